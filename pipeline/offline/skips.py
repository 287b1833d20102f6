"""How many images of a split may be skipped before a build fails: data that is damaged on a large scale is noticed."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline import UserError
from pipeline.offline.shards import Outcome


class TooManySkipped(UserError):
    """More images were skipped than the user allows."""


@dataclass(frozen=True)
class SkipLimit:
    """At most `count` images of a split, or `percent` of it where that is more."""

    count: int = 10
    percent: float = 0.1

    @classmethod
    def parse(cls, text: str) -> "SkipLimit":
        """`25` images or `0.5%`. Raises UserError."""
        found = re.fullmatch(r"([0-9]{1,9})|([0-9]{1,3}(?:\.[0-9]{1,6})?)%", text.strip())
        if not found or float(found[2] or 0) > 100:
            raise UserError(f"--max-skipped {text}: neither a number of images, such as 25, nor a share, such as 0.5%")
        return cls(count=int(found[1]), percent=0.0) if found[1] else cls(count=0, percent=float(found[2]))

    def counter(self, images: Mapping[str, int]) -> "SkipCounter":
        """A counter for splits of so many images."""
        return SkipCounter({split: max(self.count, math.floor(n * self.percent / 100)) for split, n in images.items()})


SKIP_LIMIT = SkipLimit()


class SkipCounter:
    """What was skipped of each split so far."""

    def __init__(self, allowed: Mapping[str, int]) -> None:
        self._allowed = allowed
        self._skipped: dict[str, Counter[str]] = {split: Counter() for split in allowed}

    def add(self, outcome: Outcome) -> None:
        """Count a shard's skipped images. Raises TooManySkipped."""
        split = outcome.name.partition("/")[0]
        reasons = self._skipped[split]
        reasons += outcome.skipped
        if reasons.total() > self._allowed[split]:
            told = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
            raise TooManySkipped(
                f"{split}: {reasons.total():,} images skipped so far ({told}), at most {self._allowed[split]:,} may "
                "be; the finished shards stay. Mend RAW and run the same command with --retry-skipped, or allow more "
                "with --max-skipped"
            )
