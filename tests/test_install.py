"""Environments and images hold what constraints.txt pins; the wheel has one package, whose command works anywhere."""

import ast
import importlib.metadata
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import httpx
import PIL
import pytest
from click.testing import CliRunner
from PIL import features

from conftest import ROOT, normal, pins, until
from penstock import __version__
from penstock.__main__ import COMMANDS, SERVICE, TOOLS, load
from penstock.__main__ import main as penstock

CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
SETUP = SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


def test_pillow_simd_is_the_only_pillow():
    assert importlib.metadata.version("pillow-simd") == PIL.__version__ == pins()["pillow-simd"]
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("pillow")
    assert all(features.check(name) for name in ("jpg", "zlib", "webp", "libtiff", "freetype2"))


def test_everything_installed_has_its_exact_version_in_constraints():
    pinned = pins()  # `path`: Ray puts a folder of its own on sys.path when it is imported
    for dist in importlib.metadata.distributions(path=[sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]):
        if '"editable": true' not in (dist.read_text("direct_url.json") or ""):  # this project
            assert pinned.get(normal(dist.name)) == dist.version.partition("+")[0], dist.name


def test_pillow_simd_was_compiled_for_the_processor():
    """tools/setup.sh notes how it compiled; without AVX2 bicubic rescaling is about half as fast."""
    note = ROOT / ".venv" / "pillow-simd.built"
    if not note.exists():
        pytest.skip("not installed by tools/setup.sh")
    has_avx2 = "avx2" in Path("/proc/cpuinfo").read_text().split()
    assert ("-mavx2" in note.read_text()) == has_avx2


def names(lines: list[str]) -> set[str]:
    return {normal(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in lines}


def required(target: str) -> set[str]:
    """Return the names of the distributions that an image of docker/ installs."""
    line = [sys.executable, "docker/requirements.py", target]
    return names(subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=True).stdout.splitlines())


def test_images_hold_pinned_packages_that_their_commands_need():
    assert re.search(r"^ARG BASE=debian:[a-z]+-\d{8}-slim$", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    everything = [line for extra in extras if extra != "dev" for line in extras[extra]]
    assert required("train") == names(project["dependencies"] + everything)
    assert required("build") < required("train") <= set(pins())
    lacking = required("train") - required("build")
    assert {"torch", "nvidia-dali-cuda130"} <= lacking
    imported = {"nvidia-dali-cuda130": "nvidia", "faiss-cpu": "faiss"}
    blocked = sorted(imported.get(name, name) for name in lacking)
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); sys.argv = ['build_shards.py', '--help']\n"
    code += "import runpy; runpy.run_path('tools/build_shards.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def output(*words: str) -> str:
    return CliRunner().invoke(penstock, words, prog_name="penstock").output


def test_help_lists_each_command_with_the_beginning_of_its_own_help():
    listed = output("--help").partition("Commands:\n")[2]
    assert [line.split()[0] for line in listed.splitlines()] == [*TOOLS, *SERVICE, *COMMANDS]
    for name, line in (TOOLS | SERVICE | COMMANDS).items():
        assert line in listed
        assert (load(name).help or "").startswith(line.rstrip("."))
        assert output(name, "--help").startswith(f"Usage: penstock {name} [OPTIONS]")


def test_imports_are_rewritten_and_nothing_else_is():
    source = """
import os, pipeline.files as files
from pipelines import x
def f():
    from tools.a import (b,
        c)  # from tools.a import b
    import trainer as t; from trainer import u
    return 'from pipeline import cli', pipeline.files
"""
    expected = source.replace("pipeline.files as", "penstock.pipeline.files as").replace(
        "    from t", "    from penstock.t"
    )
    expected = expected.replace("import trainer as t; from t", "import penstock.trainer as t; from penstock.t")
    assert SETUP.rewrite(source, "m.py") == expected
    with pytest.raises(ValueError, match=r"m\.py:1: write `import pipeline\.files as NAME`"):
        SETUP.rewrite("import pipeline.files", "m.py")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout, in which a wheel was built before."""
    source = tmp_path_factory.mktemp("source")
    for name in ("penstock", "pipeline", "trainer", "tools", "tests", "docker"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "penstock_imagenet.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    stale = source / "build" / "lib" / "penstock" / "pipeline" / "stale.py"  # of an earlier wheel
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    return source


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_environment(tmp_path_factory.mktemp("environment"), wheel)


def new_environment(folder: Path, *installed: object) -> Path:
    """Make a virtual environment whose other packages are those of this one, without what their .pth files do."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    pip("--python", folder / "bin/python", "install", "--no-deps", "--ignore-installed", *installed)
    return folder


