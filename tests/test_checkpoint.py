"""Checkpoints: what comes back, what is refused, and what a kill or a full disk leaves."""

import json
import os
import random
import resource
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from conftest import ROOT
from pipeline import UserError
from runs import beginning, of_november_2026
from trainer import checkpoint as checkpoints
from trainer.checkpoint import META, Checkpoint, CheckpointError, CheckpointWriter, best_file, files, load, save
from trainer.layers import shapes
from trainer.recipe import Recipe, from_dict, override

FLOATS = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 1e22, 2.0**-1074 * 3]


def checkpoint(step: int, elements: int = 12, recipe: Recipe | None = None) -> Checkpoint:
    """Of random tensors, none of which is contiguous where it has two dimensions, in a recipe of two small layers."""
    random = torch.Generator().manual_seed(step)
    layers = f"fc6={{kind='linear', width={elements // 3}, then=['relu']}}, fc8={{kind='linear'}}"
    model = f"model={{size=1, columns=1, order=['fc6', 'fc8'], layers={{{layers}}}}}"
    recipe = recipe or from_dict(tomllib.loads(model), override(Recipe(), ["optim.lr=0.3", "train.seed=7"]), "")

    def drawn() -> dict[str, torch.Tensor]:
        sizes = shapes(recipe.model, 2)
        return {
            name: torch.randn(size[::-1], generator=random).permute(*range(len(size))[::-1])
            for name, size in sizes.items()
        }

    _, progress, _ = beginning(step)
    loader = {"version": 1, "order": "uniform", "step": step, "bad": [3, 2**40], "window": None}
    progress |= {"loss": FLOATS, "best": {"step": 3, "top1_error": 42.123456789012345}, "on": True, "ünit": "µs"}
    history = ({"step": 0, "devices": ["cpu", "cpu"]}, {"step": 2, "torch": "2"})
    return Checkpoint(step, recipe, ("a", "b"), "f" * 64, drawn(), drawn(), loader, progress, history)


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    for kind in ("weights", "velocity"):
        first, second = getattr(one, kind), getattr(other, kind)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert replace(one, weights={}, velocity={}) == replace(other, weights={}, velocity={})


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def refusal(call: Callable[[], object], kind: type[UserError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 700
    return str(caught.value)


def test_everything_comes_back_exactly_and_is_readable_without_us(tmp_path: Path):
    path = save(tmp_path, checkpoint(3))
    assert path == tmp_path / "checkpoints" / "step-00000003.safetensors"
    assert_same(load(path), checkpoint(3))
    assert_same(load(tmp_path), checkpoint(3))
    assert [value.hex() for value in load(path).progress["loss"]] == [value.hex() for value in FLOATS]
    again = [save(tmp_path / "again", one).read_bytes() for one in (checkpoint(3), load(path))]
    assert again == [path.read_bytes()] * 2
    umask = os.umask(0o22)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask  # others may read it
    tensors = safetensors.torch.load_file(path)
    assert sorted(tensors) == [f"{kind}.{n}" for kind in ("velocity", "weights") for n in sorted(checkpoint(3).weights)]
    assert torch.equal(tensors["weights.fc6.weight"], checkpoint(3).weights["fc6.weight"])
    with safe_open(path, framework="numpy") as file:
        plain = json.loads(file.metadata()["penstock"])
    assert (plain["format"], plain["step"], plain["classes"]) == (2, 3, ["a", "b"])


def test_values_that_would_not_come_back_are_refused_before_writing(tmp_path: Path):
    for value in (float("nan"), float("inf"), {1, 2}):
        with pytest.raises((ValueError, TypeError)):
            save(tmp_path, replace(checkpoint(3), progress={"loss": value}))
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_of_the_earlier_code_loads(tmp_path: Path):
    """Without a checksum. Its recipe has every key of that time; test_train resumes a run from one."""
    recipe = json.loads((Path(__file__).parent / "recipe-2026-11.json").read_text())
    for layer in list(recipe["model"]["layers"].values())[:-1]:
        layer["width"] = 2
    path, saved = checkpoints.step_file(tmp_path, 3), checkpoint(3, recipe=from_dict(recipe, Recipe(), ""))
    path.parent.mkdir()
    path.write_bytes(of_november_2026(saved, recipe))
    old = load(tmp_path)
    recipe["data"] |= {"readers": 1, "depth": 2, "workers": []}  # which came later
    recipe["data"] |= {"tier": "auto", "device_bytes": 0, "max_stall": 0.01, "hardware_share": 0.9, "flips": True}
    assert json.loads(json.dumps(asdict(old.recipe))) == recipe
    assert_same(old, saved)


@dataclass
class Payload:
    """Unpickled, it leaves a folder."""

    folder: str

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.folder,)


def altered(key: str = "step", value: object = 3, tensors: Callable[[dict], object] = dict) -> Callable[[Path], object]:
    """Return a function that writes a checkpoint anew, under a right checksum, with a value or the tensors changed."""

    def alter(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            plain = json.loads(file.metadata()[META])
        *sections, last = key.split(".")
        holder = plain
        for section in sections:
            holder = holder[int(section) if isinstance(holder, list) else section]
        holder[last] = value
        stored = safetensors.torch.load_file(path)
        tensors(stored)
        safetensors.torch.save_file(stored, path, {META: checkpoints.sealed(stored, json.dumps(plain))})

    return alter


def written(tensors: dict[str, torch.Tensor], **texts: str) -> Callable[[Path], object]:
    return lambda path: safetensors.torch.save_file(tensors, path, texts)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: os.truncate(path, 0), "damaged"),
    "a byte short": (lambda path: os.truncate(path, path.stat().st_size - 1), "damaged"),
    "torch.save": (lambda path: torch.save(Payload(f"{path}.unpickled"), path), "damaged"),
    "of others": (written({"a": torch.zeros(2)}), "something else"),
    "not JSON": (written({}, penstock="{"), "damaged (input data was truncated)"),
    "no object": (written({}, penstock="[1]"), "damaged (expected object, got array)"),
    "deep JSON": (written({}, penstock='{"a":' * 10**5), "damaged"),
    "NaN": (written({}, penstock='{"a": NaN}'), "damaged (JSON is malformed: invalid character (byte 6))"),
    "negative step": (altered("step", -1), "damaged (step: expected int >= 0)"),
    "newer format": (altered("format", 3), "of format 3, and this version of the program reads format 2; read it with"),
    "no format": (written({}, penstock="{}"), "of format 1, and this version"),
    "type": (altered("step", "3"), "damaged (step: expected int, got str)"),
    "no history": (altered("history", None), "damaged (history: expected array, got null)"),
    "a start": (altered("history.0.devices", "cpu"), "damaged (history[0].devices: expected array, got str)"),
    "a change": (altered("history.0.changed", {"a": [1]}), "expected array of length 2, got 1"),
    "a label": (altered("classes", ["a", 1]), "damaged (classes[1]: expected str, got int)"),
    "no classes": (altered("classes", []), "damaged (classes: expected array of length >= 1)"),
    "data set": (altered("dataset", "f"), "damaged (dataset: expected str matching regex"),
    "recipe": (altered("recipe", {"nonsense": 1}), "version of this program (its recipe: unknown key nonsense"),
    "no recipe": (altered("recipe", {}), "model.order = (): must be one layer at least"),
    "no loader": (altered("loader", {}), "damaged (loader: object missing required field step)"),
    "another step": (altered("loader.step", 4), "damaged (it is of step 3, and its loader's state of step 4)"),
    "bad": (altered("loader.bad", [-1]), "damaged (loader.bad[0]: expected int >= 0)"),
    "no progress": (altered("progress", {}), "damaged (progress: object missing required field schedule)"),
    "plateaus": (altered("progress.schedule.best", "x"), "damaged (progress.schedule.best: expected float | null, got"),
    "window": (altered("progress.window", None), "damaged (progress.window: expected object, got null)"),
    "wrong images": (altered("progress.window.wrong", "9"), "damaged (progress.window.wrong: expected float, got str)"),
    "pending": (altered("progress.pending", 1), "damaged (progress.pending: expected bool, got int)"),
    "no velocity": (
        altered(tensors=lambda t: t.pop("velocity.fc6.bias")),
        "(velocity.fc6.bias is missing, its recipe says (4,))",
    ),
    "one too many": (altered(tensors=lambda t: t.update(a=torch.zeros(1))), "a is (1,), its recipe says none"),
    "a number for all": (
        altered(tensors=lambda t: t.update({"weights.fc8.bias": torch.zeros(1)})),
        "weights.fc8.bias is (1,), its recipe says (2,)",
    ),
    "float64": (altered(tensors=lambda t: t.update(a=torch.zeros(1).double())), "damaged (a is not float32)"),
    "unknown": (altered("checksun", "0" * 64), "damaged (unknown key checksun)"),
    "diverged": (
        altered(tensors=lambda t: t["velocity.fc8.bias"].fill_(float("-inf"))),
        "velocity.fc8.bias is not finite: its training has diverged",
    ),
    "long": (written({"x" * 10**5: torch.zeros(1)}, penstock="{}"), "of format 1"),
    "a long choice": (altered("recipe.train.compile", "x" * 10**5), "must be one of no, segments, graphs"),
    "a long key": (altered("x" * 10**5), "damaged (unknown key x"),
    "a fifo": (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
    "step": (lambda path: save(path.parents[1], checkpoint(5)).replace(path), "holds step 5, and its name another"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_one_line(tmp_path: Path, damage: str):
    path = save(tmp_path, checkpoint(3))
    alter, reason = DAMAGES[damage]
    alter(path)
    message = refusal(lambda: load(tmp_path))
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert message.endswith("; name another checkpoint, or train again")
    older = save(tmp_path, checkpoint(1))
    assert refusal(lambda: load(tmp_path)).endswith(f"; delete it to use {older.name}")
    assert names(tmp_path) == [older.name, path.name]  # nothing was unpickled


def test_every_flipped_bit_is_in_the_way(tmp_path: Path):
    """Of the header's length, its JSON, its padding, the tensors."""
    path = save(tmp_path, checkpoint(3))
    good, chance = path.read_bytes(), random.Random(3)
    for i in [*range(8), *chance.sample(range(8, len(good)), 300)]:
        data = bytearray(good)
        data[i] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        message = refusal(lambda: load(tmp_path))
        assert message.startswith(f"{path}: ")
        if i >= len(good) - 8 * sum(value.numel() for value in checkpoint(3).weights.values()):
            assert "damaged (its checksum is not that of its bytes)" in message


def test_what_is_there_and_what_is_not(tmp_path: Path):
    assert "no checkpoint in" in refusal(lambda: load(tmp_path / "run"))
    assert "no such file" in refusal(lambda: load(tmp_path / "step-1.safetensors"))
    for step in (100_000_000, 99_999_999):
        save(tmp_path, checkpoint(step))
    (tmp_path / "checkpoints" / "step-of-mine.safetensors").touch()
    assert [load(file).step for file in files(tmp_path)] == [99_999_999, 100_000_000]
    checkpoints.require_same_data(checkpoint(1), "f" * 64, tmp_path)
    message = refusal(lambda: checkpoints.require_same_data(checkpoint(1), "e" * 64, tmp_path))
    assert message.endswith("this one is eeeeeeeeeeee…; name the DATASET that it was trained on")


def test_the_newest_and_the_best_stay(tmp_path: Path):
    assert not best_file(tmp_path).exists()
    with CheckpointWriter(tmp_path, keep=2) as writer:
        for step in range(1, 7):
            writer.save(checkpoint(step), best=step in (2, 3))
    assert names(tmp_path) == ["best.safetensors", "step-00000005.safetensors", "step-00000006.safetensors"]
    assert_same(load(best_file(tmp_path)), checkpoint(3))
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(checkpoint(6), best=True)
        writer.save(checkpoint(4))  # an older one that someone went back to
    assert names(tmp_path) == ["best.safetensors", "step-00000004.safetensors"]
    assert load(best_file(tmp_path)).step == 6


def test_a_save_returns_at_once_and_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gate, write = threading.Event(), checkpoints.write

    def slow(*arguments: object) -> None:
        assert gate.wait(60)
        write(*arguments)

    monkeypatch.setattr(checkpoints, "write", slow)
    with CheckpointWriter(tmp_path, keep=3) as writer:
        progress = checkpoint(1).progress | {"loss": 1.0}
        path = writer.save(replace(checkpoint(1), progress=progress))
        progress["loss"] = 2.0  # what the loop goes on to do
        assert not path.exists()
        threading.Timer(0.1, gate.set).start()
        writer.save(checkpoint(2))
        assert load(path).progress["loss"] == 1.0
    assert load(tmp_path).step == 2


@pytest.mark.proof
def test_an_interpreter_that_exits_waits_for_the_write(tmp_path: Path):
    code = """
import sys, time
from test_checkpoint import Path, CheckpointWriter, checkpoint, checkpoints
write = checkpoints.write
checkpoints.write = lambda *arguments: (time.sleep(0.5), write(*arguments))
CheckpointWriter(Path(sys.argv[1]), keep=1).save(checkpoint(1), best=True)
sys.exit("gone")
"""
    assert run(code, tmp_path).stderr == "gone\n"
    assert names(tmp_path) == ["best.safetensors", "step-00000001.safetensors"]


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", code, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, env=env)


@pytest.mark.proof
def test_kills_leave_whole_checkpoints(tmp_path: Path):
    """Ten processes that save without end, killed while a temporary file is there or at any moment."""
    code = """
import os, random, signal, sys, time
from test_checkpoint import Path, CheckpointWriter, assert_same, checkpoint, checkpoints, files, load
folder, leftovers = Path(sys.argv[1]), 0
def unfinished():
    return [path for path in (folder / "checkpoints").glob("*") if ".tmp" in path.name]
for n in range(10):
    before = load(folder).step if n else 0
    writer = CheckpointWriter(folder, keep=2)
    assert not unfinished()  # what the last kill left is swept
    if not (child := os.fork()):
        for step in range(before + 1, before + 1000):
            writer.save(checkpoint(step, 300_000), best=step % 3 == 0)
        os._exit(1)
    while checkpoints.step_file(folder, before + 2) > max(files(folder), default=folder):
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.02))
    while n % 2 and not unfinished():
        pass
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    leftovers += len(unfinished())
    assert 2 <= len(files(folder)) <= 3
    for file in [*files(folder), *folder.rglob("best*.safetensors")]:
        saved = load(file)
        assert_same(saved, checkpoint(saved.step, 300_000))
print(leftovers)
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1


def test_a_write_that_fails_leaves_the_older_ones(tmp_path: Path):
    """Beyond a limit of the size of files: some of it is written, then EFBIG."""
    writer, small, large = CheckpointWriter(tmp_path, keep=1), checkpoint(1, 1500), checkpoint(2, 60_000)
    path = writer.save(small, best=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        failed = writer.save(large)
        message = refusal(lambda: writer.save(checkpoint(3)), UserError)
        remedy = "the checkpoint of step 1 stays; allow larger files (ulimit -f), then go on by --resume"
        assert message == f"{failed}: File too large; {remedy}"
        writer.save(large)
        assert refusal(writer.close, UserError) == message
        with pytest.raises(KeyError) as caught, CheckpointWriter(tmp_path, keep=1) as writer:
            writer.save(large)
            raise KeyError("of the body")
        assert caught.value.__notes__ == [message]
        other = CheckpointWriter(tmp_path / "other", keep=1)
        other.save(large)
        assert "there is no older checkpoint; allow larger files" in refusal(other.close, UserError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (names(tmp_path), names(tmp_path / "other")) == (["best.safetensors", path.name], [])
    assert_same(load(tmp_path), small)
