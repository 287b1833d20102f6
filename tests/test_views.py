"""Views of any size, as of CIFAR-10: 24 × 24 of 32 × 32 pixels; every picture against Pillow's decoder and numpy."""

from collections.abc import Callable
from itertools import islice, product
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import one_line
from pipeline import UserError, manifest
from pipeline.manifest import Manifest
from pipeline.online import Loader, augment
from pipeline.online.samples import SampleReader
from reference import jpeg_pixels

SIZE, VIEW = 32, 24
CPUS = ("cpu:0", "cpu:1")  # two devices by name: two graphs, each with its part of a batch
CORNERS = [(0, 0), (0, 8), (4, 4), (8, 0), (8, 8)]
PLACES = {  # views → top, left, and the step along a row
    "centre": [(4, 4, 1)],
    "ten": [(top, left, step) for step in (1, -1) for top, left in CORNERS],
    "nine": [(top, left, 1) for top, left in product((0, 4, 8), repeat=2)],
}


def pictures(built: Manifest, split: str) -> list[np.ndarray]:
    """Each (32, 32, 3) uint8, as Pillow decodes it, in the order of the ids."""
    with SampleReader(built, split) as reader:
        return [jpeg_pixels(data.tobytes()) for data in reader.read(np.arange(built.split(split).samples))]


def window(image: np.ndarray, top: int, left: int, step: int, view: int = VIEW) -> np.ndarray:
    return image[top : top + view, left : left + view][:, ::step]


