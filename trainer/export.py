"""A run's network for other programs: a safetensors file and an ONNX graph, compared with ours before they appear."""

import json
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors import torch as safetensors
from torch import Tensor

from pipeline import UserError, manifest
from pipeline.files import write_bytes_aside
from pipeline.manifest import Manifest
from pipeline.online.samples import SampleReader
from trainer import checkpoint as checkpoints
from trainer.checkpoint import META, Checkpoint
from trainer.model import Grouped
from trainer.network import load_network
from trainer.parallel import Columns
from trainer.pictures import Pictures, pixels
from trainer.recipe import Recipe
from trainer.watch import Diverged

WEIGHTS_FILE, GRAPH_FILE = "model.safetensors", "model.onnx"
MEAN = "mean"  # its name beside the weights
PICTURES = 16  # on which the files are compared with our network
MOST = 1e-4  # by which a probability may differ
ERRORS_ONLY = 3  # ONNX Runtime's severities: what it says of devices and threads is not for our users


@dataclass(frozen=True)
class Exported:
    """What was written, and how far its probabilities are from ours, at most, on so many pictures of a split."""

    step: int
    weights: Path
    graph: Path
    parameters: int
    nodes: int
    split: str
    pictures: int
    weights_differ: float
    graph_differs: float


def export(run: Path, data: Path, out: Path) -> Exported:
    """Write OUT/model.safetensors and OUT/model.onnx of the checkpoint `run`, or of the newest in it.

    Raises:
        UserError: a missing package, checkpoint or data set; a data set that the network was not trained on; numbers
            that are not finite; a network too large for ONNX; a file whose probabilities are not ours. Nothing is
            written then.
    """
    onnxruntime = _package("onnxruntime")
    _package("onnx")
    from trainer import onnxgraph  # here, because the package onnx is optional

    checkpoint, dataset = checkpoints.load(run), manifest.load(data)
    recipe, classes = checkpoint.recipe, len(checkpoint.classes)
    network = load_network(checkpoint, dataset, (torch.device("cpu"),) * recipe.model.columns, run)
    _require_fit(checkpoint, dataset, run)
    split, jpegs = _pictures(dataset)
    ours = _probabilities(network, Pictures(dataset, recipe).views(jpegs))
    mean = mean_view(dataset, recipe)
    text = {META: json.dumps(described(checkpoint, dataset), allow_nan=False)}
    weights = safetensors.save(checkpoint.weights | {MEAN: torch.from_numpy(mean)}, text)
    arrays = {name: value.numpy() for name, value in checkpoint.weights.items()}
    model = onnxgraph.build(recipe.model, arrays, mean, classes, text)
    graph = model.SerializeToString()
    raw = np.stack([_centre(pixels(jpeg), recipe.model.size) for jpeg in jpegs])
    weights_differ = _differ(WEIGHTS_FILE, ours, _from_weights(weights, checkpoint, torch.from_numpy(raw)))
    graph_differs = _differ(GRAPH_FILE, ours, _from_graph(onnxruntime, graph, raw))
    write_bytes_aside(out / WEIGHTS_FILE, weights)
    write_bytes_aside(out / GRAPH_FILE, graph)
    parameters = sum(value.numel() for value in checkpoint.weights.values())
    files, counts = (out / WEIGHTS_FILE, out / GRAPH_FILE), (parameters, len(model.graph.node))
    return Exported(checkpoint.step, *files, *counts, split, len(jpegs), weights_differ, graph_differs)


def mean_view(dataset: Manifest, recipe: Recipe) -> np.ndarray:
    """What is subtracted from a centre view: (3, size, size) float32, in grey levels of RGB.

    The centre of the mean image, also where `data.mean` is "aligned": the centre view was cut from there.
    """
    statistics, size = dataset.statistics(), recipe.model.size
    if recipe.data.mean == "colour":
        colour = statistics.mean_color.astype(np.float32)[:, None, None]
        return np.ascontiguousarray(np.broadcast_to(colour, (3, size, size)))
    return _centre(statistics.mean_image, size)


