"""A third level: the second drafter goes on after its own re-drafts. Nothing changes but the tree."""

import math
import random

import pytest
import torch
from tiny import FAMILIES, OracleDrafts, image_inputs, prompt, tiny_assistant, tiny_target

from hf_d2sd.candidates import Draft
from hf_d2sd.drafting import Drafter
from hf_d2sd.prefixes import select_deeper_prefixes

NEW = 16


def run(family: str = "llama", seed: int = 0, **options):
    inputs = image_inputs(9, seed) if family == "gemma3_image" else {"input_ids": prompt(9, seed)}
    return tiny_target(family).generate(**inputs, do_sample=False, max_new_tokens=NEW, **options)


def brute_force_prefixes(tokens, confidence, kept, count, block_size) -> set[tuple[int, int]]:
    """Of one row: the `count` most probable (draft, length), each prefix of the first draft that has it."""
    probabilities, seen = {}, set()
    for draft, (words, sure) in enumerate(zip(tokens, confidence)):
        for length in range(min(len(words), block_size - 2) + 1):
            fresh = tuple(words[:length]) not in seen
            seen.add(tuple(words[:length]))
            if length > kept[draft] and fresh:
                rejected = 1 - sure[length] if length < len(words) else 1
                probabilities[draft, length] = math.prod(sure[:length]) * rejected
    return set(sorted(probabilities, key=probabilities.get, reverse=True)[:count])


