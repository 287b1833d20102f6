"""The dataset directory, here and in a store: other people's readers, the same bytes every time, and every refusal."""

import hashlib
import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from wds2idx import IndexCreator

from conftest import build, digests, drawn, saved, verify
from pipeline import LFS_POINTER, UserError, manifest
from pipeline.image import rescale
from pipeline.manifest import DatasetError
from pipeline.offline.build import ShardSlice
from pipeline.offline.build import build as write
from s3 import Store, empty_bucket, running_server  # noqa: F401 – two are fixtures
from stored import evaluation_plan
from tars import tar_bytes, tree

LITTLE = ("--workers", 1, "--samples-per-shard", 16)


def shard_paths(root: Path, split: str) -> list[Path]:
    return [root / shard.name for shard in manifest.load(root).split(split).shards]


def test_the_directory_holds_what_its_manifest_lists(dataset: Path, raw: Path):
    built = manifest.load(dataset)
    assert {name: (split.samples, split.skipped) for name, split in built.splits.items()} == {
        "train": (41, 1),
        "val": (9, 0),
    }
    assert set(built.files) | {"dataset.json"} == set(digests(dataset))
    assert all(digests(dataset)[name] == record.sha256 for name, record in built.files.items())
    lines = [json.loads(line) for line in (dataset / "skipped.jsonl").read_text().splitlines()]
    assert lines == [
        {"key": "train_checks_0003", "reason": "truncated", "source": "train/checks/0003.jpg", "split": "train"}
    ]
    for name in built.files:
        if not name.endswith((".tar", ".npz", ".npy", ".png")):
            assert str(raw) not in (dataset / name).read_text()


def test_index_is_what_wds2idx_writes(dataset: Path, tmp_path: Path):
    paths = shard_paths(dataset, "train") + shard_paths(dataset, "val")
    assert len(paths) == 4
    for path in paths:
        with IndexCreator(str(path), str(tmp_path / "theirs.idx"), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "theirs.idx").read_bytes() == path.with_suffix(".idx").read_bytes()


def test_webdataset_reads_the_shards(dataset: Path, raw: Path):
    built = manifest.load(dataset)
    shards = [str(path) for path in shard_paths(dataset, "train")]
    theirs = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert len(theirs) == 41
    records = built.samples("train")
    for sample, record in zip(theirs, records):
        assert int(sample["cls"]) == record["label"]
        assert len(sample["jpg"]) == record["size"]
        name = built.classes[record["label"]].wnid
        original = raw / "train" / name / f"{sample['__key__'][-4:]}.jpg"
        assert sample["__key__"] == f"train_{name}_{original.stem}"
        assert bytes(record["digest"]) == hashlib.sha256(original.read_bytes()).digest()[:16]
        stored = np.asarray(Image.open(io.BytesIO(sample["jpg"]))).astype(int)
        assert np.abs(stored - rescale(Image.open(original), 256)[..., :3]).mean() < 12


def test_timm_finds_the_splits(dataset: Path):
    """As its reader of WebDataset does: name, num_samples, filenames below the root and shard_lengths of a split."""
    info = json.loads((dataset / "_info.json").read_bytes())
    built = manifest.load(dataset)
    assert info["splits"].keys() == built.splits.keys() == {"train", "val"}
    for name, split in built.splits.items():
        described = info["splits"][name]
        assert (described["name"], described["num_samples"]) == (name, split.samples)
        lengths = [
            len(list(webdataset.WebDataset(str(dataset / file), shardshuffle=False))) for file in described["filenames"]
        ]
        assert lengths == described["shard_lengths"]
        assert sum(lengths) == split.samples


def test_statistics_are_those_of_the_rescaled_pixels(dataset: Path, raw: Path):
    pixels = [
        rescale(Image.open(path), 256)[..., :3]
        for path in sorted((raw / "train").rglob("*.jpg"))
        if path != raw / "train" / "checks" / "0003.jpg"
    ]
    built = manifest.load(dataset)
    statistics = built.statistics()
    assert statistics.n == len(pixels) == 41
    np.testing.assert_allclose(statistics.mean_image, np.mean(pixels, 0, dtype=np.float64), rtol=1e-12)
    flat = np.stack(pixels).reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(statistics.covariance, np.cov(flat.T, bias=True), rtol=1e-9)
    shards = built.split("train").shards
    assert np.sum([shard.sum_color for shard in shards], 0).tolist() == flat.sum(0).tolist()
    assert np.sum([shard.second_moments for shard in shards], 0).tolist() == (flat.T @ flat).tolist()


