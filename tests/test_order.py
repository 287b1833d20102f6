"""Which samples form which batch: permutations, their uniformity, and the parts of ranks."""

import numpy as np
import pytest

from pipeline import UserError
from pipeline.online.order import Order, part

SHARDS = (40, 40, 0, 40, 40, 17)
COUNT = sum(SHARDS)


def order(kind: str, samples: int = COUNT, batch: int = 16, seed: int = 7, **options: object) -> Order:
    shards = SHARDS if samples == COUNT else (samples,)
    return Order(samples, batch, seed, kind, shards=shards, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["uniform", "shards", "fixed"])
@pytest.mark.parametrize(("samples", "batch"), [(10, 4), (12, 4), (5, 8), (1, 1), (COUNT, 16)])
@pytest.mark.parametrize("last", ["short", "drop"])
def test_an_epoch_visits_every_sample_once(kind: str, samples: int, batch: int, last: str):
    if last == "drop" and samples < batch:
        with pytest.raises(UserError, match=r"batch_size=8: the split has 5 samples, and last='drop' leaves no batch"):
            order(kind, samples, batch, last=last)
        return
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
        assert seen.min() >= 0
        assert seen.max() < samples


@pytest.mark.parametrize("kind", ["uniform", "shards"])
def test_an_order_is_a_function_of_seed_and_epoch(kind: str):
    one = order(kind).permutation(3)
    assert one.tolist() == order(kind).permutation(3).tolist()
    assert one.tolist() != order(kind).permutation(4).tolist()
    assert one.tolist() != order(kind, seed=8).permutation(3).tolist()
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


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_share_out_every_global_batch(ranks: int):
    made = order("uniform", batch=50)
    permutation = made.permutation(0)
    for step in range(made.steps_per_epoch):
        batch = made.batch(step, permutation)
        parts = [batch[part(len(batch), rank, ranks)] for rank in range(ranks)]
        assert np.concatenate(parts).tolist() == batch.tolist()
        sizes = [len(each) for each in parts]
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "random"}, "order='random': must be one of uniform, shards, fixed"),
        ({"last": "pad"}, "last='pad': must be one of short, drop"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"window": 0}, "window=0: must be at least 1"),
        ({"seed": -1}, "seed=-1: must be between 0"),
    ],
)
def test_impossible_orders(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        Order(**({"samples": 10, "batch_size": 2, "seed": 1} | options))
