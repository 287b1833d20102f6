"""The context of the endpoints: the site, the database, the scheduler, and the stream of events."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy.exc import SQLAlchemyError

from pipeline.service.database import Database, Event
from pipeline.service.queue import Queue
from pipeline.service.scheduler import Scheduler
from pipeline.service.site import Site

AGAIN = 1.0  # seconds between two looks at a database that does not answer
RECENT = 5_000  # events in memory
PIECE = 1_000  # events of one SELECT
ALIVE = 10.0  # seconds of silence after which a stream says that it is alive


@dataclass(frozen=True)
class Settings:
    """The options that the server was started with."""

    tls: bool = False
    tokens_required: bool = False
    feeds: tuple[str, ...] = ()  # addresses of decoding workers that are no jobs of this server


class Stream:
    """The events of the database, from any number on, to any number of readers: each event once, in order."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._last = self._floor = database.last_event()
        self._recent: deque[Event] = deque()  # all events after number `_floor`, up to `_last`
        self._changed = asyncio.Event()
        self.readers = 0

    async def run(self) -> None:
        """Fetch new events as soon as they are committed, until the task is cancelled."""
        loop, committed = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            loop.call_soon_threadsafe(committed.set)

        self._database.listeners.append(tell)
        try:
            while True:
                committed.clear()
                try:
                    while new := await asyncio.to_thread(self._database.events, self._last):
                        self._add(new)
                    await committed.wait()
                except SQLAlchemyError:  # a lost database, which may come back; the scheduler's thread tells of it
                    await asyncio.sleep(AGAIN)
        finally:
            self._database.listeners.remove(tell)

    def _add(self, new: list[Event]) -> None:
        self._recent.extend(new)
        while len(self._recent) > RECENT:
            self._floor = self._recent.popleft().id
        self._last = new[-1].id
        self._changed.set()
        self._changed = asyncio.Event()

    async def after(self, number: int, job: int | None = None) -> AsyncIterator[Event | None]:
        """Yield all events after a number, of all jobs or of one; None after a while without any. Never ends.

        A number beyond the newest event, of a database that is gone, means: from now on.
        """
        number = min(number, self._last)
        while True:
            changed, last, whole = self._changed, self._last, True  # before the look: no event falls between
            if number >= self._floor:
                new = [event for event in self._newer(number) if job in (None, event.job)]
            else:
                new = await asyncio.to_thread(self._database.events, number, job, PIECE)
                whole = len(new) < PIECE
            for event in new:
                yield event
            number = max(number, new[-1].id if new else 0, last if whole else 0)
            if whole:
                try:
                    await asyncio.wait_for(changed.wait(), ALIVE)
                except TimeoutError:
                    yield None

    def _newer(self, number: int) -> list[Event]:
        return list(takewhile(lambda event: event.id > number, reversed(self._recent)))[::-1]


@dataclass
class Service:
    site: Site
    database: Database
    queue: Queue
    scheduler: Scheduler
    settings: Settings = field(default_factory=Settings)
    stream: Stream = field(init=False)

    def __post_init__(self) -> None:
        self.stream = Stream(self.database)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Here = Annotated[Service, Depends(_service)]
