"""Several networks as one: the weighted mean of their probabilities (paper, section 6; the 2012 code's averages)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from pipeline import UserError
from pipeline.manifest import Manifest
from trainer import checkpoint as checkpoints
from trainer import probabilities
from trainer.checkpoint import Checkpoint, load_network, require_classes
from trainer.data import require_pictures
from trainer.devices import choose_devices
from trainer.evaluate import Progress, labelled, predictions
from trainer.probabilities import Origin, Probabilities
from trainer.tally import Evaluation, Tally

ROUNDS, CHANGE = 10_000, 1e-10  # of fitting: it ends where no weight changes by more
LEAST = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class Member:
    """A network, or what was saved of one."""

    place: Path
    source: Checkpoint | Probabilities

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes if isinstance(self.source, Checkpoint) else self.source.origin.classes

    @property
    def name(self) -> str:
        return f"{self.place}, step {self.source.step}" if isinstance(self.source, Checkpoint) else str(self.place)


@dataclass(frozen=True)
class Mean:
    """What an ensemble finds on a split; errors are None where not every image has a label."""

    whole: Probabilities
    together: Evaluation | None
    alone: tuple[Evaluation | None, ...]


@dataclass(frozen=True)
class Ensemble:
    """Networks of the same classes.

    Args:
        dataset: what runs compute on, and saved probabilities must be of; None: there are saved ones alone.
        views, devices: of runs; see `evaluate.predictions` and `devices.choose_devices`.
    Raises:
        UserError: their classes differ, or a run has no data set, or one that it cannot see, or no devices.
    """

    members: tuple[Member, ...]
    dataset: Manifest | None
    views: str = "ten"
    devices: str | None = None
    progress: Progress | None = None
    _kept: dict[tuple[int, str], Probabilities] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = self.members[0]
        for member in self.members:
            require_classes(member.classes, first.classes, member.place, first.place)
            if self.dataset is None and isinstance(member.source, Checkpoint):
                raise UserError(f"{member.place}: name the data set that it is to see, too: --data DATASET")
        if self.dataset is not None:
            wnids = tuple(record.wnid for record in self.dataset.classes)
            require_classes(first.classes, wnids, first.place, self.dataset.root)
            for recipe in (each.source.recipe for each in self.members if isinstance(each.source, Checkpoint)):
                require_pictures(self.dataset, recipe)
                choose_devices(self.devices, recipe.model.columns)

    def require_split(self, split: str, labels: bool = False) -> None:
        """Raise UserError where a split is not there, empty or without the `labels` that are needed, or where saved
        probabilities are of another split or data set than they are asked for."""
        if self.dataset is not None:
            if not self.dataset.split(split).samples:
                raise UserError(f"{self.dataset.root}: the split {split!r} is empty; name another")
            if labels and not labelled(self.dataset, split):
                raise _unlabelled(self.dataset.root, split)
        identity = self.dataset.identity if self.dataset else None
        for member in self.members:
            if isinstance(member.source, Probabilities):
                origin = member.source.origin
                identity = identity or origin.dataset
                if origin.split != split:
                    raise UserError(
                        f"{member.place}: probabilities of the split {origin.split!r}, not of {split!r}; "
                        f"save those with evaluate --split {split} --save-probabilities, or name the run"
                    )
                if origin.dataset != identity:
                    raise UserError(
                        f"{member.place}: probabilities of the data set {origin.dataset[:12]}, not of {identity[:12]}; "
                        "save them anew"
                    )

    def fitted(self, split: str, keep: bool) -> np.ndarray:
        """(members,) float64: `fitted_weights` on a split. `keep` its probabilities for `mean`, in memory.

        Raises:
            UserError: an image of it has no label; as `mean`.
        """
        true: list[np.ndarray] = []
        labels = np.zeros(0)
        for i, member in enumerate(self.members):
            mine = self._values(i, split)
            if mine.labels.min() < 0:
                raise _unlabelled(member.place, split)
            labels = labels if i else mine.labels
            self._require_labels(i, mine.labels, labels)
            true.append(mine.values[np.arange(len(mine.labels)), mine.labels])
            if keep:
                self._kept[i, split] = mine
        return fitted_weights(np.stack(true))

    def mean(self, weights: np.ndarray, split: str) -> Mean:
        """The mean of all on a split, and how each errs. One network's probabilities are in memory at a time.

        Raises:
            UserError: data and networks do not fit together; the split is empty; labels differ.
            Diverged: a network's outputs are not finite numbers.
        """
        alone, views, first = [], [], self._values(0, split)
        total = np.zeros_like(first.values)
        for i, weight in enumerate(weights):
            mine = self._values(i, split) if i else first
            self._require_labels(i, mine.labels, first.labels)
            total += weight * mine.values
            alone.append(errors(mine))
            views.append(mine.origin.views)
        names = tuple(member.name for member in self.members)
        origin = replace(first.origin, networks=names, views=", ".join(dict.fromkeys(views)))
        whole = Probabilities(origin, first.labels, total)
        return Mean(whole, errors(whole), tuple(alone))

    def _require_labels(self, i: int, mine: np.ndarray, first: np.ndarray) -> None:
        if not np.array_equal(mine, first):
            raise UserError(f"{self.members[i].place}: has other labels than {self.members[0].place}; save both anew")

    def _values(self, i: int, split: str) -> Probabilities:
        member = self.members[i]
        if isinstance(member.source, Probabilities):
            return member.source
        assert self.dataset is not None
        return self._kept.get((i, split)) or self._computed(member, member.source, self.dataset, split)

    def _computed(self, member: Member, checkpoint: Checkpoint, dataset: Manifest, split: str) -> Probabilities:
        where = choose_devices(self.devices, checkpoint.recipe.model.columns)
        network = load_network(checkpoint, dataset, where, member.place)
        found = predictions(network, dataset, checkpoint.recipe, split, [self.views], progress=self.progress)
        batches = [(batch.labels.numpy(), batch.chances[self.views].numpy()) for batch in found]
        labels, values = (np.concatenate(each) for each in zip(*batches))
        origin = Origin(dataset.identity, split, self.views, (member.name,), checkpoint.classes)
        return Probabilities(origin, labels, values)


def load(places: Sequence[Path]) -> tuple[Member, ...]:
    """Run directories, checkpoint files, or .npz files of `evaluate --save-probabilities`. Raises UserError."""
    return tuple(
        Member(place, probabilities.load(place) if place.suffix == ".npz" else checkpoints.load(place))
        for place in places
    )


def _unlabelled(where: object, split: str) -> UserError:
    return UserError(f"{where}: the split {split!r} has images without a label; fit on one that has")


def errors(found: Probabilities) -> Evaluation | None:
    """None where not every image has a label."""
    if found.labels.min() < 0:
        return None
    tally = Tally(found.values.shape[1])
    tally.add(torch.from_numpy(found.labels), torch.from_numpy(found.values))
    return tally.whole()


def parse_weights(text: str, members: int) -> np.ndarray:
    """`2,1,1` → (members,) float64 that sum to 1. Raises UserError where it is something else."""
    try:
        weights = np.array([float(word) for word in text.split(",")])
    except ValueError as error:
        raise UserError(f"--weights {text}: give numbers, such as 2,1,1") from error
    if len(weights) != members:
        raise UserError(f"--weights {text}: {len(weights)} numbers for {members} networks; give one for each")
    if not np.isfinite(weights).all() or weights.min() < 0 or not 0 < weights.sum() < np.inf:
        raise UserError(f"--weights {text}: give numbers of at least 0, and one above it")
    return weights / weights.sum()


def fitted_weights(true: np.ndarray) -> np.ndarray:
    """The weights of the mixture that makes the true labels likeliest, by expectation and maximisation.

    The likelihood is concave in the weights, and every round raises it: w_m ← mean over the images of
    w_m p_m / Σ w p (Dempster, Laird and Rubin, 1977), from equal weights.

    Args:
        true: (members, n) float64: each network's probability of each image's true label.
    Returns:
        (members,) float64, of sum 1.
    """
    true = np.maximum(true, LEAST)
    weights = np.full(len(true), 1 / len(true))
    for _ in range(ROUNDS):
        parts = weights[:, None] * true
        after = (parts / parts.sum(0)).mean(1)
        change, weights = np.abs(after - weights).max(), after
        if change < CHANGE:
            break
    return weights
