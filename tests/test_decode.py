"""Decoding against Pillow, every reason for leaving a picture out, damaged and hostile files."""

import csv
import gzip
import io
import random
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from conftest import LIMITS, picture, reason, saved
from pipeline import LFS_POINTER
from pipeline.decode import REASONS, ImageError, decode
from pipeline.image import rescale
from reference import png_chunk

SMALL = {**LIMITS, "max_bytes": 2**20, "max_pixels": 10**6}  # quick to decode, whatever a header claims
NUMBERS = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
BIG_TIFF = b"II+\0" + struct.pack("<HHQ", 8, 0, 2**64 - 1)  # its directory lies at the end of the address space


def test_pixel_types_become_rgb():
    grey = np.asarray(decode(saved(picture("grey", 40, 30).convert("L"), "PNG"), **LIMITS))
    assert grey.shape == (30, 40, 3)
    assert (grey[..., :1] == grey).all()
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)  # scaled, not clipped
    pixels = np.asarray(decode(saved(Image.fromarray(ramp), "PNG"), **LIMITS))
    assert np.abs(pixels[0, :, 0].astype(int) - np.arange(256)).max() <= 1
    image = picture("cmyk", 64, 64)
    pixels = np.asarray(decode(saved(image.convert("CMYK"), "JPEG", quality=95), **LIMITS)).astype(int)
    assert np.abs(pixels - np.asarray(image)).mean() < 6


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
    """libjpeg writes ten scans for progressive colour pictures, and one for baseline ones."""
    data = saved(picture("scans", 200, 100), "JPEG", progressive=progressive, comment=b"\xff\xda" * 50)
    assert decode(data, **{**LIMITS, "max_scans": scans}).size == (200, 100)
    assert reason(data, max_scans=scans - 1) == "too_many_scans"


