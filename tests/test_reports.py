"""What people reported, rebuilt in small: each input is built by the command line, and every picture has its label.

../shared/data/reports/NN-name/make.py writes the inputs. A picture of a built set is known by the digest of its raw
bytes, which samples.npy holds; pictures of equal bytes may change places, which no one could see.
"""

import hashlib
import json
import os
import re
import runpy
import sys
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from click.testing import Result

from conftest import ROOT, build, finish
from trees import missing

Labels = Counter[tuple[str, str, str | None]]  # split, digest of the raw picture, name of its class
Maker = Callable[[str], tuple[Path, dict[str, Any]]]
OPTIONS = ("--size", 32, "--workers", 1)
WNIDS = ["n01440764", "n01443537"]
LFS = ("Git LFS pointer", "git lfs pull")


class Report(NamedTuple):
    """One input: `rules` tell split → regular expression of its pictures' paths, whose group is the class, if any.

    Where `refusal` is set too, either outcome is safe: the right labels, or a line with these fragments.
    """

    raw: str  # the report's number, and the folder below its target
    rules: dict[str, str] = {}  # noqa: RUF012  # never changed
    classes: tuple[str, ...] = ()  # in the order of their labels
    refusal: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    says: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def made(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Return a function that makes a report's input once: the folder, and the variables of its make.py."""
    inputs: dict[str, tuple[Path, dict[str, Any]]] = {}

    def make(number: str) -> tuple[Path, dict[str, Any]]:
        if number not in inputs:
            folder = report(shared, number)
            target = tmp_path_factory.mktemp("reports") / folder.name
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["make.py", str(target)])
                patch.setattr(sys, "path", [*sys.path])
                inputs[number] = target, runpy.run_path(str(folder / "make.py"))
        return inputs[number]

    return make


def report(shared: Path, number: str) -> Path:
    if not (folders := sorted((shared / "reports").glob(f"{number}-*"))):
        pytest.skip(f"no report {number} in {shared / 'reports'}")
    return folders[0]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def labels(dataset: Path) -> tuple[Labels, list[str]]:
    """Return what the shards of a built set hold, by tarfile, and the names of the classes in order of their labels."""
    manifest = json.loads((dataset / "dataset.json").read_bytes())
    records = sorted(manifest["classes"], key=lambda record: record["label"])
    names = [record["wnid"] for record in records]
    assert [record["label"] for record in records] == [*range(len(names))]
    seen: Labels = Counter()
    for split in manifest["splits"]:
        rows = iter(np.load(dataset / split / "samples.npy"))
        for shard in sorted((dataset / split).glob("*.tar")):
            with tarfile.open(shard) as tar:
                members = {info.name: tar.extractfile(info).read() for info in tar}
            for name in [name for name in members if name.endswith(".jpg")]:
                row, text = next(rows), members.get(name.replace(".jpg", ".cls"))
                assert int(row["label"]) == (-1 if text is None else int(text))
                seen[split, bytes(row["digest"]).hex(), None if text is None else names[int(text)]] += 1
        assert next(rows, None) is None
    return seen, names


def by_path(raw: Path, rules: dict[str, str]) -> Labels:
    """Return the labels that paths below RAW tell."""
    files = {path.relative_to(raw).as_posix(): path for path in raw.rglob("*") if path.is_file()}
    matches = [(split, path, re.fullmatch(rule, path)) for path in files for split, rule in rules.items()]
    return Counter(
        (split, digest(files[path].read_bytes()), match[1] if match.groups() else None)
        for split, path, match in matches
        if match
    )


def one_split(seen: Labels) -> Labels:
    """Return the labels with train and val as one split: a hold-out takes what its hashes say."""
    counts: Labels = Counter()
    for (split, *rest), count in seen.items():
        counts[("test" if split == "test" else "train", *rest)] += count
    return counts


def refused(result: Result, raw: Path, fragments: tuple[str, ...]) -> bool:
    """Return False if a build ended well; else assert that it was refused in one line with all the fragments."""
    if result.exit_code == 0:
        return False
    assert result.exit_code == 2, result.output
    *others, line = result.stderr.replace(str(raw), "RAW").splitlines()
    assert all(re.match("(note|warning|left out): ", other) for other in others), result.stderr
    assert fragments, f"is refused: {line}"
    assert missing(fragments, line) == [], line
    return True


