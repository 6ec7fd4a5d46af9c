"""The kernels that a cascade can run on, each with the reason where it cannot: all that knows their signatures.

A module of its own because it is the only code that differs from machine to machine; `attention` is the same on all.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .compat import attention_of, decoder_of, has_sdpa, head_sizes, takes_attention_functions

logger = logging.get_logger(__name__)

HUB_KERNEL = "kernels-community/flash-attn2"
ALIGNED = 16  # columns that rows of a bias are apart a multiple of: memory-efficient attention reads them in vectors
QUERIES_AT_ONCE = 32  # of a head, that torch's kernel for CPUs takes together
KEYS_TO_SHARE = 128  # of all rows, below which bringing queries together takes as long as reading keys again


@dataclass(frozen=True)
class Facts:
    """What the choice of a backend depends on."""

    device: torch.device
    devices: frozenset[str]  # types of all devices that hold weights
    dtype: torch.dtype
    head_dim: int
    softcap: float | None
    own_implementation: str
    supports_sdpa: bool
    obstacle: str | None  # to attention functions other than the model's own

    @classmethod
    def of(cls, model) -> "Facts":
        config = model.config.get_text_config(decoder=True)
        decoder = decoder_of(model)
        device = next((p.device for p in decoder.parameters() if p.device.type != "meta"), torch.device("cpu"))
        return cls(
            device=device,
            devices=frozenset(p.device.type for p in decoder.parameters()) - {"meta"},
            dtype=model.dtype,
            head_dim=max(head_sizes(config)),
            softcap=getattr(config, "attn_logit_softcapping", None),
            own_implementation=attention_of(config),
            supports_sdpa=has_sdpa(decoder),
            obstacle=_architecture_obstacle(decoder, config),
        )

    def mask_obstacle(self, implementation: str) -> str | None:
        if implementation == "sdpa" and not self.supports_sdpa:
            return "the model has no SDPA attention"
        if implementation == "sdpa" and self.softcap is not None and self.own_implementation != "sdpa":
            return "SDPA has no soft-capping"
        return None


def _architecture_obstacle(decoder, config) -> str | None:
    if not takes_attention_functions(decoder):
        return f"{type(decoder).__name__} takes no other attention function"
    if getattr(config, "kv_lora_rank", None) is not None:
        return "keys and values have different sizes"
    return None


@dataclass(frozen=True)
class Packing:
    """Sequences of queries and of keys, S each, packed one behind the other: a query sees its own segment's keys."""

    query_starts: Tensor  # (S + 1,) int32
    key_starts: Tensor  # (S + 1,) int32
    # At least the most of a segment, and at least 2: at 1 FlashAttention folds the heads that share a key into the
    # batch, which wants one query in each segment, and some have none.
    max_queries: int
    max_keys: int  # at least the most of a segment
    causal: bool = False  # aligned at the end of each segment


@dataclass(frozen=True)
class Scoring:
    """How the scores of keys come from their products with a query."""

    scale: float
    softcap: float = 0.0  # c, if scores become `c * tanh(scores / c)`; 0: none


@dataclass(frozen=True)
class Prefix:
    """The stored keys that all nodes of a row see: those within the row's `bounds`, of which few rows have none."""

    bounds: Tensor  # (B, 2)
    limits: list[int]  # the same start and end in all rows, where the host knows them; else empty
    longest: int  # at least the most such keys of a row
    query_starts: Tensor | None = None  # (2·B + 1,) int32, of packed sequences; see `Packing`
    key_starts: Tensor | None = None  # (2·B + 1,) int32
    starts: Tensor | None = None  # (B,) int32, the bounds apart
    ends: Tensor | None = None  # (B,) int32
    empty: Tensor | None = None  # (B, 1, 1) bool, where there are rows without any such key

    def packing(self, num_nodes: int) -> Packing:
        assert self.query_starts is not None and self.key_starts is not None
        return Packing(self.query_starts, self.key_starts, max(num_nodes, 2), self.longest)

    def cut(self, states: Tensor) -> Tensor:
        """Of keys or values (B, Hk, slots, D) those within the limits."""
        return states[:, :, self.limits[0] : self.limits[1]]


