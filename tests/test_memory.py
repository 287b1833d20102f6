"""Memory: what headers and tags will cost is counted beforehand, and no picture takes a process beyond a bound."""

import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import LIMITS, ROOT, picture, reason, saved
from pipeline import manifest
from pipeline.decode import decode
from reference import png, png_chunk, tiff_directory

PIXELS = 64 * 64
KINDS = {  # form, mode, options → bytes that are held per pixel: Pillow's pictures, and libjpeg's coefficients
    "baseline": ("JPEG", "RGB", {}, 4),
    "progressive 4:2:0": ("JPEG", "RGB", {"progressive": True, "subsampling": 2}, 7),  # 2 bytes × (1 + ¼ + ¼) samples
    "progressive 4:2:2": ("JPEG", "RGB", {"progressive": True, "subsampling": 1}, 8),
    "progressive 4:4:4": ("JPEG", "RGB", {"progressive": True, "subsampling": 0}, 10),
    "progressive CMYK": ("JPEG", "CMYK", {"progressive": True}, 16),
    "PNG": ("PNG", "RGBA", {}, 8),
    "WebP": ("WEBP", "RGB", {}, 20),
    "GIF": ("GIF", "P", {}, 8),
    "BMP": ("BMP", "RGB", {}, 8),
}


@pytest.mark.parametrize("name", KINDS)
def test_memory_is_a_matter_of_the_header(name: str, monkeypatch: pytest.MonkeyPatch):
    """The verdict of small pictures under a small limit, to the byte."""
    form, mode, options, per_pixel = KINDS[name]
    data = saved(picture("header", 64, 64).convert(mode), form, **options)
    if form == "JPEG":
        scan = data.index(b"\xff\xda") + 2
        more = len(data) + 2 * (scan + int.from_bytes(data[scan : scan + 2], "big"))
    else:
        more = len(data) * {"PNG": 2, "WEBP": 3, "GIF": 2, "BMP": 1}[form] + 24 * 64
    monkeypatch.setattr("pipeline.decode.HELD_BYTES", PIXELS * per_pixel + more)
    assert decode(data, **LIMITS).size == (64, 64)
    monkeypatch.setattr("pipeline.decode.HELD_BYTES", PIXELS * per_pixel + more - 1)
    assert reason(data) == "too_many_pixels"


def test_tags_that_share_their_bytes_are_counted(monkeypatch: pytest.MonkeyPatch):
    def with_exif(tiff: bytes) -> bytes:
        exif = b"Exif\0\0" + tiff
        return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + jpeg[2:]

    jpeg, bomb = saved(picture("tags", 20, 10), "JPEG"), tiff_directory(2700, 7, 30_000)
    assert reason(bomb) == reason(with_exif(bomb)) == "too_many_bytes"
    assert decode(with_exif(tiff_directory(2700, 7, 10**9)), **LIMITS).size == (
        20,
        10,
    )  # never kept: more than there is
    tags = with_exif(tiff_directory(1000, 7, 100))  # 100,000 bytes, of the quarter of the limit that tags may take
    monkeypatch.setattr("pipeline.decode.HELD_BYTES", 400_000)
    assert decode(tags, **LIMITS).size == (20, 10)
    monkeypatch.setattr("pipeline.decode.HELD_BYTES", 400_000 - 4)
    assert reason(tags) == "too_many_bytes"


