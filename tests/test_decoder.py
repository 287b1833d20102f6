"""Decoders: the CPU's against Pillow and DALI, byte for byte; what does not decode; memory; the graph of GPUs."""

import gc
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from conftest import ROOT, picture, saved
from pipeline import manifest
from pipeline.online import Loader, graph, turbo
from pipeline.online.augment import AlexNet, ViewOptions
from pipeline.online.batch import Batch, Crops, Transform, Undecodable
from pipeline.online.normalise import Normaliser
from pipeline.online.plain import ImageNet
from reference import jpeg_pixels
from stored import decoded, jpegs

CPU = torch.device("cpu")


def odd_pictures() -> list[bytes]:
    """JPEGs of every chroma subsampling, progressive, grey, and sides of all remainders, 256 pixels and more."""
    options = [
        *({"subsampling": subsampling, "quality": 60 + 19 * subsampling} for subsampling in (0, 1, 2)),
        {"progressive": True, "optimize": True},
    ]
    made = [saved(picture(f"odd{i}", 256 + i, 290 - i), "JPEG", **options[i % 4]) for i in range(16)]
    return [*made, saved(picture("grey", 300, 260).convert("L"), "JPEG")]


def drawn_crops(recipe: Transform, pictures: list[bytes]) -> Crops:
    sizes = np.array([jpeg_pixels(data).shape[:2] for data in pictures])
    return recipe.crops(0, 0, np.arange(len(pictures)), None, sizes)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_cpus_views_are_those_of_dali(dataset: Path, threads: int):
    """Crop boxes, mirrored or not, of stored and of odd pictures; the whole picture, of which several are cut."""
    pictures, statistics = [*jpegs(dataset, "train"), *odd_pictures()], manifest.load(dataset).statistics()
    recipes: list[Transform] = [AlexNet(ViewOptions(view=view), statistics, 256, 3) for view in (224, 223, 57, 22)]
    for recipe in (*recipes, AlexNet(ViewOptions(views="ten"), statistics, 256, 3), ImageNet("centre")):
        crops, n = drawn_crops(recipe, pictures), len(pictures)
        cpu = turbo.Decoder(recipe, False, n, threads)
        dali = graph.Decoder((CPU,), graph.GraphOptions(recipe.decoded, threads=2), n, False)
        views = decoded(cpu, pictures, crops)
        assert views.shape == (n, recipe.decoded, recipe.decoded, 3)
        assert (views == decoded(dali, pictures, crops)).all()
        cpu.close()
    assert set(crops.flip.tolist()) == {0}  # centre views
    assert set(drawn_crops(recipes[0], pictures).flip.tolist()) == {0, 1}


def test_resized_views_are_torchvisions(dataset: Path):
    """RandomResizedCrop and RandomHorizontalFlip of Pillow's images: crop, then resize, then mirror; bit for bit.

    DALI, on a GPU, resizes in one step in float, Pillow in two with 8 bits between; both antialias with a triangle.
    """
    whole = [saved(picture(f"whole{i}", *size), "JPEG", quality=95) for i, size in enumerate([(256, 900), (640, 256)])]
    pictures = [*jpegs(dataset, "train"), *whole]
    recipe = ImageNet("random", 4)
    crops, n = drawn_crops(recipe, pictures), len(pictures)
    expected = []
    for data, (top, left), (height, width), flip in zip(pictures, crops.start, crops.shape, crops.flip):
        box = Image.fromarray(jpeg_pixels(data)).crop((left, top, left + width, top + height))
        view = box.resize((224, 224), Image.Resampling.BILINEAR)
        expected.append(np.asarray(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view))
    views, normal = (decoded(turbo.Decoder(recipe, normal, n, 2), pictures, crops) for normal in (False, True))
    assert (views == expected).all()
    levels = (views - crops.offset[:, None, None]) * (np.float32(1) / crops.std)[:, None, None]
    assert normal.dtype == levels.dtype == np.float32
    assert (normal == levels.transpose(0, 3, 1, 2)).all()
    options = graph.GraphOptions(224, resize=True, threads=2)
    difference = decoded(graph.Decoder((CPU,), options, n, False), pictures, crops).astype(float) - expected
    assert np.abs(difference).mean() < 0.5  # grey levels
    assert (difference**2).mean((1, 2, 3)).max() < 255**2 / 10**5  # 50 dB


