"""The same shards for other models: crop boxes against a scalar RandomResizedCrop, webdataset() against Pillow."""

import math
import pickle
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import build, one_line, picture
from pipeline import UserError, manifest
from pipeline.online.batch import Transform
from pipeline.online.plain import ImageNet, webdataset
from reference import jpeg_pixels, philox_words
from stored import jpegs

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # webdataset warns of shards that it does not share

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
    for array in (found.start, found.shape, found.flip):
        assert array.dtype == np.int32
        assert array.flags.c_contiguous


def test_those_that_share_a_head_share_its_window():
    recipe = ImageNet("random", 5)
    ids, heads = np.arange(12), np.repeat([0, 4, 8], 4)
    own, shared = (recipe.crops(0, 0, ids, given, squares(12)) for given in (None, heads))
    for name in ("start", "shape", "flip"):
        assert (getattr(shared, name) == getattr(own, name)[heads]).all()


def test_centre_windows():
    recipe: Transform = ImageNet("centre", 1)
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


Pairs = list[tuple[int, bytes]]  # label and pixels


def pairs(samples: Iterable[tuple[Image.Image, int]]) -> Pairs:
    return [(label, np.asarray(image).tobytes()) for image, label in samples]


def stored_pairs(root: Path, split: str) -> Pairs:
    labels = manifest.load(root).samples(split)["label"].tolist()
    stored = [(label, jpeg_pixels(data).tobytes()) for label, data in zip(labels, jpegs(root, split), strict=True)]
    assert len(set(stored)) == len(stored)  # so that equal lists are equal keys
    return stored


def test_webdataset_gives_every_sample_in_the_order_of_the_build(dataset: Path):
    for split in ("train", "val"):
        first, label = next(iter(webdataset(str(dataset), split)))
        assert isinstance(first, Image.Image)
        assert (first.mode, first.size, type(label)) == ("RGB", (256, 256), int)
        assert pairs(webdataset(dataset, split)) == stored_pairs(dataset, split)


def test_webdataset_shuffles(dataset: Path):
    expected = stored_pairs(dataset, "train")
    shuffled = webdataset(dataset, "train", shuffle=20, seed=3)
    again, other = webdataset(dataset, "train", shuffle=20, seed=3), webdataset(dataset, "train", shuffle=20, seed=4)
    orders = [pairs(shuffled), pairs(shuffled), pairs(other), expected]  # two passes differ, and from other seeds'
    assert pairs(again) == orders[0]
    assert all(Counter(order) == Counter(expected) for order in orders)
    assert all(one != two for i, one in enumerate(orders) for two in orders[:i])


def as_it_is(sample: object) -> object:
    return sample


def test_webdataset_workers_share_the_shards(dataset: Path):
    for split, shuffle in (("train", 20), ("val", 0)):  # three shards; one, so that a worker has none
        samples = webdataset(dataset, split, shuffle=shuffle)
        loader = torch.utils.data.DataLoader(samples, batch_size=None, num_workers=2, collate_fn=as_it_is)
        assert Counter(pairs(loader)) == Counter(stored_pairs(dataset, split))


def test_webdataset_ranks_share_the_shards(dataset: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        parts.append(pairs(pickle.loads(pickle.dumps(webdataset(dataset, "train")))))  # as a spawned worker gets it
    assert all(parts)
    assert Counter(parts[0] + parts[1]) == Counter(stored_pairs(dataset, "train"))


def test_webdataset_without_labels_and_with_whole_pictures(tmp_path: Path):
    raw, root = tmp_path / "raw", tmp_path / "dataset"
    for name, sides in (("train/a", (90, 80)), ("train/b", (120, 80)), ("test", (60, 80))):
        (raw / name).mkdir(parents=True)
        picture(name, *sides).save(raw / name / f"{name.replace('/', '')}.jpg")
    result = build(raw, root, "--workers", 1, "--size", 32, "--crop", "none")
    assert result.exit_code == 0, result.output
    for split in ("train", "test"):
        assert pairs(webdataset(root, split)) == stored_pairs(root, split)
    ((image, label),) = webdataset(root, "test")
    assert (image.size, label) == ((32, 42), -1)


def test_impossible_webdatasets(small: Path, tmp_path: Path):
    with pytest.raises(UserError) as caught:
        webdataset("s3://bucket/dataset", "train")
    one_line(caught, "s3://bucket/dataset", "copy")
    with pytest.raises(UserError, match="no split named 'other'; there are: train, val"):
        webdataset(small, "other")
    with pytest.raises(UserError, match="shuffle=-1: must be at least 0"):
        webdataset(small, "train", shuffle=-1)
    odd = tmp_path / "a#b"
    odd.symlink_to(small)
    assert next(iter(webdataset(odd, "val")))[0].size == (32, 32)  # the link is followed
    odd.unlink()
    shutil.copytree(small, odd)
    with pytest.raises(UserError) as caught:
        webdataset(odd, "val")
    one_line(caught, "a#b/val/val-000000.tar", "rename")
