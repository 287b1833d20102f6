"""tools/gpu.py on the CPU: the code that a GPU runs, and that its record says what its table says. No times."""

import json
import math
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from pipeline.manifest import Manifest
from tools import gpu_bench, gpu_training, plain_alexnet
from tools.gpu import BATCHES, HEADER, main
from tools.gpu_bench import COMPARED, DRAWN, OUTPUTS, PLANS, RUN, Bench, Plan
from tools.gpu_rows import REPETITIONS, Row
from tools.gpu_training import BESIDE, BF16, FP32, WAYS
from tools.operations import SIDES, of_step
from tools.peers.datasets import of_images
from tools.ways import Way
from trainer import recipe as recipes
from trainer.layers import plan
from trainer.recipe import COMPILED, PRECISIONS

((BATCH,), _, _) = PLANS["cpu"]
TIMED = ("decode", "loader", "grouped", "torchvision", "step", "fed", "evaluate")
# both, and steps with the same masks, in fp32 and bf16
TRAINING = ["grouped"] * 2 + ["torchvision"] * 2 + ["step"] * 3 + ["fed"] * 2
LOADED = ["loader"] * (len(OUTPUTS) + 1)
PARTS = ["decode", *LOADED, "pixels", *["matrix"] * 2, *TRAINING, *["evaluate"] * 2, *["two devices"] * 4]


def words(dataset: Path, *more: object) -> list[str]:
    return [str(dataset), "--device", "cpu", "--seconds", "0.05", *map(str, more)]


