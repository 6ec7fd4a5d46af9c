"""The walk: which drafted nodes the target's own choices lead through."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def walk(
    tokens: Sequence[int],
    parents: Sequence[int],
    choose: Callable[[int], int],
    is_finished: Callable[[], bool],
) -> tuple[list[int], list[int]]:
    """Follow the target's choices from the anchor for as long as the tree holds the chosen token.

    Lossless by construction: each emitted token is the target's choice given exactly the tokens before it, and no
    draft probability enters.

    Args:
        tokens, parents: N entries each, the nodes of a `CandidateTree`; siblings carry distinct tokens.
        choose: called once for each node on the path, in order, with the node's index; returns the target's token.
        is_finished: asked after each choice; the walk ends where generation does.

    Returns:
        The path (A,), node indices from the anchor on, and the emitted tokens (A,): the last is the bonus, which no
        node on the path carries. Afterwards the target's cache must hold exactly the path.
    """
    child = {(parent, token): node for node, (parent, token) in enumerate(zip(parents, tokens))}
    path, emitted, node = [], [], 0
    while node is not None:
        token = choose(node)
        path.append(node)
        emitted.append(token)
        node = None if is_finished() else child.get((node, token))
    return path, emitted


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
