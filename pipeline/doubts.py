"""Doubts about a dataset directory that holds all its promises: what is almost never meant, in a line each."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from pipeline.cli import printable
from pipeline.manifest import Manifest

MOST, MOST_OF_TWO = 0.5, 0.9  # of the training pictures in one class; of two classes one is often much larger
NAMED = 3  # classes in a line; the rest is counted


class Duplicates(NamedTuple):
    """Raw images that a data set holds more than once: equal digests in its samples.npy."""

    positions: np.ndarray  # (m,) of the samples concerned, in the splits one after the other, by group
    groups: np.ndarray  # (m,) the number of each sample's group, ascending
    within: int  # groups with two samples of one class of a split; an unlabelled one is of a class of its own
    across_labels: int  # groups of more than one label
    across_splits: int

    def __str__(self) -> str:
        """Return the counts in words."""
        images = int(self.groups[-1]) + 1 if len(self.groups) else 0
        return (
            f"{images:,} raw images in {len(self.groups):,} samples; {self.within:,} within a class of a split, "
            f"{self.across_labels:,} across labels, {self.across_splits:,} across splits"
        )


def doubts(dataset: Manifest, samples: Mapping[str, np.ndarray] | None = None) -> list[str]:
    """Return a line on each fact that is almost never meant, the one on duplicates last.

    A validation split of one class; splits of other classes than the training split; a class of most training pictures;
    one raw image under two labels, or in two splits. Of 14 million samples in seconds.

    Args:
        samples: split → (n,) of `manifest.SAMPLE`, for splits that are loaded already; by default all of `dataset`.
    Raises:
        DatasetError: a samples.npy is damaged.
    """
    samples = {split: dataset.samples(split) for split in dataset.splits} if samples is None else samples
    counts = {split: _per_class(records, len(dataset.classes)) for split, records in samples.items()}
    lines = [*_of_validation(dataset, counts), *_of_classes(dataset, counts), *_of_the_largest(dataset, counts)]
    copies = duplicates(samples)
    return lines + ([f"duplicates: {copies}"] if copies.across_labels or copies.across_splits else [])


def _per_class(records: np.ndarray, classes: int) -> np.ndarray:
    """Return the number of samples by label, (classes,) int64."""
    labels = records["label"]
    return np.bincount(labels[labels >= 0], minlength=classes)


def _of_validation(dataset: Manifest, counts: Mapping[str, np.ndarray]) -> Iterator[str]:
    present = np.flatnonzero(counts.get("val", np.empty(0)))
    if len(present) == 1:
        yield f"the validation split is of one class alone, {_names(dataset, present)}; its error tells little"


def _of_classes(dataset: Manifest, counts: Mapping[str, np.ndarray]) -> Iterator[str]:
    trained = counts.get("train", np.empty(0)) > 0
    absent = np.flatnonzero(sum(counts.values()) == 0) if trained.any() else np.empty(0, int)
    if len(absent):
        yield f"{len(absent):,} of {len(trained):,} classes have no picture: {_names(dataset, absent)}"
    for split, count in counts.items():
        present = count > 0
        unlabelled, of_one_class = not present.any(), split == "val" and present.sum() == 1  # the latter has its line
        if split == "train" or not trained.any() or unlabelled or of_one_class:
            continue
        differing = [(trained & ~present, f"not in {split}"), (present & ~trained, "not in train")]
        texts = [
            f"{mask.sum():,} of {(trained | present).sum():,} are {where} ({_names(dataset, np.flatnonzero(mask))})"
            for mask, where in differing
            if mask.any()
        ]
        if texts:
            yield f"the classes of train and {split} differ: {', '.join(texts)}"


def _of_the_largest(dataset: Manifest, counts: Mapping[str, np.ndarray]) -> Iterator[str]:
    count = counts.get("train", np.zeros(1, np.int64))
    largest, total = count.argmax(), count.sum()
    if count[largest] > total * (MOST if np.count_nonzero(count) > 2 else MOST_OF_TWO):
        share = f"{count[largest]:,} of {total:,}, {100 * count[largest] / total:.0f} %"
        yield f"most training pictures ({share}) are of one class, {_names(dataset, np.array([largest]))}"


def _names(dataset: Manifest, labels: np.ndarray) -> str:
    names = [printable(dataset.classes[label].wnid, 60) for label in labels[:NAMED].tolist()]
    return ", ".join(names) + (f" and {len(labels) - NAMED:,} more" if len(labels) > NAMED else "")


def duplicates(samples: Mapping[str, np.ndarray]) -> Duplicates:
    """Return the samples with equal digests of all splits; groups have the order of their first samples."""
    tables = list(samples.values())
    halves = np.concatenate([t["digest"] for t in tables] or [np.empty((0, 16), "u1")]).view("<u8")  # (n, 2)
    # Sorting numbers of 64 bits takes seconds for 14 million; comparing 16 bytes at a time takes minutes.
    positions = np.argsort(halves[:, 0], kind="stable")
    positions = positions[_repeated(halves[positions, 0])]
    positions = positions[np.lexsort(halves[positions].T)]
    positions = positions[_repeated(*halves[positions].T)]
    starts = ~_equal_to_the_last(*halves[positions].T)
    ranks = np.argsort(np.argsort(positions[starts]))  # of the groups, by their first samples
    group = ranks[np.cumsum(starts) - 1]
    order = np.argsort(group, kind="stable")
    positions, group = positions[order], group[order]
    labels = np.concatenate([t["label"] for t in tables] or [np.empty(0, "<i4")])[positions]
    splits = np.searchsorted(np.cumsum([*map(len, tables)]), positions, "right")
    order = np.lexsort((labels, splits, group))
    alike = _equal_to_the_last(group[order], splits[order], labels[order])
    within = len(np.unique(group[order][alike]))
    return Duplicates(positions, group, within, _mixed(group, labels, labels >= 0), _mixed(group, splits, labels > -2))


def _equal_to_the_last(*columns: np.ndarray) -> np.ndarray:
    """Return for each row of the (n,) columns if it equals the one before, (n,) bool."""
    equal = np.zeros(len(columns[0]), bool)
    equal[1:] = np.logical_and.reduce([column[1:] == column[:-1] for column in columns])
    return equal


def _repeated(*columns: np.ndarray) -> np.ndarray:
    """Return for each row of the (n,) sorted columns if another one equals it, (n,) bool."""
    equal = _equal_to_the_last(*columns)
    return equal | np.append(equal[1:], False)[: len(equal)]


def _mixed(groups: np.ndarray, values: np.ndarray, counted: np.ndarray) -> int:
    """Return the number of groups with more than one of the `values` that are `counted`; groups are ascending."""
    groups, values = groups[counted], values[counted]
    starts = np.flatnonzero(~_equal_to_the_last(groups))
    if not len(starts):  # reduceat takes no empty array
        return 0
    return int((np.minimum.reduceat(values, starts) != np.maximum.reduceat(values, starts)).sum())
