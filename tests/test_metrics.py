"""What a run says of itself: JSON lines, TensorBoard's files read byte by byte, plain lines, the bar on a terminal."""

import contextlib
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from conftest import ROOT
from pipeline import UserError
from trainer import terminal
from trainer.metrics import Metrics, read
from trainer.terminal import Terminal

LAYERS = {"conv1": {"weight": 0.5, "update": 0.0005, "ratio": 0.001}, "fc8": {"weight": 2, "update": 1, "ratio": 0.5}}
TIME = {"images_per_second": 250.0, "stall": 0.125, "stall_by": {"reading": 0.125, "workers": 0.0}}
STALLED = "stall 12.5 % (reading: --set data.readers=2, or a faster disk, or a local copy)"  # in 144 characters
FED = "stall 33.0 % (workers: 2 more beside 4 at this rate, or a faster network; waited most for feed:8815 (10.0.0.7))"
ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\].*?\x07)")


def trained(step: int, **other: object) -> dict[str, Any]:
    return {"step": step, "epoch": step // 10, "loss": 1 / step, "lr": 0.01, "layers": LAYERS, "time": TIME} | other


def validated(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": 1, "samples": 9, "top1_error": 55.55, "top5_error": 11.1, "nll": 1.25}


def crc32c(data: bytes) -> int:
    """The Castagnoli checksum, bit by bit, masked as TFRecord has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(file: Path) -> list[Any]:
    data, found = file.read_bytes(), []
    while data:
        length, head = struct.unpack("<QI", data[:12])
        body, (foot,) = data[12 : 12 + length], struct.unpack("<I", data[12 + length : 16 + length])
        assert (head, foot) == (crc32c(data[:8]), crc32c(body))
        found, data = [*found, Event.FromString(body)], data[16 + length :]
    return found


def scalars(file: Path) -> dict[tuple[str, int], float]:
    return {(value.tag, event.step): value.simple_value for event in events(file) for value in event.summary.value}


def test_lines_and_scalars(tmp_path: Path):
    line = trained(2)
    with Metrics(tmp_path / "run", 0) as metrics:
        metrics.train(line)
        metrics.validation(validated(2))
        written = (tmp_path / "run" / "metrics.jsonl").read_text().split("\n")  # before anything is closed
        (file,) = (tmp_path / "run" / "tensorboard").iterdir()
        found = scalars(file)
    assert line == trained(2)  # which the caller may go on using
    assert written.pop() == ""
    assert [json.loads(text) for text in written] == [{"kind": "train", **line}, {"kind": "validation", **validated(2)}]
    expected = {"loss": 0.5, "lr": 0.01, "images_per_second": 250, "stall": 0.125, "update_ratio/conv1": 0.001}
    expected |= {"update_ratio/fc8": 0.5}
    expected |= {"validation/top1_error": 55.55, "validation/top5_error": 11.1, "validation/nll": 1.25}
    assert {tag: value for (tag, _), value in found.items()} == pytest.approx(expected)
    assert {step for _, step in found} == {2}
    version, start = events(file)[:2]
    assert version.file_version == "brain.Event:2"
    assert (start.session_log.status, start.step) == (SessionLog.START, 1)
    assert "tfevents" in file.name  # how TensorBoard knows its files


def test_a_resumed_run_forgets_what_was_lost(tmp_path: Path):
    threads = threading.active_count()
    for start in (0, 2, 2):  # all in one second, perhaps
        with Metrics(tmp_path, start) as metrics:
            for step in range(start + 1, 5):
                metrics.train(trained(step, loss=float(start + step)))
        assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 4]
        with (tmp_path / "metrics.jsonl").open("a") as lines:
            lines.write('{"kind": "tra')  # a kill in the middle of a line
    assert [line["loss"] for line in read(tmp_path)] == [1, 2, 5, 6]
    files = sorted((tmp_path / "tensorboard").iterdir())  # the order in which TensorBoard reads them
    assert [events(file)[1].step for file in files] == [1, 3, 3]
    assert [len(scalars(file)) for file in files] == [4 * 6, 2 * 6, 2 * 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]
    assert threading.active_count() == threads
    Metrics(tmp_path, 0).close()  # a new run in the place of one that left no checkpoint
    assert read(tmp_path) == []


@pytest.mark.parametrize("damaged", [b"{broken", b"\xff\xfe", b'{"step": 1}'])
def test_a_damaged_line_is_named_and_nothing_changes(tmp_path: Path, damaged: bytes):
    path, before = tmp_path / "metrics.jsonl", json.dumps({"kind": "train", **trained(1)}).encode()
    path.write_bytes(before + b"\n" + damaged + b"\n")
    for use in (read, lambda run: Metrics(run, 1)):
        with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged .*; delete that line"):
            use(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before + b"\n" + damaged + b"\n"


def test_a_number_that_is_not_finite_is_named(tmp_path: Path):
    layers = {"fc8": {"weight": 1.0, "update": float("inf"), "ratio": 1.0}}
    with Metrics(tmp_path, 0) as metrics:
        with pytest.raises(UserError, match=r"^step 3: layers\.fc8\.update is inf: training has diverged"):
            metrics.train(trained(3, layers=layers))
        with pytest.raises(UserError, match="nll is nan"):
            metrics.validation(validated(3) | {"nll": float("nan")})
    assert read(tmp_path) == []


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / "ballast").open("ab", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))


def test_a_full_disk(tmp_path: Path):
    """A file system of 300 kB; the lines of a run fit, until it is filled."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "penstock", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    run, remedy = tmp_path / "run", "No space left on device; make room, then go on with the run by --resume"
    try:
        with Metrics(run, 0) as metrics:
            metrics.train(trained(1))
            fill(tmp_path)
            with pytest.raises(UserError, match=remedy) as caught:
                for step in range(2, 1000):
                    metrics.train(trained(step))
        assert re.match(rf"{run}/(metrics\.jsonl|tensorboard/events\S+): ", str(caught.value))
        assert read(run)[0] == {"kind": "train", **trained(1)}
        fill(tmp_path)
        with pytest.raises(UserError, match=remedy):
            Metrics(run, 1)
        (tmp_path / "ballast").unlink()
        with Metrics(run, 1) as metrics:
            metrics.train(trained(2))
        assert [line["step"] for line in read(run)] == [1, 2]
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Ten minutes for the first 200 of 9,000 steps: the other 8,800 take 7 h 20 min."""
    now = 1000.0
    monkeypatch.setattr(terminal, "monotonic", lambda: now)
    for name, value in (("FORCE_COLOR", "1"), ("TTY_COMPATIBLE", "1"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    calm, news = "stall  0.0 %", ["step 1090: tier jpeg → raw: stall 9.0 %, 12 images/s → 0.0 %, 13 images/s"]
    with Terminal(10_000, 1000) as console:
        stalls = (5, 1100, calm), (10, 1200, calm), (11, 1300, FED), (11, 1300, STALLED), (12, 1400, STALLED)
        for minutes, step, stall in stalls:
            now = 1000.0 + 60 * minutes
            console.step(step)
            console.train(trained(step, loss=6.90775, epoch=7), stall, news)
        console.validation(validated(1400))
        console.validation(validated(1500) | {"unreadable": 2})
        console.print("checkpoint: a[b]/c")
        console.train(trained(10_000, loss=0.5, epoch=89), STALLED[:62] + ")", [])
    captured = capsys.readouterr()
    assert captured.err == ""
    assert not news
    assert captured.out.splitlines() == [
        "loader: step 1090: tier jpeg → raw: stall 9.0 %, 12 images/s → 0.0 %, 13 images/s",
        "step  1100/10000  epoch 7   loss 6.9078  lr 0.01     250 images/s  stall  0.0 %",
        "step  1200/10000  epoch 7   loss 6.9078  lr 0.01     250 images/s  stall  0.0 %  ETA 7:20:00",
        "step  1300/10000  epoch 7   loss 6.9078  lr 0.01     250 images/s  stall 33.0 % (workers)  ETA 5:19:00",
        "stall by workers: 2 more beside 4 at this rate, or a faster network; waited most for feed:8815 (10.0.0.7)",
        "step  1300/10000  epoch 7   loss 6.9078  lr 0.01     250 images/s  stall 12.5 % (reading)  ETA 5:19:00",
        "stall by reading: --set data.readers=2, or a faster disk, or a local copy",
        "step  1400/10000  epoch 7   loss 6.9078  lr 0.01     250 images/s  stall 12.5 % (reading)  ETA 4:18:00",
        "validation at step 1400: top-1 error 55.5 %, top-5 error 11.1 % (centre view)",
        "validation at step 1500: top-1 error 55.5 %, top-5 error 11.1 % (centre view); "
        "2 of 9 could not be read; counted as wrong",
        "checkpoint: a[b]/c",
        "step 10000/10000  epoch 89  loss 0.5000  lr 0.01     250 images/s  stall 12.5 % (reading)",
    ]


RUN = f"""
import time
from trainer.terminal import Terminal
with Terminal(400, 100) as console:
    for done in range(101, 401):
        time.sleep(0.005)
        console.step(done)
        if done % 100 == 0:
            console.train({{"step": done, "epoch": 3, "loss": 1.5, "lr": 0.01, "time": {TIME}}}, {STALLED!r}, [])
            console.validation({validated(7)!r})
    console.print("checkpoint: a[b]/c")
"""


def test_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    """The screen holds the lines that scrolled by, then the two rows of the bar."""
    for name in ("NO_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(ROOT)
    output: list[bytes] = []

    def keep(terminal: int) -> bytes:
        output.append(os.read(terminal, 65536))
        return output[-1]

    assert pty.spawn([sys.executable, "-c", RUN], keep) == 0
    screen = b"".join(output).decode()
    text = ESCAPE.sub("", screen).replace("\r", "\n")
    lines = [line.rstrip() for line in text.split("\n") if line.strip()]
    assert max(map(len, lines)) <= 80
    assert lines.count("validation at step 7: top-1 error 55.5 %, top-5 error 11.1 % (centre view)") == 3
    assert lines.count("checkpoint: a[b]/c") == 1
    assert not re.search(r"step +\d+/\d+ +epoch", text)  # no log lines of training
    assert re.fullmatch(r"step 400/400 ━+ 0:\d\d:\d\d ETA 0:00:00", lines[-2])
    assert lines[-1].startswith("epoch 3   loss 1.5000  lr 0.01     250 images/s  stall 12.5 % (read")
    assert re.search(r"step 2\d\d/400 [━╸╺]+ 0:\d\d:\d\d ETA 0:\d\d:\d\d", text)
    assert "\x1b[?25h" in screen  # the cursor is back
