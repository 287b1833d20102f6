"""The tiers of supply: the bytes of the decoder from each, in every option; damage; what is chosen, and said."""

import json
import logging
import os
import re
import shutil
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import build, make_tier, one_line
from pipeline import UserError, manifest, records, tier
from pipeline.online import Batch, Loader, tuner
from pipeline.online.samples import SampleReader
from pipeline.online.tiers import Records
from runs import resume, train
from stored import damage
from trainer import checkpoint as checkpoints
from trainer import data as loaders
from trainer import metrics
from trainer import recipe as recipes

STEPS = 12  # of 6 an epoch
SIZE = 7  # samples of a batch
ALL = 10**9  # bytes of memory


def make(root: Path, kind: str) -> None:
    assert make_tier(root, "--format", kind).exit_code == 0


@pytest.fixture(scope="module")
def rgb(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `dataset` with its records as RGB. Read only."""
    root = Path(shutil.copytree(dataset, tmp_path_factory.mktemp("rgb") / "dataset"))
    make(root, "rgb")
    return root


@pytest.fixture(scope="module")
def yuv(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `dataset` with its records as 4:2:0 planes. Read only."""
    root = Path(shutil.copytree(dataset, tmp_path_factory.mktemp("yuv") / "dataset"))
    make(root, "yuv420")
    return root


@pytest.fixture
def tiny(small: Path, tmp_path: Path) -> Path:
    """A copy of `small`, pictures of 32 pixels, with both tiers, to damage."""
    root = Path(shutil.copytree(small, tmp_path / "dataset"))
    for kind in records.KINDS:
        make(root, kind)
    return root


def assert_same(one: Batch, other: Batch) -> None:
    assert (one.step, one.epoch, one.ids.tolist()) == (other.step, other.epoch, other.ids.tolist())
    assert torch.equal(one.labels, other.labels)
    assert one.images.dtype == other.images.dtype
    assert torch.equal(one.images, other.images)


TIERS: list[tuple[str, dict[str, Any]]] = [  # data set, and options of the loader
    ("rgb", {"tier": "raw"}),
    ("yuv", {"tier": "raw", "threads": 1}),
    ("yuv", {"tier": "device", "device_bytes": ALL}),
    ("yuv", {"tier": "device", "device_bytes": 17 * 98_304 + 1}),
    ("rgb", {"tier": "device", "device_bytes": ALL, "threads": 3}),  # whose records are decoded from the shards
    ("rgb", {"tier": "auto", "max_stall": 0.0}),
]
VIEWS: list[tuple[str, dict[str, Any]]] = [  # split, and options of the views
    ("train", {}),
    ("train", {"output": "uint8"}),
    ("train", {"mean": "aligned", "output": "bfloat16"}),
    ("train", {"mean": "colour", "lighting": "off", "view": 255, "crop_chunk": 3}),
    ("train", {"order": "shards", "window": 20, "positions": "paper", "view": 131, "output": "uint8"}),
    ("val", {"views": "centre"}),
    ("val", {"views": "ten", "mean": "aligned"}),
    ("val", {"views": "ten", "output": "uint8"}),
    ("val", {"views": "nine"}),
]


@pytest.mark.parametrize(("split", "views"), VIEWS)
def test_every_tier_gives_the_decoders_bytes(dataset: Path, rgb: Path, yuv: Path, split: str, views: dict[str, Any]):
    """Over two epochs, so that what is resident after the first is used in the second."""
    roots = {"rgb": rgb, "yuv": yuv}
    with Loader(dataset, split, batch_size=SIZE, tier="jpeg", **views) as loader:
        expected = list(islice(loader, STEPS))
    assert expected
    for name, options in TIERS:
        with Loader(roots[name], split, batch_size=SIZE, **options, **views) as loader:
            for batch, other in zip(expected, islice(loader, STEPS), strict=True):
                assert_same(batch, other)


@pytest.mark.parametrize(("views", "output"), [("random", "float32"), ("random", "uint8"), ("centre", "float32")])
def test_raw_pictures_are_resized_as_decoded_ones(rgb: Path, views: str, output: str):
    split = "train" if views == "random" else "val"
    given: dict[str, Any] = {"batch_size": SIZE, "recipe": "imagenet", "views": views, "output": output}
    with Loader(rgb, split, tier="jpeg", **given) as jpeg, Loader(rgb, split, tier="raw", **given) as raw:
        batches = list(islice(jpeg, 6))
        for batch, other in zip(batches, islice(raw, 6), strict=True):
            assert_same(batch, other)


@pytest.mark.parametrize("kind", ["alexnet", "imagenet"])
def test_a_rank_gets_its_part(rgb: Path, kind: str):
    given: dict[str, Any] = {"batch_size": SIZE, "rank": 1, "ranks": 3, "recipe": kind}
    with Loader(rgb, tier="jpeg", **given) as jpeg, Loader(rgb, tier="raw", **given) as raw:
        for batch, other in islice(zip(jpeg, raw), 7):
            assert_same(batch, other)


def test_a_state_of_one_tier_goes_on_in_another(dataset: Path, rgb: Path, yuv: Path):
    """Two steps of each in turn, from the middle of one epoch to the next."""
    with Loader(dataset, batch_size=SIZE, tier="jpeg") as loader:
        expected = iter(list(islice(loader, 2 * len(TIERS) + 4)))
    state = None
    for name, options in [("rgb", {"tier": "jpeg"}), *TIERS, ("yuv", {"tier": "jpeg"})]:
        with Loader({"rgb": rgb, "yuv": yuv}[name], batch_size=SIZE, **options) as loader:
            if state:
                loader.load_state_dict(state)
            for batch, other in zip(islice(expected, 2), loader):
                assert_same(batch, other)
            state = loader.state_dict()
    assert next(expected, None) is None


def test_nothing_is_read_once_all_is_resident(tiny: Path):
    with Loader(tiny, batch_size=SIZE, view=28, tier="device", device_bytes=ALL) as loader:
        steps = loader.steps_per_epoch
        with Loader(tiny, batch_size=SIZE, view=28, tier="jpeg") as jpeg:
            expected = list(islice(jpeg, 3 * steps))
        for batch, other in zip(islice(expected, steps + 4), loader):  # what is prepared ahead is of the second epoch
            assert_same(batch, other)
        for path in [*tiny.rglob("*.raw"), *tiny.rglob("*.tar")]:
            os.truncate(path, 0)
        for batch, other in zip(expected[steps + 4 :], loader):
            assert_same(batch, other)


# ---- damage ----


def read_all(data: manifest.Manifest, kind: str, reader: SampleReader) -> list[bytes]:
    found = Records(data, "val", kind, tier.load(data, kind), reader)
    out = np.empty(found.bytes, np.uint8)
    pictures = []
    for sample in range(data.split("val").samples):
        found.read(sample, out)
        pictures.append(out.tobytes())
    found.close()
    return pictures


@pytest.mark.parametrize("kind", records.KINDS)
def test_every_flipped_byte_is_found_and_the_shards_picture_taken(
    tiny: Path, kind: str, caplog: pytest.LogCaptureFixture
):
    """Each byte of a file of nine pictures and their digests in turn, one bit of it."""
    data = manifest.load(tiny)
    path = tier.folder(tiny, kind) / "val-000000.raw"
    content = bytearray(path.read_bytes())
    reader = SampleReader(data, "val")
    expected = read_all(data, kind, reader)
    assert not caplog.records
    step = 7  # bytes; coprime to every size in the file
    with open(path, "r+b") as file:
        for at in range(0, len(content), step):
            os.pwrite(file.fileno(), bytes([content[at] ^ 1 << at % 8]), at)
            assert read_all(data, kind, reader) == expected, at
            os.pwrite(file.fileno(), content[at : at + 1], at)
    reader.close()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(range(0, len(content), step))
    pattern = (
        rf"{path}: damaged at sample \d \(key \w+\); its pictures come from the shard; mend it: python \S+ {tiny} "
    )
    assert all(re.match(pattern, line) for line in lines), lines[0]
    assert f"--format {kind}" in lines[0]


@pytest.mark.parametrize("harm", ["cut", "remove", "zero"])
def test_a_file_that_changes_while_it_is_used_costs_no_batch(tiny: Path, harm: str, caplog: pytest.LogCaptureFixture):
    path = tier.folder(tiny, "rgb") / "train-000000.raw"
    with (
        Loader(tiny, batch_size=SIZE, view=28, tier="raw") as raw,
        Loader(tiny, batch_size=SIZE, view=28, tier="jpeg") as jpeg,
    ):
        if harm == "remove":
            path.unlink()
        elif harm == "cut":
            os.truncate(path, 5000)  # sample 0 is whole
        else:
            os.truncate(path, 0)
            os.truncate(path, 10**6)
        for batch, other in islice(zip(jpeg, raw), 14):
            assert_same(batch, other)
    words = {"cut": "cut short", "remove": "No such file or directory", "zero": "(damaged|cut short)"}[harm]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) <= 1 if harm == "remove" else len(lines) == 1  # an open file is still there
    assert all(re.match(rf"{path}: {words},? at sample", line) for line in lines), lines


