"""Path heads: conditional probabilities against brute force, trees and chains of them, decoding, training."""

import itertools
import math

import pytest
import torch
from test_expansion import ANCHORS, paths_of, random_guesses
from test_training import random_blocks, random_rows
from tiny import OracleDrafts, prompt, tiny_drafter, tiny_target

from hf_d2sd import D2SDAssistant, D2SDDrafterConfig, D2SDDrafterModel
from hf_d2sd.candidates import Draft, expand
from hf_d2sd.drafting import Drafter
from hf_d2sd.paths import conditional, rest
from hf_d2sd.target import TargetPass
from hf_d2sd.training.blocks import NO_LABEL, true_tokens
from hf_d2sd.training.drafters import Trainee
from hf_d2sd.training.shards import Row
from hf_d2sd.tree import CandidateTree


def with_head(seed: int = 0, block_size: int = 5, **changes) -> D2SDDrafterModel:
    """A random drafter whose random path head says much."""
    drafter = tiny_drafter(block_size, seed=seed, **{"path_rank": 4, "path_candidates": 5, **changes})
    torch.manual_seed(seed)
    torch.nn.init.normal_(drafter.path_head.candidate.weight, std=0.6)
    return drafter


def with_transitions(seed: int, rows: int, drafts: int, depth: int, width: int) -> Draft:
    guesses = random_guesses(seed, rows, drafts, depth, width)
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, drafts, depth, width, width + 1, generator=generator)
    transitions = logits.log_softmax(-1)[..., :-1]
    fields = guesses.tokens, guesses.confidence, guesses.log_probs, guesses.kept
    return Draft(*fields, transitions=transitions)


def test_conditional_probabilities_are_a_softmax_in_which_the_candidates_alone_are_rescored():
    logits, scores = torch.randn(3, 30, dtype=torch.float64) * 3, torch.randn(3, 2, 6, dtype=torch.float64)
    best = logits.topk(6)
    log_probs = conditional(best.values, scores, rest(best.values, logits.logsumexp(-1)))
    for slot, before in itertools.product(range(3), range(2)):
        rescored = logits[slot].index_add(0, best.indices[slot], scores[slot, before])
        expected = rescored.log_softmax(-1)[best.indices[slot]]
        torch.testing.assert_close(log_probs[slot, before], expected)


def test_candidates_that_are_the_whole_vocabulary_leave_nothing_to_others():
    logits = torch.randn(4, 5)
    log_probs = conditional(logits, torch.zeros(4, 1, 5), rest(logits, logits.logsumexp(-1)))
    torch.testing.assert_close(log_probs[:, 0], logits.log_softmax(-1))


@pytest.mark.parametrize("seed", range(6))
def test_a_chain_takes_the_likeliest_token_after_the_one_before(seed):
    draft = with_transitions(seed, rows=2, drafts=3, depth=4, width=3)
    chain = draft.chain()
    for row, block in itertools.product(range(2), range(3)):
        before = 0
        for position in range(4):
            choices = draft.transitions[row, block, position, before]
            before = int(choices.argmax())
            assert chain.best[row, block, position] == draft.tokens[row, block, position, before]
            assert chain.best_confidence[row, block, position] == pytest.approx(choices[before].exp().item())


def every_path(draft: Draft, row: int, width: int) -> dict:
    """The log probability of each path of one draft in which a node has at most `width` children, by definition."""
    found = {}
    for length in range(1, draft.depth + 1):
        for places in itertools.product(range(draft.width), repeat=length):
            total, path, before = 0.0, (), 0
            for level, place in enumerate(places):
                choices = draft.transitions[row, 0, level, before]
                allowed = int((choices > choices[place]).sum()) < width
                total += choices[place].item() if allowed else -math.inf
                path, before = path + (int(draft.tokens[row, 0, level, place]),), place
            if total > -math.inf:
                found[path] = total
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("width", [2, 3])
def test_the_nodes_are_the_likeliest_of_all_paths_by_conditional_probabilities(seed, width):
    draft, budget = with_transitions(seed, rows=2, drafts=1, depth=4, width=3), 12
    candidates = expand(draft, budget, width)
    tree = CandidateTree.from_candidates(ANCHORS, candidates, budget=budget, fixed_size=True)
    for row in range(2):
        scores, nodes = every_path(draft, row, width), paths_of(tree, row)
        best = sorted(scores, key=scores.get, reverse=True)[: budget - 1]
        assert set(nodes) == set(best)
        for path, node in nodes.items():
            assert tree.scores[row, node].item() == pytest.approx(scores[path], abs=1e-5)


