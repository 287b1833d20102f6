"""The processes of one world, as torchrun starts them: who this one is, and what they tell each other.

What is small goes by gloo, through the hosts: text as bytes, never pickled. Gradients: `trainer.replicas`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline import UserError, volumes

PATIENCE = 50.0  # seconds; so that a job knows within a minute that one of its machines is gone
# of gloo's errors, which have no type of their own: the place in its code, or what it says once one exchange was late
GLOO = ("/gloo/", "Application timeout caused pair closure")


class RankLost(UserError):
    """Another process of the job has ended, or does not answer."""


@dataclass(frozen=True)
class World:
    """This process, of `size`. Without torchrun there is one.

    All but `is_main`: to be called by every process, in the same order. Raises RankLost where another process is gone.
    """

    rank: int = 0
    size: int = 1
    patience: float = PATIENCE  # seconds

    @property
    def is_main(self) -> bool:
        """Whether this is the one that speaks and writes."""
        return self.rank == 0

    def gathered(self, rows: Tensor, most: int) -> Tensor:
        """(n, width) float64 on the CPU of each process → those of all, by rank, in the first; its own in the others.

        `most`: as many rows as one process has at most, the same for all; a process may have none.
        """
        if self.size == 1:
            return rows
        sent = torch.full((most, 1 + rows.shape[1]), 0.0, dtype=torch.float64)
        sent[: len(rows), 0], sent[: len(rows), 1:] = 1.0, rows  # a row that counts begins with 1
        received = [torch.empty_like(sent) for _ in range(self.size)] if self.is_main else None
        with self.exchange():
            dist.gather(sent, received)
        if received is None:
            return rows
        whole = torch.cat(received)
        return whole[whole[:, 0] == 1.0, 1:]

    def texts(self, text: str) -> list[str]:
        """What each process says, by rank, in all."""
        if self.size == 1:
            return [text]
        own = torch.tensor(list(text.encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self.exchange():
            dist.all_gather(sizes, torch.tensor([len(own)]))
            sent = torch.zeros(max(map(int, sizes)), dtype=torch.uint8)
            sent[: len(own)] = own
            received = [torch.empty_like(sent) for _ in sizes]
            dist.all_gather(received, sent)
        return [bytes(each[: int(size)].tolist()).decode() for each, size in zip(received, sizes)]

    def least(self, numbers: list[int]) -> list[int]:
        """The least of all processes, for each of the numbers; below 2⁶³."""
        if self.size == 1:
            return numbers
        found = torch.tensor(numbers)
        with self.exchange():
            dist.all_reduce(found, dist.ReduceOp.MIN)
        return found.tolist()

    def total(self, sums: Tensor) -> None:
        """The sum over all processes, in place, in all; on the tensor's device."""
        if self.size > 1:
            with self.exchange():
                dist.all_reduce(sums)

    def send(self, tensor: Tensor) -> None:
        """The first process's values, in place, in all; on the tensor's device."""
        if self.size > 1:
            with self.exchange():
                dist.broadcast(tensor, 0)

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """What one process refuses in here, by a UserError or OSError, every process refuses.

        The first that refuses says so, and so does the first of all; the others end without a word.
        """
        if self.size == 1:
            yield
            return
        mine: UserError | OSError | None = None
        try:
            yield
        except (UserError, OSError) as error:
            mine = error
        said = volumes.explained(mine) if isinstance(mine, OSError) and mine.strerror else str(mine)
        found = self.texts(f"{said} " if mine else "")  # a message may be empty
        refused = next((rank for rank, text in enumerate(found) if text), None)
        if refused is None:
            return
        if mine and refused == self.rank:
            raise mine
        if self.is_main:
            raise UserError(f"process {refused}: {found[refused].strip()}")
        raise SystemExit(UserError.exit_code)

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Raise RankLost where an exchange within fails, because another process is gone."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not any(word in str(error) for word in GLOO):
                raise
            if "timed out" in str(error).lower() or "timeout" in str(error).lower():
                what = f"has not answered for {self.patience:g} s"
            else:
                what = "has ended before its time; the reason is in its own line"
            raise RankLost(f"another process of this job {what}") from error


class AnyRank:
    """Whether any process wants something, known to all one call later: so nobody waits for the answer."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._before: tuple[dist.Work, Tensor] | None = None

    def __call__(self, mine: bool) -> bool:
        """Of the last call, by all; with one process: `mine`. To be called by every process."""
        if self._world.size == 1:
            return mine
        with self._world.exchange():
            before, wanted = self._before, torch.tensor([int(mine)])
            self._before = dist.all_reduce(wanted, dist.ReduceOp.MAX, async_op=True), wanted
            if before is None:
                return False
            before[0].wait()
            return bool(before[1])


SINGLE = World()


@contextmanager
def processes(patience: float = PATIENCE) -> Iterator[World]:
    """Those of the job that torchrun started, joined until the context ends: by gloo, and between GPUs by NCCL.

    Args:
        patience: seconds that an exchange may wait for another process.
    Raises:
        UserError: they do not find each other.
    """
    said = os.environ.get("WORLD_SIZE", "1")
    if not said.isdecimal():
        raise UserError(f"WORLD_SIZE={said}: not a number of processes; start them with torchrun, or unset WORLD_SIZE")
    count = int(said)
    if count == 1:
        yield SINGLE
        return
    by = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(by, timeout=timedelta(seconds=patience))
    except (ValueError, RuntimeError) as error:
        what = str(error).partition("\n")[0]
        raise UserError(
            f"WORLD_SIZE={count}, and there is no such job ({what}); start it with torchrun, or unset WORLD_SIZE"
        ) from error
    try:
        yield World(dist.get_rank(), count, patience)
    finally:
        dist.destroy_process_group()
