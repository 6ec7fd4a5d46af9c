"""32,768 tokens of context on tiny models: nothing is lost on the way, and a cycle costs what it did before."""

import copy

import pytest
import torch
from tiny import OracleDrafts, prompt, tiny_assistant, tiny_drafter, tiny_target
from torch.profiler import ProfilerActivity, profile

from hf_d2sd import D2SDAssistant
from hf_d2sd.cache import TreeCache
from hf_d2sd.drafting import Drafter
from hf_d2sd.growing import State, grow
from hf_d2sd.modeling import CACHE_NAME
from hf_d2sd.options import DecodingOptions
from hf_d2sd.target import Target

CONTEXT = 32_768
WINDOWED = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=100)


def long_target(family: str):
    target = copy.deepcopy(tiny_target(family))
    target.config.get_text_config().max_position_embeddings = 2 * CONTEXT
    return target


@pytest.mark.slow
@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "mistral"])
def test_32k_tokens_of_context_decode_as_plain_generate_does(family, windows, monkeypatch):
    target, pair = long_target(family), tiny_assistant(4, 6)
    if windows:
        pair = D2SDAssistant.from_drafters(tiny_drafter(4, **WINDOWED), tiny_drafter(6, seed=1, **WINDOWED))
    options = dict(do_sample=False, max_new_tokens=24, prefill_chunk_size=2048, return_dict_in_generate=True)
    plain = target.generate(prompt(CONTEXT), **options)
    contexts, stock = [], Drafter._denoise
    OracleDrafts(monkeypatch, plain.sequences[0], 0.7)

    def denoise(drafter, blocks, width):
        draft = stock(drafter, blocks, width)
        contexts.append((drafter.context.cache.lengths, drafter.context.positions))
        return draft

    stock = Drafter._denoise
    monkeypatch.setattr(Drafter, "_denoise", denoise)
    ours = target.generate(prompt(CONTEXT), assistant_model=pair, **options)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    assert ours[CACHE_NAME].get_seq_length() == CONTEXT + 23
    assert all(length == position and length[0] >= CONTEXT for length, position in contexts), "no feature is missing"
    assert pair.last_stats.mean_acceptance_length > 1.5


@pytest.mark.parametrize("kind", ["full", "windowed"])
@torch.no_grad()
def test_chunks_of_a_prompt_give_the_draft_of_one_pass(kind):
    model = tiny_drafter(4, **(WINDOWED | dict(sliding_window=5) if kind == "windowed" else {}))
    drafts = []
    for chunk in (None, 7, 64):
        target = Target(tiny_target(), TreeCache(tiny_target().config), {0, 2})
        drafter = Drafter(model, tiny_target())
        for step in target.prefill(prompt(150), 150, chunk):
            drafter.extend(step, target.positions)
        assert drafter.context.positions == [150]
        drafts.append(drafter.draft(torch.tensor([5]), 4))
    for draft in drafts[1:]:
        assert draft.tokens.tolist() == drafts[0].tokens.tolist()
        torch.testing.assert_close(draft.confidence, drafts[0].confidence, atol=1e-5, rtol=1e-4)


def peak_of(run) -> int:
    """Bytes that are allocated at most while `run` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "mistral"])
@torch.no_grad()
def test_a_cycle_allocates_as_much_at_6000_tokens_as_at_600(family):
    """Drafts, tree, verification and the moves in the caches; the buffers have room. A mask would grow tenfold."""
    peaks = {}
    for backend in (None, "eager"):
        for context in (600, 6000):
            peaks[backend, context] = peak_of_a_cycle(family, context, backend)
    assert peaks[None, 6000] <= 1.05 * peaks[None, 600] + 4096
    if family != "mistral":  # all its layers have windows: a mask is small there too
        assert peaks["eager", 6000] > 3 * peaks["eager", 600], "the control: masks and scores over all keys"


def peak_of_a_cycle(family: str, context: int, backend: str | None) -> int:
    model = tiny_target(family)
    target = Target(model, TreeCache(model.config), {0, 2}, backend=backend)
    drafters = [Drafter(drafter, model, backend=backend) for drafter in tiny_assistant(4, 6).drafters]
    for step in target.prefill(prompt(context), context, 500):
        for drafter in drafters:
            drafter.extend(step, target.positions)
    options = DecodingOptions(num_branches=4, tree_budget=None, block_size=4, second_block_size=6)

    def cycle():
        tree = grow(State(torch.tensor([5]), drafters, options))
        step = target.verify(tree)
        path = torch.tensor([[0, 1]])
        target.commit(step, path, [2])
        for drafter in drafters:
            drafter.extend(step, target.positions, path, [2])

    cycle()  # the prompt goes into the drafters' caches, and buffers grow
    cycle()
    return peak_of(cycle)
