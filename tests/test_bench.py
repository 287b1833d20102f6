"""tools/bench: arithmetic against numpy, and each command at its smallest size. No times."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from conftest import one_line, picture
from networks import drawn, images, narrow
from pipeline import UserError, manifest
from pipeline.online.samples import SampleReader
from tools.bench import common, load, peers_load, steps, train
from tools.bench.__main__ import COMMANDS, main
from tools.bench.common import CORES, ENVIRONMENTS, Figures, Row
from tools.bench.peers_build import SIDE, Job
from trainer.layers import plan
from trainer.parallel import TwoColumnNet, reference_precision
from trainer.retrieval import codes

RATES = {"one": [90.0, 120.0, 60.0, 75.0, 99.0], "two": [30.0, 36.0, 25.0, 15.0, 40.0]}


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


def measured(name: str, rates: list[float], **more: Any) -> Row:
    return Row(name, name.title(), runs=[{"images": rate, "seconds": 1.0, "rss": 2**20} | more for rate in rates])


def test_medians_and_ratios_are_numpys():
    one, two = (np.array(RATES[name]) for name in RATES)
    assert common.ratio(RATES["one"], RATES["two"]) == np.median(one) / np.median(two)
    ratios = one / two
    expected = f"{np.median(one) / np.median(two):.2f} × ({ratios.min():.2f} to {ratios.max():.2f})"
    assert common.ratio_text(RATES["one"], RATES["two"]) == expected
    assert common.spread(RATES["one"]) == f"{np.median(one):.1f} ({one.min():.1f} to {one.max():.0f})"
    runs = [{"images": 128, "seconds": 0.5, "other": 2.0}, {"images": 64, "seconds": 0.125, "other": 1.0}]
    row = Row("any", "Any", runs=runs)
    assert (row.rates(), row.rates("other")) == ([256.0, 512.0], [64.0, 64.0])


def test_repetitions_are_interleaved_and_one_failure_ends_no_other_row(capsys: pytest.CaptureFixture[str]):
    rows, order = [Row("a", "A"), Row("b", "B"), Row("c", "C")], list[str]()

    def run(row: Row) -> Figures:
        order.append(row.name)
        if row.name == "b" and len(order) > 3:
            raise UserError("no luck")
        return {"images": 1, "seconds": 1.0}

    common.interleave(rows, run, 3)
    assert order == ["a", "b", "c", "c", "b", "a", "a", "c"]
    assert [(len(row.runs), row.failed) for row in rows] == [(3, ""), (0, "no luck"), (3, "")]
    assert capsys.readouterr().err.count("not run: no luck") == 1


def test_a_row_that_gives_another_number_of_images_fails():
    row = Row("a", "A")
    common.interleave([row], lambda row: {"images": 7, "seconds": 1.0}, 2, 12)
    assert (row.runs, row.failed) == ([], "gave 7 of 12 pictures")


def test_a_table_of_peers_and_its_baseline():
    rows = [measured("decode-encode", [200.0]), measured("penstock", [50.0, 100.0, 25.0])]
    rows += [measured("penstock-baseline", [40.0, 80.0, 50.0]), Row("ffcv", "FFCV", failed="no compiler")]
    rows[0].against = rows[2].against = ["penstock"]
    shares = [common.cells(rows, row, "decode-encode", "1")[2:5] for row in rows]
    assert shares == [
        ("200 (200 to 200)", "100 %", "0.25 × (0.25 to 0.25)"),
        ("50.0 (25.0 to 100)", "25 %", ""),
        ("50.0 (40.0 to 80.0)", "25 %", "1.00 × (0.50 to 1.25)"),
        ("not run: no compiler", "", ""),
    ]
    assert common.baseline_lines(rows) == [f"penstock, workers {CORES}: 1.00 × (0.50 to 1.25) the baseline's rate"]


def test_the_trainers_table():
    facts = {"operations": 10**9, "devices": 2}
    matrix, step = measured("matrix", [8e12, 4e12, 2e12]), measured("columns", [800.0, 400.0, 200.0])
    step.against, step.facts = ["grouped", "absent"], facts
    step.runs[0]["stall"] = {"reading": 0.25, "decoding": 0.5}
    rows = [matrix, step, measured("grouped", [1000.0, 500.0, 250.0]), Row("lost", "Lost", failed="out of memory")]
    group = train.Group("bf16", 8, ["cpu"], rows, "bf16")
    cells = dict(zip(train.HEADER, train.cells(group, step)))
    assert cells["images/s, median (min to max)"] == "400 (200 to 800)"
    assert (cells["GFLOP/s"], cells["of the matrix rate"]) == ("400", "5.0 %")  # of that of both devices
    assert (cells["stall"], cells["compared"]) == ("75.0 %", "0.80 × (0.80 to 0.80) grouped")
    assert train.cells(group, matrix)[3:5] == ("", "4,000")
    assert train.cells(group, rows[3])[3] == "not run: out of memory"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; sys.exit('no luck')", "failed (1): no luck"),
        ("print('nothing')", "printed no figures, but 'nothing'"),
        ("import time; time.sleep(60)", "hangs: not done after 1 s"),
        ("import os; os.kill(os.getpid(), 9)", "failed (-9): nothing on stderr"),
    ],
)
def test_a_job_that_fails(program: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(common, "PATIENCE", 1.0)
    script = tmp_path / "world.py"
    script.write_text(program)
    with pytest.raises(UserError) as error:
        common.run_job(str(script), Row("any", "Any"), {})
    one_line(error, reason)


def test_build(tmp_path: Path):
    """Seven JPEGs of two classes, of which a run takes 12; half a JPEG and a PNG, that are left out."""
    for number in range(7):
        folder = tmp_path / "raw" / ("cats", "dogs")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(f"bench{number}", 300 + number, 280).save(folder / f"{number}.jpg", quality=90)
    data = (tmp_path / "raw" / "cats" / "0.jpg").read_bytes()
    (tmp_path / "raw" / "cats" / "half.jpg").write_bytes(data[: len(data) // 2])
    picture("png", 300, 280).save(tmp_path / "raw" / "dogs" / "png.png")
    names = ("decode-encode", "penstock", "penstock-baseline", "opencv")
    only = [word for name in names if name != "penstock-baseline" for word in ("--only", name)]
    file, options = tmp_path / "build.json", ("--images", 12, "--repetitions", 1, "--workers", 1, *only)
    out = bench("build", tmp_path / "raw", *options, "--baseline", common.ROOT, "--json", file)
    found = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert "12 pictures (7 distinct; 2 left out: no whole JPEG)" in out
    assert tuple(found) == names
    for row in found.values():
        if peer := row.get("environment"):
            assert row["failed"] == f"not installed; python tools/bench peers {peer}"
            assert f"not run: {row['failed']}" in out
            continue
        (run,) = row["runs"]
        assert (run["images"], run["seconds"] > 0) == (12, True)
        assert run["rss"] > 10 * 2**20
    assert "penstock, workers 1: " in out
    assert "penstock, workers 1, start to exit: " in out


@pytest.mark.proof
def test_load(dataset: Path, tmp_path: Path):
    gives = {
        "decode": "uint8, 256 × 256 × 3",
        "penstock-uint8": "uint8, 3 × 224 × 224",
        "synthetic": "float32, 3 × 224 × 224",
        "dali-reader": "float32, 3 × 224 × 224",
    }
    file, only = tmp_path / "load.json", [word for name in (*gives, "ffcv-raw") for word in ("--only", name)]
    out = bench("load", dataset, "--batch", 8, "--batches", 2, "--repetitions", 1, "--json", file, *only)
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == [row.name for row in load.ROWS if row.name in rows]
    assert rows.pop("ffcv-raw")["failed"] == "not installed; python tools/bench peers ffcv"
    assert {name: run["gives"] for name, row in rows.items() for run in row["runs"]} == gives
    assert {run["images"] for row in rows.values() for run in row["runs"]} == {16}
    assert "FFCV, raw pixels" in out


@pytest.mark.proof
def test_first_batch(tmp_path: Path):
    file = tmp_path / "first.json"
    out = bench("first-batch", "--samples", 2000, "--shards", 5, "--repetitions", 2, "--batch", 8, "--json", file)
    (row,) = json.loads(file.read_text())["rows"]
    for run in row["runs"]:
        assert run["images"] == 8
        assert sum(run["stages"].values()) == pytest.approx(run["seconds"])
        assert all(f"\n| {stage} " in out for stage in (*run["stages"], "in all"))


def test_more_shards_than_samples():
    done = CliRunner().invoke(main, ["first-batch", "--samples", "5", "--shards", "6"])
    expected = "Error: 6 shards of 5 samples; give as many samples as shards, or more\n"
    assert (done.exit_code, done.output) == (2, expected)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of training in this process, torchvision's network at a sixteenth of its width."""

    def run_job(script: str, row: Row, job: Figures) -> Figures:
        options = json.loads(json.dumps(row.options))
        figures = steps.group(Job(function="group", workers=1, options=options, **job))
        reference_precision()
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


