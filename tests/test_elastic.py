"""Elastic and exact: the same batches whatever the threads and ranks; a state goes on where it was taken."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import UserError
from pipeline.online import Loader

CPUS = ("cpu:0", "cpu:1")  # two devices by name


def batches(dataset: Path, first: int = 0, until: int = 8, **options: object) -> list[torch.Tensor]:
    with Loader(dataset, batch_size=16, step=first, **options) as loader:  # type: ignore[arg-type]
        return [batch.images.clone() for batch in islice(loader, until - first)]


def test_the_same_step_has_the_same_bits(dataset: Path):
    """Whatever the threads, readers, depth, devices, and the step to begin with."""
    whole = batches(dataset, threads=1, depth=1)
    for options in (
        {"threads": 2, "depth": 3, "readers": 3},
        {"threads": 4, "depth": 5},
        {"device": CPUS},
        {"device": CPUS, "feed": "replicate"},
    ):
        assert all(torch.equal(*pair) for pair in zip(whole, batches(dataset, **options), strict=True))
    for first in (1, 3, 5):
        assert all(torch.equal(*pair) for pair in zip(whole[first:], batches(dataset, first), strict=True))


@pytest.mark.parametrize(("ranks", "order"), [(2, "uniform"), (3, "shards"), (8, "fixed")])
def test_ranks_have_the_batches_of_one(dataset: Path, ranks: int, order: str):
    """41 samples in batches of 8: the last of an epoch has one sample, and ranks without any."""
    options = {"batch_size": 8, "order": order, "crop_chunk": 3}
    with Loader(dataset, **options) as loader:  # type: ignore[arg-type]
        whole = list(islice(loader, 13))
    parts = []
    for rank in range(ranks):
        with Loader(dataset, rank=rank, ranks=ranks, **options) as loader:  # type: ignore[arg-type]
            parts.append(list(islice(loader, 13)))
    for one, *theirs in zip(whole, *parts, strict=True):
        assert torch.equal(one.images, torch.cat([each.images for each in theirs]))
        assert torch.equal(one.labels, torch.cat([each.labels for each in theirs]))
        assert np.concatenate([each.ids for each in theirs]).tolist() == one.ids.tolist()
        assert [each.place for each in theirs] == np.cumsum([0, *(len(each.ids) for each in theirs[:-1])]).tolist()
        assert {each.whole for each in theirs} == {len(one.ids)}
        assert {each.step for each in theirs} == {one.step}


def test_more_ranks_than_samples(dataset: Path):
    found = []
    for rank in range(4):
        with Loader(dataset, batch_size=3, rank=rank, ranks=4) as loader:
            found.append([(batch.place, len(batch.images), len(batch.labels)) for batch in islice(loader, 15)])
    assert [each[0] for each in found] == [(0, 1, 1), (1, 1, 1), (2, 1, 1), (3, 0, 0)]
    assert [each[13] for each in found] == [(0, 1, 1), (1, 1, 1), (2, 0, 0), (2, 0, 0)]


@pytest.mark.parametrize("steps", [0, 4])
def test_a_state_goes_on_where_it_was_taken(dataset: Path, steps: int):
    """In the same loader, in a new one, and with another number of ranks."""
    with Loader(dataset, batch_size=8) as loader:
        before = list(islice(loader, steps))
        state = loader.state_dict()
        after = [batch.images.clone() for batch in islice(loader, 4)]
        loader.load_state_dict(state)
        again = list(islice(loader, 4))
    assert len(before) == steps
    assert [batch.step for batch in again] == list(range(steps, steps + 4))
    assert all(torch.equal(batch.images, images) for batch, images in zip(again, after))
    parts = []
    for rank in range(3):
        with Loader(dataset, batch_size=8, rank=rank, ranks=3, threads=1) as loader:
            loader.load_state_dict(state)
            parts.append([batch.images.clone() for batch in islice(loader, 4)])
    assert all(torch.equal(images, torch.cat(each)) for images, *each in zip(after, *parts))


def test_a_state_of_another_loader_is_refused(dataset: Path):
    with Loader(dataset, batch_size=8) as loader:
        state = loader.state_dict()
    for options, words in (
        ({"seed": 5}, "seed: 2012 there, 5 here"),
        ({"batch_size": 9}, "batch_size: 8 there, 9 here"),
        ({"order": "shards"}, "order: 'uniform' there, 'shards' here; window: None there"),
        ({"mean": "colour"}, "mean: 'centre' there, 'colour' here"),
        ({"view": 200}, "view: 224 there, 200 here"),
        ({"recipe": "imagenet"}, "recipe: 'alexnet' there, 'imagenet' here"),
    ):
        with Loader(dataset, **{"batch_size": 8, **options}) as loader:  # type: ignore[arg-type]
            with pytest.raises(UserError, match=words):
                loader.load_state_dict(state)
            assert len(next(loader).ids) == loader.order.batch_size  # and goes on as it was
    with Loader(dataset, batch_size=8) as loader:
        with pytest.raises(UserError, match="dataset: '0f"):
            loader.load_state_dict(state | {"dataset": "0f"})
        for step in (None, -1, True, "3"):
            with pytest.raises(UserError, match=f"of another loader .step {step!r}"):
                loader.load_state_dict(state | {"step": step})
        assert next(loader).step == 0
