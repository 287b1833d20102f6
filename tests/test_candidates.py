"""Candidates for the step: kernels in Triton's interpreter and compiler; the update has the bits of the trainer's."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from networks import drawn, narrow
from trainer.optim import Momentum, Schedule
from trainer.parallel import TwoColumnNet

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
LRN = (1, 1, 0, 55 * 55, 48, 2)  # of conv1 of the original: stride, length and half of either axis
RNORM = (27, 27, 2, 1, 27, 2)  # of conv2
POOL = (48, 55, 55, 27, 27, 3, 2)  # of conv1 in channels last
KERNELS = {  # types of the arguments, and constants
    "lrn": ("_normalise", ("*bf16", "*bf16", "*fp32", "i32", "fp32", "fp32"), LRN),
    "rnorm": ("_normalise", ("*fp32", "*fp32", "*fp32", "i32", "fp32", "fp32"), RNORM),
    "lrn-backward": ("_normalise_backward", ("*bf16", "*fp32", "*bf16", "*bf16", "i32", "fp32"), LRN),
    "rnorm-backward": ("_normalise_backward", ("*fp32", "*fp32", "*fp32", "*fp32", "i32", "fp32"), RNORM),
    "pool": ("_pool", ("*bf16", "*bf16", "*u8", "i32"), POOL),
    "pool-backward": ("_pool_backward", ("*u8", "*bf16", "*bf16", "i32"), POOL),
}


def test_the_kernels_are_the_trainers_functions_in_the_interpreter():
    """Forward and backward, within 2·10⁻⁶, pixels hanging over and ties of windows included."""
    line = [sys.executable, str(Path(__file__).with_name("interpreted_step.py"))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 5_000  # values that were compared


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_compile_for_gpus(name: str, architecture: int, tmp_path: Path):
    """Without a GPU, at sides of the original; nothing is kept outside registers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tools.bench import candidates

    function, types, numbers = KERNELS[name]
    kernel = getattr(candidates, function)
    signature = dict(zip(kernel.arg_names, (*types, *["constexpr"] * (len(numbers) + 1)), strict=True))
    constants = dict(zip(kernel.arg_names[len(types) :], (*numbers, candidates.BLOCK), strict=True))
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", architecture, 32))
    (tmp_path / "cubin").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.check_output([tool, "--dump-resource-usage", tmp_path / "cubin"], text=True)
    (registers,), (stack,) = (re.findall(rf"{word}:(\d+)", usage) for word in ("REG", "STACK"))
    assert int(registers) <= 128, usage
    assert int(stack) == 0, usage


def test_the_update_of_many_tensors_at_once_has_the_trainers_bits():
    """With drops of single layers, other rates of biases, a layer without decay, and one that is frozen later."""
    from tools.bench.candidates import ForeachMomentum

    overrides = ("optim.layers.conv1={drops=[1], frozen_from=2}", "optim.layers.fc6={lr=0.5, decay=0.0}")
    recipe, cpu = narrow("original", *overrides, "train.epochs=4"), torch.device("cpu")
    schedule = Schedule(recipe, 4)
    networks = [TwoColumnNet(recipe.model, 7, (cpu, cpu)) for _ in range(2)]
    for network in networks:
        network.load(drawn(recipe.model, 7, torch.float32))
    one, other = (each(network.parts(), 0.9) for each, network in zip((Momentum, ForeachMomentum), networks))
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        pairs = [(w, part[name]) for own, part in zip(one.parts, other.parts) for name, w in own.items()]
        for tensors in pairs:
            gradient = torch.randn(tensors[0].shape, generator=generator)
            for w in tensors:
                w.grad = gradient.clone()
        for optimiser in (one, other):
            optimiser.step(schedule.rates(step))
        for ours, theirs in zip([*other.parts, *other.velocity], [*one.parts, *one.velocity]):
            assert all(torch.equal(ours[name], value) for name, value in theirs.items())
        assert [w.grad is None for w in other.parts[0].values()] == [w.grad is None for w in one.parts[0].values()]
    assert schedule.rates(3)["conv1"].frozen
    assert not torch.equal(one.parts[0]["fc6.weight"], drawn(recipe.model, 7, torch.float32)["fc6.weight"][:32])
