"""One batch decoded on one device or on several, each of which then has all of it."""

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from pipeline.online.graph import Graph, GraphOptions, undecodable
from pipeline.online.order import part
from pipeline.online.sequence import Prepared


class Decoder:
    """Prepared batches in, views on every device out, in the same order.

    With several devices each decodes its part of a batch, and the parts are exchanged from device to device; or each
    decodes everything (`replicate`).
    """

    def __init__(
        self, devices: tuple[torch.device, ...], options: GraphOptions, most: int, replicate: bool = False
    ) -> None:
        self._devices, self._options, self._replicate = devices, options, replicate
        self._most = max(1, most if replicate else part(most, 0, len(devices)).stop)
        self._streams = [torch.cuda.Stream(device) if device.type == "cuda" else None for device in devices]
        self._inside: deque[Prepared] = deque()
        self._stopped = False
        self._graphs = self._built()

    def submit(self, batch: Prepared) -> None:
        """Begin to decode a batch; it may be empty."""
        self._inside.append(batch)
        self._feed(batch)

    @contextmanager
    def streams(self) -> Iterator[None]:
        """Streams of our own on every GPU, for `result` and what is made of it: ready there when the context ends."""
        streams = [stream for stream in self._streams if stream is not None]
        with ExitStack() as stack:
            for stream in streams:
                stack.enter_context(torch.cuda.stream(stream))
            yield
            for stream in streams:
                stream.synchronize()

    @property
    def oldest(self) -> Prepared:
        """The batch that `result` gives next."""
        return self._inside[0]

    def result(self) -> tuple[Prepared, list[Tensor]]:
        """The oldest batch, and its views on each device, ready there: uint8 (n, h, w, 3), or float32 (n, 3, h, w).

        Raises:
            RuntimeError: it does not decode; `replace` it, or be done with this decoder.
        """
        batch = self.oldest
        parts = [
            graph.result(self._streams[i]) if self._places(i, batch) else self._none(self._devices[i])
            for i, graph in enumerate(self._graphs)
        ]
        if len(parts) > 1 and not self._replicate:
            parts = [torch.cat([part.to(device, non_blocking=True) for part in parts]) for device in self._devices]
        self._inside.popleft()
        return batch, parts

    def undecodable(self) -> list[int]:
        """The places of the oldest batch whose samples do not decode; none when told to stop."""
        batch, device_id = self._inside[0], _device_id(self._devices[0])
        return undecodable(batch.jpegs, batch.windows, self._options, device_id, lambda: self._stopped)

    def stop(self) -> None:
        """Let a search for what does not decode end."""
        self._stopped = True

    def close(self) -> None:
        """Free the graphs, and what they hold."""
        self._graphs = []
        self._inside.clear()

    def replace(self, batch: Prepared) -> None:
        """Another batch in place of the oldest, which failed: with graphs made anew, as DALI's are of no use then."""
        self._inside[0] = batch
        self._graphs = []  # before others are made: a GPU may not have room for both
        self._graphs = self._built()
        for each in self._inside:
            self._feed(each)

    def _built(self) -> list[Graph]:
        return [Graph(self._options, self._most, _device_id(device)) for device in self._devices]

    def _feed(self, batch: Prepared) -> None:
        for i, graph in enumerate(self._graphs):
            if places := self._places(i, batch):
                graph.submit(batch.jpegs[places.start : places.stop], batch.windows[places.start : places.stop])

    def _places(self, graph: int, batch: Prepared) -> range:
        """The places of the batch that a graph decodes."""
        n = len(batch.ids)
        return range(n) if self._replicate else range(n)[part(n, graph, len(self._graphs))]

    def _none(self, device: torch.device) -> Tensor:
        side = self._options.view
        if self._options.normalised:
            return torch.empty((0, 3, side, side), device=device)
        return torch.empty((0, side, side, 3), dtype=torch.uint8, device=device)


def _device_id(device: torch.device) -> int | None:
    return None if device.type == "cpu" else device.index or 0
