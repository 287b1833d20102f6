"""Stored pictures: read back, as views of a decoder, and replaced so that all hashes of the dataset fit."""

import json
import os
import tarfile
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import manifest
from pipeline.manifest import BuildRecipe
from pipeline.offline.plan import Plan, make_plan
from pipeline.offline.raw import Sources
from pipeline.offline.sources import find_sources
from pipeline.online.batch import Batch, Crops

SHARD = "train/train-000000"
Members = list[tuple[str, bytes]]
ALL = tuple(f"train/train-{number:06d}" for number in range(3))


def evaluation_plan(raw: Path, of: Path, classes: Collection[str] = (), **recipe: int | str) -> Plan:
    """Return the plan of RAW's validation pictures, of some classes or all, to evaluate the data set `of`."""
    known, sources = manifest.load(of), Sources("made up")
    for image in find_sources(raw).images:
        if image.split == "val" and (not classes or image.wnid in classes):
            sources.images.append(image)
    sources.classes, sources.evaluation_of = known.classes, known
    return make_plan(sources, BuildRecipe(**{"size": known.recipe.size} | recipe))


def jpegs(root: Path, split: str) -> list[bytes]:
    """Return the stored pictures in the order of the ids, by the manifest's records."""
    pictures = []
    for record in manifest.load(root).samples(split):
        shard = (root / split / f"{split}-{record['shard']:06d}.tar").read_bytes()
        pictures.append(shard[record["offset"] :][: record["size"]])
    return pictures


def decoded(decoder: Any, pictures: list[bytes], crops: Crops) -> np.ndarray:
    """Return the views that a decoder makes of a batch of pictures."""
    batch = Batch(0, 0, 0, len(pictures), np.arange(len(pictures)))
    batch.jpegs, batch.crops = [np.frombuffer(data, np.uint8) for data in pictures], crops
    decoder.submit(batch)
    _, (views, *_) = decoder.result()
    return np.asarray(views.cpu())


def misstate(root: Path, *samples: int) -> None:
    """Write another height into the frame headers of training pictures, whose CRC-32 then differs."""
    for record in manifest.load(root).samples("train")[[*samples]]:
        with open(root / f"train/train-{record['shard']:06d}.tar", "r+b") as file:
            file.seek(int(record["offset"]))
            data = file.read(int(record["size"]))
            file.seek(int(record["offset"]) + data.index(b"\xff\xc0") + 5)
            file.write(b"\x7f")


def remake(root: Path, change: Callable[[dict], object] = lambda body: None) -> None:
    """Make all hashes and sizes in dataset.json fit the files; then change it, and sign it again."""
    body = json.loads((root / "dataset.json").read_bytes())
    for name in [name for name in body["files"] if (root / name).exists()]:
        data = (root / name).read_bytes()
        body["files"][name] = {"bytes": len(data), "sha256": manifest.sha256(data)}
    for shard in (shard for split in body["splits"].values() for shard in split["shards"]):
        shard["bytes"] = body["files"][shard["name"]]["bytes"]
    del body["checksum"], body["identity"]
    change(body)
    signed = {key: body.get(key) for key in manifest.IDENTITY_KEYS}
    body.setdefault("identity", manifest.sha256(manifest.canonical_json(signed)))
    checksum = manifest.sha256(manifest.canonical_json(body))
    (root / "dataset.json").write_bytes(manifest.canonical_json(body | {"checksum": checksum}))


def members_of(root: Path, shard: str = SHARD) -> Members:
    with tarfile.open(root / f"{shard}.tar") as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]


def rewrite(root: Path, members: Members, shard: str = SHARD) -> None:
    """Replace a shard: tar, index, and its sample records but for labels."""
    tar, lines, records = b"", [], []
    for name, data in members:
        offset, info = len(tar) + 512, tarfile.TarInfo(name)
        if name.endswith(".jpg"):
            records.append((offset, len(data), zlib.crc32(data)))
            lines.append(f"jpg {offset} {len(data)} {name}")
        else:
            lines[-1] += f" {name[-3:]} {offset} {len(data)} {name}"
        info.size = len(data)
        tar += info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)
    (root / f"{shard}.tar").write_bytes(tar + bytes(1024))
    (root / f"{shard}.idx").write_bytes(os.fsencode("".join(f"{line}\n" for line in [f"v1.2 {len(lines)}", *lines])))
    samples = np.load(root / "train/samples.npy")
    for i, record in zip(np.flatnonzero(samples["shard"] == int(shard[-6:])), records):
        samples["offset"][i], samples["size"][i], samples["crc32"][i] = record
    np.save(root / "train/samples.npy", samples)


def damage(root: Path, *samples: int, split: str = "train") -> None:
    """Change a byte of some stored pictures: their CRC-32 differs."""
    for record in np.load(root / split / "samples.npy")[list(samples)]:
        shard = root / split / f"{split}-{record['shard']:06d}.tar"
        content = bytearray(shard.read_bytes())
        content[int(record["offset"]) + int(record["size"]) // 2] ^= 255
        shard.write_bytes(content)


def forge(root: Path, *samples: int) -> None:
    """Put bytes that do not decode in place of some training samples, with hashes, sizes and CRC-32 to fit."""
    records = manifest.load(root).samples("train")
    for shard in sorted({int(records["shard"][sample]) for sample in samples}):
        members = members_of(root, ALL[shard])
        first = int(np.flatnonzero(records["shard"] == shard)[0])
        jpegs = [i for i, (name, _) in enumerate(members) if name.endswith(".jpg")]
        for sample in samples:
            if records["shard"][sample] == shard:
                at = jpegs[sample - first]
                members[at] = (members[at][0], members[at][1][:300] + b"no JPEG" * 99)
        rewrite(root, members, ALL[shard])
    remake(root)
