"""Views of any size, 24 of 32 × 32 pixels as of CIFAR-10 or 224 of 256: each against Pillow's decoder and numpy.

And the sheet that shows them.
"""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageColor

from conftest import one_line
from pipeline import UserError, manifest
from pipeline.manifest import Manifest
from pipeline.online import Loader, augment
from reference import jpeg_pixels, view_places
from stored import jpegs
from trainer.figures.sheets import COLOURS, augmentation, first_views

SIZE, VIEW = 32, 24
SEED, SAMPLE = 7, 5  # of the sheet
CPUS = ("cpu:0", "cpu:1")  # by name two devices
PLACES = view_places(SIZE - VIEW)
OPTIONS = [
    {},
    {"mean": "aligned"},
    {"mean": "colour"},
    {"lighting": "paper"},
    {"lighting": "off", "shrink": True},
    {"shrink": False},
    {"lighting": "paper", "shrink": True, "mean": "aligned"},
    {"positions": "paper", "crop_chunk": 3, "mean": "aligned"},
    {"lighting_until": 3},
    {"positions": "centre", "mean": "aligned"},
    {"flips": False, "crop_chunk": 3},
    {"positions": "centre", "flips": False, "lighting": "off", "mean": "colour"},
    {"view": 32, "mean": "aligned"},  # one place; the mean image is as large as a view, and yet it is mirrored
    {"view": 224},  # of the larger pictures
]


def pictures(built: Manifest, split: str) -> list[np.ndarray]:
    """Each (size, size, 3) uint8, as Pillow decodes it, in the order of the ids."""
    return [jpeg_pixels(data) for data in jpegs(built.root, split)]


def window(image: np.ndarray, top: int, left: int, step: int, view: int = VIEW) -> np.ndarray:
    return image[top : top + view, left : left + view][:, ::step]


