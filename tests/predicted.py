"""Raw pictures of odd kinds, a data set built of them, a run with random weights, and what it makes of them.

A test that wants the fixture `world` imports `shared_world`.
"""

import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image

from conftest import build, drawn, saved
from pipeline import manifest
from pipeline.manifest import Manifest
from pipeline.online import Loader
from pipeline.online.samples import SampleReader
from reported import RECIPE
from runs import trainer
from trainer import checkpoint as checkpoints
from trainer.checkpoint import Checkpoint
from trainer.layers import shapes
from trainer.parallel import TwoColumnNet

WNIDS = [f"n{number:08d}" for number in (11, 12, 25, 31, 47, 58, 63)]
WORDS = "great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias"  # as ImageNet has them
SIDES = [(40, 30), (256, 256), (256, 256), (700, 200), (201, 333), (257, 255), (300, 300), (512, 512), (640, 480),
         (256, 400), (255, 255), (400, 256), (600, 31), (300, 451)]  # fmt: skip
KINDS = "JPEG JPEG PNG PNG GIF CMYK L WEBP progressive JPEG TIFF turned BMP JPEG".split()


@dataclass
class World:
    raw: Path  # raw/val/CLASS/KEY.EXTENSION
    data: Path
    run: Path
    dataset: Manifest
    keys: list[str]  # of the validation split, by id
    inputs: dict[str, np.ndarray]  # by views: what the loader gives, by id
    chances: dict[str, np.ndarray]  # by views: (n, classes) float64, by id

    @property
    def files(self) -> dict[str, Path]:
        """The raw validation pictures by their keys."""
        return {path.stem: path for path in sorted((self.raw / "val").rglob("*.*"))}


@pytest.fixture(scope="session", name="world")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Read only."""
    return make(tmp_path_factory.mktemp("predict"))


def make(folder: Path) -> World:
    raw, data, run = folder / "raw", folder / "set", folder / "run"
    _draw(raw)
    result = build(raw, data, "--workers", 1, "--samples-per-shard", 5)
    assert result.exit_code == 0, result.output
    dataset = manifest.load(data)
    network = TwoColumnNet(RECIPE.model, len(WNIDS), (torch.device("cpu"),) * 2)
    network.load(save_run(run, dataset))
    ids, inputs, chances = np.arange(dataset.split("val").samples), {}, {}
    with SampleReader(dataset, "val") as reader:
        keys = [reader.key(number) for number in ids]
    for views in ("centre", "ten"):
        inputs[views], logits = _by_the_loader(dataset, network, views)
        odds = np.exp(logits - logits.max(-1, keepdims=True))
        chances[views] = (odds / odds.sum(-1, keepdims=True)).mean(1)
    return World(raw, data, run, dataset, keys, inputs, chances)


def _draw(raw: Path) -> None:
    for split, count in (("train", 2), ("val", 2)):
        for number, wnid in enumerate(WNIDS):
            (raw / split / wnid).mkdir(parents=True)
            for i in range(count):
                place = 2 * number + i
                kind = KINDS[place]
                image = drawn(("blobs", "checks", "stripes")[place % 3], f"{split}{place}", *SIDES[place])
                ending = {"L": "png", "CMYK": "jpg", "turned": "jpg", "progressive": "JPG"}.get(kind, kind.lower())
                name = f"{split}{place:02}.{ending}"
                (raw / split / wnid / name).write_bytes(_saved(image, kind))
    lines = [f"{wnid} {WORDS if i == 2 else f'thing {i}, Ding'}" for i, wnid in enumerate(WNIDS)]
    (raw / "LOC_synset_mapping.txt").write_text("\n".join(lines) + "\n")


def _saved(image: Image.Image, kind: str) -> bytes:
    if kind in ("CMYK", "L"):
        return saved(image.convert(kind), "JPEG" if kind == "CMYK" else "PNG")
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        return saved(image, "JPEG", exif=exif)
    if kind == "progressive":
        return saved(image, "JPEG", progressive=True)
    return saved(image, kind, quality=95) if kind == "JPEG" else saved(image, kind)  # 95: as the builder


def save_run(run: Path, dataset: Manifest, factor: float = 1.0) -> dict[str, torch.Tensor]:
    """A run directory with random weights, wide enough apart for unequal probabilities."""
    generator, weights = torch.Generator().manual_seed(3), {}
    for name, shape in shapes(RECIPE.model, len(WNIDS)).items():
        wide = 0.3 if name.startswith("fc8") else 1.5
        weights[name] = factor * wide * torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
    velocity = {name: torch.zeros_like(value) for name, value in weights.items()}
    classes = tuple(record.wnid for record in dataset.classes)
    checkpoints.save(run, Checkpoint(1, RECIPE, classes, dataset.identity, weights, velocity, {}, {}, ()))
    return weights


def _by_the_loader(dataset: Manifest, network: TwoColumnNet, views: str) -> tuple[np.ndarray, np.ndarray]:
    """The network's inputs, and its logits (n, views, classes) float64."""
    inputs, logits = [], []
    with Loader(dataset, "val", batch_size=4, views=views, mean=RECIPE.data.mean) as loader, torch.inference_mode():
        for batch in loader:
            several = batch.images if views == "ten" else batch.images[:, None]
            inputs.append(batch.images.numpy().copy())
            logits.append(torch.stack([network(each) for each in several.unbind(1)], 1).double().numpy())
    return np.concatenate(inputs), np.concatenate(logits)


def predict(world: World, *words: object, views: str = "centre", run: Path | None = None, text: bool = False) -> Result:
    form = () if text else ("--json",)
    more = ("--data", world.data, "--checkpoint", run or world.run, "--devices", "cpu,cpu", "--views", views)
    result = trainer("predict", *words, *more, *form)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def lines(result: Result) -> list[dict[str, object]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def failures(result: Result) -> dict[str, str]:
    """Name → code."""
    return {str(line["picture"]): str(line["error"]) for line in lines(result) if "error" in line}


def assert_predicted(world: World, result: Result, keys: list[str], views: str = "centre") -> None:
    """The lines are those of the validation pictures with these keys, in this order."""
    found = [line for line in lines(result) if "labels" in line]
    assert [str(line["picture"]).rpartition("/")[2].partition(".")[0] for line in found] == keys
    for line, key in zip(found, keys):
        chances = world.chances[views][world.keys.index(key)]
        order = np.argsort(-chances, kind="stable")[:5]
        assert np.diff(np.log(np.sort(chances))).min() > 1e-4  # else the order would be chance
        labels = line["labels"]
        assert [each["label"] for each in labels] == order.tolist()
        np.testing.assert_allclose([each["probability"] for each in labels], chances[order], rtol=0, atol=1e-6)
        records = [world.dataset.classes[label] for label in order]
        assert [(each["wnid"], each["words"]) for each in labels] == [(r.wnid, r.words) for r in records]


def members(tar: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and data of each member, by their headers alone."""
    at = 0
    while size := tar[at + 124 : at + 135].strip(b"\0 "):
        name, length = tar[at : at + 100].rstrip(b"\0").decode(), int(size, 8)
        yield name, tar[at + 512 : at + 512 + length]
        at += 512 + -(-length // 512) * 512


def picture_bytes(width: int = 60, height: int = 50) -> bytes:
    out = io.BytesIO()
    drawn("checks", "any", width, height).save(out, "JPEG")
    return out.getvalue()
