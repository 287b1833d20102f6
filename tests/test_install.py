"""What is installed is what constraints.txt says, and Pillow-SIMD stands alone."""

import importlib.metadata
import re
import sysconfig
from pathlib import Path

import PIL
import pytest
from PIL import features

from conftest import ROOT


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {normal(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}


def installed() -> dict[str, str]:
    """Versions by name; of this environment alone, for Ray puts a folder of its own on sys.path when it is imported."""
    found = importlib.metadata.distributions(path=[sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    return {normal(dist.name): dist.version.partition("+")[0] for dist in found}


def test_pillow_simd_is_the_only_pillow():
    assert "pillow-simd" in installed()
    assert "pillow" not in installed()
    assert PIL.__version__ == pins()["pillow-simd"]
    assert all(features.check(name) for name in ("jpg", "zlib", "webp", "libtiff", "freetype2"))


def test_everything_installed_has_its_exact_version_in_constraints():
    pinned = pins()
    for name, version in installed().items():
        if name != "penstock":
            assert pinned.get(name) == version, name


def test_pillow_simd_was_compiled_for_the_processor():
    """tools/setup.sh notes how it compiled; without AVX2 bicubic rescaling is about half as fast."""
    note = ROOT / ".venv" / "pillow-simd.built"
    if not note.exists():
        pytest.skip("not installed by tools/setup.sh")
    has_avx2 = "avx2" in Path("/proc/cpuinfo").read_text().split()
    assert ("-mavx2" in note.read_text()) == has_avx2