def recipe_of(built: Manifest, **options: object) -> augment.AlexNet:
    return augment.AlexNet(augment.Transform(**options), built.statistics(), SIZE, seed=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mean": "aligned"},
        {"mean": "colour"},
        {"positions": "paper", "crop_chunk": 4},
        {"view": 31},
        {"view": 32, "mean": "aligned"},  # one place; the mean image is as large as a view, and yet it is mirrored
        {"view": 2},  # of 1 pixel at the left edge, libjpeg's colour is another: it does not see the next one
    ],
    ids=str,
)
def test_random_views_equal_pillow_and_numpy(small: Path, options: dict):
    """Within float32's rounding of the formula in float64, and bit for bit of `augment.reference`."""
    options = {"view": VIEW, **options}
    view, chunk, built = options["view"], options.get("crop_chunk", 1), manifest.load(small)
    recipe, known, statistics = recipe_of(built, **options), pictures(built, "train"), built.statistics()
    middle, places = (SIZE - view) // 2, SIZE - view + (options.get("positions") != "paper")
    deviations = np.sqrt(statistics.eigenvalues)
    with Loader(built, batch_size=16, seed=3, **options) as loader:
        for batch in islice(loader, 4):  # an epoch, whose last batch is short, and one more
            n, heads = len(batch.ids), batch.ids[np.arange(len(batch.ids)) // chunk * chunk]
            draws = augment.draw(3, batch.epoch, batch.ids, places, heads)
            crops = recipe.crops(batch.step, batch.epoch, batch.ids, heads, np.full((n, 2), SIZE))
            assert batch.images.shape == (n, 3, view, view)
            for i, number in enumerate(batch.ids):
                place = (*draws.crop[i].tolist(), -1 if draws.flip[i] else 1)
                own = {
                    "centre": window(statistics.mean_image, middle, middle, 1, view),
                    "aligned": window(statistics.mean_image, *place, view),
                    "colour": statistics.mean_color,
                }[options.get("mean", "centre")]
                shift = statistics.eigenvectors @ (0.1 * draws.normals[i] * deviations)
                formula = (window(known[number], *place, view) - own + shift) / 1.1
                np.testing.assert_allclose(batch.images[i].numpy(), formula.transpose(2, 0, 1), atol=1e-4)
                bits = augment.reference(
                    known[number], crops, i, recipe.mean_deviations.get(recipe.divisor(batch.step)), recipe.aligned
                )
                assert (batch.images[i].numpy() == bits).all()


def test_random_views_start_at_all_81_places_equally_often(small: Path):
    """Each view is looked up among all windows of its picture: no draw is believed."""
    built, epochs = manifest.load(small), 60
    known = pictures(built, "train")
    places = list(product(range(9), range(9), (1, -1)))
    by_pixels = [{window(image, *place).tobytes(): place for place in places} for image in known]
    assert all(len(each) == 162 for each in by_pixels)
    counts = np.zeros((9, 9, 2), int)
    with Loader(built, batch_size=41, view=VIEW, output="uint8") as loader:
        for batch in islice(loader, epochs):
            for number, image in zip(batch.ids, batch.images.permute(0, 2, 3, 1).numpy()):
                top, left, step = by_pixels[number][image.tobytes()]
                counts[top, left, int(step < 0)] += 1
    assert counts.sum() == epochs * 41
    mean = epochs * 41 / 81
    assert ((counts.sum(2) - mean) ** 2 / mean).sum() < 135.8  # 80 degrees of freedom, 99.99 %
    assert abs(counts[..., 1].sum() / counts.sum() - 0.5) < 0.04  # four standard deviations


@pytest.mark.parametrize("mean", ["centre", "aligned", "colour"])
@pytest.mark.parametrize("views", PLACES)
@pytest.mark.parametrize("device", ["cpu", CPUS])
def test_views_of_evaluation_equal_pillow_and_numpy(small: Path, views: str, mean: str, device: str | tuple[str, str]):
    """(picture's window − mean image's centre) and the like, in float64, and bit for bit in float32."""
    built = manifest.load(small)
    recipe, statistics = recipe_of(built, views=views, mean=mean, view=VIEW), built.statistics()
    crops, rest = (
        recipe.crops(0, 0, np.arange(9), None, np.full((9, 2), SIZE)),
        recipe.mean_deviations.get(recipe.divisor(0)),
    )
    with Loader(built, "val", batch_size=4, views=views, mean=mean, view=VIEW, device=device) as loader:
        batches = list(loader)
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


@pytest.mark.parametrize("views", PLACES)
def test_uint8_views_of_evaluation_are_those_of_the_pictures(small: Path, views: str):
    built = manifest.load(small)
    with Loader(built, "val", batch_size=9, views=views, view=VIEW, output="uint8") as loader:
        (images,) = [batch.images.reshape(9, -1, 3, VIEW, VIEW).numpy() for batch in loader]
    for picture, found in zip(pictures(built, "val"), images):
        for place, image in zip(PLACES[views], found, strict=True):
            assert (image == window(picture, *place).transpose(2, 0, 1)).all()


@pytest.mark.parametrize("views", ["ten", "nine"])
def test_a_rank_without_samples_has_no_views(small: Path, views: str):
    with Loader(small, "val", batch_size=8, views=views, view=VIEW, rank=1, ranks=2) as loader:
        assert [batch.images.shape for batch in loader] == [
            (n, len(PLACES[views]), 3, VIEW, VIEW)
            for n in (4, 0)  # 9 samples: the second batch is the other rank's
        ]


@pytest.mark.parametrize(("places", "count"), [(augment.ten_views, 10), (augment.nine_views, 9)])
def test_places_of_several_views(places: Callable[[int, int], list], count: int):
    """The middle is rounded down; a view as large as the picture has but one place."""
    for size, view, known in ((256, 224, {0, 16, 32}), (32, 25, {0, 3, 7}), (32, 32, {0})):
        found = places(size, view)
        assert len(found) == count
        assert {top for top, *_ in found} == {left for _, left, _ in found} == known
    assert len(set(places(32, 24))) == count
    assert augment.nine_views(32, 24)[:4] == [(0, 0, False), (0, 4, False), (0, 8, False), (4, 0, False)]


def test_a_state_of_another_view_is_refused(small: Path):
    with Loader(small, batch_size=8, view=24) as one, Loader(small, batch_size=8, view=28) as other:
        state = one.state_dict()
        assert state["view"] == 24
        with pytest.raises(UserError, match="view: 24 there, 28 here"):
            other.load_state_dict(state)
        one.load_state_dict(state)


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
