"""The sheets of a run: text that is not boxes and does not overflow; pictures, bars and views in their positions.

And the pages of runs that have little to show, or cannot be shown.
"""

import errno
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageFont

from conftest import saved
from pipeline import UserError
from pipeline.manifest import DatasetError
from reported import LINEAR, NETWORK, Written, invoke, read_page, short_run
from runs import one_line, trainer
from stored import damage
from trainer.figures import gather, page
from trainer.figures.gather import Example, Neighbour
from trainer.figures.sheets import (
    GAP,
    MARGIN,
    NEAR,
    NEAR_GAP,
    RED,
    SIDE,
    WIDTH,
    blank,
    drawable,
    fitted,
    font,
    neighbours,
    paragraph,
    picture,
    predictions,
    tick,
)
from trainer.pictures import pixels

FONT = ImageFont.load_default(size=19)
WHALE = "grey whale, gray whale, devilfish, Eschrichtius gibbosus, Eschrichtius robustus"
CLASSES = ("tench", "goldfish", "猫", WHALE, "hen")


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def has(sheet: np.ndarray, colour: str) -> np.ndarray:
    """(height, width) bool: where a sheet has a colour."""
    return (sheet == ImageColor.getrgb(colour)).all(2)


# Parts of a sheet


@pytest.mark.parametrize(
    ("words", "spelled"),
    [
        ("crème brûlée", "creme brulee"),
        ("cre\u0300me", "creme"),
        ("−3 × 4 – Straße", "-3 x 4 - Stra\\xdfe"),
        ("猫 x", "\\u732b x"),
        ("\x1b[31m\x07a\tb", "\\x1b[31m\\x07a b"),
        ("it’s “so” …", 'it\'s "so" ...'),
        ("\ud800", "\\ud800"),
    ],
)
def test_characters_that_the_font_lacks_are_spelled(words: str, spelled: str) -> None:
    box = bytes(FONT.getmask("\U0010ffff"))
    assert drawable(words) == spelled
    assert all(bytes(FONT.getmask(character)) != box for character in spelled)


@pytest.mark.parametrize("words", [WHALE, "x" * 5000, "猫" * 50])
def test_text_fits(words: str) -> None:
    full = drawable(words)
    for width in (40, 171, 999):
        shortened = fitted(words, width)
        assert FONT.getlength(shortened) <= width
        shown = len(shortened) - 1
        if shortened.endswith("…"):
            assert full.startswith(shortened[:-1])
            assert FONT.getlength(full[: shown + 1].rstrip() + "…") > width or full[shown] == " "
        else:
            assert shortened in (full, full.split(",")[0])


def test_paragraphs_are_full_lines_within_the_margins() -> None:
    words, height = " ".join([WHALE] * 8), round(1.4 * 17)
    part = (np.asarray(paragraph(words)) < 255).any(2)
    ends = [part[top : top + height].any(0).nonzero()[0].max() for top in range(0, len(part), height)]
    assert len(ends) > 5
    assert part[:, :MARGIN].sum() == 0
    assert max(ends) <= WIDTH - MARGIN + 1
    longest = max(ImageFont.load_default(size=17).getlength(word + " ") for word in words.split())
    assert min(ends[:-1]) > WIDTH - MARGIN - longest  # no line ends before it must


def test_a_pillow_that_cannot_write_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_freetype(size: float) -> None:
        raise ImportError("The _imagingft C module is not installed")

    monkeypatch.setattr(ImageFont, "load_default", without_freetype)
    with pytest.raises(UserError, match=r"without FreeType .*libfreetype-dev"):
        font(31)  # pixels that nobody has asked for before


def test_small_pictures_are_magnified_exactly_and_large_ones_fit() -> None:
    small = noise(24, 24)
    assert (np.asarray(picture(small, 100)) == small.repeat(4, 0).repeat(4, 1)).all()
    assert (np.asarray(picture(np.full((900, 900, 3), 77, np.uint8), 90)) == np.full((90, 90, 3), 77)).all()


# Predictions and neighbours


