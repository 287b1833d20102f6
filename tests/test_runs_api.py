"""Runs over HTTP: what the server says of a run, against the trainer's own readers and the bytes of its files."""

import json
import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from pipeline import manifest
from pipeline.service.curves import MOST
from pipeline.service.site import Site
from pipeline.service.web.runs import metrics
from runs import train, trainer
from serving import Server, served
from trainer import checkpoint as checkpoints
from trainer.metrics import read

STEPS, PNG = 7, b"\x89PNG\r\n\x1a\nnot a picture"
CSP = "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"


@pytest.fixture(name="trained", scope="module")
def a_run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server's folder with a data set, and the run `r` of it that was evaluated. Read only, but for other runs."""
    root = tmp_path_factory.mktemp("site")
    data, run = root / "datasets/d", root / "runs/r"
    shutil.copytree(dataset, data)
    done = train(data, run, STEPS, "train.checkpoint_every=2", "train.keep=2")
    assert done.exit_code == 0, done.output
    done = trainer("evaluate", "--data", data, "--checkpoint", run)
    assert done.exit_code == 0, done.output
    (run / "figures").mkdir()
    (run / "figures/kernels.png").write_bytes(PNG)
    (run / "report.html").write_text("<script>alert(1)</script>")
    return root


@pytest.fixture(name="server", scope="module")
def serving(trained: Path) -> Iterator[Server]:
    with served(trained) as server:
        yield server


def answer(server: Server, path: str, **params: Any) -> Any:
    return server.client.get(f"/v1/runs{path}", params=params).raise_for_status().json()


def copied(trained: Path, name: str) -> Path:
    """Return a copy of the run, to be changed, beside it."""
    return Path(shutil.copytree(trained / "runs/r", trained / "runs" / name))


def test_a_run_is_what_the_trainer_says(server: Server, trained: Path):
    run, lines = trained / "runs/r", read(trained / "runs/r")
    (listed,) = (one for one in answer(server, "")["runs"] if one["name"] == "r")
    view = answer(server, "/r")
    assert listed == {key: view[key] for key in view if key not in ("recipe", "history", "evaluations")}
    last, validations = lines[-2], [line for line in lines if line["kind"] == "validation"]
    assert (last["kind"], lines[-1]["kind"]) == ("train", "validation")
    best = min(validations, key=lambda line: line["top1_error"])
    newest = checkpoints.load(run)
    assert view["name"] == "r"
    assert (view["state"], view["job"], view["error"]) == (None, None, None)
    assert (view["dataset"], view["identity"]) == ("d", manifest.load(trained / "datasets/d").identity)
    assert (view["step"], view["steps"]) == (newest.step, newest.progress["steps"]) == (STEPS, STEPS)
    for key in ("loss", "lr", "epoch"):
        assert view[key] == last[key], key
    for key in ("images_per_second", "stall"):
        assert view[key] == last["time"][key], key
    for key in ("top1_error", "top5_error"):
        assert view[key] == validations[-1][key], key
    assert view["best"] == {key: best[key] for key in ("step", "top1_error")}
    assert view["recipe"] == json.loads((run / "recipe.json").read_text())
    assert view["history"] == json.loads((run / "history.json").read_text())
    evaluated = json.loads((run / "evaluation.json").read_text())
    (evaluation,) = view["evaluations"]
    assert evaluation["errors"] == {key: evaluated[key] for key in ("centre", "ten")}
    assert evaluation["step"] == STEPS
    assert view["report"] is True


