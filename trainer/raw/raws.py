"""A raw picture to predict, before anything is known of it but its name; and why one cannot be predicted."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.decode import REASONS

BESIDE = (  # how the names of files end that lie beside pictures and are none
    *(".cls", ".csv", ".html", ".idx", ".json", ".jsonl", ".log", ".md", ".npy", ".npz", ".parquet", ".py"),
    *(".safetensors", ".toml", ".tsv", ".txt", ".xml", ".yaml", ".yml"),
)


@dataclass(frozen=True)
class Raw:
    """A file that should be a picture."""

    name: str  # the file's path or URL; of a member of a tar, after the tar's own
    size: int  # bytes
    read: Callable[[], bytes]  # raises OSError, StorageError; any thread may call it
    stored: bool = False  # a manifest says that the builder stored it: of its own size, it is taken as it is


@dataclass(frozen=True)
class Failure:
    """A picture, a folder or a tar that cannot be predicted."""

    name: str
    code: str  # of pipeline.image.REASONS, or "unreadable", or "bad_tar"
    reason: str


@dataclass
class LeftOut:
    """What was not taken for a picture."""

    kinds: Counter[str] = field(default_factory=Counter)
    empty: list[str] = field(default_factory=list)  # places without a picture

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.kinds.items()))


def useless(name: str, code: str) -> Failure:
    """A picture that is not decoded, for one of pipeline.image.REASONS."""
    return Failure(name, code, REASONS[code])


def unreadable(place: object, error: OSError) -> Failure:
    return Failure(str(place), "unreadable", error.strerror or str(error))


def no_picture(name: str) -> str:
    """What a file in a folder or a tar is by its name, if no picture; else empty."""
    last = name.rpartition("/")[2].lower()
    if last.startswith("."):
        return "hidden"
    return next((f"*{ending}" for ending in BESIDE if last.endswith(ending)), "")