def test_a_picture_that_is_damaged_everywhere_is_named_or_replaced(tiny: Path):
    path = tier.folder(tiny, "rgb") / "val-000000.raw"
    damage(tiny, 4, split="val")
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), b"damage", 4 * 3072)
    given: dict[str, Any] = {"batch_size": 2, "views": "centre", "view": 28}
    with pytest.raises(UserError) as caught, Loader(tiny, "val", tier="raw", **given) as loader:
        list(loader)
    one_line(caught, "sample 4 (key val_checks_0001)", "max_bad=0", "--repair RAW")
    with (
        Loader(tiny, "val", tier="raw", max_bad=1, **given) as raw,
        Loader(tiny, "val", tier="jpeg", max_bad=1, **given) as jpeg,
    ):
        for batch, other in zip(jpeg, raw, strict=True):
            assert_same(batch, other)
        assert raw.bad == jpeg.bad == [4]


def test_what_a_run_before_found_bad_is_replaced_from_records_too(tiny: Path):
    """Their records are whole, but the batches stay those that the other tier gave."""
    given: dict[str, Any] = {"batch_size": SIZE, "view": 28, "max_bad": 2}
    with Loader(tiny, tier="jpeg", **given) as jpeg, Loader(tiny, tier="raw", **given) as raw:
        state = jpeg.state_dict() | {"bad": [3, 20]}
        jpeg.load_state_dict(state)
        raw.load_state_dict(state)
        for batch, other in islice(zip(jpeg, raw), 8):
            assert_same(batch, other)
            assert not {3, 20} & set(other.ids.tolist())


