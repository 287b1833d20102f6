"""The sections of the page, each a fragment of HTML."""

import shlex
from html import escape
from math import nan
from statistics import median

import numpy as np

from pipeline.manifest import Manifest
from pipeline.online.samples import SampleReader
from trainer import feed
from trainer import recipe as recipes
from trainer.figures import html, kernels
from trainer.figures.html import picture, table
from trainer.figures.material import Material, Seen
from trainer.layers import plan

TRAINING_SAMPLES, CONFUSED = 16, 8  # how many are shown
TILE, ACROSS = 44, 6  # pixels of a kernel, and kernels in a row: what a phone is wide; fewer of larger ones


def facts(material: Material) -> str:
    """What the run is of."""
    dataset, checkpoint = material.dataset, material.checkpoint
    model, train = checkpoint.recipe.model, checkpoint.recipe.train
    layers = ", ".join(f"{layer.name} {layer.width:,}" for layer in plan(model, len(checkpoint.classes)))
    samples = ", ".join(f"{split.samples:,} {escape(name)}" for name, split in dataset.splits.items())
    times = [line["time"] for line in material.lines if line["kind"] == "train"]
    speed, stall = (median([time[key] for time in times] or [nan]) for key in ("images_per_second", "stall"))
    measured = f"{speed:,.0f} images/s, stall {100 * stall:.1f} % of the time (medians over the training log)"
    rows = {
        "Data set": f"{escape(dataset.root.resolve().name)}: {samples} samples, {len(dataset.classes):,} classes, "
        f"identity <code>{dataset.identity[:12]}</code>",
        "Network": f"{layers} maps or units, {model.columns} column{'s together' if model.columns > 1 else ''}",
        "Training": f"{checkpoint.step:,} of {checkpoint.progress['steps']:,} steps of {train.batch_size} images, "
        f"seed {train.seed}",
        "Speed": measured if times else "not recorded",
    }
    body = "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in rows.items())
    return f'<dl class="facts">{body}</dl>'


def errors(material: Material, command: list[str]) -> str:
    """What `evaluate` found; `command` is that of an evaluation."""
    evaluation, checkpoint = material.evaluation, material.checkpoint
    if evaluation is None:
        hint = f"<p>Not evaluated yet; the command is <code>{escape(shlex.join(command))}</code></p>"
        return hint if _validated(material.dataset) else _none("val")
    images, step = evaluation["centre"]["samples"], evaluation["step"]
    caption = f"Errors on the split {evaluation['split']} ({images:,} images) at step {step:,}"
    if (step, evaluation["dataset"]) != (checkpoint.step, checkpoint.dataset):
        caption += f"; out of date, the newest checkpoint is that of step {checkpoint.step:,}: evaluate again"
    rows = []
    for name, key in (("centre view", "centre"), ("ten views", "ten")):
        found = evaluation[key]
        rates = (f"{found[key]:.1f}&nbsp;%" for key in ("top1_error", "top5_error"))
        rows.append([name, *rates, f"{found['nll']:.3f}"])
    heads = ("view", "top-1 error", "top-5 error", "negative log-likelihood, nats")
    confused = _confused(material, evaluation["confused"])
    return f'<div class="beside"><div>{table(caption, heads, rows)}</div>{confused}</div>'


def _confused(material: Material, pairs: list[tuple[int, int, int]]) -> str:
    if not pairs:
        return ""
    rows = [
        [*(f'<span class="word">{escape(material.words(label))}</span>' for label in pair), f"{images:,}"]
        for *pair, images in pairs[:CONFUSED]
    ]
    return f"<div>{table('Confused most often, by the ten views', ('true label', 'taken for', 'images'), rows)}</div>"


def mean(material: Material) -> str:
    """The mean image, and the components of the colours."""
    dataset = material.dataset
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


def training_samples(material: Material) -> str:
    """The first samples of the run's first batch: as stored, and as the network saw them in the first epoch."""
    dataset, recipe = material.dataset, material.recipe
    side, view = dataset.recipe.size, recipe.model.size
    with feed.training(dataset, recipe, batch_size=TRAINING_SAMPLES) as loader:
        batch = next(loader)
    with SampleReader(dataset, "train") as reader:
        stored = reader.read(batch.ids)
    cards = ""
    for number, jpeg, label, x in zip(batch.ids, stored, batch.labels.tolist(), batch.images.numpy()):
        cards += html.pair(f"Training sample {number}", material.words(label), jpeg.tobytes(), x)
    return (
        f"<p>Above, each sample as it is stored ({side} × {side} pixels, JPEG). Beneath, as the network sees it in the "
        f"first epoch: a random view of {view} × {view} pixels, {_treated(recipe)}. To show it, "
        f"{html.MID_GREY} grey levels are added, and what falls outside 0 to 255 is clipped.</p>"
        f'<div class="samples">{cards}</div>'
    )


