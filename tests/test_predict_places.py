"""What `trainer predict` says of files, folders and tars that hold no picture, or a bad one."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from conftest import reason
from pipeline.decode import ImageError, decode
from predicted import World, failures, lines, picture_bytes, predict, shared_world  # noqa: F401  # a fixture
from tars import tar_bytes, tree


def test_hostile_pictures_are_named_and_the_others_come(world: World, shared: Path):
    folder = shared / "odd-images"
    limits = {name: getattr(world.dataset.recipe, name) for name in ("max_bytes", "max_pixels", "max_scans")}
    expected = {}
    for path in sorted((folder / "files").rglob("*")):
        try:
            decode(path.read_bytes(), **limits)
        except ImageError as error:
            expected[str(path)] = error.code
    result = predict(world, folder)
    assert result.exit_code == 2
    assert failures(result) == expected
    good = [line for line in lines(result) if "labels" in line]
    assert len(expected) > 30
    assert len(good) == 139 - len(expected)
    assert all(np.isfinite([each["probability"] for each in line["labels"]]).all() for line in good)
    *told, last = result.stderr.splitlines()
    assert told == ["left out: 1 *.csv"]
    assert f"{len(expected)} could not be predicted" in last
    assert f"{len(good)} were" in last


def test_a_folder_is_gone_through_in_order_and_says_what_it_left_out(world: World, tmp_path: Path):
    good = picture_bytes()
    names = [
        "b/2.jpg",
        "b/1",
        "a/z.JPG",
        "a-b.png",
        "c.txt",
        "d.json",
        "e.JSON",
        ".hidden.jpg",
        ".git/x.jpg",
        "bad.jpg",
    ]
    folder = tree(tmp_path / "some", {name: good if name != "bad.jpg" else b"no" for name in names})
    (folder / "b" / "loop").symlink_to(folder)
    (folder / "b" / "nothing").symlink_to(folder / "missing")
    os.mkfifo(folder / "pipe")
    (folder / "more").symlink_to(folder / "a")
    result = predict(world, folder)
    assert result.exit_code == 2
    found = [str(line["picture"]).removeprefix(f"{folder}/") for line in lines(result)]
    assert found == ["a/z.JPG", "a-b.png", "b/1", "b/2.jpg", "bad.jpg"]
    assert failures(result) == {str(folder / "bad.jpg"): "unrecognised"}
    left = result.stderr.splitlines()[0]
    for words in ("2 hidden", "1 *.txt", "2 *.json", "2 link to nothing, pipe"):
        assert words in left
    assert failures(predict(world, folder / "pipe")) == {str(folder / "pipe"): "unreadable"}
    assert predict(world, folder / ".hidden.jpg").exit_code == 0  # who names it means it


def member(name: str, size: int, **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


GOOD = picture_bytes()
WHOLE = tar_bytes({"one.jpg": GOOD, "two.jpg": GOOD})
SECOND = 512 + -(-len(GOOD) // 512) * 512  # where the second header stands
BAD_TARS = {
    "not.tar": (b"no tar" * 1000, "not a whole, plain tar", 0),
    "empty.tar": (b"", "empty, not even", 0),
    "packed.tar": (gzip.compress(WHOLE), "unpack it", 0),
    "packed.tar.gz": (gzip.compress(WHOLE), "unpack it", 0),
    "inside.tar": (WHOLE[: SECOND + 700], "cut short inside 'two.jpg'", 1),
    "header.tar": (WHOLE[: SECOND + 100], f"damaged at byte {SECOND}: a header is cut short", 1),
    "between.tar": (WHOLE[:SECOND], "cut short at byte", 1),
    "damaged.tar": (WHOLE[:SECOND] + b"x" * 100 + WHOLE[SECOND + 100 :], f"damaged at byte {SECOND}: bad checksum", 1),
    "long.tar": (WHOLE[:SECOND] + member("x", 2**31, type=b"x") + WHOLE[SECOND:], "claims 2,147,483,648 bytes", 1),
    "backwards.tar": (WHOLE[:SECOND] + member("x.jpg", -SECOND - 512) + WHOLE[SECOND:], "", 1),
    "endless.tar": (member("x.jpg", -512) + WHOLE, "", 0),
    "deep.tar": (b"".join(member("x", 0, type=b"x") for _ in range(3000)) + WHOLE, "", 0),
}


@pytest.mark.parametrize("name", BAD_TARS)
def test_a_bad_tar_is_named_and_the_others_come(world: World, name: str, tmp_path: Path):
    data, words, before = BAD_TARS[name]
    tree(tmp_path, {name: data, "z.tar": tar_bytes({"last.jpg": GOOD})})
    result = predict(world, tmp_path / name, tmp_path / "z.tar")
    assert result.exit_code == 2
    found = lines(result)
    assert [line["picture"] for line in found if "labels" in line] == [
        *[f"{tmp_path / name}/one.jpg"][:before],
        f"{tmp_path / 'z.tar'}/last.jpg",
    ]
    (bad,) = [line for line in found if "error" in line]
    assert (bad["picture"], bad["error"]) == (str(tmp_path / name), "bad_tar")
    assert words in bad["reason"]


def test_what_is_too_large_is_not_read(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    size = world.dataset.recipe.max_bytes + 1
    with open(tmp_path / "a.tar", "wb") as file:  # with a hole
        file.write(member("huge.jpg", size))
        file.seek(-(-size // 512) * 512, io.SEEK_CUR)
        file.write(tar_bytes({"small.jpg": GOOD, "link.jpg": GOOD}))
    with open(tmp_path / "b.jpg", "wb") as file:
        file.truncate(size)
    most = []
    honest = os.pread
    monkeypatch.setattr(os, "pread", lambda number, count, at: most.append(count) or honest(number, count, at))
    result = predict(world, tmp_path)
    assert result.exit_code == 2
    assert failures(result) == {
        f"{tmp_path}/a.tar/huge.jpg": "too_many_bytes",
        f"{tmp_path}/b.jpg": "too_many_bytes",
    }
    assert len(lines(result)) == 4
    assert max(most) < 2**20


def test_members_that_are_no_files_are_left_out(world: World, tmp_path: Path):
    links = member("l.jpg", 0, type=b"2", linkname="/etc/passwd") + member("../up.jpg/", 0, type=b"5")
    (tmp_path / "a.tar").write_bytes(links + tar_bytes({"../../out.jpg": GOOD, "._x.jpg": b"", "x.cls": b"1"}))
    result = predict(world, tmp_path / "a.tar")
    assert result.exit_code == 0, result.output
    assert [line["picture"] for line in lines(result)] == [f"{tmp_path}/a.tar/../../out.jpg"]
    assert result.stderr == "left out: 1 *.cls, 1 hidden, 1 link, device or sparse file in a tar\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]


def test_reasons_are_the_decoders(world: World, tmp_path: Path):
    cut = next(path for path in world.files.values() if path.suffix == ".jpeg").read_bytes()[:800]
    (tmp_path / "cut.jpg").write_bytes(cut)
    assert failures(predict(world, tmp_path)) == {str(tmp_path / "cut.jpg"): reason(cut)}