def pip(*words: object) -> None:
    line = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *map(str, words), "--no-index"]
    done = subprocess.run(line, capture_output=True, text=True, env=CLEAN, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run(environment: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a program of the environment from a folder that has nothing of ours."""
    (environment / "elsewhere").mkdir(exist_ok=True)
    line = [str(environment / "bin" / str(words[0])), *map(str, words[1:])]
    folder = environment / "elsewhere"
    return subprocess.run(line, capture_output=True, text=True, cwd=folder, env=CLEAN, check=False, timeout=300)


@pytest.mark.proof
def test_a_wheel_has_one_package_and_imports_nothing_by_the_names_of_the_checkout(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        info = f"penstock_imagenet-{__version__}.dist-info"
        assert archive.read(f"{info}/top_level.txt").split() == [b"penstock", b"penstock_imagenet"]
        assert {name.partition("/")[0] for name in names} == {"penstock", "penstock_imagenet.py"}
        assert {name.split("/")[1] for name in names if name.count("/") > 1} == {"pipeline", "trainer", "tools"}
        assert not {name for name in names if "bench/" in name or "stale" in name or name.endswith("demo.py")}
        recipes = {path.name for path in ROOT.glob("trainer/re*/*.toml")}  # and experiments, of trainer/reproduce
        assert {Path(name).name for name in names if name.endswith(".toml")} == recipes
        for name in names:
            for node in ast.walk(ast.parse(archive.read(name))) if name.endswith(".py") else ():
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                modules += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
                roots = {module.partition(".")[0] for module in modules}
                assert not roots & {"pipeline", "trainer", "tools", "tests"}, name


@pytest.mark.proof
def test_the_command_works_from_any_folder(environment: Path):
    def ok(*words: object) -> str:
        done = run(environment, "penstock", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert ok("--version") == f"penstock, version {__version__}\n"
    assert "make-raw" in ok("--help")
    ok("make-raw", "raw", "--classes", 2, "--train", 20, "--val", 2)
    built = ok("build", "raw", "dataset", "--samples-per-shard", 8, "--workers", 2)
    assert "40 train, 4 val, 2 classes" in built
    assert "all holds" in ok("verify", "dataset", "--workers", 2)
    assert ok("train", "--help").startswith("Usage: penstock train [OPTIONS]")
    one_step = ("--set", "train.steps=1", "--set", "train.batch_size=4", "--devices", "cpu,cpu")
    ok("train", "--data", "dataset", "--recipe", "tiny", "--out", "run", *one_step)
    outside = "import importlib.util as u; assert not any(map(u.find_spec, ('pipeline', 'trainer', 'tools')))"
    assert run(environment, "python", "-c", outside).returncode == 0
    code = "import sys, atexit; atexit.register(lambda: print('torch' in sys.modules)); sys.argv[1:] = ['--help']\n"
    done = run(environment, "python", "-c", code + "from penstock_imagenet import main; main()")
    assert (done.returncode, done.stdout.splitlines()[-1], done.stderr) == (0, "False", "")


@pytest.mark.proof
def test_the_server_works_from_any_folder(environment: Path, tmp_path: Path):
    """Its pages and their files are installed, and so is what its jobs run."""
    raw = tmp_path / "raw"
    assert run(environment, "penstock", "make-raw", raw, "--classes", 2, "--train", 20, "--val", 2).returncode == 0
    line = [environment / "bin/penstock", "serve", "--root", tmp_path / "site", "--raw-root", raw, "--port", 0]
    words, pipe = [str(word) for word in line], subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path, env=CLEAN) as server:
        try:
            assert server.stdout
            url = server.stdout.readline().partition(" at ")[2].split()[0]
            page = httpx.get(url, headers={"Accept": "text/html"})
            assert page.status_code == 200
            for name in re.findall(r'(?:href|src)="(/static/[^"]+)"', page.text):
                assert httpx.get(url + name).status_code == 200
            job = httpx.post(f"{url}/v1/jobs", json={"kind": "build", "dataset": "d", "raw": str(raw)}).json()
            until(server, lambda: bool(httpx.get(f"{url}/v1/jobs/{job['id']}").json()["ended"]))
            assert httpx.get(f"{url}/v1/jobs/{job['id']}").json()["state"] == "succeeded"
            split = httpx.get(f"{url}/v1/datasets/d").json()["splits"]["train"]
            assert split["samples"] + split["skipped"] == 40
        finally:
            server.terminate()
    assert server.returncode == 128 + signal.SIGTERM


@pytest.mark.proof
def test_a_package_of_another_distribution_is_named(environment: Path):
    """In the place of ours, and removed again."""
    (path,) = environment.glob("lib/python*/site-packages/penstock/__init__.py")
    ours = path.read_bytes()
    path.write_text('"""A flow tracer."""\n')
    for fault in (f"{path}: belongs to", "the package penstock lacks its __init__.py, which"):
        done = run(environment, "penstock", "--help")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert done.stderr.startswith(f"Error: {fault} another distribution called penstock")
        assert "`pip uninstall penstock`" in done.stderr
        done = run(environment, "python", "-c", "from penstock.pipeline.online import Loader")
        assert done.stderr.splitlines()[-1].startswith(f"ImportError: {fault} another distribution")
        path.unlink(missing_ok=True)
    path.write_bytes(ours)


@pytest.mark.proof
def test_an_editable_install_has_the_command_and_the_packages_of_the_checkout(source: Path, tmp_path: Path):
    environment = new_environment(tmp_path / "environment", "--no-build-isolation", "--editable", source)
    assert run(environment, "penstock", "--version").stdout == f"penstock, version {__version__}\n"
    code = "import pipeline, trainer, tools; print(pipeline.__file__)"
    assert run(environment, "python", "-c", code).stdout == f"{source}/pipeline/__init__.py\n"
