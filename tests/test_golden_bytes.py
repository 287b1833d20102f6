"""The bytes of four dataset directories, as recorded before the modules moved: a refactor must reproduce them."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from conftest import build, digests
from pipeline.image import codec_versions

CODECS = {"jpeg": "2.1.5", "pillow-simd": "12.1.1.post0", "simplejpeg": "1.9.0", "webp": "1.2.4", "tiff": "4.5.0"}
DESCRIPTIONS = {"dataset.json", "_info.json"}  # they may gain fields; the identity holds what determines the bytes

# SHA-256 over the lines "NAME SHA-256" of all other files, and the identity
GOLDEN = {
    "drawn": (
        "d518a6374d6ff3e28106d22608140945dccfc0e97a82b307b7e665f652e1a8fb",
        "2a0e2cc17490d7b27c9aaade057a1c3d678cb39d957357ff1a7256d23c6ade5e",
    ),
    "odd": (
        "8f1bd6b6c5bae9b499c5a041c062d1281ca0e164205aa3a668cffabff0912a9a",
        "c3e3a69e71ba626a2424d6079066481b5e721dabfbd57e2add9bd64c41417282",
    ),
    "clothing10": (
        "228badb4edcdcf672f57ac458e8229132ef55ca78197d6e69c2731577c9527f7",
        "f8db97d141b5fb8446d7055678c4c7a289b4fac964a77fb23bce7c92c46deda7",
    ),
    "imagenet-sample": (
        "cb3f3d310dd42a80b9edac7bea17b14ebb2a4dbcd56e9120114ad2180ac7cc48",
        "1858023d56035c0ca6cde5d6ea788d4340ee4fa512180a1e6408f93a744ea189",
    ),
}


def recorded(root: Path) -> tuple[str, str]:
    """Return the digest of the data files below `root`, and the manifest's identity."""
    lines = [f"{name} {digest}\n" for name, digest in digests(root).items() if name not in DESCRIPTIONS]
    identity = json.loads((root / "dataset.json").read_text())["identity"]
    return hashlib.sha256("".join(lines).encode()).hexdigest(), identity


@pytest.fixture(autouse=True)
def same_codecs() -> None:
    if other := {name: now for name in CODECS if (now := codec_versions().get(name)) != CODECS[name]}:
        pytest.skip(f"the bytes were recorded with other codecs than {other}")


def test_bytes_of_drawn_pictures(official: Path, tmp_path: Path):
    result = build(official, tmp_path / "out", "--allow-incomplete", "--samples-per-shard", 16, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert recorded(tmp_path / "out") == GOLDEN["drawn"]


def test_bytes_of_odd_pictures(shared: Path, tmp_path: Path):
    shutil.copytree(shared / "odd-images/files", tmp_path / "raw/odd")
    options = ("--layout", "class-folders", "--max-skipped", "100%", "--samples-per-shard", 32, "--workers", 1)
    result = build(tmp_path / "raw", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert recorded(tmp_path / "out") == GOLDEN["odd"]


@pytest.mark.parametrize(("name", "holdout"), [("clothing10", 0.1), ("imagenet-sample", 0)])  # one picture a class
def test_bytes_of_photographs(name: str, holdout: float, shared: Path, tmp_path: Path):
    result = build(shared / name, tmp_path / "out", "--workers", 2, "--holdout", holdout)
    assert result.exit_code == 0, result.output
    assert recorded(tmp_path / "out") == GOLDEN[name]
