"""`trainer predict` against what the loader and the network make of the same pictures in a data set; bad pictures."""

import gzip
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import trainer.predict as module
from conftest import ROOT, build
from pipeline import storage
from pipeline.decode import ImageError, decode
from predicted import World, assert_predicted, failures, lines, members, picture_bytes, predict, save_run, shared_world  # noqa: F401  # a fixture
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
    [("files", "centre"), ("folder", "ten"), ("tar", "ten"), ("split", "ten"), ("shards", "centre")],
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


def test_what_no_manifest_lists_goes_the_way_of_raw_pictures(
    world: World, tmp_path: Path, seen: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
):
    """Though it looks like a shard; and so do the pictures of a data set of another size."""
    shard = (world.data / "val" / "val-000000.tar").read_bytes()
    pictures = Pictures(world.dataset, checkpoints.load(world.run).recipe)
    jpegs = [data for name, data in members(shard) if name.endswith(".jpg")]
    expected = pictures.views([pictures.stored(jpeg) for jpeg in jpegs]).numpy()
    assert not (expected == world.inputs["centre"][: len(jpegs)]).all()  # it is another generation
    tree(tmp_path, {"copy.tar": shard, "set/val/new.tar": shard, "other/val/val-000000.tar": shard})
    tree(tmp_path, {"set/dataset.json": (world.data / "dataset.json").read_bytes(), "other/dataset.json": b"{}"})
    assert_predicted(world, predict(world, world.data / "val" / "val-000000.tar"), world.keys[:5])
    monkeypatch.chdir(world.data / "val")
    assert_predicted(world, predict(world, "val-000000.tar"), world.keys[:5])
    assert (seen.pop() == seen.pop()).all()
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
    assert [" ".join(line.split()) for line in result.stdout.splitlines()] == [" ".join(words) for words in expected]
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
    found = module.classify(
        network, Pictures(world.dataset, checkpoint.recipe), endless(), "ten", world.dataset.classes
    )
    some = list(itertools.islice(found, 20))
    assert [each.picture for each in some] == [f"{number}" for number in range(20)]
    assert [isinstance(each, Prediction) for each in some] == [bool(number % 3) for number in range(20)]
    assert next(taken) <= 3 * BATCH_SIZE["ten"] + 2 * THREADS + 1


@pytest.mark.proof
@pytest.mark.parametrize(("redirection", "code"), [(">&-", 0), ("| true; exit ${PIPESTATUS[0]}", 128 + 13)])
def test_a_closed_stdout_ends_quietly(world: World, redirection: str, code: int):
    command = [sys.executable, "-m", "trainer", "predict", str(world.raw / "val"), "--data", str(world.data)]
    command += ["--checkpoint", str(world.run), "--devices", "cpu,cpu"]
    line = ["bash", "-c", f'"$@" {redirection}', "bash", *command]
    done = subprocess.run(line, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "")


# Mistakes


def test_mistakes_are_one_line(world: World, tmp_path: Path):
    picture = next(iter(world.files.values()))
    one_line(predict(world, picture, tmp_path / "missing.jpg"), "missing.jpg: no such file or folder")
    one_line(predict(world, tmp_path), f"no pictures in {tmp_path}")
    (tmp_path / "notes.txt").write_text("x")
    one_line(predict(world, tmp_path), f"no pictures in {tmp_path}", "left out: 1 *.txt")
    one_line(predict(world, picture, run=tmp_path), "checkpoint")
    result = predict(world, tmp_path, picture)  # one location without pictures among others
    assert (result.exit_code, len(lines(result))) == (2, 1)
    assert result.stderr.splitlines() == ["left out: 1 *.txt", f"Error: no pictures in {tmp_path}"]


def test_a_network_that_diverged_or_is_of_other_classes(world: World, tmp_path: Path, dataset: Path):
    picture = next(iter(world.files.values()))
    save_run(tmp_path / "diverged", world.dataset, 1e30)
    one_line(predict(world, picture, run=tmp_path / "diverged"), "diverged")
    other = json.loads((dataset / "dataset.json").read_text())["classes"]
    assert len(other) != len(world.dataset.classes)
    result = predict(World(world.raw, dataset, world.run, world.dataset, [], {}, {}), picture)
    one_line(result, "a network of 7 classes", "3 others")


# Hostile pictures, folders and tars


def test_hostile_pictures_are_named_and_the_others_come(world: World, shared: Path):
    folder = shared / "odd-images"
    limits = {name: getattr(world.dataset.recipe, name) for name in ("max_bytes", "max_pixels", "max_scans")}
    expected = {}
    for path in sorted((folder / "files").rglob("*")):
        try:
            decode(path.read_bytes(), **limits)
        except ImageError as error:
            expected[str(path)] = error.code
    result = predict(world, folder)
    assert result.exit_code == 2
    assert failures(result) == expected
    good = [line for line in lines(result) if "labels" in line]
    assert len(expected) > 30
    assert len(good) == 139 - len(expected)
    assert all(np.isfinite([each["probability"] for each in line["labels"]]).all() for line in good)
    *told, last = result.stderr.splitlines()
    assert told == ["left out: 1 *.csv"]
    assert f"{len(expected)} could not be predicted" in last
    assert f"{len(good)} were" in last