def test_another_seed_gives_another_order_of_training(dataset: Path, raw: Path, tmp_path: Path):
    assert build(raw, tmp_path / "seed", *LITTLE, "--seed", 1).exit_code == 0
    other = digests(tmp_path / "seed")
    assert other["train/train-000000.tar"] != digests(dataset)["train/train-000000.tar"]
    assert other["val/val-000000.tar"] == digests(dataset)["val/val-000000.tar"]


def test_a_dataset_that_holds_what_a_file_system_puts_there_is_empty(dataset: Path, raw: Path, tmp_path: Path):
    junk = (".DS_Store", "._.DS_Store", "lost+found/1/file")
    root = tree(tmp_path / "volume", dict.fromkeys(junk, b"not ours"))
    done = build(raw, root, *LITTLE)
    assert done.exit_code == 0, done.output
    assert {name: file for name, file in digests(root).items() if name not in junk} == digests(dataset)
    assert verify(root, "--quick").exit_code == 0


def test_a_pipe_in_place_of_the_lock_is_not_waited_for(raw: Path, tmp_path: Path):
    (tmp_path / ".build").mkdir()
    os.mkfifo(pipe := tmp_path / ".build" / "lock")
    refused = build(raw, tmp_path, *LITTLE)
    assert (refused.exit_code, refused.output.splitlines()[-1]) == (2, f"Error: {pipe}: No such device or address")


@pytest.mark.proof
def test_folders_in_a_store_give_the_same_bytes_in_a_store(s3: Store, raw: Path, dataset: Path):
    s3.upload(raw, "raw")
    arguments = (f"{s3.url}/raw", f"{s3.url}/out", *LITTLE)
    result = build(*arguments)
    assert result.exit_code == 0, result.output
    assert s3.digests("out") == digests(dataset)
    assert manifest.load(f"{s3.url}/out").identity == manifest.load(dataset).identity
    again = build(*arguments)
    assert again.exit_code == 2
    assert "a finished dataset is there already" in again.output
    assert verify(f"{s3.url}/out").exit_code == 0
    assert build(f"{s3.url}/nothing", f"{s3.url}/other").exit_code == 2


@pytest.mark.proof
def test_archives_in_a_store_with_a_failing_server_and_two_workers(s3: Store, raw: Path, tmp_path: Path):
    """The tars of synsets inside a tar, read by ranges; one of five answers is an error or torn."""
    synsets = {}
    for number, folder in enumerate(sorted((raw / "train").iterdir())):
        pictures = {f"n{number:08d}_{path.stem}.JPEG": path.read_bytes() for path in sorted(folder.glob("*.jpg"))}
        synsets[f"n{number:08d}.tar"] = tar_bytes(pictures)
    s3.upload(tree(tmp_path / "raw", {"fall11_whole.tar": tar_bytes(synsets)}), "tars")
    assert build(tmp_path / "raw", tmp_path / "local", *LITTLE).exit_code == 0
    s3.faults(0.2, seed=3)
    result = build(f"{s3.url}/tars", f"{s3.url}/built", "--workers", 2, "--samples-per-shard", 16)
    assert result.exit_code == 0, result.output
    s3.faults(0.0)
    assert s3.digests("built") == digests(tmp_path / "local")


def test_pictures_that_git_lfs_has_not_fetched_are_skipped_for_this_reason(raw: Path, tmp_path: Path):
    pointer, folder = LFS_POINTER + b"v1\noid sha256:0\nsize 400000000\n", tmp_path / "raw"
    for name in ("blobs", "stripes"):
        shutil.copytree(raw / "train" / name, folder / name)
    tree(folder, {"blobs/99.jpg": pointer, "stripes/99.jpg": pointer})
    assert build(folder, tmp_path / "out", "--workers", 1, "--size", 32).exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    skipped = {(line["source"], line["reason"]) for line in lines}
    assert skipped == {("blobs/99.jpg", "lfs_pointer"), ("stripes/99.jpg", "lfs_pointer")}
    refused = build(tree(tmp_path / "tars", {"train-0.tar": pointer}), tmp_path / "none")
    assert refused.exit_code == 2
    assert refused.stderr == f"Error: {tmp_path}/tars: train-0.tar: a Git LFS pointer; run git lfs pull\n"


