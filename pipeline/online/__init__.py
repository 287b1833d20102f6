"""The online stage: a dataset directory to batches on the device. Never the offline stage."""

from pipeline.online.batch import Batch
from pipeline.online.loader import Loader
from pipeline.online.plain import webdataset

__all__ = ["Batch", "Loader", "webdataset"]