def drafter_at_work(model: D2SDDrafterModel, seed: int = 0) -> Drafter:
    """With seven tokens of random context, in two rows."""
    drafter = Drafter(model, tiny_target())
    generator = torch.Generator().manual_seed(seed)
    states = tuple(torch.randn(2, 7, 32, generator=generator) for _ in range(5))
    drafter.extend(TargetPass(torch.empty(2, 7, 0), states), [7, 7])
    return drafter


def reference(drafter: Drafter, hidden, before: int) -> tuple[int, float]:
    """A slot's likeliest candidate after a token, and its log probability, by definition over the whole vocabulary."""
    model, target = drafter.model, tiny_target()
    logits = target.lm_head(hidden)
    best = logits.topk(model.config.path_candidates).indices
    rows, embed = target.lm_head.weight[best], target.get_input_embeddings()(torch.tensor([before]))
    log_probs = logits.index_add(0, best, model.path_head(hidden, embed, rows)[0]).log_softmax(-1)
    token = int(best[log_probs[best].argmax()])
    return token, log_probs[token].item()


@pytest.mark.parametrize("kept", [0, 2])
def test_a_block_is_decoded_left_to_right_through_the_head(kept, monkeypatch):
    drafter, states = drafter_at_work(with_head()), []
    read = Drafter._read
    monkeypatch.setattr(
        Drafter, "_read", lambda self, hidden, *rest: states.append(hidden) or read(self, hidden, *rest)
    )
    anchor = torch.tensor([5, 6])
    with torch.no_grad():
        given = torch.tensor([[3, 9, 4, 4], [8, 2, 4, 4]])[:, None]
        prefixes = Draft.of(given, torch.full(given.shape, 0.5), torch.full((2, 1), kept))
        draft = drafter.redraft(anchor, prefixes, 5)
        hidden = states[0].view(2, 5, -1)
        for row in range(2):
            before = int(anchor[row])
            for slot in range(4):
                token = int(draft.best[row, 0, slot])
                if slot < kept:
                    assert token == given[row, 0, slot]
                else:
                    expected, log_prob = reference(drafter, hidden[row, slot + 1], before)
                    assert token == expected
                    assert draft.log_probs[row, 0, slot, 0] == pytest.approx(log_prob, abs=1e-4)
                before = token


def test_temperatures_divide_the_corrected_logits():
    plain, cooled = with_head(), with_head()
    cooled.config.confidence_temperatures = [1.0, 2.0, 1.0, 1.0]
    with torch.no_grad():
        drafts = [drafter_at_work(model).draft(torch.tensor([5, 6]), 5, 3) for model in (plain, cooled)]
    hot, cold = (draft.transitions[:, 0, 1] for draft in drafts)
    differences = (hot - hot[..., :1]) / (cold - cold[..., :1])
    torch.testing.assert_close(differences[..., 1:], torch.full_like(differences[..., 1:], 2.0), rtol=1e-3, atol=1e-3)


def test_a_head_that_was_not_trained_changes_nothing():
    drafter, same = tiny_drafter(5), tiny_drafter(5)
    headed = tiny_drafter(5, path_rank=4)
    headed.load_state_dict(drafter.state_dict(), strict=False)
    with torch.no_grad():
        chains = [drafter_at_work(model).draft(torch.tensor([5, 6]), 5) for model in (same, headed)]
    assert torch.equal(chains[0].best, chains[1].best)
    torch.testing.assert_close(chains[0].confidence, chains[1].confidence)


