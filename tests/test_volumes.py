"""What a volume keeps from the commands, and a GPU that is not there: one line each, with both sides and the remedy."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from conftest import ROOT, build
from pipeline import volumes
from pipeline.online import devices as options
from tools.make_raw import main as make_raw
from trainer.__main__ import main as trainer

IS_ROOT = os.geteuid() == 0
WITHOUT = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]  # root, whom permissions bind like any user
OTHER = 4242

# one process for many commands, because torch takes seconds to import
RUNNER = """
import json, sys
from click.testing import CliRunner
from tools.build_shards import main as build_shards
from trainer.__main__ import main as trainer
for words in json.loads(sys.argv[1]):
    done = CliRunner().invoke({"build": build_shards, "trainer": trainer}[words[0]], words[1:])
    print(json.dumps([done.exit_code, done.stderr]))
"""


def told(commands: list[list[str]], before: tuple[str, ...] = ()) -> list[str]:
    """What each command says, in a process without root's rights; each must be one line, with exit code 2."""
    if IS_ROOT and not shutil.which("setpriv"):
        pytest.skip("root without setpriv: permissions do not bind")
    line = [*before, *(WITHOUT if IS_ROOT else []), sys.executable, "-c", RUNNER, json.dumps(commands)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads(answer) for answer in done.stdout.splitlines()]
    assert len(found) == len(commands)
    for code, said in found:
        assert code == 2, said
        assert said.startswith("Error: ")
        assert said.count("\n") == 1, said
        assert "Traceback" not in said
    return [said.removeprefix("Error: ").strip() for _, said in found]


def train(data: Path, run: Path) -> list[str]:
    return ["trainer", "train", "--data", str(data), "--out", str(run), "--recipe", "tiny", "--devices", "cpu,cpu"]


def written(raw: Path, dataset: Path, volume: Path) -> list[list[str]]:
    """Commands that would write to `volume`, and into a folder that they would make in it."""
    return [["build", str(raw), str(volume / "set")], train(dataset, volume)]


def read(dataset: Path, closed: Path, out: Path) -> list[list[str]]:
    """Commands that would read from `closed`."""
    evaluate = ["trainer", "evaluate", "--data", str(dataset), "--checkpoint", str(closed)]
    return [["build", str(closed), str(out)], train(closed, out), evaluate]


@pytest.mark.proof
def test_what_permissions_keep_is_told_with_both_users_and_the_remedy(raw: Path, dataset: Path, tmp_path: Path):
    me, group = os.geteuid(), os.getegid()
    owners = (me, OTHER) if IS_ROOT else (me,)  # only root can give a folder to another user
    commands, expected = [], []
    for owner in owners:
        for mode in (0o555, 0o000):
            place = tmp_path / f"{owner}-{mode:o}"
            place.mkdir(mode=mode)
            os.chown(place, owner, owner if owner == OTHER else -1)
            asked = read(dataset, place, tmp_path / "out") if mode == 0 else written(raw, dataset, place)
            remedy = f"chmod -R u+rwX {place}"
            if owner != me:
                remedy = f"run this as that user (docker run --user {owner}:{owner}), or as root, "
                remedy += f"chown -R {me}:{group} {place}"
            commands += asked
            expected += [(place, owner, mode, remedy)] * len(asked)
    for said, (place, owner, mode, remedy) in zip(told(commands), expected, strict=True):
        assert said.startswith(f"{place}: belongs to user {owner} (mode {mode:03o}), and user {me} may not "), said
        assert ("write to it" in said) == (mode == 0o555)
        assert said.endswith(f"; {remedy}")


