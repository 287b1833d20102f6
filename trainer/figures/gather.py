"""Gather what the figures of a run show: records, pictures with probabilities, their neighbours, its commands."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import chain, islice
from math import gcd, isfinite
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np
import torch
from msgspec import Meta

from pipeline import UserError, storage
from pipeline.manifest import BuildRecipe, DatasetError, Manifest
from pipeline.online.samples import SampleReader
from pipeline.typed import Count, from_values
from trainer import metrics
from trainer import recipe as recipes
from trainer.checkpoint import Checkpoint, require_same_data
from trainer.evaluate import view_probabilities
from trainer.nonfinite import require_finite, require_finite_outputs
from trainer.parallel import TwoColumnNet
from trainer.pictures import Pictures, pixels
from trainer.retrieval.index import Show, features, hidden
from trainer.retrieval.search import BadIndex, Index, digest, nearest

SHOWN, QUERIES, NEAREST = 8, 5, 6  # pictures with predictions; with neighbours; neighbours of each (Figure 4)
SEARCHED = 20_000  # training images that pass through the network for a figure at most; more need an index
INDEX, EVALUATION = "index", "evaluation.json"  # in the run directory
AT_ONCE = 16  # pictures of a batch that are searched for errors
DAMAGED = (LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError)


class Rates(TypedDict):
    """The errors of a view, in percent and in nats per image."""

    samples: Count
    top1_error: Annotated[float, Meta(ge=0, le=100)]
    top5_error: Annotated[float, Meta(ge=0, le=100)]
    nll: Annotated[float, Meta(ge=0, le=1e300)]


class Pair(TypedDict):
    """A label whose images are taken for another."""

    true: Count
    predicted: Count
    images: Count


class Evaluation(TypedDict):
    """The part of evaluation.json that is drawn."""

    step: Count
    split: str
    dataset: str
    centre: Rates
    ten: Rates
    confused: NotRequired[list[Pair]]


@dataclass(frozen=True)
class Example:
    """A stored picture; `probabilities` (classes,) float64 are the network's for its centre view."""

    id: int
    pixels: np.ndarray  # (size, size, 3) uint8
    label: int  # −1: none
    probabilities: np.ndarray


@dataclass(frozen=True)
class Neighbour:
    """A training picture; `distance` is that of its features in the last hidden layer from the query's."""

    id: int
    pixels: np.ndarray
    label: int
    distance: float


Similar = tuple[tuple[Example, tuple[Neighbour, ...]], ...]  # each query with its neighbours, the nearest first


@dataclass(frozen=True)
class FigureData:
    """The content of a run's figures."""

    run: Path
    dataset: Manifest
    checkpoint: Checkpoint
    lines: list[dict[str, Any]]  # of metrics.jsonl
    evaluation: Evaluation | None  # of evaluation.json
    kernels: np.ndarray | None  # (n, 3, k, k) float32 of the first layer, in the grouped layout, if it has any
    split: str
    only_errors: bool
    examples: tuple[Example, ...]  # of `split`, spread over it; with `only_errors` those that the network gets wrong
    similar: Similar  # pictures of `split`, and the training pictures that are nearest to each
    lacking: dict[str, str]  # figures that cannot be drawn, and why: "kernels", "predictions", "neighbours", …

    def words(self, label: int) -> str:
        """Return the words of a label; −1 is none."""
        return self.dataset.classes[label].words if label >= 0 else "no label"


def has_images(dataset: Manifest, split: str) -> bool:
    """Return whether a data set has this split, and an image in it."""
    return split in dataset.splits and dataset.splits[split].samples > 0


def searched(dataset: Manifest, split: str = "val") -> int:
    """Return the number of training images that pass through the network for the neighbours of pictures of `split`."""
    samples = dataset.split("train").samples
    return samples if samples <= SEARCHED and has_images(dataset, split) else 0


@contextmanager
def noting(lacking: dict[str, str], *figures: str) -> Iterator[None]:
    """Note in `lacking` why figures cannot be drawn: one of their pictures is damaged, or they need an index."""
    try:
        yield
    except (DatasetError, BadIndex) as error:
        lacking |= dict.fromkeys(figures, str(error))


