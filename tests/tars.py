"""Tars and folders of made-up files, and the content of the images that a layout lists."""

import io
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from pipeline.offline.raw import RawImage


def tree(folder: Path, files: dict[str, bytes]) -> Path:
    """Write `files` (path → bytes) into `folder`."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def tar_bytes(members: dict[str, bytes] | Iterable[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def contents(images: Iterable[RawImage]) -> Counter[tuple[str, str, str | None, bytes]]:
    """Return split, file name, class and bytes of each image."""
    return Counter((image.split, image.name, image.wnid, image.read()) for image in images)
