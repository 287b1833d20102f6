"""Decoding and rescaling against Pillow's two steps, and every reason for leaving a picture out."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import picture
from pipeline.image import REASONS, ImageError, count_scans, decode, encode, rescale
from reference import jpeg_pixels, two_step_rescale

LIMITS = {"max_bytes": 64 * 2**20, "max_pixels": 64 * 10**6, "max_scans": 100}


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def reason(data: bytes, **limits: int) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, **{**LIMITS, **limits})
    return caught.value.code


@pytest.mark.parametrize(
    "sides", [(256, 256), (500, 375), (375, 500), (257, 256), (256, 511), (64, 48), (1, 9), (3000, 20), (1021, 767)]
)
def test_rescaling_equals_resize_and_crop(sides: tuple[int, int]):
    image = picture("scale", *sides)
    ours, theirs = rescale(image, 256).astype(int), two_step_rescale(image, 256).astype(int)
    assert ours.shape == (256, 256, 3)
    assert np.abs(ours - theirs).max() <= 1
    error = ((ours - theirs) ** 2).mean()
    assert error == 0 or 10 * np.log10(255**2 / error) > 60  # dB


def test_real_photographs_are_rescaled_as_in_two_steps(shared: Path):
    ratios = []
    for path in sorted((shared / "imagenet-sample").iterdir())[::20]:
        image = decode(path.read_bytes(), **LIMITS)
        error = ((rescale(image, 256).astype(float) - two_step_rescale(image, 256)) ** 2).mean()
        ratios.append(99.0 if error == 0 else 10 * np.log10(255**2 / error))
    assert len(ratios) >= 20
    assert np.mean(ratios) > 60
    assert min(ratios) > 50


@pytest.mark.parametrize("sides", [(512, 512), (1024, 768), (300, 257), (500, 375), (375, 900)])
def test_area_is_the_mean_over_the_covered_area(sides: tuple[int, int]):
    """Against pixels repeated so often that every covered area is whole: short side · 256 parts, means of blocks."""
    image = picture("area", *sides)
    found = rescale(image, 256, "area").astype(float)
    width, height = sides
    short, long = min(sides), max(sides)
    rescaled = int(256 * long / short)
    start = round((rescaled - 256) / 2)
    for y, x in ((0, 0), (17, 200), (128, 128), (255, 255)):
        low_x, low_y = (start, 0) if width >= height else (0, start)
        step_x, step_y = (long / rescaled, short / 256) if width >= height else (short / 256, long / rescaled)
        columns = np.clip(
            np.minimum(np.arange(width) + 1, (low_x + x + 1) * step_x)
            - np.maximum(np.arange(width), (low_x + x) * step_x),
            0,
            1,
        )
        rows = np.clip(
            np.minimum(np.arange(height) + 1, (low_y + y + 1) * step_y)
            - np.maximum(np.arange(height), (low_y + y) * step_y),
            0,
            1,
        )
        expected = np.einsum("h,w,hwc->c", rows, columns, np.asarray(image)) / (step_x * step_y)
        assert np.abs(found[y, x] - expected).max() <= 0.51
    assert (rescale(Image.new("RGB", sides, (7, 99, 250)), 256, "area") == [7, 99, 250]).all()
    small = picture("small", 100, 80)
    assert (rescale(small, 256, "area") == rescale(small, 256)).all()


def test_grey_becomes_three_equal_channels():
    pixels = np.asarray(decode(saved(picture("grey", 40, 30).convert("L"), "PNG"), **LIMITS))
    assert pixels.shape == (30, 40, 3)
    assert (pixels[..., :1] == pixels).all()


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    pixels = np.asarray(decode(saved(Image.fromarray(ramp), "PNG"), **LIMITS))
    assert np.abs(pixels[0, :, 0].astype(int) - np.arange(256)).max() <= 1


def test_transparency_is_put_over_white():
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    image.putpixel((1, 1), (200, 0, 0, 255))
    pixels = np.asarray(decode(saved(image, "PNG"), **LIMITS))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[1, 1].tolist() == [200, 0, 0]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert np.asarray(decode(saved(palette, "PNG", transparency=1), **LIMITS))[0, 0].tolist() == [255, 255, 255]
    assert np.asarray(decode(saved(palette, "PNG"), **LIMITS))[0, 0].tolist() == [40, 50, 60]


def test_cmyk_jpeg_is_near_the_rgb_it_came_from():
    image = picture("cmyk", 64, 64)
    pixels = np.asarray(decode(saved(image.convert("CMYK"), "JPEG", quality=95), **LIMITS)).astype(int)
    assert np.abs(pixels - np.asarray(image)).mean() < 6


def test_orientation_tag_is_ignored_unless_asked_for():
    image = picture("exif", 60, 30)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(image, "JPEG", exif=exif)
    assert decode(data, **LIMITS).size == (60, 30)
    turned = np.asarray(decode(data, **LIMITS, exif="apply"))
    assert (turned == np.rot90(np.asarray(decode(data, **LIMITS)), -1)).all()  # 6: a quarter turn clockwise


@pytest.mark.parametrize("progressive", [False, True])
def test_scans_are_counted(progressive: bool):
    """libjpeg's default progressive script has ten scans for colour pictures, a baseline file has one."""
    data = saved(picture("scans", 200, 100), "JPEG", progressive=progressive, comment=b"\xff\xda" * 50)
    assert count_scans(data, 1000) == (10 if progressive else 1)
    assert count_scans(data, 5) == (5 if progressive else 1)
    assert count_scans(data[:50], 1000) == 0


