"""A training recipe: the options that determine a run. One frozen dataclass, read from TOML, validated once."""

import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from pipeline.errors import UserError

FOLDER = Path(__file__).parent / "recipes"


class RecipeError(UserError):
    """A recipe that does not exist, does not parse, or holds an impossible value."""


@dataclass(frozen=True)
class ModelRecipe:
    """The network of section 4 of the specification; widths count both columns."""

    maps: tuple[int, ...] = (96, 256, 384, 384, 256)  # conv1 … conv5
    units: tuple[int, ...] = (4096, 4096)  # fc6, fc7
    weight_sd: tuple[float, ...] = (0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01)  # conv1 … conv5, fc6 … fc8
    bias: tuple[float, ...] = (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0)  # initial biases
    dropout: float = 0.5  # probability of dropping a unit of fc6 and fc7


@dataclass(frozen=True)
class OptimRecipe:
    """v ← momentum·v − decay·lr·w − lr·gradient; w ← w + v. Rates fall in equal steps to lr / lr_factor."""

    lr: float = 0.01
    lr_factor: float = 250.0  # the last rate is lr / lr_factor
    lr_steps: int = 4  # number of constant stretches, equally long
    bias_lr: float = 0.02
    bias_lr_factor: float = 10.0
    bias_lr_steps: int = 2
    momentum: float = 0.9
    decay: float = 0.0005  # of weights; biases have none


@dataclass(frozen=True)
class TrainRecipe:
    seed: int = 2012
    batch_size: int = 128
    steps: int = 900_810  # 90 epochs of ImageNet
    lighting: bool = True
    lighting_until: float = 0.75  # share of the run after which lighting and the factor 1/1.1 are off
    log_every: int = 20  # steps
    validate_every: int = 10_009  # steps; 0: only at the end
    checkpoint_every: int = 10_009  # steps; 0: only at the end


@dataclass(frozen=True)
class Recipe:
    model: ModelRecipe = field(default_factory=ModelRecipe)
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)

    def __post_init__(self) -> None:
        model, optim, train = self.model, self.optim, self.train
        _require(
            len(model.maps) == 5 and all(n >= 2 and n % 2 == 0 for n in model.maps),
            "model.maps",
            model.maps,
            "five even numbers, one half per column",
        )
        _require(
            len(model.units) == 2 and all(n >= 2 and n % 2 == 0 for n in model.units),
            "model.units",
            model.units,
            "two even numbers, one half per column",
        )
        _require(
            len(model.weight_sd) == 8 and min(model.weight_sd) >= 0,
            "model.weight_sd",
            model.weight_sd,
            "eight numbers ≥ 0",
        )
        _require(len(model.bias) == 8, "model.bias", model.bias, "eight numbers")
        _require(0 <= model.dropout < 1, "model.dropout", model.dropout, "at least 0 and below 1")
        for name in ("lr", "bias_lr", "lr_factor", "bias_lr_factor"):
            _require(getattr(optim, name) > 0, f"optim.{name}", getattr(optim, name), "a number above 0")
        for name in ("lr_steps", "bias_lr_steps"):
            _require(getattr(optim, name) >= 1, f"optim.{name}", getattr(optim, name), "at least 1")
        _require(0 <= optim.momentum < 1, "optim.momentum", optim.momentum, "at least 0 and below 1")
        _require(optim.decay >= 0, "optim.decay", optim.decay, "at least 0")
        for name in ("batch_size", "steps", "log_every"):
            _require(getattr(train, name) >= 1, f"train.{name}", getattr(train, name), "at least 1")
        _require(train.checkpoint_every >= 0, "train.checkpoint_every", train.checkpoint_every, "at least 0")
        _require(
            train.validate_every >= 0, "train.validate_every", train.validate_every, "at least 0 (0: only at the end)"
        )
        _require(0 <= train.lighting_until <= 1, "train.lighting_until", train.lighting_until, "between 0 and 1")
        _require(0 <= train.seed < 2**64, "train.seed", train.seed, "between 0 and 2⁶⁴ − 1")


def load(name: str, settings: Sequence[str] = ()) -> Recipe:
    """A recipe by the name of a file in trainer/recipes, or by path, with `key=value` settings on top.

    Raises:
        RecipeError: naming what is known.
    """
    path = FOLDER / f"{name}.toml" if "/" not in name and not name.endswith(".toml") else Path(name)
    try:
        values = tomllib.loads(path.read_text())
    except (FileNotFoundError, IsADirectoryError) as error:
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.toml")))
        raise RecipeError(f"{name}: no such recipe; there are {known}, or give the path of a .toml file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not TOML ({error})") from error
    return override(from_dict(values, Recipe(), str(path)), settings)


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """Apply settings such as `train.steps=4`; values are TOML."""
    for setting in settings:
        key, equals, text = setting.partition("=")
        section, dot, name = key.strip().partition(".")
        if not equals or not dot:
            raise RecipeError(f"--set {setting}: not of the form section.key=value, such as train.steps=4")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"--set {setting}: the value is not TOML ({error})") from error
        recipe = from_dict({section: {name: value}}, recipe, f"--set {setting}")
    return recipe


def from_dict(values: Mapping[str, Any], base: Any, where: str, prefix: str = "") -> Any:
    """`base` with `values` put over it; an unknown key or a value of another type is a RecipeError."""
    known = {entry.name: getattr(base, entry.name) for entry in fields(base)}
    types = get_type_hints(type(base))
    changed = {}
    for key, value in values.items():
        if key not in known:
            raise RecipeError(
                f"{where}: unknown key {prefix}{key}; known: {', '.join(prefix + name for name in known)}"
            )
        if is_dataclass(known[key]):
            if not isinstance(value, Mapping):
                raise RecipeError(f"{where}: {prefix}{key} = {value!r}: a section, not a value")
            changed[key] = from_dict(value, known[key], where, f"{prefix}{key}.")
        else:
            changed[key] = _typed(value, types[key], f"{where}: {prefix}{key}")
    return replace(base, **changed)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    return asdict(recipe)


def _typed(value: Any, wanted: Any, where: str) -> Any:
    if wanted is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    if wanted in (int, bool) and type(value) is wanted:
        return value
    element = {tuple[int, ...]: int, tuple[float, ...]: float}.get(wanted)
    if element and isinstance(value, list | tuple):
        return tuple(_typed(item, element, where) for item in value)
    kind = f"a list of {element.__name__}" if element else wanted.__name__
    raise RecipeError(f"{where} = {value!r}: must be {kind}")


def _require(holds: bool, key: str, value: Any, what: str) -> None:
    if not holds:
        raise RecipeError(f"{key} = {value}: must be {what}")
