"""Keyed draws: the order of an epoch and its parts; crop, flip and lighting: known answers, distributions, formulas."""

from pathlib import Path

import numpy as np
import pytest

from pipeline import UserError, manifest
from pipeline.online import augment
from pipeline.online.augment import ViewOptions
from pipeline.online.order import Order
from pipeline.online.philox import philox

SHARDS = (40, 40, 0, 40, 40, 17)
COUNT = sum(SHARDS)


def order(kind: str, samples: int = COUNT, batch: int = 16, seed: int = 7, **options: object) -> Order:
    shards = SHARDS if samples == COUNT else (samples,)
    return Order(samples, batch, seed, kind, shards=shards, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["uniform", "shards", "fixed"])
@pytest.mark.parametrize(
    ("samples", "batch", "last"), [(12, 4, "drop"), (5, 8, "short"), (COUNT, 16, "short"), (COUNT, 16, "drop")]
)
def test_an_epoch_visits_every_sample_once(kind: str, samples: int, batch: int, last: str):
    made = order(kind, samples, batch, last=last)
    assert made.steps_per_epoch == (samples // batch if last == "drop" else -(-samples // batch))
    for epoch in (0, 1, 5):
        permutation = made.permutation(epoch)
        first = epoch * made.steps_per_epoch
        batches = [made.batch(first + i, permutation) for i in range(made.steps_per_epoch)]
        seen = np.concatenate(batches)
        assert len(np.unique(seen)) == len(seen)
        assert len(seen) == (samples // batch * batch if last == "drop" else samples)
        assert all(len(ids) == batch for ids in batches[: samples // batch])
        assert set(seen.tolist()) <= set(range(samples))


def test_an_order_is_a_function_of_seed_and_epoch():
    for kind in ("uniform", "shards"):
        orders = [order(kind, seed=seed).permutation(epoch).tolist() for seed, epoch in ((7, 3), (7, 4), (8, 3))]
        assert orders[0] not in orders[1:]
        assert orders[0] == order(kind).permutation(3).tolist()
    assert order("fixed").permutation(3).tolist() == list(range(COUNT))


def test_shuffle_is_uniform():
    """Each of 6 ids stands equally often at each of 6 places: chi-squared with 25 degrees of freedom, 99.99 % bound."""
    counts = np.zeros((6, 6))
    for epoch in range(3000):
        counts[np.arange(6), order("uniform", 6, 2, seed=1).permutation(epoch)] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 60.1


def test_shards_come_one_after_another_and_are_shuffled_inside_the_window():
    shard_of = np.repeat(np.arange(len(SHARDS)), SHARDS)
    firsts, neighbours = set(), []
    for epoch in range(40):
        found = order("shards", window=40).permutation(epoch)
        for start in range(0, COUNT, 40):
            assert len(set(shard_of[found[start : start + 40]])) <= 3  # two, and the one with 17 between them
        firsts.add(int(shard_of[found[0]]))
        neighbours.append(np.mean(np.diff(found) == 1))
    assert len(firsts) > 2
    assert np.mean(neighbours) < 0.05  # of a shuffled forty, one in forty follows its predecessor
    whole = order("shards", window=COUNT).permutation(0)
    assert len(set(shard_of[whole[:40]])) > 3


def test_philox_known_answers():
    """The three vectors published with the Random123 library."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for key, counter, words in (
        ((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ones, ones), (ones,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ((0xA4093822, 0x299F31D0), pi, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ):
        assert " ".join(f"{int(word):08x}" for word in philox(key, counter)) == words


def test_draws_have_the_right_distributions():
    draws = augment.draw(5, 0, np.arange(200_000), 33)
    for axis in (0, 1):
        counts = np.bincount(draws.crop[:, axis], minlength=33)
        assert len(counts) == 33
        assert ((counts - 200_000 / 33) ** 2 / (200_000 / 33)).sum() < 75  # 32 degrees of freedom, beyond 99.99 %
    assert abs(draws.flip.mean() - 0.5) < 0.005
    assert np.abs(draws.normals.mean(0)).max() < 0.01
    assert np.abs(np.cov(draws.normals.T) - np.eye(3)).max() < 0.02
    assert abs((np.abs(draws.normals) > 1.959964).mean() - 0.05) < 0.002
    assert abs(np.corrcoef(draws.crop.T)[0, 1]) < 0.01


def test_the_papers_lighting_is_its_formula_for_pixels_between_0_and_1(dataset: Path):
    """p + Σ αᵢ λᵢ pᵢ with αᵢ = 0.1 zᵢ (section 4.1), on pixels and covariance scaled by 1/255 and 1/255²."""
    statistics = manifest.load(dataset).statistics()
    values, vectors = np.linalg.eigh(statistics.covariance / 255**2)
    normals = np.array([[1.0, 0, 0], [0, 0, 1.0], [0.5, -2, 0.25]])
    found = augment.lighting_shift(normals, statistics, "paper")
    signs = np.sign((vectors[:, ::-1] * statistics.eigenvectors).sum(0))
    expected = 255 * (vectors[:, ::-1] * signs) @ (0.1 * normals * values[::-1]).T
    np.testing.assert_allclose(found, expected.T, rtol=1e-4, atol=1e-6)


def test_heads_share_crop_and_flip_but_not_lighting():
    ids, heads = np.arange(64), np.arange(64) // 32 * 32
    draws, own = augment.draw(3, 1, ids, 33, heads), augment.draw(3, 1, ids, 33)
    assert len(np.unique(draws.crop, axis=0)) == 2
    assert (draws.crop[:32] == own.crop[0]).all()
    assert (draws.flip[32:] == own.flip[32]).all()
    assert (draws.normals == own.normals).all()


def test_impossible_orders_and_transforms():
    with pytest.raises(UserError, match="order='random': must be one of uniform, shards, fixed"):
        Order(10, 2, 1, "random")
    with pytest.raises(UserError, match="batch_size=8: the split has 5 samples, and last='drop' leaves no batch"):
        order("uniform", 5, 8, last="drop")
    with pytest.raises(UserError, match="seed=-1: must be between 0"):
        Order(10, 2, -1)
    with pytest.raises(UserError, match="views='eleven': must be one of random, centre, ten, nine"):
        ViewOptions(views="eleven")
    with pytest.raises(UserError, match="crop_chunk=0: must be at least 1"):
        ViewOptions(crop_chunk=0)
