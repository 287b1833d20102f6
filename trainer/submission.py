"""The file that ILSVRC's server takes."""

import numpy as np

from pipeline import UserError
from pipeline.manifest import Manifest

GUESSES = 5  # a line (devkit readme of ILSVRC)


def submission(values: np.ndarray, dataset: Manifest, split: str) -> bytes:
    """For each image a line of the five likeliest classes' devkit ids, from 1 on, the likeliest first.

    Of equally likely ones the lower label comes first.

    Args:
        values: (n, classes) float64, in the order of the ids: that of the file names.
    Raises:
        UserError: the classes have no devkit ids, or images of the split are missing or shuffled: a line would stand
            for another.
    """
    ids = devkit_ids(dataset, split)
    best = np.argsort(-values, axis=1, kind="stable")[:, :GUESSES]
    return "".join(" ".join(map(str, row)) + "\n" for row in ids[best].tolist()).encode()


def devkit_ids(dataset: Manifest, split: str) -> np.ndarray:
    """(classes,) int64, by label. Raises UserError as `submission`."""
    ids = np.array([record.devkit_id or 0 for record in dataset.classes])
    if not ids.all():
        raise UserError(
            f"{dataset.root}: its classes have no devkit ids, and a submission is made of them; build from ILSVRC's "
            "archives with their devkit"
        )
    if split == "train":
        raise UserError(
            f"{dataset.root}: the split 'train' is shuffled; a submission is of val or test, in the order of the files"
        )
    lacking = dataset.split(split).skipped
    if lacking or dataset.recipe.limit:
        why = (
            f"{lacking} of its images were skipped" if lacking else f"it was built with --limit {dataset.recipe.limit}"
        )
        raise UserError(
            f"{dataset.root}: the split {split!r} is not whole ({why}); a submission has a line for each image"
        )
    return ids