def test_no_training_picture_that_decodes_is_an_error(tmp_path: Path):
    tree(tmp_path / "raw", {"a/1.jpg": b"", "b/1.jpg": b""})
    result = build(tmp_path / "raw", tmp_path / "out", "--holdout", 0)
    assert result.exit_code == 2
    assert "no training image could be decoded; the reasons: empty" in result.output
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_filter_subsampling_and_orientation_are_options(raw: Path, tmp_path: Path):
    """One picture with an orientation tag, stored as asked, against Pillow and `image.rescale`."""
    for name in ("a", "b"):
        (tmp_path / "raw" / name).mkdir(parents=True)
    picture, exif = Image.open(next((raw / "val" / "blobs").iterdir())), Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    picture.save(tmp_path / "raw" / "a" / "1.png", exif=exif)
    picture.save(tmp_path / "raw" / "b" / "2.png")
    options = ("--filter", "area", "--subsampling", "4:4:4", "--exif", "apply", "--quality", 100, "--holdout", 0)
    result = build(tmp_path / "raw", tmp_path / "out", "--workers", 1, *options)
    assert result.exit_code == 0, result.output
    for sample in webdataset.WebDataset(str(tmp_path / "out/train/train-000000.tar"), shardshuffle=False):
        stored = Image.open(io.BytesIO(sample["jpg"]))
        assert stored.layer[0][1:3] == (1, 1)  # type: ignore[attr-defined]  # chroma at the full resolution
        raw_picture = picture.rotate(-90, expand=True) if sample["__key__"] == "1" else picture
        expected = io.BytesIO()
        Image.fromarray(rescale(raw_picture, 256, "area")[..., :3]).save(expected, "JPEG", quality=100, subsampling=0)
        assert sample["jpg"] == expected.getvalue()


@pytest.fixture
def torn(tmp_path: Path) -> Path:
    """12 pictures of two classes: five whose LF became CR LF, and one with bytes too many before its end."""
    files = {}
    for name in ("a", "b"):
        files |= {f"{name}/{i}.jpg": saved(drawn("blobs", f"torn{name}{i}", 90, 80), "JPEG") for i in range(6)}
    for name in ("a/1.jpg", "a/3.jpg", "b/0.jpg", "b/2.jpg", "b/4.jpg"):
        files[name] = files[name].replace(b"\n", b"\r\n")
    files["b/5.jpg"] = files["b/5.jpg"][:-2] + bytes(20) + files["b/5.jpg"][-2:]
    return tree(tmp_path / "torn", files)


ONE_BY_ONE = ("--workers", 1, "--size", 32, "--holdout", 0, "--samples-per-shard", 1)


def test_warnings_of_the_decoder_are_counted_and_said(torn: Path, tmp_path: Path):
    """Of all shards, whoever built them; the build is otherwise like any other."""
    problem = "6 pictures were decoded although libjpeg warned of damaged data, such as "
    cause = "; in 5 a CR stands before each LF, as after a transfer as text: fetch them again as binary files"
    warned = {"a/1.jpg", "a/3.jpg", "b/0.jpg", "b/2.jpg", "b/4.jpg", "b/5.jpg"}

    def is_said(output: str) -> bool:
        (line,) = (line for line in output.splitlines() if line.startswith("note: 6"))
        named = line.removeprefix(f"note: {problem}").removesuffix(cause).split(", ")
        return line == f"note: {problem}{', '.join(named)}{cause}" and len(named) == 3 and {*named} < warned

    done = build(torn, tmp_path / "once", *ONE_BY_ONE)
    assert done.exit_code == 0, done.output
    assert is_said(done.output)
    for part in ("1/2", "2/2"):
        assert build(torn, tmp_path / "parts", *ONE_BY_ONE, "--part", part).exit_code == 0
    assert is_said(build(torn, tmp_path / "parts", *ONE_BY_ONE, "--merge").output)
    assert digests(tmp_path / "parts") == digests(tmp_path / "once")
    last = json.loads(build(torn, tmp_path / "json", *ONE_BY_ONE, "--json").stdout.splitlines()[-1])
    assert last["decoder_warnings"].items() >= {"pictures": 6, "as_text": 5}.items()
    assert {*last["decoder_warnings"]["such_as"]} < warned
    for name in warned:
        (torn / name).unlink()
    assert "libjpeg" not in build(torn, tmp_path / "sound", *ONE_BY_ONE).output


def test_json_names_any_folder(raw: Path, tmp_path: Path):
    root = tmp_path / os.fsdecode(b"caf\xe9")
    lines = build(raw, root, *LITTLE, "--size", 32, "--json").stdout.splitlines()
    assert json.loads(lines[-1])["dataset"] == rf"{tmp_path}/caf\xe9"


