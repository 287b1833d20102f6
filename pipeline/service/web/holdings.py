"""The dashboard's pages of what the server holds: data sets, runs and decoding workers."""

import random
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, Response

from pipeline import UserError
from pipeline.doubts import doubts
from pipeline.manifest import Manifest
from pipeline.service.database import WAITING
from pipeline.service.runs import Evaluation
from pipeline.service.web import charts, datasets, runs, workers
from pipeline.service.web.context import Here
from pipeline.service.web.pages import STALL, render
from pipeline.service.web.problem import Problem

DRAWN = 12  # samples on a page
SHOWN = 5  # classes with the most, and with the fewest images
NAMES = 200  # of skipped images
AMOUNTS = (-1, -0.5, 0, 0.5, 1)  # standard deviations along a component
EVALUATION = "evaluation.json"  # of the run's own data set
SHEETS = {
    "kernels.png": "The kernels of the first layer, both columns",
    "predictions.png": "Validation images, and what the network takes them for",
    "neighbours.png": "The training images that the network finds most like validation images",
    "augmentation.png": "One training image as the network sees it in several epochs",
}
router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)


@router.get("/datasets")
def dataset_list(request: Request, service: Here) -> Response:
    """Show all data sets."""
    after = service.database.last_event()
    return render(request, "datasets.html", after=after, active=False, sets=datasets.summaries(service.site))


@router.get("/datasets/{name}")
def dataset_page(
    request: Request,
    service: Here,
    name: str,
    split: Annotated[str | None, Query(pattern="^(train|val|test)$")] = None,
    epoch: Annotated[int, Query(ge=0, le=10**6)] = 0,
    draw: Annotated[int, Query(ge=0, le=2**31)] = 1,
) -> Response:
    """Show a data set: samples drawn by the number `draw`, colours, classes, what was skipped, how to use it."""
    manifest = service.site.dataset(name)
    split = split or next(iter(manifest.splits))
    if split not in manifest.splits:
        raise Problem(404, f"{split}: no such split of {name}; there are: {', '.join(manifest.splits)}")
    base = str(request.base_url).rstrip("/")
    values = {
        "one": datasets.summary(manifest, name),
        "warnings": doubts(manifest),
        "statistics": manifest.statistics_summary,
        "samples": _samples(manifest, split, draw),
        "components": _components(manifest, name),
        "amounts": AMOUNTS,
        "skipped": datasets.skipped(manifest, limit=NAMES),
        "snippets": snippets(name, base, manifest, split, service.settings.tokens_required),
        **_classes(manifest, split),
    }
    return render(request, "dataset.html", split=split, epoch=epoch, draw=draw, base=base, **values)


def _samples(manifest: Manifest, split: str, draw: int) -> list[dict[str, Any]]:
    """Return DRAWN samples of a split, a function of `draw`; of one that is damaged the reason, as "error"."""
    number = manifest.splits[split].samples
    samples: list[dict[str, Any]] = []
    for i in random.Random(draw).sample(range(number), min(DRAWN, number)):
        try:
            samples.append({**datasets.sample(manifest, split, i)})
        except (UserError, OSError) as error:  # or its shard is not there
            samples.append({"id": i, "error": str(error)})
    return samples


def _classes(manifest: Manifest, split: str) -> dict[str, Any]:
    """Return a split's classes with images of each: all in a chart, and tables of the most and the fewest."""
    numbers = datasets.histogram(manifest, split)
    order = np.argsort(-numbers, kind="stable")

    def rows(labels: np.ndarray) -> list[dict[str, Any]]:
        return [_class(manifest, int(label), int(numbers[label]), int(numbers.max(initial=1))) for label in labels]

    if len(order) <= 2 * SHOWN:
        return {"histogram": "", "tables": [(f"Images of each class in {split}", rows(order))]}
    words = f"{numbers.min():,} to {numbers.max():,} images, the median is {np.median(numbers):,.0f}"
    drawn = charts.bars("Images of each class", numbers[order].tolist(), words, "classes, the largest first")
    tables = [("Most images", rows(order[:SHOWN])), ("Fewest images", rows(order[: -SHOWN - 1 : -1]))]
    return {"histogram": drawn, "words": words, "tables": tables}


