"""Seeded mutations of the files that commands read, written again under right checksums.

A mutation takes a random generator and the folder of a case, writes one file of it anew, and returns its description.
"""

import hashlib
import io
import json
import os
import re
import stat
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from damaged import EVIL, canonical, damaged_npy, damaged_npz, damaged_tar, joined, mutate, npy, parts, zipped

STEP = "run/checkpoints/step-00000004.safetensors"
META, CHECKSUM = "penstock", "checksum"  # key of a checkpoint's metadata, and one of the JSON that is its value
TABLES = tuple(f"data/{split}/samples.npy" for split in ("train", "val", "test"))
SHARDS = ("data/val/val-000000.tar", "data/train/train-000001.tar")
INDEX = "run/index/index.json"
SEALED = ("data/dataset.json", "data/statistics.npz", *TABLES, *SHARDS, STEP, "p.npz", INDEX, "run/index/codes.npy")
FILES = (*SEALED, "r.toml", "run/metrics.jsonl", "run/evaluation.json", "run/index/features.npy")
IDENTITY = ("format", "recipe", "classes", "splits", "statistics")
JsonObject = dict[str, Any]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put(path: Path, data: bytes) -> None:
    """Replace a file; the material, of which it is a hard link, stays."""
    path.unlink()
    path.write_bytes(data)


def manifest_of(case: Path) -> JsonObject:
    """Return dataset.json without its digests."""
    body: JsonObject = json.loads((case / "data/dataset.json").read_bytes())
    return {key: value for key, value in body.items() if key not in ("checksum", "identity")}


def seal(case: Path, body: Any) -> None:
    """Write dataset.json with a right identity and checksum; the checkpoint and the index are of this data set now."""
    if isinstance(body, dict):
        identity = sha256(canonical({key: body[key] for key in IDENTITY if key in body}, case))
        for name in (STEP, INDEX):
            if (case / name).exists():
                follow(case, name, identity)
        body = {"identity": identity} | body
        body["checksum"] = sha256(canonical(body, case))
    put(case / "data/dataset.json", canonical(body, case))


def follow(case: Path, name: str, identity: str) -> None:
    """Make a checkpoint, or an index, one of the data set `identity`."""
    if name == INDEX:
        return seal_index(case, json.loads((case / name).read_bytes()) | {"dataset": identity})
    header, data = parts((case / name).read_bytes())
    values = json.loads(header["__metadata__"][META])
    values["dataset"] = values["loader"]["dataset"] = identity
    put(case / name, checkpoint(values, header, data, case))


def seal_index(case: Path, body: Any) -> None:
    """Write index.json with a right checksum."""
    if isinstance(body, dict):
        body.pop("checksum", None)
        body["checksum"] = sha256(canonical(body, case))
    put(case / INDEX, canonical(body, case))


def checkpoint(values: Any, header: JsonObject, data: bytes, case: Path) -> bytes:
    """Return a checkpoint's file, with a right checksum if those of this version have one: over JSON and tensors."""
    if isinstance(values, dict) and CHECKSUM in values:
        body = {key: value for key, value in values.items() if key != CHECKSUM}
        names = sorted(header.keys() - {"__metadata__"})
        tensors = b"".join(data[slice(*header[name]["data_offsets"])] for name in names)
        values = body | {CHECKSUM: sha256(canonical(body, case) + tensors)}
    header["__metadata__"][META] = canonical(values, case).decode()
    return joined(header, data)


def put_data(case: Path, name: str, data: bytes, change: Callable[[JsonObject], object] = lambda body: None) -> None:
    """Replace a file of the data set; its size and digest in dataset.json follow, and what else `change` does there."""
    put(case / "data" / name, data)
    body = manifest_of(case)
    body["files"][name] = {"bytes": len(data), "sha256": sha256(data)}
    for shard in (shard for split in body["splits"].values() for shard in split["shards"] if shard["name"] == name):
        shard["bytes"] = len(data)
    change(body)
    seal(case, body)


