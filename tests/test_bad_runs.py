"""What a user can get wrong with a run, by its commands: one clear line, and nothing written or lost."""

import errno
import fcntl
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from conftest import CLASSES, begun, build, digests, gone, until
from runs import WIDTHS, one_line, options, resume, start, train, trainer
from stored import damage
from trainer import checkpoint as checkpoints
from trainer.__main__ import COMMANDS
from trainer.metrics import read


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train(dataset, folder, 4).exit_code == 0
    return folder


def test_data_that_lacks_something(raw: Path, dataset: Path, tmp_path: Path):
    new = tmp_path / "run"
    one_line(train(tmp_path / "nothing", new, 1), "no such directory", "build_shards.py")
    for lost in ("statistics.npz", "dataset.json", "train/samples.npy"):
        data = Path(shutil.copytree(dataset, tmp_path / lost.partition("/")[0]))
        (data / lost).unlink()
        one_line(train(data, new, 1), lost if lost != "dataset.json" else str(data))
    assert build(raw, tmp_path / "whole", "--workers", 1, "--crop", "none").exit_code == 0
    one_line(train(tmp_path / "whole", new, 1), "--crop none")
    assert build(raw, tmp_path / "small", "--workers", 1, "--size", 64).exit_code == 0
    one_line(train(tmp_path / "small", new, 1), "images of 64 pixels", "224")
    one_line(train(dataset, new, 1, "model.classes=10184"), f"has {len(CLASSES)} classes", "10,184", "model.classes")
    assert not new.exists()


WRITERS = {  # a file that a command writes in RUN, and the command
    "recipe.json": "train --resume --set train.steps=5 --data {data} --out {run} --devices cpu,cpu",
    "evaluation.json": "evaluate --data {data} --checkpoint {run} --devices cpu,cpu",
    "report.html": "figures {run} --data {data} --devices cpu,cpu",
    "figures/kernels.png": "figures {run} --data {data} --devices cpu,cpu",
    "index/codes.npy": "index {run} {data} --devices cpu,cpu",
    "export/model.onnx": "export {run} --data {data}",
    "all.npz": "ensemble {run} --data {data} --save-probabilities {run}/all.npz --devices cpu,cpu",
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_directory_where_a_file_should_be(name: str, run: Path, dataset: Path, tmp_path: Path):
    own = Path(shutil.copytree(run, tmp_path / "run"))
    (own / name).unlink(missing_ok=True)
    (own / name).mkdir(parents=True)
    before = digests(own)
    result = trainer(*WRITERS[name].format(data=dataset, run=own).split())
    one_line(result, f"Error: {own / name}: is a directory, where a file should be; move it away")
    assert digests(own) == before


@pytest.mark.proof
@pytest.mark.parametrize("lack", ["bytes", "room", "inodes", "read-only"])
@pytest.mark.parametrize("name", [name for name in WRITERS if not name.startswith(("recipe", "figures"))])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    name: str, lack: str, run: Path, dataset: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
):
    def work(*_: object, **__: object) -> None:
        raise AssertionError("it was begun")

    own = Path(shutil.copytree(run, disk / "run"))
    files = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(bytes(files - (4096 if lack == "room" else 0)) if lack in ("bytes", "room") else b"")
    if lack not in ("bytes", "room"):
        change = "ro" if lack == "read-only" else f"nr_inodes={os.statvfs(disk).f_files - os.statvfs(disk).f_ffree}"
        subprocess.run(["mount", "-o", f"remount,{change}", disk], check=True)
    for module in ("evaluate.predictions", "ensemble.predictions", "export.load_network", "figures.page.draw"):
        monkeypatch.setattr(f"trainer.{module}", work)
    monkeypatch.setattr("trainer.retrieval.index._write_features", work)
    result = trainer(*WRITERS[name].format(data=dataset, run=own).split())
    if lack == "room" and name in ("evaluation.json", "report.html", "all.npz"):  # small, or of an unknown size
        assert isinstance(result.exception, AssertionError)
    else:
        reason = {"read-only": "is read-only", "room": "MB are free; make room"}.get(lack, "No space left on device")
        one_line(result, f"Error: {disk}", reason)