NO_VAL = ("--holdout", "0")
ALLOWED = ("--allow-incomplete",)
AARDVARK = ("aardvark", "ape", "bee", "cat")
SPLIT = {"train": r"train/(\w+)/[^/]+", "val": r"val/(\w+)/[^/]+"}
FOLDERS = {"train": r"(\w+)/[^/]+\.\w+"}

REPORTS = [
    Report("02", {"train": r"(\d+)/\d+_\d\.jpeg"}, tuple(map(str, range(12))), options=NO_VAL),
    Report("04", {"train": r"Training/(\w+)/.*", "test": r"Testing/(\w+)/.*"}, ("glioma", "healthy", "pituitary"),
           options=NO_VAL),
    Report("08", {"train": r"(\w+)/\d\.jpg"}, ("cat", "dog"), options=NO_VAL, says=("@eaDir", "Thumbs.db", "._…")),
    Report("10/parquet", refusal=("train-00000-of-00001.parquet", *LFS)),
    Report("10/wds", refusal=("imagenet1k-train-0000.tar", *LFS)),
    Report("10/ilsvrc", refusal=("ILSVRC2012_img_train.tar", *LFS)),
    Report("10/folders", refusal=LFS),
    Report("10/mixed", {"train": r"(\w+)/[0-8]?\d\.jpg"}, ("cat", "dog"), options=NO_VAL, says=("lfs_pointer",)),
    Report("14/breeds", refusal=("--labels", "labels.csv")),
    Report("14/catsdogs", refusal=("train",)),
    Report("14/images", refusal=("--labels", "train.csv")),
    Report("14/pets", refusal=("images",)),
    Report("14", refusal=("breeds",)),
    Report("16/flat", refusal=("val", "devkit")),
    Report("16/empty", refusal=("val", "--allow-incomplete")),
    Report("16/empty", {"train": r"train/(\w+)/.*"}, tuple(WNIDS), options=ALLOWED, says=("held out",)),
    Report("16/oneclass", SPLIT, tuple(WNIDS), refusal=("n01443537", "--allow-incomplete"), options=NO_VAL),
    Report("16/oneclass", SPLIT, tuple(WNIDS), options=(*ALLOWED, *NO_VAL), says=("n01443537",)),
    Report("16/moved", refusal=("val", "ILSVRC2012_val_00000009.JPEG")),
    Report("17/oneclass", SPLIT, ("cat",), refusal=("cat",)),
    Report("17/two", FOLDERS, ("cat", "dog")),
    Report("17/six", FOLDERS, ("cat", "dog", "owl")),
    Report("20/classes", {"train": r"(cat|dog)/.*"}, ("cat", "dog"), options=NO_VAL, says=("banner.png",)),
    Report("20/split", SPLIT, ("cat", "dog"), says=("train/samples.png",)),
    Report("20/flat", {"train": r"(n\d+)_\d+\.JPEG"}, ("n01440760", "n01440761"), options=NO_VAL, says=("mean.png",)),
    Report("25/empty", refusal=("aardvark", "--allow-incomplete")),
    Report("25/empty", SPLIT, AARDVARK, options=ALLOWED, says=("aardvark",)),
    Report("25/jfif", SPLIT, AARDVARK),
    Report("25/bare", refusal=("aardvark", "--allow-incomplete")),
    Report("25/bare", {"train": r"train/(ape|bee|cat)/.*", "val": SPLIT["val"]}, AARDVARK, options=ALLOWED,
           says=("aardvark",)),
    Report("25/broken", {"train": r"train/(ape|bee|cat)/.*", "val": SPLIT["val"]}, AARDVARK,
           says=("1 of 4 classes have no picture: aardvark",)),
    Report("25/all-jfif", FOLDERS, ("ape", "bee"), options=NO_VAL),
    Report("25/all-JPE", FOLDERS, ("ape", "bee"), options=NO_VAL),
    Report("25/all-avif", refusal=(".avif",)),
    Report("25/all-heic", refusal=(".heic",)),
    Report("25/all-ppm", refusal=(".ppm",)),
    Report("25/all-bare", refusal=("extension…",)),
    Report("25/flatempty", refusal=("aardvark", "--allow-incomplete")),
    Report("25/flatempty", {"train": r"(ape|bee)/.*"}, AARDVARK[:3], options=(*ALLOWED, *NO_VAL), says=("aardvark",)),
]  # fmt: skip


