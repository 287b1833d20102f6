"""The kernels of `tools.bench.candidates` in Triton's interpreter, on the CPU: a program, for it takes a variable."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.bench import candidates
from trainer import lrn

Function = Callable[[Tensor], Tensor]
# n, maps, height, width: small ones of either parity, in torch's layout and in channels last
INPUTS = (((2, 8, 7, 7), torch.contiguous_format), ((1, 6, 5, 8), torch.channels_last))
PAIRS: dict[str, tuple[Function, Function]] = {
    "lrn": (lambda x: candidates.lrn(x, 1), lambda x: lrn.lrn(x, 1)),
    "lrn of two columns": (lambda x: candidates.lrn(x, 2), lambda x: lrn.lrn(x, 2)),
    "rnorm": (candidates.same_map_norm, lrn.same_map_norm),
    "pool, relu": (candidates.pool_relu, lambda x: F.relu(F.max_pool2d(x, 3, 2, ceil_mode=True))),
}


def outcome(function: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the result, and the gradient of x for one of another layout."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(x)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype)
    y.backward(g)
    assert x.grad is not None
    return y.detach(), x.grad


def main() -> None:
    checked = 0
    for (shape, layout), (name, (ours, theirs)) in product(INPUTS, PAIRS.items()):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 60
        x = x.round().contiguous(memory_format=layout)  # so that windows have ties
        for actual, expected in zip(outcome(ours, x), outcome(theirs, x)):
            assert actual.shape == expected.shape
            torch.testing.assert_close(
                actual, expected, rtol=2e-6, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
            checked += actual.numel()
        narrow = ours(x.half())  # half the bits: computed in float32, and rounded once
        torch.testing.assert_close(narrow, theirs(x.half().float()).half(), rtol=2**-10, atol=1e-3)
    odd = torch.full((1, 1, 3, 3), -1.0)
    odd[0, 0, 1, 1] = torch.nan
    assert candidates.pool_relu(odd).isnan().all()
    print(checked)


if __name__ == "__main__":
    main()
