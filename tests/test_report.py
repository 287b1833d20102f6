"""The page of `python -m trainer figures`: whole in one file, true to its sources, whatever of the run is missing."""

import io
import json
import re
import shlex
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.online import Loader
from reported import (
    CLASSES,
    RATIOS,
    RECIPE,
    Page,
    Written,
    build_dataset,
    draw,
    invoke,
    pixels,
    read_page,
    save_run,
    sheet,
    source,
)
from runs import one_line, trainer
from stored import jpegs as jpegs_of
from trainer import checkpoint as checkpoints
from trainer import recipe
from trainer.checkpoint import load_network
from trainer.figures import gather, page
from trainer.figures.sheets import picture
from trainer.model import Grouped
from trainer.retrieval import codes

# The page as a whole


def test_the_command_names_the_page_which_shows_every_sheet_once(written: Written) -> None:
    sections = {
        "kernels": "first-layer-kernels",
        "predictions": "validation-images",
        "neighbours": "similar-training-images",
        "augmentation": "augmentation",
    }
    files = [written.run / "figures" / f"{name}.png" for name in sections]
    assert written.output.splitlines() == [*map(str, files), f"{written.run / 'report.html'}"]
    for file, section in zip(files, sections.values()):
        with Image.open(file) as image:
            assert (image.format, image.width) == ("PNG", 640)
            assert np.asarray(image).std() > 10, f"{file.name} is blank"
        assert source(sheet(written.page, section)) == file.read_bytes()


def test_nothing_is_fetched(written: Written) -> None:
    for element in written.page.root.all():
        assert element.tag not in ("link", "iframe", "object", "embed", "base", "audio", "video", "source")
        for name, value in element.attributes.items():
            assert not name.startswith("on"), f"inline handler {name}"
            if name in ("src", "href", "srcset", "action", "data"):
                assert value.startswith("data:" if element.tag == "img" else "#"), value[:80]
            if name == "style":
                assert "url(" not in value
    scripts = written.page.root.all("script")
    assert sum("* plotly.js v" in script.text for script in scripts) == 1
    assert all("src" not in script.attributes for script in scripts)
    (style,) = written.page.root.all("head")[0].all("style")
    assert "url(" not in style.text
    (policy,) = (meta for meta in written.page.root.all("meta") if "http-equiv" in meta.attributes)
    assert policy.attributes["content"].startswith("default-src 'none'; img-src data:;")


