"""Error rates of predictions: top-1 and top-5 as in 2012, log-likelihood, by class, and who is taken for whom."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

LEAST = torch.finfo(torch.float64).tiny  # of a probability: its logarithm is finite


@dataclass(frozen=True)
class Evaluation:
    """Error rates in percent, and the mean negative log-likelihood in nats, over `samples` images."""

    samples: int
    top1_error: float
    top5_error: float
    nll: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Confusion:
    """So many images of the class `true` (a label) had `predicted` as their most probable one."""

    true: int
    predicted: int
    images: int
    share: float  # of the images of the class, in percent


class Tally:
    """Adds up predictions, batch by batch; `sums` of several are those of all their images."""

    def __init__(self, classes: int) -> None:
        self.sums = torch.zeros((classes, 4), dtype=torch.float64)  # images, wrong by top-1, wrong by top-5, nats
        self._confused: Counter[tuple[int, int]] = Counter()

    def add(self, labels: Tensor, chances: Tensor) -> None:
        """Labels (n,) int64, each of a class, and probabilities (n, classes) float64, on the CPU."""
        nats = -chances.gather(1, labels[:, None])[:, 0].clamp_min(LEAST).log()
        wrong = [top_k_errors(chances, labels, k) for k in (1, 5)]
        self.sums.index_add_(0, labels, torch.stack([torch.ones_like(nats), *wrong, nats], 1))
        predicted = chances.argmax(1)  # the first of several that are level
        missed = predicted != labels
        self._confused.update(zip(labels[missed].tolist(), predicted[missed].tolist()))

    def whole(self) -> Evaluation:
        """Over all images; there must be one at least."""
        return _evaluation(self.sums.sum(0))

    def by_class(self) -> list[Evaluation | None]:
        """By label; None for a class without images."""
        return [_evaluation(row) if row[0] else None for row in self.sums]

    def confused(self, most: int) -> list[Confusion]:
        """The pairs that are confused most often, at most so many; of equally frequent ones the lower labels first."""
        pairs = sorted(self._confused.items(), key=lambda item: (-item[1], item[0]))[:most]
        return [Confusion(*pair, images, 100 * images / float(self.sums[pair[0], 0])) for pair, images in pairs]


def _evaluation(sums: Tensor) -> Evaluation:
    images, wrong1, wrong5, nats = sums.tolist()
    return Evaluation(int(images), 100 * wrong1 / images, 100 * wrong5 / images, nats / images)


def top_k_errors(chances: Tensor, labels: Tensor, k: int) -> Tensor:
    """(n, classes), (n,) → (n,) in [0, 1]: 1 if at least k classes are strictly likelier; ties share the credit.

    As in the 2012 code: with `larger` classes strictly above and `equal` level with the true one (itself included),
    the credit is (k − larger) / equal, at most 1.
    """
    true = chances.gather(1, labels[:, None])
    larger = (chances > true).sum(1)
    equal = (chances == true).sum(1)
    return 1 - ((k - larger).double() / equal).clamp(0, 1)