def position_of(tile: np.ndarray, sheet: np.ndarray) -> tuple[int, int]:
    """Left and top of the only position where a sheet holds a tile in its first 400 rows."""
    height, width = tile.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(sheet[:400], (1, width, 3))[:, :, 0, 0]
    starts = np.argwhere((windows == tile[0]).all((2, 3))).tolist()
    (start,) = [(left, top) for top, left in starts if (sheet[top : top + height, left : left + width] == tile).all()]
    return start


def words_of(label: int) -> str:
    return CLASSES[label] if label >= 0 else "no label"


def ends(card: np.ndarray, colour: str) -> list[int]:
    """The length of each bar of a colour, by its first row of pixels, where no text is."""
    rows = has(card, colour).any(1)
    return [int(has(card[row : row + 1], colour).sum()) for row in (rows & ~np.roll(rows, 1)).nonzero()[0]]


def test_predictions_are_drawn_to_scale_and_the_true_label_is_red_and_ticked() -> None:
    probabilities = np.array([0.5, 0.25, 0.125, 0.0625, 0.0])
    examples = [Example(i, noise(32, 32, i), label, probabilities) for i, label in enumerate((1, -1))]
    sheet = np.asarray(predictions(examples, words_of))
    assert sheet.shape[1] == WIDTH
    (left, top), (_, below) = (position_of(noise(32, 32, i).repeat(5, 0).repeat(5, 1), sheet) for i in (0, 1))
    assert left == MARGIN + (SIDE - 160) // 2
    full, first = WIDTH - MARGIN - (MARGIN + SIDE + GAP), sheet[top : top + SIDE]
    assert ends(first, "#bcd3e3") == [round(full * probability) for probability in (0.5, 0.125, 0.0625)]
    assert ends(first, "#f3c5c1") == [round(full * 0.25)]
    second = below - (SIDE - 160) // 2
    labelled, unlabelled = has(sheet[:second], RED), has(sheet[second:], RED)
    assert labelled.any()
    assert not unlabelled.any()
    marked = blank(30)
    tick(marked, 0, 15)
    mark = has(np.asarray(marked), RED)
    mark = mark[np.ix_(mark.any(1), mark.any(0))]
    windows = np.lib.stride_tricks.sliding_window_view(labelled, mark.shape)
    assert (windows == mark).all((2, 3)).any()


def test_five_bars_are_drawn_and_a_true_label_beyond_them_is_named() -> None:
    probabilities = np.array([0.01, 0.3, 0.04, 0.25, 0.2, 0.05, 0.15])
    missed, hit = (np.asarray(predictions([Example(0, noise(32, 32), i, probabilities)], str)) for i in (0, 1))
    full = WIDTH - MARGIN - (MARGIN + SIDE + GAP)
    assert ends(missed, "#bcd3e3") == [round(full * probability) for probability in (0.3, 0.25, 0.2, 0.15, 0.05)]
    assert ends(missed, "#f3c5c1") == []
    assert has(missed, RED).any()
    assert (missed[63:97] != hit[63:97]).any(2).any(0).nonzero()[0].max() > 260  # "(missed)" stands beside the label


def test_neighbours_stand_apart_from_the_query() -> None:
    pictures = [noise(41, 41, seed) for seed in range(7)]
    distances = (0.0, 1e-30, 1.5, float("inf"), 6.0, 7.5)
    near = [Neighbour(i, pictures[i + 1], 2 if i == 2 else 3, distances[i]) for i in range(6)]
    query = Example(0, pictures[0], 2, np.zeros(5))
    sheet = np.asarray(neighbours(((query, tuple(near)),), words_of))
    assert position_of(pictures[0].repeat(4, 0).repeat(4, 1), sheet)[0] == MARGIN + (SIDE - 164) // 2
    positions = [position_of(pixels.repeat(3, 0).repeat(3, 1), sheet) for pixels in pictures[1:]]
    first = MARGIN + SIDE + GAP + (NEAR - 123) // 2
    assert [left for left, _ in positions] == [first + i * (NEAR + NEAR_GAP) for i in (0, 1, 2)] * 2
    tops = [top for _, top in positions]
    assert tops[:3] == [tops[0]] * 3
    assert tops[3:] == [tops[3]] * 3
    assert tops[3] > tops[0] + 123 + 40
    rows, lefts = has(sheet, RED).nonzero()
    assert positions[2][0] - 3 <= lefts.min()
    assert lefts.max() <= WIDTH - MARGIN
    assert tops[0] + 123 < rows.min() < rows.max() < tops[3]


