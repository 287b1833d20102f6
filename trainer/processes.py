"""The processes of one job, as torchrun starts them: who this one is, and how the first gets what all have found."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process, of `count`. Without torchrun there is one."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks and writes."""
        return self.rank == 0

    def gathered(self, rows: Tensor, most: int) -> Tensor:
        """(n, width) float64 on the CPU of each process → those of all, by rank, in the first; its own in the others.

        `most`: as many rows as one process has at most, the same for all; a process may have none.

        Raises:
            UserError: another process is gone.
        """
        if self.count == 1:
            return rows
        sent = torch.full((most, 1 + rows.shape[1]), 0.0, dtype=torch.float64)
        sent[: len(rows), 0], sent[: len(rows), 1:] = 1.0, rows  # a row that counts begins with 1
        received = [torch.empty_like(sent) for _ in range(self.count)] if self.first else None
        try:
            dist.gather(sent, received)
        except RuntimeError as error:  # what gloo makes of a closed connection
            raise UserError(
                "another process of this job has ended before its time; the reason is in its own line"
            ) from error
        if received is None:
            return rows
        whole = torch.cat(received)
        return whole[whole[:, 0] == 1.0, 1:]


ALONE = Processes()


@contextmanager
def processes() -> Iterator[Processes]:
    """Those of the job that torchrun started, joined until the context ends, by gloo: what they exchange is small.

    Raises:
        UserError: they do not find each other.
    """
    said = os.environ.get("WORLD_SIZE", "1")
    if not said.isdecimal():
        raise UserError(f"WORLD_SIZE={said}: not a number of processes; start them with torchrun, or unset WORLD_SIZE")
    count = int(said)
    if count == 1:
        yield ALONE
        return
    try:
        dist.init_process_group("gloo")
    except (ValueError, RuntimeError) as error:
        what = str(error).partition("\n")[0]
        raise UserError(
            f"WORLD_SIZE={count}, and there is no such job ({what}); start it with torchrun, or unset WORLD_SIZE"
        ) from error
    try:
        yield Processes(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()
