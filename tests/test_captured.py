"""Whole cycles on the device: one function of tensors, which asks the host nothing, and the loop that replays it."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from recorded import (
    POLICIES,
    GraphOnCpu,
    NoHost,
    PackedOnDevice,
    Truth,
    decode,
    new_pair,
    recorded_of,
    to_meta,
    without_cuda,
)
from test_batch import ends_of, pad, prompts
from test_sampling import marginal, p_value
from test_threads import state_of
from test_vocabulary import PRUNED
from tiny import prompt, tiny_drafter, tiny_target

from hf_d2sd import D2SDAssistant, choosing, graphs
from hf_d2sd.kernels import KERNELS
from hf_d2sd.modeling import CACHE_NAME

SAMPLED = dict(do_sample=True, top_k=9, temperature=1.3, top_p=0.95, min_p=0.01)
HEADS = dict(path_rank=4, path_candidates=5, path_text_weight=4.0)


@pytest.fixture
def late(monkeypatch):
    """Cycles are begun before the host has read the one before, as with a graph."""
    without_cuda(monkeypatch)


def captured(rows: int = 1, backend: str = "masked", pair=None, target=None, **options):
    """A cycle in the state in which some call left it, and an assistant that holds it."""
    pair = pair or new_pair()
    pair.compile(backend=None)
    ids = pad(prompts(rows, 1)) if rows > 1 else prompt(9)
    decode(pair, ids, new=12, target=target, d2sd_attention_backend=backend, **options)
    recorded = recorded_of(pair)
    recorded.state.alive.fill_(True)
    recorded.cycle.origin.rooms.fill_(40)
    return recorded, pair


def copies(recorded):
    """A state, and what the cycle then leaves behind in it and in the buffers."""
    buffers = [buffer for layer in recorded.cycle.target.cache.layers for buffer in layer._buffers]
    before = [buffer.clone() for buffer in buffers]

    def run(cycle):
        for buffer, old in zip(buffers, before):
            buffer.copy_(old)
        after = cycle(recorded.state)
        return [tensor.clone() for tensor in (*after.tensors(), *buffers)]

    return run


# It asks the host nothing --------------------------------------------------------------------------------------------

SHAPES = {
    **{name: dict(options) for name, options in POLICIES.items()},
    "sampled": SAMPLED,
    "batch": dict(rows=3),
    "sampled batch of wide trees": dict(rows=3, **SAMPLED, **POLICIES["wide"]),
    "sdpa": dict(backend="sdpa"),
    "eager": dict(backend="eager", rows=3),
    "packed": dict(backend="packed"),
    "packed, batch": dict(backend="packed", rows=3, **POLICIES["levels"]),
}


@pytest.fixture(autouse=True)
def packed_on_device(monkeypatch):
    """A backend "packed" that takes what FlashAttention's packed calls take."""
    monkeypatch.setitem(KERNELS, "packed", PackedOnDevice())


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_a_cycle_reads_nothing_and_brings_nothing_to_another_device(name, monkeypatch):
    """On a CPU nothing is read; and where tensors have no content at all, everything still is on one device."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # it does not know "meta"
    target = copy.deepcopy(tiny_target("llama"))
    recorded, pair = captured(target=target, **SHAPES[name])
    with NoHost("cpu") as mode:
        recorded.cycle(recorded.state)
    assert mode.calls > 100
    to_meta(recorded), to_meta(pair), to_meta(target)
    with NoHost("meta"):
        after = recorded.cycle(recorded.state)
    assert {tensor.device.type for tensor in after.tensors()} == {"meta"}
    assert [tensor.shape for tensor in after.tensors()] == [tensor.shape for tensor in recorded.state.tensors()]


@torch.no_grad()
def test_a_row_that_has_ended_gains_nothing_more():
    """Else it would outgrow the buffers while others go on."""
    recorded, _ = captured(rows=3)
    before = recorded.state
    before.alive[1] = False
    after = recorded.cycle(before)
    assert after.gained[1] == before.gained[1] and after.counts[0][1] == 0
    assert after.anchors[1] == before.anchors[1] and not after.alive[1]
    assert (after.gained[[0, 2]] > before.gained[[0, 2]]).all()


@pytest.mark.parametrize("changes", [HEADS, dict(draft_vocab_size=len(PRUNED)), {**HEADS, "tree_width": 3}])
@torch.no_grad()
def test_nor_does_it_with_path_heads_and_pruned_vocabularies(changes):
    width = changes.pop("tree_width", 1) if "tree_width" in changes else 1
    pair = new_pair(**changes)
    for drafter in pair.drafters:
        if "draft_vocab_size" in changes:
            drafter.draft_token_ids.copy_(torch.tensor(PRUNED))
        drafter.config.confidence_temperatures = [1.5] * (drafter.config.block_size - 1)
    recorded, _ = captured(pair=pair, d2sd_tree_width=width, d2sd_tree_budget=14)
    with NoHost("cpu"):
        recorded.cycle(recorded.state)


def test_the_proof_sees_what_asks():
    with pytest.raises(AssertionError, match="asks the host"), NoHost("cpu"):
        torch.ones(2).sum().item()
    with pytest.raises(AssertionError, match="made of numbers"), NoHost("cpu"):
        torch.tensor([1, 2])
    with pytest.raises(AssertionError, match="on meta"), NoHost("cpu"):
        torch.ones(2).to("meta")


FAST = {"paper", "sampled batch of wide trees"}


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SHAPES])
@torch.no_grad()
def test_a_cycle_is_one_graph_without_a_break(name):
    """As torch traces it: `fullgraph` refuses what would have to be run by Python, reads of tensors among it."""
    torch._dynamo.reset()
    recorded, _ = captured(**SHAPES[name])
    run = copies(recorded)
    torch.manual_seed(0)
    eager = run(recorded.cycle)
    torch.manual_seed(0)
    compiled = run(
        torch.compile(graphs._with_own_code(recorded.cycle), fullgraph=True, backend="eager", dynamic=False)
    )
    for one, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


# It writes what plain decoding writes --------------------------------------------------------------------------------


def plain_texts(family, rows, eos=None, new=30):
    return [decode(None, row[None], family, new, eos_token_id=eos)[0].tolist() for row in rows]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("ahead", ["late", "at once"])
def test_greedy_text_and_counts_are_those_of_one_cycle_after_the_other(name, ahead, request, monkeypatch):
    if ahead == "late":
        request.getfixturevalue("late")
    pair, ids = new_pair(), prompt(9)
    plain = plain_texts("llama", [ids[0]])
    Truth(monkeypatch, plain)
    eager = decode(pair, ids, **POLICIES[name])
    counts = pair.last_stats
    pair.compile(backend=None)
    ours = decode(pair, ids, **POLICIES[name])
    assert ours.tolist() == eager.tolist() == plain
    if name != "samples":  # whose draws differ
        assert pair.last_stats == counts
    if name not in ("plain", "samples"):
        assert max(counts.committed_per_cycle) >= 3, "drafts must be accepted, or commits are not tested"


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_oss"])
def test_a_ragged_batch_whose_rows_end_early(family, late, monkeypatch):
    rows, (truths, eos) = prompts(5, 2), ends_of(family, 5, 2)
    Truth(monkeypatch, [row.tolist() + truth for row, truth in zip(rows, truths)])
    pair, inputs = new_pair(), pad(rows)
    pair.compile(backend=None)
    plain = decode(None, inputs, family, 20, eos_token_id=eos)
    options = dict(eos_token_id=eos, return_dict_in_generate=True)
    ours = decode(pair, inputs, family, 20, **options)
    assert ours.sequences.tolist() == plain.tolist()
    assert pair.last_stats.new_tokens == sum(map(len, truths))
    assert not recorded_of(pair).state.alive.any(), "the device must know by itself which rows have ended"
    plain = decode(None, inputs, family, 20, **options)
    assert_same_cache(ours[CACHE_NAME], plain[CACHE_NAME], plain.sequences, inputs["attention_mask"])


def assert_same_cache(ours, plain, sequences, mask):
    """The keys and values of all tokens that are no padding of a prompt."""
    assert ours.get_seq_length() == plain.get_seq_length()
    real = torch.nn.functional.pad(mask.bool(), (0, sequences.shape[1] - mask.shape[1] - 1), value=True)
    for one, other in zip(ours.layers, plain.layers, strict=True):
        seen = real[:, -other.keys.shape[2] :]
        for name in ("keys", "values"):
            mine, its = (getattr(layer, name).transpose(1, 2)[seen] for layer in (one, other))
            torch.testing.assert_close(mine, its, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_what_a_cycle_too_many_wrote_is_cut(family, late, monkeypatch):
    """A criterion that only the host knows ends the text within a path; the cache and the next turn are exact."""
    ids = prompt(9)
    whole = plain_texts(family, [ids[0]], new=60)[0]
    Truth(monkeypatch, [whole], accuracy=0.95)
    launched = []
    stock = GraphOnCpu.fetch
    monkeypatch.setattr(GraphOnCpu, "fetch", lambda *args: launched.append(1) or stock(*args))
    for length in (19, 20, 21, 22, 23):
        pair, ends = new_pair(), lambda ids, scores, length=length: torch.tensor([ids.shape[1] >= length])
        pair.compile(backend=None)
        options = dict(stopping_criteria=[ends], return_dict_in_generate=True)
        launched.clear()
        ours = decode(pair, ids, family, 60, **options)
        assert ours.sequences[0].tolist() == whole[:length]
        assert len(launched) == pair.last_stats.cycles, (
            "one cycle is begun that nobody reads; the first is not replayed"
        )
        plain = decode(None, ids, family, 60, **options)
        assert_same_cache(ours[CACHE_NAME], plain[CACHE_NAME], plain.sequences, torch.ones_like(ids))
        cache, turn = copy.deepcopy(ours[CACHE_NAME]), ours.sequences
        eager = decode(pair, turn, family, 20, d2sd_compile=False, **{CACHE_NAME: cache})
        counts = pair.last_stats
        again = decode(pair, turn, family, 20, **{CACHE_NAME: copy.deepcopy(ours[CACHE_NAME])})
        assert again.tolist() == eager.tolist() == [whole[: length + 20]]
        assert pair.last_stats == counts


@pytest.mark.parametrize("length", [20, 23])
def test_the_drafters_know_after_a_call_what_they_would_have_known(length, late, monkeypatch):
    """Theirs is read on, of what waits and of what was read too early, in a turn that is decoded as always."""
    contexts, text = {}, plain_texts("llama", [prompt(9)[0]], new=60)
    ends = lambda ids, scores: torch.tensor([ids.shape[1] >= length])  # noqa: E731
    for compiles in (False, True):
        pair = new_pair()
        if compiles:
            pair.compile(backend=None)
        with monkeypatch.context() as patch:
            Truth(patch, text, accuracy=0.95)
            out = decode(pair, prompt(9), new=60, stopping_criteria=[ends], return_dict_in_generate=True)
            assert out.sequences.tolist() == [text[0][:length]]
            turn = dict(d2sd_compile=False, return_dict_in_generate=True, **{CACHE_NAME: out[CACHE_NAME]})
            known = [context.positions for context in out[CACHE_NAME]._d2sd_contexts[1]]
            assert known == [[length - 1]] * 2
            out = decode(pair, out.sequences, new=9, **turn)
        contexts[compiles] = out[CACHE_NAME]._d2sd_contexts[1]
    for ours, eager in zip(contexts[True], contexts[False], strict=True):
        assert ours.positions == eager.positions
        assert ours.cache.lengths == eager.cache.lengths >= [length]
        for one, other in zip(ours.cache.layers, eager.cache.layers, strict=True):
            torch.testing.assert_close(one.keys, other.keys, atol=1e-4, rtol=1e-4)


class Heard:
    """A streamer, and how many tokens the counts knew of whenever it was told some."""

    def __init__(self, pair):
        self.pair, self.tokens, self.ended, self.exact = pair, [], False, True

    def put(self, value):
        if value.ndim == 1:
            self.tokens += value.tolist()
            self.exact &= len(self.pair.last_stats.token_sources) == len(self.tokens)

    def end(self):
        self.ended = True


def test_streamers_and_criteria_see_every_token_in_order(late, monkeypatch):
    ids, seen = prompt(9), []
    plain = plain_texts("llama", [ids[0]])
    Truth(monkeypatch, plain, accuracy=0.9)
    pair = new_pair()
    pair.compile(backend=None)
    heard = Heard(pair)
    looks = lambda text, scores: seen.append(text[0].tolist()) or torch.tensor([False])  # noqa: E731
    ours = decode(pair, ids, streamer=heard, stopping_criteria=[looks])
    assert ours.tolist() == plain
    assert ids[0].tolist() + heard.tokens == plain[0]
    assert heard.ended and heard.exact
    assert seen == [plain[0][:length] for length in range(10, 40)]


def test_a_streamer_that_fails_leaves_the_assistant_in_order(monkeypatch):
    class Failing(Heard):
        def put(self, value):
            super().put(value)
            if len(self.tokens) > 12:
                raise RuntimeError("no more")

    pair = new_pair()
    pair.compile(backend=None)
    plain = plain_texts("llama", [prompt(9)[0]])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no more"):
            decode(pair, prompt(9), streamer=Failing(pair))
        assert decode(pair, prompt(9)).tolist() == plain
    assert len(pair._recorded) == 1


def test_a_drafter_with_a_pruned_vocabulary_drafts_the_calls_own_words(late):
    """Cycle for cycle what they are without recording, once both have read as far."""
    drafters = [tiny_drafter(4, draft_vocab_size=len(PRUNED)), tiny_drafter(6, seed=1, draft_vocab_size=len(PRUNED))]
    for drafter in drafters:
        drafter.draft_token_ids.copy_(torch.tensor(PRUNED))
    pair = D2SDAssistant.from_drafters(*drafters)
    pair.compile(backend=None)
    for length in (9, 14):  # the words of one call are not the next one's
        assert decode(pair, prompt(length, 4)).tolist() == plain_texts("llama", [prompt(length, 4)[0]])
        words = [drafter.words for drafter in recorded_of(pair).cycle.drafters]
        known = set(decode(None, prompt(length, 4))[0].tolist()) - set(PRUNED)
        for one in words:
            mine = one.ids[: one.count].tolist()
            assert len(mine) == len(set(mine))
            assert set(mine) <= known
            assert set(prompt(length, 4)[0].tolist()) - set(PRUNED) <= set(mine)
            assert one._unused.tolist() == [False] * one.count + [True] * (len(one.ids) - one.count)


# Sampling ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(temperature=1.3), dict(top_k=3), dict(top_p=0.8)], ids=str)
def test_texts_occur_as_often_as_the_target_says(options, monkeypatch):
    """Drawn on the device, in batches; each text's probability is that of plain forwards."""
    from test_sampling import NEW, PROMPT, SETTINGS, assistant, exact_distribution, target

    name = next(iter(options))
    pair, drawn = copy.deepcopy(assistant()), []
    pair.compile(backend=None)
    torch.manual_seed(0)
    lengths = []
    for _ in range(12):
        out = target().generate(
            PROMPT.repeat(256, 1),
            assistant_model=pair,
            max_new_tokens=NEW,
            **{**dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0), **options},
        )
        drawn += [tuple(row) for row in out[:, PROMPT.shape[1] :].tolist()]
        lengths += pair.last_stats.committed_per_cycle
    assert len(pair._recorded) == 1
    expected = exact_distribution(graphs_processors(SETTINGS[name][1]()))
    views = [(i,) for i in range(NEW)] + [(1, 2, 3), (0, 1, 2, 3)]
    worst = min(p_value([tuple(text[i] for i in view) for text in drawn], marginal(expected, view)) for view in views)
    assert worst > 1e-4
    assert len(set(lengths)) >= 3, "trees must be accepted, or the walk is not tested"


