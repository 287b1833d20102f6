"""--json of the commands: each line of standard output is an event, with the numbers of the files and of the text."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from conftest import ROOT, build, verify
from evaluated import VAL, Made, shared_made
from pipeline import cli, manifest
from reported import Written, invoke
from runs import resume, train, trainer
from trainer.metrics import read

__all__ = ["shared_made"]

Event = dict[str, Any]
SHARD = "train/train-000000.tar"


def events(result: Result, exit_code: int = 0) -> list[Event]:
    """Return the events of a command, `event` being the first key of each."""
    assert result.exit_code == exit_code, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(next(iter(line)) == "event" for line in lines)
    return lines


def of(kind: str, lines: list[Event]) -> list[Event]:
    """Return the values of the events of a kind."""
    return [{key: value for key, value in line.items() if key != "event"} for line in lines if line["event"] == kind]


def kinds(lines: list[Event]) -> list[str]:
    return [line["event"] for line in lines]


def test_progress_is_printed_four_times_a_second_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    now = 1000.0
    monkeypatch.setattr(cli.time, "monotonic", lambda: now)
    with cli.progress_bars(as_json=True) as show:
        for done in range(1, 34):
            now += 0.0625
            show("a", done, 33, "note")
            show("b", done, 99)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["done"] for line in of("progress", lines) if line["task"] == "a"] == [*range(1, 34, 4)]
    assert of("progress", lines)[-1] == {"task": "b", "done": 33, "total": 99}


def test_verify(raw: Path, tmp_path: Path):
    """Duplicates, damage, its repair; in the words and numbers of the text."""
    copies, root = Path(shutil.copytree(raw, tmp_path / "raw")), tmp_path / "dataset"
    shutil.copyfile(copies / "train/blobs/0001.jpg", copies / "train/blobs/again.jpg")
    options = ("--workers", 1)
    assert build(copies, root, *options, "--size", 32, "--samples-per-shard", 16).exit_code == 0
    good = verify(root, *options).output.splitlines()
    lines, built = events(verify(root, *options, "--json")), manifest.load(root)
    shards = sum(len(split.shards) for split in built.splits.values())
    (last, *_), (done,) = reversed(of("progress", lines)), of("done", lines)
    assert (of("plan", lines), last) == (
        [{"shards": shards, "quick": False}],
        {"task": "shards", "done": shards, "total": shards},
    )
    assert of("note", lines) == [{"text": good[0]}]
    assert of("duplicates", lines) == [{"samples": good[1].strip().split(" = "), "count": 2}]
    assert done["seconds"] > 0
    text = f"all holds: {done['files']} files, {done['samples']} samples, {done['bytes']:,} bytes, "
    assert (done["failed"], good[-1].startswith(text)) == (0, True)

    damaged = bytearray((root / SHARD).read_bytes())
    damaged[700] ^= 1
    (root / SHARD).write_bytes(damaged)
    shown = verify(root, "--quick", *options).output.splitlines()
    lines = events(verify(root, "--quick", "--json", *options), exit_code=1)
    assert [f"{failure['file']}: {failure['reason']}" for failure in of("failure", lines)] == [shown[0]]
    assert (lines[-1]["event"], lines[-1]["failed"]) == ("done", 1)
    lines = events(verify(root, "--json", "--repair", copies, *options))
    order = [kind for kind in kinds(lines) if kind not in ("progress", "note", "duplicates")]
    assert order == ["plan", "failure", "repaired", "plan", "done"]
    assert (of("repaired", lines), lines[-1]["failed"]) == ([{"files": [SHARD]}], 0)


def test_train(dataset: Path, tmp_path: Path):
    """The events have the lines of metrics.jsonl; a run that an error ends is not done."""
    run = tmp_path / "run"
    lines = events(train(dataset, run, 4, more=("--json",)))
    trained = [{**line, "steps": 4} for line in read(run) if line.pop("kind") == "train"]
    shown = of("train", lines)
    stalls = [line.pop("stall_text") for line in shown]
    assert shown == trained
    for stall, line in zip(stalls, trained):
        assert re.match(rf"stall +{100 * line['time']['stall']:.1f} %", stall)
    validated = [line for line in read(run) if line["kind"] == "validation"]
    assert [{"kind": "validation", **line} for line in of("validation", lines)] == validated
    assert of("plan", lines) == [{"run": str(run), "steps": 4, "start": 0}]
    file = {"file": str(run / "checkpoints/step-00000004.safetensors"), "step": 4}
    assert (of("checkpoint", lines), of("done", lines)) == ([file], [{"step": 4}])
    assert [line["event"] for line in lines[:2] + lines[-3:]] == ["plan", "note", "checkpoint", "done", "page"]
    assert " parameters, " in lines[1]["text"]

    lines = events(resume(dataset, run, "train.steps=5", "optim.lr=1e30", more=("--json",)), exit_code=2)
    assert of("plan", lines) == [{"run": str(run), "steps": 5, "start": 4}]
    assert "from step 4: optim.lr 0.01 → 1e+30" in [line["text"] for line in of("note", lines)]
    assert "done" not in kinds(lines)


def test_evaluate(made: Made, tmp_path: Path):
    run = Path(shutil.copytree(made.run, tmp_path / "run"))
    lines = events(trainer("evaluate", "--data", made.data, "--checkpoint", run, "--devices", "cpu,cpu", "--json"))
    assert {*kinds(lines[:-1])} == {"progress"}
    assert of("progress", lines)[-1] == {"task": "val", "done": sum(VAL), "total": sum(VAL)}
    assert of("done", lines) == [json.loads((run / "evaluation.json").read_text())]


def test_figures(written: Written, tmp_path: Path):
    """All files; where pictures are damaged, a note in the place of a sheet."""
    lines = events(invoke(written.data, written.run, "--json"))
    assert of("done", lines) == [{"files": written.output.splitlines()}]
    searched = [line for line in of("progress", lines) if line["done"] == line["total"]]
    assert [line["total"] for line in searched] == [written.dataset.splits["train"].samples]
    data, run = (Path(shutil.copytree(path, tmp_path / path.name)) for path in (written.data, written.run))
    (data / SHARD).write_bytes(bytes((data / SHARD).stat().st_size))
    lines = events(invoke(data, run, "--json"))
    for part, note in zip(("neighbours.png", "augmentation.png", "training samples"), of("note", lines), strict=True):
        assert re.match(f"no {part}: .*{SHARD}", note["text"])
    drawn = "figures/kernels.png", "figures/predictions.png", "report.html"
    assert of("done", lines) == [{"files": [str(run / name) for name in drawn]}]


def test_feed(dataset: Path):
    line = [sys.executable, "-m", "pipeline.service", "feed", "--root", str(dataset.parent), "--port", "0", "--json"]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            event = json.loads(process.stdout.readline())
            assert re.fullmatch(r"grpc://127\.0\.0\.1:\d+", event.pop("uri"))
            assert event == {"event": "serving", "data_sets": 1, "pid": process.pid}
        finally:
            process.kill()
