"""The metadata of a checkpoint: all of it that is not a tensor, as JSON, with the type and the range of each value."""

from dataclasses import dataclass, field
from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

from pipeline import UserError, typed
from pipeline.typed import Count, Sha256

FORMAT = 2  # of the metadata and of the tensors' names


class Position(TypedDict):  # the part of a loader's state that the loader does not compare with its own
    step: Count
    bad: list[Count]


class Plateaus(TypedDict):  # optim.Schedule.state()
    best: float | None  # top-1 error
    since: Count
    fallen: Count


class Window(TypedDict):  # metrics.LogInterval.state()
    losses: float
    wrong: NotRequired[Annotated[float, Meta(ge=0)]]  # images; earlier versions did not count them
    images: Count


class Progress(TypedDict):  # of the training loop
    schedule: Plateaus
    window: Window
    steps: Count  # of the run to its end
    over: bool  # ended on its last plateau
    pending: NotRequired[bool]  # the validation of this step is still to be done


class Start(TypedDict, total=False):  # of the run; the first version wrote fewer keys
    step: Count
    devices: list[str]
    processes: Count
    threads: Count
    torch: str
    dataset: Sha256
    init: dict[str, Any] | None
    changed: dict[str, tuple[Any, Any]]  # key of the recipe → values before and since


@dataclass(frozen=True)
class Metadata:
    """All of the values."""

    format: int
    step: Count
    recipe: dict[str, Any]  # `recipe.from_dict` checks it
    classes: Annotated[list[str], Meta(min_length=1)]
    dataset: Sha256
    loader: Position
    progress: Progress
    history: list[Start]
    tensors: list[str] = field(default_factory=list)  # earlier versions read it
    checksum: Sha256 = ""  # earlier versions wrote none


def plain_values(text: str) -> dict[str, Any]:
    """Return the values of a checkpoint's metadata, once they are known to be of these types; none is left out.

    Raises UserError, without the file's name: of another version, or damaged.
    """
    try:
        values = typed.from_json(text, dict[str, Any])
        if (version := values.get("format", 1)) == FORMAT:
            known = typed.from_values(values, Metadata)
            if unknown := values.keys() - Metadata.__dataclass_fields__:
                raise UserError(f"unknown key {min(unknown):.100}")
    except UserError as error:
        raise UserError(f"damaged ({error})") from error
    if version != FORMAT:
        remedy = "read it with the version that wrote it"
        raise UserError(f"of format {version!r:.50}, and this version of the program reads format {FORMAT}; {remedy}")
    if known.loader["step"] != known.step:
        raise UserError(f"damaged (it is of step {known.step}, and its loader's state of step {known.loader['step']})")
    return values