def test_a_folder_is_gone_through_in_order_and_says_what_it_left_out(world: World, tmp_path: Path):
    names = "b/2.jpg b/1 a/z.JPG a-b.png c.txt d.json e.JSON .hidden.jpg .git/x.jpg bad.jpg".split()
    folder = tree(tmp_path / "some", {name: GOOD if name != "bad.jpg" else b"no" for name in names})
    (folder / "b" / "loop").symlink_to(folder)
    (folder / "b" / "nothing").symlink_to(folder / "missing")
    os.mkfifo(folder / "pipe")
    (folder / "more").symlink_to(folder / "a")
    result = predict(world, folder)
    assert result.exit_code == 2
    found = [str(line["picture"]).removeprefix(f"{folder}/") for line in lines(result)]
    assert found == ["a/z.JPG", "a-b.png", "b/1", "b/2.jpg", "bad.jpg"]
    assert failures(result) == {str(folder / "bad.jpg"): "unrecognised"}
    left = result.stderr.splitlines()[0]
    for words in ("2 hidden", "1 *.txt", "2 *.json", "2 link to nothing, pipe"):
        assert words in left
    assert failures(predict(world, folder / "pipe")) == {str(folder / "pipe"): "unreadable"}
    assert predict(world, folder / ".hidden.jpg").exit_code == 0  # who names it means it


def member(name: str, size: int, **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


WHOLE = tar_bytes({"one.jpg": GOOD, "two.jpg": GOOD})
SECOND = 512 + -(-len(GOOD) // 512) * 512  # where the second header stands
BAD_TARS = {
    "not.tar": (b"no tar" * 1000, "not a whole, plain tar", 0),
    "packed.tar.gz": (gzip.compress(WHOLE), "unpack it", 0),
    "inside.tar": (WHOLE[: SECOND + 700], "cut short inside 'two.jpg'", 1),
    "between.tar": (WHOLE[:SECOND], "cut short at byte", 1),
    "damaged.tar": (WHOLE[:SECOND] + b"x" * 100 + WHOLE[SECOND + 100 :], f"damaged at byte {SECOND}: bad checksum", 1),
    "long.tar": (WHOLE[:SECOND] + member("x", 2**31, type=b"x") + WHOLE[SECOND:], "claims 2,147,483,648 bytes", 1),
    "backwards.tar": (WHOLE[:SECOND] + member("x.jpg", -SECOND - 512) + WHOLE[SECOND:], "", 1),
    "deep.tar": (b"".join(member("x", 0, type=b"x") for _ in range(3000)) + WHOLE, "", 0),
}


@pytest.mark.parametrize("name", BAD_TARS)
def test_a_bad_tar_is_named_and_the_others_come(world: World, name: str, tmp_path: Path):
    data, words, before = BAD_TARS[name]
    tree(tmp_path, {name: data, "z.tar": tar_bytes({"last.jpg": GOOD})})
    result = predict(world, tmp_path / name, tmp_path / "z.tar")
    assert result.exit_code == 2
    found = lines(result)
    assert [line["picture"] for line in found if "labels" in line] == [
        *[f"{tmp_path / name}/one.jpg"][:before],
        f"{tmp_path / 'z.tar'}/last.jpg",
    ]
    (bad,) = [line for line in found if "error" in line]
    assert (bad["picture"], bad["error"]) == (str(tmp_path / name), "bad_tar")
    assert words in bad["reason"]


def test_what_is_too_large_is_not_read(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    size = world.dataset.recipe.max_bytes + 1
    with open(tmp_path / "a.tar", "wb") as file:  # with a hole
        file.write(member("huge.jpg", size))
        file.seek(-(-size // 512) * 512, io.SEEK_CUR)
        file.write(tar_bytes({"small.jpg": GOOD, "link.jpg": GOOD}))
    with open(tmp_path / "b.jpg", "wb") as file:
        file.truncate(size)
    most = []
    honest = os.pread
    monkeypatch.setattr(os, "pread", lambda number, count, at: most.append(count) or honest(number, count, at))
    result = predict(world, tmp_path)
    assert result.exit_code == 2
    assert failures(result) == {
        f"{tmp_path}/a.tar/huge.jpg": "too_many_bytes",
        f"{tmp_path}/b.jpg": "too_many_bytes",
    }
    assert len(lines(result)) == 4
    assert max(most) < 2**20


def test_members_that_are_no_files_are_left_out(world: World, tmp_path: Path):
    links = member("l.jpg", 0, type=b"2", linkname="/etc/passwd") + member("../up.jpg/", 0, type=b"5")
    (tmp_path / "a.tar").write_bytes(links + tar_bytes({"../../out.jpg": GOOD, "._x.jpg": b"", "x.cls": b"1"}))
    result = predict(world, tmp_path / "a.tar")
    assert result.exit_code == 0, result.output
    assert [line["picture"] for line in lines(result)] == [f"{tmp_path}/a.tar/../../out.jpg"]
    assert result.stderr == "left out: 1 *.cls, 1 hidden, 1 link, device or sparse file in a tar\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]
