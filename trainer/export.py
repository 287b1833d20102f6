"""Write a run's network for other programs: safetensors and ONNX, compared with ours before they appear."""

import io
import json
import warnings
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import torch as safetensors
from torch import Tensor

from pipeline import UserError, manifest
from pipeline.cli import Command
from pipeline.files import write_bytes_aside
from pipeline.manifest import Manifest
from pipeline.online.samples import SampleReader
from trainer import checkpoint as checkpoints
from trainer.checkpoint import META, Checkpoint, load_network, require_same_data
from trainer.layers import ModelRecipe, parameter_count
from trainer.lrn import BETA, SAME_MAP_ALPHA, SAME_MAP_SIZE
from trainer.model import Grouped, Weights
from trainer.nonfinite import require_finite_outputs
from trainer.options import DATA, PATH, RUN, require_writable
from trainer.pictures import Pictures, pixels
from trainer.recipe import Recipe

WEIGHTS_FILE, GRAPH_FILE = "model.safetensors", "model.onnx"
OPSET = 17  # of 2022, so that older runtimes read it too
MAX_GRAPH_BYTES = 2**31 - 2**24  # 2 GiB, the limit of protobuf, with room for what is not weights
SAMPLES = 16  # pictures on which the files are compared with our network
MAX_DIFFERENCE = 1e-4  # of a probability


class PlainNetwork(Grouped):
    """The network in evaluation, without hand-written gradients, which torch.onnx cannot export.

    `tensors` are those of the safetensors file: the weights, and the mean, which is subtracted from the pixels.
    """

    mean: Tensor  # (3, size, size) float32, grey levels

    def __init__(self, recipe: ModelRecipe, classes: int, tensors: Weights) -> None:
        super().__init__(recipe, classes)
        self.load(tensors)
        self.register_buffer("mean", tensors["mean"])

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return probabilities and logits, (n, classes) float32, of (n, 3, size, size) float32, RGB grey levels."""
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


def onnx_model(network: PlainNetwork, text: dict[str, str]) -> Any:
    """Return the onnx.ModelProto of `network`, with `text` as its metadata.

    `pixels` (n, 3, size, size) float32 → `probabilities` and `logits`, (n, classes) float32, for any n.

    Raises UserError: more weights than an ONNX file can hold.
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
    onnx.helper.set_model_props(model, text)
    onnx.checker.check_model(model, full_check=True)
    return model


def mean_view(dataset: Manifest, recipe: Recipe) -> np.ndarray:
    """Return the mean, (3, size, size) float32, that is subtracted from a centre view, in grey levels of RGB."""
    statistics, size = dataset.statistics(), recipe.model.size
    if recipe.data.mean == "colour":
        return np.tile(statistics.mean_color.astype(np.float32)[:, None, None], (1, size, size))
    return _centre(statistics.mean_image, size)  # for mean = "aligned", too: a centre view's part of the image


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