# ---- choice ----


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught, Loader(*arguments, **options):
        pass
    return one_line(caught)


def test_a_tier_that_is_not_to_be_had_is_refused_with_what_to_do(dataset: Path, raw: Path, tmp_path: Path, tiny: Path):
    assert refused(dataset, tier="raw").endswith(f"make it: python tools/raw_tier.py {dataset} --format rgb")
    assert "must be one of auto, jpeg, raw, device" in refused(dataset, tier="disk")
    assert "decoding workers" in refused(dataset, tier="raw", workers=["localhost:1"])
    assert "max_stall=2: must be between 0 and 1" in refused(dataset, max_stall=2)
    assert "recipe='imagenet'" in refused(dataset, tier="device", recipe="imagenet")
    other, whole = tmp_path / "other", tmp_path / "whole"
    assert build(raw, other, "--size", 32, "--subsampling", "4:4:4", "--workers", 1).exit_code == 0
    assert "stored with 4:4:4" in refused(other, tier="device", view=28)
    assert build(raw, whole, "--size", 32, "--crop", "none", "--workers", 1).exit_code == 0
    assert "differ in size" in refused(whole, tier="raw", recipe="imagenet")
    made = tier.load(manifest.load(tiny), "rgb")
    shutil.rmtree(tiny / "raw-yuv420")
    for codec, files, words in (
        ("0" * 64, made.files, "other pixels than this machine's"),
        (made.codec, dict(list(made.files.items())[1:]), "made from other shards"),
    ):
        changed = tier.Tier(made.root, made.kind, made.size, codec, made.built_with, files)
        (made.root / tier.FILE_NAME).write_bytes(changed.to_json())
        assert words in refused(tiny, tier="raw", view=28)


