"""Recipe files: what each says, what stands over what, and one clear line for whatever is impossible."""

import json
import os
import random
import re
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch

from conftest import one_line
from trainer import recipe as recipes
from trainer.layers import LayerRecipe, ModelRecipe, RecipeError, plan
from trainer.optim import Schedule
from trainer.recipe import (
    FOLDER,
    MAX_FLOAT,
    DataRecipe,
    LayerRates,
    OptimRecipe,
    Recipe,
    TrainRecipe,
    difference,
    from_dict,
    load,
    override,
)

NAMES = recipes.names()
CONV3 = "model.layers.conv3"
SECTIONS = {
    "model": ModelRecipe,
    CONV3: LayerRecipe,
    "optim": OptimRecipe,
    "optim.layers.conv3": LayerRates,
    "data": DataRecipe,
    "train": TrainRecipe,
}
KINDS = {
    f"{section}.{name}": kind
    for section, options in SECTIONS.items()
    for name, kind in get_type_hints(options, include_extras=True).items()
}
LISTS = {key: kind for key, kind in KINDS.items() if get_origin(get_args(kind)[0] if get_args(kind) else kind) is tuple}
NUMBERS = {key: kind.__metadata__[0] for key, kind in KINDS.items() if get_args(kind)[:1] in ((int,), (float,))}


def written(folder: Path, name: str, text: str) -> str:
    (folder / f"{name}.toml").write_text(text)
    return str(folder / f"{name}.toml")


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_survives_json_and_names_its_command(name: str):
    """As recipe.json and checkpoints hold it; the command is in the comment at its beginning, with its own name."""
    recipe = load(name)
    assert from_dict(json.loads(json.dumps(asdict(recipe), allow_nan=False)), Recipe(), "") == recipe
    lines = (FOLDER / f"{name}.toml").read_text().splitlines()
    command = " ".join(line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), lines))
    assert re.search(f"python -m trainer train --data .* --recipe {name} .*--out ", command)


@pytest.mark.parametrize("name", NAMES)
def test_settings_of_a_difference_lead_from_one_recipe_to_the_other(name: str):
    """`difference` misses nothing, where both have the same layers."""
    original, recipe = load("original"), load(name)
    changes = difference(original, recipe)
    assert (not changes) == (name == "original")
    assert all(before != now for before, now in changes.values())
    if recipe.model.order == original.model.order:
        settings = [f"{key}={json.dumps(now)}" for key, (_, now) in changes.items() if now is not None]
        assert all(key.startswith("optim.layers.") for key, (_, now) in changes.items() if now is None)
        assert override(original, settings) == recipe


def test_a_table_that_only_one_recipe_has():
    one, other = load("original"), load("original", ["optim.layers={conv2={lr=0.1}}"])
    assert difference(one, other)["optim.layers.conv2.lr"] == (None, 0.1)
    assert difference(other, one)["optim.layers.conv2.lr"] == (0.1, None)


def test_settings_reach_nested_keys():
    """Tables and single keys; whole numbers where a float is meant; texts, lists, booleans."""
    settings = [
        "train.steps=4",
        "optim.lr=1",
        f"{CONV3}.sd=0.5",
        f"{CONV3} = {{ bias = 2, then = ['tanh'] }}",
        "optim.layers.fc8={lr=0.5, drops=[1, 2.5]}",
        "optim.layers.fc8.frozen_from=3",
        "train.channels_last=true",
        'data.order="fixed"',
        'data.workers=["10.0.0.7:8815", "ray://feed"]',
    ]
    recipe, plain = load("original", settings), load("original")
    conv3, fc8 = recipe.model.layers["conv3"], recipe.optim.layers["fc8"]
    assert (recipe.train.steps, recipe.optim.lr, recipe.train.channels_last, recipe.data.order) == (4, 1, True, "fixed")
    assert isinstance(recipe.optim.lr, float)
    assert recipe.data.workers == ("10.0.0.7:8815", "ray://feed")
    assert (conv3.sd, conv3.bias, conv3.then, conv3.width) == (0.5, 2.0, ("tanh",), 384)
    assert (fc8.lr, fc8.drops, fc8.frozen_from, fc8.decay) == (0.5, (1.0, 2.5), 3.0, 1.0)
    assert recipe.model.layers["conv4"] == plain.model.layers["conv4"]
    assert recipe.optim.layers["conv1"] == plain.optim.layers["conv1"]
    assert plain == load("original")


