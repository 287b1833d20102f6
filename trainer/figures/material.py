"""What the figures of a run are made of: its records, pictures with the network's answers, and their neighbours."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import UserError
from pipeline.manifest import Manifest
from pipeline.online.samples import SampleReader
from trainer.checkpoint import Checkpoint, require_same_data
from trainer.evaluate import probabilities
from trainer.figures import records
from trainer.parallel import Columns
from trainer.pictures import Pictures
from trainer.recipe import Recipe
from trainer.retrieval.features import features, hidden
from trainer.retrieval.index import BadIndex, Index, digest
from trainer.retrieval.search import nearest
from trainer.watch import Diverged

SHOWN, QUERIES, NEAREST = 8, 5, 6  # pictures with predictions; with neighbours; of these for each (Figure 4)
SEARCHED = 20_000  # training images at most that are gone through for a figure; more want an index
INDEX = "index"  # its folder in a run's
AT_ONCE = 16  # pictures that are looked through for errors

Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class Seen:
    """A stored picture; `chances` (classes,) float64 are the network's for its centre view."""

    id: int
    jpeg: bytes
    label: int  # −1: none
    chances: np.ndarray

    @property
    def wrong(self) -> bool:
        return int(self.chances.argmax()) != self.label


@dataclass(frozen=True)
class Found:
    """A training picture, and how far what the last layer sees of it is from what it sees of the query."""

    id: int
    jpeg: bytes
    label: int
    distance: float


@dataclass(frozen=True)
class Material:
    """All that is shown of a run.

    Args:
        seen: of `split`, spread over it; with `only_errors` those that the network gets wrong.
        similar: a picture of `split` and its nearest training pictures, the nearest first.
        lacking: why there is nothing in `seen`, or in `similar`; "" where there is.
    """

    run: Path
    dataset: Manifest
    checkpoint: Checkpoint
    lines: Lines
    evaluation: dict[str, Any] | None
    kernels: np.ndarray | None  # (n, 3, k, k) float32 of the first layer, in the grouped layout; None: it has none
    split: str
    only_errors: bool
    seen: tuple[Seen, ...]
    similar: tuple[tuple[Seen, tuple[Found, ...]], ...]
    lacking: dict[str, str]

    @property
    def recipe(self) -> Recipe:
        return self.checkpoint.recipe

    def words(self, label: int) -> str:
        return self.dataset.classes[label].words if label >= 0 else "no label"


def gather(
    run: Path,
    dataset: Manifest,
    network: Columns,
    checkpoint: Checkpoint,
    split: str = "val",
    only_errors: bool = False,
) -> Material:
    """`network` holds the weights of `checkpoint`, the newest of `run`.

    Raises:
        UserError: `run` is not a directory; `dataset` is not what it was trained on; a file of either is damaged.
        Diverged: what the network makes of a picture is not a finite number.
    """
    if not run.is_dir():
        raise UserError(f"{run}: not a directory; figures are of a whole run: name its directory")
    require_same_data(checkpoint, dataset.identity, run)
    lines, evaluation = records.lines(run), records.evaluation(run, len(dataset.classes))
    kernels = None
    if network.layers[0].recipe.kind == "conv":
        kernels = network.gathered()[f"{network.layers[0].name}.weight"].numpy()
    seen, queries, lacking = _looked_at(dataset, network, checkpoint.recipe, split, only_errors)
    similar, why = _similar(run, dataset, network, checkpoint, split, queries)
    lacking["similar"] = lacking["seen"] if not queries else why
    about = (run, dataset, checkpoint, lines, evaluation, kernels, split, only_errors)
    return Material(*about, seen, similar, lacking)


