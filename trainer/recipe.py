"""A training recipe: the options that determine a run. One frozen dataclass, read from TOML, validated once."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from trainer.layers import ModelRecipe, RecipeError, require

FOLDER = Path(__file__).parent / "recipes"
SCHEDULES = ("stretches", "drops", "plateau")
PRECISIONS = ("fp32", "tf32", "bf16")
COMPILED = ("no", "segments", "graphs")
GREATEST = 3.4e38  # about the greatest float32
MOST = 2**20  # images of a batch, epochs, steps between two events: beyond any sense


@dataclass(frozen=True)
class LayerRates:
    """How one layer's rates differ from the others'. Times are epochs of `train.epochs`."""

    lr: float = 1.0  # times the rate of the weights
    bias_lr: float = 1.0  # times the rate of the biases
    decay: float = 1.0  # times optim.decay
    drops: tuple[float, ...] = ()  # when its weights' rate is divided by optim.drop_factor once more
    frozen_from: float = 0.0  # when it stops learning, and its gradient is not computed any more; 0: never


@dataclass(frozen=True)
class OptimRecipe:
    """v ← momentum·v − decay·lr·w − lr·gradient; w ← w + v. Times are epochs of `train.epochs`.

    Args:
        batch_size: what the rates are meant for; another train.batch_size scales them in proportion.
        schedule: "stretches": equally long ones, of rates that fall in equal ratios to lr / lr_factor; "drops": a
            division by drop_factor at each time of `drops`; "plateau": one whenever the validation error has not
            improved for `patience` validations, `most_drops` times, and at the next plateau the run ends.
    """

    batch_size: int = 128
    schedule: str = "stretches"
    lr: float = 0.01
    bias_lr: float = 0.02
    momentum: float = 0.9
    decay: float = 0.0005  # of weights; biases have none
    lr_factor: float = 250.0
    lr_steps: int = 4  # stretches
    bias_lr_factor: float = 10.0
    bias_lr_steps: int = 2
    drops: tuple[float, ...] = ()
    bias_drops: tuple[float, ...] = ()
    drop_factor: float = 10.0
    patience: int = 5
    most_drops: int = 3
    layers: Mapping[str, LayerRates] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("lr", "bias_lr", "lr_factor", "bias_lr_factor", "drop_factor"):
            require(getattr(self, name) > 0, f"optim.{name}", getattr(self, name), "a number above 0")
        for name in ("batch_size", "lr_steps", "bias_lr_steps", "patience"):
            require(getattr(self, name) >= 1, f"optim.{name}", getattr(self, name), "at least 1")
        require(self.schedule in SCHEDULES, "optim.schedule", repr(self.schedule), f"one of {', '.join(SCHEDULES)}")
        require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "at least 0 and below 1")
        require(self.decay >= 0, "optim.decay", self.decay, "at least 0")
        require(self.most_drops >= 0, "optim.most_drops", self.most_drops, "at least 0")
        for layer, rates in self.layers.items():
            for name in ("lr", "bias_lr", "decay", "frozen_from"):
                value = getattr(rates, name)
                require(value >= 0, f"optim.layers.{layer}.{name}", value, "at least 0")


@dataclass(frozen=True)
class DataRecipe:
    """What the loader is asked for; pipeline/online/augment.py says what the options mean."""

    order: str = "uniform"
    mean: str = "centre"
    lighting: str = "code"
    lighting_until: float = 68.0  # epochs of train.epochs, after which lighting and the factor 1/1.1 are off
    positions: str = "code"
    crop_chunk: int = 1
    max_bad: int = 0

    def __post_init__(self) -> None:
        require(self.lighting_until >= 0, "data.lighting_until", self.lighting_until, "at least 0 epochs")
        known = {
            "order": ("uniform", "fixed", "shards"),
            "mean": ("centre", "aligned", "colour"),
            "lighting": ("code", "paper", "off"),
            "positions": ("code", "paper"),
        }
        for name, values in known.items():
            value = getattr(self, name)
            require(value in values, f"data.{name}", repr(value), f"one of {', '.join(values)}")
        require(self.crop_chunk >= 1, "data.crop_chunk", self.crop_chunk, "at least 1")
        require(self.max_bad >= 0, "data.max_bad", self.max_bad, "at least 0")


@dataclass(frozen=True)
class TrainRecipe:
    """A run's length and habits."""

    seed: int = 2012
    batch_size: int = 128
    epochs: float = 90.0
    steps: int = 0  # 0: as many as the epochs take; else so many, and the epochs that stand in a recipe stretch to them
    log_every: int = 20  # steps
    validate_every: int = 0  # steps; 0: at the end of every epoch
    checkpoint_every: int = 0  # steps; 0: at the end of every epoch
    keep: int = 3  # of the newest checkpoints; the best stays as well
    precision: str = "fp32"  # "tf32": 10 bits of mantissa in products; "bf16": products of bfloat16, LRN and loss not
    compile: str = "no"  # "segments": torch.compile of each column between exchanges; "graphs": CUDA graphs of them too
    channels_last: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "log_every", "keep"):
            require(1 <= getattr(self, name) <= MOST, f"train.{name}", getattr(self, name), f"between 1 and {MOST:,}")
        require(0 < self.epochs <= MOST, "train.epochs", self.epochs, f"above 0, and at most {MOST:,}")
        require(self.steps >= 0, "train.steps", self.steps, "at least 0 (0: as many as the epochs take)")
        for name in ("validate_every", "checkpoint_every"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name}", value, "at least 0 (0: at the end of every epoch)")
        require(0 <= self.seed < 2**64, "train.seed", self.seed, "between 0 and 2⁶⁴ − 1")
        for name, known in (("precision", PRECISIONS), ("compile", COMPILED)):
            value = getattr(self, name)
            require(value in known, f"train.{name}", repr(value), f"one of {', '.join(known)}")


