"""Samples that fail: named in one line, or replaced and logged; shards that vanish or change; how it ends."""

import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT, build, one_line, verify
from pipeline import UserError, manifest
from pipeline.manifest import DatasetError
from pipeline.online import Loader, samples
from pipeline.online.samples import SampleReader
from runs import Runs, assert_same_end, options, resumed, shared_runs, train, trainer  # noqa: F401 – a fixture
from stored import damage, forge, misstate
from trainer import checkpoint as checkpoints
from trainer.evaluate import top_k_errors
from trainer.metrics import read

SEED = 3


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    root = tmp_path / "copy"
    shutil.copytree(dataset, root)
    return root


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_named(copy: Path, harm: str):
    shard, built = copy / "val" / "val-000000.tar", manifest.load(copy)
    message = "No such file"
    if harm == "flip":
        damage(copy, 4, split="val")
        message = r"damaged at sample 4 \(key val_checks_0001\)"
    elif harm == "cut":
        os.truncate(shard, int(built.samples("val")["offset"][4]) + 700)
        message = "cut short at sample 4"
    else:
        shard.unlink()
    with (
        pytest.raises(UserError, match=message) as caught,
        Loader(built, "val", batch_size=2, views="centre") as loader,
    ):
        list(loader)
    assert str(shard) in str(caught.value)
    assert str(caught.value).endswith(f"mend it: python tools/verify_shards.py {copy} --repair RAW")
    if harm != "flip":  # at opening: existence and size
        with pytest.raises(DatasetError, match=r"val-000000\.tar: (missing|has \d+ bytes)"):
            Loader(copy, "val", views="centre")


@pytest.mark.parametrize("harm", [damage, forge])
def test_bad_samples_are_replaced_counted_and_logged(dataset: Path, copy: Path, harm, caplog: pytest.LogCaptureFixture):
    """17, 18 and 40 of 41 are bad: 19 stands in for the first two, 0 for the last; all the rest is as it was."""
    with Loader(dataset, batch_size=8, seed=SEED) as loader:
        whole = list(islice(loader, 12))
    harm(copy, 17, 18, 40)
    with (
        caplog.at_level(logging.WARNING, "penstock"),
        Loader(copy, batch_size=8, seed=SEED, max_bad=3) as loader,
    ):
        found = list(islice(loader, 12))
        assert loader.bad == [17, 18, 40]
        assert loader.state_dict()["bad"] == [17, 18, 40]
    stands_in = {17: 19, 18: 19, 40: 0}
    labels = manifest.load(dataset).samples("train")["label"]
    for one, other in zip(whole, found, strict=True):
        assert other.ids.tolist() == [stands_in.get(i, i) for i in one.ids.tolist()]
        assert other.labels.tolist() == labels[other.ids].tolist()
        same = torch.from_numpy(~np.isin(one.ids, list(stands_in)))
        assert torch.equal(one.images[same], other.images[same])
        assert not any(torch.equal(*pair) for pair in zip(one.images[~same], other.images[~same]))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert {line.split("sample ")[1].split(" ")[0] for line in lines} == {"17", "18", "40"}
    assert all("train-00000" in line and "(key " in line and line.endswith("stands in") for line in lines)


@pytest.mark.parametrize("harm", [damage, forge])
def test_in_evaluation_a_bad_sample_has_no_label(dataset: Path, copy: Path, harm, caplog: pytest.LogCaptureFixture):
    harm(copy, 17, 40)
    options = {"batch_size": 8, "views": "ten", "max_bad": 2}
    with Loader(dataset, **options) as whole, Loader(copy, **options) as loader:
        for one, other in zip(whole, loader, strict=True):
            read = torch.from_numpy(~np.isin(one.ids, (17, 40)))
            assert other.labels.tolist() == torch.where(read, one.labels, -1).tolist()
            assert torch.equal(one.images[read], other.images[read])
    assert [record.getMessage()[-19:] for record in caplog.records] == ["its label is −1 now"] * 2


def test_ranks_agree_on_what_stands_in(copy: Path):
    forge(copy, 18, 40)
    damage(copy, 17)
    with Loader(copy, batch_size=8, seed=SEED, max_bad=3) as loader:
        whole = list(islice(loader, 6))
    parts = []
    for rank in range(3):
        with Loader(copy, batch_size=8, seed=SEED, max_bad=3, rank=rank, ranks=3) as loader:
            parts.append(list(islice(loader, 6)))
    for one, *theirs in zip(whole, *parts):
        assert np.concatenate([each.ids for each in theirs]).tolist() == one.ids.tolist()
        assert torch.equal(one.images, torch.cat([each.images for each in theirs]))


