"""`python -m trainer index`: the features of a run, its codes, and a directory that is whole or not there."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from conftest import ROOT, digests
from pipeline import manifest
from pipeline.online.samples import SampleReader
from retrieved import RECIPE, UNITS, index, save_run
from runs import one_line
from trainer import checkpoint as checkpoints
from trainer import data as feed
from trainer.checkpoint import load_network
from trainer.parallel import TwoColumnNet
from trainer.pictures import Pictures
from trainer.retrieval import codes, folder
from trainer.retrieval.features import features
from trainer.retrieval.folder import appearing
from trainer.retrieval.index import Index, digest

CPU = (torch.device("cpu"),) * 2


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "STEPS", 40)


@pytest.fixture
def run(dataset: Path, tmp_path: Path) -> Path:
    save_run(tmp_path / "run", dataset)
    return tmp_path / "run"


def network(run: Path, data: Path) -> TwoColumnNet:
    return load_network(checkpoints.load(run), manifest.load(data), CPU, run)


def test_the_features_are_what_the_last_layer_sees_of_every_image(dataset: Path, run: Path):
    result = index(run, dataset)
    assert result.exit_code == 0, result.output
    said = result.output.splitlines()
    assert f"41 images, {UNITS} features of fc7 each: " in said[0]
    assert " images/s  stall " in said[0]
    assert said[1].startswith("9 queries: of the 6 nearest, the nearest 6 codes hold ")
    assert said[-1] == f"index: {run / 'index'}"
    stored = np.load(run / "index" / "features.npy", allow_pickle=False)
    assert (stored.shape, stored.dtype) == ((41, UNITS), np.float16)
    data, net = manifest.load(dataset), network(run, dataset)
    with torch.inference_mode(), feed.evaluation(data, RECIPE, "train", "centre", CPU) as loader:
        seen = np.concatenate([net.hidden(batch.replicas).numpy() for batch in loader])
    np.testing.assert_array_equal(stored, seen.astype(np.float16))
    assert np.std(stored, 0).max() > 1  # the images differ

    # what the last layer makes of them in numpy, against the whole network in torch
    weights = checkpoints.load(run).weights
    with SampleReader(data, "train") as reader:
        views = Pictures(data, RECIPE).views([jpeg.tobytes() for jpeg in reader.read(np.arange(41))])
    with torch.inference_mode():
        logits = net(views).numpy()
    by_numpy = stored.astype(np.float64) @ weights["fc8.weight"].double().numpy().T + weights["fc8.bias"].numpy()
    np.testing.assert_allclose(by_numpy, logits, atol=2e-3 * np.abs(logits).max())

    batches = list(features(net, data, RECIPE, "train"))
    np.testing.assert_array_equal(np.concatenate([ids for ids, _ in batches]), np.arange(41))
    np.testing.assert_array_equal(np.concatenate([each for _, each in batches]), seen)


def test_the_directory_says_what_it_is_of(dataset: Path, run: Path, tmp_path: Path):
    out = tmp_path / "elsewhere" / "mine"
    result = index(run, dataset, "--split", "val", "--bits", 40, "--float32", "--out", out)
    assert result.exit_code == 0, result.output
    assert "9 queries: of the 6 nearest" in result.output  # its own rows
    assert not (run / "index").exists()
    said = json.loads((out / "index.json").read_text())
    files, weights = said.pop("files"), checkpoints.load(run).weights
    del said["checksum"]
    assert said == {
        "format": 1, "step": 3, "weights": digest(weights), "dataset": manifest.load(dataset).identity,
        "split": "val", "layer": "fc7", "n": 9, "units": UNITS, "bits": 40, "dtype": "float32",
    }  # fmt: skip
    found = digests(out)
    assert sorted(found) == ["autoencoder.safetensors", "codes.npy", "features.npy", "index.json"]
    for name, record in files.items():
        assert record["bytes"] == (out / name).stat().st_size
        assert record.get("sha256", found[name]) == found[name]
    stored, bits = np.load(out / "features.npy"), np.load(out / "codes.npy")
    layers = load_file(out / "autoencoder.safetensors")
    inputs = stored.astype(np.float64) @ layers["up"] + layers["bias"]
    assert (np.unpackbits(bits, axis=1) == (inputs > 0))[np.abs(inputs) > 1e-4].all()
    assert (bits.shape, stored.dtype) == ((9, 5), np.float32)
    loaded = Index(out)
    assert type(loaded.rows.mapped) is np.memmap
    changed = {**weights, "fc8.bias": weights["fc8.bias"] + 1}
    assert digest(changed) != digest(weights)


def test_the_same_command_gives_the_same_bytes(dataset: Path, run: Path):
    first = (index(run, dataset), digests(run / "index"))[1]
    assert index(run, dataset).exit_code == 0
    assert digests(run / "index") == first


@pytest.mark.parametrize("bits", [24, 33, 264])
def test_impossible_bits(bits: int, dataset: Path, run: Path):
    one_line(index(run, dataset, "--bits", bits), f"--bits {bits}", "a multiple of 8 from 32 to 256")


def test_what_cannot_be_indexed(dataset: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one_line(index(run, dataset, "--split", "test"), "no split named 'test'")
    one_line(index(checkpoints.files(run)[0], dataset), "is a file", "--out")
    one_line(index(tmp_path / "nothing", dataset), "no checkpoint in")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    one_line(index(run, dataset, "--out", mine), "is not an index (it has thesis.txt)", "--out")
    one_line(index(run, dataset, "--out", mine / "thesis.txt"), "is a file")
    one_line(index(run, dataset, "--out", "/proc"), "is where a disk is mounted")
    assert (mine / "thesis.txt").read_text() == "mine"
    save_run(tmp_path / "large", dataset, factor=1e4)
    one_line(index(tmp_path / "large", dataset), "float16 ends at 65,504", "--float32")
    assert os.listdir(tmp_path / "large") == ["checkpoints"]
    assert index(tmp_path / "large", dataset, "--float32").exit_code == 0
    save_run(tmp_path / "infinite", dataset, factor=float("inf"))
    one_line(index(tmp_path / "infinite", dataset), "not finite")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10**6))
    one_line(index(run, dataset), "1.0 MB are free", "make room")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "faiss", None)
    one_line(index(run, dataset), "needs the package faiss: pip install 'penstock-imagenet[retrieval]'")
    assert os.listdir(run) == ["checkpoints"]


def test_an_older_index_stays_until_the_new_one_is_whole(dataset: Path, run: Path, monkeypatch: pytest.MonkeyPatch):
    assert index(run, dataset).exit_code == 0
    before, learnt = digests(run / "index"), codes.learnt
    for error, code in ((KeyboardInterrupt, 130), (OSError(28, "No space left on device"), 2)):

        def fail(*_: object, error: type[BaseException] | BaseException = error) -> None:
            raise error

        monkeypatch.setattr(codes, "learnt", fail)
        result = index(run, dataset, "--bits", 32)
        assert (result.exit_code, len(result.output.splitlines())) == (code, 1), result.output
        assert digests(run / "index") == before
        assert sorted(os.listdir(run)) == ["checkpoints", "index"]
    monkeypatch.setattr(codes, "learnt", learnt)
    assert index(run, dataset, "--bits", 32).exit_code == 0
    assert Index(run / "index").meta.bits == 32
    assert sorted(os.listdir(run)) == ["checkpoints", "index"]


KILLED = """
import sys, time
from pathlib import Path
from trainer.retrieval.folder import appearing
with appearing(Path(sys.argv[1])) as folder:
    (folder / "file").write_text("new")
    print(folder, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path: Path):
    place = tmp_path / "index"
    with appearing(place) as first:
        (first / "file").write_text("old")
    writer = subprocess.Popen([sys.executable, "-c", KILLED, place], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert writer.stdout
    left = Path(writer.stdout.readline().strip())
    with appearing(place) as another:
        (another / "file").write_text("another")
    assert left.is_dir()  # of one who lives
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert (place / "file").read_text() == "another"
    assert left.is_dir()
    with appearing(place):
        assert not left.exists()
    assert os.listdir(tmp_path) == ["index"]


@pytest.mark.parametrize("flag", [folder.EXCHANGE, 1 << 10])  # the second no file system knows
def test_a_folder_takes_the_place_of_another(flag: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folder, "EXCHANGE", flag)
    for text in ("old", "new"):
        with appearing(tmp_path / "index") as aside:
            (aside / text).write_text(text)
            number = os.open(aside, os.O_RDONLY)
            with pytest.raises(BlockingIOError):
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(number)
        assert os.listdir(tmp_path) == ["index"]
        assert os.listdir(tmp_path / "index") == [text]


def test_a_link_to_an_index_stays_a_link(dataset: Path, run: Path, tmp_path: Path):
    disk = tmp_path / "disk"
    (disk / "mine").mkdir(parents=True)
    (run / "index").symlink_to(disk / "mine")
    for bits in (32, 40):
        result = index(run, dataset, "--bits", bits)
        assert result.exit_code == 0, result.output
        assert (run / "index").is_symlink()
        assert Index(disk / "mine").meta.bits == bits
        assert (sorted(os.listdir(run)), os.listdir(disk)) == (["checkpoints", "index"], ["mine"])


def test_the_folder_at_hand_is_not_replaced(dataset: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name in (".", here, run.parent / "run" / ".." / "here"):
        one_line(index(run, dataset, "--out", name), "is the folder that you are in", "--out")


@pytest.mark.parametrize("name", ["index", "*"])
def test_folders_of_others_stay(name: str, tmp_path: Path):
    others = ["index.mine.tmp", "index.0123456g.tmp", "a.01234567.tmp"]
    for other in others:
        (tmp_path / other).mkdir()
    (tmp_path / f"{name}.01234567.tmp").mkdir()
    (tmp_path / f"{name}.89abcdef.tmp").symlink_to(tmp_path / "a.01234567.tmp")
    with appearing(tmp_path / name):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted([*others, name, f"{name}.89abcdef.tmp"])
