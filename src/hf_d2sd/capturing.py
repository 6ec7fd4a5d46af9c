"""All that knows how a forward of Transformers is asked for the outputs of single layers."""

from collections.abc import Iterable

from torch import Tensor
from transformers.utils import output_capturing

# From 5.23 on a list of entries counts as the full tuple does, embeddings first; before, it counts layers alone.
_EMBEDDINGS_COUNT = hasattr(output_capturing, "selected_hidden_states")


def select_layers(layer_ids: Iterable[int]) -> list[int]:
    """What `output_hidden_states` has to be for a forward to hand out the outputs of these layers, and no others."""
    return sorted(layer + _EMBEDDINGS_COUNT for layer in layer_ids)


def embeddings_first(hidden_states: tuple[Tensor | None, ...], selected: bool) -> tuple[Tensor | None, ...]:
    """What a forward handed out, `selected` or in full, with entry i + 1 for the output of layer i."""
    return hidden_states if _EMBEDDINGS_COUNT or not selected else (None, *hidden_states)
