"""The kinds of jobs: the parameters of each, and the command of ours that it runs."""

import sys
from abc import ABC, abstractmethod
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from pipeline import UserError
from pipeline.manifest import FILE_NAME, BuildRecipe
from pipeline.service import runs
from pipeline.service.site import NAME, Site, is_name

# the fields of BuildRecipe that are options of the command
RECIPE = (
    *("size", "crop", "filter", "quality", "subsampling", "exif", "seed", "samples_per_shard", "holdout", "limit"),
)
MOST_RETRIES = 10
UNFINISHED = ".build/plan.json"  # of a data set: a build has begun, and has not ended
Name = Annotated[str, Field(pattern=rf"^{NAME}$", description="Letters, digits, and . _ - after the first of them.")]
Raw = Annotated[str, Field(min_length=1, max_length=4096, description="A folder or URL below a --raw-root.")]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:%-]{0,99}$")]
Address = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:/+-]{0,199}$")]
Key = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_.-]{0,99}$")]
Value = Annotated[str, Field(pattern=r"^[^\x00-\x1f]{0,1000}$")]
Gpus = Annotated[int, Field(ge=0, le=2, description="GPUs; by default as many of two as the server has.")]
Needs: TypeAlias = dict[str, int]  # "cpu", "gpu" or "feed" → slots


class Kind(BaseModel, ABC):
    """Parameters of a job. `reads` and `writes` name what other jobs must not change, or use, at the same time."""

    model_config = ConfigDict(extra="forbid")
    kind: str
    retries: Annotated[int, Field(ge=0, le=MOST_RETRIES, description="Starts anew after a failure.")] = 2
    paths: ClassVar[tuple[str, ...]] = ()  # parameters that name raw images, or files beside them

    @property
    def target(self) -> str:
        """Return the name of the data set or of the run that the job is about."""
        return str(getattr(self, "run", None) or getattr(self, "dataset", ""))

    @property
    def reads(self) -> frozenset[str]:
        return frozenset([f"datasets/{self.dataset}"] if hasattr(self, "dataset") else [])

    @property
    def writes(self) -> frozenset[str]:
        return frozenset([f"runs/{self.run}"] if hasattr(self, "run") else [])

    def needs(self, gpus: int) -> Needs:
        """Return the slots that the job takes on a server with so many GPUs."""
        wanted = getattr(self, "gpus", 0)
        taken = min(2 if self.kind == "train" else 1, gpus) if wanted is None else wanted
        return {"gpu": taken} if taken else {"cpu": 1}

    @abstractmethod
    def words(self, site: Site, since: float | None = None) -> list[str]:
        """Return the words after `penstock`; of a job that was begun before, at `since`, those that go on with it."""

    def has_begun(self, site: Site, progress: dict[str, Any]) -> bool:
        """Return whether a command that failed had begun to work: what it lacked then, as a worker, may come back."""
        return bool(progress.get("done") or progress.get("uri"))

    def check(self, site: Site, gpus: int) -> None:
        """Raise UserError where the server cannot run the job."""
        for name in ("dataset", "run", "classes_of", "init"):
            if (value := getattr(self, name, None)) is not None and not is_name(value):
                raise UserError(f"{name} {value}: ends in . or .tmp; take another name")
        for name in self.paths:
            if (value := getattr(self, name, None)) is not None:
                site.raw(value)
        if (wanted := getattr(self, "gpus", None) or 0) > gpus:
            raise UserError(f"gpus {wanted}: this server has slots for {gpus}; see `penstock serve --slots`")


def _recipe_field(name: str) -> tuple[Any, Any]:
    """Return type and default, None, of a parameter that is a field of BuildRecipe."""
    (field,) = (field for field in fields(BuildRecipe) if field.name == name)
    kind: Any = float if name == "holdout" else int
    if choices := field.metadata.get("choices"):
        kind = Literal[choices]
    else:
        least, most = field.metadata["bounds"]
        kind = Annotated[kind, Field(ge=least, le=2**63 - 1 if most is None else most)]
    return kind | None, None


