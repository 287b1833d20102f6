"""Archives are read without unpacking, whatever wrote them; damage is one clear line, and listings are cached."""

import gzip
import io
import os
import shutil
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from conftest import build, picture, saved
from pipeline import LFS_POINTER, SourceError
from pipeline.archives import DATA_AFTER_END, NO_END, members
from pipeline.offline.ilsvrc import TRAIN_TAR
from pipeline.offline.sources import find_sources
from pipeline.storage import opened
from tars import tar_bytes

INNER = tar_bytes({"n00000001_1.JPEG": b"one" * 300, "n00000001_2.JPEG": b"two"})
NESTED = tar_bytes({"n00000001.tar": INNER, "n00000002.tar": tar_bytes({"n00000002_1.JPEG": b"three" * 200})})


def special(name: str, kind: bytes, link: str = "", data: bytes = b"", form: int = tarfile.GNU_FORMAT) -> bytes:
    """Return a member of any kind, without an archive's end."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info.tobuf(form) + data.ljust(-(-len(data) // 512) * 512, b"\0")


def listed(path: Path) -> tuple[dict[str, tuple[int, int]], Counter[str]]:
    """Return name → (offset, size) of the regular members, and the number of others by reason."""
    with opened(path) as (read, size):
        listing = list(members(read, 0, size, str(path)))
    regular = {member.name: (member.offset, member.size) for member in listing if not member.reason}
    return regular, Counter(member.reason for member in listing if member.reason)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_of_every_format_against_tarfile(tmp_path: Path, form: int):
    path = tmp_path / "a.tar"
    names = ["a", "./b.JPEG", f"{'d' * 90}/{'e' * 90}.JPEG", "ä/ö.JPEG", "c//f"]
    if form != tarfile.USTAR_FORMAT:
        names += ["g" * 300, f"{'long/' * 60}h.JPEG", "ü" * 120]
    with tarfile.open(path, "w", format=form, pax_headers={"comment": "global"}) as tar:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = (0, 1, 511, 512, 513)[i % 5]
            info.mtime = 1.5 if form == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(bytes([i]) * info.size))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    with tarfile.open(path) as tar:
        plain = {os.path.normpath(m.name): (m.offset_data, m.size) for m in tar if m.isfile()}
    assert listed(path) == (plain, {"folder in an archive": 1})


@pytest.mark.parametrize("form", ["gnu", "pax", "oldgnu", "v7"])
def test_archives_of_gnu_tar(tmp_path: Path, form: str):
    """Sparse files are no plain bytes: left out, and what follows them is listed."""
    for name in ("a.JPEG", "b.JPEG", "z" * 60 + ".JPEG"):
        (tmp_path / name).write_bytes(name.encode() * 99)
    os.mkdir(tmp_path / "d")
    if form != "v7":
        with open(tmp_path / "bb.JPEG", "wb") as file:  # more holes than the first block's map has room for
            for i in range(40):
                file.seek(i * 65536)
                file.write(b"x" * 4096)
            file.truncate(2**23)
    sparse = [] if form == "v7" else ["-S"]
    command = ["tar", f"--format={form}", *sparse, "-cf", "t.tar", *sorted(path.name for path in tmp_path.iterdir())]
    subprocess.run(command, cwd=tmp_path, check=True)
    regular, left_out = listed(tmp_path / "t.tar")
    data = (tmp_path / "t.tar").read_bytes()
    assert {name: data[at : at + n] for name, (at, n) in regular.items()} == {
        name: name.encode() * 99 for name in ("a.JPEG", "b.JPEG", "z" * 60 + ".JPEG")
    }
    assert left_out.get("sparse file in an archive", 0) == (form != "v7")


def test_hostile_members_are_named_and_left_out_and_nothing_is_written_outside(tmp_path: Path):
    good = saved(picture("good", 40, 40), "JPEG")
    hostile = [
        special("n00000001_1.JPEG", b"0", data=good),
        special("n00000001_2.JPEG", b"2", "/etc/passwd"),
        special("n00000001_3.JPEG", b"1", "n00000001_1.JPEG"),
        special("pipe.JPEG", b"6"),
        special("null.JPEG", b"3"),
        special("/tmp/penstock-absolute.JPEG", b"0", data=good),
        special("../../dotted.JPEG", b"0", data=good),
        special("a/../../b.JPEG", b"0", data=good),
        special("n00000001_1.JPEG", b"0", data=b"the second"),
        special("./n00000001_1.JPEG", b"0", data=b"the third"),
        special("n00000001_9.JPEG", b"Q", data=b"?"),
        special("evil\x1b[2J\n.JPEG", b"2", "x"),
        *(special(f"../{i}.JPEG", b"0") for i in range(9)),
    ]
    inner = b"".join(hostile) + bytes(1024)
    other = tar_bytes({"n00000002_1.JPEG": good, "n00000002_2.JPEG": good})
    outer = special("n00000002.tar", b"0", data=other) + special("../n00000003.tar", b"0", data=other)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "all.tar").write_bytes(outer + special("n00000001.tar", b"0", data=inner) + bytes(1024))
    before = set(tmp_path.rglob("*"))
    result = build(tmp_path / "raw", tmp_path / "out", "--workers", 1, "--holdout", 0)
    assert result.exit_code == 0, result.output
    assert "4 train, 2 classes" in result.output
    for line in (
        "2 × link in an archive: n00000001.tar/n00000001_2.JPEG, n00000001.tar/evil",
        "2 × device or pipe in an archive: n00000001.tar/pipe.JPEG, n00000001.tar/null.JPEG",
        "2 × second member of one name in an archive: n00000001.tar/n00000001_1.JPEG, ",
        "1 × unknown kind of member in an archive: n00000001.tar/n00000001_9.JPEG",
        "13 × absolute, dotted or overlong name in an archive: all.tar/../n00000003.tar, ",
        "n00000001.tar//tmp/penstock-absolute.JPEG, n00000001.tar/../../dotted.JPEG, ",
        " and 8 more",
    ):
        assert line in result.output
    assert "\x1b" not in result.output
    (first,) = (image for image in find_sources(tmp_path / "raw").images if image.name == "n00000001_1.JPEG")
    assert first.read() == good
    assert {path for path in tmp_path.rglob("*") if "out" not in path.relative_to(tmp_path).parts} == before
    assert not Path("/tmp/penstock-absolute.JPEG").exists()


def with_field(data: bytes, start: int, value: bytes) -> bytes:
    """Replace one field of a tar's first header, and make its checksum right."""
    header = bytearray(data[:512])
    header[start : start + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


GOOD = tar_bytes({"n00000001.tar": tar_bytes({"x.JPEG": b"x" * 600})})
TERABYTES = b"\x80" + (2**43).to_bytes(11, "big")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty, not even an archive's end"),
        (LFS_POINTER + b"v1\noid sha256:0\nsize 9\n", "all.tar: a Git LFS pointer; run git lfs pull$"),
        (GOOD[:700], "cut short inside 'n00000001.tar', which claims 10,240 bytes where 188 are left"),
        (with_field(GOOD, 124, TERABYTES), "cut short inside 'n00000001.tar', which claims 8,796,093,022,208 bytes"),
        (gzip.compress(GOOD), "is compressed, so that no image can be found alone"),
        (with_field(GOOD, 124, b"\xff" * 12), "damaged at byte 0: a header has an invalid number"),
        (with_field(GOOD, 124, b"0000z000000\0"), "damaged at byte 0: invalid header"),
        (GOOD[:5] + b"!" + GOOD[6:], "damaged at byte 0: bad checksum"),
        (GOOD[:512] + with_field(GOOD[512:], 124, TERABYTES), "n00000001.tar: cut short inside 'x.JPEG', which claims"),
        (GOOD[:517] + b"!" + GOOD[518:], "n00000001.tar: damaged at byte 512: bad checksum"),
        (special("x", b"x", data=b"12 path=abc\n"), "damaged at byte 0: a header is cut short"),
        (special("x", b"x", data=b"0 path=abc\n") + GOOD, "damaged at byte 0: invalid header"),
        (special("x", b"x", data=b"16 size=\x80\xff\xff\xff\xff\xff\xff\n") + GOOD, "a header has an invalid number"),
        (with_field(special("x", b"L"), 124, TERABYTES) + GOOD, "an extended header claims 8,796,093,022,208 bytes"),
        (special("x", b"L", data=b"name\0"), "damaged at byte 0: a header is cut short"),
    ],
)
def test_structural_damage_is_one_clear_line(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "all.tar").write_bytes(content)
    with pytest.raises(SourceError, match=message) as caught:
        find_sources(tmp_path, "webdataset" if b"n0" not in content else None)
    assert "all.tar" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_end_that_is_missing_or_followed_by_data_is_counted(tmp_path: Path):
    member, end = special("a", b"0", data=b"x"), bytes(1024)
    for content, reasons in ((member, {NO_END: 1}), (member + end, {}), (member + end + member, {DATA_AFTER_END: 1})):
        (tmp_path / "a.tar").write_bytes(content)
        assert listed(tmp_path / "a.tar") == ({"a": (512, 1)}, reasons)