@pytest.mark.parametrize("case", REPORTS, ids=lambda case: " ".join((case.raw, *case.options)))
def test_every_label_is_right_or_the_input_is_refused(case: Report, made: Maker, tmp_path: Path):
    number, _, below = case.raw.partition("/")
    raw, out = made(number)[0] / below, tmp_path / "out"
    result = build(raw, out, *OPTIONS, *case.options)
    if refused(result, raw, case.refusal):
        assert not (out / "dataset.json").exists()
        return
    assert case.rules, result.output
    (seen, names), expected = labels(out), by_path(raw, case.rules)
    assert (seen if "val" in case.rules else one_split(seen)) == expected
    assert names == [*case.classes]
    assert missing(case.says, result.output) == []
    trained = {name for split, _, name in seen if split == "train"}
    assert trained == {name for split, _, name in expected if split == "train"}  # no class is held out as a whole
    if "val" not in case.rules and "--holdout" not in case.options:
        assert re.search("held out|hold-?out", result.output)  # announced, also where none came


def test_tiny_imagenet(made: Maker, tmp_path: Path):
    """Labels of val/ by its annotations; the order is the rank of the wnid, whatever that of wnids.txt."""
    raw, _ = made("01")
    result = build(raw, tmp_path / "out", *OPTIONS)
    assert result.exit_code == 0, result.output
    rows = [line.split("\t")[:2] for line in (raw / "val/val_annotations.txt").read_text().splitlines()]
    expected = by_path(raw, {"train": r"train/(n\d+)/images/.*\.JPEG", "test": r"test/images/.*"})
    expected.update(("val", digest((raw / "val/images" / name).read_bytes()), wnid) for name, wnid in rows)
    seen, names = labels(tmp_path / "out")
    assert seen == expected
    assert expected.total() == 24 + 6 + 4
    assert names == ["n01443537", "n01629819", "n02124075"]
    classes = json.loads((tmp_path / "out/dataset.json").read_bytes())["classes"]
    assert [record["words"] for record in classes] == ["word 0", "word 1", "word 2"]


@pytest.mark.parametrize(("below", "table"), [("breeds", "labels.csv"), ("images", "train.csv")])
def test_kaggle_with_its_table_of_labels(below: str, table: str, made: Maker, tmp_path: Path):
    raw = made("14")[0] / below
    result = build(raw, tmp_path / "out", *OPTIONS, *NO_VAL, "--labels", raw / table)
    assert result.exit_code == 0, result.output
    rows = dict(line.split(",") for line in (raw / table).read_text().splitlines()[1:])
    train, test = ("train_images", "test_images") if below == "images" else ("train", "test")
    expected: Labels = Counter()
    for path in (raw / train).iterdir():
        expected["train", digest(path.read_bytes()), rows.get(path.name) or rows[path.stem]] += 1
    expected.update(("test", digest(path.read_bytes()), None) for path in (raw / test).iterdir())
    assert labels(tmp_path / "out") == (expected, sorted(set(rows.values())))


LISTS = ["mapping.txt", "numbered.txt", "labelled.txt", "tab.txt", "head.csv", "index.json", "list.json", "quotes.txt",
         "crlf.txt", "comma.txt", "slash.txt", "order.txt", "utf16.txt"]  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_classes(name: str, made: Maker, tmp_path: Path):
    raw = made("21")[0]
    result = build(raw / "raw", tmp_path / "out", *OPTIONS, *NO_VAL, "--classes", raw / name)
    assert result.exit_code == 0, result.output
    expected = by_path(raw / "raw", {"train": "(n01440764|n01484850)/.*"})
    assert labels(tmp_path / "out") == (expected, ["n01440764", "n01484850"])
    assert expected.total() == 24


PARQUET = {  # folder → fragments of a refusal, where one is as safe as the right labels
    "text-digits": (),
    "int8": (),
    "uint64": (),
    "float": ("label",),
    "bool": ("label",),
    "dictionary": (),
    "large": (),
    "view": (),
    "list-of-bytes": ("image",),
    "list-of-uint8": ("image",),
    "path-only": ("image",),
    "names-target": ("target",),
    "names-label_id-label_name": ("label_id", "label_name"),
    "fine-coarse": ("fine_label", "coarse_label"),
    "base64": ("image",),
    "lz4": (),
    "brotli": (),
    "nulls": (),
    "v2-bytestream": (),
    "empty-file": (),
    "convert": ("default",),
    "convert/default": (),
    "hub": ("datasets--me--mine",),
    "hub/datasets--me--mine/snapshots/0a1b": (),
}