class _Build(Kind):
    kind: Literal["build"]
    dataset: Name
    raw: Raw
    layout: Word | None = None
    class_depth: Annotated[str, Field(pattern=r"^([0-9]{1,2}|last)$")] | None = None
    labels: Raw | None = None
    classes: Raw | None = None
    classes_of: Name | None = None
    keep_labels: bool = False
    allow_incomplete: bool = False
    retry_skipped: bool = False
    max_skipped: Annotated[str, Field(pattern=r"^[0-9.]{1,12}%?$")] | None = None
    workers: Annotated[int, Field(ge=1, le=1024)] | None = None
    executor: Literal["processes", "ray"] | None = None
    ray_address: Address | None = None
    paths: ClassVar[tuple[str, ...]] = ("raw", "labels", "classes")

    @property
    def reads(self) -> frozenset[str]:
        return frozenset([f"datasets/{self.classes_of}"] if self.classes_of else [])

    @property
    def writes(self) -> frozenset[str]:
        return frozenset([f"datasets/{self.dataset}"])

    def words(self, site: Site, since: float | None = None) -> list[str]:
        given = self.model_dump(exclude={"kind", "dataset", "raw", "retries"}, exclude_none=True)
        dataset = site.datasets / self.dataset
        if since is not None and not self.retry_skipped and _is_finished(dataset, since):
            return ["verify", "--quick", "--json", "--", str(dataset)]
        given |= {name: site.raw(given[name]) for name in ("labels", "classes") if name in given}
        if self.classes_of:
            given["classes_of"] = str(site.datasets / self.classes_of)
        return ["build", *_options(given), "--json", "--", site.raw(self.raw), str(dataset)]

    def has_begun(self, site: Site, progress: dict[str, Any]) -> bool:
        return (site.datasets / self.dataset / UNFINISHED).exists()

    def check(self, site: Site, gpus: int) -> None:
        super().check(site, gpus)
        if (site.datasets / self.dataset / FILE_NAME).exists() and not self.retry_skipped:
            raise UserError(f"dataset {self.dataset}: a finished data set is there already; take another name")


_RECIPE_FIELDS: Any = {name: _recipe_field(name) for name in RECIPE}
Build = create_model("Build", __base__=_Build, **_RECIPE_FIELDS)
Build.__doc__ = "Build a data set of raw images; each other parameter is the command's option of that name."


class Verify(Kind):
    """Check every promise of a data set; `repair`: rebuild what fails of the raw images there."""

    kind: Literal["verify"]
    dataset: Name
    quick: bool = False
    repair: Raw | None = None
    paths: ClassVar[tuple[str, ...]] = ("repair",)

    @property
    def writes(self) -> frozenset[str]:
        return self.reads if self.repair else frozenset()

    def words(self, site: Site, since: float | None = None) -> list[str]:
        options = _options({"quick": self.quick, "repair": self.repair and site.raw(self.repair)})
        return ["verify", *options, "--json", "--", str(site.datasets / self.dataset)]


class Train(Kind):
    """Train a network; with `resume` an earlier run of that name goes on, and `set` changes single keys."""

    kind: Literal["train"]
    dataset: Name
    run: Name
    recipe: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")] | None = None
    set: Annotated[dict[Key, Value], Field(max_length=100)] = {}
    resume: bool = False
    init: Name | None = None
    feed: Annotated[list[Address], Field(max_length=64)] = []
    gpus: Gpus | None = None

    @property
    def reads(self) -> frozenset[str]:
        return frozenset([f"datasets/{self.dataset}", *([f"runs/{self.init}"] if self.init else [])])

    def words(self, site: Site, since: float | None = None) -> list[str]:
        run, options = site.runs / self.run, ["--data", str(site.datasets / self.dataset)]
        begun = runs.newest(run) if self.resume or since is not None else None
        recent = begun and since is not None and begun.stat().st_mtime >= since
        if begun and recent and runs.is_complete(begun):  # but for its page
            return ["figures", str(run), *options, "--json"]
        options += ["--out", str(run), "--json", *([f"--feed={','.join(self.feed)}"] if self.feed else [])]
        if self.resume or not begun:
            options += [f"--set={key}={value}" for key, value in self.set.items()]
        if self.resume or begun:
            return ["train", *options, "--resume"]
        options += [f"--recipe={self.recipe}"] if self.recipe else []
        return ["train", *options, *([f"--init={site.runs / self.init}"] if self.init else [])]

    def check(self, site: Site, gpus: int) -> None:
        super().check(site, gpus)
        begun = runs.newest(site.runs / self.run)
        if begun and not self.resume:
            raise UserError(f'run {self.run}: exists already; go on with it by "resume": true, or take another name')
        if self.resume and (self.recipe or self.init):
            raise UserError(f"run {self.run}: a resumed run keeps its recipe; change single keys by `set`")


