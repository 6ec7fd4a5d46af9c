"""`hf-d2sd card`: a model card from a pair's files, result files and what its author wrote."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from ..checks import refuse_missing_file, refuse_unwritable_file
from ..modeling import D2SDConfig, D2SDDrafterConfig
from ..modeling.weights_d2sd import find_weights, read_header

TEMPLATE = Path(__file__).with_name("template.md")
TAGS = ["speculative-decoding", "assisted-generation", "d2sd", "dflash"]
METRIC = "mean_acceptance_length"
_SETS = {  # prompt files of the benchmarks: title, data set
    "gsm8k": ("GSM8K", "openai/gsm8k"),
    "humaneval": ("HumanEval", "openai/openai_humaneval"),
    "spec_bench": ("Spec-Bench", "spec-bench"),
}
_SUMMARY = {"mean of files": "mean", "speed-up": "speed-up", "nodes a pass": "nodes a pass"}


@dataclass
class CardOptions:
    """Write the model card of a folder with a pair or a drafter."""

    model: Path = field(metadata={"help": "folder of the pair or drafter"})
    out: Path = field(metadata={"help": "the card, README.md of that folder for example"})
    base_model: str = field(metadata={"help": "Hub id of the target"})
    repo: str | None = field(default=None, metadata={"help": "Hub id or folder that the card's code names"})
    results: list[Path] = field(default_factory=list, metadata={"help": "result files of the benchmarks, JSON"})
    strategy: str | None = field(
        default=None, metadata={"help": "the pair's own in the result files; default: the last"}
    )
    details: Path | None = field(default=None, metadata={"help": "Markdown by hand: data, recipe, limits"})
    license: str = "apache-2.0"
    language: str = "en"
    datasets: list[str] = field(default_factory=list, metadata={"help": "Hub ids of data that was learned from"})
    title: str | None = None
    chat: bool = field(default=True, metadata={"help": "whether the target has a chat template"})


@dataclass(frozen=True)
class Results:
    """Tokens a target pass of several strategies, as a table; the last strategy is the pair's own."""

    file: str
    about: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]
    own: dict[str, float]  # by prompt file


def card(options: CardOptions) -> dict:
    """Write the card; returns where it is, and what it reports.

    Raises:
        ValueError: for a folder without a drafter, or a result file that is none.
    """
    refuse_unwritable_file("--out", options.out, makes_folder=True)
    refuse_missing_file("--details", options.details)
    for file in options.results:
        refuse_missing_file("--results", file)
    results = [read_results(file, options.strategy) for file in options.results]
    made = make_card(options, results)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    made.save(options.out)
    return {"out": str(options.out), "results": {result.file: result.own for result in results}}


def make_card(options: CardOptions, results: list[Results]) -> ModelCard:
    config = read_config(options.model)
    name = options.title or f"D²SD drafters for {options.base_model.split('/')[-1]}"
    data = ModelCardData(
        base_model=options.base_model,
        datasets=options.datasets or None,
        eval_results=[entry for result in results for entry in eval_results(result)] or None,
        language=options.language,
        library_name="transformers",
        license=options.license,
        metrics=[METRIC] if results else None,
        model_name=(options.repo or options.model.name).split("/")[-1],
        pipeline_tag="text-generation",
        tags=TAGS,
    )
    pair = isinstance(config, D2SDConfig)
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=name,
        repo=options.repo or str(options.model),
        chat=options.chat,
        pair=config if pair else None,
        drafters=describe_drafters(options.model, config),
        results=results,
        details=options.details.read_text(encoding="utf-8").strip() if options.details else "",
    )


def read_config(folder: Path) -> D2SDConfig | D2SDDrafterConfig:
    """Of a pair or a drafter in this library's layout.

    Raises:
        ValueError: for a folder that holds neither.
    """
    kinds = {"d2sd": D2SDConfig, "d2sd_drafter": D2SDDrafterConfig}
    model_type = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    if model_type not in kinds:
        raise ValueError(f"{folder} is no pair and no drafter of this library: its model_type is {model_type!r}.")
    return kinds[model_type].from_pretrained(folder)


