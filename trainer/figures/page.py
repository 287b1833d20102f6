"""Write the figures of a run: the sheets RUN/figures/*.png, and the page RUN/report.html, which needs no network."""

import shlex
from collections.abc import Callable, Mapping
from functools import partial
from html import escape
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from nvidia import dali
from PIL import Image

from pipeline.files import write_bytes_aside
from pipeline.manifest import BuildRecipe
from pipeline.online import augment
from pipeline.online.samples import SampleReader
from trainer import recipe as recipes
from trainer.figures import sections, sheets
from trainer.figures.augmentation import augmentation
from trainer.figures.drawing import png
from trainer.figures.gather import FigureData
from trainer.pictures import pixels

FOLDER, FILE_NAME = "figures", "report.html"
RECORDED = ("size", "crop", "filter", "quality", "subsampling", "exif", "samples_per_shard", "seed", "holdout", "limit")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # and no network
STYLE = """
:root { --ink: #1c2733; --soft: #55626d; --line: #d5dce2; color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--ink); background: #fff;
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.75rem; line-height: 1.2; }
h2 { font-size: 1.25rem; break-after: avoid; }
h3 { font-size: 1rem; margin: 0 0 .5rem; break-after: avoid; }
p { max-width: 46rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .75rem 1.25rem; margin: 0; padding: 0; list-style: none; }
section, footer { margin-top: 2rem; border-top: 1px solid var(--line); }
figure { margin: 0; break-inside: avoid; }
figcaption, caption { color: var(--soft); font-size: .875rem; line-height: 1.35; padding: .4rem 0; text-align: left; }
img { display: block; max-width: 100%; height: auto; }
.mean { width: 256px; }
.sheet { max-width: calc(100% + 2rem); margin: 0 -1rem; } /* its own white margins stand in the page's */
.facts { max-width: 56rem; }
.facts div { display: grid; grid-template-columns: 6rem 1fr; padding: .3rem 0; border-bottom: 1px solid var(--line); }
.facts dd { margin: 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; break-inside: avoid; max-width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line); }
thead th { font-size: .875rem; line-height: 1.3; vertical-align: bottom; }
tbody th { font-weight: 400; }
@media (min-width: 22.5rem) { .whole { white-space: nowrap; } }
.strip { display: inline-block; width: 2.5rem; height: 1.1rem; border: 1px solid var(--line); vertical-align: middle; }
.beside { display: flex; flex-wrap: wrap; gap: 1.5rem; }
.beside > div { flex: 1 1 min(20rem, 100%); }
.word { unicode-bidi: isolate; } /* a word from right to left turns no other */
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); gap: 1.25rem .75rem; }
.samples img { width: 100%; margin-bottom: .4rem; }
.charts { display: grid; gap: 1.75rem 1.25rem; }
@media (min-width: 48rem) { .charts { grid-template-columns: repeat(2, 1fr); } }
.charts > div { min-width: 0; break-inside: avoid; }
pre { white-space: pre-wrap; font-size: .875rem; background: #f4f6f8; padding: .75rem; }
@media print { nav { display: none; } body { max-width: none; } .charts { display: block; }
  .sheet { max-height: 22cm; width: auto; break-inside: avoid; } }
"""


def draw(data: FigureData) -> tuple[list[Path], dict[str, str]]:
    """Write all; a sheet that nothing is known for is deleted.

    Returns:
        The files written, the page last; and by file name why a sheet was not.
    Raises:
        OSError: the disk is full.
    """
    draws: dict[str, Callable[[], Image.Image]] = {
        "kernels": lambda: sheets.kernels(np.asarray(data.kernels), data.checkpoint.recipe.model.columns),
        "predictions": lambda: sheets.predictions(data.examples, data.words),
        "neighbours": lambda: sheets.neighbours(data.similar, data.words),
        "augmentation": lambda: _augmentation(data),
    }
    drawn, written = {}, []
    for name, draw_sheet in draws.items():
        path = data.run / FOLDER / f"{name}.png"
        if name in data.lacking:
            path.unlink(missing_ok=True)
        else:
            drawn[name] = png(draw_sheet())
            write_bytes_aside(path, drawn[name])
            written.append(path)
    path = data.run / FILE_NAME
    write_bytes_aside(path, page(data, drawn).encode(errors="replace"))
    return [*written, path], {f"{name}.png": reason for name, reason in data.lacking.items()}