@pytest.mark.proof
@pytest.mark.parametrize("victim", ["metrics.jsonl", ""])
def test_files_of_a_run_that_are_deleted_end_it(victim: str, dataset: Path, tmp_path: Path):
    run = tmp_path / "run"
    process = start(*options(dataset, run, "train.steps=1000", "train.validate_every=1000"))
    until(process, lambda: (run / "metrics.jsonl").exists() and len(read(run)) > 2)
    gone = (run / victim).rename(tmp_path / "gone")  # at one moment, with all that is in it
    gone.unlink() if victim else shutil.rmtree(gone)
    output = process.communicate(timeout=60)[0]
    name = re.escape(f"{run}/metrics.jsonl") + ("" if victim else f"|{re.escape(f'{run}/tensorboard/')}events[^:]*")
    line = f"Error: ({name}): deleted while the run writes it; what is left of the run goes on by --resume"
    assert process.returncode == 2, output
    assert re.fullmatch(line, output.splitlines()[-1])


ENDED = {  # every command; those that write, write to {out}
    "tools/make_raw.py": "{out} --classes 3 --train 10",
    "tools/build_shards.py": "{raw} {out} --workers 2",
    "tools/verify_shards.py": "{data} --workers 2",
    "train": "--data {data} --out {out} --recipe tiny --devices cpu,cpu",
    "evaluate": "--data {data} --checkpoint {run}",
    "ensemble": "{run} --data {data} --save-probabilities {out}/all.npz",
    "predict": "{data} --data {data} --checkpoint {run}",
    "figures": "{run} --data {data}",
    "index": "{run} {data} --out {out}",
    "similar": "{raw}/val/blobs/0000.jpg --data {data} --checkpoint {run}",
    "export": "{run} --data {data} --out {out}",
    "reproduce": "columns --data {data} --out {out} --device cpu",
}


def caught(process: subprocess.Popen[str], number: int) -> bool:
    """Return True once the process has a handler of a signal."""
    masks = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return masks is not None and bool(int(masks[1], 16) >> (number - 1) & 1)


