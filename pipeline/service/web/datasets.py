"""Data sets over HTTP: summaries, statistics, classes, what was skipped, samples as pictures."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict
from typing_extensions import TypedDict  # pydantic takes typing's only from Python 3.12 on

from penstock import __version__
from pipeline import UserError
from pipeline.doubts import doubts
from pipeline.manifest import Manifest
from pipeline.service.site import Site
from pipeline.service.web import jobs
from pipeline.service.web.context import Here
from pipeline.service.web.problem import responses
from pipeline.service.web.samples import MOST, contents, png
from pipeline.volumes import explained

Name = Annotated[str, Path(max_length=100)]
Split = Annotated[str, Path(max_length=40)]
Number = Annotated[int, Path(ge=0, le=2**40)]
Offset = Annotated[int, Query(ge=0, le=2**40)]
Limit = Annotated[int, Query(ge=1, le=1000)]
router = APIRouter(prefix="/v1/datasets", tags=["data sets"])


class SplitView(TypedDict):
    """Numbers of a split."""

    samples: int
    skipped: int
    shards: int


class Summary(TypedDict):
    """A data set. `recipe` are the options that determine its bytes."""

    name: str
    identity: str
    bytes: int
    classes: int
    splits: dict[str, SplitView]
    recipe: dict[str, Any]
    built_with: dict[str, str]


class Summaries(TypedDict):
    """All data sets; of those that are damaged the reason."""

    datasets: list[Summary]
    damaged: dict[str, str]


class One(Summary):
    """A data set, with what is almost never meant of it."""

    warnings: list[str]


class ClassView(TypedDict):
    """A class, and its samples in each split."""

    label: int
    wnid: str
    words: str
    samples: dict[str, int]


class Classes(TypedDict):
    """Classes in the order of their labels."""

    classes: list[ClassView]
    total: int


class Skipped(TypedDict):
    """Raw images that are in no split: their numbers by split and reason, and their names."""

    reasons: dict[str, dict[str, int]]
    skipped: list[dict[str, Any]]
    total: int


class Sample(TypedDict):
    """A sample. `bytes` and `offset` locate its JPEG in the shard; `label` −1: none."""

    id: int
    split: str
    label: int
    wnid: str
    words: str
    key: str
    bytes: int
    shard: str
    offset: int
    crc32: int


class Check(BaseModel):
    """The options of a check: `quick` decodes nothing."""

    model_config = ConfigDict(extra="forbid")
    quick: bool = False


def summary(data: Manifest, name: str) -> Summary:
    """Return the numbers of a data set."""
    splits = {
        split: SplitView(samples=entry.samples, skipped=entry.skipped, shards=len(entry.shards))
        for split, entry in data.splits.items()
    }
    return Summary(
        name=name,
        identity=data.identity,
        bytes=sum(record.bytes for record in data.files.values()),
        classes=len(data.classes),
        splits=splits,
        recipe=asdict(data.recipe),
        built_with=dict(data.built_with),
    )


def summaries(site: Site) -> Summaries:
    """Return the summaries of all data sets, and why others are damaged."""
    whole, damaged = [], {}
    for name in site.dataset_names():
        try:
            whole.append(summary(site.dataset(name), name))
        except UserError as error:  # one damaged data set hides no other
            damaged[name] = str(error)
        except OSError as error:
            damaged[name] = explained(error)
    return Summaries(datasets=whole, damaged=damaged)


def classes(data: Manifest, offset: int = 0, limit: int = 100, words: str = "") -> Classes:
    """Return classes whose wnid or words have `words` in them, with the numbers of their samples."""
    counts = {split: contents(data).histogram(split) for split in data.splits}
    chosen = [one for one in data.classes if words.lower() in f"{one.wnid} {one.words}".lower()]
    views = [
        ClassView(
            label=one.label,
            wnid=one.wnid,
            words=one.words,
            samples={split: int(count[one.label]) for split, count in counts.items()},
        )
        for one in chosen[offset : offset + limit]
    ]
    return Classes(classes=views, total=len(chosen))


def skipped(data: Manifest, reason: str | None = None, offset: int = 0, limit: int = 100) -> Skipped:
    """Return the raw images that were skipped, for any reason or for one."""
    lines = contents(data).skipped
    reasons: dict[str, Counter[str]] = {split: Counter() for split in data.splits}
    for line in lines:
        reasons.setdefault(line["split"], Counter())[line["reason"]] += 1
    chosen = [line for line in lines if reason in (None, line["reason"])]
    counts = {split: dict(counter) for split, counter in reasons.items()}
    return Skipped(reasons=counts, skipped=chosen[offset : offset + limit], total=len(chosen))


def sample(data: Manifest, split: str, number: int) -> Sample:
    """Return what is known of a sample. Raises Missing, DatasetError."""
    record, (_, key) = contents(data).record(split, number), contents(data).stored(split, number)
    label = int(record["label"])
    one = data.classes[label] if label >= 0 else None
    return Sample(
        id=number,
        split=split,
        label=label,
        wnid=one.wnid if one else "",
        words=one.words if one else "",
        key=key,
        bytes=int(record["size"]),
        shard=f"{split}/{split}-{record['shard']:06d}.tar",
        offset=int(record["offset"]),
        crc32=int(record["crc32"]),
    )


def histogram(data: Manifest, split: str) -> Any:
    """Return the number of samples of each class, (classes,) int64. Raises Missing."""
    return contents(data).histogram(split)


@router.get("", responses=responses())
def list_datasets(service: Here) -> Summaries:
    """List the data sets."""
    return summaries(service.site)


@router.get("/{name}", responses=responses(404, 422))
def one(service: Here, name: Name) -> One:
    """Return a data set's numbers, recipe and identity, and what is almost never meant of it."""
    data = service.site.dataset(name)
    return One(**summary(data, name), warnings=doubts(data))


