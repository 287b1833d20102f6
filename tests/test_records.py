"""The records of a data set and of a run: damaged ones, and those that lie, are one line that names file and remedy."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import verify
from pipeline import UserError, manifest
from pipeline.manifest import DatasetError, Manifest
from pipeline.online.loader import Loader
from reported import CENTRE, TEN, TRAIN, VALIDATION, Written, invoke
from runs import one_line
from stored import remake
from trainer import checkpoint as checkpoints
from trainer.figures import gather

LINES = [{"kind": "train", **line, "layers": {"fc8": {"ratio": 0.5}}} for line in TRAIN]
LINES.append({"kind": "validation", **VALIDATION})
EVALUATION = {"step": 40, "split": "val", "dataset": "0" * 64, "centre": CENTRE, "ten": TEN}


def write_lines(run: Path, lines: list[dict[str, Any]], more: str = "") -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + more)


def without(line: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != key}


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    assert gather.read_lines(tmp_path) == []
    write_lines(tmp_path, LINES, '{"kind": "train", "step": 50, "lo')
    assert gather.read_lines(tmp_path) == LINES
    old = [without(line, "layers") for line in LINES]
    write_lines(tmp_path, old)
    assert gather.read_lines(tmp_path) == old


@pytest.mark.parametrize(
    ("number", "change", "problem"),
    [
        (1, {"loss": None}, "None is not a finite number"),
        (3, {"time": {"stall": 0.5}}, "it lacks 'images_per_second'"),
        (3, {"time": 5}, "not subscriptable"),
        (2, {"layers": {"fc8": {}}}, "it lacks 'ratio'"),
        (4, {"top5_error": True}, "True is not a finite number"),
    ],
)
def test_a_damaged_line_is_named(number: int, change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    write_lines(tmp_path, [line | (change if i == number else {}) for i, line in enumerate(LINES, 1)])
    with pytest.raises(UserError, match=rf"metrics\.jsonl: line {number} is damaged .*; delete that line$") as caught:
        gather.read_lines(tmp_path)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"ten": TEN | {"top1_error": float("nan")}},
        {"ten": TEN | {"nll": float("inf")}},
        {"ten": []},
        {"step": "40"},
        {"step": -1},
        {"centre": CENTRE | {"samples": 9.5}},
        {"centre": CENTRE | {"top5_error": True}},
        {"split": None},
        {"confused": [{"true": 3, "predicted": 0, "images": 1}]},
        {"confused": [{"true": 0, "predicted": -1, "images": 1}]},
        {"confused": [[0, 1, 1]]},
    ],
)
def test_a_damaged_evaluation_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    assert gather.read_evaluation(tmp_path, 3) is None
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    assert gather.read_evaluation(tmp_path, 3) == EVALUATION | {"confused": []}
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION | change))
    with pytest.raises(
        UserError, match=r"evaluation\.json: damaged \(.*\); write it again: python -m trainer evaluate$"
    ):
        gather.read_evaluation(tmp_path, 3)


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluation.json"])
def test_a_record_that_cannot_be_read_is_named(written: Written, tmp_path: Path, name: str) -> None:
    run = Path(shutil.copytree(written.run, tmp_path / "run"))
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to("/proc/self/mem")  # nothing is at address 0
    one_line(invoke(written.data, run), f"Error: {run / name}: Input/output error")


def test_a_diverged_last_layer_is_one_line(written: Written, tmp_path: Path) -> None:
    run, checkpoint = tmp_path / "run", checkpoints.load(written.run)
    weights = {name: value.clone() for name, value in checkpoint.weights.items()}
    weights["fc8.bias"][1] = float("nan")
    checkpoints.save(run, replace(checkpoint, weights=weights))
    one_line(invoke(written.data, run), "weights.fc8.bias is not finite: its training has diverged")
    assert not (run / "figures").exists()


def test_errors_are_not_looked_for_where_there_are_no_labels(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, samples = Path(shutil.copytree(written.run, tmp_path / "run")), Manifest.samples

    def unlabelled(self: Manifest, split: str) -> np.ndarray:
        table = np.array(samples(self, split))
        table["label"] = -1
        return table

    monkeypatch.setattr(Manifest, "samples", unlabelled)
    (run / "metrics.jsonl").unlink()
    result = invoke(written.data, run, "--only-errors")
    assert "no predictions.png: No image in val has a label, so none is known to be an error." in result.output


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 10**5, b"\xff", b'{"step": 1e400}'])
def test_what_is_no_evaluation_costs_the_page_one_line(written: Written, tmp_path: Path, content: bytes) -> None:
    run = Path(shutil.copytree(written.run, tmp_path / "run"))
    (run / "evaluation.json").write_bytes(content)
    one_line(invoke(written.data, run), f"Error: {run}/evaluation.json: damaged (", "python -m trainer evaluate")


# ---- a data set whose checksums are right


def put(*keys: str | int, value: object) -> Callable[[dict], None]:
    """Return the change of dataset.json that puts a value there."""

    def change(body: Any) -> None:
        for key in keys[:-1]:
            body = body[key]
        body[keys[-1]] = value

    return change


TRAIN_SPLIT, FIRST = ("splits", "train"), ("splits", "train", "shards", 0)
NAMES = "the shards of train are not train/train-NNNNNN.tar in their order"
ELSE = "an unknown key, another kind of number, or an identity that is not that of its content"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("format", value=2), "format 2, this version of Penstock reads format 1"),
        (put("format", value=True), "format: expected int, got bool"),
        (put("identity", value="0" * 64), ELSE),
        (put("more", value=1), ELSE),
        (put("recipe", "colour", value="grey"), ELSE),
        (put("recipe", "size", value=15), "recipe: size is 15, not from 16 to 1024"),
        (put("recipe", "size", value=32.0), "recipe.size: expected int, got float"),
        (put("recipe", "seed", value=-1), "recipe: seed is -1, not from 0 to None"),
        (put("recipe", "crop", value="round"), "recipe: crop is 'round', none of centre, none"),
        (put("recipe", "max_bytes", value="x"), "recipe.max_bytes: expected int, got str"),
        (put("recipe", "max_scans", value=0), "recipe.max_scans: expected int >= 1"),
        (put("built_with", value="x"), "built_with: expected object, got str"),
        (put("built_with", "pillow", value=None), "built_with[...]: expected str, got null"),
        (put("classes", 0, "label", value="0"), "classes[0].label: expected int, got str"),
        (put("classes", 1, "wnid", value="blobs"), "the labels are not the ranks 0, 1, 2 … of different classes"),
        (lambda body: body["classes"].reverse(), "the labels are not the ranks 0, 1, 2 … of different classes"),
        (put("classes", value=[]), "train/samples.npy: sample 0 is in no shard or class"),
        (put("splits", value=[]), "splits: expected object, got array"),
        (put("splits", "../x", value={}), "splits: expected str matching regex"),
        (lambda body: body["splits"].pop("val"), "no split named 'val'; there are: train"),
        (put(*TRAIN_SPLIT, "samples", value="x"), "splits[...].samples: expected int, got str"),
        (put(*TRAIN_SPLIT, "samples", value=42), "the shards of train do not add up to its 42 samples"),
        (put(*TRAIN_SPLIT, "skipped", value=-1), "splits[...].skipped: expected int >= 0"),
        (put(*FIRST, value=7), "splits[...].shards[0]: expected object, got int"),
        (put(*FIRST, "name", value="../../../etc/passwd"), NAMES),
        (put(*FIRST, "name", value="/etc/passwd"), NAMES),
        (put(*FIRST, "name", value="train/train-0.tar"), NAMES),
        (lambda body: body["splits"]["train"]["shards"].reverse(), NAMES),
        (put(*FIRST, "samples", value=2**63), "splits[...].shards[0].samples: expected int <= 9223372036854775807"),
        (put(*FIRST, "bytes", value=512), "train/train-000000.tar: 512 bytes in splits, another number or none in"),
        (put(*FIRST, "sum_color", value=[1, 2]), "sum_color: expected array of length 3, got 2"),
        (put(*FIRST, "second_moments", 1, 2, value=0.5), "second_moments[1][2]: expected int, got float"),
        (put("files", value="x"), "files: expected object, got str"),
        (put("files", "../../x", value={"bytes": 0, "sha256": "0" * 64}), "files: expected str matching regex"),
        (put("files", "/etc/passwd", value={"bytes": 0, "sha256": "0" * 64}), "files: expected str matching regex"),
        (put("files", "x", value={"bytes": 0, "sha256": ""}), "files[...].sha256: expected str matching regex"),
        (lambda body: body["files"].pop("train/train-000000.tar"), "another number or none in files"),
        (lambda body: body["files"].pop("val/samples.npy"), "val/samples.npy: not in files"),
        (lambda body: body["files"].pop("statistics.npz"), "statistics.npz: not in files"),
        (put("statistics", value=None), "statistics: expected object, got null"),
        (put("statistics", "n", value=0), "statistics.n: expected int >= 1"),
        (put("statistics", "mean_color", value=[1.0, 2.0]), "statistics.mean_color: expected array of length >= 3"),
        (put("statistics", "mean_color", value=[1, 2, 3]), ELSE),
        (put("statistics", "mean_color", 0, value=-1e308), "statistics.mean_color[0]: expected float >= 0.0"),
        (put("statistics", "eigenvalues", 0, value=1e308), "statistics.eigenvalues[0]: expected float <= 195075.0"),
        (put("recipe", "size", value=10**4000), f"recipe: size is 1{79 * '0'}, not from 16 to 1024"),
        (put("recipe", "crop", value="x" * 10**5), f"recipe: crop is '{79 * 'x'}, none of centre, none"),
        (put("files", "x" * 101, value={"bytes": 0, "sha256": "0" * 64}), "files: expected str matching regex"),
        (put("files", "x/", value={"bytes": 0, "sha256": "0" * 64}), "files: expected str matching regex"),
        (put("statistics", "covariance", 0, 0, value="x"), "statistics.covariance[0][0]: expected float, got str"),
        (put("statistics", "eigenvalues", 0, value=1.5), "statistics.npz: differs from the statistics in dataset.json"),
    ],
)  # fmt: skip
def test_a_manifest_that_lies(root: Path, change: Callable[[dict], object], words: str) -> None:
    remake(root, change)
    with pytest.raises(DatasetError) as refusal:
        read_all(root)
    assert words in str(refusal.value)
    assert re.fullmatch(rf"{root}[^\n]*(build it again|there are: train)", str(refusal.value))


def read_all(root: Path) -> None:
    built = manifest.load(root)
    built.statistics()
    for split in ("train", "val"):
        built.samples(split)


def npy(array: np.ndarray, shape: str = "", version: tuple[int, int] = (1, 0)) -> bytes:
    """Return an .npy file; with `shape` that one is in its header, of the same length."""
    out = io.BytesIO()
    np.lib.format.write_array(out, array, version)
    old = f"({len(array)},), }}"
    return out.getvalue().replace(old.encode().ljust(len(shape)), shape.encode()) if shape else out.getvalue()


def samples(change: Callable[[np.ndarray], bytes | None]) -> Callable[[Path], None]:
    def changed(root: Path) -> None:
        path = root / "train/samples.npy"
        array = np.load(path)
        data = change(array)
        path.write_bytes(npy(array) if data is None else data)

    return changed


def sample(field: str, value: int) -> Callable[[Path], None]:
    return samples(lambda array: array[field].__setitem__(7, value))


def statistics(
    name: str = "n", change: Callable[[Any], Any] = lambda array: array, write: Callable[..., None] = np.savez
) -> Callable[[Path], None]:
    def changed(root: Path) -> None:
        path = root / "statistics.npz"
        arrays = dict(np.load(path))
        arrays[name] = change(arrays[name])
        write(path, **{key: array for key, array in arrays.items() if array is not None})

    return changed


def content(data: bytes) -> Callable[[Path], None]:
    return lambda root: (root / "statistics.npz").write_bytes(data) and None


TABLE = r"train/samples.npy: sample 7 is in no shard or class of dataset.json ({})"
SPOILT = "statistics.npz: damaged ({})"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *((sample("label", value), f"label {value}); build it again") for value in (3, 2**31 - 1, -1, -2**31)),
        *((sample("shard", value), f"dataset.json (shard {value}, ") for value in (1, 7, 2**32 - 1)),
        *((sample("offset", value), f" offset {value}, ") for value in (0, 511, 2**40, 2**63, 2**64 - 1)),
        *((sample("size", value), f" size {value}, ") for value in (0, 2**32 - 1)),
        (samples(lambda array: npy(array[:-1])), "train/samples.npy: damaged ("),
        (samples(lambda array: npy(np.repeat(array, 2))), "train/samples.npy: damaged ("),
        (samples(lambda array: npy(array["offset"])), "train/samples.npy: damaged ("),
        (samples(lambda array: npy(array[None])), "|V40 of shape (1, 41) in 1,640 bytes, not |V40 of shape (41,)"),
        (samples(lambda array: npy(array, version=(2, 0))), "damaged (another version of the format)"),
        (samples(lambda array: npy(array, shape="(1000000000000000,), }")), "of shape (1000000000000000,) in"),
        (samples(lambda array: npy(array.astype(object))), "train/samples.npy: damaged ("),
        (samples(lambda array: npy(array)[:100]), "train/samples.npy: damaged ("),
        (samples(lambda array: b""), "train/samples.npy: damaged ("),
        (content(b""), SPOILT.format("File is not a zip file")),
        (content(b"\x80\x04N."), SPOILT.format("File is not a zip file")),
        (content(npy(np.zeros(3))), SPOILT.format("File is not a zip file")),
        (statistics("mean_image", lambda array: None), SPOILT.format("'mean_image is not a file in the archive'")),
        (statistics("mean_image", lambda array: array[1:]), "mean_image has the shape (31, 32, 3), not (32, 32, 3)"),
        (statistics("mean_image", lambda array: array * np.nan), "mean_image holds numbers that are not finite"),
        (statistics("mean_image", lambda array: array - 300), "the mean image holds no grey levels from 0 to 255"),
        (statistics("mean_image", lambda array: array * 1e300), "the mean image holds no grey levels from 0 to 255"),
        (statistics("eigenvalues", lambda array: array + np.inf), "eigenvalues holds numbers that are not finite"),
        (statistics("sum_image", lambda array: array * 1.0), "sum_image is no array of <i8"),
        (statistics("n", lambda array: array[None]), "n has the shape (1,), not ()"),
        (statistics("n", lambda array: array.astype(object)), "Object arrays cannot be loaded when allow_pickle=False"),
        (statistics(write=np.savez_compressed), SPOILT.format("a member is compressed")),
    ],
)  # fmt: skip
def test_a_table_that_lies(root: Path, change: Callable[[Path], None], words: str) -> None:
    change(root)
    remake(root)
    with pytest.raises(DatasetError) as refusal:
        read_all(root)
    message = str(refusal.value)
    assert words in message
    assert re.fullmatch(rf"{root}/(train/samples\.npy|statistics\.npz): .*; build it again", message)
    result = verify(root, "--quick", "--workers", 1)
    line = message.removeprefix(f"{root}/").removesuffix("; build it again")
    assert (result.exit_code, result.output.splitlines()[0]) == (1, line)


@pytest.mark.parametrize("name", ["dataset.json", "train/samples.npy", "statistics.npz", "train/train-000001.tar"])
@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path)]
)
def test_what_is_no_regular_file_is_not_waited_for(root: Path, name: str, make: Callable[[Path], None]) -> None:
    (root / name).unlink()
    make(root / name)
    began = time.monotonic()
    for use in (read_all, lambda root: Loader(root, "train")):
        with pytest.raises(
            DatasetError,
            match=rf"^{root / name}: .*(egular file|s a directory|symbolic links).*; (build it again|mend it: .*)$",
        ):
            use(root)
    assert verify(root, "--quick", "--workers", 1).exit_code == (2 if name == "dataset.json" else 1)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("words", "change"),
    [
        (["tools/verify_shards.py", "{data}"], lambda root: remake(root, put("files", value="x"))),
        (
            ["-m", "trainer", "evaluate", "--data", "{data}", "--checkpoint", "{data}"],
            lambda root: remake(root, put("statistics", value=None)),
        ),
        (
            ["-m", "trainer", "train", "--data", "{data}", "--out", "{data}-run", "--devices", "cpu,cpu"],
            sample("offset", 2**63),
        ),
    ],
)
def test_commands_say_so_in_one_line(root: Path, words: list[str], change: Callable[[Path], None]) -> None:
    change(root)
    remake(root, lambda body: None) if words[-1] == "cpu,cpu" else None
    line = [sys.executable, *(word.format(data=root) for word in words)]
    result = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(rf"Error: {root}/[^\n]*; build it again\n", result.stderr), result.stderr
    assert not Path(f"{root}-run").exists()