def chosen(root: Path, **options: Any) -> tuple[str, list[str]]:
    with Loader(root, batch_size=SIZE, view=28, **options) as loader:
        return loader.tier, loader.news


def test_auto_takes_what_is_there_and_says_why_it_does_not(tiny: Path, small: Path):
    assert chosen(small) == ("jpeg", [])
    assert chosen(tiny) == ("raw", [])
    path = tiny / "raw-rgb" / "train-000001.raw"
    os.truncate(path, 10)
    name, (line,) = chosen(tiny)
    assert name == "jpeg"
    assert line.startswith(f"not used: {path}: has 10 bytes")
    assert line.endswith(f"make it: python tools/raw_tier.py {tiny} --format rgb")


def test_the_tier_in_memory_says_what_fits(tiny: Path):
    samples, record = manifest.load(tiny).split("train").samples, 32 * 32 * 3 // 2
    _, (every,) = chosen(tiny, tier="device", device_bytes=ALL)
    _, (some,) = chosen(tiny, tier="device", device_bytes=10 * record)
    shutil.rmtree(tiny / "raw-yuv420")
    _, (none,) = chosen(tiny, tier="device", device_bytes=0)
    _, (own,) = chosen(tiny, tier="device")
    assert every == f"tier device: {samples} of {samples} samples fit in 1,000,000,000 bytes of cpu"
    assert some.endswith(f"the rest from raw-yuv420 on disk: {samples * record:,} bytes would hold all")
    assert none.startswith(f"tier device: 0 of {samples} ")
    assert "the rest from the shards" in none
    assert own.startswith(f"tier device: {samples} of {samples} ")


def test_a_loader_that_tunes_itself_gives_the_same_batches(rgb: Path, dataset: Path):
    """Nothing keeps it waiting, and so it turns whatever there is."""
    with (
        Loader(rgb, batch_size=SIZE, threads=1, max_stall=0.0) as loader,
        Loader(dataset, batch_size=SIZE, tier="jpeg") as jpeg,
    ):
        for batch, other in islice(zip(jpeg, loader), 120):
            assert_same(batch, other)
        assert loader.news
        assert all(line.startswith("step ") and "stall" in line for line in loader.news), loader.news
        assert not jpeg.news


