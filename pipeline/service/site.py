"""The folder of a server: data sets, runs and jobs by name, and the raw images that it may read."""

import os
import re
import secrets
import threading
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import UserError, manifest, storage
from pipeline.cli import printable
from pipeline.manifest import FILE_NAME, Manifest

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"  # of a data set or of a run
ENDINGS = (".", ".tmp")  # that no name has
RUN_FILES = ("recipe.json", "history.json", "metrics.jsonl", "checkpoints")  # of which a run's folder has one


class Missing(UserError):
    """A data set, a run or a job that the server does not have."""


@dataclass(frozen=True)
class Site:
    """`root` is the server's folder; builds and repairs read raw images below one of `raw_roots`, folders or URLs."""

    root: Path
    raw_roots: tuple[str, ...] = ()
    _manifests: dict[str, tuple[tuple[int, str], Manifest]] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def datasets(self) -> Path:
        return self.root / "datasets"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def jobs(self) -> Path:
        return self.root / "jobs"

    @property
    def feed_token(self) -> Path:
        return self.root / "feed.token"

    def make(self) -> None:
        """Make the folders, and the secret that decoding workers and trainers share. Raises OSError."""
        for folder in (self.datasets, self.runs, self.jobs):
            folder.mkdir(parents=True, exist_ok=True)
        if not self.feed_token.exists():  # one server at a time works here
            with open(os.open(self.feed_token, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(secrets.token_hex(32) + "\n")

    def dataset_names(self) -> list[str]:
        """Return the names of all finished data sets, in their order."""
        return [name for name in _names(self.datasets) if (self.datasets / name / FILE_NAME).is_file()]

    def dataset(self, name: str) -> Manifest:
        """Return the manifest of a data set, loaded again where its file has changed.

        Raises Missing: there is none of that name; DatasetError: it is damaged.
        """
        root = self.datasets / name
        if not is_name(name) or not self._inside(root) or not (root / FILE_NAME).is_file():
            raise Missing(f"{name:.80}: no such data set; there are: {_listed(self.dataset_names())}")
        stamp = storage.stamp(root / FILE_NAME)
        if (known := self._manifests.get(name)) and known[0] == stamp:
            return known[1]
        with self._lock:  # one thread loads what many ask for at once
            if not (known := self._manifests.get(name)) or known[0] != stamp:
                known = self._manifests[name] = stamp, manifest.load(root)
            return known[1]

    def run_names(self) -> list[str]:
        """Return the names of all runs, in their order."""
        return [name for name in _names(self.runs) if _is_run(self.runs / name)]

    def run(self, name: str) -> Path:
        """Return the folder of a run. Raises Missing."""
        if not is_name(name) or not self._inside(self.runs / name) or not _is_run(self.runs / name):
            raise Missing(f"{name:.80}: no such run; there are: {_listed(self.run_names())}")
        return self.runs / name

    def raw(self, text: str) -> str:
        """Return RAW as builds take it: below a folder of raw images, links resolved.

        Raises UserError: it lies elsewhere, or is not there.
        """
        if "\0" in text or len(text) > 4096:
            raise UserError("raw: not a path")
        path = text.rstrip("/") if storage.is_remote(text) else os.path.realpath(text)
        roots = [root.rstrip("/") if storage.is_remote(root) else os.path.realpath(root) for root in self.raw_roots]
        below = any(f"{path}/".startswith(f"{root}/".replace("//", "/", root == "/")) for root in roots)
        if not below or ".." in path.split("/"):
            allowed = _listed(list(self.raw_roots)) if roots else "none; name some by `penstock serve --raw-root DIR`"
            raise UserError(f"{printable(text)}: not below a folder of raw images of this server ({allowed})")
        if not storage.is_remote(path) and not os.path.exists(path):
            raise UserError(f"{printable(text)}: no such file or folder")
        return path

    def _inside(self, path: Path) -> bool:
        """Return whether a path, links resolved, lies in the server's folder."""
        return os.path.realpath(path).startswith(os.path.realpath(self.root) + os.sep)


def is_name(text: str) -> bool:
    """Return whether a data set or a run may have this name."""
    return re.fullmatch(NAME, text) is not None and not text.endswith(ENDINGS)


def _is_run(folder: Path) -> bool:
    return any((folder / file).exists() for file in RUN_FILES)


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if is_name(entry.name) and entry.is_dir())


def _listed(names: list[str], most: int = 10) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"
