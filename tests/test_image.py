"""Rescaling and encoding against Pillow's own steps, and the bounded memory of a picture's way to a shard."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from conftest import LIMITS, ROOT, picture, reason, saved
from pipeline import manifest
from pipeline.decode import ImageError, decode
from pipeline.image import codec_versions, encode, pixels_of, rescale
from reference import jpeg_pixels, png, png_chunk, tiff_directory, two_step_rescale


def rgb(image: Image.Image, size: int = 256, kernel: str = "bicubic", crop: str = "centre") -> np.ndarray:
    """Return the colours of `rescale`'s RGBX."""
    pixels = rescale(image, size, kernel, crop)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 4
    assert pixels.flags.c_contiguous
    return pixels[..., :3]


@pytest.mark.parametrize("sides", [(256, 256), (375, 500), (257, 256), (64, 48), (1, 9), (3000, 20), (1021, 767)])
def test_rescaling_equals_resize_and_crop(sides: tuple[int, int]):
    image = picture("scale", *sides)
    ours, theirs = rgb(image, 256).astype(int), two_step_rescale(image, 256).astype(int)
    assert ours.shape == (256, 256, 3)
    assert np.abs(ours - theirs).max() <= 1
    error = ((ours - theirs) ** 2).mean()
    assert error == 0 or 10 * np.log10(255**2 / error) > 60  # dB


def test_real_photographs_are_decoded_as_by_pillow_and_rescaled_as_in_two_steps(shared: Path):
    ratios = []
    for path in sorted((shared / "imagenet-sample").iterdir()):
        data = path.read_bytes()
        simplejpeg.decode_jpeg(data, "RGBX", strict=True)  # libjpeg-turbo has nothing against it
        image, theirs = decode(data, **LIMITS), Image.open(path).convert("RGB")
        assert image.mode == "RGB"
        assert (np.asarray(image) == np.asarray(theirs)).all(), path.name
        ours = rgb(image)
        error = ((ours.astype(float) - two_step_rescale(theirs, 256)) ** 2).mean()
        ratios.append(99.0 if error == 0 else 10 * np.log10(255**2 / error))
    assert len(ratios) >= 400
    assert np.mean(ratios) >= 60  # dB
    assert min(ratios) >= 50


@pytest.mark.parametrize("sides", [(515, 384), (257, 900), (1600, 300)])
def test_the_square_of_a_whole_picture_is_the_cropped_one(sides: tuple[int, int]):
    """By areas; bicubic whole pictures are compared with Pillow's in test_statistics.py."""
    uncropped, square = rgb(picture("whole", *sides), 256, "area", "none"), rgb(picture("whole", *sides), 256, "area")
    long = int(256 * max(sides) / min(sides))
    assert uncropped.shape == ((256, long, 3) if sides[0] >= sides[1] else (long, 256, 3))
    top, left = round((uncropped.shape[0] - 256) / 2), round((uncropped.shape[1] - 256) / 2)
    assert (uncropped[top : top + 256, left : left + 256] == square).all()


def test_a_whole_picture_may_be_sixteen_times_as_long_as_wide():
    assert rgb(Image.new("RGB", (10, 160)), 256, crop="none").shape == (4096, 256, 3)
    for sides in ((10, 161), (20_000, 1)):
        with pytest.raises(ImageError, match="too_many_pixels"):
            rgb(Image.new("RGB", sides), 256, crop="none")
        assert rgb(Image.new("RGB", sides), 256).shape == (256, 256, 3)
    with pytest.raises(ImageError, match="too_many_pixels"):
        rgb(Image.new("RGB", (10, 160)), 5000, crop="none")  # 80,000 rows: libjpeg writes 65,500


@pytest.mark.parametrize("sides", [(512, 512), (300, 257), (500, 375), (375, 900)])
def test_area_is_the_mean_over_the_covered_area(sides: tuple[int, int]):
    image = picture("area", *sides)
    means = rgb(image, 256, "area").astype(float)
    width, height = sides
    short, long = min(sides), max(sides)
    rescaled = int(256 * long / short)
    start = round((rescaled - 256) / 2)
    left, top = (start, 0) if width >= height else (0, start)
    step_x, step_y = (long / rescaled, short / 256) if width >= height else (short / 256, long / rescaled)

    def covered(pixels: int, first: float, step: float) -> np.ndarray:
        """Return the part of each pixel between `first` and `first` + `step`."""
        position = np.arange(pixels)
        return np.clip(np.minimum(position + 1, first + step) - np.maximum(position, first), 0, 1)

    for y, x in ((0, 0), (17, 200), (128, 128), (255, 255)):
        columns, rows = covered(width, (left + x) * step_x, step_x), covered(height, (top + y) * step_y, step_y)
        expected = np.einsum("h,w,hwc->c", rows, columns, np.asarray(image)) / (step_x * step_y)
        assert np.abs(means[y, x] - expected).max() <= 0.51
    assert (rgb(Image.new("RGB", sides, (7, 99, 250)), 256, "area") == [7, 99, 250]).all()
    small = picture("small", 100, 80)
    assert (rgb(small, 256, "area") == rgb(small, 256)).all()


