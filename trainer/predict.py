"""Labels of pictures in files, folders and tars, each seen as if the builder had stored it; the command predict."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from pipeline import SourceError, UserError, archives, manifest, storage
from pipeline.cli import Command, json_text, printable
from pipeline.decode import REASONS, ImageError, decode
from pipeline.manifest import BuildRecipe, ClassRecord, DatasetError
from pipeline.storage import Location, read_ahead
from trainer import checkpoint as checkpoints
from trainer.checkpoint import load_network, note_other_data
from trainer.devices import choose_devices
from trainer.evaluate import view_probabilities
from trainer.nonfinite import require_finite_outputs
from trainer.options import CHECKPOINT, DATA, DEVICES, JSON
from trainer.parallel import TwoColumnNet
from trainer.pictures import Pictures, pixels
from trainer.probabilities import top

BATCH_SIZE = {"centre": 32, "ten": 8}  # pictures; results come a batch at a time
THREADS = min(4, os.cpu_count() or 1)  # that decode, each with as much memory as the builder's worker
TARS = (".tar", ".tar.gz", ".tgz")  # of which the packed ones are refused
NO_PICTURES = (  # endings of files that often lie beside pictures
    *(".cls", ".csv", ".html", ".idx", ".json", ".jsonl", ".log", ".md", ".npy", ".npz", ".parquet", ".py"),
    *(".safetensors", ".toml", ".tsv", ".txt", ".xml", ".yaml", ".yml"),
)
TOO_LARGE = "too_many_bytes", REASONS["too_many_bytes"]
USABLE = ("", archives.UNSAFE_NAME, archives.SECOND_OF_NAME)  # of reasons; no picture is written to a path of its name
NOT_COUNTED = (archives.FOLDER, archives.DATA_AFTER_END)


@dataclass(frozen=True)
class Raw:
    """A file that should be a picture."""

    picture: str  # path or URL of the file; for a member of a tar TAR/MEMBER
    size: int  # bytes
    read: Callable[[], bytes]  # raises OSError, StorageError; any thread may call it
    stored: bool = False  # listed in a manifest: if it has the data set's size, it is used as it is


@dataclass(frozen=True)
class Prediction:
    """A picture and its five most probable labels, the most probable first."""

    picture: str  # as of `Raw`
    labels: list[dict[str, Any]]  # label, wnid, words, probability


@dataclass(frozen=True)
class Failure:
    """A picture, a folder or a tar that cannot be predicted."""

    picture: str
    error: str  # of pipeline.decode.REASONS, or "unreadable", or "bad_tar"
    reason: str


class RawPictures:
    """Every picture at locations that exist, one after the other, in the order of paths and of members.

    In folders and tars, entries that are hidden, end as in NO_PICTURES or are no files are counted in `left_out`; all
    others should be pictures. `empty` lists locations without any. Raises StorageError: the object store fails.
    """

    def __init__(self, locations: Sequence[Location], rules: BuildRecipe) -> None:
        """Take the `rules` of the data set that the network was trained on."""
        self._locations, self._rules = locations, rules
        self.left_out: Counter[str] = Counter()
        self.empty: list[str] = []

    def __iter__(self) -> Iterator[Raw | Failure]:
        for location in self._locations:
            empty = True
            for picture in self._at(location):
                empty = False
                yield picture
            if empty:
                self.empty.append(str(location))

    def _at(self, root: Location) -> Iterator[Raw | Failure]:
        """Yield a file, or the pictures of a folder and its folders. Links are followed, and folders visited once."""
        is_file, is_dir = storage.is_file(root), storage.is_dir(root)
        if not is_file and not is_dir:
            yield Failure(str(root), "unreadable", "neither a file nor a folder")
            return
        entry = storage.Entry("", is_file, is_dir, storage.stamp(root)[0] if is_file else 0)
        seen, pending = set[object](), [(root, entry)]
        while pending:  # a stack: folders may be nested more deeply than Python's calls
            folder, entry = pending.pop()
            path = folder / entry.name if entry.name else folder
            if not entry.is_dir or entry.name.startswith("."):
                if not self._counted(entry.name, entry.is_file):
                    yield from self._file(path, entry.size)
                continue
            try:
                identity = os.path.realpath(path) if isinstance(path, Path) else path  # inodes may not be unique
                entries = [] if identity in seen else storage.scan(path)
            except OSError as error:
                yield unreadable(path, error)
                continue
            seen.add(identity)
            pending += [(path, entry) for entry in reversed(entries)]

    def _file(self, path: Location, size: int) -> Iterator[Raw | Failure]:
        if path.name.lower().endswith(TARS):
            yield from self._tar(path)
        elif size > self._rules.max_bytes:
            yield Failure(str(path), *TOO_LARGE)
        else:
            yield Raw(str(path), size, lambda: storage.read_range(str(path), 0, size))

    def _tar(self, tar: Location) -> Iterator[Raw | Failure]:
        """Yield the members that should be pictures, and at last a Failure if the tar is damaged."""
        stored = is_shard(tar)
        try:
            with storage.opened(tar) as (read, size):
                for member in archives.members(read, 0, size, str(tar)):
                    name = f"{tar}/{member.name}"
                    if member.reason == archives.NO_END:
                        raise SourceError(f"cut short at byte {member.offset:,}: it has no end mark; fetch it again")
                    if member.reason not in USABLE:
                        if member.reason not in NOT_COUNTED:
                            self.left_out["link, device or sparse file in a tar"] += 1
                    elif self._counted(member.name):
                        continue
                    elif member.size > self._rules.max_bytes:
                        yield Failure(name, *TOO_LARGE)
                    else:  # read now: threads would read the tar out of order
                        yield Raw(name, member.size, partial(bytes, read(member.size, member.offset)), stored)
        except OSError as error:
            yield unreadable(tar, error)
        except SourceError as error:
            yield Failure(str(tar), "bad_tar", f"not a whole, plain tar ({str(error).removeprefix(f'{tar}: ')})")

    def _counted(self, name: str, is_file: bool = True) -> bool:
        """Return True, and count the entry in `left_out`, if it is no file, or no picture by its name."""
        last, other = name.rpartition("/")[2].lower(), "" if is_file else "link to nothing, pipe or device"
        kind = "hidden" if last.startswith(".") else next((f"*{e}" for e in NO_PICTURES if last.endswith(e)), other)
        self.left_out.update([kind] if kind else [])
        return bool(kind)


def is_shard(tar: Location) -> bool:
    """Return True if the manifest of a dataset directory lists a tar: the builder has rescaled its pictures already.

    The pictures' size does not decide it: the builder would encode a raw JPEG of that size again.
    """
    path = tar.resolve() if isinstance(tar, Path) else tar
    root = path.parent.parent
    try:
        dataset = manifest.parse(storage.read_bytes(root / manifest.FILE_NAME), root)
    except (OSError, UserError):  # no manifest, or not one of ours
        return False
    names = {shard.name for split in dataset.splits.values() for shard in split.shards}
    return f"{path.parent.name}/{path.name}" in names


def unreadable(name: object, error: OSError) -> Failure:
    return Failure(str(name), "unreadable", error.strerror or str(error))


@torch.inference_mode()
def classify(
    network: TwoColumnNet,
    pictures: Pictures,
    raws: Iterable[Raw | Failure],
    views: str,
    classes: Sequence[ClassRecord],
) -> Iterator[Prediction | Failure]:
    """Yield, for each of `raws` in order, a prediction or the reason of a failure. Few are in memory at a time.

    Args:
        views: "centre", or "ten", whose probabilities are averaged.
    Raises:
        Diverged: an output is not a finite number.
        StorageError: the object store fails.
    """
    ready = read_ahead(raws, partial(_pixels, pictures), THREADS, lambda raw: raw.size if isinstance(raw, Raw) else 0)
    while batch := list(islice(ready, BATCH_SIZE[views])):
        stored = [picture for _, picture in batch if isinstance(picture, np.ndarray)]
        rows: Iterator[np.ndarray] = iter(())
        if stored:
            probabilities = view_probabilities(network, pictures.seen(stored, views)).mean(1).cpu().numpy()
            require_finite_outputs(probabilities, network.name)
            rows = iter(probabilities)
        for raw, picture in batch:
            if isinstance(picture, Failure):
                yield picture
                continue
            row, labels = next(rows), []
            for i in top(row).tolist():
                names = {"label": i, "wnid": classes[i].wnid, "words": classes[i].words}
                labels.append({**names, "probability": float(row[i])})
            yield Prediction(raw.picture, labels)


def _pixels(pictures: Pictures, raw: Raw | Failure) -> np.ndarray | Failure:
    """Return the pixels of a picture as the builder would store it, or why that fails. Raises StorageError."""
    if isinstance(raw, Failure):
        return raw
    try:
        data = raw.read()
        jpeg = data if raw.stored and fits(data, pictures.rules) else pictures.stored(data)
        return pixels(jpeg, pictures.rules.size)
    except ImageError as error:
        return Failure(raw.picture, error.code, REASONS[error.code])
    except DatasetError:  # a stored picture, whose damage Pillow bears
        return Failure(raw.picture, "corrupt", REASONS["corrupt"])
    except OSError as error:
        return unreadable(raw.picture, error)


def fits(data: bytes, rules: BuildRecipe) -> bool:
    """Return True for a JPEG as the builder stores it: RGB of size × size, and not gzipped. Raises ImageError."""
    image = decode(data, max_bytes=rules.max_bytes, max_pixels=rules.max_pixels, max_scans=rules.max_scans)
    return data.startswith(b"\xff\xd8") and image.format == "JPEG" and image.size == (rules.size, rules.size)


@click.command(cls=Command)
@click.argument("words", metavar="PICTURES...", nargs=-1, required=True)
@DATA
@CHECKPOINT
@click.option("--views", type=click.Choice(["centre", "ten"]), default="centre", show_default=True)
@JSON
@DEVICES
def predict(words: tuple[str, ...], data: Path, run: Path, views: str, as_json: bool, devices: str | None) -> None:
    """Print the five most probable labels of each picture. DATA is the data set that RUN was trained on.

    PICTURES are files, folders, tars of pictures, or shards, as paths or as URLs of an object store. Pictures of any
    size are rescaled as the builder does it. With --json, each is a line of its own.

    \b
    Examples:
      python -m trainer predict cat.jpg holidays/ --data /data/imagenet-256 --checkpoint runs/1
      python -m trainer predict s3://bucket/set/val/val-000000.tar --json --data … --checkpoint …
    """
    locations = [storage.location(word) for word in words]
    for location, exists in read_ahead(locations, storage.exists):
        if not exists:
            raise UserError(f"{printable(str(location))}: no such file or folder")
    dataset, checkpoint = manifest.load(data), checkpoints.load(run)
    note_other_data(checkpoint, dataset)
    network = load_network(checkpoint, dataset, choose_devices(devices, checkpoint.recipe.model.columns), run)
    raws, pictures = RawPictures(locations, dataset.recipe), Pictures(dataset, checkpoint.recipe)
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # which reports bad pictures, as this command does
    predicted = failed = 0
    for result in classify(network, pictures, raws, views, dataset.classes):
        failed += isinstance(result, Failure)
        predicted += isinstance(result, Prediction)
        if as_json:
            click.echo(json_text(asdict(result)))
        elif isinstance(result, Failure):
            click.echo(f"{printable(result.picture)}: {result.error}: {printable(result.reason)}", err=True)
        else:
            click.echo(_text(result))
    left_out = ", ".join(f"{count:,} {kind}" for kind, count in sorted(raws.left_out.items()))
    left_out = f"left out: {printable(left_out)}" if left_out else ""
    problems = [f"{failed:,} could not be predicted, for the reasons above; {predicted:,} were"] if failed else []
    problems += [f"no pictures in {', '.join(map(printable, raws.empty))}"] if raws.empty else []
    if not predicted and not failed:
        also = f" ({left_out})" if left_out else ""
        raise UserError(f"{problems[0]}; name files, folders or tars of pictures{also}")
    if left_out:
        click.echo(left_out, err=True)
    if problems:
        raise UserError("; ".join(problems))


def _text(prediction: Prediction) -> str:
    """Return the picture's name and a line for each label."""
    lines = [click.style(printable(prediction.picture), bold=True)]
    for label in prediction.labels:
        words, wnid = printable(label["words"]), printable(label["wnid"])
        lines.append(f"{100 * label['probability']:6.1f} %  {words}" + (f" ({wnid})" if wnid != words else ""))
    return "\n".join(lines)
