"""The page RUN/report.html: what a run was given, what it learned, how it errs. One file, which needs no network."""

import shlex
from html import escape
from importlib import metadata

import torch
from nvidia import dali
from PIL import Image

from pipeline.manifest import BuildRecipe
from trainer import recipe as recipes
from trainer.figures import html, sections
from trainer.figures.material import Material

FILE_NAME = "report.html"
RECORDED = ("size", "crop", "filter", "quality", "subsampling", "exif", "samples_per_shard", "seed", "holdout", "limit")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # and no network


def page(material: Material, augmentation: bytes) -> str:
    """The page, whole. `augmentation`: the PNG of what crops and lighting do to a picture."""
    commands = _commands(material)
    shown = "Validation images" if material.split == "val" else f"Images of {material.split}"
    parts = {
        "Result": sections.facts(material) + sections.errors(material, commands["evaluate"]),
        shown: sections.predictions(material),
        "Similar training images": sections.similar(material),
        "First-layer kernels": sections.first_kernels(material),
        "Curves": sections.curves(material),
        "Mean image and colours": sections.mean(material),
        "Training samples": sections.training_samples(material),
        "Augmentation": sections.augmentation(augmentation),
    }
    return _page(f"AlexNet, run {material.run}", parts, _shell(commands))


def _commands(material: Material) -> dict[str, list[str]]:
    """The commands that make the page from raw images; RAW, which nobody recorded, is left open."""
    dataset = material.dataset
    build = ["python", "tools/build_shards.py", "RAW", str(dataset.root)]
    for name in RECORDED:
        if getattr(dataset.recipe, name) != getattr(BuildRecipe, name):
            build += [f"--{name.replace('_', '-')}", str(getattr(dataset.recipe, name))]
    trainer, data, run = ["python", "-m", "trainer"], ["--data", str(dataset.root)], str(material.run)
    return {
        "build": build,
        "train": [*trainer, "train", *data, "--out", run, *_recipe_options(material.recipe)],
        "evaluate": [*trainer, "evaluate", *data, "--checkpoint", run],
        "figures": [*trainer, "figures", run, *data],
    }


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