@pytest.mark.parametrize(("subsampling", "factors"), [("4:4:4", (1, 1)), ("4:2:2", (2, 1)), ("4:2:0", (2, 2))])
def test_encoded_jpeg_is_close_and_plain(subsampling: str, factors: tuple[int, int]):
    """The bytes are Pillow's for the RGB picture: JFIF and no other metadata; one baseline scan."""
    for sides in ((256, 256), (341, 256), (100, 75)):
        image = picture("jpeg", *sides)
        data = encode(pixels_of(image), quality=95, subsampling=subsampling)
        assert data == saved(image, "JPEG", quality=95, subsampling=subsampling)
        with Image.open(io.BytesIO(data)) as stored:
            assert (stored.format, stored.mode, stored.size) == ("JPEG", "RGB", sides)
            assert [name for name, _ in stored.applist] == ["APP0"]  # type: ignore[attr-defined]
            assert stored.layer[0][1:3] == factors  # type: ignore[attr-defined]
            assert "progressive" not in stored.info
        assert (data.count(b"\xff\xc0"), data.count(b"\xff\xda")) == (1, 1)
        assert np.abs(jpeg_pixels(data).astype(int) - np.asarray(image)).mean() < 6
        padded = pixels_of(image).copy()
        padded[..., 3] = 77  # padding, which means nothing
        assert encode(padded, quality=95, subsampling=subsampling) == data


def test_codec_versions_name_what_decides_bytes():
    assert set(codec_versions()) == {"pillow-simd", "simplejpeg", "jpeg", "png", "webp", "tiff"}
    assert all(version != "None" for version in codec_versions().values())


def test_sharing_memory_changes_no_pixel():
    """Resample pixels in numpy's memory and in Pillow-SIMD's own."""
    for sides in ((517, 389), (64, 700), (2, 3)):
        data = saved(picture("memory", *sides), "JPEG", quality=97)
        theirs = Image.open(io.BytesIO(data)).convert("RGB")
        for kernel in ("bicubic", "area"):
            assert (rgb(decode(data, **LIMITS), 256, kernel) == rgb(theirs, 256, kernel)).all()


# Memory


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
    lying = with_exif(tiff_directory(2700, 7, 10**9))  # never kept: more than there is
    assert decode(lying, **LIMITS).size == (20, 10)
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
    pixels = rescale(image, 256, kernel, crop, len(data))
    Sums.zero(256 if crop == "centre" else 1).add(pixels)
    verdict = f"{len(encode(pixels, quality=95, subsampling='4:2:0')) > 0}"
except ImageError as error:
    verdict = error.code
