"""A training recipe: the options that determine a run. One frozen dataclass, read from TOML, validated once."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from trainer.layers import LayerRecipe, ModelRecipe, RecipeError, require, require_least, require_one_of

FOLDER = Path(__file__).parent / "recipes"
MAX_FLOAT = 3.4e38  # about the greatest float32
MAX_COUNT = 2**20  # images of a batch, epochs, steps between two log lines: beyond any sense


@dataclass(frozen=True)
class LayerRates:
    """Factors of one layer's rates, and its own drops. Times are epochs of `train.epochs`."""

    lr: float = 1.0  # × the rate of the weights
    bias_lr: float = 1.0  # × the rate of the biases
    decay: float = 1.0  # × optim.decay
    drops: tuple[float, ...] = ()  # when its weights' rate is divided by optim.drop_factor once more
    frozen_from: float = 0.0  # when it stops learning: its gradient is no longer computed; 0: never


@dataclass(frozen=True)
class OptimRecipe:
    """v ← momentum·v − decay·lr·w − lr·gradient; w ← w + v. Times are epochs of `train.epochs`.

    Args:
        batch_size: the batch that the rates are meant for; another train.batch_size scales them in proportion.
        schedule: "stretches": `lr_steps` stretches of equal length, with rates that fall in equal ratios from lr to
            lr / lr_factor; "drops": the rate is divided by drop_factor at each time of `drops`; "plateau": whenever the
            validation error has not improved for `patience` validations, `most_drops` times; the next plateau ends the
            run.
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
        require_least(1, "optim", self, "batch_size", "lr_steps", "bias_lr_steps", "patience")
        require_least(0, "optim", self, "decay", "most_drops")
        require_one_of("optim", self, schedule=("stretches", "drops", "plateau"))
        require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "at least 0 and below 1")
        for layer, rates in self.layers.items():
            require_least(0, f"optim.layers.{layer}", rates, "lr", "bias_lr", "decay", "frozen_from")


@dataclass(frozen=True)
class DataRecipe:
    """Options of the loader, which pipeline/online/augment.py and order.py describe."""

    order: str = "uniform"
    mean: str = "centre"
    lighting: str = "code"
    lighting_until: float = 68.0  # epochs of train.epochs, after which lighting and the factor 1/1.1 are off
    positions: str = "code"
    crop_chunk: int = 1
    # damaged pictures that are passed over, of training and of validation: 0, for without one the data are not those
    # that the run's identity names
    max_bad: int = 0
    readers: int = 1  # samples read at a time; neither this nor the depth changes a batch
    depth: int = 2  # batches made ready ahead of use

    def __post_init__(self) -> None:
        require_one_of("data", self, order=("uniform", "fixed", "shards"), mean=("centre", "aligned", "colour"))
        require_one_of("data", self, lighting=("code", "paper", "off"), positions=("code", "paper"))
        require_least(0, "data", self, "lighting_until", "max_bad")
        require_least(1, "data", self, "crop_chunk")
        for name in ("readers", "depth"):  # threads, and memory
            require(1 <= getattr(self, name) <= 64, f"data.{name}", getattr(self, name), "between 1 and 64")


@dataclass(frozen=True)
class TrainRecipe:
    """Length, batches, checkpoints and arithmetic of a run."""

    seed: int = 2012
    batch_size: int = 128
    epochs: float = 90.0
    steps: int = 0  # 0: as many as the epochs take; else so many, to which all times in epochs stretch
    log_every: int = 20  # steps
    validate_every: int = 0  # steps; 0: at the end of every epoch
    checkpoint_every: int = 0  # steps; 0: at the end of every epoch
    keep: int = 3  # of the newest checkpoints; the best stays as well
    precision: str = "fp32"  # "tf32": products have 10 bits of mantissa; "bf16": bfloat16, but for LRN sums and loss
    compile: str = "no"  # "segments": torch.compile of each column between exchanges; "graphs": CUDA graphs of them too
    channels_last: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "log_every", "keep"):
            value = getattr(self, name)
            require(1 <= value <= MAX_COUNT, f"train.{name}", value, f"between 1 and {MAX_COUNT:,}")
        require(0 < self.epochs <= MAX_COUNT, "train.epochs", self.epochs, f"above 0, and at most {MAX_COUNT:,}")
        require(self.steps >= 0, "train.steps", self.steps, "at least 0 (0: as many as the epochs take)")
        for name in ("validate_every", "checkpoint_every"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name}", value, "at least 0 (0: at the end of every epoch)")
        require(0 <= self.seed < 2**64, "train.seed", self.seed, "between 0 and 2⁶⁴ − 1")
        require_one_of("train", self, precision=("fp32", "tf32", "bf16"), compile=("no", "segments", "graphs"))


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
    """Return a recipe by the name of a file in trainer/recipes, or by path, with `key=value` settings on top.

    A file may begin with `base = "NAME"`: its values are put over that recipe.

    Raises:
        RecipeError: no such recipe, or an impossible one.
    """
    return override(_read(name, ()), settings)


def _read(name: str, above: tuple[str, ...]) -> Recipe:
    """Read a recipe and its bases; `above` are the recipes that have it as their base."""
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
    """Return the names of the recipes in trainer/recipes."""
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


def from_dict(values: Mapping[str, Any], base: Recipe, source: str) -> Recipe:
    """Return `base` with `values` put over it; the inverse of `dataclasses.asdict`. Errors begin with `source`.

    Layers of `base` that a new `model.order` does not name are dropped, and their rates.

    Raises:
        RecipeError: an unknown key, a value of another type, or what a recipe refuses.
    """
    values = _typed(values, Recipe, "", source)
    merged, order = asdict(base), values.get("model", {}).get("order", base.model.order)
    for section in ("model", "optim"):
        layers = merged[section]["layers"]
        merged[section]["layers"] = {name: layer for name, layer in layers.items() if name in order}
    merged = _merged(merged, values)
    model, optim = merged["model"], merged["optim"]
    try:
        model["layers"] = {name: LayerRecipe(**layer) for name, layer in model["layers"].items()}
        optim["layers"] = {name: LayerRates(**rates) for name, rates in optim["layers"].items()}
        data, train = DataRecipe(**merged["data"]), TrainRecipe(**merged["train"])
        return Recipe(ModelRecipe(**model), OptimRecipe(**optim), data, train)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from error


def difference(before: Recipe, now: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which two recipes differ, with both values: {"optim.lr": (0.01, 0.001)}; None: no such key."""
    one, other = flat(asdict(before)), flat(asdict(now))
    return {key: (one.get(key), other.get(key)) for key in one | other if one.get(key) != other.get(key)}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested sections by their full keys: {"optim.lr": 0.01}."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return result


