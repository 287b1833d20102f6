"""tools/bench: arithmetic against numpy and torch, and each command once at its smallest size. No times."""

import importlib.util
import json
import tempfile
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from torch.utils.flop_counter import FlopCounterMode

from conftest import picture
from networks import drawn, images, narrow
from pipeline import UserError, manifest
from pipeline.service.database import Database, add_event, url_of
from stored import jpegs
from tools.bench import common, load, steps, train
from tools.bench.__main__ import COMMANDS, main
from tools.bench.clients import Clients, Stream
from tools.bench.common import ENVIRONMENTS, Figures, Row
from tools.bench.peers_build import Job
from trainer.layers import plan
from trainer.parallel import TwoColumnNet
from trainer.retrieval import codes

TRITON = {"foreach"} if importlib.util.find_spec("triton") else set()  # rows that need no more of it than to be there


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache without any peer's environment, and a folder for temporary files, in which none is left."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield
    assert not list((tmp_path / "temporary").glob("penstock-*"))


def bench(*words: object) -> str:
    done: Result = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


# Arithmetic


def test_medians_and_ratios_are_numpys():
    rates = [90.0, 120.0, 60.0, 75.0, 99.0], [30.0, 36.0, 25.0, 15.0, 40.0]
    one, two = map(np.array, rates)
    assert common.ratio(*rates) == np.median(one) / np.median(two)
    ratios = one / two
    expected = f"{np.median(one) / np.median(two):.2f} × ({ratios.min():.2f} to {ratios.max():.2f})"
    assert common.ratio_text(*rates) == expected
    assert common.spread(rates[0]) == f"{np.median(one):.1f} ({one.min():.1f} to {one.max():.0f})"
    row = Row("any", "Any", runs=[{"images": 128, "seconds": 0.5, "other": 2.0}])
    assert (row.rates(), row.rates("other")) == ([256.0], [64.0])


def test_repetitions_are_interleaved_and_one_failure_ends_no_other_row(capsys: pytest.CaptureFixture[str]):
    rows, order = [Row("a", "A"), Row("b", "B"), Row("c", "C")], list[str]()

    def run(row: Row) -> Figures:
        order.append(row.name)
        if row.name == "b" and len(order) > 3:
            raise UserError("no luck")
        return {"images": 7, "seconds": 1.0}

    common.interleave(rows, run, 3)
    assert order == ["a", "b", "c", "c", "b", "a", "a", "c"]
    assert [(len(row.runs), row.failed) for row in rows] == [(3, ""), (0, "no luck"), (3, "")]
    assert capsys.readouterr().err.count("not run: no luck") == 1
    row = Row("a", "A")
    common.interleave([row], run, 2, 12)
    assert (row.runs, row.failed) == ([], "gave 7 of 12 pictures")


def test_operations_are_those_that_torch_counts():
    """Use two columns: torch counts too many for the gradient of a grouped convolution."""
    recipe, classes, size = narrow("original").model, 7, 3
    columns, counter = TwoColumnNet(recipe, classes, (torch.device("cpu"),) * 2), FlopCounterMode(display=False)
    columns.load(drawn(recipe, classes))
    with counter:
        F.cross_entropy(columns(images(recipe, size).float()), torch.tensor([0, 2, 4])).backward()
    counts = [layer.multiply_adds for layer in plan(recipe, classes)]
    assert size * steps.operations(counts) == counter.get_total_flops()


def test_the_plain_network_is_torchvisions():
    """Its published parameters and multiply-adds of a forward pass; the first layer's input has no gradient."""
    with torch.device("meta"):
        network = steps.alexnet(1000)
    assert sum(parameter.numel() for parameter in network.parameters()) == 61_100_840
    first = 64 * 3 * 11 * 11 * 55 * 55
    assert steps.alexnet_operations(1000) == 2 * (3 * 714_188_480 - first)


# Parts


@pytest.mark.parametrize(("count", "shards"), [(15, 1), (100, 3)])  # 15 + 16 + 10
def test_a_dataset_of_so_many_images(count: int, shards: int, dataset: Path, tmp_path: Path):
    built = load.of_images(dataset, count, tmp_path / "part")
    assert manifest.load(tmp_path / "part") == built
    assert built.split("train").samples == sum(shard.samples for shard in built.split("train").shards) == count
    assert len(built.split("train").shards) == shards
    assert sorted(jpegs(tmp_path / "part", "train")) == sorted(islice(cycle(jpegs(dataset, "train")), count))
    if shards == 1:  # of which a larger one is made
        large = load.of_images(tmp_path / "part", 100, tmp_path / "large", 7)
        assert [shard.samples for shard in large.split("train").shards] == [15, 14, 14, 15, 14, 14, 14]
        assert jpegs(tmp_path / "large", "train") == [*islice(cycle(jpegs(tmp_path / "part", "train")), 100)]


