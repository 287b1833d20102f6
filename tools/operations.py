"""Operations: how many a step of training takes, and how many a device makes of a large matrix product."""

from collections.abc import Sequence

import torch

SIDES = {"cuda": 8192, "cpu": 1024}  # of the matrices
PRODUCTS = {"cuda": 10, "cpu": 1}  # before a GPU is waited for


def of_step(layers: Sequence[int]) -> int:
    """Of forward and backward, for one image, from the multiply-adds of each layer's weights, forward.

    Two operations a multiply-add; as many again for the gradient of the weights, and for that of what the layer sees,
    which the first layer does without. Neither normalisation, pooling, dropout nor the new weights are counted.
    """
    return 2 * (3 * sum(layers) - layers[0])


class Product:
    """A product of two square matrices on a device, in a precision of `train.precision`.

    Args:
        side: rows and columns; default: `SIDES`.
    """

    def __init__(self, precision: str, device: torch.device, side: int | None = None) -> None:
        from trainer.parallel import reference_precision

        reference_precision(precision)
        self.side = side or SIDES[device.type]
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        generator = torch.Generator(device).manual_seed(0)
        shape = self.side, self.side
        self._a, self._b = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2))
        self._out = torch.empty_like(self._a)
        self._device, self._products = device, PRODUCTS[device.type]

    def step(self) -> int:
        """A few products, to their end. → the operations, 2 · side³ each."""
        for _ in range(self._products):
            torch.mm(self._a, self._b, out=self._out)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return 2 * self.side**3 * self._products
