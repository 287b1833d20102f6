"""Several processes of torchrun: what they agree on, and the sum of their gradients."""

import gc
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline import UserError, volumes
from trainer.model import Masks
from trainer.parallel import TwoColumnNet

PATIENCE = 50.0  # seconds; so that a run knows within a minute that one of its machines is gone
# gloo's errors have no type of their own: the path of its code, or its words once one collective was late
GLOO = ("/gloo/", "Application timeout caused pair closure")


class RankLost(UserError):
    """Another process has ended, or does not answer."""


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them; without torchrun there is one.

    Every process calls the methods, in the same order. They raise RankLost where another process is gone.
    """

    rank: int = 0
    size: int = 1
    patience: float = PATIENCE  # seconds

    @property
    def is_main(self) -> bool:
        """Return whether this process prints and writes."""
        return self.rank == 0

    def all_gather(self, value: Any) -> list[Any]:
        """Return each process's value, by rank. It travels as JSON, which keeps every bit of a float."""
        if self.size == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self.collective():
            dist.all_gather(sizes, torch.tensor([len(own)]))
            padded = torch.zeros(max(map(int, sizes)), dtype=torch.uint8)
            padded[: len(own)] = own
            received = [torch.empty_like(padded) for _ in sizes]
            dist.all_gather(received, padded)
        return [json.loads(bytes(text[: int(size)].tolist())) for text, size in zip(received, sizes)]

    def gather_rows(self, rows: Tensor, most: int) -> Tensor:
        """Return all processes' rows, by rank, in the main process; its own in each other.

        `rows` (n, width) float64 on the CPU; n may differ, be 0, and is at most `most`, which is the same for all.
        """
        if self.size == 1:
            return rows
        padded = torch.zeros((most, 1 + rows.shape[1]), dtype=torch.float64)
        padded[: len(rows), 0], padded[: len(rows), 1:] = 1.0, rows  # a row that counts begins with 1
        received = [torch.empty_like(padded) for _ in range(self.size)] if self.is_main else None
        with self.collective():
            dist.gather(padded, received)
        if received is None:
            return rows
        gathered = torch.cat(received)
        return gathered[gathered[:, 0] == 1.0, 1:]

    def minimum(self, numbers: list[int]) -> list[int]:
        """Return the least of all processes, element by element; numbers below 2⁶³."""
        if self.size == 1:
            return numbers
        least = torch.tensor(numbers)
        with self.collective():
            dist.all_reduce(least, dist.ReduceOp.MIN)
        return least.tolist()

    def sum(self, values: Tensor) -> None:
        """Add up `values` over all processes, in place; on the tensor's device."""
        if self.size > 1:
            with self.collective():
                dist.all_reduce(values)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the main one's values, in place; tensors of the same shapes and layouts in all."""
        if self.size > 1:
            with self.collective():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """End every process if one raises UserError or OSError in this block.

        The first that raises prints its message, and so does the main process; the others end silently.
        """
        if self.size == 1:
            yield
            return
        own: UserError | OSError | None = None
        try:
            yield
        except (UserError, OSError) as error:
            own = error
        message = volumes.explained(own) if isinstance(own, OSError) and own.strerror else str(own)
        messages = self.all_gather(message if own else None)
        failed = next((rank for rank, text in enumerate(messages) if text is not None), None)
        if failed is None:
            return
        if own and failed == self.rank:
            raise own
        if self.is_main:
            raise UserError(f"process {failed}: {messages[failed]}")
        raise SystemExit(UserError.exit_code)

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Raise RankLost where a collective within fails because another process is gone."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not any(word in str(error) for word in GLOO):
                raise
            late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
            reason = (
                f"has not answered for {self.patience:g} s"
                if late
                else "has ended before its time; the reason is in its own line"
            )
            raise RankLost(f"another process of this job {reason}") from error

    def require_equal_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise UserError, in every process, where one's settings (JSON values by name) are not the main one's."""
        main, *others = self.all_gather([socket.gethostname(), dict(settings)])
        with self.raise_together():
            for rank, (host, values) in enumerate(others, 1):
                for key in dict.fromkeys((*main[1], *values)):
                    if values.get(key) != main[1].get(key):
                        raise UserError(
                            f"process {rank}, on {host}, has {key} {values.get(key)}, and the first process, on "
                            f"{main[0]}, has {main[1].get(key)}; start all processes alike"
                        )


SINGLE = World()


class AnyRank:
    """An asynchronous any(): each call returns the answer of the call before, so that it never waits."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: tuple[dist.Work, Tensor] | None = None

    def __call__(self, own: bool) -> bool:
        """Return whether any process said True at its last call; with one process, `own`. Every process calls it."""
        if self._world.size == 1:
            return own
        with self._world.collective():
            pending, answer = self._pending, torch.tensor([int(own)])
            self._pending = dist.all_reduce(answer, dist.ReduceOp.MAX, async_op=True), answer
            if pending is None:
                return False
            pending[0].wait()
            return bool(pending[1])


