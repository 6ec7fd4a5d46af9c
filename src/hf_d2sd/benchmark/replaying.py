"""Decoding a text that is known already: what drafters would have had accepted, without the target's passes.

The target's greedy text decides what a cycle accepts, and its hidden states are all that drafters read of it. With
both at hand, from one forward over the whole text, the engine's own loop runs with everything real but the target.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..candidates import Draft, expand
from ..choosing import Choosers
from ..compat import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList
from ..context import ContextSource
from ..decoding import Accepted, Batch, decode
from ..drafting import Drafter
from ..followers import Followers
from ..growing import wide_drafts
from ..modeling import D2SDAssistant
from ..options import DecodingOptions
from ..target import TargetPass
from ..tree import CandidateTree


@dataclass(frozen=True)
class Text:
    """One row: a prompt, and what the target wrote after it."""

    tokens: Tensor  # (T,)
    prompt_length: int
    features: Callable[[list[int]], Tensor]  # from layer ids, (T, F)


@dataclass(frozen=True)
class KnownPass(TargetPass):
    """A pass whose features stand at known places of the texts. Its `logits` (B, N) are the target's choices."""

    texts: list[Text] = field(default_factory=list)
    at: Tensor | None = None  # (B, N), the place of each token

    def features(self, layer_ids: list[int], nodes: Tensor | None = None) -> Tensor:
        at = self.at if nodes is None else self.at.gather(1, nodes)
        return torch.stack([text.features(layer_ids)[row] for text, row in zip(self.texts, at)])


class KnownTarget:
    """Stands where `Target` does: it knows what each row's text goes on with, and computes nothing."""

    def __init__(self, texts: Sequence[Text]):
        self.texts, self.device = list(texts), torch.device("cpu")
        self.positions = [text.prompt_length for text in texts]

    def prompts(self) -> KnownPass:
        """The pass over all prompts."""
        width = max(self.positions)
        at = torch.arange(width).expand(len(self.texts), -1)
        at = at.minimum(torch.tensor(self.positions)[:, None] - 1)
        firsts = torch.stack([text.tokens[text.prompt_length] for text in self.texts])[:, None]
        return KnownPass(firsts, (), list(self.positions), texts=self.texts, at=at)

    def verify(self, tree: CandidateTree) -> KnownPass:
        """Each node's choice: what follows in the text at its depth, which is right for all nodes that are walked."""
        return KnownPass(self.following(tree.depths), (), texts=self.texts, at=self._places(tree.depths))

    def following(self, depths: Tensor) -> Tensor:
        """(B, N): the tokens that the texts go on with after those at these depths (B, N) behind the anchors."""
        places = self._places(depths + 1)
        return torch.stack([text.tokens[row] for text, row in zip(self.texts, places)])

    def _places(self, depths: Tensor) -> Tensor:
        ends = torch.tensor([len(text.tokens) - 1 for text in self.texts])[:, None]
        return (torch.tensor(self.positions)[:, None] + depths).minimum(ends)

    def commit(self, step: KnownPass, paths: Tensor, counts: list[int]) -> None:
        self.positions = [position + count for position, count in zip(self.positions, counts)]

    def select(self, staying: list[int]) -> None:
        self.texts, self.positions = ([values[at] for at in staying] for values in (self.texts, self.positions))


class KnownChoosers(Choosers):
    """Choices that need no logits."""

    def look(self, choices: Tensor) -> Tensor:
        return choices


@dataclass
class Counts:
    """Of all rows and cycles: tokens committed, target passes, and nodes that these would have verified."""

    tokens: int = 0
    passes: int = 0
    nodes: int = 0

    def begin(self, *_) -> None:
        pass

    def see(self, batch: Batch, tree: CandidateTree, step: TargetPass, accepted: Accepted) -> None:
        for host, emitted in zip(accepted.trees, accepted.emitted):
            self.tokens += len(emitted)
            self.passes += bool(emitted)
            self.nodes += len(host) if emitted else 0


def left_padded(tokens: Tensor, width: int) -> Tensor:
    """(width,), with the first token as filling."""
    return torch.cat([tokens[:1].expand(width - len(tokens)), tokens])


@torch.inference_mode()
def replay(
    assistant: D2SDAssistant,
    target: nn.Module,
    texts: Sequence[Text],
    options: DecodingOptions,
    max_new_tokens: int,
    eos_token_id: list[int],
    loop: Callable[[Batch, Iterable[KnownPass], Counts], None] = decode,
) -> Counts:
    """Decode known texts side by side.

    Args:
        target: whose embedding and LM head the drafters call.
        texts: greedy ones, of at most `max_new_tokens` new tokens.
        loop: the engine's own, or `follow`.
    """
    width = max(text.prompt_length for text in texts)
    criteria = StoppingCriteriaList(
        [MaxLengthCriteria(width + max_new_tokens), EosTokenCriteria(torch.tensor(eos_token_id))]
    )
    prompts = torch.stack([left_padded(text.tokens[: text.prompt_length], width) for text in texts])
    choosers = KnownChoosers(prompts, [], criteria, do_sample=False)
    drafters = [Drafter(model, target) for model in assistant.drafters[: 2 if options.redrafts else 1]]
    known, counts, begun = KnownTarget(texts), Counts(), [text.tokens[: text.prompt_length].tolist() for text in texts]
    context = ContextSource(begun) if options.context_nodes else None
    followers = Followers.wanted(begun, drafters, options, known.device)
    batch = Batch(known, drafters, choosers, options, context=context, followers=followers)
    loop(batch, [known.prompts()], counts)
    return counts


def follow(batch: Batch, prompt_passes: Iterable[KnownPass], counts: Counts) -> None:
    """As `decode`, with a wide tree that is always the text's own path, as far as the drafts' candidates have it.

    No tree of any size that is chosen among these candidates gets further.
    """
    _, anchors = batch.begin(prompt_passes)
    anchors = batch.leave(anchors)
    while anchors:
        state = batch.state(anchors)
        drafts = wide_drafts(state)
        truth = batch.target.following(torch.arange(drafts.depth).expand(len(anchors), -1))
        tree = state.tree(expand(_only(truth, drafts), drafts.depth + 1))
        step = batch.target.verify(tree)
        accepted = batch.accept(tree, step)
        batch.commit(step, accepted)
        counts.see(batch, tree, step, accepted)
        anchors = batch.leave(accepted.anchors(anchors))


def _only(truth: Tensor, drafts: Draft) -> Draft:
    """The drafts, sure of the tokens `truth` (B, D) and of no other."""
    log_probs = torch.where(drafts.tokens == truth[:, None, :, None], 0.0, -torch.inf)
    return replace(drafts, log_probs=log_probs, transitions=None)