# A child process does all that the builder does to a picture.
CHILD = """
import re, sys
from pathlib import Path
from pipeline.decode import ImageError, decode
from pipeline.image import encode, rescale
from pipeline.offline.statistics import Sums
kernel, crop = sys.argv[2:]
try:
    data = Path(sys.argv[1]).read_bytes()
    image = decode(data, max_bytes=32 * 2**20, max_pixels=64 * 10**6, max_scans=100)
    pixels = rescale(image, 256, kernel, crop)
    Sums.zero(256 if crop == "centre" else 1).add(pixels)
    verdict = f"{len(encode(pixels, quality=95, subsampling='4:2:0')) > 0}"
except ImageError as error:
    verdict = error.code
print(verdict, re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
MOST = 332_000  # KiB, that is 340 MB; the builder's other modules take less than 10 MB, which makes 350


def verdict_within_memory(data: bytes, folder: Path, kernel: str = "bicubic", crop: str = "centre") -> str:
    """What becomes of a picture in a fresh process, whose peak of resident memory stays below `MOST`."""
    path = folder / "picture"
    path.write_bytes(data)
    command = [sys.executable, "-c", CHILD, str(path), kernel, crop]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    verdict, peak = found.stdout.split()
    assert int(peak) < MOST, f"{int(peak) // 1024} MiB, {verdict}"
    return verdict


def drawn(mode: str, form: str, side: int, **options: object) -> Callable[[], bytes]:
    return lambda: saved(Image.new("RGB", (side, side), (200, 30, 90)).convert(mode), form, **options)


def written(side: int, colour: int, depth: int = 8, **options: object) -> Callable[[], bytes]:
    return lambda: png(side, side, colour, depth, **options)  # type: ignore[arg-type]


TEXT = png_chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress("😀".encode() + b"a" * (2**20 - 8)))
HEAVY = {  # each at its limit, or beyond: what is accepted and what not
    "PNG with alpha": (written(5900, 6), "True"),
    "TIFF in one strip": (drawn("RGB", "TIFF", 4200, compression="tiff_lzw", strip_size=2**31 - 1), "True"),
}
HEAVIER = {
    "64 MP JPEG, 26 MiB": (lambda: drawn("RGB", "JPEG", 8000)().ljust(26 * 2**20, b"\0"), "True"),
    "grey with a warning": (lambda: drawn("L", "JPEG", 7500)()[:-2] + bytes(9) + b"\xff\xd9", "True"),
    "grey beyond, with a warning": (
        lambda: drawn("L", "JPEG", 8000)()[:-2] + bytes(9) + b"\xff\xd9",
        "too_many_pixels",
    ),
    "with a warning": (lambda: drawn("RGB", "JPEG", 8000)()[:-2] + bytes(9) + b"\xff\xd9", "True"),
    "truncated": (lambda: drawn("RGB", "JPEG", 8000)()[:500_000], "truncated"),
    "progressive 4:4:4": (drawn("RGB", "JPEG", 5270, progressive=True, subsampling=0), "True"),
    "progressive grey": (drawn("L", "JPEG", 6820, progressive=True), "True"),
    "progressive beyond": (drawn("L", "JPEG", 7200, progressive=True), "too_many_pixels"),
    "progressive CMYK": (drawn("CMYK", "JPEG", 4200, progressive=True), "True"),
    "CMYK": (drawn("CMYK", "JPEG", 5880), "True"),
    "PNG beyond": (written(6100, 6), "too_many_pixels"),
    "PNG interlaced": (written(5900, 6, interlaced=True), "True"),
    "PNG 16 bits RGBA": (written(5890, 6, 16), "True"),
    "PNG palette, transparent": (written(5900, 3, chunks=png_chunk(b"tRNS", bytes(range(200)))), "True"),
    "PNG high": (lambda: png(3, 4_000_000, 2), "True"),
    "PNG with texts": (written(3000, 6, chunks=TEXT * 60), "too_many_pixels"),
    "WebP": (drawn("RGB", "WEBP", 3730, method=0), "True"),
    "WebP of noise": (
        lambda: saved(Image.frombytes("RGB", (3200, 3000), os.urandom(28_800_000)), "WEBP", lossless=True, quality=0),
        "True",
    ),
    "GIF transparent": (drawn("P", "GIF", 5600, transparency=3), "True"),
    "BMP": (drawn("RGB", "BMP", 3300), "True"),
    **{
        f"TIFF {mode}": (drawn(mode, "TIFF", 4100, compression=compression, strip_size=strip), "True")
        for mode, compression, strip in (
            ("RGBA", "tiff_lzw", 2**31 - 1),
            ("CMYK", "tiff_adobe_deflate", 2**31 - 1),
            ("LA", "tiff_adobe_deflate", 2**16),
            ("P", "tiff_lzw", 2**31 - 1),
        )
    },
    "TIFF as JPEG": (drawn("YCbCr", "TIFF", 4200, compression="jpeg", strip_size=2**31 - 1), "True"),
}


@pytest.mark.parametrize("name", HEAVY)
def test_memory_is_bounded(name: str, tmp_path: Path):
    make, verdict = HEAVY[name]
    assert verdict_within_memory(make(), tmp_path) == verdict


@pytest.mark.proof
@pytest.mark.parametrize("name", HEAVIER)
def test_memory_is_bounded_for_every_kind(name: str, tmp_path: Path):
    make, verdict = HEAVIER[name]
    assert verdict_within_memory(make(), tmp_path) == verdict


@pytest.mark.proof
@pytest.mark.parametrize("sides", [(8000, 8000), (32_000, 2000)])
@pytest.mark.parametrize(("kernel", "crop"), [("bicubic", "none"), ("area", "none"), ("area", "centre")])
def test_memory_is_bounded_for_every_way_of_rescaling(sides: tuple[int, int], kernel: str, crop: str, tmp_path: Path):
    assert verdict_within_memory(saved(Image.new("RGB", sides), "JPEG"), tmp_path, kernel, crop) == "True"


# The builder itself, in a process of its own: the peak of it and its workers, the largest of them.
BUILDER = """
import resource, subprocess, sys
subprocess.run([sys.executable, "tools/build_shards.py", *sys.argv[1:]], check=True, capture_output=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.proof
@pytest.mark.parametrize(
    ("sides", "padding", "crop"), [((8000, 8000), 26 * 2**20, "centre"), ((2000, 32_000), 0, "none")]
)
def test_a_worker_stays_below_350_megabytes(sides: tuple[int, int], padding: int, crop: str, tmp_path: Path):
    """The two pictures that take most of all in this file."""
    heaviest = saved(Image.new("RGB", sides, (200, 30, 90)), "JPEG").ljust(padding, b"\0")
    for name, data in (("a/1.jpg", heaviest), ("b/2.jpg", saved(picture("light", 300, 300), "JPEG"))):
        (tmp_path / "raw" / name).parent.mkdir(parents=True)
        (tmp_path / "raw" / name).write_bytes(data)
    command = [sys.executable, "-c", BUILDER, str(tmp_path / "raw"), str(tmp_path / "out"), "--workers", "1"]
    found = subprocess.run([*command, "--crop", crop], cwd=ROOT, capture_output=True, text=True, check=True)
    assert sum(split.samples for split in manifest.load(tmp_path / "out").splits.values()) == 2
    assert int(found.stdout) * 1024 < 350_000_000


def test_later_frames_cost_nothing(tmp_path: Path):
    """The second frame again and again, to 20 MiB of GIF; animated PNG and WebP; a chain of 500,000 TIFF pages."""
    frames = [Image.new("RGB", (100, 100), (i, 255 - i, 9)) for i in range(250)]
    animated = {
        form: saved(frames[0], form, save_all=True, append_images=frames[1:]) for form in ("GIF", "PNG", "WEBP")
    }
    second = animated["GIF"].index(b"\x21\xf9", animated["GIF"].index(b"\x2c"))
    animated["GIF"] = animated["GIF"][:-1] + animated["GIF"][second:-1] * (20 * 2**20 // len(animated["GIF"])) + b";"
    tiff = bytearray(saved(frames[0], "TIFF"))
    (first,) = struct.unpack_from("<I", tiff, 4)
    (tags,) = struct.unpack_from("<H", tiff, first)
    struct.pack_into("<I", tiff, first + 2 + 12 * tags, len(tiff))
    chain = (struct.pack("<HHHIII", 1, 256, 4, 1, 8, len(tiff) + 18 * (i + 1)) for i in range(500_000))
    animated["TIFF"] = bytes(tiff) + b"".join(chain)
    for form, data in animated.items():
        pixels = np.asarray(decode(data, **LIMITS))
        assert np.abs(pixels.astype(int) - [0, 255, 9]).max() <= 5, form
        assert verdict_within_memory(data, tmp_path) == "True"
