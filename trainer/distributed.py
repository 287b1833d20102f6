"""Processes of torchrun: collective calls, errors that end all of them, and the sum of their gradients."""

import gc
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

PATIENCE = 50  # seconds; so that a run ends within a minute of the loss of a machine
# gloo's errors have no type of their own: they name a path of its code, or have these words once a collective was late
GLOO_ERRORS = ("/gloo/", "Application timeout caused pair closure")


class RankLost(UserError):
    """Another process has ended, or does not answer."""


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them; without torchrun there is one.

    Every process calls the methods, in the same order. They raise RankLost if another process is gone.
    """

    rank: int = 0
    size: int = 1
    patience: float = PATIENCE  # seconds: for another process, and for decoding workers

    @property
    def is_main(self) -> bool:
        """Return True in the process that prints and writes."""
        return self.rank == 0

    def all_gather(self, value: Any) -> list[Any]:
        """Return each process's value, a plain Python object, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.collective():
            dist.all_gather_object(values, value)
        return values

    def any(self, own: bool) -> bool:
        """Return True if `own` of any process is True."""
        if self.size == 1:
            return own
        answer = torch.tensor([int(own)])
        with self.collective():
            dist.all_reduce(answer, dist.ReduceOp.MAX)
        return bool(answer)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Return all processes' rows (n, width), by rank, in the main process; its own in each other. n may differ."""
        if self.size == 1:
            return rows
        gathered: list[Any] | None = [None] * self.size if self.is_main else None
        with self.collective():
            dist.gather_object(rows, gathered)
        return torch.cat(gathered) if gathered else rows

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
        kind = type(own) if isinstance(own, UserError) else UserError
        messages = self.all_gather((kind, message) if own else None)
        failed = next((rank for rank, pair in enumerate(messages) if pair), None)
        if failed is None:
            return
        if own and failed == self.rank:
            raise own
        if self.is_main:
            kind, message = messages[failed]
            raise kind(f"process {failed}: {message}")
        raise SystemExit(UserError.exit_code)

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Raise RankLost if a collective within fails because another process is gone."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not any(word in str(error) for word in GLOO_ERRORS):
                raise
            reason = "has ended before its time; the reason is in its own line"
            if "timed out" in str(error).lower() or "timeout" in str(error).lower():
                reason = f"has not answered for {self.patience:g} s"
            raise RankLost(f"another process of this job {reason}") from error

    def require_equal_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise UserError, in every process, if one's settings (plain values by name) are not the main one's."""
        (main_host, expected), *others = self.all_gather((socket.gethostname(), dict(settings)))
        with self.raise_together():
            for rank, (host, values) in enumerate(others, 1):
                for key in expected | values:
                    if values.get(key) != expected.get(key):
                        raise UserError(
                            f"process {rank}, on {host}, has {key} {values.get(key)}, and the first process, on "
                            f"{main_host}, has {expected.get(key)}; start all processes alike"
                        )


SINGLE = World()


@contextmanager
def join(patience: float = PATIENCE) -> Iterator[World]:
    """Join the processes that torchrun started until the context ends: by gloo, and between GPUs by NCCL.

    Args:
        patience: seconds that a collective may wait for another process, and a loader for decoding workers.
    Raises:
        UserError: they do not find each other.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal():
        raise UserError(f"WORLD_SIZE={size}: not a number of processes; start them with torchrun, or unset WORLD_SIZE")
    if int(size) == 1:
        yield World(patience=patience)
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
    """Copies of a network, one in each process on devices of its own, to be trained as one network.

    After `backward` a parameter's gradient is the sum over the processes. A loss that is a sum over samples, divided by
    the global batch's size, thus has the gradient of the mean over the global batch, however unequal the processes'
    parts are, even if one is empty.
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
        """Wrap the network anew if layers were frozen since: DistributedDataParallel would wait for their gradients."""
        trained = [parameter.requires_grad for parameter in self.network.parameters()]
        if trained == self._trained:
            return
        self._trained, self._forward = trained, self.network
        gc.collect()  # frees the wrapper before, which is part of a cycle, with its hooks on the gradients
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
    """Sum over the processes, where DistributedDataParallel takes the mean: parts of a batch differ in size."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
