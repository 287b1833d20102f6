"""The network in several processes: a replica in each, and one gradient for all, by DistributedDataParallel."""

import gc
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline import UserError
from trainer.distributed import World
from trainer.model import Masks
from trainer.parallel import TwoColumnNet


class Replicas:
    """This process's replica of a network that every process of a job has, on devices of its own.

    A parameter's gradient is the sum over the processes, once `backward` is done. A loss that is a sum over samples,
    divided by the global batch's size, thus has the gradient of the mean over the global batch, however unequal the
    processes' parts are, and where one has none.
    """

    def __init__(self, network: TwoColumnNet, world: World) -> None:
        """Every process gets the first one's weights."""
        self.network, self._world = network, world
        self.devices = network.devices
        self._run: Any = network
        self._trained: list[bool] | None = None
        self.equalise([parameter.data for parameter in network.parameters()])

    def equalise(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the first one's values, in place; tensors of the same shapes and layouts in all."""
        for tensor in tensors:
            self._world.send(tensor)

    def __call__(self, x: Tensor | Sequence[Tensor], masks: Masks | Sequence[Masks] | None) -> Tensor:
        """Return the logits, as `TwoColumnNet` does, of this rank's part of a batch, which may be empty."""
        if self._world.size > 1:
            self._prepare()
        logits: Tensor = self._run(x, masks)
        return logits

    def _prepare(self) -> None:
        """Wrap the network anew where layers have been frozen since: their gradients are not waited for."""
        trained = [parameter.requires_grad for parameter in self.network.parameters()]
        if trained == self._trained:
            return
        self._trained, self._run = trained, self.network
        gc.collect()  # the wrapper before, which is part of a cycle, and its hooks on the gradients
        if any(trained):
            wrapped = DistributedDataParallel(self.network, gradient_as_bucket_view=True, init_sync=False)
            wrapped.register_comm_hook(None, _summed)
            self._run = wrapped

    def require_equal(self, step: int, tensors: Sequence[Tensor]) -> None:
        """Raise UserError where the processes' tensors differ in a bit, as they never do on sound machines."""
        if self._world.size == 1:
            return
        own = sum(int(tensor.detach().contiguous().view(torch.int32).sum(dtype=torch.int64)) for tensor in tensors)
        found = self._world.texts(str(own))
        if wrong := [rank for rank, each in enumerate(found) if each != found[0]]:
            raise UserError(
                f"step {step}: the weights of process {wrong[0]} are not the first one's: a fault of memory, device or "
                "network, or another version of a library; no checkpoint is written; mend that, then go on by --resume"
            )


def _summed(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The sum over the processes, in place of DistributedDataParallel's mean: parts of a batch differ in size."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
