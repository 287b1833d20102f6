"""`python -m trainer similar`: pictures looked up in an index, and the indexes that are refused."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import manifest
from pipeline.online.samples import SampleReader
from retrieved import RECIPE, index, save_run, similar
from runs import one_line
from trainer import checkpoint as checkpoints
from trainer.checkpoint import load_network
from trainer.pictures import Pictures
from trainer.retrieval import codes


@pytest.fixture(scope="session")
def indexed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an index. Read only."""
    run = tmp_path_factory.mktemp("indexed") / "run"
    save_run(run, dataset)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codes, "STEPS", 40)
        result = index(run, dataset)
    assert result.exit_code == 0, result.output
    return run


@pytest.fixture
def run(indexed: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(indexed, tmp_path / "run"))


def expected(run: Path, data: Path, raw: Path) -> tuple[np.ndarray, np.ndarray]:
    """All ids by their distance from a raw picture, and the distances, by numpy."""
    dataset, checkpoint = manifest.load(data), checkpoints.load(run)
    network = load_network(checkpoint, dataset, (torch.device("cpu"),) * 2, run)
    seen = Pictures(dataset, RECIPE)
    with torch.inference_mode():
        query = network.hidden(seen.views([seen.stored(raw.read_bytes())]))[0].double().numpy()
    distances = np.sqrt(((np.load(run / "index" / "features.npy").astype(np.float64) - query) ** 2).sum(1))
    ids = np.argsort(distances, kind="stable")
    return ids, distances[ids]


@pytest.mark.parametrize("how", [(), ("--exact",)])
def test_the_nearest_images_of_a_picture(how: tuple[str, ...], raw: Path, dataset: Path, indexed: Path):
    asked = [raw / "train" / "stripes" / "0005.jpg", raw / "val" / "blobs" / "0001.jpg"]
    result = similar(indexed, dataset, *asked, "--json", "--count", 4, *how)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.output.splitlines()]
    assert [line["picture"] for line in lines] == [str(path) for path in asked]
    data = manifest.load(dataset)
    with SampleReader(data, "train") as reader:
        for path, line in zip(asked, lines):
            ids, distances = expected(indexed, dataset, path)
            found = line["nearest"]
            assert [each["id"] for each in found] == ids[:4].tolist()  # all 41 rows are candidates
            np.testing.assert_allclose([each["distance"] for each in found], distances[:4], rtol=1e-5, atol=1e-3)
            assert [each["key"] for each in found] == [reader.key(int(number)) for number in ids[:4]]
            assert [each["label"] for each in found] == reader.labels(ids[:4]).tolist()
            assert all(each["words"] == data.classes[each["label"]].words for each in found)
    first = lines[0]["nearest"][0]
    assert "stripes" in first["words"]
    assert first["distance"] < 0.01 * lines[0]["nearest"][1]["distance"]  # the picture itself


def test_people_read_a_table(raw: Path, dataset: Path, indexed: Path):
    path = raw / "train" / "stripes" / "0005.jpg"
    result = similar(indexed, dataset, path, "--index", indexed / "index")
    assert result.exit_code == 0, result.output
    head, *rows = result.output.splitlines()
    ids, distances = expected(indexed, dataset, path)
    assert head == str(path)
    assert [row.split()[1] for row in rows] == [str(number) for number in ids[:6]]
    assert rows[1].split()[0] == f"{distances[1]:.4g}"
    assert rows[0].endswith("  stripes")
    everything = similar(indexed, dataset, path, "--count", 1000)
    assert [row.split()[1] for row in everything.output.splitlines()[1:]] == [str(number) for number in ids]


def test_a_picture_that_is_none_is_named_and_the_others_come(raw: Path, dataset: Path, indexed: Path, tmp_path: Path):
    good, bad = raw / "train" / "blobs" / "0002.jpg", raw / "train" / "checks" / "0003.jpg"
    (tmp_path / "empty.png").touch()
    words = (bad, good, tmp_path / "empty.png", tmp_path / "missing.jpg", tmp_path)
    result = similar(indexed, dataset, *words)
    assert result.exit_code == 2
    assert "truncated" in result.stderr.splitlines()[0]
    assert result.stderr.splitlines()[0].startswith(str(bad))
    assert "empty.png: empty: " in result.stderr
    assert "missing.jpg: unreadable: No such file or directory" in result.stderr
    assert "4 could not be used" in result.stderr.splitlines()[-1]
    assert result.stdout == similar(indexed, dataset, good).stdout
    lines = [json.loads(line) for line in similar(indexed, dataset, *words, "--json").stdout.splitlines()]
    assert [line.get("error", "none") for line in lines] == ["truncated", "none", "empty", "unreadable", "unreadable"]
    only = similar(indexed, dataset, bad)
    assert (only.exit_code, only.stdout) == (2, "")


def test_an_index_that_is_of_no_use_is_refused(raw: Path, dataset: Path, small: Path, run: Path, tmp_path: Path):
    picture = raw / "train" / "blobs" / "0002.jpg"
    one_line(similar(run, dataset, picture, "--index", tmp_path / "none"), "no index there", "python -m trainer index")
    one_line(similar(checkpoints.files(run)[0], dataset, picture), "is a file", "--index")
    one_line(similar(run, small, picture), "of the data set", "this one is")
    save_run(run, dataset, factor=2.0, step=4)
    one_line(similar(run, dataset, picture), "of another network", "at step 3", "make it again")


@pytest.mark.parametrize("name", ["index.json", "features.npy", "codes.npy", "autoencoder.safetensors"])
def test_a_damaged_index_is_refused(name: str, raw: Path, dataset: Path, run: Path):
    file = run / "index" / name
    whole = file.read_bytes()

    def refused(*words: str) -> None:
        one_line(similar(run, dataset, raw / "train" / "blobs" / "0002.jpg"), *words)

    for damaged in (whole[:-1], whole[: len(whole) // 2], b"", whole + b" "):
        file.write_bytes(damaged)
        refused(str(file) if name != "index.json" else "index.json", "amaged", "make ", " again")
    file.unlink()
    refused("no index there" if name == "index.json" else f"{file}: missing", "python -m trainer index")


def test_an_index_of_another_version_is_refused(raw: Path, dataset: Path, run: Path):
    file = run / "index" / "index.json"
    text = file.read_text()
    for old, new, words in (
        ('"format": 1', '"format": 2', "format 2, this version"),
        ('"bits": 128', '"bits": 64', "its checksum does not fit"),
        ('"units"', '"unit"', "another version"),
        ("{", "[" * 10_000, "damaged"),
    ):
        assert old in text
        file.write_text(text.replace(old, new, 1))
        one_line(similar(run, dataset, raw / "train" / "blobs" / "0002.jpg"), str(file), words)


def test_without_faiss_an_exact_search_is_left(
    raw: Path, dataset: Path, indexed: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "faiss", None)
    picture = raw / "train" / "blobs" / "0002.jpg"
    one_line(similar(indexed, dataset, picture), "needs the package faiss: pip install 'penstock-imagenet[retrieval]'")
    assert similar(indexed, dataset, picture, "--exact").exit_code == 0
