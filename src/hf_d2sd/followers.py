"""Which tokens followed which in the text so far: what it says of pairs of tokens, with nothing learned.

A text says again what it has said: after a name's first part comes its second, after a loop's keyword its variable. A
path head learned what goes together in any text; this is what goes together in this one.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .paths import OfText

MOST = 2048  # pairs of a row that are kept: the latest
DOUBT = 1.0  # places more at which a token is thought to have stood: what stood once says less than what did often
AGREED = 0.3  # so much of what else is known of its followers a text says again that speaks of a token at length
NOTHING = -1  # in the place of a token where there is no pair
_CACHED = 2**18  # numbers at a time that stay in a processor's cache


def of_text(pairs: Tensor, before: Tensor, after: Tensor, weight: float) -> OfText:
    """What texts say of each of C tokens after each of A: scores (B, M, A, C), and what is left of all else (B, M, A).

    Where a stood n(a) times, and b came next n(a, b) times, the score is w · n(a, b) / (n(a) + `DOUBT`), and what is
    left 1 - `AGREED` · n(a) / (n(a) + `DOUBT`): a drafter has read the text as well.

    Args:
        pairs: (2, B, T), tokens and those that followed them, `NOTHING` where there are fewer than T.
        before: (B, M, A); after: (B, M, C).
        weight: w.
    """
    places = before.shape[1]
    if pairs.is_cpu:
        places = max(_CACHED // max(len(before) * before.shape[2] * pairs.shape[2], 1), 1)
    counts, both = [], []
    for some, behind in zip(before.split(places, dim=1), after.split(places, dim=1)):
        stood = (some[..., None] == pairs[0][:, None, None]).float()  # (B, m, A, T)
        came = (behind[..., None] == pairs[1][:, None, None]).float()  # (B, m, C, T)
        counts.append(stood.sum(-1))
        both.append(stood @ came.transpose(-1, -2))
    count, pair = torch.cat(counts, dim=1), torch.cat(both, dim=1)
    return OfText(weight / (count + DOUBT)[..., None] * pair, 1 - AGREED * count / (count + DOUBT))


class Followers:
    """The pairs of the rows' texts so far, on the device where they are looked up.

    Args:
        texts: by row, its tokens so far.
    """

    def __init__(self, texts: Iterable[Sequence[int]], device: torch.device):
        texts = list(texts)
        self.counts = [0] * len(texts)  # pairs of a row's text
        self._last: list[int | None] = [None] * len(texts)
        self._new: list[tuple[int, int, int, int]] = []  # rows, places and both tokens of pairs not on the device yet
        self._pairs = torch.full((2, len(texts), 0), NOTHING, device=device)
        self.extend(texts)

    def extend(self, tokens: Sequence[Sequence[int]]) -> None:
        """By row, the tokens with which its text goes on."""
        for row, more in enumerate(tokens):
            if not more:
                continue
            last = self._last[row]
            text = list(more) if last is None else [last, *more]
            text, skipped = text[-MOST - 1 :], max(len(text) - MOST - 1, 0)
            self.counts[row] += skipped
            for first, second in zip(text, text[1:]):
                self._new.append((row, self.counts[row] % MOST, first, second))
                self.counts[row] += 1
            self._last[row] = text[-1]

    def select(self, staying: list[int]) -> None:
        """Let all rows but the given ones leave the batch."""
        self._pairs = self.pairs[:, staying]
        self.counts = [self.counts[row] for row in staying]
        self._last = [self._last[row] for row in staying]

    @classmethod
    def wanted(cls, texts: list[list[int]], drafters: Iterable, options, device: torch.device) -> "Followers | None":
        """Those that a call's drafters read; `None` where none does.

        Where the text so far proposes nodes of its own, they are not read: both would count what it says, and of a
        tree's nodes too many would be of what it says.
        """
        reads = any(drafter.reads_text for drafter in drafters) and not options.context_nodes
        return cls(texts, device) if reads else None

    @property
    def pairs(self) -> Tensor:
        """(2, B, T), see `of_text`; in a ring of `MOST`, in which the pair after n others stands at n mod `MOST`."""
        if self._new:
            width = min(max(self.counts), MOST)
            if width > self._pairs.shape[2]:
                room = min(-(-width // 256) * 256, MOST) - self._pairs.shape[2]
                self._pairs = torch.nn.functional.pad(self._pairs, (0, room), value=NOTHING)
            rows, places, firsts, seconds = torch.tensor(self._new).t().to(self._pairs.device)
            self._pairs[:, rows, places] = torch.stack([firsts, seconds])
            self._new = []
        return self._pairs

    def of_text(self, before: Tensor, after: Tensor, weight: float) -> OfText:
        """What the texts say, see the function."""
        return of_text(self.pairs, before, after, weight)


class CycleFollowers:
    """The same for recorded cycles: a ring of fixed size, which grows without the host."""

    def __init__(self, rows: int, device: torch.device):
        self._pairs = torch.full((2, rows, MOST + 1), NOTHING, device=device)  # the last place is never read
        self._counts = torch.zeros(rows, dtype=torch.long, device=device)  # pairs, when these cycles began

    def load(self, followers: Followers) -> None:
        """Those of a batch's texts."""
        pairs = followers.pairs
        self._pairs.fill_(NOTHING)
        self._pairs[:, :, : pairs.shape[2]] = pairs
        self._counts.copy_(torch.tensor(followers.counts))

    def extend(self, anchors: Tensor, emitted: Tensor, counts: Tensor, gained: Tensor) -> None:
        """Rows go on with the first `counts` (B,) of tokens (B, W) behind their anchors (B,), after `gained` (B,)."""
        every = torch.arange(emitted.shape[1], device=emitted.device)
        places = (self._counts + gained)[:, None] + every
        places = torch.where(every < counts[:, None], places % MOST, MOST)
        before = torch.cat([anchors[:, None], emitted[:, :-1]], dim=1)
        for ring, tokens in zip(self._pairs, (before, emitted)):
            ring.scatter_(1, places, tokens)

    def of_text(self, before: Tensor, after: Tensor, weight: float) -> OfText:
        """What the texts say, see the function."""
        return of_text(self._pairs[..., :MOST], before, after, weight)
