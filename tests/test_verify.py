"""tools/verify_shards.py names damage to a dataset directory, also where a hash of the manifest fits."""

import io
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from conftest import build, digests, picture, verify
from pipeline import manifest
from pipeline.doubts import duplicates
from pipeline.manifest import DatasetError
from pipeline.offline.build import build as write
from pipeline.offline.verify import check, load
from pipeline.online.samples import SampleReader
from stored import ALL, SHARD, Members, evaluation_plan, members_of, remake, rewrite

TABLE = "train/samples.npy"


def assert_one_failure(root: Path, file: str, words: str) -> None:
    failures = check(load(root))
    assert [failure.file for failure in failures] == [file], failures
    assert words in failures[0].reason


def failing(root: Path, quick: bool = True) -> list[str]:
    return [failure.file for failure in check(load(root), quick=quick)]


def test_good_datasets_pass(dataset: Path, small: Path):
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    for root, options in ((dataset, ["--workers", 1]), (small, ["--quick"])):
        result = verify(root, *options)
        assert result.exit_code == 0, result.output
        files, samples = len(digests(root)), 50
        size = sum(path.stat().st_size for path in root.rglob("*") if path.name != "dataset.json" and path.is_file())
        assert re.fullmatch(rf"all holds.*: {files} files, {samples} samples, {size:,} bytes, .* s\n", result.output)
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*")} == before


def test_a_set_for_evaluation_alone_passes_and_its_statistics_fit_themselves(small: Path, raw: Path, tmp_path: Path):
    root = tmp_path / "alone"
    write(evaluation_plan(raw, small), root)
    result = verify(root, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"all holds: 8 files, 9 samples, .* s\n", result.output)
    arrays = dict(np.load(root / "statistics.npz"))
    arrays["sum_image"][0, 0, 0] += 1
    np.savez(root / "statistics.npz", **arrays)
    remake(root)
    assert_one_failure(root, "statistics.npz", "mean_image is not what its exact sums give")


@pytest.mark.parametrize("flips", [30, pytest.param(500, marks=pytest.mark.proof)])
def test_a_flipped_bit_fails_its_file_alone(root: Path, flips: int):
    random = np.random.default_rng(flips)
    names = sorted(name for name in digests(root) if (root / name).stat().st_size)
    assert len(names) > 12
    names += ["dataset.json"] * 8
    for name in itertools.islice(itertools.cycle(names), flips):
        good = (root / name).read_bytes()
        bad = bytearray(good)
        bad[int(random.integers(len(bad)))] ^= 1 << int(random.integers(8))
        (root / name).write_bytes(bad)
        if name == "dataset.json":
            with pytest.raises(DatasetError):
                load(root)
        else:
            assert failing(root) == [name]
        (root / name).write_bytes(good)
    assert failing(root) == []


def test_same_failures_in_the_same_order_with_two_workers(root: Path):
    for name in ("train/train-000001.tar", "train/train-000002.idx", "val/samples.npy", "mean.png"):
        (root / name).write_bytes(b"")
    one, two = (verify(root, "--workers", workers) for workers in (1, 2))
    assert one.exit_code == two.exit_code == 1
    assert one.output.splitlines()[:-1] == two.output.splitlines()[:-1]
    lines = [line.split(":")[0] for line in one.output.splitlines()]
    assert lines == ["train/train-000001.tar", "train/train-000002.idx", "val/samples.npy", "mean.png", "4 failed"]


def test_missing_unlisted_and_unfinished(root: Path):
    (root / f"{SHARD}.tar").unlink()
    (root / "skipped.jsonl").unlink()
    (root / "val" / "notes\n.txt").write_text("notes")
    (root / ".build").mkdir()
    (root / ".build" / "plan.json").write_text("{}")
    (root / ".cache").mkdir()
    result = verify(root)
    assert result.exit_code == 1
    assert result.output.splitlines()[:5] == [
        ".build: unfinished: the build was killed at its very end; the same command again ends it",
        ".cache: not listed in dataset.json",
        r"'val/notes\n.txt': not listed in dataset.json",
        f"{SHARD}.tar: missing",
        "skipped.jsonl: missing",
    ]


