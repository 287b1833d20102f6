"""Ideas for the step, each beside what it would replace: `bench gpu` measures them, and the trainer uses none yet.

Kernels for the local normalisations, and for pooling with ReLU; an update in few launches; a step as one CUDA graph.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline import UserError
from trainer.lrn import BETA, LRN, ORIGINAL, SAME_MAP_ALPHA, SAME_MAP_SIZE
from trainer.optim import Momentum, Rates

BLOCK = 512  # elements of a program
SIZE, STRIDE = 3, 2  # of pooling


class Axis(NamedTuple):
    """Neighbours along a dimension: elements from one to the next, how many there are, how many count on each side."""

    stride: int
    length: int
    half: int


@triton.jit
def _inside(position, length: tl.constexpr):  # type: ignore[no-untyped-def]
    return (position >= 0) & (position < length)


@triton.jit
def _normalise(  # type: ignore[no-untyped-def]
    x,
    y,
    scale,  # float32
    count,
    alpha,
    k,
    stride_a: tl.constexpr,
    length_a: tl.constexpr,
    half_a: tl.constexpr,
    stride_b: tl.constexpr,
    length_b: tl.constexpr,
    half_b: tl.constexpr,
    block: tl.constexpr,
):
    """y = x·s^−¾, s = k + alpha·Σx² over the neighbours of each element, which are zero outside."""
    i = tl.program_id(0) * block + tl.arange(0, block)
    a, b = i // stride_a % length_a, i // stride_b % length_b
    total = tl.zeros((block,), tl.float32)
    for p in range(2 * half_a + 1):  # a loop: all of 25 neighbours at once would not fit in registers
        for q in tl.static_range(2 * half_b + 1):
            there = (i < count) & _inside(a + p - half_a, length_a) & _inside(b + q - half_b, length_b)
            place = i + (p - half_a) * stride_a + (q - half_b) * stride_b
            value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
            total += value * value
    s = total * alpha + k
    root = tl.rsqrt(s)
    own = tl.load(x + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(scale + i, s, mask=i < count)
    tl.store(y + i, (own * (root * tl.sqrt(root))).to(y.dtype.element_ty), mask=i < count)


@triton.jit
def _normalise_backward(  # type: ignore[no-untyped-def]
    x,
    scale,
    g,  # ∂L/∂y
    dx,
    count,
    factor,  # 2·β·alpha
    stride_a: tl.constexpr,
    length_a: tl.constexpr,
    half_a: tl.constexpr,
    stride_b: tl.constexpr,
    length_b: tl.constexpr,
    half_b: tl.constexpr,
    block: tl.constexpr,
):
    """dx = g·s^−¾ − factor·x·Σ(g·x·s^−¾/s)."""
    i = tl.program_id(0) * block + tl.arange(0, block)
    a, b = i // stride_a % length_a, i // stride_b % length_b
    total = tl.zeros((block,), tl.float32)
    for p in range(2 * half_a + 1):
        for q in tl.static_range(2 * half_b + 1):
            there = (i < count) & _inside(a + p - half_a, length_a) & _inside(b + q - half_b, length_b)
            place = i + (p - half_a) * stride_a + (q - half_b) * stride_b
            s = tl.load(scale + place, mask=there, other=1.0)
            root = tl.rsqrt(s)
            value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
            total += tl.load(g + place, mask=there, other=0.0).to(tl.float32) * (root * tl.sqrt(root)) * value / s
    root = tl.rsqrt(tl.load(scale + i, mask=i < count, other=1.0))
    own = tl.load(x + i, mask=i < count, other=0.0).to(tl.float32)
    direct = tl.load(g + i, mask=i < count, other=0.0).to(tl.float32) * (root * tl.sqrt(root))
    tl.store(dx + i, (direct - factor * own * total).to(dx.dtype.element_ty), mask=i < count)


def lrn(x: Tensor, columns: int, constants: LRN = ORIGINAL) -> Tensor:
    """`trainer.lrn.lrn`, of x (n, maps, height, width) in float32, bfloat16 or float16."""
    x = _dense(x)
    axis = Axis(x.stride(1), x.shape[1] // columns, constants.size // 2)
    result: Tensor = _Normalised.apply(x, Axis(1, 1, 0), axis, constants.alpha, constants.k)
    return result


def same_map_norm(x: Tensor) -> Tensor:
    """`trainer.lrn.same_map_norm`."""
    x, half = _dense(x), SAME_MAP_SIZE // 2
    axes = Axis(x.stride(2), x.shape[2], half), Axis(x.stride(3), x.shape[3], half)
    result: Tensor = _Normalised.apply(x, *axes, SAME_MAP_ALPHA / SAME_MAP_SIZE**2, 1.0)
    return result


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Axis, b: Axis, alpha: float, k: float) -> Tensor:
        y, scale = torch.empty_like(x), torch.empty_like(x, dtype=torch.float32)
        _normalise[_programs(x)](x, y, scale, x.numel(), alpha, k, *a, *b, BLOCK)
        ctx.save_for_backward(x, scale)
        ctx.rest = 2 * BETA * alpha, *a, *b, BLOCK
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, scale = ctx.saved_tensors
        dx = torch.empty_like(x)
        _normalise_backward[_programs(x)](x, scale, _like(gradients[0], x), dx, x.numel(), *ctx.rest)
        return dx, None, None, None, None


def _dense(x: Tensor) -> Tensor:
    """Return x (n, maps, height, width), whose elements lie side by side, in channels last or as torch has them."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _like(g: Tensor, x: Tensor) -> Tensor:
    return g if g.stride() == x.stride() else torch.empty_like(x, dtype=g.dtype).copy_(g)


