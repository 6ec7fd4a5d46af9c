"""What followed which token in the text so far: against counting, in rings, in drafts, in training."""

import math
import random
from collections import Counter

import pytest
import torch
from test_paths import drafter_at_work, with_head
from test_training import random_blocks, random_rows
from tiny import prompt, tiny_drafter, tiny_target

from hf_d2sd import D2SDAssistant, D2SDDrafterConfig, followers
from hf_d2sd.candidates import Draft
from hf_d2sd.drafting import Drafter
from hf_d2sd.followers import AGREED, DOUBT, CycleFollowers, Followers
from hf_d2sd.paths import OfText, conditional, rest
from hf_d2sd.training.blocks import NO_LABEL, true_tokens
from hf_d2sd.training.drafters import Trainee

CPU = torch.device("cpu")


def counted(text: list[int], before: int, after: int, most: int = 10**9) -> float:
    """The share, pair by pair."""
    pairs = list(zip(text, text[1:]))[-most:]
    return Counter(pairs)[before, after] / (stood(text, before, most) + DOUBT)


def stood(text: list[int], token: int, most: int = 10**9) -> int:
    return sum(one == token for one in text[:-1][-most:])


def left(text: list[int], before: int, most: int = 10**9) -> float:
    return 1 - AGREED * stood(text, before, most) / (stood(text, before, most) + DOUBT)


def says_the_same(got, texts: list[list[int]], most: int = 10**9, words: int = 5) -> None:
    every = torch.arange(words).expand(len(texts), 1, words)
    said = got.of_text(every, every, 2.0)
    expected = [[[2 * counted(text, a, b, most) for b in range(words)] for a in range(words)] for text in texts]
    torch.testing.assert_close(said.scores[:, 0], torch.tensor(expected))
    torch.testing.assert_close(
        said.left[:, 0], torch.tensor([[left(text, a, most) for a in range(5)] for text in texts])
    )


@pytest.mark.parametrize("most", [4, 7, 2048])
@pytest.mark.parametrize("seed", range(4))
def test_shares_are_those_of_the_latest_pairs_however_the_text_came(monkeypatch, seed, most):
    """And rows that leave take theirs along."""
    monkeypatch.setattr(followers, "MOST", most)
    rng = random.Random(seed)

    def some(length: int) -> list[int]:
        return [rng.randrange(5) for _ in range(length)]

    texts = [some(rng.choice((0, 1, 9, 30))) for _ in range(4)]
    known = Followers(texts, CPU)
    for step in range(12):
        more = [some(rng.choice((0, 0, 1, 3, 11))) for _ in texts]
        known.extend(more)
        texts = [text + new for text, new in zip(texts, more)]
        if step % 3 == 2:
            says_the_same(known, texts, most)
        if step == 7:
            known.select([3, 1])
            texts = [texts[3], texts[1]]


def test_a_text_that_is_longer_than_what_is_kept_counts_its_end():
    text = [random.Random(0).randrange(5) for _ in range(5000)]
    says_the_same(Followers([text], CPU), [text], followers.MOST)


@pytest.mark.parametrize("most", [6, 2048])
def test_a_ring_that_grows_on_the_device_holds_the_same(monkeypatch, most):
    monkeypatch.setattr(followers, "MOST", most)
    rng = random.Random(1)
    texts = [[rng.randrange(5) for _ in range(length)] for length in (3, 20)]
    here, there = Followers(texts, CPU), CycleFollowers(2, CPU)
    there.load(here)
    gained, anchors = torch.zeros(2, dtype=torch.long), torch.tensor([text[-1] for text in texts])
    for _ in range(10):
        emitted, counts = torch.randint(0, 5, (2, 4)), torch.randint(0, 5, (2,))
        there.extend(anchors, emitted, counts, gained)
        new = [row[:count].tolist() for row, count in zip(emitted, counts)]
        here.extend(new)
        texts = [text + more for text, more in zip(texts, new)]
        gained, anchors = gained + counts, torch.tensor([text[-1] for text in texts])
        says_the_same(there, texts, most)
        says_the_same(here, texts, most)


