"""The attention of a tree pass: "d2sd_cascade" or a mask, and the one place that decides which.

A cascade has two parts. The prefix part is all nodes of a row against its cached keys, without a mask. The small part
is the nodes against each other, and, where a window is narrower than the context, against the few cached keys that
only some nodes see. Both parts give the log-sum-exp (LSE) of their scores, by which they merge to what one attention
over all keys would give. Nothing is as large as nodes times context.
"""

import functools
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers.utils import logging

from .cache import Place, TreeCache, TreeLayer, is_recurrent, layer_windows, side_by_side
from .compat import (
    attention_types_of,
    attention_within,
    biases_by_position,
    current_plan,
    embeds_positions_itself,
    register_attention,
)
from .kernels import CPU, KERNELS, Facts, Kernel, Packing, Scoring, tokens_of
from .tree import CandidateTree, Chains

logger = logging.get_logger(__name__)

NAME = "d2sd_cascade"
SHORT = 512  # keys up to which one call with a mask beats two calls and a merge on a CPU, measured
MASKED = ("sdpa", "eager")  # attention of Transformers that takes a 4-D mask


@dataclass(frozen=True)
class Nodes:
    """The queries of one pass, N in each of B rows, and which of them see which. Shared by all layers."""

    visible: Tensor  # (B, N, N) bool
    depths: Tensor  # (B, N), positions after the anchor's
    max_depth: int  # at least the greatest depth
    tree: CandidateTree | None = None
    block_size: int | None = None  # for the blocks of a draft: nodes see their own block
    one_sided: bool = False  # of it, only the nodes before them, as in a tree

    @classmethod
    def of_tree(cls, tree: CandidateTree) -> "Nodes":
        deepest = tree.max_depth if tree.max_depth is not None else len(tree) - 1
        return cls(tree.visibility(), tree.depths, deepest, tree=tree)

    @classmethod
    def of_blocks(cls, rows: int, count: int, block_size: int, device: torch.device) -> "Nodes":
        """`count` blocks in each row that stand at the same positions and do not see each other."""
        block = torch.arange(count, device=device).repeat_interleave(block_size)
        depths = torch.arange(block_size, device=device).repeat(count)
        visible = (block[:, None] == block).expand(rows, -1, -1)
        return cls(visible, depths.expand(rows, -1), block_size - 1, block_size=block_size)

    def __len__(self) -> int:
        return self.depths.shape[1]

    @functools.cached_property
    def causal(self) -> "Nodes":
        """The same nodes, each seeing none that stands behind it."""
        if self.block_size is None:
            return self
        earlier = self.depths[:, None] <= self.depths[..., None]
        return replace(self, visible=self.visible & earlier, one_sided=True)

    def segments(self) -> Chains:
        """What attends to what as packed sequences: a tree's chains, or the blocks."""
        if self.tree is not None:
            return self.tree.chains(self.visible)
        rows, size = self.depths.shape
        every = torch.arange(rows * size, device=self.depths.device)
        starts = torch.arange(0, rows * size + 1, self.block_size, device=every.device, dtype=torch.int32)
        return Chains(every, starts, every, starts)


@dataclass(frozen=True)
class LayerPlan:
    """What the layers of one type need to know of a pass, as tensors of fixed shapes on one device."""

    bounds: Tensor  # (B, 2): of each row's stored keys, all nodes see those from bounds[b, 0] up to bounds[b, 1]
    edge: Tensor | None  # (B, E), slots of the keys before them that some nodes see; `None`: there are none
    # (B or 1, 1, N, E + N), added to the scores of the small part; (B, 1, N, keys) if that has all of few keys.
    mask: Tensor | None  # `None`: `segments` say it
    prefix: list[Tensor]  # int32 starts of the prefix part as packed sequences: queries and keys, (2·B + 1,) each
    segments: list[Tensor]  # of the small part as packed sequences: the fields of `Chains`
    longest: int  # at least the longest row's stored keys
    deepest: int  # at least the nodes of any segment, less one
    causal: bool
    has_prefix: bool  # whether any key is seen by all nodes

    def to(self, device: torch.device) -> "LayerPlan":
        def moved(value):
            if isinstance(value, list):
                return [tensor.to(device) for tensor in value]
            return value.to(device) if torch.is_tensor(value) else value

        return LayerPlan(**{name: moved(value) for name, value in vars(self).items()})