def test_lost_and_doubled_events_are_those_that_the_database_tells(tmp_path: Path):
    """Six events of two jobs; a stream that begins after the first one, and one that misses two and doubles one."""
    database = Database(url_of(tmp_path, None))
    for job in (1, 1, 2, 1, 1, 1):
        with database.writing() as connection:
            add_event(connection, job, "progress", {})
    told = database.events(0)
    database.close()
    clients = Clients(0, tmp_path, 0, 0, 1.0)
    clients.job = 1
    clients.streams = whole, broken = [Stream(), Stream()]
    whole.after, broken.after = told[0].id, 0
    for stream, heard in ((whole, told[1:]), (broken, [told[0], told[2], told[4], told[4], told[5]])):
        for event in heard:
            line = json.dumps({"id": event.id, "job": event.job, "kind": "ended" if event.id == 6 else event.kind})
            assert stream.hear(f"data: {line}\n".encode(), 1) == (event.id == 6)
    figures = clients.figures(1.0)
    assert (figures["events"], figures["lost"], figures["out_of_order"]) == (4 + 5, 2, 1)


# Commands


def test_help_and_pinned_peers():
    for name in COMMANDS:
        assert "--help" in bench(name, "--help")
    assert all("==" in requirement for environment in ENVIRONMENTS.values() for requirement in environment)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("train", "DATASET", "--variant", "fp64"), ("fp64", "fp32, tf32, bf16")),
        (("train", "DATASET", "--devices", "cpu"), ("--devices cpu", "two")),
        (("load", "DATASET"), ("size 32", "--size 256")),
        (("first-batch", "--samples", "5", "--shards", "6"), ("6 shards of 5 samples", "as many samples as shards")),
    ],
)
def test_impossible_values_are_one_line(words: tuple[str, ...], parts: tuple[str, ...], small: Path):
    done = CliRunner().invoke(main, [str(small) if word == "DATASET" else word for word in words])
    assert (done.exit_code, done.output.count("\n")) == (2, 1), done.output
    assert all(part in done.output for part in parts), done.output


