"""The merged tree against a trie of dicts that was written without looking at it."""

import math
import random

import pytest
import torch

from hf_d2sd.tree import FROM_FIRST, FROM_SECOND, FROM_TARGET, Branches, CandidateTree

ANCHOR = 7


class Case:
    """A first block and branches over a small vocabulary, so that rows share prefixes, as plain lists."""

    def __init__(self, seed: int, block_size=None, second_block_size=None, num_branches=None, vocab=None):
        rng = random.Random(seed)
        self.depth = (block_size or rng.randrange(2, 8)) - 1
        self.second_depth = (second_block_size or self.depth + 1 + rng.choice([0, 0, 1, 3])) - 1
        count = rng.randrange(0, 6) if num_branches is None else num_branches
        vocab = vocab or rng.choice([2, 3, 6])
        self.tokens = [rng.randrange(vocab) for _ in range(self.depth)]
        self.confidence = [rng.uniform(0.02, 1.0) for _ in range(self.depth)]
        longest = self.depth if self.second_depth > self.depth else self.depth - 1
        self.prefix_lengths = [rng.randrange(0, longest + 1) for _ in range(count)]
        self.branch_tokens = [[rng.randrange(vocab) for _ in range(self.second_depth)] for _ in range(count)]
        self.branch_confidence = [[rng.uniform(0.02, 1.0) for _ in range(self.second_depth)] for _ in range(count)]

    def branches(self) -> Branches:
        return Branches(
            torch.tensor(self.prefix_lengths, dtype=torch.long),
            torch.tensor(self.branch_tokens, dtype=torch.long).view(-1, self.second_depth),
            torch.tensor(self.branch_confidence, dtype=torch.float64).view(-1, self.second_depth),
        )

    def merge(self, **options) -> CandidateTree:
        confidence = torch.tensor(self.confidence, dtype=torch.float64)
        return CandidateTree.merge(
            torch.tensor(ANCHOR), torch.tensor(self.tokens), confidence, self.branches(), **options
        )

    def rows(self) -> list[list[tuple[int, float]]]:
        """(token, confidence) along the first block and along each branch, kept prefix included."""
        first = list(zip(self.tokens, self.confidence))
        rows = [first]
        for kept, tokens, confidence in zip(self.prefix_lengths, self.branch_tokens, self.branch_confidence):
            rows.append(first[:kept] + list(zip(tokens, confidence))[kept:])
        return rows


def trie(case: Case, max_depth=None) -> dict[tuple[int, ...], tuple[float, int]]:
    """Token path → (greatest product of confidences over the rows that hold it, first such row)."""
    nodes = {}
    for rank, row in enumerate(case.rows()):
        path, probability = (), 1.0
        for token, confidence in row[:max_depth]:
            path, probability = (*path, token), probability * confidence
            best, owner = nodes.get(path, (0.0, rank))
            nodes[path] = (max(best, probability), owner)
    return nodes


def paths(tree: CandidateTree) -> list[tuple[int, ...]]:
    """The tokens from the anchor's child to each node, by walking up the parents."""
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    result = []
    for node in range(len(tree)):
        path = []
        while node != 0:
            path.append(tokens[node])
            node = parents[node]
        result.append(tuple(reversed(path)))
    return result


SEEDS = range(300)


def test_the_nodes_are_the_distinct_token_paths():
    shared = 0
    for seed in SEEDS:
        case = Case(seed)
        found = paths(case.merge())
        assert len(found) == len(set(found)), "two nodes of one token path"
        assert set(found) == {(), *trie(case)}, seed
        shared += sum(map(len, case.rows())) - len(trie(case))
    assert shared > 1000, "rows must share nodes, or merging is not tested"


def test_a_score_is_the_best_owners_log_probability():
    for seed in SEEDS:
        case = Case(seed)
        tree, nodes = case.merge(), trie(case)
        expected = [0.0] + [math.log(nodes[path][0]) for path in paths(tree)[1:]]
        assert tree.scores.tolist() == pytest.approx(expected, abs=1e-9)


def test_scores_never_rise_along_a_path():
    for seed in SEEDS:
        tree = Case(seed).merge()
        assert (tree.scores[1:] <= tree.scores[tree.parents[1:]]).all()