def test_a_stand_in_of_another_size_has_a_window_of_its_own(raw: Path, tmp_path: Path):
    """Whole pictures: only the bad samples count as bad, even where their headers lie about their sizes."""
    root = tmp_path / "whole"
    assert build(raw, root, "--crop", "none", "--workers", 1, "--samples-per-shard", 16).exit_code == 0
    forge(root, 1)
    damage(root, 17)
    misstate(root, 5, 30)
    with Loader(root, batch_size=8, seed=SEED, recipe="imagenet", max_bad=4) as loader:
        assert len(list(islice(loader, 12))) == 12
        assert loader.bad == [1, 5, 17, 30]


@pytest.mark.parametrize("harm", [damage, forge])
def test_more_bad_samples_than_may_be(copy: Path, harm):
    """One, and none may be; one more than `max_bad`; all of them."""
    harm(copy, 17)
    shard = f"train-{manifest.load(copy).samples('train')['shard'][17]:06d}.tar"
    with Loader(copy, batch_size=8, seed=SEED) as loader, pytest.raises(DatasetError) as caught:
        list(islice(loader, 6))
    one_line(caught, "damaged at sample 17 (key" if harm is damage else "max_bad=0", shard, "sample 17 (key")
    harm(copy, 18, 40)
    with Loader(copy, batch_size=8, seed=SEED, max_bad=2) as loader, pytest.raises(DatasetError) as caught:
        list(islice(loader, 6))
    one_line(caught, "samples that failed: 3, allowed: max_bad=2", "verify_shards", ".tar: sample ")
    harm(copy, *sorted({*range(manifest.load(copy).split("train").samples)} - {17, 18, 40}))
    with Loader(copy, batch_size=4, seed=SEED, max_bad=1000) as loader:
        for _ in range(2):  # and again
            with pytest.raises(DatasetError, match="samples that failed: 41, allowed: max_bad=1000"):
                next(loader)


