"""A part of a batch, decoded anywhere: the request that names it, its decoding, and the answer with the views.

A worker decodes parts for consumers elsewhere, and a consumer some beside its workers. The views are a function of the
request, so that it does not matter who answers it, nor how often.
"""

import ctypes
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
from msgspec import Meta

from pipeline import UserError, storage, typed
from pipeline.manifest import Manifest
from pipeline.online import turbo
from pipeline.online.batch import Batch, Transform, Undecodable
from pipeline.online.samples import DAMAGED, UNDECODABLE, BadSamples, Pictures, SampleReader
from pipeline.typed import Count, Sha256

PROTOCOL = 1  # version of `Request` and of `Answer.to_batch`
MOST = 256  # samples of a part
LONGEST = 2**16  # bytes of a request; MOST ids, owners, and KNOWN bad samples, of 40 bits take less
KNOWN = 2048  # bad samples that a request names
Number = Annotated[int, Meta(ge=0, le=2**40)]
Numbers = Annotated[tuple[Number, ...], Meta(max_length=MOST)]


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A part of a batch: all that its views are a function of, and who may answer it."""

    protocol: Count
    codec: Annotated[str, Meta(max_length=64)]  # `turbo.fingerprint` of the consumer
    data: Annotated[str, Meta(min_length=1, max_length=500)]  # the data set's folder below the worker's
    identity: Sha256  # of the data set
    split: Annotated[str, Meta(max_length=100)]
    recipe: Literal["alexnet", "imagenet"]
    views: Literal["random", "centre", "ten", "nine"]
    positions: Literal["code", "paper", "centre"]  # these, and flips: see `augment.ViewOptions`; of the recipe alexnet
    view: Annotated[int, Meta(ge=1, le=1024)]
    seed: Annotated[int, Meta(ge=0)]
    max_bad: Count  # samples that may fail; see `samples.BadSamples`
    flips: bool = True
    step: Number = 0
    epoch: Number = 0
    ids: Numbers = ()
    owners: Numbers | None = None  # the samples whose crop and flip are used
    bad: Annotated[tuple[Number, ...], Meta(max_length=KNOWN)] = ()  # ids that are known to be bad

    @property
    def options(self) -> dict[str, Any]:
        """The options of `loader.recipe_of` that the views depend on; colours are the consumer's business."""
        if self.recipe == "imagenet":
            return {"views": self.views}
        colours = {"mean": "colour", "lighting": "off"}
        return {key: getattr(self, key) for key in ("views", "positions", "flips", "view")} | colours


def template(data: Manifest, split: str, recipe: Transform, seed: int, max_bad: int) -> Request:
    """Return a request for no samples; the data set has the name of its folder here."""
    options = {"positions": "code", "flips": True, "view": recipe.view} | recipe.described()
    known: dict[str, Any] = {key: options[key] for key in ("recipe", "views", "positions", "flips", "view")}
    name = data.root.name if storage.is_remote(data.root) else os.path.basename(os.path.abspath(data.root))
    own: dict[str, Any] = {
        "protocol": PROTOCOL,
        "codec": turbo.fingerprint(),
        "data": name or ".",
        "identity": data.identity,
    }
    return Request(**own, **known, split=split, seed=seed, max_bad=max_bad)


def parse(data: bytes) -> Request:
    """Return the request that these bytes are. Raises UserError: none, or one of another protocol or decoder."""
    if len(data) > LONGEST:
        raise UserError(f"a request of {len(data):,} bytes; at most {LONGEST:,}")
    version = typed.from_json(data, dict[str, Any]).get("protocol")
    if version != PROTOCOL:
        text = f"{version!r:.40}"
        raise UserError(f"protocol version {text} asked for, {PROTOCOL} here; install the same Penstock on both sides")
    request = typed.from_json(data, Request)
    if request.seed >= 2**64:
        raise UserError("seed: must be below 2⁶⁴")
    if request.owners is not None and len(request.owners) != len(request.ids):
        raise UserError(f"owners: {len(request.owners)}, for {len(request.ids)} ids")
    if request.codec != (own := turbo.fingerprint()):
        reason = f"its JPEG decoder gives other pixels ({own[:12]!r}) than yours ({request.codec[:12]!r})"
        raise UserError(f"{reason}; install the same simplejpeg and pillow-simd on both sides")
    return request


