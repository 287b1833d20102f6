"""Mutated files under right checksums: every command gives right results, or one line and 2, and touches nothing else.

One case alone, whose files stay in TMPDIR/attack*: PYTHONPATH=. python tests/test_attacks.py NUMBER
"""

import faulthandler
import gc
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import zlib
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest

import attacks
from conftest import ROOT, build, picture
from damaged import outside

SEED, SEALED, MORE = 18, range(1000), range(1000, 3000)  # numbers of cases
FLIPPED, QUICK = range(3000, 3300), range(3300, 3350)
SECONDS = int(os.environ.get("ATTACK_SECONDS", "60"))  # after which a case hangs
MEMORY = 4 * 2**30  # bytes of a case, beyond those of the server
SERVERS = 2
RECIPE = """
model.size = 16
model.order = ["conv1", "fc6", "fc8"]
model.layers.conv1 = { width = 4, kernel = 5, stride = 2, then = ["lrn", "relu", "pool"], sd = 0.05 }
model.layers.fc6 = { kind = "linear", width = 8, sees = "both", then = ["relu", "dropout"], sd = 0.1 }
model.layers.fc8 = { kind = "linear", sees = "both", sd = 0.1 }
optim = { batch_size = 6, lr = 0.001, layers.conv1 = { lr = 0.5, drops = [1] } }
train = { batch_size = 6, epochs = 2, log_every = 1, keep = 2 }
"""
PATHS = "DATA RUN RAW PICTURE.JPG P.NPZ R.TOML NEW".split()  # words of command lines: what lies in a case's folder
NETWORK, CPU = "--data DATA --checkpoint RUN --json --devices cpu,cpu", "--devices cpu,cpu"
TRAIN = f"trainer train --data DATA {CPU}"
PAGE = "run/figures run/figures/*.png run/report.html"
LOG = "run/checkpoints/* run/tensorboard/* run/metrics.jsonl run/history.json run/recipe.json"
COMMANDS = {  # name → command line; what it may write
    "verify": ("verify DATA --workers 1", ""),
    "quick": ("verify DATA --workers 1 --quick", ""),
    "repair": ("verify DATA --workers 1 --repair RAW", "data/*"),
    "loader": ("load DATA train", ""),
    "views": ("load DATA val", ""),
    "evaluate": (f"trainer evaluate {NETWORK}", "run/evaluation*.json"),
    "step": (f"trainer evaluate --data DATA --checkpoint {attacks.STEP} --json --views centre {CPU}", ""),
    "predict": (f"trainer predict PICTURE.JPG {NETWORK}", ""),
    "tar": (f"trainer predict data/val/val-000000.tar {NETWORK}", ""),
    "ensemble": (f"trainer ensemble RUN P.NPZ --data DATA --json --views centre {CPU}", ""),
    "saved": ("trainer ensemble P.NPZ P.NPZ --json", ""),
    "similar": (f"trainer similar PICTURE.JPG {NETWORK}", ""),
    "figures": (f"trainer figures RUN --data DATA {CPU}", PAGE),
    "export": ("trainer export RUN --data DATA", "run/export run/export/*"),
    "train": (f"{TRAIN} --out NEW --recipe R.TOML --set train.steps=2", "new/* new"),
    "init": (f"{TRAIN} --out NEW --recipe R.TOML --init RUN --set train.steps=2", "new/* new"),
    "resume": (f"{TRAIN} --out RUN --resume --set train.epochs=3", f"{LOG} {PAGE}"),
}
READERS = "verify quick repair loader views evaluate evaluate"
KINDS = {  # mutation → its share, and the commands that read its file
    "of_manifest": (27, f"{READERS} step predict tar ensemble similar figures export train resume"),
    "of_manifest_text": (2, f"{READERS} tar resume"),
    "of_samples": (12, f"{READERS} views ensemble similar figures train resume"),
    "of_statistics": (11, f"{READERS} predict similar export train figures"),
    "of_shard": (9, f"{READERS} tar train resume"),
    "of_other_files": (3, "verify quick repair verify evaluate"),
    "of_checkpoint": (17, "evaluate evaluate step predict ensemble similar figures export init resume resume resume"),
    "of_records": (9, "figures figures figures resume resume resume evaluate"),
    "of_index": (4, "similar"),
    "of_recipe": (10, "train train train init"),
    "of_probabilities": (4, "saved saved ensemble"),
    "of_kinds": (4, " ".join(COMMANDS)),
}
PLAN = [kind for kind, (share, _) in KINDS.items() for _ in range(share)]
FAST = ("of_manifest", "of_samples", "of_statistics", "of_shard", "of_checkpoint")
SLOW = ("repair", "similar", "figures", "export", "train", "init", "resume")  # commands that the quick test leaves out
VERIFIED = ("of_manifest", "of_samples", "of_statistics", "of_shard")  # if no reader finds the lie, verify_shards does
OTHER_RIGHT = {  # mutation → changes that make another right input, whose results differ
    "of_recipe": "",
    "of_checkpoint": "tensor: |recipe|values: classes: ",
    "of_kinds": f"{attacks.STEP}: gone",  # then the checkpoint before it is the newest
    "of_probabilities": "(labels|probabilities) = |(dataset|split|views|from)",
    "of_manifest": r"nudge recipe\.[a-z_]+ = \d|delete splits\.|\.words = ",
    "of_shard": "content, with its CRC-32",
}
BESIDE = ("warning: ", "note: ", "no page: ", "training on the CPU", "left out: ", "Usage: ", "Try ", "the run is ")