def gather(
    run: Path,
    dataset: Manifest,
    network: TwoColumnNet,
    checkpoint: Checkpoint,
    split: str = "val",
    only_errors: bool = False,
    show: Show = lambda *_: None,
) -> FigureData:
    """Return what the figures of `run` show; `network` holds the weights of `checkpoint`, its newest.

    A damaged picture costs those figures alone that need it. `show` takes what is done.

    Raises:
        UserError: `run` is not a directory; `dataset` is not what it was trained on; a file of either is damaged.
        Diverged: a weight, or an output of the network, is not a finite number.
    """
    if not run.is_dir():
        raise UserError(f"{run}: not a directory; figures are of a whole run: name its directory")
    require_same_data(checkpoint, dataset.identity, run)
    require_finite(checkpoint.step, checkpoint.weights)
    lines, evaluation = read_lines(run), read_evaluation(run, len(dataset.classes))
    kernels, lacking, first = None, {}, network.layers[0]
    if first.recipe.kind == "conv":
        kernels = checkpoint.weights[f"{first.name}.weight"].numpy()
    else:
        lacking["kernels"] = f"The first layer, {first.name}, has no kernels to look at."
    examples: tuple[Example, ...] = ()
    similar: Similar = ()
    if not has_images(dataset, split):
        lacking["predictions"] = lacking["neighbours"] = f"The data set has no images in {split}."
    else:
        samples = _with_probabilities(dataset, network, checkpoint.recipe, split)
        with noting(lacking, "predictions", "neighbours"):
            examples = spread = tuple(islice(samples, SHOWN))
            with noting(lacking, "neighbours"):
                similar = _similar(run, dataset, network, checkpoint, split, spread[:QUERIES], show)
        if only_errors and (dataset.samples(split)["label"] < 0).all():
            examples, lacking["predictions"] = (), f"No image in {split} has a label, so none is known to be an error."
        elif only_errors and examples:
            errors = _errors(chain(spread, samples), dataset.split(split).samples, show)
            with noting(lacking, "predictions"):
                examples = tuple(islice(errors, SHOWN))
            if not examples:
                lacking["predictions"] = f"The network makes no error in {split}."
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
                _require_numbers(line, "nll", "top1_error", "top5_error")
            else:
                _require_numbers(line, "loss", *{"top1_error"} & line.keys())
                _require_numbers(line["time"], "images_per_second", "stall")
                for layer in line.get("layers", {}).values():
                    _require_numbers(layer, "ratio")
        except DAMAGED as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            path = run / metrics.FILE_NAME
            raise UserError(f"{path}: line {number} is damaged ({reason}); delete that line") from error
    return lines


