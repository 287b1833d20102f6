"""The OpenAPI document against the server: made-up requests of every operation, whose answers have to fit it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from serving import served

CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")


@pytest.mark.parametrize(
    ("examples", "least", "seconds"), [(4, 60, 120), pytest.param(350, 5_000, 1800, marks=pytest.mark.slow)]
)
def test_no_request_breaks_the_server(tmp_path: Path, small: Path, examples: int, least: int, seconds: int):
    """Streams of events do not end by themselves, and are left out."""
    shutil.copytree(small, tmp_path / "datasets/d")
    (tmp_path / "raw").mkdir()
    with served(tmp_path, "--raw-root", tmp_path / "raw", "--slots", "feed=1") as server:
        line = [Path(sys.executable).parent / "schemathesis", "run", f"{server.url}/v1/openapi.json", "--no-color"]
        line += ["--phases", "fuzzing", "--max-examples", examples, "--checks", ",".join(CHECKS)]
        line += [
            "--exclude-path-regex",
            "events$",
            "--request-timeout",
            "20",
            "--seed",
            "20",
            "--generation-database",
            "none",
        ]
        hooks = {"SCHEMATHESIS_HOOKS": "openapi_hooks", "PYTHONPATH": str(ROOT / "tests"), "PYTHONHASHSEED": "0"}
        words = [str(word) for word in line]
        result = subprocess.run(
            words, env=os.environ | hooks, capture_output=True, text=True, timeout=seconds, check=False, cwd=tmp_path
        )
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
        count = re.search(r"([0-9,]+) generated, ([0-9,]+) passed", result.stdout)
        assert count, result.stdout[-3000:]
        assert count[1] == count[2]
        assert int(count[1].replace(",", "")) >= least
        assert server.client.get("/v1/jobs").status_code == 200
        assert "Traceback" not in server.errors()
