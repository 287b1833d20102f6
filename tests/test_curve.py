"""tools/curve.py: each run's line is where its numbers are."""

import json
from pathlib import Path

from click.testing import CliRunner
from PIL import Image, ImageColor

from tools.curve import HEIGHT, main
from trainer.figures.charts import BOTTOM, LEFT, RIGHT, TOP
from trainer.figures.drawing import COLOURS, MARGIN, WIDTH


def run(folder: Path, points: dict[int, float]) -> Path:
    folder.mkdir(parents=True)
    lines = [{"kind": "train", "step": 1, "loss": 2.0}]
    lines += [{"kind": "validation", "step": step, "top1_error": error} for step, error in points.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_lines_are_where_the_numbers_are(tmp_path: Path):
    flat, falling = run(tmp_path / "a" / "run", {1: 50, 100: 50}), run(tmp_path / "b" / "run", {1: 100, 100: 0})
    result = CliRunner().invoke(main, [str(flat), str(falling), "--out", str(tmp_path / "curve.png"), "--limit", "25"])
    assert result.exit_code == 0, result.output
    image = Image.open(tmp_path / "curve.png")
    assert image.size == (WIDTH, HEIGHT + 2 * MARGIN)
    first, second = (ImageColor.getrgb(colour) for colour in COLOURS[:2])
    height, width, foot = HEIGHT - TOP - BOTTOM, RIGHT - LEFT, MARGIN + HEIGHT - BOTTOM
    for step in (10, 30, 80):
        x = LEFT + round(step * width / 100)
        assert image.getpixel((x, foot - height // 2)) == first
        error = 100 - 100 * (step - 1) / 99
        assert image.getpixel((x, foot - round(error * height / 100))) == second
        assert image.getpixel((x, foot - round(25 * height / 100))) in (ImageColor.getrgb("#8fae8f"), second)


def test_a_run_without_validation_is_named(tmp_path: Path):
    result = CliRunner().invoke(main, [str(run(tmp_path / "r", {})), "--out", str(tmp_path / "c.png")])
    assert result.exit_code == 2
    assert "r: no validation in its metrics.jsonl" in result.output
    assert not (tmp_path / "c.png").exists()
