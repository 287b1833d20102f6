"""`python -m trainer index` and `similar`: a run's features and codes, pictures looked up in them, bad indexes."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.numpy import load_file

from conftest import ROOT, digests
from networks import drawn, narrow
from pipeline import manifest
from pipeline.online.samples import SampleReader
from runs import beginning, one_line, trainer
from trainer import checkpoint as checkpoints
from trainer import data as loaders
from trainer.checkpoint import Checkpoint, load_network
from trainer.parallel import TwoColumnNet
from trainer.pictures import Pictures
from trainer.retrieval import codes
from trainer.retrieval.index import features
from trainer.retrieval.search import Index, digest

CPU = (torch.device("cpu"),) * 2
RECIPE = narrow("original")  # 48 units in fc7
UNITS = 48


def save_run(run: Path, data: Path, factor: float = 1.0, step: int = 3) -> dict[str, torch.Tensor]:
    """A run directory of one checkpoint, of the weights of tests/networks.py; fc7's times `factor`."""
    dataset = manifest.load(data)
    weights = drawn(RECIPE.model, len(dataset.classes), torch.float32)
    weights = {name: value * (factor if name.startswith("fc7") else 1) for name, value in weights.items()}
    velocity = {name: torch.zeros_like(value) for name, value in weights.items()}
    classes = tuple(record.wnid for record in dataset.classes)
    state = Checkpoint(step, RECIPE, classes, dataset.identity, weights, velocity, *beginning(step))
    checkpoints.save(run, state)
    return weights


def index(run: Path, data: Path, *options: object) -> Result:
    return trainer("index", run, data, "--devices", "cpu,cpu", *options)