def test_pictures_have_texts_headings_an_order_and_links_a_target(written: Written) -> None:
    images = written.page.root.all("img")
    assert len(images) == 1 + 2 * 16 + 4  # the mean, training samples as stored and as seen, the sheets
    for image in images:
        assert image.attributes["alt"].strip()
        height, width = pixels(image).shape[:2]
        assert (image.attributes["width"], image.attributes["height"]) == (str(width), str(height))
    levels = [int(element.tag[1]) for element in written.page.root.all() if element.tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    links = [link.attributes["href"].removeprefix("#") for link in written.page.root.all("a")]
    assert links == [section.attributes["id"] for section in written.page.root.all("section")]


def test_class_words_never_become_markup(written: Written) -> None:
    html = (written.run / "report.html").read_text(encoding="utf-8")
    assert not any(name in html for name in CLASSES)
    captions = {caption.words() for caption in written.page.section("training-samples").all("figcaption")}
    assert captions == set(CLASSES)
    alts = [image.attributes["alt"] for image in written.page.section("training-samples").all("img")]
    assert all(any(f", {name}, as " in alt for name in CLASSES) for alt in alts)
    alt = sheet(written.page, "validation-images").attributes["alt"]
    assert all(f"taken for {name}" in alt or f", {name} " in alt for name in CLASSES)


# Sections


def test_result(written: Written) -> None:
    result = written.page.section("result")
    rows = [[cell.words() for cell in row.inside] for row in result.all("tbody")[0].all("tr")]
    assert rows == [
        ["centre view", "61.2 %", "13.4 %", "1.515"],
        ["ten views", "59.9 %", "11.1 %", "1.414"],
    ]
    rows = result.all("tbody")[1].all("tr")
    assert [[cell.words() for cell in row.inside] for row in rows] == [[CLASSES[0], CLASSES[2], "3"]]
    assert len(rows[0].all("span", "word")) == 2  # long words may break
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
    assert source(section.all("img")[0]) == (written.data / "mean.png").read_bytes()
    deviations = np.sqrt(np.linalg.eigvalsh(written.dataset.statistics().covariance))[::-1]
    assert [row.inside[1].words() for row in section.all("tr")[1:]] == [f"{deviation:.1f}" for deviation in deviations]


def test_training_samples_are_the_stored_bytes_and_the_loaders_tensors(written: Written) -> None:
    with Loader(written.data, "train", batch_size=16, seed=RECIPE.train.seed, device="cpu") as loader:
        batch = next(loader)
    section, jpegs = written.page.section("training-samples"), jpegs_of(written.data, "train")
    above, beneath = section.all("img", "stored"), section.all("img", "seen")
    assert [source(image) for image in above] == [jpegs[i] for i in batch.ids]
    assert len(above) == len(beneath) == 16
    for image, x, label, figure in zip(beneath, batch.images.numpy(), batch.labels, section.all("figure")):
        levels = np.clip(np.rint(x + 128), 0, 255).transpose(1, 2, 0)
        assert np.array_equal(pixels(image), levels)
        assert figure.all("figcaption")[0].words() == CLASSES[int(label)]


def traces(page: Page, name: str) -> dict[str, dict[int, float]]:
    """The points of each curve of a chart: step → value."""
    (script,) = (s.text for s in page.root.all("script") if f'getElementById("{name}")' in s.text)
    drawn, _ = json.JSONDecoder().raw_decode(script, script.index("[", script.index("Plotly.newPlot(")))
    return {trace["name"]: dict(zip(trace["x"], trace["y"])) for trace in drawn}


def test_curves_are_the_recorded_numbers(written: Written) -> None:
    losses = {"training": {20: 1.25, 30: 1.125, 40: 0.75}, "validation": {40: 1.0625}}
    assert traces(written.page, "losses") == losses
    assert traces(written.page, "errors") == {"top-1": {40: 62.5}, "top-5": {40: 12.25}}
    ratios = {name: {20 + 10 * i: value for i, value in enumerate(row) if value} for name, row in RATIOS.items()}
    assert traces(written.page, "updates") == ratios


@pytest.mark.parametrize(
    ("kinds", "change", "drawn", "still"),
    [
        (("train", "validation"), {"layers": {"fc8": {"ratio": 0.0}}}, ["losses", "errors"], ["fc8"]),  # lr = 0
        (("validation",), {"nll": 0.0, "top1_error": 0.0}, ["losses", "errors"], []),
        (
            ("train",),
            {"loss": 1e308, "layers": {"a": {"ratio": 1e-308}, "b": {"ratio": 0}}},
            ["losses", "updates"],
            ["b"],
        ),
        (("train",), {"layers": None}, ["losses"], []),
        ((), {}, [], []),
    ],
)
def test_any_curves_are_drawn_and_those_without_points_left_out(
    kinds: tuple[str, ...], change: dict, drawn: list[str], still: list[str], written: Written
) -> None:
    text = (written.run / "metrics.jsonl").read_text()
    lines = [line | change for line in map(json.loads, text.splitlines()) if line["kind"] in kinds]
    lines = [{key: value for key, value in line.items() if value is not None} for line in lines]
    html = "".join(chart.html for chart in page.charts(lines))
    assert [div.attributes["id"] for div in Page(html).root.all("div", "plotly-graph-div")] == drawn
    assert page.still(lines) == still


@pytest.mark.parametrize(
    ("least", "axis"),
    [(0.5, "1 [-1.1,1.1]"), (3.0, "1 [-0.1,1.1]"), (1e-7, "1 [-7.1,1.1]"), (1e-300, "34 [-300.1,1.1]")],
)
def test_a_logarithmic_axis_has_some_ticks_and_not_many(least: float, axis: str) -> None:
    ratios = {"a": {"ratio": 2.0}, "b": {"ratio": least}}
    *_, updates = page.charts([{"kind": "train", "step": 7, "loss": 0.0, "layers": ratios}])
    assert " ".join(re.findall(r'"(?:range|dtick)":(\[.*?\]|\d+),', updates.html)) == axis
    assert updates.label == f"Updates, mean |update| / mean |weight|: a 2 at step 7; b {least:.4g} at step 7"


def outputs(written: Written, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The probabilities and the inputs of fc8, of each sample of a split, and the labels."""
    network = Grouped(RECIPE.model, len(CLASSES))
    network.load(written.weights)
    with Loader(written.data, split, batch_size=64, views="centre", device="cpu") as loader, torch.inference_mode():
        batch = next(loader)
        rows = network(batch.images).double().softmax(1).numpy()
        hidden = network.run(network.layers[:-1], batch.images, [None] * 7).double().numpy()
    return rows, hidden, batch.labels.numpy()


def test_predictions_are_the_networks_probabilities_of_these_pictures(written: Written) -> None:
    rows, _, labels = outputs(written, "val")
    assert np.ptp(rows, axis=1).min() > 0.01, "no test: all classes are equally probable"
    image, jpegs = sheet(written.page, "validation-images"), jpegs_of(written.data, "val")
    alt, drawn = image.attributes["alt"], pixels(image)
    ids = [int(number) for number in re.findall(r"val sample (\d+) ", alt)]
    assert len(ids) == len(set(ids)) == min(8, len(jpegs))
    texts = []
    for i, number in enumerate(ids):
        best = ", ".join(f"{CLASSES[label]} {100 * rows[number][label]:.1f} %" for label in np.argsort(-rows[number]))
        texts.append(f"val sample {number} ({CLASSES[labels[number]]}) is taken for {best}")
        top = 63 + 200 * i
        shown = picture(np.asarray(Image.open(io.BytesIO(jpegs[number]))), 184)
        assert (drawn[top : top + 184, 16 : 16 + 184] == np.asarray(shown)).all()
    assert alt == "; ".join(texts)


def test_neighbours_are_the_nearest_training_images(written: Written) -> None:
    (_, asked, labels), (_, rows, known) = outputs(written, "val"), outputs(written, "train")
    alt = sheet(written.page, "similar-training-images").attributes["alt"]
    queries = [int(number) for number in re.findall(r"nearest to val sample (\d+) ", alt)]
    assert len(queries) == 5
    texts = []
    for query in queries:
        distances = np.sqrt(((rows - asked[query]) ** 2).sum(1))
        nearest = np.argsort(distances, kind="stable")[:6]
        samples = ", ".join(f"{i} ({CLASSES[known[i]]}) at {distances[i]:.4g}" for i in nearest)
        texts.append(f"nearest to val sample {query} ({CLASSES[labels[query]]}): training samples {samples}")
    assert re.sub(r"(\.\d*?)0+\b", r"\1", alt) == re.sub(r"(\.\d*?)0+\b", r"\1", "; ".join(texts))


def test_many_training_images_are_looked_for_in_the_index(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(written.run, tmp_path / "run"))
    checkpoint = checkpoints.load(run)
    network = load_network(checkpoint, written.dataset, (torch.device("cpu"),) * 2, run)
    shown: list[tuple[object, ...]] = []

    def neighbours() -> str | list[list[int]]:
        shown.clear()
        data = gather.gather(run, written.dataset, network, checkpoint, show=lambda *row: shown.append(row))
        return data.lacking.get("neighbours") or [[image.id for image in near] for _query, near in data.similar]

    expected = neighbours()
    assert len(expected) == 5
    assert shown == [("training pictures through the network", 27, 27)]
    monkeypatch.setattr(gather, "SEARCHED", 3)
    assert "no index there" in neighbours()
    assert shown == []
    monkeypatch.setattr(codes, "STEPS", 20)
    made = trainer("index", run, written.data, "--devices", "cpu,cpu", "--float32")
    assert made.exit_code == 0, made.output
    assert neighbours() == expected
    (run / "index" / "features.npy").write_bytes(b"")  # the other figures do not need it
    assert "make it again" in neighbours()


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


# What may be missing


def test_old_runs_without_records(written: Written, tmp_path: Path) -> None:
    run = Path(shutil.copytree(written.run, tmp_path / "run"))
    for name in ("evaluation.json", "metrics.jsonl"):
        (run / name).unlink()
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
    (tmp_path / "run" / "figures").mkdir()
    (tmp_path / "run" / "figures" / "predictions.png").write_bytes(b"of an earlier run")
    result = invoke(tmp_path / "data", tmp_path / "run")
    assert result.exit_code == 0, result.output
    page = read_page(tmp_path / "run")
    for name in ("result", "curves", "validation-images", "similar-training-images"):
        assert "The data set has no images in val." in page.section(name).text
    assert sorted(path.stem for path in (tmp_path / "run" / "figures").iterdir()) == ["augmentation", "kernels"]
    assert "no predictions.png: The data set has no images in val." in result.output.splitlines()
    assert len(page.root.all("img", "seen")) == len(page.root.all("img", "stored")) == dataset.splits["train"].samples


def test_only_errors_of_another_split_beside_an_old_evaluation(written: Written, tmp_path: Path) -> None:
    run = Path(shutil.copytree(written.run, tmp_path / "run"))
    evaluation = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(evaluation | {"step": 30}))
    assert invoke(written.data, run, "--only-errors", "--split", "train").exit_code == 0
    page = read_page(run)
    assert "out of date" in page.section("result").all("caption")[0].text
    assert "Only images that the network gets wrong" in page.section("images-of-train").text
    shown = sheet(page, "images-of-train").attributes["alt"].split("; ")
    assert 1 <= len(shown) <= 8
    for text in shown:
        label, guesses = text.split(" (", 1)[1].split(") is taken for ")
        assert not guesses.startswith(label), "the most probable label is the true one"
    similar = sheet(page, "similar-training-images").attributes["alt"].split("; ")
    assert len(similar) == 5
    for text in similar:  # a training picture is not its own neighbour
        query, *neighbours = re.findall(r"(?:sample|samples|,) (\d+) \(", text)
        assert len(set(neighbours)) == 6
        assert query not in neighbours


def test_mistakes_are_one_line(written: Written, tmp_path: Path) -> None:
    one_line(invoke(written.data, tmp_path), "no checkpoint")
    one_line(invoke(written.data, checkpoints.files(written.run)[0]), "not a directory")
    run = shutil.copytree(written.run, tmp_path / "run")
    (run / "report.html").unlink()
    metrics = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(metrics.replace('"time"', '"hour"'))
    one_line(invoke(written.data, run), "metrics.jsonl: line 1 is damaged (it lacks 'time')")
    (run / "metrics.jsonl").write_text(metrics)
    (run / "evaluation.json").write_text("{")
    one_line(invoke(written.data, run), "evaluation.json: damaged")
    checkpoints.save(run, replace(checkpoints.load(written.run), dataset="0" * 64))
    one_line(invoke(written.data, run), "trained on the data set 000000000000")
    assert not (run / "report.html").exists()