def test_a_recipe_stands_over_its_base(tmp_path: Path):
    """What the upper one does not say stays; layers that a new order leaves out go, and their rates."""
    middle = written(tmp_path, "middle", 'base = "original"\n[optim]\nlr = 0.5\n[model.layers]\nconv3 = { sd = 0.2 }')
    layers = "[model.layers]\nconv2 = { stride = 9 }\nconv3 = { bias = 0.5 }"
    text = f'base = "{middle}"\n[model]\norder = ["conv2", "conv3", "fc8"]\n{layers}'
    recipe, original = load(written(tmp_path, "upper", text)), load("original")
    assert (recipe.optim.lr, recipe.optim.drops) == (0.5, original.optim.drops)
    conv3 = recipe.model.layers["conv3"]
    assert (conv3.sd, conv3.bias, conv3.width, conv3.sees) == (0.2, 0.5, 384, "both")
    assert set(recipe.model.layers) == {"conv2", "conv3", "fc8"}
    assert recipe.optim.layers == {}  # conv1's went
    assert load("six-conv").optim.layers == original.optim.layers


def test_bases_that_lead_back_are_refused(tmp_path: Path):
    for name, base in (("alone", "alone"), ("one", "other"), ("other", "third"), ("third", "one")):
        written(tmp_path, name, f'base = "{tmp_path / base}.toml"')
    for name in ("alone", "one"):
        with pytest.raises(RecipeError) as caught:
            load(str(tmp_path / f"{name}.toml"))
        one_line(caught, "base", "not lead back")


def test_a_byte_order_mark_is_passed_over(tmp_path: Path):
    (tmp_path / "mark.toml").write_bytes(b"\xef\xbb\xbf" + (FOLDER / "original.toml").read_bytes())
    assert load(str(tmp_path / "mark.toml")) == load("original")


def test_missing_and_broken_files(tmp_path: Path):
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "wide.toml").write_bytes('base = "original"'.encode("utf-16"))
    (tmp_path / "folder.toml").mkdir()
    os.mkfifo(tmp_path / "fifo.toml")
    for name, *words in (
        (str(tmp_path / "wide.toml"), "wide.toml: not TOML in UTF-8 ('utf-8' codec can't decode byte 0xff"),
        (str(tmp_path / "folder.toml"), "folder.toml: not a regular file; name a .toml file, or one of automatic,"),
        (str(tmp_path / "fifo.toml"), "fifo.toml: not a regular file; name"),
        (
            written(tmp_path, "nothing", 'base = "original"\nmodel.order = []'),
            "nothing.toml: has no layers (model.order)",
        ),
        (written(tmp_path, "empty", ""), "empty.toml: has no layers (model.order); begin it with base"),
        ("huge", "huge: no such recipe; there are ", *NAMES),
        (written(tmp_path, "child", 'base = "huge"'), "huge: no such recipe"),
        (str(tmp_path / "none.toml"), "none.toml: no such recipe"),
        (written(tmp_path, "broken", "[model\nsize = 1"), "broken.toml: not TOML in UTF-8 (Expected"),
        (str(tmp_path / "bytes.toml"), "bytes.toml: not TOML"),
        (written(tmp_path, "wrong", "base = 3"), "wrong.toml", "base = 3", "another recipe's name"),
    ):
        with pytest.raises(RecipeError) as caught:
            load(name)
        one_line(caught, *words)