def graphs_processors(processors):
    from transformers import LogitsProcessorList

    return LogitsProcessorList(processors)


def test_a_seed_gives_a_text_again():
    pair = new_pair()
    pair.compile(backend=None)
    texts = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        texts.append(decode(pair, prompt(9), **SAMPLED).tolist())
    assert texts[0] == texts[1] != texts[2]


# What is recorded, and for how long ----------------------------------------------------------------------------------


def test_a_cycle_is_recorded_once_for_its_shapes_and_each_shape_keeps_its_own(monkeypatch):
    pair, made = new_pair(), []
    pair.compile(backend=None)
    stock = graphs.Recorded.__init__
    monkeypatch.setattr(graphs.Recorded, "__init__", lambda self, *args: made.append(self) or stock(self, *args))
    plain = {length: plain_texts("llama", [prompt(length)[0]]) for length in (5, 9, 14)}
    for _ in range(2):
        for length in plain:
            assert decode(pair, prompt(length)).tolist() == plain[length]
            assert decode(pair, prompt(length), d2sd_num_branches=0).tolist() == plain[length]
    assert len(made) == 2
    decode(pair, prompt(5), new=300)
    assert len(made) == 3


def test_weights_that_moved_are_not_read_where_they_were():
    pair, target = new_pair(), copy.deepcopy(tiny_target("llama"))
    pair.compile(backend=None)
    decode(pair, prompt(9), target=target)
    layer = target.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(-layer.weight.detach())
    plain = decode(None, prompt(9), target=target)
    assert decode(pair, prompt(9), target=target).tolist() == plain.tolist()
    assert len(pair._recorded) == 2


