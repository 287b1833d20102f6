"""The options of tools/build_shards.py, in the groups in which its help shows them."""

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from pipeline.errors import UserError
from pipeline.manifest import BuildRecipe
from pipeline.offline import executors
from pipeline.offline.build import Part, Run
from pipeline.offline.lock import PLAN_FILE
from pipeline.offline.shards import BUILD_FOLDER
from pipeline.offline.sources import LAYOUTS, Sources, find_sources
from pipeline.storage import Location, location

Function = TypeVar("Function", bound=Callable[..., Any])


def together(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """Several options as one decorator, in the order in which the help lists them."""

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


class PartType(click.ParamType):
    """K/N as a `Part`."""

    name = "K/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Part:
        number, slash, of = str(value).partition("/")
        if slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of) <= 10**6:
            return Part(int(number), int(of))
        self.fail(f"{value}: not K/N with K from 1 to N, such as 3/16", param, ctx)


# What determines the bytes: every name is a field of BuildRecipe.
recipe_options = together(
    click.option(
        "--size",
        type=click.IntRange(16, 1024),
        default=256,
        show_default=True,
        help="Pixels of a side of the stored square.",
    ),
    click.option(
        "--crop",
        type=click.Choice(["centre", "none"]),
        default="centre",
        show_default=True,
        help="none: the whole picture, its shorter side --size, for other models' augmentation; the statistics "
        "are then only per colour, and this trainer does not take it.",
    ),
    click.option(
        "--filter",
        type=click.Choice(["bicubic", "area"]),
        default="bicubic",
        show_default=True,
        help="How pictures are rescaled; area as in cuda-convnet2.",
    ),
    click.option("--quality", type=click.IntRange(1, 100), default=95, show_default=True, help="JPEG quality."),
    click.option(
        "--subsampling",
        type=click.Choice(["4:2:0", "4:2:2", "4:4:4"]),
        default="4:2:0",
        show_default=True,
        help="Of the stored JPEGs' chroma.",
    ),
    click.option(
        "--exif",
        type=click.Choice(["ignore", "apply"]),
        default="ignore",
        show_default=True,
        help="The orientation tag: ignored as by torchvision and the original, or the picture turned.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(min=0),
        default=2012,
        show_default=True,
        help="Of the order of the training split.",
    ),
    click.option("--samples-per-shard", type=click.IntRange(1, 65536), default=4096, show_default=True),
    click.option(
        "--holdout",
        type=click.FloatRange(0, 0.5),
        default=0.1,
        show_default=True,
        help="Share of the training images that becomes the validation split, where RAW has none.",
    ),
    click.option(
        "--limit",
        type=click.IntRange(min=0),
        default=0,
        help="Use at most this many images, drawn evenly over RAW (0: all).",
    ),
)

source_options = together(
    click.option("--layout", metavar="NAME", help=f"Of RAW, where it is not recognised: {', '.join(LAYOUTS)}."),
    click.option(
        "--classes",
        metavar="FILE",
        help="Only the classes (wnids or folder names) in FILE, one a line; labels are ranks among those.",
    ),
    click.option(
        "--allow-incomplete", is_flag=True, help="Build with what is there, where it is not what the layout promises."
    ),
)

skip_options = together(
    click.option(
        "--max-skipped",
        metavar="N|P%",
        help="Fail where more images of a split are skipped.  [default: 0.1% of the split, at least 10]",
    ),
    click.option("--retry-skipped", is_flag=True, help="Try again what an earlier run skipped, finished or not."),
)

run_options = together(
    click.option(
        "--workers",
        type=click.IntRange(min=1),
        default=len(os.sched_getaffinity(0)),
        show_default="all cores",
        help="Processes; with Ray the most tasks at a time, by default one on each CPU of its cluster.",
    ),
    click.option(
        "--executor",
        type=click.Choice(["processes", "ray"]),
        default="processes",
        show_default=True,
        help="Who builds the shards: processes here, or Ray, on a cluster (pip install 'penstock[ray]').",
    ),
    click.option(
        "--ray-address",
        metavar="ADDRESS",
        help="HOST:PORT of a Ray cluster's head, or auto: the cluster of this machine. RAW and DATASET then lie where "
        "each node sees them under the same path.  [default: RAY_ADDRESS, else auto]",
    ),
    click.option("--part", type=PartType(), help="Build every Nth shard from the Kth on, one job of N; see --merge."),
    click.option("--merge", is_flag=True, help="End a build whose parts are all built."),
    click.option("--dry-run", is_flag=True, help="Print counts, shards, expected size and time; write nothing."),
    click.option("--json", "as_json", is_flag=True, help="One JSON object a line on stdout, for machines."),
)


def chosen_sources(raw: Location, asked: Mapping[str, Any], cache: Location | None = None) -> Sources:
    """`find_sources` as `source_options` say."""
    return find_sources(
        raw,
        asked["layout"],
        classes=location(asked["classes"]) if asked["classes"] else None,
        allow_incomplete=asked["allow_incomplete"],
        cache=cache,
    )


def chosen_run(raw: Location, dataset: Location, asked: Mapping[str, Any]) -> Run | None:
    """Who runs the tasks, as `run_options` say; None: a pool of `workers` processes."""
    if asked["executor"] == "processes":
        if asked["ray_address"]:
            raise UserError(f"--ray-address {asked['ray_address']}: means something only with --executor ray")
        return None
    given = click.get_current_context().get_parameter_source("workers") is not ParameterSource.DEFAULT
    shared = (raw, dataset / BUILD_FOLDER / PLAN_FILE)
    return partial(
        executors.run_on_ray, address=asked["ray_address"], at_once=asked["workers"] if given else None, shared=shared
    )


def split_recipe(options: dict[str, Any]) -> tuple[BuildRecipe, dict[str, Any]]:
    """The build recipe among the options, and the other options."""
    names = {field.name for field in fields(BuildRecipe)}
    recipe = BuildRecipe(**{name: value for name, value in options.items() if name in names})
    return recipe, {name: value for name, value in options.items() if name not in names}