def test_what_does_not_decode_is_known_by_its_position(dataset: Path):
    """The CPU's decoder and DALI's; the rest of the batch, and the batches after it, come as they are."""
    good, recipe = jpegs(dataset, "train"), AlexNet(ViewOptions(), manifest.load(dataset).statistics(), 256, 3)
    bad = {
        1: good[1][:-400],  # cut
        2: good[2][:300] + b"no JPEG" * 99,
        3: b"",
        5: saved(picture("cmyk", 256, 256).convert("CMYK"), "JPEG"),
        7: saved(picture("small", 230, 230), "JPEG"),  # the crop box is outside
        8: saved(picture("png", 256, 256), "PNG"),
    }
    pictures = [bad.get(i, data) for i, data in enumerate(good[:9])]
    crops = recipe.crops(0, 0, np.arange(9), None, np.full((9, 2), 256))
    crops.start[7] = 10
    expected = decoded(turbo.Decoder(recipe, False, 9, 1), good[:9], crops)
    for decoder in (
        turbo.Decoder(recipe, False, 9, 2),
        graph.Decoder((CPU, CPU), graph.GraphOptions(224), 9, False),
    ):
        batches = []
        for step, data in enumerate((pictures, good[:9])):
            batches.append(Batch(step, 0, 0, 9, np.arange(9)))
            batches[-1].jpegs, batches[-1].crops = [np.frombuffer(jpeg, np.uint8) for jpeg in data], crops
            decoder.submit(batches[-1])
        with pytest.raises(Undecodable) as caught:
            decoder.result()
        assert caught.value.positions == list(bad)
        assert caught.value.batch is batches[0]
        for i in bad:
            batches[0].jpegs[i] = np.frombuffer(good[i], np.uint8)
        decoder.retry()
        for batch in batches:
            decoded_batch, (views, *_) = decoder.result()
            assert decoded_batch is batch
            assert (views.numpy() == expected).all()
        decoder.close()


@pytest.mark.parametrize("replicate", [False, True])
def test_devices_share_out_a_batch_or_decode_all_of_it(dataset: Path, replicate: bool):
    """Batches of 3, 1 and 0 samples, on one device and on two: parts may be empty; the order is kept."""
    pictures, recipe = jpegs(dataset, "train"), AlexNet(ViewOptions(), manifest.load(dataset).statistics(), 256, 3)
    decoders = [graph.Decoder((CPU,) * n, graph.GraphOptions(224), 3, replicate) for n in (1, 2)]
    for decoder in (*decoders, cpu := turbo.Decoder(recipe, False, 3, 2)):
        for step, n in enumerate((3, 1, 0)):
            batch = Batch(step, 0, 0, n, np.arange(n))
            batch.jpegs = [np.frombuffer(data, np.uint8) for data in pictures[:n]]
            batch.crops = recipe.crops(step, 0, batch.ids, None, np.full((n, 2), 256))
            decoder.submit(batch)
    for step, n in enumerate((3, 1, 0)):
        (one, (whole,)), (other, views) = (decoder.result() for decoder in decoders)
        assert (one.step, other.step, len(whole), len(views)) == (step, step, n, 2)
        assert all(torch.equal(view, whole) for view in views)
        assert torch.equal(cpu.result()[1][0], whole)


GPU_OPTIONS = [
    graph.GraphOptions(224, threads=3, hardware_share=0.0),
    graph.GraphOptions(224, resize=True),
    graph.GraphOptions(224, size=256),
    graph.GraphOptions(224, size=256, whole=True, hardware_share=0.65),
]


