"""Signals that end a program with one line and an exit code, from its first line on: 130, 143, 129."""

import os
import signal
import sys
from types import FrameType
from typing import Any

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
NUMBERS = tuple(WORDS)
AGAIN = 0.01  # seconds after which an interruption is raised once more


def begin() -> None:
    """Prepare the process for a command: the first call of a program, before the imports that take long.

    Until a command runs, a signal ends the process at once, since nothing is begun. A signal that nohup or a shell's
    `&` ignores stays ignored. Closed standard streams are opened on /dev/null: else the next files, of this process
    and of its children, would have their numbers, and get what libraries print.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode))
    sys.unraisablehook = _interrupt_again
    for number in NUMBERS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)


def handlers() -> dict[int, Any]:
    """Return the present handlers of NUMBERS, but for signals that are ignored."""
    present = {number: signal.getsignal(number) for number in NUMBERS}
    return {number: handler for number, handler in present.items() if handler != signal.SIG_IGN}


def interrupt(numbers: dict[int, Any]) -> None:
    """Let each of these signals raise KeyboardInterrupt(number), the first one alone."""
    for number in numbers:
        signal.signal(number, _interrupt)


def restore(before: dict[int, Any]) -> None:
    """Set the handlers again; after `begin` the signals are ignored from now on, since the program is ending."""
    for number, handler in before.items():
        signal.signal(number, signal.SIG_IGN if handler is _end else handler)


def _end(number: int, frame: FrameType | None) -> None:
    """End the process. No exception: one that is raised in an import may be swallowed."""
    try:
        os.write(2, f"Error: {WORDS[signal.Signals(number)]}\n".encode())
    finally:
        os._exit(128 + number)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, once: a second signal must not interrupt the deletion of temporary files."""
    for ignored in NUMBERS:
        signal.signal(ignored, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def _interrupt_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Interrupt a moment later, where a destructor or the import of a Cython module has swallowed KeyboardInterrupt."""
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        return sys.__unraisablehook__(unraisable)
    number = unraisable.exc_value.args[0]
    signal.signal(signal.SIGALRM, lambda alarm, frame: _interrupt(number, frame))
    signal.setitimer(signal.ITIMER_REAL, AGAIN)
