"""MATLAB files by scipy, in a process of its own: damaged bytes can crash its reader, and end that process alone."""

import io
import multiprocessing
import resource
import struct
import zlib
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

Value = str | int | None
MAX_SECONDS, MAX_MEMORY = 60, 2 * 2**30  # of processor time; bytes of data. The real meta.mat takes 0.1 s
_READER_ERRORS = (
    NotImplementedError, ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError,
    OSError, EOFError, zlib.error, struct.error,
)  # fmt: skip


class MatError(ValueError):
    """Not a MAT-file of version 5, or damaged."""


def struct_rows(data: bytes, variable: str, fields: Collection[str]) -> list[dict[str, Value]]:
    """The rows of the struct array named `variable`, with those of `fields` that it has.

    Raises:
        MatError: no such variable, or bytes that cannot be read in bounded time and memory.
    """
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, context, _bound) as pool:
            return pool.submit(_read, data, variable, tuple(fields)).result()
    except BrokenProcessPool as error:
        raise MatError("its reader crashed on it, or ran out of time or memory") from error


def _bound() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _read(data: bytes, variable: str, fields: tuple[str, ...]) -> list[dict[str, Value]]:
    from scipy.io import loadmat  # here, in the child: the builder's workers need not hold it
    from scipy.io.matlab import MatReadError

    try:
        table = loadmat(io.BytesIO(data), squeeze_me=True, variable_names=[variable])[variable]
        known = [field for field in fields if field in (table.dtype.names or ())]
        return [{field: _plain(row[field]) for field in known} for row in table.reshape(-1)]
    except (MatReadError, *_READER_ERRORS) as error:
        raise MatError(f"{type(error).__name__}: {error}") from None


def _plain(value: Any) -> Value:
    """A string or a whole number; None for anything else."""
    if isinstance(value, str):
        return str(value)
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return None