@pytest.mark.parametrize("options", GPU_OPTIONS, ids=["slice", "resize", "hints", "whole"])
def test_dalis_graph_of_a_gpu_takes_its_arguments(monkeypatch: pytest.MonkeyPatch, options: graph.GraphOptions):
    """Names and types of arguments are checked where a graph is constructed, which needs no GPU, unlike its build."""
    built, decoders = [], {}
    monkeypatch.setattr(Pipeline, "build", lambda pipeline: built.append(pipeline))
    for name in ("image", "image_slice"):
        function = getattr(fn.decoders, name)
        monkeypatch.setattr(
            fn.decoders,
            name,
            lambda *inputs, f=function, n=name, **words: decoders.update({n: words}) or f(*inputs, **words),
        )
    graph.Graph(options, 8, torch.device("cuda:0"))
    assert [pipeline.device_id for pipeline in built] == [0]
    ((name, words),) = decoders.items()
    assert (name, words["device"]) == ("image" if options.whole else "image_slice", "mixed")
    assert words["hw_decoder_load"] == options.hardware_share
    assert {words[f"preallocate_{side}_hint"] for side in ("width", "height")} == {options.size}


@pytest.mark.parametrize("devices", [1, 2])
def test_whole_pictures_are_the_decoders_and_their_views_the_same(dataset: Path, devices: int):
    """Records of kind "pixels", also of a batch of one and of none; what has another size is named, as what is bad."""
    recipe = AlexNet(ViewOptions(), manifest.load(dataset).statistics(), 256, 3)
    pictures = [*jpegs(dataset, "train")[:5], saved(picture("grey", 256, 256).convert("L"), "JPEG")]
    crops = drawn_crops(recipe, pictures)
    options = graph.GraphOptions(224, size=256, whole=True, threads=2)
    decoder = graph.Decoder((CPU,) * devices, options, 6, False)
    batch = Batch(0, 0, 0, 6, np.arange(6))
    batch.jpegs, batch.crops = [np.frombuffer(data, np.uint8) for data in pictures], crops
    decoder.submit(batch)
    _, (records, *_) = decoder.result()
    assert batch.kind == "pixels"
    assert (records.numpy() == np.stack([jpeg_pixels(jpeg).reshape(-1) for jpeg in pictures])).all()
    normaliser = Normaliser(recipe, (CPU,), "uint8", 256)
    views = normaliser.images(batch, *normaliser.prepare(batch, [records]), CPU).permute(0, 2, 3, 1)
    assert (views.numpy() == decoded(turbo.Decoder(recipe, False, 6, 1), pictures, crops)).all()
    assert decoded(decoder, pictures[:1], crops[:1]).shape == (1, 256 * 256 * 3)
    assert decoded(decoder, [], crops[:0]).shape == (0, 256 * 256 * 3)
    large, small = (saved(picture("large", side, side), "JPEG") for side in (257, 240))
    for bad, positions in (([large], [0]), ([pictures[0], small, b"", pictures[1], large], [1, 2, 4])):
        with pytest.raises(Undecodable) as caught:
            decoded(decoder, bad, crops[: len(bad)])
        assert caught.value.positions == positions
        caught.value.batch.jpegs[:] = [np.frombuffer(pictures[0], np.uint8)] * len(bad)
        decoder.retry()
        assert len(decoder.result()[1]) == devices
    decoder.close()


def test_memory_is_used_again_once_a_batch_is_gone(dataset: Path):
    with Loader(dataset, batch_size=8, threads=2) as loader:
        kept = list(islice(loader, 12))
        copies = [batch.images.clone() for batch in kept]
        more = [next(loader).images.data_ptr() for _ in range(20)]
        assert all(torch.equal(batch.images, copy) for batch, copy in zip(kept, copies))
        assert not {batch.images.data_ptr() for batch in kept} & set(more)
        assert len(set(more)) < 10
        view = kept[0].images[3, 1, 5:, 7:]  # part of a batch keeps all of it
        expected = view.clone()
        del kept
        gc.collect()
        for _ in range(20):
            next(loader)
        assert torch.equal(view, expected)


def test_a_cpu_needs_no_dali(dataset: Path):
    code = f"""
import sys
from pipeline.online import Loader
with Loader({str(dataset)!r}, batch_size=8) as loader:
    next(loader)
print([name for name in sys.modules if name.startswith("nvidia")])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
