"""Data sets at a server: the same bytes by other programs' HTTP clients and by ours; ranges, conditions, refusals."""

import hashlib
import http.client
import json
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from email.parser import BytesParser
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import httpx
import pytest
import torch
import webdataset

from pipeline import UserError, manifest, storage
from pipeline.offline.verify import check
from pipeline.online import Loader
from pipeline.online import webdataset as pairs
from pipeline.online.cache import ShardCache
from pipeline.service import tokens
from pipeline.service.database import Database, url_of
from serving import Server, served
from stored import damage, remake

SHARD = "train/train-000001.tar"
Get = Callable[..., httpx.Response]


@pytest.fixture(scope="module")
def server(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("server")
    shutil.copytree(dataset, root / "datasets/d")
    with served(root) as server:
        yield server


@pytest.fixture
def url(server: Server) -> str:
    return f"{server.url}/v1/datasets/d"


@pytest.fixture(scope="module")
def shard(dataset: Path) -> bytes:
    return (dataset / SHARD).read_bytes()


@pytest.fixture
def get(server: Server) -> Get:
    """Return a function that asks the server for a URL, with headers."""
    return lambda url, **headers: server.client.get(url, headers={k.replace("_", "-"): v for k, v in headers.items()})


def test_every_file_is_served_under_its_hash(get: Get, server: Server, dataset: Path, url: str):
    names = {path.relative_to(dataset).as_posix() for path in dataset.rglob("*") if path.is_file()}
    listed = get(f"{url}/", accept="application/json").json()["files"]
    assert {file["name"] for file in listed} == names
    for file in listed:
        data, answer = (dataset / file["name"]).read_bytes(), get(f"{url}/{file['name']}")
        assert answer.content == data
        assert answer.headers["ETag"] == f'"{file["sha256"]}"' == f'"{hashlib.sha256(data).hexdigest()}"'
        alike = server.client.head(f"{url}/{file['name']}", headers={"Range": "bytes=0-1"})  # which is for GET alone
        assert (alike.status_code, int(alike.headers["Content-Length"]), file["bytes"]) == (200, len(data), len(data))
        assert alike.headers["Accept-Ranges"] == "bytes"
    assert get(f"{url}/{SHARD}").headers["Content-Type"] == "application/x-tar"
    below = get(f"{url}/train/", accept="application/json").json()["files"]
    assert {f"train/{file['name']}" for file in below} == {name for name in names if name.startswith("train/")}


@pytest.mark.parametrize(
    ("asked", "start", "stop"), [("0-0", 0, 1), ("100-299", 100, 300), ("-7", -7, None), ("9-", 9, None)]
)
def test_a_range(get: Get, url: str, shard: bytes, asked: str, start: int, stop: int | None):
    answer = get(f"{url}/{SHARD}", range=f"bytes={asked}")
    expected = shard[start:stop]
    first = len(shard) + start if start < 0 else start
    assert (answer.status_code, answer.content) == (206, expected)
    assert answer.headers["Content-Range"] == f"bytes {first}-{first + len(expected) - 1}/{len(shard)}"


def test_several_ranges(get: Get, url: str, shard: bytes):
    answer = get(f"{url}/{SHARD}", range=f"bytes=0-9, 512-611,{len(shard)}-,-5")  # the third is beyond the end
    assert answer.status_code == 206
    message = f"Content-Type: {answer.headers['Content-Type']}\r\n\r\n".encode() + answer.content
    parts = BytesParser().parsebytes(message).get_payload()
    assert [part.get_payload(decode=True) for part in parts] == [shard[:10], shard[512:612], shard[-5:]]
    assert parts[1]["Content-Range"] == f"bytes 512-611/{len(shard)}"


@pytest.mark.parametrize("header", ["bytes=5-3", "bytes=x-", "lines=1-2", "bytes=", "bytes=-", "bytes=1_0-20", "junk"])
def test_a_range_that_is_none_is_passed_over(get: Get, url: str, shard: bytes, header: str):
    answer = get(f"{url}/{SHARD}", range=header)
    assert (answer.status_code, answer.content) == (200, shard)


@pytest.mark.parametrize("asked", ["{}-", "{}-{}", "-0", "999999999999-"])
def test_a_range_beyond_the_end(get: Get, url: str, shard: bytes, asked: str):
    answer = get(f"{url}/{SHARD}", range="bytes=" + asked.format(len(shard), len(shard) + 9))
    assert (answer.status_code, answer.headers["Content-Range"]) == (416, f"bytes */{len(shard)}")
    assert answer.headers["Content-Type"] == "application/problem+json"


def test_conditions(get: Get, url: str, shard: bytes):
    etag = f'"{hashlib.sha256(shard).hexdigest()}"'
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        answer = get(f"{url}/{SHARD}", if_none_match=known, range="bytes=0-9")
        assert (answer.status_code, answer.content, answer.headers["ETag"]) == (304, b"", etag)
    assert get(f"{url}/{SHARD}", if_none_match='"other"').content == shard
    assert get(f"{url}/{SHARD}", if_range=etag, range="bytes=0-9").content == shard[:10]
    for stale in ('"other"', f"W/{etag}", get(f"{url}/{SHARD}").headers["Last-Modified"]):
        answer = get(f"{url}/{SHARD}", if_range=stale, range="bytes=0-9")
        assert (answer.status_code, answer.content) == (200, shard)


PATHS = (
    "..%2f..%2fpenstock.db", "../penstock.db", "%2e%2e/%2e%2e/penstock.db", "train/../dataset.json", "./dataset.json",
    "/etc/passwd", "%2fetc%2fpasswd", "..\\..\\penstock.db", "..%5cpenstock.db", "dataset.json%00", "%00", "tra",
    "train//", "train/train-000001.tar/", ".build", "secret.txt", "link.png", "train%2f%2e%2e%2fdataset.json", "%ff",
)  # fmt: skip


def test_nothing_but_the_files_of_the_manifest(server: Server, root: Path):
    """Whatever the path is: not a file that the data set does not list, not a link, not another folder."""
    folder = server.root / "datasets/linked"
    shutil.copytree(root, folder)
    (folder / "secret.txt").write_text("secret")
    (server.root / "mean.png").write_bytes((folder / "mean.png").read_bytes())
    (folder / "mean.png").unlink()
    (folder / "mean.png").symlink_to(server.root / "mean.png")
    paths = [f"linked/{path}" for path in (*PATHS, "mean.png")]
    for path in (*paths, *(f"{name}/dataset.json" for name in ("..", "%2e%2e", "%00", "linked%00", ".", "no", "%2f"))):
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc)  # httpx would tidy the path
        connection.putrequest("GET", f"/v1/datasets/{path}", skip_accept_encoding=True)
        connection.endheaders()
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        assert (path, answer.status) == (path, 404)
        assert json.loads(body)["status"] == 404


