"""Trees for targets with recurrent states: chains from root to leaf as rows, and states that follow the accepted path.

A recurrent layer sees one token after the other, so a tree's chains run as rows of their own, each from a copy of its
row's state. Attention layers put these rows side by side again: they see the cached prefix once, and no key of it is
copied. A layer's kernel gives the state after the last token alone. So the states are those before the pass until it
is known what is kept of it; then the recurrent modules, and nothing else of the model, run once more over the inputs
that they had for the kept tokens. A module of its own because no other part of the core knows that states exist.
"""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .attention import Nodes
from .cache import StateLayer, TreeCache, choose_rows, map_states
from .compat import CACHE_NAME, States, goes_stepwise, has_states, run_with_states, state_holders, wrap_forward
from .tree import CandidateTree


@dataclass(frozen=True)
class Chains:
    """A tree's C chains from root to leaf, L tokens each, all beginning with the anchor; fillers end them."""

    tokens: Tensor  # (B, C, L)
    slots: Tensor  # (B, N), where each node stands among the C·L tokens: in the first chain that it is in

    @classmethod
    def of_tree(cls, tree: CandidateTree) -> "Chains":
        rows, size = tree.tokens.shape
        nodes = torch.arange(size, device=tree.tokens.device)
        exists = (tree.parents >= 0) | (nodes == 0)
        has_child = torch.zeros_like(tree.parents).scatter_reduce(
            1, tree.parents.clamp(min=0), (tree.parents >= 0).long(), "amax"
        )
        is_leaf = exists & (has_child == 0)
        chain = is_leaf.cumsum(1) - 1  # (B, N), of a leaf
        count, length = torch.stack([is_leaf.sum(1).max(), tree.depths.max() + 1]).tolist()

        within = tree.visibility() & is_leaf[..., None]  # (B, leaves, nodes)
        place = torch.where(within, chain[..., None] * length + tree.depths[:, None], count * length)
        tokens = tree.tokens[:, :1].repeat(1, count * length + 1)  # the last one takes what is no chain's
        tokens.scatter_(1, place.flatten(1), tree.tokens[:, None].expand(-1, size, -1).flatten(1))
        slots = torch.where(exists, place.amin(1), 0)
        return cls(tokens[:, :-1].view(rows, count, length), slots)

    def nodes(self) -> Nodes:
        """The tokens as an attention's queries: chains that do not see each other."""
        rows, count, length = self.tokens.shape
        return Nodes.of_blocks(rows, count, length, self.tokens.device).causal

    def gather(self, states: Tensor) -> Tensor:
        """From what the chains' rows give, (B·C, L, ...), what belongs to each node (B, N, ...)."""
        return pick(states, self.tokens.shape[0], self.slots)


def pick(states: Tensor, rows: int, slots: Tensor, of: list[int] | None = None) -> Tensor:
    """(B', A, ...): of states (B·C, L, ...) those in slots (B', A) of the rows `of`, by default of all B `rows`."""
    flat = states.reshape(rows, -1, *states.shape[2:])
    at = torch.tensor(range(rows) if of is None else of, device=flat.device)[:, None]
    return flat[at, slots.to(flat.device)]


@dataclass(frozen=True)
class Call:
    """A module that changed a layer's state, and what it was called with."""

    module: nn.Module
    args: tuple
    kwargs: dict

    def again(self, choose: Callable[[Tensor], Tensor], shape: tuple[int, int]) -> None:
        """Call it with some tokens of every argument that has all of them: that begins with this shape."""

        def chosen(value):
            return choose(value) if torch.is_tensor(value) and value.shape[:2] == shape else value

        args, kwargs = map(chosen, self.args), {name: chosen(value) for name, value in self.kwargs.items()}
        self.module(*args, **kwargs)


