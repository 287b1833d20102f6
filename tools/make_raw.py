"""Draw a small ILSVRC2012 in the official layout: tars and devkit as published, pictures from a seed."""

import gzip
import io
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

Plane = NDArray[np.floating]  # (height, width), float32 for speed

SPLITS = ("train", "val")
MAX_SEED = 2**32 - 1  # one word of a SeedSequence, so that no two keys coincide
FOREGROUND = (0.3, 0.4)  # share of the area, one range for all classes: mean colours must not tell them apart


def generator(
    seed: int, purpose: str, split: str = "train", class_index: int = 0, index: int = 0
) -> np.random.Generator:
    """The random numbers of one picture, or of one decision about the whole set, from nothing but its key."""
    purposes = ("pixels", "kind", "quality", "odd", "numbers", "order")
    return np.random.default_rng([seed, purposes.index(purpose), SPLITS.index(split), class_index, index])


# ---------------------------------------------------------------------------------------------------------- patterns
# Each maps coordinates u, v (h, w), one period long per unit, to a height (h, w) that is greatest in the figures.


def ridge(t: Plane) -> Plane:
    """0.5 minus the distance to the nearest integer: a triangle wave of period 1."""
    return np.float32(0.5) - np.abs(t - np.rint(t))


def cells(u: Plane, v: Plane, rng: np.random.Generator) -> tuple[Plane, Plane]:
    """Coordinates in [-0.5, 0.5] within the unit cells, alternate rows shifted by half a cell in half the pictures."""
    row = np.rint(v)
    u = u + np.float32(rng.choice([0.0, 0.5])) * (row % 2)
    return u - np.rint(u), v - row


def stripes(u: Plane, v: Plane, rng: np.random.Generator) -> Plane:
    return ridge(u)


def checkerboard(u: Plane, v: Plane, rng: np.random.Generator) -> Plane:
    a, b = ridge(u / 2) - np.float32(0.25), ridge(v / 2) - np.float32(0.25)
    return np.sign(a * b) * np.minimum(np.abs(a), np.abs(b))


def rings(u: Plane, v: Plane, rng: np.random.Generator) -> Plane:
    return ridge(np.hypot(u, v) + np.float32(rng.random()))


def dots(u: Plane, v: Plane, rng: np.random.Generator) -> Plane:
    return -np.hypot(*cells(u, v, rng))


def triangles(u: Plane, v: Plane, rng: np.random.Generator) -> Plane:
    a, b = cells(u, v, rng)
    b = b + np.float32(0.12)  # half the inradius: the tip stays inside the cell
    return -np.maximum(np.float32(3**0.5 / 2) * np.abs(a) + b / 2, -b)


def crosses(u: Plane, v: Plane, rng: np.random.Generator) -> Plane:
    a, b = (np.abs(c) for c in cells(u, v, rng))
    return -np.minimum(np.maximum(3 * a, b), np.maximum(a, 3 * b))


def spirals(u: Plane, v: Plane, rng: np.random.Generator) -> Plane:
    turns = np.arctan2(v, u) / np.float32(2 * np.pi)
    return ridge(np.hypot(u, v) + int(rng.choice([-1, 1]) * rng.integers(3, 6)) * turns)


def bricks(u: Plane, v: Plane, rng: np.random.Generator) -> Plane:
    row = np.rint(v)
    along = u / 2 + row % 2 / 2
    return np.maximum(2 * np.abs(along - np.rint(along)) - np.float32(0.5), np.abs(v - row))


def waves(u: Plane, v: Plane, rng: np.random.Generator) -> Plane:
    length, height = rng.uniform(1.6, 2.4), rng.uniform(0.4, 0.55)
    return ridge(v + np.float32(height) * np.sin(u * np.float32(2 * np.pi / length)))


def stars(u: Plane, v: Plane, rng: np.random.Generator) -> Plane:
    a, b = cells(u, v, rng)
    turn = np.arctan2(b, a) * np.float32(2.5 / np.pi)  # 1 from tip to tip
    angle = np.abs(turn - np.rint(turn)) * np.float32(np.pi / 2.5)
    return -np.hypot(a, b) * (np.cos(angle) + 2 * np.sin(angle))  # 2: valleys at half the radius of the tips


def rays(u: Plane, v: Plane, rng: np.random.Generator) -> Plane:
    return ridge(np.arctan2(v, u) * np.float32(rng.integers(8, 15) / (2 * np.pi)))


@dataclass(frozen=True)
class PatternClass:
    """One class; its ILSVRC2012_ID is its place in CLASSES plus 1."""

    wnid: str
    words: str
    gloss: str
    height: Callable[[Plane, Plane, np.random.Generator], Plane]


