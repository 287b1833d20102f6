"""One shard: a deterministic tar and its DALI index, written aside, fsynced, renamed; its record last."""

import hashlib
import io
import json
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.files import HashingFile, write_aside, write_bytes_aside
from pipeline.image import ImageError, decode, encode, rescale
from pipeline.manifest import SAMPLE, BuildRecipe, canonical_json
from pipeline.offline.plan import PlannedImage
from pipeline.offline.statistics import Sums

BLOCK = 512  # bytes; a tar is made of these
BUILD_FOLDER = ".build"


@dataclass(frozen=True)
class ShardTask:
    """Everything that determines one shard's bytes, and where to put it."""

    root: Path
    split: str
    number: int
    images: tuple[PlannedImage, ...]
    recipe: BuildRecipe

    @property
    def name(self) -> str:
        return f"{self.split}/{self.split}-{self.number:06d}"

    @property
    def record_path(self) -> Path:
        return self.root / BUILD_FOLDER / f"{self.split}-{self.number:06d}.npz"


@dataclass(frozen=True)
class ShardResult:
    """A finished shard. One whose images were all skipped has no files."""

    name: str
    samples: np.ndarray  # (n,) of SAMPLE
    sums: Sums
    skipped: list[dict[str, str]]  # key, source, reason
    files: dict[str, dict[str, Any]]  # path below the root → bytes, sha256


def write_shard(task: ShardTask) -> ShardResult:
    """Build one shard, unless its record says that it is done already.

    A pure function of the task, but for the place where it puts its files. A kill at any moment leaves either the
    whole shard with its record, or files that the next run overwrites.

    Raises:
        OSError, SourceError: nothing of the shard counts as done.
    """
    if done := load_record(task):
        return done
    sums, skipped, samples, index = Sums.zero(task.recipe.size), [], [], []

    def write_tar(out: HashingFile) -> None:
        for image in task.images:
            try:
                data = _read(image, task.recipe)
                pixels = rescale(decode_raw(data, task.recipe), task.recipe.size, task.recipe.filter)
            except ImageError as error:
                skipped.append({"key": image.key, "source": image.raw.path, "reason": error.code})
                continue
            sums.add(pixels)
            jpeg = encode(pixels, quality=task.recipe.quality, subsampling=task.recipe.subsampling)
            offset = _write_member(out, f"{image.key}.jpg", jpeg)
            line = f"jpg {offset} {len(jpeg)} {image.key}.jpg"
            if image.label >= 0:
                label = str(image.label).encode()
                line += f" cls {_write_member(out, f'{image.key}.cls', label)} {len(label)} {image.key}.cls"
            index.append(line)
            digest = np.frombuffer(hashlib.sha256(data).digest()[:16], np.uint8)
            samples.append((task.number, offset, len(jpeg), image.label, zlib.crc32(jpeg), digest))
        out.write(bytes(2 * BLOCK))

    tar, idx = f"{task.name}.tar", f"{task.name}.idx"
    files = {tar: write_aside(task.root / tar, write_tar)}
    text = f"v1.2 {len(index)}\n" + "".join(line + "\n" for line in index)
    files[idx] = write_bytes_aside(task.root / idx, text.encode())
    if not samples:
        for name in files:
            (task.root / name).unlink()
        files = {}
    result = ShardResult(task.name, np.array(samples, SAMPLE), sums, skipped, files)
    _save_record(task, result)
    return result


def decode_raw(data: bytes, recipe: BuildRecipe) -> Image.Image:
    """`image.decode` within the limits of a build recipe."""
    return decode(
        data,
        max_bytes=recipe.max_bytes,
        max_pixels=recipe.max_pixels,
        max_scans=recipe.max_scans,
        exif=recipe.exif,
    )


def load_record(task: ShardTask) -> ShardResult | None:
    """The result of a shard that an earlier run finished; None where there is none, or none that can be read."""
    try:
        with np.load(task.record_path, allow_pickle=False) as record:
            meta = json.loads(record["meta"].tobytes())
            sums = Sums(int(record["n"]), record["sum_image"].astype(np.int64), record["second_moments"])
            samples = record["samples"]
    except (FileNotFoundError, zipfile.BadZipFile, ValueError, KeyError, EOFError):
        return None  # the shard is built again
    for name, file in meta["files"].items():
        path = task.root / name
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            return None
    return ShardResult(task.name, samples, sums, meta["skipped"], meta["files"])


def _save_record(task: ShardTask, result: ShardResult) -> None:
    meta = canonical_json({"skipped": result.skipped, "files": result.files})
    buffer = io.BytesIO()
    np.savez(
        buffer,
        samples=result.samples,
        n=result.sums.n,
        sum_image=result.sums.sum_image.astype(np.uint32),  # at most 255 · samples_per_shard
        second_moments=result.sums.second_moments,
        meta=np.frombuffer(meta, np.uint8),
    )
    write_bytes_aside(task.record_path, buffer.getvalue())


def _read(image: PlannedImage, recipe: BuildRecipe) -> bytes:
    if image.raw.size > recipe.max_bytes:
        raise ImageError("too_many_bytes")
    return image.raw.read()


def _write_member(out: HashingFile, name: str, data: bytes) -> int:
    """Append one regular file to a USTAR archive (mtime, uid, gid 0); returns the offset of its data."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    out.write(info.tobuf(tarfile.USTAR_FORMAT))
    offset = out.bytes
    out.write(data)
    out.write(bytes(-len(data) % BLOCK))
    return offset