def described(checkpoint: Checkpoint, dataset: Manifest) -> dict[str, Any]:
    """What both files say of themselves: plain JSON values."""
    recipe, picture = checkpoint.recipe, dataset.recipe.size
    size, start = recipe.model.size, (picture - recipe.model.size) // 2
    return {
        "step": checkpoint.step,
        "dataset": checkpoint.dataset,
        "classes": [{"wnid": record.wnid, "words": record.words} for record in dataset.classes],
        "input": {
            "shape": ["n", 3, size, size],
            "dtype": "float32",
            "colours": "RGB",
            "range": [0, 255],
            "view": f"rows and columns {start} to {start + size - 1} of a picture of {picture} x {picture} pixels",
            "mean": recipe.data.mean,
        },
        "model": asdict(recipe.model),
    }


def _package(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"trainer export needs the package {name}: pip install 'penstock-imagenet[export]'") from error


def _require_fit(checkpoint: Checkpoint, dataset: Manifest, run: Path) -> None:
    """Raise UserError where the data set is not the network's own, or the network is of no use."""
    if checkpoint.dataset != dataset.identity:
        raise UserError(
            f"{run}: trained on the data set {checkpoint.dataset[:12]}…, {dataset.root} is {dataset.identity[:12]}…, "
            "whose mean image the network has never seen subtracted; name the one that it was trained on"
        )
    for name, value in checkpoint.weights.items():
        if not bool(value.isfinite().all()):
            raise Diverged(
                f"{run}: numbers in {name} are not finite: its training has diverged; name an older checkpoint"
            )


def _pictures(dataset: Manifest) -> tuple[str, list[bytes]]:
    """The stored pictures to compare on: spread evenly over the validation split, or the training split."""
    split = next((name for name in ("val", "train") if name in dataset.splits and dataset.splits[name].samples), None)
    if split is None:
        raise UserError(f"{dataset.root}: no pictures in val or train, on which to compare the files with the network")
    samples = dataset.splits[split].samples
    shown = min(PICTURES, samples)
    ids = (2 * np.arange(shown) + 1) * samples // (2 * shown)
    with SampleReader(dataset, split) as reader:
        return split, [jpeg.tobytes() for jpeg in reader.read(ids)]


def _centre(picture: np.ndarray, size: int) -> np.ndarray:
    """(side, side, 3) → its middle, (3, size, size) float32."""
    start = (len(picture) - size) // 2
    window = picture[start : start + size, start : start + size]
    return np.ascontiguousarray(window.transpose(2, 0, 1), np.float32)


@torch.inference_mode()
def _probabilities(network: Columns | Grouped, x: Tensor) -> Tensor:
    """(n, 3, size, size) float32 → (n, classes) float64."""
    found: Tensor = network(x)
    return found.double().softmax(1)


def _from_weights(data: bytes, checkpoint: Checkpoint, raw: Tensor) -> Tensor:
    """Probabilities (n, classes) of the file's tensors, of pixels (n, 3, size, size) float32."""
    tensors = safetensors.load(data)
    network = Grouped(checkpoint.recipe.model, len(checkpoint.classes))
    network.load(tensors)
    return _probabilities(network, raw - tensors[MEAN])


def _from_graph(onnxruntime: ModuleType, data: bytes, raw: np.ndarray) -> Tensor:
    """The same of the graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = 1  # more are bound to cores, which a container may forbid: a warning for each
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["probabilities"], {"pixels": raw})[0])


def _differ(name: str, ours: Tensor, theirs: Tensor) -> float:
    """The greatest difference between probabilities. Raises UserError where there is no telling, or too large a one."""
    if not bool(ours.isfinite().all()):
        raise Diverged("the network's outputs are not finite numbers: its training has diverged")
    greatest = float((ours - theirs).abs().max())
    if not greatest <= MOST:  # also where it is not a number
        raise UserError(
            f"{name}: its probabilities differ from the network's by {greatest:.1e}, where {MOST:.0e} is the most; "
            "nothing was written; a defect of ours, or of the package onnxruntime: try another version of it"
        )
    return greatest
