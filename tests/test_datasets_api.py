"""What a data set holds over HTTP, against the manifest, numpy, PIL and the loader."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import manifest
from pipeline.online import Loader
from pipeline.online.augment import draw
from pipeline.online.plain import webdataset
from serving import Server, served

MID_GREY = 128


@pytest.fixture(scope="module")
def data(dataset: Path) -> manifest.Manifest:
    return manifest.load(dataset)


@pytest.fixture(scope="module")
def server(dataset: Path, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve a whole data set, and one with a shard that is damaged in its first JPEG."""
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(dataset, root / "datasets/whole")
    hurt = Path(shutil.copytree(small, root / "datasets/hurt"))
    with open(hurt / "train/train-000000.tar", "r+b") as shard:
        shard.seek(600)
        shard.write(b"\xff\xff\xff")
    (root / "datasets/unfinished/.build").mkdir(parents=True)
    broken = Path(shutil.copytree(small, root / "datasets/broken")) / "dataset.json"
    broken.write_text(broken.read_text().replace("train", "trail", 1))
    with served(root) as running:
        yield running


def test_summaries(server: Server, data: manifest.Manifest):
    listed = server.client.get("/v1/datasets").json()
    assert [one["name"] for one in listed["datasets"]] == ["hurt", "whole"]
    assert list(listed["damaged"]) == ["broken"]
    answer = server.client.get("/v1/datasets/broken")
    assert (answer.status_code, answer.json()["detail"]) == (422, listed["damaged"]["broken"])
    assert "mend it" in answer.json()["detail"]
    whole = server.client.get("/v1/datasets/whole").json()
    assert whole["identity"] == data.identity
    assert whole["splits"] == {
        "train": {"samples": 41, "skipped": 1, "shards": 3},
        "val": {"samples": 9, "skipped": 0, "shards": 1},
    }
    size = sum(path.stat().st_size for path in Path(str(data.root)).rglob("*") if path.is_file())
    assert whole["bytes"] + (Path(str(data.root)) / "dataset.json").stat().st_size == size
    assert whole["classes"] == 3
    statistics = server.client.get("/v1/datasets/whole/statistics").json()
    assert statistics == data.statistics_summary


def test_classes_are_searched_and_paged(server: Server, data: manifest.Manifest):
    every = server.client.get("/v1/datasets/whole/classes").json()
    assert every["total"] == 3
    labels = data.samples("train")["label"]
    for record in every["classes"]:
        assert record["samples"] == {"train": int((labels == record["label"]).sum()), "val": 3}
    page = server.client.get("/v1/datasets/whole/classes", params={"offset": 1, "limit": 1}).json()
    assert page["classes"] == every["classes"][1:2]
    some = server.client.get("/v1/datasets/whole/classes", params={"q": "CHECK"}).json()
    assert [record["wnid"] for record in some["classes"]] == ["checks"]


def test_what_was_skipped(server: Server, data: manifest.Manifest):
    lines = [json.loads(line) for line in data.read("skipped.jsonl").splitlines()]
    answer = server.client.get("/v1/datasets/whole/skipped").json()
    assert answer == {"reasons": {"train": {"truncated": 1}, "val": {}}, "skipped": lines, "total": 1}
    assert server.client.get("/v1/datasets/whole/skipped", params={"reason": "x"}).json()["total"] == 0


def test_samples_are_those_that_webdataset_reads(server: Server, dataset: Path, data: manifest.Manifest):
    numbers = list(range(0, 41, 10))
    ours = [server.client.get(f"/v1/datasets/whole/samples/train/{n}").json() for n in numbers]
    stored = [server.client.get(f"/v1/datasets/whole/samples/train/{n}/stored").content for n in numbers]
    theirs = list(webdataset(dataset, "train"))
    for number, sample, jpeg in zip(numbers, ours, stored):
        picture, label = theirs[number]
        assert sample["label"] == label
        assert sample["words"] == data.classes[label].words
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")), np.asarray(picture))
        shard = (dataset / sample["shard"]).read_bytes()
        assert shard[sample["offset"] : sample["offset"] + sample["bytes"]] == jpeg
        assert shard[sample["offset"] - 512 :].startswith(f"{sample['key']}.jpg".encode())