CLASSES = (  # wnids in no order, as the devkit's are: a label is not an ILSVRC2012_ID minus 1
    PatternClass("n90417263", "striped cloth, stripes", "parallel straight bands of two colours", stripes),
    PatternClass("n90128845", "checkerboard, chequer", "squares that alternate in rows and columns", checkerboard),
    PatternClass("n90973310", "target, concentric rings", "circles of growing radius about one centre", rings),
    PatternClass("n90251197", "polka dots, dots", "round spots in rows on a plain ground", dots),
    PatternClass("n90804456", "triangles, pennants", "rows of small triangles, all pointing one way", triangles),
    PatternClass("n90036621", "crosses, plus signs", "rows of upright crosses with four equal arms", crosses),
    PatternClass("n90665078", "spiral, pinwheel", "arms that wind outwards from one centre", spirals),
    PatternClass("n90519904", "brick wall, bricks", "courses of blocks with staggered joints", bricks),
    PatternClass("n90347782", "waves, ripples", "bands that swing regularly from side to side", waves),
    PatternClass("n90790135", "stars, starry cloth", "rows of stars with five points", stars),
    PatternClass("n90182539", "sunburst, rays", "straight wedges that leave one centre in all directions", rays),
)


# ---------------------------------------------------------------------------------------------------------- pictures


def coordinates(height: int, width: int, rng: np.random.Generator) -> tuple[Plane, Plane]:
    """Pixel places as u, v (height, width) float32 in periods: shifted, turned, tilted and slightly bent at random."""
    period = min(height, width) / rng.uniform(4, 8)  # pixels
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
    """Foreground and background (3, 1, 1) float32 RGB grey levels, alike in distribution, 45 or more apart in luma."""
    pairs = rng.uniform(30, 225, (64, 2, 3)).astype(np.float32)
    luma = pairs @ np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as JPEG
    foreground, background = pairs[np.argmax(np.abs(luma[:, 0] - luma[:, 1]) >= 45), :, :, None, None]
    return foreground, background


def pixels(seed: int, split: str, class_index: int, index: int) -> NDArray[np.uint8]:
    """One picture of a class, (height, width, 3) uint8 RGB, sides 200 to 520 pixels; a function of its key alone."""
    rng = generator(seed, "pixels", split, class_index, index)
    long = rng.integers(280, 521)
    sides = (max(200, int(long * rng.uniform(0.62, 1.0))), int(long))
    height, width = sides if rng.random() < 0.7 else sides[::-1]

    field = CLASSES[class_index].height(*coordinates(height, width, rng), rng)
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


def kind(seed: int, split: str, class_index: int, index: int) -> str:
    """What the file of an ordinary picture is: an "rgb", "grayscale" or "cmyk" JPEG."""
    rng = generator(seed, "kind", split, class_index, index)
    return str(rng.choice(["rgb", "grayscale", "cmyk"], p=[0.93, 0.05, 0.02]))


