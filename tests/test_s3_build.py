"""Builds from and to an object store: a real S3 server over HTTP, that fails now and then."""

import hashlib
import io
import shutil
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from conftest import build
from pipeline import manifest, storage
from s3 import Store, empty_bucket, running_server  # noqa: F401  # fixtures
from tools.verify_shards import main as verify_shards

pytestmark = pytest.mark.proof

OPTIONS = ("--workers", 1, "--samples-per-shard", 16)


def upload(folder: Path, url: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            place = storage.location(f"{url}/{path.relative_to(folder).as_posix()}")
            storage.put_if_absent(place, path.read_bytes())


def digests(url: str) -> dict[str, str]:
    """Return the SHA-256 of every object below a URL."""
    root = storage.location(url)
    sums = {}
    for below, entries in storage.walk(root):
        for entry in entries:
            if entry.is_file:
                name = f"{below}/{entry.name}" if below else entry.name
                sums[name] = hashlib.sha256(storage.read_bytes(root / name)).hexdigest()
    return sums


def local_digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def verify(*arguments: object) -> Result:
    return CliRunner().invoke(verify_shards, [str(argument) for argument in arguments])


def test_folders_in_a_store_give_the_same_bytes_in_a_store(s3: Store, raw: Path, dataset: Path):
    upload(raw, f"{s3.url}/raw")
    result = build(f"{s3.url}/raw", f"{s3.url}/out", *OPTIONS)
    assert result.exit_code == 0, result.output
    assert digests(f"{s3.url}/out") == local_digests(dataset)
    assert manifest.load(f"{s3.url}/out").identity == manifest.load(dataset).identity
    again = build(f"{s3.url}/raw", f"{s3.url}/out", *OPTIONS)
    assert again.exit_code == 2
    assert "a finished dataset is there already" in again.output
    assert verify(f"{s3.url}/out").exit_code == 0


def test_archives_in_a_store_with_a_failing_server_and_two_workers(s3: Store, raw: Path, dataset: Path, tmp_path: Path):
    """The tars of synsets inside a tar, read by ranges; three of ten answers are errors or torn."""
    outer = io.BytesIO()
    with tarfile.open(fileobj=outer, mode="w") as whole:
        for number, folder in enumerate(sorted((raw / "train").iterdir())):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for path in sorted(folder.glob("*.jpg")):
                    tar.add(path, f"n{number:08d}_{path.stem}.JPEG")
            info = tarfile.TarInfo(f"n{number:08d}.tar")
            info.size = len(inner.getvalue())
            whole.addfile(info, io.BytesIO(inner.getvalue()))
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "fall11_whole.tar").write_bytes(outer.getvalue())
    upload(tmp_path / "raw", f"{s3.url}/tars")
    assert build(tmp_path / "raw", tmp_path / "local", *OPTIONS).exit_code == 0
    s3.faults(0.2, seed=3)
    result = build(f"{s3.url}/tars", f"{s3.url}/built", "--workers", 2, "--samples-per-shard", 16)
    assert result.exit_code == 0, result.output
    s3.faults(0.0)
    assert digests(f"{s3.url}/built") == local_digests(tmp_path / "local")


def test_an_interrupted_build_goes_on_and_another_recipe_is_refused(
    s3: Store, raw: Path, dataset: Path, tmp_path: Path
):
    upload(raw, f"{s3.url}/raw")
    part = build(f"{s3.url}/raw", f"{s3.url}/parts", *OPTIONS, "--part", "1/2")
    assert part.exit_code == 0, part.output
    with pytest.raises(manifest.DatasetError, match="its build has not finished"):
        manifest.load(f"{s3.url}/parts")
    other = build(f"{s3.url}/raw", f"{s3.url}/parts", *OPTIONS, "--quality", 50)
    assert other.exit_code == 2
    assert "quality 95 → 50" in other.output
    assert "not built yet" in build(f"{s3.url}/raw", f"{s3.url}/parts", *OPTIONS, "--merge").output
    assert build(f"{s3.url}/raw", f"{s3.url}/parts", *OPTIONS).exit_code == 0
    assert digests(f"{s3.url}/parts") == local_digests(dataset)


def test_mistakes_are_one_line(s3: Store, raw: Path, tmp_path: Path):
    for arguments in (
        (f"{s3.url}/nothing", tmp_path / "out"),
        ("s3://no-such-bucket-here/raw", tmp_path / "out"),
        ("nonsense://x/y", tmp_path / "out"),
        (raw, "s3://no-such-bucket-here/out"),
    ):
        result = build(*arguments, *OPTIONS)
        assert result.exit_code == 2, result.output
        assert len([line for line in result.output.splitlines() if line.startswith("Error: ")]) == 1
    assert not (tmp_path / "out").exists()


def test_a_dataset_in_a_store_is_verified_and_not_repaired_there(s3: Store, raw: Path, dataset: Path, tmp_path: Path):
    damaged = Path(shutil.copytree(dataset, tmp_path / "damaged"))
    shard = damaged / "train" / "train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (damaged / "notes.txt").write_text("not listed")
    upload(damaged, f"{s3.url}/damaged")
    result = verify(f"{s3.url}/damaged", "--quick")
    assert result.exit_code == 1
    assert "train/train-000001.tar: its SHA-256 is not that of the manifest" in result.output
    assert "notes.txt: not listed" in result.output
    refused = verify(f"{s3.url}/damaged", "--quick", "--repair", raw)
    assert refused.exit_code == 2
    assert "works on a local folder" in refused.output
