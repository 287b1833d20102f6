"""What may fail in a measurement without ending the others: it is said in its own row."""

import subprocess

from pipeline import UserError

# torch's out of memory is a RuntimeError, and so is what it cannot compile
FAILURES = (RuntimeError, UserError, ImportError, AssertionError, OSError, subprocess.SubprocessError)


def reason(error: BaseException) -> str:
    """One line, at most 200 characters; where DALI or torch.compile wrap the cause, the cause."""
    text = str(error)
    for before in ("encountered:\n", "raised:\n"):
        text = text.partition(before)[2] or text
    return (text.strip().splitlines() or [type(error).__name__])[0][:200]