def page(data: FigureData, drawn: Mapping[str, bytes]) -> str:
    """Return the page; `drawn` has the PNG sheets by name."""
    commands, sheet = _commands(data), partial(sections.sheet, data, drawn)
    parts = {
        "Result": sections.facts(data) + sections.errors(data, commands["evaluate"]),
        "Validation images" if data.split == "val" else f"Images of {data.split}": sheet("predictions"),
        "Similar training images": sheet("neighbours"),
        "First-layer kernels": sheet("kernels"),
        "Curves": sections.curves(data),
        "Mean image and colours": sections.mean(data),
        "Training samples": sections.training_samples(data),
        "Augmentation": sheet("augmentation"),
    }
    links = body = ""
    for name, content in parts.items():
        anchor = name.lower().replace(" ", "-")
        links += f'<li><a href="#{anchor}">{name}</a></li>'
        body += f'<section id="{anchor}"><h2>{name}</h2>{content}</section>\n'
    title, shell = escape(f"AlexNet, run {data.run}"), "\n".join(map(shlex.join, commands.values()))
    own = metadata.version("penstock-imagenet")
    versions = [f"penstock {own}", f"torch {torch.__version__}", f"DALI {dali.__version__}"]
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{title}</title>
<style>{STYLE}</style>
</head><body>
<header><h1>{title}</h1><nav aria-label="Sections"><ul>{links}</ul></nav></header>
<main>{body}</main>
<footer><h2>How this page was made</h2><pre>{escape(shell)}</pre>
<p>{escape(", ".join([*versions, f"pillow-simd {Image.__version__}"]))}</p></footer>
</body></html>
"""


def _augmentation(data: FigureData) -> Image.Image:
    """Return the sheet of the first training image."""
    recipe, keys = data.checkpoint.recipe, data.checkpoint.recipe.data
    lighting = keys.lighting if keys.lighting_until > 0 else "off"
    options = augment.Transform(
        view=recipe.model.size, mean=keys.mean, lighting=lighting, positions=keys.positions, crop_chunk=keys.crop_chunk
    )
    with SampleReader(data.dataset, "train") as reader:
        stored = pixels(reader.read(np.zeros(1, np.int64))[0].tobytes())
    return augmentation(stored, options, data.dataset.statistics(), recipe.train.seed, sample=0)


def _commands(data: FigureData) -> dict[str, list[str]]:
    """Return the commands that make the page from raw images; RAW, which nobody recorded, is left open."""
    dataset = data.dataset
    build = ["python", "tools/build_shards.py", "RAW", str(dataset.root)]
    for name in RECORDED:
        if getattr(dataset.recipe, name) != getattr(BuildRecipe, name):
            build += [f"--{name.replace('_', '-')}", str(getattr(dataset.recipe, name))]
    trainer, data_option, run = ["python", "-m", "trainer"], ["--data", str(dataset.root)], str(data.run)
    return {
        "build": build,
        "train": [*trainer, "train", *data_option, "--out", run, *_recipe_options(data.checkpoint.recipe)],
        "evaluate": [*trainer, "evaluate", *data_option, "--checkpoint", run],
        "figures": [*trainer, "figures", run, *data_option],
    }


def _recipe_options(recipe: recipes.Recipe) -> list[str]:
    """Return the fewest --recipe and --set options of `train` that give this recipe."""
    choices = []
    for name in recipes.names():
        known = recipes.load(name)
        if known.model.order == recipe.model.order and known.optim.layers.keys() == recipe.optim.layers.keys():
            changed = recipes.difference(known, recipe)
            settings = (("--set", recipes.as_setting(key, new)) for key, (_, new) in changed.items())
            choices.append(["--recipe", name, *(word for pair in settings for word in pair)])
    return min(choices, key=len, default=["--recipe", "RECIPE"])
