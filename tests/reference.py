"""Attention by its rule, in double precision: what the kernels and the cascade are compared with."""

import torch

from hf_d2sd.kernels import Kernel


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
    """The signature of FlashAttention's varlen calls. It takes no segment that has queries and no keys."""

    name, describe, packs, by_default = "packed", "a reference", True, False

    def obstacle(self, facts):
        return None

    def varlen(self, q, k, v, packing, scoring):
        q_starts, k_starts = packing.query_starts, packing.key_starts
        refuse_what_flash_attention_refuses(q, k, v, packing)
        out, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[1], len(q)), torch.nan, dtype=torch.float32)
        assert int(k_starts[-1]) <= len(k)
        assert int(q_starts[-1]) == len(q)
        for q0, q1, k0, k1 in zip(
            *(starts[at : len(starts) - 1 + at].tolist() for starts in (q_starts, k_starts) for at in (0, 1))
        ):
            if q1 == q0:
                continue
            assert 0 < k1 - k0 <= packing.max_keys
            assert q1 - q0 <= packing.max_queries
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
