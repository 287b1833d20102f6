"""The page RUN/report.html: what a run was given, what it learned, how it errs. One file, which needs no network."""

import json
import shlex
from collections.abc import Callable
from html import escape
from importlib import metadata
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from nvidia import dali
from PIL import Image

from pipeline import manifest
from pipeline.errors import UserError
from pipeline.files import write_bytes_aside
from pipeline.manifest import BuildRecipe, Manifest
from pipeline.online.samples import SampleReader
from trainer import feed, metrics
from trainer import recipe as recipes
from trainer.checkpoint import Checkpoint, require_same_data
from trainer.evaluate import probabilities
from trainer.figures import html
from trainer.figures.html import picture, table
from trainer.layers import plan
from trainer.parallel import Columns
from trainer.pictures import Pictures
from trainer.tally import Evaluation

FILE_NAME = "report.html"
TRAINING_SAMPLES, VALIDATION_SAMPLES = 16, 8  # how many are shown
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # and no network
NO_VALIDATION = "<p>The data set has no validation images.</p>"

Lines = list[dict[str, Any]]


def write_report(run: Path, data: Path, network: Columns, checkpoint: Checkpoint) -> Path:
    """Write RUN/report.html and return its path. `network` holds the weights of `checkpoint`, the newest of `run`.

    Raises:
        UserError: `run` is not a directory; `data` is not what it was trained on; a file of either is damaged.
    """
    if not run.is_dir():
        raise UserError(f"{run}: not a directory; a report is of a whole run: name its directory as --checkpoint")
    dataset = manifest.load(data)
    require_same_data(checkpoint, dataset.identity, run)
    lines = _recorded(run / metrics.FILE_NAME, lambda path: metrics.read(path.parent)) or []
    evaluation = _recorded(run / "evaluation.json", _evaluation)
    commands = _commands(run, dataset, checkpoint.recipe)
    sections = {
        "Result": _facts(dataset, checkpoint, lines) + _errors(dataset, checkpoint, evaluation, commands["evaluate"]),
        "Mean image and colours": _mean(dataset),
        "Training samples": _training_samples(dataset, checkpoint.recipe),
        "Curves": _curves(dataset, lines),
        "First-layer kernels": _kernels(network),
        "Validation images": _predictions(dataset, network, checkpoint.recipe),
    }
    path = run / FILE_NAME
    title = f"AlexNet, run {run}"
    write_bytes_aside(path, _page(title, sections, _shell(commands)).encode(errors="replace"))
    return path


def _recorded(path: Path, read: Callable[[Path], Any]) -> Any:
    """What a run wrote down; None where there is no such file."""
    try:
        return read(path) if path.exists() else None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); mend or delete it") from error


def _evaluation(path: Path) -> dict[str, Any]:
    """What `evaluate` wrote. Raises KeyError, TypeError or ValueError where it is something else."""
    found = json.loads(path.read_text())
    about = {"step": int(found["step"]), "split": str(found["split"]), "dataset": str(found["dataset"])}
    return about | {views: Evaluation(**found[views]).to_dict() for views in ("centre", "ten")}


def _validation(dataset: Manifest) -> int:
    return dataset.splits["val"].samples if "val" in dataset.splits else 0


def _words(dataset: Manifest, label: int) -> str:
    return dataset.classes[label].words if label >= 0 else "no label"


# The sections, each a fragment of HTML.


def _facts(dataset: Manifest, checkpoint: Checkpoint, lines: Lines) -> str:
    model, train = checkpoint.recipe.model, checkpoint.recipe.train
    layers = ", ".join(f"{layer.name} {layer.width:,}" for layer in plan(model, len(checkpoint.classes)))
    samples = ", ".join(f"{split.samples:,} {escape(name)}" for name, split in dataset.splits.items())
    times = [line["time"] for line in lines if line["kind"] == "train"]
    speed, stall = (median([time[key] for time in times] or [nan]) for key in ("images_per_second", "stall"))
    measured = f"{speed:,.0f} images/s, stall {100 * stall:.1f} % of the time (medians over the training log)"
    facts = {
        "Data set": f"{escape(dataset.root.resolve().name)}: {samples} samples, {len(dataset.classes):,} classes, "
        f"identity <code>{dataset.identity[:12]}</code>",
        "Network": f"{layers} maps or units, {model.columns} column{'s together' if model.columns > 1 else ''}",
        "Training": f"{checkpoint.step:,} of {checkpoint.progress['steps']:,} steps of {train.batch_size} images, "
        f"seed {train.seed}",
        "Speed": measured if times else "not recorded",
    }
    rows = "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in facts.items())
    return f'<dl class="facts">{rows}</dl>'