def read_evaluation(run: Path, classes: int) -> Evaluation | None:
    """Return the content of evaluation.json, of a network of so many classes; None if there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    path = run / EVALUATION
    if not path.exists():
        return None
    try:
        content = from_values(json.loads(storage.read_bytes(path)), Evaluation)
        pairs = content.setdefault("confused", [])
        if any(max(pair["true"], pair["predicted"]) >= classes for pair in pairs):
            raise UserError(f"a label of confused pairs is none of {classes} classes")
        return content
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); write it again: python -m trainer evaluate") from error


def _require_numbers(record: dict[str, Any], *keys: str) -> None:
    """Raise KeyError if a record lacks a key, ValueError if its value is not a finite number."""
    for value in (record[key] for key in keys):
        if type(value) not in (int, float) or not isfinite(value):
            raise ValueError(f"{value!r} is not a finite number")


@torch.inference_mode()
def _with_probabilities(
    dataset: Manifest, network: TwoColumnNet, recipe: recipes.Recipe, split: str
) -> Iterator[Example]:
    """Yield every sample of a split once; the first few are spread over it."""
    samples, pictures = dataset.split(split).samples, Pictures(dataset, recipe)
    stride = max(1, round(samples * 0.618))  # about the golden section: multiples of it spread evenly
    while gcd(stride, samples) != 1:  # so that they visit every sample
        stride += 1
    order = np.arange(samples) * stride % samples
    with SampleReader(dataset, split) as reader:
        for start in range(0, samples, AT_ONCE):
            ids = order[start : start + AT_ONCE]
            stored = [pixels(jpeg.tobytes(), dataset.recipe.size) for jpeg in reader.read(ids)]
            rows = view_probabilities(network, pictures.seen(stored)).mean(1).cpu().numpy()
            require_finite_outputs(rows, network.name)
            for fields in zip(ids.tolist(), stored, reader.labels(ids).tolist(), rows):
                yield Example(*fields)


def _errors(samples: Iterable[Example], total: int, show: Show) -> Iterator[Example]:
    """Yield the samples that the network gets wrong."""
    for done, sample in enumerate(samples, start=1):
        show("pictures searched for errors", done, total)
        if sample.label not in (-1, int(sample.probabilities.argmax())):
            yield sample


@torch.inference_mode()
def _similar(
    run: Path,
    dataset: Manifest,
    network: TwoColumnNet,
    checkpoint: Checkpoint,
    split: str,
    queries: tuple[Example, ...],
    show: Show,
) -> Similar:
    """Return each query with its nearest training images, itself left out. Raises BadIndex, if one is needed."""
    rows = _training_features(run, dataset, network, checkpoint, show)
    query_features = hidden(network, Pictures(dataset, checkpoint.recipe).seen([query.pixels for query in queries]))
    similar = []
    with SampleReader(dataset, "train") as reader:
        for query, ids, distances in zip(queries, *nearest(rows, query_features, NEAREST + 1)):
            others = np.flatnonzero((ids != query.id) | (split != "train"))[:NEAREST]
            stored = [pixels(jpeg.tobytes(), dataset.recipe.size) for jpeg in reader.read(ids[others])]
            labels = reader.labels(ids[others]).tolist()
            fields = zip(ids[others].tolist(), stored, labels, distances[others].tolist())
            similar.append((query, tuple(Neighbour(*row) for row in fields)))
    return tuple(similar)


def _training_features(
    run: Path, dataset: Manifest, network: TwoColumnNet, checkpoint: Checkpoint, show: Show
) -> np.ndarray:
    """Return the features (n, units) of the training images; if they are many, those of the run's index.

    Raises:
        BadIndex: there is no index of them.
    """
    if (total := dataset.split("train").samples) <= SEARCHED:
        parts = []
        for ids, rows in features(network, dataset, checkpoint.recipe, "train"):
            parts.append(rows)
            show("training pictures through the network", int(ids[-1]) + 1, total)
        return np.concatenate(parts)
    try:
        index = Index(run / INDEX)
        index.require(digest(checkpoint.weights), dataset, run)
    except BadIndex as error:
        message = f"More than {SEARCHED:,} training images are looked for in an index alone ({error})."
        raise BadIndex(message) from error
    if index.meta.split != "train":
        raise BadIndex(f"The index {run / INDEX} is of the split {index.meta.split!r}, not of the training images.")
    return index.rows


def commands(data: FigureData) -> dict[str, list[str]]:
    """Return the commands that make the page from raw images; RAW, which nobody recorded, is left open."""
    dataset = data.dataset
    build = ["python", "tools/build_shards.py", "RAW", str(dataset.root)]
    for field in fields(BuildRecipe):
        if (value := getattr(dataset.recipe, field.name)) != field.default and field.metadata:  # an option of the build
            build += [f"--{field.name.replace('_', '-')}", str(value)]
    trainer, data_option, run = ["python", "-m", "trainer"], ["--data", str(dataset.root)], str(data.run)
    return {
        "build": build,
        "train": [*trainer, "train", *data_option, "--out", run, *_recipe_options(data.checkpoint.recipe)],
        "evaluate": [*trainer, "evaluate", *data_option, "--checkpoint", run],
        "figures": [*trainer, "figures", run, *data_option],
    }


def _recipe_options(recipe: recipes.Recipe) -> list[str]:
    """Return the fewest --recipe and --set options of `train` that give this recipe."""
    choices = []
    for name in recipes.names():
        known = recipes.load(name)
        if known.model.order == recipe.model.order and known.optim.layers.keys() == recipe.optim.layers.keys():
            changed = recipes.difference(known, recipe)
            settings = (("--set", f"{key}={json.dumps(new)}") for key, (_, new) in changed.items())
            choices.append(["--recipe", name, *(word for pair in settings for word in pair)])
    return min(choices, key=len, default=["--recipe", "RECIPE"])
