"""The verification of raw tiers: each flipped byte, other pictures under right digests, tier.json that lies."""

import hashlib
import json
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest
from click.testing import Result

from conftest import build, make_tier, one_line, picture
from conftest import verify as verify_with
from damaged import canonical, mutate
from pipeline import manifest, records, tier
from pipeline.manifest import DatasetError
from pipeline.offline import verify_tiers
from pipeline.offline.raw_tier import WORK_FOLDER
from stored import damage


def verify(root: Path, *options: object) -> Result:
    return verify_with(root, "--workers", 1, *options)


@pytest.mark.parametrize("kind", records.KINDS)
@pytest.mark.parametrize("stride", [61, pytest.param(1, marks=pytest.mark.proof)])
def test_verification_finds_each_flipped_byte(tmp_path: Path, kind: str, stride: int):
    """Of five pictures of 16 pixels, their digests, and tier.json."""
    for name in ("train/a/0", "train/a/1", "train/b/2", "val/a/3", "val/b/4"):
        (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(name, 20, 24).save(tmp_path / "raw" / f"{name}.png")
    root = tmp_path / "dataset"
    assert build(tmp_path / "raw", root, "--size", 16, "--workers", 1).exit_code == 0
    assert make_tier(root, "--format", kind).exit_code == 0
    data = manifest.load(root)
    for path in sorted((root / f"raw-{kind}").iterdir()):
        content = path.read_bytes()
        for at in range(0, len(content), stride):
            with open(path, "r+b") as file:
                os.pwrite(file.fileno(), bytes([content[at] ^ 1 << at % 8]), at)
            (failure,) = verify_tiers.check(data, quick=True, workers=1)
            assert failure.file == f"raw-{kind}/{path.name}", at
            assert failure.reason.endswith(f"; mend it: python tools/raw_tier.py {root} --format {kind}")
            assert "\n" not in failure.reason
            if path.suffix == ".json":
                with pytest.raises(DatasetError) as caught:
                    tier.load(data, kind)
                one_line(caught, str(path), "tools/raw_tier.py")
            path.write_bytes(content)
    assert not verify_tiers.check(data, quick=False, workers=1)


def other_picture(content: bytearray, size: int, count: int) -> None:
    """Put the second picture of a file and its digest in place of the first ones."""
    content[:size] = content[size : 2 * size]
    content[count * size : count * size + 8] = content[count * size + 8 : count * size + 16]


def other_digest(content: bytearray, size: int, count: int) -> None:
    content[count * size] ^= 1


def longer(content: bytearray, size: int, count: int) -> None:
    content.append(0)


def unchanged(content: bytearray, size: int, count: int) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "sha256", "quick", "message"),
    [
        (other_picture, "", "all holds", "picture 0 is not that of its shard"),
        (other_digest, "", "", "picture 0 is not that of its digest"),
        (unchanged, "0" * 64, "", "its SHA-256 is not that of tier.json"),
        (longer, "", "", "has 27,721 bytes, 27,721 are promised, its pictures need 27,720"),
    ],
)
def test_verification_finds_what_tier_json_lists(root: Path, change: Any, sha256: str, quick: str, message: str):
    """A file whose bytes and SHA-256 fit, or a wrong SHA-256 alone."""
    assert make_tier(root).exit_code == 0
    data, path = manifest.load(root), root / "raw-rgb" / "val-000000.raw"
    made, content = tier.load(data, "rgb"), bytearray(path.read_bytes())
    change(content, 3 * 32 * 32, data.split("val").samples)
    path.write_bytes(content)
    sha256 = sha256 or hashlib.sha256(content).hexdigest()
    changed = tier.TierFile(len(content), sha256, made.files[path.name].shard_sha256)
    files = {**made.files, path.name: changed}
    lying = tier.Tier(made.root, made.kind, made.size, made.codec, made.built_with, files)
    (made.root / "tier.json").write_bytes(lying.to_json())
    assert verify(root, "--quick").stdout.startswith(quick or f"raw-rgb/val-000000.raw: {message}; mend it: ")
    result = verify(root)
    assert result.exit_code == 1
    assert result.stdout.startswith(f"raw-rgb/val-000000.raw: {message}; mend it: ")


def test_verification_names_what_does_not_belong(root: Path):
    assert make_tier(root).exit_code == 0
    (root / "raw-rgb" / "notes.txt").write_text("mine")
    (root / "raw-yuv420" / WORK_FOLDER).mkdir(parents=True)
    (root / "raw-rgb" / "train-000001.raw").unlink()
    result = verify(root)
    assert result.exit_code == 1
    lines = sorted(result.stdout.splitlines()[:3])
    assert lines[0] == "raw-rgb/notes.txt: not listed in tier.json; delete it"
    assert lines[1].startswith("raw-rgb/train-000001.raw: missing; mend it: ")
    assert lines[2].startswith("raw-yuv420/tier.json: missing: the tier is unfinished; mend it: ")
    damage(root, 3)
    result = verify(root)
    assert "note: raw tiers (rgb, yuv420) are not checked until the shards hold" in result.stdout


def test_a_tier_that_lies_is_a_line(root: Path, tmp_path: Path):
    """One thing in tier.json changed at random, under a checksum that fits."""
    assert make_tier(root).exit_code == 0
    data, path, random = manifest.load(root), root / "raw-rgb" / "tier.json", Random(4)
    before = json.loads(path.read_bytes())
    del before["checksum"]
    for _ in range(300):
        value, change = mutate(random, before)
        content = signed(value, tmp_path)
        path.write_bytes(content)
        try:
            found = tier.load(data, "rgb")
        except DatasetError as error:
            assert "\n" not in str(error), change
            assert len(str(error)) < 1000, change
        else:  # words that mean nothing to us
            assert found.files == tier.parse(signed(before, tmp_path), found.root).files, change


def signed(value: Any, case: Path) -> bytes:
    body = canonical(value, case)
    if not isinstance(value, dict):
        return body
    return canonical(value | {"checksum": hashlib.sha256(body).hexdigest()}, case)
