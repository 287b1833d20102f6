"""tools/gpu.py on the CPU: the code that a GPU runs, and that its record says what its table says. No times."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch

from pipeline.manifest import Manifest
from tools.gpu import BATCHES, COMPARED, HEADER, OUTPUTS, PLANS, REPETITIONS, Bench, Row, main
from tools.peers.datasets import of_images

((BATCH,), _, _) = PLANS["cpu"]
TIMED = ("decode", "loader", "step", "fed")


def words(dataset: Path, *more: object) -> list[str]:
    return [str(dataset), "--device", "cpu", "--seconds", "0.05", *map(str, more)]


def test_every_row_is_measured(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "gpu.json"
    main(words(dataset, "--json", file, "--markdown"))
    out = capsys.readouterr().out
    found = json.loads(file.read_text())
    rows = [Row(**row) for row in found.pop("rows")]
    parts = ["decode", *["loader"] * len(OUTPUTS), "pixels", "step", "step", "fed", "two devices", "two devices"]
    assert [row.part for row in rows] == parts
    for row in rows:
        assert row.batch == BATCH
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
    assert [row.part for row in rows if row.ceiling] == ["loader"] * len(OUTPUTS) + ["step", "fed"]
    pixels, fed = by_name["pixels", "uint8, hardware_share 0"].found, by_name["fed", "loader's batches"]
    assert pixels["views"] >= COMPARED
    assert pixels["mean difference from the CPU's"] == pixels["largest"] == 0
    assert fed.found["lost"] == 1 - fed.share
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
        "_step": torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
        "_fed": ModuleNotFoundError("No module named 'click'"),
    }
    for name, error in failing.items():

        def fail(self: Bench, row: Row, *_: object, error: Exception = error) -> None:
            row.found["hardware_share"] = 0
            raise error

        monkeypatch.setattr(Bench, name, fail)
    main(words(dataset))
    table = capsys.readouterr().out.strip().split("\n\n")[-1].splitlines()
    assert [line.split()[0] for line in table] == [
        "part",
        "decode",
        *["loader"] * 5,
        "pixels",
        *"step step fed two two".split(),
    ]
    reasons = [line.partition("not measured: ")[2].partition("  ")[0] for line in table]
    memory, module = "CUDA out of memory.", "No module named 'click'"
    assert reasons == ["", "no decoder", *[""] * 6, memory, memory, module, *["one device"] * 2]


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
    row = bench._row("fed", "", BATCH, bench._fed)
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
