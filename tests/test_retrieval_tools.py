"""The tools that measure retrieval: what they print, and that what they made is deleted."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from retrieved import UNITS, index, save_run
from tools.retrieval_bench import main as bench
from tools.retrieval_recall import main as recall
from trainer.retrieval import codes


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "STEPS", 5)


def test_searches_over_made_up_features_are_timed(tmp_path: Path):
    result = CliRunner().invoke(bench, ["--rows", "300", "--folder", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "300 rows of 4,096 float16, 128 bits; 5 queries" in result.output
    assert result.output.count("from the disk") == result.output.count("in memory") == 2
    assert "codes found 100 %" in result.output  # all 300 are candidates
    assert os.listdir(tmp_path) == []
    missing = CliRunner().invoke(bench, ["--folder", str(tmp_path / "none")])
    assert (missing.exit_code, missing.output) == (2, f"Error: --folder {tmp_path / 'none'}: no such directory\n")


def test_codes_of_other_kinds_are_compared(dataset: Path, tmp_path: Path):
    save_run(tmp_path / "run", dataset)
    assert index(tmp_path / "run", dataset).exit_code == 0
    result = CliRunner().invoke(recall, [str(tmp_path / "run"), str(dataset)])
    assert result.exit_code == 0, result.output
    head, *lines = result.output.splitlines()
    assert head == f"41 rows of {UNITS}, 9 queries; 6 codes, 6 codes"
    assert [line.split()[0] for line in lines] == ["32"] * 3 + ["64"] * 2 + ["128"] * 2 + ["256"] * 2
    assert all(0 <= float(share) <= 100 for line in lines for share in line.split()[-2:])
