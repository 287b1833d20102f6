"""Draw the sheets of a run: predictions, nearest training pictures, the views of a sample; and the parts of a sheet."""

import io
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from unicodedata import combining, normalize

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipeline import UserError
from pipeline.manifest import Statistics
from pipeline.online import augment
from trainer.figures.gather import Example, Neighbour, Similar
from trainer.probabilities import top

INK, SOFT, PALE, RED = "#1c2733", "#55626d", "#eef1f4", "#b3261e"
WIDTH, MARGIN = 640, 16  # pixels, of a sheet: a phone shows it at half its size, a page of paper at its own
SMALL, TEXT, TITLE = 17, 19, 22  # pixels, of letters
LONGEST = 1000  # characters of a text, which are wider than any sheet
BOLD = 0.35  # pixels added around each letter: the font has one weight
FINE = 4  # a tick is drawn so many times as large and reduced, for smooth edges
ALIKE = str.maketrans("−–—‐‑×’‘“”", "-----x''\"\"")  # ASCII that looks like it

ACROSS = 3  # pictures in a row
SIDE, GAP = 184, 20  # pixels: of the box of a picture, and what is beside it
LABEL, ROW, BAR = 34, 30, 27  # pixels high: a true label, a guess, its bar
PERCENT = 72  # pixels: kept for the probability
OTHER_BAR, TRUE_BAR = "#bcd3e3", "#f3c5c1"  # pale, for there is text on them
NEAR_GAP = 14  # pixels between two neighbours
NEAR = (WIDTH - 2 * MARGIN - SIDE - GAP - (ACROSS - 1) * NEAR_GAP) // ACROSS  # pixels, of a neighbour's box
EPOCHS, VIEW_GAP = 6, 16  # epochs whose views are shown, pixels between two
VIEW = (WIDTH - 2 * MARGIN - (ACROSS - 1) * VIEW_GAP) // ACROSS  # pixels, of the box of a view
STORED = 512  # pixels, of the box of the stored picture
TAG, LINES = 24, 52  # pixels: of the number of a crop box; of two lines beneath a view
COLOURS = ("#1f5f8b", "#b4530f", "#3b7d3b", "#7a3e9d", "#00737a", "#a6195a")  # of the epochs

Words = Callable[[int], str]  # of a label; −1: "no label"


def predictions(examples: Sequence[Example], words: Words) -> Image.Image:
    """Return the sheet of examples, each with its true label and the five most probable ones as bars."""
    text = "At the top each picture's true label, then the most probable labels; the true one is red and ticked."
    return titled("Predictions", [_prediction(example, words) for example in examples], text)


def neighbours(similar: Similar, words: Words) -> Image.Image:
    """Return the sheet of queries, each with its nearest training pictures. Those of its own label are ticked."""
    text = (
        "At the left a picture that was looked for; beside it the training pictures nearest to it by the Euclidean "
        "distance of their features in the last hidden layer. Those of the same label are red and ticked."
    )
    return titled("Nearest training pictures", [_similar(query, near, words) for query, near in similar], text)


def titled(title: str, parts: Sequence[Image.Image], note: str) -> Image.Image:
    """Return a sheet of parts, one beneath the other, with a title above and a note beneath."""
    rows = [paragraph(title, TITLE, INK, bold=True), *parts, paragraph(note)]
    sheet, top = blank(sum(row.height + MARGIN for row in rows) + MARGIN), MARGIN
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + MARGIN
    return sheet


