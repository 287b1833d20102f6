"""Damage of what files hold: JSON, arrays, archives and tars with one thing changed, drawn at random."""

import io
import json
import pickle
import re
import struct
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

TEXTS = {"@deep@": "[" * 10**5 + "]" * 10**5, "@digits@": "9" * 5000, "@1e400@": "1e400"}  # as no encoder writes them
NUMBERS = (-1, 0, 1, 2, 3, 7, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, 10**400)
FLOATS = (0.5, -0.0, 1e308, -1e308, 5e-324, 1e-300, float("nan"), float("inf"), -float("inf"))
WORDS = ("", " ", "x", "0", "null", "..", "../../../x", "@outside@", "a\0b", "a\nb", "\ud800", "\x1b[31m", "x" * 10**5)
CONTAINERS: tuple[Any, ...] = ([], {}, [1], ["x"], [[]], {"x": 1}, [None] * 3, "@deep@")
JUNK = (None, True, False, *NUMBERS, *FLOATS, *WORDS, *CONTAINERS, "@digits@", "@1e400@")
SHAPES = ("(10**15,)", "(-1,)", "(0,)", "(9223372036854775808,)", "()", "(1, 1)", "('x',)", "(True,)", "(1e3,)")
EVIL = pickle.dumps(slice(None))  # any pickle: to load one would be the fault
LINKS = (b"1", b"2", b"3", b"5", b"6", b"S", b"L", b"x", b"g", b"\xff")  # types of tar members that are no files


# ---- JSON ----