def _treated(recipe: recipes.Recipe) -> str:
    lit = recipe.data.lighting != "off" and recipe.data.lighting_until > 0
    return (
        f"mirrored or not, minus the mean {'colour' if recipe.data.mean == 'colour' else 'image'}"
        f"{', with its colours shifted (lighting)' if lit else ''}"
        f"{' and divided by 1.1' if lit and recipe.data.lighting == 'code' else ''}"
    )


def curves(material: Material) -> str:
    """Losses, errors and updates over the steps."""
    if not material.lines:
        return "<p>No steps are recorded.</p>"
    note = "<p>Training is measured with dropout on random views, validation without, on the centre view.</p>"
    charts = html.curves(material.lines)
    return f'{note if _validated(material.dataset) else _none("val")}<div class="charts">{charts}</div>'


def first_kernels(material: Material) -> str:
    """Figure 3 of the paper."""
    if material.kernels is None:
        return f"<p>The first layer, {material.recipe.model.order[0]}, has no kernels to look at.</p>"
    grids, columns = "", material.recipe.model.columns
    side = material.kernels.shape[-1]
    shown = np.split(kernels.tiles(material.kernels, zoom=max(1, TILE // side)), columns)
    for column, (part, tiles) in enumerate(zip(np.split(material.kernels, columns), shown)):
        alt = f"The {len(part)} kernels of {side} × {side} weights in column {column}: {kernels.measured(part)}"
        across = max(1, ACROSS * TILE // tiles.shape[1])
        image = picture(html.png(html.grid(tiles, across)), "png", alt, "pixelated")
        caption = f"{len(part)} kernels; {kernels.measured(part)}"
        name = f"Column {column}" if columns > 1 else "One column"
        grids += f"<div><h3>{name}</h3><figure>{image}<figcaption>{caption}</figcaption></figure></div>"
    return f'<p>{escape(kernels.reading(material.kernels, columns))}</p><div class="grids">{grids}</div>'


def predictions(material: Material) -> str:
    """Figure 4 of the paper, left."""
    if not material.seen:
        return f"<p>{escape(material.lacking['seen'])}</p>"
    words = [record.words for record in material.dataset.classes]
    which = "Only images that the network gets wrong. " if material.only_errors else ""
    cards = "".join(
        html.prediction(_name(material, seen), seen.jpeg, seen.chances, words, seen.label) for seen in material.seen
    )
    note = f"<p>{which}The most probable labels of the centre view; ✓ marks the true one.</p>"
    return f'{note}<div class="cards">{cards}</div>'


def augmentation(sheet: bytes) -> str:
    """What crops, mirroring and lighting do to one picture."""
    alt = "One training picture: random crops of it, some mirrored, and the same crop in several lightings"
    return html.wide(sheet, "What crops and lighting do to one picture", alt)


def similar(material: Material) -> str:
    """Figure 4 of the paper, right."""
    if not material.similar:
        return f"<p>{escape(material.lacking['similar'])}</p>"
    rows = ""
    for query, found in material.similar:
        cards = html.near(_name(material, query), query.jpeg, material.words(query.label), None, False)
        for each in found:
            same = each.label == query.label
            name = f"Training sample {each.id}"
            cards += html.near(name, each.jpeg, material.words(each.label), each.distance, same)
        rows += f'<div class="near">{cards}</div>'
    return (
        "<p>First a picture of the split that was looked for, then the training pictures whose last hidden layer is "
        f"nearest to its own, by Euclidean distance; ✓ marks those of its label.</p>{rows}"
    )


def _name(material: Material, seen: Seen) -> str:
    return f"{'Validation' if material.split == 'val' else material.split.capitalize()} sample {seen.id}"


def _validated(dataset: Manifest) -> bool:
    return "val" in dataset.splits and dataset.splits["val"].samples > 0


def _none(split: str) -> str:
    return f"<p>The data set has no images in {split}.</p>"