def _typed(value: Any, kind: Any, key: str, source: str) -> Any:
    """Convert a value of TOML or JSON to type `kind`, and a section to a dict of such values. Raises RecipeError."""
    if is_dataclass(kind) or get_origin(kind) is Mapping:
        if not isinstance(value, Mapping):
            raise RecipeError(f"{source}: {key} = {value!r}: a section, not a value")
        prefix = f"{key}." if key else ""
        types = get_type_hints(kind) if is_dataclass(kind) else dict.fromkeys(value, get_args(kind)[1])
        if unknown := [name for name in value if name not in types]:
            known = ", ".join(prefix + name for name in types)
            raise RecipeError(f"{source}: unknown key {prefix}{unknown[0]}; known: {known}")
        return {name: _typed(inner, types[name], prefix + name, source) for name, inner in value.items()}
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(_typed(element, get_args(kind)[0], key, source) for element in value)
    if kind is float and type(value) in (int, float) and abs(value) <= MAX_FLOAT:
        return float(value)
    if kind is not float and type(value) is kind:
        return value
    names = {float: f"a number up to {MAX_FLOAT:.2g}", int: "a whole number", bool: "true or false", str: "a text"}
    expected = names[kind] if kind in names else f"a list, each {names[get_args(kind)[0]]}"
    raise RecipeError(f"{source}: {key} = {value!r}: must be {expected}")


def _merged(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of `base` with the values of `values` over them, key by key."""
    sections = {key: _merged(base.get(key, {}), value) for key, value in values.items() if isinstance(value, Mapping)}
    return {**base, **values, **sections}
