"""Attention by its rule, in double precision: what the kernels and the cascade are compared with."""

from types import SimpleNamespace

import torch
from operators import one_operator

from hf_d2sd import kernels
from hf_d2sd.kernels import FlashCacheKernel, FlashKernel, Kernel, TorchKernel, Ways


def brute_force(query, key, value, seen, scale, sinks=None, softcap=0.0):
    """(H, N, D) of one row: softmax over the keys that are seen, (N, keys) bool; key heads are repeated."""
    query, key, value = (x.double() for x in (query, key, value))
    group = query.shape[0] // key.shape[0]
    key, value = (x.repeat_interleave(group, 0) for x in (key, value))
    scores = query @ key.transpose(1, 2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, scores.shape[1], 1)], dim=2)
    return scores.softmax(-1)[..., : key.shape[1]] @ value


def refuse_what_flash_attention_refuses(q, k, v, packing) -> None:
    """As its C++ checks its arguments; but half precision alone, which is a matter of its kernels."""
    starts = packing.query_starts, packing.key_starts
    if not q.dtype == k.dtype == v.dtype:
        raise RuntimeError("query and key must have the same dtype")
    if any(one.dtype != torch.int32 or not one.is_contiguous() for one in starts):
        raise RuntimeError("cu_seqlens must have dtype int32 and be contiguous")
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        raise RuntimeError("Input tensor must have contiguous last dimension")
    if q.shape[-1] > 256 or q.shape[-1] % 8:
        raise RuntimeError("head_size must be a multiple of 8 up to 256")
    if q.shape[1] % k.shape[1]:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")
    if len(starts[0]) != len(starts[1]):
        raise RuntimeError("cu_seqlens_k must have shape (batch_size + 1)")
    segments = len(starts[0]) - 1
    if packing.max_queries == 1 and q.shape[1] > k.shape[1] and len(q) != segments:  # groups fold into the batch
        raise RuntimeError(f"shape '[{segments}, {k.shape[1]}, ...]' is invalid for input of size {q.numel()}")


