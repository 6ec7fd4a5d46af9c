"""How drafted tokens are accepted: each policy is one function of a row's tree and of what chooses its tokens."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .tree import HostTree


class Choice(Protocol):
    """The target's choice of each token, as a policy sees it."""

    def choose(self, node: int) -> int:
        """The target's token at a node, which is with that the row's next one."""

    def is_finished(self) -> bool:
        """Whether the row ends with the token that was chosen last."""


def walk(tree: HostTree, choice: Choice) -> tuple[list[int], list[int]]:
    """Follow the target's choices from the anchor for as long as the tree holds the chosen token.

    Lossless by construction: each emitted token is the target's choice given exactly the tokens before it, and no
    draft probability enters.

    Args:
        tree: siblings carry distinct tokens.
        choice: asked for a token once for each node on the path, in order; the walk ends where generation does.

    Returns:
        The path (A,), node indices from the anchor on, and the emitted tokens (A,): the last is the bonus, which no
        node on the path carries. Afterwards the target's cache must hold exactly the path.
    """
    child = {(parent, token): node for node, (parent, token) in enumerate(zip(tree.parents, tree.tokens))}
    path, emitted = [0], [choice.choose(0)]
    while not choice.is_finished() and (path[-1], emitted[-1]) in child:
        path.append(child[path[-1], emitted[-1]])
        emitted.append(choice.choose(path[-1]))
    return path, emitted


# By name, what `d2sd_acceptance` chooses among. A policy returns a path and the tokens emitted for it, as `walk` does.
POLICIES: dict[str, Callable[[HostTree, Choice], tuple[list[int], list[int]]]] = {"walk": walk}


def greedy_paths(
    tokens: Tensor, parents: Tensor, depths: Tensor, visible: Tensor, choices: Tensor, width: int
) -> Tensor:
    """The paths of `walk` where each node's choice is known beforehand, by tensors of fixed shapes alone.

    Args:
        tokens, parents, depths: (B, N), the nodes of a `CandidateTree`; visible: (B, N, N).
        choices: (B, N), the target's token at each node.
        width: at least the longest path there can be.

    Returns:
        (B, width), each row's path from the anchor on; entries beyond its end are 0.
    """
    nodes = depths.new_ones(depths.shape).cumsum(1) - 1  # (B, N)
    carried = (parents >= 0) & (tokens == choices.gather(1, parents.clamp(min=0)))  # by the parent's own choice
    on_path = ~(visible & ~(carried | (nodes == 0))[:, None]).any(-1)  # it and all its ancestors
    paths = depths.new_zeros(depths.shape[0], width + 1)  # the last entry takes what is on no path
    paths.scatter_(1, torch.where(on_path, depths, width), nodes)
    return paths[:, :-1]
