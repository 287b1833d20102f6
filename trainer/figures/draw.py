"""Everything that there is to look at of a run, written: RUN/figures/*.png and RUN/report.html."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.files import write_bytes_aside
from pipeline.online import augment
from pipeline.online.samples import SampleReader
from trainer.figures.augmentation import augmentation
from trainer.figures.curves import curves, updates
from trainer.figures.drawing import png
from trainer.figures.kernels import kernels
from trainer.figures.material import Found, Material, Seen
from trainer.figures.neighbours import Neighbour, Row, neighbours
from trainer.figures.page import FILE_NAME, page
from trainer.figures.predictions import Card, predictions
from trainer.pictures import pixels
from trainer.predict import top

FOLDER, AUGMENTATION = "figures", "augmentation.png"


def draw(material: Material) -> tuple[list[Path], dict[str, str]]:
    """Write all; a figure that there is nothing for goes, where an earlier one stands.

    Returns:
        The files that were written, the page last; and by file name why one was not.
    Raises:
        OSError: the disk is full.
    """
    folder, written, lacking = material.run / FOLDER, [], {}
    for name, (make, why) in _figures(material).items():
        path = folder / name
        if why:
            lacking[name] = why
            path.unlink(missing_ok=True)
        else:
            write_bytes_aside(path, png(make()))
            written.append(path)
    path = material.run / FILE_NAME
    sheet = (folder / AUGMENTATION).read_bytes()
    write_bytes_aside(path, page(material, sheet).encode(errors="replace"))
    return [*written, path], lacking


def _figures(material: Material) -> dict[str, tuple[Callable[[], Image.Image], str]]:
    """File name → how it is drawn, and why it is not."""
    model, lines = material.recipe.model, material.lines
    return {
        "kernels.png": (
            lambda: kernels(np.asarray(material.kernels), model.columns),
            "" if material.kernels is not None else "the first layer has no kernels",
        ),
        "predictions.png": (lambda: predictions(_cards(material)), material.lacking["seen"]),
        "neighbours.png": (lambda: neighbours(_rows(material)), material.lacking["similar"]),
        "curves.png": (lambda: curves(lines), "" if lines else "no steps are recorded"),
        "updates.png": (lambda: updates(lines), "" if lines else "no steps are recorded"),
        AUGMENTATION: (lambda: _augmentation(material), ""),
    }


def _cards(material: Material) -> list[Card]:
    cards = []
    for seen in material.seen:
        best = top(seen.chances).tolist()
        guesses = [(material.words(label), float(seen.chances[label])) for label in best]
        true = material.words(seen.label) if seen.label >= 0 else None
        cards.append(Card(pixels(seen.jpeg), true, guesses, best.index(seen.label) if seen.label in best else None))
    return cards


def _rows(material: Material) -> list[Row]:
    rows = []
    for query, found in material.similar:
        near = [_neighbour(material, query, each) for each in found]
        rows.append(Row(pixels(query.jpeg), material.words(query.label) if query.label >= 0 else None, near))
    return rows


def _neighbour(material: Material, query: Seen, found: Found) -> Neighbour:
    return Neighbour(pixels(found.jpeg), material.words(found.label), found.distance, found.label == query.label)


def _augmentation(material: Material) -> Image.Image:
    """Of the first training image."""
    recipe, dataset = material.recipe, material.dataset
    data = recipe.data
    options = augment.Transform(
        view=recipe.model.size,
        mean=data.mean,
        lighting=data.lighting if data.lighting_until > 0 else "off",
        positions=data.positions,
        crop_chunk=data.crop_chunk,
    )
    with SampleReader(dataset, "train") as reader:
        stored = pixels(reader.read(np.zeros(1, np.int64))[0].tobytes())
    return augmentation(stored, options, dataset.statistics(), recipe.train.seed, sample=0)
