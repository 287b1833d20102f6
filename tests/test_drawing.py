"""What sheets are made of: text that is not boxes and does not overflow; pictures, lines and bars in their places."""

from itertools import pairwise
from math import hypot

import numpy as np
import pytest
from PIL import ImageColor, ImageFont

from pipeline import UserError
from trainer.figures.drawing import (
    MARGIN,
    RED,
    WIDTH,
    blank,
    drawable,
    fitted,
    font,
    paragraph,
    picture,
    put,
    wrapped,
    write,
)
from trainer.figures.neighbours import Neighbour, Row, neighbours
from trainer.figures.predictions import Card, predictions
from trainer.figures.strokes import area, dashes, dot, line, tick

FONT = ImageFont.load_default(size=17)
INK = (28, 39, 51)
WHALE = "grey whale, gray whale, devilfish, Eschrichtius gibbosus, Eschrichtius robustus"
WORDS = (
    "crème brûlée",
    "cre\u0300me",
    "Ångström × 5 − 3",
    "Straße",
    "猫",
    "Ёж",
    "한국",
    "½ m²",
    "a\tb\nc",
    "ﬁn",
    "ø",
    "😀",
    "\ud800",
)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def has(sheet: np.ndarray, colour: str) -> np.ndarray:
    """(height, width) bool: where a sheet has a colour."""
    return (sheet == ImageColor.getrgb(colour)).all(2)


@pytest.mark.parametrize("words", WORDS)
def test_no_character_becomes_a_box(words: str) -> None:
    box = bytes(FONT.getmask("\U0010ffff"))
    found = drawable(words)
    assert found
    assert all(bytes(FONT.getmask(character)) != box for character in found)


def test_what_cannot_be_drawn_is_spelled() -> None:
    assert drawable("crème brûlée") == "creme brulee"
    assert drawable("cre\u0300me") == "creme"
    assert drawable("−3 × 4 – Straße") == "-3 x 4 - Strasse"
    assert drawable("猫 x") == "\\u732b x"
    assert drawable("\x1b[31m\x07") == "\\x1b[31m\\x07"
    assert drawable("it’s “so” …") == "it’s “so” …"


@pytest.mark.parametrize("width", [40, 100, 171, 250, 999])
@pytest.mark.parametrize("words", [WHALE, "Supercalifragilisticexpialidocious", "x" * 5000, "猫" * 50])
def test_text_fits(words: str, width: int) -> None:
    found = fitted(words, width)
    assert FONT.getlength(found) <= width
    whole = drawable(words)
    if found.endswith("…"):
        shown = len(found) - 1
        assert whole.startswith(found[:-1])
        assert FONT.getlength(whole[: shown + 1].rstrip() + "…") > width or whole[shown] == " "
    else:
        assert found in (whole, whole.split(",")[0])


def test_text_stays_in_its_width() -> None:
    sheet = blank(30, 400)
    write(sheet, (10, 5), "whale " * 30, bold=True, width=150)
    dark = (np.asarray(sheet) < 255).any(2).any(0).nonzero()[0]
    assert dark.min() >= 10
    assert 130 < dark.max() <= 160


def test_paragraphs_lose_no_word() -> None:
    words = " ".join([WHALE] * 8)
    lines = wrapped(words, 500)
    assert " ".join(lines) == words
    assert len(lines) > 5
    assert all(FONT.getlength(each) <= 500 for each in lines)
    assert all(FONT.getlength(f"{one} {other.split()[0]}") > 500 for one, other in pairwise(lines))
    part = np.asarray(paragraph(words))
    assert (part[:, WIDTH - MARGIN + 2 :] == 255).all()
    assert (part[-24:] < 255).any()


def test_a_pillow_that_cannot_write_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_freetype(size: float) -> None:
        raise ImportError("The _imagingft C module is not installed")

    monkeypatch.setattr(ImageFont, "load_default", without_freetype)
    with pytest.raises(UserError, match=r"without FreeType .*libfreetype-dev"):
        font(31)  # pixels that nobody has asked for before


def test_small_pictures_are_magnified_exactly_and_large_ones_fit() -> None:
    small = noise(24, 20)
    assert (np.asarray(picture(small, 100)) == small.repeat(4, 0).repeat(4, 1)).all()
    assert (np.asarray(picture(small, 24)) == small).all()
    even = np.full((900, 300, 3), 77, np.uint8)
    assert picture(even, 90).size == (30, 90)
    assert (np.asarray(picture(even, 90)) == 77).all()
    assert picture(noise(1, 5000), 100).size == (100, 1)


def test_a_picture_is_in_the_middle_of_its_box() -> None:
    sheet = blank(120, 140)
    put(sheet, (30, 10), noise(20, 40), 100)
    found = np.asarray(sheet)
    expected = np.full((120, 140, 3), 255, np.uint8)
    expected[40:80, 40:120] = noise(20, 40).repeat(2, 0).repeat(2, 1)
    assert (found == expected).all()


