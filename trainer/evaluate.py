"""Error rates over every image of a split: centre view, or the mean of the ten views' probabilities."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.manifest import Manifest
from trainer import feed
from trainer.parallel import Columns
from trainer.recipe import Recipe
from trainer.watch import Diverged

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


@torch.inference_mode()
def evaluate(network: Columns, data: Manifest, recipe: Recipe, split: str, views: str) -> Evaluation:
    """Evaluate every labelled image of `split` exactly once. Raises UserError where it is empty or has no labels."""
    wrong1 = wrong5 = nll = 0.0
    samples = 0
    with feed.evaluation(data, recipe, split, views, network.devices) as loader:
        for batch in loader:
            if int(batch.labels.min()) < 0:
                raise UserError(
                    f"{data.root}: the split {split!r} has images without a label; it can be predicted, not evaluated"
                )
            chances = probabilities(network, batch.replicas)
            if not bool(chances.isfinite().all()):
                raise Diverged("the network's outputs are not finite numbers: its training has diverged")
            wrong1 += float(top_k_errors(chances, batch.labels, 1).sum())
            wrong5 += float(top_k_errors(chances, batch.labels, 5).sum())
            nll -= float(chances.gather(1, batch.labels[:, None]).clamp_min(LEAST).log().sum())
            samples += len(batch.labels)
    return Evaluation(samples, 100 * wrong1 / samples, 100 * wrong5 / samples, nll / samples)


def probabilities(network: Columns, images: Tensor | Sequence[Tensor]) -> Tensor:
    """(n, 3, size, size), or (n, views, 3, size, size) which are averaged, or the same for each column → softmax
    (n, classes) float64."""
    each = [images] * len(network.devices) if isinstance(images, Tensor) else images
    if each[0].dim() == 4:
        return network(each).double().softmax(1)
    n, views = each[0].shape[:2]
    return network([image.flatten(0, 1) for image in each]).double().softmax(1).unflatten(0, (n, views)).mean(1)


def top_k_errors(chances: Tensor, labels: Tensor, k: int) -> Tensor:
    """(n, classes), (n,) → (n,) in [0, 1]: 1 if at least k classes are strictly likelier; ties share the credit.

    As in the 2012 code: with `larger` classes strictly above and `equal` level with the true one (itself included),
    the credit is (k − larger) / equal, at most 1.
    """
    true = chances.gather(1, labels[:, None])
    larger = (chances > true).sum(1)
    equal = (chances == true).sum(1)
    return 1 - ((k - larger) / equal).clamp(0, 1)