@pytest.fixture(autouse=True)
def thin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision's network at a sixteenth of its width."""
    convolutions = tuple((width // 16, *rest) for width, *rest in plain_alexnet.CONVOLUTIONS)
    monkeypatch.setattr(plain_alexnet, "CONVOLUTIONS", convolutions)
    monkeypatch.setattr(plain_alexnet, "UNITS", 64)


def test_every_row_is_measured(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "gpu.json"
    main(words(dataset, "--json", file, "--markdown"))
    out = capsys.readouterr().out
    found = json.loads(file.read_text())
    rows = [Row(**row) for row in found.pop("rows")]
    assert [row.part for row in rows] == PARTS
    for row in rows:
        assert row.batch == (SIDES["cpu"] if row.part == "matrix" else BATCH)
        if row.part in TIMED:
            assert len(row.rates) == REPETITIONS
            assert all(math.isfinite(rate) and rate > 0 for rate in row.rates)
            assert row.images_per_second == statistics.median(row.rates)
            assert row.host_cores > 0
        else:
            assert row.images_per_second is None
        assert row.not_measured == ("one device" if row.part == "two devices" else "")
    by_name = {(row.part, row.what): row for row in rows}
    assert len(by_name) == len(rows)
    for row in rows:  # shares are of the rows that they name
        if row.share is None:
            assert row.ceiling == ""
        else:
            part, _, what = row.ceiling.partition(", ")
            assert row.share == row.images_per_second / by_name[part, what].images_per_second
    assert by_name["loader", RUN].found["stall"] > 0
    assert [row.part for row in rows if row.ceiling] == [
        *["loader"] * len(OUTPUTS),
        *("step", "step", "fed", "fed", "evaluate", "evaluate"),
    ]
    pixels = by_name["pixels", "uint8, hardware_share 0"].found
    assert pixels["views"] >= COMPARED
    assert pixels["mean difference from the CPU's"] == pixels["largest"] == 0
    for precision in ("fp32", "bf16"):
        fed = by_name["fed", f"{precision}, loader's batches"]
        assert fed.ceiling == f"step, {precision}, same batch"
        assert fed.found["lost"] == 1 - fed.share
        step, demand = by_name["step", f"{precision}, same batch"], fed.images_per_second / fed.share
        assert step.ceiling == f"grouped, {precision}, same batch"
        assert fed.found["supply over demand"] == pytest.approx(by_name["loader", RUN].images_per_second / demand)
        # operations are those of the two networks; shares are of that precision's product
        product = by_name["matrix", f"{precision}, n × n"].found
        assert 0 < product["least"] <= product["TFLOP/s"] <= product["most"]
        ours = of_step([layer.multiply_adds for layer in plan(recipes.load("tiny").model, 1000)])
        for part, operations in (
            ("grouped", ours),
            ("step", ours),
            ("torchvision", of_step(plain_alexnet.multiply_adds())),
        ):
            row = by_name[part, f"{precision}, same batch"]
            assert row.found["TFLOP/s"] == pytest.approx(row.images_per_second * operations / 1e12)
            assert row.found["of the matrix rate"] == pytest.approx(row.found["TFLOP/s"] / product["TFLOP/s"])
        plain = by_name["torchvision", f"{precision}, same batch"].images_per_second
        assert step.found["times torchvision"] == step.images_per_second / plain

    # what each way makes of the batch, against what the grouped network makes of it in fp32
    assert "loss off" not in by_name["grouped", "fp32, same batch"].found
    for what, bound in (("fp32, same batch", 1e-4), ("fp32, same batch, same masks", 1e-4), ("bf16, same batch", 0.5)):
        step = by_name["step", what].found
        assert step["loss off"] < bound / 10
        assert step["gradient off"] < bound
        assert step["agrees"] == 1
    assert by_name["step", "bf16, same batch"].found["gradient off"] > 1e-3  # not the same, or it is no bfloat16
    plain, kept = by_name["step", "fp32, same batch"], by_name["step", "fp32, same batch, same masks"]
    assert plain.found["for masks"] == 1 - plain.images_per_second / kept.images_per_second
    for part, on in (("step", "same batch"), ("fed", "loader's batches")):
        one, other = by_name[part, f"bf16, {on}"], by_name[part, f"fp32, {on}"]
        assert one.found["times fp32"] == one.images_per_second / other.images_per_second
    for row in rows:
        if row.part in ("loader", "fed"):
            causes = [row.found[cause] for cause in ("reading", "decoding", "transfer")]
            assert row.found["stall"] == sum(causes)
            assert 0 <= min(causes) <= sum(causes) <= 1

    # as measured, then the facts and the table: nothing but what the record has
    measured, facts, table = out.strip().split("\n\n")
    assert measured.splitlines() == ["  ".join(filter(None, row.cells())) for row in rows]
    assert found.pop("repetitions") == REPETITIONS
    assert facts.splitlines() == [f"- {fact}" for fact in found.values()]
    assert found["command"].endswith("--markdown")
    assert found["pictures"].startswith(f"{BATCHES * BATCH:,}, 41 distinct")
    assert torch.__version__ in found["versions"]
    cells = [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in table.splitlines()]
    assert cells == [HEADER, ("---",) * len(HEADER), *(row.cells() for row in rows)]


def test_one_row_may_fail(dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """What is out of memory, cannot be decoded or imported is said in its row; the rows that need it do without."""
    said = "Error in MIXED operator,\nwith the following traceback:\nencountered:\n\nno decoder\nStacktrace"
    failing = {
        "_decode": RuntimeError(said),
        "_plain": torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
        "_step": torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
        "_fed": ModuleNotFoundError("No module named 'click'"),
        "_evaluate": ModuleNotFoundError("No module named 'click'"),
    }
    for name, error in failing.items():

        def fail(self: Bench, row: Row, *_: object, error: Exception = error) -> None:
            row.found["hardware_share"] = 0
            raise error

        monkeypatch.setattr(Bench, name, fail)
    main(words(dataset))
    table = capsys.readouterr().out.strip().split("\n\n")[-1].splitlines()
    assert [line.split()[0] for line in table] == ["part", *(part.split()[0] for part in PARTS)]
    reasons = [line.partition("not measured: ")[2].partition("  ")[0] for line in table]
    memory, module = "CUDA out of memory.", "No module named 'click'"
    assert reasons == ["", "no decoder", *[""] * 9, *[memory] * 7, *[module] * 4, *["one device"] * 4]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler, for what torch makes of it on a CPU")
def test_a_compiled_way_leaves_nothing_behind(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The code that a GPU runs, with a network of two layers: it agrees, and torch's settings are as before."""
    recipe, resets = tmp_path / "small.toml", list[bool]()
    order = 'order = ["conv1", "fc8"]\nsize = 40\nlayers.conv1 = { width = 8 }'
    recipe.write_text(f'base = "tiny"\n[model]\n{order}\n')
    monkeypatch.setitem(PLANS, "cpu", Plan((BATCH,), (0,), str(recipe)))
    reset = torch.compiler.reset
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(True) or reset())
    bench = Bench(of_images(dataset, BATCHES * BATCH, tmp_path / "part"), torch.device("cpu"), 0.01)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    bench._row("grouped", f"{FP32}, {DRAWN}", BATCH, bench._step, FP32)
    assert not resets
    way = Way("tf32", True, "segments")
    row = bench._row("step", f"{way}, {DRAWN}", BATCH, bench._step, way)
    assert row.not_measured == ""
    assert row.what == "tf32, channels_last, segments, same batch"
    assert (row.found["agrees"], row.found["gradient off"] < 1e-4) == (1, True)  # TF32 is of a GPU
    assert row.found["compiled in, s"] > 0
    assert len(resets) == 1
    assert before == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)


def test_a_way_that_cannot_be_compiled(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its row says why, not only that; the settings are as before."""

    def fail(*_: object, **__: object) -> None:
        torch.backends.cudnn.allow_tf32 = False
        raise BackendCompilerFailed(torch.compile, RuntimeError("no Triton\nhere"), None)

    before = torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(gpu_training.Training, "__init__", fail)
    bench = Bench(of_images(dataset, BATCHES * BATCH, tmp_path / "part"), torch.device("cpu"), 0.01)
    row = bench._row("step", "", BATCH, bench._step, Way("bf16", False, "graphs"))
    assert (row.rates, row.not_measured) == ([], "RuntimeError: no Triton")
    assert torch.backends.cudnn.allow_tf32 == before


def test_wrong_gradients_do_not_agree():
    right = {"loss": torch.tensor(2.0), "conv1.weight": torch.ones(3), "fc8.weight": torch.full((4,), 1e6)}
    assert gpu_training.apart(right, right) == (0, 0)
    loss, gradient = gpu_training.apart({**right, "conv1.weight": torch.zeros(3)}, right)
    assert (loss, gradient) == (0, 1)  # the worst layer, however small beside others
    assert max(gpu_bench.WITHIN.values()) < 1


def test_the_fastest_way_in_bf16_is_fed():
    bench = Bench.__new__(Bench)
    bench._ways, bench.done = WAYS["cuda"], []
    assert {FP32, BF16} <= set(BESIDE["cuda"]) <= set(bench._ways)
    assert {way.precision for way in bench._ways} == set(gpu_bench.WITHIN) == set(PRECISIONS)
    assert {way.compile for way in bench._ways} == set(COMPILED)
    assert bench._fastest_bf16(8).precision == "bf16"  # where none could be measured
    for rate, way in enumerate(bench._ways):
        rate = 99.0 if way == FP32 else float(rate % 7)
        bench.done.append(Row("step", f"{way}, {DRAWN}", 8, [rate], rate))
    assert str(bench._fastest_bf16(8)) == "bf16, channels_last, segments"


def test_only_the_fastest_of_equal_rows_is_in_the_table():
    bench = Bench.__new__(Bench)
    bench.done = [Row("decode", "uint8", 8, [rate], rate) for rate in (1.0, 3.0, 2.0)]
    bench.done.append(Row("decode", "uint8", 9, not_measured="no decoder"))
    assert bench.fastest("decode", "uint8", 8) is bench.done[1]
    assert bench.fastest("decode", "uint8", 9) is bench.done[3]


def test_pictures_without_a_label(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They are decoded and not trained on: a label of −1 would leave the GPU unusable for the rows that follow."""
    data = of_images(dataset, BATCHES * BATCH, tmp_path / "part")
    records = data.samples("train")
    records["label"][-1] = -1
    monkeypatch.setattr(Manifest, "samples", lambda *_: records)
    bench = Bench(data, torch.device("cpu"), 0.01)
    row = bench._row("fed", "", BATCH, bench._fed, FP32)
    assert (row.rates, row.not_measured) == ([], "there are training pictures without a label")


def test_without_a_device(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    main([])
    assert capsys.readouterr().out == "no CUDA device; --device cpu runs the same, smaller\n"


def test_another_device(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit) as ended:
        main(["--device", "cuda:2"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in ("--device", "cuda:2", "cuda:0", "cuda:1", "cpu"):
        assert word in error


def test_no_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(words(tmp_path / "missing"))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert str(tmp_path / "missing") in error
    assert error.count("\n") == 1
