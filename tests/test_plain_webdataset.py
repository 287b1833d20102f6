"""pipeline.online.webdataset against the manifest and Pillow."""

import pickle
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import CLASSES, build, one_line, picture
from pipeline import UserError, manifest
from pipeline.online.plain import webdataset
from reference import jpeg_pixels
from stored import jpegs

Pairs = list[tuple[int, bytes]]  # label and pixels


def pairs(samples: Iterable[tuple[Image.Image, int]]) -> Pairs:
    return [(label, np.asarray(image).tobytes()) for image, label in samples]


def stored_pairs(root: Path, split: str) -> Pairs:
    labels = manifest.load(root).samples(split)["label"].tolist()
    found = [(label, jpeg_pixels(data).tobytes()) for label, data in zip(labels, jpegs(root, split), strict=True)]
    assert len(set(found)) == len(found)  # so that equal lists are equal keys
    return found


def as_it_is(sample: object) -> object:
    return sample


def worked(dataset: torch.utils.data.IterableDataset, workers: int) -> Pairs:
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=as_it_is)
    return pairs(loader)


@pytest.mark.filterwarnings("error::UserWarning")
def test_webdataset_gives_every_sample_in_the_order_of_the_build(dataset: Path):
    for split in ("train", "val"):
        first, label = next(iter(webdataset(str(dataset), split)))
        assert isinstance(first, Image.Image)
        assert (first.mode, first.size, type(label)) == ("RGB", (256, 256), int)
        assert pairs(webdataset(dataset, split)) == stored_pairs(dataset, split)
    keys = []
    for shard in (dataset / "train").glob("*.tar"):
        with tarfile.open(shard) as tar:
            keys += [name for name in tar.getnames() if name.endswith(".jpg")]
    assert len(set(keys)) == len(keys) == len(stored_pairs(dataset, "train"))


@pytest.mark.filterwarnings("error::UserWarning")
def test_webdataset_shuffles(dataset: Path):
    expected = stored_pairs(dataset, "train")
    shuffled = webdataset(dataset, "train", shuffle=20, seed=3)
    again, other = webdataset(dataset, "train", shuffle=20, seed=3), webdataset(dataset, "train", shuffle=20, seed=4)
    orders = [pairs(shuffled), pairs(shuffled), pairs(other), expected]  # two passes differ, and from other seeds'
    assert pairs(again) == orders[0]
    assert all(Counter(order) == Counter(expected) for order in orders)
    assert all(one != two for i, one in enumerate(orders) for two in orders[:i])


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("shuffle", [0, 20])
def test_webdataset_workers_share_the_shards(dataset: Path, shuffle: int):
    for split in ("train", "val"):  # three shards; one, so that a worker has none
        found = worked(webdataset(dataset, split, shuffle=shuffle), workers=2)
        assert Counter(found) == Counter(stored_pairs(dataset, split))


@pytest.mark.filterwarnings("error::UserWarning")
def test_webdataset_ranks_share_the_shards(dataset: Path, monkeypatch: pytest.MonkeyPatch):
    found: Pairs = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        part = pairs(pickle.loads(pickle.dumps(webdataset(dataset, "train"))))  # as a spawned worker gets it
        assert 0 < len(part) < 41
        found += part
    assert Counter(found) == Counter(stored_pairs(dataset, "train"))


def test_webdataset_without_labels_and_with_whole_pictures(tmp_path: Path):
    raw = tmp_path / "raw"
    for name in CLASSES[:2]:
        (raw / "train" / name).mkdir(parents=True)
        for i in range(2):
            picture(f"{name}{i}", 90 + 30 * i, 80).save(raw / "train" / name / f"{name}{i}.jpg")
    (raw / "test").mkdir()
    for i in range(3):
        picture(f"test{i}", 60, 80).save(raw / "test" / f"{i}.jpg")
    root = tmp_path / "dataset"
    result = build(raw, root, "--workers", 1, "--size", 32, "--crop", "none")
    assert result.exit_code == 0, result.output
    for split in ("train", "test"):
        assert pairs(webdataset(root, split)) == stored_pairs(root, split)
    assert {label for _, label in webdataset(root, "test")} == {-1}
    assert [image.size for image, _ in webdataset(root, "test")] == [(32, 42)] * 3


def test_impossible_webdatasets(small: Path, tmp_path: Path):
    with pytest.raises(UserError) as caught:
        webdataset("s3://bucket/dataset", "train")
    one_line(caught, "s3://bucket/dataset", "copy")
    with pytest.raises(UserError, match="no split named 'other'; there are: train, val"):
        webdataset(small, "other")
    with pytest.raises(UserError, match="no such directory"):
        webdataset(tmp_path / "nothing", "train")
    with pytest.raises(UserError, match="shuffle=-1: must be at least 0"):
        webdataset(small, "train", shuffle=-1)
    odd = tmp_path / "a#b"
    odd.symlink_to(small)
    assert next(iter(webdataset(odd, "val")))[0].size == (32, 32)  # the link is followed
    odd.unlink()
    odd.mkdir()
    for path in small.rglob("*"):
        target = odd / path.relative_to(small)
        if path.is_file():
            target.parent.mkdir(exist_ok=True)
            target.hardlink_to(path)
    with pytest.raises(UserError) as caught:
        webdataset(odd, "val")
    one_line(caught, "a#b/val/val-000000.tar", "rename")
