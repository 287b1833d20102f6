"""Pictures of odd kinds, a data set and a run of them; what commands say of it, and what Pillow and numpy compute.

A test that wants the fixture `made` imports `shared_made`.
"""

import io
import json
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import drawn as picture_of
from conftest import saved as encoded
from networks import drawn, narrow
from pipeline import manifest
from pipeline.manifest import BuildRecipe
from pipeline.offline.build import build
from pipeline.offline.plan import make_plan
from pipeline.offline.sources import find_sources
from reference import view_places
from runs import beginning, trainer
from trainer import checkpoint as checkpoints
from trainer.checkpoint import Checkpoint
from trainer.model import Grouped

SIZE, VIEW = 112, 100
CLASSES = ("[bold]ant", "[red]bee", "cow", "dog", "eel", "fox", "gnu")  # a terminal's markup, where it is not escaped
VAL = (6, 5, 5, 5, 5, 5, 0)  # images of each; batches of 15 leave one
KINDS = "JPEG PNG GIF CMYK L WEBP progressive TIFF turned BMP".split()  # of validation pictures, in turn
ENDINGS = {"L": "png", "CMYK": "jpg", "turned": "jpg", "progressive": "JPG"}
SIDES = [(150, 130), (112, 112), (40, 30), (300, 90), (90, 301), (113, 111), (600, 31)]  # in turn; one as stored
RECIPE = narrow("original", size=VIEW)
STEP = 40
FLOAT32 = 1e-5  # between it and float64, in a probability, and in nats
MIDDLE = (SIZE - VIEW) // 2
PLACES = view_places(SIZE - VIEW)


@dataclass(frozen=True)
class Made:
    data: Path
    run: Path
    raw: Path  # raw/val/CLASS/KEY.ENDING

    @property
    def options(self) -> tuple[object, ...]:
        return "--data", self.data, "--checkpoint", self.run, "--devices", "cpu,cpu"


@pytest.fixture(scope="session", name="made")
def shared_made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Read only."""
    return make(tmp_path_factory.mktemp("evaluated"))


def make(folder: Path) -> Made:
    """Three training pictures of each class, VAL, and five of no class; the patterns are of no use."""
    raw, data = folder / "raw", folder / "data"
    for label, name in enumerate(CLASSES):
        pattern = ("blobs", "checks", "stripes")[label % 3]
        for split, count in (("train", 3), ("val", VAL[label])):
            (raw / split / name).mkdir(parents=True)
            for i in range(count):
                n = sum(VAL[:label]) + i
                sides, kind = (SIDES[n % 7], KINDS[n % 10]) if split == "val" else ((150, 130), "PNG")
                image, ending = picture_of(pattern, f"{split}{name}{i}", *sides), ENDINGS.get(kind, kind.lower())
                (raw / split / name / f"{split}{label}{i}.{ending}").write_bytes(encode(image, kind))
    (raw / "test").mkdir()
    for i in range(5):
        picture_of("blobs", f"test{i}", 130, 140).save(raw / "test" / f"{i}.png")
    rules = BuildRecipe(size=SIZE, samples_per_shard=10)
    build(make_plan(find_sources(raw), rules), data, workers=1)
    save_run(folder / "run", data, weights(data))
    return Made(data, folder / "run", raw)


def encode(image: Image.Image, kind: str) -> bytes:
    if kind in ("CMYK", "L"):
        return encoded(image.convert(kind), "JPEG" if kind == "CMYK" else "PNG")
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        return encoded(image, "JPEG", exif=exif)
    if kind == "progressive":
        return encoded(image, "JPEG", progressive=True)
    return encoded(image, kind, quality=95) if kind == "JPEG" else encoded(image, kind)  # 95: as the builder


def weights(data: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random; but for the last layer, which makes no class likelier than the others, and nothing certain."""
    found = drawn(RECIPE.model, len(CLASSES), torch.float32)
    found["fc8.weight"] = found["fc8.weight"].roll(seed, 1)
    found["fc8.bias"].zero_()
    raw = logits(found, views_of(data, "val", "centre")[0])
    scale = 1.5 / float((raw - raw.mean(0)).std())
    found["fc8.weight"] *= scale
    found["fc8.bias"] -= torch.from_numpy(scale * raw.mean(0))
    return found


def save_run(run: Path, data: Path, values: dict[str, torch.Tensor], classes: tuple[str, ...] = CLASSES) -> None:
    dataset = manifest.load(data)
    velocity = {name: torch.zeros_like(value) for name, value in values.items()}
    checkpoints.save(run, Checkpoint(STEP, RECIPE, classes, dataset.identity, values, velocity, *beginning(STEP)))


def stored(data: Path, split: str) -> tuple[np.ndarray, list[int | None], list[str]]:
    """(n, SIZE, SIZE, 3) uint8, labels and keys, as tarfile and Pillow find them in the shards, in their order."""
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
    return np.stack(pictures), list(labels.values()), list(labels)


def views_of(data: Path, split: str, views: str) -> list[np.ndarray]:
    """Of each view (n, 3, VIEW, VIEW) float64: the window less the centre of the mean image."""
    pictures = stored(data, split)[0]
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


@cache
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


def errors(labels: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """In percent, and nats: of one image at most 708, no logarithm of 0.

    An image is wrong by the share of the true class's ranks, were level ones put in any order, past the first k.
    """
    true = values[np.arange(len(labels)), labels][:, None]
    ranks = (values > true).sum(1)[:, None] + np.arange(values.shape[1])
    level = np.arange(values.shape[1]) < (values == true).sum(1)[:, None]
    top1, top5 = (100 * float(np.mean(((ranks >= k) & level).sum(1) / level.sum(1))) for k in (1, 5))
    nll = -float(np.log(np.maximum(true, np.finfo(np.float64).tiny)).mean())
    return {"samples": len(labels), "top1_error": top1, "top5_error": top5, "nll": nll}


def evaluate(made: Made, *options: object) -> dict[str, Any]:
    """What --json says at the end."""
    result = trainer("evaluate", *made.options, "--json", *options)
    assert result.exit_code == 0, result.output
    line = json.loads(result.output.splitlines()[-1])
    assert line.pop("event") == "done"
    return line


def equal(found: dict[str, Any], wanted: dict[str, Any], nats: float = 1e-6) -> None:
    """The same images, and errors to the last digits."""
    assert found.keys() == wanted.keys() == {"samples", "top1_error", "top5_error", "nll"}
    assert found["samples"] == wanted["samples"]
    for name, most in (("top1_error", 1e-10), ("top5_error", 1e-10), ("nll", nats)):
        assert found[name] == pytest.approx(wanted[name], abs=most), name
