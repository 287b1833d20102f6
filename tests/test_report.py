"""The page of `python -m trainer report`: whole in one file, and every picture, bar and number true to its source."""

import base64
import io
import json
import math
import shlex
import shutil
import tarfile
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from pipeline import manifest
from pipeline.manifest import BuildRecipe, Manifest
from pipeline.offline.build import build
from pipeline.offline.plan import make_plan
from pipeline.offline.sources import find_sources
from pipeline.online import Loader
from trainer import checkpoint as checkpoints
from trainer import figures, recipe
from trainer.__main__ import main
from trainer.checkpoint import Checkpoint
from trainer.model import AlexNet, shapes
from trainer.recipe import ModelRecipe, Recipe, TrainRecipe

CLASSES = ("\"quoted\" & 'co'", "<b>bold", "<script>alert(1)<")  # sorted; each is markup where it is not escaped
RECIPE = Recipe(ModelRecipe(maps=(4, 4, 4, 4, 4), units=(8, 8)), train=TrainRecipe(batch_size=8, steps=40, seed=7))
STEP = 40
TRAIN = [
    {"step": 20, "epoch": 4, "lr": 0.01, "loss": 1.25, "time": {"images_per_second": 100.0, "stall": 0.25}},
    {"step": 30, "epoch": 7, "lr": 0.01, "loss": 1.125, "time": {"images_per_second": 321.0, "stall": 0.125}},
    {"step": 40, "epoch": 9, "lr": 0.01, "loss": 0.75, "time": {"images_per_second": 400.0, "stall": 0.0}},
]
VALIDATION = {"step": 40, "epoch": 9, "samples": 9, "top1_error": 62.5, "top5_error": 12.25, "nll": 1.0625}
CENTRE = {"samples": 9, "top1_error": 61.24, "top5_error": 13.37, "nll": 1.5151}
TEN = {"samples": 9, "top1_error": 59.91, "top5_error": 11.13, "nll": 1.4142}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""
    inside: list["Element"] = field(default_factory=list)

    def all(self, tag: str, style: str | None = None) -> list["Element"]:
        """The descendants with this tag and, where given, this class, in document order."""
        found = []
        for child in self.inside:
            if child.tag == tag and style in (None, child.attributes.get("class")):
                found.append(child)
            found += child.all(tag, style)
        return found

    def words(self) -> str:
        """The text of a leaf."""
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
        (found,) = (section for section in self.root.all("section") if section.attributes["id"] == name)
        return found

    def everything(self) -> list[Element]:
        def below(element: Element) -> list[Element]:
            return [element, *(deeper for child in element.inside for deeper in below(child))]

        return below(self.root)


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
    checkpoints.save(run, Checkpoint(STEP, RECIPE, classes, dataset.identity, weights, velocity))
    lines = [{"kind": "train", **line} for line in TRAIN] + [{"kind": "validation", **VALIDATION}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation = {"step": STEP, "split": "val", "dataset": dataset.identity, "centre": CENTRE, "ten": TEN}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    return weights


def invoke(data: Path, run: Path) -> Result:
    return CliRunner().invoke(
        main, ["report", "--data", str(data), "--checkpoint", str(run), "--devices", "cpu,cpu"], prog_name="trainer"
    )


def read_page(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("report")
    draw(folder / "raw", 12)
    data, run = folder / "pictures", folder / "run 1"
    dataset = build_dataset(folder / "raw", data, 0.25)
    weights = save_run(run, dataset)
    result = invoke(data, run)
    assert result.exit_code == 0, result.output
    return Written(data, run, dataset, weights, result.output, read_page(run))


def source(image: Element) -> bytes:
    head, _, data = image.attributes["src"].partition(";base64,")
    assert head in ("data:image/png", "data:image/jpeg")
    return base64.b64decode(data, validate=True)


def pixels(image: Element) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(source(image))))