@dataclass(frozen=True)
class Recipe:
    model: ModelRecipe = field(default_factory=ModelRecipe)
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)

    def __post_init__(self) -> None:
        for name in self.optim.layers:
            known = ", ".join(self.model.order)
            require(name in self.model.layers, f"optim.layers.{name}", name, f"a layer of the model: {known}")


def load(name: str, settings: Sequence[str] = ()) -> Recipe:
    """A recipe by the name of a file in trainer/recipes, or by path, with `key=value` settings on top.

    A file may begin with `base = "NAME"`: it is that recipe with what the file says put over it.

    Raises:
        RecipeError: naming what is known.
    """
    return override(_read(name, ()), settings)


def _read(name: str, above: tuple[str, ...]) -> Recipe:
    path = FOLDER / f"{name}.toml" if "/" not in name and not name.endswith(".toml") else Path(name)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise RecipeError(f"{name}: no such recipe; there are {', '.join(names())}, or give a .toml file") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not TOML ({error})") from error
    base = values.pop("base", None)
    if base is None:
        return from_dict(values, Recipe(), str(path))
    if not isinstance(base, str) or base in above:
        raise RecipeError(f"{path}: base = {base!r}: must be another recipe's name, and not lead back here")
    return from_dict(values, _read(base, (*above, name)), str(path))


def names() -> list[str]:
    """The recipes in trainer/recipes."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """Apply settings such as `train.steps=4` or `model.layers.conv3.sd=0.01`; values are TOML."""
    for setting in settings:
        key, equals, text = setting.partition("=")
        section, *path = key.strip().split(".")
        if not equals or not path or "\n" in setting:
            raise RecipeError(f"--set {setting}: not of the form section.key=value, such as train.steps=4")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError) as error:  # tomllib's own is a ValueError, as is a number of 5,000 digits
            hint = "; a text stands in quotes" if text.strip().isidentifier() else ""
            raise RecipeError(f"--set {setting}: the value is not TOML ({error}{hint})") from error
        for name in reversed(path):
            value = {name: value}
        recipe = from_dict({section: value}, recipe, f"--set {setting}")
    return recipe


def from_dict(values: Mapping[str, Any], base: Any, where: str, prefix: str = "") -> Any:
    """`base` with `values` put over it; an unknown key or a value of another type is a RecipeError.

    Of `model.layers`, those that a new `model.order` does not name go.
    """
    known, types = {entry.name: getattr(base, entry.name) for entry in fields(base)}, get_type_hints(type(base))
    changed = {}
    for key, value in values.items():
        if key not in known:
            raise RecipeError(
                f"{where}: unknown key {prefix}{key}; known: {', '.join(prefix + name for name in known)}"
            )
        name = f"{prefix}{key}"
        if is_dataclass(known[key]):
            changed[key] = from_dict(_section(value, f"{where}: {name}"), known[key], where, f"{name}.")
        elif get_origin(types[key]) is Mapping:
            changed[key], entry = {}, get_args(types[key])[1]
            for each, given in _section(value, f"{where}: {name}").items():
                inner, start = f"{name}.{each}", known[key].get(each, entry())
                changed[key][each] = from_dict(_section(given, f"{where}: {inner}"), start, where, f"{inner}.")
        else:
            changed[key] = _typed(value, types[key], f"{where}: {name}")
    if isinstance(base, ModelRecipe):
        order = changed.get("order", base.order)
        kept = {name: layer for name, layer in base.layers.items() if name in order}
        changed["layers"] = kept | changed.get("layers", {})
    elif isinstance(base, OptimRecipe):
        changed["layers"] = {**base.layers, **changed.get("layers", {})}
    elif isinstance(base, Recipe):
        optim, layers = changed.get("optim", base.optim), changed.get("model", base.model).layers
        gone = base.model.layers.keys() - layers.keys()
        given = values.get("optim", {}).get("layers", {})  # of a layer that is not there: an error, below
        kept = {name: rates for name, rates in optim.layers.items() if name in given or name not in gone}
        changed["optim"] = replace(optim, layers=kept)
    try:
        return replace(base, **changed)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain values, which `from_dict` takes back."""
    return asdict(recipe)


def difference(before: Recipe, now: Recipe) -> dict[str, tuple[Any, Any]]:
    """The keys in which two recipes differ, with both values: {"optim.lr": (0.01, 0.001)}. None: not there."""
    one, other = flat(to_dict(before)), flat(to_dict(now))
    keys = [*one, *(key for key in other if key not in one)]
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What `to_dict` gave, by full keys: {"optim.lr": 0.01}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def as_setting(key: str, value: Any) -> str:
    """KEY=VALUE for `--set`."""
    return f"{key}={json.dumps(value)}"


def _section(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where} = {value!r}: a section, not a value")
    return value


def _typed(value: Any, wanted: Any, where: str) -> Any:
    if wanted is float and type(value) in (int, float) and abs(value) <= GREATEST:
        return float(value)
    if wanted in (int, bool, str) and type(value) is wanted:
        return value
    element = {tuple[int, ...]: int, tuple[float, ...]: float, tuple[str, ...]: str}.get(wanted)
    if element and isinstance(value, list | tuple):
        return tuple(_typed(item, element, where) for item in value)
    names = {float: f"a number up to {GREATEST:.2g}", int: "a whole number", bool: "true or false", str: "a text"}
    kind = f"a list, each {names[element]}" if element else names[wanted]
    raise RecipeError(f"{where} = {value!r}: must be {kind}")