@dataclass
class Pass:
    """A pass over chains, whose states are not those that count. All by the index of a layer."""

    chains: Chains
    layers: dict[int, StateLayer]
    before: dict[int, States]
    after: dict[int, States] = field(default_factory=dict)  # of one chain alone
    calls: dict[int, Call] = field(default_factory=dict)

    def keep(self, slots: Tensor, counts: list[int]) -> None:
        """Let the states be those after each row's first `counts[b]` of the tokens in `slots` (B, A)."""
        _, count, length = self.chains.tokens.shape
        none_kept = [not kept for kept in counts]
        for at, layer in self.layers.items():
            if count == 1 and set(counts) <= {0, length}:
                layer.states = map_states(_by_row(none_kept), self.before[at], self.after[at])
            else:
                with going_on():
                    layer.states = self._follow(at, slots, counts)

    def _follow(self, layer_index: int, slots: Tensor, counts: list[int]) -> States:
        """The states after the kept tokens. The rows run together up to the end of one, which then stays behind."""
        layer, call, states = self.layers[layer_index], self.calls[layer_index], self.before[layer_index]
        rows, chains, length = self.chains.tokens.shape
        going, start = list(range(rows)), 0
        done: dict[int, States] = {}  # by row
        for end in sorted(set(counts)):
            if end:
                layer.states = choose_rows(states, None)
                kept = functools.partial(pick, rows=rows, slots=slots[going, start:end], of=going)
                call.again(kept, (rows * chains, length))
                states = layer.states
            done |= {row: choose_rows(states, [at]) for at, row in enumerate(going) if counts[row] == end}
            staying = [at for at, row in enumerate(going) if counts[row] > end]
            states, going, start = choose_rows(states, staying), [going[at] for at in staying], end
        return map_states(lambda *of: torch.cat(of), *(done[row] for row in range(rows)))


def _by_row(first: list[bool]) -> Callable[[Tensor, Tensor], Tensor]:
    """Takes rows (B, ...) of its first argument where so said, the others of its second."""

    def choose(one: Tensor, other: Tensor) -> Tensor:
        if not any(first):
            return other
        takes = torch.tensor(first, device=one.device).view(-1, *(1,) * (one.ndim - 1))
        return torch.where(takes, one, other)

    return choose


@contextlib.contextmanager
def pass_over(cache: TreeCache, chains: Chains) -> Iterator[Pass]:
    """Within, the cache's states are copies for each of the chains; afterwards they are as before."""
    count = chains.tokens.shape[1]
    layers = {at: layer for at, layer in enumerate(cache.layers) if has_states(layer)}
    here = Pass(chains, layers, {at: layer.states for at, layer in layers.items()})
    for layer in layers.values():
        layer.states = map_states(lambda state: state.repeat_interleave(count, dim=0), layer.states)
    with going_on(here):
        yield here
    for at, layer in layers.items():
        if count == 1:
            here.after[at] = layer.states
        layer.states = here.before[at]


# What runs is seen where modules' classes define it; in passes other than these that does nothing -------------------


class _Running(threading.local):
    active = False
    in_prompt = False  # the pass is one that plain decoding would make too
    stepping = False  # hooks are at rest while one of them goes on by single tokens
    here: Pass | None = None  # where calls that change states are noted
    stack: tuple[Call, ...] = ()  # the modules that run, the innermost last


_running = _Running()
_holders: "weakref.WeakKeyDictionary[nn.Module, int]" = weakref.WeakKeyDictionary()  # see `state_holders`
_watching = threading.Lock()  # threads may begin with a target at once


@contextlib.contextmanager
def going_on(here: Pass | None = None, in_prompt: bool = False) -> Iterator[None]:
    """Within, passes of this thread go on from states, also where a mixer could so by single tokens alone.

    Args:
        here: where the calls that change states are noted.
        in_prompt: whether the passes are over a prompt, as plain decoding makes them.
    """
    layers = {} if here is None else here.layers
    _running.active, _running.in_prompt, _running.here, _running.stack = True, in_prompt, here, ()
    for at, layer in layers.items():
        layer.on_update = functools.partial(_note, at)
    try:
        yield
    finally:
        _running.active, _running.stepping, _running.here = False, False, None
        for layer in layers.values():
            layer.on_update = None