@dataclass(frozen=True)
class TreePlan:
    """One pass's plans for the layers of each type. Models hand it to their layers in the attention mask's place."""

    kernel: Kernel
    layer_types: list[str]
    plans: dict[str, LayerPlan]
    elsewhere: dict = field(default_factory=dict)  # copies on other devices, for targets that are spread

    def of_layer(self, layer: int, device: torch.device) -> LayerPlan:
        layer_type = self.layer_types[layer]
        plan = self.plans[layer_type]
        if plan.bounds.device == device:
            return plan
        if (layer_type, device) not in self.elsewhere:
            self.elsewhere[layer_type, device] = plan.to(device)
        return self.elsewhere[layer_type, device]


def _attend(
    module,
    query: Tensor,  # (B, Hq, N, D)
    key: Tensor,  # (B, Hk, keys, D): stored ones, at the end the nodes' own
    value: Tensor,
    attention_mask: Tensor,  # says nothing: the plan does
    **options,  # scaling, softcap, and attention sinks: s_aux (Hq,)
) -> tuple[Tensor, None]:
    """As Transformers' attention function of this name."""
    tree_plan, scaling = current_plan(), options.get("scaling")
    plan = tree_plan.of_layer(module.layer_idx, query.device)
    if torch.is_autocast_enabled(query.device.type):  # as it treats torch's own attention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (states.to(dtype) for states in (query, key, value))
    call = _cascade_op if torch.compiler.is_compiling() else cascade
    came_as, query = query.shape, side_by_side(query, len(plan.bounds))
    output = call(
        query,
        key,
        value,
        plan.bounds,
        plan.edge,
        plan.mask,
        plan.prefix,
        plan.segments,
        options.get("s_aux"),
        tree_plan.kernel.name,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        options.get("softcap") or 0.0,
        plan.longest,
        plan.deepest,
        plan.causal,
        plan.has_prefix,
    )
    if came_as[0] > len(output):  # chains of each row, side by side: back to rows
        output = output.view(came_as[0], came_as[2], *output.shape[2:])
    return output, None


def cascade(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    edge: Tensor | None,
    mask: Tensor | None,
    prefix: list[Tensor],
    segments: list[Tensor],
    sinks: Tensor | None,
    kernel: str,
    scaling: float,
    softcap: float,
    longest: int,
    deepest: int,
    causal: bool,
    has_prefix: bool,
) -> Tensor:
    """Attention of the nodes to the prefix and to each other, (B, N, Hq, D). For arguments see `LayerPlan`."""
    run, scoring = KERNELS[kernel], Scoring(scaling, softcap)
    num_nodes = query.shape[2]
    nodes = slice(key.shape[2] - num_nodes, None)
    if mask is None:
        own_key, own_value = (states[:, :, nodes] for states in (key, value))
        order, query_starts, keys, key_starts = segments
        packing = Packing(query_starts, key_starts, max(deepest + 1, 2), deepest + 1, causal)
        out, lse = _over_segments(run, query, own_key, own_value, (order, keys), packing, scoring)
    else:
        every = edge is None and mask.shape[-1] == key.shape[2]
        few_key, few_value = (states if every else _with_edge(states, nodes, edge) for states in (key, value))
        out, lse = run.masked(query, few_key, few_value, mask, scoring)
    if has_prefix:
        packed = Packing(prefix[0], prefix[1], max(num_nodes, 2), longest) if prefix else None
        prefix_out, prefix_lse = run.over_prefix(query, key, value, bounds, packed, scoring)
        out, lse = merge(out, lse, prefix_out, prefix_lse, needs_lse=sinks is not None)
    if sinks is not None:
        out = out * torch.sigmoid(lse - sinks[:, None])[..., None].to(out.dtype)
    return out.transpose(1, 2).contiguous()


