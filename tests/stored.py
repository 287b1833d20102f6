"""Stored pictures, and their views through the graph."""

from pathlib import Path

import numpy as np

from pipeline import manifest
from pipeline.online.batch import Crops
from pipeline.online.graph import Graph, GraphOptions


def jpegs(root: Path, split: str) -> list[bytes]:
    """The stored pictures in the order of the ids, by the manifest's records."""
    found = []
    for record in manifest.load(root).samples(split):
        shard = (root / split / f"{split}-{record['shard']:06d}.tar").read_bytes()
        found.append(shard[record["offset"] :][: record["size"]])
    return found


def views(pictures: list[bytes], crops: Crops, *, normalised: bool, resize: bool = True) -> np.ndarray:
    graph = Graph(GraphOptions(view=224, resize=resize, normalised=normalised, threads=2), len(pictures))
    graph.submit([np.frombuffer(data, np.uint8) for data in pictures], crops)
    return graph.result().numpy().copy()
