"""The ends of commands: one line and an exit code, with the remedy where a volume keeps a folder from the command."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from conftest import ROOT, build, command, digests, picture, saved
from penstock.__main__ import TOOLS, load
from pipeline import volumes
from pipeline.cli import json_text, printable
from pipeline.online import devices
from tools.demo import main as demo
from tools.make_raw import main as make_raw
from trainer.__main__ import COMMANDS
from trainer.__main__ import main as trainer

IS_ROOT = os.geteuid() == 0
WITHOUT = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]  # root, whom permissions bind like any user
OTHER = 4242
MEMORY = "raise the limit (ulimit -v, a container's), or take fewer --workers or a smaller batch"
PROGRAM = """
import os, signal, sys, time
from pipeline import process
process.begin()
if sys.argv[1] == "before":
    os.kill(os.getpid(), signal.SIGHUP)
import click
from pipeline import UserError
from pipeline.cli import Command, progress_bars
class Dropped:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
@click.command(cls=Command, interrupted="the same command goes on")
@click.argument("way")
def main(way):
    with progress_bars() as show:
        show("[rows]", 1, 2)
        show("[rows]", 2, 2)
    if way == "user":
        raise UserError("size=0: \\x1b too small")
    if way == "system":
        open("/nowhere/at all")
    if way in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, way)
        try:
            exec("os.kill(os.getpid(), number)")
        finally:  # as on a lost terminal; the user is impatient
            os.kill(os.getpid(), number)
            raise OSError(5, "Input/output error")
    if way == "ignored":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        main.main(["hup"], standalone_mode=False)
    if way == "hup":
        os.kill(os.getpid(), signal.SIGHUP)
    if way == "swallowed":
        Dropped()
        time.sleep(9)
    if way == "replaced":  # as by code in C, which gives its error no context
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            pass
        raise ValueError("could not determine the shape")
    if way == "memory":
        bytearray(2**62)
    if way == "primitive":
        raise RuntimeError("could not create a primitive")
    if way == "end of file":
        raise EOFError("No data left in file")
main()
"""


def run(way: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, way]
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm"}
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, check=False, timeout=60, capture_output=True)


@pytest.mark.parametrize(
    ("way", "code", "line"),
    [
        ("user", 2, "Error: size=0: \\x1b too small\n"),
        ("system", 2, "Error: /nowhere/at all: No such file or directory\n"),
        ("before", 129, "Error: hung up\n"),
        ("SIGINT", 130, "Error: interrupted; the same command goes on\n"),
        ("SIGTERM", 143, "Error: terminated; the same command goes on\n"),
        ("SIGHUP", 129, "Error: hung up; the same command goes on\n"),
        ("swallowed", 143, "Error: terminated; the same command goes on\n"),
        ("replaced", 143, "Error: terminated; the same command goes on\n"),
        ("ignored", 0, ""),
        ("memory", 2, f"Error: not enough memory (MemoryError); {MEMORY}\n"),
        ("primitive", 2, f"Error: not enough memory (could not create a primitive); {MEMORY}\n"),
        ("", 2, "Error: WAY is empty (an unset shell variable?)\n"),
        ("none", 0, ""),
    ],
)
def test_every_end_is_one_line_and_an_exit_code(way: str, code: int, line: str):
    done = run(way)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", line)


def test_an_end_of_file_that_nobody_foresaw_is_a_defect():
    """Else click takes it for the user's."""
    done = run("end of file")
    assert done.returncode == 1
    assert "EOFError: No data left in file" in done.stderr
    assert "Aborted" not in done.stderr


@pytest.mark.parametrize("name", [*TOOLS, *COMMANDS, "demo"])
def test_empty_texts_are_refused(name: str):
    """As an unset shell variable leaves them: for a path, the current folder."""
    command = demo if name == "demo" else load(name)
    kinds = click.Path | click.types.StringParamType | click.types.FuncParamType
    texts = [param for param in command.params if isinstance(param.type, kinds)]
    assert texts
    for param in texts:
        for empty in ("", " \t"):
            words = [empty if other is param else "x" for other in command.params if isinstance(other, click.Argument)]
            words += [param.opts[0], empty] if isinstance(param, click.Option) else []
            hint = param.opts[0] if isinstance(param, click.Option) else param.human_readable_name
            done = CliRunner().invoke(command, words)
            assert (done.exit_code, done.output) == (2, f"Error: {hint} is empty (an unset shell variable?)\n")


