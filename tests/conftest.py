"""Fixtures: a folder of pictures drawn here, a dataset built from it, and the real data beside the checkout, if any."""

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from tools.build_shards import main as build_shards

ROOT = Path(__file__).parent.parent
CLASSES = ("blobs", "checks", "stripes")


def picture(name: str, width: int, height: int) -> Image.Image:
    """A smooth random picture with some grain, a function of its name."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    coarse = random.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray(np.clip(smooth + random.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8))


def build(*arguments: object) -> Result:
    """Run tools/build_shards.py in this process."""
    return CliRunner().invoke(build_shards, [str(argument) for argument in arguments])


def drawn(kind: str, name: str, width: int, height: int) -> Image.Image:
    """`picture` with the class's pattern in it: nothing, a checkerboard, or stripes."""
    y, x = np.ogrid[:height, :width]
    dark = {"blobs": 0 * x * y, "checks": (x // 24 + y // 24) % 2, "stripes": y // 12 % 2 + 0 * x}[kind]
    return Image.fromarray((np.asarray(picture(name, width, height)) * (1 - 0.6 * dark[..., None])).astype(np.uint8))


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ of three classes: 42 and 9 pictures, the same file names in every class, one truncated."""
    folder = tmp_path_factory.mktemp("raw")
    for split, count in (("train", 14), ("val", 3)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                sides = (300 + 10 * i, 280) if i % 2 else (260, 300 + 7 * i)
                drawn(name, f"{split}{name}{i}", *sides).save(folder / split / name / f"{i:04d}.jpg", quality=90)
    victim = folder / "train" / "checks" / "0003.jpg"
    victim.write_bytes(victim.read_bytes()[:4000])
    (folder / "train" / "checks" / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture(scope="session")
def dataset(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`raw`, built in shards of 16. Read only: a test that damages a dataset copies it."""
    root = tmp_path_factory.mktemp("built") / "dataset"
    result = build(raw, root, "--workers", 1, "--samples-per-shard", 16)
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout."""
    folder = Path(os.environ.get("PENSTOCK_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data at {folder} (set PENSTOCK_SHARED)")
    return folder / "data"
