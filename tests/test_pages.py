"""Parquet pages against pyarrow's own reading of the same files, value by value; and how few of them are read."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from parquets import IMAGE, blobs
from pipeline import SourceError
from pipeline.offline.parquet import encodings, footers, pages, pagetable, snappy

CODECS = ("none", "snappy", "gzip", "brotli", "zstd", "lz4")


def table(count: int, nulls: bool = False) -> pa.Table:
    """As Hugging Face has it: image (bytes, path), label, and a column that is of no use to us."""
    draw = random.Random(1)
    images: list[dict[str, object] | None] = [{"bytes": b, "path": f"{i}.jpg"} for i, b in enumerate(blobs(count))]
    for i in range(count) if nulls else ():
        if (kind := draw.randrange(5)) < 2 or 20 < i < 40:
            images[i] = [None, {"bytes": None, "path": None}][kind % 2]
    labels = pa.array([draw.randrange(-1, 1000) for _ in range(count)], pa.int64())
    return pa.table({"text": ["x"] * count, "image": pa.array(images, IMAGE), "label": labels})


def by_pyarrow(file: Path) -> list[bytes | None]:
    """The images as pyarrow reads them."""
    column = pq.read_table(file, columns=["image"])["image"].combine_chunks()
    rows = column.to_pylist()
    return [row["bytes"] if isinstance(row, dict) else row for row in rows]


def agrees(file: Path) -> np.ndarray:
    """Every row, read in random order and in order, is what pyarrow reads there. The table of pages."""
    expected = by_pyarrow(file)
    rows = list(range(len(expected)))
    random.Random(2).shuffle(rows)
    assert {row: pages.read_row(str(file), row) for row in rows} == {row: expected[row] or b"" for row in rows}
    footer = footers.read_footer(file)
    assert list(pages.values(footer, footer.image())) == expected
    assert list(pages.nulls(footer, footer.image())) == [value is None for value in expected]
    for name, leaf in (("label", footer.label()), ("path", footer.beside(footer.image(), "path"))):
        if leaf is None:
            continue
        told = pq.read_table(file, columns=[leaf.name])
        plain = [row[name] if isinstance(row, dict) else row for row in told.column(0).to_pylist()]
        read = list(pages.values(footer, leaf))
        if leaf.kind == "BYTE_ARRAY":
            assert read == [None if value is None else value.encode() for value in plain]
        else:
            assert [None if v is None else int.from_bytes(v, "little", signed=True) for v in read] == plain
    return pagetable.scan(footer, footer.image())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("nulls", [False, True])
def test_every_row_is_what_pyarrow_reads(tmp_path: Path, codec: str, version: str, dictionary: bool, nulls: bool):
    file = tmp_path / "a.parquet"
    options = {"compression": codec, "data_page_version": version, "use_dictionary": dictionary}
    pq.write_table(
        table(150, nulls), file, row_group_size=60, data_page_size=40_000, write_batch_size=5, **options,
        write_page_index=nulls, write_page_checksum=nulls, dictionary_pagesize_limit=100_000,
    )  # fmt: skip
    found = agrees(file)
    kinds = Counter(found["encoding"].tolist())
    assert kinds[pagetable.PLAIN] > 5
    assert (kinds[pagetable.RLE_DICTIONARY] > 0) == dictionary
    assert ((found["dictionary"] == -2).sum() == 3) == dictionary
    assert (found["crc"] >= 0).all() == nulls


def test_default_options_at_full_page_sizes(tmp_path: Path):
    for i, options in enumerate([{}, {"use_dictionary": False}, {"row_group_size": 100}, {"write_batch_size": 1}]):
        pq.write_table(table(600, nulls=bool(i % 2)), tmp_path / f"{i}.parquet", **options)
        agrees(tmp_path / f"{i}.parquet")


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("nullable", [True, False])
def test_a_plain_column_of_bytes(tmp_path: Path, kind: pa.DataType, nullable: bool):
    values: list[bytes | None] = [*blobs(70)]
    if nullable:
        values[3:50:4] = [None] * 12
    schema = pa.schema([pa.field("image", kind, nullable), pa.field("label", pa.int32(), nullable)])
    columns = [pa.array(values, kind), pa.array(range(70), pa.int32())]
    for i, encoding in enumerate(({}, {"image": "DELTA_LENGTH_BYTE_ARRAY", "label": "DELTA_BINARY_PACKED"})):
        file = tmp_path / f"{i}.parquet"
        options = {"use_dictionary": False, "column_encoding": encoding} if encoding else {}
        pq.write_table(pa.table(columns, schema=schema), file, row_group_size=40, **options)
        assert pagetable.DELTA_LENGTH in agrees(file)["encoding"] or not encoding


@pytest.mark.parametrize("kind", [pa.int8(), pa.int32(), pa.int64()])
@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_BINARY_PACKED", "dictionary"])
def test_labels_of_every_width(tmp_path: Path, kind: pa.DataType, encoding: str):
    draw, bits = random.Random(3), kind.bit_width
    labels = [draw.randrange(-(2 ** (bits - 1)), 2 ** (bits - 1)) for _ in range(40_000)]
    labels[:2000] = [draw.choice([5, None]) for _ in range(2000)]
    images = pa.array([b"x"] * len(labels))
    options = {"use_dictionary": True} if encoding == "dictionary" else {
        "use_dictionary": False, "column_encoding": {"label": encoding, "image": "PLAIN"}
    }  # fmt: skip
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": images, "label": pa.array(labels, kind)}), file, row_group_size=30_000, **options)
    footer = footers.read_footer(file)
    read = pages.values(footer, footer.label())
    expected = pq.read_table(file)["label"].to_pylist()
    assert [None if v is None else int.from_bytes(v, "little", signed=True) for v in read] == expected


@pytest.mark.parametrize("width", [0, 1, 2, 7, 8, 13, 31, 32])
def test_bit_packed_runs_longer_than_a_step(width: int):
    count = 8 * (encodings.STEP // 8 + 3)
    numbers = np.random.default_rng(width).integers(0, 2**width, count, dtype=np.uint64)
    bits = np.unpackbits(numbers.view(np.uint8).reshape(count, 8), axis=1, bitorder="little")[:, :width]
    groups = count // 8
    head = bytes([groups << 1 & 127 | 129, groups >> 6 & 127 | 128, groups >> 13])
    packed = head + np.packbits(bits, bitorder="little").tobytes()
    assert (encodings.hybrid(packed, 0, width, count - 5) == numbers[: count - 5]).all()
    with pytest.raises(encodings.Damaged):
        encodings.hybrid(packed[: len(packed) - 2], 0, width, count + 1)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each page that is read from now on."""
    sizes: list[int] = []
    read = pages.read_range

    def counting(file: str, offset: int, size: int) -> bytes:
        sizes.append(size)
        return read(file, offset, size)

    monkeypatch.setattr(pages, "read_range", counting)
    return sizes


