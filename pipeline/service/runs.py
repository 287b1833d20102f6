"""The folder of a run: its checkpoints by their headers, its evaluations, and other files; without the trainer."""

import os
import re
import stat
import struct
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypeVar

import msgspec
from typing_extensions import TypedDict  # pydantic takes typing's only from Python 3.12 on

from pipeline import UserError, storage, typed
from pipeline.typed import Count
from pipeline.volumes import open_regular

CHECKPOINT, EVALUATION, BEST = r"(step-\d{8,}|best)\.safetensors", r"evaluation[\w-]*\.json", "best.safetensors"
HEADER, LARGEST = 2**26, 2**24  # bytes of a checkpoint's header, and of a file of JSON, at most
VIEWS = ("centre", "nine", "ten")  # of evaluations
T = TypeVar("T")


class Checkpoint(TypedDict):
    """A checkpoint; `best`: of the least validation error."""

    file: str
    step: int | None  # None: best.safetensors is damaged
    bytes: int
    best: bool


class Evaluation(TypedDict):
    """Errors over every image of a split, by views."""

    file: str
    step: int
    split: str
    dataset: str
    errors: dict[str, dict[str, float]]


def files_of(folder: Path, pattern: str) -> dict[str, os.stat_result]:
    """Return the files in a folder with such names, in their order. Links are none: they may lead out of the run."""
    try:
        names = [] if folder.is_symlink() else sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        names = []
    files = dict[str, os.stat_result]()
    for name in names:
        with suppress(FileNotFoundError):  # deleted since
            if re.fullmatch(pattern, name, re.ASCII) and stat.S_ISREG((status := os.lstat(folder / name)).st_mode):
                files[name] = status
    return files


def checkpoints(run: Path) -> list[Checkpoint]:
    files, views = files_of(run / "checkpoints", CHECKPOINT), list[Checkpoint]()
    best = _described(run / "checkpoints" / BEST) if BEST in files else None
    for file, status in files.items():
        step = int(file[5:-12]) if file != BEST else best and best["step"]
        chosen = file == BEST or (best is not None and step == best["step"])
        views.append(Checkpoint(file=file, step=step, bytes=status.st_size, best=chosen))
    return sorted(views, key=lambda view: (view["step"] or 0, view["file"]))


class _Metadata(msgspec.Struct):
    penstock: str


class _Header(msgspec.Struct):
    """The header of a safetensors file that is a checkpoint of ours; the metadata is JSON in JSON."""

    metadata: _Metadata = msgspec.field(name="__metadata__")


class _Progress(TypedDict):
    steps: Count
    over: NotRequired[bool]  # a plateau has ended the run
    pending: NotRequired[bool]  # the validation of this step is due


class _Described(TypedDict):
    """The part of a checkpoint's metadata that is shown."""

    step: Count
    progress: _Progress


def steps(run: Path, saved: list[Checkpoint]) -> int | None:
    """Return the steps of the whole run, as its newest checkpoint that is not damaged says."""
    described = (_described(run / "checkpoints" / checkpoint["file"]) for checkpoint in reversed(saved))
    return next((one["progress"]["steps"] for one in described if one), None)


def newest(run: Path) -> Path | None:
    """Return the newest checkpoint of a run; None where it has none."""
    return max((run / "checkpoints").glob("step-*.safetensors"), default=None)


def is_complete(checkpoint: Path) -> bool:
    """Return whether a checkpoint is the last one of its run, and was validated; a damaged one is not."""
    if (described := _described(checkpoint)) is None:
        return False
    progress = described["progress"]
    ended = described["step"] >= progress["steps"] and not progress.get("pending")
    return ended or progress.get("over", False)


def _described(path: Path) -> _Described | None:
    """Return the metadata of a safetensors file; None where it is damaged, or deleted."""
    try:
        return _header(path, *storage.stamp(path))
    except (OSError, UserError):
        return None


@lru_cache(1000)
def _header(path: Path, size: int, changed: str) -> _Described:
    """Return the metadata in the header of a file of that size and time."""
    with open_regular(path) as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        header = file.read(length) if length <= min(HEADER, size) else b""
    return typed.from_json(typed.from_json(header, _Header).metadata.penstock, _Described)


class _Timing(TypedDict):
    steps: NotRequired[Count]
    epochs: NotRequired[float]


class _Recipe(TypedDict):
    train: NotRequired[_Timing]


class _Start(TypedDict):
    dataset: NotRequired[str]


class Plan(NamedTuple):
    """A run's recipe.json and history.json, and the parts of them that are shown apart."""

    recipe: dict[str, Any]
    history: list[dict[str, Any]]
    timing: _Timing
    identity: str | None  # of the data set


def plan(run: Path) -> Plan:
    """Return the plan of a run; of files that are missing, nothing. Raises UserError: one is damaged."""
    recipe, history = run / "recipe.json", run / "history.json"
    timing, starts = content(recipe, _Recipe).get("train", _Timing()), content(history, list[_Start])
    identity = starts[-1].get("dataset") if starts else None
    return Plan(content(recipe, dict[str, Any]), content(history, list[dict[str, Any]]), timing, identity)


def content(path: Path, kind: type[T]) -> T:
    """Return what a file of JSON holds; empty where it is missing. Raises UserError: it is damaged."""
    try:
        with open_regular(path) as file:
            return typed.from_json(file.read(LARGEST), kind)
    except FileNotFoundError:
        return kind()
    except (UserError, OSError) as error:
        raise UserError(f"{path.name}: is damaged ({error}); delete it") from error


class _Rates(TypedDict):
    step: Count
    split: str
    dataset: str
    centre: NotRequired[dict[str, float]]
    nine: NotRequired[dict[str, float]]
    ten: NotRequired[dict[str, float]]


def evaluations(run: Path) -> list[Evaluation]:
    views = list[Evaluation]()
    for file in files_of(run, EVALUATION):
        rates = _rates(run / file, *storage.stamp(run / file))
        errors = {view: rates[view] for view in VIEWS if view in rates}  # type: ignore[literal-required]
        step, split, dataset = rates["step"], rates["split"], rates["dataset"]
        views.append(Evaluation(file=file, step=step, split=split, dataset=dataset, errors=errors))
    return views


@lru_cache(1000)
def _rates(path: Path, size: int, changed: str) -> _Rates:
    return content(path, _Rates)