def test_damage_is_not_served(get: Get, server: Server, root: Path):
    folder = shutil.copytree(root, server.root / "datasets/damaged")
    url = f"{server.url}/v1/datasets/damaged"
    whole = get(f"{url}/mean.png").content
    os.truncate(folder / "mean.png", len(whole) - 1)
    answer = get(f"{url}/mean.png")
    assert answer.status_code == 422
    assert f"has {len(whole) - 1} bytes, the manifest promises {len(whole)}" in answer.json()["detail"]
    (folder / "mean.png").unlink()
    os.mkfifo(folder / "mean.png")
    assert "not a regular file" in get(f"{url}/mean.png").json()["detail"]
    with pytest.raises(UserError, match=r"cannot look: 422 damaged/mean.png: not a regular file"):
        manifest.load(url).read("mean.png")


def test_a_file_that_is_replaced_or_grows_while_it_is_read(server: Server, root: Path):
    """Who has begun to read gets the old file to its end; a data set of the same name has its own hashes."""
    folder, size = Path(shutil.copytree(root, server.root / "datasets/old")), 64 * 2**20 + 5
    body = json.loads((folder / "dataset.json").read_bytes())
    big = hashlib.sha256(bytes(size)).hexdigest()
    body["files"]["big.bin"] = {"bytes": size, "sha256": big}
    (folder / "big.bin").write_bytes(bytes(size))
    (folder / "dataset.json").write_bytes(signed(body))
    with server.client.stream("GET", f"{server.url}/v1/datasets/old/big.bin") as answer:
        (folder / "other").write_bytes(b"\1" * size)
        os.replace(folder / "other", folder / "big.bin")
        pieces = hashlib.sha256()
        for piece in answer.iter_raw():
            pieces.update(piece)
    assert pieces.hexdigest() == big
    body["files"]["big.bin"]["sha256"] = hashlib.sha256(b"\1" * size).hexdigest()
    (folder / "dataset.json").write_bytes(signed(body))
    with server.client.stream("GET", f"{server.url}/v1/datasets/old/big.bin") as answer:
        with open(folder / "big.bin", "ab") as file:
            file.write(b"more")
        assert sum(map(len, answer.iter_raw())) == size
    os.truncate(folder / "big.bin", size)
    etag = server.client.head(f"{server.url}/v1/datasets/old/big.bin").headers["ETag"]
    assert "Traceback" not in server.errors()
    assert etag == f'"{body["files"]["big.bin"]["sha256"]}"'