def test_reasons():
    good = saved(picture("good", 200, 100), "JPEG")
    assert reason(b"") == "empty"
    assert reason(b"no picture at all") == "unrecognised"
    assert reason(good[: len(good) // 2]) == "truncated"
    assert reason(good, max_bytes=100) == "too_many_bytes"
    assert reason(good, max_pixels=100 * 200 - 1) == "too_many_pixels"
    assert reason(saved(picture("good", 200, 100), "JPEG", progressive=True), max_scans=3) == "too_many_scans"
    assert np.asarray(decode(good + good * 200, **LIMITS)).shape == (100, 200, 3)  # what follows the end does not count
    png = bytearray(saved(picture("good", 200, 100), "PNG"))
    png[200:260] = bytes(60)
    assert reason(bytes(png)) == "corrupt"
    assert reason(saved(Image.new("F", (8, 8)), "TIFF")) == "unsupported"
    assert np.asarray(decode(good, **LIMITS)).shape == (100, 200, 3)


def test_hostile_files_are_decoded_or_left_out_with_a_reason(shared: Path):
    rows = list(csv.DictReader((shared / "odd-images" / "expected.csv").open()))
    assert len(rows) == 139
    differing = {}
    for row in rows:
        path = next((shared / "odd-images" / "files").rglob(row["file"]))
        try:
            pixels = rescale(decode(path.read_bytes(), **LIMITS), 256)
        except ImageError as error:
            assert error.code in REASONS
            verdict = error.code
        else:
            assert pixels.shape == (256, 256, 3)
            verdict = "True"
        if (verdict == "True") != (row["pillow_ok"] == "True"):
            differing[row["file"]] = verdict
    assert differing == {
        "broken_data_stream.png": "corrupt",  # Pillow-SIMD 12.1 rejects what expected.csv's newer Pillow lets pass
        "hopper.ico": "unrecognised",  # formats that no layout of ImageNet holds
        "hopper.sgi": "unrecognised",
        "pgm.jpeg": "unrecognised",
        "lab.tif": "unsupported",  # CIELAB needs littleCMS
    }


def test_encoded_jpeg_is_close_and_plain():
    pixels = np.asarray(picture("jpeg", 256, 256))
    data = encode(pixels, quality=95, subsampling="4:2:0")
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (256, 256))
        assert "exif" not in image.info
        assert "progressive" not in image.info
        assert image.layer[0][1:3] == (2, 2)  # type: ignore[attr-defined]  # chroma at half the resolution
    assert np.abs(jpeg_pixels(data).astype(int) - pixels).mean() < 6