def stored(data: Path, split: str) -> list[bytes]:
    """Every JPEG of a split in the order of the ids, read with nothing of ours."""
    found = []
    for shard in sorted((data / split).glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                found += [file.read()] if member.name.endswith(".jpg") else []
    return found


# The page as a whole


def test_the_command_names_the_page(written: Written) -> None:
    assert written.output == f"{written.run / 'report.html'}\n"


def test_nothing_is_fetched(written: Written) -> None:
    for element in written.page.everything():
        assert element.tag not in ("link", "iframe", "object", "embed", "base", "audio", "video", "source")
        for name, value in element.attributes.items():
            assert not name.startswith("on"), f"inline handler {name}"
            if name in ("src", "href", "srcset", "action", "data"):
                assert value.startswith("data:" if element.tag == "img" else "#"), value[:80]
            if name == "style":
                assert "url(" not in value
    scripts = written.page.root.all("script")
    assert scripts
    assert all("src" not in script.attributes for script in scripts)
    (style,) = written.page.root.all("head")[0].all("style")
    assert "url(" not in style.text
    assert "@import" not in style.text
    (policy,) = (meta for meta in written.page.root.all("meta") if "http-equiv" in meta.attributes)
    assert policy.attributes["content"].startswith("default-src 'none'; img-src data:;")


def test_plotly_is_there_once(written: Written) -> None:
    assert sum("* plotly.js v" in script.text for script in written.page.root.all("script")) == 1


def test_every_picture_has_a_text_and_a_size(written: Written) -> None:
    images = written.page.root.all("img")
    assert len(images) == 1 + 2 * 16 + 2 + min(8, written.dataset.splits["val"].samples)
    for image in images:
        assert image.attributes["alt"].strip()
        height, width = pixels(image).shape[:2]
        assert (image.attributes["width"], image.attributes["height"]) == (str(width), str(height))


def test_headings_are_in_order(written: Written) -> None:
    levels = [int(element.tag[1]) for element in written.page.everything() if element.tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_links_lead_to_sections(written: Written) -> None:
    links = [link.attributes["href"].removeprefix("#") for link in written.page.root.all("a")]
    assert links == [section.attributes["id"] for section in written.page.root.all("section")]


def test_class_words_never_become_markup(written: Written) -> None:
    html = (written.run / "report.html").read_text(encoding="utf-8")
    assert not any(name in html for name in CLASSES)
    captions = {caption.words() for caption in written.page.section("training-samples").all("figcaption")}
    assert captions == set(CLASSES)
    alts = [image.attributes["alt"] for image in written.page.section("training-samples").all("img")]
    assert all(any(f", {name}, as " in alt for name in CLASSES) for alt in alts)
    bars = written.page.section("validation-images").all("span", "word")
    assert {bar.words().removeprefix("✓ ").removesuffix(" (the true label)") for bar in bars} == set(CLASSES)


# The sections


def test_result(written: Written) -> None:
    result = written.page.section("result")
    rows = [[cell.words() for cell in row.inside] for row in result.all("tbody")[0].all("tr")]
    assert rows == [
        ["centre view", "61.2 %", "13.4 %", "1.515"],
        ["ten views", "59.9 %", "11.1 %", "1.414"],
    ]
    facts = {name.words(): text.words() for name, text in zip(result.all("dt"), result.all("dd"))}
    train, val = (written.dataset.splits[split].samples for split in ("train", "val"))
    assert facts["Data set"] == (
        f"pictures: {train} train, {val} val samples, 3 classes, identity {written.dataset.identity[:12]}"
    )
    assert facts["Network"].startswith("4 · 4 · 4 · 4 · 4 maps (conv1 to conv5), 8 · 8 units")
    assert facts["Training"] == "40 of 40 steps of 8 images, seed 7"
    assert facts["Speed"].startswith("321 images/s, stall 12.5 %")  # medians, not means


def test_mean_and_colours(written: Written) -> None:
    section = written.page.section("mean-image-and-colours")
    (image,) = section.all("img")
    assert source(image) == (written.data / "mean.png").read_bytes()
    covariance = written.dataset.statistics().covariance
    deviations = np.sqrt(np.linalg.eigvalsh(covariance))[::-1]
    shown = [row.inside[1].words() for row in section.all("tbody")[0].all("tr")]
    assert shown == [f"{deviation:.1f}" for deviation in deviations]


def test_training_samples_are_the_stored_bytes_and_the_loaders_tensors(written: Written) -> None:
    with Loader(written.data, "train", batch_size=16, seed=RECIPE.train.seed, device="cpu") as loader:
        batch = next(loader)
    section, jpegs = written.page.section("training-samples"), stored(written.data, "train")
    above, beneath = section.all("img", "stored"), section.all("img", "seen")
    assert [source(image) for image in above] == [jpegs[i] for i in batch.ids]
    assert len(above) == len(beneath) == 16
    for image, x, label, figure in zip(beneath, batch.images.numpy(), batch.labels, section.all("figure")):
        levels = np.clip(np.rint(x + 128), 0, 255).transpose(1, 2, 0)
        assert np.array_equal(pixels(image), levels)
        assert figure.all("figcaption")[0].words() == CLASSES[int(label)]


def test_curves_are_the_recorded_numbers(written: Written) -> None:
    def drawn(name: str) -> list[tuple[str, list[float], list[float]]]:
        (script,) = (s.text for s in written.page.root.all("script") if f'getElementById("{name}")' in s.text)
        traces, _ = json.JSONDecoder().raw_decode(script, script.index("[", script.index("Plotly.newPlot(")))
        return [(trace["name"], trace["x"], trace["y"]) for trace in traces]

    assert drawn("losses") == [("training", [20, 30, 40], [1.25, 1.125, 0.75]), ("validation", [40], [1.0625])]
    assert drawn("errors") == [("top-1", [40], [62.5]), ("top-5", [40], [12.25])]


def test_kernels_of_each_column(written: Written) -> None:
    grids = written.page.section("first-layer-kernels").all("img", "pixelated")
    for image, kernels in zip(grids, written.weights["conv1.weight"].split(2)):
        low, high = kernels.min(), kernels.max()
        expected = ((kernels - low) / (high - low) * 255).round().permute(0, 2, 3, 1).numpy()
        grid = pixels(image)
        assert grid.shape == (46, 91, 3)  # two kernels of 44 × 44 in a row, and borders
        for i, kernel in enumerate(expected):
            tile = grid[1:45, 1 + 45 * i : 45 + 45 * i]
            for dy, dx in ((0, 0), (3, 3)):  # nearest neighbour: the corners of each 4 × 4 block
                assert np.abs(tile[dy::4, dx::4] - kernel).max() <= 1
        assert (grid[:, [0, 45, 90]] == 255).all()
        assert (grid[[0, 45]] == 255).all()


def test_bars_are_the_networks_probabilities(written: Written) -> None:
    network = AlexNet(RECIPE.model, len(CLASSES))
    network.load(written.weights)
    with Loader(written.data, "val", batch_size=64, views="centre", device="cpu") as loader, torch.inference_mode():
        batch = next(loader)
        chances = network(batch.images).double().softmax(1).numpy()
    assert np.ptp(chances, axis=1).min() > 0.01, "no test: all classes are equally probable"
    jpegs, ids = stored(written.data, "val"), []
    for figure in written.page.section("validation-images").all("figure"):
        ids.append(jpegs.index(source(figure.all("img")[0])))
        row, label = chances[ids[-1]], int(batch.labels[ids[-1]])
        for bar, expected in zip(figure.all("li"), np.argsort(-row), strict=True):
            is_true = expected == label
            assert bar.all("span", "word")[0].words() == (
                f"✓ {CLASSES[expected]} (the true label)" if is_true else CLASSES[expected]
            )
            assert len(bar.all("b")) == is_true
            assert float(bar.all("span", "chance")[0].words().removesuffix(" %")) == pytest.approx(
                100 * row[expected], abs=0.06
            )
            width = bar.all("span", "bar")[0].attributes["style"].removeprefix("width: ").removesuffix("%")
            assert float(width) == pytest.approx(100 * row[expected], abs=0.01)
    assert ids == sorted(set(ids))
    assert len(ids) == min(8, len(jpegs))


def test_at_most_five_bars_and_a_true_label_beyond_them() -> None:
    chances = np.array([0.01, 0.3, 0.04, 0.25, 0.2, 0.05, 0.15])
    page = Page(figures.prediction("Sample", figures.png(np.zeros((2, 2, 3), np.uint8)), chances, "abcdefg", 2))
    assert [bar.words() for bar in page.root.all("span", "word")] == ["b", "d", "e", "g", "f"]
    assert page.root.all("figcaption")[0].words() == "True label: c (not among these)"
    assert not page.root.all("li", "true")


def test_commands_give_the_recipe(written: Written) -> None:
    (text,) = (pre.text for pre in written.page.root.all("footer")[0].all("pre"))
    commands = [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]
    assert commands[0] == [
        *("python", "tools/build_shards.py", "RAW", str(written.data)),
        *("--samples-per-shard", "10", "--holdout", "0.25"),
    ]
    train = commands[1]
    assert train[train.index("--out") + 1] == str(written.run)
    settings = [train[i + 1] for i, word in enumerate(train) if word == "--set"]
    assert recipe.load(train[train.index("--recipe") + 1], settings) == RECIPE
    assert [command[3] for command in commands[1:]] == ["train", "evaluate", "report"]


# What may be missing


def test_not_evaluated_yet(written: Written, tmp_path: Path) -> None:
    run = shutil.copytree(written.run, tmp_path / "run")
    (run / "evaluation.json").unlink()
    (run / "metrics.jsonl").unlink()
    assert invoke(written.data, run).exit_code == 0
    page = read_page(run)
    assert f"python -m trainer evaluate --data {written.data} --checkpoint {run}" in page.section("result").text
    assert "not recorded" in page.section("result").text
    assert "No steps are recorded" in page.section("curves").text


def test_no_validation_split_and_few_training_samples(tmp_path: Path) -> None:
    draw(tmp_path / "raw", 3)
    dataset = build_dataset(tmp_path / "raw", tmp_path / "data", 0.0)
    assert "val" not in dataset.splits
    save_run(tmp_path / "run", dataset)
    (tmp_path / "run" / "evaluation.json").unlink()
    result = invoke(tmp_path / "data", tmp_path / "run")
    assert result.exit_code == 0, result.output
    page = read_page(tmp_path / "run")
    for name in ("result", "curves", "validation-images"):
        assert "The data set has no validation images." in page.section(name).text
    assert len(page.root.all("img", "seen")) == len(page.root.all("img", "stored")) == dataset.splits["train"].samples


def test_old_evaluation_says_so(written: Written, tmp_path: Path) -> None:
    run = shutil.copytree(written.run, tmp_path / "run")
    evaluation = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(evaluation | {"step": 30}))
    assert invoke(written.data, run).exit_code == 0
    assert "out of date" in read_page(run).section("result").all("caption")[0].text


def fails_in_one_line(data: Path, run: Path) -> str:
    result = invoke(data, run)
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    return line


def test_mistakes_are_one_line(written: Written, tmp_path: Path) -> None:
    assert "no checkpoint" in fails_in_one_line(written.data, tmp_path)
    (file,) = (written.run / "checkpoints").iterdir()
    assert "not a directory" in fails_in_one_line(written.data, file)
    run = shutil.copytree(written.run, tmp_path / "run")
    (run / "report.html").unlink()
    for damaged in ("{", "{}", '{"step": 1, "split": "val", "dataset": "", "centre": {}, "ten": 3}'):
        (run / "evaluation.json").write_text(damaged)
        assert "evaluation.json: damaged" in fails_in_one_line(written.data, run)
    other = replace(checkpoints.load(written.run), dataset="0" * 64)
    checkpoints.save(run, other)
    assert "trained on the data set 000000000000" in fails_in_one_line(written.data, run)
    assert not (run / "report.html").exists()
    assert manifest.load(written.data).identity == written.dataset.identity
