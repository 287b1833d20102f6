"""Batches of a data set in an object store: those of the local one, through a bounded cache, while the store fails."""

from contextlib import suppress
from itertools import islice
from pathlib import Path

import pytest
import torch

from conftest import build
from pipeline import UserError, manifest, storage
from pipeline.online import Loader
from pipeline.storage import read_ahead
from s3 import Store, empty_bucket, running_server  # noqa: F401 – two are fixtures

pytestmark = pytest.mark.proof

OPTIONS = {"batch_size": 8, "window": 8, "seed": 5}


@pytest.fixture(scope="module")
def built(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven shards of four training images."""
    root = tmp_path_factory.mktemp("remote") / "dataset"
    assert build(raw, root, "--samples-per-shard", 4, "--workers", 1).exit_code == 0
    return root


@pytest.fixture
def url(built: Path, s3: Store) -> str:
    """The data set in the store."""
    names = [path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()]
    root = storage.location(f"{s3.url}/data")
    for _ in read_ahead(names, lambda name: storage.put_if_absent(root / name, (built / name).read_bytes())):
        pass
    return f"{s3.url}/data"


def on_disk(folder: Path) -> int:
    """Bytes of the shards there, while others come and go."""
    found = 0
    for path in folder.rglob("train-*"):
        with suppress(FileNotFoundError):
            found += path.stat().st_size
    return found


@pytest.mark.parametrize("order", ["uniform", "shards", "fixed"])
def test_batches_are_those_of_the_local_data(built: Path, url: str, s3: Store, tmp_path: Path, order: str):
    """Two epochs and a bit; a third of the store's answers fail; the cache holds half of the shards where it may."""
    largest = max(shard.bytes for shard in manifest.load(built).split("train").shards)
    limit = {"uniform": 11, "shards": 8, "fixed": 3}[order] * largest  # 8: two windows of four shards
    with Loader(built, order=order, **OPTIONS) as loader:
        whole = list(islice(loader, 14))
    s3.faults(0.3, seed=7)
    cache = tmp_path / "cache"
    with Loader(url, order=order, cache=cache, cache_bytes=limit, **OPTIONS) as loader:
        for one, other in zip(whole, islice(loader, 14), strict=True):
            assert torch.equal(one.images, other.images)
            assert one.ids.tolist() == other.ids.tolist()
            assert on_disk(cache) <= limit
    s3.faults(0)
    assert not list(cache.rglob("*.part"))


def test_evaluation_from_a_store(built: Path, url: str, tmp_path: Path):
    with Loader(built, "val", views="centre", batch_size=4) as loader:
        whole = torch.cat([batch.images for batch in loader])
    with Loader(url, "val", views="centre", batch_size=4, cache=tmp_path / "cache") as loader:
        assert torch.equal(whole, torch.cat([batch.images for batch in loader]))


def test_what_a_remote_loader_needs(built: Path, url: str, tmp_path: Path):
    with pytest.raises(UserError, match=r"is remote; name a folder on this machine for its shards: cache=FOLDER"):
        Loader(url)
    for order, what in (("uniform", "all shards"), ("shards", "two windows"), ("fixed", "two shards")):
        with pytest.raises(
            UserError, match=f"order='{order}' has {what} in use, [0-9,]+ bytes, and cache_bytes=100,000"
        ):
            Loader(url, cache=tmp_path / "cache", order=order, window=8, cache_bytes=100_000)