def _class(manifest: Manifest, label: int, images: int, most: int) -> dict[str, Any]:
    record = manifest.classes[label]
    return {
        "label": label,
        "wnid": record.wnid,
        "words": record.words,
        "images": images,
        "bar": charts.bar(images / most),
    }


def _components(manifest: Manifest, name: str) -> list[dict[str, Any]]:
    """Return the three principal components of the training pixels' colours, the strongest first."""
    summary = manifest.statistics_summary
    values, vectors = np.maximum(summary["eigenvalues"], 0), np.array(summary["eigenvectors"])
    found = []
    for k, (value, vector) in enumerate(zip(values, vectors.T)):
        shifts = [np.add(summary["mean_color"], a * np.sqrt(value) * vector) for a in np.linspace(-1, 1, 15)]
        found.append(
            {
                "share": 100 * value / (sum(values) or 1),
                "deviation": float(np.sqrt(value)),
                "vector": vector.tolist(),
                "path": f"/v1/datasets/{name}/statistics/component.png?component={k}&amount=",
                "swatch": charts.swatch(f"Component {k + 1}, from −1 to +1 standard deviation", shifts),
            }
        )
    return found


def snippets(name: str, base: str, manifest: Manifest, split: str, secret: bool) -> list[tuple[str, str]]:
    """Return titles and texts: how programs read a data set from this server; `secret`: with a token."""
    url = f"{base}/v1/datasets/{name}"
    shards = [shard.name for shard in manifest.splits[split].shards]
    numbers = f"{{000000..{len(shards) - 1:06d}}}" if len(shards) > 1 else "000000"
    header = '-H "Authorization: Bearer $PENSTOCK_TOKEN" ' if secret else ""
    urls = f"{url}/{split}/{split}-{numbers}.tar"
    urls = f"pipe:curl -sf {header}{urls}" if secret else urls
    return [
        ("Penstock's trainer, on this server", f"penstock submit train {name} RUN --recipe tiny"),
        (
            "Penstock's loader, in Python",
            "from penstock.pipeline.online import Loader\n\n"
            f'url = "{url}"\nwith Loader(url, "{split}", batch_size=16, cache="shards") as loader:\n'
            "    for batch in loader:  # goes on for ever\n"
            "        print(batch.images.shape, batch.labels.shape)",
        ),
        (
            "webdataset",
            f"import webdataset\n\nurls = {urls!r}\n"
            'for sample in webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"):\n'
            '    print(sample["__key__"], sample["jpg"].shape, sample.get("cls"))',
        ),
        (
            "timm, on a copy of the folder",
            f'import timm.data\n\ndataset = timm.data.create_dataset("wds/{name}", root="{name}", split="{split}")',
        ),
        ("A file", f"curl -C - -O {header}{url}/{shards[0]}"),
    ]


@router.get("/runs")
def run_list(request: Request, service: Here) -> Response:
    """Show all runs."""
    after = service.database.last_event()
    found = runs.summaries(service)
    return render(request, "runs.html", after=after, active=any(run["state"] == "running" for run in found), runs=found)


@router.get("/runs/{name}")
def run_page(request: Request, service: Here, name: str) -> Response:
    """Show a run: its curves, speed and stall, errors, figures and checkpoints."""
    after = service.database.last_event()
    run, lines = runs.summary(service, name), runs.metrics(service.site, name)
    trained = [line for line in lines if line["kind"] == "train"]
    validated = [line for line in lines if line["kind"] == "validation"]
    busy = any(one.target == name for one in service.database.jobs(WAITING, limit=1000))
    names = [figure["file"] for figure in runs.figures(service.site, name)]
    values: dict[str, Any] = {
        "run": run,
        "job": service.queue.job(run["job"]) if run["job"] else None,
        "busy": busy,
        "newest": trained[-1] if trained else {},
        "evaluations": [row for one in run["evaluations"] for row in _errors(one)],
        "recipe": _recipe(run["recipe"]),
        "cause": cause(trained[-1]["time"]) if trained else "",
        "curves": curves(trained, validated),
        "checkpoints": runs.checkpoints(service.site, name),
        "figures": [(file, SHEETS.get(file, file)) for file in sorted(names, key=[*SHEETS, *names].index)],
    }
    return render(request, "run.html", after=after, active=busy, **values)