def picture(seed: int, split: str, class_index: int, index: int, odd: str | None = None) -> bytes:
    """The file of one picture, of its kind or, where `odd` is "png" or "truncated", of that one."""
    image, form = Image.fromarray(pixels(seed, split, class_index, index)), odd or kind(seed, split, class_index, index)
    quality = int(generator(seed, "quality", split, class_index, index).integers(75, 96))
    image = image.convert({"grayscale": "L", "cmyk": "CMYK"}.get(form, "RGB"))
    out = io.BytesIO()
    image.save(out, "PNG" if form == "png" else "JPEG", quality=quality)
    return out.getvalue()[: out.tell() // 2] if form == "truncated" else out.getvalue()


# ------------------------------------------------------------------------------------------------------------ layout


def odd_pictures(seed: int, classes: int, train: int) -> dict[tuple[int, int], str]:
    """(class, index) of the two odd training pictures: a PNG named .JPEG, and a truncated JPEG."""
    places = generator(seed, "odd").choice(classes * train, 2, replace=False)
    return {divmod(int(place), train): odd for place, odd in zip(places, ("png", "truncated"))}


def training_numbers(seed: int, class_index: int, train: int) -> list[int]:
    """The rising integers in the names of a class's training pictures, with gaps, as the published ones have."""
    return np.cumsum(generator(seed, "numbers", "train", class_index).integers(2, 180, train)).tolist()


def validation_order(seed: int, classes: int, val: int) -> list[tuple[int, int]]:
    """(class, index) of ILSVRC2012_val_00000001.JPEG and those after it."""
    return [divmod(int(place), val) for place in generator(seed, "order").permutation(classes * val)]


def tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    """A USTAR archive of (name, data) with mtime, uid and gid 0, TarInfo's defaults."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def train_tar(seed: int, classes: int, train: int) -> bytes:
    """ILSVRC2012_img_train.tar: a tar of one tar per synset, all sorted by name."""
    odd = odd_pictures(seed, classes, train)

    def synset(c: int) -> bytes:
        names = ((f"{CLASSES[c].wnid}_{n}.JPEG", i) for i, n in enumerate(training_numbers(seed, c, train)))
        return tar((name, picture(seed, "train", c, i, odd.get((c, i)))) for name, i in sorted(names))

    wnids = sorted((CLASSES[c].wnid, c) for c in range(classes))
    return tar((f"{wnid}.tar", synset(c)) for wnid, c in wnids)


def val_tar(seed: int, classes: int, val: int) -> bytes:
    """ILSVRC2012_img_val.tar: flat, the classes mixed."""
    order = enumerate(validation_order(seed, classes, val), start=1)
    return tar((f"ILSVRC2012_val_{n:08d}.JPEG", picture(seed, "val", c, i)) for n, (c, i) in order)


def devkit_tar(seed: int, classes: int, train: int, val: int) -> bytes:
    """ILSVRC2012_devkit_t12.tar.gz: meta.mat, and the ground truth as one ILSVRC2012_ID a line, by file name."""
    truth = "".join(f"{c + 1}\n" for c, _ in validation_order(seed, classes, val))
    members = {"ILSVRC2012_validation_ground_truth.txt": truth.encode(), "meta.mat": meta_mat(classes, train)}
    return gzip.compress(tar((f"ILSVRC2012_devkit_t12/data/{name}", data) for name, data in members.items()), mtime=0)


def meta_mat(classes: int, train: int) -> bytes:
    """The devkit's meta.mat: the leaves with ids 1 … classes, then two internal synsets."""
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss"]
    fields += ["num_children", "children", "wordnet_height", "num_train_images"]
    synsets = np.empty((classes + 2, 1), [(name, object) for name in fields])
    none, leaves = np.zeros((1, 0), np.uint16), np.arange(1, classes + 1, dtype=np.uint16)[None]
    for i, c in enumerate(CLASSES[:classes]):
        synsets[i, 0] = (i + 1, c.wnid, c.words, c.gloss, 0, none, 0, train)
    synsets[-2, 0] = (classes + 1, "n90000017", "pattern", "forms that repeat", 1, leaves[:, -1:] + 2, 2, 0)
    synsets[-1, 0] = (classes + 2, "n90000042", "drawn pattern", "a pattern that a program drew", classes, leaves, 1, 0)
    out = io.BytesIO()
    savemat(out, {"synsets": synsets})
    header = b"MATLAB 5.0 MAT-file, written by tools/make_raw.py".ljust(116)  # scipy's has the time and the platform
    return header + out.getvalue()[116:]


def check(out: Path, classes: int, train: int, val: int, seed: int) -> None:
    """Raise ValueError for a number out of range, or for an `out` that is neither new nor an empty directory."""
    many = 10**6  # no class of the published set comes near
    limits = {"classes": (classes, 2, len(CLASSES)), "train": (train, 1, many), "val": (val, 1, many)}
    for name, (value, least, most) in {**limits, "seed": (seed, 0, MAX_SEED)}.items():
        if not least <= value <= most:
            raise ValueError(f"--{name} {value} is out of range: give {least} to {most}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty directory: give a new or empty one")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under a temporary name beside it, and rename it when it is complete."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--classes", default=10, show_default=True, help=f"Number of classes, 2 to {len(CLASSES)}.")
@click.option("--train", default=120, show_default=True, help="Training pictures per class.")
@click.option("--val", default=20, show_default=True, help="Validation pictures per class.")
@click.option("--seed", default=2012, show_default=True, help="The same seed draws the same bytes.")
def main(out: Path, classes: int, train: int, val: int, seed: int) -> None:
    """Write a small ILSVRC2012 of drawn pictures into OUT, a new or empty directory."""
    try:
        check(out, classes, train, val, seed)
    except ValueError as error:
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(2) from error
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "ILSVRC2012_devkit_t12.tar.gz", devkit_tar(seed, classes, train, val))
        write_whole(out / "ILSVRC2012_img_val.tar", val_tar(seed, classes, val))
        write_whole(out / "ILSVRC2012_img_train.tar", train_tar(seed, classes, train))
    except OSError as error:
        raise click.ClickException(f"cannot write into {out}: {error}") from error
    odd = odd_pictures(seed, classes, train)
    kinds = Counter(kind(seed, "val", c, i) for c in range(classes) for i in range(val))
    kinds.update(odd.get((c, i)) or kind(seed, "train", c, i) for c in range(classes) for i in range(train))
    click.echo(
        f"wrote {out}: {classes * train} training and {classes * val} validation pictures of {classes} classes, "
        f"{kinds['grayscale']} grayscale, {kinds['cmyk']} CMYK, {kinds['png']} PNG named .JPEG, "
        f"{kinds['truncated']} truncated"
    )


if __name__ == "__main__":
    main()