def _programs(x: Tensor) -> tuple[int]:
    assert x.numel() < 2**31
    return (triton.cdiv(x.numel(), BLOCK),)


@triton.jit
def _pool(  # type: ignore[no-untyped-def]
    x,
    y,
    which,  # uint8: the position in its window of the greatest value, or size² where ReLU has no gradient
    count,
    inner: tl.constexpr,  # elements from one pixel to the next
    height: tl.constexpr,
    width: tl.constexpr,
    rows: tl.constexpr,  # of the result
    columns: tl.constexpr,
    size: tl.constexpr,
    stride: tl.constexpr,
    block: tl.constexpr,
):
    i = tl.program_id(0) * block + tl.arange(0, block)
    column, row = i // inner % columns * stride, i // (inner * columns) % rows * stride
    image = x + i // (inner * columns * rows) * (inner * width * height) + i % inner
    best, position = tl.full((block,), float("-inf"), tl.float32), tl.zeros((block,), tl.int32)
    for p in tl.static_range(size):
        for q in tl.static_range(size):
            there = (i < count) & (row + p < height) & (column + q < width)
            place = image + ((row + p) * width + column + q) * inner
            value = tl.load(place, mask=there, other=float("-inf")).to(tl.float32)
            better = (value > best) | (value != value)  # one that is not a number stays
            best, position = tl.where(better, value, best), tl.where(better, p * size + q, position)
    tl.store(y + i, tl.where(best <= 0, 0.0, best).to(y.dtype.element_ty), mask=i < count)
    tl.store(which + i, tl.where(best <= 0, size * size, position).to(tl.uint8), mask=i < count)


