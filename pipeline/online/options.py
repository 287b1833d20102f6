"""What a user may choose of a loader, checked: recipes, devices, counts."""

import ctypes
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from pipeline import UserError
from pipeline.manifest import Manifest
from pipeline.online.augment import AlexNet, Transform
from pipeline.online.plain import ImageNet
from pipeline.online.windows import Recipe

DRIVERS = ("/dev/nvidiactl", "/dev/dxg")  # where NVIDIA's driver is: on Linux; on Windows' Linux


def recipe_of(data: Manifest, name: str, seed: int, options: dict[str, Any]) -> Recipe:
    """The recipe of a name for a data set. Raises UserError where its pictures do not suit, or there is none."""
    if name == "alexnet":
        if data.recipe.crop != "centre":
            raise UserError(
                f"{data.root}: built with --crop none, whole pictures for other models' augmentation; "
                "take recipe='imagenet', or build with --crop centre"
            )
        _check_known(options, Transform.__dataclass_fields__)
        return AlexNet(Transform(**options), data.statistics(), data.recipe.size, seed)
    check_choice("recipe", name, ("alexnet", "imagenet"))
    _check_known(options, ("views",))
    return ImageNet(seed=seed, **options)


def _check_known(options: dict[str, Any], known: Iterable[str]) -> None:
    for name in options:
        if name not in known:
            raise UserError(f"{name}={options[name]!r}: no such option; this recipe has {', '.join(known)}")


def devices_of(names: "Sequence[str | torch.device]") -> tuple[torch.device, ...]:
    """Devices by name, CUDA's with their number, the CPU without. Raises UserError where one is not there."""
    found = []
    for name in names:
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise UserError(f"device={name!r}: not a device; name cpu or cuda:N") from error
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"device={name!r}: is not supported; name cpu or cuda:N")
        if device.type == "cuda":
            there = torch.cuda.device_count()
            if (device.index or 0) >= there:
                raise UserError(f"device={name!r}: {missing_device(there)}, or name cpu")
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        else:
            device = torch.device("cpu")  # whatever its number: there is one
        found.append(device)
    if len({device.type for device in found}) != 1:
        raise UserError(f"device={names}: name GPUs, or the CPU, at least one and not both")
    return tuple(found)


def missing_device(there: int) -> str:
    """Why torch, which sees `there` CUDA devices, does not have another one, and what to do."""
    if there:
        seen = "cuda:0" if there == 1 else f"cuda:0 to cuda:{there - 1}"
        many = "is 1 CUDA device" if there == 1 else f"are {there} CUDA devices"
        return f"there {many} here; name {seen}, one for both columns if need be (cuda:0,cuda:0)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install its CUDA build"
    if not any(os.path.exists(driver) for driver in DRIVERS):
        return "no NVIDIA driver in sight; in a container, start it with --gpus all (NVIDIA Container Toolkit)"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "the driver's libcuda.so.1 is missing; in a container, NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return f"CUDA_VISIBLE_DEVICES={hidden!r} leaves none; unset it"
    return f"the driver shows none to torch's CUDA {torch.version.cuda}; see nvidia-smi, or install a newer driver"


def check_counts(**counts: int) -> None:
    """Raise UserError where a count is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name}={count}: must be at least 1")


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise UserError where a value is not among the known ones."""
    if value not in known:
        raise UserError(f"{name}={value!r}: must be one of {', '.join(known)}")