def test_what_was_recorded_is_bounded_and_neither_copied_nor_saved(monkeypatch):
    pair, target = new_pair(), copy.deepcopy(tiny_target("llama"))
    target(prompt(), output_hidden_states=True)
    before = state_of(target)
    pair.compile(backend=None)
    for budget in range(3, 9):
        decode(pair, prompt(9), new=6, target=target, d2sd_tree_budget=budget)
    assert state_of(target) == before
    assert len(pair._recorded) == graphs._MOST_RECORDED
    assert not copy.deepcopy(pair)._recorded
    assert not pickle.loads(pickle.dumps(pair._recorded))


def test_two_threads_do_not_share_a_recorded_cycle():
    import threading

    pair, plain = new_pair(), {n: plain_texts("llama", [prompt(n)[0]]) for n in (5, 9)}
    pair.compile(backend=None)
    wrong = []

    def work(length):
        for _ in range(3):
            if decode(pair, prompt(length)).tolist() != plain[length]:
                wrong.append(length)

    threads = [threading.Thread(target=work, args=(length,)) for length in (5, 9)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert wrong == []


# What cannot be recorded ---------------------------------------------------------------------------------------------

LEFT = {
    "output_scores": dict(return_dict_in_generate=True, output_scores=True),
    "d2sd_trace": dict(d2sd_trace=True),
    "RepetitionPenaltyLogitsProcessor may look at the text so far": dict(repetition_penalty=1.5),
}


@pytest.mark.parametrize("reason", LEFT)
def test_other_calls_decode_by_compiled_passes_and_say_why(reason, monkeypatch):
    said = []
    monkeypatch.setattr(graphs.logger, "warning_once", said.append)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    pair = new_pair()
    pair.compile()
    plain = decode(None, prompt(9), new=10, **{k: v for k, v in LEFT[reason].items() if "d2sd" not in k})
    ours = decode(pair, prompt(9), new=10, **LEFT[reason])
    assert getattr(ours, "sequences", ours).tolist() == getattr(plain, "sequences", plain).tolist()
    assert len(said) == 1
    assert reason in said[0]
    assert not vars(pair).get("_recorded")


def test_a_limit_is_needed_and_a_cycle_that_breaks_is_refused_with_a_way_on(monkeypatch):
    pair = new_pair()
    pair.compile(backend=None)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="needs a limit"):
        patch.setattr(choosing, "MaxLengthCriteria", type(None))
        decode(pair, prompt(9))

    def breaks(*args):
        raise RuntimeError("no graph of this.")

    monkeypatch.setattr(graphs.Recorded, "__init__", breaks)
    with pytest.raises(ValueError, match=r"no graph of this.*whole=False"):
        decode(pair, prompt(9))


