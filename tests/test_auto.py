"""Cycles that are chosen by what pays: the text is plain decoding's, whatever is chosen and whenever it changes."""

import json
import math
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_batch import mostly_right
from tiny import OracleDrafts, prompt, tiny_assistant, tiny_drafter, tiny_target
from transformers import GenerationConfig

from hf_d2sd import D2SDAssistant
from hf_d2sd.costs import FIRST, ONCE, PARTS, PASS, REST, SECOND, Costs, Tally, costs_of
from hf_d2sd.growing import State
from hf_d2sd.modeling import CACHE_NAME
from hf_d2sd.options import settle
from hf_d2sd.paying import Pace, weights

NEW = 40


def fresh_pair(*sizes) -> D2SDAssistant:
    first, second = sizes or (4, 6)
    return D2SDAssistant.from_drafters(tiny_drafter(first), tiny_drafter(second, seed=1))


def machine(step: float = 0.01, first: float = 0.2, second: float = 0.2, node: float = 0.03, rest: float = 0.05):
    """A clock that goes on by what the parts of a cycle take on a machine with such costs, in plain steps.

    The parts themselves take no time on it: `Ticking` moves it on by what is marked.
    """

    def cost(part) -> float:
        name, size = part
        return (
            step
            * {
                FIRST: first,
                SECOND: second * (1 + 0.5 * (size - 1)),
                PASS: 0.9 + node * (size - 1),
                REST: rest,
                ONCE: first,
            }[name]
        )

    return cost


class Ticking:
    """A stand-in for `Stopwatch`, on which parts take what a machine says."""

    def __init__(self, cost, noise: float = 0.0, seed: int = 0):
        self.cost, self.noise, self.random = cost, noise, random.Random(seed)
        self.ready, self.parts = [], {}

    def start(self):
        self.parts = {}

    def mark(self, name, size=1):
        if name != REST:
            slower = 1 + self.noise * self.random.expovariate(1.0)
            self.parts[name, size] = self.cost((name, size)) * slower

    def stop(self):
        self.parts[REST, 1] = self.cost((REST, 1)) * (2 if list(self.parts) == [(PASS, 1)] else 1)
        self.ready.append(self.parts)

    def finished(self):
        done, self.ready = self.ready, []
        return done


@pytest.fixture
def on_machine(monkeypatch):
    """Let calls see the times of some machine."""

    def use(**changes):
        noise = changes.pop("noise", 0.0)
        monkeypatch.setattr("hf_d2sd.calling.Stopwatch", lambda device: Ticking(machine(**changes), noise))

    return use


def by_chance(monkeypatch, seed: int) -> None:
    """Let dice say, in each cycle, whether it drafts, with how many branches, and how many nodes are checked."""
    dice = random.Random(seed)

    def drafts(pace, reach, has_drafter):
        pace._kind = dice.choice(["plain", "first"]) if has_drafter else "plain"
        return pace._kind == "first"

    def branches(pace, reach):
        count = dice.choice([0, *pace._counts])
        pace._kind = "both" if count else "first"
        return count

    def nodes(pace, reach):
        return dice.choice([size for size in pace._sizes if size <= len(reach) + 1])

    for function in (drafts, branches, nodes):
        monkeypatch.setattr(Pace, function.__name__, function)


def both(target, ids, assistant, **options):
    options = dict(do_sample=False, max_new_tokens=NEW, **options)
    plain = target.generate(ids, **options)
    return plain, target.generate(ids, **options, assistant_model=assistant, d2sd_auto=True)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt_oss"])
def test_the_text_is_plain_decodings(family, monkeypatch):
    target, ids, assistant = tiny_target(family), prompt(9), fresh_pair()
    expected = target.generate(ids, do_sample=False, max_new_tokens=NEW)
    OracleDrafts(monkeypatch, expected[0], 0.8, seed=3)
    for _ in range(3):
        got = target.generate(ids, do_sample=False, max_new_tokens=NEW, assistant_model=assistant, d2sd_auto=True)
        assert got.tolist() == expected.tolist()
    assert assistant.last_stats.decisions.kinds.total() == assistant.last_stats.cycles