def test_a_folder_that_is_no_dataset_is_refused(root: Path, raw: Path, tmp_path: Path):
    for path, words in ((tmp_path / "nowhere", "no such directory"), (raw, "not a dataset directory")):
        result = verify(path)
        assert (result.exit_code, words in result.output) == (2, True)
    (root / "dataset.json").write_bytes((root / "dataset.json").read_bytes()[:-2])
    result = verify(root, "--repair", raw)
    assert result.exit_code == 2
    assert "build it again" in result.output


def test_duplicates_are_information(raw: Path, tmp_path: Path):
    copies = Path(shutil.copytree(raw, tmp_path / "raw"))
    blob, stripe = copies / "train/blobs/0001.jpg", copies / "train/stripes/0002.jpg"
    for target in ("train/blobs/a.jpg", "train/checks/b.jpg", "val/blobs/c.jpg"):
        shutil.copyfile(blob, copies / target)
    shutil.copyfile(stripe, copies / "val/stripes/d.jpg")
    assert build(copies, tmp_path / "out", "--workers", 1, "--size", 32).exit_code == 0
    result = verify(tmp_path / "out", "--quick", "--workers", 1)
    assert result.exit_code == 0, result.output
    first, *sets, _ = result.output.splitlines()
    counts = "2 raw images in 6 samples; 1 within a class of a split, 1 across labels, 2 across splits"
    assert first == f"warning: duplicates: {counts}"
    assert {frozenset(line.strip().split(" = ")) for line in sets} == {
        frozenset({"train/0 train_blobs_0001", "train/0 a", "train/1 b", "val/0 c"}),
        frozenset({"train/2 train_stripes_0002", "val/2 d"}),
    }


def pictures_of(raw: Path, counts: dict[str, int]) -> Path:
    """Draw so many different pictures in each folder SPLIT/CLASS."""
    for folder, count in counts.items():
        (raw / folder).mkdir(parents=True)
        for i in range(count):
            picture(f"{folder}{i}", 40, 36).save(raw / folder / f"{i}.png")
    return raw


BALANCED = {f"{split}/{name}": 2 for split in ("train", "val") for name in "abcd"}


@pytest.mark.parametrize(
    ("changed", "warnings"),
    [
        ({}, []),
        (
            {"val/b": 0, "val/c": 0, "val/d": 0},
            ["the validation split is of one class alone, a; its error tells little"],
        ),
        ({"val/b": 0, "val/c": 0}, ["the classes of train and val differ: 2 of 4 are not in val (b, c)"]),
        ({"train/b": 0}, ["the classes of train and val differ: 1 of 4 are not in train (b)"]),
        ({"train/c": 6}, []),
        ({"train/c": 7}, ["most training pictures (7 of 13, 54 %) are of one class, c"]),
        ({"train/c": 0, "train/d": 0, "val/c": 0, "val/d": 0, "train/a": 18}, []),
        (
            {"train/c": 0, "train/d": 0, "val/c": 0, "val/d": 0, "train/a": 19},
            ["most training pictures (19 of 21, 90 %) are of one class, a"],
        ),
    ],
)
def test_what_is_almost_never_meant_is_warned_of(tmp_path: Path, changed: dict[str, int], warnings: list[str]):
    """At the end of a build, also for machines, and by verify_shards.py; the exit code is 0."""
    counts = {folder: count for folder, count in (BALANCED | changed).items() if count}
    built = build(pictures_of(tmp_path / "raw", counts), tmp_path / "out", "--workers", 1, "--size", 32)
    verified = verify(tmp_path / "out", "--quick", "--workers", 1)
    for result in (built, verified):
        assert result.exit_code == 0, result.output
        lines = [line for line in result.output.splitlines() if line.startswith("warning: ")]
        assert lines == [f"warning: {warning}" for warning in warnings]
    again = build(tmp_path / "raw", tmp_path / "json", "--workers", 1, "--size", 32, "--json")
    assert json.loads(again.output.splitlines()[-1])["warnings"] == warnings