def recipe_of(built: Manifest, **options: object) -> augment.AlexNet:
    transform = augment.ViewOptions(**options)  # type: ignore[arg-type]
    return augment.AlexNet(transform, built.statistics(), built.recipe.size, seed=3)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_random_views_equal_pillow_and_numpy(small: Path, dataset: Path, options: dict):
    """Within float32's rounding of the formula in float64, and bit for bit of `augment.reference`; each device alike.

    The formula of the specification: (crop, flipped or not, − mean + lighting) / 1.1.
    """
    options = {"view": VIEW, **options}
    view, chunk = options["view"], options.get("crop_chunk", 1)
    built = manifest.load(dataset if view > SIZE else small)
    recipe, known, statistics = recipe_of(built, **options), pictures(built, "train"), built.statistics()
    middle, places = (built.recipe.size - view) // 2, built.recipe.size - view + (options.get("positions") != "paper")
    lighting = options.get("lighting", "code")
    deviations = np.sqrt(statistics.eigenvalues) if lighting == "code" else statistics.eigenvalues / 255
    seen = []
    with Loader(built, batch_size=8, seed=3, device=CPUS, **options) as loader:
        for batch in islice(loader, 7):  # an epoch, whose last batch is short, and one more
            heads = batch.ids[np.arange(len(batch.ids)) // chunk * chunk]
            seen.append(len(batch.ids))
            lit = lighting != "off" and batch.step < options.get("lighting_until", 10**9)
            divisor = 1.1 if options.get("shrink", lighting == "code") and lit else 1
            draws = augment.draw(3, batch.epoch, batch.ids, places, heads)
            crops = recipe.crops(batch.step, batch.epoch, batch.ids, heads, np.empty((len(batch.ids), 2)))
            rest = recipe.mean_deviations.get(recipe.divisor(batch.step))
            assert batch.labels.tolist() == built.samples("train")["label"][batch.ids].tolist()
            assert all(torch.equal(batch.images, images) for images in batch.replicas)
            for i, (number, image) in enumerate(zip(batch.ids, batch.images.numpy(), strict=True)):
                place = (*draws.crop[i].tolist(), -1 if draws.flip[i] and options.get("flips", True) else 1)
                place = (middle, middle, place[2]) if options.get("positions") == "centre" else place
                own = {
                    "centre": window(statistics.mean_image, middle, middle, 1, view),
                    "aligned": window(statistics.mean_image, *place, view),
                    "colour": statistics.mean_color,
                }[options.get("mean", "centre")]
                shift = statistics.eigenvectors @ (0.1 * draws.normals[i] * deviations) if lit else 0
                formula = (window(known[number], *place, view) - own + shift) / divisor
                np.testing.assert_allclose(image, formula.transpose(2, 0, 1), atol=1e-4)
                assert (image == augment.reference(known[number], crops, i, rest, recipe.aligned)).all()
    assert seen == [8, 8, 8, 8, 8, 1, 8]


@pytest.mark.parametrize("mean", ["centre", "aligned", "colour"])
@pytest.mark.parametrize("views", PLACES)
def test_views_of_evaluation_equal_pillow_and_numpy(small: Path, views: str, mean: str):
    """(picture's window − mean image's centre) and the like, in float64, and bit for bit in float32."""
    built = manifest.load(small)
    recipe, statistics = recipe_of(built, views=views, mean=mean, view=VIEW), built.statistics()
    crops, rest = (
        recipe.crops(0, 0, np.arange(9), None, np.full((9, 2), SIZE)),
        recipe.mean_deviations.get(recipe.divisor(0)),
    )
    with Loader(built, "val", batch_size=4, views=views, mean=mean, view=VIEW, device=CPUS) as loader:
        batches = list(loader)
        assert list(loader) == []  # it is over
    several = () if views == "centre" else (len(PLACES[views]),)
    for batch in batches:
        assert batch.images.shape == (len(batch.ids), *several, 3, VIEW, VIEW)
        assert all(torch.equal(batch.images, images) for images in batch.replicas)
    assert [batch.ids.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    images = torch.cat([batch.images for batch in batches]).reshape(9, -1, 3, VIEW, VIEW).numpy()
    for i, (picture, found) in enumerate(zip(pictures(built, "val"), images)):
        for place, image in zip(PLACES[views], found, strict=True):
            own = {
                "centre": statistics.mean_image[4:28, 4:28],
                "aligned": window(statistics.mean_image, *place),
                "colour": statistics.mean_color,
            }[mean]
            np.testing.assert_allclose(image, (window(picture, *place) - own).transpose(2, 0, 1), atol=1e-4)
            subtracted = window(rest, *place) if mean == "aligned" and rest is not None else rest
            bits = augment.reference_normalise(window(picture, *place), crops.offset[i], crops.std[i], subtracted)
            assert (image == bits).all()


@pytest.mark.parametrize("views", ["ten", "nine"])
def test_a_rank_without_samples_has_no_views(small: Path, views: str):
    with Loader(small, "val", batch_size=8, views=views, view=VIEW, rank=1, ranks=2) as loader:
        assert [batch.images.shape for batch in loader] == [
            (n, len(PLACES[views]), 3, VIEW, VIEW)
            for n in (4, 0)  # 9 samples: the second batch is the other rank's
        ]


def test_the_middle_of_several_views_is_rounded_down():
    for views in (augment.ten_views, augment.nine_views):
        assert {top for top, *_ in views(32, 25)} == {left for _, left, _ in views(32, 25)} == {0, 3, 7}


def test_pictures_smaller_than_a_view(small: Path):
    for options, words in (
        ({}, ("images of 32 pixels; a view needs 224;", "--size 256, or take view=32 or less")),
        ({"view": 33}, ("images of 32 pixels; a view needs 33;", "--size 38, or take view=32 or less")),
        ({"view": 32, "positions": "paper"}, ("a view needs 33;", "--size 37, or take view=31 or less")),
        ({"view": 0}, ("view=0: must be at least 1",)),
        ({"recipe": "imagenet", "view": 24}, ("view=24: no such option; this recipe has views",)),
    ):
        with pytest.raises(UserError) as caught:
            Loader(small, **options)  # type: ignore[arg-type]
        one_line(caught, *words)


# A run's sheet of one sample's views


@pytest.mark.parametrize("lighting", ["code", "paper", "off"])
def test_views_are_what_the_loader_gives(small: Path, lighting: str) -> None:
    dataset = manifest.load(small)
    mean = dataset.statistics().mean_image[4:28, 4:28]
    options = augment.ViewOptions(view=VIEW, lighting=lighting)
    expected = first_views(pictures(dataset, "train")[SAMPLE], options, dataset.statistics(), SEED, SAMPLE)
    images: list[np.ndarray] = []
    with Loader(dataset, "train", batch_size=16, seed=SEED, device="cpu", view=VIEW, lighting=lighting) as loader:
        while len(images) < len(expected):
            batch = next(loader)
            images += [batch.images[i].numpy() for i in (np.asarray(batch.ids) == SAMPLE).nonzero()[0]]
    divisor = 1.1 if lighting == "code" else 1.0
    for image, view in zip(images, expected):
        x = (view.pixels - mean + view.shift) / divisor
        assert np.abs(image - x.transpose(2, 0, 1)).max() < 1e-3
    assert any(view.shift.any() for view in expected) == (lighting != "off")
    assert len({(view.top, view.left, view.mirrored) for view in expected}) > 3


def test_the_sheet_of_a_sample_shows_its_views_and_crop_boxes(small: Path) -> None:
    dataset, options = manifest.load(small), augment.ViewOptions(view=VIEW)
    pixels, statistics = pictures(dataset, "train")[SAMPLE], dataset.statistics()
    sheet = np.asarray(augmentation(pixels, options, statistics, SEED, SAMPLE))
    views = first_views(pixels, options, statistics, SEED, SAMPLE)
    zoom, tops = 192 // VIEW, set()
    for i, view in enumerate(views):
        left = 16 + i % 3 * (192 + 16) + (192 - zoom * VIEW) // 2
        lit = np.clip(np.rint(pixels[4:28, 4:28].astype(float) + view.shift), 0, 255).astype(np.uint8)
        for kind, shown in (("cut", view.pixels), ("lit", lit)):
            tile = shown.repeat(zoom, 0).repeat(zoom, 1)
            strip = sheet[:, left : left + len(tile)]
            (top,) = [y for y in range(len(strip) - len(tile)) if (strip[y : y + len(tile)] == tile).all()]
            tops.add((kind, i // 3, top))
    assert [kind for kind, _, _ in sorted(tops, key=lambda row: row[2])] == ["cut", "cut", "lit", "lit"]

    zoom = 512 // len(pixels)
    tile = pixels.repeat(zoom, 0).repeat(zoom, 1)[-zoom:, -zoom:]  # of the corner: no box of these views covers it
    strip = sheet[:900, 16 + 512 - zoom : 16 + 512]
    (corner,) = [y for y in range(len(strip) - zoom) if (strip[y : y + zoom] == tile).all()]
    boxes, colour = sheet[corner + zoom - 512 : corner + zoom, 16 : 16 + 512], ImageColor.getrgb(COLOURS[5])
    left, top, side = views[-1].left * zoom, views[-1].top * zoom, VIEW * zoom  # drawn above the others
    assert (boxes[top + side - 1, left + 3 : left + side - 3] == colour).all()
    assert (boxes[top + 3 : top + side - 3, left] == colour).all()


def test_runs_without_lighting_and_views_that_do_not_fit(small: Path) -> None:
    dataset = manifest.load(small)
    pixels, statistics = pictures(dataset, "train")[SAMPLE], dataset.statistics()
    off = augment.ViewOptions(view=VIEW, lighting="off", crop_chunk=32)
    lit, dark = (augmentation(pixels, kind, statistics, SEED, SAMPLE) for kind in (augment.ViewOptions(view=VIEW), off))
    assert lit.height - dark.height > 150
    with pytest.raises(UserError, match="images of 32 pixels"):
        augmentation(pixels, augment.ViewOptions(), statistics, SEED, SAMPLE)