def test_checkpoints_are_those_of_the_folder(server: Server, trained: Path):
    run = trained / "runs/r"
    views = {view["file"]: view for view in answer(server, "/r/checkpoints")["checkpoints"]}
    files = [*checkpoints.files(run), checkpoints.best_file(run)]
    assert sorted(views) == sorted(file.name for file in files)
    best = checkpoints.load(checkpoints.best_file(run)).step
    for file in files:
        step, view = checkpoints.load(file).step, views[file.name]
        assert (view["step"], view["bytes"], view["best"]) == (step, file.stat().st_size, step == best)
        data, path = file.read_bytes(), f"/v1/runs/r/checkpoints/{file.name}"
        whole = server.client.get(path)
        assert whole.content == data
        part = server.client.get(path, headers={"Range": "bytes=1000-", "If-Range": whole.headers["etag"]})
        assert (part.status_code, part.content) == (206, data[1000:])
        assert server.client.get(path, headers={"If-None-Match": whole.headers["etag"]}).status_code == 304
        beyond = server.client.get(path, headers={"Range": f"bytes={len(data)}-"})
        assert (beyond.status_code, beyond.headers["content-type"]) == (416, "application/problem+json")


def test_figures_and_the_page(server: Server):
    assert answer(server, "/r/figures") == {"figures": [{"file": "kernels.png", "bytes": len(PNG)}]}
    figure = server.client.get("/v1/runs/r/figures/kernels.png")
    assert (figure.content, figure.headers["content-type"]) == (PNG, "image/png")
    page = server.client.get("/v1/runs/r/report")
    assert page.text == "<script>alert(1)</script>"
    assert page.headers["content-security-policy"] == CSP


def test_metrics_are_the_lines_of_the_file(server: Server, trained: Path):
    data = (trained / "runs/r/metrics.jsonl").read_bytes()
    lines = data.splitlines(keepends=True)
    assert server.client.get("/v1/runs/r/metrics").content == data
    part = server.client.get("/v1/runs/r/metrics", headers={"Range": "bytes=10-99"})
    assert (part.status_code, part.content) == (206, data[10:100])
    for after in range(STEPS + 1):
        newer = server.client.get("/v1/runs/r/metrics", params={"after_step": after}).content
        assert newer == b"".join(line for line in lines if json.loads(line)["step"] > after)


@pytest.mark.parametrize(
    "path",
    [
        *("nothing", "..", "%2e%2e", "r%2f..", "/checkpoints/step-1.safetensors", "r/checkpoints/recipe.json"),
        *("r/checkpoints/..%2frecipe.json", "r/figures/..%2f..%2f..%2fpenstock.db", "r/figures/kernels.png%00"),
        *("r/checkpoints/%2fetc%2fpasswd", "r/recipe.json", "r/figures/..%5creport.html"),
    ],
)
def test_nothing_else_is_served(server: Server, path: str):
    refused = server.client.get(f"/v1/runs/{path}")
    assert refused.status_code == 404
    assert refused.headers["content-type"] == "application/problem+json"


def test_links_are_not_followed(server: Server, trained: Path, tmp_path: Path):
    run, secret = copied(trained, "linked"), tmp_path / "secret"
    secret.write_bytes(b"secret")
    (run / "checkpoints/step-00000099.safetensors").symlink_to(secret)
    (run / "report.html").unlink()
    (run / "report.html").symlink_to(secret)
    shutil.move(run / "figures", tmp_path / "figures")
    (run / "figures").symlink_to(tmp_path / "figures")
    os.mkfifo(run / "checkpoints/step-00000100.safetensors")
    shutil.copytree(trained / "runs/r", tmp_path / "run")
    (trained / "runs/outside").symlink_to(tmp_path / "run")
    assert answer(server, "/linked/figures") == {"figures": []}
    assert answer(server, "/linked")["report"] is False
    steps = [view["step"] for view in answer(server, "/linked/checkpoints")["checkpoints"]]
    assert max(steps) == STEPS
    assert "outside" not in [one["name"] for one in answer(server, "")["runs"]]
    names = [f"linked/checkpoints/step-{step:08}.safetensors" for step in (99, 100)]
    for path in (*names, "linked/report", "linked/figures/kernels.png", "outside", "outside/report"):
        assert server.client.get(f"/v1/runs/{path}").status_code == 404, path