def test_holdout_and_limit(raw: Path, tmp_path: Path):
    assert build(raw / "train", tmp_path / "a", "--workers", 1, "--holdout", 0.3).exit_code == 0
    splits = manifest.load(tmp_path / "a").splits
    assert sum(split.samples + split.skipped for split in splits.values()) == 42
    assert 5 <= splits["val"].samples <= 20
    assert build(raw, tmp_path / "b", "--workers", 1, "--limit", 10).exit_code == 0
    splits = manifest.load(tmp_path / "b").splits
    assert sum(split.samples + split.skipped for split in splits.values()) == 10
    for share, words in (("0.9", "0.9 is not in the range"), ("nan", "Error: holdout is nan, not from 0 to 0.5\n")):
        bad = build(raw, tmp_path / "c", "--holdout", share)
        assert bad.exit_code == 2
        assert words in bad.output


# A set for evaluation alone: classes and statistics are another data set's, and all pictures are of val


def test_a_set_for_evaluation_alone(small: Path, raw: Path, tmp_path: Path):
    """A build by parts that goes on with statistics of the same data set alone."""
    root, plan = tmp_path / "parts", evaluation_plan(raw, small, samples_per_shard=4)
    assert ({split: len(ids) for split, ids in plan.splits.items()}, plan.notes) == ({"val": 9}, ())
    write(plan, root, part=ShardSlice(1, 2))
    other = replace(plan, statistics=replace(plan.statistics, n=1))
    with pytest.raises(UserError, match=r"that differs in the statistics of --classes-of [0-9a-f]{12} → [0-9a-f]{12};"):
        write(other, root)
    built, of = write(plan, root), manifest.load(small)
    assert {name: (split.samples, split.skipped) for name, split in built.splits.items()} == {"val": (9, 0)}
    assert (built.classes, built.statistics_summary) == (of.classes, of.statistics_summary)
    for name in ("statistics.npz", "mean.png"):
        assert (root / name).read_bytes() == (small / name).read_bytes()
    write(evaluation_plan(raw, small, samples_per_shard=16), tmp_path / "whole")
    name = "val/val-000000.tar"
    assert (tmp_path / "whole" / name).read_bytes() == (small / name).read_bytes()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"size": 64}, "--size 64: {of} was built with 32; add --size 32"),
        ({"crop": "none"}, "--crop none: {of} was built with centre; add --crop centre"),
    ],
)
def test_a_set_for_evaluation_of_another_size_is_refused(
    small: Path, raw: Path, recipe: dict[str, int | str], message: str
):
    with pytest.raises(UserError, match=f"^{re.escape(message.format(of=small))}$"):
        evaluation_plan(raw, small, **recipe)


def test_a_set_for_evaluation_in_another_way_is_noted(small: Path, raw: Path):
    (note,) = evaluation_plan(raw, small, filter="area", quality=90, seed=1).notes
    remedy = "--filter bicubic --quality 95 makes them alike"
    assert note == f"pictures are made in another way than those of {small}; {remedy}"


def test_a_set_for_evaluation_without_a_picture_is_refused(small: Path, tmp_path: Path):
    files = {"train/blobs/0.png": saved(drawn("blobs", "0", 40, 40), "PNG"), "val/blobs/1.png": b"none"}
    plan = evaluation_plan(tree(tmp_path / "raw", files), small)
    with pytest.raises(UserError, match=r"no picture to evaluate could be decoded; the reasons: unrecognised$"):
        write(plan, tmp_path / "data")
    assert not (tmp_path / "data" / "dataset.json").exists()
    with pytest.raises(UserError, match=r"^no picture to evaluate is left: "):
        evaluation_plan(tmp_path / "raw", small, ["no such class"])


def test_a_damaged_dataset_is_an_error_that_names_the_file(dataset: Path, tmp_path: Path):
    def damaged(name: str, content: bytes | None) -> str:
        root = tmp_path / "copy"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(dataset, root)
        if content is None:
            (root / name).unlink()
        else:
            (root / name).write_bytes(content)
        with pytest.raises(DatasetError) as caught:
            loaded = manifest.load(root)
            loaded.statistics()
            loaded.samples("train")
        assert str(root / name) in str(caught.value)
        return str(caught.value)

    shutil.copytree(dataset, tmp_path / "elsewhere")
    assert manifest.load(tmp_path / "elsewhere").identity == manifest.load(dataset).identity
    size = (dataset / "statistics.npz").stat().st_size
    assert "missing" in damaged("train/train-000001.tar", None)
    assert "has 5 bytes" in damaged("train/train-000001.idx", b"short")
    assert "damaged" in damaged("statistics.npz", bytes(size))
    assert "damaged" in damaged("train/samples.npy", bytes((dataset / "train/samples.npy").stat().st_size))
    assert "not a manifest" in damaged("dataset.json", b"[]")
