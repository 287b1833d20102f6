"""Tar archives by their headers alone: name, offset and size of each regular file. Nothing is unpacked.

USTAR, GNU and PAX headers, as https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html and GNU tar's manual
describe them. Whatever is not a plain file with a plain name is left out and named; what cannot be read is an error.
"""

import os
from collections.abc import Iterator

from pipeline.offline.raw import LeftOut, SourceError, shown
from pipeline.storage import Location, Read, opened

BLOCK = 512
MAX_EXTENDED = 2**20  # bytes of an extended header; a real one has some hundred
MAX_NAME = 4096  # bytes, as PATH_MAX
_REGULAR, _EXTENDED, _SPARSE = b"0\x007", b"LKxXg", b"S"
_WITHOUT_DATA = {
    b"1": "link in an archive",
    b"2": "link in an archive",
    b"3": "device or pipe in an archive",
    b"4": "device or pipe in an archive",
    b"5": "folder in an archive",
    b"6": "device or pipe in an archive",
}

_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd

Member = tuple[str, int, int]  # name, offset, size


def first_name(path: Location) -> str:
    """The name of an archive's first regular file; empty where it has none, or is damaged."""
    try:
        with opened(path) as (read, size):
            return next(members(read, 0, size, str(path), LeftOut()), ("", 0, 0))[0]
    except SourceError:
        return ""


def members(read: Read, start: int, end: int, where: str, left_out: LeftOut) -> Iterator[Member]:
    """Each regular file of the tar at [start, end), in order; `where` names the tar in messages.

    Links, devices, sparse files, names that lead out of the archive, and the second of two equal names are left out
    and named in `left_out`.

    Raises:
        SourceError: a header that is damaged, or claims more bytes than there are.
    """
    if start == end:
        raise SourceError(f"{where}: empty, not even an archive's end; fetch it again")
    at = start
    lasting: dict[str, bytes] = {}  # from global headers
    coming: dict[str, bytes] = {}  # for the next member
    seen: set[str] = set()
    while at < end:
        block = read(min(BLOCK, end - at), at)
        if at == start and block.startswith(_PACKED):
            raise SourceError(f"{where}: is compressed, so that no image can be found alone; unpack it to a plain tar")
        if not block.strip(b"\0"):
            if read(min(128 * BLOCK, end - at), at).strip(b"\0"):
                left_out.add("data after the end of an archive", where)
            break
        if len(block) < BLOCK:
            raise _damaged(where, at, "the header is cut short")
        kind, size = block[156:157], _checked_size(block, where, at)
        data = at + BLOCK
        while kind == _SPARSE and block[482 if data == at + BLOCK else 504]:  # the map goes on in blocks of its own
            block = read(BLOCK, data)
            data += BLOCK
            if len(block) < BLOCK or data > end:
                raise _damaged(where, at, "the sparse map is cut short")
        if kind in _EXTENDED:
            if size > min(MAX_EXTENDED, end - data):
                raise _damaged(where, at, f"an extended header claims {size:,} bytes, at most {MAX_EXTENDED:,} may be")
            fields = _extended(kind, read(size, data), where, at)
            (lasting if kind == b"g" else coming).update(fields)
        else:
            fields = {**lasting, **coming}
            coming = {}
            name, plain = _name(fields.get("path") or _header_name(block))
            if kind in _WITHOUT_DATA:
                size = 0
            elif "size" in fields:
                size = _number(fields["size"], 10, where, at)
            if size > end - data:
                raise SourceError(
                    f"{where}: cut short inside {shown(name)}, which claims {size:,} bytes where {end - data:,} are "
                    "left; fetch it again"
                )
            if reason := _refusal(kind, name, plain, fields, seen):
                left_out.add(reason, f"{os.path.basename(where)}/{name}")
            else:
                seen.add(plain)
                yield plain, data, size
        at = data + -(-size // BLOCK) * BLOCK
    else:
        left_out.add("archive without an end mark, perhaps cut short", where)
    if coming:
        raise _damaged(where, min(at, end), "it ends after an extended header")


def _refusal(kind: bytes, name: str, plain: str, fields: dict[str, bytes], seen: set[str]) -> str:
    """Why a member is left out; empty: it is not."""
    if kind in _WITHOUT_DATA:
        return _WITHOUT_DATA[kind]
    if kind == _SPARSE or "sparse" in fields:
        return "sparse file in an archive"
    if kind not in _REGULAR:
        return "unknown kind of member in an archive"
    if kind == b"\0" and name.endswith("/"):  # folders before there was a kind for them
        return _WITHOUT_DATA[b"5"]
    if not plain:
        return "absolute, dotted or overlong name in an archive"
    return "second member of one name in an archive" if plain in seen else ""


def _checked_size(block: bytes, where: str, at: int) -> int:
    """The size in a header whose checksum is right, whether bytes were summed as unsigned or (wrongly) as signed."""
    promised = _number(block[148:156], 8, where, at)
    rest = block[:148] + block[156:]
    total = sum(rest) + 8 * 32
    if promised != total and promised != total - 256 * sum(byte > 127 for byte in rest):
        raise _damaged(where, at, "the checksum of a header does not fit it")
    if block[156:157] in _WITHOUT_DATA:
        return 0
    return _number(block[124:136], 8, where, at)


def _number(field: bytes, base: int, where: str, at: int) -> int:
    if base == 8 and field[:1] == b"\x80":  # GNU's base 256, for what 11 octal digits cannot hold
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    if digits.translate(None, b"01234567" if base == 8 else b"0123456789") or len(digits) > 20:
        raise _damaged(where, at, "a header has an invalid number")
    return int(digits or b"0", base)


def _header_name(block: bytes) -> bytes:
    name, prefix = (field.partition(b"\0")[0] for field in (block[:100], block[345:500]))
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def _name(raw: bytes) -> tuple[str, str]:
    """The name as it stands, and as a plain relative path: empty where it leads elsewhere or is too long."""
    name = raw.decode("utf-8", "surrogateescape")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    good = not name.startswith("/") and ".." not in parts and "\0" not in name and len(raw) <= MAX_NAME
    return name, "/".join(parts) if good else ""


def _extended(kind: bytes, data: bytes, where: str, at: int) -> dict[str, bytes]:
    """What an extended header says of the next member: `path`, `size`, or that it is `sparse`."""
    if kind == b"K":
        return {}
    if kind == b"L":
        return {"path": data.partition(b"\0")[0]}
    fields, start = {}, 0
    while start < len(data) and data[start]:
        length, space, _ = data[start : start + 20].partition(b" ")
        stop = start + int(length) if space and length.isdigit() else 0
        key, equals, value = data[start + len(length) + 1 : max(stop - 1, 0)].partition(b"=")
        if not equals or stop > len(data) or data[stop - 1 : stop] != b"\n":
            raise _damaged(where, at, "a PAX header has an invalid record")
        if key in (b"path", b"size"):
            fields[key.decode()] = value
        elif key.startswith(b"GNU.sparse."):
            fields["sparse"] = value
        start = stop
    return fields


def _damaged(where: str, at: int, why: str) -> SourceError:
    return SourceError(f"{where}: damaged at byte {at}: {why}; fetch it again")
