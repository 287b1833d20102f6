"""python -m trainer reproduce: try a claim of the paper in small, with several runs of each variant."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click

from pipeline import UserError, manifest
from pipeline.cli import Command, json_text, print_event, print_line, progress_bars
from pipeline.files import locked, write_bytes_aside
from pipeline.manifest import Manifest
from trainer.evaluate import VIEWS, labelled
from trainer.figures.curves import curves
from trainer.figures.sheets import png
from trainer.options import DATA, JSON, PATH
from trainer.reproduce import crew, measure
from trainer.reproduce.crew import Outcome
from trainer.reproduce.experiment import Experiment, Run, load, planned, searched

Row = dict[str, Any]  # of a run: variant, choice, seed, step, and what was measured


@click.command(cls=Command, interrupted="runs that trained are saved; the same command goes on")
@click.argument("name")
@DATA
@click.option("--out", type=PATH, required=True, help="The folder of the runs, and of what is measured.")
@click.option("--seed", "seeds", type=click.IntRange(0, 2**63 - 1), multiple=True, help="May be repeated.")
@click.option("--jobs", type=click.IntRange(1, 64), default=1, show_default=True, help="Runs at a time.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key in every run.")
@click.option("--split", help="That errors are of.  [default: test if it has labels, else val]")
@click.option("--device", metavar="DEVICE", help="Of every column, such as cuda:0.  [default: as train chooses]")
@click.option("--no-train", is_flag=True, help="Measure the runs that are done, and train none.")
@JSON
def reproduce(
    name: str,
    data: Path,
    out: Path,
    seeds: tuple[int, ...],
    jobs: int,
    settings: tuple[str, ...],
    split: str | None,
    device: str | None,
    no_train: bool,
    as_json: bool,
) -> None:
    """Try a claim of the paper in small: train what experiment NAME compares, and measure it.

    NAME is figure1, lrn, ablations, columns, neighbours, and with -cifar behind it each of these three; or a .toml file
    like those in trainer/reproduce. Runs that are there are not trained again; one that was interrupted goes on.
    docs/reproduction.md has what we found.

    \b
    Examples:
      python -m trainer reproduce figure1 --data CIFAR --out FOLDER --jobs 2
      python -m trainer reproduce lrn --data CIFAR --out FOLDER --seed 1 --set train.epochs=40
    """
    experiment, dataset = load(name), manifest.load(data)
    seeds = tuple(dict.fromkeys(seeds)) or experiment.seeds
    split = split or ("test" if "test" in dataset.splits and labelled(dataset, "test") else "val")
    if experiment.measure in ("error", "neighbours"):  # before the runs, which may take days
        if dataset.split(split).samples == 0:
            raise UserError(f"{data}: the split {split!r} is empty; name another --split")
        if not labelled(dataset, split):
            raise UserError(f"{data}: the split {split!r} has images without a label; name another --split")
    search = partial(searched, experiment, dataset, out, seeds[0], settings)
    search(_choices(experiment), 1)
    planned(experiment, dataset, out, seeds, settings, {})  # an impossible recipe is refused before anything is written
    with ExitStack() as stack:
        if not no_train:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out, "another command trains here; wait for it, or name another --out"))
        show = stack.enter_context(progress_bars(as_json))

        def outcomes(runs: Sequence[Run]) -> list[Outcome]:
            runs = [run for run in runs if crew.done(run)] if no_train else runs
            return crew.train(runs, dataset, jobs, device, show, lambda text: print_line(as_json, text))

        chosen, trials = _search(experiment, search, outcomes)
        ended = outcomes(planned(experiment, dataset, out, seeds, settings, chosen))
        lost = [outcome.run for outcome in ended if outcome.diverged]
        found = [outcome for outcome in ended if not outcome.diverged]
        rows: list[Row] = []
        for outcome in found:
            show("measured", len(rows), len(found))
            rows.append(_measured(experiment, outcome, dataset, split, device))
        show("measured", len(rows), len(found))
    if lost and not rows:
        folder = lost[0].folder
        raise UserError(f"{folder}: {crew.DIVERGED}; lower its rates, and delete the folder and {folder.name}.log")
    if not rows:
        raise UserError(f"{out}: no run is done; leave out --no-train")
    lines = [experiment.claim, *_search_lines(trials), *_lines(experiment, rows, split)]
    lines += [f"{run.name}: {crew.DIVERGED}; it counts in no mean" for run in lost]
    files = {out / f"{Path(name).stem}.json": _recorded(experiment, dataset, split, trials, rows, lines)}
    if experiment.measure == "epochs":
        files[out / f"{Path(name).stem}.png"] = png(_figure(experiment, found))
    for path, content in files.items():
        write_bytes_aside(path, content)
    for line in lines:
        print_line(as_json, line)
    if as_json:
        print_event("done", files=[str(path) for path in files], runs=rows)
    else:
        click.echo("\n".join(map(str, files)))


def _choices(experiment: Experiment) -> dict[str, list[str]]:
    """Return the choices of the search by variant; none without a search."""
    return {variant: list(experiment.search.choices) for variant in experiment.variants} if experiment.search else {}


def _search(
    experiment: Experiment, runs_of: Callable[..., list[Run]], outcomes: Callable[[list[Run]], list[Outcome]]
) -> tuple[dict[str, str], list[Outcome]]:
    """Return the best choice by variant, and how far each choice came.

    Raises UserError: the search is not finished, or every choice of a variant has diverged.
    """
    left, latest = _choices(experiment), dict[str, Outcome]()
    for epochs in experiment.search.epochs if experiment.search else ():
        runs = runs_of(left, epochs)
        trials = outcomes(runs)
        if len(trials) < len(runs):
            raise UserError("the search for rates is not finished; leave out --no-train")
        latest |= {trial.run.name: trial for trial in trials}
        for variant, choices in left.items():
            own = [trial for trial in trials if trial.run.variant == variant and not trial.diverged]
            if not own:
                raise UserError(f"{variant}: every choice of the search has diverged; give it lower rates")
            own.sort(key=partial(_rank, experiment))
            left[variant] = [trial.run.choice for trial in own[: -(-len(choices) // 2)]]
    return {variant: choices[0] for variant, choices in left.items()}, list(latest.values())


def _rank(experiment: Experiment, trial: Outcome) -> tuple[float, float]:
    """Return what the lower is, the better a choice: when it came to the target, and its last training error."""
    reached = measure.epochs_to(trial.lines, trial.run.epoch, experiment.target) if trial.run.until else None
    return math.inf if reached is None else reached, trial.lines[-1]["top1_error"]


def _measured(experiment: Experiment, outcome: Outcome, dataset: Manifest, split: str, device: str | None) -> Row:
    run = outcome.run
    if experiment.measure == "epochs":
        values: dict[str, Any] = {"epochs": measure.epochs_to(outcome.lines, run.epoch, experiment.target)}
        values["top1_error"] = outcome.lines[-1]["top1_error"]
    elif experiment.measure == "columns":
        values = measure.columns_of(run)
    elif experiment.measure == "neighbours":
        values = measure.neighbours_of(run, dataset, split, device)
    else:
        values = measure.error_rates(run, dataset, split, experiment.views, device)
    return {"variant": run.variant, "choice": run.choice, "seed": run.seed, "step": outcome.lines[-1]["step"], **values}


def _search_lines(trials: Sequence[Outcome]) -> list[str]:
    rows = [["search", "rate", "training error", "after epoch"]] if trials else []
    for trial in trials:
        error = crew.DIVERGED if trial.diverged else f"{trial.lines[-1]['top1_error']:.1f} %"
        epoch = f"{trial.lines[-1]['step'] / trial.run.epoch:.3g}" if trial.lines else "0"
        rows.append([trial.run.variant, trial.run.choice, error, epoch])
    return aligned(rows)


def _lines(experiment: Experiment, rows: Sequence[Row], split: str) -> list[str]:
    """Return the table of an experiment's outcome."""
    by_variant = {name: [row for row in rows if row["variant"] == name] for name in experiment.variants}
    by_variant = {name: own for name, own in by_variant.items() if own}
    if experiment.measure == "columns":
        return _columns(by_variant)
    if experiment.measure == "neighbours":
        return _neighbours(by_variant, split)
    first, key = next(iter(experiment.variants)), "epochs" if experiment.measure == "epochs" else "top1_error"
    what = (
        f"epochs to {experiment.target:g} %" if key == "epochs" else f"top-1 error, {split}, {VIEWS[experiment.views]}"
    )
    by_seed = {row["seed"]: row[key] for row in by_variant.get(first, ())}
    table = [["variant", "runs", what, f"{'its ratio to' if key == 'epochs' else 'less that of'} {first}, by seed"]]
    for name, own in by_variant.items():
        values = [row[key] for row in own]
        if None in values:
            lowest = min(row["top1_error"] for row in own)
            table.append([name, str(len(own)), f"not reached; {lowest:.1f} % at the end", ""])
            continue
        # by seed, for runs of one seed have the order of their pictures and their crops in common
        pairs = [(row[key], by_seed[row["seed"]]) for row in own if by_seed.get(row["seed"]) is not None]
        other = ""
        if name != first and pairs:
            compared = [one / two if key == "epochs" else one - two for one, two in pairs]
            other = measure.mean(compared).text("" if key == "epochs" else " points")
        table.append([name, str(len(own)), measure.mean(values).text("" if key == "epochs" else " %"), other])
    return aligned(table)