class Evaluate(Kind):
    """Compute the errors of a run over every image of a split."""

    kind: Literal["evaluate"]
    dataset: Name
    run: Name
    split: Literal["train", "val", "test"] | None = None
    gpus: Gpus | None = None

    def words(self, site: Site, since: float | None = None) -> list[str]:
        data, run = str(site.datasets / self.dataset), str(site.runs / self.run)
        return ["evaluate", *_options({"split": self.split}), "--json", "--data", data, "--checkpoint", run]


class Figures(Kind):
    """Draw the paper's figures of a run, and its page."""

    kind: Literal["figures"]
    dataset: Name
    run: Name
    only_errors: bool = False
    gpus: Gpus | None = None

    def words(self, site: Site, since: float | None = None) -> list[str]:
        data, run = str(site.datasets / self.dataset), str(site.runs / self.run)
        return ["figures", run, *_options({"only_errors": self.only_errors}), "--json", "--data", data]


class Feed(Kind):
    """Decode the server's data sets for trainers; at another than a loopback address for those with DIR/feed.token."""

    kind: Literal["feed"]
    host: Annotated[str, Field(pattern=r"^[A-Za-z0-9:][A-Za-z0-9.:-]{0,252}$")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None

    def needs(self, gpus: int) -> Needs:
        return {"feed": 1}  # it waits most of the time, and never ends

    def words(self, site: Site, since: float | None = None) -> list[str]:
        options = _options(self.model_dump(include={"host", "port", "threads"}, exclude_none=True))
        token = [] if self.host in ("127.0.0.1", "localhost", "::1") else [f"--token-file={site.feed_token}"]
        return ["feed", "--root", str(site.datasets), *options, *token, "--json"]


AnyKind: TypeAlias = Annotated[Build | Verify | Train | Evaluate | Figures | Feed, Field(discriminator="kind")]  # type: ignore[valid-type]
KINDS: dict[str, type[Kind]] = {kind.__name__.lower(): kind for kind in (Build, Verify, Train, Evaluate, Figures, Feed)}
_ADAPTER: TypeAdapter[Any] = TypeAdapter(AnyKind)


def parse(params: dict[str, Any]) -> Kind:
    """Return the parameters of a job as the class of its kind. Raises UserError, one line."""
    try:
        kind: Kind = _ADAPTER.validate_python(params)
        return kind
    except ValidationError as error:
        raise UserError(explained(error.errors())) from error


def explained(errors: Any) -> str:
    """Return pydantic's first error as a line: the parameter, its value, and what is wrong with it."""
    first = errors[0]
    names = [str(name) for name in first["loc"]]
    names = names[names[:1] == ["body"] :]
    names = names[bool(names) and names[0] in KINDS :]  # but `feed` is a parameter of training, too
    value = "" if isinstance(first["input"], dict | list) else f" {first['input']!r:.100}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{'.'.join(names) or 'body'}{value}: {first['msg'][:1].lower()}{first['msg'][1:]}{more}"


def command(words: list[str]) -> list[str]:
    """Return the line that runs a command of ours in this Python."""
    return [sys.executable, "-m", "penstock", *words]


def _is_finished(dataset: Path, since: float) -> bool:
    """Return whether a build has finished since then, to its very end, in which it deletes its working files."""
    manifest = dataset / FILE_NAME
    return manifest.exists() and manifest.stat().st_mtime >= since and not (dataset / ".build").exists()


def _options(given: dict[str, Any]) -> list[str]:
    """Return options of these names and values; True is a flag, and None and False are left out."""
    kept = {name.replace("_", "-"): value for name, value in given.items() if value is not None and value is not False}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in kept.items()]