@pytest.mark.proof
def test_a_read_only_volume_is_told(raw: Path, dataset: Path, tmp_path: Path):
    volume = tmp_path / "volume"
    volume.mkdir()
    mounted = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    before = ("unshare", "--mount", "sh", "-c", mounted, str(volume))
    if subprocess.run([*before, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount")
    for said in told(written(raw, dataset, volume), before):
        assert said == f"{volume}: is read-only; mount the volume without :ro, or name another place"


def test_an_empty_folder_may_be_a_volume_that_is_not_mounted(dataset: Path, tmp_path: Path):
    place = tmp_path / "volume"
    place.mkdir()
    evaluate = ["evaluate", "--data", str(dataset), "--checkpoint"]
    for done, words in (
        (build(place, tmp_path / "set"), f"{place}: no raw images; the folder"),
        (build(place / "in", tmp_path / "set"), f"archives; {place}"),
        (CliRunner().invoke(trainer, train(place, tmp_path / "run")[1:]), "(not a dataset directory); the folder"),
        (CliRunner().invoke(trainer, train(place / "in", tmp_path / "run")[1:]), f"RAW {place / 'in'}; {place}"),
        (CliRunner().invoke(trainer, [*evaluate, str(place)]), f"--out {place}; the folder"),
    ):
        assert done.exit_code == 2
        assert f"{words} is empty: is the volume mounted?\n" in done.stderr
        assert done.stderr.count("\n") == 1


def test_in_a_container_what_is_on_no_volume_is_refused(
    raw: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The mounts as /proc/self/mountinfo lists them in a container, proc(5): the fifth word is the mount point."""
    home = tmp_path / "a b"
    mounts = "22 1 0:20 / / rw - overlay overlay rw\n24 22 8:1 /srv {} rw - ext4 /dev/sda1 rw\n"
    monkeypatch.setattr(volumes, "MOUNTS", tmp_path / "mountinfo")
    monkeypatch.setenv(volumes.CONTAINER, "1")
    volumes.MOUNTS.write_text(mounts.format("/elsewhere"))
    top = Path(*tmp_path.parts[:2])
    lacking = f"no volume is mounted at {top}: docker run --volume FOLDER:{top}\n"
    for done, words in (
        (build(raw, home / "set"), f"{home / 'set'}: would be lost with this container; {lacking}"),
        (build(tmp_path / "none", home / "set"), lacking),
        (CliRunner().invoke(trainer, train(tmp_path / "none", home / "run")[1:]), lacking),
    ):
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.stderr
        assert done.stderr.endswith(words)
    monkeypatch.chdir(tmp_path)
    assert f"{home / 'set'} is on no volume; name a path on one" in build(raw, "a b/set").stderr
    volumes.MOUNTS.write_text(mounts.format(str(home).replace(" ", "\\040")))
    small = [str(home / "raw"), "--classes", "2", "--train", "1", "--val", "1"]
    assert CliRunner().invoke(make_raw, small).exit_code == 0  # builders' processes would not know these mounts


@pytest.mark.parametrize(
    ("there", "cuda", "drivers", "hidden", "words"),
    [
        (0, None, (), None, "is built without CUDA; install its CUDA build"),
        (0, "13.0", (), None, "no NVIDIA driver in sight; in a container, start it with --gpus all"),
        (0, "13.0", ("/dev/null",), None, "libcuda.so.1 is missing; in a container, NVIDIA_DRIVER_CAPABILITIES="),
        (0, "13.0", ("/dev/null",), "", "CUDA_VISIBLE_DEVICES='' leaves none; unset it"),
        (0, "13.0", ("/dev/null",), "no", "the driver shows none to torch's CUDA 13.0; see nvidia-smi"),
        (1, "13.0", ("/dev/null",), None, "CUDA devices here: 1; name cuda:0, one for both columns if need be"),
        (2, "13.0", ("/dev/null",), None, "CUDA devices here: 2; name cuda:0 to cuda:1"),
    ],
)
def test_a_gpu_that_is_not_there(
    there: int, cuda: str | None, drivers: tuple[str, ...], hidden: str | None, words: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(options, "DRIVERS", drivers)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setattr(options.ctypes, "CDLL", lambda name: None)
        if hidden != "no":
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    command = [*train(tmp_path, tmp_path / "run")[1:-1], f"cuda:{there},cuda:{there}"]
    done = CliRunner().invoke(trainer, command)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(f"Error: --devices {command[-1]}: device='cuda:{there}': ")
    assert words in done.stderr
    assert done.stderr.endswith(", or name cpu\n")
