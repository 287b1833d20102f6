"""The sections of the page of `python -m trainer figures`: every picture and number is true to its source."""

import io
import json
import re
import shlex
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.online import Loader
from reported import CLASSES, RATIOS, RECIPE, Page, Written, pixels, sheet, source
from runs import trainer
from trainer import checkpoint as checkpoints
from trainer import recipe
from trainer.checkpoint import load_network
from trainer.figures import gather, sections
from trainer.figures.drawing import picture
from trainer.model import Grouped


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
    assert facts["Network"].startswith("conv1 4, conv2 4, conv3 4, conv4 4, conv5 4, fc6 8, fc7 8, fc8 3 maps or units")
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


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ("validation-images", "predictions"),
        ("similar-training-images", "neighbours"),
        ("first-layer-kernels", "kernels"),
        ("augmentation", "augmentation"),
    ],
)
def test_the_page_shows_the_sheets(section: str, name: str, written: Written) -> None:
    assert source(sheet(written.page, section)) == (written.run / "figures" / f"{name}.png").read_bytes()


def test_predictions_are_the_networks_probabilities_of_these_pictures(written: Written) -> None:
    network = Grouped(RECIPE.model, len(CLASSES))
    network.load(written.weights)
    with Loader(written.data, "val", batch_size=64, views="centre", device="cpu") as loader, torch.inference_mode():
        batch = next(loader)
        rows = network(batch.images).double().softmax(1).numpy()
    assert np.ptp(rows, axis=1).min() > 0.01, "no test: all classes are equally probable"
    image, jpegs = sheet(written.page, "validation-images"), stored(written.data, "val")
    alt, drawn = image.attributes["alt"], pixels(image)
    ids = [int(number) for number in re.findall(r"val sample (\d+) ", alt)]
    assert len(ids) == len(set(ids)) == min(8, len(jpegs))
    texts = []
    for i, number in enumerate(ids):
        best = ", ".join(f"{CLASSES[label]} {100 * rows[number][label]:.1f} %" for label in np.argsort(-rows[number]))
        texts.append(f"val sample {number} ({CLASSES[int(batch.labels[number])]}) is taken for {best}")
        top = 63 + 200 * i
        shown = picture(np.asarray(Image.open(io.BytesIO(jpegs[number]))), 184)
        assert (drawn[top : top + 184, 16 : 16 + 184] == np.asarray(shown)).all()
    assert alt == "; ".join(texts)


def features(written: Written, split: str) -> tuple[np.ndarray, np.ndarray]:
    """What fc8 is given, of each sample of a split: (n, 8), and the labels (n,)."""
    network = Grouped(RECIPE.model, len(CLASSES))
    network.load(written.weights)
    with Loader(written.data, split, batch_size=64, views="centre", device="cpu") as loader, torch.inference_mode():
        batch = next(loader)
        return network.run(network.layers[:-1], batch.images, [None] * 7).numpy(), batch.labels.numpy()


def test_neighbours_are_the_nearest_training_images(written: Written) -> None:
    (asked, labels), (rows, known) = features(written, "val"), features(written, "train")
    alt = sheet(written.page, "similar-training-images").attributes["alt"]
    queries = [int(number) for number in re.findall(r"nearest to val sample (\d+) ", alt)]
    assert len(queries) == 5
    texts = []
    for query in queries:
        distances = np.sqrt(((rows.astype(np.float64) - asked[query]) ** 2).sum(1))
        nearest = np.argsort(distances, kind="stable")[:6]
        found = ", ".join(f"{i} ({CLASSES[known[i]]}) at {distances[i]:.4g}" for i in nearest)
        texts.append(f"nearest to val sample {query} ({CLASSES[labels[query]]}): training samples {found}")
    assert re.sub(r"(\.\d*?)0+\b", r"\1", alt) == re.sub(r"(\.\d*?)0+\b", r"\1", "; ".join(texts))


def test_many_training_images_are_looked_for_in_the_index(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(written.run, tmp_path / "run"))
    checkpoint = checkpoints.load(run)
    network = load_network(checkpoint, written.dataset, (torch.device("cpu"),) * 2, run)

    def neighbours() -> str | list[list[int]]:
        data = gather.gather(run, written.dataset, network, checkpoint)
        return data.lacking.get("neighbours") or [[found.id for found in row] for _query, row in data.similar]

    expected = neighbours()
    assert len(expected) == 5
    monkeypatch.setattr(gather, "SEARCHED", 3)
    assert "no index there" in neighbours()
    made = trainer("index", run, written.data, "--devices", "cpu,cpu", "--float32")
    assert made.exit_code == 0, made.output
    assert neighbours() == expected
    (run / "index" / "features.npy").write_bytes(b"")  # the other figures do not need it
    assert "make the index again" in neighbours()
    made = trainer("index", run, written.data, "--devices", "cpu,cpu", "--split", "val")
    assert made.exit_code == 0, made.output
    assert "is of the split 'val'" in neighbours()


def test_confused_pairs_and_updates(written: Written) -> None:
    rows = written.page.section("result").all("tbody")[1].all("tr")
    assert [[cell.words() for cell in row.inside] for row in rows] == [[CLASSES[0], CLASSES[2], "3"]]
    (script,) = (s.text for s in written.page.root.all("script") if 'getElementById("updates")' in s.text)
    traces, _ = json.JSONDecoder().raw_decode(script, script.index("[", script.index("Plotly.newPlot(")))
    drawn = {trace["name"]: dict(zip(trace["x"], trace["y"])) for trace in traces}
    expected = {name: {20 + 10 * i: value for i, value in enumerate(row) if value} for name, row in RATIOS.items()}
    assert drawn == expected


@pytest.mark.parametrize(
    ("kinds", "ratios", "charts"),
    [
        (("train", "validation"), {"fc8": 0.0}, ["losses", "errors"]),
        (("train",), {}, ["losses"]),
        (("validation",), {}, ["losses", "errors"]),
        (("train",), {"conv1": 0.5, "fc8": 0.0}, ["losses", "updates"]),
    ],
)
def test_curves_without_points_are_left_out(
    kinds: tuple[str, ...], ratios: dict[str, float], charts: list[str], written: Written
) -> None:
    text = (written.run / "metrics.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if line["kind"] in kinds]
    for line in lines:
        line["layers"] = {name: {"ratio": ratio} for name, ratio in ratios.items()}
    page = Page(sections.curves(SimpleNamespace(lines=lines, dataset=written.dataset)))  # type: ignore[arg-type]
    assert [div.attributes["id"] for div in page.root.all("div", "plotly-graph-div")] == charts


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
    assert [command[3] for command in commands[1:]] == ["train", "evaluate", "figures"]