def test_it_is_the_default_unless_the_call_says_how_trees_are():
    assistant, unset = fresh_pair(), GenerationConfig(d2sd_auto=None)
    options = settle(assistant, unset)
    assert options.auto and (options.num_branches, options.tree_budget, options.tree_width) == (4, 64, 8)
    for name, value in dict(num_branches=2, tree_budget=8, tree_width=1, levels=3, branch_source="samples").items():
        assert not settle(assistant, GenerationConfig(**{"d2sd_auto": None, f"d2sd_{name}": value})).auto
    recorded = settle(assistant, GenerationConfig(d2sd_auto=None, d2sd_compile=True))
    assert recorded.auto and [shape.redrafts for shape in recorded.shapes] == [False, False, True]
    assert [shape.tree_size for shape in recorded.shapes] == [1, 4, 26] and not any(s.auto for s in recorded.shapes)
    given = settle(assistant, GenerationConfig(d2sd_auto=None, d2sd_compile=True, d2sd_num_branches=2))
    assert not given.auto and given.shapes == [given]
    fixed = settle(assistant, GenerationConfig(d2sd_auto=False))
    assert (fixed.auto, fixed.num_branches, fixed.tree_budget, fixed.tree_width) == (False, 4, None, 1)
    bounded = settle(assistant, GenerationConfig(d2sd_auto=True, d2sd_tree_budget=12, d2sd_num_branches=1))
    assert (bounded.auto, bounded.num_branches, bounded.tree_budget) == (True, 1, 12)


@pytest.mark.parametrize("bad", [dict(d2sd_levels=3), dict(d2sd_branch_source="samples")])
def test_what_fixes_the_shape_of_trees_does_not_go_with_it(bad):
    with pytest.raises(ValueError, match="d2sd_auto"):
        tiny_target().generate(prompt(5), assistant_model=tiny_assistant(), d2sd_auto=True, max_new_tokens=4, **bad)


@pytest.fixture
def switching(monkeypatch):
    """Calls that are on for three cycles and off for four, with trees of all sizes and any number of branches."""

    def turn(pace) -> int:
        return pace.decisions.kinds.total()

    def drafts(pace, reach, has_drafter):
        pace._kind = "first" if turn(pace) % 7 > 3 else "plain"
        return pace._kind == "first"

    def branches(pace, reach):
        pace._kind = "both" if turn(pace) % 3 else "first"
        return turn(pace) % 3

    monkeypatch.setattr(Pace, "drafts", drafts)
    monkeypatch.setattr(Pace, "branches", branches)
    monkeypatch.setattr(Pace, "nodes", lambda pace, reach: (6, 2, 1, 9)[turn(pace) % 4] if reach else 1)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("rows", [1, 3])
def test_switching_on_and_off_in_the_middle_of_a_row_changes_no_token(family, rows, switching, monkeypatch):
    target, ids = tiny_target(family), torch.cat([prompt(9, seed) for seed in range(rows)])
    expected = torch.cat([target.generate(row[None], do_sample=False, max_new_tokens=NEW) for row in ids])
    if rows == 1:
        OracleDrafts(monkeypatch, expected[0], 0.9, seed=2)
    assistant = fresh_pair()
    got = target.generate(ids, do_sample=False, max_new_tokens=NEW, assistant_model=assistant, d2sd_auto=True)
    assert got.tolist() == expected.tolist()
    kinds = assistant.last_stats.decisions.kinds
    assert kinds["plain"] > 3 and kinds["first"] + kinds["both"] > 3, kinds


def test_a_batch_of_ragged_rows_and_ends_is_plain_decodings(on_machine):
    on_machine(first=0.05, second=0.05, node=0.01)
    target, assistant = tiny_target("llama"), fresh_pair()
    prompts = [prompt(length, length)[0] for length in (4, 9, 9, 13)]
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in prompts])
    options = dict(do_sample=False, max_new_tokens=24, eos_token_id=[5, 7], pad_token_id=0)
    alone = [target.generate(row[None], **options)[0, len(row) :].tolist() for row in prompts]
    got = target.generate(ids, attention_mask=mask, **options, assistant_model=assistant, d2sd_auto=True)
    for row, expected in zip(got[:, width:].tolist(), alone):
        assert row[: len(expected)] == expected and set(row[len(expected) :]) <= {0}


def test_sampling_gives_the_text_of_the_seed(on_machine, monkeypatch):
    on_machine(first=0.02, second=0.02, node=0.005)
    target, ids, assistant = tiny_target("qwen3"), prompt(7), fresh_pair()
    for seed in range(5):
        options = dict(do_sample=True, temperature=0.9, top_k=12, max_new_tokens=NEW)
        torch.manual_seed(seed)
        expected = target.generate(ids, **options)
        torch.manual_seed(seed)
        got = target.generate(ids, **options, assistant_model=assistant, d2sd_auto=True)
        assert got.tolist() == expected.tolist()


def test_turns_go_on_from_a_cache_that_plain_steps_and_trees_filled(on_machine, monkeypatch):
    on_machine(first=0.05, second=0.05, node=0.01)
    target, assistant = tiny_target("llama"), fresh_pair()
    ids, cache, plain_ids = prompt(9), None, prompt(9)
    for turn in range(3):
        expected = target.generate(plain_ids, do_sample=False, max_new_tokens=12)
        with pytest.MonkeyPatch.context() as patch:
            OracleDrafts(patch, expected[0], 0.8, seed=turn)
            out = target.generate(
                ids,
                do_sample=False,
                max_new_tokens=12,
                assistant_model=assistant,
                d2sd_auto=True,
                return_dict_in_generate=True,
                **({} if cache is None else {CACHE_NAME: cache}),
            )
        assert out.sequences.tolist() == expected.tolist()
        cache = out[CACHE_NAME]
        ids = plain_ids = torch.cat([expected, prompt(4, 50 + turn)], dim=1)


