"""The walk against hand-written trees and brute force."""

import random

import pytest

from hf_d2sd.acceptance import walk
from hf_d2sd.tree import HostTree

#        0
#      / | \        tokens: 0:a(7)  1:5  2:6  3:9
#     1  2  3               1 → 4:6, 5:9;  2 → 6:6;  6 → 7:5
#    / \  \
#   4   5  6 - 7
TOKENS = [7, 5, 6, 9, 6, 9, 6, 5]
PARENTS = [-1, 0, 0, 0, 1, 1, 2, 6]


def never():
    return False


class Scripted:
    """Chooses by a function of the node, and ends when another one says so."""

    def __init__(self, choose, is_finished=never):
        self.choose, self.is_finished = choose, is_finished


def host_tree(tokens, parents) -> HostTree:
    return HostTree(list(tokens), list(parents), [], [], [], [])


def run(choices, tokens=TOKENS, parents=PARENTS, is_finished=never):
    """Walk with one choice for each node (a dict: the others must not be asked); also what was asked, in order."""
    asked = []

    def choose(node):
        asked.append(node)
        return choices[node]

    return *walk(host_tree(tokens, parents), Scripted(choose, is_finished)), asked


@pytest.mark.parametrize(
    "choices, path, emitted",
    [
        ({0: 8}, [0], [8]),  # nothing accepted: the anchor's choice is the bonus
        ({0: 7}, [0], [7]),  # the anchor's own token is no child
        ({0: 5, 1: 8}, [0, 1], [5, 8]),
        ({0: 5, 1: 9, 5: 6}, [0, 1, 5], [5, 9, 6]),  # a leaf is accepted; 6 is elsewhere in the tree
        ({0: 6, 2: 6, 6: 5, 7: 1}, [0, 2, 6, 7], [6, 6, 5, 1]),
        ({0: 6, 2: 5}, [0, 2], [6, 5]),  # 5 stands under node 6 and node 0, not under node 2
        ({0: 9, 3: 6}, [0, 3], [9, 6]),
    ],
)
def test_it_follows_the_targets_choices(choices, path, emitted):
    assert run(choices) == (path, emitted, path)


def test_a_tree_of_the_anchor_alone_gives_the_targets_token():
    assert run({0: 3}, tokens=[7], parents=[-1]) == ([0], [3], [0])


def test_it_ends_where_generation_does_though_the_tree_goes_on():
    answers = iter([False, True])
    path, emitted, asked = run({0: 6, 2: 6, 6: 5}, is_finished=lambda: next(answers))
    assert (path, emitted, asked) == ([0, 2], [6, 6], [0, 2])  # node 6 carries the last token and is not on the path


def test_it_asks_whether_generation_ended_after_each_choice_and_never_before():
    events = []
    choices = {0: 5, 1: 9, 5: 6}

    def choose(node):
        events.append(("choose", node))
        return choices[node]

    def is_finished():
        events.append("finished?")
        return False

    walk(host_tree(TOKENS, PARENTS), Scripted(choose, is_finished))
    assert events == [("choose", 0), "finished?", ("choose", 1), "finished?", ("choose", 5), "finished?"]


def random_tree(rng: random.Random, size: int, vocab: int):
    """Siblings carry distinct tokens; parents stand before children, children in any order."""
    tokens, parents, taken = [rng.randrange(vocab)], [-1], {}
    while len(tokens) < size:
        parent = rng.randrange(len(tokens))
        token = rng.randrange(vocab)
        if token not in taken.setdefault(parent, set()):
            taken[parent].add(token)
            tokens.append(token)
            parents.append(parent)
    return tokens, parents


def brute_force(tokens, parents, target, limit):
    """The target decodes alone, token by token; the path is the longest prefix of its text that the tree holds."""
    text = []
    while len(text) < limit:
        text.append(target(tuple(text)))
    nodes = {}
    for node in range(len(tokens)):
        words, at = [], node
        while at != 0:
            words.append(tokens[at])
            at = parents[at]
        nodes[tuple(reversed(words))] = node
    length = 1
    while length < limit and tuple(text[:length]) in nodes:
        length += 1
    return [nodes[tuple(text[:i])] for i in range(length)], text[:length]


def test_random_trees_accept_the_longest_prefix_of_what_the_target_writes_alone():
    rng = random.Random(0)
    lengths = set()
    for case in range(2000):
        vocab = rng.choice([2, 3, 5])
        tokens, parents = random_tree(rng, rng.randrange(1, 24), vocab)
        script = {}

        def target(prefix):
            return script.setdefault(prefix, rng.randrange(vocab))  # noqa: B023

        limit = rng.randrange(1, 8)
        expected = brute_force(tokens, parents, target, limit)
        emitted_so_far, words_at = [], {0: ()}

        def choose(node):
            prefix = () if node == 0 else (*words_at[parents[node]], tokens[node])  # noqa: B023
            words_at[node] = prefix  # noqa: B023
            emitted_so_far.append(target(prefix))  # noqa: B023
            return emitted_so_far[-1]  # noqa: B023

        scripted = Scripted(choose, lambda: len(emitted_so_far) == limit)  # noqa: B023
        got = walk(host_tree(tokens, parents), scripted)
        assert got == expected, case
        lengths.add(len(got[0]))
    assert lengths >= {1, 2, 3, 4, 5}, "paths of many lengths must occur"