def test_train(here: None, recipe: Path, dataset: Path, tmp_path: Path):
    file, turns = tmp_path / "train.json", ("--seconds", 0, "--repetitions", 2)
    out = bench("train", dataset, "--recipe", recipe, "--batch", 2, "--devices", "cpu,cpu", *turns, "--json", file)
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == [row.name for row in train.ROWS]
    for name, row in rows.items():
        assert [run["steps"] for run in row["runs"]] == [1, 1]
        assert f"{row['title']} " in out
        if name != "matrix":
            assert [run["images"] for run in row["runs"]] == [2, 2]
        for run in row["runs"]:
            assert ("stall" in run) == (name == "loader" or name.endswith("fed"))
            assert 0 <= sum(run.get("stall", {}).values()) <= 1
    counts = {name: row.get("facts", {}).get("operations") for name, row in rows.items()}
    assert counts["columns"] == counts["fed"] == counts["grouped"] != counts["torchvision"] == counts["torchvision-fed"]


def test_gpu_runs_on_the_cpu(here: None, recipe: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The code of a GPU; one kind of row fails, and the others do not."""
    monkeypatch.setitem(train.PLANS, "cpu", ((4,), (0,), str(recipe), ("fp32", "bf16")))

    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(steps.Grouped, "__init__", fail)
    file = tmp_path / "gpu.json"
    out = bench("gpu", dataset, "--device", "cpu", "--seconds", 0, "--repetitions", 1, "--json", file)
    rows = json.loads(file.read_text())["rows"]
    for row in rows:
        assert row.get("failed", "") == ("CUDA out of memory. Tried to allocate" if row["name"] == "grouped" else "")
    names = [(row["facts"]["group"], row["name"]) for row in rows]
    assert len(set(names)) == len(names)
    loads = ["load uint8", "load float32", "load bfloat16"]
    assert [name for group, name in names if group == "supply"] == ["decode 0", *loads]
    assert [name for group, name in names if group == "bf16"] == [*(row.name for row in train.ROWS), "fp32"]
    assert out.count("not run: CUDA out of memory.") >= 2


def test_gpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench("gpu") == "no CUDA device; --device cpu runs the same, smaller\n"


@pytest.mark.proof
def test_a_group_is_a_process_of_its_own(dataset: Path, tmp_path: Path):
    options = ("--recipe", "tiny", "--devices", "cpu,cpu", "--batch", 2, "--seconds", 0, "--repetitions", 1)
    assert "ceiling: a matrix product" in bench("train", dataset, *options, "--only", "matrix")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--variant", "fp64"), ("fp64", "fp32, tf32, bf16")),
        (("--variant", "bf16,segment"), ("segment", "segments, graphs")),
        (("--devices", "cpu"), ("--devices cpu", "two")),
        (("--recipe", "wide"), ("wide", "original")),
    ],
)
def test_impossible_values_are_one_line(words: tuple[str, ...], parts: tuple[str, ...], dataset: Path):
    done = CliRunner().invoke(main, ["train", str(dataset), "--recipe", "tiny", "--devices", "cpu,cpu", *words])
    assert (done.exit_code, done.output.count("\n")) == (2, 1), done.output
    assert all(part in done.output for part in parts), done.output


def test_every_command_has_its_help():
    for name in COMMANDS:
        assert "--help" in bench(name, "--help")
    assert all("==" in requirement for environment in ENVIRONMENTS.values() for requirement in environment)


def test_operations_are_those_that_torch_counts():
    """Of two columns: of a grouped convolution's gradient torch counts too many."""
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


@pytest.mark.parametrize(("count", "shards"), [(15, 1), (16, 2), (100, 3)])  # 15 + 16 + 10
def test_a_dataset_of_so_many_images(count: int, shards: int, dataset: Path, tmp_path: Path):
    source, built = manifest.load(dataset), load.of_images(dataset, count, tmp_path / "part")
    assert manifest.load(tmp_path / "part") == built
    assert built.split("train").samples == sum(shard.samples for shard in built.split("train").shards) == count
    assert len(built.split("train").shards) == shards
    with SampleReader(source, "train") as every, SampleReader(built, "train") as part:
        expected = [bytes(jpeg) for jpeg in every.read(np.arange(count) % source.split("train").samples)]
        assert [bytes(jpeg) for jpeg in part.read(np.arange(count))] == expected
    world = Job("", str(tmp_path / "part"), "", 1)
    jpegs = list(peers_load.stored_jpegs(world))
    assert jpegs[: len(expected)] == expected[: len(jpegs)]
    assert peers_load.mean_colour(world) == source.statistics().mean_color.tolist()
    load.write_pictures(world, 50, tmp_path / "pictures" / "all")
    files = sorted((tmp_path / "pictures" / "all").iterdir())
    assert [file.read_bytes() for file in files] == [jpegs[i % len(jpegs)] for i in range(50)]


def test_an_inflated_dataset(dataset: Path, tmp_path: Path):
    one = load.of_images(dataset, 15, tmp_path / "one")
    built = load.of_images(tmp_path / "one", 100, tmp_path / "large", 7)
    assert manifest.load(tmp_path / "large") == built
    assert [shard.samples for shard in built.split("train").shards] == [15, 14, 14, 15, 14, 14, 14]
    with SampleReader(one, "train") as few, SampleReader(built, "train") as many:
        ids = np.arange(100)
        assert [bytes(jpeg) for jpeg in many.read(ids)] == [bytes(jpeg) for jpeg in few.read(ids % 15)]


def test_pictures_of_another_size(small: Path, tmp_path: Path):
    with pytest.raises(UserError) as error:
        load.of_images(small, 16, tmp_path / "part")
    one_line(error, str(small), "size 32", "--size 256")


def test_only_what_follows_the_warm_up_is_measured():
    world, taken = Job("", "", "", 1, batch=3, batches=4), list[int]()

    def batches() -> Iterator[np.ndarray]:
        while True:
            taken.append(0)
            yield np.zeros((3, 2, 5), np.uint8)

    figures = peers_load.take(world, batches())
    assert len(taken) == peers_load.warm_up(world) + 4
    assert peers_load.images_of(world) >= 3 * len(taken)
    assert (figures["images"], figures["gives"]) == (12, "uint8, 2 × 5")
    with pytest.raises(ValueError, match="too many values"):  # batches of two shapes
        peers_load.take(world, (np.zeros((3, 2, i % 2)) for i in range(99)))


def test_random_views_reach_every_edge():
    """A picture whose pixels are (row, column, 0)."""
    pixels = np.stack([*np.indices((SIDE, SIDE)), np.zeros((SIDE, SIDE))], 2).astype(np.uint8)
    views = [peers_load.pillow_view(Image.fromarray(pixels), torch.zeros(3, 1, 1)) for _ in range(600)]
    corners = np.array([view[:2].amin((1, 2)).tolist() for view in views])
    assert views[0].shape == (3, peers_load.VIEW, peers_load.VIEW)
    assert corners.min(axis=0).tolist() == [0, 0]
    assert corners.max(axis=0).tolist() == [SIDE - peers_load.VIEW] * 2
    assert 0.4 < np.mean([bool(view[1, 0, 0] > view[1, 0, -1]) for view in views]) < 0.6


def test_retrieval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(codes, "STEPS", 2)
    (tmp_path / "features").mkdir()
    out = bench("retrieval", "--rows", 300, "--folder", tmp_path / "features", "--repetitions", 2)
    assert "300 rows of 4,096 float16, 128 bits" in out
    for where in ("in memory", "features on the disk"):
        assert f"\n| by codes, {where} " in out
        assert f"\n| exact, {where} " in out
    assert list((tmp_path / "features").iterdir()) == []