# Rows of a batch -----------------------------------------------------------------------------------------------------


def test_what_rows_promise_and_what_comes_of_it_count_by_their_weights(on_machine, monkeypatch):
    """In real calls, against sums that are made one row after the other."""
    on_machine(first=0.05, second=0.05, node=0.005)
    target, ids = tiny_target("llama"), torch.cat([prompt(9, seed) for seed in range(4)])
    sequences = target.generate(ids, do_sample=False, max_new_tokens=60, pad_token_id=0)
    mostly_right(monkeypatch, sequences[:, 9:].tolist(), [9] * 4)
    begin, reach, end, add, given, uneven = Pace.begin, State.reach, Pace.end, Tally.add, {}, []

    def noting_begin(pace, emitted, length, rooms):
        assert [room + count for room, count in zip(rooms, emitted, strict=True)] == [60] * len(emitted)
        begin(pace, emitted, length, rooms)
        given.update(pace=pace, weights=weights(rooms, emitted, pace.table.share_of_rows))
        uneven.append(max(given["weights"]) - min(given["weights"]))

    def noting_reach(state, candidates):
        found = reach(state, candidates)
        if candidates is not None:
            sums = [0.0] * len(found)
            for weight, scores, there, deep, room in zip(
                given["weights"],
                candidates.scores.tolist(),
                candidates.exists.expand_as(candidates.scores).tolist(),
                candidates.depths.expand_as(candidates.scores).tolist(),
                state.rooms,
            ):
                row = [math.exp(s) if t and d < room else 0.0 for s, t, d in zip(scores, there, deep)]
                sums = [one + weight * other for one, other in zip(sums, sorted(row, reverse=True), strict=True)]
            assert found == pytest.approx(sums, abs=1e-4)
        return found

    def noting_end(pace, emitted):
        came = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tally, "add", lambda tally, of, to: (came.append(of), add(tally, of, to)))
            end(pace, emitted)
        accepted = sum(weight * (count - 1) for weight, count in zip(given["weights"], emitted, strict=True))
        if len(came) > 1:  # a plain step says nothing of drafts
            assert came[:2] == pytest.approx([accepted] * 2)

    monkeypatch.setattr(Pace, "begin", noting_begin)
    monkeypatch.setattr(State, "reach", noting_reach)
    monkeypatch.setattr(Pace, "end", noting_end)
    options = dict(do_sample=False, max_new_tokens=60, pad_token_id=0, d2sd_auto=True, d2sd_context=0)
    out = target.generate(ids, assistant_model=fresh_pair(), **options)
    assert out.tolist() == sequences.tolist() and max(uneven) > 0.5


# Decisions -----------------------------------------------------------------------------------------------------------


def run(assistant, ids, target, sequence, accuracy, new, confidence=0.9):
    """The decisions of a call in which so many of the drafted tokens are right."""
    with pytest.MonkeyPatch.context() as patch:
        OracleDrafts(patch, sequence, accuracy, confidence, seed=1)
        options = {"d2sd_auto": True, "d2sd_context": 0}  # of drafts alone
        got = target.generate(ids, do_sample=False, max_new_tokens=new, assistant_model=assistant, **options)
    assert got[0].tolist() == sequence.tolist()
    return assistant.last_stats.decisions


@pytest.fixture(scope="module")
def long_text():
    target, ids = tiny_target("llama"), prompt(9)
    return target, ids, target.generate(ids, do_sample=False, max_new_tokens=200)[0]


def test_drafts_that_are_always_wrong_are_switched_off_and_cost_little(long_text, on_machine):
    on_machine()
    target, ids, sequence = long_text
    decisions = run(assistant := fresh_pair(), ids, target, sequence, 0.0, 200)
    assert decisions.kinds["plain"] > 0.8 * decisions.kinds.total(), decisions
    assert decisions.measured <= 1.035 * 200, decisions
    assert decisions.reasons["drafts do not pay here"] > 100
    again = run(assistant, ids, target, sequence, 0.0, 200)
    assert again.measured <= 1.03 * 200, again


def test_good_drafts_stay_on(long_text, on_machine):
    on_machine()
    target, ids, sequence = long_text
    assistant = fresh_pair()
    run(assistant, ids, target, sequence, 0.95, 200)
    decisions = run(assistant, ids, target, sequence, 0.95, 200)
    assert decisions.kinds["plain"] < 0.2 * decisions.kinds.total(), decisions
    assert decisions.measured < 0.75 * 200, decisions


