"""Packages, version and the optional library of `csrc/`; what is declarative is in pyproject.toml.

`kernels/` stands at the top of the checkout but is installed as `mixflow_fast.kernels`: a public
distribution owns the name `kernels`. It must not get an `__init__.py`, or the checkout's folder
would hide that distribution from everyone who runs inside it.

The library is compiled where PyTorch and a C++ compiler are there when this runs, which takes
`--no-build-isolation`; MIXFLOW_BUILD=0 leaves it out. An installation never fails because of it:
`mixflow_fast/extension.py` says what is used without it, and builds it later.
"""

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """`__version__` of mixflow_fast, read as text: importing it would need torch."""
    text = (ROOT / "mixflow_fast" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise ValueError('mixflow_fast/__init__.py must hold a line __version__ = "X.Y.Z"')
    return match.group(1)


def can_compile() -> bool:
    """Whether there is something to build with; PyTorch is looked for and not imported."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    wanted = os.environ.get("MIXFLOW_BUILD") != "0" and sys.platform == "linux"
    return wanted and importlib.util.find_spec("torch") is not None and bool(shutil.which(compiler))


def extension_module() -> ModuleType:
    """`mixflow_fast/extension.py` by its path: the package itself need not be importable here."""
    spec = importlib.util.spec_from_file_location(
        "mixflow_fast_extension", ROOT / "mixflow_fast" / "extension.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class BuildLibrary(build_ext):
    """Compiles `csrc/` as a request at run time does: with ninja, by the same function."""

    def get_ext_filename(self, fullname: str) -> str:
        # A library of operators, not a module: no Python's ABI in the name.
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            library = extension_module().compile_library(Path(self.build_temp) / "csrc")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(library, target)
        # Whatever a compiler, a missing ninja or a broken PyTorch brings.
        except Exception as error:
            target.unlink(missing_ok=True)  # of an earlier build in this folder
            self.warn(
                f"csrc/ was not built, the package works without it: {error}\n"
                "once what is missing is there: python -m mixflow_fast.extension build"
            )


setup(
    version=read_version(),
    packages=[
        *find_packages(include=["mixflow_fast", "mixflow_fast.*"]),
        *("mixflow_fast.kernels", "mixflow_fast.csrc"),
        *(f"mixflow_fast.kernels.{op}" for op in find_packages("kernels")),
    ],
    package_dir={
        "mixflow_fast": "mixflow_fast",
        "mixflow_fast.kernels": "kernels",
        "mixflow_fast.csrc": "csrc",
    },
    package_data={
        "mixflow_fast": ["recipes/*.yaml"],
        "mixflow_fast.csrc": ["*.h", "*.cpp", "*.cu"],
    },
    include_package_data=False,
    # optional: setuptools does not look for a library that was not built.
    ext_modules=[Extension("mixflow_fast._csrc", [], optional=True)] if can_compile() else [],
    cmdclass={"build_ext": BuildLibrary},
)