def test_lines_go_through_their_points() -> None:
    sheet = blank(100, 200)
    line(sheet, [(10, 20), (190, 20)], "#1c2733", 3)
    line(sheet, [(50, -5), (50, 300)], "#1c2733", 3)  # and what lies outside does no harm
    dot(sheet, (150, 70), "#1c2733", 5)
    area(sheet, [(100, 40), (120, 40), (120, 60), (100, 60)], "#000000", 0.25)
    found = np.asarray(sheet)
    assert (found[20, 11:190] == INK).all()
    assert (found[19:22, 100] == INK).all()
    assert (found[:, 50] == INK).all()
    assert (found[15, 60:200] == 255).all()
    assert (found[66:75, 150] == INK).all()
    assert (found[78, 140:160] == 255).all()
    assert (found[45:55, 105:115] == round(255 * 0.75)).all()


def test_dashes_have_their_lengths() -> None:
    corners = [(0.0, 0.0), (33.0, 0.0), (33.0, 54.0), (0.0, 54.0)]
    pieces = list(dashes(corners, 10, 7))
    lengths = [sum(hypot(c - a, d - b) for (a, b), (c, d) in pairwise(piece)) for piece in pieces]
    assert lengths == pytest.approx([10] * 7 + [120 - 7 * 17])
    assert pieces[0] == [(0, 0), (10, 0)]
    assert pieces[1] == [(17, 0), (27, 0)]
    assert pieces[2] == [pytest.approx((33, 1)), pytest.approx((33, 11))]


def place_of(tile: np.ndarray, sheet: np.ndarray) -> tuple[int, int]:
    """Left and top of the only place where a sheet holds a tile in its first row of pictures."""
    height, width = tile.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(sheet[:120], (1, width, 3))[:, :, 0, 0]
    starts = np.argwhere((windows == tile[0]).all((2, 3))).tolist()
    (found,) = [(left, top) for top, left in starts if (sheet[top : top + height, left : left + width] == tile).all()]
    return found


def cards() -> list[Card]:
    guesses = [("tench", 0.5), ("goldfish", 0.25), ("猫", 0.125), (WHALE, 0.0625), ("hen", 0.0)]
    return [Card(noise(32, 32), "goldfish", guesses, 1), Card(noise(32, 32, 1), WHALE, guesses[:2], None)]


def test_predictions_are_drawn_to_scale() -> None:
    sheet = np.asarray(predictions(cards()))
    assert sheet.shape[1] == WIDTH
    side = (WIDTH - 2 * MARGIN - 3 * 40) // 4
    tile = noise(32, 32).repeat(8, 0).repeat(8, 1)
    left, top = place_of(tile, sheet)
    assert left == MARGIN + (side - 256) // 2
    first = sheet[top + 280 :, MARGIN : MARGIN + side]
    assert ends(first, "#bcd3e3") == [round(side * chance) for chance in (0.5, 0.125, 0.0625)]
    assert ends(first, "#f3c5c1") == [round(side * 0.25)]


def ends(card: np.ndarray, colour: str) -> list[int]:
    """How far each bar of a colour reaches, by its first row of pixels, where no text is."""
    rows = has(card, colour).any(1)
    return [int(has(card[row : row + 1], colour).sum()) for row in (rows & ~np.roll(rows, 1)).nonzero()[0]]


def test_the_true_label_is_red_and_ticked_where_it_is() -> None:
    sheet = np.asarray(predictions(cards()))
    right, wrong = sheet[:, : WIDTH // 4], sheet[:, WIDTH // 4 : WIDTH // 2]
    bars = slice(24 + 31 + 16 + 258 + 32, -60)
    assert has(right[bars], RED).any()
    assert not has(wrong[bars], RED).any()
    assert has(wrong, RED).any()  # the label itself
    marked = blank(30, 60)
    tick(marked, (0, 15), RED)
    mark = has(np.asarray(marked), RED)
    mark = mark[np.ix_(mark.any(1), mark.any(0))]
    assert _holds(has(right[bars], RED), mark)
    assert not _holds(has(wrong, RED), mark)


def _holds(sheet: np.ndarray, mark: np.ndarray) -> bool:
    windows = np.lib.stride_tricks.sliding_window_view(sheet, mark.shape)
    return bool((windows == mark).all((2, 3)).any())


def test_neighbours_stand_apart_from_the_query() -> None:
    pictures = [noise(49, 49, seed) for seed in range(7)]
    found = [Neighbour(each, WHALE, 1.5 * i, same=i == 2) for i, each in enumerate(pictures[1:])]
    sheet = np.asarray(neighbours([Row(pictures[0], WHALE, found), Row(pictures[1], None, ())]))
    lefts = [place_of(each.repeat(3, 0).repeat(3, 1), sheet)[0] for each in pictures]
    steps = np.diff(lefts)
    assert len(set(steps[1:])) == 1
    assert steps[0] == steps[1] + 48 - 12
    red = has(sheet[:300], RED).any(0).nonzero()[0]
    assert lefts[3] - 3 <= red.min()
    assert red.max() < lefts[4]
