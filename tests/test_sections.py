"""The sections of the page of `python -m trainer figures`: every picture, bar and number is true to its source."""

import json
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.online import Loader
from reported import CLASSES, RATIOS, RECIPE, Page, Written, invoke, pixels, read_page, source
from runs import trainer
from trainer import recipe
from trainer.figures import html, material
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


def test_kernels_of_each_column(written: Written) -> None:
    grids = written.page.section("first-layer-kernels").all("img", "pixelated")
    for image, kernels in zip(grids, written.weights["conv1.weight"].split(2)):
        largest = written.weights["conv1.weight"].abs().max()  # of both columns: they have one scale
        expected = (128 + 127 * kernels / largest).round().permute(0, 2, 3, 1).numpy()
        grid = pixels(image)
        assert grid.shape == (46, 91, 3)  # two kernels of 44 × 44 in a row, and borders
        for i, kernel in enumerate(expected):
            tile = grid[1:45, 1 + 45 * i : 45 + 45 * i]
            for dy, dx in ((0, 0), (3, 3)):  # nearest neighbour: the corners of each 4 × 4 block
                assert np.abs(tile[dy::4, dx::4] - kernel).max() <= 1
        assert (grid[:, [0, 45, 90]] == 255).all()
        assert (grid[[0, 45]] == 255).all()


def test_bars_are_the_networks_probabilities(written: Written) -> None:
    network = Grouped(RECIPE.model, len(CLASSES))
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
    assert len(ids) == len(set(ids))
    assert len(ids) == min(8, len(jpegs))


def features(written: Written, split: str) -> tuple[np.ndarray, np.ndarray]:
    """What fc8 is given, of each sample of a split: (n, 8), and the labels (n,)."""
    network = Grouped(RECIPE.model, len(CLASSES))
    network.load(written.weights)
    with Loader(written.data, split, batch_size=64, views="centre", device="cpu") as loader, torch.inference_mode():
        batch = next(loader)
        return network.run(network.layers[:-1], batch.images, [None] * 7)[0].numpy(), batch.labels.numpy()


def test_neighbours_are_the_nearest_training_images(written: Written) -> None:
    (asked, labels), (rows, known) = features(written, "val"), features(written, "train")
    queries, jpegs = stored(written.data, "val"), stored(written.data, "train")
    shown = written.page.section("similar-training-images").all("div", "near")
    assert len(shown) == 5
    for row in shown:
        first, *found = row.all("figure")
        query = queries.index(source(first.all("img")[0]))
        distances = np.sqrt(((rows.astype(np.float64) - asked[query]) ** 2).sum(1))
        nearest = np.argsort(distances, kind="stable")[:6]
        assert [jpegs.index(source(figure.all("img")[0])) for figure in found] == nearest.tolist()
        for figure, i in zip(found, nearest, strict=True):
            (caption,) = figure.all("figcaption")
            distance = re.search(r"[\d.]+$", caption.text)
            assert distance is not None
            assert float(distance[0]) == pytest.approx(distances[i], rel=1e-3)
            assert (caption.text[0] == "✓") == (known[i] == labels[query])


def test_many_training_images_are_looked_for_in_the_index(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def figures_of(run: Path) -> list[str]:
        assert invoke(written.data, run).exit_code == 0
        return [image.attributes["src"] for image in read_page(run).section("similar-training-images").all("img")]

    run = Path(shutil.copytree(written.run, tmp_path / "run"))
    expected = figures_of(run)
    monkeypatch.setattr(material, "SEARCHED", 3)
    assert figures_of(run) == []
    assert "no index there" in read_page(run).section("similar-training-images").text
    made = trainer("index", run, written.data, "--devices", "cpu,cpu", "--float32")
    assert made.exit_code == 0, made.output
    assert figures_of(run) == expected
    (run / "index" / "features.npy").write_bytes(b"")  # the rest of the page does not need it
    assert figures_of(run) == []
    assert "make the index again" in read_page(run).section("similar-training-images").text
    made = trainer("index", run, written.data, "--devices", "cpu,cpu", "--split", "val")
    assert made.exit_code == 0, made.output
    assert figures_of(run) == []
    assert "is of the split 'val'" in read_page(run).section("similar-training-images").text


def test_confused_pairs_and_updates(written: Written) -> None:
    rows = written.page.section("result").all("tbody")[1].all("tr")
    assert [[cell.words() for cell in row.inside] for row in rows] == [[CLASSES[0], CLASSES[2], "3"]]
    (script,) = (s.text for s in written.page.root.all("script") if 'getElementById("updates")' in s.text)
    traces, _ = json.JSONDecoder().raw_decode(script, script.index("[", script.index("Plotly.newPlot(")))
    drawn = {trace["name"]: dict(zip(trace["x"], trace["y"])) for trace in traces}
    expected = {name: {20 + 10 * i: value for i, value in enumerate(row) if value} for name, row in RATIOS.items()}
    assert drawn == expected


def test_at_most_five_bars_and_a_true_label_beyond_them() -> None:
    chances = np.array([0.01, 0.3, 0.04, 0.25, 0.2, 0.05, 0.15])
    page = Page(html.prediction("Sample", html.png(np.zeros((2, 2, 3), np.uint8)), chances, "abcdefg", 2))
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
    assert [command[3] for command in commands[1:]] == ["train", "evaluate", "figures"]
