"""`evaluate` in several processes of torchrun: what one finds, said once; and the end of all where one fails."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from evaluated import FLOAT32, Made, equal, errors, evaluate, known, make, saved, spoil, stored
from runs import one_line, trainer
from trainer import probabilities

pytestmark = pytest.mark.proof  # processes of torchrun


class Job:
    """`evaluate` in several processes of this machine."""

    def __init__(self, count: int, *options: object) -> None:
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m", "trainer"]
        command = [sys.executable, *start, "evaluate", *map(str, options)]
        pipe, self.options = subprocess.PIPE, options
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)

    def end(self) -> None:
        try:
            self.output, self.errors = self.process.communicate(timeout=120)
        finally:
            self.process.terminate()  # torchrun ends its own

    def option(self, name: str) -> Path:
        return Path(str(self.options[self.options.index(name) + 1]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Read only."""
    return make(tmp_path_factory.mktemp("evaluated"))


@pytest.fixture(scope="module")
def jobs(made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """31 images; in batches of 7 among two, and of 15 among three, of which the last has one image, for the first."""
    folder = tmp_path_factory.mktemp("jobs")
    two = replace(made, run=Path(shutil.copytree(made.run, folder / "run")))
    found = {
        "two": Job(2, *two.options, "--batch-size", 7, "--save-probabilities", folder / "two.npz"),
        "three": Job(3, *made.options, "--batch-size", 15, "--save-probabilities", folder / "three.npz", "--json"),
    }
    for job in found.values():
        job.end()
    return found


@pytest.mark.parametrize("name", ["two", "three"])
def test_several_processes_find_what_one_finds(jobs: dict[str, Job], made: Made, tmp_path: Path, name: str):
    job, labels = jobs[name], np.array(stored(made.data, "val")[1])
    assert job.process.returncode == 0, job.errors
    alone = evaluate(made, "--save-probabilities", tmp_path / "alone.npz")
    text = job.output if name == "three" else (job.option("--checkpoint") / "evaluation.json").read_text()
    found = json.loads(text)
    for views in ("centre", "ten"):
        equal(found[views], errors(labels, known(made, "val", views)), FLOAT32)
        equal(found.pop(views), alone.pop(views))
    for mine, theirs in zip(found.pop("classes"), alone.pop("classes"), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-6)
    assert found == alone  # the pairs, and what it is of
    file = job.option("--save-probabilities")
    np.testing.assert_allclose(saved(file), saved(tmp_path / "alone.npz"), rtol=0, atol=1e-7)
    assert probabilities.load(file).labels.tolist() == labels.tolist()


def test_the_first_process_alone_speaks(jobs: dict[str, Job]):
    output = jobs["two"].output
    assert output.count("top-1 error") == output.count("most confused") == 1
    assert output.rstrip().endswith("; of 2 processes, the first's")
    assert "Error" not in jobs["two"].errors + jobs["three"].errors


def test_a_job_that_nobody_started(made: Made, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = trainer("evaluate", *made.options)
    one_line(result, "WORLD_SIZE=2, and there is no such job", "RANK", "start it with torchrun, or unset WORLD_SIZE")
    for count in ("", "two", "-1"):
        monkeypatch.setenv("WORLD_SIZE", count)
        one_line(trainer("evaluate", *made.options), f"WORLD_SIZE={count}: not a number of processes", "unset")


@pytest.mark.slow
def test_where_one_process_fails_the_other_ends_in_a_line_too(made: Made, tmp_path: Path):
    """What else there is to read is torchrun's."""
    damaged = replace(made, data=Path(shutil.copytree(made.data, tmp_path / "damaged")))
    spoil(damaged.data, 4)  # of the first batch of 7, and the second process
    job = Job(2, *damaged.options, "--batch-size", 7, "--save-probabilities", tmp_path / "a.npz")
    job.end()
    assert job.process.returncode == 1  # torchrun's
    assert job.output == ""
    told = f"Error: {damaged.data}/val/val-000000.tar: damaged at sample 4 "
    lines = [line for line in job.errors.splitlines() if line.startswith("Error: ")]
    rest = [line for line in lines if not line.startswith(told)]
    assert len(lines) - len(rest) == 1
    gone = "Error: another process of this job has ended before its time; the reason is in its own line"
    assert rest in ([gone], ["Error: terminated"])  # that, where torchrun was faster
    assert "[rank" not in job.errors  # how a traceback of ours would begin
    assert not list(tmp_path.glob("a.npz*"))