@pytest.mark.proof
@pytest.mark.parametrize("name", ENDED)
def test_a_signal_at_any_moment_is_one_line(name: str, run: Path, raw: Path, dataset: Path, tmp_path: Path):
    """From the first line of our own on: Python's start before it takes 0.02 s."""
    assert [*ENDED][3:] == [*COMMANDS]
    own, moments = Path(shutil.copytree(run, tmp_path / "run")), random.Random(name)
    if name == "similar":
        assert trainer("index", own, dataset).exit_code == 0
    for i in range(9):
        out, number = tmp_path / f"out{i}", (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[i % 3]
        words = ENDED[name].format(raw=raw, data=dataset, run=own, out=out).split()
        process = begun([sys.executable, *([] if "/" in name else ["-m", "trainer"]), name, *words])
        until(process, partial(caught, process, signal.SIGHUP))
        time.sleep(moments.uniform(0, 1.5))
        send = moments.choice((os.kill, os.killpg))
        with suppress(ProcessLookupError):
            send(process.pid, number)
            if moments.random() < 0.5:
                time.sleep(moments.uniform(0, 0.05))
                send(process.pid, number)
        errors = process.communicate(timeout=60)[1]
        assert gone(process.pid)
        if process.returncode:  # else it had ended before its moment
            assert process.returncode == 128 + number, errors
            assert re.fullmatch(r"Error: [^\n]*\n", errors), errors
        assert not [*tmp_path.rglob("*.tmp")]


def test_without_validation_images_a_run_ends_and_says_so(raw: Path, tmp_path: Path):
    assert build(raw / "train", tmp_path / "data", "--workers", 1, "--holdout", 0).exit_code == 0
    result = train(tmp_path / "data", tmp_path / "run", 2)
    assert result.exit_code == 0, result.output
    assert "not validated" in result.output
    one_line(train(tmp_path / "data", tmp_path / "r", 2, 'optim.schedule="plateau"'), "no labelled validation images")


def test_a_run_directory_is_one_processs_and_holds_nothing_else(dataset: Path, tmp_path: Path):
    run = tmp_path / "run"
    run.write_text("a file")
    one_line(train(dataset, run, 1), "is a file")
    one_line(resume(dataset, run), "is a file; name the run directory")
    run.unlink()
    run.mkdir()
    (run / "thesis.txt").write_text("a text")
    one_line(train(dataset, run, 1), "is not a run directory (it has thesis.txt)")
    one_line(train(dataset, dataset / "new" / "run", 1), f"run: lies inside DATASET, {dataset}", "name another --out")
    assert not (dataset / "new").exists()
    (run / "thesis.txt").unlink()
    (run / "recipe.json.0a1b.tmp").write_text("{")  # as a kill in the first second leaves it
    (run / "tensorboard").mkdir()
    folder = os.open(run, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    one_line(train(dataset, run, 1), "another process trains there")
    os.close(folder)
    assert train(dataset, run, 1).exit_code == 0
    assert not list(run.glob("*.tmp"))
    for file in checkpoints.files(run):
        file.unlink()
    before = checkpoints.best_file(run).read_bytes()
    one_line(train(dataset, run, 1), "exists already", "--resume")  # of which only the best checkpoint is left
    assert checkpoints.best_file(run).read_bytes() == before


def test_without_locks_a_run_begins_with_a_warning(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def flock(file: object, kind: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    run = tmp_path / "run"
    (run / "lost+found").mkdir(parents=True)  # as in the top folder of a disk
    result = train(dataset, run, 1)
    assert result.exit_code == 0, result.output
    problem = "its file system has no locks, and nothing keeps a second process from writing there"
    assert (
        result.stderr.count("warning:") == result.stderr.count(f"warning: {run}: {problem}; start one at a time\n") == 1
    )


def test_options_of_a_new_run(run: Path, dataset: Path, tmp_path: Path):
    new = tmp_path / "r"
    one_line(train(dataset, new, 1, "train.step=1"), "unknown key train.step")
    one_line(train(dataset, new, 1, more=("--recipe", "huge")), "huge: no such recipe; there are automatic,", "tiny")
    for devices, words in (("cuda:99,cuda:98", "or name cpu"), ("cpu", "1 given; the network has two columns")):
        one_line(train(dataset, new, 1, more=("--devices", devices)), devices, words)
    one_line(train(dataset, new, 1, more=("--other-data",)), "--resume")
    one_line(train(dataset, new, 1, more=("--init-layers", "conv1")), "--init CHECKPOINT")
    one_line(train(dataset, new, 1, more=("--init", tmp_path)), "no checkpoint")
    assert "'nan' is not a valid integer" in train(dataset, new, 1, more=("--patience", "nan")).stderr
    init = ("--init", run, "--init-layers")
    one_line(train(dataset, new, 1, more=(*init, ",")), "names no layer")
    one_line(train(dataset, new, 1, more=(*init, "conv9")), "--init-layers conv9", "not in both")
    narrow = [f"model.layers.{name}.width=6" for name in WIDTHS]
    one_line(train(dataset, new, 1, *narrow, more=(*init, "conv1")), "--init-layers conv1", "shape", "fit are none")
    one_line(train(dataset, new, 1, *narrow, more=("--init", run)), "no layer of that network has the name and shape")
    workers = "data.workers = ['feed', '']: must be a list of at most 256, each a text of 1 to 200 characters"
    for feed, words in (
        (("--feed", ""), "--feed is empty (an unset shell variable?)"),
        (("--feed", "feed, "), f"--feed: {workers}"),
        (("--set", 'data.workers=["feed", ""]'), f'--set data.workers=["feed", ""]: {workers}'),
        (("--feed", "feed:8815,http://feed"), "'http://feed': no address of a worker; write HOST:PORT, "),
    ):
        one_line(train(dataset, new, 1, more=feed), words)
    assert not new.exists()


def test_what_cannot_change_on_resume(run: Path, raw: Path, dataset: Path, tmp_path: Path):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused = {
        "model.layers.fc6.width=16": "--set model.layers.fc6.width: cannot change on resume (32 → 16)",
        "train.seed=1": "--set train.seed: cannot change on resume (2012 → 1)",
        'data.mean="colour"': "data.mean: cannot change",
        "train.stepz=1": "unknown key train.stepz",
    }
    for setting, words in refused.items():
        one_line(resume(dataset, run, "train.steps=9", setting), words)
    one_line(resume(dataset, run, more=("--recipe", "original")), "a resumed run keeps its own")
    one_line(resume(dataset, run, "optim.lr=5.0"), "has done 4 steps, and 4 are asked for", "train.steps")
    one_line(train(dataset, run, 2), "exists already", "--resume")
    one_line(resume(dataset, tmp_path / "none"), "no checkpoint")
    for name in CLASSES[:2]:
        shutil.copytree(raw / "train" / name, tmp_path / "raw" / name)
    assert build(tmp_path / "raw", tmp_path / "two", "--workers", 1).exit_code == 0
    other = resume(tmp_path / "two", run, "train.steps=5", more=("--other-data",))
    one_line(other, "has learned 3 classes", "has 2", "--init")
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "command",
    [
        "train --data DATA --out RUN --resume",
        "train --data DATA --out OUT --recipe tiny --init RUN",
        "evaluate --data DATA --checkpoint RUN",
        "export RUN --data DATA --out OUT",
        "predict --data DATA --checkpoint RUN PICTURE",
        "index RUN DATA",
        "similar --data DATA --checkpoint RUN PICTURE",
        "figures RUN --data DATA",
        "ensemble RUN RUN --data DATA",
    ],
)
def test_no_command_takes_tensors_of_other_shapes_than_the_recipes(
    run: Path, raw: Path, dataset: Path, tmp_path: Path, command: str
):
    """As one number for all classes a bias would fit, and be wrong; under a right checksum."""
    file = checkpoints.step_file(tmp_path / "run", 4)
    saved = checkpoints.load(run)
    values = saved.weights | {"fc8.bias": saved.weights["fc8.bias"][:1]}
    checkpoints.save(tmp_path / "run", replace(saved, weights=values))
    paths = {"RUN": tmp_path / "run", "DATA": dataset, "OUT": tmp_path / "out"}
    paths["PICTURE"] = next((raw / "val").rglob("*.jpg"))
    result = trainer(*(paths.get(word, word) for word in command.split()))
    one_line(
        result, f"Error: {file}: damaged (weights.fc8.bias is (1,), its recipe says (3,)); name another checkpoint"
    )
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


def test_the_page_of_a_network_without_kernels(dataset: Path, tmp_path: Path):
    text = "[model]\nsize = 32\ncolumns = 1\norder = ['only']\n[model.layers.only]\nkind = 'linear'\n"
    (tmp_path / "own.toml").write_text(text + "[data]\nmean = 'aligned'\n[train]\nsteps = 1\n")
    new = ("--data", dataset, "--recipe", tmp_path / "own.toml", "--out", tmp_path / "own", "--devices", "cpu")
    result = trainer("train", *new)
    assert result.exit_code == 0, result.output
    assert "only, has no kernels to look at" in (tmp_path / "own" / "report.html").read_text()


def test_a_run_has_its_page_in_spite_of_a_damaged_sample(dataset: Path, tmp_path: Path):
    data = Path(shutil.copytree(dataset, tmp_path / "data"))
    damage(data, 5)
    result = trainer("train", *options(data, tmp_path / "run", "train.steps=1", "data.max_bad=1"))
    assert result.exit_code == 0, result.output
    assert f"\npage: {tmp_path}/run/report.html\n" in result.output
    assert checkpoints.load(tmp_path / "run").step == 1
