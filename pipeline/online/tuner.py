"""Turns a loader's options while its consumer waits: one at a time, kept if it helped. Without a clock of its own."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from statistics import median
from typing import Any

from pipeline.online.stall import Wait

WINDOW, SECONDS = 10, 0.03  # steps, and seconds, of a measurement, at least
SETTLING = 4  # steps after a change that are not measured
WARM_UP = 8  # steps at the start
MOST_TRIALS = 12  # of an episode
QUIET = 500  # steps without a stall, after which another episode may begin
GAIN = 1.05  # times the images/s, for which a change is kept
PAUSE, LEAST_PAUSE = 10, 1.0  # times the median step, and seconds: then the consumer did something else
MOST_READERS = MOST_DEPTH = 16
LEFT = {  # cause → what is nothing to turn
    "reading": "a faster disk, or order='shards'",
    "decoding": "a raw tier (tools/raw_tier.py), or more CPU cores",
    "transfer": "a faster link to the device",
    "workers": "more of them",
}
NONE = Wait()
SHARES = (0.5, 0.7, 0.9, 0.95)  # of pictures, to a GPU's hardware decoder; those below are tried first


@dataclass(frozen=True)
class Setting:
    """Options of `Loader` that may be turned without changing a batch."""

    tier: str
    threads: int
    readers: int
    depth: int
    hardware_share: float


@dataclass(frozen=True)
class _Measured:
    """The consumer's rate and stall over a window."""

    rate: float  # images/s
    stall: float  # share of the time
    causes: list[str]  # that of most first; a slow stage that has been waited for while others work is not seen

    @property
    def cause(self) -> str:
        return self.causes[0]

    def __str__(self) -> str:
        return f"{100 * self.stall:.1f} %, {self.rate:,.0f} images/s"


@dataclass
class _Window:
    """The steps of one measurement."""

    wait: Wait
    seconds: list[float] = field(default_factory=list)  # of each step
    waited: list[float] = field(default_factory=list)  # of these, by the host
    images: list[int] = field(default_factory=list)
    last: Wait = NONE

    def add(self, seconds: float, images: int, wait: Wait, before: Wait) -> None:
        self.seconds.append(seconds)
        self.waited.append(wait.host - before.host)
        self.images.append(images)
        self.last = wait

    def measured(self) -> _Measured | None:
        """Return the outcome, once it is long enough. Steps with a pause of the consumer do not count."""
        usual = max(LEAST_PAUSE, PAUSE * median(self.seconds))
        steps = zip(self.seconds, self.waited, self.images)
        counted = [(s, images) for s, waited, images in steps if s <= usual or waited > s / 2]
        seconds = sum(s for s, _ in counted)
        if len(counted) < WINDOW or seconds < SECONDS:
            return None
        shares = (self.last - self.wait).shares(seconds)
        stall, causes = min(1.0, sum(shares.values())), sorted(shares, key=lambda name: -shares[name])
        return _Measured(sum(images for _, images in counted) / seconds, stall, causes)


