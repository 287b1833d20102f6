"""The page of `python -m trainer figures`: whole in one file, whatever of the run is missing; mistakes are one line."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline import manifest
from reported import CLASSES, Written, build_dataset, draw, invoke, pixels, read_page, save_run, sheet
from trainer import checkpoint as checkpoints

# The page as a whole


def test_the_command_names_the_page(written: Written) -> None:
    names = ("kernels", "predictions", "neighbours", "augmentation")
    files = [written.run / "figures" / f"{name}.png" for name in names]
    assert written.output.splitlines() == [*map(str, files), f"{written.run / 'report.html'}"]
    for file in files:
        with Image.open(file) as image:
            assert (image.format, image.width) == ("PNG", 640)
            assert np.asarray(image).std() > 10, f"{file.name} is blank"


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
    assert len(images) == 1 + 2 * 16 + 4  # the mean, training samples as stored and as seen, the sheets
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
    alt = sheet(written.page, "validation-images").attributes["alt"]
    assert all(f"taken for {name}" in alt or f", {name} " in alt for name in CLASSES)


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


def test_only_errors_and_another_split(written: Written, tmp_path: Path) -> None:
    run = shutil.copytree(written.run, tmp_path / "run")
    assert invoke(written.data, run, "--only-errors", "--split", "train").exit_code == 0
    section = read_page(run).section("images-of-train")
    assert "Only images that the network gets wrong" in section.text
    shown = sheet(read_page(run), "images-of-train").attributes["alt"].split("; ")
    assert 1 <= len(shown) <= 8
    for text in shown:
        label, guesses = text.split(" (", 1)[1].split(") is taken for ")
        assert not guesses.startswith(label), "the most probable label is the true one"


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
