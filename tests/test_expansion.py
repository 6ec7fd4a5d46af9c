"""Trees of the likeliest paths, against an enumeration of all paths."""

import itertools
import math

import pytest
import torch

from hf_d2sd.candidates import Draft, count_nodes, likeliest_prefixes
from hf_d2sd.candidates import expand as candidates_of
from hf_d2sd.tree import FROM_FIRST, FROM_SECOND, CandidateTree


def random_guesses(seed: int, rows: int, drafts: int, depth: int, width: int, vocab: int = 9) -> Draft:
    """Distinct tokens at each position, with probabilities that fall and sum to less than one."""
    generator = torch.Generator().manual_seed(seed)
    shape = rows, drafts, depth
    tokens = torch.rand(*shape, vocab, generator=generator).argsort(-1)[..., :width]
    logits = 3 * torch.randn(*shape, vocab, generator=generator, dtype=torch.float64)
    return draft_of(tokens, logits.log_softmax(-1).sort(-1, descending=True).values[..., :width].float())


def draft_of(tokens, log_probs) -> Draft:
    return Draft(tokens, log_probs.exp(), log_probs, tokens.new_zeros(tokens.shape[:2]))


def after(guesses: Draft, prefixes: Draft) -> Draft:
    """The same drafts, of which those after the first go on from prefixes."""
    first, rest = (
        draft_of(guesses.tokens[:, part], guesses.log_probs[:, part]) for part in (slice(1), slice(1, None))
    )
    return first.followed_by(rest.after(prefixes))


def expand(anchors, guesses: Draft, prefixes: Draft | None = None, *, budget: int, max_depth=None) -> CandidateTree:
    guesses = guesses if prefixes is None else after(guesses, prefixes)
    candidates = candidates_of(guesses, budget)
    return CandidateTree.from_candidates(anchors, candidates, budget=budget, max_depth=max_depth, fixed_size=True)


def all_paths(guesses: Draft, row: int, redrafted: list[tuple] = (), max_depth: int | None = None) -> dict:
    """Every path's log probability, by definition: each token's by the draft of the longest re-drafted path above."""
    depth, width = guesses.tokens.shape[2:]
    found = {}
    for length in range(1, (max_depth or depth) + 1):
        for choice in itertools.product(range(width), repeat=length):
            path, total, draft = (), 0.0, 0
            for level, rank in enumerate(choice):
                total += guesses.log_probs[row, draft, level, rank].item()
                path += (int(guesses.tokens[row, draft, level, rank]),)
                if path in redrafted:
                    draft = 1 + redrafted.index(path)
            if total > -math.inf:
                found[path] = max(total, found.get(path, -math.inf))
    return found


def paths_of(tree, row: int) -> dict[tuple, int]:
    """Each node's path, without the anchor; fillers left out."""
    tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
    paths = {0: ()}
    for node in range(1, len(tokens)):
        if parents[node] >= 0:
            paths[node] = paths[parents[node]] + (tokens[node],)
    return {path: node for node, path in paths.items() if path}


ANCHORS = torch.tensor([7, 8])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("budget", [2, 5, 12, 60])
def test_the_nodes_are_the_likeliest_of_all_paths(seed, budget):
    guesses = random_guesses(seed, rows=2, drafts=1, depth=4, width=3)
    tree = expand(ANCHORS, guesses, budget=budget)
    for row in range(2):
        every = all_paths(guesses, row)
        best = sorted(every, key=every.get, reverse=True)[: budget - 1]
        nodes = paths_of(tree, row)
        assert set(nodes) == set(best)
        for path, node in nodes.items():
            assert float(tree.scores[row, node]) == pytest.approx(every[path], abs=1e-5)
            assert int(tree.depths[row, node]) == len(path)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("budget", [3, 9, 30])
def test_below_a_redrafted_path_its_own_draft_counts(seed, budget):
    guesses = random_guesses(seed, rows=2, drafts=4, depth=4, width=3)
    first = draft_of(guesses.tokens[:, :1], guesses.log_probs[:, :1])
    redrafted = likeliest_prefixes(ANCHORS, first, count=3, longest=3)
    tree = expand(ANCHORS, guesses, redrafted, budget=budget)
    for row in range(2):
        named = [tuple(t[:n]) for t, n in zip(redrafted.best[row].tolist(), redrafted.kept[row].tolist())]
        every = all_paths(guesses, row, named)
        nodes = paths_of(tree, row)
        assert set(nodes) == set(sorted(every, key=every.get, reverse=True)[: budget - 1])
        for path, node in nodes.items():
            above = [name for name in named if path[: len(name)] == name and len(name) < len(path)]
            writer = 1 + named.index(max(above, key=len)) if above else 0
            assert int(tree.ranks[row, node]) == writer
            assert int(tree.sources[row, node]) == (FROM_SECOND if writer else FROM_FIRST)


