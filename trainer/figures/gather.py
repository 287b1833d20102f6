"""Gather all that the figures of a run show: its records, pictures with the network's answers, and their neighbours."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from math import gcd, isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import UserError
from pipeline.manifest import Manifest
from pipeline.online.samples import SampleReader
from trainer import metrics
from trainer.checkpoint import Checkpoint, require_same_data
from trainer.evaluate import Evaluation, view_probabilities
from trainer.nonfinite import Diverged, require_finite
from trainer.parallel import TwoColumnNet
from trainer.pictures import Pictures
from trainer.recipe import Recipe
from trainer.retrieval.features import features, hidden
from trainer.retrieval.index import BadIndex, Index, digest
from trainer.retrieval.search import nearest

SHOWN, QUERIES, NEAREST = 8, 5, 6  # pictures with predictions; with neighbours; neighbours of each (Figure 4)
SEARCHED = 20_000  # training images that are searched for a figure at most; more need an index
INDEX, EVALUATION = "index", "evaluation.json"  # in the run directory
AT_ONCE = 16  # pictures of a batch that are searched for errors


@dataclass(frozen=True)
class Example:
    """A stored picture; `probabilities` (classes,) float64 are the network's for its centre view."""

    id: int
    jpeg: bytes
    label: int  # −1: none
    probabilities: np.ndarray


@dataclass(frozen=True)
class Neighbour:
    """A training picture; `distance` is that of its features in the last hidden layer from the query's."""

    id: int
    jpeg: bytes
    label: int
    distance: float


Similar = tuple[tuple[Example, tuple[Neighbour, ...]], ...]  # each query with its neighbours, the nearest first


@dataclass(frozen=True)
class FigureData:
    """All that is shown of a run.

    Args:
        lines: of metrics.jsonl.
        kernels: (n, 3, k, k) float32 of the first layer, in the grouped layout; None: it has none.
        examples: of `split`, spread over it; with `only_errors` those that the network gets wrong.
        similar: pictures of `split`, and the training pictures that are nearest to each.
        lacking: the names of the figures that cannot be drawn, and why: "kernels", "predictions", "neighbours".
    """

    run: Path
    dataset: Manifest
    checkpoint: Checkpoint
    lines: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    kernels: np.ndarray | None
    split: str
    only_errors: bool
    examples: tuple[Example, ...]
    similar: Similar
    lacking: dict[str, str]

    def words(self, label: int) -> str:
        return self.dataset.classes[label].words if label >= 0 else "no label"


def gather(
    run: Path,
    dataset: Manifest,
    network: TwoColumnNet,
    checkpoint: Checkpoint,
    split: str = "val",
    only_errors: bool = False,
) -> FigureData:
    """Return what the figures of `run` show; `network` holds the weights of `checkpoint`, its newest.

    Raises:
        UserError: `run` is not a directory; `dataset` is not what it was trained on; a file of either is damaged.
        Diverged: a weight, or an output of the network, is not a finite number.
    """
    if not run.is_dir():
        raise UserError(f"{run}: not a directory; figures are of a whole run: name its directory")
    require_same_data(checkpoint, dataset.identity, run)
    require_finite(checkpoint.step, checkpoint.weights)
    lines, evaluation = read_lines(run), read_evaluation(run, len(dataset.classes))
    kernels, first = None, network.layers[0]
    if first.recipe.kind == "conv":
        kernels = network.gathered()[f"{first.name}.weight"].numpy()
    examples, queries, no_examples = _examples(dataset, network, checkpoint.recipe, split, only_errors)
    similar, no_similar = _similar(run, dataset, network, checkpoint, split, queries)
    reasons = {
        "kernels": "" if kernels is not None else f"The first layer, {first.name}, has no kernels to look at.",
        "predictions": no_examples,
        "neighbours": no_similar if queries else no_examples,
    }
    lacking = {name: reason for name, reason in reasons.items() if reason}
    recorded = (run, dataset, checkpoint, lines, evaluation, kernels)
    return FigureData(*recorded, split, only_errors, examples, similar, lacking)