def forget(*kept: "pages.Cache[Any]") -> None:
    for cache in kept:
        cache._kept.clear()
        cache._size = 0


def written(file: Path, images: list[bytes | None], **options: object) -> str:
    structs = pa.array([{"bytes": image, "path": "a"} for image in images], IMAGE)
    pq.write_table(pa.table({"image": structs}), file, **options)
    return str(file)


def test_a_row_costs_one_page_and_rows_in_order_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    draw = random.Random(4)
    images = [draw.randbytes(100_000) for _ in range(400)]
    file = written(tmp_path / "a.parquet", images, row_group_size=200, use_dictionary=False, write_batch_size=1)
    lines = pagetable.scan(footers.read_footer(tmp_path / "a.parquet"), footers.read_footer(Path(file)).image())
    assert len(lines) >= 30
    sizes = counted(monkeypatch)
    rows = list(range(400))
    for row in rows:
        pages.read_row(file, row)
    assert len(sizes) == len(lines)
    draw.shuffle(rows)
    sizes.clear()
    for row in rows[:100]:
        assert pages.read_row(file, row) == images[row]
    assert len(sizes) <= 100
    assert max(sizes) < 1.3 * 2**20
    assert pages._pages._size <= pages.CACHE


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [False, True])
def test_a_large_page_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, version: str, dictionary: bool
):
    draw = random.Random(5)
    images: list[bytes | None] = [draw.randbytes(draw.randrange(150_000)) for _ in range(100)]
    images[3:90:6] = [None, b"", bytes(2000) + draw.randbytes(65_536), images[0], images[1]] * 3
    options = {"compression": codec, "data_page_version": version, "use_dictionary": dictionary}
    file = written(tmp_path / "a.parquet", images, **options)
    entered = codec != "zstd" or (version == "2.0" and not dictionary)  # which stores these images as they are
    rows = list(range(100)) * 2
    sizes = counted(monkeypatch)
    for turn in range(2):
        draw.shuffle(rows)
        if turn:
            forget(pages._pages, pages._dictionaries)
            sizes.clear()
        for row in rows:
            assert pages.read_row(file, row) == (images[row] or b"")
    assert (max(sizes) < 150_000 + 2 * snappy.BLOCK) == entered
    assert (len(pages._pages._kept) == 0) == entered
    agrees(Path(file))