def value(name: str) -> float:
    """Return the number of a class: 07, 7.0 and c7 are 7."""
    return float({"true": "1", "false": "0"}.get(name, name.removeprefix("c")))


@pytest.mark.parametrize("below", PARQUET)
def test_parquet_files(below: str, made: Maker, tmp_path: Path):
    """Each kind of column gives the labels that were written, or one line that names the column and the remedy."""
    raw, variables = made("12")
    result = build(raw / below, tmp_path / "out", *OPTIONS, *NO_VAL)
    if refused(result, raw / below, PARQUET[below]):
        return
    numbers = [number % 2 == 0 for number in variables["lab"]] if below == "bool" else variables["lab"]
    rows = [(digest(data), float(number)) for data, number in zip(variables["jpg"], numbers)]
    if below == "nulls":
        rows = [row for i, row in enumerate(rows) if i % 6 and i % 7 != 1]
        assert "left out" in result.output
    splits = ("train", "val") if below.startswith("convert") else ("train",)
    seen, names = labels(tmp_path / "out")
    assert Counter({(split, data, value(str(name))): count for (split, data, name), count in seen.items()}) == Counter(
        (split, *row) for split in splits for row in rows
    )
    assert names == sorted(names)  # numbers of one width, so that both orders are the same
    if all(map(str.isdecimal, names)):
        assert names in ([f"{n:02d}" for n in range(12)], sorted({f"{n:02.0f}" for _, n in rows}))


def shown(text: str) -> str:
    """Return a label as a class name may show it: in NFC, without spaces around, unprintable characters escaped."""
    plain = unicodedata.normalize("NFC", text).strip()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in plain)


@pytest.mark.parametrize("below", ["cls", "json", "parquet", "folders"])
def test_labels_that_are_words(below: str, made: Maker, tmp_path: Path):
    raw, variables = made("28")
    result = build(raw / below, tmp_path / "out", *OPTIONS, *NO_VAL)
    assert result.exit_code == 0, result.output
    texts = [text.replace("long " * 50, "long " * 40) if below == "folders" else text for text in variables["texts"]]
    seen, names = labels(tmp_path / "out")
    assert Counter({(data, shown(str(name))): count for (_, data, name), count in seen.items()}) == Counter(
        (digest(variables["pics"].data(i)), shown(texts[i % 7])) for i in range(28)
    )
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("below", "texts", "order"),
    [("latin1", ["caf\\xe9", "tea"], ["caf\\xe9", "tea"]), ("minus2", [-2, 2, 10, 9], [-2, 2, 9, 10])],
)
def test_labels_of_bytes_and_below_zero(below: str, texts: list, order: list, made: Maker, tmp_path: Path):
    raw, variables = made("28")
    result = build(raw / below, tmp_path / "out", *OPTIONS, *NO_VAL)
    assert result.exit_code == 0, result.output
    seen, names = labels(tmp_path / "out")
    kind = type(texts[0])
    assert Counter({(data, kind(name)): count for (_, data, name), count in seen.items()}) == Counter(
        (digest(variables["pics"].data(i)), texts[i % len(texts)]) for i in range(28)
    )
    assert [kind(name) for name in names] == order


@pytest.mark.parametrize(
    ("number", "env", "warnings"),
    [("19", {}, 1), ("19", {"NOLOCK": "37"}, 1), ("27", {}, 0), ("27", {"FSYNC": "38"}, 0), ("27", {"FSYNC": "95"}, 0)],
    ids=["ENOSYS of flock", "ENOLCK of flock", "EINVAL of fsync", "ENOSYS of fsync", "EOPNOTSUPP of fsync"],
)
def test_file_systems(number: str, env: dict[str, str], warnings: int, made: Maker, shared: Path, tmp_path: Path):
    """A file system without locks costs a line, one without fsync of folders nothing; the labels are right."""
    path = f"{report(shared, number)}{os.pathsep}{ROOT}"
    raw = made("21")[0] / "raw"
    done = finish(raw, tmp_path / "out", *NO_VAL, env={**os.environ, **env, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert labels(tmp_path / "out")[0] == by_path(raw, {"train": r"(n\d+)/.*"})
    assert [line.split(": ")[0] for line in done.stderr.splitlines() if "lock" in line] == ["warning"] * warnings
