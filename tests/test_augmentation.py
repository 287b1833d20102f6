"""The sheet of a sample's views: the crops, mirror images and colours that training has for it."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import UserError, manifest
from pipeline.online import Loader, augment
from pipeline.online.samples import SampleReader
from trainer.figures.augmentation import augmentation, seen

SEED, SAMPLE, VIEW = 7, 5, 24


def stored(dataset: manifest.Manifest) -> np.ndarray:
    with SampleReader(dataset, "train") as reader:
        return np.asarray(Image.open(io.BytesIO(reader.read(np.array([SAMPLE]))[0].tobytes())))


@pytest.mark.parametrize("lighting", ["code", "paper", "off"])
def test_it_is_what_the_loader_gives(small: Path, lighting: str) -> None:
    dataset = manifest.load(small)
    mean = dataset.statistics().mean_image[4:28, 4:28]
    options = augment.Transform(view=VIEW, lighting=lighting)
    expected = seen(stored(dataset), options, dataset.statistics(), SEED, SAMPLE)
    given = {}
    with Loader(dataset, "train", batch_size=16, seed=SEED, device="cpu", view=VIEW, lighting=lighting) as loader:
        while len(given) < len(expected):
            batch = next(loader)
            for place in (np.asarray(batch.ids) == SAMPLE).nonzero()[0]:
                given[len(given)] = batch.images[place].numpy()
    divisor = 1.1 if lighting == "code" else 1.0
    for each in expected:
        x = (each.view - mean + each.shift) / divisor
        assert np.abs(given[each.epoch] - x.transpose(2, 0, 1)).max() < 1e-3
    assert any(each.shift.any() for each in expected) == (lighting != "off")
    assert len({(each.top, each.left, each.mirrored) for each in expected}) > 3


def test_the_sheet_shows_them(small: Path) -> None:
    dataset = manifest.load(small)
    picture, statistics, options = stored(dataset), dataset.statistics(), augment.Transform(view=VIEW)
    sheet = np.asarray(augmentation(picture, options, statistics, SEED, SAMPLE))
    zoom = 182 // VIEW
    tops = set()
    for i, each in enumerate(seen(picture, options, statistics, SEED, SAMPLE)):
        left = 24 + i * (182 + 12) + (182 - zoom * VIEW) // 2
        lit = np.clip(np.rint(picture[4:28, 4:28].astype(float) + each.shift), 0, 255).astype(np.uint8)
        for kind, pixels in (("cut", each.view), ("lit", lit)):
            tile = pixels.repeat(zoom, 0).repeat(zoom, 1)
            strip = sheet[:, left : left + len(tile)]
            (top,) = [y for y in range(len(strip) - len(tile)) if (strip[y : y + len(tile)] == tile).all()]
            tops.add((kind, top))
    assert [kind for kind, _ in sorted(tops, key=lambda each: each[1])] == ["cut", "lit"]


def test_principal_colours_are_the_statistics(small: Path) -> None:
    dataset = manifest.load(small)
    statistics = dataset.statistics()
    sheet = np.asarray(augmentation(stored(dataset), augment.Transform(view=VIEW), statistics, SEED, SAMPLE))
    flat = {tuple(colour) for colour in sheet[24:600:4, 600:1180:4].reshape(-1, 3).tolist()}
    values, vectors = np.linalg.eigh(statistics.covariance)
    for value, vector in zip(values, vectors.T):
        for times in (-2, -1, 0, 1, 2):
            colour = statistics.mean_color + times * np.sqrt(value) * vector
            assert tuple(np.clip(np.rint(colour), 0, 255).astype(int).tolist()) in flat


def test_what_is_shown_without_lighting_or_of_large_pictures(small: Path) -> None:
    dataset = manifest.load(small)
    lit = augmentation(stored(dataset), augment.Transform(view=VIEW), dataset.statistics(), SEED, SAMPLE)
    options = augment.Transform(view=VIEW, lighting="off", crop_chunk=32)
    dark = augmentation(stored(dataset), options, dataset.statistics(), SEED, SAMPLE)
    assert lit.height - dark.height > 150
    with pytest.raises(UserError, match="images of 32 pixels"):
        augmentation(stored(dataset), augment.Transform(), dataset.statistics(), SEED, SAMPLE)
