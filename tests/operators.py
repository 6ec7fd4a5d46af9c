"""What a stretch of code asks of the device: operators that run a kernel, views and allocations aside."""

import contextlib
from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_NO_KERNEL = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
_NO_KERNEL |= {"detach", "alias", "_unsafe_view", "promote_types"}
_NO_KERNEL |= {"lift_fresh", "scalar_tensor"}  # of the host
_FROM_HOST = {"lift_fresh", "lift_fresh_copy"}  # what `torch.tensor` ends in; numbers alone are a kernel's arguments


class Operators(TorchDispatchMode):
    """Within: how often each operator was called that runs a kernel, and how many tensors were made of host values.

    A kernel counts as one operator, whatever its stand-in computes it by; see `one_operator`.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.from_host = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        self.from_host += name in _FROM_HOST
        if name not in _NO_KERNEL and not _is_view(func):
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return self.calls.total()

    def __enter__(self):
        _counting.append(self)
        return super().__enter__()

    def __exit__(self, *error):
        _counting.pop()
        return super().__exit__(*error)


_counting: list[Operators] = []


@contextlib.contextmanager
def one_operator(name: str):
    """Within, a stand-in computes what on a GPU one call of that name does."""
    with _disable_current_modes():
        yield
    for counting in _counting:
        counting.calls[name] += 1


def _is_view(func) -> bool:
    """Whether an operator only looks at its argument another way: it returns an alias and writes to nothing."""
    schema = func._schema
    aliases = [one.alias_info for one in (*schema.arguments, *schema.returns) if one.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def of_a_layer(run, few: int = 2, many: int = 4) -> Counter:
    """Operators of one layer: what `run(many)` has more than `run(few)`, models of so many layers, by layer."""
    counts = []
    for layers in (few, many):
        with Operators() as counted:
            run(layers)
        counts.append(counted.calls)
    more = counts[1].copy()
    more.subtract(counts[0])
    return Counter({name: count / (many - few) for name, count in more.items() if count})
