"""Pictures drawn from a seed: classes that differ in shape and texture, not in mean colour."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.floating]  # (height, width), float32 for speed

FOREGROUND = (0.3, 0.4)  # share of the area, one range for all classes: mean colours must not tell them apart


def generator(seed: int, purpose: str, split: str = "train", c: int = 0, index: int = 0) -> np.random.Generator:
    """Return the generator of one picture of class `c`, or of one decision about the set: a function of its key."""
    splits, purposes = ("train", "val"), ("pixels", "kind", "quality", "odd", "numbers", "order")
    return np.random.default_rng([seed, purposes.index(purpose), splits.index(split), c, index])


def ridge(t: Plane) -> Plane:
    """Return 0.5 minus the distance to the nearest integer: a triangle wave of period 1."""
    return np.float32(0.5) - np.abs(t - np.rint(t))


def cells(u: Plane, v: Plane, rng: np.random.Generator) -> tuple[Plane, Plane]:
    """Return coordinates in [-0.5, 0.5] in unit cells, alternate rows shifted by half a cell in half the pictures."""
    row = np.rint(v)
    u = u + np.float32(rng.choice([0.0, 0.5])) * (row % 2)
    return u - np.rint(u), v - row


def relief(pattern: str, u: Plane, v: Plane, rng: np.random.Generator) -> Plane:
    """Return the height (h, w) of a pattern at coordinates u, v (h, w), in periods; it is greatest in the figures."""
    if pattern in ("dots", "triangles", "crosses", "stars"):
        u, v = cells(u, v, rng)
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    match pattern:
        case "stripes":
            return ridge(u)
        case "checkerboard":
            a, b = ridge(u / 2) - np.float32(0.25), ridge(v / 2) - np.float32(0.25)
            return np.sign(a * b) * np.minimum(np.abs(a), np.abs(b))
        case "rings":
            return ridge(radius + np.float32(rng.random()))
        case "dots":
            return -radius
        case "triangles":
            v = v + np.float32(0.12)  # half the inradius: the tip stays inside the cell
            return -np.maximum(np.float32(3**0.5 / 2) * np.abs(u) + v / 2, -v)
        case "crosses":
            a, b = np.abs(u), np.abs(v)
            return -np.minimum(np.maximum(3 * a, b), np.maximum(a, 3 * b))
        case "spirals":
            return ridge(radius + int(rng.choice([-1, 1]) * rng.integers(3, 6)) * (angle / np.float32(2 * np.pi)))
        case "bricks":
            row = np.rint(v)
            along = u / 2 + row % 2 / 2
            return np.maximum(2 * np.abs(along - np.rint(along)) - np.float32(0.5), np.abs(v - row))
        case "waves":
            length, height = rng.uniform(1.6, 2.4), rng.uniform(0.4, 0.55)
            return ridge(v + np.float32(height) * np.sin(u * np.float32(2 * np.pi / length)))
        case "stars":
            turn = angle * np.float32(2.5 / np.pi)  # 1 from tip to tip
            angle = np.abs(turn - np.rint(turn)) * np.float32(np.pi / 2.5)
            return -radius * (np.cos(angle) + 2 * np.sin(angle))  # 2: valleys at half the radius of the tips
        case "rays":
            return ridge(angle * np.float32(rng.integers(8, 15) / (2 * np.pi)))
    raise ValueError(pattern)


class PatternClass(NamedTuple):
    """One class; its ILSVRC2012_ID is its index in CLASSES plus 1."""

    wnid: str
    words: str
    gloss: str
    pattern: str


CLASSES = (  # wnids in no order, as the devkit's are: a label is not an ILSVRC2012_ID minus 1
    PatternClass("n90417263", "striped cloth, stripes", "parallel straight bands of two colours", "stripes"),
    PatternClass("n90128845", "checkerboard, chequer", "squares that alternate in rows and columns", "checkerboard"),
    PatternClass("n90973310", "target, concentric rings", "circles of growing radius about one centre", "rings"),
    PatternClass("n90251197", "polka dots, dots", "round spots in rows on a plain ground", "dots"),
    PatternClass("n90804456", "triangles, pennants", "rows of small triangles, all pointing one way", "triangles"),
    PatternClass("n90036621", "crosses, plus signs", "rows of upright crosses with four equal arms", "crosses"),
    PatternClass("n90665078", "spiral, pinwheel", "arms that wind outwards from one centre", "spirals"),
    PatternClass("n90519904", "brick wall, bricks", "courses of blocks with staggered joints", "bricks"),
    PatternClass("n90347782", "waves, ripples", "bands that swing regularly from side to side", "waves"),
    PatternClass("n90790135", "stars, starry cloth", "rows of stars with five points", "stars"),
    PatternClass("n90182539", "sunburst, rays", "straight wedges that leave one centre in all directions", "rays"),
)


def coordinates(height: int, width: int, rng: np.random.Generator) -> tuple[Plane, Plane]:
    """Return u, v (height, width) float32 of each pixel, in periods: shifted, turned, tilted, bent at random."""
    period = min(height, width) / rng.uniform(3, 6)  # pixels
    x = ((np.arange(width) - width * rng.uniform(0.3, 0.7)) / period).astype(np.float32)
    y = ((np.arange(height) - height * rng.uniform(0.3, 0.7)) / period).astype(np.float32)[:, None]
    lean = (rng.uniform(-0.2, 0.2, 2) * period / max(height, width)).astype(np.float32)
    depth = 1 + lean[0] * x + lean[1] * y
    angle, squeeze = rng.uniform(0, 2 * np.pi), np.float32(rng.uniform(0.8, 1.0))
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = (cosine * x - sine * y) / depth, (sine * x + cosine * y) / (depth * squeeze)
    bend, phase = np.float32(rng.uniform(0, 0.25)), np.float32(rng.uniform(0, 2 * np.pi))
    return u + bend * np.sin(np.float32(0.8) * v + phase), v


def colours(rng: np.random.Generator) -> tuple[Plane, Plane]:
    """Return foreground and background (3, 1, 1) float32, RGB grey levels: the foreground brighter by 70 in luma."""
    pairs = rng.uniform(30, 225, (64, 2, 3)).astype(np.float32)
    luma = pairs @ np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as JPEG
    foreground, background = pairs[np.argmax(luma[:, 0] - luma[:, 1] >= 70), :, :, None, None]
    return foreground, background


def pixels(seed: int, split: str, class_index: int, index: int) -> NDArray[np.uint8]:
    """Draw one picture of a class, (height, width, 3) uint8 RGB, sides 200 to 520 pixels; a function of its key."""
    rng = generator(seed, "pixels", split, class_index, index)
    long = rng.integers(280, 521)
    sides = (max(200, int(long * rng.uniform(0.62, 1.0))), int(long))
    height, width = sides if rng.random() < 0.7 else sides[::-1]

    field = relief(CLASSES[class_index].pattern, *coordinates(height, width, rng), rng)
    threshold = np.quantile(field[::4, ::4], 1 - rng.uniform(*FOREGROUND)).astype(np.float32)
    mask = np.clip((field - threshold) / np.float32(rng.uniform(0.04, 0.12)) + np.float32(0.5), 0, 1)
    foreground, background = colours(rng)
    picture = mask * (foreground - background) + background  # (3, h, w): three times as fast as (h, w, 3)

    patch_h, patch_w = (int(side * rng.uniform(0.05, 0.35)) for side in (height, width))  # something plain in front
    top, left = rng.integers(height - patch_h), rng.integers(width - patch_w)
    picture[:, top : top + patch_h, left : left + patch_w] = rng.uniform(30, 225, (3, 1, 1))

    slope = rng.uniform(-0.3, 0.3, 2).astype(np.float32)
    rows, columns = (np.linspace(-1, 1, side, dtype=np.float32) for side in (height, width))
    picture *= 1 + slope[0] * rows[:, None] + slope[1] * columns
    picture += rng.standard_normal((height, width), np.float32) * np.float32(rng.uniform(2, 8))
    return np.clip(picture, 0, 255).astype(np.uint8).transpose(1, 2, 0)
