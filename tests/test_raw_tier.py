"""The raw tier's command and its verification: bytes, kills, full disks, refusals, and each change found."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import simplejpeg
import xxhash
from click.testing import CliRunner, Result

from conftest import LITTLE, ROOT, begun, build, digests, one_line, until, verify
from damaged import canonical, mutate
from pipeline import manifest, records, tier
from pipeline.manifest import DatasetError
from pipeline.offline import verify_tiers
from pipeline.offline.raw_tier import WORK_FOLDER
from stored import damage, jpegs
from tools.raw_tier import main as raw_tier


def make(root: Path, *options: object) -> Result:
    result = CliRunner().invoke(raw_tier, [str(root), "--workers", "1", *map(str, options)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refusal(root: object, *options: object) -> str:
    result = make(root, *options)  # type: ignore[arg-type]
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture(scope="module")
def many(little: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`little`, built: 28 shards. Read only."""
    root = tmp_path_factory.mktemp("many") / "dataset"
    assert build(little, root, *LITTLE, "--workers", 1).exit_code == 0
    return root


@pytest.fixture(scope="module")
def whole(many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of both tiers of `many`, made without an interruption, by their SHA-256."""
    root = Path(shutil.copytree(many, tmp_path_factory.mktemp("whole") / "dataset"))
    for kind in records.KINDS:
        assert make(root, "--format", kind).exit_code == 0
    return files(root)


def files(root: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(root).items() if name.startswith("raw-")}


@pytest.fixture
def copy(many: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(many, tmp_path / "dataset"))


def test_a_file_holds_the_pictures_of_its_shard_and_their_digests(root: Path):
    """By simplejpeg and xxhash alone; tier.json by hashlib."""
    for kind, size in (("rgb", 3 * 32 * 32), ("yuv420", 32 * 32 * 3 // 2)):
        assert make(root, "--format", kind).exit_code == 0
        listed = json.loads((root / f"raw-{kind}" / "tier.json").read_bytes())
        for split, built in manifest.load(root).splits.items():
            pictures = iter(jpegs(root, split))
            for shard in built.shards:
                name = f"{Path(shard.name).stem}.raw"
                content = (root / f"raw-{kind}" / name).read_bytes()
                assert len(content) == shard.samples * (size + 8)
                for i in range(shard.samples):
                    record, jpeg = content[i * size : (i + 1) * size], next(pictures)
                    if kind == "rgb":
                        assert record == simplejpeg.decode_jpeg(jpeg).transpose(2, 0, 1).tobytes()
                    else:
                        assert record[:1024] == simplejpeg.decode_jpeg(jpeg, "GRAY").tobytes()
                    digest = content[shard.samples * size + 8 * i :][:8]
                    assert int.from_bytes(digest, "little") == xxhash.xxh3_64_intdigest(record)
                expected = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                tar = hashlib.sha256((root / shard.name).read_bytes()).hexdigest()
                assert listed["files"][name] == expected | {"shard_sha256": tar}
            assert next(pictures, None) is None
    assert verify(root).exit_code == 0


def test_the_bytes_are_the_same_with_any_number_of_workers(copy: Path, whole: dict[str, str]):
    for kind in records.KINDS:
        assert make(copy, "--format", kind, "--workers", 3).exit_code == 0
    assert files(copy) == whole


def killed(root: Path, notes: int, *options: str) -> int:
    """Kill the command and its workers once so many files are noted; return how many then are."""
    line = [sys.executable, str(ROOT / "tools/raw_tier.py"), str(root), *options]
    process = begun(line)
    until(process, lambda: len(list(root.glob(f"raw-rgb/{WORK_FOLDER}/*.json"))) >= notes)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    return len(list(root.glob(f"raw-rgb/{WORK_FOLDER}/*.json")))


def assert_goes_on(root: Path, whole: dict[str, str]) -> None:
    """The same command writes what is missing, leaves the rest as it is, and ends at the bytes of a whole run."""
    noted = [root / "raw-rgb" / path.stem for path in root.glob(f"raw-rgb/{WORK_FOLDER}/*.json")]
    before = {path: path.stat().st_mtime_ns for path in noted}
    result = make(root)
    assert result.exit_code == 0, result.output
    assert f": {28 - len(noted)} of 28 files written" in result.stdout or len(noted) == 28
    assert {path: path.stat().st_mtime_ns for path in noted} == before
    assert files(root) == {name: digest for name, digest in whole.items() if name.startswith("raw-rgb")}


def test_a_killed_command_goes_on(copy: Path, whole: dict[str, str]):
    assert 2 <= killed(copy, 2, "--workers", "1") < 28
    assert not (copy / "raw-rgb" / "tier.json").exists()
    unfinished = verify(copy)
    assert unfinished.exit_code == 1
    assert "raw-rgb/tier.json: missing: the tier is unfinished; the same command again ends it" in unfinished.stdout
    assert_goes_on(copy, whole)


@pytest.mark.proof
def test_many_kills_at_random_moments(copy: Path, whole: dict[str, str]):
    random = Random(8)
    for _ in range(12):
        shutil.rmtree(copy / "raw-rgb", ignore_errors=True)
        for notes in sorted(random.sample(range(25), 2)):
            killed(copy, notes, "--workers", str(random.choice([1, 2])))
        assert_goes_on(copy, whole)


def test_ctrl_c_ends_in_a_line(copy: Path, whole: dict[str, str]):
    process = begun([sys.executable, str(ROOT / "tools/raw_tier.py"), str(copy), "--workers", "2"])
    until(process, lambda: any(copy.glob(f"raw-rgb/{WORK_FOLDER}/*.json")))
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    if process.returncode:  # else it was faster
        assert process.returncode == 130
        assert errors == "Error: interrupted; what is finished stays; the same command goes on\n"
        assert_goes_on(copy, whole)
    assert not list(copy.rglob("*.tmp"))


def test_a_finished_tier_is_left_alone_and_one_that_changed_is_mended(copy: Path, whole: dict[str, str]):
    assert make(copy).exit_code == 0
    root = copy / "raw-rgb"
    before = {path: path.stat().st_mtime_ns for path in root.iterdir()}
    assert ": 28 files are as they were, " in make(copy).stdout
    assert {path: path.stat().st_mtime_ns for path in root.iterdir()} == before
    with open(root / "train-000003.raw", "r+b") as file:
        file.write(b"x")
    os.truncate(root / "val-000001.raw", 5)
    (root / "train-000099.raw").write_bytes(b"of another time")
    assert ": 2 of 28 files written, " in make(copy).stdout
    assert files(copy) == {name: digest for name, digest in whole.items() if name.startswith("raw-rgb")}
    (root / "tier.json").write_bytes(b"{}")
    assert ": 28 of 28 files written, " in make(copy).stdout
    assert files(copy) == {name: digest for name, digest in whole.items() if name.startswith("raw-rgb")}


def test_another_codec_makes_it_anew(copy: Path, monkeypatch: pytest.MonkeyPatch):
    assert make(copy).exit_code == 0
    monkeypatch.setattr(records, "fingerprint", lambda kind: "1" * 64)
    assert ": 28 of 28 files written, " in make(copy).stdout
    assert tier.load(manifest.load(copy), "rgb").codec == "1" * 64


def test_json_events(copy: Path):
    events = [json.loads(line) for line in make(copy, "--json").stdout.splitlines()]
    assert [event["event"] for event in events if event["event"] != "progress"] == ["plan", "done"]
    assert (events[-1]["written"], events[-1]["files"], events[-1]["pictures"]) == (28, 28, events[0]["pictures"])


def test_what_no_tier_can_be_made_of_is_refused(raw: Path, copy: Path, tmp_path: Path):
    other, whole = tmp_path / "other", tmp_path / "pictures"
    assert build(raw, other, "--size", 32, "--subsampling", "4:2:2", "--workers", 1).exit_code == 0
    assert "stored with 4:2:2, not 4:2:0; take --format rgb" in refusal(other, "--format", "yuv420")
    assert build(raw, whole, "--size", 32, "--crop", "none", "--workers", 1).exit_code == 0
    assert "its pictures differ in size; build with --crop centre" in refusal(whole)
    assert "no such directory" in refusal(tmp_path / "nowhere")
    assert not (other / "raw-yuv420").exists()
    assert not (whole / "raw-rgb").exists()
    damage(copy, 20)
    line = refusal(copy)
    assert re.search(r"train-000003\.tar: picture \d \(key \w+\): its CRC-32 differs; mend it: .* --repair RAW$", line)
    assert not list(copy.rglob("*.tmp"))
    assert "--repair RAW" in refusal(copy)  # and again: what is finished stays


def test_two_at_once_are_refused(copy: Path):
    line = [sys.executable, str(ROOT / "tools/raw_tier.py"), str(copy), "--workers", "1"]
    process = begun(line)
    until(process, lambda: any(copy.glob(f"raw-rgb/{WORK_FOLDER}/*.json")))
    process.send_signal(signal.SIGSTOP)
    try:
        assert refusal(copy).endswith("raw-rgb: another process makes this tier")
    finally:
        process.kill()
        process.communicate(timeout=60)


@pytest.mark.proof
def test_a_full_disk(many: Path, disk: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    """Seen ahead; or by a quota, which the free space does not show, amid the work."""
    root = Path(shutil.copytree(many, disk / "dataset"))
    ballast = disk / "ballast"
    free = shutil.disk_usage(disk).free
    ballast.write_bytes(bytes(free - 200_000))
    before = sorted(root.rglob("*"))
    line = refusal(root)
    assert re.search(r"raw-rgb: needs [\d,]+ bytes more, and [\d,]+ are free; make room", line)
    assert sorted(root.rglob("*")) == sorted([*before, root / "raw-rgb"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: os.statvfs_result and type("Usage", (), {"free": 10**12}))
    line = refusal(root)
    assert line.endswith("No space left on device; what is finished stays; make room, and the same command goes on")
    assert any(root.rglob("*.raw"))
    assert not list(root.rglob("*.tmp"))
    ballast.unlink()
    assert_goes_on(root, whole)


# ---- verification ----


@pytest.mark.parametrize("kind", records.KINDS)
def test_verification_finds_each_flipped_byte(root: Path, kind: str):
    """Every 97th byte of every file, which in the end is each place of a record and of a digest; and tier.json's."""
    assert make(root, "--format", kind).exit_code == 0
    data = manifest.load(root)
    for path in sorted((root / f"raw-{kind}").iterdir()):
        content = path.read_bytes()
        for at in range(0, len(content), 3 if path.suffix == ".json" else 997):
            with open(path, "r+b") as file:
                os.pwrite(file.fileno(), bytes([content[at] ^ 1 << at % 8]), at)
            found = verify_tiers.check(data, quick=True, workers=1, progress=lambda done, total: None)
            assert [failure.file for failure in found] == [f"raw-{kind}/{path.name}"], (path, at)
            assert found[0].reason.endswith(f"; make it anew: python tools/raw_tier.py {root} --format {kind}")
            assert "\n" not in found[0].reason
            if path.suffix == ".json":
                with pytest.raises(DatasetError) as caught:
                    tier.load(data, kind)
                one_line(caught, str(path), "tools/raw_tier.py")
            path.write_bytes(content)
    assert not verify_tiers.check(data, quick=False, workers=1, progress=lambda done, total: None)


def test_verification_finds_pictures_that_are_not_the_shards(root: Path):
    """A file with another picture, whose digests and SHA-256 all fit."""
    assert make(root).exit_code == 0
    data, path = manifest.load(root), root / "raw-rgb" / "val-000000.raw"
    made, content, size = tier.load(data, "rgb"), bytearray(path.read_bytes()), 3 * 32 * 32
    content[:size] = content[size : 2 * size]
    count = data.split("val").samples
    content[count * size :][:8] = content[count * size + 8 :][:8]
    content[count * size : count * size + 8] = content[count * size + 8 : count * size + 16]
    path.write_bytes(content)
    changed = tier.TierFile(len(content), hashlib.sha256(content).hexdigest(), made.files[path.name].shard_sha256)
    files = {**made.files, path.name: changed}
    lying = tier.Tier(made.root, made.kind, made.size, made.codec, made.built_with, files)
    (made.root / "tier.json").write_bytes(lying.to_json())
    assert verify(root, "--quick").exit_code == 0
    result = verify(root)
    assert result.exit_code == 1
    assert "raw-rgb/val-000000.raw: picture 0 is not that of its shard; make it anew: " in result.stdout


def test_verification_names_what_does_not_belong(root: Path):
    assert make(root).exit_code == 0
    (root / "raw-rgb" / "notes.txt").write_text("mine")
    (root / "raw-yuv420").mkdir()
    (root / "raw-rgb" / "train-000001.raw").unlink()
    result = verify(root)
    assert result.exit_code == 1
    lines = sorted(result.stdout.splitlines()[:3])
    assert lines[0] == "raw-rgb/notes.txt: not listed in tier.json; delete it"
    assert lines[1].startswith("raw-rgb/train-000001.raw: missing; make it anew: ")
    assert lines[2].startswith("raw-yuv420/tier.json: missing: the tier is unfinished; ")
    damage(root, 3)
    result = verify(root)
    assert "note: raw tiers (rgb, yuv420) are not checked until the shards hold" in result.stdout


def test_a_tier_that_lies_is_a_line(root: Path, tmp_path: Path):
    """One thing in tier.json changed at random, under a checksum that fits."""
    assert make(root).exit_code == 0
    data, path, random = manifest.load(root), root / "raw-rgb" / "tier.json", Random(4)
    before = json.loads(path.read_bytes())
    del before["checksum"]
    for _ in range(300):
        value, change = mutate(random, before)
        content = signed(value, tmp_path)
        path.write_bytes(content)
        try:
            found = tier.load(data, "rgb")
        except DatasetError as error:
            assert "\n" not in str(error), change
            assert len(str(error)) < 1000, change
        else:  # words that mean nothing to us
            assert found.files == tier.parse(signed(before, tmp_path), found.root).files, change


def signed(value: Any, case: Path) -> bytes:
    body = canonical(value, case)
    if not isinstance(value, dict):
        return body
    return canonical(value | {"checksum": hashlib.sha256(body).hexdigest()}, case)


def test_help_needs_no_data_set():
    ended = subprocess.run(
        [sys.executable, str(ROOT / "tools/raw_tier.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert "--format [rgb|yuv420]" in ended.stdout


def test_records_are_as_large_as_said():
    """ImageNet: 1,281,167 training pictures: 252 and 126 GB, as the help says."""
    assert np.rint(1_281_167 * records.record_bytes("rgb", 256) / 1e9) == 252
    assert np.rint(1_281_167 * records.record_bytes("yuv420", 256) / 1e9) == 126
