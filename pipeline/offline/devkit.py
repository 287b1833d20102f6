"""The ILSVRC development kit: class words, the devkit's own class ids, the labels of the validation images."""

import gzip
import io
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from pipeline.errors import UserError

MAX_BYTES = 64 * 2**20  # of the kit unpacked; the real one has 6 MB


class DevkitError(UserError):
    """A development kit that is damaged or not one."""


@dataclass(frozen=True)
class Devkit:
    words: dict[str, str]  # wnid → words
    ids: dict[str, int]  # wnid → ILSVRC2012_ID, 1 … n, an order of its own
    validation: list[str]  # the wnid of each validation image, in ascending order of file names


def read_devkit(path: Path) -> Devkit:
    """Read ILSVRC2012_devkit_t12.tar.gz in memory, without unpacking it.

    Raises:
        DevkitError: a damaged archive, a missing member, or a ground truth that names unknown ids.
    """
    try:
        with gzip.open(path) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise DevkitError(f"{path}: unpacks to more than {MAX_BYTES} bytes; this is not the ILSVRC2012 devkit")
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            meta = _member(tar, path, "data/meta.mat")
            truth = _member(tar, path, "data/ILSVRC2012_validation_ground_truth.txt")
    except (gzip.BadGzipFile, tarfile.TarError, EOFError, zlib.error) as error:
        raise DevkitError(f"{path}: damaged ({error}); fetch it again") from error
    return parse_devkit(meta, truth, str(path))


def parse_devkit(meta: bytes, truth: bytes, where: str) -> Devkit:
    """meta.mat and the ground truth file → Devkit. Only leaves of the hierarchy (num_children 0) are classes."""
    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True, struct_as_record=True)["synsets"]
        leaves = [row for row in synsets if int(row["num_children"]) == 0]
        ids = {str(row["WNID"]): int(row["ILSVRC2012_ID"]) for row in leaves}
        words = {str(row["WNID"]): str(row["words"]) for row in leaves}
        numbers = [int(line) for line in truth.split()]
    except (MatReadError, KeyError, ValueError, TypeError, IndexError, zlib.error) as error:
        raise DevkitError(f"{where}: meta.mat or the ground truth is damaged ({error}); fetch it again") from error
    wnids = {number: wnid for wnid, number in ids.items()}
    unknown = sorted(set(numbers) - set(wnids))
    if unknown:
        raise DevkitError(f"{where}: the ground truth names class ids that meta.mat lacks: {unknown[:5]}")
    return Devkit(words, ids, [wnids[number] for number in numbers])


def _member(tar: tarfile.TarFile, path: Path, suffix: str) -> bytes:
    for member in tar:
        if member.isfile() and member.name.endswith(suffix):
            file = tar.extractfile(member)
            assert file is not None
            return file.read()
    raise DevkitError(f"{path}: has no …/{suffix}; this is not the ILSVRC2012 devkit")