def _looked_at(
    dataset: Manifest, network: Columns, recipe: Recipe, split: str, only_errors: bool
) -> tuple[tuple[Seen, ...], tuple[Seen, ...], dict[str, str]]:
    """What is shown with predictions, what is looked for, and why there is nothing."""
    samples = dataset.splits[split].samples if split in dataset.splits else 0
    if not samples:
        return (), (), {"seen": f"The data set has no images in {split}."}
    found = _answers(dataset, network, recipe, split)
    first = [next(found) for _ in range(min(SHOWN, samples))]
    if not only_errors:
        return tuple(first), tuple(first[:QUERIES]), {"seen": ""}
    if not bool((dataset.samples(split)["label"] >= 0).any()):
        why = f"No image in {split} has a label, so none is known to be an error."
        return (), tuple(first[:QUERIES]), {"seen": why}
    wrong = [each for each in first if each.label >= 0 and each.wrong]
    for each in found:
        if len(wrong) >= SHOWN:
            break
        wrong += [each] if each.label >= 0 and each.wrong else []
    why = "" if wrong else f"The network makes no error in {split}."
    return tuple(wrong), tuple(first[:QUERIES]), {"seen": why}


@torch.inference_mode()
def _answers(dataset: Manifest, network: Columns, recipe: Recipe, split: str) -> Iterator[Seen]:
    """All of a split, each once; the first few are spread over it."""
    samples, pictures = dataset.split(split).samples, Pictures(dataset, recipe)
    order = np.arange(samples) * _stride(samples) % samples
    with SampleReader(dataset, split) as reader:
        for start in range(0, samples, AT_ONCE):
            ids = order[start : start + AT_ONCE]
            jpegs = [jpeg.tobytes() for jpeg in reader.read(ids)]
            chances = probabilities(network, pictures.views(jpegs)).cpu().numpy()
            if not np.isfinite(chances).all():
                raise Diverged("the network's outputs are not finite numbers: its training has diverged")
            for each in zip(ids.tolist(), jpegs, reader.labels(ids).tolist(), chances):
                yield Seen(*each)


def _stride(n: int) -> int:
    """Steps of it, round and round, visit 0 … n − 1 each once; about a golden section of n, so that they spread."""
    stride = max(1, round(n * 0.618))
    while gcd(stride, n) != 1:
        stride += 1
    return stride


@torch.inference_mode()
def _similar(
    run: Path, dataset: Manifest, network: Columns, checkpoint: Checkpoint, split: str, queries: tuple[Seen, ...]
) -> tuple[tuple[tuple[Seen, tuple[Found, ...]], ...], str]:
    """Each query and its nearest training images, without itself; or why there are none."""
    if not queries:
        return (), ""
    asked = hidden(network, Pictures(dataset, checkpoint.recipe).views([each.jpeg for each in queries]))
    rows, why = _training_features(run, dataset, network, checkpoint)
    if rows is None:
        return (), why
    own = split == "train"  # each query is the nearest to itself
    found = []
    with SampleReader(dataset, "train") as reader:
        for query, *each in zip(queries, *nearest(rows, asked, NEAREST + own)):
            ids, distances = (numbers[each[0] != query.id if own else slice(None)][:NEAREST] for numbers in each)
            jpegs = [jpeg.tobytes() for jpeg in reader.read(ids)]
            seen = zip(ids.tolist(), jpegs, reader.labels(ids).tolist(), distances.tolist())
            found.append((query, tuple(Found(*one) for one in seen)))
    return tuple(found), ""


def _training_features(
    run: Path, dataset: Manifest, network: Columns, checkpoint: Checkpoint
) -> tuple[np.ndarray | None, str]:
    """(n, units) of the training images: computed, or where there are many those of the run's index; else why not."""
    if dataset.split("train").samples <= SEARCHED:
        return np.concatenate([rows for _, rows in features(network, dataset, checkpoint.recipe, "train")]), ""
    try:
        index = Index(run / INDEX)
        index.require(digest(checkpoint.weights), dataset.identity, run)
    except BadIndex as error:
        return None, f"More than {SEARCHED:,} training images are looked for in an index alone ({error})."
    if index.meta.split != "train":
        return None, f"The index {run / INDEX} is of the split {index.meta.split!r}, not of the training images."
    return index.rows.mapped, ""
