"""Which device each column of each process lives on."""

import os
from collections import Counter

import torch

from pipeline import UserError
from pipeline.online.devices import devices_of


def placed(devices: str | None, columns: int) -> tuple[torch.device, ...]:
    """A device per column: those that were named, as for `parse_devices`, or the default."""
    return parse_devices(default_devices(columns) if devices is None else devices, columns)


def parse_devices(text: str, columns: int = 2) -> tuple[torch.device, ...]:
    """`cuda:0,cuda:1`, `cuda:0,cuda:0` or `cpu,cpu` → a device per column.

    Of several processes of torchrun on a machine, each takes its own of as many names as they have columns together;
    where fewer are named, all take the same, which only a CPU can be.

    Raises:
        UserError: one is not there, too few or too many are named, or two processes name one GPU.
    """
    rank, processes = local_rank()
    try:
        named = devices_of([name.strip() for name in text.split(",")])
    except UserError as error:
        raise UserError(f"--devices {text}: {error}") from error
    shares = [named] * processes
    if len(named) == columns * processes:
        shares = [named[i * columns : (i + 1) * columns] for i in range(processes)]
    if len(shares[rank]) != columns:
        count = "one column: give one" if columns == 1 else "two columns: give two"
        example = "cuda:0 or cpu" if columns == 1 else "cuda:0,cuda:1 or cpu,cpu"
        more = f", for each of the {processes} processes on this machine" if processes > 1 else ""
        raise UserError(f"--devices {text}: {len(named)} given; the network has {count}{more}, such as {example}")
    users = Counter(device for share in shares for device in set(share))
    common = [str(device) for device in dict.fromkeys(named) if device.type == "cuda" and users[device] > 1]
    if common:
        raise UserError(
            f"--devices {text}: {processes} processes on this machine would share {' and '.join(common)}; "
            f"name {columns * processes}, {columns} for each, or leave --devices out"
        )
    return shares[rank]


def default_devices(columns: int = 2) -> str:
    """A GPU per column where there are as many, one for all where there are fewer, else the CPU.

    Of several processes of torchrun on a machine, each has its own: process 1 the third and the fourth, with two
    columns, or the second where there are not as many.

    Raises:
        UserError: there are fewer GPUs than processes on this machine.
    """
    rank, processes = local_rank()
    count = torch.cuda.device_count()
    if not count:
        return ",".join(["cpu"] * columns)
    each = min(columns, count // processes)
    if not each:
        raise UserError(
            f"{processes} processes on this machine, which has {count} CUDA devices; start at most {count} "
            "(torchrun --nproc-per-node), or name --devices"
        )
    return ",".join(f"cuda:{rank * each + i % each}" for i in range(columns))


def local_rank() -> tuple[int, int]:
    """(this process's number on its machine, how many of the job are there); (0, 1) without torchrun.

    Raises:
        UserError: LOCAL_RANK or LOCAL_WORLD_SIZE are not as torchrun sets them.
    """
    rank, count = (os.environ.get(name, default) for name, default in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        raise UserError(
            f"LOCAL_RANK={rank}, LOCAL_WORLD_SIZE={count}: must be this process's number on the machine and how many "
            "there are, as torchrun sets them"
        )
    return int(rank), int(count)
