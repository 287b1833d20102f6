"""Batches against numpy and Pillow: draws, order, pixels, exact repetition, damage."""

import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import manifest
from pipeline.errors import UserError
from pipeline.online import Loader, augment
from pipeline.online.loader import normalise
from pipeline.online.order import Order
from pipeline.online.philox import philox
from pipeline.online.samples import SampleReader
from reference import jpeg_pixels, philox_words


def test_philox_known_answers():
    """The three vectors published with the Random123 library."""
    assert [
        f"{int(word):08x}" for word in philox((0, 0), (0, 0, 0, 0))
    ] == "6627e8d5 e169c58d bc57ac4c 9b00dbd8".split()
    ones = 0xFFFFFFFF
    assert [f"{int(word):08x}" for word in philox((ones, ones), (ones,) * 4)] == (
        "408f276d 41c83b0e a20bc7c6 6d5451fd".split()
    )
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert [f"{int(word):08x}" for word in philox((0xA4093822, 0x299F31D0), pi)] == (
        "d16cfe09 94fdcceb 5001e420 24126ea1".split()
    )


def test_philox_broadcasts():
    words = philox((3, 4), (7, np.arange(5)[:, None], np.arange(6)[None], 9))
    assert words.shape == (5, 6, 4)
    assert words[2, 3].tolist() == philox_words((3, 4), (7, 2, 3, 9))


@pytest.mark.parametrize(("samples", "batch"), [(10, 4), (12, 4), (5, 8), (1, 1), (1000, 64)])
def test_an_epoch_visits_every_sample_once(samples: int, batch: int):
    order = Order(samples, batch, seed=7)
    assert order.steps_per_epoch == int(np.ceil(samples / batch))
    for epoch in (0, 1, 5):
        assert sorted(order.permutation(epoch).tolist()) == list(range(samples))
    if samples > 4:
        assert order.permutation(0).tolist() != order.permutation(1).tolist()
        assert order.permutation(0).tolist() != Order(samples, batch, seed=8).permutation(0).tolist()
    assert order.permutation(1).tolist() == Order(samples, batch, seed=7).permutation(1).tolist()


def test_shuffle_is_uniform():
    """Each of 6 ids stands equally often at each of 6 places: chi-squared with 25 degrees of freedom, 99.99 % bound."""
    counts = np.zeros((6, 6))
    for epoch in range(3000):
        counts[np.arange(6), Order(6, 2, seed=1).permutation(epoch)] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 60.1


def test_draws_have_the_right_distributions():
    draws = augment.draw(5, 0, np.arange(200_000), 256)
    for axis in (0, 1):
        counts = np.bincount(draws.crop[:, axis], minlength=33)
        assert len(counts) == 33
        assert ((counts - 200_000 / 33) ** 2 / (200_000 / 33)).sum() < 75  # 32 degrees of freedom, beyond 99.99 %
    assert abs(draws.flip.mean() - 0.5) < 0.005
    assert np.abs(draws.normals.mean(0)).max() < 0.01
    assert np.abs(np.cov(draws.normals.T) - np.eye(3)).max() < 0.02
    assert abs((np.abs(draws.normals) > 1.959964).mean() - 0.05) < 0.002
    assert abs(np.corrcoef(draws.crop.T)[0, 1]) < 0.01


def test_draws_are_a_function_of_seed_epoch_and_id():
    ids = np.array([9, 2, 5])
    one, other = augment.draw(5, 3, ids, 256), augment.draw(5, 3, ids[::-1].copy(), 256)
    assert (one.crop == other.crop[::-1]).all()
    assert (one.normals == other.normals[::-1]).all()
    assert (augment.draw(5, 4, ids, 256).normals != one.normals).all()
    assert (augment.draw(6, 3, ids, 256).normals != one.normals).all()


def test_lighting_shift_is_the_formula(dataset: Path):
    statistics = manifest.load(dataset).statistics()
    normals = np.array([[1.0, 0, 0], [0.5, -2, 0.25]])
    expected = [
        0.1 * sum(z[i] * np.sqrt(statistics.eigenvalues[i]) * statistics.eigenvectors[:, i] for i in range(3))
        for z in normals
    ]
    np.testing.assert_allclose(augment.lighting_shift(normals, statistics), expected, rtol=1e-6)


def test_ten_views_are_corners_centre_and_mirror_images():
    places = {(top, left) for top, left, _ in augment.ten_views(256)}
    assert places == {(0, 0), (0, 32), (16, 16), (32, 0), (32, 32)}
    assert len(set(augment.ten_views(256))) == 10


def test_training_batches_equal_pillow_and_numpy_bit_for_bit(dataset: Path):
    """The view is exact; the float arithmetic after it is the same sequence of float32 operations."""
    built = manifest.load(dataset)
    statistics, records = built.statistics(), built.samples("train")
    mean = augment.mean_view(statistics)
    seen = []
    with Loader(dataset, "train", batch_size=8, seed=3) as loader, SampleReader(built, "train") as reader:
        for batch in (next(loader) for _ in range(13)):  # two epochs and one batch: the last of an epoch is short
            seen.append(len(batch.ids))
            assert batch.labels.tolist() == records["label"][batch.ids].tolist()
            draws = augment.draw(3, batch.epoch, batch.ids, 256)
            shifts = augment.lighting_shift(draws.normals, statistics)
            for i, data in enumerate(reader.read(batch.ids)):
                view = augment.reference_view(jpeg_pixels(data.tobytes()), *draws.crop[i], bool(draws.flip[i]))
                expected = augment.reference_normalise(view, mean, shifts[i])
                assert (batch.images[i].numpy() == expected).all()
    assert seen == [8, 8, 8, 8, 8, 1] * 2 + [8]