class Ended(NamedTuple):
    code: int | None  # None: not after SECONDS
    out: str
    err: str


def plan(number: int) -> tuple[Random, str, str]:
    """Return the generator, the mutation and the command of a case."""
    draw = Random(f"{SEED} {number}")
    if number in FLIPPED:
        return draw, "of_bits", draw.choice([name for name in COMMANDS if name != "repair"])
    quick = number in QUICK
    kind = FAST[number % len(FAST)] if quick else PLAN[number * 37 % len(PLAN)]
    return draw, kind, draw.choice([name for name in KINDS[kind][1].split() if not (quick and name in SLOW)])


class Server:
    """Has everything imported once; makes the material, and runs each case in a child process of its own."""

    def __init__(self, base: Path, quick: bool) -> None:
        from tools.verify_shards import main as verify
        from trainer.__main__ import MODULES, load, main

        self.mains: dict[str, Callable[..., Any]] = {"verify": verify, "trainer": main, "load": iterate}
        for name in ("evaluate", "ensemble", "predict", "train") if quick else MODULES:
            load(name)
        if not quick:
            import faiss  # noqa: F401
            import onnxruntime  # noqa: F401
            import plotly.graph_objects  # noqa: F401
            import torch.onnx  # noqa: F401
        self.quick, self.drawn = quick, False  # the page of a training, which takes longer than all else
        self.base, self.case, self.material = base, base / "material", base / "material"
        for folder in (self.material / "cwd", base / "a/beside", base / "tmp", base / "outside"):
            folder.mkdir(parents=True)
        self._make()
        self.case = base / "a/case"
        outside(self.case).write_text("root:x:0:0\n")
        below = [path.relative_to(self.material) for path in sorted(self.material.rglob("*"))]
        self.folders = [path for path in below if (self.material / path).is_dir()]
        self.files = [path for path in below if path not in self.folders]
        self.names = [str(path.relative_to("data")) for path in self.files if path.is_relative_to("data")]
        gc.freeze()  # the children share these pages
        self.results: dict[str, str] = {}
        for name in COMMANDS:
            if not (quick and name in SLOW):
                self._lay_out()
                attacks.seal(self.case, attacks.manifest_of(self.case))  # as every mutation does
                self.results[name] = self._result(name, self._run(COMMANDS[name][0], right=True))

    def _make(self) -> None:
        """Make a data set, a run of it, saved probabilities and an index; in children: no thread may start here."""
        raw = self.material / "raw"
        for split, count in (("train", 4), ("val", 2), ("test", 1)):
            for name in ("ant", "bee", "cow"):
                (raw / split / name).mkdir(parents=True)
                for i in range(count):
                    picture(f"{split}{name}{i}", 60, 50).save(raw / split / name / f"{i}.jpg")
        (raw / "train/ant/bad.jpg").write_bytes(b"no picture")
        shutil.copy(raw / "val/bee/1.jpg", self.material / "picture.jpg")
        (self.material / "r.toml").write_text(RECIPE)
        options = ("--workers", 1, "--size", 20, "--samples-per-shard", 5)
        assert build(raw, self.material / "data", *options).exit_code == 0
        lines = [f"{TRAIN} --out RUN --recipe R.TOML", f"trainer evaluate {NETWORK}"]
        lines.append(f"trainer evaluate {NETWORK} --views centre --save-probabilities P.NPZ")
        for line in [*lines, *([] if self.quick else [f"trainer index RUN DATA --bits 32 {CPU}"])]:
            self._run(line, right=True)

    def _lay_out(self) -> None:
        """Make the folder of the next case, of hard links to the material."""
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir()
        for folder in self.folders:
            (self.case / folder).mkdir()
        for file in self.files:
            os.link(self.material / file, self.case / file)

    def _run(self, line: str, right: bool = False) -> Ended:
        """Run a command line in a child process; `right`: its exit code must be 0."""
        main, *words = line.split()
        words = [str(self.case / word.lower()) if word in PATHS or "/" in word else word for word in words]
        outputs = self.base.with_suffix(".out"), self.base.with_suffix(".err")
        child = os.fork()
        if not child:
            self._child(main, words, *outputs)
        descriptor = os.pidfd_open(child)
        ready, _, _ = select.select([descriptor], [], [], SECONDS)
        os.close(descriptor)
        if not ready:
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == 0 or not right, (line, outputs[1].read_text())
        return Ended(code if ready else None, *(path.read_text(errors="replace") for path in outputs))

    def _child(self, main: str, words: Sequence[str], out: Path, err: Path) -> None:
        """Run `main`, and end as a Python process does."""
        code = 1
        try:
            os.chdir(self.case / "cwd")
            for number, path in ((1, out), (2, err)):
                os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            os.environ["TMPDIR"] = tempfile.tempdir = str(self.base / "tmp")
            faulthandler.dump_traceback_later(SECONDS - 1)
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
            self.mains[main](args=[*words, *(["--no-page"] if words[0] == "train" and not self.drawn else [])])
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            if sys.exc_info()[0]:  # on its way out of here, where it would not be printed
                traceback.print_exc()
            threading._shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _result(self, name: str, ended: Ended) -> str:
        """Return the output of a command, of training its log, but for times, digests and the case's folder."""
        text = re.sub('{"event": "progress".*\n', "", ended.out)  # as many as time allows
        if name in ("train", "init", "resume"):
            run = self.case / ("run" if name == "resume" else "new")
            lines = (run / "metrics.jsonl").read_text(errors="replace").splitlines()
            lines = [line for line in lines if name != "resume" or re.search('"step": [56],', line)]
            text = re.sub('"time": {.*?}}', "", "\n".join(lines))
            text += f"\n{sorted(path.name for path in (run / 'checkpoints').iterdir())}"
        text = re.sub(r"(?<![\d.])[0-9a-f]{12,}", "DIGEST", text.replace(str(self.case), "CASE"))
        return re.sub(r"[\d,.]+ +(s|bytes|files)\b|\d\.\de-\d\d", "TIME", text)

    def _listing(self) -> dict[str, tuple[int, ...]]:
        """Return all that lies in the server's folder, by its path from that of the case."""
        entries = {}
        for folder, folders, files in os.walk(self.base):
            for entry in (*folders, *files):
                status = os.lstat(path := os.path.join(folder, entry))
                changes = (status.st_mtime_ns, status.st_size) if entry in files else ()
                entries[os.path.relpath(path, self.case)] = (status.st_ino, *changes)
        return entries

    def attack(self, number: int) -> str | None:
        """Run a case; return in words what is wrong."""
        draw, kind, name = plan(number)
        self._lay_out()
        change = getattr(attacks, kind)(draw, self.case)
        before, self.drawn = self._listing(), kind == "of_records"
        ended = self._run(COMMANDS[name][0])
        after = self._listing()
        may_write = ended.code == 0 or name in ("train", "init", "resume") or "repaired: " in ended.out
        allowed = COMMANDS[name][1].split() if may_write else []
        changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        changed = [path for path in changed if path.endswith(".tmp") or not any(fnmatch(path, one) for one in allowed)]
        wrong = self._wrong(ended) or (f"writes {changed[:5]}" if changed else None)
        if not wrong and ended.code == 0:
            wrong = self._difference(kind, change, name, ended)
        return wrong and f"{number} {kind} [{change}] {name}: {wrong}"

    def _wrong(self, ended: Ended) -> str | None:
        """Return what is wrong with an exit code and the lines on stderr."""
        lines = ended.err.splitlines()
        frames = re.findall(r'File ".*/(.*)", line (\d+)', ended.err)
        if ended.code is None:
            return f"hangs, {frames[:3]}"
        if "Traceback" in ended.err or ended.code not in (0, 1, 2):
            return f"exit {ended.code}, {' '.join(lines[-1:])[:300]} {frames[-1:]}"
        if ended.code == 1 and not re.search(r"^\d+ failed", ended.out, re.MULTILINE):  # as verify_shards ends
            return f"exit 1, {lines[-1:]}"
        errors = [line for line in lines if line.startswith("Error: ")]
        others = [line for line in lines if line and not line.startswith((*BESIDE, str(self.case)))]
        if others != errors or lines[-1:] * (ended.code == 2) != errors:
            return f"exit {ended.code}, other lines: {others[:3]}"
        for error in errors:
            if not any(name in error for name in (str(self.case), "--", "reasons above", *self.names)):
                return f"names no file: {error[:400]}"
            if len(error) > 800 or not error.isprintable():
                return f"{len(error)} characters: {error[:200]!r}"
        return None

    def _difference(self, kind: str, change: str, name: str, ended: Ended) -> str | None:
        """Return how a result differs from that of the undamaged files, where it should not."""
        if kind == "of_bits" and change.startswith("data/") and name in ("verify", "quick"):
            return "all holds"
        result, right = self._result(name, ended).splitlines(), self.results[name].splitlines()
        if result == right or re.search(f"^(repaired: |no [a-z]+.png: {self.case}/)", ended.out, re.M):
            return None
        if no_numbers := [line for line in result if re.search(r"\b(nan|inf|NaN|Infinity)\b", line)]:
            return f"no numbers: {no_numbers[:1]}"
        if kind in OTHER_RIGHT and re.search(OTHER_RIGHT[kind], change):
            return None
        if kind in VERIFIED and self._run(COMMANDS["verify"][0]).code in (1, 2):
            return None
        i = next((i for i, pair in enumerate(zip(result, right)) if pair[0] != pair[1]), min(len(result), len(right)))
        return f"differs: {result[i : i + 1]} for {right[i : i + 1]}"


