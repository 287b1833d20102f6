"""tools/bench.py: every contestant works on every picture, once per repetition; what cannot run says why. No times."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from conftest import picture
from tools.bench import main
from tools.peers import processes
from tools.peers.building import Building
from tools.peers.contestants import CONTESTANTS, Contestant
from tools.peers.facts import CORES
from tools.peers.pictures import Pictures, prepare
from tools.peers.rounds import Entry, run_rounds
from tools.peers.table import BUILD, rows

IMAGES = 12


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Nine JPEGs of two classes; half a JPEG and a PNG, that are left out."""
    for number in range(9):
        folder = tmp_path / "raw" / ("cats", "dogs")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(f"bench{number}", 300 + number, 280).save(folder / f"{number}.jpg", quality=90)
    whole = (tmp_path / "raw" / "cats" / "0.jpg").read_bytes()
    (tmp_path / "raw" / "cats" / "half.jpg").write_bytes(whole[: len(whole) // 2])
    picture("png", 300, 280).save(tmp_path / "raw" / "dogs" / "png.png")
    return tmp_path / "raw"


def test_build(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # without any peer's environment
    record = tmp_path / "bench.json"
    result = CliRunner().invoke(
        main, ["build", str(raw), "--images", str(IMAGES), "--repetitions", "1", "--markdown", "--json", str(record)]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(record.read_text())
    assert found["pictures"].items() >= {"images": IMAGES, "distinct": 9, "left_out": 2}.items()
    assert found["machine"]["cores"] == CORES
    assert [(line["contestant"], line["workers"]) for line in found["results"]] == [
        (name, workers) for name in CONTESTANTS for workers in sorted({1, CORES})
    ]
    for line in found["results"]:
        if peer := CONTESTANTS[line["contestant"]].environment:
            assert line["not_run"] == f"not installed; python tools/bench.py peers {peer}"
            assert f"not run: {line['not_run']}" in result.output
            continue
        (run,) = line["runs"]
        assert run["images"] == IMAGES
        assert 0 < run["seconds"] < run["wall"]
        assert line["images_per_second"] == [run["images"] / run["seconds"]]
        assert run["rss"] > 10 * 2**20
        assert (run["stored"] > 0) == (line["contestant"] == "penstock")
        assert f"| {CONTESTANTS[line['contestant']].title} | {line['workers']} |" in result.output
    assert not list((tmp_path / "cache" / "penstock" / "bench").iterdir())  # no scratch is left


def test_pictures_are_links_to_those_that_decode(raw: Path, tmp_path: Path):
    pictures = prepare(raw, tmp_path / "pictures", IMAGES)
    files = sorted(path for path in pictures.folder.rglob("*") if path.is_file())
    assert len(files) == pictures.images == IMAGES
    assert len({path.stat().st_ino for path in files}) == pictures.distinct == 9
    originals = {path.read_bytes() for path in raw.rglob("[0-9].jpg")}
    assert {path.read_bytes() for path in files} == originals
    assert {path.parent.name for path in files} == {"cats", "dogs"}


def test_fewer_pictures_than_raw_holds(raw: Path, tmp_path: Path):
    prepare(raw, tmp_path / "pictures", 3)
    assert len(list((tmp_path / "pictures").glob("*/*.jpg"))) == 3


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; sys.exit('no luck')", "failed (1): no luck"),
        ("print('{\"images\": 7}')", "stored 7 of 12 pictures"),
        ("print('nothing')", "printed no figures, but: 'nothing"),
        ("import time; time.sleep(60)", "hangs: not done after"),
    ],
)
def test_a_peer_that_fails_is_not_run(
    program: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(processes, "_command", lambda *_: [sys.executable, "-c", program])
    monkeypatch.setattr(processes, "PATIENCE", 0.5)
    monkeypatch.setattr(processes, "SLOWEST", 1000.0)
    entry = Entry(Contestant("peer", "A peer", "none", "nothing"), 1)
    building = Building.of(Pictures(tmp_path / "pictures", IMAGES, 9, 0, 1.0, 1.0), [1])
    run_rounds([entry], building.run, 2, print)
    assert entry.not_run.startswith(reason)
    assert entry.runs == []
    assert capsys.readouterr().out.count("not run") == 1  # not tried again


def test_rounds_are_interleaved():
    order: list[str] = []

    def run(entry: Entry) -> dict[str, float]:
        order.append(f"{entry.contestant.name}{entry.workers}")
        return {"images": 1, "seconds": 1.0}

    entries = [Entry(Contestant(name, name, "none", "nothing"), workers) for name in "ab" for workers in (1, 2)]
    run_rounds(entries, run, 3, lambda line: None)
    assert order == ["a1", "a2", "b1", "b2"] * 3


def test_table_of_known_runs():
    def entry(name: str, *seconds: float) -> Entry:
        runs = [{"images": 100, "seconds": each, "wall": 2 * each, "rss": 2**20} for each in seconds]
        return Entry(CONTESTANTS[name], 1, runs)

    found = rows(BUILD, [entry("decode-encode", 0.5), entry("penstock", 1.0, 4.0, 2.0), entry("ffcv", 4.0)])
    names = BUILD.header
    assert [dict(zip(names[2:5], row[2:5])) for row in found] == [
        {names[2]: "200 (200 to 200)", names[3]: "100 %", names[4]: "0.25 ×"},
        {names[2]: "50 (25 to 100)", names[3]: "25 %", names[4]: ""},
        {names[2]: "25 (12 to 50)", names[3]: "12 %", names[4]: ""},
        {names[2]: "25 (25 to 25)", names[3]: "12 %", names[4]: "2.00 ×"},
    ]
