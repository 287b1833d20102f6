"""The raw tier's command: its bytes, kills, full disks, refusals, and what has it made anew."""

import errno
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

import numpy as np
import pytest
import simplejpeg
import xxhash
from click.testing import Result

from conftest import LITTLE, ROOT, begun, build, digests, gone, make_tier, patched, until
from conftest import verify as verify_with
from pipeline import manifest, records, storage
from pipeline.offline import verify_tiers
from pipeline.offline.raw_tier import WORK_FOLDER
from stored import damage, jpegs

SLOW = """
import os, time
from pipeline import records
decode = records.record_of
def slow(*picture):
    time.sleep(float(os.environ["SECONDS"]))
    return decode(*picture)
records.record_of = slow
"""


def verify(root: Path, *options: object) -> Result:
    return verify_with(root, "--workers", 1, *options)


def refusal(root: object, *options: object) -> str:
    result = make_tier(root, *options)
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
        assert make_tier(root, "--format", kind).exit_code == 0
    return files(root)


def files(root: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(root).items() if name.startswith("raw-")}


@pytest.fixture
def copy(many: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(many, tmp_path / "copy"))


def test_a_file_holds_the_pictures_of_its_shard_and_their_digests(root: Path):
    """By simplejpeg and xxhash alone; tier.json by hashlib."""
    for kind, size in (("rgb", 3 * 32 * 32), ("yuv420", 32 * 32 * 3 // 2)):
        assert make_tier(root, "--format", kind).exit_code == 0
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
        assert make_tier(copy, "--format", kind, "--workers", 3).exit_code == 0
    assert files(copy) == whole


def slowly(root: Path, seconds: float, *options: str) -> subprocess.Popen[str]:
    """Begin the command, which takes so long for each of six pictures of a file."""
    line = [sys.executable, str(ROOT / "tools/raw_tier.py"), str(root), *options]
    return begun(line, env=patched(root.parent, SLOW, SECONDS=seconds))


def killed(root: Path, notes: int, *options: str) -> int:
    """Kill the command and its workers once so many files are noted; return how many then are."""
    process = slowly(root, 0.01, *options)
    until(process, lambda: len(list(root.glob(f"raw-rgb/{WORK_FOLDER}/*.json"))) >= notes)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert gone(process.pid)
    return len(list(root.glob(f"raw-rgb/{WORK_FOLDER}/*.json")))


def assert_goes_on(root: Path, whole: dict[str, str]) -> None:
    """The same command writes what is missing, leaves the rest as it is, and ends at the bytes of a whole run."""
    noted = [root / "raw-rgb" / path.stem for path in root.glob(f"raw-rgb/{WORK_FOLDER}/*.json")]
    before = {path: path.stat().st_mtime_ns for path in noted}
    result = make_tier(root)
    assert result.exit_code == 0, result.output
    assert f": {28 - len(noted)} of 28 files written" in result.stdout or len(noted) == 28
    assert {path: path.stat().st_mtime_ns for path in noted} == before
    assert files(root) == {name: digest for name, digest in whole.items() if name.startswith("raw-rgb")}


def test_a_killed_command_goes_on(copy: Path, whole: dict[str, str]):
    assert 2 <= killed(copy, 2, "--workers", "1") < 28
    assert not (copy / "raw-rgb" / "tier.json").exists()
    unfinished = verify(copy)
    assert unfinished.exit_code == 1
    assert "raw-rgb/tier.json: missing: the tier is unfinished; mend it: python tools/raw_tier.py" in unfinished.stdout
    assert_goes_on(copy, whole)


def test_a_note_that_does_not_fit_its_file_is_no_note(copy: Path, whole: dict[str, str]):
    killed(copy, 6, "--workers", "1")
    notes = sorted(copy.glob(f"raw-rgb/{WORK_FOLDER}/*.json"))
    for note, key, value in zip(notes, ("shard_sha256", "codec", "bytes"), (b'"' + b"0" * 64 + b'"',) * 2 + (b"99",)):
        content, count = re.subn(rb'("%s": )[^,\n]+' % key.encode(), rb"\g<1>" + value, note.read_bytes())
        assert count == 1
        note.write_bytes(content)
        with open(note.parent.parent / note.stem, "r+b") as file:
            file.write(b"no picture")
    notes[3].write_text("[" * 10**5)
    os.truncate(copy / "raw-rgb" / notes[4].stem, 99)
    result = make_tier(copy)
    assert f": {28 - len(notes) + 5} of 28 files written, " in result.stdout
    assert files(copy) == {name: digest for name, digest in whole.items() if name.startswith("raw-rgb")}


@pytest.mark.proof
def test_many_kills_at_random_moments(copy: Path, whole: dict[str, str]):
    random = Random(8)
    for _ in range(6):
        shutil.rmtree(copy / "raw-rgb", ignore_errors=True)
        for notes in sorted(random.sample(range(25), 2)):
            killed(copy, notes, "--workers", str(random.choice([1, 2])))
        assert_goes_on(copy, whole)


def test_ctrl_c_ends_in_a_line_and_leaves_nothing_half_written(copy: Path, whole: dict[str, str]):
    process = slowly(copy, 0.1, "--workers", "2")
    until(process, lambda: any(copy.glob(f"raw-rgb/{WORK_FOLDER}/*.json")) and any(copy.glob("raw-rgb/*.tmp")))
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "Error: interrupted; what is finished stays; the same command goes on\n"
    assert not list(copy.rglob("*.tmp"))
    assert_goes_on(copy, whole)


def test_a_finished_tier_is_left_alone_and_one_that_changed_is_mended(copy: Path, whole: dict[str, str]):
    assert make_tier(copy).exit_code == 0
    root = copy / "raw-rgb"
    before = {path: path.stat().st_mtime_ns for path in root.iterdir()}
    assert ": 28 files are as they were, " in make_tier(copy).stdout
    assert {path: path.stat().st_mtime_ns for path in root.iterdir()} == before
    with open(root / "train-000003.raw", "r+b") as file:
        file.write(b"x")
    os.truncate(root / "val-000001.raw", 5)
    (root / "train-000099.raw").write_bytes(b"of another time")
    assert ": 2 of 28 files written, " in make_tier(copy).stdout
    assert files(copy) == {name: digest for name, digest in whole.items() if name.startswith("raw-rgb")}
    (root / "tier.json").write_bytes(b"{}")
    assert ": 28 of 28 files written, " in make_tier(copy).stdout
    assert files(copy) == {name: digest for name, digest in whole.items() if name.startswith("raw-rgb")}


def test_a_tier_of_another_codec_is_made_anew(copy: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    """Such a tier may be right for another machine: verification says only that it did not compare the pixels."""
    decode = records.record_of
    with monkeypatch.context() as patch:
        patch.setattr(records, "fingerprint", lambda kind: "1" * 64)
        patch.setattr(records, "record_of", lambda *picture: 255 - decode(*picture))
        assert make_tier(copy).exit_code == 0
    result = verify(copy)
    assert (result.exit_code, result.stdout.count("raw-rgb: pixels not compared: decoded by a codec that ")) == (0, 1)
    told, done = make_tier(copy).stdout.splitlines()
    reason = "decoded by a codec that gives other pixels than this machine's"
    assert told == f"{copy}/raw-rgb/tier.json: {reason}; the tier is made anew"
    assert ": 28 of 28 files written, " in done
    assert files(copy) == {name: digest for name, digest in whole.items() if name.startswith("raw-rgb")}


def test_a_tier_of_other_shards_is_made_anew(copy: Path, root: Path):
    """`copy` and `root` have files of the same names."""
    assert make_tier(copy).exit_code == 0
    shutil.move(copy / "raw-rgb", root / "raw-rgb")
    line = f"{root}/raw-rgb/tier.json: made from other shards; "
    (found, *more) = verify(root, "--quick").stdout.splitlines()
    assert found.startswith(line.removeprefix(f"{root}/") + "mend it: ")
    assert len(more) == 1
    assert make_tier(root).stdout.startswith(line + "the tier is made anew\n")
    assert verify(root).exit_code == 0


def test_a_tier_that_cannot_be_read_is_no_tier_to_make_anew(root: Path, monkeypatch: pytest.MonkeyPatch):
    """Its disk may be better tomorrow, its owner give access."""
    assert make_tier(root).exit_code == 0
    before, read = files(root), storage.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "tier.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path)

    monkeypatch.setattr(storage, "read_bytes", failing)
    assert refusal(root) == f"Error: {root}/raw-rgb/tier.json: Input/output error"
    assert files(root) == before


def test_json_events(copy: Path):
    events = [json.loads(line) for line in make_tier(copy, "--json").stdout.splitlines()]
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
    process = slowly(copy, 0.1, "--workers", "1")
    until(process, lambda: any(copy.glob("raw-rgb/*.tmp")))
    process.send_signal(signal.SIGSTOP)
    try:
        assert refusal(copy).endswith("raw-rgb: another process makes this tier; wait for it, or stop it")
    finally:
        process.kill()
        process.communicate(timeout=60)


@pytest.mark.proof
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk(many: Path, disk: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch, workers: int):
    """Seen ahead; or by a quota, which the free space does not show, amid the work."""
    root = Path(shutil.copytree(many, disk / "dataset"))
    ballast = disk / "ballast"
    free = shutil.disk_usage(disk).free
    ballast.write_bytes(bytes(free - 200_000))
    before = sorted(root.rglob("*"))
    line = refusal(root)
    assert re.search(r"raw-rgb: needs 0\.5 MB, and 0\.2 MB are free; make room$", line)
    assert sorted(root.rglob("*")) == sorted([*before, root / "raw-rgb"])
    assert not verify_tiers.check(manifest.load(root), quick=True, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12))
        line = refusal(root, "--workers", workers)
    assert line.endswith("No space left on device; what is finished stays; make room, and the same command goes on")
    assert any(root.rglob("*.raw"))
    assert not list(root.rglob("*.tmp"))
    ballast.unlink()
    assert_goes_on(root, whole)
    victim = root / "raw-rgb" / "train-000002.raw"  # is mended without room for a second one
    victim.write_bytes(bytes(victim.stat().st_size))
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - 8192))
    assert ": 1 of 28 files written, " in make_tier(root).stdout
    (root / "raw-rgb" / "tier.json").write_bytes(b"{}")  # the files that are of no use by then give way
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free + ballast.stat().st_size - 300_000))
    assert ": 28 of 28 files written, " in make_tier(root).stdout
    assert files(root) == {name: digest for name, digest in whole.items() if name.startswith("raw-rgb")}


def test_help_needs_no_data_set():
    ended = subprocess.run(
        [sys.executable, str(ROOT / "tools/raw_tier.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert "--format [rgb|yuv420]" in ended.stdout


def test_records_are_as_large_as_said():
    """ImageNet: 1,281,167 training pictures: 252 and 126 GB, as the help says."""
    assert np.rint(1_281_167 * records.record_bytes("rgb", 256) / 1e9) == 252
    assert np.rint(1_281_167 * records.record_bytes("yuv420", 256) / 1e9) == 126