@pytest.mark.parametrize("seed", range(6))
def test_duplicates_are_those_of_a_plain_dictionary(seed: int):
    """Digests of few values, with equal first halves; labels and splits drawn."""
    random = np.random.default_rng(seed)
    samples = {}
    for split in ("train", "val", "test"):
        records = np.zeros(int(random.integers(0, 40)), manifest.SAMPLE)
        records["digest"][:, [0, 15]] = random.integers(0, 2 + 3 * seed, (len(records), 2))
        records["label"] = random.integers(-1, 3, len(records))
        samples[split] = records
    groups: dict[bytes, list[tuple[int, str, int]]] = {}
    every = [(split, record) for split, records in samples.items() for record in records]
    for position, (split, record) in enumerate(every):
        groups.setdefault(record["digest"].tobytes(), []).append((position, split, int(record["label"])))
    alike = [group for group in groups.values() if len(group) > 1]
    copies = duplicates(samples)
    assert copies.positions.tolist() == [position for group in alike for position, _, _ in group]
    assert copies.groups.tolist() == [number for number, group in enumerate(alike) for _ in group]
    assert copies.within == sum(len({x[1:] for x in group}) < len(group) for group in alike)
    assert copies.across_labels == sum(len({label for _, _, label in group if label >= 0}) > 1 for group in alike)
    assert copies.across_splits == sum(len({split for _, split, _ in group}) > 1 for group in alike)


# Violations whose hashes fit


@pytest.mark.proof
def test_no_content_whose_hashes_fit_is_a_traceback(root: Path):
    """Damage of every kind and length, with the manifest made to fit: a failure or harmless, never an exception."""
    random = np.random.default_rng(8)
    names = sorted(digests(root).keys() - {"dataset.json"})
    good = {name: (root / name).read_bytes() for name in [*names, "dataset.json"]}
    failures = 0
    for count in range(260):
        name = names[count % len(names)]
        bad = bytearray(good[name])
        start, length = int(random.integers(min(len(bad), 700))), int(random.integers(1, 60))
        bit = bytes([bad[start] ^ 1 << int(random.integers(8))])
        stop, content = [(start + 1, bit), (start + length, random.bytes(length)), (start + length, b""), (None, b"")][
            count // len(names) % 4
        ]
        bad[start:stop] = content
        (root / name).write_bytes(bad)
        remake(root)
        failures += bool(failing(root, quick=False))
        for changed in (name, "dataset.json"):
            (root / changed).write_bytes(good[changed])
    assert failures > 200  # the others changed only padding, mean.png, or the names of skipped images


def tar(change: Callable[[Members], Members]) -> Callable[[Path], None]:
    return lambda root: rewrite(root, change(members_of(root)))


