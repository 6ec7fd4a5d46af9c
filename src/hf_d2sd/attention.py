"""The attention of a tree pass: "d2sd_cascade" or a mask, and the one place that decides which.

A cascade has two parts. The prefix part is all nodes of a row against its cached keys, without a mask. The small part
is the nodes against each other, and, where a window is narrower than the context, against the few cached keys that
only some nodes see. Both parts give the log-sum-exp (LSE) of their scores, by which they merge to what one attention
over all keys would give. Nothing is as large as nodes times context.
"""

import contextlib
import functools
from collections.abc import Sequence
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
    stock_sdpa,
)
from .kernels import CPU, KERNELS, Facts, Kernel, Packing, Prefix, Scoring, empty_bias, repeated, tokens_of
from .tree import CandidateTree, Chains

logger = logging.get_logger(__name__)

NAME, GROUPED = "d2sd_cascade", "d2sd_grouped"
# Keys up to which one call with a mask beats two calls and a merge.
SHORT = 512  # in a row, on a CPU, measured
# On a GPU the mask's call reads each key as often as queries share it: some 11 ns a key more at an H100's bandwidth, 8
# heads of 128 shared by four. A cascade is four more launches a layer, each 5 to 35 µs of the host, or 3 in a graph.
SHORT_LAUNCHED, SHORT_REPLAYED = 4096, 1024  # in all rows
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
        starts = torch.arange(0, rows * size + 1, self.block_size, device=self.depths.device, dtype=torch.int32)
        return Chains(None, starts, None, starts)


@dataclass(frozen=True)
class LayerPlan:
    """What the layers of one type need to know of a pass, as tensors of fixed shapes on one device."""

    bounds: Tensor  # (B, 2): of each row's stored keys, all nodes see those from bounds[b, 0] up to bounds[b, 1]
    # (B, E + N): of the small part's keys the slots, E of which only some nodes see; `None`: the nodes', or all of few
    few: Tensor | None
    # (B or 1, 1, N, E + N), added to the scores of the small part; (B, 1, N, keys) if that has all of few keys.
    mask: Tensor | None  # `None`: `segments` say it
    prefix: list[Tensor]  # the tensors of `Prefix`, bounds aside
    segments: list[Tensor | None]  # of the small part as packed sequences: the fields of `Chains`
    longest: int  # at least the longest row's stored keys
    deepest: int  # at least the nodes of any segment, less one
    causal: bool
    has_prefix: bool  # whether any key is seen by all nodes
    limits: list[int] = field(default_factory=list)  # the bounds, where they are the same in all rows and known

    def to(self, device: torch.device) -> "LayerPlan":
        def moved(value):
            if isinstance(value, list):
                return [moved(one) for one in value]
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
        plan.few,
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
        plan.limits,
    )
    if came_as[0] > len(output):  # chains of each row, side by side: back to rows
        output = output.view(came_as[0], came_as[2], *output.shape[2:])
    return output, None


def cascade(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    few: Tensor | None,
    mask: Tensor | None,
    prefix: list[Tensor],
    segments: list[Tensor | None],
    sinks: Tensor | None,
    kernel: str,
    scaling: float,
    softcap: float,
    longest: int,
    deepest: int,
    causal: bool,
    has_prefix: bool,
    limits: Sequence[int] = (),
) -> Tensor:
    """Attention of the nodes to the prefix and to each other, (B, N, Hq, D). For arguments see `LayerPlan`."""
    run, scoring, order = KERNELS[kernel], Scoring(scaling, softcap), None
    nodes = slice(key.shape[2] - query.shape[2], None)
    if mask is None:
        order, query_starts, keys, key_starts = segments
        query = query if order is None else _ordered(query, order)
        packing = Packing(query_starts, key_starts, max(deepest + 1, 2), deepest + 1, causal)
        own = (tokens_of(states[:, :, nodes]) for states in (key, value))
        own_key, own_value = own if keys is None else (states[keys] for states in own)
        out, lse = _over_segments(run, query, own_key, own_value, packing, scoring)
    else:
        every = few is None and mask.shape[-1] == key.shape[2]
        group = query.shape[1] // key.shape[1] if run.repeats else 1
        few_key, few_value = (_chosen(states, slice(None) if every else nodes, few, group) for states in (key, value))
        out, lse = run.masked(query, few_key, few_value, mask, scoring)
    if has_prefix:
        seen = Prefix(bounds, list(limits), longest, *prefix)
        prefix_out, prefix_lse = run.over_prefix(query, key, value, seen, scoring)
        out, lse = merge(out, lse, prefix_out, prefix_lse, needs_lse=sinks is not None)
    if sinks is not None:
        out = out * _share(lse, sinks[:, None], out.dtype)
    return _in_place(out.transpose(1, 2).contiguous(), order)