def test_mutated_headers_with_right_checksums_raise_nothing_but_source_error():
    """PAX, GNU and sparse headers; without a right checksum, the parser would not look at the other fields."""
    archives = [NESTED]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        sparse = special("s.JPEG", b"S", data=b"x" * 700, form=form)
        names = ["a.JPEG", "ü" * 90 + ".JPEG", "d/" * 80 + "e.JPEG"]
        archives.append(b"".join(special(name, b"0", data=name.encode(), form=form) for name in names) + sparse)
    random, refused = np.random.default_rng(2012), 0
    for i in range(3000):
        data = bytearray(archives[i % len(archives)])
        headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
        for at in random.choice(headers, 2).tolist():
            start, stop = [(0, 512), (124, 136), (156, 157), (386, 512), (512, 600)][random.integers(5)]
            for _ in range(3 if stop > 200 else 1):
                position = at + int(random.integers(start, stop))
                if position < len(data):
                    data[position] = int(random.choice(list(b"\0\x80\xff0123456789 =\nLKSxXgVM/")))
            data[at : at + 512] = with_field(bytes(data[at : at + 512]), 0, b"")
        tar = bytes(data)
        try:
            for member in members(lambda size, at, tar=tar: tar[at : at + size], 0, len(tar), "a.tar"):
                assert member.reason or 0 <= member.offset <= member.offset + member.size <= len(tar)
        except SourceError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 300 < refused < 2700


