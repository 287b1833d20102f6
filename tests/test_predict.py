"""`trainer predict` against what the loader and the network make of the same pictures in a data set."""

import gzip
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import trainer.predict as module
from conftest import ROOT, build
from pipeline import storage
from predicted import World, assert_predicted, lines, members, picture_bytes, predict, save_run, shared_world  # noqa: F401  # a fixture
from runs import one_line
from s3 import Store, empty_bucket, running_server  # noqa: F401  # fixtures
from tars import tar_bytes, tree
from trainer import checkpoint as checkpoints
from trainer.network import load_network
from trainer.pictures import Pictures
from trainer.predict import BATCH_SIZE, THREADS, Failure, Prediction, Raw, fits
from trainer.probabilities import top


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """What the network is given."""
    given = []
    honest = module.view_probabilities

    def noting(network: object, images: torch.Tensor) -> torch.Tensor:
        given.append(images.numpy().copy())
        return honest(network, images)

    monkeypatch.setattr(module, "view_probabilities", noting)
    return given


GOOD = picture_bytes()


def raw_tar(world: World) -> bytes:
    """The raw validation pictures in the form of WebDataset."""
    sides = [(f"val/{key}.{end}", b"{}") for key in world.files for end in ("cls", "json", "txt")]
    pictures = [(f"val/{path.name}", path.read_bytes()) for path in world.files.values()]
    return tar_bytes(sorted([*sides, *pictures]))


# The same pictures give the same, wherever they come from


@pytest.mark.parametrize(
    ("source", "views"),
    [("files", "centre"), ("folder", "centre"), ("tar", "ten"), ("split", "ten"), ("shards", "centre")],
)
def test_a_picture_is_seen_as_in_a_data_set(
    world: World, source: str, views: str, tmp_path: Path, seen: list[np.ndarray]
):
    """The input bit for bit, and the labels; raw pictures of 256×256 and stored ones among them."""
    (tmp_path / "val-000000.tar").write_bytes(raw_tar(world))  # named as a shard, but no manifest says so
    words = {
        "files": [*world.files.values()],
        "folder": [world.raw / "val"],
        "tar": [tmp_path / "val-000000.tar"],
        "split": [world.data / "val"],
        "shards": [f"{world.data}/val/val-00000{i}.tar" for i in range(3)],
    }[source]
    result = predict(world, *words, views=views)
    assert result.exit_code == 0, result.output
    stored = source in ("split", "shards")
    assert_predicted(world, result, world.keys if stored else list(world.files), views)
    order = [world.keys.index(key) for key in (world.keys if stored else world.files)]
    np.testing.assert_array_equal(np.concatenate(seen), world.inputs[views][order])


def test_from_an_object_store(world: World, s3: Store, seen: list[np.ndarray]):
    uploads = {f"raw/{path.name}": path for path in world.files.values()}
    uploads |= {
        str(path.relative_to(world.data.parent)): path for path in world.data.rglob("*") if path.suffix != ".npz"
    }
    for name, path in uploads.items():
        if path.is_file():
            storage.put_if_absent(storage.location(f"{s3.url}/{name}"), path.read_bytes())
    keys = list(world.files)
    s3.faults(0.1, seed=1)
    assert_predicted(world, predict(world, f"{s3.url}/raw"), keys)
    assert_predicted(world, predict(world, f"{s3.url}/raw/{world.files[keys[0]].name}"), keys[:1])
    assert_predicted(world, predict(world, f"{s3.url}/set/val"), world.keys)
    result = predict(world, *(f"{s3.url}/set/val/val-00000{i}.tar" for i in range(2)))
    s3.faults(0)
    assert_predicted(world, result, world.keys[:10])
    order = [world.keys.index(key) for key in keys]
    expected = world.inputs["centre"]
    np.testing.assert_array_equal(
        np.concatenate(seen), np.concatenate([expected[order], expected[order[:1]], expected, expected[:10]])
    )
    one_line(predict(world, f"{s3.url}/nothing.jpg"), "nothing.jpg: no such file")