def _columns(by_variant: dict[str, list[Row]]) -> list[str]:
    head = ("colour of the columns", "orientation of the columns", "colours apart by", "random halves by", "p")
    table = [["variant", "seed", *head]]
    for name, own in by_variant.items():
        for row in own:
            shares = (" and ".join(f"{share:.3f}" for share in row[key]) for key in ("colour", "orientation"))
            apart = abs(row["colour"][0] - row["colour"][1])
            table.append([name, str(row["seed"]), *shares, f"{apart:.3f}", f"{row['halves']:.3f}", f"{row['p']:.3g}"])
        apart_by = measure.mean([abs(row["colour"][0] - row["colour"][1]) for row in own])
        together = measure.combined([row["p"] for row in own])
        halves = measure.mean([row["halves"] for row in own])
        table.append([name, "all", "", "", apart_by.text(digits=3), halves.text(digits=3), f"{together:.3g}"])
    return aligned(table)


def _neighbours(by_variant: dict[str, list[Row]], split: str) -> list[str]:
    near = f"{measure.NEAREST} nearest training pictures"
    heads = ("by features", "by pixels", "by chance", "found both ways")
    table = [["variant", "runs", *(f"{head}, %" for head in heads)]]
    for name, own in by_variant.items():
        means = (measure.mean([row[key] for row in own]) for key in ("features", "pixels", "chance", "common"))
        table.append([name, str(len(own)), *(each.text(digits=1) for each in means)])
    count = next(iter(by_variant.values()))[0]["samples"]
    return [f"of the {near} of {count:,} pictures of {split}, those of their class:", *aligned(table)]


def _figure(experiment: Experiment, found: Sequence[Outcome]) -> Any:
    """Return the sheet of training error over epochs, a curve for each variant, of its first seed."""
    courses: dict[str, list[tuple[float, float]]] = {}
    for outcome in found:
        points = [(line["step"] / outcome.run.epoch - 0.5, line["top1_error"]) for line in outcome.lines]
        courses.setdefault(outcome.run.variant, points)
    return curves(courses, "Training error rate (%)", "Epochs", experiment.target, experiment.claim)


def _recorded(
    experiment: Experiment,
    dataset: Manifest,
    split: str,
    trials: Sequence[Outcome],
    rows: Sequence[Row],
    lines: list[str],
) -> bytes:
    search = [
        {"variant": trial.run.variant, "choice": trial.run.choice, "diverged": trial.diverged, "lines": trial.lines}
        for trial in trials
    ]
    record = {"claim": experiment.claim, "measure": experiment.measure, "dataset": dataset.identity, "split": split}
    return (json_text(record | {"table": lines, "runs": list(rows), "search": search}, indent=1) + "\n").encode()


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of texts as lines whose columns are two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]
