"""Checkpoints in the background: training goes on while the one before is written."""

import errno
import os
import secrets
import shutil
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType

from pipeline import UserError
from pipeline.files import ASIDE, sweep, sync_folder, write_aside
from trainer import checkpoint as checkpoints
from trainer.checkpoint import Checkpoint

NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS}  # of file systems without hard links
REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
}


class Saver:
    """Writes the checkpoints of a run, one at a time; the newest `keep` stay, and best.safetensors.

    An interpreter that exits waits for the write in hand.
    """

    def __init__(self, run: Path, keep: int) -> None:
        """Delete what writers that were killed left: no other may write checkpoints of this run now."""
        if keep < 1:
            raise ValueError(f"keep = {keep}: at least 1")
        self._run, self._keep = run, keep
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        sweep(run / checkpoints.FOLDER)

    def save(self, checkpoint: Checkpoint, best: bool = False) -> Path:
        """Begin to write a checkpoint, and return the path that it will have.

        Nobody may change its tensors from now on; its other values are copied. Waits for the write before this one.

        Args:
            best: RUN/checkpoints/best.safetensors becomes this one, too.
        Raises:
            UserError: the write before this one has failed; this one is not begun.
            ValueError, TypeError: the checkpoint is not as it should be (see `checkpoint.serialised`).
        """
        self._wait()
        path = checkpoints.step_file(self._run, checkpoint.step)
        self._pending = self._worker.submit(self._write, path, checkpoints.serialised(checkpoint), best)
        return path

    def look(self) -> None:
        """Raise UserError if the write in hand has failed by now. Does not wait."""
        if self._pending and self._pending.done():
            self._wait()

    def close(self) -> None:
        """Wait for the last write. Raises UserError if it failed."""
        self._worker.shutdown(wait=True)
        self._wait()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        self._worker.shutdown(wait=True)
        failed = self._pending.exception() if self._pending else None
        if failed and failed is not error:
            error.add_note(str(failed))  # the body's own exception is the one to see

    def _wait(self) -> None:
        if self._pending:
            wait([self._pending])  # an interruption here leaves it pending
            pending, self._pending = self._pending, None
            pending.result()

    def _write(self, path: Path, parts: list[bytes | memoryview], best: bool) -> None:
        target = path
        try:
            if best:  # first: a run killed between the two is resumed from before, and finds it the best again
                target = checkpoints.best_file(self._run)
                checkpoints.write(target, parts)
                _link(target, path)
            else:
                checkpoints.write(path, parts)
            # the one just written stays, whatever its step
            others = [file for file in checkpoints.files(self._run) if file != path]
            for target in others[: max(0, len(others) - self._keep + 1)]:
                target.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{target}: {error.strerror}; {self._advice(error)}") from error

    def _advice(self, error: OSError) -> str:
        remedy = REMEDIES.get(error.errno or 0, "mend that")
        whole = [file.stem.removeprefix("step-") for file in checkpoints.files(self._run)]
        if not whole:
            return f"there is no older checkpoint; {remedy}, then start again"
        return f"the checkpoint of step {int(whole[-1])} stays; {remedy}, then go on by --resume"


def _link(file: Path, to: Path) -> None:
    """Make `to` another name of `file`, atomically; a copy of it where the file system has no hard links."""
    aside = to.with_name(f"{to.name}.{secrets.token_hex(4)}{ASIDE}")
    try:
        os.link(file, aside)
        os.replace(aside, to)
        sync_folder(to.parent)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with open(file, "rb") as source:
            write_aside(to, lambda out: shutil.copyfileobj(source, out, 2**20))
    finally:
        aside.unlink(missing_ok=True)  # also where `to` was that file already: the replacement then does nothing