def _note(layer_index: int) -> None:
    if _running.here is not None and _running.stack:
        _running.here.calls[layer_index] = _running.stack[-1]


def watch(model: nn.Module) -> None:
    """See to it, once, that calls of modules that know which layer they belong to are noted.

    A module stays as it is. One whose forward was replaced, by accelerate say, does not run its class's: hooks it is.
    """
    with _watching:
        for block, at in state_holders(model).items():
            _holders[block] = at
            wrap_forward(type(block), _beside)
        for module in model.modules():
            if not hasattr(module, "layer_idx") or hasattr(module, "_d2sd_is_watched"):
                continue
            if "forward" not in vars(module):
                wrap_forward(type(module), _watched)
                continue
            module._d2sd_is_watched = True
            module.register_forward_pre_hook(_enter, with_kwargs=True)
            module.register_forward_hook(_leave, with_kwargs=True)


def _beside(stock: Callable, block: nn.Module, hidden: Tensor, position_ids: Tensor, **kwargs):
    """A module that keeps its states itself, as in `state_holders`: in our passes they are those of our cache."""
    cache = kwargs.get(CACHE_NAME)
    if not isinstance(cache, TreeCache):
        return stock(block, hidden, position_ids=position_ids, **kwargs)
    layer = cache.layers[_holders[block]]
    if _running.active:
        _running.stack += (Call(block, (hidden,), {"position_ids": position_ids, **kwargs}),)
    goes_on = has_states(layer)
    states = (layer.conv_states[0], layer.recurrent_states[0]) if goes_on else (None, None)
    step = 1 if goes_on and not _running.in_prompt else hidden.shape[1]  # several tokens begin without a convolution's
    outputs = []
    for part, positions in zip(hidden.split(step, dim=1), position_ids.split(step, dim=1)):
        arguments = {"position_ids": positions, **kwargs}
        output, states = run_with_states(stock, block, states, (part,), arguments)
        outputs.append(output)
    layer.put(*states)
    if _running.active:
        _running.stack = _running.stack[:-1]
    return torch.cat(outputs, dim=1), None


def _watched(stock: Callable, module: nn.Module, *args, **kwargs):
    args, kwargs = _enter(module, args, kwargs) or (args, kwargs)
    output = stock(module, *args, **kwargs)
    replaced = _leave(module, args, kwargs, output)
    return output if replaced is None else replaced


def _enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
    if not _running.active or _running.stepping:
        return None
    _running.stack += (Call(module, args, kwargs),)
    if _has_steps(module, args, kwargs):
        _note(module.layer_idx)  # single tokens may change a state in its place
        return _token(args, kwargs, 0)
    return None


def _leave(module: nn.Module, args: tuple, kwargs: dict, output):
    if not _running.active or _running.stepping:
        return None
    *before, call = _running.stack
    _running.stack = tuple(before)
    if not _has_steps(module, call.args, call.kwargs):
        return None
    _running.stepping = True
    outputs = [output]
    for at in range(1, _hidden(call.args, call.kwargs).shape[1]):
        args, kwargs = _token(call.args, call.kwargs, at)
        outputs.append(module(*args, **kwargs))
    _running.stepping = False
    return torch.cat(outputs, dim=1)


def _hidden(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _has_steps(module: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether a module has to take its tokens one after the other."""
    return goes_stepwise(module, _running.in_prompt) and _hidden(args, kwargs).shape[1] > 1


def _token(args: tuple, kwargs: dict, at: int) -> tuple[tuple, dict]:
    """The arguments of a mixer for one of its tokens."""
    one = _hidden(args, kwargs)[:, at : at + 1]
    return ((one, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": one})
