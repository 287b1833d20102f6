"""Learn an auto-encoder: features → a short binary code → features. Codes of near features differ in few bits.

One layer up and one down. The encoder begins with the principal components, turned at random so that each bit carries
as much as any other, and both layers are then trained to give the features back, through noise, which drives the
code's units to their ends (Salakhutdinov and Hinton, Semantic hashing, 2009; for pictures Krizhevsky and Hinton, Using
very deep autoencoders for content-based image retrieval, 2011). docs/retrieval.md has what other codes find.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline import UserError

SEED = 2012
SAMPLE = 20_000  # rows that it learns from, at most
STEPS, BATCH, RATE = 1000, 256, 0.03  # the rate is relative to the first weights' spread, and falls to nothing
NOISE = 1.0  # standard deviation, where that of the code's inputs is 1
SPARE, POWER = 16, 4  # components beyond those asked for, and iterations, for exact ones
RIDGE = 1e-3  # of the first decoder's least squares, relative to the rows


@dataclass(frozen=True)
class AutoEncoder:
    """A bit is 1 where features · up + bias > 0; with h = ±1 for each bit, h · down + offset gives the features back.

    All float32: `up` (units, bits), `bias` (bits,), `down` (bits, units), `offset` (units,).
    """

    up: Tensor
    bias: Tensor
    down: Tensor
    offset: Tensor

    @classmethod
    def of(cls, layers: Mapping[str, Tensor], units: int, bits: int) -> "AutoEncoder":
        """Return the one of these layers. Raises UserError where they have other names, shapes or types."""
        shapes = {"up": (units, bits), "bias": (bits,), "down": (bits, units), "offset": (units,)}
        promised = {name: (shape, torch.float32) for name, shape in shapes.items()}
        if {name: (tuple(layer.shape), layer.dtype) for name, layer in layers.items()} != promised:
            raise UserError(f"not the layers of an auto-encoder of {units} units and {bits} bits")
        return cls(**layers)

    @torch.no_grad()
    def codes(self, features: np.ndarray) -> np.ndarray:
        """(n, units) float16 or float32 → (n, bits / 8) uint8, the first bit being the highest of the first byte."""
        x = torch.from_numpy(np.array(features)).float()
        return np.packbits((x @ self.up + self.bias > 0).numpy(), axis=1)


def learn(rows: Tensor, bits: int, show: Callable[[int], object] = lambda steps: None) -> AutoEncoder:
    """Learn an auto-encoder of features, (n, units) float32, n ≥ 1. The same rows give the same one on one machine.

    `show` is called after each of the `STEPS`, with the number of those done.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        largest = float(rows.abs().max()) or 1.0  # divided out: no sum or square is then beyond float32's range
        x = rows / largest
        mean = x.mean(0)
        x -= mean
        spread = float(x.square().sum(1).mean().sqrt()) or 1.0  # 1 where all rows are equal
        x /= spread
        # the principal components, turned at random: where they are fewer than bits, each bit is a direction among
        # them, and no two are mixed unequally, for the rows of the random matrix are orthonormal
        count = min(bits, x.shape[1], max(1, len(x) - 1))
        components = torch.svd_lowrank(x, min(count + SPARE, *x.shape), niter=POWER)[2][:, :count]
        up = components @ torch.linalg.qr(torch.randn(bits, count)).Q.T
        up, bias, down, offset = _trained(x, up / (float((x @ up).std(correction=0)) or 1.0), show)
    scale = largest * spread
    return AutoEncoder(up / scale, bias - mean @ up / spread, down * scale, offset * scale + mean * largest)


def _trained(x: Tensor, up: Tensor, show: Callable[[int], object]) -> tuple[Tensor, ...]:
    """Train encoder and decoder to give rows x back, by Adam, starting with `up`."""
    signs = (x @ up > 0).float() * 2 - 1
    ridge = RIDGE * len(x) * torch.eye(up.shape[1])
    down = torch.linalg.solve(signs.T @ signs + ridge, signs.T @ x)
    layers = [up, torch.zeros(up.shape[1]), down, torch.zeros(x.shape[1])]
    spreads = [float(up.std()), 1.0, float(down.std()), float(down.std())]
    parameters = [layer.clone().requires_grad_() for layer in layers]
    groups = [{"params": [parameter], "lr": RATE * spread} for parameter, spread in zip(parameters, spreads)]
    optimiser = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 1 / STEPS, STEPS)
    for step in range(STEPS):
        batch = x[torch.randint(len(x), (min(BATCH, len(x)),))]
        encode, bias, decode, offset = parameters
        inputs = batch @ encode + bias
        code = torch.tanh(inputs + NOISE * torch.randn(inputs.shape))
        (code @ decode + offset - batch).square().sum(1).mean().backward()  # the mean squared distance
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        show(step + 1)
    return tuple(parameter.detach() for parameter in parameters)