def _ordered(query: Tensor, order: Tensor) -> Tensor:
    """(B, Hq, N, D): the queries in the order (B·N,) of chains, each row's own first."""
    rows, heads, num_nodes, width = query.shape
    return query.transpose(1, 2).reshape(-1, heads, width)[order].view(rows, num_nodes, heads, width).transpose(1, 2)


def _in_place(out: Tensor, order: Tensor | None) -> Tensor:
    """Of outputs (B, N, Hq, D) in such an order each at its node."""
    if order is None:
        return out
    flat = out.flatten(0, 1)
    return torch.empty_like(flat).index_copy_(0, order, flat).view(out.shape)


def _share(lse: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, Hq, N, 1): of two sets of keys with these log-sum-exps the weight of the first one."""
    ahead = lse - other
    return torch.sigmoid(ahead, out=torch.empty_like(ahead, dtype=dtype))[..., None]


def merge(
    out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor, needs_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Two attentions over different keys as one: outputs (B, H, N, D), LSEs (B, H, N), at least in float32.

    What counts less is weighed in the outputs' own dtype, as attention weighs values.
    """
    merged = torch.lerp(other_out, out, _share(lse, other_lse, out.dtype))
    return merged, torch.logaddexp(lse, other_lse) if needs_lse else None


def _chosen(states: Tensor, some: slice, few: Tensor | None, group: int) -> Tensor:
    """(B, Hk · group, n, D): of keys or values those in slots `few` (B, n), or in a slice, each head so often."""
    if few is None:
        return repeated(states[:, :, some], group)
    rows, heads, _, width = states.shape
    every = states[:, :, None].expand(-1, -1, group, -1, -1)
    index = few[:, None, None, :, None].expand(-1, heads, group, -1, width)
    return every.gather(3, index).view(rows, heads * group, -1, width)


def _over_segments(run: Kernel, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scoring: Scoring):
    """The small part as packed sequences: chains, causal and aligned at the end, or blocks in both directions.

    Args:
        query: (B, Hq, N, D), chain by chain; key, value: (T, Hk, D), as `Chains.keys` has them.
    """
    rows, heads, num_nodes, width = query.shape
    out, lse = run.varlen(query.transpose(1, 2).reshape(-1, heads, width), key, value, packing, scoring)
    return out.view(rows, num_nodes, heads, width).transpose(1, 2), lse.view(heads, rows, num_nodes).transpose(0, 1)


_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor bounds, Tensor? few, Tensor? mask, Tensor[] prefix, "
    "Tensor?[] segments, Tensor? sinks, str kernel, float scaling, float softcap, int longest, int deepest, "
    "bool causal, bool has_prefix, int[] limits=[]) -> Tensor"
)
_cascade_op = torch.library.custom_op("hf_d2sd::cascade", cascade, mutates_args=(), schema=_SCHEMA)


@_cascade_op.register_fake
def _(query, *args, **kwargs):
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)


register_attention(NAME, _attend)


def _attend_grouped(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options
) -> tuple[Tensor, None]:
    """Transformers' "sdpa", by which heads that share keys read them once where a row has one query.

    In half precision torch's kernel for CPUs reads and converts keys for each head of queries: as queries of one head
    three that share them take a quarter of the time at 180 keys.
    """
    rows, heads, size, width = query.shape
    shared = key.shape[1]
    others = options.get("position_bias") is not None or options.get("softcap") is not None or options.get("dropout")
    if size > 1 or attention_mask is not None or shared == heads or others:
        return stock_sdpa()(module, query, key, value, attention_mask, **options)
    grouped = query.reshape(rows, shared, heads // shared, width)
    out = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, scale=options.get("scaling"))
    return out.reshape(rows, 1, heads, value.shape[-1]), None


register_attention(GROUPED, _attend_grouped)


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
    groups: bool = False  # whether a plain step's queries that share keys read them together

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
        groups = facts.own_implementation == "sdpa" and facts.obstacle is None and _is_half_on_cpu(facts)
        return cls(backend, reason, name, windows, text_config, types, kernel, *ways, causal_types, recurrent, groups)

    def __str__(self) -> str:
        most = 0 if self.kernel is None else most_at_once(self.kernel, TreeLayer(), rows=1)
        at_once = f"; up to {most} keys in one call with a mask" if most else ""
        measured = str(self.kernel.ways) if self.kernel is not None and self.kernel.ways is not None else ""
        way = f"; the prefix by {measured}, by measurement" if measured else ""
        return f"{self.backend}: {self.reason}{at_once}{way}"

    def active(self, plan: object = None):
        """Within, the forwards of this thread use this attention; every other thread's and later ones their own."""
        return attention_within(self.implementation, plan)

    def active_for_one(self):
        """As `active`, for a plain step: a token in each row, which sees all that the cache hands out."""
        groups = self.groups and not torch.are_deterministic_algorithms_enabled()
        return attention_within(GROUPED, None) if groups else contextlib.nullcontext()

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