def _errors(one: Evaluation) -> list[tuple[str, str, dict[str, float]]]:
    """Return an evaluation's rows: where it was computed, views, error rates."""
    other = "" if one["file"] == EVALUATION else " of another data set"
    return [(f"{one['split']}{other}, step {one['step']:,}", view, rates) for view, rates in one["errors"].items()]


def _recipe(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the keys of a training recipe that people ask for, and their values."""
    train, optim, model = (recipe.get(part, {}) for part in ("train", "optim", "model"))
    layers = ", ".join(f"{name} {layer.get('width') or 'classes'}" for name, layer in model.get("layers", {}).items())
    values = {
        "Network": layers and f"{layers}; {model.get('columns')} columns",
        "Batch": train.get("batch_size"),
        "Epochs": train.get("epochs"),
        "Learning rate": optim.get("lr"),
        "Schedule": optim.get("schedule"),
        "Momentum, decay": optim and f"{optim.get('momentum')}, {optim.get('decay')}",
        "Seed": train.get("seed"),
    }
    return [(name, str(value)) for name, value in values.items() if value]


def cause(time: dict[str, Any]) -> str:
    """Return what the device waited for most; "" where it hardly waited."""
    shares = time.get("stall_by") or {"batches": time["stall"]}
    return max(shares, key=lambda name: shares[name]) if time["stall"] > STALL else ""


def curves(trained: Sequence[dict[str, Any]], validated: Sequence[dict[str, Any]]) -> list[tuple[str, charts.Markup]]:
    """Return titles and charts of the lines of metrics.jsonl."""
    if not trained and not validated:
        return []

    def curve(name: str, lines: Sequence[dict[str, Any]], *path: str, percent: bool = False) -> charts.Curve:
        values = [_at(line, path) for line in lines]
        values = [round(100 * value, 2) for value in values] if percent else values
        return charts.Curve(name, [(line["step"], value) for line, value in zip(lines, values)])

    shares = [(name, share) for line in trained for name, share in line["time"].get("stall_by", {}).items()]
    causes = dict.fromkeys(name for name, share in shares if share > STALL)
    stall = [curve("all", trained, "time", "stall", percent=True)]
    stall += [curve(name, trained, "time", "stall_by", name, percent=True) for name in causes]
    losses = [curve("training", trained, "loss"), curve("validation", validated, "nll")]
    errors = [curve("top-1", validated, "top1_error"), curve("top-5", validated, "top5_error")]
    errors.append(curve("top-1 in training", [line for line in trained if "top1_error" in line], "top1_error"))
    return [
        ("Loss", charts.lines("Loss", losses)),
        ("Error", charts.lines("Error", errors, " %")),
        ("Speed", charts.lines("Speed", [curve("images/s", trained, "time", "images_per_second")])),
        ("Stall: the device waits for", charts.lines("Stall", stall, " %", least=1)),
        ("Learning rate", charts.lines("Learning rate", [curve("rate", trained, "lr")], log=True)),
    ]


def _at(line: dict[str, Any], path: Sequence[str]) -> float:
    value: Any = line
    for key in path:
        value = value.get(key, 0.0)
    return float(value)


@router.get("/workers")
def worker_list(request: Request, service: Here) -> Response:
    """Show the decoding workers: who is there, and how busy."""
    after = service.database.last_event()
    return render(request, "workers.html", after=after, active=True, workers=workers.workers(service))
