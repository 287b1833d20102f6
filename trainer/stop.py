"""A request to end: SIGTERM, Ctrl-C or a lost terminal lets the step in hand end and the run be saved."""

import signal
import threading
from types import FrameType
from typing import Any

from pipeline import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(UserError):
    """The end that was asked for, after the run was saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number  # as a shell has it: 143 for SIGTERM, 130 for SIGINT


class Stop:
    """Takes note of SIGTERM, SIGINT and SIGHUP while it is a context; a second one acts as it would have without it."""

    def __init__(self) -> None:
        self._asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and a shell's `&` have it
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @property
    def asked(self) -> bool:
        return self._asked is not None

    def obey(self, step: int) -> None:
        """Raise Stopped: the end was asked for, of this process or of another, and the run is saved up to `step`."""
        number = signal.SIGTERM if self._asked is None else self._asked
        name = signal.Signals(number).name if self._asked is not None else "another process was asked to end"
        raise Stopped(f"{name}: stopped and saved after step {step}; go on by --resume", number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
