"""The tables of a report, as rows of texts: for the terminal, for Markdown and for HTML."""

import math
from dataclasses import dataclass

from .probing import STAGES
from .result import Result
from .strategies import NO_BUDGET, PLAIN
from .summary import EVERYTHING, Estimate, ratio_between


@dataclass(frozen=True)
class Table:
    """Rows of texts under a head, and a sentence on what they are."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def number(value: float | Estimate | None, spec: str = ".2f") -> str:
    plain = value.value if isinstance(value, Estimate) else value
    return "–" if plain is None or math.isnan(plain) else format(value, spec)


def overview(result: Result) -> Table:
    rows = []
    for name in result.names:
        cell, probed = result.cell(name), result.probed(name)
        rows.append(
            [
                name,
                number(cell.speed),
                number(cell.whole_speed),
                number(cell.tokens_per_second, ".1f"),
                number(cell.alpha),
                number(cell.rows, ".1f"),
                f"{cell.same} of {cell.prompts}",
                number(probed.peak_mb if probed else None, ".0f"),
            ]
        )
    note = (
        "Speed-up over plain decoding: median over prompts of the ratio pair by pair, with its 95% bootstrap "
        "interval, of decoding alone, then of whole calls. α: tokens a target pass. Rows: positions that a pass "
        "checks. Same text: answers equal to plain decoding's. Memory: median peak over what was in use before."
    )
    head = ["strategy", "speed-up", "with prefill", "tokens/s", "α", "rows", "same text", "peak MiB"]
    return Table("All prompts", note, head, rows)


def by_group(result: Result) -> Table:
    """Speed-up / α for each suite and task, as published tables have them."""
    groups = [group for group in result.groups if group != EVERYTHING]
    rows = [
        [
            name,
            *(f"{number(_value(c.speed))} / {number(_value(c.alpha))}" for c in map(result.cells[name].get, groups)),
        ]
        for name in result.names
    ]
    sizes = [f"{group} ({result.cell(PLAIN, group).prompts})" for group in groups]
    return Table("By suite and task", "Speed-up / α; in brackets, prompts.", ["strategy", *sizes], rows)


def intervals(result: Result) -> Table:
    rows = [
        [name, *(number(result.cell(name, suite).speed) for suite in result.suites)]
        for name in result.names
        if name != PLAIN
    ]
    return Table("Speed-ups with intervals", "Decoding alone.", ["strategy", *result.suites], rows)


def equality(result: Result) -> Table:
    rows = []
    for name in result.names:
        cell = result.cell(name)
        differing = cell.prompts - cell.same
        worst = f"{max(cell.gaps, key=abs):.3f}" if cell.gaps else "–"
        middle = f"{sorted(map(abs, cell.gaps))[len(cell.gaps) // 2]:.3f}" if cell.gaps else "–"
        rows.append([name, f"{cell.same} of {cell.prompts}", str(differing), middle, worst])
    note = (
        "Texts against plain decoding's. Where two part, the target's logits at that place, computed once more in "
        "one pass, prefer the plain token by so much: near 0, below it too, two tokens were tied within rounding."
    )
    return Table("Texts", note, ["strategy", "same", "differing", "median gap", "widest gap"], rows)


def stages(result: Result) -> Table | None:
    probed = {name: result.probed(name) for name in result.names}
    probed = {name: entry for name, entry in probed.items() if entry is not None and entry.stage_ms}
    if not probed:
        return None
    names = [stage for stage in STAGES if any(stage in entry.stage_ms for entry in probed.values())]
    rows = [
        [name, *(number(entry.stage_ms.get(stage, 0.0)) for stage in names), number(sum(entry.stage_ms.values()))]
        for name, entry in probed.items()
    ]
    note = "Milliseconds a cycle, of calls made again under instruments."
    return Table("Time by stage", note, ["strategy", *names, "cycle"], rows)


def overhead(result: Result) -> str | None:
    """What the loop itself costs, and how the chain of one drafter compares with Transformers' own, in words."""
    if not {"dflash", "dflash-native"} <= set(result.names):
        return None
    ratio = ratio_between(result.rows, "dflash", "dflash-native")
    probed = result.probed("dflash")
    text = f"The first drafter's chain runs at {number(ratio)} times the speed of Transformers' own DFlash loop."
    if probed is not None and probed.stage_ms:
        own = sum(probed.stage_ms.get(stage, 0.0) for stage in ("tree", "accept", "commit", "other"))
        text += f" In a cycle everything but the two models' passes takes {1000 * own:.0f} µs."
    return text


