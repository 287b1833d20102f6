"""Write a run's network for other programs: safetensors and ONNX, compared with our network before they appear."""

import io
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import torch as safetensors
from torch import Tensor

from pipeline import UserError, manifest
from pipeline.files import write_bytes_aside
from pipeline.manifest import Manifest
from pipeline.online.samples import SampleReader
from trainer import checkpoint as checkpoints
from trainer.checkpoint import META, Checkpoint, load_network
from trainer.layers import ModelRecipe, parameter_count
from trainer.lrn import BETA, SAME_MAP_ALPHA, SAME_MAP_SIZE
from trainer.model import Grouped, Weights
from trainer.nonfinite import Diverged
from trainer.pictures import Pictures, pixels
from trainer.recipe import Recipe

WEIGHTS_FILE, GRAPH_FILE = "model.safetensors", "model.onnx"
MEAN = "mean"  # name of the mean beside the weights
OPSET = 17  # of 2022, so that older runtimes read it too
MAX_GRAPH_BYTES = 2**31 - 2**24  # 2 GiB, the limit of protobuf, with room for what is not weights
SAMPLES = 16  # pictures on which the files are compared with our network
MAX_DIFFERENCE = 1e-4  # of a probability
ERRORS_ONLY = 3  # severity for ONNX Runtime, whose warnings about devices and threads do not concern our users


@dataclass(frozen=True)
class Exported:
    """What was written: `differences` has the greatest difference of a probability from ours, by file."""

    step: int
    parameters: int
    nodes: int
    split: str
    pictures: int
    differences: dict[Path, float]