def test_ranks_name_the_first_owner_and_sources_the_drafter():
    seen = set()
    for seed in SEEDS:
        case = Case(seed)
        tree, nodes = case.merge(), trie(case)
        expected = [nodes[path][1] for path in paths(tree)[1:]]
        assert tree.ranks.tolist()[1:] == expected
        sources = [FROM_TARGET] + [FROM_FIRST if rank == 0 else FROM_SECOND for rank in expected]
        assert tree.sources.tolist() == sources
        seen.update(sources)
    assert seen == {FROM_TARGET, FROM_FIRST, FROM_SECOND}


@pytest.mark.parametrize("options", [dict(), dict(budget=6), dict(max_depth=2), dict(budget=9, max_depth=3)])
def test_parents_stand_before_children_and_depths_count_from_the_anchor(options):
    for seed in SEEDS:
        tree = Case(seed).merge(**options)
        parents, depths = tree.parents.tolist(), tree.depths.tolist()
        assert (tree.tokens[0], parents[0], depths[0]) == (ANCHOR, -1, 0)
        assert all(0 <= parent < node for node, parent in enumerate(parents) if node)
        assert depths == [len(path) for path in paths(tree)]
        assert len(set(zip(parents, tree.tokens.tolist()))) == len(tree), "siblings carry distinct tokens"


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 8, 16])
def test_a_budget_keeps_the_nodes_most_likely_to_be_reached(budget):
    pruned = 0
    for seed in SEEDS:
        case = Case(seed)
        nodes = trie(case)
        tree = case.merge(budget=budget)
        kept = set(paths(tree)) - {()}
        assert kept <= set(nodes)
        assert len(kept) == min(budget - 1, len(nodes))
        assert all(path[:-1] in kept for path in kept if len(path) > 1), "a kept node's parent is kept"
        dropped = set(nodes) - kept
        pruned += len(dropped)
        if kept and dropped:
            worst = min(nodes[path][0] for path in kept)
            assert worst >= max(nodes[path][0] for path in dropped) * (1 - 1e-9), "a dropped node outranks a kept one"
        expected = [math.log(nodes[path][0]) for path in paths(tree)[1:]]
        assert tree.scores[1:].tolist() == pytest.approx(expected, abs=1e-9)
    assert pruned > 100


def test_a_budget_beyond_the_tree_changes_nothing():
    for seed in range(30):
        case = Case(seed)
        assert paths(case.merge(budget=10**6)) == paths(case.merge())


@pytest.mark.parametrize("confidence", [1.0, 0.0])
@pytest.mark.parametrize("budget", [2, 3, 5, 7])
def test_equal_scores_still_keep_parents_with_their_children(confidence, budget):
    """All products alike, 1 or 0: ties are broken so that the kept nodes form a tree."""
    for seed in range(100):
        case = Case(seed)
        case.confidence = [confidence] * case.depth
        case.branch_confidence = [[confidence] * case.second_depth for _ in case.prefix_lengths]
        kept = set(paths(case.merge(budget=budget)))
        assert len(kept) == min(budget, 1 + len(trie(case)))
        assert all(path[:-1] in kept for path in kept if path)


def test_low_precision_confidences_keep_a_tree():
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, 3, (15,), generator=generator)
        near_one = 1 - 1e-3 * torch.rand(5, 17, generator=generator)
        branches = Branches(
            torch.randint(0, 16, (4,), generator=generator),
            torch.randint(0, 3, (4, 17), generator=generator),
            near_one[1:].bfloat16(),
        )
        tree = CandidateTree.merge(torch.tensor(ANCHOR), tokens, near_one[0, :15].bfloat16(), branches, budget=12)
        assert len(tree) == 12
        assert len(set(paths(tree))) == 12
        assert tree.depths.tolist() == [len(path) for path in paths(tree)]


@pytest.mark.parametrize("budget", [2, 4, 6])
def test_confidences_that_rounding_puts_above_one_keep_a_tree(budget):
    """A sure softmax may come out as 1 + 1e-7: a child must not outrank its parent for it."""
    above_one = torch.full((3, 7), 1.0) + 2e-7
    branches = Branches(torch.tensor([1, 3]), torch.arange(14).view(2, 7), above_one[1:])
    tree = CandidateTree.merge(torch.tensor(ANCHOR), torch.arange(7) + 20, above_one[0], branches, budget=budget)
    assert len(set(paths(tree))) == budget
    assert tree.depths.tolist() == [len(path) for path in paths(tree)]


