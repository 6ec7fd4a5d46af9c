"""From the rows of a run to its figures: medians of ratios pair by pair, acceptance lengths, and their intervals."""

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from .probing import BINS, STAGES
from .strategies import PLAIN

RESAMPLES, LEVEL = 2000, 0.95
EVERYTHING = "all"


@dataclass(frozen=True)
class Estimate:
    """A figure and the interval in which 95 of 100 bootstrap resamples of the prompts put it."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} ({self.low:{spec}}–{self.high:{spec}})"

    def agrees_with(self, other: "Estimate") -> bool:
        """Whether the intervals overlap."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Cell:
    """One strategy on one group of prompts."""

    prompts: int
    speed: Estimate | None  # median over prompts of plain decoding's time a token over this one's, prefill apart
    whole_speed: Estimate | None  # the same with the prefill: of the whole calls
    tokens_per_second: float  # median over prompts, prefill apart
    prefill_ms: float  # median
    alpha: Estimate | None  # tokens a step, the prefill's apart
    rows: float | None  # positions that a pass of the target checks
    same: int  # prompts whose text is plain decoding's
    gaps: list[float]  # where texts part: how much the target prefers the plain token, in logits


def groups_of(rows: list[dict]) -> dict[str, list[dict]]:
    """All rows, those of each suite, and those of each task of a suite that has several."""
    groups = {EVERYTHING: rows}
    for suite in dict.fromkeys(row["key"][0] for row in rows):
        mine = [row for row in rows if row["key"][0] == suite]
        groups[suite] = mine
        tasks = dict.fromkeys(row["task"] for row in mine)
        if len(tasks) > 1:
            groups |= {f"{suite}: {task}": [row for row in mine if row["task"] == task] for task in tasks}
    return groups


def summarize(rows: list[dict], names: list[str]) -> dict[str, dict[str, Cell]]:
    """By strategy and group."""
    groups = groups_of(rows)
    return {name: {group: _cell(mine, name) for group, mine in groups.items()} for name in names}


def _cell(rows: list[dict], name: str) -> Cell:
    mine = [row["strategies"][name] for row in rows]
    speeds = [row["decoded"] / row["decode_seconds"] for row in mine if row["decoded"] > 0]
    passes = sum(row["passes"] or 0 for row in mine)
    return Cell(
        prompts=len(rows),
        speed=_median(ratios(rows, name)),
        whole_speed=_median(whole_ratios(rows, name)),
        tokens_per_second=float(np.median(speeds)) if speeds else float("nan"),
        prefill_ms=1000 * float(np.median([row["prefill_seconds"] for row in mine])),
        alpha=_ratio([row["decoded"] for row in mine], [row["steps"] for row in mine]),
        rows=sum(row["rows"] or 0 for row in mine) / passes if passes else None,
        same=sum(row["same"] for row in mine),
        gaps=sorted(row["parts"]["gap"] for row in mine if (row.get("parts") or {}).get("gap") is not None),
    )


def ratios(rows: list[dict], name: str) -> list[float]:
    """Prompt by prompt, plain decoding's time for a token over the strategy's."""
    pairs = [(row["strategies"][PLAIN], row["strategies"][name]) for row in rows if name in row["strategies"]]
    return [_seconds_a_token(plain) / _seconds_a_token(its) for plain, its in pairs if _decoded(plain, its)]


def whole_ratios(rows: list[dict], name: str) -> list[float]:
    """Prompt by prompt the same for whole calls, prefill included."""
    pairs = [(row["strategies"][PLAIN], row["strategies"][name]) for row in rows if name in row["strategies"]]
    return [_call_seconds(plain) / _call_seconds(its) for plain, its in pairs if _decoded(plain, its)]


def _decoded(*cells: dict) -> bool:
    return all(cell["decoded"] > 0 for cell in cells)


def _seconds_a_token(cell: dict) -> float:
    return cell["decode_seconds"] / cell["decoded"]


def _call_seconds(cell: dict) -> float:
    return (cell["prefill_seconds"] + cell["decode_seconds"]) / cell["tokens"]


def ratio_between(rows: list[dict], name: str, other: str) -> Estimate | None:
    """Median over prompts of `other`'s time for a token over that of `name`."""
    pairs = [(row["strategies"][other], row["strategies"][name]) for row in rows]
    return _median([_seconds_a_token(a) / _seconds_a_token(b) for a, b in pairs if _decoded(a, b)])


