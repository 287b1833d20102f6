"""Exported files: their content, ONNX Runtime and plain torch on them against our network; every refusal."""

import json
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open

from conftest import CLASSES, ROOT, build, digests
from networks import HALVES, apart, drawn, images, narrow
from pipeline import manifest
from pipeline.manifest import Manifest
from pipeline.online import Loader
from reference import jpeg_pixels
from runs import beginning, one_line, trainer
from stored import jpegs
from trainer import checkpoint as checkpoints
from trainer import export
from trainer import recipe as recipes
from trainer.checkpoint import Checkpoint
from trainer.layers import ModelRecipe
from trainer.model import Grouped

RECIPE, STEP, SHAPE = narrow("original", size=224), 4321, (3, 224, 224)
TWO_LOCAL = ('model.layers.local3={sees="own"}', "model.columns=2", "model.layers.local3.overhang=1")
CASES = [
    *((name, ()) for name in (*recipes.names(), HALVES)),
    ("original", ("model.dropout=0.3", "model.lrn_size=1")),
    ("original", ("model.lrn_size=21", "model.lrn_k=3.0")),  # more maps than a column has
    *((name, (pool,)) for name in ("tanh", "figure1-tanh") for pool in ("model.pool_size=4", "model.pool_stride=3")),
    ("cifar-13", TWO_LOCAL),
]