def of_manifest(draw: Random, case: Path) -> str:
    body, labels = manifest_of(case), []
    for _ in range(draw.choice((1, 1, 1, 2))):
        body, label = mutate(draw, body)
        labels.append(label)
    seal(case, body)
    return "; ".join(labels)


def of_manifest_text(draw: Random, case: Path) -> str:
    """Write bytes that no builder writes."""
    path, form = case / "data/dataset.json", b'"format": 1'
    data = path.read_bytes()
    version, unsigned = draw.choice((0, 2, 10**40)), re.sub(rb' "checksum".*\n', b"", data)
    changes = {"twice a key": data.replace(form, form + b",\n " + form), "no checksum": unsigned, "NUL": data + b"\0"}
    changes |= {"another format": data.replace(form, b'"format": %d' % version), "no line break": data.strip()}
    changes |= {"not UTF-8": data.replace(b"ant", b"\xff\xfe\xfd"), "UTF-16": data.decode().encode("utf-16")}
    changes |= {"BOM": b"\xef\xbb\xbf" + data, "a list": b"[" + data + b"]", "deep": b"[" * 10**6, "empty": b""}
    label = draw.choice(list(changes))
    put(path, changes[label])
    return label


def of_samples(draw: Random, case: Path) -> str:
    path = case / draw.choice((*TABLES, TABLES[1]))
    name = str(path.relative_to(case / "data"))
    samples = np.load(path)
    action = draw.choice(("field", "field", "field", "column", "rows", "file"))
    if action == "file":
        data, label = damaged_npy(draw, samples)
        put_data(case, name, data)
        return f"{name}: {label}"
    if action == "rows":
        samples, label = samples[[*draw.sample(range(len(samples)), len(samples) - 1), 0]], "other rows"
    else:
        field, row = draw.choice([*samples.dtype.names]), draw.randrange(len(samples))
        info = np.iinfo(samples.dtype[field].base)
        corners = {
            info.min,
            info.max,
            info.max - 1,
            -2,
            -1,
            0,
            1,
            2,
            3,
            511,
            512,
            513,
            4096,
            13311,
            13312,
            2**31,
            2**63,
        }
        value = draw.choice(sorted(corner for corner in corners if info.min <= corner <= info.max))
        samples[field][slice(None) if action == "column" else row] = value
        label = f"{field} = {value}, row {'all' if action == 'column' else row}"
    put_data(case, name, npy(samples))
    return f"{name}: {label}"


def of_statistics(draw: Random, case: Path) -> str:
    data, label, values = damaged_npz(draw, (case / "data/statistics.npz").read_bytes())

    def repeat(body: JsonObject) -> None:
        """Let the summary in dataset.json tell the same lie."""
        for name in values.keys() & body["statistics"].keys():
            body["statistics"][name] = values[name].tolist()

    put_data(case, "statistics.npz", data, repeat if draw.random() < 0.5 else len)
    return f"statistics.npz: {label}"


def of_shard(draw: Random, case: Path) -> str:
    """Damage a tar; in half of the cases samples.npy has the CRC-32 of what lies there now."""
    name = draw.choice(SHARDS).removeprefix("data/")
    table = f"{name.partition('/')[0]}/samples.npy"
    data, label = damaged_tar(draw, (case / "data" / name).read_bytes(), case)
    if draw.random() < 0.5:
        samples = np.load(case / "data" / table)
        for i in np.flatnonzero(samples["shard"] == int(name[-10:-4])):
            start, size = int(samples["offset"][i]), int(samples["size"][i])
            samples["crc32"][i] = zlib.crc32(data[start : start + size])
        put_data(case, table, npy(samples))
        label += ", with its CRC-32"
    put_data(case, name, data)
    return f"{name}: {label}"


