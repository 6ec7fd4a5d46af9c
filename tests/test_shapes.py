"""Recorded cycles of several shapes: what is chosen among them, and that no token depends on it."""

import pytest
import torch
from recorded import NoHost, Truth, decode, new_pair, recorded_of, without_cuda
from test_auto import Ticking
from test_batch import ends_of, pad, prompts
from test_captured import assert_same_cache, captured, copies, plain_texts
from tiny import prompt

from hf_d2sd import graphs
from hf_d2sd.costs import PASS, REST
from hf_d2sd.modeling import CACHE_NAME
from hf_d2sd.paying import ShapePace


@pytest.fixture
def any_shape(monkeypatch):
    """Each shape follows each."""

    def choose(pace, allowed):
        turn = (0, 1, 1, 2, 0, 0, 2, 2, 1, 0)[pace.decisions.kinds.total() % 10]
        return max(turn, allowed[0]), "in turns"

    monkeypatch.setattr(ShapePace, "_choose", choose)


def recorded_pair(**changes):
    pair = new_pair(**changes)
    pair.compile(backend=None)
    return pair


@pytest.mark.parametrize("ahead", ["late", "at once"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("options", [{}, dict(d2sd_tree_width=3, d2sd_tree_budget=14)], ids=["paper", "wide"])
def test_whatever_shapes_are_chosen_the_text_is_plain_decodings(family, options, ahead, any_shape, monkeypatch):
    if ahead == "late":
        without_cuda(monkeypatch)
    text = plain_texts(family, [prompt(9)[0]], new=110)
    Truth(monkeypatch, text, accuracy=0.9)
    pair = recorded_pair()
    for _ in range(2):
        assert decode(pair, prompt(9), family, 110, d2sd_auto=True, **options).tolist() == text
        kinds = pair.last_stats.decisions.kinds
        assert min(kinds[kind] for kind in ("plain", "first", "both")) > 1, kinds
        assert kinds.total() == pair.last_stats.cycles - 1, "the first reads the prompt and is not chosen"
        assert max(pair.last_stats.committed_per_cycle) >= 3
    assert len(pair._recorded) == 1 and len(recorded_of(pair).cycles) == 3


def test_a_ragged_batch_whose_rows_end_early(any_shape, monkeypatch):
    without_cuda(monkeypatch)
    rows, (truths, eos) = prompts(5, 2), ends_of("llama", 5, 2)
    Truth(monkeypatch, [row.tolist() + truth for row, truth in zip(rows, truths)])
    pair, options = recorded_pair(), dict(eos_token_id=eos, return_dict_in_generate=True)
    plain = decode(None, pad(rows), "llama", 20, **options)
    ours = decode(pair, pad(rows), "llama", 20, d2sd_auto=True, **options)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    assert_same_cache(ours[CACHE_NAME], plain[CACHE_NAME], plain.sequences, pad(rows)["attention_mask"])


@pytest.mark.parametrize(
    "shapes", [[0] * 25, [1] * 6, [0, 1, 0, 0, 2, 0, 1, 1, 0, 2, 0]], ids=["plain", "first", "all"]
)
def test_drafters_that_listened_know_what_they_would_have_read(shapes, monkeypatch):
    """Keys and values of their contexts, once they have read on in a turn that is decoded as always."""
    contexts, text = {}, plain_texts("llama", [prompt(9)[0]], new=60)
    turns = iter(shapes * 9)
    monkeypatch.setattr(ShapePace, "_choose", lambda pace, allowed: (max(next(turns), allowed[0]), "as told"))
    ends = lambda ids, scores: torch.tensor([ids.shape[1] >= 33])  # noqa: E731
    for compiles in (False, True):
        pair = recorded_pair()
        with monkeypatch.context() as patch:
            Truth(patch, text, accuracy=0.95)
            first = dict(d2sd_compile=compiles, d2sd_auto=compiles, return_dict_in_generate=True)
            out = decode(pair, prompt(9), new=60, stopping_criteria=[ends], **first)
            assert out.sequences.tolist() == [text[0][:33]]
            turn = dict(d2sd_compile=False, return_dict_in_generate=True, **{CACHE_NAME: out[CACHE_NAME]})
            out = decode(pair, out.sequences, new=9, **turn)
        contexts[compiles] = out[CACHE_NAME]._d2sd_contexts[1]
    for ours, eager in zip(contexts[True], contexts[False], strict=True):
        assert ours.positions == eager.positions and ours.cache.lengths == eager.cache.lengths
        for one, other in zip(ours.cache.layers, eager.cache.layers, strict=True):
            torch.testing.assert_close(one.keys, other.keys, atol=1e-4, rtol=1e-4)


def test_a_drafter_reads_on_before_it_has_no_room_to_listen(monkeypatch):
    without_cuda(monkeypatch)
    least = []
    monkeypatch.setattr(ShapePace, "_choose", lambda pace, allowed: (least.append(allowed[0]) or allowed[0], "least"))
    text = plain_texts("llama", [prompt(9)[0]], new=150)
    pair = recorded_pair()
    assert decode(pair, prompt(9), new=150, d2sd_auto=True).tolist() == text
    assert least.count(2) >= 2 and least.count(0) > 100, least
    assert max(recorded_of(pair).state.counts).item() <= recorded_of(pair).state.waiting[0].shape[1]


@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_no_shape_asks_the_host_and_each_is_one_graph(rows):
    torch._dynamo.reset()
    recorded, _ = captured(rows=rows, d2sd_auto=True)
    for cycle in recorded.cycles:
        run = copies(recorded)
        with NoHost("cpu"):
            eager = run(cycle)
        traced = torch.compile(graphs._with_own_code(cycle), fullgraph=True, backend="eager", dynamic=False)
        for one, other in zip(run(traced), eager, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


def test_sampled_texts_end_and_are_counted(any_shape):
    pair = recorded_pair()
    out = decode(pair, prompt(9), new=40, do_sample=True, top_k=9, d2sd_auto=True)
    assert out.shape[1] == 49 and pair.last_stats.new_tokens == 40


@pytest.mark.parametrize(
    "fixed", [dict(d2sd_num_branches=2), dict(d2sd_tree_budget=9), dict(d2sd_auto=False)], ids=str
)
def test_an_option_that_says_how_trees_are_leaves_one_shape(fixed, library_default):
    pair = recorded_pair()
    decode(pair, prompt(9), **fixed)
    assert pair.last_stats.decisions is None and len(recorded_of(pair).cycles) == 1


def test_where_no_whole_cycle_is_recorded_trees_are_the_pairs_own(library_default):
    pair, fixed = recorded_pair(), recorded_pair()
    decode(pair, prompt(9), d2sd_trace=True)
    decode(fixed, prompt(9), d2sd_trace=True, d2sd_auto=False)
    assert not vars(pair).get("_recorded") and pair.last_stats.decisions is None
    assert pair.last_stats.tree_sizes == fixed.last_stats.tree_sizes


# What is chosen ------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_machine(monkeypatch):
    """Let whole cycles take what is given, by the nodes of their trees."""

    def use(**costs):
        by_size = {int(name[1:]): cost for name, cost in costs.items()}

        def cost(part):
            return 0.0 if part[0] == REST else 0.01 * by_size[part[1]]

        monkeypatch.setattr("hf_d2sd.graphs.Stopwatch", lambda device: Ticking(cost))

    return use


@pytest.mark.parametrize(
    ("accuracy", "second", "kind"), [(0.0, 2.0, "plain"), (0.95, 9.0, "first"), (0.5, 1.45, "both")]
)
def test_the_shape_that_pays_is_chosen(accuracy, second, kind, on_machine, monkeypatch):
    on_machine(n1=1.0, n4=1.3, n26=second)
    text = plain_texts("llama", [prompt(9)[0]], new=150)
    Truth(monkeypatch, text, accuracy)
    pair = recorded_pair()
    for _ in range(3):
        assert decode(pair, prompt(9), new=150, d2sd_auto=True).tolist() == text
    decisions = pair.last_stats.decisions
    assert decisions.kinds.most_common(1)[0][0] == kind, decisions
    assert decisions.kinds[kind] > 0.6 * decisions.kinds.total(), decisions
    assert decisions.measured <= 1.05 * 150, decisions
    assert decisions.predicted == pytest.approx(decisions.measured, rel=0.15)


def test_costs_of_recorded_cycles_are_kept_apart(on_machine):
    on_machine(n1=1.0, n4=1.3, n26=2.0)
    pair = recorded_pair()
    decode(pair, prompt(9), new=60, d2sd_auto=True)
    decode(pair, prompt(9), new=20, d2sd_auto=True, d2sd_compile=False)
    recorded, eager = sorted(pair.costs.tables, key=lambda place: place.device, reverse=True)
    assert (recorded.device, eager.device) == ("cpu, recorded", "cpu")
    assert set(pair.costs.tables[recorded].curves[PASS].latest) <= {1, 4, 26}


def test_what_recorded_cycles_yield_is_known_by_how_tokens_are_chosen(on_machine):
    on_machine(n1=1.0, n4=1.3, n26=2.0)
    pair, temperatures = recorded_pair(), (0.7, 2.0)
    for temperature in temperatures:
        decode(pair, prompt(9), new=20, d2sd_auto=True, do_sample=True, temperature=temperature)
    decode(pair, prompt(9), new=20, d2sd_auto=True)
    (table,) = pair.costs.tables.values()
    names = {name for name in table.yields if name.startswith("cycle:0:4")}
    assert names == {"cycle:0:4", "cycle:0:4 at 0.7", "cycle:0:4 at 2.0"}
