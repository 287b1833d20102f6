"""`predict` against Pillow, numpy and a float64 network on the same pictures in a data set; bad pictures and tars."""

import gzip
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result

import trainer.predict as module
from conftest import ROOT, build, drawn, reason, saved
from evaluated import CLASSES, FLOAT32, Made, known, save_run, shared_made, stored, views_of, weights  # noqa: F401  # a fixture
from pipeline import manifest, storage
from pipeline.cli import printable
from pipeline.decode import ImageError, decode
from runs import one_line, trainer
from s3 import Store, empty_bucket, running_server  # noqa: F401  # fixtures
from stored import remake
from tars import tar_bytes, tree
from trainer import checkpoint as checkpoints
from trainer.checkpoint import load_network
from trainer.pictures import Pictures
from trainer.predict import BATCH_SIZE, THREADS, Failure, Prediction, Raw, fits


def picture_bytes(width: int = 60, height: int = 50) -> bytes:
    return saved(drawn("checks", "any", width, height), "JPEG")


GOOD = picture_bytes()


def predict(made: Made, *words: object, views: str = "centre", text: bool = False) -> Result:
    result = trainer("predict", *words, *made.options, "--views", views, *([] if text else ["--json"]))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def lines(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def failures(result: Result) -> dict[str, str]:
    """Name → code."""
    return {line["picture"]: line["error"] for line in lines(result) if "error" in line}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """What the network is given."""
    inputs, honest = [], module.view_probabilities

    def noting(network: Any, images: torch.Tensor) -> torch.Tensor:
        inputs.append(images.numpy().copy())
        return honest(network, images)

    monkeypatch.setattr(module, "view_probabilities", noting)
    return inputs


@pytest.fixture(scope="module")
def expected(made: Made) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By views, what is seen and the probabilities of the validation pictures, in the order of the ids."""
    return {v: (np.stack(views_of(made.data, "val", v), 1), known(made, "val", v)) for v in ("centre", "ten")}


def files_of(made: Made) -> dict[str, Path]:
    """The raw validation pictures by their keys."""
    return {path.stem: path for path in sorted((made.raw / "val").rglob("*.*"))}


def check(result: Result, seen: list[np.ndarray], made: Made, expected: dict, keys: list[str], views: str = "centre"):
    """The validation pictures with these keys were seen as they are stored, and predicted, in this order."""
    order = [stored(made.data, "val")[2].index(key) for key in keys]
    inputs, probabilities = (array[order] for array in expected[views])
    np.testing.assert_allclose(np.concatenate(seen).reshape(inputs.shape), inputs, rtol=0, atol=1e-4)
    seen.clear()
    assert [line["picture"].rpartition("/")[2].partition(".")[0] for line in lines(result)] == keys
    for line, row in zip(lines(result), probabilities):
        labels = [label["label"] for label in line["labels"]]
        assert labels == np.argsort(-row)[:5].tolist()
        np.testing.assert_allclose([label["probability"] for label in line["labels"]], row[labels], atol=FLOAT32)
        assert [(label["wnid"], label["words"]) for label in line["labels"]] == [(CLASSES[i],) * 2 for i in labels]


# The same pictures give the same, wherever they come from


@pytest.mark.parametrize(
    ("source", "views"),
    [("files", "centre"), ("folder", "centre"), ("tar", "ten"), ("split", "ten"), ("shards", "centre")],
)
def test_a_picture_is_seen_as_in_a_data_set(
    made: Made, source: str, views: str, tmp_path: Path, seen: list[np.ndarray], expected: dict
):
    """Raw pictures of the stored size, and stored ones, among them."""
    files, keys = files_of(made), stored(made.data, "val")[2]
    sides = [(f"val/{key}.{end}", b"{}") for key in files for end in ("cls", "json", "txt")]
    members = sorted([*sides, *((f"val/{path.name}", path.read_bytes()) for path in files.values())])
    (tmp_path / "val-000000.tar").write_bytes(tar_bytes(members))  # named as a shard, but no manifest says so
    words, order = {
        "files": (files.values(), list(files)),
        "folder": ([made.raw / "val"], list(files)),
        "tar": ([tmp_path / "val-000000.tar"], sorted(files)),
        "split": ([made.data / "val"], keys),
        "shards": ([f"{made.data}/val/val-00000{i}.tar" for i in range(2)], keys[:20]),
    }[source]
    result = predict(made, *words, views=views)
    assert result.exit_code == 0, result.output
    check(result, seen, made, expected, order, views)


@pytest.mark.proof
def test_from_an_object_store(made: Made, s3: Store, seen: list[np.ndarray], expected: dict):
    files, keys = files_of(made), stored(made.data, "val")[2]
    uploads = {f"raw/{path.name}": path for path in files.values()}
    uploads |= {f"set/{path.relative_to(made.data)}": path for path in made.data.rglob("*") if path.is_file()}
    for name, path in uploads.items():
        storage.put_if_absent(storage.location(f"{s3.url}/{name}"), path.read_bytes())
    s3.faults(0.1, seed=1)
    first = next(iter(files))
    check(predict(made, f"{s3.url}/raw"), seen, made, expected, sorted(files))
    check(predict(made, f"{s3.url}/raw/{files[first].name}"), seen, made, expected, [first])
    check(predict(made, f"{s3.url}/set/val"), seen, made, expected, keys)
    s3.faults(0)
    one_line(predict(made, f"{s3.url}/nothing.jpg"), "nothing.jpg: no such file")


def test_what_no_manifest_lists_goes_the_way_of_raw_pictures(made: Made, tmp_path: Path, seen: list[np.ndarray]):
    """Though it looks like a shard; and so do the pictures of a data set of another size."""
    pictures = Pictures(manifest.load(made.data), checkpoints.load(made.run).recipe)
    shard = (made.data / "val" / "val-000000.tar").read_bytes()
    tree(tmp_path, {"set/val/new.tar": shard, "set/dataset.json": (made.data / "dataset.json").read_bytes()})
    tree(tmp_path, {"other/val/val-000000.tar": shard, "other/dataset.json": b"{}"})
    assert build(made.raw, tmp_path / "large", "--workers", 1, "--size", 130).exit_code == 0
    for name in ("set/val/new.tar", "other/val/val-000000.tar", "large/val/val-000000.tar"):
        assert predict(made, tmp_path / name).exit_code == 0
        with tarfile.open(tmp_path / name) as members:
            jpegs = [members.extractfile(info).read() for info in members if info.name.endswith(".jpg")]  # type: ignore[union-attr]
        again = pictures.views([pictures.stored(jpeg) for jpeg in jpegs]).numpy()
        np.testing.assert_array_equal(np.concatenate(seen), again)
        seen.clear()


def test_a_gzipped_picture_is_not_as_the_builder_stores_it(made: Made):
    """A shard may hold one that the builder did not write; a network is shown no bytes that are not a JPEG's."""
    rules = manifest.load(made.data).recipe
    picture = picture_bytes(rules.size, rules.size)
    assert [fits(data, rules) for data in (picture, gzip.compress(picture), GOOD)] == [True, False, False]


# What is said


def test_the_text_says_what_the_json_says(made: Made, tmp_path: Path):
    """And names of any bytes never reach a terminal as they are."""
    own = replace(made, data=Path(shutil.copytree(made.data, tmp_path / "data")))
    remake(own.data, lambda body: body["classes"][2].update(words="great white shark, white shark"))
    folder = os.fsencode(tmp_path / "some")
    os.mkdir(folder)
    names = [b"a\x1b[2Jb\n.jpg", "ü\u202e.jpg".encode(), b"\xff\xfe.jpg"]
    for name, data in zip(names, (GOOD, GOOD, b"no")):
        Path(os.fsdecode(folder + b"/" + name)).write_bytes(data)
    words = [*files_of(made).values(), os.fsdecode(folder)]
    text, result = (predict(own, *words, text=form) for form in (True, False))
    assert all(letter.isprintable() for letter in (text.output + result.output).replace("\n", ""))
    printed = [(folder + b"/" + name).decode("utf-8", "backslashreplace") for name in names]
    assert [line["picture"] for line in lines(result)[-3:]] == printed
    expected = []
    for line in lines(result)[:-1]:
        expected.append(printable(line["picture"]))
        for label in line["labels"]:
            wnid = "" if label["words"] == label["wnid"] else f" ({label['wnid']})"
            expected.append(f"{100 * label['probability']:6.1f} %  {label['words']}{wnid}")
    assert text.stdout.splitlines() == expected
    assert f"great white shark, white shark ({CLASSES[2]})" in text.stdout
    note, first, last = text.stderr.splitlines()
    assert note.startswith(f"note: {own.data}: another data set than the run's")
    assert first == f"{tmp_path}/some/\\udcff\\udcfe.jpg: unrecognised: no picture format that we read"
    assert "1 could not be predicted" in last


def test_results_come_while_pictures_are_still_found(made: Made):
    """Of an endless folder; few pictures are ahead."""
    taken = itertools.count()

    def endless():
        while True:
            number = next(taken)
            yield Raw(f"{number}", len(GOOD), lambda: GOOD) if number % 3 else Failure(f"{number}", "empty", "why")

    checkpoint, dataset = checkpoints.load(made.run), manifest.load(made.data)
    network = load_network(checkpoint, dataset, (torch.device("cpu"),) * 2, made.run)
    results = module.classify(network, Pictures(dataset, checkpoint.recipe), endless(), "ten", dataset.classes)
    some = list(itertools.islice(results, 20))
    assert [result.picture for result in some] == [f"{number}" for number in range(20)]
    assert [isinstance(result, Prediction) for result in some] == [bool(number % 3) for number in range(20)]
    assert next(taken) <= 3 * BATCH_SIZE["ten"] + 2 * THREADS + 1


@pytest.mark.proof
def test_a_closed_stdout_ends_quietly(made: Made):
    command = [sys.executable, "-m", "trainer", "predict", str(made.raw / "val"), *map(str, made.options)]
    for redirection, code in ((">&-", 0), ("| true; exit ${PIPESTATUS[0]}", 128 + 13)):
        line = ["bash", "-c", f'"$@" {redirection}', "bash", *command]
        done = subprocess.run(line, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
        assert (done.returncode, done.stderr) == (code, "")


# Mistakes; hostile pictures, folders and tars


def test_mistakes_are_one_line(made: Made, tmp_path: Path):
    picture = next(iter(files_of(made).values()))
    one_line(predict(made, picture, tmp_path / "missing.jpg"), "missing.jpg: no such file or folder")
    (tmp_path / "notes.txt").write_text("x")
    one_line(predict(made, tmp_path), f"no pictures in {tmp_path}", "left out: 1 *.txt")
    result = predict(made, tmp_path, picture)  # one location without pictures among others
    assert (result.exit_code, len(lines(result))) == (2, 1)
    assert result.stderr.splitlines() == ["left out: 1 *.txt", f"Error: no pictures in {tmp_path}"]
    one_line(predict(replace(made, run=tmp_path), picture), "checkpoint")
    save_run(tmp_path / "run", made.data, {name: value * 1e30 for name, value in weights(made.data).items()})
    one_line(predict(replace(made, run=tmp_path / "run"), picture), "diverged")


def test_hostile_pictures_are_named_and_the_others_come(made: Made, shared: Path):
    folder, rules = shared / "odd-images", manifest.load(made.data).recipe
    limits = {name: getattr(rules, name) for name in ("max_bytes", "max_pixels", "max_scans")}
    expected = {}
    for path in sorted((folder / "files").rglob("*")):
        try:
            decode(path.read_bytes(), **limits)
        except ImageError as error:
            expected[str(path)] = error.code
    result = predict(made, folder)
    assert result.exit_code == 2
    assert failures(result) == expected
    good = [label["probability"] for line in lines(result) for label in line.get("labels", ())]
    assert (len(good), np.isfinite(good).all()) == (5 * (139 - len(expected)), True)
    assert result.stderr.splitlines()[0] == "left out: 1 *.csv"
    assert f"{len(expected)} could not be predicted, for the reasons above; {139 - len(expected)} were" in result.stderr


def test_a_folder_is_gone_through_in_order_and_says_what_it_left_out(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also where all files have one inode number, as mergerfs may have it."""
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda *of, **more: os.stat_result((*real(*of, **more)[:1], 1, 1, *real(*of)[3:])))
    names = "b/2.jpg b/1 a/z.JPG a-b.png c.txt d.json e.JSON .hidden.jpg .git/x.jpg bad.jpg".split()
    folder = tree(tmp_path / "some", {name: GOOD if name != "bad.jpg" else GOOD[:300] for name in names})
    (folder / "b" / "loop").symlink_to(folder)
    (folder / "b" / "nothing").symlink_to(folder / "missing")
    os.mkfifo(folder / "pipe")
    (folder / "more").symlink_to(folder / "a")
    result = predict(made, folder)
    assert result.exit_code == 2
    names = [line["picture"].removeprefix(f"{folder}/") for line in lines(result)]
    assert names == ["a/z.JPG", "a-b.png", "b/1", "b/2.jpg", "bad.jpg"]
    assert failures(result) == {str(folder / "bad.jpg"): reason(GOOD[:300])}
    assert result.stderr.splitlines()[0] == "left out: 2 *.json, 1 *.txt, 2 hidden, 2 link to nothing, pipe or device"
    assert failures(predict(made, folder / "pipe")) == {str(folder / "pipe"): "unreadable"}
    assert predict(made, folder / ".hidden.jpg").exit_code == 0  # who names it means it


def test_folders_may_be_nested_more_deeply_than_calls(made: Made, tmp_path: Path):
    folder = tmp_path / "deep"
    for _ in range(sys.getrecursionlimit() + 50):
        os.mkdir(folder)
        folder = folder / "a"
    folder.with_name("one.jpg").write_bytes(GOOD)
    try:
        result = predict(made, tmp_path / "deep")
    finally:
        subprocess.run(["rm", "-r", tmp_path / "deep"], check=True)  # pytest's own deletion calls itself
    assert result.exit_code == 0, result.output
    assert len(lines(result)) == 1


def member(name: str, size: int, **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


WHOLE = tar_bytes({"one.jpg": GOOD, "two.jpg": GOOD})
SECOND = 512 + -(-len(GOOD) // 512) * 512  # where the second header stands
BAD_TARS = {  # content, words of the reason, pictures before the damage; test_archives has more
    "not.tar": (b"no tar" * 1000, "not a whole, plain tar", 0),
    "packed.tar.gz": (gzip.compress(WHOLE), "unpack it", 0),
    "between.tar": (WHOLE[:SECOND], "cut short at byte", 1),
}


def test_a_bad_tar_is_named_and_the_others_come(made: Made, tmp_path: Path):
    tree(tmp_path, {name: data for name, (data, _, _) in BAD_TARS.items()} | {"z.tar": tar_bytes({"last.jpg": GOOD})})
    result = predict(made, *(tmp_path / name for name in (*BAD_TARS, "z.tar")))
    assert result.exit_code == 2
    rest = iter(lines(result))
    for name, (_, words, before) in BAD_TARS.items():
        for _ in range(before):
            assert next(rest)["picture"] == f"{tmp_path / name}/one.jpg"
        bad = next(rest)
        assert (bad["picture"], bad["error"]) == (str(tmp_path / name), "bad_tar")
        assert words in bad["reason"]
    assert [line["picture"] for line in rest] == [f"{tmp_path}/z.tar/last.jpg"]


def test_what_is_too_large_is_not_read(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    size, most, honest = manifest.load(made.data).recipe.max_bytes + 1, [], os.pread
    with open(tmp_path / "a.tar", "wb") as file:  # with a hole
        file.write(member("huge.jpg", size))
        file.seek(-(-size // 512) * 512, io.SEEK_CUR)
        file.write(tar_bytes({"small.jpg": GOOD, "link.jpg": GOOD}))
    with open(tmp_path / "b.jpg", "wb") as file:
        file.truncate(size)
    monkeypatch.setattr(os, "pread", lambda number, count, at: most.append(count) or honest(number, count, at))
    result = predict(made, tmp_path)
    assert result.exit_code == 2
    assert failures(result) == {f"{tmp_path}/{name}": "too_many_bytes" for name in ("a.tar/huge.jpg", "b.jpg")}
    assert len(lines(result)) == 4
    assert max(most) < 2**20


def test_members_that_are_no_files_are_left_out(made: Made, tmp_path: Path):
    links = member("l.jpg", 0, type=b"2", linkname="/etc/passwd") + member("../up.jpg/", 0, type=b"5")
    (tmp_path / "a.tar").write_bytes(links + tar_bytes({"../../out.jpg": GOOD, "._x.jpg": b"", "x.cls": b"1"}))
    result = predict(made, tmp_path / "a.tar")
    assert result.exit_code == 0, result.output
    assert [line["picture"] for line in lines(result)] == [f"{tmp_path}/a.tar/../../out.jpg"]
    assert result.stderr == "left out: 1 *.cls, 1 hidden, 1 link, device or sparse file in a tar\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]