def turn(loader: Loader, setting: tuner.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a batch, after which the tuner chooses a setting for the next one."""
    with monkeypatch.context() as patch:
        patch.setattr(tuner.Tuner, "after", lambda *arguments: setting)
        next(loader)


def test_nothing_is_left_over_where_settings_are_turned(rgb: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch):
    """Threads and descriptors, after rounds of settings; a state that is loaded, or an end, before the next batch."""
    settings = [tuner.Setting(name, 1 + i % 3, 1 + i % 4, 2 + i % 5, 0.9) for i, name in enumerate(["raw", "jpeg"] * 4)]
    monkeypatch.setattr(tuner.Tuner, "after", lambda *arguments: None)
    before = set(threading.enumerate())
    with Loader(rgb, batch_size=SIZE) as loader, Loader(dataset, batch_size=SIZE, tier="jpeg") as jpeg:
        threads, files = [], []
        for _ in range(3):
            for setting in settings:
                turn(loader, setting, monkeypatch)
            next(loader)
            threads.append(threading.active_count())
            files.append(len(os.listdir("/proc/self/fd")))
        assert max(threads) < min(threads) + len(settings)  # some pools begin a thread only when it is needed
        assert len(set(files)) == 1
        turn(loader, settings[0], monkeypatch)
        state = {**loader.state_dict(), "step": 5}
        for each in (loader, jpeg):
            each.load_state_dict(state)
        for batch, other in islice(zip(jpeg, loader), 2 * SIZE):
            assert_same(batch, other)
        assert loader.tier == "raw"
        turn(loader, settings[1], monkeypatch)
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)
    assert set(threading.enumerate()) == before


def test_lines_go_to_the_log_by_default(tiny: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "penstock")
    with Loader(tiny, batch_size=SIZE, view=28, tier="device", device_bytes=ALL) as loader:
        next(loader)
    assert [record.getMessage()[:12] for record in caplog.records] == ["tier device:"]


# ---- training ----


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "time"} for line in metrics.read(run)]


def test_a_run_ends_with_the_same_weights_whatever_its_tier(yuv: Path, rgb: Path, tmp_path: Path):
    """Losses and weights bit for bit: in one go, and begun with one tier and ended with another."""
    steps = 6
    assert train(rgb, tmp_path / "jpeg", steps, 'data.tier="jpeg"').exit_code == 0
    expected = checkpoints.load(tmp_path / "jpeg")
    for name, root, words in (
        ("raw", rgb, ('data.tier="raw"',)),
        ("device", yuv, ('data.tier="device"', "data.hardware_share=0.5")),
        ("auto", rgb, ("data.max_stall=0.0",)),
    ):
        result = train(root, tmp_path / name, steps, *words)
        assert result.exit_code == 0, result.output
        assert lines_of(tmp_path / name) == lines_of(tmp_path / "jpeg")
        for key, weights in checkpoints.load(tmp_path / name).weights.items():
            assert torch.equal(weights, expected.weights[key]), (name, key)
    half, other = tmp_path / "half", tmp_path / "other"
    for run, first, second in ((other, "jpeg", "jpeg"), (half, "raw", "device")):
        assert train(rgb, run, 4, f'data.tier="{first}"').exit_code == 0
        ended = resume(rgb, run, f"train.steps={steps}", f'data.tier="{second}"', more=("--max-stall", 5))
        assert ended.exit_code == 0, ended.output
    assert "loader: tier device: 41 of 41 samples fit in " in ended.stdout
    expected = checkpoints.load(other)
    for key, weights in checkpoints.load(half).weights.items():
        assert torch.equal(weights, expected.weights[key]), key
    changes = checkpoints.load(half).history[-1]["changed"]
    assert changes["data.tier"] == ["raw", "device"]
    assert changes["data.max_stall"] == [0.01, 0.05]


@pytest.mark.parametrize(("name", "judged"), [("jpeg", "jpeg"), ("auto", "raw"), ("device", "raw")])
def test_a_run_without_records_is_validated_without_them(rgb: Path, name: str, judged: str):
    recipe, devices = recipes.load("tiny", [f'data.tier="{name}"']), [torch.device("cpu")]
    with loaders.evaluation(manifest.load(rgb), recipe, "val", "centre", devices) as loader:
        assert loader.tier == judged


def test_a_run_says_why_its_tier_is_not_there_and_what_its_loader_does(dataset: Path, yuv: Path, tmp_path: Path):
    refused = train(dataset, tmp_path / "refused", 1, 'data.tier="raw"')
    assert refused.exit_code == 2
    (line,) = refused.stderr.splitlines()
    assert line.endswith(f"missing; make it: python tools/raw_tier.py {dataset} --format rgb")
    assert not (tmp_path / "refused").exists()
    for value in ("-1", "101", "nan"):
        assert train(dataset, tmp_path / "refused", 1, more=("--max-stall", value)).exit_code == 2
    result = train(yuv, tmp_path / "run", 1, 'data.tier="device"', more=("--json",))
    events = [json.loads(line) for line in result.stdout.splitlines()]
    (told,) = [event for event in events if event["event"] == "loader"]
    assert told["text"].startswith("tier device: 41 of 41 samples fit in ")
