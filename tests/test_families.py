"""Greedy D²SD decoding writes what plain `generate` writes, for every family and every shape of tree."""

import functools

import pytest
from tiny import FAMILIES, OracleDrafts, image_inputs, prompt, tiny_assistant, tiny_target

from hf_d2sd import attention

NEW_TOKENS, PROMPTS = 16, 20


@functools.cache
def reference(family: str, seed: int):
    """A prompt, and plain greedy decoding of it. Lengths lie on both sides of the sliding window."""
    length = 3 + seed
    inputs = image_inputs(length, seed) if family == "gemma3_image" else {"input_ids": prompt(length, seed)}
    plain = tiny_target(family).generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    return inputs, plain


def decode(family: str, seed: int, assistant, **options):
    inputs, plain = reference(family, seed)
    ours = tiny_target(family).generate(
        **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, assistant_model=assistant, **options
    )
    return ours, plain


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_plain_generate(family, block_size, every, monkeypatch):
    """K in {0, 1, 4}, budgets {8, 32, none}, 20 prompts; drafts are right at 0, 70 or 95 percent of the positions.

    Each prompt with three of the nine trees, each K and each budget once; or with all of them.
    """
    assistant = tiny_assistant(block_size, block_size + 2)
    cycles = tokens = 0
    for seed in range(PROMPTS):
        _, plain = reference(family, seed)
        for case, (branches, budget) in enumerate((k, b) for k in (0, 1, 4) for b in (8, 32, None)):
            if not every and (case + case // 3 + seed) % 3:
                continue
            accuracy = (None, 0.7, 0.95)[(seed // 3 + case) % 3]
            with monkeypatch.context() as patch:
                if accuracy is not None:
                    OracleDrafts(patch, plain[0], accuracy, seed=case)
                ours, _ = decode(family, seed, assistant, d2sd_num_branches=branches, d2sd_tree_budget=budget)
            assert ours.tolist() == plain.tolist(), (family, block_size, seed, branches, budget)
            stats = assistant.last_stats
            assert max(stats.tree_sizes) <= (budget or 10**9)
            cycles, tokens = cycles + stats.cycles, tokens + stats.new_tokens
    assert tokens / cycles > 1.5, "trees were hardly ever accepted: the test would not see a wrong walk"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_perfect_first_block_is_accepted_whole_and_extended(family, monkeypatch):
    """With γ₂ > γ one branch keeps the whole first block and goes on: γ₂ tokens a cycle."""
    _, plain = reference(family, 0)
    assistant = tiny_assistant(4, 6)
    OracleDrafts(monkeypatch, plain[0], 1.0, confidence=0.99)
    ours, _ = decode(family, 0, assistant, d2sd_num_branches=1)
    assert ours.tolist() == plain.tolist()
    assert max(assistant.last_stats.committed_per_cycle) == 6


@pytest.mark.parametrize("backend", ["eager", "sdpa", "cpu", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_backend_decodes_alike(family, backend, packed, monkeypatch):
    monkeypatch.setattr(attention, "SHORT", 0)
    if (family, backend) == ("gpt_oss", "sdpa"):
        pytest.skip("it has no SDPA attention")
    _, plain = reference(family, 3)
    OracleDrafts(monkeypatch, plain[0], 0.7)
    assistant = tiny_assistant(4, 6)
    ours, _ = decode(family, 3, assistant, d2sd_attention_backend=backend)
    assert ours.tolist() == plain.tolist()
    assert assistant.attention_backend == f"{backend}: asked for by d2sd_attention_backend"
    assert assistant.last_stats.mean_acceptance_length > 1.2