# On a GPU, and here with what stands for a graph ---------------------------------------------------------------------

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def on(request, monkeypatch):
    """A device, where there is a graph or what stands for it."""
    if request.param == "cpu":
        without_cuda(monkeypatch)
    return request.param


def models_on(device: str, dtype: torch.dtype = torch.float32, family: str = "llama"):
    target, pair = copy.deepcopy(tiny_target(family)).to(device, dtype), new_pair().to(device, dtype)
    pair.compile(backend=None)
    return target, pair


@pytest.mark.parametrize("on", DEVICES, indirect=True)
@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.bfloat16, 3)])
def test_a_replayed_cycle_leaves_what_running_it_leaves(on, dtype, rows, monkeypatch):
    """In 200 cycles on a GPU (20 here) after prompts of all lengths, of drafts from never to always right."""
    target, pair = models_on(on, dtype)
    cycles, wanted, stock, paths = [], 200 if on == "cuda" else 20, graphs.Recorded.launch, set()

    def launch(recorded):
        twins = [recorded.cycle.target.cache, *(drafter.context.cache for drafter in recorded.cycle.drafters)]
        buffers = [buffer for cache in twins for layer in cache.layers for buffer in layer._buffers]
        before = [buffer.clone() for buffer in buffers]
        expected = [tensor.clone() for tensor in (*recorded.cycle(recorded.state).tensors(), *buffers)]
        for buffer, old in zip(buffers, before):
            buffer.copy_(old)
        read = stock(recorded)
        for seen, one in zip((*recorded.state.tensors(), *buffers), expected, strict=True):
            torch.testing.assert_close(seen, one)
        cycles.append(recorded)
        paths.update(recorded.state.counts[0].tolist())
        return read

    monkeypatch.setattr(graphs.Recorded, "launch", torch.no_grad()(launch))
    for seed in range(100):
        texts = [prompt(3 + (7 * seed + 5 * row) % 41, seed + row)[0] for row in range(rows)]
        ids = {name: tensor.to(on) for name, tensor in pad(texts).items()}
        plain = decode(None, ids, target=target, new=40)
        own = [row[int((mask == 0).sum()) :].tolist() for row, mask in zip(plain, ids["attention_mask"])]
        with monkeypatch.context() as patch:
            Truth(patch, own, (0.8, 0.5, 1.0, 0.0)[seed % 4], device=on)
            ours = decode(pair, ids, target=target, new=40)
        if dtype == torch.float32:
            assert ours.tolist() == plain.tolist()
        if len(cycles) >= wanted:
            break
    assert len(cycles) >= wanted
    assert len(pair._recorded) == 1
    assert len(paths - {0}) >= 3, "paths of several lengths must be moved"


