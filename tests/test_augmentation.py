"""The sheet of a sample's views: the crops, mirror images and colours that training has for it."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from pipeline import UserError, manifest
from pipeline.online import Loader, augment
from pipeline.online.samples import SampleReader
from trainer.figures.augmentation import COLOURS, augmentation, first_views

SEED, SAMPLE, VIEW = 7, 5, 24


def stored(dataset: manifest.Manifest) -> np.ndarray:
    with SampleReader(dataset, "train") as reader:
        return np.asarray(Image.open(io.BytesIO(reader.read(np.array([SAMPLE]))[0].tobytes())))


@pytest.mark.parametrize("lighting", ["code", "paper", "off"])
def test_it_is_what_the_loader_gives(small: Path, lighting: str) -> None:
    dataset = manifest.load(small)
    mean = dataset.statistics().mean_image[4:28, 4:28]
    options = augment.Transform(view=VIEW, lighting=lighting)
    expected = first_views(stored(dataset), options, dataset.statistics(), SEED, SAMPLE)
    given = {}
    with Loader(dataset, "train", batch_size=16, seed=SEED, device="cpu", view=VIEW, lighting=lighting) as loader:
        while len(given) < len(expected):
            batch = next(loader)
            for position in (np.asarray(batch.ids) == SAMPLE).nonzero()[0]:
                given[len(given)] = batch.images[position].numpy()
    divisor = 1.1 if lighting == "code" else 1.0
    for epoch, view in enumerate(expected):
        x = (view.pixels - mean + view.shift) / divisor
        assert np.abs(given[epoch] - x.transpose(2, 0, 1)).max() < 1e-3
    assert any(view.shift.any() for view in expected) == (lighting != "off")
    assert len({(view.top, view.left, view.mirrored) for view in expected}) > 3


def test_the_sheet_shows_them(small: Path) -> None:
    dataset = manifest.load(small)
    picture, statistics, options = stored(dataset), dataset.statistics(), augment.Transform(view=VIEW)
    sheet = np.asarray(augmentation(picture, options, statistics, SEED, SAMPLE))
    zoom = 192 // VIEW
    tops = set()
    for i, view in enumerate(first_views(picture, options, statistics, SEED, SAMPLE)):
        left = 16 + i % 3 * (192 + 16) + (192 - zoom * VIEW) // 2
        lit = np.clip(np.rint(picture[4:28, 4:28].astype(float) + view.shift), 0, 255).astype(np.uint8)
        for kind, pixels in (("cut", view.pixels), ("lit", lit)):
            tile = pixels.repeat(zoom, 0).repeat(zoom, 1)
            strip = sheet[:, left : left + len(tile)]
            (top,) = [y for y in range(len(strip) - len(tile)) if (strip[y : y + len(tile)] == tile).all()]
            tops.add((kind, i // 3, top))
    assert [kind for kind, _, _ in sorted(tops, key=lambda row: row[2])] == ["cut", "cut", "lit", "lit"]


def test_crop_boxes_are_where_the_views_are_cut(small: Path) -> None:
    dataset = manifest.load(small)
    picture, options = stored(dataset), augment.Transform(view=VIEW)
    sheet = np.asarray(augmentation(picture, options, dataset.statistics(), SEED, SAMPLE))
    zoom = 512 // len(picture)
    tile = picture.repeat(zoom, 0).repeat(zoom, 1)[-zoom:, -zoom:]  # of the corner: no box of these views covers it
    strip = sheet[:900, 16 + 512 - zoom : 16 + 512]
    (corner,) = [y for y in range(len(strip) - zoom) if (strip[y : y + zoom] == tile).all()]
    shown = sheet[corner + zoom - 512 : corner + zoom, 16 : 16 + 512]
    last = first_views(picture, options, dataset.statistics(), SEED, SAMPLE)[-1]  # drawn above the others
    colour = ImageColor.getrgb(COLOURS[5])
    left, top, side = last.left * zoom, last.top * zoom, VIEW * zoom
    assert (shown[top + side - 1, left + 3 : left + side - 3] == colour).all()
    assert (shown[top + 3 : top + side - 3, left] == colour).all()


def test_runs_without_lighting_and_views_that_do_not_fit(small: Path) -> None:
    dataset = manifest.load(small)
    lit = augmentation(stored(dataset), augment.Transform(view=VIEW), dataset.statistics(), SEED, SAMPLE)
    options = augment.Transform(view=VIEW, lighting="off", crop_chunk=32)
    dark = augmentation(stored(dataset), options, dataset.statistics(), SEED, SAMPLE)
    assert lit.height - dark.height > 150
    with pytest.raises(UserError, match="images of 32 pixels"):
        augmentation(stored(dataset), augment.Transform(), dataset.statistics(), SEED, SAMPLE)
