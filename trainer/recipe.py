"""A training recipe: the options that determine a run. One frozen dataclass, read from TOML, validated once."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from msgspec import Meta

from pipeline import UserError, typed
from trainer.layers import MAX_COUNT, Count, LayerRecipe, ModelRecipe, Positive, Probability, RecipeError, require

FOLDER = Path(__file__).parent / "recipes"
MAX_FLOAT = 3.4e38  # about the greatest float32, in which the rates are applied
MAX_DROPS = 32  # so that no power of a drop's factor overflows
Rate: TypeAlias = Annotated[float, Meta(ge=1e-38, le=MAX_FLOAT)]
Factor: TypeAlias = Annotated[float, Meta(ge=0, le=10**6)]
Divisor: TypeAlias = Annotated[float, Meta(ge=1, le=10**6)]
Time: TypeAlias = Annotated[float, Meta(ge=0, le=MAX_COUNT)]  # epochs
Times: TypeAlias = Annotated[tuple[Time, ...], Meta(max_length=MAX_DROPS)]
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Few: TypeAlias = Annotated[int, Meta(ge=1, le=64)]  # threads, or batches in memory
Address: TypeAlias = Annotated[str, Meta(min_length=1, max_length=200)]  # of a decoding worker
Steps: TypeAlias = Annotated[int, Meta(ge=0, le=10**9)]


@dataclass(frozen=True)
class LayerRates:
    """Factors of one layer's rates, and its own drops. Times are epochs of `train.epochs`."""

    lr: Factor = 1.0  # × the rate of the weights
    bias_lr: Factor = 1.0  # × the rate of the biases
    decay: Factor = 1.0  # × optim.decay
    drops: Times = ()  # when its weights' rate is divided by optim.drop_factor once more
    frozen_from: Time = 0.0  # when it stops learning: its gradient is no longer computed; 0: never


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

    batch_size: Positive = 128
    schedule: Literal["stretches", "drops", "plateau"] = "stretches"
    lr: Rate = 0.01
    bias_lr: Rate = 0.02
    momentum: Probability = 0.9
    decay: Annotated[float, Meta(ge=0, le=1000)] = 0.0005  # of weights; biases have none
    lr_factor: Divisor = 250.0
    lr_steps: Positive = 4  # stretches
    bias_lr_factor: Divisor = 10.0
    bias_lr_steps: Positive = 2
    drops: Times = ()
    bias_drops: Times = ()
    drop_factor: Divisor = 10.0
    patience: Positive = 5
    most_drops: Annotated[int, Meta(ge=0, le=MAX_DROPS)] = 3
    layers: Mapping[str, LayerRates] = field(default_factory=dict)


@dataclass(frozen=True)
class DataRecipe:
    """Options of the loader, which pipeline/online/augment.py and order.py describe."""

    order: Literal["uniform", "fixed", "shards"] = "uniform"
    mean: Literal["centre", "aligned", "colour"] = "centre"
    lighting: Literal["code", "paper", "off"] = "code"
    lighting_until: Time = 68.0  # of train.epochs, after which lighting and the factor 1/1.1 are off
    positions: Literal["code", "paper", "centre"] = "code"  # of crops; "centre": always the middle
    flips: bool = True
    crop_chunk: Positive = 1
    # damaged pictures that are passed over, of training and of validation: 0, for without one the data are not those
    # that the run's identity names
    max_bad: Count = 0
    # what follows changes no batch (but for the rounding of a GPU's JPEG decoder, which tier "jpeg" has there)
    tier: Literal["auto", "jpeg", "raw", "device"] = "auto"  # of training; see docs/tiers.md
    device_bytes: Count = 0  # of tier "device", on each; 0: what is free there, less 12 GiB (of a CPU's, half)
    max_stall: Share = 0.01  # of the time; with more, tier "auto" turns what the cause names
    readers: Few = 1  # samples read at a time
    depth: Few = 2  # batches made ready ahead of use
    hardware_share: Share = 0.9  # of the pictures, to a GPU's hardware decoder
    # of decoding workers, as pipeline/online/endpoints.py reads them; for the command train alone
    workers: Annotated[tuple[Address, ...], Meta(max_length=256)] = ()