class PlainNetwork(Grouped):
    """The network in evaluation, without the gradients written by hand, which torch.onnx cannot export.

    `tensors` are those of the safetensors file: the weights, and the mean, which is subtracted from the pixels.
    """

    mean: Tensor  # (3, size, size) float32, grey levels

    def __init__(self, recipe: ModelRecipe, classes: int, tensors: Weights) -> None:
        super().__init__(recipe, classes)
        self.load(tensors)
        self.register_buffer(MEAN, tensors[MEAN])

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(n, 3, size, size) float32, RGB grey levels → probabilities and logits, (n, classes) float32."""
        x = pixels - self.mean
        for layer in self.layers:
            x = self.layer(layer, x, None)
        return x.softmax(1), x

    def _then(self, word: str, x: Tensor, columns: int, mask: Tensor | None) -> Tensor:
        if word == "lrn":  # F.local_response_norm exports as four times the nodes, with branches on the batch's size
            size, half = self.lrn.size, self.lrn.size // 2
            squares = F.pad((x * x).unflatten(1, (columns, -1)), (0, 0, 0, 0, half, half))
            sums = size * F.avg_pool3d(squares, (size, 1, 1), 1).flatten(1, 2)
            return x * (self.lrn.k + self.lrn.alpha * sums) ** -BETA
        if word == "rnorm":
            means = F.avg_pool2d(x * x, SAME_MAP_SIZE, 1, SAME_MAP_SIZE // 2)
            return x * (1 + SAME_MAP_ALPHA * means) ** -BETA
        return super()._then(word, x, columns, mask)


def onnx_model(network: PlainNetwork, text: Mapping[str, str]) -> Any:
    """Return the onnx.ModelProto of `network`, with `text` as its metadata.

    `pixels` (n, 3, size, size) float32 → `probabilities` and `logits`, (n, classes) float32, for any n.

    Raises:
        UserError: more weights than an ONNX file can hold.
    """
    import onnx  # optional

    size = sum(4 * value.numel() for value in network.state_dict().values())
    if size > MAX_GRAPH_BYTES:
        raise UserError(
            f"weights of {size / 2**30:.2f} GiB; an ONNX file holds {MAX_GRAPH_BYTES / 2**30:.2f}; "
            "the checkpoint is a safetensors file, which any program can read too"
        )
    inputs, outputs = ["pixels"], ["probabilities", "logits"]
    example, file = torch.zeros(2, *network.mean.shape), io.BytesIO()
    axes = {name: {0: "n"} for name in inputs + outputs}
    names: dict[str, Any] = {"input_names": inputs, "output_names": outputs, "dynamic_axes": axes}
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # that this exporter is the old one, as docs/export.md says
        torch.onnx.export(network, (example,), file, dynamo=False, opset_version=OPSET, **names)  # type: ignore[arg-type]
    model = onnx.load_from_string(file.getvalue())
    onnx.helper.set_model_props(model, dict(text))
    onnx.checker.check_model(model, full_check=True)
    return model


def export(run: Path, data: Path, out: Path) -> Exported:
    """Write OUT/model.safetensors and OUT/model.onnx of the checkpoint `run`, or of the newest in it.

    Raises:
        UserError: a missing package, checkpoint or data set; other data than it was trained on; numbers that are not
            finite; a network too large for ONNX; a file whose probabilities are not ours. Nothing is written then.
    """
    for package in ("onnx", "onnxruntime"):
        try:
            import_module(package)
        except ImportError as error:
            raise UserError(
                f"trainer export needs the package {package}: pip install 'penstock-imagenet[export]'"
            ) from error
    checkpoint, dataset = checkpoints.load(run), manifest.load(data)
    recipe, classes = checkpoint.recipe, len(checkpoint.classes)
    network = load_network(checkpoint, dataset, (torch.device("cpu"),) * recipe.model.columns, run)
    _require_fit(checkpoint, dataset, run)
    split, jpegs = _samples(dataset)
    views = Pictures(dataset, recipe).views(jpegs)  # (n, 3, size, size) float32, less the mean
    raw = np.stack([_centre(pixels(jpeg), recipe.model.size) for jpeg in jpegs])
    text = {META: json.dumps(metadata(checkpoint, dataset), allow_nan=False)}
    weights = safetensors.save(checkpoint.weights | {MEAN: torch.from_numpy(mean_view(dataset, recipe))}, text)
    plain = PlainNetwork(recipe.model, classes, safetensors.load(weights))
    graph = (model := onnx_model(plain, text)).SerializeToString()
    with torch.inference_mode():
        ours = network(views).double().softmax(1)
        theirs = {WEIGHTS_FILE: plain(torch.from_numpy(raw))[0], GRAPH_FILE: _onnx_probabilities(graph, raw)}
    differences = {out / name: _difference(name, ours, probabilities) for name, probabilities in theirs.items()}
    for path, content in zip(differences, (weights, graph)):
        write_bytes_aside(path, content)
    parameters = parameter_count(recipe.model, classes)
    return Exported(checkpoint.step, parameters, len(model.graph.node), split, len(jpegs), differences)


def mean_view(dataset: Manifest, recipe: Recipe) -> np.ndarray:
    """Return the mean that is subtracted from a centre view: (3, size, size) float32, in grey levels of RGB.

    The centre of the mean image, also where `data.mean` is "aligned": the centre view was cut from there.
    """
    statistics, size = dataset.statistics(), recipe.model.size
    if recipe.data.mean == "colour":
        colour = statistics.mean_color.astype(np.float32)[:, None, None]
        return np.ascontiguousarray(np.broadcast_to(colour, (3, size, size)))
    return _centre(statistics.mean_image, size)


def metadata(checkpoint: Checkpoint, dataset: Manifest) -> dict[str, Any]:
    """Return the metadata of both files: plain JSON values."""
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


def _require_fit(checkpoint: Checkpoint, dataset: Manifest, run: Path) -> None:
    """Raise UserError where the network was trained on another data set, or has diverged."""
    if checkpoint.dataset != dataset.identity:
        raise UserError(
            f"{run}: trained on the data set {checkpoint.dataset[:12]}…, {dataset.root} is {dataset.identity[:12]}…, "
            "whose mean image the network has never seen subtracted; name the one that it was trained on"
        )
    for name, value in checkpoint.weights.items():
        if not bool(value.isfinite().all()):
            raise Diverged(f"{run}: {name} is not finite: its training has diverged; name an older checkpoint")


def _samples(dataset: Manifest) -> tuple[str, list[bytes]]:
    """Return stored pictures spread evenly over the validation split, or else the training split, and its name."""
    split = next((name for name in ("val", "train") if name in dataset.splits and dataset.splits[name].samples), None)
    if split is None:
        raise UserError(f"{dataset.root}: no pictures in val or train, on which to compare the files with the network")
    samples = dataset.splits[split].samples
    count = min(SAMPLES, samples)
    with SampleReader(dataset, split) as reader:
        return split, [jpeg.tobytes() for jpeg in reader.read((2 * np.arange(count) + 1) * samples // (2 * count))]


def _centre(picture: np.ndarray, size: int) -> np.ndarray:
    """(side, side, 3) → its middle, (3, size, size) float32."""
    start = (len(picture) - size) // 2
    middle = picture[start : start + size, start : start + size]
    return np.ascontiguousarray(middle.transpose(2, 0, 1), np.float32)


def _onnx_probabilities(graph: bytes, raw: np.ndarray) -> Tensor:
    """Return the probabilities (n, classes) that ONNX Runtime gives for pixels (n, 3, size, size) float32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = ERRORS_ONLY, 1  # more would be bound to cores
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["probabilities"], {"pixels": raw})[0])


def _difference(name: str, ours: Tensor, theirs: Tensor) -> float:
    """Return the greatest difference between probabilities. Raises UserError if it is too large, or not a number."""
    if not bool(ours.isfinite().all()):
        raise Diverged("the network's outputs are not finite numbers: its training has diverged")
    greatest = float((ours - theirs).abs().max())
    if not greatest <= MAX_DIFFERENCE:  # also where it is not a number
        raise UserError(
            f"{name}: its probabilities differ from the network's by {greatest:.1e}, where {MAX_DIFFERENCE:.0e} is the "
            "most; nothing was written; a defect of ours, or of the package onnxruntime: try another version of it"
        )
    return greatest
