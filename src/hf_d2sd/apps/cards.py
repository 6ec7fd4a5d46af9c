"""What a drafter's model card says of its acceptance length."""

import re
import statistics
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

_METRIC = re.compile(r"accept\w*[ _-]length|tokens[ _](a|per)[ _](target[ _])?pass", re.I)
_COLUMNS = ("mean", "mean acceptance length", "acceptance length", "tokens a pass", "tokens a target pass")


def read_card(name: str) -> ModelCard | None:
    """The card in a folder or on the Hub; `None` where there is none, or it cannot be reached."""
    if Path(name).is_dir():
        path = Path(name) / "README.md"
        return ModelCard.load(path, ignore_metadata_errors=True) if path.exists() else None
    try:
        return ModelCard.load(name, ignore_metadata_errors=True)
    except (EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, OSError):
        return None


def published_acceptance(card: ModelCard) -> float | None:
    """Tokens a target pass: the mean of what the metadata lists, else of a table's bold row."""
    listed = [
        float(result.metric_value)
        for result in card.data.eval_results or []
        if _METRIC.search(f"{result.metric_type} {result.metric_name or ''}")
    ]
    return statistics.fmean(listed) if listed else _from_tables(card.text)


def _from_tables(text: str) -> float | None:
    column = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        headers = [cell.lower() for cell in cells]
        named = next((headers.index(name) for name in _COLUMNS if name in headers), None)
        if named is not None:
            column = named
        elif not cells:
            column = None
        elif column is not None and column < len(cells) and cells[0].startswith("**"):
            value = cells[column].strip("*")
            if re.fullmatch(r"\d+(\.\d+)?", value):
                return float(value)
    return None
