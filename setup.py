"""Build a wheel in which the checkout's packages are subpackages of `penstock`; pyproject.toml has everything else.

Packages named `tools` or `trainer` in site-packages would collide with everybody's. So a wheel has `pipeline` as
`penstock.pipeline`, and its absolute imports are rewritten while it is built: at run time nothing is special, and
processes that are spawned import by the same names. An editable install (`make setup`) has the checkout as it is.
"""

import ast
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

PACKAGES = ("pipeline", "trainer", "tools")
DEVELOPERS = ("tools.bench", "tools.bench.*")  # not installed
CHECKOUT = [*find_packages(include=[f"{name}*" for name in PACKAGES], exclude=DEVELOPERS), "trainer.recipes"]
LEFT_OUT = {("penstock.tools", "demo")}  # which runs the commands of the checkout
GUARD = "\n\nimport penstock_imagenet\n\npenstock_imagenet.require_ours()\n"


def rewrite(source: str, path: str) -> str:
    """Return a module's source with its imports of PACKAGES as imports of `penstock`.

    Raises:
        ValueError: an `import NAME.MODULE` that would bind another name than before.
    """
    lines = source.splitlines(keepends=True)
    for line, column in sorted(_imports(ast.parse(source), path), reverse=True):
        text = lines[line - 1]
        prefix = re.match(r"from\s+|", text[column:])[0]  # type: ignore[index]
        lines[line - 1] = text[:column] + prefix + "penstock." + text[column + len(prefix) :]
    return "".join(lines)


def _imports(tree: ast.AST, path: str) -> list[tuple[int, int]]:
    """Return line (from 1) and column of each statement or alias that imports one of PACKAGES."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and _is_ours(str(node.module)):
            found.append((node.lineno, node.col_offset))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _is_ours(alias.name):
                    if alias.asname is None:  # would bind the name `penstock`
                        raise ValueError(f"{path}:{node.lineno}: write `import {alias.name} as NAME`")
                    found.append((alias.lineno, alias.col_offset))
    return found


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in PACKAGES


class BuildPackage(build_py):
    """Rewrite the imports of each module that is copied into the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)  # modules of an earlier wheel
        super().run()

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[:2] not in LEFT_OUT]

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        outfile, copied = super().build_module(module, module_file, package)
        guard = GUARD if module == "__init__" and package in {f"penstock.{name}" for name in PACKAGES} else ""
        text = Path(module_file).read_text(encoding="utf-8")
        Path(outfile).write_text(rewrite(text, module_file) + guard, encoding="utf-8")
        return outfile, copied


class EditableCheckout(editable_wheel):
    """Install the checkout's packages under their own names."""

    def finalize_options(self) -> None:
        self.distribution.packages, self.distribution.package_dir = ["penstock", *CHECKOUT], {}
        super().finalize_options()


if __name__ == "__main__":
    setup(
        packages=["penstock", *(f"penstock.{name}" for name in CHECKOUT)],
        package_dir={f"penstock.{name}": name for name in PACKAGES},
        package_data={
            "penstock.trainer.recipes": ["*.toml"],
            "penstock.trainer.reproduce": ["*.toml"],
            "penstock.trainer.figures": ["page.html"],
            "penstock.pipeline.service.web": ["templates/*.html", "static/*"],
        },
        py_modules=["penstock_imagenet"],
        cmdclass={"build_py": BuildPackage, "editable_wheel": EditableCheckout},
    )
