"""The records of a run: old ones are read, and damaged ones are one line that names file, line and remedy."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import UserError
from pipeline.manifest import Manifest
from reported import CENTRE, TEN, TRAIN, VALIDATION, Written, invoke
from runs import one_line
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
        {"ten": []},
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
    with pytest.raises(UserError, match=r"evaluation\.json: damaged .*; mend or delete it$"):
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
    one_line(invoke(written.data, run), "fc8.bias is not a finite number: training has diverged")
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