def describe_drafters(folder: Path, config: D2SDConfig | D2SDDrafterConfig) -> list[tuple[str, list[str]]]:
    """Rows of the card's table: what, and its value for each drafter; sizes are those in the weight files."""
    drafters = {"drafter": config}
    if isinstance(config, D2SDConfig):
        drafters = {role: getattr(config, role) for role in ("first", "second") if getattr(config, role) is not None}
    sizes = dict.fromkeys(drafters, 0)
    for file in find_weights(folder):
        for name, (_, shape) in read_header(file).items():
            if not name.endswith("draft_token_ids"):
                sizes[name.split(".")[0] if "drafter" not in drafters else "drafter"] += math.prod(shape)
    each = list(drafters.values())
    return [
        ("", list(drafters)),
        ("parameters", [f"{size / 1e6:.1f} million" for size in sizes.values()]),
        ("block, γ", [str(one.block_size) for one in each]),
        ("layers", [str(one.num_hidden_layers) for one in each]),
        (
            "width, heads, key-value heads",
            [f"{one.hidden_size}, {one.num_attention_heads}, {one.num_key_value_heads}" for one in each],
        ),
        ("features of the target's layers", [", ".join(map(str, one.target_layer_ids)) for one in each]),
        ("mask token", [str(one.mask_token_id) for one in each]),
        ("draft vocabulary", [f"{one.draft_vocab_size:,}" if one.draft_vocab_size else "all" for one in each]),
        ("confidences calibrated", ["yes" if one.confidence_temperatures else "no" for one in each]),
    ]


def read_results(file: Path, strategy: str | None = None) -> Results:
    """The summary of `hf-d2sd bench`, or a result file of `benchmarks/acceptance.py`.

    Args:
        strategy: which row is the pair's own; the last one by default.

    Raises:
        ValueError: for a file without strategies, or without the named one.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        strategies = _of_summary(content["cells"]) if "cells" in content else _of_acceptance(content["strategies"])
        settings = content.get("settings", content)
        about = [f"{key} {settings[key]}" for key in ("dtype", "max_new_tokens") if key in settings]
        about += [content["environment"]["processor"]] if "environment" in content else []
        last = list(strategies)[-1]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{file} is no result file with strategies: {error!r}.") from error
    if (strategy or last) not in strategies:
        raise ValueError(f"{file} has no strategy {strategy!r}; it has {', '.join(strategies)}.")
    own = strategies.pop(strategy or last)
    strategies[strategy or last] = own
    suites = sorted(name for name in own if name not in _SUMMARY)
    shown = suites + [name for name in _SUMMARY if name in own]
    rows = [(name, [_number(values.get(column), column) for column in shown]) for name, values in strategies.items()]
    columns = [_title(column) for column in shown]
    return Results(file.name, "; ".join(about).replace("_", " "), columns, rows, {name: own[name] for name in suites})


def _of_acceptance(strategies: dict) -> dict[str, dict[str, float]]:
    """By strategy the numbers of each prompt file, and the summary's; tasks of a file are left out."""
    wanted = {name for values in strategies.values() for name in values if name.endswith("_dev") or name in _SUMMARY}
    return {
        name: {key: value for key, value in values.items() if key in wanted} for name, values in strategies.items()
    }


def _of_summary(cells: dict) -> dict[str, dict[str, float]]:
    """The same of a benchmark's cells, and the speed-up; plain decoding, of one token a pass, is left out."""
    read = {}
    for name, groups in cells.items():
        suites = {group: cell["alpha"] for group, cell in groups.items() if group != "all" and ": " not in group}
        every = groups["all"]
        found = {**suites, "mean of files": every["alpha"], "speed-up": every["speed"]}
        values = {key: estimate["value"] for key, estimate in found.items() if estimate is not None}
        read[name] = values | ({"nodes a pass": every["rows"]} if every["rows"] is not None else {})
    return {name: values for name, values in read.items() if name != "ar"}


def _title(column: str) -> str:
    return _SUMMARY.get(column) or _SETS.get(re.sub("_dev$", "", column), (column,))[0]


def _number(value: float | None, column: str) -> str:
    return "" if value is None else f"{value:.1f}" if column == "nodes a pass" else f"{value:.2f}"


def eval_results(results: Results) -> list[EvalResult]:
    """What the Hub shows beside the card: the pair's own numbers."""
    entries = []
    for name, value in results.own.items():
        title, dataset = _SETS.get(re.sub("_dev$", "", name), (name, name))
        entries.append(
            EvalResult(
                task_type="text-generation",
                task_name="Speculative decoding",
                dataset_type=dataset,
                dataset_name=title,
                metric_type=METRIC,
                metric_name="Tokens a target pass",
                metric_value=value,
            )
        )
    return entries