@router.get("/{name}/statistics", responses=responses(404, 422))
def statistics(service: Here, name: Name) -> dict[str, Any]:
    """Return mean colour, covariance, its eigenvalues and eigenvectors (columns), of RGB grey levels."""
    return dict(service.site.dataset(name).statistics_summary)


PNG: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}},
    304: {"description": "The picture has the ETag of If-None-Match"},
}
JPEG: dict[int | str, dict[str, Any]] = {
    **PNG,
    200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}},
}


@router.get("/{name}/statistics/mean.png", responses=responses(404, 422) | PNG, response_class=Response)
def mean_png(service: Here, request: Request, name: Name) -> Response:
    """Return the mean image, as PNG."""
    data = service.site.dataset(name)
    return _picture(request, data, lambda: png(contents(data).mean()))


@router.get("/{name}/statistics/component.png", responses=responses(404, 422) | PNG, response_class=Response)
def component_png(
    service: Here,
    request: Request,
    name: Name,
    component: Annotated[int, Query(ge=0, le=2)] = 0,
    amount: Annotated[float, Query(ge=-MOST, le=MOST, allow_inf_nan=False)] = 1.0,
    sample: Annotated[int, Query(ge=0, le=2**40)] = 0,
) -> Response:
    """Return a training picture that is moved along a component of colour, by standard deviations, as lighting does."""
    data = service.site.dataset(name)
    return _picture(request, data, lambda: png(contents(data).shifted(component, amount, sample)))


@router.get("/{name}/classes", responses=responses(404, 422))
def list_classes(
    service: Here, name: Name, offset: Offset = 0, limit: Limit = 100, q: Annotated[str, Query(max_length=100)] = ""
) -> Classes:
    """List classes, with their samples in each split; `q`: a part of the wnid or of the words."""
    return classes(service.site.dataset(name), offset, limit, q)


@router.get("/{name}/skipped", responses=responses(404, 422))
def list_skipped(
    service: Here,
    name: Name,
    reason: Annotated[str | None, Query(max_length=100)] = None,
    offset: Offset = 0,
    limit: Limit = 100,
) -> Skipped:
    """List the raw images that were skipped, for any reason or for one."""
    return skipped(service.site.dataset(name), reason, offset, limit)


@router.get("/{name}/samples/{split}/{number}", responses=responses(404, 422))
def one_sample(service: Here, name: Name, split: Split, number: Number) -> Sample:
    """Return what is known of a sample."""
    return sample(service.site.dataset(name), split, number)


@router.get("/{name}/samples/{split}/{number}/stored", responses=responses(404, 422) | JPEG, response_class=Response)
def stored(service: Here, request: Request, name: Name, split: Split, number: Number) -> Response:
    """Return a sample as it is stored, byte for byte."""
    data = service.site.dataset(name)
    contents(data).record(split, number)
    return _picture(request, data, lambda: contents(data).stored(split, number)[0], "image/jpeg")


@router.get("/{name}/samples/{split}/{number}/view", responses=responses(404, 422) | PNG, response_class=Response)
def view(
    service: Here,
    request: Request,
    name: Name,
    split: Split,
    number: Number,
    seed: Annotated[int, Query(ge=0, le=2**64 - 1)] = 2012,
    epoch: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0,
    step: Annotated[int | None, Query(ge=0, le=2**40)] = None,
    batch_size: Annotated[int, Query(ge=1, le=2**20)] = 128,
    lighting: bool = True,
) -> Response:
    """Return a sample as the network sees it, less the mean, plus mid-grey: of an epoch, or of that of a step.

    A step is one of a run whose epochs end with a short batch, as the trainer's do.
    """
    data = service.site.dataset(name)
    contents(data).record(split, number)
    if step is not None:
        epoch = step // -(-max(len(contents(data).records(split)), 1) // batch_size)
    return _picture(request, data, lambda: png(contents(data).view(split, number, seed, epoch, lighting)))


@router.post("/{name}/verify", status_code=201, responses=responses(404, 413, 422))
def verify(service: Here, response: Response, name: Name, check: Check) -> jobs.JobView:
    """Submit a job that checks every promise of the data set."""
    service.site.dataset(name)
    job = jobs.create(service, {"kind": "verify", "dataset": name, "quick": check.quick})
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return jobs.view(job)


def _picture(request: Request, data: Manifest, draw: Callable[[], bytes], kind: str = "image/png") -> Response:
    """Return a picture that is a function of the data set, the URL and our version: by these is its ETag."""
    etag = f'"{data.identity[:32]}-{__version__}"'
    headers = {"ETag": etag, "Cache-Control": "private, max-age=0, must-revalidate"}
    if {etag, "*"} & {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}:
        return Response(status_code=304, headers=headers)
    return Response(draw(), media_type=kind, headers=headers)
