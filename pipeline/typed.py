"""Read JSON as the dataclass that it should be: types and ranges stand in its annotations, and are checked here."""

import re
from typing import Annotated, Any, TypeVar

import msgspec

from pipeline import UserError

Kind = TypeVar("Kind")
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


def from_json(data: bytes | str, kind: type[Kind]) -> Kind:
    """Return JSON as a value of `kind`: a dataclass, TypedDict, or container of such. Unknown keys are passed over.

    Numbers are finite; a whole number may stand for a floating one, and nothing else is converted.
    Raises UserError, without the file's name: no JSON, too deeply nested, or a value of another type or out of range.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (ValueError, RecursionError) as error:
        raise UserError(_reason(error)) from error


def from_values(value: Any, kind: type[Kind]) -> Kind:
    """Return what a parser of JSON or TOML gave as a value of `kind`. Raises UserError as `from_json`."""
    try:
        return msgspec.convert(value, type=kind)
    except (ValueError, RecursionError) as error:
        raise UserError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """Return msgspec's message with the key in front: `files[...].bytes: expected int >= 0`."""
    text, _, key = str(error).replace("`", "").partition(" - at $")
    text = text[:1].lower() + text[1:]
    return f"{re.sub('^[.]', '', key)}: {text}" if key else text