def test_listings_are_cached_until_their_archives_change(official: Path, tmp_path: Path):
    raw, state = tmp_path / "raw", tmp_path / "out" / ".build"
    shutil.copytree(official, raw)
    first = find_sources(raw, cache=state)
    (listings,) = state.iterdir()
    cached = listings.read_bytes()
    status = (raw / TRAIN_TAR).stat()
    (raw / TRAIN_TAR).write_bytes(b"\xaa" * status.st_size)
    os.utime(raw / TRAIN_TAR, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = find_sources(raw, cache=state)
    assert (list(again.images), again.ignored, again.classes) == (list(first.images), first.ignored, first.classes)
    assert listings.read_bytes() == cached
    os.utime(raw / TRAIN_TAR, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(SourceError, match="damaged at byte 0"):
        find_sources(raw, cache=state)


def test_a_damaged_listing_cache_is_ignored_and_written_again(tmp_path: Path):
    raw, state = tmp_path / "raw", tmp_path / "out" / ".build"
    raw.mkdir()
    (raw / "all.tar").write_bytes(special("../x.JPEG", b"0") + NESTED)
    first = find_sources(raw, cache=state)
    listings = state / "listings"
    good, random = listings.read_bytes(), np.random.default_rng(2012)
    for i in range(60):
        bad = bytearray(good)
        bad[int(random.integers(len(bad)))] ^= 1 << int(random.integers(8))
        listings.write_bytes(bad if i % 3 else good[: int(random.integers(len(good)))])
        again = find_sources(raw, cache=state)
        assert (list(again.images), again.ignored.lines()) == (list(first.images), first.ignored.lines())
        assert listings.read_bytes() == good


def test_no_build_is_begun_where_none_may_be(tmp_path: Path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "all.tar").write_bytes(NESTED)
    for name, words in (
        ("notes.txt", "exists and is not an unfinished build"),
        ("dataset.json", "a finished dataset is there already"),
    ):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("{}")
        find_sources(tmp_path / "raw", cache=folder / ".build")
        assert [path.name for path in folder.iterdir()] == [name]
        refused = build(tmp_path / "raw", folder, "--holdout", 0)
        assert (refused.exit_code, words in refused.output) == (2, True)
        assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, "{}")]