@dataclass(frozen=True)
class TrainRecipe:
    """Length, batches, checkpoints and arithmetic of a run."""

    seed: int = 2012
    batch_size: Positive = 128
    epochs: Annotated[float, Meta(ge=1e-6, le=MAX_COUNT)] = 90.0
    steps: Steps = 0  # 0: as many as the epochs take; else so many, to which all times in epochs stretch
    log_every: Positive = 20  # steps
    validate_every: Steps = 0  # 0: at the end of every epoch
    checkpoint_every: Steps = 0  # 0: at the end of every epoch
    keep: Positive = 3  # of the newest checkpoints; the best stays as well
    # "tf32": products have 10 bits of mantissa; "bf16": bfloat16, but for LRN sums and loss
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    # "segments": torch.compile of each column between exchanges; "graphs": CUDA graphs of them too
    compile: Literal["no", "segments", "graphs"] = "no"
    channels_last: bool = False

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**64, "train.seed", self.seed, "between 0 and 2⁶⁴ − 1")  # beyond msgspec's bounds


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
        optim, scale = self.optim, self.train.batch_size / self.optim.batch_size
        for name in self.model.order:
            own = optim.layers.get(name, LayerRates())
            weights, biases = optim.lr * own.lr * max(1, optim.decay * own.decay), optim.bias_lr * own.bias_lr
            for key, rate in (("lr", weights * scale), ("bias_lr", biases * scale)):
                allowed = f"at most {MAX_FLOAT}, times the factors of {name}, its decay, and train.batch_size"
                require(rate <= MAX_FLOAT, f"optim.{key}", getattr(optim, key), allowed)


def load(name: str, settings: Sequence[str] = ()) -> Recipe:
    """Return a recipe by the name of a file in trainer/recipes, or by path, with `key=value` settings on top.

    A file may begin with `base = "NAME"`: its values are put over that recipe.

    Raises:
        RecipeError: no such recipe, or an impossible one.
    """
    recipe = override(_read(name, ()), settings)
    if not recipe.model.order:
        raise RecipeError(f'{name}: has no layers (model.order); begin it with base = "original", or name another')
    return recipe


def _read(name: str, above: tuple[str, ...]) -> Recipe:
    """Read a recipe and its bases; `above` are the recipes that have it as their base."""
    path = FOLDER / f"{name}.toml" if "/" not in name and not name.endswith(".toml") else Path(name)
    if path.exists() and not path.is_file():  # a fifo would be waited for
        raise RecipeError(f"{path}: not a regular file; name a .toml file, or one of {', '.join(names())}")
    try:
        values = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise RecipeError(f"{name}: no such recipe; there are {', '.join(names())}, or give a .toml file") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not TOML in UTF-8 ({error})") from error
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
        source = f"--set {setting:.200}"
        section, *path = key.strip().split(".")
        if not equals or not path or "\n" in setting:
            raise RecipeError(f"{source}: not of the form section.key=value, such as train.steps=4")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError) as error:  # tomllib's own is a ValueError, as is a number of 5,000 digits
            hint = "; a text stands in quotes" if text.strip().isidentifier() else ""
            raise RecipeError(f"{source}: the value is not TOML ({error}{hint})") from error
        for name in reversed(path):
            value = {name: value}
        recipe = from_dict({section: value}, recipe, source)
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
            raise RecipeError(f"{source}: {key} = {_shown(value)}: a section, not a value")
        prefix = f"{key}." if key else ""
        hints = get_type_hints(kind, include_extras=True) if is_dataclass(kind) else {}
        types = hints or dict.fromkeys(value, get_args(kind)[1])
        if unknown := [name for name in value if name not in types]:
            known = ", ".join(prefix + name for name in types)
            raise RecipeError(f"{source}: unknown key {prefix}{unknown[0]:.100}; known: {known}")
        return {name: _typed(inner, types[name], prefix + name, source) for name, inner in value.items()}
    try:
        return typed.from_values(value, kind)
    except UserError as error:
        raise RecipeError(f"{source}: {key} = {_shown(value)}: must be {_expected(kind)}") from error


def _shown(value: Any) -> str:
    """Return a value as Python writes it, cut off where it is long."""
    try:
        return f"{value!r:.100}"
    except ValueError:  # Python does not write whole numbers of more than 4,300 digits, which TOML has in hexadecimal
        return "a number of thousands of digits"


def _expected(kind: Any) -> str:
    """Return in words what a value of this type must be."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    base, *bounds = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    if get_origin(base) is tuple:
        return f"a list of at most {bounds[0].max_length}, each {_expected(get_args(base)[0])}"
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}[base]
    if base is str and bounds:
        return f"{words} of {bounds[0].min_length} to {bounds[0].max_length} characters"
    for bound in bounds:
        words += f" from {bound.ge:,} to " + (f"{bound.le:,}" if bound.lt is None else f"below {bound.lt}")
    return words


def _merged(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of `base` with the values of `values` over them, key by key."""
    sections = {key: _merged(base.get(key, {}), value) for key, value in values.items() if isinstance(value, Mapping)}
    return {**base, **values, **sections}