def _is_half_on_cpu(facts: Facts) -> bool:
    return facts.devices == {"cpu"} and facts.dtype in (torch.float16, torch.bfloat16)


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


def as_bias(seen: Tensor, dtype: torch.dtype, kernel: Kernel, stored: int = 0) -> Tensor:
    """(B, 1, N, stored + keys), from which keys are seen: what is added to their scores, as the kernel reads it.

    Args:
        seen: (B, N, keys) bool, of the last ones; those before them, `stored`, are seen by all.
    """
    rows, size, keys = seen.shape
    mask = empty_bias((rows, 1, size, stored + keys), dtype, seen.device, kernel.on_gpu)
    mask[:, 0, :, stored:].masked_fill_(~seen, torch.finfo(dtype).min)
    return mask


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
    why = CPU.obstacle(facts) if facts.device.type == "cpu" else KERNELS["torch"].obstacle(facts)
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
    device, deepest, longest = nodes.depths.device, nodes.max_depth, layer.bound(place.lengths)
    narrow = window is not None and longest + deepest >= window
    first, end = layer.first_handed_out, place.start + len(nodes)
    if end - first <= most_at_once(kernel, layer, len(place.lengths)):
        if not narrow and layer.is_known and min(place.lengths) == place.start:  # all nodes see all that is stored
            mask = as_bias(nodes.visible, dtype, kernel, place.start - first)
        else:
            mask = as_bias(tree_mask(nodes, place, layer, window), dtype, kernel)
        bounds = nodes.depths.new_empty(len(place.lengths), 2)  # of no prefix
        return LayerPlan(bounds, None, mask, [], [], longest, deepest, causal=True, has_prefix=False)
    ends = place.ends(device)
    starts, few, mask = torch.zeros_like(ends), None, None
    if window is not None and narrow:
        starts, few, seen = _at_the_edge(nodes, ends, window)
        own = torch.arange(end - first - len(nodes), end - first, device=device).expand(len(ends), -1)
        few, mask = torch.cat([(few - first).clamp(min=0), own], dim=1), as_bias(seen, dtype, kernel)
    elif not kernel.packs:
        mask = as_bias(nodes.visible if len(ends) > 1 else nodes.visible[:1], dtype, kernel)
    bounds = (torch.stack([starts, ends], dim=1) - first).clamp(min=0)
    has_prefix = longest > 0 and (window is None or not narrow or deepest + 1 < window)
    return LayerPlan(
        bounds=bounds,
        few=few,
        mask=mask,
        prefix=_pack_prefix(bounds, len(nodes), layer, place) if kernel.on_gpu and has_prefix else [],
        segments=[] if mask is not None else segments,
        longest=longest,
        deepest=deepest,
        causal=nodes.block_size is None or nodes.one_sided,
        has_prefix=has_prefix,
        limits=_limits(place.lengths, deepest, window if narrow else None, first) if layer.is_known else [],
    )


def most_at_once(kernel: Kernel, layer: TreeLayer, rows: int) -> int:
    """Up to how many keys a row one call with a mask is faster than two calls and a merge, which cost launches."""
    if kernel.packs:
        return 0
    if not kernel.on_gpu:
        return SHORT
    return (SHORT_LAUNCHED if layer.is_known else SHORT_REPLAYED) // rows


def _limits(lengths: list[int], deepest: int, window: int | None, first: int) -> list[int]:
    """The bounds of rows of the same length, as `_at_the_edge` has them; of rows of several lengths none."""
    if min(lengths) < max(lengths):
        return []
    start = 0 if window is None else min(max(lengths[0] + deepest - window + 1, 0), lengths[0])
    return [max(start - first, 0), max(lengths[0] - first, 0)]


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


def _pack_prefix(bounds: Tensor, num_nodes: int, layer: TreeLayer, place: Place) -> list[Tensor]:
    """The tensors of `Prefix`: as packed sequences a row's keys lie between slots that no segment's queries see."""
    spacing = layer.row_spacing(place.start + num_nodes)
    rows = torch.arange(len(bounds), device=bounds.device)
    key_starts = (bounds + spacing * rows[:, None]).flatten()
    query_starts = (num_nodes * (rows[:, None] + torch.arange(2, device=bounds.device))).flatten()
    packed = [torch.nn.functional.pad(starts, (1, 0)).to(torch.int32) for starts in (query_starts, key_starts)]
    prefix = [*packed, *bounds.T.to(torch.int32, memory_format=torch.contiguous_format)]
    may_be_empty = not layer.is_known or min(place.lengths) == 0
    empty = [(bounds[:, 0] >= bounds[:, 1])[:, None, None]] if may_be_empty else []
    return prefix + empty


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