@pytest.mark.parametrize("max_depth", [1, 2, 4, 99])
def test_nothing_stands_deeper_than_max_depth(max_depth):
    for seed in SEEDS:
        case = Case(seed)
        assert set(paths(case.merge(max_depth=max_depth))) == {(), *trie(case, max_depth)}


def test_a_longer_second_block_extends_the_whole_first_block():
    case = Case(0, block_size=4, second_block_size=7, num_branches=1, vocab=9)
    case.prefix_lengths = [3]
    tree = case.merge()
    assert tree.parents.tolist() == [-1, 0, 1, 2, 3, 4, 5]  # one chain
    assert tree.tokens.tolist() == [ANCHOR, *case.tokens, *case.branch_tokens[0][3:]]
    assert tree.ranks.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_padding_of_a_shorter_first_block_is_no_node():
    """Zeros pad the first row to γ₂-1; a branch that really drafts token 0 there is another's node."""
    case = Case(0, block_size=2, second_block_size=4, num_branches=1)
    case.tokens, case.confidence, case.prefix_lengths = [3], [0.5], [0]
    case.branch_tokens, case.branch_confidence = [[3, 0, 0]], [[0.9, 0.8, 0.7]]
    tree = case.merge()
    assert paths(tree) == [(), (3,), (3, 0), (3, 0, 0)]
    assert tree.ranks.tolist() == [0, 0, 1, 1]
    assert tree.scores.exp().tolist() == pytest.approx([1, 0.9, 0.72, 0.504])


def test_a_branch_that_repeats_the_first_block_adds_nothing():
    case = Case(3, block_size=5, second_block_size=5, num_branches=1)
    case.prefix_lengths, case.branch_tokens = [0], [list(case.tokens)]
    tree = case.merge()
    assert tree.tokens.tolist() == [ANCHOR, *case.tokens]
    assert set(tree.ranks.tolist()) == {0}


def test_what_a_branch_says_at_kept_positions_does_not_matter():
    for seed in range(50):
        case = Case(seed, num_branches=3)
        before = case.merge()
        for kept, tokens, confidence in zip(case.prefix_lengths, case.branch_tokens, case.branch_confidence):
            tokens[:kept] = [1 - token for token in tokens[:kept]]
            confidence[:kept] = [1e-3] * kept
        after = case.merge()
        assert paths(after) == paths(before)
        assert torch.equal(after.scores, before.scores)


def test_without_branches_the_tree_is_the_first_block():
    case = Case(1, block_size=6, num_branches=0)
    confidence = torch.tensor(case.confidence)
    tree = CandidateTree.merge(torch.tensor(ANCHOR), torch.tensor(case.tokens), confidence)
    assert tree.tokens.tolist() == [ANCHOR, *case.tokens]
    assert tree.parents.tolist() == [-1, 0, 1, 2, 3, 4]
    assert case.merge().tokens.tolist() == tree.tokens.tolist(), "zero branches are no branches"


def test_anchor_only_is_the_tree_of_plain_decoding():
    tree = CandidateTree.anchor_only(torch.tensor(ANCHOR))
    assert len(tree) == 1
    assert (tree.tokens.tolist(), tree.parents.tolist(), tree.depths.tolist()) == ([ANCHOR], [-1], [0])
    assert (tree.ranks.tolist(), tree.scores.tolist(), tree.sources.tolist()) == ([0], [0.0], [FROM_TARGET])
    assert tree.visibility().tolist() == [[True]]


def test_a_node_sees_itself_and_its_ancestors():
    for seed in SEEDS:
        tree = Case(seed).merge(budget=(None, 2, 7)[seed % 3])
        parents = tree.parents.tolist()
        for node, row in enumerate(tree.visibility().tolist()):
            ancestors = set()
            while node != -1:
                ancestors.add(node)
                node = parents[node]
            assert {k for k, seen in enumerate(row) if seen} == ancestors


def test_a_long_chain_sees_all_of_itself():
    for size in (1, 2, 3, 31, 32, 33, 64):
        zeros = torch.zeros(size, dtype=torch.long)
        chain = CandidateTree(zeros, torch.arange(size) - 1, torch.arange(size), zeros.float(), zeros)
        assert torch.equal(chain.visibility(), torch.ones(size, size).tril().bool())
