"""The tiers that a data set has, the one to begin with, and the decoder of each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pipeline import UserError, storage
from pipeline.manifest import DatasetError, Manifest
from pipeline.online import tiers, turbo
from pipeline.online.batch import Transform
from pipeline.online.prefetch import Decoder
from pipeline.online.samples import SampleReader
from pipeline.online.tuner import Setting
from pipeline.records import KINDS, fingerprint
from pipeline.tier import Tier, build_command, folder, load

TIERS = ("auto", "jpeg", "raw", "device")
RESERVE = 12 * 2**30  # bytes of a GPU's free memory that the network is left, where nobody says how many


@dataclass
class Supply:
    """The tiers of a split, on the devices that a loader decodes for, and their decoders.

    jpeg: the shards; raw: records on disk; device: records in the memory of each device, filled as samples are first
    used, the rest from the raw tier or decoded from the shards.
    """

    data: Manifest
    split: str
    recipe: Transform
    devices: tuple[torch.device, ...]  # each once
    reader: SampleReader
    most: int  # samples of a batch
    replicate: bool  # see `graph.Decoder`
    normalised: bool  # a CPU's decoder normalises the views that it cuts
    device_bytes: int | None  # for records, on each device; None: what `_room` says
    told: Callable[[str], None]
    _raw: dict[str, Tier] = field(default_factory=dict)  # by kind
    _resident: tiers.Resident | None = None

    def choose(self, tier: str) -> str:
        """Return the tier to begin with. Raises UserError where the one asked for is not to be had."""
        problem = self._unfit(tier)
        if tier == "jpeg" or (tier == "auto" and problem):
            return "jpeg"
        if problem:
            raise UserError(f"tier={tier!r}: {problem}; take tier='jpeg'")
        problems = [self._find(kind) for kind in self._kinds(tier)]
        if tier == "raw" and not self._raw:
            raise UserError(f"tier='raw': {problems[0]}")
        root = self.data.root
        for kind, problem in zip(self._kinds(tier), problems):
            if problem and isinstance(root, Path) and storage.is_dir(folder(root, kind)):
                self.told(f"not used: {problem}")
        return tier if tier != "auto" else "raw" if self._raw else "jpeg"

    def tunable(self, tier: str) -> tuple[str, ...]:
        """Return the tiers that may take turns, since they give the same bytes; a GPU's JPEG decoder rounds its own."""
        if not self._raw:
            return (tier,)
        if not self._on_gpu:
            return ("jpeg", "raw")
        return ("raw", "device") if "yuv420" in self._raw else ("raw",)

    def decoder(self, setting: Setting) -> Decoder:
        """Return a decoder of the setting's tier; what another tier kept in memory is freed."""
        if setting.tier != "device":
            self._resident = None
        if setting.tier == "jpeg":
            return self._jpeg_decoder(setting)
        kind = "yuv420" if setting.tier == "device" else next(kind for kind in self._kinds("raw") if kind in self._raw)
        records = tiers.Records(self.data, self.split, kind, self._raw.get(kind), self.reader)
        threads = max(setting.threads, setting.readers)  # each reads, too
        if kind == "rgb" and not self._on_gpu:
            return tiers.Decoder(records, self.recipe, self.normalised, self.most, threads)
        resident = self._memory(records.bytes) if setting.tier == "device" else None
        return tiers.RecordDecoder(records, resident, self.recipe, self.most, threads, self.devices)

    @property
    def _on_gpu(self) -> bool:
        return self.devices[0].type == "cuda"

    def _kinds(self, tier: str) -> tuple[str, ...]:
        """Return the kinds of records that suit a tier, the best first: half the bytes, or on a CPU less to compute."""
        if tier == "device":
            return ("yuv420",)
        if self.recipe.resize or (tier == "auto" and not self._on_gpu):
            return ("rgb",)
        return KINDS[::-1] if self._on_gpu else KINDS

    def _unfit(self, tier: str) -> str:
        """Return why no records suit, if they do not."""
        recipe = self.data.recipe
        if recipe.crop != "centre":
            return f"{self.data.root}: built with --crop none, of pictures that differ in size"
        if self.recipe.resize and (self._on_gpu or tier == "device"):
            return "recipe='imagenet' resizes its views, which takes decoded JPEGs, or tier='raw' on a CPU"
        if tier == "device" and recipe.subsampling != "4:2:0":
            return f"{self.data.root}: stored with {recipe.subsampling}, and a device keeps pictures of 4:2:0"
        return ""

    def _find(self, kind: str) -> str:
        """Load the raw tier of a kind; return why it is of no use, if it is of none."""
        try:
            tier = load(self.data, kind)
        except DatasetError as error:
            return str(error)
        if tier.codec != fingerprint(kind):
            reason = "decoded by a codec that gives other pixels than this machine's"
            return f"{tier.root}: {reason}; make it anew: {build_command(self.data, kind)}"
        self._raw[kind] = tier
        return ""

    def _jpeg_decoder(self, setting: Setting) -> Decoder:
        if not self._on_gpu:
            return turbo.Decoder(self.recipe, self.normalised, self.most, setting.threads)
        from pipeline.online import graph  # slow, and a CPU has no need of DALI

        recipe = self.recipe
        options = graph.GraphOptions(recipe.decoded, recipe.resize, setting.threads, setting.hardware_share)
        return graph.Decoder(self.devices, options, self.most, self.replicate)

    def _memory(self, record: int) -> tiers.Resident:
        """Return the records in the memory of the devices; tell how many samples it has room for."""
        if self._resident is None:
            samples = self.data.split(self.split).samples
            room = min(map(_room, self.devices)) if self.device_bytes is None else self.device_bytes
            while self._resident is None:
                fit = min(samples, room // record)
                try:
                    self._resident = tiers.Resident(self.devices, fit, record)
                except torch.OutOfMemoryError:  # what is free need not be in one piece
                    room //= 2
            source = f"{folder(Path(), 'yuv420')} on disk" if self._raw else "the shards"
            rest = "" if fit == samples else f", the rest from {source}: {samples * record:,} bytes would hold all"
            where = " and ".join(map(str, self.devices))
            self.told(f"tier device: {fit:,} of {samples:,} samples fit in {room:,} bytes of {where}{rest}")
        return self._resident


def _room(device: torch.device) -> int:
    """Return the bytes that records may take: of a GPU's free memory all but `RESERVE`, of the host's the half."""
    if device.type == "cuda":
        return max(0, torch.cuda.mem_get_info(device)[0] - RESERVE)
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 // 2 for line in file if line.startswith("MemAvailable"))