def data(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda root: (root / name).write_bytes(change((root / name).read_bytes()))


def sample(field: str, position: int, value: int) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        samples = np.load(root / TABLE)
        samples[field][position] = value
        np.save(root / TABLE, samples)

    return change


def unlabelled(root: Path) -> None:
    rewrite(root, [member for i, member in enumerate(members_of(root)) if i != 1])
    sample("label", 0, -1)(root)


def array(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def changed(root: Path) -> None:
        with np.load(root / "statistics.npz") as arrays:
            every = {key: change(arrays[key]) if key == name else arrays[key] for key in arrays}
        np.savez(root / "statistics.npz", **every)

    return changed


@pytest.mark.parametrize(
    ("change", "file", "words"),
    [
        (tar(lambda m: [m[0], (m[1][0], b"3"), *m[2:]]), f"{SHARD}.tar", "neither a KEY.jpg nor a label from 0 to 2"),
        (tar(lambda m: m + m[:2]), f"{SHARD}.tar", "holds 16 samples, the manifest promises 15"),
        (unlabelled, TABLE, "sample 0 is in no shard or class of dataset.json (shard 0, offset 512, "),
        (data(f"{SHARD}.idx", lambda text: text.replace(b"jpg 512 ", b"jpg 513 ")), f"{SHARD}.idx", "not the index"),
        *((sample(field, 7, 513), TABLE, f"sample 7: {field} 513, but ") for field in ("offset", "size", "crc32")),
        (sample("label", 7, 2), TABLE, "sample 7: label 2, but "),
        (data("skipped.jsonl", lambda text: text * 2), "skipped.jsonl", "lists {'train': 2}"),
        (data("skipped.jsonl", lambda text: b"[" + text), "skipped.jsonl", "does not load"),
        (
            array("mean_image", lambda a: np.nextafter(a, 300)),
            "statistics.npz",
            "mean_image is not what its",
        ),
        (array("sum_image", lambda a: a + 1), "statistics.npz", "colour sums of the training shards"),
        (array("n", lambda n: n + 1), "statistics.npz", "differs from the statistics"),
    ],
)
def test_a_violation_whose_hashes_fit(root: Path, change: Callable[[Path], object], file: str, words: str):
    change(root)
    remake(root)
    assert_one_failure(root, file, words)


def test_names_in_a_shard_are_printed_escaped(root: Path):
    rewrite(root, [*members_of(root), ("\x1b[2J\n\udcff.txt", b"")])
    remake(root)
    line = verify(root, "--quick", "--workers", 1).output.splitlines()[0]
    assert line == rf"{SHARD}.tar: \x1b[2J\n\udcff.txt: neither a KEY.jpg nor a label from 0 to 2"
    with open(root / f"{SHARD}.tar", "r+b") as file:
        file.write(b"\x1b\n\xff\0")
    with SampleReader(load(root), "train") as reader:
        assert reader.key(0) == r"\x1b\n\ufffd"


@pytest.mark.parametrize(
    ("change", "shards", "file", "words"),
    [
        (lambda image: image.resize((31, 32)), (SHARD,), f"{SHARD}.tar", ".jpg: 31×32 JPEG, not an RGB JPEG of 32×32"),
        (lambda image: image.convert("L"), (SHARD,), f"{SHARD}.tar", "32×32 not RGB"),
        (lambda image: image.point(lambda x: 255 - x), ALL, "statistics.npz", "mean colour of the stored JPEGs"),
        (lambda image: image.filter(ImageFilter.BoxBlur(8)), ALL, "statistics.npz", "eigenvalues of the stored JPEGs"),
    ],
)
def test_stored_pictures(
    root: Path, change: Callable[[Image.Image], Image.Image], shards: tuple[str, ...], file: str, words: str
):
    for shard in shards:
        members = members_of(root, shard)
        for i, (name, data) in enumerate(members):
            if name.endswith(".jpg"):
                out = io.BytesIO()
                change(Image.open(io.BytesIO(data))).save(out, "JPEG", quality=95)
                members[i] = (name, out.getvalue())
        rewrite(root, members, shard)
    remake(root)
    assert failing(root) == []  # --quick does not decode
    assert_one_failure(root, file, words)


@pytest.mark.parametrize(
    ("change", "file", "words"),
    [
        (lambda body: body["splits"]["train"]["shards"][0]["sum_color"].reverse(), "statistics.npz", "colour sums"),
        (lambda body: body["splits"]["val"].update(skipped=1), "skipped.jsonl", "the manifest promises"),
        (lambda body: body["classes"][0].update(wnid="zoo"), "dataset.json", "ranks of the sorted wnids"),
        (lambda body: body["files"].update(a={"bytes": 1, "sha256": "0" * 64}), "a", "missing"),
        (lambda body: body["files"].pop("mean.png"), "mean.png", "not listed"),
    ],
)
def test_dataset_json(root: Path, change: Callable[[dict], object], file: str, words: str):
    remake(root, change)
    failures = check(load(root))
    assert any(failure.file == file and words in failure.reason for failure in failures), failures


def test_a_dataset_without_info_json_stays_valid(root: Path, raw: Path):
    """Older builds wrote none."""
    (root / "_info.json").unlink()
    remake(root, lambda body: body["files"].pop("_info.json"))
    assert verify(root).exit_code == 0
    (root / "mean.png").unlink()
    result = verify(root, "--repair", raw, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert not (root / "_info.json").exists()
    manifest.load(root)
