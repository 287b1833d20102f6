"""python -m trainer index: the features of a split's images, and the auto-encoder and the codes made of them."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import save

from pipeline import UserError, manifest
from pipeline.cli import Command, progress_bars
from pipeline.files import ASIDE, content, locked, require_writable, sync_folder
from pipeline.manifest import Manifest, canonical_json, sha256
from pipeline.online.samples import SampleReader
from trainer import checkpoint as checkpoints
from trainer import data as loaders
from trainer.checkpoint import load_network, note_other_data
from trainer.devices import choose_devices
from trainer.nonfinite import require_finite_outputs
from trainer.options import DEVICES, PATH, RUN
from trainer.parallel import TwoColumnNet
from trainer.pictures import Pictures
from trainer.recipe import Recipe
from trainer.retrieval import codes, search
from trainer.retrieval.search import Index, Meta

UNFINISHED = f"index{ASIDE}"  # the folder in an index that holds the files of its successor
LEAST_BITS, MOST_BITS = 32, 256  # of a code, a multiple of 8
QUERIES = 200  # pictures at most that are looked up to measure recall
ENCODED = 4096  # rows encoded at a time

Show = Callable[[str, int, int], None]  # of a stage: its name, what is done, the total


@click.command(cls=Command, interrupted="an older index stays as it was")
@RUN
@click.argument("data", metavar="DATASET", type=PATH)
@click.option("--split", default="train", show_default=True)
@click.option("--bits", type=int, default=128, show_default=True, help="Of a code: 32 to 256, a multiple of 8.")
@click.option("--out", type=PATH, help="The index directory.  [default: RUN/index]")
@click.option("--float32", is_flag=True, help="Features of 4 bytes, where 2 are too few.")
@click.option("--force", is_flag=True, help="Replace an index that is there.")
@DEVICES
def index(
    run: Path, data: Path, split: str, bits: int, out: Path | None, float32: bool, force: bool, devices: str | None
) -> None:
    """Write the features of every image of a split, from the last hidden layer, and short codes of them, to search in.

    \b
    Examples:
      python -m trainer index runs/1 /data/imagenet-256
      python -m trainer index runs/1 photos-256 --split val --bits 64 --out runs/1/index-val
    """
    if not LEAST_BITS <= bits <= MOST_BITS or bits % 8:
        raise UserError(f"--bits {bits}: a multiple of 8 from {LEAST_BITS} to {MOST_BITS}")
    if out is None and run.is_file():
        raise UserError(f"{run}: is a file; name the index directory: --out")
    out = out or run / "index"
    search.require_faiss("trainer index")
    dataset, checkpoint = manifest.load(data), checkpoints.load(run)
    recipe, n = checkpoint.recipe, dataset.split(split).samples
    if n == 0:
        raise UserError(f"{dataset.root}: the split {split!r} is empty; there is nothing to index")
    _require_free(out, force)
    note_other_data(checkpoint, dataset)
    network = load_network(checkpoint, dataset, choose_devices(devices, recipe.model.columns), run)
    units = hidden(network, torch.zeros(1, 3, recipe.model.size, recipe.model.size)).shape[1]
    layer = recipe.model.order[-2] if len(recipe.model.order) > 1 else "the pictures"
    origin = (checkpoint.step, search.digest(checkpoint.weights), dataset.identity, split)
    meta = Meta(*origin, layer, n, units, bits, "float32" if float32 else "float16")
    require_writable(out, n * (units * np.dtype(meta.dtype).itemsize + bits // 8) + 8 * units * (bits + 1) + 2**20)
    with _appearing(out) as folder, progress_bars() as show:
        summary = _write_features(network, recipe, dataset, meta, folder, show)
        write_codes(folder, meta, show)
        write_meta(folder, meta)
    click.echo(summary)
    made = Index(out)
    if measured := search.recall(made, *_queries(made, network, dataset, recipe)):
        click.echo(measured)
    click.echo(f"index: {out}")


def _require_free(out: Path, force: bool) -> None:
    """Raise UserError if `out` is something else than an index, or an index that may not be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file; name a directory as --out")
    if directories := [name for name in (search.META, *search.FILES) if (out / name).is_dir()]:
        raise UserError(f"{out / directories[0]}: is a directory, where a file should be; move it away")
    names = content(out)
    if others := names - {search.META, *search.FILES, UNFINISHED}:
        raise UserError(f"{out}: exists and is not an index (it has {min(others)}); name another --out")
    if search.META in names and not force:
        raise UserError(f"{out}: exists already; replace it by --force, or name another --out")


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """Yield a temporary folder in `out`, whose files become those of `out` when the body has ended well.

    An older index stays until then. Raises UserError if another process writes there.
    """
    out.mkdir(parents=True, exist_ok=True)
    aside = out / UNFINISHED
    with locked(out, "another process writes it; wait for its end, or name another --out"):
        try:
            shutil.rmtree(aside, ignore_errors=True)  # of a writer that was killed: a living one has the lock
            aside.mkdir()
            yield aside
            for path in aside.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            (out / search.META).unlink(missing_ok=True)  # until the last rename there is no index, never half of one
            for name in (*search.FILES, search.META):
                os.rename(aside / name, out / name)
            sync_folder(out)
        except OSError as error:
            error.filename = error.filename or str(out)  # the error of a full disk names no file
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            with suppress(OSError):
                out.rmdir()  # if it is empty: an index that was not written leaves no folder


