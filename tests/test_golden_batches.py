"""Ten batches of every option of the loader, as recorded before its modules moved: a refactor must reproduce them."""

import hashlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import build
from pipeline.online import Loader

# options, and the first 16 digits of the SHA-256 over steps, epochs, ids, labels and images of ten batches of five
GOLDEN: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, "7c45510a93210e2e"),
    "colour": ({"mean": "colour"}, "a9b2063227fa0904"),
    "aligned": ({"mean": "aligned"}, "324d185c340e35e3"),
    "paper": ({"lighting": "paper", "positions": "paper"}, "10c8096909c38116"),
    "off": ({"lighting": "off"}, "1b29400d84d2cd98"),
    "until": ({"lighting_until": 5}, "aee509ca4d235923"),
    "no shrink": ({"shrink": False}, "47829deeb2a7ef24"),
    "chunk": ({"crop_chunk": 4}, "31a0d77f70b4067b"),
    "view": ({"view": 64}, "4306be58be429fba"),
    "uint8": ({"output": "uint8"}, "52168e1d9457a72b"),
    "bfloat16": ({"output": "bfloat16"}, "22a35fe32e5eb9f0"),
    "centre": ({"views": "centre"}, "296e574c46ce8b9f"),
    "ten": ({"views": "ten"}, "ed1c885dcbe76eba"),
    "ten aligned": ({"views": "ten", "mean": "aligned", "view": 128}, "2ad59d3f816d839f"),
    "nine": ({"views": "nine", "view": 128}, "20702f1ae64e983d"),
    "nine uint8": ({"views": "nine", "view": 128, "output": "uint8"}, "e9b7333facff4b24"),
    "fixed": ({"order": "fixed"}, "ec0b77a9d3bfaba3"),
    "shards": ({"order": "shards", "window": 8}, "fa2e8b645dc294c8"),
    "drop": ({"last": "drop"}, "bc6533887207862a"),
    "rank": ({"rank": 1, "ranks": 3}, "7d4d7d3e8d4bc316"),
    "two devices": ({"device": ("cpu", "cpu")}, "136d07ca2d751189"),
    "replicate": ({"device": ("cpu", "cpu"), "feed": "replicate"}, "136d07ca2d751189"),
    # recorded when libjpeg-turbo and Pillow took the place of DALI on the CPU: torchvision's resize, not DALI's
    "imagenet": ({"recipe": "imagenet"}, "db55d5195f3672f5"),
    "imagenet centre": ({"recipe": "imagenet", "views": "centre"}, "4913f83c286323ad"),
    "readers": ({"readers": 2, "threads": 2, "depth": 4}, "7c45510a93210e2e"),
}


@pytest.fixture(scope="module")
def drawn(official: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn") / "dataset"
    result = build(official, root, "--allow-incomplete", "--samples-per-shard", 16, "--workers", 1)
    assert result.exit_code == 0, result.output
    return root


@pytest.mark.parametrize("name", GOLDEN)
def test_batches(drawn: Path, name: str):
    options, digest = GOLDEN[name]
    content = hashlib.sha256()
    with Loader(drawn, batch_size=5, seed=3, **options) as loader:
        for batch in islice(loader, 10):
            content.update(np.array([batch.step, batch.epoch]).tobytes())
            content.update(batch.ids.tobytes() + batch.labels.numpy().tobytes())
            for images in batch.replicas:
                content.update(images.contiguous().view(torch.uint8).numpy().tobytes())
    assert content.hexdigest()[:16] == digest
