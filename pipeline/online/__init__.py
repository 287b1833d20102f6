"""The online stage: a dataset directory to batches on the device. Never the offline stage."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.online.batch import Batch
    from pipeline.online.loader import Loader
    from pipeline.online.plain import webdataset

__all__ = ["Batch", "Loader", "webdataset"]
MODULES = {"Batch": "batch", "Loader": "loader", "webdataset": "plain"}


def __getattr__(name: str) -> Any:
    """Import what is asked for, with torch, which takes seconds: the server uses a module here that needs none."""
    if name in MODULES:
        return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
