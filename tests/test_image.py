"""Decoding, rescaling and encoding against Pillow's own steps, and every reason for leaving a picture out."""

import csv
import gzip
import io
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from conftest import LIMITS, picture, reason, saved
from pipeline.decode import REASONS, ImageError, decode
from pipeline.image import codec_versions, encode, pixels_of, rescale
from reference import jpeg_pixels, two_step_rescale


def rgb(image: Image.Image, size: int = 256, kernel: str = "bicubic", crop: str = "centre") -> np.ndarray:
    """Return the colours of `rescale`'s RGBX."""
    pixels = rescale(image, size, kernel, crop)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 4
    assert pixels.flags.c_contiguous
    return pixels[..., :3]


@pytest.mark.parametrize(
    "sides", [(256, 256), (500, 375), (375, 500), (257, 256), (256, 511), (64, 48), (1, 9), (3000, 20), (1021, 767)]
)
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


@pytest.mark.parametrize("kernel", ["bicubic", "area"])
@pytest.mark.parametrize("sides", [(500, 375), (375, 500), (300, 300), (257, 900), (1021, 767), (90, 60), (1600, 100)])
def test_the_square_of_a_whole_picture_is_the_cropped_one(sides: tuple[int, int], kernel: str):
    image = picture("whole", *sides)
    whole, square = rgb(image, 256, kernel, "none"), rgb(image, 256, kernel)
    long = int(256 * max(sides) / min(sides))
    assert whole.shape == ((256, long, 3) if sides[0] >= sides[1] else (long, 256, 3))
    top, left = round((whole.shape[0] - 256) / 2), round((whole.shape[1] - 256) / 2)
    inner = whole[top : top + 256, left : left + 256].astype(int)
    if kernel == "area" and min(sides) > 256:
        assert (inner == square).all()
    else:  # Pillow's weights of another box
        assert np.abs(inner - square).max() <= (1 if min(sides) > 256 else 2)
        assert ((inner - square) ** 2).mean() < 0.01


def test_a_whole_picture_may_be_sixteen_times_as_long_as_wide():
    assert rgb(Image.new("RGB", (10, 160)), 256, crop="none").shape == (4096, 256, 3)
    for sides in ((10, 161), (20_000, 1)):
        with pytest.raises(ImageError, match="too_many_pixels"):
            rgb(Image.new("RGB", sides), 256, crop="none")
        assert rgb(Image.new("RGB", sides), 256).shape == (256, 256, 3)
    with pytest.raises(ImageError, match="too_many_pixels"):
        rgb(Image.new("RGB", (10, 160)), 5000, crop="none")  # 80,000 rows: libjpeg writes 65,500


@pytest.mark.parametrize("sides", [(512, 512), (1024, 768), (300, 257), (500, 375), (375, 900)])
def test_area_is_the_mean_over_the_covered_area(sides: tuple[int, int]):
    """Against pixels repeated so often that every covered area is whole: short side · 256 parts, means of blocks."""
    image = picture("area", *sides)
    found = rgb(image, 256, "area").astype(float)
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
    assert (rgb(Image.new("RGB", sides, (7, 99, 250)), 256, "area") == [7, 99, 250]).all()
    small = picture("small", 100, 80)
    assert (rgb(small, 256, "area") == rgb(small, 256)).all()


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