class Tuner:
    """Watches the waiting of a consumer; turns what the cause of a stall names, and goes back where that gave nothing.

    What the other causes name is tried after that: a slow stage may be at work while the consumer waits for those
    behind it. No setting is tried twice in an episode, which has at most `MOST_TRIALS`: so it settles, and cannot go to
    and fro. A stall-free time of `QUIET` steps ends an episode. `said` gathers lines for the user, who empties it.
    """

    def __init__(self, setting: Setting, *, tiers: tuple[str, ...], cores: int, on_gpu: bool, max_stall: float) -> None:
        """`tiers`: those that may take turns; `max_stall`: a share of the time."""
        self.setting, self.said = setting, list[str]()
        self._tiers, self._cores, self._on_gpu, self._max_stall = tiers, cores, on_gpu, max_stall
        self._tried = set[Setting]()  # in this episode, and those that it left; a stage may help only after another
        self._tiers_tried = set[str]()  # each once, for a tier is made slowly
        self._kept: tuple[Setting, _Measured] | None = None  # before a change that is being tried
        self._quiet, self._told = 0, False
        self._skipped, self._window = WARM_UP, _Window(NONE)
        self._before, self._then = NONE, 0.0

    def after(self, step: int, images: int, wait: Wait, now: float) -> Setting | None:
        """Take note of a batch that the consumer got; return what the batches after it are to be made with, if new.

        `wait` is all waiting so far (`stall.Meter.total`), `now` the time in seconds by any clock.
        """
        seconds, before = now - self._then, self._before
        self._before, self._then = wait, now
        if self._skipped:
            self._skipped -= 1
            self._window = _Window(wait)
            return None
        self._window.add(seconds, images, wait, before)
        if not (measured := self._window.measured()):
            return None
        self._window = _Window(wait)
        chosen = self._judged(step, measured) if self._kept else self._watched(step, measured)
        if chosen is None or chosen == self.setting:
            return None
        self.setting, self._skipped = chosen, SETTLING
        return chosen

    def _watched(self, step: int, measured: _Measured) -> Setting | None:
        """Return what to try where there is a stall."""
        if measured.stall <= self._max_stall:
            self._quiet += WINDOW
            if self._quiet >= QUIET:
                self._tried.clear()
                self._tiers_tried.clear()
                self._told = False
            return None
        self._quiet = 0
        if chosen := self._next(self.setting, measured.causes):
            self._kept = self.setting, measured
            return chosen
        if not self._told:
            self._told = True
            self.said.append(f"step {step}: stall {measured}, {measured.cause}; what is left: {LEFT[measured.cause]}")
        return None

    def _judged(self, step: int, measured: _Measured) -> Setting | None:
        """Keep what is being tried, or return what to try next, or what was before."""
        assert self._kept
        before, then = self._kept
        text = f"step {step}: {_difference(before, self.setting)}"
        shifted = measured.cause != then.cause  # as fast, but limited by another stage: both have to be turned
        gain = measured.rate / then.rate
        if measured.stall <= self._max_stall or gain >= GAIN or (shifted and gain * GAIN >= 1):
            self.said.append(f"{text}: stall {then} → {measured}")
            self._kept = None
            return self._watched(step, measured)
        self.said.append(f"{text} gave nothing (stall {then} → {measured}, {measured.cause}); back")
        chosen = self._next(before, then.causes)
        if chosen is None:
            self._kept = None
        return chosen or before

    def _next(self, setting: Setting, causes: list[str]) -> Setting | None:
        """Return the first change of a setting that is not tried yet."""
        for name, value in chain.from_iterable(self._changes(setting, cause) for cause in causes):
            changed = replace(setting, **{name: value})
            known = changed in self._tried or (name == "tier" and value in self._tiers_tried)
            if not known and len(self._tried) <= MOST_TRIALS:
                self._tried |= {setting, changed}
                self._tiers_tried |= {setting.tier, changed.tier}
                return changed
        return None

    def _changes(self, setting: Setting, cause: str) -> Iterator[tuple[str, Any]]:
        """Yield what may help against a cause, the best first."""
        at = self._tiers.index(setting.tier)
        faster = [("tier", tier) for tier in self._tiers[at + 1 :]]
        if cause == "decoding":
            yield from faster
            if setting.threads < self._cores:
                yield "threads", min(2 * setting.threads, self._cores)
            if self._on_gpu and setting.tier == "jpeg":
                yield from (("hardware_share", share) for share in SHARES[::-1] if share < setting.hardware_share)
                yield from (("hardware_share", share) for share in SHARES if share > setting.hardware_share)
        elif cause == "reading":
            at_once = setting.readers if setting.tier == "jpeg" else max(setting.readers, setting.threads)
            if at_once < MOST_READERS:
                yield "readers", min(2 * at_once, MOST_READERS)
            yield from faster if setting.tier == "raw" else ()
            yield from (("tier", tier) for tier in self._tiers[:at] if tier == "jpeg")
        elif cause == "transfer":
            if setting.depth < MOST_DEPTH:
                yield "depth", min(2 * setting.depth, MOST_DEPTH)
            yield from (change for change in faster if change[1] == "device")


def _difference(before: Setting, after: Setting) -> str:
    """Return `readers 1 → 2`."""
    names = [name for name in Setting.__dataclass_fields__ if getattr(before, name) != getattr(after, name)]
    return ", ".join(f"{name.replace('_', ' ')} {getattr(before, name)} → {getattr(after, name)}" for name in names)
