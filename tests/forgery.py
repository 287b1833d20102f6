"""A dataset directory changed so that all its hashes fit what lies there."""

import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline import manifest

SHARD = "train/train-000000"
Members = list[tuple[str, bytes]]
ALL = tuple(f"train/train-{number:06d}" for number in range(3))


def remake(root: Path, change: Callable[[dict], object] = lambda body: None) -> None:
    """Make all hashes and sizes in dataset.json fit what lies there; then change it, and sign it again."""
    body = json.loads((root / "dataset.json").read_bytes())
    for name in body["files"]:
        data = (root / name).read_bytes()
        body["files"][name] = {"bytes": len(data), "sha256": manifest.sha256(data)}
    for shard in (shard for split in body["splits"].values() for shard in split["shards"]):
        shard["bytes"] = body["files"][shard["name"]]["bytes"]
    del body["checksum"], body["identity"]
    change(body)
    signed = {key: body[key] for key in manifest.IDENTITY_KEYS}
    body.setdefault("identity", manifest.sha256(manifest.canonical_json(signed)))
    checksum = manifest.sha256(manifest.canonical_json(body))
    (root / "dataset.json").write_bytes(manifest.canonical_json(body | {"checksum": checksum}))


def members_of(root: Path, shard: str = SHARD) -> Members:
    with tarfile.open(root / f"{shard}.tar") as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]


def rewrite(
    root: Path, members: Members, shard: str = SHARD, end: bytes = bytes(1024), padding: bytes = b"\0", **header: object
) -> None:
    """Replace a shard: tar, index, and its sample records but for labels. `header` goes to its first member."""
    tar, lines, places = b"", [], []
    for name, data in members:
        offset, info = len(tar) + 512, tarfile.TarInfo(name)
        if name.endswith(".jpg"):
            places.append((offset, len(data), zlib.crc32(data)))
            lines.append(f"jpg {offset} {len(data)} {name}")
        else:
            lines[-1] += f" {name[-3:]} {offset} {len(data)} {name}"
        info.size = len(data)
        for field, value in header.items() if not tar else ():
            setattr(info, field, value)
        tar += info.tobuf(tarfile.USTAR_FORMAT) + data + padding * (-len(data) % 512)
    (root / f"{shard}.tar").write_bytes(tar + end)
    (root / f"{shard}.idx").write_text("".join(f"{line}\n" for line in [f"v1.2 {len(lines)}", *lines]))
    samples = np.load(root / "train/samples.npy")
    for i, place in zip(np.flatnonzero(samples["shard"] == int(shard[-6:])), places):
        samples["offset"][i], samples["size"][i], samples["crc32"][i] = place
    np.save(root / "train/samples.npy", samples)