def signed(body: dict) -> bytes:
    body = {key: value for key, value in body.items() if key != "checksum"}
    return manifest.canonical_json(body | {"checksum": manifest.sha256(manifest.canonical_json(body))})


def test_the_server_closes_every_file(get: Get, server: Server, url: str, shard: bytes):
    """After whole answers, parts, errors, answers without a body, and clients that go away."""

    def files() -> list[str]:
        folder = Path(f"/proc/{server.process.pid}/fd")
        return [name for name in (os.path.realpath(path) for path in folder.iterdir()) if name.endswith(".tar")]

    get(f"{url}/{SHARD}"), get(f"{url}/{SHARD}", range="bytes=0-9,20-29"), get(f"{url}/{SHARD}", range="bytes=-0")
    get(f"{url}/{SHARD}", if_none_match=f'"{hashlib.sha256(shard).hexdigest()}"')
    server.client.head(f"{url}/{SHARD}")
    for _ in range(5):
        with server.client.stream("GET", f"{url}/{SHARD}") as answer:
            next(answer.iter_raw(1000))
    server.until(lambda: not files())


def test_other_programs_read_it(dataset: Path, url: str, shard: bytes, tmp_path: Path):
    """webdataset by curl; curl itself, which goes on with a part of a file; fsspec: folders, and a range of a file."""
    own = [(dataset / f"train/train-{i:06d}.tar").as_posix() for i in range(2)]
    remote = [f"{url}/train/train-{i:06d}.tar" for i in range(2)]
    for one, other in zip(
        *(webdataset.WebDataset(shards, shardshuffle=False) for shards in (own, remote)), strict=True
    ):
        assert (one["__key__"], one["jpg"], one["cls"]) == (other["__key__"], other["jpg"], other["cls"])
    part = tmp_path / "part.tar"
    part.write_bytes(shard[:70_001])
    subprocess.run(["curl", "-sf", "-C", "-", "-o", part, f"{url}/{SHARD}"], check=True, timeout=60)
    assert part.read_bytes() == shard
    files = fsspec.filesystem("http")
    names = {f"{url}/{path.relative_to(dataset).as_posix()}" for path in dataset.rglob("*") if path.is_file()}
    assert set(files.find(f"{url}/")) == names
    assert {name.removeprefix(f"{url}/") for name in files.ls(f"{url}/", detail=False)} >= {"train/", "dataset.json"}
    with files.open(f"{url}/{SHARD}") as file:
        file.seek(1000)
        assert file.read(2000) == shard[1000:3000]


@pytest.mark.parametrize(
    "options",
    [{"order": "shards", "window": 16}, {"recipe": "imagenet", "split": "val"}, {"views": "centre", "split": "val"}],
)
def test_batches_are_those_of_the_local_data(dataset: Path, url: str, tmp_path: Path, options: dict):
    with Loader(dataset, batch_size=8, seed=3, **options) as loader:
        whole = list(islice(loader, 8))
    with Loader(url, batch_size=8, seed=3, cache=tmp_path, **options) as loader:
        for one, other in zip(whole, islice(loader, 8), strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.labels, other.labels)


def test_the_rest_of_the_library_reads_it(dataset: Path, url: str):
    """The manifest, its arrays, folders, verify --quick, pairs for a torch DataLoader."""
    local, remote = manifest.load(dataset), manifest.load(f"{url}/")
    assert remote.identity == local.identity
    assert remote.statistics().sum_image.tobytes() == local.statistics().sum_image.tobytes()
    assert not check(remote, quick=True)
    listed = [(folder, entries) for folder, entries in storage.walk(remote.root)]
    assert listed == [
        (folder, [e._replace(size=e.size if e.is_file else 0) for e in es]) for folder, es in storage.walk(dataset)
    ]
    for one, other in zip(pairs(dataset, "val"), pairs(url, "val"), strict=True):
        assert (one[0].tobytes(), one[1]) == (other[0].tobytes(), other[1])