def merge(
    out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor, needs_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Two attentions over different keys as one: outputs (B, H, N, D), LSEs (B, H, N), at least in float32."""
    dtype = torch.promote_types(out.dtype, torch.float32)
    share = torch.sigmoid(other_lse - lse)[..., None].to(dtype)
    merged = torch.lerp(out.to(dtype), other_out.to(dtype), share)
    return merged.to(out.dtype), torch.logaddexp(lse, other_lse) if needs_lse else None


def _with_edge(states: Tensor, nodes: slice, edge: Tensor | None) -> Tensor:
    """(B, Hk, E + N, D): the keys or values that some nodes see and others do not."""
    own = states[:, :, nodes]
    if edge is None:
        return own
    index = edge[:, None, :, None].expand(*states.shape[:2], -1, states.shape[3])
    return torch.cat([states.gather(2, index), own], dim=2)


def _over_segments(
    run: Kernel, query, key, value, places, packing: Packing, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """The small part as packed sequences: chains, causal and aligned at the end, or blocks in both directions.

    Args:
        places: which queries, and which keys, stand behind each other: `order` and `keys` of `Chains`.
    """
    order, keys = places
    packed_key, packed_value = (tokens_of(states)[keys] for states in (key, value))
    rows, heads, num_nodes, width = query.shape
    queries = query.transpose(1, 2).reshape(-1, heads, width)[order]
    out, lse = run.varlen(queries, packed_key, packed_value, packing, scoring)
    out = torch.empty_like(out).index_copy_(0, order, out).view(rows, num_nodes, heads, width)
    lse = torch.empty_like(lse).index_copy_(1, order, lse).view(heads, rows, num_nodes)
    return out.transpose(1, 2), lse.transpose(0, 1)


_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor bounds, Tensor? edge, Tensor? mask, Tensor[] prefix, "
    "Tensor[] segments, Tensor? sinks, str kernel, float scaling, float softcap, int longest, int deepest, "
    "bool causal, bool has_prefix) -> Tensor"
)
_cascade_op = torch.library.custom_op("hf_d2sd::cascade", cascade, mutates_args=(), schema=_SCHEMA)


@_cascade_op.register_fake
def _(query, *args, **kwargs):
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)


register_attention(NAME, _attend)


@dataclass(frozen=True)
class TreeAttention:
    """How a model attends in a tree pass, and why so. The prefill keeps the model's own implementation."""

    backend: str
    reason: str
    implementation: str  # what Transformers calls it
    windows: dict[str, int | None]  # the sliding window of each layer type: positions nearer than this are seen
    text_config: object
    layer_types: list[str]  # of every layer, those without a cache of their own included
    kernel: Kernel | None = None  # of a cascade; `None`: masks
    by_position: bool = False  # whether the model adds a bias by the positions of keys
    tells_positions: bool = False  # whether its embedding of positions has to be told them
    causal_types: frozenset[str] = frozenset()  # layer types in which also the nodes of a block see none behind them
    recurrent: bool = False  # whether some layers keep a state: nodes then come as chains

    @classmethod
    def for_model(
        cls, model, forced: str | None = None, two_sided: bool = False, obstacle: str | None = None
    ) -> "TreeAttention":
        """Choose a backend for a model; `forced` names the one that it has to be.

        Args:
            two_sided: for drafters: a window is the greatest distance seen, and blocks may see all of themselves.
            obstacle: what stands in the way of a cascade, so that it is to be a mask.

        Raises:
            ValueError: for an unknown backend, or one that cannot run here.
        """
        facts, recurrent = Facts.of(model), is_recurrent(model.config)
        facts = facts if obstacle is None else replace(facts, obstacle=obstacle)
        windows = {name: window and window + two_sided for name, window in layer_windows(model.config).items()}
        if recurrent:
            backend, reason = _choose_for_chains(facts, forced, bool(windows))
        else:
            backend, reason = choose(facts, forced)
        kernel = KERNELS.get(backend)
        text_config = model.config.get_text_config(decoder=True)
        causal_types = frozenset((model.config.causal_layer_types or ()) if two_sided else ())
        types = attention_types_of(model.config)
        ways = biases_by_position(model), embeds_positions_itself(model)
        name = NAME if kernel else backend
        return cls(backend, reason, name, windows, text_config, types, kernel, *ways, causal_types, recurrent)

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"

    def active(self, plan: object = None):
        """Within, the forwards of this thread use this attention; every other thread's and later ones their own."""
        return attention_within(self.implementation, plan)

    def active_at(self, plan: object, positions: Tensor, nodes: Nodes, places: dict[str, Place]):
        """As `active`, for a target's pass over nodes at `positions` (B, N): models hear of these in several ways."""
        keys = _key_positions(nodes, *places.values()) if self.by_position else None
        return attention_within(self.implementation, plan, positions if self.tells_positions else None, keys)

    def prepare(
        self, nodes: Nodes, cache: TreeCache, places: dict[str, Place], dtype
    ) -> "TreePlan | dict[str, Tensor]":
        """The plan of a pass, or its masks by layer type.

        Args:
            cache: whose layers will append the N nodes, or place them.
            places: by layer type, where the nodes are going to stand.
            dtype: of the activations; an additive mask is made in it.
        """
        layers = cache.by_type()
        seen = {name: nodes.causal if name in self.causal_types else nodes for name in self.windows}
        if self.kernel is None:
            return {
                name: self.as_mask(tree_mask(seen[name], places[name], layers[name], window), dtype)
                for name, window in self.windows.items()
            }
        segments = list(vars(nodes.segments()).values()) if self.kernel.packs else []
        plans = {
            name: plan_layer(self.kernel, seen[name], segments, places[name], layers[name], window, dtype)
            for name, window in self.windows.items()
        }
        return TreePlan(self.kernel, self.layer_types, plans)

    def as_mask(self, seen: Tensor, dtype: torch.dtype) -> Tensor:
        """From which keys are seen, (B, N, keys) bool, to the mask (B, 1, N, keys) that the implementation takes."""
        return seen[:, None] if self.implementation == "sdpa" else additive(seen, dtype)[:, None]

    def masks(self, prepared) -> dict[str, Tensor]:
        """By layer type, what a layer is given as its mask; with a plan one that says nothing, so none is made."""
        if not isinstance(prepared, TreePlan):
            return prepared
        device = next(iter(prepared.plans.values())).bounds.device
        return dict.fromkeys(self.windows, torch.empty(1, 1, 1, 1, device=device))

    def as_argument(self, prepared):
        """What the model's forward takes as `attention_mask`: one for each layer type, or one for all."""
        masks = self.masks(prepared)
        if self.recurrent:  # their models name two kinds of masks, or take none
            return {"full_attention": next(iter(masks.values())), **masks, **_NO_PADDING} if masks else None
        by_type = getattr(self.text_config, "layer_types", None) is not None  # as `create_masks_for_generate` decides
        return masks if by_type else next(iter(masks.values()))


def _key_positions(nodes: Nodes, place: Place) -> Tensor:
    """(B, keys): of each key of a layer the position after its row's first, of nodes that of their depth."""
    lengths = place.ends(nodes.depths.device)[:, None]
    stored = torch.arange(place.start, device=lengths.device).expand(len(lengths), -1)
    return torch.cat([stored, lengths + nodes.depths], dim=1)


_NO_PADDING = {"linear_attention": None, "conv": None}  # what recurrent layers take for a mask


def _choose_for_chains(facts: Facts, forced: str | None, attends: bool) -> tuple[str, str]:
    """As `choose`, for chains: they share a prefix, as masks over all keys do not have it.

    Raises:
        ValueError: as `choose`, for such masks that are asked for, and for a model that takes no other attention.
    """
    if not attends:
        return "none", "no layer attends"
    if facts.obstacle is not None or forced in MASKED:
        why = f"d2sd_attention_backend is {forced!r}" if forced is not None else facts.obstacle
        raise ValueError(
            "D²SD checks a tree's chains against one cached prefix where a target has recurrent states, and here "
            f"{why}. Leave d2sd_attention_backend unset, or generate without assistant_model."
        )
    backend, reason = choose(facts, forced)
    return (backend, reason) if backend in KERNELS else ("masked", KERNELS["masked"].describe)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


@functools.cache
def choose(facts: Facts, forced: str | None) -> tuple[str, str]:
    """The first backend that can run, in the order of speed, or the one that is asked for; and why it is the one.

    Raises:
        ValueError: for an unknown backend, or one that cannot run here.
    """
    if forced is not None:
        _check_forced(facts, forced)
        return forced, "asked for by d2sd_attention_backend"
    own = facts.own_implementation
    kernels = [KERNELS[own]] if own in KERNELS else []
    kernels += [kernel for kernel in KERNELS.values() if kernel.by_default]
    for kernel in kernels:
        if kernel.obstacle(facts) is None:
            logger.info(f"D²SD runs candidate trees with {kernel.name!r}: {kernel.describe}.")
            return kernel.name, kernel.describe
    masked = own if own in MASKED else "eager" if facts.mask_obstacle("sdpa") else "sdpa"
    why = CPU.obstacle(facts) if facts.device.type == "cpu" else KERNELS["varlen"].obstacle(facts)
    logger.warning(f"D²SD runs candidate trees with {masked!r} attention and a mask over all keys: {why}.")
    return masked, f"with a mask over all keys, since {why}"


def _check_forced(facts: Facts, forced: str) -> None:
    if forced not in (*KERNELS, *MASKED):
        names = ", ".join(map(repr, (*KERNELS, *MASKED)))
        raise ValueError(f"d2sd_attention_backend is {forced!r}; it must be one of {names}.")
    obstacle = KERNELS[forced].obstacle(facts) if forced in KERNELS else facts.mask_obstacle(forced)
    if obstacle is not None:
        raise ValueError(f"d2sd_attention_backend={forced!r} cannot run here: {obstacle}.")


def plan_layer(
    kernel: Kernel,
    nodes: Nodes,
    segments: list[Tensor],
    place: Place,
    layer: TreeLayer,
    window: int | None,
    dtype: torch.dtype,
) -> LayerPlan:
    """Which of a layer's stored keys all nodes see, which only some, and what they see of each other.

    Args:
        place: where the nodes stand; of a row with len stored keys, key i stands len - i positions before the anchor.
        window: a node sees positions nearer than this; `None` for all.
    """
    device, deepest = nodes.depths.device, nodes.max_depth
    ends, longest = place.ends(device), layer.bound(place.lengths)
    narrow = window is not None and longest + deepest >= window
    starts, edge, mask = torch.zeros_like(ends), None, None
    first, end = layer.first_handed_out, place.start + len(nodes)
    few = not kernel.packs and end - first <= SHORT
    if few:
        mask = additive(tree_mask(nodes, place, layer, window), dtype)[:, None]
    elif window is not None and narrow:
        starts, edge, seen = _at_the_edge(nodes, ends, window)
        edge, mask = (edge - first).clamp(min=0), additive(seen, dtype)[:, None]
    elif not kernel.packs:
        mask = additive(nodes.visible if len(ends) > 1 else nodes.visible[:1], dtype)[:, None]
    bounds = (torch.stack([starts, ends], dim=1) - first).clamp(min=0)
    return LayerPlan(
        bounds=bounds,
        edge=edge,
        mask=mask,
        prefix=_pack_prefix(bounds, len(nodes), layer.row_spacing(end)) if kernel.packs else [],
        segments=[] if mask is not None else segments,
        longest=longest,
        deepest=deepest,
        causal=nodes.block_size is None or nodes.one_sided,
        has_prefix=not few and longest > 0 and (window is None or not narrow or deepest + 1 < window),
    )


def _at_the_edge(nodes: Nodes, ends: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows with `ends` (B,) stored keys: where those begin that all nodes see (B,), those before that only some see
    (B, E), and which of these and of the nodes each node sees (B, N, E + N).

    Key i is seen from depth d if len - i + d < window: by all nodes from len + deepest - window + 1 on.
    """
    deepest = nodes.max_depth
    starts = torch.minimum((ends + deepest - window + 1).clamp(min=0), ends)
    edge = starts[:, None] - 1 - torch.arange(min(deepest, window - 1), device=ends.device)  # (B, E)
    distance = (ends[:, None] - edge)[:, None] + nodes.depths[..., None]  # (B, N, E)
    seen = torch.cat([(distance < window) & (edge >= 0)[:, None], _near(nodes, window)], dim=2)
    return starts, edge, seen


def _pack_prefix(bounds: Tensor, num_nodes: int, spacing: int) -> list[Tensor]:
    """Starts of queries and keys, (2·B + 1,) each: a row's keys lie between slots that no segment's queries see."""
    rows = torch.arange(len(bounds), device=bounds.device)
    key_starts = (bounds + spacing * rows[:, None]).flatten()
    query_starts = (num_nodes * (rows[:, None] + torch.arange(2, device=bounds.device))).flatten()
    return [torch.nn.functional.pad(starts, (1, 0)).to(torch.int32) for starts in (query_starts, key_starts)]


def _near(nodes: Nodes, window: int) -> Tensor:
    """(B, N, N) bool: which nodes see each other, within the window."""
    distance = (nodes.depths[..., None] - nodes.depths[:, None]).abs()
    return nodes.visible & (distance < window)


def tree_mask(nodes: Nodes, place: Place, layer: TreeLayer, window: int | None) -> Tensor:
    """Which keys each node sees of all that a layer hands out: cached ones within its window, and other nodes.

    Returns:
        (B, N, keys) bool; the nodes are the last keys.
    """
    device = nodes.depths.device
    ends = place.ends(device)[:, None, None]
    slots = torch.arange(layer.first_handed_out, place.start, device=device)  # stored keys handed out
    seen = (slots < ends).expand(len(place.lengths), nodes.depths.shape[1], -1)
    if window is not None:
        seen = seen & (ends - slots + nodes.depths[..., None] < window)
        return torch.cat([seen, _near(nodes, window)], dim=2)
    return torch.cat([seen, nodes.visible], dim=2)