@dataclass(frozen=True)
class Answer:
    """The views of a part."""

    views: np.ndarray  # (n, side, side, 3) uint8, RGB, cropped and mirrored
    ids: np.ndarray  # (n,) int64, after the replacement of bad samples
    labels: np.ndarray  # (n,) int64; −1: none
    bad: dict[int, str]  # newly found bad samples: id → shard, key and reason

    @property
    def damaged(self) -> bool:
        """True where stored bytes are damaged, which those of another copy of the data set need not be."""
        return any(where.endswith(DAMAGED) for where in self.bad.values())

    def verify(self, request: Request, reader: SampleReader, training: bool) -> None:
        """Raise UserError where the ids are not those of the request, bad samples replaced, or have other labels."""
        bad, samples = {*request.bad, *self.bad}, len(reader)
        ids, requested = list(request.ids), np.array(request.ids, np.int64)
        for i, sample in enumerate(request.ids):
            while sample in bad and len(bad) < samples:
                ids[i] = sample = (sample + 1) % samples
        if ids != self.ids.tolist():
            raise UserError("answers with other samples than were asked for")
        labels = reader.labels(self.ids)
        if not training:
            labels[self.ids != requested] = -1
        if not np.array_equal(labels, self.labels):
            raise UserError("answers with other labels than samples.npy has here")

    def to_batch(self) -> pa.RecordBatch:
        """Return the record batch that crosses the network; it uses the memory of the arrays."""
        n, side = self.views.shape[:2]
        column = pa.binary(side * side * 3)
        views = pa.FixedSizeBinaryArray.from_buffers(column, n, [None, pa.py_buffer(self.views)])
        bad = json.dumps({str(sample): where for sample, where in self.bad.items()})
        fields = [("view", column), ("id", pa.int64()), ("label", pa.int64())]
        schema = pa.schema(fields, metadata={"side": str(side), "bad": bad})
        return pa.record_batch([views, pa.array(self.ids), pa.array(self.labels)], schema=schema)

    @staticmethod
    def from_batch(batch: pa.RecordBatch, n: int, side: int) -> "Answer":
        """Return the answer that a record batch holds, in its memory. Raises UserError, ArrowInvalid: not n views."""
        batch.validate(full=True)
        types = [pa.binary(side * side * 3), pa.int64(), pa.int64()]
        if batch.num_rows != n or batch.schema.types != types or any(column.null_count for column in batch.columns):
            raise UserError(f"answers with {batch.num_rows} rows of {batch.schema.types}, not with {n} of {types}")
        view, ids, labels = batch.columns
        texts = typed.from_json((batch.schema.metadata or {}).get(b"bad", b"{}"), dict[str, str])
        if not all(text.isdecimal() for text in texts):
            raise UserError("answers with bad samples that are no numbers")
        bad = {int(text): where for text, where in texts.items()}
        size = side * side * 3
        views = _array(view.buffers()[1])[view.offset * size :][: n * size].reshape(n, side, side, 3)
        return Answer(views, ids.to_numpy().copy(), labels.to_numpy().copy(), bad)


def _array(buffer: pa.Buffer | None) -> np.ndarray:
    """Return memory of Arrow, which nobody else uses, as a writable array: torch takes no other without a warning."""
    if buffer is None or not buffer.size:
        return np.empty(0, np.uint8)
    memory = (ctypes.c_ubyte * buffer.size).from_address(buffer.address)
    memory.owner = buffer  # so that it lives as long
    return np.frombuffer(memory, np.uint8)


class Parts:
    """Decodes parts of the batches of one split with one recipe. Threads may share it.

    `begin` makes a decoder of uint8 views, for parts of so many samples at most.
    """

    def __init__(
        self,
        data: Manifest,
        split: str,
        recipe: Transform,
        reader: SampleReader,
        begin: Callable[[Transform], turbo.Decoder],
    ) -> None:
        self._data, self._split, self._recipe, self._reader, self._begin = data, split, recipe, reader, begin
        self._size = data.recipe.size if data.recipe.crop == "centre" else None

    @cached_property
    def _decoder(self) -> turbo.Decoder:
        return self._begin(self._recipe)

    @property
    def bytes_per_view(self) -> int:
        return self._recipe.decoded**2 * 3

    def require(self, request: Request) -> None:
        """Raise UserError where the split has no such samples."""
        samples = self._data.split(self._split).samples
        if (highest := max((*request.ids, *(request.owners or ())), default=0)) >= samples:
            raise UserError(f"sample {highest}: the split {self._split!r} has {samples}")

    def decode(self, request: Request) -> Answer:
        """Return the views of a part, which `require` has checked.

        Raises BadSample: more samples fail than may; DatasetError: a shard is missing or changed; StorageError.
        """
        bad = BadSamples(self._data, self._split, request.max_bad, request.bad, self._recipe.training, announce=False)
        pictures = Pictures(self._reader, bad, self._recipe, self._size)
        ids = np.array(request.ids, np.int64)
        batch = Batch(request.step, request.epoch, 0, len(ids), ids.copy())
        batch.requested_ids = ids
        batch.crop_owner_ids = None if request.owners is None else np.array(request.owners, np.int64)
        pictures.read(batch)
        job = self._decoder.begin(batch)
        while True:
            try:
                views = self._decoder.finish(job)
            except Undecodable as error:
                pictures.replace(batch, error.positions, UNDECODABLE)
                self._decoder.again(job)
            else:
                return Answer(views, batch.ids, pictures.labels(batch), bad.texts)

    def close(self) -> None:
        """End the decoder; parts that are being decoded raise RuntimeError."""
        self._decoder.close()