def _samples(dataset: Manifest) -> tuple[str, list[bytes]]:
    """Return the name of the validation split, or else of the training split, and JPEGs spread evenly over it."""
    split = next((name for name in ("val", "train") if name in dataset.splits and dataset.splits[name].samples), None)
    if split is None:
        raise UserError(f"{dataset.root}: no pictures in val or train, on which to compare the files with the network")
    samples = dataset.splits[split].samples
    count = min(SAMPLES, samples)
    with SampleReader(dataset, split) as reader:
        return split, [jpeg.tobytes() for jpeg in reader.read((2 * np.arange(count) + 1) * samples // (2 * count))]


def _centre(picture: np.ndarray, size: int) -> np.ndarray:
    """Return the middle (3, size, size) float32 of (side, side, 3)."""
    start = (len(picture) - size) // 2
    middle = picture[start : start + size, start : start + size]
    return np.ascontiguousarray(middle.transpose(2, 0, 1), np.float32)


def _onnx_probabilities(graph: bytes, raw: np.ndarray) -> Tensor:
    """Return the probabilities (n, classes) that ONNX Runtime gives for pixels (n, 3, size, size) float32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: warnings about devices and threads do not concern our users
    options.intra_op_num_threads = 1  # more would be bound to cores
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["probabilities"], {"pixels": raw})[0])


def _difference(name: str, ours: Tensor, theirs: Tensor) -> float:
    """Return the greatest difference between probabilities. Raises UserError if it is too large, or not a number."""
    greatest = float((ours - theirs).abs().max())
    if not greatest <= MAX_DIFFERENCE:  # also where it is not a number
        raise UserError(
            f"{name}: its probabilities differ from the network's by {greatest:.1e}, where {MAX_DIFFERENCE:.0e} is the "
            "most; nothing was written; a defect of ours, or of the package onnxruntime: try another version of it"
        )
    return greatest


@click.command(cls=Command, interrupted="nothing was written, or whole files")
@RUN
@DATA
@click.option("--out", type=PATH, help="The folder of the two files.  [default: RUN/export]")
def export(run: Path, data: Path, out: Path | None) -> None:
    """Write a run's network for other programs: model.safetensors and model.onnx.

    RUN is a run directory, of which the newest checkpoint is taken, or a checkpoint file; DATA is what it was trained
    on. On pictures of it both files must give the network's own probabilities before they are written.

    \b
    Examples:
      python -m trainer export runs/1 --data /data/imagenet-256
      python -m trainer export runs/1/checkpoints/best.safetensors --data /data/imagenet-256 --out best
    """
    if out is None and run.is_file():
        raise UserError(f"{run}: is a checkpoint file; name a folder for what is exported, too: --out FOLDER")
    for package in ("onnx", "onnxruntime"):
        if find_spec(package) is None:
            raise UserError(f"trainer export needs the package {package}: pip install 'penstock-imagenet[export]'")
    checkpoint, dataset = checkpoints.load(run), manifest.load(data)
    recipe, classes = checkpoint.recipe, len(checkpoint.classes)
    folder = run / "export" if out is None else out
    paths = folder / WEIGHTS_FILE, folder / GRAPH_FILE
    for path in paths:
        require_writable(path, 2 * 4 * parameter_count(recipe.model, classes))  # of both, float32
    network = load_network(checkpoint, dataset, (torch.device("cpu"),) * recipe.model.columns, run)
    require_same_data(checkpoint, dataset.identity, run)  # its mean image is exported, too
    split, jpegs = _samples(dataset)
    views = Pictures(dataset, recipe).views(jpegs)  # (n, 3, size, size) float32, less the mean
    raw = np.stack([_centre(pixels(jpeg, dataset.recipe.size), recipe.model.size) for jpeg in jpegs])
    text = {META: json.dumps(metadata(checkpoint, dataset), allow_nan=False)}
    weights = safetensors.save(checkpoint.weights | {"mean": torch.from_numpy(mean_view(dataset, recipe))}, text)
    plain = PlainNetwork(recipe.model, classes, safetensors.load(weights))
    graph = (model := onnx_model(plain, text)).SerializeToString()
    with torch.inference_mode():
        ours = network(views).double().softmax(1)
        require_finite_outputs(ours, network.name)
        of_weights = _difference(WEIGHTS_FILE, ours, plain(torch.from_numpy(raw))[0])
        of_graph = _difference(GRAPH_FILE, ours, _onnx_probabilities(graph, raw))
    for path, content in zip(paths, (weights, graph)):
        write_bytes_aside(path, content)
    parameters = parameter_count(recipe.model, classes)
    lines = [
        f"{paths[0]}  {len(weights) / 1e6:,.1f} MB: {parameters:,} parameters of step {checkpoint.step:,}, and mean",
        f"{paths[1]}  {len(graph) / 1e6:,.1f} MB: {len(model.graph.node)} nodes",
        f"compared with the network on {len(jpegs)} pictures of {split}: probabilities differ by at most "
        f"{of_weights:.1e} and {of_graph:.1e}",
        f'load: safetensors.torch.load_file("{paths[0]}")',
        f'      onnxruntime.InferenceSession("{paths[1]}").run(["probabilities"], {{"pixels": pixels}})',
        "docs/export.md has an example of each, and what they are to be given",
    ]
    click.echo("\n".join(lines))
