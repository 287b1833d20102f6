"""The sheets of a run: text that is not boxes and does not overflow; pictures, bars and views in their positions."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageFont

from conftest import saved
from pipeline import UserError, manifest
from pipeline.online import Loader, augment
from pipeline.online.samples import SampleReader
from trainer.figures.gather import Example, Neighbour
from trainer.figures.sheets import (
    COLOURS,
    GAP,
    MARGIN,
    NEAR,
    NEAR_GAP,
    RED,
    SIDE,
    WIDTH,
    augmentation,
    blank,
    drawable,
    first_views,
    fitted,
    font,
    neighbours,
    paragraph,
    picture,
    predictions,
    tick,
)

FONT = ImageFont.load_default(size=19)
WHALE = "grey whale, gray whale, devilfish, Eschrichtius gibbosus, Eschrichtius robustus"
CLASSES = ("tench", "goldfish", "猫", WHALE, "hen")
SEED, SAMPLE, VIEW = 7, 5, 24


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


def png(pixels: np.ndarray) -> bytes:
    return saved(Image.fromarray(pixels), "PNG")


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
    examples = [Example(i, png(noise(32, 32, i)), label, probabilities) for i, label in enumerate((1, -1))]
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
    missed, hit = (np.asarray(predictions([Example(0, png(noise(32, 32)), i, probabilities)], str)) for i in (0, 1))
    full = WIDTH - MARGIN - (MARGIN + SIDE + GAP)
    assert ends(missed, "#bcd3e3") == [round(full * probability) for probability in (0.3, 0.25, 0.2, 0.15, 0.05)]
    assert ends(missed, "#f3c5c1") == []
    assert has(missed, RED).any()
    assert (missed[63:97] != hit[63:97]).any(2).any(0).nonzero()[0].max() > 260  # "(missed)" stands beside the label


def test_neighbours_stand_apart_from_the_query() -> None:
    pictures = [noise(41, 41, seed) for seed in range(7)]
    distances = (0.0, 1e-30, 1.5, float("inf"), 6.0, 7.5)
    near = [Neighbour(i, png(pictures[i + 1]), 2 if i == 2 else 3, distances[i]) for i in range(6)]
    query = Example(0, png(pictures[0]), 2, np.zeros(5))
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


# The views of a sample


def stored(dataset: manifest.Manifest) -> np.ndarray:
    with SampleReader(dataset, "train") as reader:
        return np.asarray(Image.open(io.BytesIO(reader.read(np.array([SAMPLE]))[0].tobytes())))


@pytest.mark.parametrize("lighting", ["code", "paper", "off"])
def test_views_are_what_the_loader_gives(small: Path, lighting: str) -> None:
    dataset = manifest.load(small)
    mean = dataset.statistics().mean_image[4:28, 4:28]
    options = augment.Transform(view=VIEW, lighting=lighting)
    expected = first_views(stored(dataset), options, dataset.statistics(), SEED, SAMPLE)
    images: list[np.ndarray] = []
    with Loader(dataset, "train", batch_size=16, seed=SEED, device="cpu", view=VIEW, lighting=lighting) as loader:
        while len(images) < len(expected):
            batch = next(loader)
            images += [batch.images[i].numpy() for i in (np.asarray(batch.ids) == SAMPLE).nonzero()[0]]
    divisor = 1.1 if lighting == "code" else 1.0
    for image, view in zip(images, expected):
        x = (view.pixels - mean + view.shift) / divisor
        assert np.abs(image - x.transpose(2, 0, 1)).max() < 1e-3
    assert any(view.shift.any() for view in expected) == (lighting != "off")
    assert len({(view.top, view.left, view.mirrored) for view in expected}) > 3


def test_the_sheet_of_a_sample_shows_its_views_and_crop_boxes(small: Path) -> None:
    dataset, options = manifest.load(small), augment.Transform(view=VIEW)
    pixels, statistics = stored(dataset), dataset.statistics()
    sheet = np.asarray(augmentation(pixels, options, statistics, SEED, SAMPLE))
    views = first_views(pixels, options, statistics, SEED, SAMPLE)
    zoom, tops = 192 // VIEW, set()
    for i, view in enumerate(views):
        left = 16 + i % 3 * (192 + 16) + (192 - zoom * VIEW) // 2
        lit = np.clip(np.rint(pixels[4:28, 4:28].astype(float) + view.shift), 0, 255).astype(np.uint8)
        for kind, shown in (("cut", view.pixels), ("lit", lit)):
            tile = shown.repeat(zoom, 0).repeat(zoom, 1)
            strip = sheet[:, left : left + len(tile)]
            (top,) = [y for y in range(len(strip) - len(tile)) if (strip[y : y + len(tile)] == tile).all()]
            tops.add((kind, i // 3, top))
    assert [kind for kind, _, _ in sorted(tops, key=lambda row: row[2])] == ["cut", "cut", "lit", "lit"]

    zoom = 512 // len(pixels)
    tile = pixels.repeat(zoom, 0).repeat(zoom, 1)[-zoom:, -zoom:]  # of the corner: no box of these views covers it
    strip = sheet[:900, 16 + 512 - zoom : 16 + 512]
    (corner,) = [y for y in range(len(strip) - zoom) if (strip[y : y + zoom] == tile).all()]
    boxes, colour = sheet[corner + zoom - 512 : corner + zoom, 16 : 16 + 512], ImageColor.getrgb(COLOURS[5])
    left, top, side = views[-1].left * zoom, views[-1].top * zoom, VIEW * zoom  # drawn above the others
    assert (boxes[top + side - 1, left + 3 : left + side - 3] == colour).all()
    assert (boxes[top + 3 : top + side - 3, left] == colour).all()


def test_runs_without_lighting_and_views_that_do_not_fit(small: Path) -> None:
    dataset = manifest.load(small)
    pixels, statistics = stored(dataset), dataset.statistics()
    off = augment.Transform(view=VIEW, lighting="off", crop_chunk=32)
    lit, dark = (augmentation(pixels, kind, statistics, SEED, SAMPLE) for kind in (augment.Transform(view=VIEW), off))
    assert lit.height - dark.height > 150
    with pytest.raises(UserError, match="images of 32 pixels"):
        augmentation(pixels, augment.Transform(), statistics, SEED, SAMPLE)