def test_a_run_that_cannot_be_read_hides_no_other(server: Server, trained: Path):
    """It is a folder, here, in the place of a file; for root any file can be read."""
    (trained / "runs/shut/metrics.jsonl").mkdir(parents=True)
    listed = {one["name"]: one for one in answer(server, "")["runs"]}
    assert "metrics.jsonl: is a directory" in listed["shut"]["error"]
    assert listed["r"]["error"] is None
    page = server.client.get("/runs", headers={"Accept": "text/html"})
    assert page.status_code == 200
    assert "is a directory" in page.text
    shutil.rmtree(trained / "runs/shut")


def test_metrics_that_grow(trained: Path):
    """A torn line does not count until it is whole; a file that a resumed run has written anew is read anew."""
    run, site = copied(trained, "grows"), Site(trained)
    path, whole = run / "metrics.jsonl", read(run)

    def shown() -> list[dict[str, Any]]:
        return metrics(site, "grows")

    assert [line["step"] for line in shown()] == [line["step"] for line in whole]
    assert shown()[0] == {key: value for key, value in whole[0].items() if key != "layers"}
    line = json.dumps(next(line for line in whole if line["kind"] == "train") | {"step": STEPS + 1})
    with open(path, "a") as file:
        file.write(line[:50])
        file.flush()
        assert len(shown()) == len(whole)
        file.write(line[50:] + "\n")
    assert [line["step"] for line in metrics(site, "grows", STEPS)] == [STEPS + 1]
    anew = path.with_suffix(".tmp")
    anew.write_text("".join(json.dumps(line) + "\n" for line in whole if line["step"] <= 3))
    os.replace(anew, path)
    assert {line["step"] for line in shown()} == {1, 2, 3}
    path.unlink()
    assert shown() == []


def test_metrics_of_a_long_run_are_thinned(trained: Path):
    run, site = copied(trained, "long"), Site(trained)
    line = next(line for line in read(run) if line["kind"] == "train")
    count = 5 * MOST + 1
    text = "".join(json.dumps(line | {"step": step, "loss": step}) + "\n" for step in range(1, count + 1))
    (run / "metrics.jsonl").write_text(text)
    lines = metrics(site, "long")
    steps = [line["step"] for line in lines]
    assert MOST <= len(steps) <= 2 * MOST
    assert (steps[0], steps[-1]) == (1, count)
    assert steps == [line["loss"] for line in lines]
    assert len({later - earlier for earlier, later in pairwise(steps[:-1])}) == 1  # even, but for the last
    assert metrics(site, "long", count - 1)[0]["step"] == count


def test_damaged_files(server: Server, trained: Path):
    """The rest of the run is shown, with the reason."""
    run = copied(trained, "damaged")
    number = len(read(run)) + 1
    checkpoint = checkpoints.files(run)[-1]
    checkpoint.write_bytes(b"\xff" * 100)
    checkpoints.best_file(run).write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with open(run / "metrics.jsonl", "a") as file:
        file.write("nonsense\n")
    view = answer(server, "/damaged")
    assert view["step"] == STEPS
    assert view["error"].startswith(f"metrics.jsonl: line {number} is damaged (")
    steps = {view["file"]: view["step"] for view in answer(server, "/damaged/checkpoints")["checkpoints"]}
    assert steps[checkpoint.name] == STEPS
    assert steps["best.safetensors"] is None
    (run / "metrics.jsonl").unlink()
    for text in ("[", '{"train": {"steps": "many"}}'):
        (run / "recipe.json").write_text(text)
        view = answer(server, "/damaged")
        assert view["error"].startswith("recipe.json: is damaged (")
        assert (view["recipe"], view["loss"]) == ({}, None)


def test_the_state_is_that_of_the_newest_training(server: Server, trained: Path):
    copied(trained, "resumed")
    job = server.submit("train", dataset="d", run="resumed", resume=True, set={"train.steps": "9"})
    server.client.post(f"/v1/jobs/{job['id']}/cancel").raise_for_status()
    assert server.ended(job["id"])["state"] == "cancelled"
    view = answer(server, "/resumed")
    assert (view["state"], view["job"], view["dataset"]) == ("cancelled", job["id"], "d")
