"""Tars and folders of made-up files."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path


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