def test_a_second_drafter_that_costs_more_than_it_yields_is_left_out(long_text, on_machine):
    target, ids, sequence = long_text
    shares = []
    for second in (0.02, 5.0):
        on_machine(second=second)
        assistant = fresh_pair()
        for _ in range(3):
            decisions = run(assistant, ids, target, sequence, 0.95, 200, confidence=0.95)
        shares.append(decisions.kinds["both"] / decisions.kinds.total())
    assert shares[0] > 0.2 > 0.05 > shares[1], shares


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_costs_are_predicted_within_fifteen_percent_after_64_cycles(long_text, on_machine, noise):
    """On a machine whose costs are far from what was guessed, and now and then slower."""
    on_machine(first=0.4, second=0.1, node=0.06, rest=0.15, noise=noise)
    target, ids, sequence = long_text
    assistant = fresh_pair()
    while not costs_of(assistant).tables or next(iter(costs_of(assistant).tables.values())).cycles < 64:
        run(assistant, ids, target, sequence, 0.8, 200)
    decisions = run(assistant, ids, target, sequence, 0.8, 200)
    assert decisions.predicted == pytest.approx(decisions.measured, rel=0.15), decisions


def test_decisions_and_their_reasons_are_counted(long_text, on_machine):
    on_machine()
    target, ids, sequence = long_text
    assistant = fresh_pair()
    decisions = run(assistant, ids, target, sequence, 0.9, 200)
    stats = assistant.last_stats
    cycles = stats.cycles
    assert decisions.kinds.total() == decisions.nodes.total() == decisions.branches.total() == cycles
    assert (
        decisions.reasons["measuring a plain step"] >= 2
        and decisions.reasons["the first draft pays, the second would not"] > 0
    )
    assert sum(size * count for size, count in decisions.nodes.items()) >= sum(stats.tree_sizes)
    assert "both" in str(decisions) and "expected" in str(decisions)


def test_with_fixed_trees_nothing_is_decided():
    assistant = fresh_pair()
    tiny_target().generate(prompt(5), do_sample=False, max_new_tokens=8, assistant_model=assistant, d2sd_auto=False)
    assert assistant.last_stats.decisions is None and assistant.costs is None


# What is kept --------------------------------------------------------------------------------------------------------


def test_costs_are_saved_readably_and_loaded(long_text, on_machine, tmp_path):
    on_machine()
    target, ids, sequence = long_text
    assistant = fresh_pair()
    with pytest.raises(ValueError, match="generate"):
        assistant.save_costs(tmp_path / "costs.json")
    run(assistant, ids, target, sequence, 0.9, 200)
    assistant.save_costs(tmp_path / "costs.json")
    entry = json.loads((tmp_path / "costs.json").read_text())["costs"][0]
    assert entry["rows"] == 1 and set(entry["parts"]) == set(PARTS)
    other = fresh_pair()
    other.load_costs(tmp_path / "costs.json")
    decisions = run(other, ids, target, sequence, 0.9, 200)
    assert decisions.reasons["measuring a plain step"] == 0, "what was loaded is known"
    assert str(costs_of(assistant)).startswith("LlamaForCausalLM 4x32x24, float32, cpu, 1 threads, 1 rows")


def test_eight_threads_share_costs(long_text):
    target, ids, sequence = long_text
    assistant = fresh_pair()

    def call(seed: int) -> list[int]:
        options = dict(do_sample=False, max_new_tokens=24, d2sd_auto=True, assistant_model=assistant)
        return target.generate(ids[:, : 4 + seed % 5], **options)[0].tolist()

    expected = [
        target.generate(ids[:, :length], do_sample=False, max_new_tokens=24)[0].tolist() for length in range(4, 9)
    ]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(call, range(40))) == [expected[seed % 5] for seed in range(40)]
    table = next(iter(costs_of(assistant).tables.values()))
    assert len(costs_of(assistant).tables) == 1 and table.cycles > 40
    assert (
        Costs.from_dict(json.loads(json.dumps(costs_of(assistant).as_dict()))).as_dict()
        == costs_of(assistant).as_dict()
    )


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("accuracy", [0.0, 0.95])
def test_real_costs_are_predicted_within_fifteen_percent(threads, accuracy, long_text):
    """By this machine's clock, in the middle one of seven calls: of one, what else the machine does may say more."""
    target, ids, sequence = long_text
    assistant, ratios = fresh_pair(), []
    torch.set_num_threads(threads)
    for _ in range(10):
        decisions = run(assistant, ids, target, sequence, accuracy, 200)
        ratios.append(decisions.predicted / decisions.measured)
    assert next(iter(costs_of(assistant).tables.values())).cycles >= 64
    assert sorted(ratios[3:])[3] == pytest.approx(1.0, abs=0.15), ratios