print(verdict, re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
MOST = 332_000  # KiB, that is 340 MB; the builder's other modules take less than 10 MB, which makes 350


def verdict_within_memory(data: bytes, folder: Path, kernel: str = "bicubic", crop: str = "centre") -> str:
    """Return the verdict on a picture of a fresh process, whose peak of resident memory must stay below `MOST`."""
    path = folder / "picture"
    path.write_bytes(data)
    command = [sys.executable, "-c", CHILD, str(path), kernel, crop]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    verdict, peak = process.stdout.split()
    assert int(peak) < MOST, f"{int(peak) // 1024} MiB, {verdict}"
    return verdict


def flat(mode: str, form: str, side: int, **options: object) -> bytes:
    return saved(Image.new("RGB", (side, side), (200, 30, 90)).convert(mode), form, **options)


TEXT = png_chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress("😀".encode() + b"a" * (2**20 - 8)))
PLAIN_TEXT = png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + "😀".encode() + b"a" * (2**22 - 40))
STRIP, FEW_ROWS, WARNED = {"strip_size": 2**31 - 1}, {"strip_size": 2**16}, bytes(9) + b"\xff\xd9"
HEAVY = {  # each at its limit
    "64 MP JPEG, 18 MiB": lambda: flat("RGB", "JPEG", 8000).ljust(18 * 2**20, b"\0"),
    "grey with a warning": lambda: flat("L", "JPEG", 7500)[:-2] + WARNED,
    "with a warning": lambda: flat("RGB", "JPEG", 8000)[:-2] + WARNED,
    "progressive 4:4:4": lambda: flat("RGB", "JPEG", 5270, progressive=True, subsampling=0),
    "progressive grey": lambda: flat("L", "JPEG", 6820, progressive=True),
    "progressive CMYK": lambda: flat("CMYK", "JPEG", 4200, progressive=True),
    "CMYK": lambda: flat("CMYK", "JPEG", 5880),
    "PNG with alpha": lambda: png(5900, 5900, 6),
    "PNG 16 bits RGBA": lambda: png(5890, 5890, 6, 16),
    "PNG palette, transparent": lambda: png(5900, 5900, 3, chunks=png_chunk(b"tRNS", bytes(range(200)))),
    "PNG high": lambda: png(3, 4_000_000, 2),
    "PNG with texts": lambda: png(5600, 5600, 6, chunks=TEXT * 60),
    "PNG with a long text": lambda: png(5600, 5600, 6, chunks=PLAIN_TEXT),
    "WebP": lambda: flat("RGB", "WEBP", 3730, method=0),
    "WebP of noise": lambda: saved(
        Image.frombytes("RGB", (3200, 3000), os.urandom(28_800_000)), "WEBP", lossless=True, quality=0
    ),
    "GIF transparent": lambda: flat("P", "GIF", 5600, transparency=3),
    "BMP": lambda: flat("RGB", "BMP", 3300),
    "TIFF in one strip": lambda: flat("RGB", "TIFF", 4200, compression="tiff_lzw", **STRIP),
    "TIFF CMYK": lambda: flat("CMYK", "TIFF", 4100, compression="tiff_adobe_deflate", **STRIP),
    "TIFF LA": lambda: flat("LA", "TIFF", 4100, compression="tiff_adobe_deflate", **FEW_ROWS),
    "TIFF as JPEG": lambda: flat("YCbCr", "TIFF", 4200, compression="jpeg", **STRIP),
}
TOO_HEAVY = {
    "truncated": (lambda: flat("RGB", "JPEG", 8000)[:500_000], "truncated"),
    "64 MP JPEG, 26 MiB": (lambda: flat("RGB", "JPEG", 8000).ljust(26 * 2**20, b"\0"), "too_many_pixels"),
    "larger grey with a warning": (lambda: flat("L", "JPEG", 8000)[:-2] + WARNED, "too_many_pixels"),
    "progressive": (lambda: flat("L", "JPEG", 7200, progressive=True), "too_many_pixels"),
    "larger PNG": (lambda: png(6100, 6100, 6), "too_many_pixels"),
    "larger PNG with texts": (lambda: png(5900, 5900, 6, chunks=TEXT * 60), "too_many_pixels"),
}


@pytest.mark.proof
@pytest.mark.parametrize("name", [*HEAVY, *TOO_HEAVY])
def test_memory_is_bounded(name: str, tmp_path: Path):
    make, verdict = TOO_HEAVY.get(name) or (HEAVY[name], "True")
    assert verdict_within_memory(make(), tmp_path) == verdict


@pytest.mark.proof
@pytest.mark.parametrize("sides", [(8000, 8000), (30_800, 2000)])
@pytest.mark.parametrize(("kernel", "crop"), [("bicubic", "none"), ("area", "none"), ("area", "centre")])
def test_memory_is_bounded_for_every_way_of_rescaling(sides: tuple[int, int], kernel: str, crop: str, tmp_path: Path):
    assert verdict_within_memory(saved(Image.new("RGB", sides), "JPEG"), tmp_path, kernel, crop) == "True"


# The builder itself, in a process of its own: the peak of it and its workers, the largest of them.
BUILDER = """
import resource, subprocess, sys
subprocess.run([sys.executable, "tools/build_shards.py", *sys.argv[1:]], check=True, capture_output=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def test_a_picture_is_refused_whose_two_passes_take_too_much():
    assert rescale(Image.new("RGB", (30_800, 2000)), 256, crop="none").shape == (256, 3942, 4)
    for image, size in ((Image.new("RGB", (32_000, 2000)), 256), (Image.new("RGB", (7900, 7900)), 1024)):
        with pytest.raises(ImageError, match="too_many_pixels"):
            rescale(image, size, crop="none")


@pytest.mark.proof
@pytest.mark.parametrize(
    ("sides", "padding", "crop"), [((8000, 8000), 18 * 2**20, "centre"), ((2000, 30_800), 0, "none")]
)
def test_a_worker_stays_below_350_megabytes(sides: tuple[int, int], padding: int, crop: str, tmp_path: Path):
    """Build the two pictures that take most of all in this file."""
    heaviest = saved(Image.new("RGB", sides, (200, 30, 90)), "JPEG").ljust(padding, b"\0")
    for name, data in (("a/1.jpg", heaviest), ("b/2.jpg", saved(picture("light", 300, 300), "JPEG"))):
        (tmp_path / "raw" / name).parent.mkdir(parents=True)
        (tmp_path / "raw" / name).write_bytes(data)
    command = [sys.executable, "-c", BUILDER, str(tmp_path / "raw"), str(tmp_path / "out"), "--workers", "1"]
    process = subprocess.run([*command, "--crop", crop], cwd=ROOT, capture_output=True, text=True, check=True)
    assert sum(split.samples for split in manifest.load(tmp_path / "out").splits.values()) == 2
    assert int(process.stdout) * 1024 < 350_000_000


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
