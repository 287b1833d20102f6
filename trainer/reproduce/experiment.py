"""An experiment: a claim of the paper, the runs that try it, and what is measured of them. Read from TOML."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta

from pipeline import typed
from pipeline.manifest import Manifest
from trainer import recipe as recipes
from trainer.data import steps_of, steps_per_epoch
from trainer.layers import Positive, require
from trainer.recipe import Recipe, RecipeError

FOLDER = Path(__file__).parent
Name: TypeAlias = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9.-]{0,40}\Z")]  # it becomes a folder's
Settings: TypeAlias = tuple[str, ...]  # as --set takes them


@dataclass(frozen=True)
class Variant:
    """One of the networks that are compared, and how it is trained."""

    recipe: str
    settings: Settings = ()


@dataclass(frozen=True)
class Search:
    """A choice of rates, made for each variant alone, by halving: after each of `epochs` the better half goes on.

    Better is what came first to the target, if there is one, else the lower training error. The best of the last is
    taken. (Successive halving: Jamieson and Talwalkar, 2016.)
    """

    epochs: Annotated[tuple[Positive, ...], Meta(min_length=1)]
    choices: Annotated[Mapping[Name, Settings], Meta(min_length=1)]


@dataclass(frozen=True)
class Experiment:
    """A claim, and how it is tried. Differences are to the first of the variants.

    Args:
        claim: in words, with the paper's section and numbers.
        measure: "error": top-1 error of `views`; "epochs": of training until the training error of a whole epoch is
            `target` percent, where the run ends; "columns": how the two columns' kernels of the first layer differ;
            "neighbours": how often the nearest training pictures are of a picture's class.
        settings: of every variant, over its own recipe and below its own settings.
    """

    claim: str
    measure: Literal["error", "epochs", "columns", "neighbours"]
    variants: Annotated[Mapping[Name, Variant], Meta(min_length=1)]
    settings: Settings = ()
    views: Literal["centre", "ten", "nine"] = "centre"
    target: Annotated[float, Meta(gt=0, lt=100)] = 25.0
    search: Search | None = None
    seeds: Annotated[tuple[Annotated[int, Meta(ge=0, le=2**63 - 1)], ...], Meta(min_length=1)] = (2012, 7, 8)

    def __post_init__(self) -> None:
        require(len(set(self.seeds)) == len(self.seeds), "seeds", list(self.seeds), "numbers, each once")
        choices = self.search.choices if self.search else [""]
        joined = [f"{variant}-{choice}" for variant, choice in product(self.variants, choices)]
        for name in joined:  # of folders: a run would pass for that of another variant
            require(joined.count(name) == 1, "variant-choice", name, "of one variant and choice; rename one of them")


@dataclass(frozen=True)
class Run:
    """One training run of an experiment."""

    variant: str
    choice: str  # of the search; "" without one
    seed: int
    folder: Path
    recipe: str  # that `settings` are put over
    settings: Settings
    steps: int  # after which it ends
    epoch: int  # steps of an epoch
    until: float | None  # training error in percent that ends it before
    by_log: bool  # its log is all that is wanted of it: no weights of its last step

    @property
    def name(self) -> str:
        return self.folder.name

    def loaded(self) -> Recipe:
        return recipes.load(self.recipe, self.settings)


def names() -> list[str]:
    """Return the names of the experiments."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def load(name: str) -> Experiment:
    """Return an experiment by the name of a file in trainer/reproduce, or by path.

    Raises RecipeError: no such experiment, or an impossible one.
    """
    path = FOLDER / f"{name}.toml" if "/" not in name and not name.endswith(".toml") else Path(name)
    if path.exists() and not path.is_file():  # a fifo would be waited for
        raise RecipeError(f"{path}: not a regular file; name a .toml file, or one of {', '.join(names())}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        experiment = typed.from_values(values, Experiment)
        _require_known(values, Experiment)
        for variant in values["variants"]:
            _require_known(values["variants"][variant], Variant, f"variants.{variant}.")
        _require_known(values.get("search", {}), Search, "search.")
        return experiment
    except FileNotFoundError as error:
        known = ", ".join(names())
        raise RecipeError(f"{name}: no such experiment; there are {known}, or give a .toml file") from error
    except (ValueError, RecursionError) as error:  # a UserError is a ValueError
        raise RecipeError(f"{path}: not an experiment ({error})") from error


def _require_known(values: Mapping[str, Any], kind: type, prefix: str = "") -> None:
    """Raise RecipeError if a section of a file has a key that a dataclass does not have."""
    known = [field.name for field in fields(kind)]
    for key in values:
        if key not in known:
            raise RecipeError(f"unknown key {prefix}{key:.100}; known: {', '.join(prefix + name for name in known)}")


def planned(
    experiment: Experiment,
    dataset: Manifest,
    out: Path,
    seeds: Sequence[int],
    more: Settings,
    chosen: Mapping[str, str],
) -> list[Run]:
    """Return the runs of every variant and seed, in folders of `out`, seed by seed; `more` settings are put on top.

    `chosen` has, by variant, which of the search's choices it takes.
    Raises RecipeError: an impossible recipe, or one whose runs cannot be measured.
    """
    return [
        _run(experiment, dataset, out, variant, chosen.get(variant, ""), seed, more)
        for seed in seeds
        for variant in experiment.variants
    ]


def searched(
    experiment: Experiment,
    dataset: Manifest,
    out: Path,
    seed: int,
    more: Settings,
    left: Mapping[str, Sequence[str]],
    epochs: int,
) -> list[Run]:
    """Return the runs of the search, of one seed and so many epochs, of the choices that are `left` by variant."""
    runs = []
    for variant, choices in left.items():
        for choice in choices:
            run = _run(experiment, dataset, out, variant, choice, seed, more)
            runs.append(replace(run, steps=min(epochs * run.epoch, run.steps), by_log=True))
    return runs


def _run(
    experiment: Experiment, dataset: Manifest, out: Path, variant: str, choice: str, seed: int, more: Settings
) -> Run:
    own = experiment.variants[variant]
    settings = [*experiment.settings, *own.settings]
    if experiment.search and choice:
        settings += experiment.search.choices[choice]
    settings += [*more, f"train.seed={seed}"]
    epoch = steps_per_epoch(dataset, recipes.load(own.recipe, settings))
    by_log = experiment.measure == "epochs"
    if by_log or experiment.search:
        settings.append(f"train.log_every={epoch}")
    recipe = recipes.load(own.recipe, settings)
    require(recipe.optim.schedule != "plateau", f"{variant}: optim.schedule", "plateau", "one of a known length")
    if experiment.measure == "columns":
        first = recipe.model.order[0]
        kind = recipe.model.layers[first].kind
        require(recipe.model.columns == 2, f"{variant}: model.columns", recipe.model.columns, "2, to be compared")
        require(kind == "conv", f"{variant}: model.layers.{first}.kind", kind, "conv, to be compared")
    steps = steps_of(dataset, recipe)
    folder, until = out / "-".join(filter(None, (variant, choice, str(seed)))), experiment.target if by_log else None
    return Run(variant, choice, seed, folder, own.recipe, tuple(settings), steps, epoch, until, by_log)
