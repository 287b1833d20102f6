"""Checkpoints: what comes back, what is refused, and what a kill or a full disk leaves."""

import json
import os
import pickle
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from conftest import ROOT
from pipeline import UserError
from trainer import checkpoint as checkpoints
from trainer.checkpoint import META, Checkpoint, CheckpointError, CheckpointWriter, best_file, files, load, save
from trainer.recipe import Recipe, override

FLOATS = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 1e22, 2.0**-1074 * 3]


def checkpoint(step: int, elements: int = 12) -> Checkpoint:
    """Of random tensors, a scalar and one that is not contiguous among them."""
    random = torch.Generator().manual_seed(step)

    def drawn() -> dict[str, torch.Tensor]:
        big = torch.randn(3, elements // 3, generator=random).t()
        return {"fc6.weight": big, "conv1.bias": torch.randn(5, generator=random), "scale": torch.tensor(step / 7)}

    recipe = override(Recipe(), ["optim.lr=0.3", "train.seed=7"])
    loader = {"version": 1, "order": "uniform", "step": step, "bad": [3, 2**40], "window": None}
    progress = {"loss": FLOATS, "best": {"step": 3, "top1_error": 42.123456789012345}, "on": True, "ünit": "µs"}
    history = ({"step": 0, "devices": "cpu,cpu"}, {"step": 2, "torch": "2"})
    return Checkpoint(step, recipe, ("a", "b"), "f" * 64, drawn(), drawn(), loader, progress, history)


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    for kind in ("weights", "velocity"):
        mine, theirs = getattr(one, kind), getattr(other, kind)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert replace(one, weights={}, velocity={}) == replace(other, weights={}, velocity={})


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def refusal(call: Callable[[], object], kind: type[UserError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_everything_comes_back_exactly_and_is_readable_without_us(tmp_path: Path):
    path = save(tmp_path, checkpoint(3))
    assert path == tmp_path / "checkpoints" / "step-00000003.safetensors"
    for place in (path, tmp_path):
        assert_same(load(place), checkpoint(3))
    assert [value.hex() for value in load(path).progress["loss"]] == [value.hex() for value in FLOATS]
    again = [save(tmp_path / "again", one).read_bytes() for one in (checkpoint(3), load(path))]
    assert again == [path.read_bytes()] * 2
    held = safetensors.torch.load_file(path)
    assert sorted(held) == [f"{kind}.{n}" for kind in ("velocity", "weights") for n in sorted(checkpoint(3).weights)]
    assert torch.equal(held["weights.fc6.weight"], checkpoint(3).weights["fc6.weight"])
    with safe_open(path, framework="numpy") as file:
        plain = json.loads(file.metadata()["penstock"])
    assert (plain["format"], plain["step"], plain["classes"]) == (2, 3, ["a", "b"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
def test_values_that_would_not_come_back_are_refused_before_writing(tmp_path: Path, value: object):
    with pytest.raises((ValueError, TypeError)):
        save(tmp_path, replace(checkpoint(3), progress={"loss": value}))
    for weights in ({}, {name: tensor.double() for name, tensor in checkpoint(3).weights.items()}):
        with pytest.raises(ValueError, match=r"differ|float32"):
            save(tmp_path, replace(checkpoint(3), weights=weights))
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_of_the_earlier_code_loads(tmp_path: Path):
    """The bytes that the code of November 2026 wrote, put together here; its recipe has every key of that time."""
    tensors = {"fc8.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "fc8.bias": np.float32([0.5, -1.5])}
    recipe = json.loads((Path(__file__).parent / "recipe-2026-11.json").read_text())
    values = {"format": 2, "step": 40, "recipe": recipe, "classes": ["a", "b"], "dataset": "f" * 64}
    values |= {"loader": {"step": 40}, "progress": {"over": False}, "history": [{"step": 0}], "tensors": [*tensors]}
    header: dict[str, object] = {"__metadata__": {"penstock": json.dumps(values)}}
    data = b""
    for kind, factor in (("weights", 1), ("velocity", 2)):
        for name, value in tensors.items():
            content = (factor * value).tobytes()
            offsets = [len(data), len(data) + len(content)]
            header[f"{kind}.{name}"] = {"dtype": "F32", "shape": value.shape, "data_offsets": offsets}
            data += content
    text = json.dumps(header).encode()
    path = tmp_path / "checkpoints" / "step-00000040.safetensors"
    path.parent.mkdir()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    old = load(tmp_path)
    assert (old.step, old.classes, old.loader, old.progress) == (40, ("a", "b"), {"step": 40}, {"over": False})
    assert json.loads(json.dumps(asdict(old.recipe))) == recipe
    for name, value in tensors.items():
        assert torch.equal(old.weights[name], torch.from_numpy(value))
        assert torch.equal(old.velocity[name], torch.from_numpy(2 * value))


@dataclass
class Payload:
    """Unpickled, it leaves a folder."""

    folder: str

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.folder,)


def altered(text: str = "", without: str = "", more: str = "", **values: object) -> Callable[[Path], object]:
    """Other plain values than the checkpoint's, or `text` for them; a tensor less; a float64 more, or instead."""

    def alter(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            plain = json.loads(file.metadata()[META]) | values
        held = {name: value for name, value in safetensors.torch.load_file(path).items() if name != without}
        held |= {more: torch.zeros((), dtype=torch.float64)} if more else {}
        safetensors.torch.save_file(held, path, {META: text or json.dumps(plain)})

    return alter


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: os.truncate(path, 0), "damaged"),
    "a byte short": (lambda path: os.truncate(path, path.stat().st_size - 1), "damaged"),
    "longer": (lambda path: os.truncate(path, path.stat().st_size + 1), "damaged"),
    "garbage": (lambda path: path.write_bytes(bytes(range(256)) * 99), "damaged"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(Payload(f"{path}.unpickled"))), "damaged"),
    "torch.save": (lambda path: torch.save(Payload(f"{path}.unpickled"), path), "damaged"),
    "of others": (lambda path: safetensors.torch.save_file({"a": torch.zeros(2)}, path), "something else"),
    "not JSON": (altered("{"), "damaged"),
    "another JSON": (altered("[1]"), "not a JSON object"),
    "deep JSON": (altered("[" * 10**5), "damaged"),
    "NaN": (altered(progress={"a": float("nan")}), "NaN is not a finite number"),
    "1e999": (altered('{"format": 2, "a": 1e999}'), "1e999 is not a finite number"),
    "no format": (altered('{"step": 3}'), "of format 1, and this version"),
    "other format": (
        altered(format=3),
        "of format 3, and this version of the program reads format 2; read it with",
    ),
    "no values": (altered('{"format": 2}'), "step, recipe"),
    "negative step": (altered(step=-1), "(step: missing"),
    "classes": (altered(classes=[1]), "(classes: missing"),
    "recipe": (altered(recipe={"nonsense": 1}), "another version of this program (its recipe"),
    "no velocity": (altered(without="velocity.scale"), "velocity.scale"),
    "too many": (altered(more="weights.extra"), "weights.extra"),
    "shapes": (altered(more="weights.conv1.bias"), "differ in shape"),
    "type": (altered(more="weights.scale"), "not float32"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_one_line(tmp_path: Path, damage: str):
    path = save(tmp_path, checkpoint(3))
    meddle, reason = DAMAGES[damage]
    meddle(path)
    message = refusal(lambda: load(tmp_path))
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert message.endswith("; name another checkpoint, or train again")
    older = save(tmp_path, checkpoint(1))
    assert refusal(lambda: load(tmp_path)).endswith(f"; delete it to use {older.name}")
    assert refusal(lambda: load(path)).endswith("; name another checkpoint, or train again")
    assert names(tmp_path) == [older.name, path.name]  # nothing was unpickled


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
    with CheckpointWriter(tmp_path, keep=2) as saver:
        for step in range(1, 7):
            saver.save(checkpoint(step), best=step in (2, 3))
    assert names(tmp_path) == ["best.safetensors", "step-00000005.safetensors", "step-00000006.safetensors"]
    found = tmp_path / "checkpoints" / "best.safetensors"
    assert best_file(tmp_path) == found
    assert_same(load(found), checkpoint(3))
    with CheckpointWriter(tmp_path, keep=1) as saver:
        saver.save(checkpoint(6), best=True)
        saver.save(checkpoint(4))  # an older one that someone went back to
    assert names(tmp_path) == ["best.safetensors", "step-00000004.safetensors"]
    assert load(found).step == 6


def test_a_save_returns_at_once_and_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gate, write = threading.Event(), checkpoints.write

    def slow(*arguments: object) -> None:
        assert gate.wait(60)
        write(*arguments)

    monkeypatch.setattr(checkpoints, "write", slow)
    with CheckpointWriter(tmp_path, keep=3) as saver:
        progress = {"loss": 1.0}
        path = saver.save(replace(checkpoint(1), progress=progress))
        progress["loss"] = 2.0  # what the loop goes on to do
        assert not path.exists()
        threading.Timer(0.1, gate.set).start()
        saver.save(checkpoint(2))
        assert load(path).progress == {"loss": 1.0}
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
for n in range(10):
    before = load(folder).step if n else 0
    saver = CheckpointWriter(folder, keep=2)
    assert not list(folder.rglob("*.tmp"))  # the leftovers of the last kill are swept
    if not (child := os.fork()):
        for step in range(before + 1, before + 1000):
            saver.save(checkpoint(step, 300_000), best=step % 3 == 0)
        os._exit(1)
    while checkpoints.step_file(folder, before + 2) > max(files(folder), default=folder):
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.02))
    while n % 2 and not list(folder.rglob("*.tmp")):
        pass
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    leftovers += len(list(folder.rglob("*.tmp")))
    assert 2 <= len(files(folder)) <= 3
    for file in [*files(folder), *folder.rglob("best*.safetensors")]:
        found = load(file)
        assert_same(found, checkpoint(found.step, 300_000))
print(leftovers)
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1


def test_a_write_that_fails_leaves_the_older_ones(tmp_path: Path):
    """Beyond a limit of the size of files: some of it is written, then EFBIG."""
    saver, small, large = CheckpointWriter(tmp_path, keep=1), checkpoint(1, 3000), checkpoint(2, 60_000)
    path = saver.save(small, best=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        failed = saver.save(large)
        message = refusal(lambda: saver.save(checkpoint(3)), UserError)
        remedy = "the checkpoint of step 1 stays; allow larger files (ulimit -f), then go on by --resume"
        assert message == f"{failed}: File too large; {remedy}"
        saver.save(large)
        assert refusal(saver.close, UserError) == message
        with pytest.raises(KeyError) as caught, CheckpointWriter(tmp_path, keep=1) as saver:
            saver.save(large)
            raise KeyError("of the body")
        assert caught.value.__notes__ == [message]
        other = CheckpointWriter(tmp_path / "other", keep=1)
        other.save(large)
        assert "there is no older checkpoint; allow larger files" in refusal(other.close, UserError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (names(tmp_path), names(tmp_path / "other")) == (["best.safetensors", path.name], [])
    assert_same(load(tmp_path), small)


@pytest.mark.proof
def test_a_full_disk(tmp_path: Path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "penstock", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        saver = CheckpointWriter(tmp_path, keep=1)
        path = saver.save(checkpoint(1, 24_000))
        failed = saver.save(checkpoint(2, 24_000))  # 192 kB: there is not room for two
        message = refusal(saver.close, UserError)
        assert message.startswith(f"{failed}: No space left on device; the checkpoint of step 1 stays; make room, ")
        assert names(tmp_path) == [path.name]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
