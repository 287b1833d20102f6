"""Figure 4 of the paper, left: pictures with their true labels, and the five labels that are thought most probable."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from trainer.figures.drawing import (
    INK,
    MARGIN,
    PALE,
    RED,
    SMALL,
    SOFT,
    TEXT,
    WIDTH,
    blank,
    fitted,
    heading,
    length,
    paragraph,
    put,
    stacked,
    write,
)
from trainer.figures.strokes import tick

ACROSS, GAP = 4, 40  # cards in a row; pixels between two
SIDE = (WIDTH - 2 * MARGIN - (ACROSS - 1) * GAP) // ACROSS  # pixels: of a card's width and of its picture's box
LABEL, ROW, BAR = 30, 27, 23  # pixels high: the true label, a guess, its bar
PERCENT = 66  # pixels: kept for the probability
OTHERS, TRUE = "#bcd3e3", "#f3c5c1"  # of bars: pale, for there is text on them


@dataclass(frozen=True)
class Card:
    """A picture, (height, width, 3) uint8, and what was made of it.

    Args:
        true: the words of its label; None: it has none.
        guesses: words and probability, the most probable first.
        correct: which of the guesses is the true label; None: none of them.
    """

    pixels: np.ndarray
    true: str | None
    guesses: Sequence[tuple[str, float]]
    correct: int | None


def predictions(cards: Sequence[Card]) -> Image.Image:
    """The cards, four in a row. The true label is red, bold and ticked."""
    rows = [cards[start : start + ACROSS] for start in range(0, len(cards), ACROSS)]
    text = "Under each picture its true label, then the labels that the network thinks most probable; the true one is "
    return stacked(heading("Predictions"), *(_row(row) for row in rows), paragraph(text + "red and ticked."))


def _row(cards: Sequence[Card]) -> Image.Image:
    part = blank(SIDE + LABEL + ROW * max(len(card.guesses) for card in cards) + 8)
    for i, card in enumerate(cards):
        left = MARGIN + i * (SIDE + GAP)
        put(part, (left, 0), card.pixels, SIDE)
        _label(part, left, card)
        for j, (words, chance) in enumerate(card.guesses):
            _bar(part, (left, SIDE + LABEL + 8 + j * ROW), words, chance, j == card.correct)
    return part


def _label(part: Image.Image, left: int, card: Card) -> None:
    """The true label in the middle beneath the picture, and whether it is not among the guesses."""
    words, colour = (card.true, RED) if card.true is not None else ("no label", SOFT)
    missed = " (missed)" if card.true is not None and card.correct is None else ""
    words = fitted(words, SIDE - length(missed, SMALL), TEXT, bold=card.true is not None)
    wide = length(words, TEXT, bold=True) + length(missed, SMALL)
    start, middle = left + (SIDE - wide) / 2, SIDE + LABEL // 2 + 2
    start += write(part, (start, middle), words, TEXT, colour, "lm", bold=card.true is not None)
    write(part, (start, middle), missed, SMALL, SOFT, "lm")


def _bar(part: Image.Image, place: tuple[int, int], words: str, chance: float, true: bool) -> None:
    """A guess on its bar, whose whole width is 100 %."""
    left, top = place
    pen, foot, middle = ImageDraw.Draw(part), top + BAR - 1, top + BAR // 2
    pen.rectangle([left, top, left + SIDE - 1, foot], PALE)
    if (wide := round(SIDE * chance)) > 0:
        pen.rectangle([left, top, left + wide - 1, foot], TRUE if true else OTHERS)
    colour, start = (RED, left + 6 + tick(part, (left + 6, middle), RED)) if true else (INK, left + 6)
    write(part, (start, middle), words, SMALL, colour, "lm", true, left + SIDE - PERCENT - start)
    write(part, (left + SIDE - 6, middle), f"{100 * chance:.1f} %", SMALL, colour, "rm", true)