@triton.jit
def _pool_backward(  # type: ignore[no-untyped-def]
    which,
    g,
    dx,
    count,
    inner: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    size: tl.constexpr,
    stride: tl.constexpr,
    block: tl.constexpr,
):
    """Sum, for each input, over the windows that it is the greatest value of."""
    i = tl.program_id(0) * block + tl.arange(0, block)
    x, y = i // inner % width, i // (inner * width) % height
    first = i // (inner * width * height) * (inner * columns * rows) + i % inner
    total = tl.zeros((block,), tl.float32)
    for p in tl.static_range((size - 1) // stride + 1):
        for q in tl.static_range((size - 1) // stride + 1):
            row, column = y // stride - p, x // stride - q
            down, across = y - row * stride, x - column * stride
            there = (i < count) & _inside(row, rows) & _inside(column, columns) & (down < size) & (across < size)
            place = first + (row * columns + column) * inner
            own = tl.load(which + place, mask=there, other=255).to(tl.int32) == down * size + across
            total += tl.load(g + place, mask=there & own, other=0.0).to(tl.float32)
    tl.store(dx + i, total.to(dx.dtype.element_ty), mask=i < count)


def pool_relu(x: Tensor) -> Tensor:
    """Return relu(max_pool2d(x, 3, 2, ceil_mode=True)) of x (n, maps, height, width); relu first gives the same."""
    result: Tensor = _PooledRelu.apply(_dense(x))
    return result


class _PooledRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        n, maps, height, width = x.shape
        rows, columns = (-(-(side - SIZE) // STRIDE) + 1 for side in (height, width))
        layout = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
        y = torch.empty((n, maps, rows, columns), dtype=x.dtype, device=x.device, memory_format=layout)
        which = torch.empty_like(y, dtype=torch.uint8)
        rest = x.stride(3), height, width, rows, columns, SIZE, STRIDE, BLOCK
        _pool[_programs(y)](x, y, which, y.numel(), *rest)
        ctx.save_for_backward(which)
        ctx.shape, ctx.layout, ctx.rest = x.shape, layout, rest
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (which,), g = ctx.saved_tensors, gradients[0]
        dx = torch.empty(ctx.shape, dtype=g.dtype, device=g.device, memory_format=ctx.layout)
        _pool_backward[_programs(dx)](which, _like(g, which), dx, dx.numel(), *ctx.rest)
        return dx


class ForeachMomentum(Momentum):
    """`Momentum` in four launches for all tensors of a column with the same rates, instead of four for each."""

    @torch.no_grad()
    def step(self, rates: dict[str, Rates]) -> None:
        """Update velocities and parameters by the gradients, and free these: the same values as `Momentum.step`."""
        for part, velocity in zip(self.parts, self.velocity):
            for (rate, decay), names in _by_rates(part, rates).items():
                weights, v = [part[name] for name in names], [velocity[name] for name in names]
                gradients = [w.grad for w in weights if w.grad is not None]
                assert len(gradients) == len(weights)
                torch._foreach_mul_(v, self.momentum)
                if decay is not None:
                    torch._foreach_sub_(v, weights, alpha=decay)
                torch._foreach_sub_(v, gradients, alpha=rate)
                torch._foreach_add_(weights, v)
                for w in weights:
                    w.grad = None


def _by_rates(part: dict[str, Tensor], rates: dict[str, Rates]) -> dict[tuple[float, float | None], list[str]]:
    """Return the parameters that change, by the rates of the gradient and of the decay, which biases have none of."""
    groups: dict[tuple[float, float | None], list[str]] = {}
    for name in part:
        layer, _, kind = name.partition(".")
        rate = rates[layer]
        if not rate.frozen:
            key = (rate.biases, None) if kind == "bias" else (rate.weights, rate.decay * rate.weights)
            groups.setdefault(key, []).append(name)
    return groups


def captured(step: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], Tensor]:
    """Return `step`, which reads `inputs` and waits for nothing, as one CUDA graph: a function of other inputs.

    It takes three steps at once. Raises UserError: not all is on one GPU.
    """
    devices = {tensor.device for tensor in inputs}
    if len(devices) > 1 or not all(device.type == "cuda" for device in devices):
        raise UserError("one CUDA graph of a whole step: all has to be on one GPU")
    current, aside = torch.cuda.current_stream(*devices), torch.cuda.Stream(*devices)
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    current.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(*devices), torch.cuda.graph(graph):
        result = step()

    def run(values: Sequence[Tensor]) -> Tensor:
        for own, value in zip(inputs, values):
            own.copy_(value)
        graph.replay()
        return result

    return run