@pytest.mark.parametrize("seed", [2012, 7])
def test_a_view_is_what_the_loader_gives(server: Server, dataset: Path, seed: int):
    unlit, mirrored = 0, set()
    with Loader(dataset, "train", batch_size=16, seed=seed, device="cpu") as loader:
        for _ in range(5):
            batch = next(loader)
            grey = torch.clamp(torch.round(batch.images + MID_GREY), 0, 255).to(torch.uint8).numpy()
            for position in (0, 7):
                path = f"/v1/datasets/whole/samples/train/{int(batch.ids[position])}/view"
                step = {"seed": seed, "step": batch.step, "batch_size": 16}
                png = server.client.get(path, params=step).raise_for_status()
                assert png.headers["content-type"] == "image/png"
                pixels = np.asarray(Image.open(io.BytesIO(png.content)))
                assert np.array_equal(pixels, grey[position].transpose(1, 2, 0))
                same = server.client.get(path, params={"seed": seed, "epoch": batch.epoch}).content
                assert same == png.content
                dark = server.client.get(path, params={"seed": seed, "epoch": batch.epoch, "lighting": False}).content
                unlit += dark != png.content
                mirrored |= {int(draw(seed, batch.epoch, batch.ids[position : position + 1], 33).flip[0])}
    assert unlit == 10
    assert mirrored == {0, 1}


def test_views_of_other_splits_are_of_the_centre(server: Server, dataset: Path):
    with Loader(dataset, "val", batch_size=9, views="centre", device="cpu") as loader:
        batch = next(loader)
    expected = torch.clamp(torch.round(batch.images[4] + MID_GREY), 0, 255).to(torch.uint8).numpy().transpose(1, 2, 0)
    png = server.client.get(f"/v1/datasets/whole/samples/val/{int(batch.ids[4])}/view").content
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), expected)


def test_the_mean_image_and_what_lighting_does(server: Server, data: manifest.Manifest):
    mean = Image.open(io.BytesIO(server.client.get("/v1/datasets/whole/statistics/mean.png").content))
    assert np.array_equal(np.asarray(mean), np.rint(data.statistics().mean_image).astype(np.uint8))
    path = "/v1/datasets/whole/statistics/component.png"
    jpeg = server.client.get("/v1/datasets/whole/samples/train/0/stored").content
    plain = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")).astype(float)
    values, vectors = np.linalg.eigh(np.array(data.statistics_summary["covariance"]))  # ascending
    for component, amount in ((0, -3), (1, 1.5), (2, 3)):
        png = server.client.get(path, params={"component": component, "amount": amount}).content
        axis, sd = vectors[:, 2 - component], values[2 - component] ** 0.5
        axis = axis * np.sign(axis[np.abs(axis).argmax()])
        expected = np.clip(np.rint(plain + amount * sd * axis), 0, 255)
        assert np.abs(np.asarray(Image.open(io.BytesIO(png))).astype(float) - expected).max() <= 1


def test_pictures_have_etags(server: Server):
    path = "/v1/datasets/whole/samples/train/3/stored"
    first = server.client.get(path)
    again = server.client.get(path, headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_verify_is_a_job(server: Server):
    answer = server.client.post("/v1/datasets/hurt/verify", json={"quick": False})
    assert answer.status_code == 201
    job = server.ended(int(answer.headers["location"].rpartition("/")[2]))
    assert (job["state"], job["reason"]) == ("failed", "1 files failed")
    assert [failure["file"] for failure in job["progress"]["failures"]] == ["train/train-000000.tar"]


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("nothing", 404, "nothing: no such data set; there are: broken, hurt, whole"),
        ("unfinished", 404, "no such data set"),
        ("..", 404, ""),
        ("%2e%2e%2fwhole", 404, ""),
        ("whole/samples/test/0", 404, "test: no such split; there are: train, val"),
        ("whole/samples/train/41", 404, "41: no such sample; train has 41"),
        ("whole/samples/train/-1", 422, ""),
        ("whole/samples/train/x/view", 422, ""),
        ("whole/samples/train/0/view?seed=-1", 422, "seed '-1'"),
        ("whole/statistics/component.png?amount=nan", 422, "amount"),
        ("whole/statistics/component.png?component=3", 422, "component"),
        ("hurt/samples/train/0/stored", 422, "damaged at sample 0"),
    ],
)
def test_what_is_not_there_is_a_problem(server: Server, path: str, status: int, words: str):
    answer = server.client.get(f"/v1/datasets/{path}")
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert words in answer.json()["detail"]
    assert "\n" not in answer.json()["detail"]
