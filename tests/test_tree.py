"""The merged tree against a trie of dicts that was written without looking at it."""

import math
import random
from typing import NamedTuple

import pytest
import torch

from hf_d2sd.candidates import Draft, merge
from hf_d2sd.tree import FROM_FIRST, FROM_SECOND, FROM_TARGET, CandidateTree

ANCHOR = 7


class Branches(NamedTuple):
    """Re-drafts as the second drafter says them: branch k keeps `prefix_lengths[k]` tokens of the first block."""

    prefix_lengths: torch.Tensor  # (K,)
    tokens: torch.Tensor  # (K, γ₂-1), at the kept positions whatever
    confidence: torch.Tensor  # (K, γ₂-1)


def merged(anchors, tokens, confidence, branches=None, **options) -> CandidateTree:
    """The trees of a batch: tokens and confidence are (B, γ-1), those of branches (B, K, γ₂-1)."""
    first = Draft.of(tokens[:, None], confidence[:, None])
    if branches is not None:
        kept, *said = branches
        branches = Draft.of(*said).after(first.cut(kept))
    return CandidateTree.from_candidates(anchors, merge(first, branches), **options)


def merge_one(tokens, confidence, branches=None, max_depth=None, **options) -> CandidateTree:
    """The tree of a batch of one: tokens and confidence are (γ-1,), those of branches (K, γ₂-1)."""
    if branches is not None:
        branches = Branches(*(field[None] for field in branches))
    if max_depth is not None:
        max_depth = torch.tensor([max_depth])
    tree = merged(torch.tensor([ANCHOR]), tokens[None], confidence[None], branches, max_depth=max_depth, **options)
    assert len(tree) == len(tree.row(0)), "a batch of one has no fillers"
    return tree.row(0)


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
        return merge_one(torch.tensor(self.tokens), confidence, self.branches(), **options)

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
        tree = merge_one(tokens, near_one[0, :15].bfloat16(), branches, budget=12)
        assert len(tree) == 12
        assert len(set(paths(tree))) == 12
        assert tree.depths.tolist() == [len(path) for path in paths(tree)]


@pytest.mark.parametrize("budget", [2, 4, 6])
def test_confidences_that_rounding_puts_above_one_keep_a_tree(budget):
    """A sure softmax may come out as 1 + 1e-7: a child must not outrank its parent for it."""
    above_one = torch.full((3, 7), 1.0) + 2e-7
    branches = Branches(torch.tensor([1, 3]), torch.arange(14).view(2, 7), above_one[1:])
    tree = merge_one(torch.arange(7) + 20, above_one[0], branches, budget=budget)
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
    tree = merge_one(torch.tensor(case.tokens), confidence)
    assert tree.tokens.tolist() == [ANCHOR, *case.tokens]
    assert tree.parents.tolist() == [-1, 0, 1, 2, 3, 4]
    assert case.merge().tokens.tolist() == tree.tokens.tolist(), "zero branches are no branches"


def test_anchor_only_is_the_tree_of_plain_decoding():
    tree = CandidateTree.anchor_only(torch.tensor([ANCHOR])).row(0)
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


def batch(cases: list[Case], **options) -> CandidateTree:
    """The cases' trees merged as one batch; all have the same shapes."""
    branches = [case.branches() for case in cases]
    return merged(
        torch.full((len(cases),), ANCHOR),
        torch.tensor([case.tokens for case in cases]),
        torch.tensor([case.confidence for case in cases], dtype=torch.float64),
        Branches(*(torch.stack(fields) for fields in zip(*branches))),
        **options,
    )


@pytest.mark.parametrize("fixed_size", [False, True])
@pytest.mark.parametrize("budget", [None, 1, 6, 30])
def test_each_row_of_a_batch_is_merged_as_if_alone(budget, fixed_size):
    sizes = set()
    for seed in range(40):
        rng = random.Random(seed)
        shape = dict(block_size=rng.randrange(2, 8), second_block_size=8, num_branches=rng.randrange(0, 6))
        cases = [Case(seed * 10 + i, **shape, vocab=rng.choice([2, 6])) for i in range(5)]
        depths = [rng.randrange(1, 9) for _ in cases]
        trees = batch(cases, budget=budget, max_depth=torch.tensor(depths), fixed_size=fixed_size)
        for row, (case, depth) in enumerate(zip(cases, depths)):
            alone, got = case.merge(budget=budget, max_depth=depth), trees.row(row)
            for name in ("tokens", "parents", "depths", "scores", "ranks"):
                assert torch.equal(getattr(got, name), getattr(alone, name)), name
            fillers = slice(len(got), None)
            assert (trees.parents[row, fillers] == -1).all()
            assert trees.visibility()[row, fillers].sum() == len(trees) - len(got), "a filler sees itself"
            sizes.add((fixed_size, len(trees) - len(got)))
    if budget != 1:
        assert len(sizes) > 3, "rows must have fillers"


def test_trees_of_a_fixed_size_never_change_their_shape():
    sizes = {len(batch([Case(seed, 5, 7, 3)], budget=12, fixed_size=True)) for seed in range(50)}
    assert sizes == {12}


def random_forest(seed: int, rows: int, size: int) -> CandidateTree:
    rng = random.Random(seed)
    parents = [[-1] + [rng.choice([rng.randrange(node), node - 1]) for node in range(1, size)] for _ in range(rows)]
    for row in parents:
        count = rng.randrange(1, size + 1)
        row[count:] = [-1] * (size - count)
    depths = torch.tensor([[depth_of(row, node) for node in range(size)] for row in parents])
    zeros = torch.zeros_like(depths)
    return CandidateTree(zeros, torch.tensor(parents), depths, zeros.float(), zeros)


def depth_of(parents, node):
    return 0 if parents[node] == -1 else 1 + depth_of(parents, parents[node])


def check_chains(tree: CandidateTree):
    visible = tree.visibility()
    chains, size = tree.chains(visible), len(tree)
    assert sorted(chains.order.tolist()) == list(range(visible.shape[0] * size)), "every node is in one chain"
    queries, keys = chains.query_starts.tolist(), chains.key_starts.tolist()
    assert keys[-1] <= len(chains.keys)
    for (q, q_end), (k, k_end) in zip(zip(queries, queries[1:]), zip(keys, keys[1:])):
        assert k_end > k, "kernels do not take a segment without keys"
        nodes, seen = chains.order[q:q_end].tolist(), chains.keys[k:k_end].tolist()
        for at, node in enumerate(nodes):  # causal, aligned at the end
            row, inside = divmod(node, size)
            expected = {row * size + k for k, sees in enumerate(visible[row, inside].tolist()) if sees}
            upto = seen[: len(seen) - len(nodes) + at + 1]
            assert set(upto) == expected
            assert len(upto) == len(expected)


def test_chains_give_each_node_the_keys_it_sees():
    for seed in range(60):
        check_chains(random_forest(seed, rows=1 + seed % 3, size=1 + seed % 13))


def test_chains_of_merged_trees_are_counted_without_asking_the_device():
    for seed in range(40):
        tree = batch([Case(seed * 3 + i, 5, 7, 3) for i in range(3)], budget=(None, 9)[seed % 2], fixed_size=True)
        check_chains(tree)
        bound = 3 * (4 * 7 + len(tree))
        assert len(tree.chains(tree.visibility()).keys) <= bound
