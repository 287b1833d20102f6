"""The dashboard's pages, over a real server, without a browser: parsed as HTML, and followed link by link."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
import pytest
from jinja2 import Undefined
from jinja2.utils import missing

from conftest import ROOT, picture
from markup import Page
from pipeline import manifest
from pipeline.service import tokens
from pipeline.service.database import Database, jobs
from pipeline.service.queue import Queue, Slots
from pipeline.service.scheduler import Scheduler
from pipeline.service.site import Site
from pipeline.service.web import app, pages
from pipeline.service.web.context import Service
from serving import Server, served

HOSTILE = '<script>alert("1")</script> & <b>'
CLASS = "a<script>&'b"  # a folder's name has no slash
FILE = "<img src=x onerror=alert(1)>.jpg"
SETTING = {"size": "256", "samples_per_shard": "8", "holdout": "0.2", "max_skipped": "5"}


def page(server: Server, path: str, status: int = 200) -> Page:
    answer = server.client.get(path, headers={"Accept": "text/html"})
    assert answer.status_code == status, f"{path}: {answer.text[:500]}"
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    found = Page(answer.text)
    found.check()
    return found


def post(server: Server, path: str, **fields: str) -> str:
    """Send a form, which is accepted, and return where it leads to."""
    answer = server.client.post(path, data=fields, headers={"Origin": server.url})
    assert answer.status_code == 303, answer.text
    return answer.headers["location"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 30 pictures of two classes, and two files that are none, one by a hostile name."""
    root = tmp_path_factory.mktemp("pages") / "raw"
    for number in range(30):
        path = root / (CLASS, "plain")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(path.name, 40, 44).save(path)
    (root / CLASS / FILE).write_bytes(b"no picture")
    (root / "plain" / "empty.jpg").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def server(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server that has a data set, a run with metrics, a job that failed, and one that runs."""
    root = tmp_path_factory.mktemp("site")
    run = root / "runs" / "drawn"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics()))
    with served(root, "--raw-root", raw, "--slots", "cpu=1") as server:
        server.submit("build", dataset="d", raw=str(raw), **SETTING)
        failing = server.submit("evaluate", dataset="d", run="drawn")
        server.ended(failing["id"])
        log = root / "jobs" / str(failing["id"]) / "log"
        log.write_bytes(log.read_bytes() + f"{HOSTILE}\n".encode())
        insert(
            server, "evaluate", "succeeded", errors={"centre": {"top1_error": 12.34, "top5_error": 5.67, "samples": 6}}
        )
        insert(
            server,
            "verify",
            "failed",
            failed=1,
            failures=[{"file": HOSTILE, "reason": HOSTILE}],
            unit="shards",
            total=4,
        )
        insert(server, "figures", "cancelled", task="pictures", done=3, total=9, unit="images", rate=1.5, eta=4.0)
        server.submit("feed")
        yield server


def insert(server: Server, kind: str, state: str, **progress: Any) -> None:
    """Put a job that is over into the server's database."""
    data = Database(f"sqlite:///{server.root}/penstock.db")
    params = {"kind": kind, "dataset": "d"} | ({} if kind == "verify" else {"run": "drawn"})
    times = {"created": 1e9, "started": 1e9 + 1, "ended": 1e9 + 9_000}
    values = {"kind": kind, "state": state, "target": "elsewhere", "params": params, "progress": progress, "attempt": 2}
    with data.writing() as connection:
        connection.execute(jobs.insert().values(reason=HOSTILE if state == "failed" else None, **values, **times))
    data.close()


def metrics() -> list[dict]:
    """Return the lines of a run's metrics.jsonl: 60 of training and 3 validations."""
    lines: list[dict] = []
    for step in range(1, 61):
        stalls = {"reading": 0.0, "decoding": 0.05, "transfer": 0.0, "workers": 0.0}
        time = {"images_per_second": 900 + step, "stall": 0.05, "stall_by": stalls}
        lines.append(
            {"kind": "train", "step": step, "epoch": 0, "lr": 0.01, "loss": 7 / step, "time": time, "layers": {}}
        )
        if step > 9:  # the first lines are of an earlier version, which did not count errors
            lines[-1]["top1_error"] = 94 - step / 2
        if step % 20 == 0:
            errors = {"top1_error": 90 - step / 2, "top5_error": 50 - step / 2, "nll": 7 / step, "unreadable": 0}
            lines.append({"kind": "validation", "step": step, "epoch": 0, "samples": 6, **errors})
    return lines


def test_every_link_of_every_page_leads_somewhere(server: Server):
    """From the overview on, over pages, pictures and files; each page is checked."""
    seen, waiting = set(), ["/", "/login"]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        with server.client.stream("GET", path, headers={"Accept": "text/html"}) as answer:
            assert answer.status_code == 200, path
            text = answer.read().decode() if answer.headers["content-type"].startswith("text/html") else ""
        if not path.startswith("/v1"):
            head = server.client.head(path)
            assert (head.status_code, head.content) == (200, b""), path
        if text and not path.startswith("/v1"):
            found = Page(text)
            found.check()
            links = [element["href"] for element in found.all("a", "link")] + [
                element["src"] for element in found.all("img", "script")
            ]
            for link in links:
                parts = urlsplit(urljoin(server.url + path, link))
                assert f"{parts.scheme}://{parts.netloc}" == server.url, link
                if "draw=" not in parts.query or len(seen) < 30:
                    waiting.append(parts._replace(scheme="", netloc="", fragment="").geturl())
    for path in (
        "/jobs",
        "/datasets/d",
        "/runs/drawn",
        "/workers",
        "/new",
        "/docs",
        "/v1/openapi.json",
        "/static/style.css",
    ):
        assert any(path == urlsplit(one).path for one in seen), path


def test_the_overview_says_what_runs_what_waits_and_why_something_failed(server: Server, raw: Path):
    verify = server.submit("verify", dataset="d", quick=True)
    later = server.submit("build", dataset="other", raw=str(raw))
    server.until(lambda: server.job(later["id"])["waits_for"] or server.job(later["id"])["state"] != "queued")
    reason = server.job(2)["reason"]
    words = page(server, "/").words
    assert "Feed" in words
    assert reason in words
    waits = server.job(later["id"])["waits_for"]
    assert waits is None or waits in page(server, f"/jobs/{later['id']}").words
    for job in (verify, later):
        server.ended(job["id"])


class Known(Undefined):
    """A name that a template asks for in vain: no attribute of a value that always has the same ones."""

    def __init__(self, hint: str | None = None, obj: Any = missing, name: str | None = None, *more: Any) -> None:
        assert obj is missing or isinstance(obj, Mapping), f"{type(obj).__name__} has no {name}"
        super().__init__(hint, obj, name, *more)


def test_the_overview_says_what_a_device_waits_for(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of jobs that stay as they are: no scheduler runs."""
    monkeypatch.setattr(pages.PAGES, "undefined", Known)
    site, data = Site(tmp_path), Database(f"sqlite:///{tmp_path / 'penstock.db'}")
    site.make()
    shutil.copytree(server.root / "datasets/d", site.datasets / "d")
    (site.runs / "r").mkdir()
    (site.runs / "r/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics()))
    stall = "stall 23.1 % (decoding: more CPU cores)"
    progress = {"total": 60, "done": 30, "unit": "steps", "stall": 0.231, "stall_text": stall}
    with data.writing() as connection:
        for state in ("running", "queued", "failed", "succeeded", "cancelled"):
            params = {"kind": "train", "dataset": "d", "run": "r"}
            values = {"kind": "train", "state": state, "target": "r", "params": params, "created": 1e9, "started": 1e9}
            connection.execute(jobs.insert().values(progress=progress, attempt=1, **values))
    queue = Queue(site, data, Slots())
    web = app.create(Service(site, data, queue, Scheduler(queue, data, 1)))

    async def asked() -> dict[str, str]:
        paths = ["/", "/jobs", "/jobs/1", "/jobs/3", "/datasets", "/datasets/d", "/runs", "/runs/r", "/workers", "/new"]
        transport, html = httpx.ASGITransport(web), {"Accept": "text/html"}
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=html) as client:
            return {path: (await client.get(path)).raise_for_status().text for path in paths}

    texts = asyncio.run(asked())
    for path in ("/", "/jobs/1"):
        assert Page(texts[path]).words.count(stall) == 1, path
    assert "more CPU cores" not in texts["/jobs/3"]  # it is over
    data.close()


def test_text_of_users_is_never_markup(server: Server):
    job, data = page(server, "/jobs/2"), page(server, "/datasets/d")
    assert HOSTILE in job.words
    assert CLASS in data.words
    assert FILE in data.words
    assert FILE in page(server, "/jobs/1").words
    answer = page(server, f"/jobs/{HOSTILE.replace('/', '')}", 422)
    assert "<b>" in answer.words


def test_jobs_of_other_kinds_are_shown_with_what_they_found(server: Server):
    assert "12.3 %" in page(server, "/jobs/3").words
    verify = page(server, "/jobs/4").words
    assert verify.count(HOSTILE) >= 3  # the reason, and of a file its name and what is wrong with it
    assert "1 failed" in verify
    cancelled = page(server, "/jobs/5").words
    assert "3 of 9 images" in cancelled
    assert "left" not in cancelled
    assert "attempt" in cancelled.lower()


def test_a_build_is_shown_with_its_shards_and_what_it_skipped(server: Server):
    found = page(server, "/jobs/1")
    shards = server.job(1)["progress"]["shards"]
    cells = [element for element in found.all("rect") if element.get("class") == "done"]
    assert [len(cells)] * 2 == shards
    assert "penstock build" in found.words
    (bar,) = found.all("progress")
    assert bar["max"] == bar["value"] == "32"
    assert bar["aria-label"]


def test_a_run_shows_its_curves_and_what_the_device_waits_for(server: Server):
    found = page(server, "/runs/drawn")
    assert "decoding" in found.words
    assert "5.0 %" in found.words
    assert f"{min(line['top1_error'] for line in metrics() if 'top1_error' in line):.1f} %" in found.words
    names = {element["class"] for element in found.all("polyline")}
    assert names == {"c0", "c1", "c2"}
    assert "top-1 in training 64 %" in found.words


def test_samples_are_drawn_anew_by_a_link(server: Server):
    def drawn(draw: int, split: str = "train") -> list[str]:
        images = page(server, f"/datasets/d?draw={draw}&split={split}&epoch=7").all("img")
        return [image["src"] for image in images if "/samples/" in image["src"]]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert all(f"/samples/val/{i}/" in " ".join(drawn(1, "val")) for i in range(2))
    assert all(source.endswith(("/stored", "/view?epoch=7")) for source in drawn(1))
    page(server, "/datasets/d?split=test", 404)


@pytest.mark.proof
def test_what_a_data_set_says_of_its_use_is_true(server: Server, tmp_path: Path):
    """The programs on its page run as they stand, but for the name of the package, and that they come to an end."""
    texts = re.findall("<pre[^>]*><code>(.*?)</code>", server.client.get("/datasets/d").text, re.DOTALL)
    loader, web = (unescape(text) for text in texts if text.startswith(("from penstock", "import webdataset")))
    loader = loader.replace("penstock.pipeline", "pipeline").replace(
        "in loader:", "in __import__('itertools').islice(loader, 2):"
    )
    (curl,) = (unescape(text).split() for text in texts if text.startswith("curl"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    outputs = []
    for command in ([sys.executable, "-c", loader], [sys.executable, "-c", web], curl):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.splitlines())
    data = manifest.load(server.root / "datasets/d")
    number = data.splits["train"].samples
    assert outputs[0] == [f"torch.Size([{n}, 3, 224, 224]) torch.Size([{n}])" for n in (16, number - 16)]
    assert len(outputs[1]) == number
    assert (tmp_path / "train-000000.tar").read_bytes() == (
        server.root / "datasets/d/train/train-000000.tar"
    ).read_bytes()


def test_a_damaged_sample_hides_no_other(server: Server, raw: Path):
    """Nor does a split without training pictures, or a data set of whole ones, lead to pictures that are not there."""
    data = manifest.load(server.root / "datasets/d")
    shutil.copytree(server.root / "datasets/d", server.root / "datasets/hurt")
    first = data.samples("train")[0]
    with open(server.root / "datasets/hurt" / data.splits["train"].shards[first["shard"]].name, "r+b") as shard:
        shard.seek(int(first["offset"]) + 100)
        shard.write(b"\0" * 50)
    answers = [page(server, f"/datasets/hurt?draw={draw}") for draw in range(8)]
    numbers = [(one.words.count("damaged at sample 0"), len(one.all("figure"))) for one in answers]
    assert (1, 12 - 1 + 4) in numbers
    assert (0, 12 + 4) in numbers
    options = {"raw": str(raw), "crop": "none", "size": 40, "max_skipped": "5"}
    assert server.ended(server.submit("build", dataset="whole", **options)["id"])["state"] == "succeeded"
    images = [image["src"] for image in page(server, "/datasets/whole").all("img")]
    assert all(server.client.get(image).status_code == 200 for image in images)
    assert len([image for image in images if image.endswith("/stored")]) == 12


def test_forms_make_the_jobs_that_they_say(server: Server, raw: Path):
    build = {"raw": str(raw), "dataset": "formed", "layout": "", "exif": "apply", "allow_incomplete": "on", **SETTING}
    first = post(server, "/new/build", key="k1", **build)
    assert post(server, "/new/build", key="k1", **build) == first  # a form that is sent twice
    made = server.job(int(first.rpartition("/")[2]))["params"]
    expected = {"kind": "build", "dataset": "formed", "raw": str(raw), "exif": "apply", "allow_incomplete": True}
    assert expected.items() <= made.items()
    assert made["size"] == 256
    assert made["holdout"] == 0.2
    assert "layout" not in made
    train = post(
        server,
        "/new/train",
        dataset="formed",
        run="r",
        recipe="tiny",
        set="train.steps=3\r\n optim.lr = 1",
        feed="a:1, b:2",
    )
    params = server.job(int(train.rpartition("/")[2]))["params"]
    assert params["set"] == {"train.steps": "3", "optim.lr": "1"}
    assert params["feed"] == ["a:1", "b:2"]
    assert post(server, f"{train}/cancel") == train
    assert server.ended(int(train.rpartition("/")[2]))["state"] == "cancelled"
    again = post(server, f"{train}/retry")
    assert server.job(int(again.rpartition("/")[2]))["params"] == params
    post(server, f"{again}/cancel")
    server.ended(int(first.rpartition("/")[2]))


@pytest.mark.parametrize(
    ("kind", "fields", "field", "words"),
    [
        ("build", {"raw": "/etc", "dataset": "x", "size": "64"}, "raw", "/etc: not below a folder of raw images"),
        ("build", {"raw": "RAW", "dataset": "../x", "size": "64"}, "dataset", "dataset '../x'"),
        ("train", {"dataset": "d", "run": "r", "set": HOSTILE}, "set", HOSTILE),
    ],
)
def test_a_form_that_is_refused_keeps_its_values(
    server: Server, raw: Path, kind: str, fields: dict, field: str, words: str
):
    numbers = [job["id"] for job in server.client.get("/v1/jobs").json()["jobs"]]
    fields = {name: str(raw) if value == "RAW" else value for name, value in fields.items()}
    answer = server.client.post(f"/new/{kind}", data=fields, headers={"Origin": server.url})
    assert answer.status_code == 422
    found = Page(answer.text)
    found.check()
    assert words in found.words
    kept = {one["name"]: one for one in found.all("input", "textarea") if one.get("id", "").startswith(kind)}
    assert all(kept[name].get("value", value) == value for name, value in fields.items())
    assert [name for name, one in kept.items() if "aria-invalid" in one] == [field]
    assert [job["id"] for job in server.client.get("/v1/jobs").json()["jobs"]] == numbers


def test_an_empty_server_says_how_to_begin_and_readers_see_no_buttons(tmp_path: Path):
    """A session of each scope sees the same pages; of a page without any, the way leads to the login and back."""
    data = Database(f"sqlite:///{tmp_path}/penstock.db")
    texts = {scope: tokens.create(data, scope)[1] for scope in ("read", "write")}
    data.close()
    with served(tmp_path, "--require-token") as guarded:
        headers = {"Accept": "text/html", "Origin": guarded.url}
        answer = guarded.client.get("/jobs?state=failed", headers=headers)
        assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=%2Fjobs%3Fstate%3Dfailed")
        found = page(guarded, answer.headers["location"])
        (kept,) = (field["value"] for field in found.all("input") if field["type"] == "hidden")
        assert kept == "/jobs?state=failed"
        wrong = guarded.client.post("/login", data={"token": "pst_wrong", "next": kept}, headers=headers)
        assert "wrong" in page(guarded, wrong.headers["location"]).words
        buttons = {}
        for scope in ("write", "read"):
            answer = guarded.client.post("/login", data={"token": texts[scope], "next": kept}, headers=headers)
            assert answer.headers["location"] == kept
            if scope == "write":
                words = page(guarded, "/").words
                assert f"PENSTOCK_URL={guarded.url}" in words
                assert "penstock submit build" in words
                assert "penstock serve --raw-root" in words
                job = guarded.ended(int(post(guarded, "/new/verify", dataset="none").rpartition("/")[2]))["id"]
            paths = ("/", "/jobs", "/datasets", "/runs", "/workers", f"/jobs/{job}")
            pages = [page(guarded, path) for path in paths]
            buttons[scope] = [
                form["action"] for one in pages for form in one.all("form") if form.get("method") == "post"
            ]
            buttons[scope] += [
                link["href"] for one in pages for link in one.all("a") if link["href"].startswith("/new")
            ]
        assert {*buttons["read"]} == {"/logout"}
        assert {*buttons["write"]} >= {"/logout", f"/jobs/{job}/retry", "/new", "/new#build"}
        page(guarded, "/new", 403)
        answer = guarded.client.post(f"/jobs/{job}/retry", headers=headers)
        assert answer.status_code == 403
        guarded.client.post("/logout", headers=headers)
        assert guarded.client.get("/", headers=headers).status_code == 303


def test_what_is_no_form_is_refused(server: Server):
    headers = {"Origin": server.url, "Accept": "text/html", "Content-Type": "application/x-www-form-urlencoded"}
    for body in (b"raw=\xff\xfe", b"&".join(b"a=1" for _ in range(500))):
        assert server.client.post("/new/build", content=body, headers=headers).status_code == 400
    assert server.client.post("/new/nothing", data={"a": "1"}, headers=headers).status_code == 404
    page(server, "/jobs/999", 404)
    page(server, "/nothing", 404)
    page(server, "/static/..%2fpages.py", 404)


def test_a_server_starts_without_torch():
    """Which takes a second or two, and 250 MB."""
    code = "import sys, pipeline.service.serve; print(sorted({'torch', 'pyarrow', 'nvidia'} & {*sys.modules}))"
    line = [sys.executable, "-c", code]
    assert subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "[]\n"


# ---- Charts ----
