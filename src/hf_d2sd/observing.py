"""What sees each cycle beside the method: counts, traces, hidden states for the user, and the streamer."""

import torch

from .compat import BaseStreamer
from .decoding import Accepted, Batch
from .stats import D2SDStats
from .target import TargetPass
from .tree import CandidateTree


class Observer:
    """Sees the prompts' pass and then each cycle, once its tokens are committed; it asks the device for nothing.

    Args:
        streamer: takes the first row's tokens as they come.
    """

    def __init__(self, stats: D2SDStats, streamer: BaseStreamer | None = None):
        self.stats, self.streamer = stats, streamer

    def begin(self, batch: Batch, step: TargetPass, tokens: list[int]) -> None:
        """The prompts were read, and these are the rows' first tokens."""
        for at, chooser in enumerate(batch.choosers.active):
            chooser.record.add_hidden_states(step.hidden_states, at)
        self.stats.add_first_tokens(len(tokens))
        self._stream(tokens[:1])

    def see(self, batch: Batch, tree: CandidateTree, step: TargetPass, accepted: Accepted) -> None:
        """A cycle is over; rows that had ended before it have no path."""
        for at, chooser in enumerate(batch.choosers.active):
            path, host_tree = accepted.paths[at], accepted.trees[at]
            for node in path:
                chooser.record.add_hidden_states(step.hidden_states, at, node)
            if self.stats.trace is not None and path:
                scores = tree.scores[at].tolist()
                self.stats.add_trace(batch.target.rows[at], host_tree, scores, path, accepted.emitted[at])
        self.count(accepted)

    def count(self, accepted: Accepted) -> None:
        """What can be seen of a cycle when its tensors are no more."""
        for path, host_tree in zip(accepted.paths, accepted.trees):
            self.stats.add_cycle(path, host_tree)
        self._stream(accepted.emitted[0])

    def end(self) -> None:
        """All rows have ended."""
        if self.streamer is not None:
            self.streamer.end()

    def _stream(self, tokens: list[int]) -> None:
        if self.streamer is not None:
            self.streamer.put(torch.tensor(tokens))
