"""The ILSVRC development kit: class words, the devkit's own class ids, numbers of images, labels of the flat splits."""

import gzip
import io
import zlib
from dataclasses import dataclass, field

from pipeline import UserError, storage
from pipeline.offline.archives import members
from pipeline.offline.matfile import MatError, Value, struct_rows
from pipeline.offline.raw import LeftOut, SourceError
from pipeline.storage import Location

MAX_BYTES = 64 * 2**20  # of the kit unpacked; the real one has 6 MB


class DevkitError(UserError):
    """A development kit that is damaged or not one."""


@dataclass(frozen=True)
class Devkit:
    words: dict[str, str]  # wnid → words
    ids: dict[str, int]  # wnid → ILSVRC2012_ID (or 2010's), 1 … n, an order of its own
    validation: list[str]  # the wnid of each validation image, in ascending order of file names
    test: list[str] = field(default_factory=list)  # the same of the test images, published for 2010 alone
    train: dict[str, int] = field(default_factory=dict)  # wnid → number of training images, where the kit says so


def read_devkit(path: Location, year: int = 2012) -> Devkit:
    """Read a development kit: the .tar.gz, in memory and without unpacking it, or the unpacked folder.

    2010's test labels are looked for in the kit and beside it.

    Raises:
        DevkitError: a damaged archive, a missing member, or a ground truth that names unknown ids.
    """
    wanted = ("meta.mat", f"ILSVRC{year}_validation_ground_truth.txt", f"ILSVRC{year}_test_ground_truth.txt")
    files = {name: _head(path.parent / name) for name in wanted[2:] if storage.is_file(path.parent / name)}
    if storage.is_dir(path):
        places = [path / "data" / name for name in wanted]
        files |= {place.name: _head(place) for place in places if storage.is_file(place)}
    else:
        files |= _unpacked(path, wanted)
    for name in wanted[:2]:
        if name not in files:
            raise DevkitError(f"{path}: has no …/data/{name}; this is not the ILSVRC{year} devkit")
    return parse_devkit(files[wanted[0]], files[wanted[1]], str(path), year, files.get(wanted[2], b""))


def parse_devkit(meta: bytes, truth: bytes, where: str, year: int = 2012, test: bytes = b"") -> Devkit:
    """meta.mat and the ground truth files → Devkit. Only leaves of the hierarchy (num_children 0) are classes."""
    own_id = f"ILSVRC{year}_ID"
    try:
        rows = struct_rows(meta, "synsets", ("WNID", "words", "num_children", "num_train_images", own_id))
        leaves = [row for row in rows if _number(row, "num_children") == 0]
        ids = {_text(row, "WNID"): _number(row, own_id) for row in leaves}
        words = {_text(row, "WNID"): _text(row, "words") for row in leaves}
        counted = [row for row in leaves if "num_train_images" in row]
        train = {_text(row, "WNID"): _number(row, "num_train_images") for row in counted}
        numbers, test_numbers = ([int(line) for line in lines.split()] for lines in (truth, test))
    except ValueError as error:
        raise DevkitError(f"{where}: meta.mat or the ground truth is damaged ({error}); fetch it again") from error
    wnids = {number: wnid for wnid, number in ids.items()}
    unknown = sorted({*numbers, *test_numbers} - set(wnids))
    if unknown:
        raise DevkitError(f"{where}: the ground truth names class ids that meta.mat lacks: {unknown[:5]}")
    if len(wnids) != len(leaves) or len(ids) != len(leaves):
        raise DevkitError(f"{where}: meta.mat has one wnid or one id twice; fetch it again")
    return Devkit(words, ids, [wnids[n] for n in numbers], [wnids[n] for n in test_numbers], train)


def _number(row: dict[str, Value], name: str) -> int:
    value = row.get(name)
    if not isinstance(value, int):
        raise MatError(f"a synset without a number {name}")
    return value


def _text(row: dict[str, Value], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise MatError(f"a synset without a string {name}")
    return value


def _unpacked(path: Location, wanted: tuple[str, ...]) -> dict[str, bytes]:
    """The wanted files of the archive, by name."""
    try:
        with gzip.open(io.BytesIO(_head(path))) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise DevkitError(f"{path}: unpacks to more than {MAX_BYTES:,} bytes; this is no ILSVRC devkit")
        listed = members(lambda size, at: data[at : at + size], 0, len(data), str(path), LeftOut())
        return {
            name.rpartition("/")[2]: data[offset : offset + size]
            for name, offset, size in listed
            if name.endswith(tuple(f"data/{file}" for file in wanted))
        }
    except (gzip.BadGzipFile, SourceError, EOFError, zlib.error) as error:
        raise DevkitError(f"{path}: damaged ({error}); fetch it again") from error


def _head(path: Location) -> bytes:
    """A file of the kit. Raises DevkitError where it is too large for one."""
    with storage.opened(path) as (read, _):
        data = read(MAX_BYTES + 1, 0)
    if len(data) > MAX_BYTES:
        raise DevkitError(f"{path}: has more than {MAX_BYTES:,} bytes; this is no ILSVRC devkit")
    return data