def paths(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*above, key)
        yield from paths(inner, (*above, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def drawn_path(draw: Random, value: Any) -> tuple[Any, ...]:
    """Draw a path; those that differ in positions or in names of files alone count as one."""
    kinds: defaultdict[str, list[tuple[Any, ...]]] = defaultdict(list)
    for path in sorted(paths(value), key=str):
        kinds[re.sub(r"[a-z]*[/.][^ ]*|\d+", "*", " ".join(map(str, path)))].append(path)
    return draw.choice(kinds[draw.choice(list(kinds))])


def drawn_value(draw: Random, before: Any, junk: tuple[Any, ...]) -> Any:
    """Draw a value; in half of the cases of the type of the one before, where there is such."""
    numbers = (int, float)
    kinds = numbers if type(before) in numbers else (type(before),)
    alike = [value for value in junk if type(value) in kinds]
    return draw.choice(alike if alike and draw.random() < 0.5 else junk)


def mutate(draw: Random, value: Any, junk: tuple[Any, ...] = JUNK) -> tuple[Any, str]:
    """Return a JSON value with one thing in it changed, and a description."""
    value = deepcopy(value)
    path = drawn_path(draw, value)
    holder, key, label = at(value, path[:-1]), path[-1], ".".join(map(str, path))
    action = draw.choices(("replace", "delete", "nudge", "swap", "add"), (8, 2, 6, 3, 1))[0]
    if action == "delete":
        del holder[key]
        return value, f"delete {label}"
    if action == "add":
        extra = drawn_value(draw, holder[key], junk)
        if isinstance(holder, dict):
            holder[draw.choice(("x", "", "../x", "é\0"))] = extra
        else:
            holder.insert(key, draw.choice((extra, deepcopy(holder[key]))))
        return value, f"add {short(extra)} beside {label}"
    if action == "swap":
        other = drawn_path(draw, value)
        holder[key] = deepcopy(at(value, other))
        return value, f"swap {label} = {'.'.join(map(str, other))}"
    if action == "nudge" and type(holder[key]) in (int, float):
        holder[key] += draw.choice((1, -1)) if type(holder[key]) is int else holder[key] / 2
    else:
        holder[key] = drawn_value(draw, holder[key], junk)
    return value, f"{action} {label} = {short(holder[key])}"


def short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) < 40 else f"{text[:30]}… ({len(text)})"


def canonical(value: Any, case: Path) -> bytes:
    """Return sorted keys, indented by one, ASCII, a final newline; then the values that no encoder writes."""
    text = json.dumps(value, sort_keys=True, indent=1) + "\n"
    for mark, raw in {**TEXTS, "@outside@": json.dumps(str(outside(case)))}.items():
        text = text.replace(f'"{mark}"', raw)
    return text.encode()


def outside(case: Path) -> Path:
    """Return the path of a file that no command may touch; "../../../x", below a folder of the case, lies near it."""
    return case.parent.parent / "outside" / "passwd"


# ---- Arrays ----


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def damaged_npy(draw: Random, array: np.ndarray) -> tuple[bytes, str]:
    """Return a .npy file that lies about itself, and a description."""
    data = npy(array)
    length = struct.unpack("<H", data[8:10])[0]
    header, body = data[10 : 10 + length].decode(), data[10 + length :]
    _, descr, _, order, _, shape, _ = re.split(
        r"(?<='descr': )(.*)(, 'fortran_order': )(.*)(, 'shape': )(.*)(, })", header
    )[:7]
    kind, form = f"'descr': {descr}", f"'fortran_order': {order}"
    texts = {f"shape {lie}": header.replace(shape, lie.replace("10**15", "1" + "0" * 15)) for lie in SHAPES}
    texts |= {f"type {lie}": header.replace(kind, f"'descr': '{lie}'") for lie in ("|O", "<f8", "q!")}
    texts |= {"Fortran order": header.replace(form, "'fortran_order': True"), "no header": "\n", "NUL": "\0" * length}
    texts |= {"code": "__import__('os').mkdir('x')\n", "parentheses": "(" * 4000 + "\n"}
    flat = array.ravel()
    arrays = {"objects": np.array([None, 1], object), "bytes": np.frombuffer(array.tobytes(), np.uint8)}
    arrays |= {"none": flat[:0], "one more": np.append(flat, flat[:1]), "one less": flat[:-1], "an axis": array[None]}
    arrays["bytes swapped"] = array.astype(array.dtype.newbyteorder())
    files = {"empty": b"", "cut": data[: draw.randrange(len(data))], "longer": data + bytes(draw.choice((1, 4096)))}
    files |= {"magic": b"PK\3\4" + data[4:], "version 9": data[:6] + b"\x09\0" + data[8:], "a pickle": EVIL}
    files |= {"long header": data[:8] + b"\xff\xff" + data[10:], "4 GB": data[:6] + b"\2\0" + b"\xff" * 4 + data[10:]}
    name = draw.choice([*texts, *arrays, *files])
    if name in texts:
        text = texts[name].encode()
        return data[:8] + struct.pack("<H", len(text)) + text + body, name
    return npy(arrays[name]) if name in arrays else files[name], name


def zipped(arrays: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in arrays.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def damaged_npz(draw: Random, data: bytes) -> tuple[bytes, str, dict[str, np.ndarray]]:
    """Return a .npz file with something changed, a description, and the array in it that a summary may repeat."""
    arrays = dict(np.load(io.BytesIO(data)))
    name = draw.choice(list(arrays))
    array, member = arrays[name].copy(), f"{name}.npy"
    files = {f"{key}.npy": npy(value) for key, value in arrays.items()}
    action = draw.choice(("value", "value", "type", "npy", "npy", "zip"))
    if action == "value":
        integers = [number for number in NUMBERS if -(2**63) <= number < 2**63]
        values = integers if array.dtype.kind in "iu" else FLOATS
        value = draw.choice(WORDS[:8] if array.dtype.kind == "U" else values)
        every = draw.random() < 0.3 or array.ndim == 0
        array[... if every else tuple(map(draw.randrange, array.shape))] = value
        label = f"{name} = {short(value)}{' everywhere' if every else ''}"
        return zipped(files | {member: npy(array)}), label, {name: array}
    if action == "type":
        kind = draw.choice(("f4", "f8", "i1", "i8", "U9", "S3", "c16", "?", "O", ">f8"))
        other = np.zeros(array.shape, kind) if array.dtype.kind == "U" else array.astype(kind)
        return zipped(files | {member: npy(other)}), f"{name} as {kind}", {}
    if action == "npy":
        files[member], label = damaged_npy(draw, array)
        return zipped(files), f"{name}: {label}", {}
    packed, others = zipped(files), {key: value for key, value in files.items() if key != member}
    entry = packed.index(b"PK\1\2")  # of the first member in the central directory
    fields = {"declared 4 GB": (20, b"\xfe\xff\xff\xff" * 2), "encrypted": (8, b"\1"), "method": (10, b"\x63")}
    fields |= {"offset": (42, b"\xff\xff\xff\x7f")}
    archives = {key: packed[: entry + i] + raw + packed[entry + i + len(raw) :] for key, (i, raw) in fields.items()}
    archives |= {"missing": zipped(others), "extra": zipped(files | {"../../../x": b"x", "x.npy": EVIL}), "empty": b""}
    archives |= {
        "a .npy": files[member],
        "deflated": zipped(files, zipfile.ZIP_DEFLATED),
        "no end": data[: data.rindex(b"PK\5\6")],
    }
    archives |= {
        "no members": b"PK\5\6" + bytes(18),
        "cut": data[: draw.randrange(len(data))],
        "text": b"no zip\n" * 99,
    }
    label = draw.choice([*archives, "a bomb"])
    bomb = zipped({**files, member: bytes(2 * 10**8)}, zipfile.ZIP_DEFLATED) if label == "a bomb" else b""
    return archives.get(label, bomb), f"{name}: {label}", {}


# ---- Tars and tensors ----


def damaged_tar(draw: Random, data: bytes, case: Path) -> tuple[bytes, str]:
    """Return a tar of which a member is not as the others, and a description."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        info = draw.choice(tar.getmembers())
    start, end, tar = info.offset_data - 512, info.offset_data + info.size, bytearray(data)
    action = draw.choice(("header", "header", "bit", "content", "cut", "backwards"))
    if action == "header":
        headers: dict[str, dict[str, Any]] = {f"size {size}": {"size": size} for size in (0, 2**33 - 1, 2**70)}
        headers |= {f"type {kind!r}": {"type": kind, "linkname": str(outside(case))} for kind in LINKS}
        names = ("../../../x.jpg", str(outside(case)), "x", "x" * 300 + ".jpg", "a\nb\x1b.jpg")
        headers |= {f"name {short(name)}": {"name": name} for name in names}
        headers |= {
            "one more": {"size": info.size + 1},
            "pax": {"pax_headers": {"path": "../../../x.jpg", "size": "9" * 14}},
        }
        label, header = draw.choice(list(headers)), tarfile.TarInfo(info.name)
        for key, value in {"size": info.size, **headers[label]}.items():
            setattr(header, key, value)
        tar[start : start + 512] = header.tobuf(tarfile.PAX_FORMAT if label == "pax" else tarfile.GNU_FORMAT)
        return bytes(tar), f"{info.name}: {label}"
    if action == "bit":
        tar[start + draw.randrange(512)] ^= 1 << draw.randrange(8)
    elif action == "content":
        for _ in range(draw.choice((1, 4, 400))):
            tar[draw.randrange(info.offset_data, end)] = draw.randrange(256)
    elif action == "cut":
        del tar[draw.choice((start, start + 100, end - 1, len(tar) - 512, 0)) :]
    else:
        tar[start:end] = tar[start:end][::-1]
    return bytes(tar), f"{info.name}: {action}"


def parts(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header of a safetensors file, and the bytes of its tensors."""
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header: Any, data: bytes) -> bytes:
    """Return the safetensors file of `parts`."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data
