"""Draw the parts of a sheet: text, pictures in boxes, parts one beneath the other."""

import io
from bisect import bisect_right
from functools import cache
from unicodedata import combining, normalize

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline import UserError

INK, SOFT, PALE, RED = "#1c2733", "#55626d", "#eef1f4", "#b3261e"
WIDTH, MARGIN = 640, 16  # pixels, of a sheet: a phone shows it at half its size, a page of paper at its own
SMALL, TEXT, TITLE = 17, 19, 22  # pixels, of letters
LONGEST = 1000  # characters of a text, which are wider than any sheet
BOLD = 0.35  # pixels added around each letter: the font has one weight
FINE = 4  # a tick is drawn so many times as large and reduced, for smooth edges

ALIKE = str.maketrans("−–—‐‑×’‘“”", "-----x''\"\"")  # ASCII that looks like it


def blank(height: int) -> Image.Image:
    """Return a white part of a sheet."""
    return Image.new("RGB", (WIDTH, height), "white")


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's own font, the same on every machine. Raises UserError if Pillow has no FreeType."""
    try:
        loaded = ImageFont.load_default(size=size)
    except ImportError as error:
        raise UserError(
            f"Pillow was built without FreeType ({error}), so it cannot write; install FreeType's headers "
            "(libfreetype-dev) and build pillow-simd anew: pip install --force-reinstall --no-deps "
            "--no-binary pillow-simd pillow-simd"
        ) from error
    assert isinstance(loaded, ImageFont.FreeTypeFont)
    return loaded


def drawable(text: str) -> str:
    """Return the text in ASCII, which the font has: without accents; of other scripts escapes, such as `\\u732b`."""
    plain = normalize("NFKD", " ".join(text[:LONGEST].translate(ALIKE).split()))
    characters = (character for character in plain if not combining(character))
    return "".join(c if " " <= c <= "~" else c.encode("unicode_escape").decode() for c in characters)


def length(text: str, size: int = TEXT, bold: bool = False) -> float:
    """Return the width of a drawable text in pixels."""
    return font(size).getlength(text) + 2 * BOLD * bold


def fitted(text: str, width: float, size: int = TEXT, bold: bool = False) -> str:
    """Return as much of a text as fits: all; what precedes its first comma, as synsets list synonyms; a beginning."""
    full = drawable(text)
    first = full.partition(",")[0]
    for choice in (full, first):
        if length(choice, size, bold) <= width:
            return choice
    fits = bisect_right(range(1, len(first)), width, key=lambda n: length(first[:n] + "…", size, bold))
    return first[:fits].rstrip() + "…"


def write(
    sheet: Image.Image,
    position: tuple[float, float],
    text: str,
    size: int = TEXT,
    colour: str = INK,
    anchor: str = "la",
    bold: bool = False,
    width: float = float("inf"),
) -> float:
    """Write as much as fits in `width`; `anchor` as Pillow has it. Returns its width in pixels."""
    words = fitted(text, width, size, bold)
    ImageDraw.Draw(sheet).text(position, words, colour, font(size), anchor, stroke_width=BOLD * bold)
    return length(words, size, bold)


def tick(sheet: Image.Image, left: float, middle: float, colour: str = RED) -> float:
    """Draw a ✓, which the font lacks. Returns its width in pixels."""
    mask = Image.new("L", (16 * FINE, 14 * FINE))
    points = [(x * FINE, y * FINE) for x, y in ((2, 7), (6, 11), (14, 3))]
    ImageDraw.Draw(mask).line(points, 255, round(2.5 * FINE), "curve")
    small = mask.reduce(FINE)
    sheet.paste(colour, (round(left), round(middle) - small.height // 2), small)
    return small.width + 3


def paragraph(text: str, size: int = SMALL, colour: str = SOFT, bold: bool = False) -> Image.Image:
    """Return a part with as many lines of text as it takes."""
    lines: list[str] = []
    for word in drawable(text).split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and length(longer, size, bold) <= WIDTH - 2 * MARGIN:
            lines[-1] = longer
        else:
            lines.append(word)
    height = round(1.4 * size)
    part = blank(height * len(lines))
    for i, line in enumerate(lines):
        write(part, (MARGIN, i * height), line, size, colour, bold=bold, width=WIDTH - 2 * MARGIN)
    return part


def stacked(*parts: Image.Image, gap: int = 16) -> Image.Image:
    """Return a sheet of parts, one beneath the other, with margins above and below."""
    sheet = blank(sum(part.height for part in parts) + gap * (len(parts) - 1) + 2 * MARGIN)
    top = MARGIN
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height + gap
    return sheet


def png(sheet: Image.Image) -> bytes:
    """Return the bytes of a PNG file."""
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def picture(pixels: np.ndarray, side: int) -> Image.Image:
    """(height, width, 3) uint8 → a picture in a square box: reduced, or as it is, or magnified a whole number of times.

    Small pictures are magnified without smoothing: their pixels are what the network sees.
    """
    image, longest = Image.fromarray(pixels), max(pixels.shape[:2])
    if longest <= side:
        return image.resize(
            (image.width * (side // longest), image.height * (side // longest)), Image.Resampling.NEAREST
        )
    size = (max(1, round(image.width * side / longest)), max(1, round(image.height * side / longest)))
    return image.resize(size, Image.Resampling.LANCZOS)


def put(sheet: Image.Image, position: tuple[int, int], pixels: np.ndarray, side: int) -> None:
    """Draw a picture in the middle of a square box, whose left and top are given."""
    shown = picture(pixels, side)
    sheet.paste(shown, (position[0] + (side - shown.width) // 2, position[1] + (side - shown.height) // 2))