def ablation(result: Result) -> Table | None:
    """The counterpart of the paper's ablations: the same rows and columns, our figures beside its own."""
    labels = {
        "dflash": ("first drafter alone", "4.48 / 5.75"),
        "resample": ("+ K resampled branches", "5.06 / 6.08"),
        "reuse": ("first drafter reused as second", "4.69 / 6.53"),
        "d2sd": ("D²SD", "5.35 / 7.62"),
        "d2sd-3": ("+ a third level", "5.13 / 8.24"),
    }
    rows = []
    for name, (label, published) in labels.items():
        if name in result.names:
            cells = [result.cell(name, suite) for suite in result.suites] + [result.cell(name)]
            rows.append([label, *(f"{number(_value(c.speed))} / {number(_value(c.alpha))}" for c in cells), published])
    if len(rows) < 2:
        return None
    note = (
        "Speed-up / α, in the rows of the ablations of arXiv 2606.04446 (resampled branches, one drafter in both "
        "roles, a third level). Its column: Qwen3-8B on a GPU, γ = 16, drafters of five layers, mean of GSM8K, MATH, "
        "MBPP and MT-Bench. Compare the order and the steps between rows, not the figures."
    )
    return Table("The paper's ablations", note, ["", *result.suites, "all prompts", "paper, mean"], rows)


def blocks(result: Result) -> Table | None:
    """The counterpart of the published α against block size: the first drafter's chain at each γ."""
    variants = {int(name.partition("=")[2]): name for name in result.names if name.startswith("dflash:block=")}
    if not variants:
        return None
    full = result.probed("dflash")
    rows = []
    for size, name in sorted(variants.items()):
        cells = [result.cell(name, suite) for suite in result.suites] + [result.cell(name)]
        rows.append([str(size), *(f"{number(_value(c.speed))} / {number(_value(c.alpha))}" for c in cells)])
    if "dflash" in result.names:
        cells = [result.cell("dflash", suite) for suite in result.suites] + [result.cell("dflash")]
        longest = f"{max(full.accept_rates) + 1} (trained)" if full is not None and full.accept_rates else "trained"
        rows.append([longest, *(f"{number(_value(c.speed))} / {number(_value(c.alpha))}" for c in cells)])
    note = (
        "Speed-up / α of the first drafter alone, by the block γ it decodes with. Published, of drafters trained for "
        "each γ (Qwen3-8B, MATH-500 / GSM8K, α): 8: 5.04 / 5.00; 16: 6.05 / 5.95; 24: 6.01 / 6.00; 32: 5.85 / 5.93."
    )
    return Table("Block size", note, ["γ", *result.suites, "all prompts"], rows)


def headline(result: Result) -> Table | None:
    """The counterpart of a digest's four rows: tokens a second, share of drafted tokens accepted, speed-up."""
    labels = {
        PLAIN: ("plain", "45, –, 1×"),
        "dflash": ("single diffusion", "78, 38%, 1.7×"),
        "assisted": ("Draft-LLM", "95, 48%, 2.1×"),
        "d2sd": ("D²SD", "112, 55%, 2.5×"),
        "d2sd-wide": ("D²SD, wide tree", "–"),
    }
    rows = []
    for name, (label, published) in labels.items():
        if name in result.names:
            cell = result.cell(name)
            accepted = acceptance_share(result, name)
            share = "–" if accepted is None else f"{accepted:.0%}"
            rows.append([label, number(cell.tokens_per_second, ".1f"), share, f"{number(cell.speed)}×", published])
    note = (
        "Accepted: tokens of drafts that were kept, over the drafted depth. The digest's column (tokens/s, accepted, "
        "speed-up) is of a large target on a GPU, where a pass over a tree costs what a pass over one token does."
    )
    return Table("The digest's headline", note, ["", "tokens/s", "accepted", "speed-up", "digest"], rows)


def acceptance_share(result: Result, name: str) -> float | None:
    """(α - 1) over the depth that is drafted: the tree's, or the chain's length."""
    cell, probed = result.cell(name), result.probed(name)
    depth = probed.depth if probed is not None and probed.cycles else (cell.rows or 1.0) - 1
    return (cell.alpha.value - 1) / depth if cell.alpha is not None and depth > 0 and name != PLAIN else None


def environment_lines(run: dict) -> list[str]:
    about, settings = run["environment"], run["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    decoding = f"temperature {settings['temperature']}" if settings["temperature"] else "greedy"
    drafters = ", ".join(settings["drafters"]) or "none"
    machine = f"{about['gpu'] or about['processor']}, {about['threads']} threads"
    return [
        f"Target: {settings['target']}; drafters: {drafters}; draft LM: {settings['draft_lm'] or 'none'}.",
        f"{settings['dtype']}, {decoding}, at most {settings['max_new_tokens']} new tokens, seed {settings['seed']}.",
        f"{machine}; {versions}; commit {about['commit'] or 'unknown'}; {about['started']} UTC.",
    ]


def strategies(result: Result) -> Table:
    rows = []
    for name, entry in result.run["strategies"].items():
        options = {key: value for key, value in entry["options"].items() if value != NO_BUDGET}
        rows.append([name, entry["about"], ", ".join(f"{key} {value}" for key, value in options.items()) or "–"])
    note = "What each name stands for; options without their d2sd_. Width 1 without a budget: all nodes are checked."
    return Table("Strategies", note, ["strategy", "what", "options"], rows)


def all_tables(result: Result) -> list[Table]:
    """What there is to show, in order."""
    makers = (overview, by_group, intervals, equality, stages, ablation, blocks, headline, strategies)
    made = [maker(result) for maker in makers]
    return [table for table in made if table is not None and table.rows]


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value
