"""What a run wrote down of itself: metrics.jsonl and evaluation.json, refused where they are not what was written."""

import json
from math import isfinite
from pathlib import Path
from typing import Any

from pipeline import UserError
from trainer import metrics
from trainer.tally import Evaluation

EVALUATION = "evaluation.json"


def lines(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, with all the numbers that are drawn; none where there is no such file.

    Raises:
        UserError: a line is damaged; the message has its number.
    """
    found = metrics.read(run)
    for number, line in enumerate(found, start=1):
        try:
            _require_numbers(line)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(
                f"{run / metrics.FILE_NAME}: line {number} is damaged ({what}); delete that line"
            ) from error
    return found


def evaluation(run: Path, classes: int) -> dict[str, Any] | None:
    """What `evaluate` found with a network of so many classes; None where there is no such file.

    Returns:
        {"step", "split", "dataset", "centre" and "ten": as `tally.Evaluation`, "confused": [(true, taken for, images)]}
    Raises:
        UserError: the file is damaged.
    """
    path = run / EVALUATION
    if not path.exists():
        return None
    try:
        return _evaluation(path.read_bytes(), classes)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); mend or delete it") from error


def _require_numbers(line: dict[str, Any]) -> None:
    """Raise KeyError, TypeError, AttributeError or ValueError where a line of metrics.jsonl lacks what is drawn."""
    if line["kind"] == "validation":
        found = [line[key] for key in ("nll", "top1_error", "top5_error")]
    else:
        found = [line["loss"], *(line["time"][key] for key in ("images_per_second", "stall"))]
        found += [layer["ratio"] for layer in line.get("layers", {}).values()]
    for value in found:
        _finite(value)


def _evaluation(data: bytes, classes: int) -> dict[str, Any]:
    found = json.loads(data)
    about = {"step": int(found["step"]), "split": str(found["split"]), "dataset": str(found["dataset"])}
    views = {name: Evaluation(**found[name]).to_dict() for name in ("centre", "ten")}
    for value in (value for view in views.values() for value in view.values()):
        _finite(value)
    confused = [(int(pair["true"]), int(pair["predicted"]), int(pair["images"])) for pair in found.get("confused", ())]
    for label in (label for pair in confused for label in pair[:2]):
        if not 0 <= label < classes:
            raise ValueError(f"label {label} of {classes} classes")
    return about | views | {"confused": confused}


def _finite(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
