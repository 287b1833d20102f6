"""Choose the device of each column in each process."""

import os
from collections import Counter

import torch

from pipeline import UserError
from pipeline.online.devices import devices_of


def local_rank() -> tuple[int, int]:
    """Return this process's index on its machine, and the number of processes there; (0, 1) without torchrun.

    Raises UserError: LOCAL_RANK or LOCAL_WORLD_SIZE are not as torchrun sets them.
    """
    rank, size = os.environ.get("LOCAL_RANK", "0"), os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise UserError(
            f"LOCAL_RANK={rank}, LOCAL_WORLD_SIZE={size}: must be this process's number on the machine and how many "
            "there are, as torchrun sets them"
        )
    return int(rank), int(size)


def choose_devices(names: str | None, columns: int = 2) -> tuple[torch.device, ...]:
    """Return this process's device for each column: of `names`, such as "cuda:0,cuda:1", or by `default_devices`.

    Several processes on a machine share out the names if these are as many as all their columns together; else all
    processes take the same devices, which must be CPUs.
    Raises UserError: a device is missing, too few or too many are named, or two processes name one GPU.
    """
    names = default_devices(columns) if names is None else names
    rank, processes = local_rank()
    try:
        devices = devices_of([name.strip() for name in names.split(",")])
    except UserError as error:
        raise UserError(f"--devices {names}: {error}") from error
    shares = [devices] * processes
    if len(devices) == columns * processes:
        shares = [devices[i * columns : (i + 1) * columns] for i in range(processes)]
    if len(shares[rank]) != columns:
        count = "one column: give one" if columns == 1 else "two columns: give two"
        example = "cuda:0 or cpu" if columns == 1 else "cuda:0,cuda:1 or cpu,cpu"
        more = f", for each of the {processes} processes on this machine" if processes > 1 else ""
        raise UserError(f"--devices {names}: {len(devices)} given; the network has {count}{more}, such as {example}")
    users = Counter(device for share in shares for device in set(share))
    common = [str(device) for device in dict.fromkeys(devices) if device.type == "cuda" and users[device] > 1]
    if common:
        raise UserError(
            f"--devices {names}: {processes} processes on this machine would share {' and '.join(common)}; "
            f"name {columns * processes}, {columns} for each, or leave --devices out"
        )
    return shares[rank]


def default_devices(columns: int = 2) -> str:
    """Return a GPU per column if there are enough, else one GPU for all columns; without GPUs the CPU.

    Several processes on a machine have GPUs of their own. Raises UserError: there are fewer GPUs than processes.
    """
    rank, processes = local_rank()
    count = torch.cuda.device_count()
    if not count:
        return ",".join(["cpu"] * columns)
    gpus = min(columns, count // processes)
    if not gpus:
        raise UserError(
            f"{processes} processes on this machine, which has {count} CUDA devices; start at most {count} "
            "(torchrun --nproc-per-node), or name --devices"
        )
    return ",".join(f"cuda:{rank * gpus + i % gpus}" for i in range(columns))
