"""The target: prefill, one pass over a tree, and the cache that keeps the accepted path."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention import MaskedAttention
from .cache import TreeCache
from .capturing import embeddings_first, select_layers
from .modeling import CACHE_NAME
from .tree import CandidateTree


@dataclass(frozen=True)
class TargetPass:
    """What one forward of the target gives for T tokens."""

    logits: Tensor  # (T, V); after a prefill (1, V), the last token's
    hidden_states: tuple[Tensor | None, ...]  # entry i+1 is (1, T, H), the output of layer i; None where not asked for

    def __len__(self) -> int:
        return next(layer.shape[1] for layer in self.hidden_states if layer is not None)

    def features(self, layer_ids: list[int], nodes: Tensor | None = None) -> Tensor:
        """(1, T or A, len(layer_ids) * H): what a drafter reads, for all tokens or for the given nodes (A,)."""
        layers = [self.hidden_states[i + 1] for i in layer_ids]
        if nodes is not None:
            layers = [layer.index_select(1, nodes.to(layer.device)) for layer in layers]
        return torch.cat([layer.to(layers[0].device) for layer in layers], dim=-1)


class Target:
    """The user's model at work on one sequence. Its weights are never touched, its forward is its own.

    Args:
        model: a causal LM of Transformers.
        cache: holds what is committed; it grows by `prefill` and `commit`.
        layer_ids: the layers whose outputs some drafter reads.
        all_hidden_states: keep every layer's output, for `output_hidden_states=True`.
    """

    def __init__(self, model, cache: TreeCache, layer_ids: set[int], all_hidden_states: bool = False):
        self.model, self.cache = model, cache
        self.attention = MaskedAttention.for_model(model)
        self.device = execution_device(model.get_input_embeddings())
        self.position = cache.get_seq_length()  # of the next token that is not in the cache
        self._capture = True if all_hidden_states else select_layers(layer_ids)

    def prefill(
        self, input_ids: Tensor, new_tokens: int, chunk_size: int | None = None, **model_kwargs
    ) -> Iterator[TargetPass]:
        """Run the prompt's last `new_tokens` tokens, as `generate` would; yields one pass for each chunk.

        Args:
            input_ids: (1, L), or (1, 0) where `model_kwargs` has `inputs_embeds` (1, L, H).
            chunk_size: tokens in one pass; all by default.
        """
        chunk_size = chunk_size or new_tokens
        for start in range(0, new_tokens, chunk_size):
            end = min(start + chunk_size, new_tokens)
            kwargs = {name: _without_last(value, new_tokens - end) for name, value in model_kwargs.items()}
            inputs = self.model.prepare_inputs_for_generation(
                _without_last(input_ids, new_tokens - end),
                next_sequence_length=end - start,
                is_first_iteration=True,
                **{CACHE_NAME: self.cache},
                **kwargs,
            )
            logits, hidden_states = self._forward(**inputs)
            positions = kwargs.get("position_ids")
            self.position = self.cache.get_seq_length() if positions is None else int(positions[0, -1]) + 1
            yield TargetPass(logits[0, -1:], hidden_states)

    def verify(self, tree: CandidateTree) -> TargetPass:
        """One pass over the N nodes, each seeing the cache and its own ancestors; the cache grows by all nodes."""
        self._start = self.cache.get_seq_length()
        mask = self.attention.tree_masks(tree, self.position, self.cache.visible_lengths(), self.model.dtype)
        with self.attention.active():
            logits, hidden_states = self._forward(
                input_ids=tree.tokens[None],
                position_ids=(self.position + tree.depths)[None],
                attention_mask=mask,
                **{CACHE_NAME: self.cache},
                use_cache=True,
            )
        return TargetPass(logits[0], hidden_states)

    def _forward(self, **inputs) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The model's logits (1, T, V) and the hidden states that were asked for."""
        output = self.model(**inputs, output_hidden_states=self._capture, return_dict=True)
        return output.logits, embeddings_first(output.hidden_states, selected=self._capture is not True)

    def commit(self, path: Tensor) -> None:
        """Of the nodes verified last keep the path (A,), and forget the others."""
        self.cache.keep(self._start, path)
        self.position += len(path)


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where accelerate's hooks bring them from an offload."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is None:
        device = next((tensor.device for tensor in [*module.parameters(), *module.buffers()]), "cpu")
    return torch.device(device)


def _without_last(value, count: int):
    """A tensor along the sequence without its last `count` entries; anything else unchanged."""
    if count == 0 or not torch.is_tensor(value) or value.ndim < 2 or value.shape[1] == 0:
        return value
    return value[:, :-count]
