"""tools/bench.py load and first-batch: each contestant of our own environment delivers what was asked. No times."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from conftest import one_line
from pipeline import UserError, manifest
from pipeline.online.samples import SampleReader
from tools.bench import main
from tools.peers import loading, processes
from tools.peers.datasets import inflated, of_images
from tools.peers.facts import CORES
from tools.peers.first_batch import STAGES
from tools.peers.job import SIDE
from tools.peers.loaders import LOADERS
from tools.peers.loading import Loading
from tools.peers.loadjob import VIEW, LoadJob, measure, window
from tools.peers.rounds import Entry, run_rounds
from tools.peers.table import LOAD, rows

BATCH, BATCHES = 8, 2
INTERLEAVED, PLANAR = [VIEW, VIEW, 3], [3, VIEW, VIEW]


def test_load(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # without any peer's environment
    record = tmp_path / "load.json"
    options = {"--batch": BATCH, "--batches": BATCHES, "--repetitions": 1, "--json": record}
    words = [str(word) for option in options.items() for word in option]
    result = CliRunner().invoke(main, ["load", str(dataset), *words, "--markdown"])
    assert result.exit_code == 0, result.output
    found = json.loads(record.read_text())
    samples = manifest.load(dataset).split("train").samples
    assert found.items() >= {"batch": BATCH, "batches": BATCHES, "samples": samples, "repetitions": 1}.items()
    assert [line["contestant"] for line in found["results"]] == list(LOADERS)
    gives = {}
    for line in found["results"]:
        name = line["contestant"]
        if peer := LOADERS[name].environment:
            assert line["not_run"] == f"not installed; python tools/bench.py peers {peer}"
            assert f"| not run: {line['not_run']} |" in result.output
            continue
        (run,) = line["runs"]
        assert run["images"] == BATCH * BATCHES
        assert 0 < run["seconds"] < run["wall"]
        assert line["images_per_second"] == [run["images"] / run["seconds"]]
        assert line["workers"] == CORES
        assert f"| {LOADERS[name].title} | {run['gives'][-1]}, " in result.output
        assert (f"{name} waited, in its first run, for: reading " in result.output) == name.startswith("penstock")
        gives[name] = run["gives"]
    floats = [*PLANAR, "float32"]
    assert gives == {
        "decode": [*INTERLEAVED, "uint8"],
        "penstock-uint8": [*PLANAR, "uint8"],
        "penstock-colour": floats,
        "penstock-image": floats,
        "penstock-imagenet": floats,
        "synthetic": floats,
        "dali-reader": floats,
    }
    assert not list((tmp_path / "cache" / "penstock" / "bench").iterdir())  # no scratch is left


@pytest.mark.parametrize(("images", "shards"), [(15, 1), (16, 2), (100, 3)])  # 15 + 16 + 10
def test_dataset_of_so_many_images(images: int, shards: int, dataset: Path, tmp_path: Path):
    whole = manifest.load(dataset)
    built = of_images(dataset, images, tmp_path / "part")
    assert manifest.load(tmp_path / "part") == built
    assert built.split("train").samples == sum(shard.samples for shard in built.split("train").shards) == images
    assert len(built.split("train").shards) == shards
    with SampleReader(whole, "train") as all_, SampleReader(built, "train") as part:
        ids = np.arange(images)
        expected = all_.read(ids % whole.split("train").samples)
        assert [bytes(jpeg) for jpeg in part.read(ids)] == [bytes(jpeg) for jpeg in expected]
    job = LoadJob(tmp_path / "part", tmp_path, 1, 1, 1)
    stored = [picture.jpeg() for picture in job.pictures()]
    assert stored[: len(expected)] == [bytes(jpeg) for jpeg in expected[: len(stored)]]
    labels = [picture.label for picture in job.pictures()]
    assert labels == whole.samples("train")["label"][: len(labels)].tolist()
    assert job.mean_colour() == whole.statistics().mean_color.tolist()


def test_inflated_dataset(dataset: Path, tmp_path: Path):
    one = of_images(dataset, 15, tmp_path / "one")
    built = inflated(one, 100, 7, tmp_path / "large")
    assert manifest.load(tmp_path / "large") == built
    assert [shard.samples for shard in built.split("train").shards] == [15, 14, 14, 15, 14, 14, 14]
    with SampleReader(one, "train") as few, SampleReader(built, "train") as many:
        ids = np.arange(100)
        assert [bytes(jpeg) for jpeg in many.read(ids)] == [bytes(jpeg) for jpeg in few.read(ids % 15)]


def test_pictures_of_another_size(small: Path, tmp_path: Path):
    with pytest.raises(UserError) as error:
        of_images(small, 16, tmp_path / "part")
    one_line(error, str(small), "size 32", "--size 256")


def test_first_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    record = tmp_path / "first.json"
    words = ["--samples", "2000", "--shards", "5", "--repetitions", "2", "--batch", str(BATCH), "--json", str(record)]
    result = CliRunner().invoke(main, ["first-batch", *words])
    assert result.exit_code == 0, result.output
    found = json.loads(record.read_text())
    assert found.items() >= {"samples": 2000, "shards": 5, "batch": BATCH, "repetitions": 2}.items()
    assert len(found["runs"]) == 2
    for run in found["runs"]:
        assert run["images"] == BATCH
        assert list(run["stages"]) == list(STAGES)
        assert sum(run["stages"].values()) == pytest.approx(run["seconds"])
        assert 0 < run["seconds"] < run["wall"]
    assert all(f"\n{name}: " in result.output for name in (*STAGES, "in all"))
    assert not list((tmp_path / "cache" / "penstock" / "bench").iterdir())


def test_more_shards_than_samples():
    result = CliRunner().invoke(main, ["first-batch", "--samples", "5", "--shards", "6"])
    assert result.exit_code == 2
    assert result.output == "Error: 6 shards of 5 samples; give as many samples as shards, or more\n"


def test_a_format_of_its_own_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran = []

    def program(environment: str, module: str, words: tuple[object, ...], workers: int, images: int) -> str:
        ran.append((environment, module, words[-1]))
        Path(str(words[1])).mkdir(exist_ok=True)
        return json.dumps({"images": 6, "seconds": 1.0})

    monkeypatch.setattr(processes, "run_program", program)
    monkeypatch.setattr(loading, "run_program", program)
    entry = Entry(LOADERS["ffcv-raw"], 1)
    said: list[str] = []
    run_rounds([entry], Loading(tmp_path, tmp_path, 2, 3, said.append).run, 2, said.append)
    assert ran == [("ffcv", "ffcv_convert", "raw")] + [("ffcv", "ffcv_load", "raw")] * 2
    assert len(entry.runs) == 2
    assert said[0] == "ffcv-raw: writing its own format, untimed"


def test_a_loader_that_ends_early_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "_command", lambda *_: [sys.executable, "-c", "print('{\"images\": 5}')"])
    entry = Entry(LOADERS["synthetic"], 1)
    run_rounds([entry], Loading(tmp_path, tmp_path, 2, 3, print).run, 2, print)
    assert entry.not_run == "delivered 5 of 6 pictures"


def test_only_what_follows_the_warm_up_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    job = LoadJob(tmp_path, tmp_path, 3, 4, 1)
    taken = []

    def batches():
        while True:
            taken.append(0)
            yield np.zeros((3, 2, 5), np.uint8)

    measure(job, batches(), "numpy")
    assert len(taken) == job.warm_up + 4
    assert job.images >= 3 * len(taken)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["images"] == 12
    assert figures["gives"] == [2, 5, "uint8"]


def test_batches_of_two_shapes_are_refused(tmp_path: Path):
    job = LoadJob(tmp_path, tmp_path, 3, 4, 1)
    with pytest.raises(ValueError, match="too many values"):
        measure(job, (np.zeros((3, 2, i % 2)) for i in range(99)))


def test_windows_reach_every_edge():
    drawn = np.array([window(SIDE) for _ in range(5000)])
    assert drawn[:, :2].min(axis=0).tolist() == [0, 0]
    assert drawn[:, :2].max(axis=0).tolist() == [SIDE - VIEW, SIDE - VIEW]
    assert 0.4 < drawn[:, 2].mean() < 0.6


def test_table_of_known_loaders():
    def entry(name: str, seconds: float) -> Entry:
        run = {"images": 100, "seconds": seconds, "rss": 2**20, "gives": [3, 4, 5, "uint8"]}
        return Entry(LOADERS[name], 2, [run])

    lost = Entry(LOADERS["litdata"], 2, [], "no luck")
    found = rows(LOAD, [entry("decode", 0.5), entry("penstock-uint8", 1.0), entry("ffcv-jpeg", 2.0), lost])
    assert [row[1:5] for row in found] == [
        ("uint8, 3 × 4 × 5", "200 (200 to 200)", "100 %", "0.50 ×"),
        ("uint8, 3 × 4 × 5", "100 (100 to 100)", "50 %", ""),
        ("uint8, 3 × 4 × 5", "50 (50 to 50)", "25 %", "2.00 ×"),
        ("", "not run: no luck", "", ""),
    ]
