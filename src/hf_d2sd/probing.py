"""Can this model check a tree at all? Once for a model, a small tree is compared with the same tokens as plain text.

A model that counts positions by its cache, makes its own mask, or lets the tokens of a pass bear on each other, would
verify trees wrongly and say nothing. No list of names holds every such model; two forwards of a few tokens find them.
"""

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers.utils import logging

from .attention import TreeAttention
from .cache import TreeCache, is_recurrent
from .compat import captured_layers, forward, is_quantized, own_window, plain_positions, prompt_inputs
from .kernels import Facts
from .target import Target
from .tree import CandidateTree

logger = logging.get_logger(__name__)

# By which share of their own spread a node's logits may differ between two passes. Rounding grows with a network's
# depth; wrong positions, or a mask that is not kept, make other logits altogether.
_FINE, _COARSE, _QUANTIZED = 0.01, 0.1, 0.2  # from float32 on; below; of quantized weights
_known: dict[tuple, str | None] = {}  # what was found, by what it depends on
_seen: "weakref.WeakKeyDictionary[object, dict]" = weakref.WeakKeyDictionary()  # the same by model, found faster


def attention_for(model, forced: str | None = None) -> TreeAttention:
    """The attention to verify trees with: the fastest with which the model gives each node what plain text gives it.

    Args:
        forced: the backend that it has to be.

    Raises:
        ValueError: naming the model, where trees cannot be verified; and as `TreeAttention.for_model`.
    """
    attention = TreeAttention.for_model(model, forced)
    why = own_window(model) or _fault(model, attention)
    if why is not None and forced is None and attention.kernel is not None:
        masked = TreeAttention.for_model(model, obstacle=f"{type(model).__name__} reads its mask itself")
        if _fault(model, masked) is None:
            return masked
    if why is not None:
        raise ValueError(
            f"{type(model).__name__} cannot verify a tree of candidates: {why}. Generate without assistant_model."
        )
    return attention


def _fault(model, attention: TreeAttention) -> str | None:
    """As `_probe`, which runs once for a model, and once for all models of a class and a configuration."""
    facts = Facts.of(model), attention.backend
    found = _seen.setdefault(model, {})
    if facts not in found:
        key = type(model), str(model.config.to_dict()), facts
        if key not in _known:
            _known[key] = _probe(model, attention)
        found[facts] = _known[key]
    return found[facts]


class Unfit(Exception):
    """A forward ran, and what it did is in the way; says what."""


# Two branches of two tokens after an anchor, one node of each in turn: places in a pass say nothing of positions.
_PREFIX, _BRANCHES, _DEPTH = 2, 2, 2
_PARENTS, _DEPTHS, _OWNERS = [-1, 0, 0, 1, 2], [0, 1, 1, 2, 2], [0, 0, 1, 0, 1]


def _probe(model, attention: TreeAttention) -> str | None:
    """Verify a small tree after a short text, and run each of its chains as plain text: in words, what is wrong."""
    if model.training or is_recurrent(model.config):  # dropout would be found; states are followed by a list of names
        return None
    ids = _tokens(model, _PREFIX + 1 + _BRANCHES * _DEPTH)
    try:
        with torch.no_grad():
            plain, of_tree = _both_ways(model, attention, ids)
    except torch.OutOfMemoryError:
        raise
    except Unfit as reason:
        return str(reason)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return f"its forward does not take one ({type(error).__name__}: {error})"
    if not plain.isfinite().all():
        return None  # nothing can be read from it, and nothing will from its text
    differing = (of_tree - plain).pow(2).mean(-1).sqrt() / plain.std(-1).clamp(min=1e-6)
    fine, tolerance = _tolerance(model)
    # Rounding may send a token to another expert: it then differs by much, and so may one in two.
    worst = differing.max() if fine else differing[-3:].median()
    logger.info(f"Logits of {type(model).__name__} differ by {worst:.2g} of their spread in a tree and in plain text.")
    if worst.item() <= tolerance:
        return None
    return (
        f"logits of a small tree differ from those of its chains by {worst:.2g} of their spread, where rounding makes "
        f"up to {tolerance}. It takes no position_ids or no four-dimensional mask, or the tokens of a pass bear on "
        "each other"
    )


def _tolerance(model) -> tuple[bool, float]:
    """Whether a model computes finely, and by how much its logits may differ."""
    if is_quantized(model):
        return False, _QUANTIZED
    fine = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters())
    return fine, _FINE if fine else _COARSE


def _both_ways(model, attention: TreeAttention, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of a small tree's nodes the logits (N, V), in float32 on the host: as plain text, and verified as a tree."""
    cache = TreeCache(model.config)
    device = Target(model, cache, {0}, _BRANCHES, backend=attention).device
    ids = ids.to(device)
    branches = ids[_PREFIX + 1 :].view(_BRANCHES, _DEPTH)
    texts = torch.cat([ids[: _PREFIX + 1].expand(_BRANCHES, -1), branches], dim=1)
    plain = _run_plainly(model, texts, cache)
    cache.set_lengths([_PREFIX] * _BRANCHES)
    depths, owners = (torch.tensor(values, device=device) for values in (_DEPTHS, _OWNERS))
    tokens = texts[owners, _PREFIX + depths][None]
    parents, zeros = torch.tensor([_PARENTS], device=device), torch.zeros_like(tokens)
    tree = CandidateTree(tokens, parents, depths[None], zeros.float(), zeros, _DEPTH, _BRANCHES)
    of_tree = Target(model, cache.rows([0]), {0}, backend=attention).verify(tree).logits[0]
    if len(of_tree) != len(tree):
        raise Unfit(f"for {len(tree)} tokens it gives the logits of {len(of_tree)}")
    plain = plain[owners.to(plain.device), _PREFIX + depths.to(plain.device)]
    return plain.float().cpu(), of_tree.float().cpu()


def _run_plainly(model, texts: Tensor, cache: TreeCache) -> Tensor:
    """The logits (B, L, V) of whole texts, as their prefill by `generate` would give them; fills the cache."""
    layers = len(cache.layers)
    kwargs = {"use_cache": True, **plain_positions(model, texts)}
    inputs = prompt_inputs(model, texts, texts.shape[1], cache, kwargs)
    logits, hidden_states = forward(model, inputs, captured_layers([0]))
    if hidden_states is None or len(hidden_states) < 2 or hidden_states[1] is None:
        raise Unfit("it does not hand out the outputs of its layers")
    if not cache.layers[0].is_initialized:
        raise Unfit("it keeps no keys and values in the cache that it is given")
    if len(cache.layers) != layers:
        raise Unfit("it adds layers to the cache that its configuration does not count")
    return logits


def _tokens(model, count: int) -> Tensor:
    """(count,): some words of the vocabulary, none that a configuration gives a meaning of its own."""
    special = set(_special_tokens(model.config.to_dict()))
    vocab = model.config.get_text_config(decoder=True).vocab_size
    words = [token for token in range(vocab // 4, vocab) if token not in special] or [0]
    step = max(min(len(words), 1000) // count, 1)
    return torch.tensor([words[at * step % len(words)] for at in range(count)])


def _special_tokens(config: dict) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _special_tokens(value)
        elif "token" in str(name):
            yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))
