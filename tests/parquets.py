"""What the tests of parquet write into their files."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def blobs(count: int, seed: int = 0) -> list[bytes]:
    """Random bytes, some compressible: none, few, or up to 60,000; every seventh as an earlier one."""
    draw = random.Random(seed)
    found: list[bytes] = []
    for i in range(count):
        size = draw.choice([0, 1, 7, 300, 3000, draw.randrange(60_000)])
        fresh = draw.randbytes(size) if i % 3 else draw.randbytes(3) * (size // 3)
        found.append(draw.choice(found) if i % 7 == 6 else fresh)
    return found


def small(file: Path, **options: object) -> bytes:
    """A file of 2,000 or so bytes with every kind of page, and its content."""
    images = [{"bytes": blob[:200], "path": f"{i}.jpg"} for i, blob in enumerate(blobs(30))]
    images[4:25:5] = [None] * 5
    columns = {"image": pa.array(images, IMAGE), "label": list(range(30))}
    pq.write_table(pa.table(columns), file, row_group_size=20, data_page_size=500, write_batch_size=3, **options)
    return file.read_bytes()