def read_lines(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, with all the numbers that are drawn; none if there is no such file.

    Raises:
        UserError: a line is damaged; the message has its number.
    """
    lines = metrics.read(run)
    for number, line in enumerate(lines, start=1):
        try:
            if line["kind"] == "validation":
                _require_finite(*(line[key] for key in ("nll", "top1_error", "top5_error")))
            else:
                _require_finite(line["loss"], *(line["time"][key] for key in ("images_per_second", "stall")))
                _require_finite(*(layer["ratio"] for layer in line.get("layers", {}).values()))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            path = run / metrics.FILE_NAME
            raise UserError(f"{path}: line {number} is damaged ({what}); delete that line") from error
    return lines


def read_evaluation(run: Path, classes: int) -> dict[str, Any] | None:
    """Return the content of evaluation.json, of a network of so many classes; None if there is no such file.

    Returns:
        {"step", "split", "dataset", "centre" and "ten": an `Evaluation`, "confused": [(true, taken for, images)]}
    Raises:
        UserError: the file is damaged.
    """
    path = run / EVALUATION
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        views = {name: asdict(Evaluation(**content[name])) for name in ("centre", "ten")}
        _require_finite(*(value for view in views.values() for value in view.values()))
        pairs = content.get("confused", ())
        confused = [tuple(int(pair[key]) for key in ("true", "predicted", "images")) for pair in pairs]
        if not all(0 <= label < classes for pair in confused for label in pair[:2]):
            raise ValueError(f"a label of confused pairs is none of {classes} classes")
        about = {"step": int(content["step"]), "split": str(content["split"]), "dataset": str(content["dataset"])}
        return about | views | {"confused": confused}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); mend or delete it") from error


def _require_finite(*values: Any) -> None:
    """Raise ValueError if a value is not a finite number."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise ValueError(f"{value!r} is not a finite number")


def _examples(
    dataset: Manifest, network: TwoColumnNet, recipe: Recipe, split: str, only_errors: bool
) -> tuple[tuple[Example, ...], tuple[Example, ...], str]:
    """Return the examples with predictions, the queries for neighbours, and why there are no examples."""
    if split not in dataset.splits or not dataset.splits[split].samples:
        return (), (), f"The data set has no images in {split}."
    answered = _answers(dataset, network, recipe, split)
    first = tuple(islice(answered, SHOWN))
    if not only_errors:
        return first, first[:QUERIES], ""
    if not bool((dataset.samples(split)["label"] >= 0).any()):
        return (), first[:QUERIES], f"No image in {split} has a label, so none is known to be an error."
    errors = (one for one in chain(first, answered) if one.label not in (-1, int(one.probabilities.argmax())))
    examples = tuple(islice(errors, SHOWN))
    return examples, first[:QUERIES], "" if examples else f"The network makes no error in {split}."


@torch.inference_mode()
def _answers(dataset: Manifest, network: TwoColumnNet, recipe: Recipe, split: str) -> Iterator[Example]:
    """Yield every sample of a split once; the first few are spread over it."""
    samples, pictures = dataset.split(split).samples, Pictures(dataset, recipe)
    stride = max(1, round(samples * 0.618))  # about the golden section: multiples of it spread evenly
    while gcd(stride, samples) != 1:  # so that they visit every sample
        stride += 1
    order = np.arange(samples) * stride % samples
    with SampleReader(dataset, split) as reader:
        for start in range(0, samples, AT_ONCE):
            ids = order[start : start + AT_ONCE]
            jpegs = [jpeg.tobytes() for jpeg in reader.read(ids)]
            answers = view_probabilities(network, pictures.views(jpegs)).mean(1).cpu().numpy()
            if not np.isfinite(answers).all():
                raise Diverged("the network's outputs are not finite numbers: its training has diverged")
            for fields in zip(ids.tolist(), jpegs, reader.labels(ids).tolist(), answers):
                yield Example(*fields)


@torch.inference_mode()
def _similar(
    run: Path,
    dataset: Manifest,
    network: TwoColumnNet,
    checkpoint: Checkpoint,
    split: str,
    queries: tuple[Example, ...],
) -> tuple[Similar, str]:
    """Return each query with its nearest training images, itself left out; or why there are none."""
    if not queries:
        return (), ""
    wanted = hidden(network, Pictures(dataset, checkpoint.recipe).views([query.jpeg for query in queries]))
    rows, reason = _training_features(run, dataset, network, checkpoint)
    if rows is None:
        return (), reason
    own = split == "train"  # each query is the nearest to itself
    similar = []
    with SampleReader(dataset, "train") as reader:
        for query, all_ids, all_distances in zip(queries, *nearest(rows, wanted, NEAREST + own)):
            others = all_ids != query.id if own else slice(None)
            ids, distances = all_ids[others][:NEAREST], all_distances[others][:NEAREST]
            jpegs = [jpeg.tobytes() for jpeg in reader.read(ids)]
            found = zip(ids.tolist(), jpegs, reader.labels(ids).tolist(), distances.tolist())
            similar.append((query, tuple(Neighbour(*fields) for fields in found)))
    return tuple(similar), ""


def _training_features(
    run: Path, dataset: Manifest, network: TwoColumnNet, checkpoint: Checkpoint
) -> tuple[np.ndarray | None, str]:
    """Return the features (n, units) of the training images, of the run's index if they are many; or why not."""
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
