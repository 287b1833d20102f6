"""Draw a small ILSVRC2012 in the official layout: tars and devkit as published, pictures from a seed."""

if __name__ == "__main__":  # before the imports that take long
    from pipeline import process

    process.begin()

import gzip
import io
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import click
import numpy as np
from PIL import Image
from scipy.io import savemat

from pipeline import UserError
from pipeline.cli import Command
from pipeline.files import require_writable, write_bytes_aside
from tools.patterns import CLASSES, generator, pixels


def file_form(seed: int, split: str, class_index: int, index: int) -> str:
    """Return the form of an ordinary picture: an "rgb", "grayscale" or "cmyk" JPEG."""
    rng = generator(seed, "kind", split, class_index, index)
    return str(rng.choice(["rgb", "grayscale", "cmyk"], p=[0.93, 0.05, 0.02]))


def picture(seed: int, split: str, class_index: int, index: int, odd: str | None = None) -> bytes:
    """Return the bytes of one picture's file, in its own form or, where `odd` is "png" or "truncated", in that one."""
    form = odd or file_form(seed, split, class_index, index)
    quality = int(generator(seed, "quality", split, class_index, index).integers(75, 96))
    mode = {"grayscale": "L", "cmyk": "CMYK"}.get(form, "RGB")
    image = Image.fromarray(pixels(seed, split, class_index, index)).convert(mode)
    out = io.BytesIO()
    image.save(out, "PNG" if form == "png" else "JPEG", quality=quality)
    return out.getvalue()[: out.tell() // 2] if form == "truncated" else out.getvalue()


def odd_pictures(seed: int, classes: int, train: int) -> dict[tuple[int, int], str]:
    """Return (class, index) of the two odd training pictures: a PNG named .JPEG, and a truncated JPEG."""
    numbers = generator(seed, "odd").choice(classes * train, 2, replace=False)
    return {divmod(int(number), train): odd for number, odd in zip(numbers, ("png", "truncated"))}


def training_numbers(seed: int, class_index: int, train: int) -> list[int]:
    """Return the rising integers in the names of a class's training pictures, with gaps, as the published ones have."""
    return np.cumsum(generator(seed, "numbers", "train", class_index).integers(2, 180, train)).tolist()


def validation_order(seed: int, classes: int, val: int) -> list[tuple[int, int]]:
    """Return (class, index) of ILSVRC2012_val_00000001.JPEG and those after it."""
    return [divmod(int(number), val) for number in generator(seed, "order").permutation(classes * val)]


def tar(members: Mapping[str, bytes]) -> bytes:
    """Return a USTAR archive of files by name, sorted, with mtime, uid and gid 0, TarInfo's defaults."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in sorted(members.items()):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def train_tar(seed: int, classes: int, train: int) -> bytes:
    """Return ILSVRC2012_img_train.tar: a tar of one tar per synset."""
    odd, synsets = odd_pictures(seed, classes, train), {}
    for c in range(classes):
        names = [f"{CLASSES[c].wnid}_{number}.JPEG" for number in training_numbers(seed, c, train)]
        synset = {name: picture(seed, "train", c, i, odd.get((c, i))) for i, name in enumerate(names)}
        synsets[f"{CLASSES[c].wnid}.tar"] = tar(synset)
    return tar(synsets)


def val_tar(seed: int, classes: int, val: int) -> bytes:
    """Return ILSVRC2012_img_val.tar: flat, the classes mixed."""
    order = enumerate(validation_order(seed, classes, val), start=1)
    return tar({f"ILSVRC2012_val_{n:08d}.JPEG": picture(seed, "val", c, i) for n, (c, i) in order})


def devkit_tar(seed: int, classes: int, train: int, val: int) -> bytes:
    """Return ILSVRC2012_devkit_t12.tar.gz: meta.mat, and one ILSVRC2012_ID a line as the ground truth, by file name."""
    truth = "".join(f"{c + 1}\n" for c, _ in validation_order(seed, classes, val))
    members = {"ILSVRC2012_validation_ground_truth.txt": truth.encode(), "meta.mat": meta_mat(classes, train)}
    return gzip.compress(tar({f"ILSVRC2012_devkit_t12/data/{name}": data for name, data in members.items()}), mtime=0)


def meta_mat(classes: int, train: int) -> bytes:
    """Return the devkit's meta.mat: the leaves with ids 1 … classes, then two internal synsets."""
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss"]
    fields += ["num_children", "children", "wordnet_height", "num_train_images"]
    none, leaves = np.zeros((1, 0), np.uint32), np.arange(1, classes + 1, dtype=np.uint32)[None]
    rows: list[tuple[object, ...]] = [(c.wnid, c.words, c.gloss, 0, none, 0, train) for c in CLASSES[:classes]]
    rows.append(("n90000017", "pattern", "forms that repeat", 1, leaves[:, -1:] + 2, 2, 0))
    rows.append(("n90000042", "drawn pattern", "a pattern that a program drew", classes, leaves, 1, 0))
    synsets = np.empty((len(rows), 1), [(name, object) for name in fields])
    for i, row in enumerate(rows):
        synsets[i, 0] = tuple(np.uint32(x) if isinstance(x, int) else x for x in (i + 1, *row))
    out = io.BytesIO()
    savemat(out, {"synsets": synsets})
    header = b"MATLAB 5.0 MAT-file, written by tools/make_raw.py".ljust(116)  # scipy's has the time and the platform
    return header + out.getvalue()[116:]


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--classes", type=click.IntRange(2, len(CLASSES)), default=10, help="Number of classes.")
@click.option("--train", type=click.IntRange(1, 10**6), default=120, help="Training pictures per class.")
@click.option("--val", type=click.IntRange(1, 10**6), default=20, help="Validation pictures per class.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=2012, help="The same seed draws the same bytes.")
def main(out: Path, classes: int, train: int, val: int, seed: int) -> None:
    """Write a small ILSVRC2012 of drawn pictures into OUT, a new or empty directory."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty directory: give a new or empty one")
    require_writable(out)
    devkit, validation = devkit_tar(seed, classes, train, val), val_tar(seed, classes, val)
    training = train_tar(seed, classes, train)  # all are drawn before one is written: an interruption leaves OUT empty
    write_bytes_aside(out / "ILSVRC2012_devkit_t12.tar.gz", devkit)
    write_bytes_aside(out / "ILSVRC2012_img_val.tar", validation)
    write_bytes_aside(out / "ILSVRC2012_img_train.tar", training)
    odd = odd_pictures(seed, classes, train)
    forms = Counter(file_form(seed, "val", c, i) for c in range(classes) for i in range(val))
    forms.update(odd.get((c, i)) or file_form(seed, "train", c, i) for c in range(classes) for i in range(train))
    click.echo(
        f"wrote {out}: {classes * train} training and {classes * val} validation pictures of {classes} classes, "
        f"{forms['grayscale']} grayscale, {forms['cmyk']} CMYK, {forms['png']} PNG named .JPEG, "
        f"{forms['truncated']} truncated"
    )


if __name__ == "__main__":
    main()