def test_build(tmp_path: Path):
    """Seven JPEGs of two classes, of which a run takes 12; half a JPEG and a PNG, that are left out."""
    for number in range(7):
        folder = tmp_path / "raw" / ("cats", "dogs")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(f"bench{number}", 300 + number, 280).save(folder / f"{number}.jpg", quality=90)
    data = (tmp_path / "raw" / "cats" / "0.jpg").read_bytes()
    (tmp_path / "raw" / "cats" / "half.jpg").write_bytes(data[: len(data) // 2])
    picture("png", 300, 280).save(tmp_path / "raw" / "dogs" / "png.png")
    only = [word for name in ("decode-encode", "penstock", "opencv") for word in ("--only", name)]
    file, options = tmp_path / "build.json", ("--images", 12, "--repetitions", 1, "--workers", 1, *only)
    out = bench("build", tmp_path / "raw", *options, "--baseline", common.ROOT, "--json", file)
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert "12 pictures (7 distinct; 2 left out: no whole JPEG)" in out
    assert f"not run: {rows.pop('opencv')['failed']}" in out
    assert set(rows) == {"decode-encode", "penstock", "penstock-baseline"}
    assert [[run["images"] for run in row["runs"]] for row in rows.values()] == [[12]] * 3


@pytest.mark.proof
def test_serve(tmp_path: Path):
    for number in range(6):
        folder = tmp_path / "raw" / ("cats", "dogs")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(f"bench{number}", 300 + number, 280).save(folder / f"{number}.jpg", quality=90)
    options = ("--images", 12, "--repetitions", 1, "--dashboards", 5, "--readers", 2)
    out = bench("serve", tmp_path / "raw", *options, "--json", tmp_path / "serve.json")
    (command, alone, watched) = (row["runs"][0] for row in json.loads((tmp_path / "serve.json").read_text())["rows"])
    assert [run["images"] for run in (command, alone, watched)] == [12] * 3
    assert "clients" not in alone
    clients = watched["clients"]
    assert (clients["failed"], clients["lost"], clients["out_of_order"]) == ({}, 0, 0), out
    assert clients["events"] >= 5
    assert set(clients["answers"]) == {"api", "page", "range"}
    assert "failed requests: 0\n" in out


@pytest.mark.proof
def test_load(dataset: Path, tmp_path: Path):
    gives = {
        "decode": "uint8, 256 × 256 × 3",
        "penstock-uint8": "uint8, 3 × 224 × 224",
        "synthetic": "float32, 3 × 224 × 224",
    }
    file, only = tmp_path / "load.json", [word for name in (*gives, "ffcv-raw") for word in ("--only", name)]
    bench("load", dataset, "--batch", 8, "--batches", 2, "--repetitions", 1, "--json", file, *only)
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows.pop("ffcv-raw")["failed"] == "not installed; python tools/bench peers ffcv"
    runs = {name: run for name, row in rows.items() for run in row["runs"]}
    assert {name: run["gives"] for name, run in runs.items()} == gives
    assert {run["images"] for run in runs.values()} == {16}


@pytest.mark.proof
def test_feed(dataset: Path, tmp_path: Path):
    names = ("local", "tcp-1", "unix-2", "growth-2", "tf-data")
    file, only = tmp_path / "feed.json", [word for name in names for word in ("--only", name)]
    options = ("--batch", 8, "--batches", 5, "--repetitions", 1, "--sleep", 10_000)
    bench("feed", dataset, *options, "--json", file, *only)
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows.pop("tf-data")["failed"] == "not installed; python tools/bench peers tensorflow"
    runs = {name: run for name, row in rows.items() for run in row.get("runs", ())}
    assert tuple(runs) == names[:-1]
    assert [run["images"] for run in runs.values()] == [40, 40, 40, 80]
    assert {run["gives"] for run in runs.values()} == {"uint8, 3 × 224 × 224"}
    assert all(run["workers_views"] and run["workers_cpu"] > 0 for name, run in runs.items() if name != "local")
    assert runs["growth-2"]["seconds"] > 2 * 8 * 0.01  # asleep, for two parts in a row at least


@pytest.mark.proof
def test_first_batch(tmp_path: Path):
    file = tmp_path / "first.json"
    out = bench("first-batch", "--samples", 2000, "--shards", 5, "--repetitions", 2, "--batch", 8, "--json", file)
    (row,) = json.loads(file.read_text())["rows"]
    for run in row["runs"]:
        assert run["images"] == 8
        assert sum(run["stages"].values()) == pytest.approx(run["seconds"])
        assert all(f"\n| {stage} " in out for stage in (*run["stages"], "in all"))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of training in this process, torchvision's network at a sixteenth of its width."""

    def run_job(script: str, row: Row, job: Figures) -> Figures:
        options = json.loads(json.dumps(row.options))
        figures = steps.group(Job(function="group", workers=1, options=options, **job))
        steps.choose_arithmetic(steps.Timed(lambda: 0))
        return json.loads(json.dumps(figures))

    monkeypatch.setattr(common, "run_job", run_job)
    monkeypatch.setattr(steps, "WIDTHS", tuple(width // 16 for width in steps.WIDTHS))
    monkeypatch.setattr(steps, "UNITS", 64)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of two layers."""
    file = tmp_path / "recipe.toml"
    file.write_text('base = "tiny"\n[model]\norder = ["conv1", "fc8"]\nsize = 72\nlayers.conv1 = { width = 8 }\n')
    return file


def test_gpu(here: None, recipe: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The code of a GPU; one kind of row fails, and the others do not, but for those that take a GPU."""
    monkeypatch.setitem(train.PLANS, "cpu", ((4,), (0,), str(recipe), ("fp32", "bf16")))

    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(steps.Grouped, "__init__", fail)
    file = tmp_path / "gpu.json"
    bench("gpu", dataset, "--device", "cpu", "--seconds", 0, "--repetitions", 1, "--json", file)
    rows = json.loads(file.read_text())["rows"]
    missing = {row["name"]: row["failed"] for row in rows if "failed" in row}
    assert missing.pop("grouped") == "CUDA out of memory. Tried to allocate"
    assert "on one GPU" in missing.pop("whole-graph") or not TRITON
    kernels = {row["name"] for row in rows if row["name"].split()[-1] in ("kernel", "pixels", "rgb", "yuv420")}
    assert set(missing) == {name for name in kernels if not name.startswith("load")} | ({"foreach"} - TRITON)
    cores = [run["cores"] for row in rows for run in row.get("runs", ())]
    assert min(cores) >= 0
    names = [(row["facts"]["group"], row["name"]) for row in rows]
    assert len(set(names)) == len(names)
    assert [name for group, name in names if group == "bf16"] == [*(row.name for row in train.ROWS), "fp32"]
    assert [name for group, name in names if group == "supply"] == [row.name for row in train.supply_rows((0,))]


@pytest.mark.proof
def test_train(dataset: Path, tmp_path: Path):
    options = ("--recipe", "tiny", "--devices", "cpu,cpu", "--batch", 2, "--seconds", 0, "--repetitions", 1)
    assert "ceiling: a matrix product" in bench("train", dataset, *options, "--only", "matrix")


def test_retrieval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(codes, "STEPS", 2)
    (tmp_path / "features").mkdir()
    out = bench("retrieval", "--rows", 300, "--folder", tmp_path / "features", "--repetitions", 2)
    assert "300 rows of 4,096 float16, 128 bits" in out
    for row in ("by codes, in memory", "exact, in memory", "by codes, features on", "exact, features on"):
        assert f"\n| {row} " in out
    assert list((tmp_path / "features").iterdir()) == []
