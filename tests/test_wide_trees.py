"""Decoding with trees that branch in tokens too: nothing changes but how many tokens a pass yields."""

import dataclasses

import pytest
import torch
from tiny import FAMILIES, WIDTH, image_inputs, prompt, tiny_assistant, tiny_drafter, tiny_target

from hf_d2sd.candidates import Draft
from hf_d2sd.drafting import Drafter

NEW_TOKENS = 16


class OracleLogits:
    """Raises the logits of the target's own continuation in drafts, so that it is among the likeliest tokens.

    Args:
        sequence: (L,), prompt and plain continuation.
        rank: by default the right token is the likeliest; with 2 it comes second, and so on.
        accuracy: share of the positions at which this is so.
    """

    def __init__(self, monkeypatch, sequence: torch.Tensor, rank: int = 1, accuracy: float = 1.0):
        self.sequence, self.rank, self.accuracy = sequence, rank, accuracy
        self.generator = torch.Generator().manual_seed(0)
        stock = Drafter._denoise
        monkeypatch.setattr(Drafter, "_denoise", lambda drafter, *args: self.correct(drafter, stock(drafter, *args)))

    def correct(self, drafter: Drafter, draft: Draft) -> Draft:
        width = draft.depth
        start = drafter.context.positions[0] + 1
        truth = self.sequence[start : start + width]
        truth = torch.nn.functional.pad(truth, (0, width - len(truth)), value=2).expand(draft.best.shape)
        logits = draft.logits.clone()
        place = logits.scatter(-1, truth[..., None], -torch.inf).topk(self.rank, -1).values[..., -1:]
        above = logits.scatter(-1, truth[..., None], -torch.inf).amax(-1, keepdim=True) + 3
        wanted = (
            above if self.rank == 1 else logits.scatter(-1, truth[..., None], -torch.inf).topk(self.rank - 1).values
        )
        wanted = wanted[..., -1:] - (0 if self.rank == 1 else (wanted[..., -1:] - place) / 2)
        right = torch.rand(truth.shape, generator=self.generator) < self.accuracy
        raised = logits.scatter(-1, truth[..., None], wanted)
        logits = torch.where(right[..., None], raised, logits)
        best = logits.topk(draft.tokens.shape[-1])
        log_probs = best.values - logits.logsumexp(-1, keepdim=True)
        fields = dict(tokens=best.indices, confidence=log_probs.exp(), log_probs=log_probs, logits=logits)
        return dataclasses.replace(draft, **fields)


