"""Data sets and runs made here, and the page that `python -m trainer figures` writes of them, as a tree."""

import base64
import io
import json
import math
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
from click.testing import Result
from PIL import Image

from conftest import build as build_command
from conftest import picture
from pipeline.manifest import BuildRecipe, Manifest
from pipeline.offline.build import build
from pipeline.offline.plan import make_plan
from pipeline.offline.sources import find_sources
from runs import beginning, trainer
from trainer import checkpoint as checkpoints
from trainer import recipe as recipes
from trainer.checkpoint import Checkpoint
from trainer.layers import shapes

CLASSES = ("\"quoted\" & 'co'", "<b>bold", "<script>alert(1)<")  # sorted; each is markup where it is not escaped
WIDTHS = {"conv1": 4, "conv2": 4, "conv3": 4, "conv4": 4, "conv5": 4, "fc6": 8, "fc7": 8}
SETTINGS = [f"model.layers.{name}.width={width}" for name, width in WIDTHS.items()]
RECIPE = recipes.load("original", [*SETTINGS, "train.batch_size=8", "train.steps=40", "train.seed=7"])
STEP = 40
SPEEDS = ((20, 4, 1.25, 100.0, 0.25), (30, 7, 1.125, 321.0, 0.125), (40, 9, 0.75, 400.0, 0.0))
TRAIN = [
    {"step": step, "epoch": epoch, "lr": 0.01, "loss": loss, "time": {"images_per_second": speed, "stall": stall}}
    for step, epoch, loss, speed, stall in SPEEDS
]
RATIOS = {"conv1": (0.004, 0.002, 0.001), "fc8": (0.5, 0.0, 0.125)}  # by layer; fc8 stands still at step 30
VALIDATION = {"step": 40, "epoch": 9, "samples": 9, "top1_error": 62.5, "top5_error": 12.25, "nll": 1.0625}
CENTRE = {"samples": 9, "top1_error": 61.24, "top5_error": 13.37, "nll": 1.5151}
TEN = {"samples": 9, "top1_error": 59.91, "top5_error": 11.13, "nll": 1.4142}

NETWORK = """
[model]
size = 24
order = ["conv1", "fc2"]
layers.conv1 = { kind = "conv", width = 4, kernel = 5, stride = 3, then = ["relu"] }
layers.fc2 = { kind = "linear", sees = "both" }
"""
LINEAR = """
[model]
size = 24
columns = 1
order = ["fc2"]
layers.fc2 = { kind = "linear", sees = "both" }
"""


def short_run(folder: Path, counts: dict[str, int], *settings: str, network: str = NETWORK) -> list[object]:
    """Build a data set of so many pictures of SPLIT/CLASS; return the words that train a network of a few weights."""
    for name, count in counts.items():
        (folder / "raw" / name).mkdir(parents=True)
        for i in range(count):
            picture(f"{name}{i}", 40, 40).save(folder / "raw" / name / f"{name[-1]}{i}.png")
    assert build_command(folder / "raw", folder / "data", "--workers", 1, "--size", 32).exit_code == 0
    (folder / "recipe.toml").write_text(network)
    words = [word for setting in ("train.batch_size=2", *settings) for word in ("--set", setting)]
    words += ["--recipe", folder / "recipe.toml", "--devices", "cpu" if network == LINEAR else "cpu,cpu"]
    return ["train", "--data", folder / "data", "--out", folder / "run", *words]


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""
    inside: list["Element"] = field(default_factory=list)

    def all(self, tag: str = "", style: str = "") -> list["Element"]:
        """Return the descendants, perhaps those of a tag and a class, in document order."""
        elements = []
        for child in self.inside:
            if tag in ("", child.tag) and style in ("", child.attributes.get("class")):
                elements.append(child)
            elements += child.all(tag, style)
        return elements

    def words(self) -> str:
        """Return the text of a leaf."""
        return " ".join(self.text.split())


class Page(HTMLParser):
    """The page as a tree, by the standard library's parser; `text` of an element is that of its descendants, too."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(html)
        self.close()
        assert self.open == [self.root], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].inside.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def section(self, name: str) -> Element:
        (section,) = (section for section in self.root.all("section") if section.attributes["id"] == name)
        return section


@dataclass
class Written:
    data: Path
    run: Path
    dataset: Manifest
    weights: dict[str, torch.Tensor]
    output: str
    page: Page


def draw(raw: Path, pictures: int) -> None:
    """Noisy pictures in each class folder, no two alike."""
    generator = np.random.default_rng(5)
    for name in CLASSES:
        (raw / name).mkdir(parents=True)
        for i in range(pictures):
            coarse = generator.integers(0, 256, (6, 8, 3), np.uint8)
            Image.fromarray(coarse).resize((300, 260), Image.Resampling.BICUBIC).save(raw / name / f"{i:02}.png")


def build_dataset(raw: Path, data: Path, holdout: float) -> Manifest:
    return build(make_plan(find_sources(raw), BuildRecipe(holdout=holdout, samples_per_shard=10)), data, workers=1)


def save_run(run: Path, dataset: Manifest) -> dict[str, torch.Tensor]:
    """A run directory with random weights, wide enough apart for unequal probabilities, and its records."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, shape in shapes(RECIPE.model, len(CLASSES)).items():
        weights[name] = torch.randn(shape, generator=generator) * 1.5 / math.sqrt(math.prod(shape[1:]))
    velocity = {name: torch.zeros_like(value) for name, value in weights.items()}
    classes = tuple(record.wnid for record in dataset.classes)
    plain = beginning(STEP, RECIPE.train.steps)
    checkpoints.save(run, Checkpoint(STEP, RECIPE, classes, dataset.identity, weights, velocity, *plain))
    lines: list[dict] = [{"kind": "train", **line} for line in TRAIN]
    for i, line in enumerate(lines):
        line["layers"] = {name: {"ratio": ratios[i]} for name, ratios in RATIOS.items()}
    lines.append({"kind": "validation", **VALIDATION})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation = {"step": STEP, "split": "val", "dataset": dataset.identity, "centre": CENTRE, "ten": TEN}
    evaluation["confused"] = [{"true": 0, "predicted": 2, "images": 3, "share": 50.0}]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    return weights


def invoke(data: Path, run: Path, *more: str) -> Result:
    return trainer("figures", run, "--data", data, "--devices", "cpu,cpu", *more)


def read_page(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


def write(folder: Path) -> Written:
    draw(folder / "raw", 12)
    data, run = folder / "pictures", folder / "run 1"
    dataset = build_dataset(folder / "raw", data, 0.25)
    weights = save_run(run, dataset)
    result = invoke(data, run)
    assert result.exit_code == 0, result.output
    return Written(data, run, dataset, weights, result.output, read_page(run))


def sheet(page: Page, section: str) -> Element:
    """The picture of a section's sheet."""
    (image,) = page.section(section).all("img", "sheet")
    return image


def source(image: Element) -> bytes:
    head, _, data = image.attributes["src"].partition(";base64,")
    assert head in ("data:image/png", "data:image/jpeg")
    return base64.b64decode(data, validate=True)


def pixels(image: Element) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(source(image))))