def test_the_likeliest_paths_are_those_of_the_first_draft_alone():
    guesses = random_guesses(3, rows=2, drafts=1, depth=5, width=4)
    paths = likeliest_prefixes(ANCHORS, guesses, count=6, longest=2)
    for row in range(2):
        every = all_paths(guesses, row, max_depth=2)
        best = sorted(every, key=every.get, reverse=True)[:6]
        found = [tuple(t[:n]) for t, n in zip(paths.best[row].tolist(), paths.kept[row].tolist())]
        assert sorted(found) == sorted(best)


@pytest.mark.parametrize("seed", range(12))
def test_the_next_levels_paths_are_the_likeliest_by_all_drafts_that_none_has_gone_on_from(seed):
    guesses = random_guesses(seed, rows=2, drafts=4, depth=4, width=3)
    first = draft_of(guesses.tokens[:, :1], guesses.log_probs[:, :1])
    before = likeliest_prefixes(ANCHORS, first, count=3, longest=3)
    paths = likeliest_prefixes(ANCHORS, after(guesses, before), count=4, longest=3)
    for row in range(2):
        named, found = (
            [tuple(t[:n]) for t, n in zip(prefixes.best[row].tolist(), prefixes.kept[row].tolist())]
            for prefixes in (before, paths)
        )
        every = all_paths(guesses, row, named, max_depth=3)
        best = sorted(set(every) - set(named), key=every.get, reverse=True)[:4]
        assert sorted(found) == sorted(best)


def test_where_no_path_is_left_a_prefix_is_empty():
    guesses = random_guesses(0, rows=2, drafts=3, depth=1, width=2)
    first = draft_of(guesses.tokens[:, :1], guesses.log_probs[:, :1])
    before = likeliest_prefixes(ANCHORS, first, count=2, longest=1)
    paths = likeliest_prefixes(ANCHORS, after(guesses, before), count=2, longest=1)
    assert before.kept.tolist() == [[1, 1]] * 2 and paths.kept.tolist() == [[0, 0]] * 2


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("budget", [2, 4, 9, 99])
def test_the_number_of_nodes_is_known_beforehand(depth, width, budget):
    guesses = random_guesses(0, rows=2, drafts=1, depth=depth, width=width)
    assert len(expand(ANCHORS, guesses, budget=budget)) == count_nodes(budget, width, depth)


def test_one_guess_a_position_gives_a_chain():
    guesses = random_guesses(0, rows=2, drafts=1, depth=4, width=1)
    tree = expand(ANCHORS, guesses, budget=9)
    assert tree.parents[:, :5].tolist() == [[-1, 0, 1, 2, 3]] * 2
    assert tree.tokens[:, 1:5].equal(guesses.tokens[:, 0, :, 0])


def test_no_node_is_deeper_than_a_row_allows():
    guesses = random_guesses(1, rows=2, drafts=1, depth=4, width=3)
    tree = expand(ANCHORS, guesses, budget=20, max_depth=torch.tensor([1, 3]))
    assert tree.depths.amax(1).tolist() == [1, 3]
    assert sorted(paths_of(tree, 0)) == sorted((t,) for t in guesses.tokens[0, 0, 0].tolist())


def test_of_equally_likely_nodes_a_parent_comes_before_its_child():
    guesses = draft_of(torch.arange(4).view(1, 1, 4, 1), torch.zeros(1, 1, 4, 1))  # certain all the way
    tree = expand(ANCHORS[:1], guesses, budget=3)
    assert tree.tokens.tolist() == [[7, 0, 1]] and tree.parents.tolist() == [[-1, 0, 1]]


def test_a_second_draft_may_be_the_deeper_one():
    first, second = random_guesses(0, 1, 1, 2, 2), random_guesses(1, 1, 1, 4, 2)
    both = first.followed_by(second)
    path = first.cut(torch.tensor([[2]]))  # all of the first block's best tokens
    tree = expand(ANCHORS[:1], both, path, budget=40)
    assert int(tree.depths.max()) == 4
    deepest = [p for p in paths_of(tree, 0) if len(p) > 2]
    assert deepest and all(p[:2] == tuple(first.tokens[0, 0, :, 0].tolist()) for p in deepest)
