"""Damaged and hostile files: `decode` returns a picture or raises ImageError, and prints nothing; no build ends."""

import gzip
import json
import random
import struct
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from conftest import LIMITS, build, picture, saved
from pipeline.decode import ImageError, decode
from pipeline.image import rescale

FEW, MANY = 300, 20_000  # cases
SMALL = {**LIMITS, "max_bytes": 2**20, "max_pixels": 10**6}  # quick to decode, whatever a header claims
NUMBERS = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
BIG_TIFF = b"II+\0" + struct.pack("<HHQ", 8, 0, 2**64 - 1)  # its directory lies at the end of the address space


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


def odd_images(shared: Path) -> list[bytes]:
    files = (path for path in sorted((shared / "odd-images" / "files").rglob("*")) if path.is_file())
    return [path.read_bytes() for path in files if path.stat().st_size <= SMALL["max_bytes"]]


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


def verdicts(files: list[bytes], cases: int, seed: int) -> Counter[str]:
    """Decode so many mutations; count them by reason. An exception names its case."""
    counted: Counter[str] = Counter()
    for case in range(cases):
        chance = random.Random(f"{seed}/{case}")
        data = mutated(chance.choice(files), chance.choice(files), chance)
        try:
            image = decode(data, **SMALL, exif=chance.choice(("ignore", "apply")))
            assert image.mode == "RGB"
            assert rescale(image, 16).shape == (16, 16, 4)
            counted["decoded"] += 1
        except ImageError as error:
            counted[error.code] += 1
        except Exception as error:
            error.add_note(f"seed {seed}, case {case}, {len(data)} bytes, {data[:40]!r}")
            raise
    return counted


def assert_decided(counted: Counter[str], cases: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert counted.total() == cases
    assert min(counted[key] for key in ("decoded", "corrupt", "unrecognised", "truncated")) > cases // 100
    assert capfd.readouterr() == ("", "")  # nor does a library in C write


def test_drawn_pictures(capfd: pytest.CaptureFixture[str]):
    assert_decided(verdicts(seeds(), FEW, 1), FEW, capfd)


def test_odd_pictures(shared: Path, capfd: pytest.CaptureFixture[str]):
    assert_decided(verdicts(odd_images(shared), FEW, 2), FEW, capfd)


@pytest.mark.proof
@pytest.mark.parametrize("seed", [3, 4])
def test_many_pictures(seed: int, shared: Path, capfd: pytest.CaptureFixture[str]):
    counted = verdicts(seeds() if seed == 3 else odd_images(shared), MANY // 2, seed)
    assert_decided(counted, MANY // 2, capfd)
    with capfd.disabled():
        print(f"\n{MANY // 2:,} mutations: {json.dumps(counted)}")


def test_a_build_leaves_a_hostile_file_out(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / "raw" / name).mkdir(parents=True)
        picture(name, 60, 50).save(tmp_path / "raw" / name / "good.jpg")
    (tmp_path / "raw" / "a" / "bad.jpg").write_bytes(BIG_TIFF)
    result = build(tmp_path / "raw", tmp_path / "out", "--workers", 1, "--holdout", 0, "--max-skipped", "50%")
    assert result.exit_code == 0, result.output
    (line,) = map(json.loads, (tmp_path / "out" / "skipped.jsonl").read_text().splitlines())
    assert (line["source"], line["reason"]) == ("a/bad.jpg", "corrupt")
