"""The raw tier: the records of a data set in files beside its shards, and the manifest that lists them."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
from msgspec import Meta

from pipeline import UserError, storage
from pipeline.manifest import DatasetError, Manifest, canonical_json, sha256
from pipeline.records import record_bytes
from pipeline.typed import Count, Sha256, from_values

FORMAT = 1
FILE_NAME = "tier.json"
SUFFIX = ".raw"
DIGEST = np.dtype("<u8")  # of a record, by `records.digest`; after the records of a file, one for each
Name = Annotated[str, Meta(pattern=r"^(train|val|test)-[0-9]{6}\.raw\Z")]


@dataclass(frozen=True)
class TierFile:
    """A file of a tier: the records of a shard's samples in their order, then their digests."""

    bytes: Count
    sha256: Sha256
    shard_sha256: Sha256  # of the shard that it was made from


class _Content(TypedDict):
    """The keys of tier.json, but for its checksum."""

    format: Literal[1]
    kind: Literal["rgb", "yuv420"]
    size: Annotated[int, Meta(ge=16, le=1024)]
    codec: Sha256
    built_with: dict[str, str]
    files: dict[Name, TierFile]


@dataclass(frozen=True)
class Tier:
    """tier.json, and the folder it stands in."""

    root: Path
    kind: str  # of `records.KINDS`
    size: int  # pixels of a side of every picture
    codec: str  # `records.fingerprint` of the machine that decoded them
    built_with: Mapping[str, str]  # that machine's codecs
    files: Mapping[str, TierFile]

    @property
    def record_bytes(self) -> int:
        return record_bytes(self.kind, self.size)

    def is_of(self, dataset: Manifest, kind: str) -> bool:
        """Return whether it holds records of this kind, of the shards that the data set has now."""
        shards = [shard.name for split in dataset.splits.values() for shard in split.shards]
        digests = {file_of(name): dataset.files[name].sha256 for name in shards}
        same = digests == {name: file.shard_sha256 for name, file in self.files.items()}
        return same and (self.kind, self.size) == (kind, dataset.recipe.size)

    def to_json(self) -> bytes:
        """Return the canonical bytes of tier.json, with a `checksum` over everything but itself."""
        body = {"format": FORMAT} | asdict(replace(self, root=Path()))
        del body["root"]
        return canonical_json(body | {"checksum": sha256(canonical_json(body))})


def folder(root: Path, kind: str) -> Path:
    """Return the folder of a data set's tier."""
    return root / f"raw-{kind}"


def file_of(shard: str) -> str:
    """Return the name of the tier's file for a shard SPLIT/SPLIT-NNNNNN.tar."""
    return Path(shard).stem + SUFFIX


def build_command(dataset: Manifest, kind: str) -> str:
    """Return the command that makes the tier, or makes it whole again."""
    return f"python tools/raw_tier.py {shlex.quote(str(dataset.root))} --format {kind}"


def parse(data: bytes, root: Path) -> Tier:
    """Parse the bytes of tier.json. Raises DatasetError if a byte was changed or the format is another."""
    try:
        body: dict[str, Any] = json.loads(data)
        checksum = body.pop("checksum")
        if data != canonical_json(body | {"checksum": checksum}) or checksum != sha256(canonical_json(body)):
            raise UserError("its checksum does not fit its content")
        content = from_values(body, _Content)
        own = content["kind"], content["size"], content["codec"], content["built_with"]
        tier = Tier(root, *own, content["files"])
        if tier.to_json() != data:
            raise UserError("an unknown key, or another kind of number")
        return tier
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DatasetError(f"{root / FILE_NAME}: damaged, or of another version of Penstock ({error})") from error


def load(dataset: Manifest, kind: str) -> Tier:
    """Load the tier of a local data set; check that it is of its shards, and that its files have their sizes.

    Raises DatasetError, with the command that makes the tier.
    """
    remedy = f"make it: {build_command(dataset, kind)}"
    if not isinstance(dataset.root, Path):
        raise DatasetError(f"{dataset.root}: a raw tier is read from this machine's disk; copy the data set here")
    root = folder(dataset.root, kind)
    path = root / FILE_NAME
    try:
        data = storage.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DatasetError(f"{path}: missing; {remedy}") from error
    try:
        tier = parse(data, root)
    except DatasetError as error:
        raise DatasetError(f"{error}; {remedy}") from error
    if not tier.is_of(dataset, kind):
        raise DatasetError(f"{path}: made from other shards; {remedy}")
    shards = {file_of(shard.name): shard for split in dataset.splits.values() for shard in split.shards}
    sizes = storage.sizes(root, tier.files)
    for name, file in tier.files.items():
        expected = shards[name].samples * (tier.record_bytes + DIGEST.itemsize)
        if sizes.get(name) != expected or file.bytes != expected:
            state = f"has {sizes[name]:,} bytes" if name in sizes else "missing, or not a regular file"
            raise DatasetError(f"{root / name}: {state}, {expected:,} promised; {remedy}")
    return tier