def of_other_files(draw: Random, case: Path) -> str:
    name = draw.choice(("skipped.jsonl", "skipped.jsonl", "_info.json", "val/val-000000.idx", "mean.png"))
    data = (case / "data" / name).read_bytes()
    if "json" in name and draw.random() < 0.7:
        value, label = mutate(draw, json.loads(data))
        data = canonical(value, case)
        data = data.replace(b"\n", b" ") + b"\n" if name == "skipped.jsonl" else data
    else:
        changes = {"empty": b"", "twice": data * 2, "NUL": bytes(99), "cut": data[: len(data) // 2]}
        label, data = draw.choice([*changes.items()])
    put_data(case, name, data)
    return f"{name}: {label}"


def of_checkpoint(draw: Random, case: Path) -> str:
    raw = (case / STEP).read_bytes()
    header, data = parts(raw)
    values = json.loads(header["__metadata__"][META])
    action = draw.choice(("values", "values", "values", "values", "tensor", "shape", "header", "file"))
    name = draw.choice(sorted(header.keys() - {"__metadata__"}))  # safetensors writes them in any order
    if action == "values":
        section = draw.choice((None, *(key for key, value in values.items() if value and type(value) in (dict, list))))
        if section is None:
            values, label = mutate(draw, values)
        else:
            values[section], label = mutate(draw, values[section])
            label = f"{section}: {label}"
        raw = checkpoint(values, header, data, case)
    elif action == "tensor":
        start, end = (offset // 4 for offset in header[name]["data_offsets"])
        value = draw.choice((float("nan"), float("inf"), 3e38, -3e38, 0.0, 1e-45))
        array = np.frombuffer(data, "<f4").copy()
        array[start : draw.choice((start + 1, end))] = value
        raw, label = checkpoint(values, header, array.tobytes(), case), f"{name} = {value}"
    elif action == "shape":
        shape = draw.choice(([*header[name]["shape"], 1], header[name]["shape"][::-1], [1, *header[name]["shape"]]))
        for kind in draw.choice((("weights", "velocity"), ("weights",), ("velocity",))):
            header[f"{kind}.{name.partition('.')[2]}"]["shape"] = shape
        raw, label = checkpoint(values, header, data, case), f"{name} as {shape}"
    elif action == "header":
        header, label = mutate(draw, header)
        raw = joined(header, data)
    else:
        length = len(raw) - len(data) - 8
        lies = (0, 1, length - 1, length + 1, len(raw), 2**63, 2**64 - 1, 99_999_999)
        files = {f"a header of {lie} bytes": lie.to_bytes(8, "little") + raw[8:] for lie in lies}
        files |= {"cut": raw[: draw.randrange(len(raw))], "longer": raw + b"\0", "a pickle": EVIL, "empty": b""}
        files["no metadata"] = joined({**header, "__metadata__": {}}, data)
        label, raw = draw.choice([*files.items()])
    put(case / STEP, raw)
    return f"checkpoint, {action}: {label}"


def of_records(draw: Random, case: Path) -> str:
    name = draw.choice(("metrics.jsonl",) * 4 + ("evaluation.json",) * 3 + ("history.json", "recipe.json"))
    data = (case / "run" / name).read_bytes()
    lines = data.splitlines() if name == "metrics.jsonl" else [data]
    if draw.random() < 0.2:
        cut = draw.randrange(len(data))
        files = {"empty": b"", "NUL": bytes(99), "cut": data[:cut], "not UTF-8": data[:cut] + b"\xff" + data[cut:]}
        files |= {"twice": data * 2, "deep": b"[" * 10**6 + b"\n", "null": b"null\n", "a number": b"9" * 5000 + b"\n"}
        label, data = draw.choice([*files.items()])
    else:
        i = draw.randrange(len(lines))
        value, label = mutate(draw, json.loads(lines[i]))
        lines[i], label = canonical(value, case).replace(b"\n", b" "), f"line {i + 1}, {label}"
        data = b"".join(line + b"\n" for line in lines)
    put(case / "run" / name, data)
    return f"{name}: {label}"


def of_index(draw: Random, case: Path) -> str:
    name = draw.choice(("index.json", "index.json", "codes.npy", "features.npy", "autoencoder.safetensors"))
    path, body = case / "run/index" / name, json.loads((case / INDEX).read_bytes())
    if name == "index.json":
        body, label = mutate(draw, {key: body[key] for key in body if key != "checksum"})
    else:
        if name.endswith("npy"):
            data, label = damaged_npy(draw, np.load(path))
        else:
            header, tensors = parts(path.read_bytes())
            header, label = mutate(draw, header)
            data = joined(header, tensors)
        put(path, data)
        body["files"][name] = {"bytes": len(data)} | ({} if "features" in name else {"sha256": sha256(data)})
    seal_index(case, body)
    return f"{name}: {label}"


def of_probabilities(draw: Random, case: Path) -> str:
    data = (case / "p.npz").read_bytes()
    if draw.random() < 0.5:
        arrays = dict(np.load(io.BytesIO(data)))
        about, label = mutate(draw, json.loads(str(arrays["about"])))
        arrays["about"] = np.array(canonical(about, case).decode())
        data = zipped({f"{key}.npy": npy(value) for key, value in arrays.items()})
    else:
        data, label, _ = damaged_npz(draw, data)
    put(case / "p.npz", data)
    return f"p.npz: {label}"


SETTINGS: tuple[Any, ...] = (-1, 0, 1, 2, 3, 5, 2**20, 2**20 + 1, 2**31, 2**63 - 1, 10**21, True, "", "x", "../x")
SETTINGS += (0.5, -0.5, 1e-300, 1e-45, 1e-8, 3.4e38, 1e300, [], [0.5], [-1], [3.4e38], ["lrn"], {}, {"x": 1})
SETTINGS += ("stretches", "plateau", "drops", "shards", "fixed", "aligned", "colour", "paper", "bf16", "both", "local")


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    return f"[{', '.join(map(toml, value))}]" if isinstance(value, list) else json.dumps(value)


def of_recipe(draw: Random, case: Path) -> str:
    recipe, labels = json.loads((case / "run/recipe.json").read_bytes()), []
    for _ in range(draw.choice((1, 1, 2, 3))):
        recipe, label = mutate(draw, recipe, SETTINGS)
        labels.append(label)
    text = "".join(f"{json.dumps(key)} = {toml(value)}\n" for key, value in recipe.items()).encode()
    if draw.random() < 0.1:
        cut, digits = draw.randrange(len(text)), b"train.steps = " + b"9" * 5000
        files = {
            "BOM": b"\xef\xbb\xbf" + text,
            "UTF-16": text.decode().encode("utf-16"),
            "empty": b"",
            "cut": text[:cut],
        }
        files |= {"deep": b"x = " + b"[" * 10**5, "twice": text * 2, "digits": digits, "NUL": text + b"\0"}
        files |= {"its own base": f'base = "{case}/r.toml"'.encode(), "not UTF-8": text[:cut] + b"\xff"}
        labels = [draw.choice(list(files))]
        text = files[labels[0]]
    put(case / "r.toml", text)
    return f"recipe: {'; '.join(labels)}"


def of_kinds(draw: Random, case: Path) -> str:
    """Put something that is no regular file where one is read."""
    name = draw.choice([name for name in FILES if (case / name).exists()])
    path, kind = case / name, draw.choice(("fifo", "folder", "socket", "zero", "full", "loop", "dangling", "gone"))
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif kind != "gone":
        path.symlink_to({"zero": "/dev/zero", "full": "/dev/full", "loop": path.name, "dangling": "nothing"}[kind])
    return f"{name}: {kind}"


def of_bits(draw: Random, case: Path) -> str:
    """Flip a bit of a file that a checksum covers, and seal nothing."""
    name = draw.choice([name for name in SEALED if (case / name).exists()])
    data = bytearray((case / name).read_bytes())
    position = draw.randrange(len(data))
    data[position] ^= 1 << draw.randrange(8)
    put(case / name, bytes(data))
    return f"{name}: a bit of byte {position}"