def test_the_most_probable_prefixes_of_re_drafts_are_selected():
    for seed in range(200):
        rng = random.Random(seed)
        drafts, depth = rng.randint(1, 4), rng.randint(1, 5)
        kept = [rng.randint(0, depth) for _ in range(drafts)]
        tokens = [[rng.randint(0, 1) for _ in range(depth)] for _ in range(drafts)]
        confidence = [[rng.uniform(0.05, 0.95) for _ in range(depth)] for _ in range(drafts)]
        columns = [torch.tensor(x)[None] for x in (tokens, confidence, kept)]
        owner, length = select_deeper_prefixes(columns[0], columns[1].double(), columns[2], drafts, depth + 1)
        found = {(o, n) for o, n in zip(owner[0].tolist(), length[0].tolist()) if n > 0}
        # The first draft to hold a prefix may have kept it: then nobody drafts after it again.
        assert found == brute_force_prefixes(tokens, confidence, kept, drafts, depth + 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_plain_generate(family, monkeypatch):
    for seed in range(4):
        plain = run(family, seed)
        with monkeypatch.context() as patch:
            OracleDrafts(patch, plain[0], 0.7, seed=seed)
            for budget in (None, 9):
                out = run(family, seed, assistant_model=tiny_assistant(4, 6), d2sd_levels=3, d2sd_tree_budget=budget)
                assert out.tolist() == plain.tolist()


def test_a_third_level_goes_on_where_a_re_draft_ends(monkeypatch):
    """A second drafter right at one position only after what it is shown: each level then adds a token."""
    plain = run()[0]
    shown_right = []

    def right_for_one_more(drafter: Drafter, blocks: torch.Tensor, width: int) -> Draft:
        start, mask = drafter.context.positions[0] + 1, drafter.model.config.mask_token_id
        truth = torch.nn.functional.pad(plain[start : start + blocks.shape[2] - 1], (0, blocks.shape[2]), value=2)
        truth = truth[: blocks.shape[2] - 1].expand(blocks[..., 1:].shape)
        visible = (blocks[..., 1:] != mask).sum(-1, keepdim=True)
        place = torch.arange(truth.shape[2]).expand(truth.shape)
        wrong = torch.where(truth == 3, 4, 3)
        tokens = torch.where(place <= visible, truth, wrong)
        shown_right.append(visible.max().item())
        return Draft.of(tokens, torch.where(place <= visible, 0.9, 0.1))

    monkeypatch.setattr(Drafter, "_denoise", right_for_one_more)
    assistant, alpha = tiny_assistant(6), {}
    for levels in (2, 3, 4):
        out = run(assistant_model=assistant, d2sd_levels=levels, d2sd_num_branches=2)
        assert out[0].tolist() == plain.tolist()
        alpha[levels] = assistant.last_stats.committed_per_cycle[0]
    assert alpha == {2: 3, 3: 4, 4: 5}  # a token of each draft, and the target's own
    assert max(shown_right) == 3


@pytest.mark.parametrize("wide", [False, True])
def test_sampling_with_a_seed_gives_plain_generates_text(wide):
    target, assistant = tiny_target(), tiny_assistant(4, 6)
    options = dict(do_sample=True, temperature=0.8, max_new_tokens=NEW)
    shape = dict(d2sd_tree_width=3, d2sd_tree_budget=12) if wide else {}
    for seed in range(10):
        torch.manual_seed(seed)
        plain = target.generate(prompt(), **options)
        torch.manual_seed(seed)
        ours = target.generate(prompt(), assistant_model=assistant, d2sd_levels=3, **shape, **options)
        assert ours.tolist() == plain.tolist()


def test_levels_of_a_wide_tree_draft_after_other_paths_each_time(monkeypatch):
    """A second drafter whose best token is right only right after what it is shown: each level adds a token."""
    plain, shown = run()[0], []

    def right_for_one_more(drafter: Drafter, blocks: torch.Tensor, width: int) -> Draft:
        start, mask = drafter.context.positions[0] + 1, drafter.model.config.mask_token_id
        size = blocks.shape[2] - 1
        truth = torch.nn.functional.pad(plain[start : start + size], (0, size), value=2)[:size]
        visible = (blocks[..., 1:] != mask).sum(-1, keepdim=True)  # (1, K, 1)
        shown.append([tuple(block[1 : 1 + n]) for block, n in zip(blocks[0].tolist(), visible[0, :, 0].tolist())])
        right = torch.arange(size) <= visible
        tokens = torch.where(right, truth, torch.where(truth == 3, 4, 3))
        other = torch.where(tokens == 5, 6, 5)
        sure = torch.where(right, 0.8, 0.3)
        both = torch.stack([tokens, other], -1), torch.stack([sure, 0.1 * sure], -1)
        return Draft(both[0], both[1], both[1].log(), blocks.new_zeros(blocks.shape[:2]))

    monkeypatch.setattr(Drafter, "_denoise", right_for_one_more)
    assistant, alpha = tiny_assistant(6), {}
    shape = dict(d2sd_num_branches=2, d2sd_tree_width=2, d2sd_tree_budget=64, d2sd_context=0)
    for levels in (2, 3, 4):
        shown.clear()
        out = run(assistant_model=assistant, d2sd_levels=levels, **shape)
        assert out[0].tolist() == plain.tolist()
        alpha[levels] = assistant.last_stats.committed_per_cycle[0]
        cycle = [prefix for prefixes in shown[1:levels] for prefix in prefixes]
        assert len(set(cycle)) == len(cycle) == 2 * (levels - 1)
    assert alpha[2] < alpha[3] < alpha[4]


def test_every_row_of_a_batch_equals_plain_generate():
    inputs = torch.cat([prompt(seed=seed) for seed in range(3)])
    out = tiny_target().generate(
        inputs, do_sample=False, max_new_tokens=NEW, assistant_model=tiny_assistant(4, 6), d2sd_levels=3
    )
    for row, seed in zip(out, range(3)):
        assert row.tolist() == run(seed=seed)[0].tolist()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(d2sd_levels=1), "d2sd_levels is 1"),
        (dict(d2sd_levels=3, d2sd_num_branches=0), "d2sd_num_branches is 0"),
        (dict(d2sd_levels=3, d2sd_branch_source="samples"), "'samples'"),
    ],
)
def test_levels_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        run(assistant_model=tiny_assistant(4, 6), **options)