# Drafts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headed", [True, False])
@pytest.mark.parametrize("kept", [0, 2])
def test_what_a_draft_says_of_paths_is_its_heads_scores_and_the_texts(headed, kept, monkeypatch):
    """Each candidate's after each one of the slot before, by definition; a kept prefix's too."""
    model = with_head() if headed else tiny_drafter(5, path_candidates=5)
    drafter, states = drafter_at_work(model), []
    texts = [[3, 9, 3, 9, 5], [8, 2, 6, 6, 8, 1, 6]]
    drafter.followers, model.config.path_text_weight = Followers(texts, CPU), 2.5
    read = Drafter._read
    monkeypatch.setattr(
        Drafter, "_read", lambda self, hidden, *rest: states.append(hidden) or read(self, hidden, *rest)
    )
    anchor, target = torch.tensor([5, 6]), tiny_target()
    with torch.no_grad():
        given = torch.tensor([[3, 9, 4, 4], [8, 2, 4, 4]])[:, None]
        prefixes = Draft.of(given, torch.full(given.shape, 0.5), torch.full((2, 1), kept))
        draft = drafter.redraft(anchor, prefixes, 5, width=3)
        hidden = states[0].view(2, 5, -1)
        for row in range(2):
            for slot in range(kept, 4):
                logits = target.lm_head(hidden[row, slot + 1])
                best = logits.topk(5)
                assert torch.equal(draft.tokens[row, 0, slot], best.indices)
                if slot == 0:
                    before = [int(anchor[row])] * 5
                elif slot == kept:
                    before = [int(given[row, 0, slot - 1])]  # the only one that can be
                else:
                    before = draft.tokens[row, 0, slot - 1].tolist()
                said = torch.tensor([[2.5 * counted(texts[row], a, int(b)) for b in best.indices] for a in before])
                said = OfText(said, torch.tensor([left(texts[row], a) for a in before]))
                scores = torch.zeros(())
                if headed:
                    embeds = target.get_input_embeddings()(torch.tensor(before))
                    scores = model.path_head(hidden[row, slot + 1], embeds, target.lm_head.weight[best.indices])
                expected = conditional(best.values, scores, rest(best.values, logits.logsumexp(-1)), said)
                got = draft.transitions[row, 0, slot][: len(before)]
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def reading(seed: int = 0, headed: bool = True, **changes):
    model = with_head(seed, **changes) if headed else tiny_drafter(5, seed=seed, **changes)
    model.config.path_text_weight = 3.0
    return model