@pytest.mark.parametrize("orientation", range(10))
def test_orientation_tag_is_ignored_unless_asked_for(orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(picture("exif", 60, 30), "JPEG", exif=exif)
    assert decode(data, **LIMITS).size == (60, 30)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (np.asarray(decode(data, **LIMITS, exif="apply")) == np.asarray(upright)).all()


@pytest.mark.parametrize(("progressive", "scans"), [(False, 1), (True, 10)])
def test_scans_are_counted(progressive: bool, scans: int):
    """libjpeg's default progressive script has ten scans for colour pictures, a baseline file has one."""
    data = saved(picture("scans", 200, 100), "JPEG", progressive=progressive, comment=b"\xff\xda" * 50)
    assert decode(data, **{**LIMITS, "max_scans": scans}).size == (200, 100)
    assert reason(data, max_scans=scans - 1) == "too_many_scans"


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


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_what_libjpeg_warns_of_is_left_to_pillow(mode: str):
    good = saved(picture("warned", 200, 100).convert(mode), "JPEG")
    bad = good[:-2] + bytes(20) + good[-2:]  # extraneous bytes before the end of the image
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(bad, "RGBX", strict=True)
    assert (np.asarray(decode(bad, **LIMITS)) == np.asarray(decode(good, **LIMITS))).all()


def test_sharing_memory_changes_no_pixel():
    """Pillow-SIMD's resampling of pixels in numpy's memory and in its own."""
    for sides in ((517, 389), (64, 700), (2, 3)):
        data = saved(picture("memory", *sides), "JPEG", quality=97)
        theirs = Image.open(io.BytesIO(data)).convert("RGB")
        for kernel in ("bicubic", "area"):
            assert (rgb(decode(data, **LIMITS), 256, kernel) == rgb(theirs, 256, kernel)).all()


def test_gzipped_pictures_are_read():
    good = saved(picture("gzip", 200, 100), "JPEG")
    packed = gzip.compress(good)
    assert (np.asarray(decode(packed, **LIMITS)) == np.asarray(decode(good, **LIMITS))).all()
    assert reason(packed[: len(packed) // 2]) == "truncated"
    assert reason(packed[:200] + bytes(50) + packed[250:]) == "corrupt"
    assert reason(packed[:-8] + bytes(4) + packed[-4:]) == "corrupt"  # its checksum
    assert reason(gzip.compress(packed)) == "unrecognised"  # one level
    assert reason(gzip.compress(b"")) == "empty"
    assert reason(gzip.compress(good[: len(good) // 2])) == "truncated"
    assert reason(gzip.compress(bytes(100_000)), max_bytes=99_999) == "too_many_bytes"
    assert reason(gzip.compress(bytes(100_000)), max_bytes=100_000) == "unrecognised"
    assert reason(b"\x1f\x8b" + bytes(100)) == "corrupt"


def test_hostile_files_are_decoded_or_left_out_with_a_reason(shared: Path):
    rows = list(csv.DictReader((shared / "odd-images" / "expected.csv").open()))
    assert len(rows) == 139
    differing = {}
    for row in rows:
        path = next((shared / "odd-images" / "files").rglob(row["file"]))
        try:
            pixels = rgb(decode(path.read_bytes(), **LIMITS), 256)
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


@pytest.mark.filterwarnings("ignore")
def test_odd_jpegs_are_decoded_as_by_pillow(shared: Path):
    compared = 0
    for path in sorted((shared / "odd-images" / "files").rglob("*")):
        try:
            theirs = Image.open(path)
            usual = theirs.format in ("JPEG", "MPO") and theirs.mode in ("RGB", "L")
            theirs.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue
        if usual:
            assert (np.asarray(decode(path.read_bytes(), **LIMITS)) == np.asarray(theirs.convert("RGB"))).all(), path
            compared += 1
    assert compared >= 20


@pytest.mark.parametrize(("subsampling", "factors"), [("4:4:4", (1, 1)), ("4:2:2", (2, 1)), ("4:2:0", (2, 2))])
def test_encoded_jpeg_is_close_and_plain(subsampling: str, factors: tuple[int, int]):
    """As Pillow encodes an RGB picture of its own; JFIF and no other metadata; one baseline scan."""
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


def test_padding_means_nothing():
    pixels = pixels_of(picture("layout", 300, 200))
    assert pixels.shape == (200, 300, 4)
    other = pixels.copy()
    other[..., 3] = 77
    assert encode(other, quality=90, subsampling="4:2:0") == encode(pixels, quality=90, subsampling="4:2:0")


def test_codec_versions_name_what_decides_bytes():
    assert set(codec_versions()) == {"pillow-simd", "simplejpeg", "jpeg", "png", "webp", "tiff"}
    assert all(version != "None" for version in codec_versions().values())
