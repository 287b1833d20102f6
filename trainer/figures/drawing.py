"""What every sheet is made of: text that the font can show, pictures in boxes, parts one beneath the other."""

import io
from bisect import bisect_right
from functools import cache, lru_cache
from unicodedata import combining, normalize

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline import UserError

INK, SOFT, LINE, PALE = "#1c2733", "#55626d", "#d5dce2", "#eef1f4"
BLUE, ORANGE, RED = "#1f5f8b", "#b4530f", "#b3261e"
COLOURS = (BLUE, ORANGE, "#3b7d3b", "#7a3e9d", "#00737a", "#a6195a", "#76600a", "#3f51b5", "#5b4636", "#4a5560")
WIDTH, MARGIN = 1200, 24  # pixels, of a sheet
SMALL, TEXT, TITLE = 15, 17, 22  # pixels, of letters
LONGEST = 1000  # characters of a text, which are wider than any sheet
BOLD = 0.35  # pixels added around each letter: the font has one weight

Point = tuple[float, float]
# What looks or reads like it where the font, which is ASCII and a few more, does not have it.
ALIKE = str.maketrans({"−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": "x", "•": "·", "„": "“"})
ALIKE |= str.maketrans({"ß": "ss", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "å": "a", "Å": "A"})
ALIKE |= str.maketrans({"đ": "d", "Đ": "D", "ð": "d", "Ð": "D", "ł": "l", "Ł": "L", "þ": "th", "Þ": "Th", "ı": "i"})


def blank(height: int, width: int = WIDTH) -> Image.Image:
    """A white sheet."""
    return Image.new("RGB", (width, height), "white")


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, which is the same on every machine. Raises UserError where Pillow has no FreeType."""
    try:
        found = ImageFont.load_default(size=size)
    except ImportError as error:
        raise UserError(
            f"Pillow was built without FreeType ({error}), so it cannot write; install FreeType's headers "
            "(libfreetype-dev) and build pillow-simd anew: pip install --force-reinstall --no-deps "
            "--no-binary pillow-simd pillow-simd"
        ) from error
    assert isinstance(found, ImageFont.FreeTypeFont)
    return found


def drawable(text: str) -> str:
    """The text in characters that the font has: without accents; of other scripts escapes, such as `\\u732b`."""
    return "".join(_drawable(character) for character in normalize("NFC", text[:LONGEST]).translate(ALIKE))


@lru_cache(4096)
def _drawable(character: str) -> str:
    if character.isspace():
        return " "
    if _in_font(character):
        return character
    plain = "".join(part for part in normalize("NFKD", character) if not combining(part))
    if all(_in_font(part) for part in plain):
        return plain
    return character.encode("unicode_escape").decode("ascii")


def _in_font(character: str) -> bool:
    return _glyph(character) != _glyph("\U0010ffff")  # which no font has: the box that stands for what is missing


@lru_cache(4096)
def _glyph(character: str) -> tuple[tuple[int, int], bytes]:
    mask = font(TEXT).getmask(character)
    return mask.size, bytes(mask)


def length(text: str, size: int = TEXT, bold: bool = False) -> float:
    """How wide a drawable text is, in pixels."""
    return font(size).getlength(text) + 2 * BOLD * bold


def fitted(text: str, width: float, size: int = TEXT, bold: bool = False) -> str:
    """As much of a text as fits: all; what precedes its first comma, as synsets list synonyms; else its beginning."""
    whole = drawable(text)
    first = whole.partition(",")[0]
    for choice in (whole, first):
        if length(choice, size, bold) <= width:
            return choice
    fits = bisect_right(range(1, len(first)), width, key=lambda n: length(first[:n] + "…", size, bold))
    return first[:fits].rstrip() + "…"


def write(
    sheet: Image.Image,
    place: Point,
    text: str,
    size: int = TEXT,
    colour: str = INK,
    anchor: str = "la",
    bold: bool = False,
    width: float = float("inf"),
) -> float:
    """Write as much as fits in `width`; `anchor` as Pillow has it. Returns how wide it is, in pixels."""
    words = fitted(text, width, size, bold)
    ImageDraw.Draw(sheet).text(place, words, colour, font(size), anchor, stroke_width=BOLD * bold)
    return length(words, size, bold)


def wrapped(text: str, width: float, size: int = TEXT) -> list[str]:
    """The text in lines of at most `width` pixels."""
    lines: list[str] = []
    for word in drawable(text).split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and length(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def paragraph(text: str, size: int = TEXT, colour: str = SOFT, width: int = WIDTH) -> Image.Image:
    """A part of a sheet with as many lines of text as it takes."""
    lines, height = wrapped(text, width - 2 * MARGIN, size), round(1.4 * size)
    part = blank(height * len(lines), width)
    for i, line in enumerate(lines):
        write(part, (MARGIN, i * height), line, size, colour, width=width - 2 * MARGIN)
    return part


def stacked(*parts: Image.Image, gap: int = 16) -> Image.Image:
    """A sheet of parts, one beneath the other, with margins above and below."""
    sheet = blank(sum(part.height for part in parts) + gap * (len(parts) - 1) + 2 * MARGIN)
    top = MARGIN
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height + gap
    return sheet


def png(sheet: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def heading(text: str) -> Image.Image:
    """A part with the title of a sheet."""
    part = blank(round(1.4 * TITLE))
    write(part, (MARGIN, 0), text, TITLE, bold=True, width=WIDTH - 2 * MARGIN)
    return part


def picture(pixels: np.ndarray, side: int) -> Image.Image:
    """(height, width, 3) uint8 → a picture in a square box: reduced, or as it is, or magnified a whole number of times.

    Small pictures are magnified without smoothing: their pixels are what the network sees.
    """
    image, most = Image.fromarray(pixels), max(pixels.shape[:2])
    if most <= side:
        return image.resize((image.width * (side // most), image.height * (side // most)), Image.Resampling.NEAREST)
    size = (max(1, round(image.width * side / most)), max(1, round(image.height * side / most)))
    return image.resize(size, Image.Resampling.LANCZOS)


def put(sheet: Image.Image, place: tuple[int, int], pixels: np.ndarray, side: int) -> None:
    """Draw a picture in the middle of a square box, whose left and top are given."""
    shown = picture(pixels, side)
    sheet.paste(shown, (place[0] + (side - shown.width) // 2, place[1] + (side - shown.height) // 2))