PAIRS = {
    "both": lambda: D2SDAssistant.from_drafters(with_head(0), with_head(1)),
    "first": lambda: D2SDAssistant.from_drafters(with_head(0), tiny_drafter(5, seed=1)),
    "second": lambda: D2SDAssistant.from_drafters(tiny_drafter(5), with_head(1)),
    "pruned": lambda: D2SDAssistant.from_drafters(
        with_head(0, draft_vocab_size=12), with_head(1, block_size=7, draft_vocab_size=12, path_candidates=20)
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("width, branches", [(1, 0), (1, 3), (4, 0), (4, 3)])
def test_the_text_is_the_targets(pair, width, branches):
    target, ids = tiny_target(), torch.cat([prompt(9, seed=seed) for seed in range(3)])
    options = {"do_sample": False, "max_new_tokens": 20}
    plain = target.generate(ids, **options)
    options |= {"d2sd_tree_width": width, "d2sd_tree_budget": 14, "d2sd_num_branches": branches}
    assert torch.equal(target.generate(ids, assistant_model=PAIRS[pair](), **options), plain)


@pytest.mark.parametrize("width", [1, 4])
def test_a_seed_gives_the_text_of_plain_sampling(width):
    target, ids, texts = tiny_target(), prompt(), []
    for arguments in ({}, {"assistant_model": PAIRS["both"](), "d2sd_tree_width": width, "d2sd_tree_budget": 14}):
        torch.manual_seed(11)
        texts.append(target.generate(ids, do_sample=True, max_new_tokens=20, **arguments))
    assert torch.equal(*texts)


def test_branches_go_on_from_the_kept_token():
    first, second = with_head(0), with_head(1)
    with torch.no_grad():
        given = torch.tensor([[3, 4, 4, 4], [9, 4, 4, 4]])[None]
        prefixes = Draft.of(given, torch.ones(given.shape), torch.ones(1, 2, dtype=torch.long))
        states = tuple(torch.randn(1, 7, 32) for _ in range(5))
        drafter = Drafter(second, tiny_target())
        drafter.extend(TargetPass(torch.empty(1, 7, 0), states), [7])
        draft = drafter.redraft(torch.tensor([5]), prefixes, 5, width=3)
    tree = CandidateTree.from_candidates(torch.tensor([5]), expand(draft, 30, 3), budget=30, fixed_size=True)
    assert first.config.path_rank and draft.transitions.shape == (1, 2, 4, 5, 5)
    assert torch.equal(draft.tokens[0, :, 0, 0], torch.tensor([3, 9]))
    assert torch.isinf(draft.transitions[0, :, 0, 0, 1:]).all()  # nothing else stands where a token was kept
    assert len(tree) > 1


def test_a_pair_with_heads_is_saved_and_loaded(tmp_path):
    PAIRS["both"]().save_pretrained(tmp_path)
    loaded = D2SDAssistant.from_pretrained(tmp_path)
    assert loaded.config.first.path_rank == 4 and loaded.config.first.path_width == 8
    assert torch.equal(loaded.second.path_head.candidate.weight, with_head(1).path_head.candidate.weight)


def test_a_pair_that_lacks_its_heads_weights_is_refused(tmp_path):
    tiny_drafter(5).save_pretrained(tmp_path)
    config = D2SDDrafterConfig(**{**tiny_drafter(5).config.to_dict(), "path_rank": 4})
    with pytest.raises(ValueError, match="path_head"):
        D2SDDrafterModel.from_pretrained(tmp_path, config=config)
    with pytest.raises(ValueError, match="path_rank is 0"):
        D2SDDrafterConfig(**{**tiny_drafter(5).config.to_dict(), "path_rank": 0})


def test_a_head_reads_rows_of_a_head_that_can_only_be_called(monkeypatch):
    class Called(torch.nn.Module):
        def __init__(self, head):
            super().__init__()
            self.inner = head

        def forward(self, hidden):
            return self.inner(hidden)

    target, model = tiny_target(), with_head()
    with torch.no_grad():
        plain = drafter_at_work(model).draft(torch.tensor([5, 6]), 5, 3)
        monkeypatch.setattr(target, "get_output_embeddings", lambda head=target.lm_head: Called(head))
        called = drafter_at_work(model).draft(torch.tensor([5, 6]), 5, 3)
    torch.testing.assert_close(plain.transitions, called.transitions, rtol=1e-4, atol=1e-4)


# Training ------------------------------------------------------------------------------------------------------------


def scored_by_definition(model, target, blocks) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """Of each labelled slot the corrected logits (V,), the candidates (C,) and the label."""
    hidden, before, slots = Trainee(model, target).hidden(blocks), true_tokens(blocks), []
    for row, block, slot in (blocks.labels != NO_LABEL).nonzero().tolist():
        state = hidden[row, block, slot]
        logits = target.lm_head(state)
        best = logits.topk(model.config.path_candidates).indices
        embed = target.get_input_embeddings()(before[row, block, slot - 1 : slot])
        scores = model.path_head(state, embed, target.lm_head.weight[best])[0]
        slots.append((logits.index_add(0, best, scores), best, int(blocks.labels[row, block, slot])))
    return slots


def path_loss_by_definition(model, target, blocks) -> list[float]:
    """-log of the label's probability after the true token before it; of all that is no candidate together."""
    losses = []
    for logits, best, label in scored_by_definition(model, target, blocks):
        probabilities = logits.softmax(-1)
        others = probabilities.index_fill(0, best, 0.0).sum()
        losses.append(-(probabilities[label] if label in best else others).log().item())
    return losses


def test_the_loss_is_the_cross_entropy_of_what_decoding_reads():
    model, target = with_head(), tiny_target()
    blocks = random_blocks(model, random_rows(12, 15))
    trainee = Trainee(model, target, path_head_alone=True, chunk=7).eval()
    with torch.no_grad():
        loss, _, said = trainee(blocks)
        labelled = blocks.labels != NO_LABEL
        expected = torch.tensor(path_loss_by_definition(model, target, blocks))
        weights = torch.exp(-(blocks.distance[labelled] - 1) / 4.0)
    assert loss.item() == pytest.approx(float((expected * weights).sum() / weights.sum()), rel=1e-4)
    torch.testing.assert_close(said[labelled], torch.exp(-expected), rtol=1e-3, atol=1e-5)


def test_the_head_alone_is_trained_and_the_drafter_stays_as_it_is():
    model, target = with_head(), tiny_target()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainee = Trainee(model, target, path_head_alone=True)
    blocks = random_blocks(model, random_rows(20, 24, 30))
    optimizer = torch.optim.AdamW([p for p in trainee.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(60):
        loss = trainee(blocks)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"path_head.{name}.weight" for name in ("slot", "previous", "state", "candidate")}


def test_both_are_trained_together_and_the_heads_loss_leaves_the_drafter_alone():
    target, gradients = tiny_target(), []
    for drafter in (tiny_drafter(5), with_head()):
        drafter = drafter.train()
        drafter.load_state_dict(tiny_drafter(5).state_dict(), strict=False)
        drafter.zero_grad()
        Trainee(drafter, target)(random_blocks(drafter, random_rows(12, 15)))[0].backward()
        gradients.append(drafter.fc.weight.grad)
    torch.testing.assert_close(*gradients)
    assert drafter.path_head.candidate.weight.grad.abs().sum() > 0


def rows_of_pairs(count: int) -> list[Row]:
    """Rows of random tokens, each followed by its partner."""
    firsts = torch.randint(2, 12, (count, 10))
    return [Row(torch.stack([row, row + 10], dim=1).flatten(), 4) for row in firsts]


def test_a_head_learns_what_no_slot_can_know():
    """A slot that is a partner cannot say whose, if the token before it is masked as well. A path head can."""
    torch.manual_seed(0)
    target, model = tiny_target(), tiny_drafter(5, path_rank=8, path_candidates=20)
    trainee = Trainee(model.train(), target)
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=5e-3)
    for step in range(120):
        loss = trainee(random_blocks(model, rows_of_pairs(12), base=0.0, seed=step))[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    blocks = random_blocks(model.eval(), rows_of_pairs(24), base=0.0, seed=1000)
    with torch.no_grad():
        _, right, _ = trainee.eval()(blocks)
        model.path_head.candidate.weight.zero_()
        _, without, _ = trainee(blocks)
    partner = (true_tokens(blocks) >= 12) & (blocks.labels != NO_LABEL)
    partner[..., :2] = False  # the token before is not the anchor, whom all slots see
    assert right[partner].float().mean() > 0.9
    assert without[partner].float().mean() < 0.5


def test_oracle_drafts_of_full_depth_are_accepted_with_heads_on(monkeypatch):
    target, ids = tiny_target(), prompt()
    plain = target.generate(ids, do_sample=False, max_new_tokens=24)
    OracleDrafts(monkeypatch, plain[0], accuracy=1.0)
    pair = PAIRS["both"]()
    assert torch.equal(target.generate(ids, assistant_model=pair, do_sample=False, max_new_tokens=24), plain)
    assert pair.last_stats.mean_acceptance_length > 3


def test_guesses_are_the_likeliest_candidates_after_the_true_token():
    model, target = with_head(), tiny_target()
    blocks = random_blocks(model, random_rows(12, 15))
    with torch.no_grad():
        logits, places = Trainee(model, target).eval().guesses(blocks)
        for seen, place, (expected, best, _) in zip(logits, places, scored_by_definition(model, target, blocks)):
            torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)
            assert place == best[expected[best].argmax()]