def test_snappy_streams_without_blocks_are_not_entered():
    plain = random.Random(6).randbytes(300_000)
    stream = pa.Codec("snappy").compress(plain, asbytes=True)
    starts = snappy.blocks(stream)
    assert starts is not None
    assert len(starts) == 6
    for first, last in ((0, 1), (1, 3), (2, 5), (0, 5)):
        part = plain[first * snappy.BLOCK : last * snappy.BLOCK]
        entered = snappy.run(stream[starts[first] : starts[last]], len(part))
        assert pa.Codec("snappy").decompress(entered, len(part), asbytes=True) == part
    literal = bytes([244, 255, 255]) + plain[: snappy.BLOCK]  # one block as it is
    copies = {"back": b"\x12\x01\x00", "across": b"\x0a\x01\x00"}  # 5 bytes and 3 bytes, from one byte before
    size = bytes([0x85, 0x80, 4])
    assert snappy.blocks(size + literal + copies["back"]) is None
    assert snappy.blocks(size + literal[:-1] + copies["across"]) is None
    assert snappy.blocks(stream[:-1]) is None
    assert snappy.blocks(stream + b"\0") is None
    assert snappy.blocks(pa.Codec("snappy").compress(b"ab" * 9 + plain[:200], asbytes=True)) is None  # too short
    for cut in range(0, 300_000, 7001):
        damaged = stream[:cut] + b"\xff\x00" + stream[cut + 2 :]
        found = snappy.blocks(damaged)
        assert found is None or (np.diff(found) > 0).all()


def test_the_cache_keeps_the_last_page_whatever_its_size():
    cache: pages.Cache[int] = pages.Cache(10)
    kept = []
    for key, size in ((1, 4), (2, 5), (1, 3), (3, 4), (4, 99), (3, 100)):
        cache.put(key, size, size)
        kept.append(dict.fromkeys(cache._kept))
    assert [list(keys) for keys in kept] == [[1], [1, 2], [2, 1], [1, 3], [4], [3]]
    assert cache.get(4) is None
    assert cache.get(3) == 100
    assert list(cache._kept) == [3]
    assert cache._size == 100


def test_a_file_that_is_replaced_is_read_anew(tmp_path: Path):
    file = tmp_path / "a.parquet"
    for seed in (1, 2):
        pq.write_table(pa.table({"image": blobs(20, seed)}), file)
        assert pages.read_row(str(file), 13) == blobs(20, seed)[13]
    for row in (20, 2**40, -1):
        with pytest.raises(SourceError, match=f"has no row {row}; it changed since the build began"):
            pages.read_row(str(file), row)