def test_centre_and_ten_views_equal_numpy(dataset: Path):
    built = manifest.load(dataset)
    mean = augment.mean_view(built.statistics())
    with SampleReader(built, "val") as reader:
        pictures = [jpeg_pixels(data.tobytes()) for data in reader.read(np.arange(9))]
    for views, places in (("centre", [(16, 16, False)]), ("ten", augment.ten_views(256))):
        with Loader(dataset, "val", batch_size=4, views=views) as loader:
            batches = list(loader)
        assert [batch.ids.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
        images = torch.cat([batch.images for batch in batches]).reshape(9, len(places), 3, 224, 224).numpy()
        for picture, found in zip(pictures, images):
            for place, image in zip(places, found):
                expected = augment.reference_normalise(augment.reference_view(picture, *place), mean, None)
                assert (image == expected).all()


def test_lighting_ends_where_it_is_told(dataset: Path):
    built = manifest.load(dataset)
    mean = torch.from_numpy(augment.mean_view(built.statistics()))
    with Loader(dataset, "train", batch_size=4, lighting_until=2) as loader:
        for batch in (next(loader) for _ in range(4)):
            levels = batch.images.permute(0, 2, 3, 1) + mean
            whole = (levels - levels.round()).abs().max() < 1e-4  # grey levels again, unless light was added
            assert bool(whole) == (batch.step >= 2)


def test_same_step_same_bits_whatever_the_threads_depth_and_starting_point(dataset: Path):
    def batches(first: int, **options: int) -> list[torch.Tensor]:
        with Loader(dataset, "train", batch_size=16, step=first, **options) as loader:
            return [next(loader).images.clone() for _ in range(6 - first)]

    whole = batches(0, threads=1, depth=1)
    for options in ({"threads": 2, "depth": 3}, {"threads": 4, "depth": 5}):
        for one, other in zip(whole, batches(0, **options), strict=True):
            assert torch.equal(one, other)
    for first in (1, 3, 5):
        for one, other in zip(whole[first:], batches(first), strict=True):
            assert torch.equal(one, other)


def test_normalise_against_its_reference():
    random = np.random.default_rng(0)
    view = random.integers(0, 256, (3, 224, 224, 3)).astype(np.uint8)
    mean = random.random((224, 224, 3)).astype(np.float32) * 255
    shift = random.normal(size=(3, 3)).astype(np.float32)
    for given in (None, shift):
        found = normalise(
            torch.from_numpy(view), torch.from_numpy(mean), None if given is None else torch.from_numpy(given)
        )
        for i in range(3):
            expected = augment.reference_normalise(view[i], mean, None if given is None else given[i])
            assert (found[i].numpy() == expected).all()


def test_waiting_is_counted(dataset: Path):
    began = time.perf_counter()
    with Loader(dataset, "train", batch_size=16) as loader:
        for _ in range(5):
            next(loader)
        assert 0 < loader.waited <= time.perf_counter() - began


def test_closing_ends_the_thread(dataset: Path):
    before = {thread.name for thread in threading.enumerate()}
    with Loader(dataset, "train", batch_size=16) as loader:
        next(loader)
        assert any(thread.name.startswith("penstock-loader") for thread in threading.enumerate())
    assert {thread.name for thread in threading.enumerate()} <= before


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_named(dataset: Path, tmp_path: Path, damage: str):
    root = tmp_path / "copy"
    shutil.copytree(dataset, root)
    shard = root / "val" / "val-000000.tar"
    record = manifest.load(root).samples("val")[4]
    with Loader(root, "val", batch_size=2, views="centre", depth=1) as loader:
        next(loader)  # it is open, and batches ahead are on their way
    built = manifest.load(root)
    data = bytearray(shard.read_bytes())
    data[int(record["offset"]) + 700] ^= 4
    if damage == "flip":
        shard.write_bytes(data)
        message = r"damaged at sample 4 \(key val_checks_0001\)"
    elif damage == "cut":
        shard.write_bytes(data[: int(record["offset"]) + 700])
        message = "cut short at sample 4"
    else:
        shard.unlink()
        message = "missing"
    with pytest.raises(UserError, match=message) as caught, SampleReader(built, "val") as reader:
        reader.read(np.arange(9))
    assert str(shard) in str(caught.value)
    with (
        pytest.raises(UserError, match=r"val-000000\.tar"),
        Loader(root, "val", batch_size=2, views="centre") as loader,
    ):
        list(loader)


def test_impossible_loaders(dataset: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no split named 'other'; there are: train, val"):
        Loader(dataset, "other")
    with pytest.raises(UserError, match="no such directory"):
        Loader(tmp_path / "nothing")
    for options in ({"views": "eleven"}, {"batch_size": 0}, {"depth": 0}):
        with pytest.raises(UserError, match="must be one of random, centre, ten"):
            Loader(dataset, **options)
