"""Other models' crop boxes against a scalar RandomResizedCrop and numpy."""

import math

import numpy as np
import pytest

from conftest import one_line
from pipeline import UserError
from pipeline.online.batch import Recipe
from pipeline.online.plain import ImageNet, draw_regions
from reference import philox_words

REGION, VIEW = 5, 1  # first counter words


def scalar_window(seed: int, epoch: int, sample: int, height: int, width: int) -> tuple[int, int, int, int, int, int]:
    """RandomResizedCrop by its published rule, number by number: top, left, height, width, flip, and the tries."""
    key = seed % 2**32, seed // 2**32
    low, high = sample % 2**32, sample // 2**32
    flip = philox_words(key, (VIEW, epoch, low, high))[2] >= 2**31
    for attempt in range(10):
        words = philox_words(key, (REGION + 256 * attempt, epoch, low, high))
        target_area = height * width * (0.08 + (1 - 0.08) * (words[0] / 2**32))
        log_low, log_high = math.log(3 / 4), math.log(4 / 3)
        aspect = math.exp(log_low + (log_high - log_low) * (words[1] / 2**32))
        w, h = round(math.sqrt(target_area * aspect)), round(math.sqrt(target_area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return words[2] * (height - h + 1) // 2**32, words[3] * (width - w + 1) // 2**32, h, w, flip, attempt + 1
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w, flip, 11


def squares(n: int) -> np.ndarray:
    return np.full((n, 2), 256)


@pytest.mark.parametrize("seed", [2012, 2**40 + 17])
def test_windows_are_those_of_the_scalar_rule(seed: int):
    random = np.random.default_rng(1)
    shapes = [(256, 256), (256, 4096), (4096, 256), (256, 341), (500, 375), (256, 700), (900, 256), (1, 1), (3, 2)]
    sizes = np.concatenate([squares(1000), random.permutation(np.repeat(shapes, 120, axis=0))])
    ids = random.integers(0, 2**36, len(sizes))
    found = ImageNet("random", seed).crops(0, 6, ids, None, sizes)
    expected = np.array([scalar_window(seed, 6, i, *size) for i, size in zip(ids.tolist(), sizes.tolist())])
    assert (found.start == expected[:, :2]).all()
    assert (found.shape == expected[:, 2:4]).all()
    assert (found.flip == expected[:, 4]).all()
    assert {1, 2, 3, 11} <= set(expected[:, 5].tolist())  # later tries and the fallback were seen
    assert (found.start >= 0).all()
    assert (found.start + found.shape <= sizes).all()
    for array in (found.start, found.shape, found.flip):
        assert array.dtype == np.int32
        assert array.flags.c_contiguous


def test_where_nothing_fits_the_largest_window_of_a_permitted_ratio_is_taken():
    sizes = np.array([(256, 100_000), (100_000, 256)])
    start, shape, _ = draw_regions(3, 0, np.arange(2), sizes)
    assert shape.tolist() == [[256, 341], [341, 256]]
    assert start.tolist() == [[0, 49829], [49829, 0]]


def test_windows_have_the_right_distributions():
    """Any ratio fits windows of up to ¾ of a square; there, area and log ratio are uniform and independent."""
    n = 200_000
    start, shape, flip = draw_regions(5, 0, np.arange(n), squares(n))
    area, log_ratio = shape.prod(1) / 256**2, np.log(shape[:, 1] / shape[:, 0])
    free = (area > 0.1) & (area < 0.7)
    for values, low, high, bins, bound in (
        (area[free], 0.1, 0.7, 20, 47.5),  # chi-squared of bins − 1 degrees of freedom, 99.97 % and more
        (log_ratio[free & (area > 0.3)], -0.28, 0.28, 7, 26),  # an odd number: ratio 1, which is frequent, is inside
    ):
        counts, _ = np.histogram(values, bins, (low, high))
        mean = counts.sum() / bins
        assert ((counts - mean) ** 2 / mean).sum() < bound
    assert abs(log_ratio.mean()) < 0.002
    assert abs(np.corrcoef(area[free], log_ratio[free])[0, 1]) < 0.01
    # A window of area a fits where |log ratio| ≤ ln((256.5/256)²/a): half a pixel more than 256 is rounded down
    areas = np.linspace(0.08, 1, 100_001)
    share = (np.log((256.5 / 256) ** 2 / areas) / np.log(4 / 3)).clip(0, 1)
    assert abs((area > 0.75).mean() - share[areas > 0.75].sum() / share.sum()) < 0.0025
    assert np.abs(np.quantile(area, [0, 1]) - [0.08, 1]).max() < 0.01
    assert abs(flip.mean() - 0.5) < 0.005
    slack = 256 - shape
    wide = (slack >= 60).all(1)
    place = (start[wide] + 0.5) / (slack[wide] + 1)
    assert np.abs(place.mean(0) - 0.5).max() < 0.005
    assert np.abs(place.var(0) - 1 / 12).max() < 0.001
    assert abs(np.corrcoef(place.T)[0, 1]) < 0.01
    assert (start.min(0) == 0).all()
    assert ((start + shape).max(0) == 256).all()


def test_windows_are_a_function_of_seed_epoch_and_id():
    recipe: Recipe = ImageNet("random", 5)
    ids, sizes = np.array([9, 2, 5, 2**33]), np.array([(256, 256), (300, 400), (256, 4096), (256, 256)])
    one = recipe.crops(7, 3, ids, None, sizes)
    other = recipe.crops(8, 3, ids[::-1].copy(), None, sizes[::-1].copy())
    for name in ("start", "shape", "flip"):
        assert (getattr(one, name) == getattr(other, name)[::-1]).all()
    for changed in (recipe.crops(7, 4, ids, None, sizes), ImageNet("random", 6).crops(7, 3, ids, None, sizes)):
        assert (changed.shape[[0, 1, 3]] != one.shape[[0, 1, 3]]).any(1).all()


def test_those_that_share_a_head_share_its_window():
    recipe = ImageNet("random", 5)
    ids, heads = np.arange(12), np.repeat([0, 4, 8], 4)
    own, shared = (recipe.crops(0, 0, ids, given, squares(12)) for given in (None, heads))
    for name in ("start", "shape", "flip"):
        assert (getattr(shared, name) == getattr(own, name)[heads]).all()


def test_centre_windows():
    recipe: Recipe = ImageNet("centre", 1)
    sizes = np.array([(256, 256), (256, 341), (400, 256), (224, 224), (225, 227)])
    found = recipe.crops(0, 0, np.arange(5), None, sizes)
    assert found.start.tolist() == [[16, 16], [16, 58], [88, 16], [0, 0], [0, 2]]  # 58.5 and ½ to even, as round does
    assert found.shape.tolist() == [[224, 224]] * 5
    assert found.flip.tolist() == [0] * 5
    assert (found.offset == (255 * np.array([0.485, 0.456, 0.406])).astype(np.float32)).all()
    assert (found.std == (255 * np.array([0.229, 0.224, 0.225])).astype(np.float32)).all()
    assert (recipe.view, recipe.resize, recipe.training, dict(recipe.mean_deviations)) == (224, False, False, {})
    assert recipe.described() == {"recipe": "imagenet", "views": "centre"}
    with pytest.raises(UserError) as caught:
        recipe.crops(0, 0, np.array([3, 77]), None, np.array([(256, 256), (223, 300)]))
    one_line(caught, "sample 77", "300 × 223", "224", "--size 256")
    with pytest.raises(UserError, match="views='ten': must be one of random, centre"):
        ImageNet("ten", 1)