@contextmanager
def join(patience: float = PATIENCE) -> Iterator[World]:
    """Join the processes that torchrun started until the context ends: by gloo, and between GPUs by NCCL.

    Args:
        patience: seconds that a collective may wait for another process.
    Raises:
        UserError: they do not find each other.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal():
        raise UserError(f"WORLD_SIZE={size}: not a number of processes; start them with torchrun, or unset WORLD_SIZE")
    if int(size) == 1:
        yield SINGLE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=patience))
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"WORLD_SIZE={size}, and the processes do not find each other ({reason}); start them with torchrun, or "
            "unset WORLD_SIZE"
        ) from error
    try:
        yield World(dist.get_rank(), int(size), patience)
    finally:
        dist.destroy_process_group()


class Replicas:
    """A network that every process has, each on devices of its own, as one network to train.

    After `backward` a parameter's gradient is the sum over the processes. A loss that is a sum over samples, divided by
    the global batch's size, thus has the gradient of the mean over the global batch, however unequal the processes'
    parts are, and where one has none.
    """

    def __init__(self, network: TwoColumnNet, world: World) -> None:
        """Give every process the main one's weights."""
        self.network, self._world = network, world
        self.devices = network.devices
        self._forward: Any = network
        self._trained: list[bool] | None = None
        world.broadcast([parameter.data for parameter in network.parameters()])

    def __call__(self, x: Tensor | Sequence[Tensor], masks: Masks | Sequence[Masks] | None) -> Tensor:
        """Return the logits of this process's part of a batch, which may be empty; see `TwoColumnNet.forward`."""
        if self._world.size > 1:
            self._wrap()
        logits: Tensor = self._forward(x, masks)
        return logits

    def _wrap(self) -> None:
        """Wrap the network anew where layers have been frozen since: their gradients are not waited for."""
        trained = [parameter.requires_grad for parameter in self.network.parameters()]
        if trained == self._trained:
            return
        self._trained, self._forward = trained, self.network
        gc.collect()  # the wrapper before, which is part of a cycle, and its hooks on the gradients
        if any(trained):
            wrapped = DistributedDataParallel(self.network, gradient_as_bucket_view=True, init_sync=False)
            wrapped.register_comm_hook(None, _sum_gradients)
            self._forward = wrapped

    def require_equal(self, step: int, tensors: Sequence[Tensor]) -> None:
        """Raise UserError if the processes' tensors differ in a bit, as they never do on sound machines."""
        own = sum(int(tensor.detach().contiguous().view(torch.int32).sum(dtype=torch.int64)) for tensor in tensors)
        sums = self._world.all_gather(own)
        if different := [rank for rank, total in enumerate(sums) if total != sums[0]]:
            raise UserError(
                f"step {step}: the weights of process {different[0]} are not the first one's: a fault of memory, "
                "device or network, or another version of a library; no checkpoint is written; mend that, then go on "
                "by --resume"
            )


def _sum_gradients(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sum over the processes, in place of DistributedDataParallel's mean: parts of a batch differ in size."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