def _median(values: list[float]) -> Estimate | None:
    if not values:
        return None
    values = np.asarray(values)
    return _estimate(float(np.median(values)), np.median(values[_resamples(len(values))], axis=1))


def _ratio(tops: list[float], bottoms: list[float]) -> Estimate | None:
    """Of two sums over prompts."""
    tops, bottoms = np.asarray(tops, dtype=float), np.asarray(bottoms, dtype=float)
    if bottoms.sum() == 0:
        return None
    chosen = _resamples(len(tops))
    resampled = tops[chosen].sum(1) / np.maximum(bottoms[chosen].sum(1), 1)
    return _estimate(float(tops.sum() / bottoms.sum()), resampled)


def _resamples(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(count, size=(RESAMPLES, count))


def _estimate(value: float, resampled: np.ndarray) -> Estimate:
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))


@dataclass(frozen=True)
class Instruments:
    """What the probed calls of one strategy tell, added up."""

    cycles: int
    stage_ms: dict[str, float]  # a cycle
    committed: dict[int, float]  # share of cycles by tokens committed
    accept_rates: dict[int, float]  # by depth: of the cycles whose tree came so far, those whose path did
    depth: float  # mean depth of the trees
    sources: dict[str, float]  # share of tokens
    reliability: dict[str, list[list[float]]]  # by source and bin: nodes, mean confidence, share that held
    boundaries: list[tuple[float, float]]  # by i: share of cycles that accepted exactly i, mean r(i)
    peak_mb: float | None  # median over calls

    def calibration_error(self, source: str) -> float | None:
        """Expected calibration error: the bins' distances between confidence and truth, by their share of nodes."""
        bins = [entry for entry in self.reliability.get(source, []) if entry[0]]
        total = sum(entry[0] for entry in bins)
        return sum(entry[0] * abs(entry[1] - entry[2]) for entry in bins) / total if total else None


def instruments(probes: list[dict], name: str) -> Instruments | None:
    """`None` for a strategy that was not probed."""
    mine = [row["strategies"][name] for row in probes if name in row["strategies"]]
    if not mine:
        return None
    stats = [entry["stats"] for entry in mine if entry["stats"]]
    cycles = sum(entry["cycles"] for entry in stats)
    offered, accepted = (_summed(stats, field) for field in ("offered", "accepted"))
    committed, sources = (_summed(stats, field) for field in ("committed", "sources"))
    peaks = [entry["peak_bytes"] for entry in mine if entry["peak_bytes"] is not None]
    seconds = _summed(mine, "seconds")
    written = sum(sources.values())
    return Instruments(
        cycles=cycles,
        stage_ms={stage: 1000 * seconds[stage] / cycles for stage in STAGES if stage in seconds} if cycles else {},
        committed={int(size): count / cycles for size, count in sorted(committed.items(), key=lambda x: int(x[0]))},
        accept_rates={
            int(d): accepted.get(d, 0) / count for d, count in sorted(offered.items(), key=lambda x: int(x[0]))
        },
        depth=sum(offered.values()) / cycles if cycles else float("nan"),
        sources={source: count / written for source, count in sources.items()},
        reliability=_reliability(stats),
        boundaries=_boundaries(stats),
        peak_mb=float(np.median(peaks)) / 2**20 if peaks else None,
    )


def _summed(entries: list[dict], field: str) -> Counter:
    """Of one counter in many entries; keys are texts, as JSON has them."""
    total: Counter = Counter()
    for entry in entries:
        for key, value in entry[field].items():
            total[str(key)] += value
    return total


def _reliability(stats: list[dict]) -> dict[str, list[list[float]]]:
    sums = defaultdict(lambda: np.zeros((BINS, 3)))
    for entry in stats:
        for source, bins in entry["reliability"].items():
            sums[source] += np.asarray(bins)
    return {
        source: [[n, total / n, held / n] if n else [0, 0.0, 0.0] for n, total, held in bins.tolist()]
        for source, bins in sums.items()
    }


def _boundaries(stats: list[dict]) -> list[tuple[float, float]]:
    longest = max((len(entry["boundaries"]) for entry in stats), default=0)
    sums = np.zeros((longest, 2))
    for entry in stats:
        if entry["boundaries"]:
            sums[: len(entry["boundaries"])] += np.asarray(entry["boundaries"])
    cycles = sums[:, 0].sum()
    return [(seen / cycles, expected / cycles) for seen, expected in sums.tolist()] if cycles else []
