"""A data set and a run to evaluate; what `evaluate` finds of it, and what plain Pillow, numpy and float64 find."""

import io
import json
import tarfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import drawn as picture_of
from networks import drawn, narrow
from pipeline import manifest
from pipeline.manifest import BuildRecipe
from pipeline.offline.build import build
from pipeline.offline.plan import make_plan
from pipeline.offline.sources import find_sources
from runs import trainer
from trainer import checkpoint as checkpoints
from trainer.checkpoint import Checkpoint
from trainer.model import Grouped

SIZE, VIEW = 112, 100
CLASSES = ("[bold]ant", "[red]bee", "cow", "dog", "eel", "fox", "gnu")  # a terminal's markup, where it is not escaped
VAL = (6, 5, 5, 5, 5, 5, 0)  # images of each; batches of 15 leave one
RECIPE = narrow("original", size=VIEW)
STEP = 40
FLOAT32 = 1e-5  # between it and float64, in a probability, and in nats
HIGH = SIZE - VIEW
MIDDLE = HIGH // 2
CORNERS = [(0, 0), (0, HIGH), (MIDDLE, MIDDLE), (HIGH, 0), (HIGH, HIGH)]
PLACES = {  # views → top, left, and the step along a row
    "centre": [(MIDDLE, MIDDLE, 1)],
    "ten": [(*corner, step) for step in (1, -1) for corner in CORNERS],
    "nine": [(*corner, 1) for corner in product((0, MIDDLE, HIGH), repeat=2)],
}


@dataclass
class Made:
    data: Path
    run: Path

    @property
    def options(self) -> tuple[object, ...]:
        return "--data", self.data, "--checkpoint", self.run, "--devices", "cpu,cpu"


def draw(raw: Path) -> None:
    """Three training pictures of each class, VAL, and five of no class; the patterns are of no use."""
    for label, name in enumerate(CLASSES):
        kind = ("blobs", "checks", "stripes")[label % 3]
        for split, count in (("train", 3), ("val", VAL[label])):
            (raw / split / name).mkdir(parents=True)
            for i in range(count):
                picture_of(kind, f"{split}{name}{i}", 150, 130).save(raw / split / name / f"{i}.png")
    (raw / "test").mkdir()
    for i in range(5):
        picture_of("blobs", f"test{i}", 130, 140).save(raw / "test" / f"{i}.png")


def make(folder: Path) -> Made:
    draw(folder / "raw")
    rules = BuildRecipe(size=SIZE, samples_per_shard=10)
    build(make_plan(find_sources(folder / "raw"), rules), folder / "data", workers=1)
    save_run(folder / "run", folder / "data", weights(folder / "data"))
    return Made(folder / "data", folder / "run")


def weights(data: Path) -> dict[str, torch.Tensor]:
    """Random; but for the last layer, which makes no class likelier than the others, and nothing certain."""
    found = drawn(RECIPE.model, len(CLASSES), torch.float32)
    found["fc8.bias"].zero_()
    raw = logits(found, views_of(data, "val", "centre")[0])
    scale = 1.5 / float((raw - raw.mean(0)).std())
    found["fc8.weight"] *= scale
    found["fc8.bias"] -= torch.from_numpy(scale * raw.mean(0))
    return found


def save_run(run: Path, data: Path, values: dict[str, torch.Tensor], classes: tuple[str, ...] = CLASSES) -> None:
    dataset = manifest.load(data)
    velocity = {name: torch.zeros_like(value) for name, value in values.items()}
    checkpoints.save(run, Checkpoint(STEP, RECIPE, classes, dataset.identity, values, velocity, {}, {}, ()))


def stored(data: Path, split: str) -> tuple[np.ndarray, list[int | None]]:
    """(n, SIZE, SIZE, 3) uint8 and the labels, as tarfile and Pillow find them in the shards, in their order."""
    pictures, labels = [], {}
    for shard in sorted((data / split).glob("*.tar")):
        with tarfile.open(shard) as tar:
            for info in tar:
                key, _, kind = info.name.rpartition(".")
                content = tar.extractfile(info).read()  # type: ignore[union-attr]
                if kind == "jpg":
                    pictures.append(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
                    labels[key] = None
                else:
                    labels[key] = int(content)
    return np.stack(pictures), list(labels.values())


def views_of(data: Path, split: str, views: str) -> list[np.ndarray]:
    """Of each view (n, 3, VIEW, VIEW) float64: the window less the centre of the mean image."""
    pictures, _ = stored(data, split)
    with np.load(data / "statistics.npz", allow_pickle=False) as statistics:
        mean = statistics["mean_image"][MIDDLE : MIDDLE + VIEW, MIDDLE : MIDDLE + VIEW]
    found = []
    for top, left, step in PLACES[views]:
        seen = pictures[:, top : top + VIEW, left : left + VIEW][:, :, ::step] - mean
        found.append(np.ascontiguousarray(seen.transpose(0, 3, 1, 2)))
    return found


def logits(values: dict[str, torch.Tensor], images: np.ndarray) -> np.ndarray:
    network = Grouped(RECIPE.model, len(CLASSES))
    network.load(values)
    with torch.no_grad():
        return network.double()(torch.from_numpy(images)).numpy()


def known(made: Made, split: str, views: str) -> np.ndarray:
    """(n, classes): the mean over the views of the softmax of the grouped network in float64."""
    saved = load_file(made.run / f"checkpoints/step-{STEP:08d}.safetensors")
    values = {name.removeprefix("weights."): value for name, value in saved.items() if name.startswith("weights.")}
    found = []
    for images in views_of(made.data, split, views):
        each = logits(values, images)
        odds = np.exp(each - each.max(1, keepdims=True))
        found.append(odds / odds.sum(1, keepdims=True))
    return np.mean(found, 0)


def errors(labels: np.ndarray, chances: np.ndarray) -> dict[str, float]:
    """In percent, and nats; of probabilities no two of which are level."""
    places = np.argsort(np.argsort(-chances, axis=1), axis=1)[np.arange(len(labels)), labels]
    true = chances[np.arange(len(labels)), labels]
    top1, top5 = (100 * float(np.mean(places >= k)) for k in (1, 5))
    return {"samples": len(labels), "top1_error": top1, "top5_error": top5, "nll": float(-np.log(true).mean())}


def evaluate(made: Made, *options: object) -> dict[str, Any]:
    """What --json says."""
    result = trainer("evaluate", *made.options, "--json", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def saved(file: Path) -> np.ndarray:
    """(n, classes) float64, as numpy reads them."""
    with np.load(file, allow_pickle=False) as arrays:
        return arrays["probabilities"]


def equal(found: dict[str, Any], wanted: dict[str, Any], nats: float = 1e-6) -> None:
    """The same images, and errors to the last digits."""
    assert found.keys() == wanted.keys() == {"samples", "top1_error", "top5_error", "nll"}
    assert found["samples"] == wanted["samples"]
    for name, most in (("top1_error", 1e-10), ("top5_error", 1e-10), ("nll", nats)):
        assert found[name] == pytest.approx(wanted[name], abs=most), name


def spoil(data: Path, sample: int) -> None:
    """Change a byte of a stored validation picture."""
    record = np.load(data / "val" / "samples.npy")[sample]
    shard = data / "val" / f"val-{record['shard']:06d}.tar"
    content = bytearray(shard.read_bytes())
    content[int(record["offset"]) + int(record["size"]) // 2] ^= 255
    shard.write_bytes(content)
