"""What a run says of itself: lines on the console, and the same as JSON lines in metrics.jsonl."""

import json
from pathlib import Path
from typing import Any

import click

from pipeline.errors import UserError
from pipeline.files import write_bytes_aside

FILE_NAME = "metrics.jsonl"


class Metrics:
    """Appends to RUN/metrics.jsonl. Whatever depends on the machine's speed stands under the key `time`."""

    def __init__(self, run: Path) -> None:
        self.path = run / FILE_NAME

    def drop_after(self, step: int) -> None:
        """Forget the lines past a checkpoint, which a resumed run writes again."""
        if self.path.exists():
            kept = [line for line in read(self.path.parent) if line["step"] <= step]
            write_bytes_aside(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def train(self, steps: int, line: dict[str, Any]) -> None:
        time = line["time"]
        said = time.pop("said")
        self._write({"kind": "train", **line})
        click.echo(
            f"step {line['step']:>{len(str(steps))}}/{steps}  epoch {line['epoch']:<3} "
            f"loss {line['loss']:.4f}  lr {line['lr']:.2g}  "
            f"{time['images_per_second']:6.0f} images/s  {said}"
        )

    def validation(self, line: dict[str, Any]) -> None:
        self._write({"kind": "validation", **line})
        click.echo(
            f"validation at step {line['step']}: top-1 error {line['top1_error']:.1f} %, "
            f"top-5 error {line['top5_error']:.1f} % (centre view)"
        )

    def _write(self, line: dict[str, Any]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def read(run: Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl, if there is one; a last line that a kill cut off does not count."""
    path = run / FILE_NAME
    found = []
    for number, text in enumerate(path.read_text().split("\n")[:-1] if path.exists() else [], start=1):
        try:
            line = json.loads(text)
            if not isinstance(line["step"], int) or line["kind"] not in ("train", "validation"):
                raise ValueError("not a line of ours")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: line {number} is damaged ({error}); delete that line") from error
        found.append(line)
    return found