class PackedReference(Kernel):
    """The signature of FlashAttention's varlen calls."""

    name, describe, packs, by_default, on_gpu = "packed", "a reference", True, False, True

    def obstacle(self, facts):
        return None

    def varlen(self, q, k, v, packing, scoring):
        refuse_what_flash_attention_refuses(q, k, v, packing)
        with one_operator("varlen"):
            return self.by_rule(q, k, v, packing, scoring)

    def by_rule(self, q, k, v, packing, scoring):
        q_starts, k_starts = packing.query_starts, packing.key_starts
        out, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[1], len(q)), torch.nan, dtype=torch.float32)
        assert int(k_starts[-1]) <= len(k)
        assert int(q_starts[-1]) == len(q)
        for q0, q1, k0, k1 in zip(
            *(starts[at : len(starts) - 1 + at].tolist() for starts in (q_starts, k_starts) for at in (0, 1))
        ):
            if q1 == q0:
                continue
            assert k1 - k0 <= packing.max_keys
            assert q1 - q0 <= packing.max_queries
            if k1 == k0:  # as its kernels leave rows without keys
                out[q0:q1], lse[:, q0:q1] = 0, torch.inf
                continue
            seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
            if packing.causal:  # aligned at the end
                seen = seen.tril(k1 - k0 - (q1 - q0))
            scores = q[q0:q1].transpose(0, 1).double() @ k[k0:k1].permute(1, 2, 0).double().repeat_interleave(
                q.shape[1] // k.shape[1], 0
            )
            scores = (scores * scoring.scale).masked_fill(~seen, -torch.inf)
            values = v[k0:k1].transpose(0, 1).double().repeat_interleave(q.shape[1] // k.shape[1], 0)
            out[q0:q1] = (scores.softmax(-1) @ values).transpose(0, 1).to(q.dtype)
            lse[:, q0:q1] = scores.logsumexp(-1).float()
        return out, lse


# Calls for whole rows, which split a long row of keys over the GPU ---------------------------------------------------


def _refuse(holds: bool, message: str) -> None:
    if holds:
        raise RuntimeError(message)


def refuse_dense(q, k, v) -> None:
    """What FlashAttention's checks say of q (B, N, Hq, D), k and v (B, S, Hk, D)."""
    rows, _, heads, width = q.shape
    _refuse(not q.dtype == k.dtype == v.dtype, "query and key must have the same dtype")
    _refuse(any(x.stride(-1) != 1 for x in (q, k, v)), "Input tensor must have contiguous last dimension")
    _refuse(width > 256 or width % 8 != 0, "head_size must be a multiple of 8 up to 256")
    _refuse(heads % k.shape[2] != 0, "Number of heads in key/value must divide number of heads in query")
    _refuse(k.shape != v.shape or k.shape[0] != rows or k.shape[3] != width, "k must have shape (batch_size, ...)")
    _refuse(any(x.stride(1) % 8 or x.data_ptr() % 16 for x in (k, v)), "misaligned address")


def rows_by_rule(q, k, v, starts, ends, scale):
    """(B, N, Hq, D) and (B, Hq, N) of rows that see keys within bounds; without any as the kernels leave them."""
    out, lse = torch.zeros_like(q), q.new_full((q.shape[0], q.shape[2], q.shape[1]), torch.inf, dtype=torch.float32)
    group = q.shape[2] // k.shape[2]
    for row, (start, end) in enumerate(zip(starts, ends)):
        if start < end:
            key, value = (x[row, start:end].double().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
            scores = q[row].transpose(0, 1).double() @ key.transpose(1, 2) * scale
            out[row] = (scores.softmax(-1) @ value).transpose(0, 1).to(q.dtype)
            lse[row] = scores.logsumexp(-1).float()
    return out, lse


def _bounds(q, k, cache_seqlens, cache_leftpad):
    """Each row's first key and the end, as the call's tensors say; they are refused as its checks do."""
    rows = len(q)
    for name, given in (("seqlens_k", cache_seqlens), ("leftpad_k", cache_leftpad)):
        if given is not None:
            _refuse(given.dtype != torch.int32, f"{name} must have dtype int32")
            _refuse(not given.is_contiguous(), f"{name} must be contiguous")
            _refuse(given.shape != (rows,), f"{name} must have shape (batch_size)")
    starts = [0] * rows if cache_leftpad is None else cache_leftpad.tolist()
    ends = [k.shape[1]] * rows if cache_seqlens is None else cache_seqlens.tolist()
    assert all(0 <= start <= end <= k.shape[1] for start, end in zip(starts, ends)), "it would read beyond the cache"
    return starts, ends


def with_kvcache_2(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
):  # fmt: skip
    """The signature of FlashAttention 2.8; output (B, N, Hq, D), and the LSE (B, Hq, N) if asked for."""
    assert not causal and not softcap and softmax_scale is not None and k is None
    refuse_dense(q, k_cache, v_cache)
    bounds = _bounds(q, k_cache, cache_seqlens, cache_leftpad)
    with one_operator("kvcache"):
        out, lse = rows_by_rule(q, k_cache, v_cache, *bounds, softmax_scale)
    return (out, lse) if return_softmax_lse else out


def with_kvcache_3(
    q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
    max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
    causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
):  # fmt: skip
    """The signature of FlashAttention 3, which returns more than it is asked for."""
    options = dict(cache_seqlens=cache_seqlens, cache_leftpad=cache_leftpad, return_softmax_lse=True)
    out, lse = with_kvcache_2(q, k_cache, v_cache, softmax_scale=softmax_scale, causal=causal, **options)
    return (out, lse, None, None) if return_softmax_lse else out


def dense_flash(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    """As torch's kernel on CUDA: q (B, Hq, N, D), k and v (B, Hk, S, D), grouped; the last of nine results aside."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    refuse_dense(q, k, v)
    with one_operator("flash"):
        out, lse = rows_by_rule(q, k, v, [0] * len(q), [k.shape[1]] * len(q), scale)
    return (out.transpose(1, 2), lse, *[None] * 7)


def efficient(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    """As torch's memory-efficient kernel on CUDA; of its LSE (B, H, N) rounded up to 32 the rest is infinite."""
    rows, heads, size, width = query.shape
    same = query.dtype == key.dtype == value.dtype == attn_bias.dtype
    _refuse(not same, "invalid dtype for bias - should match query's dtype")
    _refuse(key.shape[:2] != (rows, heads) or key.shape != value.shape, "it does not group queries")
    _refuse(any(x.stride(-1) != 1 for x in (query, key, value, attn_bias)), "must be contiguous in the last dimension")
    _refuse(attn_bias.shape != (rows, heads, size, key.shape[2]), "bias must have shape (B, H, N, keys)")
    aligned = 16 // query.element_size()
    for at, name in ((2, "strideM"), (1, "strideH"), (0, "strideB")):
        matters = attn_bias.shape[at] > 1
        _refuse(matters and attn_bias.stride(at) % aligned != 0, f"attn_bias is not correctly aligned ({name})")
        for x in (query, key, value):
            _refuse(x.shape[at] > 1 and x.stride(at) % aligned != 0, f"query is not correctly aligned ({name})")
    _refuse(any(x.data_ptr() % 16 for x in (query, key, value, attn_bias)), "misaligned address")
    assert compute_log_sumexp and not dropout_p and not is_causal
    with one_operator("efficient"):
        scores = query.double() @ key.double().transpose(2, 3) * scale + attn_bias.double()
        out = (scores.softmax(-1) @ value.double()).to(query.dtype)
        lse = scores.logsumexp(-1).float()
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        lse = torch.nn.functional.pad(lse, (0, -size % 32), value=torch.inf)
    return out, lse, None, None


class FlashPackage:
    """A package of FlashAttention: its packed call, and the one for a cache if it has any."""

    def __init__(self, with_kvcache=None):
        self.packed = PackedReference()
        self.flash_attn_varlen_func = self._varlen
        if with_kvcache is not None:
            self.flash_attn_with_kvcache = with_kvcache

    def _varlen(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
        softcap=0.0, return_attn_probs=False,
    ):  # fmt: skip
        packing = kernels.Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
        out, lse = self.packed.varlen(q, k, v, packing, SimpleNamespace(scale=softmax_scale, softcap=softcap))
        return out, lse, None


def flash_cache_kernel(name: str, with_kvcache, measure=None) -> FlashCacheKernel:
    """A backend of FlashAttention whose package is a stand-in."""
    packed = FlashKernel(f"{name}_varlen", "a stand-in", lambda: FlashPackage(with_kvcache))
    return _anywhere(FlashCacheKernel(packed, name, "a stand-in"), measure)


def torch_kernel(packed=None, measure=None) -> TorchKernel:
    """The backend of torch's own kernels; `packed` is its packed call, which older versions lack."""
    return _anywhere(TorchKernel(packed or SimpleNamespace(is_there=False)), measure)


def _anywhere(kernel, measure):
    kernel.obstacle = lambda facts: facts.obstacle
    kernel.ways = Ways(measure or first_is_fastest)
    return kernel


def first_is_fastest(run) -> float:
    """A timer by which all candidates take the same; they run."""
    run()
    return 1.0
