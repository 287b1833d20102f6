"""What goes wrong between here and an object store: what is tried again, and the one line that tells of the rest."""

import errno
import os
import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pipeline import UserError

TRIES = 5
FIRST_WAIT = 0.2  # seconds before the second try; doubles with each, and is cut by up to half at random
LONGEST_WAIT = 5.0  # seconds
PATIENCE = 60.0  # seconds after which no further try begins

# S3's error codes (https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html) that pass, though their status
# is not 5xx. NoSuchUpload: the answer to our "complete" was lost, and we asked again; or the upload was swept away.
PASSING_CODES = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "NoSuchUpload",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
}
PASSING_STATUS = {408, 429, 500, 502, 503, 504}
PASSING_KINDS = {  # botocore's and aiohttp's: no connection, one that broke, an answer cut short or garbled
    "ClientError",
    "ConnectionError",
    "FlexibleChecksumError",
    "HTTPClientError",
    "IncompleteReadError",
    "ResponseParserError",
}
FILE_ERRORS: dict[type[OSError], int] = {  # that are raised as for a local file
    FileExistsError: errno.EEXIST,
    FileNotFoundError: errno.ENOENT,
    IsADirectoryError: errno.EISDIR,
    NotADirectoryError: errno.ENOTDIR,
}
LASTING_NUMBERS = {
    errno.EINVAL,
    errno.EMSGSIZE,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOSYS,
    errno.ENOTEMPTY,
    errno.EPERM,
    errno.EREMCHG,
    errno.EROFS,
}

T = TypeVar("T")


class StorageError(UserError):
    """An object store that cannot be reached, refuses us, or failed too often."""


def retried(url: str, doing: str, action: Callable[[], T]) -> T:
    """The result of `action`, tried again where it failed for a reason that passes.

    Args:
        url, doing: for messages: "s3://bucket/key", "read".
    Raises:
        FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError: as for a local file.
        StorageError: everything else, in one line.
    """
    began = time.monotonic()
    tried = 0
    while True:
        try:
            tried += 1
            return action()
        except failures() as error:
            seconds = time.monotonic() - began
            if not passes(error):
                raise _lasting(url, doing, error) from error
            if tried >= TRIES or seconds > PATIENCE:
                raise StorageError(
                    f"{url}: cannot {doing}: {_why(error)} ({tried} tries in {seconds:.0f} s); "
                    f"check the network{_settings(url)}, then run the same command again"
                ) from error
        time.sleep(min(FIRST_WAIT * 2 ** (tried - 1), LONGEST_WAIT) * random.uniform(0.5, 1))


def failures() -> tuple[type[Exception], ...]:
    """What fsspec's file systems raise for what is not our mistake. Of optional packages: only what is installed."""
    found: list[type[Exception]] = [OSError, ValueError]  # ValueError: an endpoint or a bucket with an impossible name
    try:
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        found += [BotoCoreError, ClientError, ResponseParserError]
    except ImportError:
        pass
    try:
        from aiohttp import ClientError as HTTPError

        found.append(HTTPError)
    except ImportError:
        pass
    return tuple(found)


def passes(error: Exception) -> bool:
    """Whether the same request may well succeed in a moment."""
    code, status = answer(error)
    if code or status:
        return code in PASSING_CODES or status in PASSING_STATUS
    if isinstance(error, OSError):
        return not isinstance(error, (*FILE_ERRORS, PermissionError)) and error.errno not in LASTING_NUMBERS
    return any(kind.__name__ in PASSING_KINDS for kind in type(error).__mro__) and not isinstance(error, ValueError)


def answer(error: BaseException) -> tuple[str, int]:
    """The server's error code and HTTP status; "" and 0 where it did not answer."""
    response: Any = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return str(response.get("Error", {}).get("Code", "")), int(status)
    status = getattr(error, "status", 0)  # aiohttp's
    return "", status if isinstance(status, int) else 0


def _lasting(url: str, doing: str, error: Exception) -> Exception:
    """The exception that tells the user of an error that does not pass."""
    code, status = answer(error)
    if code == "NoSuchBucket":
        return StorageError(f"{url}: no such bucket; correct the URL, or create the bucket")
    if isinstance(error, PermissionError) or status in (401, 403):
        return StorageError(f"{url}: cannot {doing}: access denied ({_why(error)}); {_credentials(url)}")
    for kind, number in FILE_ERRORS.items():
        if isinstance(error, kind):
            return kind(number, os.strerror(number), url)
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
        return StorageError(f"{url}: cannot {doing}: {_why(error)}; {_credentials(url)}")
    return StorageError(f"{url}: cannot {doing}: {_why(error)}; correct the URL{_settings(url)}")


def _why(error: Exception) -> str:
    """An exception's words on one line, with the server's code."""
    code, _ = answer(error)
    words = re.sub(r"\s+", " ", str(error)).strip().rstrip(".") or type(error).__name__
    words = words if len(words) <= 240 else words[:237] + "..."
    return f"{code}: {words}" if code and code not in words else words


def _settings(url: str) -> str:
    return " and AWS_ENDPOINT_URL" if url.startswith("s3") else ""


def _credentials(url: str) -> str:
    if not url.startswith("s3"):
        return "check the store's credentials"
    return "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (a public bucket: FSSPEC_S3_ANON=true)"
