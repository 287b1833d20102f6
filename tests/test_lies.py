"""Parquet files that lie or are damaged, down to the structs of thrift: refused, in one line and in little memory."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from parquets import blobs, small
from pipeline import SourceError
from pipeline.offline.parquet import encodings, footers, pagebody, pages, pagetable
from pipeline.offline.parquet.thrift import MAX_DEPTH, read_struct


def refused(file: Path) -> str:
    """What is said of a file that cannot be read; one line that begins with its name."""
    with pytest.raises(SourceError) as caught:
        list(pages.values(footer := footers.read_footer(file), footer.image()))
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unsupported_encoding_is_named(tmp_path: Path):
    file = tmp_path / "a.parquet"
    options = {"use_dictionary": False, "column_encoding": {"image": "DELTA_BYTE_ARRAY"}}
    pq.write_table(pa.table({"image": blobs(9)}), file, **options)
    told = "row 0 and following: the encoding DELTA_BYTE_ARRAY of a BYTE_ARRAY page is not supported; write it again"
    assert told in refused(file)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda good: b"", "not a parquet file, or cut short"),
        (lambda good: b"PAR1PAR1", "not a parquet file, or cut short"),
        (lambda good: good[:-1], "not a parquet file, or cut short"),
        (lambda good: good[: len(good) // 2], "not a parquet file, or cut short"),
        (lambda good: good[:-4] + b"PARE", "encrypted; only plain parquet files"),
        (lambda good: good[:-8] + b"\xff\xff\xff\xffPAR1", "its footer claims 4,294,967,295 bytes, at most"),
        (lambda good: good[:-8] + b"\x00\x00\x00\x00PAR1", "its footer: a header is cut short; fetch it again"),
    ],
)
def test_what_is_no_parquet_file(tmp_path: Path, bad: Callable[[bytes], bytes], message: str):
    file = tmp_path / "a.parquet"
    file.write_bytes(bad(small(file)))
    assert message in refused(file)


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def header(size: int, stored: int, rows: int, encoding: int = 0) -> bytes:
    """A data page's header, version 1, with numbers zigzag-coded as thrift has them."""
    outer, inner = (
        b"".join(b"\x15" + varint((n << 1) ^ (n >> 63)) for n in numbers)
        for numbers in ((0, size, stored), (rows, encoding, 3, 3))
    )
    return outer + b"\x2c" + inner + b"\0\0"


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (header(100, -5, 3), "a header with the impossible number -5"),
        (header(2**33, 10, 3), "a header with the impossible number 8,589,934,592"),
        (
            header(2**30, 10, 3),
            "a header with 1,073,741,824 where at most 268,435,456 is supported; write it again",
        ),
        (header(100, 2**27, 3), "a page claims 134,217,728 bytes where"),
        (header(100, 10, 0), "a header with the impossible number 0"),
        (header(100, 10, 2**30), "a header with 1,073,741,824 where at most 4,194,304 is supported"),
        (header(100, 10, 2), "a header without"),  # what follows are zeros
        (header(100, 10, 4, encoding=8), "a page needs a dictionary, and there is none"),
        (header(100, 10, 4, encoding=77), "the encoding 77 of a BYTE_ARRAY page is not supported"),
        (b"\x1c" * 200, "a header of more than 12 levels"),
        (b"\x1b\x80\x80\x80\x80\x08\x33" + bytes(9), "a header"),
        (b"\xff" * 200, "a header"),
        (b"\x18" + b"\xff" * 9 + b"\x01", "a header is cut short"),
    ],
)
def test_page_headers_that_lie(tmp_path: Path, head: bytes, message: str):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [bytes(300)] * 4}), file, use_dictionary=False, compression="none")
    good = file.read_bytes()
    file.write_bytes(good[:4] + head + bytes(600 - len(head)) + good[604:])
    assert message in refused(file)


@pytest.mark.parametrize("codec", [1, 2, 4, 6, 7])
def test_a_decompression_bomb_does_not_go_off(codec: int):
    bomb = pa.Codec(pagetable.CODECS[codec]).compress(bytes(2**26), asbytes=True)
    tracemalloc.start()
    with pytest.raises(encodings.Damaged, match=r"cannot be decompressed|another length inside"):
        pagebody.decompressed(bomb, 1000, codec)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_footer_that_claims_more_rows_than_bytes(tmp_path: Path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": pa.array([None] * 10**6, pa.binary())}), file)
    assert f"it claims 1,000,000 rows in a file of {file.stat().st_size:,} bytes" in refused(file)


def test_a_checksum_that_does_not_fit(tmp_path: Path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [bytes(1000)]}), file, write_page_checksum=True, compression="none")
    good = file.read_bytes()
    file.write_bytes(good[:500] + b"\x01" + good[501:])
    with pytest.raises(SourceError, match="row 0: the page is not what its checksum says; fetch it again"):
        pages.read_row(str(file), 0)


def test_a_struct_of_thrift_with_all_its_types():
    fields = b"\x11\x12\x13\x07\x14\x09\x16\x0a\x17" + bytes(8) + b"\x18\x02hi" + b"\x19\x31\x01\x02\x01"
    data = fields + b"\x1b\x01\x58\x04\x01k\x1b\x00\x1c\x15\x04\x00\x1d" + bytes(16) + b"\x05\x3c\x02\x00"
    found, end = read_struct(data)
    assert end == len(data)
    assert found == {
        1: True, 2: False, 3: None, 4: -5, 5: 5, 6: None, 7: b"hi", 8: [None] * 3, 9: None, 10: None, 11: {1: 2},
        12: None, 30: 1,
    }  # fmt: skip
    for stop in range(len(data)):
        with pytest.raises(encodings.Cut):
            read_struct(data[:stop])
    with pytest.raises(encodings.Damaged, match=f"more than {MAX_DEPTH} levels"):
        read_struct(b"\x19\x19" * 10**6)