def run(family: str, seed: int, assistant, **options):
    inputs = image_inputs(9, seed) if family == "gemma3_image" else {"input_ids": prompt(9, seed)}
    return tiny_target(family).generate(
        **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, assistant_model=assistant, **options
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("accuracy", [0.0, 0.7])
def test_greedy_equals_plain_generate(family, accuracy, monkeypatch):
    assistant = tiny_assistant(4, 6)
    cycles = tokens = 0
    for seed in range(3):
        plain = run(family, seed, None)
        for branches, width, budget, levels in (
            (0, 2, 6, 2),
            (2, 3, 9, 3),
            (4, 8, 33, 2),
            (4, 8, 33, 4),
            (1, 2, 2, 2),
        ):
            with monkeypatch.context() as patch:
                OracleLogits(patch, plain[0], accuracy=accuracy)
                options = dict(d2sd_num_branches=branches, d2sd_tree_width=width, d2sd_tree_budget=budget)
                options |= dict(d2sd_levels=levels)
                assert run(family, seed, assistant, **options).tolist() == plain.tolist()
            assert max(assistant.last_stats.tree_sizes) <= budget
            cycles, tokens = cycles + assistant.last_stats.cycles, tokens + assistant.last_stats.new_tokens
    if accuracy:
        assert tokens / cycles > 1.5, "trees were hardly ever accepted: the test would not see a wrong walk"


def test_a_right_token_that_is_never_the_likeliest_is_found_by_a_wider_tree(monkeypatch):
    plain = run("llama", 0, None)
    assistant = tiny_assistant(4, 6)
    OracleLogits(monkeypatch, plain[0], rank=2)
    narrow, wide = dict(d2sd_num_branches=0), dict(d2sd_num_branches=0, d2sd_tree_width=2, d2sd_tree_budget=16)
    for options, accepts in ((narrow, False), (wide, True)):
        assert run("llama", 0, assistant, **options).tolist() == plain.tolist()
        assert (assistant.last_stats.mean_acceptance_length > 2) == accepts


def test_a_second_drafter_extends_the_deepest_path(monkeypatch):
    """γ₂ = 6 after γ = 4: with certain drafts a cycle commits five drafted tokens and the bonus."""
    plain = run("llama", 0, None)
    OracleLogits(monkeypatch, plain[0])
    assistant = tiny_assistant(4, 6)
    run("llama", 0, assistant, d2sd_num_branches=3, d2sd_tree_width=2, d2sd_tree_budget=64)
    assert max(assistant.last_stats.committed_per_cycle) == 6
    assert assistant.last_stats.tokens_by_source["second"] > 0


def test_sampling_with_a_seed_gives_plain_generates_text():
    target, assistant, inputs = tiny_target(), tiny_assistant(4, 6), prompt(9, 1)
    for options in (dict(d2sd_tree_width=3, d2sd_tree_budget=12), dict(d2sd_branch_source="samples")):
        for seed in range(5):
            texts = []
            for arguments in ({}, {"assistant_model": assistant, **options}):
                torch.manual_seed(seed)
                sampled = target.generate(inputs, do_sample=True, max_new_tokens=NEW_TOKENS, **arguments)
                texts.append(sampled.tolist())
            assert texts[0] == texts[1]


class TestSamples:
    def test_they_follow_the_draft_and_leave_the_users_generator_alone(self):
        logits = torch.randn(2, 1, 3, 5, generator=torch.Generator().manual_seed(0))
        ids = torch.tensor([3, 5, 7, 9, 11])
        drafter = Drafter(tiny_drafter(draft_vocab_size=5), tiny_target())
        drafter.model.draft_token_ids.copy_(ids)
        draft = dataclasses.replace(Draft.of(torch.zeros(2, 1, 3).long(), torch.ones(2, 1, 3)), logits=logits)
        state = torch.get_rng_state()
        branches = drafter.sample(draft, draft.cut(torch.zeros(2, 4000).long()))
        tokens, confidence = branches.best, branches.best_confidence
        assert torch.get_rng_state().equal(state)
        assert tokens.shape == confidence.shape == (2, 4000, 3)
        probabilities = logits[:, 0].softmax(-1)
        for row in range(2):
            for at in range(3):
                shares = (tokens[row, :, at, None] == ids).float().mean(0)
                assert (shares - probabilities[row, at]).abs().max() < 0.04
                index = (tokens[row, :, at, None] == ids).int().argmax(-1)
                assert confidence[row, :, at].equal(probabilities[row, at][index])

    def test_decoding_with_them_needs_no_second_drafter(self, monkeypatch):
        from hf_d2sd import D2SDAssistant

        assistant = D2SDAssistant.from_drafters(tiny_assistant(4, 6).first)
        plain = run("llama", 0, None)
        OracleLogits(monkeypatch, plain[0], rank=2)
        options = dict(d2sd_branch_source="samples", d2sd_num_branches=3)
        assert run("llama", 0, assistant, **options).tolist() == plain.tolist()
        assert max(assistant.last_stats.tree_sizes) > 4  # branches stand beside the first block


def test_guesses_are_the_likeliest_tokens_best_first():
    logits = torch.randn(1, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([3, 5, 7, 9, 11])
    drafter = Drafter(tiny_drafter(draft_vocab_size=5), tiny_target())
    drafter.model.draft_token_ids.copy_(ids)
    drafter._head = lambda hidden: logits.view(1, 6, 5)
    blocks = torch.zeros(1, 2, 4).long()
    guesses = drafter._read(torch.zeros(1, 8, WIDTH), torch.float32, blocks, 9)
    assert guesses.tokens.shape == (1, 2, 3, 5), "no more than there are"
    order = logits.argsort(-1, descending=True)
    assert guesses.tokens.equal(ids[order])
    torch.testing.assert_close(guesses.log_probs, logits.log_softmax(-1).gather(-1, order))
    torch.testing.assert_close(guesses.confidence, logits.softmax(-1).gather(-1, order))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(d2sd_tree_width=0), "d2sd_tree_width is 0"),
        (dict(d2sd_tree_width=2), "d2sd_tree_width is 2: .*Set d2sd_tree_budget"),
        (dict(d2sd_branch_source="third"), "d2sd_branch_source is 'third'; it must be one of"),
        (dict(d2sd_branch_source="samples", d2sd_tree_width=2, d2sd_tree_budget=8), "no use for samples"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        run("llama", 0, tiny_assistant(4, 6), **options)