IMPOSSIBLE = [  # setting; words of the line
    ("train.stepz=4", "unknown key train.stepz; known: train.seed, train.batch_size"),
    ("optim.layers.conv9.lr=4", "optim.layers.conv9 = conv9: must be a layer of the model: conv1, conv2"),
    ("model.layers.conv9.width=8", "model.layers.conv9 = conv9: must be in model.order, which has conv1, conv2"),
    ("train.steps=four", "the value is not TOML", "a text stands in quotes"),
    ("train.steps=1.5", "train.steps = 1.5: must be a whole number"),
    ("train.channels_last=1", "must be true or false"),
    ("train.compile=1", "train.compile = 1: must be one of no, segments, graphs"),
    ("optim.lr=inf", "optim.lr = inf: must be a number from 1e-38 to 3.4e+38"),
    ("optim.drops=3", "optim.drops = 3: must be a list of at most 32, each a number from 0 to 1,048,576"),
    *(
        (
            f"data.workers={value}",
            "data.workers = ",
            "must be a list of at most 256, each a text of 1 to 200 characters",
        )
        for value in ('"feed:8815"', '["feed:8815", ""]', "[8815]", ["a" * 201], ["a"] * 257)
    ),
    (f"{CONV3}=3", f"{CONV3} = 3: a section, not a value"),
    ("train.steps", "not of the form"),
    ("train.batch_size=0", "train.batch_size = 0: must be a whole number from 1 to 1,048,576"),
    ('train.compile="yes"', "train.compile = 'yes': must be one of no, segments, graphs"),
    ("optim.momentum=1", "optim.momentum = 1: must be a number from 0 to below 1"),
    ("optim.lr_factor=1e-300", "optim.lr_factor = 1e-300: must be a number from 1 to 1,000,000"),
    ("train.steps=1000000000000000000000", "must be a whole number from 0 to 1,000,000,000"),
    (f"train.steps=0x{'f' * 5000}", "train.steps = a number of thousands of digits: must be a whole number from 0"),
    (f"train.compile='{'x' * 10**4}'", "must be one of no, segments, graphs"),
    ("train.seed=-1", "train.seed = -1: must be between 0 and 2⁶⁴ − 1"),
    ("model.pool_stride=4", "model.pool_stride = 4: must be 1 to model.pool_size"),
    ("model.lrn_size=4", "model.lrn_size = 4: must be an odd number"),
    # layers that do not fit together
    ('model.order=["conv1", "conv1", "fc8"]', "must be names, each once"),
    ('model.order=["conv1", "conv9", "fc8"]', "model.order = conv9: must be a layer that has a section"),
    ('model.order=["fc8"]', "model.order = ('fc8',): must be two layers at least"),
    ('model.order=["conv1", "fc8", "conv2"]', "model.layers.fc8.width = 0: must be 0 in the last layer", "only there"),
    ('model.order=["conv1", "fc6", "conv2", "fc8"]', "model.layers.conv2.kind = conv: must be before the linear ones"),
    ('model.layers.fc8.kind="conv"', "model.layers.fc8.kind = 'conv': must be linear"),
    ('model.layers.fc8.then=["relu"]', "model.layers.fc8.then = ('relu',): must be empty"),
    (f'{CONV3}.then=["dropout"]', f"{CONV3}.then = 'dropout'", "what may follow 'conv'"),
    ('model.layers.fc6.then=["dropout", "dropout"]', "with dropout once"),
    (f"{CONV3}.width=385", f"{CONV3}.width = 385: must be a number of which either column has the half"),
    (f"{CONV3}.kernel=16", f"{CONV3}.kernel = 16: must be at most what it sees: 13 pixels"),
    ("model.size=40", "model.layers.conv5.then = pool: must be after 3 pixels; it has 2"),
]


@pytest.mark.parametrize(("setting", "words"), [(setting, words) for setting, *words in IMPOSSIBLE])
def test_impossible_settings(setting: str, words: list[str]):
    """One line that names the setting, the key, and what is known or possible."""
    with pytest.raises(RecipeError) as caught:
        load("original", [setting])
    assert str(caught.value).startswith("--set ")
    one_line(caught, setting.partition("=")[0], *words)


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_has_bounds(key: str):
    """One beyond either is refused in a line that has both."""
    bound, whole = NUMBERS[key], get_args(KINDS[key])[0] is int
    most = f"below {bound.lt}" if bound.le is None else f"{bound.le:,}"
    beyond = bound.lt if bound.le is None else bound.le + 1 if whole else bound.le * 1.001
    for value in (beyond, bound.ge - 1 if whole or bound.ge == 0 else bound.ge - abs(bound.ge) * 0.001):
        with pytest.raises(RecipeError) as caught:
            load("original", [f"{key}={value}"])
        one_line(caught, f"{key} = {value}: must be a {'whole ' * whole}number from {bound.ge:,} to {most}")