def test_bytes_fit_their_hash_while_the_data_set_is_replaced(get: Get, server: Server, root: Path):
    """By others of the same name and sizes, at any moment of a request."""
    folders, link, hashes = [server.root / f"datasets/v{i}" for i in range(64)], server.root / "datasets/new", set()
    for number, folder in enumerate(folders):
        shutil.copytree(root, folder)
        damage(folder, *(bit for bit in range(6) if number >> bit & 1))
        remake(folder)
    link.symlink_to("v0")

    def replace() -> None:
        for folder in folders:
            (server.root / "next").symlink_to(folder.name)
            os.replace(server.root / "next", link)
            time.sleep(random.uniform(0, 0.008))  # into the middle of a request

    replacing = threading.Thread(target=replace)
    replacing.start()
    while replacing.is_alive():
        answer = get(f"{server.url}/v1/datasets/new/train/train-000000.tar")
        assert answer.status_code in (200, 503)  # 503: another one each time that it looked
        if answer.status_code == 200:
            hashes.add(answer.headers["ETag"])
            assert answer.headers["ETag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'
    assert len(hashes) > 2


def test_a_data_set_that_is_replaced_under_a_loader(dataset: Path, server: Server, tmp_path: Path):
    """Its bytes are others than those that the manifest promised: they are refused, whatever the server says."""
    one, other, link = (server.root / "datasets" / name for name in ("one", "other", "changing"))
    shutil.copytree(dataset, one)
    shutil.copytree(dataset, other)
    damage(other, 0)
    remake(other)  # an undamaged data set, of the same sizes
    link.symlink_to("one")
    data = manifest.load(f"{server.url}/v1/datasets/changing")
    (tmp_path / "link").symlink_to("other")
    os.replace(tmp_path / "link", link)
    assert manifest.load(data.root).identity == data.identity  # which does not cover JPEG's bytes
    with pytest.raises(UserError, match=r"/changing/train/train-000000.tar: damaged \(its SHA-256"):
        data.read("train/train-000000.tar")
    cache = ShardCache(data, "train", tmp_path / "cache", 2**30)
    with pytest.raises(UserError, match=r"/changing/train/train-000000.tar: changed or damaged"), cache.lease([0]):
        pass
    cache.close()


def test_a_server_that_asks_for_tokens(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A token for reading is enough; without one, or with a wrong one, the first request says what to set."""
    root = tmp_path / "server"
    shutil.copytree(dataset, root / "datasets/d")
    _, token = tokens.create(Database(url_of(root, None)), "read")
    with served(root, "--require-token") as server:
        url = f"{server.url}/v1/datasets/d"
        for wrong in ("", token[:-1] + "!"):
            monkeypatch.setenv("PENSTOCK_TOKEN", wrong)
            with pytest.raises(
                UserError, match=r"access denied \(401 .*\); set PENSTOCK_TOKEN to a token of"
            ) as caught:
                manifest.load(url)
            assert not wrong or wrong not in str(caught.value)
        monkeypatch.setenv("PENSTOCK_TOKEN", token)
        with Loader(url, batch_size=8, cache=tmp_path / "cache", order="shards", window=8) as loader:
            assert next(loader).images.shape == (8, 3, 224, 224)


@pytest.mark.proof
def test_a_server_that_is_killed_and_started_again_under_a_loader(dataset: Path, tmp_path: Path):
    """The cache holds half of the shards, so that some are fetched before and some after, and perhaps meanwhile."""
    root, limit = tmp_path / "server", 2 * max(shard.bytes for shard in manifest.load(dataset).split("train").shards)
    shutil.copytree(dataset, root / "datasets/d")
    options: dict = {"batch_size": 8, "order": "fixed", "seed": 3}
    with Loader(dataset, **options) as loader:
        whole = list(islice(loader, 20))
    with (
        served(root) as server,
        Loader(f"{server.url}/v1/datasets/d", cache=tmp_path / "cache", cache_bytes=limit, **options) as loader,
    ):
        for step, (one, other) in enumerate(zip(whole, islice(loader, 20), strict=True)):
            assert torch.equal(one.images, other.images)
            if step in (3, 9):
                server.again()