def _prediction(example: Example, words: Words) -> Image.Image:
    """Return a part with an example at the left, its true label and its bars at the right."""
    best = top(example.probabilities).tolist()
    left, part = MARGIN + SIDE + GAP, blank(max(SIDE, LABEL + ROW * len(best)))
    put(part, (MARGIN, 0), example.pixels, SIDE)
    labelled = example.label >= 0
    missed = " (missed)" if labelled and example.label not in best else ""
    name = fitted(words(example.label), WIDTH - MARGIN - left - length(missed, SMALL), TEXT, labelled)
    end = left + write(part, (left, LABEL // 2 - 2), name, TEXT, RED if labelled else SOFT, "lm", labelled)
    write(part, (end + 6, LABEL // 2 - 2), missed, SMALL, SOFT, "lm")
    for i, label in enumerate(best):
        _bar(part, LABEL + i * ROW, words(label), float(example.probabilities[label]), label == example.label)
    return part


def _bar(part: Image.Image, top: int, words: str, probability: float, true: bool) -> None:
    """Draw a guess on its bar, whose full width is 100 %."""
    left, end, middle = MARGIN + SIDE + GAP, WIDTH - MARGIN, top + BAR // 2
    pen = ImageDraw.Draw(part)
    pen.rectangle([left, top, end - 1, top + BAR - 1], PALE)
    if (wide := round((end - left) * probability)) > 0:
        pen.rectangle([left, top, left + wide - 1, top + BAR - 1], TRUE_BAR if true else OTHER_BAR)
    start = left + 6 + (tick(part, left + 6, middle) if true else 0)
    colour = RED if true else INK
    write(part, (start, middle), words, SMALL, colour, "lm", true, end - PERCENT - start)
    write(part, (end - 6, middle), f"{100 * probability:.1f} %", SMALL, colour, "rm", true)


def _similar(query: Example, near: Sequence[Neighbour], words: Words) -> Image.Image:
    """Return a part with a query at the left, and at the right its neighbours, three in a row."""
    pitch = NEAR + 52
    part = blank(max(SIDE + 28, -(-len(near) // ACROSS) * pitch))
    put(part, (MARGIN, 0), query.pixels, SIDE)
    colour = INK if query.label >= 0 else SOFT
    write(part, (MARGIN, SIDE + 14), words(query.label), TEXT, colour, "lm", query.label >= 0, SIDE)
    for i, neighbour in enumerate(near):
        left, top = MARGIN + SIDE + GAP + i % ACROSS * (NEAR + NEAR_GAP), i // ACROSS * pitch
        put(part, (left, top), neighbour.pixels, NEAR)
        same, middle = neighbour.label == query.label, top + NEAR + 13
        start = left + (tick(part, left, middle) if same else 0)
        colour = RED if same else INK if neighbour.label >= 0 else SOFT
        write(part, (start, middle), words(neighbour.label), SMALL, colour, "lm", same, left + NEAR - start)
        write(part, (left, top + NEAR + 24), distance(neighbour), SMALL, SOFT)
    return part


def distance(neighbour: Neighbour) -> str:
    """Return a neighbour's distance with four digits."""
    return f"{neighbour.distance:#.4g}".rstrip(".")


@dataclass(frozen=True)
class View:
    """A sample as training sees it in one epoch."""

    top: int  # pixels
    left: int
    mirrored: bool
    pixels: np.ndarray  # (view, view, 3) uint8: as cut, and mirrored
    shift: np.ndarray  # (3,) float32, grey levels of red, green and blue that lighting adds; 0 if there is none


def first_views(
    stored: np.ndarray, options: augment.ViewOptions, statistics: Statistics, seed: int, sample: int
) -> list[View]:
    """Return the views of a sample in the first epochs: stored (size, size, 3) uint8, in a run with this seed.

    These are a run's own numbers, unless several samples share a crop (`crop_chunk`); the lighting, while it lasts.

    Raises:
        UserError: no view fits in the picture.
    """
    transform = augment.AlexNet(options, statistics, len(stored), seed)
    views = []
    for epoch in range(EPOCHS):
        draws = transform.draws(epoch, np.array([sample]))
        (top, left), mirrored = draws.crop[0].tolist(), bool(draws.flip[0])
        lighting = augment.lighting_shift(draws.normals, statistics, options.lighting)[0]
        shift = lighting if options.lit(0) else np.zeros_like(lighting)
        view = augment.reference_view(stored, top, left, mirrored, options.view)
        views.append(View(top, left, mirrored, view, shift))
    return views


def augmentation(
    stored: np.ndarray, options: augment.ViewOptions, statistics: Statistics, seed: int, sample: int
) -> Image.Image:
    """Return the sheet of one sample as stored, (size, size, 3) uint8, and of its `first_views`."""
    views = first_views(stored, options, statistics, seed, sample)
    boxes = [f"top {view.top}, left {view.left}{', mirrored' if view.mirrored else ''}" for view in views]
    parts = [
        paragraph("As stored, with the crop boxes of the first six epochs", TEXT, INK),
        _crop_boxes(stored, views, options.view),
        paragraph(f"The views of {options.view} × {options.view} pixels, as cut and mirrored", TEXT, INK),
        grid([view.pixels for view in views], VIEW, VIEW_GAP, boxes),
    ]
    if options.lit(0):
        middle = (len(stored) - options.view) // 2
        centre = augment.reference_view(stored, middle, middle, False, options.view)
        lit = [np.clip(np.rint(centre + view.shift), 0, 255).astype(np.uint8) for view in views]
        title = "The centre view with each epoch's lighting: grey levels added to red, green and blue"
        added = ["{:+.1f}, {:+.1f}, {:+.1f}".format(*view.shift) for view in views]
        parts += [paragraph(title, TEXT, INK), grid(lit, VIEW, VIEW_GAP, added)]
    else:
        parts.append(paragraph("This run has no lighting.", TEXT, INK))
    return titled(f"Sample {sample} in training with seed {seed}", parts, _note(options))


def _note(options: augment.ViewOptions) -> str:
    divided = f", and divided by {options.divisor(0):g}" if options.divisor(0) != 1 else ""
    shared = f" In this run {options.crop_chunk} samples in a row share the crop of their first: not that shown here."
    return (
        "Crop, mirroring and lighting are functions of the seed, the epoch and the sample's number. Colours are "
        f"clipped to what a screen shows; the network sees them unclipped, less the mean{divided}."
        f"{shared if options.crop_chunk > 1 else ''}"
    )


def _crop_boxes(stored: np.ndarray, views: Sequence[View], side: int) -> Image.Image:
    """Return the stored picture with a numbered crop box for each epoch."""
    shown = picture(stored, STORED)
    part, scale = blank(shown.height + MARGIN), shown.width / len(stored)
    part.paste(shown, (MARGIN, 0))
    pen = ImageDraw.Draw(part)
    for view, colour in zip(views, COLOURS):
        left, top = MARGIN + view.left * scale, view.top * scale
        pen.rectangle([left, top, left + side * scale - 1, top + side * scale - 1], outline=colour, width=3)
    for epoch, view in enumerate(views):  # above all boxes, each at another position of its own box's top
        x, y = MARGIN + (view.left + side * (epoch + 0.5) / EPOCHS) * scale, view.top * scale
        pen.rectangle([x - TAG / 2, y, x + TAG / 2, y + TAG], COLOURS[epoch])
        write(part, (x, y + TAG / 2), str(epoch), SMALL, "white", "mm", bold=True)
    return part


def grid(tiles: Sequence[np.ndarray] | np.ndarray, side: int, gap: int, captions: Sequence[str] = ()) -> Image.Image:
    """Return pictures in rows, as many in each as fit; with captions each has its epoch and its caption beneath."""
    across, down = max(1, (WIDTH - 2 * MARGIN + gap) // (side + gap)), side + gap + (LINES if captions else 0)
    part = blank(-(-len(tiles) // across) * down - gap)
    for i, tile in enumerate(tiles):
        left, top = MARGIN + i % across * (side + gap), i // across * down
        put(part, (left, top), tile, side)
        if captions:
            write(part, (left, top + side + 4), f"epoch {i}", SMALL, COLOURS[i], bold=True, width=side)
            write(part, (left, top + side + 26), captions[i], SMALL, SOFT, width=side)
    return part


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
    if length(full, size, bold) <= width:
        return full
    if length(first, size, bold) <= width:
        return first
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
    shown = fitted(text, width, size, bold)
    ImageDraw.Draw(sheet).text(position, shown, colour, font(size), anchor, stroke_width=BOLD * bold)
    return length(shown, size, bold)


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


def png(sheet: Image.Image) -> bytes:
    """Return the bytes of a PNG file."""
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def picture(pixels: np.ndarray, side: int) -> Image.Image:
    """(n, n, 3) uint8 → a picture in a square box: reduced, or as it is, or magnified a whole number of times.

    Small pictures are magnified without smoothing: their pixels are what the network sees.
    """
    image, times = Image.fromarray(pixels), side // len(pixels)
    if times == 0:
        return image.resize((side, side), Image.Resampling.LANCZOS)
    return ImageOps.scale(image, times, Image.Resampling.NEAREST)


def put(sheet: Image.Image, position: tuple[int, int], pixels: np.ndarray, side: int) -> None:
    """Draw a picture in the middle of a square box, whose left and top are given."""
    shown = picture(pixels, side)
    margin = (side - shown.width) // 2
    sheet.paste(shown, (position[0] + margin, position[1] + margin))