def test_no_key_is_without_bounds_by_mistake():
    assert {key for key, kind in KINDS.items() if kind in (int, float)} == {"train.seed"}  # whose are beyond int64
    assert {kind for key, kind in KINDS.items() if kind is str} == set()


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("lr", ["optim.lr=1e38", "optim.layers.fc8.lr=10", "optim.layers.fc8.decay=0"]),
        ("lr", ["optim.lr=1e36", "optim.decay=1000", "optim.layers.fc8.decay=10", "optim.layers.conv1.lr=0"]),
        ("lr", ["optim.lr=1e37", "train.batch_size=8192"]),
        ("bias_lr", ["optim.bias_lr=1e37", "optim.batch_size=1"]),
    ],
)
def test_rates_that_no_float32_holds_are_refused(key: str, settings: list[str]):
    """Each factor alone is within its bounds."""
    for setting in settings:
        load("original", [setting])
    with pytest.raises(RecipeError) as caught:
        load("original", settings)
    one_line(
        caught, f"optim.{key} = 1e+3", ": must be at most 3.4e+38, times the factors of ", ", its decay, and train."
    )


def corner(chance: random.Random, kind: Any) -> Any:
    """Return one of a type's extremes, or a value near its middle."""
    base, *(bound,) = get_args(kind)
    if get_origin(base) is tuple:
        return [corner(chance, get_args(base)[0]) for _ in range(chance.choice((0, 1, bound.max_length)))]
    if base is str:
        return "a" * chance.choice((bound.min_length, bound.max_length))
    greatest = bound.le if bound.lt is None else 1 - 2**-53
    return chance.choice((bound.ge, greatest, base(min(greatest, max(bound.ge, 3)))))


def test_no_schedule_within_the_bounds_overflows():
    """At 500 draws of their corners: every rate is a float32 number, or the recipe is refused for its rates."""
    chance, refused, weights, paper = random.Random(1), 0, torch.ones(1), load("paper")
    drawn = [key for key in (*NUMBERS, *LISTS) if key.startswith(("optim.", "train.", "data."))]
    for _ in range(500):
        sections: dict[str, Any] = {"optim": {"schedule": chance.choice(get_args(KINDS["optim.schedule"]))}}
        for key in chance.sample(drawn, chance.randrange(len(drawn) + 1)):
            *path, name = key.split(".")
            section = sections
            for part in path:
                section = section.setdefault(part, {})
            section[name] = corner(chance, KINDS[key])
        try:
            recipe = from_dict(sections, paper, "drawn")
        except RecipeError as error:
            refused += "lr = " in str(error)
            assert re.search(f"optim.(bias_)?lr = .*: must be at most {re.escape(str(MAX_FLOAT))}, times", str(error))
            continue
        steps = recipe.train.steps or round(recipe.train.epochs * 10_009) or 1
        schedule = Schedule(recipe, steps)
        for step in (0, steps // 2, steps - 1):
            for rates in schedule.rates(step).values():
                for rate in (rates.weights, rates.biases, rates.decay * rates.weights):
                    assert 0 <= rate <= torch.finfo(torch.float32).max
                    assert bool(weights.sub(weights, alpha=rate).isfinite())
            while schedule.validated(50) == "drop":
                assert 0 <= schedule.lr(step) <= MAX_FLOAT
    assert 50 < refused < 400


def test_rates_of_a_layer_that_went_are_refused_where_they_are_given(tmp_path: Path):
    """Those of the base go in silence; those in the same file are a mistake."""
    text = 'base = "original"\n[model]\norder = ["conv1", "conv3", "fc8"]\n[optim.layers]\nconv2 = { lr = 0.1 }'
    with pytest.raises(RecipeError) as caught:
        load(written(tmp_path, "wrong", text))
    one_line(caught, "wrong.toml", "optim.layers.conv2", "conv1, conv3, fc8")


def test_a_class_for_each_column_is_needed():
    recipe = load("original", ['model.layers.fc8.sees="own"'])
    with pytest.raises(RecipeError, match="classes = 1: must be one for each column"):
        plan(recipe.model, 1)
    assert [layer.share(1) for layer in plan(recipe.model, 3)][-1] == slice(1, 3)


def test_the_defaults_are_not_a_network():
    """A file without layers is refused when the network is to be built, by the same error."""
    with pytest.raises(RecipeError, match=r"model\.order"):
        plan(Recipe().model, 10)