def _errors(dataset: Manifest, checkpoint: Checkpoint, evaluation: Any, command: list[str]) -> str:
    if evaluation is None:
        hint = f"<p>Not evaluated yet; the command is <code>{escape(shlex.join(command))}</code></p>"
        return hint if _validation(dataset) else NO_VALIDATION
    images, step = evaluation["centre"]["samples"], evaluation["step"]
    caption = f"Errors on the split {evaluation['split']} ({images:,} images) at step {step:,}"
    if (step, evaluation["dataset"]) != (checkpoint.step, checkpoint.dataset):
        caption += f"; out of date, the newest checkpoint is that of step {checkpoint.step:,}: evaluate again"
    rows = []
    for name, key in (("centre view", "centre"), ("ten views", "ten")):
        found = evaluation[key]
        rows.append([name, f"{found['top1_error']:.1f} %", f"{found['top5_error']:.1f} %", f"{found['nll']:.3f}"])
    return table(caption, ("view", "top-1 error", "top-5 error", "negative log-likelihood, nats"), rows)


def _mean(dataset: Manifest) -> str:
    statistics = dataset.statistics()
    colour, deviations = statistics.mean_color, np.sqrt(np.maximum(statistics.eigenvalues, 0.0))
    image = picture((dataset.root / "mean.png").read_bytes(), "png", "The mean of the training images", "mean")
    rows = []
    for i, (deviation, along) in enumerate(zip(deviations, statistics.eigenvectors.T), 1):
        strip = html.gradient(colour - deviation * along, colour + deviation * along)
        cells = (f"{i} {strip}", f"{deviation:.1f}", ", ".join(f"{part:.2f}".replace("-", "−") for part in along))
        rows.append([f'<span class="whole">{cell}</span>' for cell in cells])
    caption = "Principal components of the pixels’ colours; each strip ends one standard deviation off the mean colour"
    heads = ("no.", "standard deviation, grey levels", "direction (R, G, B)")
    levels = ", ".join(f"{level:.1f}" for level in colour)
    return (
        f'<div class="beside"><figure>{image}<figcaption>Mean of {statistics.n:,} training images</figcaption></figure>'
        f"<div><p>{html.gradient(colour, colour)} Mean colour: {levels} grey levels of red, green and blue</p>"
        f"{table(caption, heads, rows)}</div></div>"
    )


def _training_samples(dataset: Manifest, recipe: recipes.Recipe) -> str:
    """The first samples of the run's first batch: as stored, and as the network saw them in the first epoch."""
    side, view = dataset.recipe.size, recipe.model.size
    lit = recipe.data.lighting != "off" and recipe.data.lighting_until > 0
    with feed.training(dataset, recipe, batch_size=TRAINING_SAMPLES) as loader:
        batch = next(loader)
    with SampleReader(dataset, "train") as reader:
        stored = reader.read(batch.ids)
    cards = ""
    for number, jpeg, label, x in zip(batch.ids, stored, batch.labels.tolist(), batch.images.numpy()):
        cards += html.pair(f"Training sample {number}", _words(dataset, label), jpeg.tobytes(), x)
    return (
        f"<p>Above, each sample as it is stored ({side} × {side} pixels, JPEG). Beneath, as the network sees it in the "
        f"first epoch: a random view of {view} × {view} pixels, mirrored or not, minus the mean "
        f"{'colour' if recipe.data.mean == 'colour' else 'image'}"
        f"{', with its colours shifted (lighting)' if lit else ''}"
        f"{' and divided by 1.1' if lit and recipe.data.lighting == 'code' else ''}. To show it, "
        f"{html.MID_GREY} grey levels are added, and what falls outside 0 to 255 is clipped.</p>"
        f'<div class="samples">{cards}</div>'
    )


def _curves(dataset: Manifest, lines: Lines) -> str:
    if not lines:
        return "<p>No steps are recorded.</p>"
    note = "<p>Training is measured with dropout on random views, validation without, on the centre view.</p>"
    return f'{note if _validation(dataset) else NO_VALIDATION}<div class="charts">{html.curves(lines)}</div>'