def test_reasons():
    good = saved(picture("good", 200, 100), "JPEG")
    assert reason(b"") == "empty"
    assert reason(b"no picture at all") == "unrecognised"
    assert reason(LFS_POINTER + b"v1\noid sha256:0\nsize 9\n") == "lfs_pointer"
    assert reason(good[: len(good) // 2]) == "truncated"
    assert reason(good, max_bytes=100) == "too_many_bytes"
    assert reason(good, max_pixels=100 * 200 - 1) == "too_many_pixels"
    assert np.asarray(decode(good + good * 200, **LIMITS)).shape == (100, 200, 3)  # what follows the end does not count
    png = bytearray(saved(picture("good", 200, 100), "PNG"))
    png[200:260] = bytes(60)
    assert reason(bytes(png)) == "corrupt"
    assert reason(saved(Image.new("F", (8, 8)), "TIFF")) == "unsupported"
    assert reason(BIG_TIFF) == "corrupt"


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_what_libjpeg_warns_of_is_left_to_pillow(mode: str):
    good = saved(picture("warned", 200, 100).convert(mode), "JPEG")
    bad = good[:-2] + bytes(20) + good[-2:]  # extraneous bytes before the end of the image
    with pytest.raises(ValueError, match="extraneous") as strict:
        simplejpeg.decode_jpeg(bad, "RGBX", strict=True)
    warnings: list[str] = []
    assert (np.asarray(decode(bad, **LIMITS, warn=warnings.append)) == np.asarray(decode(good, **LIMITS))).all()
    assert warnings == [str(strict.value)]
    decode(good, **LIMITS, warn=warnings.append)
    assert reason(bad[: len(bad) // 2], warn=warnings.append) == "truncated"
    assert len(warnings) == 1


def test_what_turbo_cannot_decode_is_no_damage(shared: Path):
    """4:1:0."""
    data, warnings = (shared / "odd-images/files/2x2_410.jpg").read_bytes(), list[str]()
    with pytest.raises(ValueError, match="subsampling"):
        simplejpeg.decode_jpeg(data, "RGBX", strict=True)
    assert decode(data, **LIMITS, warn=warnings.append).mode == "RGB"
    assert not warnings


LONG = zlib.compress(b"x" * 3 * 2**20)


@pytest.mark.parametrize(
    "chunks",
    [
        png_chunk(b"iCCP", b"profile\0\0" + LONG),
        png_chunk(b"zTXt", b"k\0\0" + LONG),
        png_chunk(b"iTXt", b"k\0\1\0en\0k\0" + LONG),
        png_chunk(b"iTXt", b"k\0\0\0en\0k\0" + b"x" * 9 * 2**20),
        png_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"short")) * 200,
        png_chunk(b"iTXt", b"k\0\1\0en\0k\0" + LONG) * 200,  # more than may be unpacked
    ],
    ids=["profile", "text", "packed text", "plain text", "200 texts", "200 long texts"],
)
@pytest.mark.parametrize("behind", [False, True])
def test_long_texts_and_profiles_of_a_png_do_not_count(chunks: bytes, behind: bool):
    """Also behind the pixels; the orientation tag beside them stays."""
    image, exif = picture("texts", 60, 30), Image.Exif()
    exif[0x0112] = 6
    plain = saved(image, "PNG", exif=exif)
    at = plain.index(b"IEND" if behind else b"IDAT") - 4
    data = plain[:at] + chunks + plain[at:]
    assert (np.asarray(decode(data, **LIMITS, exif="apply")) == np.asarray(image.transpose(Image.ROTATE_270))).all()
    assert (np.asarray(decode(gzip.compress(data), **LIMITS)) == np.asarray(image)).all()


def test_gzipped_pictures_are_read():
    good = saved(picture("gzip", 200, 100), "JPEG")
    packed = gzip.compress(good)
    assert (np.asarray(decode(packed, **LIMITS)) == np.asarray(decode(good, **LIMITS))).all()
    assert reason(packed[: len(packed) // 2]) == reason(packed[:-4]) == "truncated"
    assert reason(packed[:200] + bytes(50) + packed[250:]) == "corrupt"
    assert reason(packed[:-8] + bytes(4) + packed[-4:]) == "corrupt"  # its checksum
    assert reason(gzip.compress(packed)) == "unrecognised"  # one level
    assert reason(gzip.compress(b"")) == "empty"
    assert reason(gzip.compress(good[: len(good) // 2])) == "truncated"
    assert reason(gzip.compress(bytes(100_000)), max_bytes=99_999) == "too_many_bytes"
    assert reason(gzip.compress(bytes(100_000)), max_bytes=100_000) == "unrecognised"
    assert reason(b"\x1f\x8b" + bytes(100)) == "corrupt"


@pytest.mark.filterwarnings("ignore")
def test_odd_files_are_decoded_as_by_pillow_or_left_out_with_a_reason(shared: Path):
    rows = list(csv.DictReader((shared / "odd-images" / "expected.csv").open()))
    differing, compared = {}, 0
    for row in rows:
        path = next((shared / "odd-images" / "files").rglob(row["file"]))
        try:
            image, code = decode(path.read_bytes(), **LIMITS), ""
        except ImageError as error:
            code = error.code
            assert code in REASONS
        else:
            assert rescale(image, 256).shape == (256, 256, 4)
        if (not code) != (row["pillow_ok"] == "True"):
            differing[row["file"]] = code
        elif not code:
            theirs = Image.open(path)
            if theirs.format in ("JPEG", "MPO") and theirs.mode in ("RGB", "L"):
                assert (np.asarray(image) == np.asarray(theirs.convert("RGB"))).all(), path
                compared += 1
    assert (len(rows), compared) == (139, 60)
    assert differing == {
        "broken_data_stream.png": "corrupt",  # Pillow-SIMD 12.1 rejects what expected.csv's newer Pillow lets pass
        "hopper.ico": "unrecognised",  # formats that no layout of ImageNet holds
        "hopper.sgi": "unrecognised",
        "pgm.jpeg": "unrecognised",
        "lab.tif": "unsupported",  # CIELAB needs littleCMS
    }


# Mutations


def seeds() -> list[bytes]:
    """A picture of every format and many of their features, as drawn here."""
    image, exif = picture("hostile", 61, 47), Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera's maker"
    frames = {"save_all": True, "append_images": [picture("second", 61, 47)]}
    return [
        *(saved(image.convert(mode), "JPEG", exif=exif) for mode in ("RGB", "L", "CMYK")),
        saved(image, "JPEG", progressive=True, comment=b"\xff\xda" * 9, icc_profile=bytes(900)),
        saved(image, "MPO", **frames),
        *(saved(image.convert(mode), "PNG", exif=exif) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")),
        saved(image, "PNG", **frames),
        *(saved(image.convert("P"), "GIF", **options) for options in ({}, {"transparency": 3}, frames)),
        *(saved(image.convert(mode), "BMP") for mode in ("RGB", "P", "RGBA")),
        *(saved(image, "WEBP", exif=exif, **options) for options in ({}, {"lossless": True}, frames)),
        *(
            saved(image.convert(mode), "TIFF", compression=compression, big_tiff=big)
            for mode in ("RGB", "RGBA", "P", "CMYK", "F", "I;16")
            for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate")
            for big in (False, True)
        ),
        saved(image.convert("YCbCr"), "TIFF", compression="jpeg"),
        gzip.compress(saved(image, "JPEG")),
        BIG_TIFF,
    ]


def mutated(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Damage a file in one to three ways, in its first bytes more often than elsewhere."""
    result = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        size = len(result) if chance.random() < 0.4 else min(len(result), 200)
        position = chance.randint(min(size, 8 if chance.random() < 0.9 else 0), size)  # most keep their first bytes
        match chance.choice(("bits", "bytes", "number", "cut", "splice", "double", "directory")):
            case "bits":
                for i in range(position, min(size, position + chance.randint(1, 8))):
                    result[i] ^= 1 << chance.randrange(8)
            case "bytes":
                result[position : position + chance.randint(1, 40)] = chance.randbytes(chance.randint(0, 40))
            case "number":  # a length, a count or an offset
                width, order = chance.choice((1, 2, 4, 8)), chance.choice(("little", "big"))
                number = chance.choice((*NUMBERS, len(result), chance.randrange(2**16))) % 2 ** (8 * width)
                result[position : position + width] = number.to_bytes(width, order)
            case "cut":
                del result[max(position, chance.randrange(len(result) + 1)) :]
            case "splice":
                start = chance.randrange(len(other) + 1)
                result[position:] = other[start:]
            case "double":
                result[position:position] = result[: chance.randint(0, 2000)]
            case "directory":
                result = bytearray(tiff(chance)) if chance.random() < 0.5 else result + tiff(chance)
    return bytes(result)


def tiff(chance: random.Random) -> bytes:
    """A TIFF or BigTIFF of one directory of tags that Pillow reads, with counts and offsets that lie."""
    order, big = chance.choice("<>"), chance.random() < 0.5
    sizes = "Q" if big else "I"
    tags = [256, 257, 258, 259, 262, 273, 274, 277, 278, 279, 282, 284, 317, 320, 322, 323, 324, 325, 338, 339, 34665]
    entries = []
    for tag in sorted(chance.sample(tags, chance.randint(1, len(tags)))):
        value = chance.choice((1, 1, 2, 8, 8, 64, *NUMBERS)) % 2 ** (64 if big else 32)
        count = chance.choice((1, 1, 1, 3, *NUMBERS)) % 2 ** (64 if big else 32)
        entries.append(struct.pack(f"{order}HH{sizes}{sizes}", tag, chance.choice((*range(1, 19), 3, 4)), count, value))
    start = chance.choice((16 if big else 8, *NUMBERS)) % 2 ** (64 if big else 32)
    mark = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42)
    head = mark + (struct.pack(order + "HHQ", 8, 0, start) if big else struct.pack(order + "I", start))
    number = struct.pack(order + ("Q" if big else "H"), len(entries))
    return head + number + b"".join(entries) + bytes(chance.choice((0, 4, 8, 3000)))


def outcome(case: int, data: bytes, exif: str) -> str:
    """Return "decoded" or the reason why not; pytest shows the case and its data where another exception ends it."""
    try:
        image = decode(data, **SMALL, exif=exif)
    except ImageError as error:
        return error.code
    assert image.mode == "RGB"
    assert rescale(image, 16).shape == (16, 16, 4)
    return "decoded"


@pytest.mark.parametrize("cases", [300, pytest.param(10_000, marks=pytest.mark.proof)])
@pytest.mark.parametrize("odd", [False, True])
def test_mutations_are_decided(odd: bool, cases: int, shared: Path, capfd: pytest.CaptureFixture[str]):
    """Drawn and odd pictures, mutated."""
    folder = (path.read_bytes() for path in sorted((shared / "odd-images/files").rglob("*")) if path.is_file())
    files = [data for data in folder if len(data) <= SMALL["max_bytes"]] if odd else seeds()
    counted: Counter[str] = Counter()
    for case in range(cases):
        chance = random.Random(f"{odd}/{cases}/{case}")
        data = mutated(chance.choice(files), chance.choice(files), chance)
        counted[outcome(case, data, chance.choice(("ignore", "apply")))] += 1
    assert counted.total() == cases
    assert min(counted[key] for key in ("decoded", "corrupt", "unrecognised", "truncated")) > cases // 100
    assert capfd.readouterr() == ("", "")  # nor does a library in C write