def similar(run: Path, data: Path, *words: object) -> Result:
    return trainer("similar", *words, "--checkpoint", run, "--data", data, "--devices", "cpu,cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "STEPS", 40)


@pytest.fixture(scope="session")
def indexed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an index. Read only."""
    run = tmp_path_factory.mktemp("indexed") / "run"
    save_run(run, dataset)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codes, "STEPS", 40)
        result = index(run, dataset)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert f"41 images, {UNITS} features of fc7 each: " in lines[0]
    assert " images/s  stall " in lines[0]
    assert lines[1].startswith("9 queries: of the 6 nearest, the nearest 6 codes hold ")
    assert lines[-1] == f"index: {run / 'index'}"
    return run


@pytest.fixture
def run(indexed: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(indexed, tmp_path / "run"))


@pytest.fixture
def bare(indexed: Path, tmp_path: Path) -> Path:
    """A run without an index."""
    shutil.copytree(indexed / "checkpoints", tmp_path / "bare" / "checkpoints")
    return tmp_path / "bare"


@pytest.fixture
def picture(raw: Path) -> Path:
    return raw / "train" / "stripes" / "0005.jpg"


def network(run: Path, data: Path) -> TwoColumnNet:
    return load_network(checkpoints.load(run), manifest.load(data), CPU, run)


# index


def test_the_features_are_what_the_last_layer_sees_of_every_image(dataset: Path, indexed: Path):
    stored = np.load(indexed / "index" / "features.npy", allow_pickle=False)
    assert (stored.shape, stored.dtype) == ((41, UNITS), np.float16)
    data, net = manifest.load(dataset), network(indexed, dataset)
    with torch.inference_mode(), loaders.evaluation(data, RECIPE, "train", "centre", CPU) as loader:
        hidden = np.concatenate([net.hidden(batch.replicas).numpy() for batch in loader])
    np.testing.assert_array_equal(stored, hidden.astype(np.float16))
    assert np.std(stored, 0).max() > 1  # the images differ

    # what the last layer makes of them in numpy, against the whole network in torch
    weights = checkpoints.load(indexed).weights
    with SampleReader(data, "train") as reader:
        views = Pictures(data, RECIPE).views([jpeg.tobytes() for jpeg in reader.read(np.arange(41))])
    with torch.inference_mode():
        logits = net(views).numpy()
    by_numpy = stored.astype(np.float64) @ weights["fc8.weight"].double().numpy().T + weights["fc8.bias"].numpy()
    np.testing.assert_allclose(by_numpy, logits, atol=2e-3 * np.abs(logits).max())
    batches = list(features(net, data, RECIPE, "train"))
    np.testing.assert_array_equal(np.concatenate([ids for ids, _ in batches]), np.arange(41))
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in batches]), hidden)


def test_the_files_of_an_index(dataset: Path, bare: Path, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / "link"
    out.symlink_to(tmp_path / "elsewhere")
    options = ("--split", "val", "--bits", 40, "--float32", "--out", out)
    result = index(bare, dataset, *options)
    assert result.exit_code == 0, result.output
    assert "9 queries: of the 6 nearest" in result.output  # its own rows
    assert os.listdir(bare) == ["checkpoints"]
    content = json.loads((out / "index.json").read_text())
    files, weights = content.pop("files"), checkpoints.load(bare).weights
    del content["checksum"]
    assert content == {
        "format": 1, "step": 3, "weights": digest(weights), "dataset": manifest.load(dataset).identity,
        "split": "val", "layer": "fc7", "n": 9, "units": UNITS, "bits": 40, "dtype": "float32",
    }  # fmt: skip
    first = digests(out)
    assert sorted(first) == ["autoencoder.safetensors", "codes.npy", "features.npy", "index.json"]
    for name, record in files.items():
        assert record["bytes"] == (out / name).stat().st_size
        assert record.get("sha256", first[name]) == first[name]
    stored, bits = np.load(out / "features.npy"), np.load(out / "codes.npy")
    layers = load_file(out / "autoencoder.safetensors")
    inputs = stored.astype(np.float64) @ layers["up"] + layers["bias"]
    assert (np.unpackbits(bits, axis=1) == (inputs > 0))[np.abs(inputs) > 1e-4].all()
    assert (bits.shape, stored.dtype) == ((9, 5), np.float32)
    np.testing.assert_array_equal(Index(out).rows, stored)
    changed = {**weights, "fc8.bias": weights["fc8.bias"] + 1}
    assert digest(changed) != digest(weights)
    one_line(index(bare, dataset, *options), "exists already", "--force")
    assert index(bare, dataset, *options, "--force").exit_code == 0
    assert digests(tmp_path / "elsewhere") == first
    assert out.is_symlink()


def test_what_cannot_be_indexed(dataset: Path, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for bits in (24, 33, 264):
        one_line(index(bare, dataset, "--bits", bits), f"--bits {bits}", "a multiple of 8 from 32 to 256")
    one_line(index(bare, dataset, "--split", "test"), "no split named 'test'")
    one_line(index(checkpoints.files(bare)[0], dataset), "is a file", "--out")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    one_line(index(bare, dataset, "--out", other, "--force"), "is not an index (it has thesis.txt)", "--out")
    one_line(index(bare, dataset, "--out", other / "thesis.txt"), "is a file")
    assert (other / "thesis.txt").read_text() == "mine"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**6))
        one_line(index(bare, dataset), "1.0 MB are free", "make room")
        patch.setitem(sys.modules, "faiss", None)
        one_line(index(bare, dataset), "needs the package faiss: pip install 'penstock-imagenet[retrieval]'")
    save_run(bare, dataset, factor=float("inf"), step=4)
    one_line(index(bare, dataset), "not finite")
    save_run(bare, dataset, factor=1e36, step=5)  # sums of such features are beyond float32's range
    one_line(index(bare, dataset), "float16 ends at 65,504", "--float32")
    assert os.listdir(bare) == ["checkpoints"]
    assert index(bare, dataset, "--float32").exit_code == 0
    assert len(np.unique(np.load(bare / "index" / "codes.npy"), axis=0)) > 20


def test_an_older_index_stays_until_the_new_one_is_whole(dataset: Path, run: Path, monkeypatch: pytest.MonkeyPatch):
    before, learn = digests(run / "index"), codes.learn
    for error, code in ((KeyboardInterrupt, 130), (OSError(28, "No space left on device"), 2)):

        def fail(*_: object, error: type[BaseException] | BaseException = error) -> None:
            raise error

        monkeypatch.setattr(codes, "learn", fail)
        result = index(run, dataset, "--bits", 32, "--force")
        assert (result.exit_code, len(result.output.splitlines())) == (code, 1), result.output
        assert digests(run / "index") == before
        assert not (run / "index" / "index.tmp").exists()
    monkeypatch.setattr(codes, "learn", learn)
    writer = os.open(run / "index", os.O_RDONLY)  # as another process has it
    fcntl.flock(writer, fcntl.LOCK_EX)
    one_line(index(run, dataset, "--force"), "another process writes it", "--out")
    os.close(writer)

    def flock(file: object, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    result = index(run, dataset, "--bits", 32, "--force")
    assert result.exit_code == 0
    assert result.stderr.startswith(f"warning: {run}/index: its file system has no locks")
    assert Index(run / "index").meta.bits == 32


@pytest.mark.proof
def test_what_a_killed_writer_left_goes_with_the_next(dataset: Path, bare: Path):
    """Killed while it learns the codes, beside the features that it has written."""
    line = [sys.executable, "-m", "trainer", "index", bare, dataset, "--devices", "cpu,cpu"]
    process = subprocess.Popen(list(map(str, line)), cwd=ROOT)
    unfinished = bare / "index" / "index.tmp"
    while not (unfinished / "features.npy").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert unfinished.exists()
    assert index(bare, dataset).exit_code == 0
    assert len(os.listdir(bare / "index")) == 4


# similar


@pytest.mark.parametrize("search", [(), ("--exact",)])
def test_the_nearest_images_of_a_picture(search: tuple[str, ...], raw: Path, dataset: Path, indexed: Path):
    """As JSON and as a table, against numpy over all features."""
    data, net = manifest.load(dataset), network(indexed, dataset)
    kind, stored = Pictures(data, RECIPE), np.load(indexed / "index" / "features.npy").astype(np.float64)
    paths = [raw / "train" / "stripes" / "0005.jpg", raw / "val" / "blobs" / "0001.jpg"]
    answers = similar(indexed, dataset, *paths, "--json", "--count", 4, *search)
    table = similar(indexed, dataset, *paths, "--index", indexed / "index", "--count", 1000, *search)
    assert (answers.exit_code, table.exit_code) == (0, 0), answers.output + table.output
    lines = [json.loads(line) for line in answers.output.splitlines()]
    assert [line["picture"] for line in lines] == list(map(str, paths))
    with SampleReader(data, "train") as reader:
        for i, (path, line) in enumerate(zip(paths, lines)):
            with torch.inference_mode():
                query = net.hidden(kind.views([kind.stored(path.read_bytes())]))[0].double().numpy()
            distances = np.sqrt(((stored - query) ** 2).sum(1))
            ids, nearest = np.argsort(distances, kind="stable"), line["nearest"]
            assert [image["id"] for image in nearest] == ids[:4].tolist()  # all 41 rows are candidates
            np.testing.assert_allclose([image["distance"] for image in nearest], distances[ids[:4]], 1e-5, 1e-3)
            assert [image["key"] for image in nearest] == [reader.key(int(number)) for number in ids[:4]]
            assert [image["label"] for image in nearest] == reader.labels(ids[:4]).tolist()
            assert all(image["words"] == data.classes[image["label"]].words for image in nearest)
            head, *rows = table.output.splitlines()[42 * i : 42 * (i + 1)]
            assert head == str(path)
            assert [row.split()[1] for row in rows] == list(map(str, ids))
            assert rows[1].split()[0] == f"{distances[ids[1]]:.4g}"
            assert rows[0].endswith("  " + nearest[0]["words"])
    first, second = lines[0]["nearest"][:2]
    assert first["words"] == "stripes"
    assert first["distance"] < 0.01 * second["distance"]  # the picture itself


def test_a_picture_that_is_none_is_named_and_the_others_come(raw: Path, dataset: Path, indexed: Path, tmp_path: Path):
    good, bad = raw / "train" / "stripes" / "0005.jpg", raw / "train" / "checks" / "0003.jpg"
    (tmp_path / "empty.png").touch()
    words = (bad, good, tmp_path / "empty.png", tmp_path / "missing.jpg", tmp_path)
    result = similar(indexed, dataset, *words)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"{bad}: truncated")
    assert "empty.png: empty: " in result.stderr
    assert "missing.jpg: unreadable: No such file or directory" in result.stderr
    assert "4 could not be used" in result.stderr.splitlines()[-1]
    assert result.stdout == similar(indexed, dataset, good).stdout
    lines = [json.loads(line) for line in similar(indexed, dataset, *words, "--json").stdout.splitlines()]
    assert [line.get("error", "none") for line in lines] == ["truncated", "none", "empty", "unreadable", "unreadable"]
    only = similar(indexed, dataset, bad)
    assert (only.exit_code, only.stdout) == (2, "")


def test_an_index_that_is_of_no_use_is_refused(
    picture: Path, dataset: Path, small: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    one_line(similar(run, dataset, picture, "--index", tmp_path / "none"), "no index there", "python -m trainer index")
    one_line(similar(checkpoints.files(run)[0], dataset, picture), "is a file", "--index")
    one_line(similar(run, small, picture), "of the data set", "this one is")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "faiss", None)
        one_line(similar(run, dataset, picture), "needs the package faiss: pip install 'penstock-imagenet[retrieval]'")
        assert similar(run, dataset, picture, "--exact").exit_code == 0
    save_run(run, dataset, factor=2.0, step=4)
    one_line(similar(run, dataset, picture), "of another network", "at step 3", "make it again")


@pytest.mark.parametrize("name", ["index.json", "features.npy", "codes.npy", "autoencoder.safetensors"])
def test_a_damaged_index_is_refused(name: str, picture: Path, dataset: Path, run: Path):
    file = run / "index" / name
    intact = file.read_bytes()
    changes = [(intact[:-2], "amaged"), (b"", "amaged")]
    if name == "index.json":
        for old, new, words in (
            ('"format": 1', '"format": 2', "format 2, this version"),
            ('"bits": 128', '"bits": 64', "its checksum does not fit"),
            ('"units"', '"unit"', "another version"),
            ("{", "[" * 10_000, "damaged"),
            ('"units": ', '"more": Infinity, "units": ', "damaged"),
        ):
            assert old.encode() in intact
            changes.append((intact.replace(old.encode(), new.encode(), 1), words))
    elif name == "codes.npy":
        changes.append((intact[:-1] + bytes([intact[-1] ^ 1]), "its SHA-256 is not that in index.json"))
    for damaged, words in changes:
        file.write_bytes(damaged)
        one_line(similar(run, dataset, picture), str(file), words, "make it again: python -m trainer index --force")
    file.unlink()
    message = "no index there" if name == "index.json" else f"{file}: missing"
    one_line(similar(run, dataset, picture), message, "python -m trainer index")