def session(graph: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(graph, options)


@dataclass
class Exported:
    """A run of random weights, by which the pictures differ; the files that `export` wrote of it; what it said."""

    data: Path
    run: Path
    weights: dict[str, torch.Tensor]
    output: str

    @property
    def dataset(self) -> Manifest:
        return manifest.load(self.data)

    @property
    def folder(self) -> Path:
        return self.run / "export"

    def probabilities(self, pixels: np.ndarray) -> np.ndarray:
        return session((self.folder / "model.onnx").read_bytes()).run(["probabilities"], {"pixels": pixels})[0]


def exported(data: Path, run: Path) -> Exported:
    dataset, weights = manifest.load(data), drawn(RECIPE.model, 3, torch.float32)
    classes = tuple(record.wnid for record in dataset.classes)
    velocity = {name: torch.zeros_like(value) for name, value in weights.items()}
    checkpoint = Checkpoint(STEP, RECIPE, classes, dataset.identity, weights, velocity, *beginning(STEP))
    checkpoints.save(run, checkpoint)
    result = trainer("export", run, "--data", data)
    assert result.exit_code == 0, result.output
    return Exported(data, run, weights, result.output)


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Read only."""
    return exported(dataset, tmp_path_factory.mktemp("trained") / "run 1")


def centres(dataset: Manifest) -> np.ndarray:
    """Of the 256 × 256 pixels of every validation picture, by Pillow, the middle as the files take it."""
    windows = [jpeg_pixels(jpeg)[16:240, 16:240].transpose(2, 0, 1) for jpeg in jpegs(dataset.root, "val")]
    return np.stack(windows).astype(np.float32)


def of_the_loader(dataset: Manifest, weights: dict[str, torch.Tensor], **options: str) -> np.ndarray:
    """Probabilities of every validation picture, decoded and centred by DALI, of the network in float64."""
    network = Grouped(RECIPE.model, len(CLASSES)).double()
    network.load(weights)
    with Loader(dataset, "val", batch_size=4, views="centre", **options) as loader, torch.inference_mode():
        return torch.cat([network(batch.images.double()) for batch in loader]).softmax(1).numpy()


def test_the_graph_takes_raw_pixels_and_gives_what_evaluation_sees(trained: Exported):
    pixels = centres(trained.dataset)
    expected = of_the_loader(trained.dataset, trained.weights)
    assert expected.std(0).max() > 0.1  # pictures differ
    np.testing.assert_allclose(trained.probabilities(pixels), expected, atol=2e-5)
    assert np.abs(trained.probabilities(pixels + 1) - expected).max() > 1e-3  # and a grey level shows


def test_the_files_hold_the_weights_the_mean_and_what_they_are(trained: Exported):
    with safe_open(trained.folder / "model.safetensors", framework="numpy") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    mean = trained.dataset.statistics().mean_image[16:240, 16:240].transpose(2, 0, 1)
    assert tensors.keys() == trained.weights.keys() | {"mean"}
    assert {value.dtype for value in tensors.values()} == {np.dtype(np.float32)}
    assert all((tensors[name] == value.numpy()).all() for name, value in trained.weights.items())
    assert (tensors["mean"] == mean.astype(np.float32)).all()
    graph = session((trained.folder / "model.onnx").read_bytes())
    assert metadata == graph.get_modelmeta().custom_metadata_map
    about = json.loads(metadata["penstock"])
    assert about["classes"] == [{"wnid": each.wnid, "words": each.words} for each in trained.dataset.classes]
    assert (about["step"], about["dataset"], about["model"]["dropout"]) == (STEP, trained.dataset.identity, 0.5)
    assert about["model"]["layers"]["conv1"]["then"] == ["lrn", "pool", "relu"]
    assert about["input"]["view"] == "rows and columns 16 to 239 of a picture of 256 x 256 pixels"
    assert [about["input"][key] for key in ("colours", "range", "shape")] == ["RGB", [0, 255], ["n", 3, 224, 224]]


def test_the_command_says_what_it_wrote_and_nothing_speaks_past_it(
    trained: Exported, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """And writes the same bytes again."""
    (file,) = checkpoints.files(trained.run)
    result = trainer("export", file, "--data", trained.data, "--out", tmp_path / "out")
    assert "".join(capfd.readouterr()) == ""
    assert digests(tmp_path / "out") == digests(trained.folder)
    parameters = sum(value.numel() for value in trained.weights.values())
    nodes = len(onnx.load(trained.folder / "model.onnx").graph.node)
    first, second, third, *_ = result.output.splitlines()
    assert first.startswith(f"{tmp_path}/out/model.safetensors  ")
    assert first.endswith(f"{parameters:,} parameters of step {STEP:,}, and mean")
    assert second.endswith(f"{nodes} nodes")
    assert re.search(r"on 9 pictures of val: .* at most \S+e-0[6-9] and \S+e-0[6-9]$", third), third


def test_the_examples_of_the_document_compute_the_network(
    trained: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """The code stands in docs/export.md, and runs without us."""
    torch_code, onnx_code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL)
    imported = set(re.findall(r"^(?:import|from) (\w+)", torch_code + onnx_code, re.MULTILINE))
    assert imported == {"torch", "safetensors", "json", "numpy", "onnxruntime", "PIL"}
    pixels = centres(trained.dataset)
    shutil.copytree(trained.folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "picture.jpg").write_bytes(jpegs(trained.data, "val")[0])
    monkeypatch.chdir(tmp_path)
    exec(torch_code, plain := dict[str, Any]())
    expected = of_the_loader(trained.dataset, trained.weights)
    with torch.inference_mode():
        np.testing.assert_allclose(plain["alexnet"](torch.from_numpy(pixels)).numpy(), expected, atol=2e-5)
    exec(onnx_code, graph := dict[str, Any]())
    np.testing.assert_allclose(graph["probabilities"], expected[:1], atol=2e-5)
    assert capfd.readouterr().out == trained.dataset.classes[int(expected[0].argmax())].words + "\n"


@pytest.mark.parametrize("mean", ["centre", "aligned", "colour"])
def test_each_kind_of_mean_is_what_the_loader_subtracts(trained: Exported, mean: str):
    recipe = replace(RECIPE, data=replace(RECIPE.data, mean=mean))
    with Loader(trained.dataset, "val", batch_size=9, views="centre", mean=mean) as loader:
        seen = next(loader).images.numpy()
    np.testing.assert_allclose(centres(trained.dataset) - export.mean_view(trained.dataset, recipe), seen, atol=1e-4)


def test_a_data_set_without_validation_is_compared_on_training_pictures(raw: Path, tmp_path: Path):
    assert build(raw / "train", tmp_path / "data", "--workers", 1, "--holdout", 0).exit_code == 0
    assert "on 16 pictures of train" in exported(tmp_path / "data", tmp_path / "run").output


def refused(data: Path, run: Path, out: Path, *words: str) -> None:
    """One line, and nothing is trained."""
    one_line(trainer("export", run, "--data", data, "--out", out), *words)
    assert not out.exists()


def copied(trained: Exported, run: Path, **changes: Any) -> Path:
    """The run of `trained` with another checkpoint."""
    checkpoints.save(run, replace(checkpoints.load(trained.run), **changes))
    return run


def test_what_is_not_there_is_refused(trained: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    refused(trained.data, tmp_path, out, "no checkpoint in", "train first")
    (file,) = checkpoints.files(trained.run)
    one_line(trainer("export", file, "--data", trained.data), "is a checkpoint file", "--out")
    one_line(
        trainer("export", trained.run, "--data", trained.data, "--out", file), f"{file}: is a file, not a directory"
    )
    monkeypatch.setitem(sys.modules, "onnx", None)
    words = "needs the package onnx:", "pip install 'penstock-imagenet[export]'"
    refused(trained.data, trained.run, out, *words)


def test_other_data_is_refused(trained: Exported, tmp_path: Path):
    """Other classes, other pictures, pictures that are too small."""
    out, classes = tmp_path / "out", ("one", "three", "two")
    refused(trained.data, copied(trained, tmp_path / "1", classes=classes), out, "3 classes", "label 0 is one")
    run = copied(trained, tmp_path / "2", dataset="0" * 64)
    refused(trained.data, run, out, "trained on the data set 000000000000…", trained.dataset.identity[:12])
    large = replace(RECIPE, model=replace(RECIPE.model, size=300))
    weights = drawn(large.model, len(CLASSES), torch.float32)
    velocity = {name: torch.zeros_like(value) for name, value in weights.items()}
    run = copied(trained, tmp_path / "3", recipe=large, weights=weights, velocity=velocity)
    refused(trained.data, run, out, "images of 256 pixels, and the network sees 300", "--size")


def test_a_network_that_has_diverged_is_refused(trained: Exported, tmp_path: Path):
    """Numbers that are not finite, in the weights or only in what they give."""
    for number, value, words in ((1, np.nan, "conv3.bias"), (2, 3e38, "outputs")):
        weights = {name: each.clone() for name, each in trained.weights.items()}
        weights["conv3.bias"][:4] = value
        run = copied(trained, tmp_path / f"{number}", weights=weights)
        refused(trained.data, run, tmp_path / "out", words, "not finite", "has diverged")


def test_a_file_that_would_not_be_the_network_is_not_written(
    trained: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    graph_of, out = export.onnx_model, tmp_path / "out"

    def of_another_mean(network: export.PlainNetwork, text: dict[str, str]) -> onnx.ModelProto:
        network.mean += 9
        try:
            return graph_of(network, text)
        finally:
            network.mean -= 9

    for name, value, words in (
        ("onnx_model", of_another_mean, "model.onnx: its probabilities differ"),
        ("mean_view", lambda *_: np.full(SHAPE, np.nan, np.float32), "model.safetensors: its probabilities differ"),
        ("MAX_GRAPH_BYTES", 10_000, "weights of 0.00 GiB; an ONNX file holds"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(export, name, value)
            refused(trained.data, trained.run, out, words)


# The graph of any recipe


def mean_of(model: ModelRecipe) -> torch.Tensor:
    """(3, size, size) float32, of 90 to 110 grey levels."""
    return torch.linspace(90, 110, 3 * model.size**2).view(3, model.size, model.size)


def graph_of(model: ModelRecipe) -> onnx.ModelProto:
    """The graph of drawn weights and of `mean_of`."""
    tensors = {**drawn(model, 7, torch.float32), "mean": mean_of(model)}
    return export.onnx_model(export.PlainNetwork(model, 7, tensors), {"about": "π"})


@pytest.mark.filterwarnings("error")  # the exporter's own must not reach the user
@pytest.mark.parametrize(("name", "settings"), CASES, ids=lambda value: value if isinstance(value, str) else None)
def test_onnx_runtime_computes_what_the_network_computes_in_float64(name: str, settings: tuple[str, ...]):
    """Logits within 1e-5 of the greatest, of batches of one and of three; probabilities are their softmax."""
    model = narrow(name, *settings).model
    network = Grouped(model, 7).double()
    network.load(drawn(model, 7, torch.float32))
    run = session(graph_of(model).SerializeToString())
    for n in (1, 3):
        pixels = (images(model, n) + mean_of(model)).float()
        logits, probabilities = run.run(["logits", "probabilities"], {"pixels": pixels.numpy()})
        expected = network(pixels.double() - mean_of(model))
        assert logits.dtype == probabilities.dtype == np.float32
        assert expected.std() > 0.01
        assert apart(torch.from_numpy(logits), expected) < 1e-5
        np.testing.assert_allclose(probabilities, torch.from_numpy(logits).softmax(1), atol=1e-6)


def test_old_runtimes_can_read_the_graph():
    """Opset 17 and IR 8 of 2022, no operator of another domain; one free dimension; the metadata."""
    graph = graph_of(narrow("original").model)
    assert (graph.ir_version, [(opset.domain, opset.version) for opset in graph.opset_import]) == (8, [("", 17)])
    assert {node.domain for node in graph.graph.node} == {""}
    run = session(graph.SerializeToString())
    (pixels,), outputs = run.get_inputs(), run.get_outputs()
    assert (pixels.name, pixels.shape) == ("pixels", ["n", 3, 100, 100])
    assert [(output.name, output.shape) for output in outputs] == [("probabilities", ["n", 7]), ("logits", ["n", 7])]
    assert [(pair.key, pair.value) for pair in graph.metadata_props] == [("about", "π")]
