"""This process, from the first line of a program on: signals and lack of memory end it with one line; its streams."""

import ctypes
import io
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
NUMBERS = tuple(WORDS)
OUTPUT = "standard output"
AGAIN = 0.01  # seconds after which an interruption is raised once more
LIBC = ctypes.CDLL(None)  # here, not in a child between fork and exec
_raised: list[int] = []  # the number of the signal that has raised Interruption
LEAST = 2**28  # bytes of address space that the imports of a tool need; else libraries in C end the process, or crash


class _Output(io.FileIO):
    """Standard output, which its errors name: that its disk is full."""

    def write(self, data: Any) -> Any:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = OUTPUT
            raise


class Interruption(KeyboardInterrupt):
    """A signal, whose `number` it has. (Where KeyboardInterrupt itself has passed an exec, Python dies of SIGINT.)"""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def begin() -> None:
    """Prepare the process for a command: the first call of a program, before the imports that take long.

    Until a command runs, a signal ends the process at once, since nothing is begun. A signal that nohup or a shell's
    `&` ignores stays ignored. Closed standard streams are opened on /dev/null: else the next files, of this process
    and of its children, would have their numbers, and get what libraries print. Letters that the encoding of standard
    output lacks are escaped.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    options = {name: getattr(sys.stdout, name) for name in ("encoding", "line_buffering", "write_through")}
    options["errors"] = sys.stderr.errors  # Python's own choice there, backslashreplace
    output: Any = _Output(1, "wb", closefd=False)
    sys.stdout = io.TextIOWrapper(output if options["write_through"] else io.BufferedWriter(output), **options)
    sys.unraisablehook = _interrupt_again
    for number in handlers():
        signal.signal(number, _end)
    require_memory(LEAST)


def require_memory(least: int) -> None:
    """End the process if `ulimit -v` lets it have less than so many bytes."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < least:
        _leave(f"not enough memory: ulimit -v is {limit >> 10}; raise it to {least >> 10} or more", 2)


def handlers() -> dict[int, Any]:
    """Return the present handlers of NUMBERS, but for signals that are ignored."""
    present = {number: signal.getsignal(number) for number in NUMBERS}
    return {number: handler for number, handler in present.items() if handler != signal.SIG_IGN}


def interrupt(numbers: dict[int, Any]) -> None:
    """Let each of these signals raise Interruption, the first one alone."""
    _raised.clear()
    for number in numbers:
        signal.signal(number, _interrupt)


def taken() -> int | None:
    """Return, once, the signal that has raised Interruption, in whose place code in C may have put another error."""
    return _raised.pop() if _raised else None


def restore(before: dict[int, Any]) -> None:
    """Set the handlers again; after `begin` the signals are ignored from now on, since the program is ending."""
    for number, handler in before.items():
        signal.signal(number, signal.SIG_IGN if handler is _end else handler)


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold back the signals that end a program, which a terminal sends to all processes, until the block ends."""
    received: list[int] = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)  # which new processes inherit
    numbers = NUMBERS if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.signal(number, lambda n, frame: received.append(n)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for late in received:  # by a thread of a library, which no mask of ours reaches
            signal.raise_signal(late)


def end_with_parent(number: int, parent: int) -> None:
    """Let this process get a signal when its parent, of this process number, dies; on Linux."""
    if sys.platform == "linux":
        LIBC.prctl(1, number)  # PR_SET_PDEATHSIG of linux/prctl.h
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def _end(number: int, frame: FrameType | None) -> None:
    """End the process. No exception: one that is raised in an import may be swallowed."""
    _leave(WORDS[signal.Signals(number)], 128 + number)


def _leave(message: str, code: int) -> NoReturn:
    try:
        os.write(2, f"Error: {message}\n".encode())
    finally:
        os._exit(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise Interruption, once: a second signal must not interrupt the deletion of temporary files."""
    for ignored in NUMBERS:
        signal.signal(ignored, signal.SIG_IGN)
    _raised[:] = [number]
    raise Interruption(number)


def _interrupt_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Interrupt a moment later, where a destructor or the import of a Cython module has swallowed Interruption."""
    if "due to race condition" in str(unraisable.exc_value):  # a second signal, whose handler has just been taken away
        return None
    if not isinstance(unraisable.exc_value, Interruption):
        return sys.__unraisablehook__(unraisable)
    number = unraisable.exc_value.number
    signal.signal(signal.SIGALRM, lambda alarm, frame: _interrupt(number, frame))
    signal.setitimer(signal.ITIMER_REAL, AGAIN)
