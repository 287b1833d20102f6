"""torch devices by the names that users give, or the reason why one is not there."""

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from pipeline import UserError

DRIVERS = ("/dev/nvidiactl", "/dev/dxg")  # NVIDIA's driver on Linux, and on Windows' Linux


class Streams:
    """A stream of its own on each GPU among some devices."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._streams = [torch.cuda.Stream(device) for device in devices if device.type == "cuda"]

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the streams current; what is computed in the block is ready when it ends."""
        with ExitStack() as stack:
            for stream in self._streams:
                stack.enter_context(torch.cuda.stream(stream))
            yield
            for stream in self._streams:
                stream.synchronize()


def devices_of(names: "Sequence[str | torch.device]") -> tuple[torch.device, ...]:
    """Return devices by name, CUDA's with their number, the CPU without. Raises UserError where one is not there."""
    devices = []
    for name in names:
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise UserError(f"device={name!r}: not a device; name cpu or cuda:N") from error
        if device.type == "cpu":
            devices.append(torch.device("cpu"))  # whatever its number: there is one
        elif device.type == "cuda":
            count = torch.cuda.device_count()
            if (device.index or 0) >= count:
                raise UserError(f"device={name!r}: {missing_device(count)}, or name cpu")
            devices.append(torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index))
        else:
            raise UserError(f"device={name!r}: is not supported; name cpu or cuda:N")
    if len({device.type for device in devices}) != 1:
        raise UserError(f"device={names}: name GPUs, or the CPU, at least one and not both")
    return tuple(devices)


def missing_device(count: int) -> str:
    """Return why torch, which sees `count` CUDA devices, does not have another one, and what to do."""
    if count:
        seen = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        return f"CUDA devices here: {count}; name {seen}, one for both columns if need be (cuda:0,cuda:0)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install its CUDA build"
    if not any(os.path.exists(driver) for driver in DRIVERS):
        return "no NVIDIA driver in sight; in a container, start it with --gpus all (NVIDIA Container Toolkit)"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "the driver's libcuda.so.1 is missing; in a container, NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
    if (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"CUDA_VISIBLE_DEVICES={hidden!r} leaves none; unset it"
    return f"the driver shows none to torch's CUDA {torch.version.cuda}; see nvidia-smi, or install a newer driver"