PAIRS = {
    "both": lambda: D2SDAssistant.from_drafters(reading(0), reading(1)),
    "without heads": lambda: D2SDAssistant.from_drafters(reading(0, headed=False), reading(1, headed=False)),
    "first": lambda: D2SDAssistant.from_drafters(reading(0), tiny_drafter(5, seed=1)),
    "second": lambda: D2SDAssistant.from_drafters(tiny_drafter(5), reading(1, draft_vocab_size=12)),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("width, branches", [(1, 0), (1, 3), (4, 3)])
def test_the_text_is_the_targets(pair, width, branches):
    target, ids = tiny_target(), torch.cat([prompt(9, seed=seed) for seed in range(3)])
    options = {"do_sample": False, "max_new_tokens": 20}
    plain = target.generate(ids, **options)
    options |= {"d2sd_tree_width": width, "d2sd_tree_budget": 14, "d2sd_num_branches": branches}
    assert torch.equal(target.generate(ids, assistant_model=PAIRS[pair](), **options), plain)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("most", [8, 2048])
def test_recorded_cycles_draft_what_others_do(pair, most, monkeypatch):
    """A text that repeats itself, in a batch: the same tokens in each cycle, call after call."""
    monkeypatch.setattr(followers, "MOST", most)
    target, ids = tiny_target(), torch.cat([prompt(4, seed=seed).repeat(1, 4) for seed in range(2)])
    options = dict(do_sample=False, max_new_tokens=24, d2sd_tree_width=4, d2sd_tree_budget=10, d2sd_context=0)
    assistant, cycles = PAIRS[pair](), []
    for compiled in (False, True, True):
        if compiled:
            assistant.compile(backend=None)
        target.generate(ids, assistant_model=assistant, d2sd_compile=compiled, **options)
        cycles.append((assistant.last_stats.committed_per_cycle, assistant.last_stats.tree_sizes))
    assert cycles[0] == cycles[1] == cycles[2]


@pytest.mark.parametrize("context, read", [(0, True), (6, False)])
def test_pairs_are_read_where_the_text_so_far_proposes_nothing_itself(context, read):
    """It would be counted twice."""
    target, ids = tiny_target(), prompt(4).repeat(1, 6)
    options = dict(do_sample=False, max_new_tokens=24, d2sd_tree_width=4, d2sd_tree_budget=10)
    drafted = []
    for weight in (None, 3.0):
        assistant = PAIRS["without heads"]()
        for drafter in assistant.drafters:
            drafter.config.path_text_weight = weight
        target.generate(
            ids, assistant_model=assistant, d2sd_auto=False, d2sd_context=context, d2sd_trace=True, **options
        )
        drafted.append([cycle.tokens for cycle in assistant.last_stats.trace])
    assert (drafted[0] != drafted[1]) == read


def test_what_the_text_repeats_is_drafted_where_all_else_is_equal():
    model = tiny_drafter(5, path_candidates=30)
    model.config.path_text_weight = 6.0
    cycle = torch.tensor([7, 3, 22, 11, 0])
    drafter = Drafter(model, tiny_target())
    drafter.followers = Followers([cycle.repeat(8).tolist()], CPU)
    blocks = torch.full((1, 1, 5), model.config.mask_token_id)
    blocks[..., 0] = cycle[-1]
    with torch.no_grad():
        draft = drafter._read(torch.zeros(1, 5, 32), torch.float32, blocks, 1)  # all tokens are as likely
    assert draft.best[0, 0].tolist() == cycle[:4].tolist()
    assert (draft.confidence > 0.5).all()


def test_a_weight_that_is_none_is_refused_early():
    with pytest.raises(ValueError, match="path_text_weight is -1"):
        D2SDDrafterConfig(**{**tiny_drafter(5).config.to_dict(), "path_text_weight": -1.0})
    with pytest.raises(ValueError, match="path_text_weight is nan"):
        D2SDDrafterConfig(**{**tiny_drafter(5).config.to_dict(), "path_text_weight": math.nan})


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headed", [True, False])
def test_training_reads_the_text_before_the_anchor_alone(headed):
    """As decoding does: what stands behind the anchor is what is to be drafted."""
    model, target = reading(headed=headed, path_candidates=5), tiny_target()
    rows = random_rows(12, 30)
    for row in rows:
        row.tokens.remainder_(7)  # pairs come again
    blocks = random_blocks(model, rows, base=0.6)
    labelled = blocks.labels != NO_LABEL
    of_text = Trainee(model, target)._of_text(blocks, labelled)
    every = torch.arange(7).expand(int(labelled.sum()), 7)
    said, before = of_text(slice(None), every), true_tokens(blocks)
    seen = 0
    for (row, block, slot), scores, keeps in zip(labelled.nonzero().tolist(), said.scores[:, 0], said.left[:, 0]):
        text = rows[row].tokens[: int(blocks.anchors[row, block]) + 1].tolist()
        one = int(before[row, block, slot - 1])
        expected = [3.0 * counted(text, one, b) for b in range(7)]
        assert scores.tolist() == pytest.approx(expected) and keeps == pytest.approx(left(text, one))
        seen += sum(map(bool, expected))
    assert seen > 20
    some = of_text(slice(3, 8), every[3:8])
    assert torch.equal(some.scores, said.scores[3:8]) and torch.equal(some.left, said.left[3:8])


def test_the_heads_loss_and_guesses_are_those_of_the_sum():
    model, target = reading(), tiny_target()
    blocks = random_blocks(model, random_rows(12, 15))
    labelled = blocks.labels != NO_LABEL
    trainee = Trainee(model, target, path_head_alone=True, chunk=7).eval()
    with torch.no_grad():
        logits, places = trainee.guesses(blocks)
        plain, of_text = trainee.logits(blocks), trainee._of_text(blocks, labelled)
        best = plain.topk(5)
        model.config.path_text_weight = None
        scores = trainee.guesses(blocks)[0].gather(1, best.indices) - best.values
        model.config.path_text_weight = 3.0
        others = rest(best.values, plain.logsumexp(-1))
        given = conditional(best.values, scores[:, None], others, of_text(slice(None), best.indices))[:, 0]
        best = best.indices
        torch.testing.assert_close(logits.log_softmax(-1).gather(1, best), given, rtol=1e-3, atol=1e-4)
        assert torch.equal(places, best.gather(1, given.argmax(1, keepdim=True))[:, 0])
        _, _, said = trainee(blocks)
    labels = blocks.labels[labelled]
    probabilities, named = logits.softmax(-1), (best == labels[:, None]).any(1)
    others = 1 - probabilities.gather(1, best).sum(1)
    expected = torch.where(named, probabilities.gather(1, labels[:, None])[:, 0], others)
    torch.testing.assert_close(said[labelled], expected, rtol=1e-3, atol=1e-5)