def test_a_shard_is_known_from_its_own_folder(world: World, seen: list[np.ndarray], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(world.data / "val")
    assert_predicted(world, predict(world, "val-000000.tar"), world.keys[:5])
    np.testing.assert_array_equal(seen[0], world.inputs["centre"][:5])


def test_what_no_manifest_lists_goes_the_way_of_raw_pictures(world: World, tmp_path: Path, seen: list[np.ndarray]):
    """Though it looks like a shard; and so do the pictures of a data set of another size."""
    shard = (world.data / "val" / "val-000000.tar").read_bytes()
    pictures = Pictures(world.dataset, checkpoints.load(world.run).recipe)
    jpegs = [data for name, data in members(shard) if name.endswith(".jpg")]
    expected = pictures.views([pictures.stored(jpeg) for jpeg in jpegs]).numpy()
    assert not (expected == world.inputs["centre"][: len(jpegs)]).all()  # it is another generation
    tree(tmp_path, {"copy.tar": shard, "set/val/new.tar": shard, "other/val/val-000000.tar": shard})
    tree(tmp_path, {"set/dataset.json": (world.data / "dataset.json").read_bytes(), "other/dataset.json": b"{}"})
    for number, name in enumerate(("copy.tar", "set/val/new.tar", "other/val/val-000000.tar")):
        assert predict(world, tmp_path / name).exit_code == 0
        np.testing.assert_array_equal(seen[number], expected)
    assert build(world.raw, tmp_path / "large", "--workers", 1, "--size", 300).exit_code == 0
    assert predict(world, tmp_path / "large" / "val").exit_code == 0
    large = (tmp_path / "large" / "val" / "val-000000.tar").read_bytes()
    stored = [pictures.stored(data) for name, data in members(large) if name.endswith(".jpg")]
    np.testing.assert_array_equal(seen[3], pictures.views(stored).numpy())


# What is said


def test_a_gzipped_picture_is_not_as_the_builder_stores_it(world: World):
    """A shard may hold one that the builder did not write; a network is shown no bytes that are not a JPEG's."""
    size = world.dataset.recipe.size
    assert fits(picture_bytes(size, size), world.dataset.recipe)
    assert not fits(gzip.compress(picture_bytes(size, size)), world.dataset.recipe)
    assert not fits(picture_bytes(size, size + 1), world.dataset.recipe)


def test_the_text_says_what_the_json_says(world: World, tmp_path: Path):
    (tmp_path / "bad.jpg").write_bytes(b"no")
    files = [tmp_path / "bad.jpg", *world.files.values()]
    result = predict(world, *files, text=True)
    assert result.exit_code == 2
    found = [line for line in lines(predict(world, *files)) if "labels" in line]
    expected = []
    for line in found:
        expected.append([str(line["picture"])])
        for each in line["labels"]:
            expected.append([f"{100 * each['probability']:.1f}", "%", f"{each['words']} ({each['wnid']})"])
    plain = "".join(letter for letter in result.stdout if letter not in "█▏▎▍▌▋▊▉")
    assert [" ".join(line.split()) for line in plain.splitlines()] == [" ".join(words) for words in expected]
    first, last = result.stderr.splitlines()
    assert first == f"{tmp_path}/bad.jpg: unrecognised: no picture format that we read"
    assert "1 could not be predicted" in last


def test_strange_names_never_reach_a_terminal(world: World, tmp_path: Path):
    folder = os.fsencode(tmp_path / "some")
    os.mkdir(folder)
    names = [b"a\x1b[2Jb\n.jpg", b"\xff\xfe.jpg", "ü\u202e.jpg".encode()]
    for name, data in zip(names, (GOOD, b"no", GOOD)):
        Path(os.fsdecode(folder + b"/" + name)).write_bytes(data)
    for text in (True, False):
        result = predict(world, os.fsdecode(folder), text=text)
        assert result.exit_code == 2
        assert all(letter.isprintable() for letter in result.output.replace("\n", ""))
    named = [os.fsencode(str(line["picture"])) for line in lines(result)]
    assert named == [folder + b"/" + name for name in sorted(names)]
    text = predict(world, os.fsdecode(folder), text=True).output
    assert "a\\x1b[2Jb\\n.jpg\n" in text
    assert "\\udcff\\udcfe.jpg: unrecognised" in text
    assert "ü\\u202e.jpg" in text


def test_the_most_probable_labels():
    chances = np.array([0.1, 0.3, 0.1, 0.2, 0.05, 0.25, 0.0])
    assert top(chances).tolist() == [1, 5, 3, 0, 2]  # equal ones by label
    assert top(chances, 1).tolist() == [1]
    assert top(chances[:2]).tolist() == [1, 0]


def test_results_come_while_pictures_are_still_found(world: World):
    """Of an endless folder; few pictures are ahead."""
    taken = itertools.count()

    def endless():
        while True:
            number = next(taken)
            yield Raw(f"{number}", len(GOOD), lambda: GOOD) if number % 3 else Failure(f"{number}", "empty", "why")

    checkpoint = checkpoints.load(world.run)
    network = load_network(checkpoint, world.dataset, (torch.device("cpu"),) * 2, world.run)
    found = module.classify(network, Pictures(world.dataset, checkpoint.recipe), endless(), "ten")
    some = list(itertools.islice(found, 20))
    assert [each.name for each in some] == [f"{number}" for number in range(20)]
    assert [isinstance(each, Prediction) for each in some] == [bool(number % 3) for number in range(20)]
    assert next(taken) <= 3 * BATCH_SIZE["ten"] + 2 * THREADS + 1


@pytest.mark.proof
def test_a_closed_pipe_ends_quietly(world: World):
    command = [sys.executable, "-m", "trainer", "predict", str(world.raw / "val"), "--data", str(world.data)]
    command += ["--checkpoint", str(world.run), "--devices", "cpu,cpu"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + 13


@pytest.mark.proof
def test_a_closed_stdout_is_no_terminal(world: World):
    command = [sys.executable, "-m", "trainer", "predict", str(world.raw / "val"), "--data", str(world.data)]
    command += ["--checkpoint", str(world.run), "--devices", "cpu,cpu"]
    line = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    done = subprocess.run(line, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# Mistakes


def test_mistakes_are_one_line(world: World, tmp_path: Path):
    picture = next(iter(world.files.values()))
    one_line(predict(world, picture, tmp_path / "missing.jpg"), "missing.jpg: no such file or folder")
    one_line(predict(world, tmp_path), f"no pictures in {tmp_path}")
    (tmp_path / "notes.txt").write_text("x")
    one_line(predict(world, tmp_path), f"no pictures in {tmp_path}", "left out: 1 *.txt")
    one_line(predict(world, picture, run=tmp_path), "checkpoint")
    literal = tmp_path / "a{1,2}.jpg"
    literal.write_bytes(GOOD)
    assert predict(world, literal).exit_code == 0


def test_an_empty_place_among_others_is_a_mistake(world: World, tmp_path: Path):
    picture = next(iter(world.files.values()))
    result = predict(world, tmp_path, picture)
    assert result.exit_code == 2
    assert len(lines(result)) == 1
    assert result.stderr.splitlines() == [f"Error: no pictures in {tmp_path}"]


def test_a_network_that_diverged_or_is_of_other_classes(world: World, tmp_path: Path, dataset: Path):
    picture = next(iter(world.files.values()))
    save_run(tmp_path / "diverged", world.dataset, 1e30)
    one_line(predict(world, picture, run=tmp_path / "diverged"), "diverged")
    other = json.loads((dataset / "dataset.json").read_text())["classes"]
    assert len(other) != len(world.dataset.classes)
    result = predict(World(world.raw, dataset, world.run, world.dataset, [], {}, {}), picture)
    one_line(result, "a network of 7 classes", "3 others")
