"""The kernels that a cascade can run on, each with the reason where it cannot: all that knows their signatures.

A module of its own because it is the only code that differs from machine to machine; `attention` is the same on all.
"""

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .compat import attention_of, decoder_of, has_sdpa, head_sizes, takes_attention_functions

HUB_KERNEL = "kernels-community/flash-attn2"


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


class Kernel:
    """One way to run a cascade. Outputs come with the log-sum-exp (LSE) of their scores."""

    name: str
    describe: str
    packs = True  # it takes packed sequences
    by_default = True

    def obstacle(self, facts: Facts) -> str | None:
        """Why it cannot run; `None` if it can."""
        raise NotImplementedError

    def varlen(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, scoring: Scoring) -> tuple[Tensor, Tensor]:
        """q (Tq, Hq, D), k and v (Tk, Hk, D) in packed sequences: output (Tq, Hq, D), LSE (Hq, Tq)."""
        raise NotImplementedError

    def masked(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scoring: Scoring):
        return small_attention(query, key, value, mask, scoring)

    def over_prefix(self, query, key, value, bounds: Tensor, packing: Packing | None, scoring: Scoring):
        """All nodes against each row's keys within `bounds` (B, 2): output (B, Hq, N, D), LSE (B, Hq, N)."""
        assert packing is not None
        rows, heads, num_nodes, width = query.shape
        queries = query.transpose(1, 2).reshape(-1, heads, width)
        out, lse = self.varlen(queries, tokens_of(key), tokens_of(value), packing, scoring)
        out = out.view(rows, num_nodes, heads, width).transpose(1, 2)
        lse = lse.view(heads, rows, num_nodes).transpose(0, 1)
        empty = (bounds[:, 0] >= bounds[:, 1])[:, None, None]
        return torch.where(empty[..., None], 0, out), torch.where(empty, -torch.inf, lse)


class FlashKernel(Kernel):
    """FlashAttention's packed call, from whichever package; its versions differ in how they are asked for the LSE."""

    def __init__(self, name: str, describe: str, load: Callable[[], Callable], least_capability: int = 8):
        self.name, self.describe, self.load, self.least_capability = name, describe, load, least_capability
        self._function: Callable | None = None

    def obstacle(self, facts: Facts) -> str | None:
        reason = facts.obstacle or cuda_obstacle(facts, self.least_capability)
        if reason is None:
            try:
                self.function()
            except Exception as error:  # a package that is missing, broken or built for another torch
                reason = f"{self.name} does not load ({type(error).__name__}: {error})"
        return reason

    def function(self) -> Callable:
        if self._function is None:
            function = self.load()
            names = inspect.signature(function).parameters
            flags = [flag for flag in ("return_lse", "return_softmax_lse", "return_attn_probs") if flag in names]
            if not flags:
                raise ImportError("its varlen function returns no log-sum-exp")
            self._function, self._lse_flag = function, flags[0]
        return self._function

    def varlen(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, scoring: Scoring) -> tuple[Tensor, Tensor]:
        function = self.function()
        options = {"softmax_scale": scoring.scale, "causal": packing.causal, self._lse_flag: True}
        if scoring.softcap:
            options["softcap"] = scoring.softcap
        starts = dict(cu_seqlens_q=packing.query_starts, cu_seqlens_k=packing.key_starts)
        bounds = dict(max_seqlen_q=packing.max_queries, max_seqlen_k=packing.max_keys)
        out, lse = function(q, k, v, **starts, **bounds, **options)[:2]
        return out, heads_first(lse, *out.shape[:2])


class TorchVarlen(Kernel):
    name, describe = "varlen", "torch.nn.attention.varlen, in two parts merged by log-sum-exp"

    def obstacle(self, facts: Facts) -> str | None:
        if importlib.util.find_spec("torch.nn.attention.varlen") is None:
            return f"torch {torch.__version__} has no torch.nn.attention.varlen"
        if facts.softcap is not None:
            return "torch.nn.attention.varlen has no soft-capping"
        return facts.obstacle or cuda_obstacle(facts, 8)

    def varlen(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, scoring: Scoring) -> tuple[Tensor, Tensor]:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        starts, bounds = (packing.query_starts, packing.key_starts), (packing.max_queries, packing.max_keys)
        options = dict(scale=scoring.scale, window_size=(-1, 0) if packing.causal else (-1, -1))
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # before torch 2.12 it groups unasked
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
        mask = mask.to(query.dtype).expand(len(query), -1, -1, -1)
        return _cpu_kernel(query, key, value, 0.0, False, attn_mask=mask, scale=scoring.scale)

    def over_prefix(self, query, key, value, bounds: Tensor, packing: Packing | None, scoring: Scoring):
        limits = bounds.tolist()
        if all(row == limits[0] for row in limits):
            (start, end), *_ = limits
            seen = slice(start, end)
            return _cpu_kernel(query, key[:, :, seen], value[:, :, seen], 0.0, False, scale=scoring.scale)
        dtype = torch.promote_types(query.dtype, torch.float32)
        out, lse = torch.zeros_like(query), query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
        for row, (start, end) in enumerate(limits):
            if start < end:
                one, seen = slice(row, row + 1), slice(start, end)
                out[one], lse[one] = _cpu_kernel(
                    query[one], key[one, :, seen], value[one, :, seen], 0.0, False, scale=scoring.scale
                )
        return out, lse


class MaskedKernel(Kernel):
    """Plain matrix products, for any device and dtype. It holds scores of all nodes and keys of the prefix."""

    name, describe, packs, by_default = "masked", "plain products, in two parts merged by log-sum-exp", False, False

    def obstacle(self, facts: Facts) -> str | None:
        return facts.obstacle

    def over_prefix(self, query, key, value, bounds: Tensor, packing: Packing | None, scoring: Scoring):
        slots = torch.arange(key.shape[2], device=key.device)
        seen = (slots >= bounds[:, :1]) & (slots < bounds[:, 1:])
        mask = torch.zeros(seen.shape, device=key.device).masked_fill(~seen, torch.finfo(torch.float32).min)
        return small_attention(query, key, value, mask[:, None, None], scoring)


def _cpu_kernel(*args, **kwargs) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **kwargs)


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


def _load_flash_2() -> Callable:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


def _load_flash_3() -> Callable:
    from flash_attn_interface import flash_attn_varlen_func

    return flash_attn_varlen_func


def _load_flash_4() -> Callable:
    from flash_attn.cute import flash_attn_varlen_func

    return flash_attn_varlen_func


def _load_hub() -> Callable:
    from kernels import get_kernel

    return get_kernel(HUB_KERNEL).flash_attn_varlen_func


class HubKernel(FlashKernel):
    """It may have to be fetched from the Hub: not without being asked for."""

    by_default = False


_MERGED = "in two parts merged by log-sum-exp"
CPU = CpuKernel()
# In the order of preference. FlashAttention 2 does not split a long row of packed keys among the GPU's cores.
KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        FlashKernel("flash_attention_3", f"FlashAttention 3, {_MERGED}", _load_flash_3, 9),
        FlashKernel("flash_attention_4", f"FlashAttention 4, {_MERGED}", _load_flash_4, 9),
        TorchVarlen(),
        FlashKernel("flash_attention_2", f"FlashAttention 2, {_MERGED}", _load_flash_2),
        HubKernel("kernels", f"{HUB_KERNEL} of the Hub, {_MERGED}", _load_hub),
        CPU,
        MaskedKernel(),
    )
}