# Standard streams and limits


def limited(*words: object, shell: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a tool as a shell does, with redirections or after a command of the shell."""
    line = ["sh", "-c", f'{shell.partition("|")[0]} exec "$@" {shell.partition("|")[2]}', "sh", sys.executable]
    env = {**os.environ, "PYTHONUNBUFFERED": "", **variables}
    return subprocess.run([*line, *map(str, words)], cwd=ROOT, text=True, check=False, capture_output=True, env=env)


DRAW = ("--classes", 2, "--train", 1, "--val", 1)


def test_closed_streams_change_nothing(little: Path, little_dataset: dict[str, str], tmp_path: Path):
    done = limited(*command(little, tmp_path / "set", "--workers", 2)[1:], shell="|<&- >&- 2>&-")
    assert done.returncode == 0
    assert digests(tmp_path / "set") == little_dataset


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["tools/make_raw.py", "{out}", *DRAW], ["-m", "trainer", "--help"]])
def test_a_full_standard_output_is_named(words: list[object], unbuffered: str, tmp_path: Path):
    line = [str(word).format(out=tmp_path / "out") for word in words]
    done = limited(*line, shell="|>/dev/full", PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) == (2, "Error: standard output: No space left on device\n")
    assert limited("tools/make_raw.py", "", shell="|2>/dev/full", PYTHONUNBUFFERED=unbuffered).returncode == 2


def test_letters_that_standard_output_lacks_are_escaped(tmp_path: Path):
    for name in ("hund", "\u732b"):
        (tmp_path / "raw" / name).mkdir(parents=True)
        (tmp_path / "raw" / name / "1.png").write_bytes(saved(picture(name, 40, 40), "PNG"))
    words = ("tools/build_shards.py", tmp_path / "raw", tmp_path / "set", "--dry-run", "--workers", 1)
    done = limited(*words, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\n     1  \\u732b" in done.stdout


def test_too_little_memory_for_the_libraries_is_one_line(tmp_path: Path):
    done = limited("tools/make_raw.py", tmp_path / "out", *DRAW, shell="ulimit -v 100000;|")
    line = "Error: not enough memory: ulimit -v is 100000; raise it to 262144 or more\n"
    assert (done.returncode, done.stderr) == (2, line)
    assert not (tmp_path / "out").exists()


def test_text_is_printable_and_short():
    assert printable("a\x1b[31m\u202e\udce9 ü") == r"a\x1b[31m\u202e\udce9 ü"
    assert printable("x" * 200, 120) == "x" * 117 + "..."
    assert printable("x" * 120, 120) == "x" * 120


def test_json_holds_no_half_of_a_surrogate_pair():
    name = os.fsdecode(b"caf\xe9 \\udce9 \xff")
    value = {name: ["😀 ü", "\ud83d", 0.5, None]}
    text = json_text(value)
    assert json.loads(text) == {r"caf\xe9 \udce9 \xff": ["😀 ü", r"\ud83d", 0.5, None]}
    assert json.loads(json_text(value, indent=1)) == json.loads(text)


# Volumes and GPUs


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


def messages(commands: list[list[str]], before: tuple[str, ...] = ()) -> list[str]:
    """Return the message of each command in a process without root's rights: one line, with exit code 2."""
    if IS_ROOT and not shutil.which("setpriv"):
        pytest.skip("root without setpriv: permissions do not bind")
    line = [*before, *(WITHOUT if IS_ROOT else []), sys.executable, "-c", RUNNER, json.dumps(commands)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    ends = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(code, text[:7], text.count("\n")) for code, text in ends] == [(2, "Error: ", 1)] * len(commands), ends
    return [text.removeprefix("Error: ").strip() for _, text in ends]


def train(data: Path, run: Path) -> list[str]:
    return ["trainer", "train", "--data", str(data), "--out", str(run), "--recipe", "tiny", "--devices", "cpu,cpu"]


def writing(raw: Path, dataset: Path, volume: Path) -> list[list[str]]:
    """Return commands that would write to `volume`, and into a folder that they would make in it."""
    return [["build", str(raw), str(volume / "set")], train(dataset, volume)]


def reading(closed: Path, out: Path) -> list[list[str]]:
    """Return commands that would read from `closed`."""
    return [["build", str(closed), str(out)], train(closed, out)]


@pytest.mark.proof
def test_denied_access_names_both_users_and_the_remedy(raw: Path, dataset: Path, tmp_path: Path):
    user, group = os.geteuid(), os.getegid()
    commands, expected = [], []
    for owner in (user, OTHER) if IS_ROOT else (user,):  # only root can give a folder to another user
        for mode in (0o555, 0o000):
            folder = tmp_path / f"{owner}-{mode:o}"
            folder.mkdir(mode=mode)
            os.chown(folder, owner, owner if owner == OTHER else -1)
            added = reading(folder, tmp_path / "out") if mode == 0 else writing(raw, dataset, folder)
            remedy = f"chmod -R u+rwX {folder}"
            if owner != user:
                remedy = f"run this as that user (docker run --user {owner}:{owner}), or as root, "
                remedy += f"chown -R {user}:{group} {folder}"
            commands += added
            expected += [
                (f"{folder}: belongs to user {owner} (mode {mode:03o}), and user {user} may not ", remedy)
            ] * len(added)
    for message, (start, remedy) in zip(messages(commands), expected, strict=True):
        assert message.startswith(start), message
        assert ("write to it" in message) == ("mode 555" in start)
        assert message.endswith(f"; {remedy}")


@pytest.mark.proof
def test_a_read_only_volume_is_named(raw: Path, dataset: Path, tmp_path: Path):
    volume = tmp_path / "volume"
    volume.mkdir()
    mounted = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    before = ("unshare", "--mount", "sh", "-c", mounted, str(volume))
    if subprocess.run([*before, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount")
    for message in messages(writing(raw, dataset, volume), before):
        assert message == f"{volume}: is read-only; mount the volume without :ro, or name another place"


def test_an_empty_folder_may_be_a_volume_that_is_not_mounted(dataset: Path, tmp_path: Path):
    folder = tmp_path / "volume"
    folder.mkdir()
    evaluate = ["evaluate", "--data", str(dataset), "--checkpoint"]
    for done, words in (
        (build(folder, tmp_path / "set"), f"{folder}: no raw images; the folder"),
        (build(folder / "in", tmp_path / "set"), f"archives; {folder}"),
        (CliRunner().invoke(trainer, train(folder, tmp_path / "run")[1:]), "(not a dataset directory); the folder"),
        (CliRunner().invoke(trainer, train(folder / "in", tmp_path / "run")[1:]), f"RAW {folder / 'in'}; {folder}"),
        (CliRunner().invoke(trainer, [*evaluate, str(folder)]), f"--out {folder}; the folder"),
    ):
        assert done.exit_code == 2
        assert f"{words} is empty: is the volume mounted?\n" in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_folder_that_is_a_link_to_nothing_is_named(raw: Path, dataset: Path, tmp_path: Path):
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    for done in (build(raw, link), CliRunner().invoke(trainer, train(dataset, link)[1:])):
        assert done.exit_code == 2
        line = f"Error: {link}: is a link to nothing; make the folder that it names, or name another place\n"
        assert done.stderr == line


def test_in_a_container_a_folder_on_no_volume_is_refused(
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
    ("count", "cuda", "drivers", "words"),
    [
        (0, None, (), "is built without CUDA; install its CUDA build"),
        (0, "13.0", (), "no NVIDIA driver in sight; in a container, start it with --gpus all"),
        (0, "13.0", ("/dev/null",), "CUDA_VISIBLE_DEVICES='' leaves none; unset it"),
        (1, "13.0", ("/dev/null",), "CUDA devices here: 1; name cuda:0, one for both columns if need be"),
    ],
)
def test_a_gpu_that_is_not_there(
    count: int, cuda: str | None, drivers: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(devices, "DRIVERS", drivers)
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    name = f"cuda:{count}"
    done = CliRunner().invoke(trainer, [*train(tmp_path, tmp_path / "run")[1:-1], name])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(f"Error: --devices {name}: device='{name}': ")
    assert words in done.stderr
    assert done.stderr.endswith(", or name cpu\n")