def _write_features(
    network: TwoColumnNet, recipe: Recipe, dataset: Manifest, meta: Meta, folder: Path, show: Show
) -> str:
    """Write the features of all images; return a line on their number, images/s and the stall.

    By plain writes, not through a map, which learns of a full disk by a signal that ends the process.
    """
    began, done, dtype = time.perf_counter(), 0, np.dtype(meta.dtype)
    with (
        loaders.evaluation(dataset, recipe, meta.split, "centre", network.devices) as loader,
        open(folder / search.FEATURES, "xb") as file,
    ):
        file.write(meta.features_header())
        for batch in loader:
            rows = hidden(network, batch.replicas)
            greatest, limit = float(np.abs(rows).max()), float(np.finfo(dtype).max)
            if greatest > limit:
                raise UserError(f"a feature is {greatest:,.6g}, and {dtype} ends at {limit:,.0f}; name --float32")
            file.write(rows.astype(dtype).data)
            done += len(rows)
            show("features", done, meta.n)
        seconds = time.perf_counter() - began
        stall = loader.meter.total.text(seconds, loaders.STALLED)
    return f"{meta.n:,} images, {meta.units:,} features of {meta.layer} each: {meta.n / seconds:,.0f} images/s  {stall}"


def write_codes(folder: Path, meta: Meta, show: Show) -> None:
    """Learn the auto-encoder from a sample of the features in `folder`; write it, and the codes of all."""
    rows: np.ndarray = np.load(folder / search.FEATURES, mmap_mode="r")
    sample = np.random.default_rng(codes.SEED).choice(meta.n, min(meta.n, codes.SAMPLE), replace=False)
    learnt_from = torch.from_numpy(rows[np.sort(sample)].astype(np.float32))
    encoder = codes.learn(learnt_from, meta.bits, lambda steps: show("auto-encoder", steps, codes.STEPS))
    (folder / search.ENCODER).write_bytes(save({name: layer.contiguous() for name, layer in vars(encoder).items()}))
    written = np.empty((meta.n, meta.bits // 8), np.uint8)
    for start in range(0, meta.n, ENCODED):
        written[start : start + ENCODED] = encoder.codes(rows[start : start + ENCODED])
        show("codes", min(meta.n, start + ENCODED), meta.n)
    np.save(folder / search.CODES, written)


def write_meta(folder: Path, meta: Meta) -> None:
    """Write index.json of a folder that holds the other files."""
    files: dict[str, dict[str, Any]] = {name: {"bytes": (folder / name).stat().st_size} for name in search.FILES}
    for name in (search.CODES, search.ENCODER):
        files[name]["sha256"] = sha256((folder / name).read_bytes())
    body = {"format": search.FORMAT, **asdict(meta), "files": files}
    (folder / search.META).write_bytes(canonical_json(body | {"checksum": sha256(canonical_json(body))}))


def features(
    network: TwoColumnNet, dataset: Manifest, recipe: Recipe, split: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids (n,) int64 and features (n, units) float32 of every image of `split`, in the order of the ids."""
    with loaders.evaluation(dataset, recipe, split, "centre", network.devices) as loader:
        for batch in loader:
            yield batch.ids, hidden(network, batch.replicas)


@torch.inference_mode()
def hidden(network: TwoColumnNet, images: torch.Tensor | tuple[torch.Tensor, ...]) -> np.ndarray:
    """(n, 3, size, size), or the same for each column → (n, units) float32. Raises Diverged if one is not finite."""
    x = network.hidden(images).float()
    require_finite_outputs(x, network.name, "features")
    return x.cpu().numpy()


def _queries(
    made: Index, network: TwoColumnNet, dataset: Manifest, recipe: Recipe
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return features to look for: of the validation split, or of the index's own rows, and which these are."""
    held, own = dataset.splits.get("val"), np.unique(np.arange(QUERIES) * made.meta.n // QUERIES)  # spread evenly
    if made.meta.split == "val" or not held or not held.samples:
        return made.rows[own].astype(np.float32), own
    with SampleReader(dataset, "val") as reader:
        jpegs = [jpeg.tobytes() for jpeg in reader.read(np.unique(np.arange(QUERIES) * held.samples // QUERIES))]
    return hidden(network, Pictures(dataset, recipe).views(jpegs)), None
