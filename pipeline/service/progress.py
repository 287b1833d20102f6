"""The JSON lines that a job's command prints: folded into its progress, and as sentences for people."""

import json
from collections.abc import Iterable
from typing import Any

from pipeline.cli import printable

NAMED = 20  # notes and failures that are kept
LONGEST = 4096  # characters of a line that is kept
Progress = dict[str, Any]
OWN = {"train": ("epoch", "loss", "lr", "stall_text"), "validation": ("top1_error", "top5_error")}


def fold(progress: Progress, lines: Iterable[bytes], now: float) -> Progress:
    """Return the progress after some more lines of the log, read at `now`, in Unix seconds.

    A line that is no JSON is a note, or the error.
    """
    progress = dict(progress)
    for line in lines:
        event = parse(line)
        if event is None:
            text = printable(line.decode("utf-8", "replace").strip(), LONGEST)
            if text.startswith("Error: "):
                progress["error"] = text.removeprefix("Error: ")
            elif text:
                _add(progress, "notes", text)
        else:
            try:
                _fold(progress, event)
            except (AttributeError, KeyError, TypeError, ValueError):  # of another program, or of another version
                _add(progress, "notes", printable(line.decode("utf-8", "replace").strip(), LONGEST))
    _estimate(progress, now)
    return progress


def _estimate(progress: Progress, now: float) -> None:
    """Set rate, per second, and the time left, in seconds, where the command does not say them."""
    done, total = progress.get("done"), progress.get("total")
    if done is None or not total or (progress["unit"] == "images" and "shards" in progress):
        return
    first = progress.setdefault("first", [now, done])  # when the progress was first seen, and how far it was
    if done > first[1] and now > first[0]:
        rate = (done - first[1]) / (now - first[0])
        progress |= {"rate": round(rate, 3), "eta": round((total - done) / rate, 1)}


def parse(line: bytes) -> dict[str, Any] | None:
    """Return the event in a line; None where there is none."""
    if not line.startswith(b"{"):
        return None
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def _fold(progress: Progress, event: dict[str, Any]) -> None:
    name = event["event"]
    if name == "begin":  # an attempt: its command counts anew what an earlier one had done
        for key in ("error", "rate", "eta", "done", "failed", "failures", "skipped", "uri", "status", "first"):
            progress.pop(key, None)
        progress["command"] = ["penstock", *event["command"][2:]]
    elif name == "plan":
        _plan(progress, event)
    elif name == "shard":
        _shard(progress, event)
    elif name == "progress":
        progress |= {"task": event["task"], "done": event["done"], "total": event["total"], "unit": "images"}
        progress |= {"unit": "shards"} if event["task"] == "shards" else {}
    elif name in OWN:
        progress |= {key: event[key] for key in OWN[name] if key in event}
        if name == "train":
            speed = event["time"]
            progress |= {"stall": speed["stall"], "images_per_second": speed["images_per_second"]}
        progress |= {"done": event["step"], "unit": "steps"}
    elif name == "repaired":
        for key in ("failed", "failures"):
            progress.pop(key, None)
    elif name == "failure":
        progress["failed"] = progress.get("failed", 0) + 1
        progress["failures"] = [
            *progress.get("failures", []),
            {k: printable(str(event[k])) for k in ("file", "reason")},
        ]
        progress["failures"] = progress["failures"][:NAMED]
    elif name in ("note", "warning"):
        _add(progress, "notes", str(event.get("text", "")))
    elif name == "checkpoint":
        progress["checkpoint"] = event["file"]
    elif name == "serving":
        progress["uri"] = event["uri"]
    elif name == "status":
        progress["status"] = {key: value for key, value in event.items() if key != "event"}
    elif name == "done":
        _done(progress, event)


def _plan(progress: Progress, event: dict[str, Any]) -> None:
    progress.pop("first", None)
    if "images" in event:  # a build's
        progress |= {"images": event["images"], "classes": event["classes"], "unit": "images"}
        progress |= {"total": sum(event["images"].values()), "done": 0, "shards": [0, event["shards"]], "skipped": {}}
    elif "steps" in event:
        progress |= {"total": event["steps"], "done": event.get("start", 0), "unit": "steps"}
    elif "shards" in event:
        progress |= {"total": event["shards"], "done": 0, "unit": "shards"}
    for text in event.get("notes", ()):
        _add(progress, "notes", str(text))