def iterate(args: list[str]) -> None:
    """Print the batches of a split; end as a command does."""
    from pipeline import UserError
    from pipeline.online import Loader

    root, split = args
    options: dict[str, Any] = {"views": "ten"} if split == "val" else {"seed": 3}
    try:
        with Loader(root, split, view=16, device="cpu", batch_size=4, threads=1, **options) as loader:
            for batch, _ in zip(loader, range(3 if split == "train" else 99)):
                images = np.ascontiguousarray(batch.images)
                assert set(batch.labels.tolist()) <= {-1, 0, 1, 2}
                assert np.isfinite(images).all()
                print(batch.ids.tolist(), batch.labels.tolist(), images.shape, zlib.crc32(images.data))
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


def complaints(cases: range, servers: int = SERVERS) -> str:
    """Run cases in several servers; return a line on each that goes wrong."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as base:
        running = []
        for i in range(servers):
            share = cases[i::servers]
            line = [sys.executable, __file__, f"{base}/{i}", *map(str, (share.start, share.stop, share.step))]
            running.append(subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True))
        outputs = [server.communicate()[0] for server in running]
    assert [server.returncode for server in running] == [0] * servers, outputs
    return "".join(outputs)


def test_mutated_files_are_refused_in_one_line_or_harmless():
    assert complaints(QUICK, servers=1) == ""


@pytest.mark.proof
@pytest.mark.parametrize("cases", [SEALED, FLIPPED, pytest.param(MORE, marks=pytest.mark.slow)], ids=len)
def test_every_command_and_every_file(cases: range):
    assert complaints(cases) == ""


def serve(base: Path, cases: range) -> None:
    """Print a line for each case that goes wrong."""
    server = Server(base, cases[0] in QUICK)
    for number in cases:
        if wrong := server.attack(number):
            print(" ".join(ascii(wrong).split())[:1500], flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        sys.argv[1:] = [tempfile.mkdtemp(prefix="attack") + "/0", sys.argv[1], str(int(sys.argv[1]) + 1), "1"]
    serve(Path(sys.argv[1]), range(*map(int, sys.argv[2:])))
