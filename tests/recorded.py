"""What tests of recorded cycles share: drafts that are often right on any device, and proofs that no host is asked."""

import functools
import types

import torch
from reference import PackedReference, refuse_what_flash_attention_refuses
from tiny import tiny_drafter, tiny_target
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_d2sd import D2SDAssistant, graphs
from hf_d2sd.candidates import Draft
from hf_d2sd.drafting import Drafter
from hf_d2sd.graphs import Graph

# What decodes by each policy, the first as published.
POLICIES = {
    "paper": {},
    "paper, few nodes": dict(d2sd_tree_budget=9),
    "levels": dict(d2sd_levels=3),
    "samples": dict(d2sd_branch_source="samples"),
    "wide": dict(d2sd_tree_width=3, d2sd_tree_budget=14, d2sd_context=0),
    "wide, levels": dict(d2sd_tree_width=3, d2sd_tree_budget=14, d2sd_num_branches=2, d2sd_levels=3, d2sd_context=0),
    "wide, first alone": dict(d2sd_tree_width=3, d2sd_tree_budget=14, d2sd_num_branches=0, d2sd_context=0),
    "chain": dict(d2sd_num_branches=0),
    "plain": dict(d2sd_tree_budget=1),
}


class GraphOnCpu(Graph):
    """A graph as on a GPU, and what stands for it runs again; see `without_cuda`."""

    def __init__(self, run, device):
        super().__init__(run, device)
        self.replay = run


def without_cuda(monkeypatch) -> None:
    """Let what `Graph` calls do nothing, so that its own lines run, and cycles are begun as early as on a GPU."""

    class Nothing:
        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def nothing(self, *args):
            pass

        wait_stream = record = synchronize = replay = nothing

    for name in ("CUDAGraph", "Event", "Stream", "current_stream", "device", "graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(graphs, "Rerun", GraphOnCpu)


class PackedOnDevice(PackedReference):
    """The packed reference, computed without asking the host."""

    def varlen(self, q, k, v, packing, scoring):
        refuse_what_flash_attention_refuses(q, k, v, packing)
        at, segments = [], []
        for starts, size in ((packing.query_starts, len(q)), (packing.key_starts, len(k))):
            place = torch.arange(size, device=q.device, dtype=torch.int32)
            segments.append(torch.searchsorted(starts[1:].contiguous(), place, right=True))
            ends = torch.nn.functional.pad(starts[1:], (0, 1), value=size)
            at.append(ends[segments[-1]] - place)  # from the end
        seen = segments[0][:, None] == segments[1]
        if packing.causal:
            seen = seen & (at[1] >= at[0][:, None])
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q.double(), k.double().repeat_interleave(group, 1)) * scoring.scale
        scores = scores.masked_fill(~seen, -torch.inf)
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.double().repeat_interleave(group, 1))
        return out.to(q.dtype), scores.logsumexp(-1).float()


def new_pair(**changes) -> D2SDAssistant:
    """Drafters of one layer, for any tiny target."""
    changes = {"num_hidden_layers": 1, **changes}
    return D2SDAssistant.from_drafters(tiny_drafter(4, **changes), tiny_drafter(6, seed=1, **changes))


def recorded_of(pair: D2SDAssistant):
    """The one that an assistant used last."""
    return list(pair._recorded.values())[-1]


def decode(pair, ids, family="llama", new=30, target=None, **options):
    target = tiny_target(family) if target is None else target
    options = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0, "assistant_model": pair, **options}
    return target.generate(**ids, **options) if isinstance(ids, dict) else target.generate(ids, **options)