def _shard(progress: Progress, event: dict[str, Any]) -> None:
    skipped = dict(progress.get("skipped", {}))
    for reason, number in event.get("skipped", {}).items():
        skipped[reason] = skipped.get(reason, 0) + number
    progress |= {"done": event["done"], "seconds": event["seconds"], "rate": event["images_per_second"]}
    progress |= {"megabytes_per_second": event["megabytes_per_second"], "skipped": skipped}
    done, total = progress.get("shards", [0, 0])
    progress["shards"] = [done + 1, total]
    if event["images_per_second"] > 0:
        progress["eta"] = round((progress.get("total", event["done"]) - event["done"]) / event["images_per_second"], 1)


def _done(progress: Progress, event: dict[str, Any]) -> None:
    progress.pop("eta", None)
    if "failed" in event:  # of verify
        progress["failed"] = event["failed"]
    if "files" in event and isinstance(event["files"], list):
        progress["files"] = event["files"][:NAMED]
    errors = {key: event[key] for key in ("centre", "ten", "nine") if key in event}
    if errors:
        progress["errors"] = errors
    if progress.get("total"):
        early = event.get("step") if progress["unit"] == "steps" else None  # where a plateau has ended a run
        progress["done"] = progress["total"] if early is None else early


def _add(progress: Progress, key: str, text: str) -> None:
    progress[key] = [*progress.get(key, []), printable(text, LONGEST)][-NAMED:]


def describe(line: bytes) -> str:
    """Return a line of a log as a sentence, without control characters."""
    event = parse(line)
    if event is None:
        return printable(line.decode("utf-8", "replace").rstrip("\r\n"))
    name = event.pop("event")
    writer = SENTENCES.get(name)
    try:
        text = writer(event) if writer else _pairs(event)
    except (KeyError, TypeError, ValueError):  # of another version
        text = _pairs(event)
    return printable(f"{name}: {text}" if name not in ("note", "begin") else text)


def _pairs(event: dict[str, Any]) -> str:
    plain = {key: value for key, value in event.items() if isinstance(value, str | int | float)}
    return ", ".join(
        f"{key} {value:,.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in plain.items()
    )


def _begin(event: dict[str, Any]) -> str:
    return f"attempt {event['attempt']}: {' '.join(['penstock', *event['command'][2:]])}"


def _built(event: dict[str, Any]) -> str:
    skipped = sum(event["skipped"].values())
    speed = f"{event['images_per_second']:,.0f} images/s, {event['megabytes_per_second']:,.0f} MB/s"
    return f"{event['name']}, {event['done']:,} images done{f', {skipped:,} skipped in it' if skipped else ''}, {speed}"


def _planned(event: dict[str, Any]) -> str:
    if "images" not in event:
        return _pairs(event)
    images = ", ".join(f"{count:,} {split}" for split, count in event["images"].items())
    return f"{event['layout']}; {images}, {event['classes']:,} classes, {event['shards']:,} shards"


def _trained(event: dict[str, Any]) -> str:
    speed = f"{event['time']['images_per_second']:,.0f} images/s"
    figures = f"step {event['step']:,}, epoch {event['epoch']}, loss {event['loss']:.4f}, lr {event['lr']:.2g}"
    return f"{figures}, {speed}, {event['stall_text']}"


def _validated(event: dict[str, Any]) -> str:
    return f"step {event['step']:,}, top-1 error {event['top1_error']:.1f} %, top-5 error {event['top5_error']:.1f} %"


SENTENCES = {
    "begin": _begin,
    "plan": _planned,
    "shard": _built,
    "train": _trained,
    "validation": _validated,
    "note": lambda event: str(event["text"]),
    "warning": lambda event: str(event["text"]),
    "failure": lambda event: f"{event['file']}: {event['reason']}",
    "progress": lambda event: f"{event['task']}, {event['done']:,} of {event['total']:,}",
    "checkpoint": lambda event: str(event["file"]),
}
