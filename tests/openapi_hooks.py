"""Hooks of schemathesis, which loads this file: most requests name things that the server has."""

from typing import Any

import schemathesis

KNOWN = {"name": "d", "split": "train", "number": 1, "path": "train/train-000000.tar", "file": "metrics.jsonl"}


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    """Put known values in place of two thirds of those made up."""
    if path_parameters and hash(str(path_parameters)) % 3:
        for name in path_parameters.keys() & KNOWN.keys():
            path_parameters[name] = KNOWN[name]
    return path_parameters


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Let half of the jobs be about things that are there."""
    if isinstance(body, dict) and "kind" in body and hash(str(body)) % 2:
        body |= {"dataset": "d"} if "dataset" in body else {}
    return body