def test_threads_may_share_few_descriptors(dataset: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(samples, "MAX_OPEN", 1)
    built, errors = manifest.load(dataset), []
    with SampleReader(built, "train", readers=2) as reader:
        expected = [data.tobytes() for data in reader.read(np.arange(41))]

        def read(seed: int) -> None:
            random = np.random.default_rng(seed)
            for _ in range(60):
                ids = random.permutation(41)[:9]
                try:
                    assert [data.tobytes() for data in reader.read(ids)] == [expected[i] for i in ids]
                    reader.key(int(ids[0]))
                except (AssertionError, OSError, KeyError, UserError) as error:
                    errors.append(error)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


def test_the_count_of_bad_samples_goes_on_after_a_resume(copy: Path):
    damage(copy, 17, 18, 40)
    with Loader(copy, batch_size=41, seed=SEED, max_bad=3) as loader:
        next(loader)
        state = loader.state_dict()
    assert state["bad"] == [17, 18, 40]
    damage(copy, 5)
    with Loader(copy, batch_size=41, seed=SEED, max_bad=3) as loader:
        loader.load_state_dict(state)
        with pytest.raises(DatasetError, match=r"sample 5 .*samples that failed: 4"):
            next(loader)


# Pictures that cannot be read


def mended(root: Path, line: str, raw: Path) -> None:
    """Do what the line says, word for word."""
    words = re.search(r"; mend it: python tools/verify_shards\.py (.*? --repair RAW)[;\n]", line)
    assert words, line
    done = verify(*shlex.split(words[1].replace("RAW", shlex.quote(str(raw)))), "--quick", "--workers", 1)
    assert (done.exit_code, done.stdout.count("repaired: ")) == (0, 1), done.output


HABITS = ("train.validate_every=2", "train.checkpoint_every=100")


@pytest.mark.parametrize(
    ("split", "step", "processes"),
    [
        ("val", 2, 1),
        *(("train", step, 1) for step in (0, 3)),
        *(pytest.param(split, 2, count, marks=pytest.mark.proof) for split in ("val", "train") for count in (2, 3)),
    ],
)
def test_a_run_ends_saved_on_a_damaged_picture_and_goes_on_once_it_is_mended(
    raw: Path, dataset: Path, copy: Path, tmp_path: Path, split: str, step: int, processes: int, runs: Runs
):
    """Of training, the first of the batch after `step`."""
    with Loader(dataset, batch_size=12, seed=2012) as loader:
        sample = int(next(islice(loader, step, None)).ids[0]) if split == "train" else 4
    shard = copy / split / f"{split}-{manifest.load(dataset).samples(split)['shard'][sample]:06d}.tar"
    damage(copy, sample, split=split)

    whole, parts = (
        ["train", *options(data, tmp_path / f"{data.name}-run", "train.steps=6", *HABITS)] for data in (dataset, copy)
    )
    assert {process.exit_code for process in runs(processes, whole)} == {0}
    ended = runs(processes, parts)
    *_, drawn, last = ended[0].output.splitlines()
    who = "(process 1: )?" if processes > 1 and split == "val" else ""
    assert re.fullmatch(
        rf"Error: {who}{shard}: damaged at sample {sample} \(key \w+\); mend it: .* --repair RAW; the run is saved "
        rf"after step {step}: go on by --resume, or unmended by --resume --set data\.max_bad=1, on other data than the "
        "run's identity names",
        last,
    ), ended
    assert drawn.startswith("page: not drawn")
    assert {process.exit_code for process in ended} == {2}
    newest = checkpoints.load(tmp_path / "copy-run")
    assert (newest.step, newest.progress["pending"], newest.loader["bad"]) == (step, split == "val", [])
    mended(copy, last, raw)
    ended = runs(processes, ["train", *resumed(copy, tmp_path / "copy-run")])
    assert {process.exit_code for process in ended} == {0}, ended
    if processes < 3:  # of three the last bits may differ after a resume
        assert_same_end(tmp_path / "dataset-run", tmp_path / "copy-run")


def test_a_bad_picture_in_validation_counts_as_wrong(dataset: Path, copy: Path, tmp_path: Path):
    """Beside the probabilities of all nine pictures: its own errors count as 1, its log-likelihood not at all."""
    damage(copy, 4, split="val")
    result = train(copy, tmp_path / "run", 2, "data.max_bad=1")
    assert result.exit_code == 0, result.output
    out = tmp_path / "out.npz"
    trainer(
        "evaluate",
        "--data",
        dataset,
        "--checkpoint",
        tmp_path / "run",
        "--views",
        "centre",
        "--save-probabilities",
        out,
    )
    with np.load(out) as arrays:
        values, labels = torch.from_numpy(arrays["probabilities"]).double(), torch.from_numpy(arrays["labels"]).long()
    errors = [top_k_errors(values, labels, k) for k in (1, 5)]
    others = np.arange(9) != 4
    expected = [100 * float(error[others].sum() + 1) / 9 for error in errors]
    line = read(tmp_path / "run")[-1]
    assert [line[key] for key in ("samples", "unreadable", "top1_error", "top5_error")] == [9, 1, *expected]
    nats = -values[np.arange(9), labels].log()[others].mean()
    assert line["nll"] == pytest.approx(float(nats), rel=1e-5)
    text = f"validation at step 2: top-1 error {expected[0]:.1f} %, top-5 error {expected[1]:.1f} % (centre view)"
    assert f"{text}; 1 of 9 could not be read; counted as wrong\n" in result.stdout


LOOP = """
import sys, threading
from pipeline.online import Loader
loader = Loader(sys.argv[1], batch_size=int(sys.argv[2]), readers=2)
print(threading.active_count(), flush=True)
with loader:
    for batch in loader:
        print(batch.step, flush=True)
"""


@pytest.mark.proof  # a promise in seconds
@pytest.mark.parametrize("batch", [8, 41])
def test_ctrl_c_ends_everything_within_two_seconds(dataset: Path, batch: int):
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(dataset), str(batch)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(6)]
    assert int(lines[0]) > 2
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    process.communicate(timeout=30)
    assert time.monotonic() - began < 2  # the promise is this bound
    assert process.returncode != 0


GROWTH = """
import json, sys
from itertools import islice
from pathlib import Path
from pipeline.online import Loader

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

steps, found = int(sys.argv[2]), []
with Loader(sys.argv[1], batch_size=32, max_bad=1000) as loader:
    for batch in islice(loader, steps):
        if batch.step % 100 == 99:
            loader.load_state_dict(loader.state_dict())  # a decoder made anew
        if batch.step % 10 == 0:
            found.append(resident())
print(json.dumps(found))
"""


@pytest.mark.slow
def test_memory_does_not_grow(dataset: Path, copy: Path):
    """2,000 batches, decoders made anew 20 times: the peak of the last quarter within 1 % of that of the third."""
    found = subprocess.run(
        [sys.executable, "-c", GROWTH, str(dataset), "2000"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    sizes = np.array(json.loads(found.stdout))
    warm, late = sizes[100:150].max(), sizes[150:].max()
    assert late < 1.01 * warm, f"{warm / 1e6:.1f} MB, then {late / 1e6:.1f} MB"