class Kernel:
    """One way to run a cascade. Outputs come with the log-sum-exp (LSE) of their scores."""

    name: str
    describe: str
    packs = True  # it takes packed sequences
    by_default = True
    on_gpu = False
    repeats = False  # its `masked` takes each head of keys as often as queries share it
    ways: "Ways | None" = None  # how it runs the prefix part, where it has a choice

    def obstacle(self, facts: Facts) -> str | None:
        """Why it cannot run; `None` if it can."""
        raise NotImplementedError

    def varlen(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, scoring: Scoring) -> tuple[Tensor, Tensor]:
        """q (Tq, Hq, D), k and v (Tk, Hk, D) in packed sequences: output (Tq, Hq, D), LSE (Hq, Tq)."""
        raise NotImplementedError

    def masked(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scoring: Scoring):
        return small_attention(query, key, value, mask, scoring)

    def over_prefix(self, query, key, value, prefix: Prefix, scoring: Scoring) -> tuple[Tensor, Tensor]:
        """All nodes against each row's keys in the prefix: output (B, Hq, N, D), LSE (B, Hq, N)."""
        rows, heads, num_nodes, width = query.shape
        queries = query.transpose(1, 2).reshape(-1, heads, width)
        packing = prefix.packing(num_nodes)
        out, lse = self.varlen(queries, tokens_of(key), tokens_of(value), packing, scoring)
        out = out.view(rows, num_nodes, heads, width).transpose(1, 2)
        return without_empty(out, lse.view(heads, rows, num_nodes).transpose(0, 1), prefix)


class FlashKernel(Kernel):
    """FlashAttention's packed call, from whichever package; its versions differ in how they are asked for the LSE.

    Args:
        load: gives the package; it is fetched from the Hub, say, so not before somebody asks.
    """

    on_gpu = True

    def __init__(self, name: str, describe: str, load: Callable[[], Any], least_capability: int = 8):
        self.name, self.describe, self.load, self.least_capability = name, describe, load, least_capability

    def obstacle(self, facts: Facts) -> str | None:
        reason = facts.obstacle or cuda_obstacle(facts, self.least_capability)
        if reason is None:
            try:
                self._call  # noqa: B018
            except Exception as error:  # a package that is missing, broken or built for another torch
                reason = f"{self.name} does not load ({type(error).__name__}: {error})"
        return reason

    @functools.cached_property
    def package(self) -> Any:
        return self.load()

    @functools.cached_property
    def _call(self) -> tuple[Callable, str]:
        """The function, and what it calls the wish for the LSE."""
        function = self.package.flash_attn_varlen_func
        flags = [one for one in ("return_lse", "return_softmax_lse", "return_attn_probs") if takes(function, one)]
        if not flags:
            raise ImportError("its varlen function returns no log-sum-exp")
        return function, flags[0]

    def varlen(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, scoring: Scoring) -> tuple[Tensor, Tensor]:
        function, lse_flag = self._call
        options = {"softmax_scale": scoring.scale, "causal": packing.causal, lse_flag: True}
        if scoring.softcap:
            options["softcap"] = scoring.softcap
        starts = dict(cu_seqlens_q=packing.query_starts, cu_seqlens_k=packing.key_starts)
        bounds = dict(max_seqlen_q=packing.max_queries, max_seqlen_k=packing.max_keys)
        out, lse = function(q, k, v, **starts, **bounds, **options)[:2]
        return out, heads_first(lse, *out.shape[:2])


class HubKernel(FlashKernel):
    """It may have to be fetched from the Hub: not without being asked for."""

    by_default = False