def _kernels(network: Columns) -> str:
    grids = ""
    first = network.layers[0]
    if first.recipe.kind != "conv":
        return f"<p>The first layer, {first.name}, has no kernels to look at.</p>"
    whole = network.gathered()[f"{first.name}.weight"].numpy()
    for column, kernels in enumerate(np.split(whole, network.recipe.columns)):
        pixels = html.kernel_grid(kernels)
        alt = f"The {len(kernels)} kernels of {first.name} in column {column}"
        image = picture(html.png(pixels), "png", alt, "pixelated")
        grids += f"<div><h3>Column {column}</h3><figure>{image}<figcaption>{alt}</figcaption></figure></div>"
    side = whole.shape[-1]
    note = f"{side} × {side} weights of red, green and blue each; a column's least is shown as 0, its greatest as 255."
    return f'<p>{note}</p><div class="grids">{grids}</div>'


@torch.inference_mode()
def _predictions(dataset: Manifest, network: Columns, recipe: recipes.Recipe) -> str:
    """Validation images spread evenly over the split, each with the most probable labels for its centre view."""
    samples = _validation(dataset)
    if not samples:
        return NO_VALIDATION
    shown = min(VALIDATION_SAMPLES, samples)
    ids = (2 * np.arange(shown) + 1) * samples // (2 * shown)
    with SampleReader(dataset, "val") as reader:
        stored, labels = reader.read(ids), reader.labels(ids).tolist()
    jpegs = [jpeg.tobytes() for jpeg in stored]
    chances = probabilities(network, Pictures(dataset, recipe).views(jpegs)).cpu().numpy()
    words, cards = [record.words for record in dataset.classes], ""
    for number, jpeg, label, row in zip(ids, jpegs, labels, chances):
        cards += html.prediction(f"Validation sample {number}", jpeg, row, words, label)
    return f'<p>The most probable labels of the centre view; ✓ marks the true one.</p><div class="cards">{cards}</div>'


# The page around them.


def _commands(run: Path, dataset: Manifest, recipe: recipes.Recipe) -> dict[str, list[str]]:
    """The commands that make the page from raw images; RAW, which nobody recorded, is left open."""
    build = ["python", "tools/build_shards.py", "RAW", str(dataset.root)]
    for name in ("size", "quality", "samples_per_shard", "seed", "holdout", "limit"):
        if getattr(dataset.recipe, name) != getattr(BuildRecipe, name):
            build += [f"--{name.replace('_', '-')}", str(getattr(dataset.recipe, name))]
    trainer, data, checkpoint = ["python", "-m", "trainer"], ["--data", str(dataset.root)], ["--checkpoint", str(run)]
    commands = {"build": build, "train": [*trainer, "train", *data, "--out", str(run), *_recipe_options(recipe)]}
    return commands | {name: [*trainer, name, *data, *checkpoint] for name in ("evaluate", "report")}


def _shell(commands: dict[str, list[str]]) -> str:
    """Commands to copy into a shell, an option a line."""
    quoted = ([shlex.quote(word) for word in command] for command in commands.values())
    return "\n".join(" ".join(f"\\\n  {word}" if word[:2] == "--" else word for word in words) for words in quoted)


def _recipe_options(recipe: recipes.Recipe) -> list[str]:
    """The fewest --recipe and --set options of `train` that give this recipe."""
    choices = []
    for name in recipes.names():
        known = recipes.load(name)
        if known.model.order == recipe.model.order and known.optim.layers.keys() == recipe.optim.layers.keys():
            changed = recipes.difference(known, recipe)
            settings = (("--set", recipes.as_setting(key, new)) for key, (_, new) in changed.items())
            choices.append(["--recipe", name, *(word for pair in settings for word in pair)])
    return min(choices, key=len, default=["--recipe", "RECIPE"])


def _page(title: str, sections: dict[str, str], commands: str) -> str:
    versions = [f"penstock {metadata.version('penstock')}", f"torch {torch.__version__}", f"DALI {dali.__version__}"]
    links = body = ""
    for name, content in sections.items():
        anchor = name.lower().replace(" ", "-")
        links += f'<li><a href="#{anchor}">{name}</a></li>'
        body += f'<section id="{anchor}"><h2>{name}</h2>{content}</section>\n'
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>{html.STYLE}</style>
</head><body>
<header><h1>{escape(title)}</h1><nav aria-label="Sections"><ul>{links}</ul></nav></header>
<main>{body}</main>
<footer><h2>How this page was made</h2><pre>{escape(commands)}</pre>
<p>{escape(", ".join([*versions, f"pillow-simd {Image.__version__}"]))}</p></footer>
</body></html>
"""
