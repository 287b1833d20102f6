"""Object stores and HTTP servers: their file systems; what fails for a moment is retried, the rest one line."""

import errno
import os
import random
import re
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from pipeline import UserError
from pipeline.served import SERVER, TOKEN, ServedFiles, is_restarting

T = TypeVar("T")
TRIES, PATIENCE, FIRST_WAIT = 5, 60.0, 0.2  # none begins after 5, or 60 s; the wait doubles, less up to half at random
LAST_WAIT = 5.0  # seconds, the longest; a server that is perhaps being started again is asked more than 5 times
S3, WEB = ("s3", "s3a"), ("http", "https")  # protocols
STORES = (*S3, *WEB, "abfs", "abfss", "az", "gcs", "gs", "hf", "memory", "oci", "oss")  # whose URLs say all
# botocore tries a request 3 times, so that one bad answer does not cost a whole upload; what lasts longer, or breaks
# amid an answer, `retried` tries again. s3fs's own 5 tries would multiply with both.
S3_CLIENT = {"retries": {"mode": "standard", "total_max_attempts": 3}, "max_pool_connections": 32}
# Errors that pass, by status or code (https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html).
# NoSuchUpload: the answer to our "complete" was lost and we asked again, or another deleted the parts.
PASSING_STATUS = {408, 429, 500, 502, 503, 504}
PASSING_CODES = {"BadDigest", "IncompleteBody", "NoSuchUpload", "RequestTimeout", "XAmzContentSHA256Mismatch"}
LASTING = (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
CLIENT_ERRORS = {  # of optional packages: failures of the store or of the way to it
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "botocore.parsers": ("ResponseParserError",),
}
NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}  # botocore's
CREDENTIALS = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (public bucket: FSSPEC_S3_ANON=true)"
WEB_CREDENTIALS = f"set {TOKEN} to a token of that server (and {SERVER}, if set, to its URL)"


class StorageError(UserError):
    """An object store or an HTTP server that cannot be reached, refuses us, or failed too often."""


@cache
def filesystem(protocol: str) -> Any:
    """Return this process's one file system of a protocol; its threads share connections. Raises UserError."""
    if protocol in WEB:
        return ServedFiles()
    import fsspec

    options: dict[str, Any] = {}
    if protocol in S3:  # the environment may add to the client's options: FSSPEC_S3='{"config_kwargs": …}'
        client = S3_CLIENT | fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        options = {"config_kwargs": client, "use_listings_cache": False, "max_concurrency": 4}  # parts of an upload
    try:
        fs = fsspec.filesystem(protocol, **options)
    except (ImportError, ValueError, TypeError) as error:
        remedy = "pip install 'penstock-imagenet[s3]'" if options else "use s3://BUCKET/FOLDER, or install its package"
        raise UserError(f"{protocol}://: {error}; {remedy}") from error
    if options:
        fs.retries = 1  # see S3_CLIENT
    return fs


def protocol_of(text: str) -> str:
    """Return the protocol of a URL; "" for a path."""
    match = re.match(r"([a-z][a-z0-9+.-]+)://", text)
    return match[1] if match else ""


def retried(remote: object, doing: str, action: Callable[[Any, str], T]) -> T:
    """Return `action(file system, path)`, retried; raise FileNotFoundError, FileExistsError, else StorageError."""
    url, tries, began = str(remote), 0, time.monotonic()
    fs = filesystem(protocol_of(url))
    path = fs._strip_protocol(url) + ("/" if url.endswith("/") else "")
    while True:
        try:
            tries += 1
            fs.invalidate_cache(path)  # other machines write there too
            return action(fs, path)
        except _failures() as error:
            seconds = time.monotonic() - began
            passes, explained = _explained(url, doing, error, f"{tries} tries in {seconds:.0f} s")
            if not passes or seconds > PATIENCE or (tries >= TRIES and not is_restarting(url, error)):
                raise explained from error
        time.sleep(min(FIRST_WAIT * 2 ** (tries - 1), LAST_WAIT) * random.uniform(0.5, 1))


def _failures() -> tuple[type[Exception], ...]:
    """Return what file systems raise that is not our mistake; ValueError: an impossible endpoint or bucket name."""
    loaded = [(sys.modules.get(module), names) for module, names in CLIENT_ERRORS.items()]
    return (OSError, ValueError, *(getattr(module, name) for module, names in loaded if module for name in names))


def _explained(url: str, doing: str, error: Exception, tries: str) -> tuple[bool, Exception]:
    """Return whether an error may pass in a moment, and the exception that tells the user of it in one line."""
    if isinstance(error, UserError):
        return False, error
    response: Any = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    answer = response if isinstance(response, dict) else {}  # else aiohttp's
    code = str(answer.get("Error", {}).get("Code", ""))
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", getattr(error, "status", None))
    denied = isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ in NO_CREDENTIALS
    unanswered = not (code or status or denied or isinstance(error, LASTING))
    passes = unanswered or code in PASSING_CODES or status in PASSING_STATUS or (status == 409 and "Error" in answer)
    if isinstance(error, FileNotFoundError | FileExistsError) and not passes and code != "NoSuchBucket":
        number = errno.ENOENT if isinstance(error, FileNotFoundError) else errno.EEXIST
        return False, OSError(number, os.strerror(number), url)
    reason = re.sub(r"\s+", " ", str(error)).strip().rstrip(".")[:240] or type(error).__name__
    reason = reason if code in reason else f"{code}: {reason}"
    endpoint = " and AWS_ENDPOINT_URL" if url.startswith("s3") else ""
    remedy = "correct the URL, or create the bucket" if code == "NoSuchBucket" else f"correct the URL{endpoint}"
    if passes:
        reason, remedy = f"{reason} ({tries})", f"check the network{endpoint}, then run the same command again"
    elif denied:
        others = WEB_CREDENTIALS if protocol_of(url) in WEB else "check the store's credentials"
        reason, remedy = f"access denied ({reason})", CREDENTIALS if endpoint else others
    elif status and protocol_of(url) in WEB:  # the server says what to do, or nobody
        return False, StorageError(f"{url}: cannot {doing}: {reason}")
    return passes, StorageError(f"{url}: cannot {doing}: {reason}; {remedy}")