class TorchVarlen(Kernel):
    name, describe, on_gpu = "varlen", "torch.nn.attention.varlen, in two parts merged by log-sum-exp", True

    @functools.cached_property
    def is_there(self) -> bool:
        return importlib.util.find_spec("torch.nn.attention.varlen") is not None

    def obstacle(self, facts: Facts) -> str | None:
        if not self.is_there:
            return f"torch {torch.__version__} has no torch.nn.attention.varlen"
        if facts.softcap is not None:
            return "torch.nn.attention.varlen has no soft-capping"
        return facts.obstacle or cuda_obstacle(facts, 8)

    def varlen(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, scoring: Scoring) -> tuple[Tensor, Tensor]:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        starts, bounds = (packing.query_starts, packing.key_starts), (packing.max_queries, packing.max_keys)
        options = dict(scale=scoring.scale, window_size=(-1, 0) if packing.causal else (-1, -1))
        if takes(varlen_attn, "enable_gqa"):  # before torch 2.12 it groups unasked
            options["enable_gqa"] = q.shape[1] != k.shape[1]
        out, lse = varlen_attn(q, k, v, *starts, *bounds, return_aux=AuxRequest(lse=True), **options)
        return out, heads_first(lse, *out.shape[:2])


class CpuKernel(Kernel):
    """The kernel behind SDPA on a CPU, which gives the LSE; it groups queries without repeating keys."""

    name, describe, packs = "cpu", "torch's CPU kernel, in two parts merged by log-sum-exp", False

    def obstacle(self, facts: Facts) -> str | None:
        if facts.devices - {"cpu"}:
            return f"the model is on {'/'.join(sorted(facts.devices))}"
        if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
            return f"torch {torch.__version__} has no such kernel"
        if facts.softcap is not None:
            return "torch's CPU kernel has no soft-capping"
        return facts.obstacle

    def masked(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scoring: Scoring):
        return _grouped_on_cpu(query, key, value, scoring.scale, mask.to(query.dtype).expand(len(query), -1, -1, -1))

    def over_prefix(self, query, key, value, prefix: Prefix, scoring: Scoring) -> tuple[Tensor, Tensor]:
        if prefix.limits:
            return _grouped_on_cpu(query, prefix.cut(key), prefix.cut(value), scoring.scale)
        dtype = torch.promote_types(query.dtype, torch.float32)
        out, lse = torch.zeros_like(query), query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
        for row, (start, end) in enumerate(prefix.bounds.tolist()):
            if start < end:
                one, seen = slice(row, row + 1), slice(start, end)
                out[one], lse[one] = _grouped_on_cpu(query[one], key[one, :, seen], value[one, :, seen], scoring.scale)
        return out, lse


class MaskedKernel(Kernel):
    """Plain matrix products, for any device and dtype. It holds scores of all nodes and keys of the prefix."""

    name, describe, packs, by_default = "masked", "plain products, in two parts merged by log-sum-exp", False, False

    def obstacle(self, facts: Facts) -> str | None:
        return facts.obstacle

    def over_prefix(self, query, key, value, prefix: Prefix, scoring: Scoring) -> tuple[Tensor, Tensor]:
        mask = within(prefix.bounds, key.shape[2], torch.float32)
        return small_attention(query, key, value, mask, scoring)


# On a GPU ------------------------------------------------------------------------------------------------------------


def fastest(candidates: dict[str, Callable], measure: Callable[[Callable], float]) -> str:
    """The name of the candidate that takes least, as `measure` finds; of those that run.

    Raises:
        RuntimeError: if none runs.
    """
    times = {}
    for name, run in candidates.items():
        try:
            times[name] = measure(run)
        except (RuntimeError, TypeError) as error:  # built for another GPU, or another signature
            logger.warning(f"D²SD leaves out {name!r} for the prefix part: {type(error).__name__}: {error}")
    if not times:
        raise RuntimeError(f"None of {', '.join(candidates)} runs here; force another d2sd_attention_backend.")
    return min(times, key=lambda name: times[name])


