"""Read JSON as the dataclass, numpy's files as the arrays, that they should be: types, ranges, shapes are checked."""

import errno
import io
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from typing import Annotated, Any, BinaryIO, TypeAlias, TypeVar

import msgspec
import numpy as np

from pipeline import UserError

Kind = TypeVar("Kind")
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
# Of an array: the beginnings of numpy's name for its type ("<i8", "<U"), and its shape, None for any length.
Array: TypeAlias = tuple[str | tuple[str, ...], tuple[int | None, ...]]
LONGEST = 200  # characters of a message, which may hold a value of any length
PARSER_ERRORS = (  # of zipfile and tarfile, and of numpy, which parses a header as Python's source
    zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError, SyntaxError, EOFError,
    ValueError, TypeError, LookupError, RuntimeError, ArithmeticError, MemoryError, Warning,
)  # fmt: skip


def from_json(data: bytes | str, kind: type[Kind]) -> Kind:
    """Return JSON as a value of `kind`: a dataclass, TypedDict, or container of such. Unknown keys are passed over.

    Numbers are finite; a whole number may stand for a floating one, and nothing else is converted.
    Raises UserError, without the file's name: no JSON, too deeply nested, or a value of another type or out of range.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (ValueError, RecursionError) as error:
        raise UserError(_reason(error)) from error


def from_values(value: Any, kind: type[Kind]) -> Kind:
    """Return what a parser of JSON or TOML gave as a value of `kind`. Raises UserError as `from_json`."""
    try:
        return msgspec.convert(value, type=kind)
    except (ValueError, RecursionError) as error:
        raise UserError(_reason(error)) from error


def from_npy(data: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Return the array that an .npy file holds, a read-only view of `data`. Raises UserError as `from_json`."""
    try:
        file = io.BytesIO(data)
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("another version of the format")
        actual, by_columns, kind = np.lib.format.read_array_header_1_0(file)
        expected = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if (actual, kind) != (shape, dtype) or by_columns > (len(shape) < 2) or len(data) - file.tell() != expected:
            have = f"{kind.str} of shape {actual} in {len(data) - file.tell():,} bytes"
            raise ValueError(f"{have}, not {dtype.str} of shape {shape} in {expected:,}")
        return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)
    except PARSER_ERRORS as error:
        raise UserError(_one_line(error)) from error


def from_npz(file: BinaryIO, kinds: Mapping[str, Array]) -> dict[str, np.ndarray]:
    """Return those arrays of an .npz file, of numpy.savez, that `kinds` names. Raises OSError, UserError as above.

    Numbers are finite. Compressed members, which could fill the memory, and pickled objects are refused.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("a member is compressed")
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: _checked(name, arrays[name], *kind) for name, kind in kinds.items()}
    except (*PARSER_ERRORS, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # of a seek to a negative offset
            raise
        raise UserError(_one_line(error)) from error


def _checked(name: str, array: np.ndarray, types: str | tuple[str, ...], shape: tuple[int | None, ...]) -> np.ndarray:
    if not isinstance(array, np.ndarray) or not array.dtype.str.startswith(types):
        raise ValueError(f"{name} is no array of {types}")
    if len(array.shape) != len(shape) or any(length not in (None, n) for n, length in zip(array.shape, shape)):
        raise ValueError(f"{name} has the shape {array.shape}, not {shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name} holds numbers that are not finite")
    return array


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:LONGEST] or type(error).__name__


def _reason(error: Exception) -> str:
    """Return msgspec's message with the key in front: `files[...].bytes: expected int >= 0`."""
    text, _, key = str(error).replace("`", "").replace("key in $", "$").partition(" - at $")
    text = text[:LONGEST] if text[:2].isupper() else text[:1].lower() + text[1:LONGEST]
    return f"{re.sub('^[.]', '', key)}: {text}" if key else text
