"""Records to views: libjpeg's own pixels, all of them; and the GPU's kernel, by Triton's interpreter and compiler."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from conftest import ROOT, picture, saved
from pipeline.online import yuv
from pipeline.records import KINDS, record_of

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def jpegs(size: int) -> list[bytes]:
    """Pictures of all kinds: smooth, noise, flat, blocks of extreme colours, and one without colour."""
    random = np.random.default_rng(size)
    extreme = random.choice(np.array([0, 255], np.uint8), ((size + 7) // 8, (size + 7) // 8, 3))
    arrays = [
        random.integers(0, 256, (size, size, 3), dtype=np.uint8),
        np.full((size, size, 3), (255, 0, 3), np.uint8),
        np.repeat(np.repeat(extreme, 8, 0), 8, 1)[:size, :size],
    ]
    images = [picture(f"yuv{size}", size, size), *map(Image.fromarray, arrays)]
    stored = [
        saved(image, "JPEG", quality=quality, subsampling="4:2:0") for image in images for quality in (50, 95, 100)
    ]
    return [*stored, saved(images[0].convert("L"), "JPEG")]


def pixels(jpeg: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(jpeg, "RGB")


@pytest.mark.parametrize("size", [16, 17, 32, 227, 255, 256])
def test_records_hold_every_pixel_of_the_decoder(size: int):
    stored = jpegs(size)
    zeros = torch.zeros((len(stored), 2), dtype=torch.int32)
    expected = torch.from_numpy(np.stack([pixels(jpeg) for jpeg in stored]))
    for kind in KINDS:
        records = torch.from_numpy(np.stack([record_of(jpeg, kind, size) for jpeg in stored]))
        views = yuv.cut(records, kind, size, zeros, zeros[:, 0], size)
        assert torch.equal(views, expected), kind
    assert torch.equal(yuv.cut(expected.flatten(1), "pixels", size, zeros, zeros[:, 0], size), expected)


@pytest.mark.parametrize(("size", "side"), [(33, 13), (33, 24), (33, 32), (32, 17)])
def test_windows_and_mirrors_are_those_of_the_picture(size: int, side: int):
    """At each parity of the start, at every edge."""
    last, (jpeg, *_) = size - side, jpegs(size)
    starts = sorted({(top, left) for top in (0, 1, 2, last) for left in (0, 1, last) if max(top, left) <= last})
    start = torch.tensor([each for each in starts for _ in range(2)], dtype=torch.int32)
    flip = torch.tensor([0, 1] * len(starts), dtype=torch.int32)
    whole = pixels(jpeg)
    for kind in KINDS:
        records = torch.from_numpy(record_of(jpeg, kind, size)).repeat(len(start), 1)
        views = yuv.cut(records, kind, size, start, flip, side).numpy()
        for view, (top, left), mirrored in zip(views, start.tolist(), flip.tolist()):
            window = whole[top : top + side, left : left + side]
            assert np.array_equal(view, window[:, ::-1] if mirrored else window), (kind, top, left, mirrored)


def test_every_chroma_becomes_the_colour_that_libjpeg_documents():
    """Each of 256 × 256 chromas fills three by three samples: the four pixels of the middle one have it unmixed."""
    size = 2 * 3 * 256
    luma = np.tile(np.array([[0, 85], [170, 255]], np.uint8), (size // 2, size // 2))
    blue, red = (np.repeat(np.repeat(plane, 3, 0), 3, 1).astype(np.uint8) for plane in np.mgrid[:256, :256])
    record = torch.from_numpy(np.concatenate([luma.ravel(), blue.ravel(), red.ravel()]))[None]
    zeros = torch.zeros((1, 2), dtype=torch.int32)
    view = yuv.cut(record, "yuv420", size, zeros, zeros[:, 0], size)[0].numpy()
    middle = np.stack([view[2 + down :: 6, 2 + across :: 6] for down in (0, 1) for across in (0, 1)])
    y, cb, cr = np.mgrid[0:256:85, -128:128, -128:128]
    shares = ((0, 1.402), (-0.34414, -0.71414), (1.772, 0))  # of Cb and Cr in red, green and blue, by ITU-T T.871
    for channel, (of_cb, of_cr) in enumerate(shares):
        difference = (round(of_cb * 2**16) * cb + round(of_cr * 2**16) * cr + 2**15) // 2**16
        assert np.array_equal(middle[..., channel], np.clip(y + difference, 0, 255)), channel


def test_photographs_are_those_of_the_decoder(shared: Path):
    paths = sorted((shared / "clothing10").rglob("*.jpg"))[::40]
    for path in paths:
        with Image.open(path) as image:
            jpeg = saved(image.convert("RGB").resize((256, 256)), "JPEG", quality=95, subsampling="4:2:0")
        record = torch.from_numpy(record_of(jpeg, "yuv420", 256))[None]
        start = torch.zeros((1, 2), dtype=torch.int32)
        assert np.array_equal(yuv.cut(record, "yuv420", 256, start, start[:, 0], 256)[0].numpy(), pixels(jpeg)), path


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_record_holds_is_refused(kind: str):
    image = picture("refused", 32, 32)
    wrong = {
        "another size": saved(picture("refused", 32, 31), "JPEG"),
        "CMYK": saved(image.convert("CMYK"), "JPEG"),
        "cut short": saved(image, "JPEG")[:-200],
        "no picture": b"\xff\xd8 not a picture",
        "of another kind": saved(image, "PNG"),
    }
    if kind == "yuv420":
        wrong |= {name: saved(image, "JPEG", subsampling=name) for name in ("4:4:4", "4:2:2")}
    for name, jpeg in wrong.items():
        with pytest.raises(ValueError, match=r"\w"):
            print(name, record_of(jpeg, kind, 32))


# ---- the kernel ----


@needs_triton
def test_the_kernel_gives_the_same_bits_in_the_interpreter():
    """Every layout, dtype and mean; it compares what it gives with `yuv.cut` and `normalise` itself."""
    line = [sys.executable, str(Path(__file__).with_name("interpreted.py"))]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT, env=ENVIRONMENT)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 100_000  # values that were compared


@needs_triton
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("kind", ["rgb", "yuv420", "pixels"])
def test_the_kernel_compiles_for_gpus(kind: str, architecture: int, tmp_path: Path):
    """What the loader uses; without a GPU. No operations are contracted, and nothing is kept outside registers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipeline.online import kernel

    tensors = {"records": "*u8", "start": "*i32", "flip": "*i32", "offset": "*fp32", "factor": "*fp32"}
    for dtype, pointer, centred, side in (
        (torch.bfloat16, "*bf16", 1, 224),
        (torch.float32, "*fp32", 2, 224),
        (torch.uint8, "*u8", 0, 256),
    ):
        constants = kernel.constants(kind, 256, side, dtype, centred)
        signature = tensors | {"deviation": "*fp32", "out": pointer, "step": "i32"}
        source = ASTSource(kernel._kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=kernel.OPTIONS)
        assert "fma" not in compiled.asm["ptx"]
        assert ("cvt.rn.bf16.f32" in compiled.asm["ptx"]) == (dtype == torch.bfloat16)  # to the nearest
        (tmp_path / "cubin").write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.check_output([tool, "--dump-resource-usage", tmp_path / "cubin"], text=True)
        (registers,), (stack,) = (re.findall(rf"{name}:(\d+)", usage) for name in ("REG", "STACK"))
        assert int(registers) <= 128, usage
        assert int(stack) == 0, usage