def milliseconds(run: Callable, repeats: int = 5) -> float:
    """What a call takes on the GPU of its output, or to launch where that takes longer."""
    output, _ = run()
    with torch.cuda.device(output.device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / repeats


@dataclass
class Ways:
    """Ways to the same result, of which the fastest is found once for each shape, and then taken.

    While a CUDA graph is captured nothing can be measured: the way of that shape, if known, else the first.
    """

    measure: Callable[[Callable], float] = milliseconds
    known: dict[tuple, str] = field(default_factory=dict)

    def run(self, shape: tuple, candidates: dict[str, Callable]):
        key = shape, tuple(candidates)
        if len(candidates) > 1 and key not in self.known and not _is_capturing():
            self.known[key] = fastest(candidates, self.measure)
        return candidates[self.known.get(key, next(iter(candidates)))]()

    def __str__(self) -> str:
        return "/".join(sorted(set(self.known.values())))


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class SplitKernel(Kernel):
    """Few nodes against a long prefix by a call that splits it over the GPU; nodes against nodes with a mask."""

    packs, on_gpu, repeats = False, True, True

    def masked(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scoring: Scoring):
        if scoring.softcap:
            return small_attention(query, key, value, mask, scoring)
        rows, heads, num_nodes, _ = query.shape
        if mask.dtype != query.dtype:  # autocast
            mask = bias(mask, query.dtype)
        mask = mask.expand(rows, heads, -1, -1)
        out, lse = _efficient_kernel(query, key, value, mask, True, 0.0, False, scale=scoring.scale)[:2]
        return out, lse[..., :num_nodes]  # filled up

    def over_prefix(self, query, key, value, prefix: Prefix, scoring: Scoring) -> tuple[Tensor, Tensor]:
        assert self.ways is not None
        ways = self.prefix_ways(query, key, value, prefix, scoring)
        length = prefix.longest.bit_length()  # lengths up to the next power of two are one shape
        shape = query.device, query.dtype, query.shape, key.shape[1], length
        out, lse = self.ways.run(shape, ways)
        return without_empty(out, lse, prefix)

    def prefix_ways(self, query, key, value, prefix: Prefix, scoring: Scoring) -> dict[str, Callable]:
        """By name, what gives output (B, Hq, N, D) and LSE (B, Hq, N)."""
        raise NotImplementedError


class FlashCacheKernel(SplitKernel):
    """FlashAttention's call for a cache of keys, from whichever package, or its packed one where that is faster."""

    def __init__(self, packed: FlashKernel, name: str, describe: str):
        self.packed, self.name, self.describe = packed, name, describe
        self.by_default, self.ways = packed.by_default, Ways()

    def obstacle(self, facts: Facts) -> str | None:
        return self.packed.obstacle(facts)

    def prefix_ways(self, query, key, value, prefix: Prefix, scoring: Scoring) -> dict[str, Callable]:
        ways = {"packed": lambda: self.packed.over_prefix(query, key, value, prefix, scoring)}
        function = getattr(self.packed.package, "flash_attn_with_kvcache", None)
        if function is not None and (prefix.limits or takes(function, "cache_leftpad")):
            ways = {"kvcache": lambda: with_cache(function, query, key, value, prefix, scoring), **ways}
        return ways


def with_cache(function: Callable, query, key, value, prefix: Prefix, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """FlashAttention's `flash_attn_with_kvcache` over the prefix: output (B, Hq, N, D), LSE (B, Hq, N)."""
    options: dict[str, Any] = dict(softmax_scale=scoring.scale, causal=False, return_softmax_lse=True)
    if scoring.softcap:
        options["softcap"] = scoring.softcap
    if prefix.limits:
        key, value = prefix.cut(key), prefix.cut(value)
    else:  # its lengths count from the first slot on, keys that are left out included
        options |= dict(cache_seqlens=prefix.ends, cache_leftpad=prefix.starts)
    out, lse = function(*(states.transpose(1, 2) for states in (query, key, value)), **options)[:2]
    return out.transpose(1, 2), lse


class TorchKernel(SplitKernel):
    """The kernels behind SDPA on CUDA, which give the LSE; rows of several lengths by the packed call."""

    name, describe = "torch", "torch's kernels behind SDPA, in two parts merged by log-sum-exp"

    def __init__(self, packed: TorchVarlen):
        self.packed, self.ways = packed, Ways()

    def obstacle(self, facts: Facts) -> str | None:
        if facts.softcap is not None:
            return "torch's FlashAttention has no soft-capping"
        return facts.obstacle or cuda_obstacle(facts, 8)

    def prefix_ways(self, query, key, value, prefix: Prefix, scoring: Scoring) -> dict[str, Callable]:
        ways = {}
        if prefix.limits:
            keys, values = prefix.cut(key), prefix.cut(value)
            ways["dense"] = lambda: _flash_kernel(query, keys, values, 0.0, False, False, scale=scoring.scale)[:2]
        if self.packed.is_there:
            ways["packed"] = lambda: self.packed.over_prefix(query, key, value, prefix, scoring)
        if not ways:
            mask = within(prefix.bounds, key.shape[2], query.dtype).expand(-1, -1, query.shape[2], -1)
            mask = bias(mask, query.dtype)
            group = query.shape[1] // key.shape[1]
            ways["masked"] = lambda: self.masked(query, repeated(key, group), repeated(value, group), mask, scoring)
        return ways


def _flash_kernel(*args, **kwargs) -> tuple[Tensor, ...]:
    return torch.ops.aten._scaled_dot_product_flash_attention(*args, **kwargs)


def _efficient_kernel(*args, **kwargs) -> tuple[Tensor, ...]:
    return torch.ops.aten._scaled_dot_product_efficient_attention(*args, **kwargs)


def bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, N, keys), a mask that is added, in memory as memory-efficient attention reads it."""
    return empty_bias(mask.shape, dtype, mask.device).copy_(mask)


def empty_bias(shape: Sequence[int], dtype: torch.dtype, device: torch.device, aligned: bool = True) -> Tensor:
    """Zeros (B, 1, N, keys), by default in such memory."""
    keys = shape[-1]
    width = -(-keys // ALIGNED) * ALIGNED if aligned else keys
    return torch.zeros((*shape[:-1], width), dtype=dtype, device=device)[..., :keys]


def within(bounds: Tensor, slots: int, dtype: torch.dtype) -> Tensor:
    """(B, 1, 1, slots), a mask that is added: each row's keys within its bounds (B, 2) are seen."""
    at = torch.arange(slots, device=bounds.device)
    seen = (at >= bounds[:, :1]) & (at < bounds[:, 1:])
    mask = torch.zeros(seen.shape, device=at.device, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return mask[:, None, None]


def without_empty(out: Tensor, lse: Tensor, prefix: Prefix) -> tuple[Tensor, Tensor]:
    """The same, nothing where a row has no key in the prefix: kernels say something of it, each its own."""
    if prefix.empty is None:
        return out, lse
    return out.masked_fill(prefix.empty[..., None], 0), lse.masked_fill(prefix.empty, -torch.inf)


def repeated(states: Tensor, group: int) -> Tensor:
    """(B, Hk · group, n, D): each head of keys as often as queries share it."""
    if group == 1:
        return states
    return states[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)


def _cpu_kernel(*args, **kwargs) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **kwargs)


def _grouped_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Torch's kernel for CPUs: output (B, Hq, N, D) and LSE (B, Hq, N).

    It reads keys, and in half precision converts them, for each head of queries and each `QUERIES_AT_ONCE` of them.
    Where queries of heads that share keys are no more than these together, they go as one head's.
    """
    rows, heads, size, width = query.shape
    group = heads // key.shape[1]
    fits = 1 < group and group * size <= QUERIES_AT_ONCE and rows * key.shape[2] >= KEYS_TO_SHARE
    if not fits or size == 1 and query.dtype not in (torch.float16, torch.bfloat16):  # of which one it does fast
        return _cpu_kernel(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
    if mask is not None:
        mask = mask[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)  # (B, 1, G·N, keys)
    grouped = query.reshape(rows, heads // group, group * size, width)
    out, lse = _cpu_kernel(grouped, key, value, 0.0, False, attn_mask=mask, scale=scale)
    return out.reshape(query.shape), lse.reshape(query.shape[:3])


def small_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Attention over few keys with a mask, in float32: output (B, Hq, N, D) and LSE (B, Hq, N).

    The queries that share a head of keys stand side by side: keys are not repeated.
    """
    rows, heads, num_nodes, width = query.shape
    key_heads = key.shape[1]
    grouped = query.reshape(rows, key_heads, -1, width)  # (B, Hk, G·N, D)
    scores = (grouped @ key.transpose(2, 3)).float() * scoring.scale
    if scoring.softcap:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    scores = scores.view(rows, key_heads, heads // key_heads, num_nodes, -1) + mask[:, :, None].float()
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp().to(value.dtype).view(rows, key_heads, -1, scores.shape[-1]) @ value
    return out.view(query.shape), lse.view(rows, heads, num_nodes)


def tokens_of(states: Tensor) -> Tensor:
    """(slots of all rows, H, D): the buffer (B, H, slots, D) as packed tokens, with those that lie between the rows.

    A view where a token's heads lie side by side; rows are then as far apart as the whole buffer is long.
    """
    rows, heads, slots, width = states.shape
    stride, head_stride, token_stride, _ = states.stride()
    if rows > 1 and head_stride > token_stride:
        return states.transpose(1, 2).reshape(-1, heads, width)
    total = (rows - 1) * (stride // token_stride) + slots
    return states.as_strided((total, heads, width), (token_stride, head_stride, 1))


@functools.lru_cache(maxsize=64)
def takes(function: Callable, name: str) -> bool:
    """Whether a function has a parameter of that name."""
    return name in inspect.signature(function).parameters


def heads_first(lse: Tensor, num_queries: int, heads: int) -> Tensor:
    """(Hq, Tq), of an LSE in whichever order, with or without entries beyond the queries."""
    if lse.shape[0] != heads and lse.shape[-1] == heads:
        lse = lse.transpose(0, 1)
    return lse[:, :num_queries].float()


def cuda_obstacle(facts: Facts, least_capability: int) -> str | None:
    """Why no FlashAttention kernel can run on a model's device, in its dtype or with its heads."""
    if facts.devices != {"cuda"}:
        return f"FlashAttention needs CUDA and the model is on {'/'.join(sorted(facts.devices)) or 'meta'}"
    if facts.dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention has no {str(facts.dtype).removeprefix('torch.')}"
    capability = torch.cuda.get_device_capability(facts.device)
    if capability[0] < least_capability:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, under {least_capability}.0"
    if facts.head_dim % 8 or facts.head_dim > 256:
        return f"heads of size {facts.head_dim} are no multiple of 8 up to 256"
    return None


def _load_flash_2() -> object:
    import flash_attn

    return flash_attn


def _load_flash_3() -> object:
    import flash_attn_interface

    return flash_attn_interface


def _load_flash_4() -> object:
    import flash_attn.cute

    return flash_attn.cute


def _load_hub() -> object:
    from kernels import get_kernel

    return get_kernel(HUB_KERNEL)


_MERGED = "in two parts merged by log-sum-exp"
CPU = CpuKernel()
_VARLEN = TorchVarlen()
_PACKED = [
    FlashKernel("flash_attention_3_varlen", f"FlashAttention 3's packed call, {_MERGED}", _load_flash_3, 9),
    FlashKernel("flash_attention_2_varlen", f"FlashAttention 2's packed call, {_MERGED}", _load_flash_2),
    HubKernel("kernels_varlen", f"{HUB_KERNEL}'s packed call, {_MERGED}", _load_hub),
]
_FLASH_3, _FLASH_2, _HUB = _PACKED
# In the order of preference: fewer calls for the host to make first, and a long prefix split among the GPU's cores.
KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        FlashCacheKernel(_FLASH_3, "flash_attention_3", f"FlashAttention 3, {_MERGED}"),
        FlashCacheKernel(_FLASH_2, "flash_attention_2", f"FlashAttention 2, {_MERGED}"),
        TorchKernel(_VARLEN),
        FlashKernel("flash_attention_4", f"FlashAttention 4's packed call, {_MERGED}", _load_flash_4, 9),
        _VARLEN,
        FlashCacheKernel(_HUB, "kernels", f"{HUB_KERNEL} of the Hub, {_MERGED}"),
        *_PACKED,
        CPU,
        MaskedKernel(),
    )
}