@pytest.mark.parametrize("on", DEVICES, indirect=True)
def test_two_shapes_are_recorded_side_by_side(on):
    target, pair = models_on(on)
    for _ in range(2):
        for length, options in ((9, {}), (14, dict(d2sd_num_branches=0)), (5, dict(d2sd_levels=3))):
            ids = prompt(length).to(on)
            plain = decode(None, ids, target=target)
            assert decode(pair, ids, target=target, **options).tolist() == plain.tolist()
    assert len(pair._recorded) == 3


@pytest.mark.parametrize("on", DEVICES, indirect=True)
def test_what_was_recorded_goes_with_the_assistant(on):
    target, pair = models_on(on)
    gc.collect()
    before = torch.cuda.memory_allocated() if on == "cuda" else 0
    held = decode(pair, prompt(9).to(on), target=target, return_dict_in_generate=True)
    recorded = weakref.ref(recorded_of(pair))
    if on == "cuda":
        assert torch.cuda.memory_allocated() > before
    sequence = held.sequences.tolist()
    del pair, held
    gc.collect()
    assert recorded() is None
    if on == "cuda":
        assert torch.cuda.memory_allocated() <= before
    assert sequence == decode(None, prompt(9).to(on), target=target).tolist()


@pytest.mark.gpu
def test_fused_and_recorded_cycles_give_the_same_text():
    target, pair = models_on("cuda")
    pair.compile()
    for length in (9, 14):
        plain = decode(None, prompt(length).cuda(), target=target)
        assert decode(pair, prompt(length).cuda(), target=target).tolist() == plain.tolist()
