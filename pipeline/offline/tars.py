"""A dataset directory's files read back: hashes first, then every byte of a shard's tar, and what follows from it."""

import hashlib
import io
import os
import re
import struct
import tarfile
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from pipeline import manifest, storage
from pipeline.decode import ImageError, decode
from pipeline.image import pixels_of
from pipeline.manifest import SAMPLE, BuildRecipe, Manifest
from pipeline.offline.keys import MAX_LENGTH
from pipeline.offline.shards import BLOCK
from pipeline.offline.statistics import Sums

KEY = rf"[A-Za-z0-9_-]{{1,{MAX_LENGTH}}}"
MAX_PIXELS, MAX_SCANS = 64 * 10**6, 100  # of a stored picture: as many as a raw one may have
_HEADER_FIELDS = ("mode", "uid", "gid", "mtime", "type", "linkname", "uname", "gname")
PARSER_ERRORS = (  # what numpy and zipfile raise on bad data
    zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError, OSError, EOFError, ValueError, TypeError,
    KeyError, SyntaxError, RuntimeError, OverflowError, MemoryError, Warning,
)  # fmt: skip


class Violation(Exception):
    """The first promise that a file breaks; what else it holds is then not looked at."""


@dataclass(frozen=True)
class TarContent:
    """What a shard's tar holds, and what that demands of the files beside it."""

    samples: np.ndarray  # (n,) of SAMPLE, digests 0: they are of the raw images
    keys: list[str]
    index: bytes
    sums: Sums | None  # over the decoded pictures; each pixel counts as one picture: sum_image is (1, 1, 3)


@contextmanager
def opened(found: Manifest, name: str) -> Iterator[BinaryIO]:
    """A file of the dataset directory at its beginning, once its size and SHA-256 are those of the manifest.

    Raises:
        Violation: it is missing, unreadable or damaged.
    """
    path, promised = found.root / name, found.files.get(name)
    if promised is None:
        raise Violation(f"not listed in {manifest.FILE_NAME}")
    if not storage.is_file(path):
        raise Violation("not a file" if storage.exists(path) else "missing")
    if not storage.is_remote(path) and not os.access(path, os.R_OK):
        raise Violation("no permission to read it")
    with io.BytesIO(storage.read_bytes(path)) if storage.is_remote(path) else open(path, "rb") as file:
        if (size := file.seek(0, io.SEEK_END)) != promised.bytes:
            raise Violation(f"has {size} bytes, the manifest promises {promised.bytes}")
        file.seek(0)
        if hashlib.file_digest(file, "sha256").hexdigest() != promised.sha256:
            raise Violation("its SHA-256 is not that of the manifest")
        file.seek(0)
        yield file


def loaded(load: Callable[[], Any]) -> Any:
    """What a loader of the manifest returns. Raises Violation where the content is none, in whatever way."""
    try:
        with warnings.catch_warnings(action="error"):
            return load()
    except PARSER_ERRORS as error:
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise Violation(f"does not load ({what})") from error


def read_tar(file: BinaryIO, number: int, classes: int, recipe: BuildRecipe, pictures: bool) -> TarContent:
    """Read shard `number` back from its tar, one member in memory at a time; with `pictures`, decode those as well.

    Raises:
        Violation: a byte that the builder would not have written, or a picture that is not size×size RGB.
    """
    samples: list[tuple[int, int, int, int, int, int]] = []
    keys, index = [], []
    sums = Sums.zero(1) if pictures else None
    for name, offset, data in _members(file):
        key, _, extension = name.partition(".")
        if extension == "jpg":
            keys.append(key)
            index.append(f"jpg {offset} {len(data)} {name}")
            samples.append((number, offset, len(data), -1, zlib.crc32(data), 0))
            if sums:
                try:
                    sums.add(stored_pixels(data, "JPEG", recipe.size, recipe.crop))
                except Violation as violation:
                    raise Violation(f"{name}: {violation}") from violation
        elif not keys or keys[-1] != key or samples[-1][3] >= 0:
            raise Violation(f"{name} does not stand behind its {key}.jpg")
        else:
            index[-1] += f" cls {offset} {len(data)} {name}"
            samples[-1] = (*samples[-1][:3], _label(name, data, classes), *samples[-1][4:])
    text = "".join(f"{line}\n" for line in (f"v1.2 {len(index)}", *index))
    return TarContent(np.array(samples, SAMPLE), keys, text.encode(), sums)


def _members(file: BinaryIO) -> Iterator[tuple[str, int, bytes]]:
    """Name, offset of the data, and data of each member, every byte between them checked."""
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    while (header := file.read(BLOCK)) != bytes(BLOCK):
        offset = file.tell()
        try:
            info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
            plain = tarfile.TarInfo(info.name)
            plain.size = info.size
            expected = plain.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
        except (tarfile.TarError, ValueError) as error:
            raise Violation(f"no header of a member at byte {offset - len(header)} ({error})") from error
        if not re.fullmatch(rf"{KEY}\.(jpg|cls)", info.name):
            raise Violation(f"member {info.name!a}: only KEY.jpg and KEY.cls belong here")
        if header != expected:
            wrong = [field for field in _HEADER_FIELDS if getattr(info, field) != getattr(plain, field)]
            raise Violation(f"header of {info.name}: {', '.join(wrong) or 'its form'} is not the builder's")
        if offset + info.size > end:
            raise Violation(f"{info.name}: cut short")
        data = file.read(info.size)
        if file.read(-info.size % BLOCK).strip(b"\0"):
            raise Violation(f"{info.name}: not padded with zeros")
        yield info.name, offset, data
    if file.read(BLOCK + 1) != bytes(BLOCK):
        raise Violation("does not end with two blocks of zeros")


def _label(name: str, data: bytes, classes: int) -> int:
    if not re.fullmatch(rb"0|[1-9][0-9]{0,8}", data) or int(data) >= classes:
        raise Violation(f"{name}: holds {data[:20]!r}, not a label from 0 to {classes - 1}")
    return int(data)


def stored_pixels(data: bytes, form: str, size: int, crop: str = "centre") -> np.ndarray:
    """Decode a picture of our own, `form` "JPEG" or "PNG".

    Returns:
        (size, size, 4) uint8, RGBX; where `crop` is "none", the shorter side is `size`.
    Raises:
        Violation: it is no such picture.
    """
    try:
        image = decode(data, max_bytes=len(data), max_pixels=MAX_PIXELS, max_scans=MAX_SCANS)
    except ImageError as error:
        raise Violation(str(error)) from error
    fits = min(image.size) == size if crop == "none" else image.size == (size, size)
    if image.format != form or not fits:  # what was converted to RGB has no format
        what = f"{image.width}×{image.height} {image.format or 'not RGB'}"
        raise Violation(f"{what}, not an RGB {form} of {size}×{size}" + " or longer" * (crop == "none"))
    return pixels_of(image)
