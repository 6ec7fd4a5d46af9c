"""Few rows times a linear layer's weight on a CPU, each shape by the way that measured fastest there.

Libraries of products are made for many rows, or one, and some read the weight of one row by a single thread, which
takes twice as long on two cores. For the rows of a tree the same product written the other way around, weight times
rows, may take a third of the time; and without units for bfloat16 a weight that is converted slab by slab, in the
processor's cache, less than a kernel that emulates them. Which way wins follows from the machine, the shape and the
threads: a shape's first products take the ways in turn and are timed, which asks for no other work.
A module of its own because targets' layers, drafters' layers and heads share it, and it knows nothing of any of them.
"""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

MOST_ROWS = 64
_SIZES = (4, 8, 16, 32, MOST_ROWS)  # what rows are filled up to: numbers in between take longer than the next of these
_SIZE_OF = [next(size for size in _SIZES if size >= rows) for rows in range(MOST_ROWS + 1)]
_LEAST_WEIGHT = 2**15  # numbers in a weight, below which calls cost more than the product
_SLAB = 2**20  # numbers of a weight that are converted at a time: 4 MiB, which stay in the processor's cache
_SAMPLES, _ENOUGH = 4, 5e-3  # timed products of each way, or fewer that take so many seconds
_GAIN = 0.95  # of the stock way's time: what another has to be below

clock = time.perf_counter

Way = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, within rounding, by the fastest way for few rows on a CPU.

    Args:
        x: (..., K), of which few rows at once go another way than stock; weight: (N, K); bias: (N,).

    Returns:
        (..., N), contiguous.
    """
    if not _has_ways(x, weight, bias):
        return nn.functional.linear(x, weight, bias)
    return _choice_for(x, weight, bias)(x, weight, bias)


def settled(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Way | None:
    """How `linear` makes such products from now on; `None` where that is not known yet, or there is no choice."""
    return _choice_for(x, weight, bias).best if _has_ways(x, weight, bias) else None


def _choice_for(x: Tensor, weight: Tensor, bias: Tensor | None) -> "Choice":
    rows = x.numel() // x.shape[-1]
    size = 1 if rows == 1 else _SIZE_OF[rows]
    key = x.dtype, weight.shape, size, bias is None, torch.get_num_threads()
    return _choices.get(key) or _choices.setdefault(key, Choice((_ONE_ROW if rows == 1 else _WAYS)[x.dtype]))


def _has_ways(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether there is a choice: plain, dense tensors on a CPU, few rows, and nobody who follows the call."""
    dtype = x.dtype
    if not (x.is_cpu and weight.is_cpu and dtype in _WAYS and weight.dtype is dtype):
        return False
    if not (type(x) is Tensor and type(weight) in _PLAIN and (bias is None or _goes_along(bias, dtype))):
        return False
    if not 0 < x.numel() <= MOST_ROWS * x.shape[-1] or weight.numel() < _LEAST_WEIGHT:
        return False
    if weight.layout is not torch.strided or weight.ndim != 2 or not weight.is_contiguous():
        return False
    if x.shape[-1] != weight.shape[1] or torch.is_grad_enabled() and any(map(_learns, (x, weight, bias))):
        return False
    return not (
        torch.are_deterministic_algorithms_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
    )


_PLAIN = (Tensor, nn.Parameter)


def _goes_along(bias: Tensor, dtype: torch.dtype) -> bool:
    return type(bias) in _PLAIN and bias.dtype is dtype and bias.is_cpu


def _learns(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


class Choice:
    """The ways of one shape: in turn while they are timed, then the fastest. Threads may time more than needed."""

    def __init__(self, ways: tuple[Way, ...]):
        self.times: list[tuple[Way, list[float]]] = [(way, []) for way in ways]  # seconds
        self.best: Way | None = None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.best is not None:
            return self.best(x, weight, bias)
        # Others before stock: what first passes cost shall say what later ones will.
        way, times = min(reversed(self.times), key=lambda one: len(one[1]))
        start = clock()
        product = way(x, weight, bias)
        times.append(clock() - start)
        if all(len(times) >= _SAMPLES or sum(times) >= _ENOUGH for _, times in self.times):
            self.best = self.fastest()
        return product

    def fastest(self) -> Way:
        """The way with the least of its times; the first unless another is clearly faster."""
        (first, times), *others = self.times
        way, least = min(((way, min(times)) for way, times in others), key=lambda one: one[1])
        return way if least < _GAIN * min(times) else first


_choices: dict[tuple, Choice] = {}  # of the process


def _turned(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Weight times rows."""
    return _rows_of(nn.functional.linear(weight, _filled(x)), x, bias)


def _converted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same in float32, of which the result alone is rounded, as the stock kernels do it."""
    columns = _filled(x).float()
    step = max(_SLAB // weight.shape[1], 1)
    parts = [nn.functional.linear(part.float(), columns) for part in weight.split(step)]
    return _rows_of(torch.cat(parts) if len(parts) > 1 else parts[0], x, bias)


def _shared(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of one row: each thread's part of the weight times it, as one of a batch of products."""
    parts = _parts_of(weight)
    # A column that is a row turned: of other strides the batch's products are slow.
    row = torch.bmm(parts, x.reshape(1, -1).t().expand(parts.shape[0], -1, -1)).view(*x.shape[:-1], -1)
    return row if bias is None else row + bias


def _parts_of(weight: Tensor) -> Tensor:
    """(parts, N / parts, K): as many as threads, or as divide N."""
    rows, columns = weight.shape
    return weight.view(math.gcd(rows, torch.get_num_threads()), -1, columns)


_WAYS: dict[torch.dtype, tuple[Way, ...]] = {
    torch.float32: (nn.functional.linear, _turned),
    torch.bfloat16: (nn.functional.linear, _converted),
    torch.float16: (nn.functional.linear, _converted),
}
_ONE_ROW: dict[torch.dtype, tuple[Way, ...]] = dict.fromkeys(_WAYS, (nn.functional.linear, _shared))


def _filled(x: Tensor) -> Tensor:
    """(rows, K), of x (..., K), with rows of zeros up to the next size."""
    x = x.reshape(-1, x.shape[-1])
    missing = _SIZE_OF[len(x)] - len(x)
    return torch.constant_pad_nd(x, (0, 0, 0, missing)) if missing else x


def _rows_of(product: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """(..., N) for x (..., K), from columns (N, rows) and some more. Few calls: a pass makes hundreds of products."""
    count = x.numel() // x.shape[-1]
    rows = (product if product.shape[1] == count else product[:, :count]).t()
    if bias is not None:
        rows = rows + bias
    if rows.dtype != x.dtype:
        rows = rows.to(x.dtype)
    return rows.contiguous().view(*x.shape[:-1], -1)
