"""What gets installed, in every way of installing it, and that a foreign `kernels` survives it.

The library of `csrc/` is left out here (MIXFLOW_BUILD=0): `tests/test_csrc_build.py` installs it.
"""

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCES = (".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "tests", "docs")
NO_LIBRARY = {"MIXFLOW_BUILD": "0"}
BASE_DEPENDENCIES = {"torch", "numpy", "pyyaml", "tqdm", "safetensors", "pillow"}
FOREIGN = "MARKER = 'the public distribution of that name'\n"
IMPORT_BOTH = """
import mixflow_fast, kernels, torch
from mixflow_fast.kernels import philox
print(mixflow_fast.__version__, mixflow_fast.__file__, philox.__file__, kernels.MARKER, sep="\\n")
print(philox.random_words(0, 0, torch.tensor([0]), 4).tolist())
"""


def _python(*arguments: str, cwd: Path, **env: str) -> str:
    """Output of a Python that neither this checkout nor an installed mixflow_fast leaks into."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={
            **inherited,
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            **NO_LIBRARY,
            **env,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _isolated(code: str, *paths: Path, cwd: Path) -> list[str]:
    """Lines that `code` prints with `paths` before site-packages, whose .pth files are not read."""
    packages = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    packages.append(str(Path(torch.__file__).parent.parent))
    prelude = f"import sys\nsys.path += {packages!r}\n"
    path = os.pathsep.join(map(str, paths))
    return _python("-S", "-c", prelude + code, cwd=cwd, PYTHONPATH=path).splitlines()


def _pip(*arguments: str, cwd: Path) -> None:
    _python("-m", "pip", "-q", "--disable-pip-version-check", "--no-input", *arguments, cwd=cwd)


def _kernel_sources() -> set[str]:
    return {p.relative_to(ROOT).as_posix() for p in (ROOT / "kernels").rglob("*.py")}


def _installed_names() -> set[str]:
    """Every file that a user must get, by its place in the wheel."""
    kernels = {f"mixflow_fast/{name}" for name in _kernel_sources()}
    package = ROOT / "mixflow_fast"
    files = [*package.rglob("*.py"), *package.rglob("*.yaml")]
    csrc = {f"mixflow_fast/csrc/{p.name}" for p in (ROOT / "csrc").iterdir()}
    return kernels | csrc | {p.relative_to(ROOT).as_posix() for p in files}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy to build in: setuptools leaves `build/` and an egg-info behind."""
    copy = tmp_path_factory.mktemp("sources") / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    return copy


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    _pip("wheel", ".", "--no-deps", "--no-build-isolation", "-w", str(out), cwd=sources)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture
def foreign(tmp_path):
    """A folder with another distribution's `kernels` package in it."""
    folder = tmp_path / "foreign"
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text(FOREIGN, encoding="utf-8")
    return folder


def _check_both(lines: list[str], package: Path, philox: Path) -> None:
    version, package_file, philox_file, marker, words = lines
    assert version == _declared_version()
    assert Path(package_file) == package and Path(philox_file) == philox
    assert f"MARKER = {marker!r}\n" == FOREIGN
    # Philox4x32-10 of counter 0 and key 0: the first known answer of Random123's kat_vectors.
    assert words == str([[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]])


def _declared_version() -> str:
    tree = ast.parse((ROOT / "mixflow_fast" / "__init__.py").read_text(encoding="utf-8"))
    (value,) = [
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    return value


def test_wheel_holds_all_sources_and_nothing_else(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert names == _installed_names()
    assert "mixflow_fast/kernels/philox.py" in names
    assert any(n.startswith("mixflow_fast/recipes/") and n.endswith(".yaml") for n in names)


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
        entry_points = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
        licence = archive.read(name.replace("METADATA", "licenses/LICENSE")).decode()
    assert metadata["Version"] == _declared_version()
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0" and "Version 2.0, January" in licence
    assert "mixflow-fast = mixflow_fast.cli:main" in entry_points
    requires = metadata.get_all("Requires-Dist")
    names = {re.split(r"[^\w.-]", line)[0].lower() for line in requires}
    base = {re.split(r"[^\w.-]", line)[0].lower() for line in requires if "extra ==" not in line}
    assert base == BASE_DEPENDENCIES
    assert not names & {"flash-attn", "apex", "torchvision"}
    extras = set(metadata.get_all("Provides-Extra"))
    assert extras == set("train data vae eval repa text features watch completion gpu dev".split())


def test_command_has_its_function():
    tree = ast.parse((ROOT / "mixflow_fast" / "cli" / "main.py").read_text(encoding="utf-8"))
    assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    init = (ROOT / "mixflow_fast" / "cli" / "__init__.py").read_text(encoding="utf-8")
    assert "from mixflow_fast.cli.main import main" in init


def test_installed_wheel_beside_a_foreign_kernels(wheel, foreign, tmp_path):
    _pip("install", "--no-deps", "--no-index", "--target", str(foreign), str(wheel), cwd=tmp_path)
    lines = _isolated(IMPORT_BOTH, foreign, cwd=tmp_path)
    package = foreign / "mixflow_fast"
    _check_both(lines, package / "__init__.py", package / "kernels" / "philox.py")
    assert (foreign / "kernels" / "__init__.py").read_text(encoding="utf-8") == FOREIGN


@pytest.mark.parametrize("inside", [True, False])
def test_bare_checkout_beside_a_foreign_kernels(foreign, tmp_path, inside):
    # `inside`: the shell stands in the checkout, which `-c` puts first on the path.
    paths = (foreign,) if inside else (ROOT, foreign)
    lines = _isolated(IMPORT_BOTH, *paths, cwd=ROOT if inside else tmp_path)
    _check_both(lines, ROOT / "mixflow_fast" / "__init__.py", ROOT / "kernels" / "philox.py")


def test_editable_install_beside_a_foreign_kernels(sources, foreign, tmp_path):
    target = tmp_path / "target"
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--target", str(target))
    _pip("install", *options, "--editable", str(sources), cwd=tmp_path)
    # Before site-packages: an editable install there has a finder module of the same name.
    code = f"import site\nsite.addsitedir({str(target)!r})\n{IMPORT_BOTH}"
    lines = _isolated(code, target, foreign, cwd=tmp_path)
    _check_both(lines, sources / "mixflow_fast" / "__init__.py", sources / "kernels" / "philox.py")


def test_source_distribution_is_complete(sources, tmp_path):
    build = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    _python("-c", build, cwd=sources)
    (archive,) = tmp_path.glob("*.tar.gz")
    names = {n.partition("/")[2] for n in tarfile.open(archive).getnames()}
    kernels = _kernel_sources()
    elsewhere = ("mixflow_fast/kernels/", "mixflow_fast/csrc/")
    package = {n for n in _installed_names() if not n.startswith(elsewhere)}
    package |= {f"csrc/{p.name}" for p in (ROOT / "csrc").iterdir()}
    assert kernels | package | {"LICENSE", "pyproject.toml", "setup.py"} <= names
    assert not any(n.startswith(("tests/", "docs/", "runs/", ".venv")) for n in names)


def test_import_needs_torch_alone(tmp_path):
    code = """
import builtins, importlib.abc, sys
import torch

own = ("mixflow_fast", "torch")
plain_import = builtins.__import__

def foreign(name):
    top = name.partition(".")[0]
    return top not in own and top not in sys.stdlib_module_names

def strict_import(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "").partition(".")[0]
    if importer == "mixflow_fast" and level == 0 and foreign(name):
        raise ImportError(f"mixflow_fast imported {name}")
    return plain_import(name, globals, locals, fromlist, level)

builtins.__import__ = strict_import
try:
    exec("import numpy", {"__name__": "mixflow_fast.planted"})
except ImportError:
    print("planted import refused")
before = set(sys.modules)
import mixflow_fast
for name in getattr(mixflow_fast, "__all__", []):
    getattr(mixflow_fast, name)
from mixflow_fast.kernels import philox
print(sorted(m for m in set(sys.modules) - before if foreign(m)))
"""
    assert _isolated(code, ROOT, cwd=tmp_path) == ["planted import refused", "[]"]