# The pages of odd runs

ONE, TWO = {"train/a": 1}, {"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 1}
FROZEN, BOTH = "optim.layers.conv1.frozen_from=0.001", ("conv1", "fc2")
STILL = [f"optim.layers.{layer}.{key}=0" for layer in BOTH for key in ("lr", "bias_lr", "decay")]
ZEROS = [*STILL, *(f"model.layers.{layer}.sd=0" for layer in BOTH), "train.log_every=1"]
UNVARIED = ["data.lighting_until=0", "data.positions='centre'", "data.flips=false"]
NO_VAL, ALL = "The data set has no images in val.", ["augmentation", "kernels", "neighbours", "predictions"]


@pytest.mark.parametrize(
    ("counts", "settings", "network", "sheets", "charts", "words"),
    [
        pytest.param(
            *(ONE, ["train.steps=1"], NETWORK, ["augmentation", "kernels"]),
            {"losses": "training 0 at step 1", "errors": "in training 0 at step 1", "updates": "; fc2 "},
            {"result": NO_VAL, "validation-images": NO_VAL, "similar-training-images": NO_VAL, "curves": NO_VAL},
            id="one picture",
        ),
        pytest.param(
            *(TWO, ["train.steps=5", FROZEN], NETWORK, ALL),
            {"losses": "validation ", "errors": "top-5 from 0 at step 2 to 0 at", "updates": ": fc2 "},
            {"curves": "no update in the log changed them: conv1.", "result": "Not evaluated yet"},
            id="a frozen layer",
        ),
        pytest.param(
            *(TWO, ["train.steps=2", *ZEROS], NETWORK, ALL),
            {
                "losses": "training from 0.6931 at step 1 to 0.6931 at step 2; validation 0.6931",
                "errors": "top-1 50 at ",
            },
            {
                "curves": "no update in the log changed them: conv1, fc2.",
                "validation-images": "val sample 0 (a) is taken for a 50.0 %, b 50.0 %; val",
                "similar-training-images": " at 0.000, 3 (a) at 0.000; nearest",
                "first-layer-kernels": "; column 0: colour 0.00, orientation 0.00; column 1: colour 0.00",
            },
            id="zeros",
        ),
        pytest.param(
            *(TWO, ["train.steps=2", *UNVARIED], LINEAR, ["augmentation", "neighbours", "predictions"]),
            {"losses": "training ", "errors": "top-1 ", "updates": "fc2 "},
            {
                "first-layer-kernels": "The first layer, fc2, has no kernels",
                "similar-training-images": "nearest to val",
                "curves": "measured with dropout, validation without",
                "training-samples": "epoch: the middle 24 × 24 pixels, minus",
                "augmentation": "One training picture: its middle",
            },
            id="no kernels, the same views in every epoch",
        ),
    ],
)
def test_the_page_of_a_run_with_little_to_show(
    counts: dict[str, int],
    settings: list[str],
    network: str,
    sheets: list[str],
    charts: dict[str, str],
    words: dict[str, str],
    tmp_path: Path,
) -> None:
    result = trainer(*short_run(tmp_path, counts, *settings, network=network))
    assert (result.exit_code, "no page" in result.output) == (0, False), result.output
    shown = read_page(tmp_path / "run")
    assert sorted(path.stem for path in (tmp_path / "run" / "figures").iterdir()) == sheets
    labels = {div.all("div", "plotly-graph-div")[0].attributes["id"]: div for div in shown.root.all("div", "chart")}
    assert list(labels) == list(charts)
    for name, text in charts.items():
        assert text in labels[name].attributes["aria-label"]
    for name, text in words.items():
        section = shown.section(name)
        assert text in section.text + "".join(image.attributes["alt"] for image in section.all("img"))
    assert ("Layers without a curve" in shown.section("curves").text) == ("changed them" in words.get("curves", ""))


@pytest.mark.parametrize(
    ("split", "lost", "sections"),
    [
        ("val", ["neighbours", "predictions"], ["validation-images", "similar-training-images"]),
        ("train", ["augmentation", "neighbours"], ["similar-training-images", "training-samples", "augmentation"]),
    ],
)
def test_damaged_pictures_cost_the_figures_that_need_them(
    split: str, lost: list[str], sections: list[str], written: Written, tmp_path: Path
) -> None:
    data, run = shutil.copytree(written.data, tmp_path / "data"), shutil.copytree(written.run, tmp_path / "run")
    damage(data, *range(written.dataset.splits[split].samples), split=split)
    result = invoke(data, run)
    assert result.exit_code == 0, result.output
    problem = rf"{data}/{split}/{split}-00000\d\.tar: .*damaged at sample \d+ |its CRC-32 differs"
    for name in ALL:
        assert (run / "figures" / f"{name}.png").exists() == (name not in lost)
        assert bool(re.search(f"^no {name}\\.png: ({problem})", result.output, re.M)) == (name in lost)
    for section in read_page(run).root.all("section"):
        assert bool(re.search(problem, section.text)) == (section.attributes["id"] in sections)


GREY, NOISE = (saved(Image.fromarray(array), "JPEG") for array in (np.full((32, 32), 7, np.uint8), noise(32, 32)))


@pytest.mark.parametrize("stored", [b"", saved(Image.new("L", (32, 32)), "PNG"), NOISE[:-200], GREY], ids=len)
def test_a_stored_picture_that_is_none_is_named(stored: bytes) -> None:
    size = 16 if stored == GREY else 32
    with pytest.raises(DatasetError, match=rf"does not decode to {size} × {size} pixels \(.*verify_shards\.py$"):
        pixels(stored, size)
    assert pixels(GREY, 32).tolist() == [[[7, 7, 7]] * 32] * 32


def failing(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


FULL = failing(OSError(errno.ENOSPC, "No space left on device", "RUN/report.html"))
MORE = failing(torch.OutOfMemoryError("CUDA out of memory.\nmore"))
NESTED = "[" * 10**5 + "\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run, data, patch: patch(page, "write_bytes_aside", FULL), "RUN/report.html: No space left on device"),
        (lambda run, data, patch: patch(gather, "features", MORE), "CUDA out of memory. Name other --devices"),
        (lambda run, data, patch: patch(gather, "features", failing(MemoryError())), "not enough memory"),
        (lambda run, data, patch: (run / "report.html").mkdir(), "/report.html"),
        (lambda run, data, patch: (run / "figures").write_text(""), "/figures"),
        (lambda run, data, patch: (run / "metrics.jsonl").write_text(NESTED), "metrics.jsonl: line 1 is damaged"),
        (lambda run, data, patch: shutil.rmtree(run / "checkpoints"), "run: no checkpoint"),
        (lambda run, data, patch: shutil.rmtree(data), "data: no such directory"),
        (lambda run, data, patch: (data / "statistics.npz").write_bytes(b""), "statistics.npz: has 0 bytes"),
    ],
)
def test_what_keeps_a_page_from_being_drawn_fails_no_training(
    change: Callable[..., object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, data, draw = tmp_path / "run", tmp_path / "data", page.draw

    def draw_after(*arguments: Any) -> list[str]:
        change(run, data, monkeypatch.setattr)
        return draw(*arguments)

    monkeypatch.setattr(page, "draw", draw_after)
    result = trainer(*short_run(tmp_path, TWO, "train.steps=1"))
    assert result.exit_code == 0, result.output
    *_, announced, reason = result.output.splitlines()
    assert announced.startswith("the run is complete and saved; drawing its page, 4 training pictures through the ")
    later = f"python -m trainer figures {run} --data {data}"
    assert re.fullmatch(f"no page: .*{re.escape(message)}.*; draw it by: {later}", reason)
    monkeypatch.setattr(page, "draw", draw)
    if message != "not enough memory":
        one_line(trainer("figures", run, "--data", data, "--devices", "cpu,cpu"), message)


def test_no_page_is_drawn_where_none_is_wanted(tmp_path: Path) -> None:
    result = trainer(*short_run(tmp_path, TWO, "train.steps=1"), "--no-page")
    assert (result.exit_code, (tmp_path / "run" / "report.html").exists()) == (0, False), result.output
    assert not re.search("page: |drawing", result.output)
