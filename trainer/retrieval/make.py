"""An index made of a network and a split: features, then the auto-encoder, then the codes."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pipeline import UserError
from pipeline.manifest import Manifest
from trainer import data as feed
from trainer.checkpoint import Checkpoint
from trainer.parallel import TwoColumnNet
from trainer.retrieval import codes, index
from trainer.retrieval.features import hidden, of_batches
from trainer.retrieval.folder import appearing, require_room
from trainer.retrieval.index import CODES, DTYPES, ENCODER, FEATURES, Meta
from trainer.retrieval.rows import Rows, RowWriter

Tell = Callable[[str, int, int], None]  # what is made; how many of them are done; of how many


def make(
    network: TwoColumnNet,
    checkpoint: Checkpoint,
    dataset: Manifest,
    split: str,
    out: Path,
    bits: int = 128,
    dtype: str = "float16",
    tell: Tell = lambda what, done, whole: None,
) -> str:
    """Write the index `out` of every image of `split`, in the place of an older one once it is whole.

    Returns:
        What to say of the features: how many, images/s and the stall.
    Raises:
        UserError: the split is empty, a feature is too large for `dtype`, the disk is too small, `out` is something
            else; an older index is untouched.
    """
    n = dataset.split(split).samples
    if n == 0:
        raise UserError(f"{dataset.root}: the split {split!r} is empty; there is nothing to index")
    size = checkpoint.recipe.model.size
    units = hidden(network, torch.zeros(1, 3, size, size)).shape[1]
    meta = Meta(
        checkpoint.step,
        index.digest(checkpoint.weights),
        dataset.identity,
        split,
        checkpoint.recipe.model.order[-2],
        n,
        units,
        bits,
        dtype,
    )
    index.require_replaceable(out)
    require_room(out, n * (units * DTYPES[dtype].itemsize + bits // 8) + 8 * units * (bits + 1) + 2**20)
    with appearing(out) as folder:
        said = _write_features(network, checkpoint, dataset, meta, folder / FEATURES, tell)
        write_codes(folder, meta, tell)
        index.write_meta(folder, meta)
    return said


def _write_features(
    network: TwoColumnNet, checkpoint: Checkpoint, dataset: Manifest, meta: Meta, path: Path, tell: Tell
) -> str:
    dtype, began = DTYPES[meta.dtype], time.perf_counter()
    with (
        feed.evaluation(dataset, checkpoint.recipe, meta.split, "centre", network.devices) as loader,
        RowWriter(path, (meta.n, meta.units), dtype) as rows,
    ):
        for ids, features in of_batches(network, loader):
            assert ids[0] == rows.rows
            rows.add(rounded(features, dtype))
            tell("features", rows.rows, meta.n)
        seconds = time.perf_counter() - began
        said = loader.meter.total.said(seconds)
    return f"{meta.n:,} images, {meta.units:,} features of {meta.layer} each: {meta.n / seconds:,.0f} images/s  {said}"


def rounded(features: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float32 → `dtype`. Raises UserError where one is too large for it."""
    greatest, limit = float(np.abs(features).max(initial=0)), float(np.finfo(dtype).max)
    if greatest > limit:
        raise UserError(f"a feature is {greatest:,.0f}, and {dtype} ends at {limit:,.0f}; name --float32")
    return features.astype(dtype)


def write_codes(folder: Path, meta: Meta, tell: Tell) -> None:
    """Learn the auto-encoder from the features in `folder`; write it, and the codes of all."""
    rows = Rows(folder / FEATURES, (meta.n, meta.units), DTYPES[meta.dtype])
    encoder = codes.learnt(
        torch.from_numpy(rows.gathered(sample(meta.n)).astype(np.float32)),
        meta.bits,
        lambda steps: tell("auto-encoder", steps, codes.STEPS),
    )
    (folder / ENCODER).write_bytes(encoder.to_bytes())
    with RowWriter(folder / CODES, (meta.n, meta.bits // 8), np.dtype(np.uint8)) as written:
        for start in range(0, meta.n, codes.AT_ONCE):
            written.add(encoder.codes(rows.mapped[start : start + codes.AT_ONCE]))
            tell("codes", written.rows, meta.n)
    rows.close()


def sample(n: int) -> np.ndarray:
    """The rows from which the auto-encoder learns: all, or `codes.SAMPLE` drawn from them, ascending."""
    if n <= codes.SAMPLE:
        return np.arange(n)
    return np.sort(np.random.default_rng(codes.SEED).choice(n, codes.SAMPLE, replace=False))