class Truth:
    """Puts the target's own continuation into the first column of drafts, with mistakes that only positions decide.

    So a call gives the same cycles whatever runs them, and paths of every length occur.

    Args:
        texts: by row, prompt and plain continuation.
        accuracy: share of the drafted tokens that are right.
    """

    def __init__(self, monkeypatch, texts: list[list[int]], accuracy: float = 0.75, device: str = "cpu"):
        padded = [torch.tensor([*text, *[2] * (40 + max(map(len, texts)) - len(text))]) for text in texts]
        self.texts, self.accuracy = torch.stack(padded).to(device), accuracy
        self.rows = list(range(len(texts)))
        stock, select = Drafter._denoise, Drafter.select
        monkeypatch.setattr(Drafter, "_denoise", lambda drafter, *args: self.correct(drafter, stock(drafter, *args)))
        monkeypatch.setattr(Drafter, "select", lambda drafter, staying: self.leave(drafter, staying, select))

    def leave(self, drafter, staying, select):
        if drafter.model.config.block_size == 4:  # the first of both
            self.rows = [self.rows[at] for at in staying]
        select(drafter, staying)

    def correct(self, drafter, draft: Draft) -> Draft:
        rows, count, depth, width = draft.tokens.shape
        texts = self.texts if self.rows == list(range(rows)) else self.texts[self.rows]
        starts = torch.as_tensor(drafter.context.positions, device=texts.device)[:, None]  # (B, 1)
        at = starts + 1 + torch.arange(depth, device=texts.device)
        truth = texts.gather(1, at.clamp(max=texts.shape[1] - 1))[:, None]  # (B, 1, D)
        noise = at[:, None] * 7919 + torch.arange(count, device=texts.device)[:, None] * 104729
        noise = noise * (1 + drafter.model.config.block_size) % 9973 / 9973  # (B, R, D)
        best = torch.where(noise < self.accuracy, truth, draft.best)
        sure = (noise * 31 % 1).clamp(0.05, 0.99)
        tokens, log_probs = draft.tokens.clone(), draft.log_probs.clone()
        log_probs[..., 1:].masked_fill_(tokens[..., 1:] == best[..., None], -torch.inf)
        tokens[..., 0], log_probs[..., 0] = best, sure.log()
        return Draft(tokens, log_probs.exp(), log_probs, draft.kept, draft.logits)


_ASKING = {
    "_local_scalar_dense",
    "item",
    "equal",
    "is_nonzero",
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "_is_all_true",
    "_is_any_true",
}


class NoHost(TorchDispatchMode):
    """Raises on what reads a tensor, brings it elsewhere, or makes one of numbers of the host.

    Args:
        device: the only one on which tensors may be.
    """

    def __init__(self, device: str):
        super().__init__()
        self.device, self.calls = device, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in _ASKING or str(func) == "aten.repeat_interleave.Tensor":
            raise AssertionError(f"{func} asks the host")
        if name == "lift_fresh" and args[0].ndim:
            raise AssertionError("a tensor is made of numbers of the host")
        output = func(*args, **(kwargs or {}))
        self.calls += 1
        for leaf in tree_leaves((args, kwargs, output)):
            if torch.is_tensor(leaf) and leaf.device.type != self.device and leaf.ndim:
                raise AssertionError(f"{func} has to do with a tensor on {leaf.device}")
        return output


def to_meta(root) -> None:
    """Let all tensors that an object reaches be ones without content: nothing can be read of them, by nobody."""
    seen: dict[int, tuple] = {}

    def moved(value):
        if torch.is_tensor(value):
            if id(value) not in seen:
                empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
                seen[id(value)] = value, nn.Parameter(empty, False) if isinstance(value, nn.Parameter) else empty
            return seen[id(value)][1]
        if isinstance(value, torch.device):
            return torch.device("meta")
        if type(value) is tuple:
            return tuple(map(moved, value))
        if id(value) in seen or isinstance(value, (type, types.FunctionType, types.MethodType)):
            return value
        seen[id(value)] = (value,)
        if isinstance(value, functools.partial):
            moved(value.func), moved(value.args)
        elif isinstance(value, list):
            value[:] = map(moved, value)
        elif isinstance(value, dict):
            value.update({key: moved(one) for key, one in value.items()})
        elif isinstance(value, nn.Module) or type(value).__module__.startswith("hf_d2sd"):
            moved(vars(value))
        return value

    moved(root)
