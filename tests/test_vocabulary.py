"""A pruned draft vocabulary grows by what a call's text says."""

import pytest
import torch
from tiny import prompt, tiny_drafter, tiny_target

from hf_d2sd import D2SDAssistant
from hf_d2sd import vocabulary as module
from hf_d2sd.drafting import Drafter
from hf_d2sd.target import TargetPass

PRUNED = [0, 1, 2, 3, 5, 8, 13, 21]


def pruned(seed: int = 0, **changes):
    drafter = tiny_drafter(5, seed=seed, draft_vocab_size=len(PRUNED), **changes)
    drafter.draft_token_ids.copy_(torch.tensor(PRUNED))
    if drafter.path_head is not None:
        torch.nn.init.normal_(drafter.path_head.candidate.weight, std=0.5)
    return drafter


def drafted(model, words=(), width: int = 1):
    drafter = Drafter(model, tiny_target())
    generator = torch.Generator().manual_seed(0)
    drafter.extend(
        TargetPass(torch.empty(1, 7, 0), tuple(torch.randn(1, 7, 32, generator=generator) for _ in range(5))), [7]
    )
    drafter.words.add(words)
    with torch.no_grad():
        return drafter.draft(torch.tensor([5]), 5, width)


@pytest.mark.parametrize("changes", [{}, {"path_rank": 4, "path_candidates": 12}, {"output_multiplier": 0.5}])
def test_with_all_other_words_a_draft_is_that_of_the_whole_vocabulary(changes):
    model, whole = pruned(**changes), tiny_drafter(5, **changes)
    whole.load_state_dict({name: value for name, value in model.state_dict().items() if "token_ids" not in name})
    expected, seen = drafted(whole, width=3), drafted(model, range(24), width=3)
    assert torch.equal(seen.tokens[..., :3], expected.tokens[..., :3])
    torch.testing.assert_close(seen.log_probs, expected.log_probs)
    if expected.transitions is not None:
        torch.testing.assert_close(seen.transitions, expected.transitions, rtol=1e-4, atol=1e-4)


def test_only_words_of_the_vocabulary_and_of_the_text_are_drafted():
    seen = drafted(pruned(), [4, 9, 9, 4, 5], width=10)
    assert set(seen.tokens.flatten().tolist()) == {*PRUNED, 4, 9}


def test_a_call_learns_its_prompt_and_what_it_wrote(monkeypatch):
    added = []
    monkeypatch.setattr(module.CallWords, "add", lambda self, tokens: added.append(list(tokens)))
    target, ids = tiny_target(), prompt()
    pair = D2SDAssistant.from_drafters(pruned(0), pruned(1))
    text = target.generate(ids, assistant_model=pair, do_sample=False, max_new_tokens=12)[0].tolist()
    assert [token for tokens in added[::2] for token in tokens] == text  # and each drafter alike
    assert added[::2] == added[1::2]


@pytest.mark.parametrize("width", [1, 3])
def test_the_text_is_the_targets_in_batches(width):
    target, ids = tiny_target(), torch.cat([prompt(9, seed=seed) for seed in range(3)])
    options = {"do_sample": False, "max_new_tokens": 16}
    pair = D2SDAssistant.from_drafters(pruned(0), pruned(1))
    ours = target.generate(ids, assistant_model=pair, d2sd_tree_width=width, d2sd_tree_budget=12, **options)
    assert torch.equal(ours, target.generate(ids, **options))


def test_a_call_adds_no_more_words_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(module, "MOST_WORDS", 3)
    words = Drafter(pruned(), tiny_target()).words
    words.add([4, 6])
    words.add([7, 9, 10])
    assert words.ids.tolist() == [4, 6, 7]


def test_calls_do_not_share_their_words():
    model = pruned()
    Drafter(model, tiny_target()).words.add([4])
    assert len(Drafter(model, tiny_target()).words) == 0


@pytest.mark.parametrize("model", [tiny_drafter(5), tiny_drafter(5, own_head=True)])
def test_drafters_that_need_no_words_get_none(model):
    words = Drafter(model, tiny_target()).words
    words.add(range(24))
    assert len(words) == 0


def test_tokens_outside_the_head_are_left_alone():
    words = Drafter(pruned(), tiny_target()).words
    words.add([10_000, 4])
    assert words.ids.tolist() == [4]
