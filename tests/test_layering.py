"""Who may import whom: holds the table of docs/design.md against every import in the sources.

Lazy imports inside functions count like any other; those under `if TYPE_CHECKING:` do not run
and do not count.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "mixflow_fast"

# The table of docs/design.md: each row may import itself, the rows it names, and third parties.
# Rows stand from the bottom to the top, and a row names only rows above it in the table.
DESIGN = ROOT / "docs" / "design.md"


def _table(text: str) -> dict[str, tuple[str, ...]]:
    """The rows of the layer table: | floor | row | what it is for | may import |."""
    rows = {}
    for line in text.partition("\n## Layers\n")[2].partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 4 and cells[0].isdigit():
            name = cells[1].strip("`").removeprefix(f"{PACKAGE}/").strip("/").removesuffix(".py")
            rows[name] = tuple(n.strip(" `") for n in cells[3].split(",") if n.strip(" `-"))
    return rows


LAYERS = _table(DESIGN.read_text(encoding="utf-8"))
# Distributions that only these modules may import.
OWNED = {
    "deepspeed": ("training.engine",),
    "triton": ("kernels.runtime",),
    "nvidia": ("data.dali", "data.dali_crop", "diagnostics.doctor"),
}
# They belong to extras, so a module must import without them: only inside functions, or where an
# ImportError is caught.
OPTIONAL = {
    *("triton", "deepspeed", "torchdiffeq", "nvidia", "sklearn", "matplotlib", "scipy"),
    *("transformers", "diffusers", "peft", "accelerate", "apex", "tensorboard", "wandb", "shtab"),
}


def _row(name: str) -> str | None:
    """The row of a name below the package: 'models.sit' -> 'models'."""
    fitting = [row for row in LAYERS if name == row or name.startswith(row + ".")]
    return max(fitting, key=len, default=None)


def _sources(root: Path) -> dict[Path, str]:
    """file -> its module name below the package ('' for the package itself)."""
    found = {}
    for folder, prefix in ((root / PACKAGE, ()), (root / "kernels", ("kernels",))):
        for path in sorted(folder.rglob("*.py")):
            parts = [*prefix, *path.relative_to(folder).with_suffix("").parts]
            found[path] = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return found


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _absolute(level: int, module: str | None, importer: str, is_package: bool) -> str:
    """The absolute name behind `from <level dots><module> import`."""
    if not level:
        return module or ""
    here = [PACKAGE, *filter(None, importer.split("."))]
    base = here[: len(here) - level + is_package]
    return ".".join([*base, module] if module else base)


def _imports(path: Path, importer: str) -> list[tuple[int, str, bool]]:
    """(line, absolute name, whether the module imports without it) of everything it imports."""
    is_package = path.name == "__init__.py"
    found = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((node.lineno, alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node.level, node.module, importer, is_package)
            found.extend((node.lineno, f"{base}.{alias.name}", lazy) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            name = node.args[0]
            if called in ("import_module", "__import__") and isinstance(name, ast.Constant):
                dots = len(str(name.value)) - len(str(name.value).lstrip("."))
                target = _absolute(dots, str(name.value)[dots:], importer, is_package)
                found.append((node.lineno, target, lazy))
        optional = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.Try):
            caught = [ast.unparse(h.type) for h in node.handlers if h.type is not None]
            optional = "ImportError" in caught
        for child in node.orelse if _is_type_checking(node) else ast.iter_child_nodes(node):
            visit(child, lazy or optional)

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


def violations(root: Path) -> list[str]:
    """One line for each import below `root` that the tables above forbid."""
    wrong = []
    for path, importer in _sources(root).items():
        where = path.relative_to(root).as_posix()
        row = _row(importer or "__init__")
        if row is None:
            wrong.append(f"{where}: no row for it in docs/design.md: add one to its layer table")
            continue
        for line, name, lazy in _imports(path, importer):
            top, _, below = name.partition(".")
            at = f"{where}:{line}: {row}"
            if top == "kernels":
                wrong.append(f"{at} imports the distribution `kernels`, not {PACKAGE}.kernels")
            elif top != PACKAGE:
                if importer not in OWNED.get(top, (importer,)):
                    wrong.append(f"{at} imports {top}, which only {' and '.join(OWNED[top])} may")
                if top in OPTIONAL and not lazy:
                    wrong.append(f"{at} imports {top} outside a function; it is optional")
            elif below != "__version__":
                target = _row(below) or "__init__"
                permitted = (row, *LAYERS[row])
                if not any(target == p or target.startswith(p + ".") for p in permitted):
                    wrong.append(f"{at} may not import {name} ({target})")
    return wrong


def test_sources_keep_the_table():
    assert len(_sources(ROOT)) > 5
    assert not violations(ROOT), "\n" + "\n".join(violations(ROOT))


def test_rows_import_downwards_only():
    rank = {row: place for place, row in enumerate(LAYERS)}
    upward = [
        (row, to) for row, allowed in LAYERS.items() for to in allowed if rank[to] >= rank[row]
    ]
    assert upward == []
    for upper in ("objective", "training", "sampling", "evaluation"):
        assert upper not in LAYERS["models"] + LAYERS["kernels"]
    assert len(LAYERS) > 15 and "training" not in LAYERS["evaluation"]


def _module_of(name: str, modules: set[str]) -> str | None:
    """The module behind an imported name: 'mixflow_fast.files.sync' -> 'files'."""
    below = name.removeprefix(f"{PACKAGE}.")
    return next((m for m in (below, below.rpartition(".")[0]) if m in modules), None)


def cycles(root: Path) -> list[list[str]]:
    """Groups of modules that import each other in a circle, lazy imports included."""
    sources = _sources(root)
    # A package's own file re-exports what is below it, and stands for none of it.
    modules = {name for path, name in sources.items() if path.name != "__init__.py"}
    graph = {
        name: {_module_of(target, modules) for _, target, _ in _imports(path, name)} - {None, name}
        for path, name in sources.items()
        if name in modules
    }
    while leaves := {name for name, targets in graph.items() if not targets}:
        graph = {name: targets - leaves for name, targets in graph.items() if name not in leaves}
    while tops := set(graph) - set().union(*graph.values()):
        graph = {name: targets for name, targets in graph.items() if name not in tops}
    return [sorted([name, *targets]) for name, targets in graph.items()]


def test_no_module_imports_itself_in_a_circle():
    assert cycles(ROOT) == []


def test_a_planted_circle_is_found(tmp_path):
    folder = tmp_path / PACKAGE / "flow"
    folder.mkdir(parents=True)
    (folder / "clock.py").write_text("def f():\n    from mixflow_fast.flow.path import get_path\n")
    (folder / "path.py").write_text("from mixflow_fast.flow import clock\n")
    assert cycles(tmp_path) == [["flow.clock", "flow.path"]] * 2


def test_nothing_imports_a_top_level_kernels():
    for folder in ("tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            names = [name.partition(".")[0] for _, name, _ in _imports(path, "")]
            assert "kernels" not in names, path.name


PLANTED = {
    "plain": ("mixflow_fast/models/sit.py", "import mixflow_fast.objective", "objective"),
    "from": (
        "mixflow_fast/models/sit.py",
        "from mixflow_fast.training.trainer import fit",
        "training",
    ),
    "from package": ("mixflow_fast/models/sit.py", "from mixflow_fast import training", "training"),
    "relative": ("mixflow_fast/models/sit.py", "from ..objective import MixFlow", "objective"),
    "relative module": ("mixflow_fast/models/__init__.py", "from .. import sampling", "sampling"),
    "lazy": ("mixflow_fast/flow/path.py", "def f():\n    from .. import models", "models"),
    "in a method": (
        "mixflow_fast/sampling/samples.py",
        "class A:\n    async def f(self):\n        import mixflow_fast.training.trainer",
        "training",
    ),
    "after TYPE_CHECKING": (
        "mixflow_fast/metrics/progress.py",
        "if TYPE_CHECKING:\n    pass\nelse:\n    from ..training.trainer import fit",
        "training",
    ),
    "import_module": (
        "mixflow_fast/files.py",
        "import importlib\nx = importlib.import_module('.training.trainer', 'mixflow_fast')",
        "training",
    ),
    "root from below": (
        "mixflow_fast/optim/apex.py",
        "from mixflow_fast import MixFlow",
        "__init__",
    ),
    "kernel knows a model": ("kernels/norm.py", "from mixflow_fast.models import SiT", "models"),
    "an operator's folder knows a model": (
        "kernels/attention/op.py",
        "from mixflow_fast.models import SiT",
        "models",
    ),
    "data knows the objective": (
        "mixflow_fast/data/loader.py",
        "from mixflow_fast.objective import MixFlow",
        "objective",
    ),
    "foreign kernels": (
        "mixflow_fast/objective/mixflow.py",
        "from kernels.philox import normal",
        "dist",
    ),
    "deepspeed elsewhere": (
        "mixflow_fast/training/trainer.py",
        "def f():\n    import deepspeed.comm",
        "only training.engine may",
    ),
    "optional at the top": (
        "mixflow_fast/reports/plots.py",
        "from matplotlib import pyplot",
        "outside a function",
    ),
    "triton elsewhere": (
        "kernels/norm.py",
        "try:\n    import triton\nexcept ImportError:\n    triton = None",
        "only kernels.runtime may",
    ),
    "DALI elsewhere": (
        "mixflow_fast/data/loader.py",
        "def f():\n    from nvidia.dali import fn",
        "only data.dali and data.dali_crop and",
    ),
    "unknown module": ("mixflow_fast/helpers.py", "", "add one to its layer table"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_checker_catches_a_planted_violation(tmp_path, case):
    name, source, message = PLANTED[case]
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(source, encoding="utf-8")
    found = violations(tmp_path)
    assert len(found) == 1 and name in found[0] and message in found[0], found


def test_checker_permits_what_the_table_permits(tmp_path):
    permitted = {
        "kernels/interpolate.py": "from mixflow_fast.kernels import philox\nfrom . import philox",
        "mixflow_fast/objective/mixflow.py": "from ..flow.path import linear\nimport torch, numpy",
        "mixflow_fast/models/sit.py": (
            "from typing import TYPE_CHECKING\nfrom mixflow_fast import __version__\n"
            "from . import blocks\nfrom ..kernels.norm import norm\n"
            "if TYPE_CHECKING:\n    from ..objective import MixFlow"
        ),
        "mixflow_fast/data/order.py": "from mixflow_fast.kernels.philox import Stream",
        "mixflow_fast/training/engine.py": (
            "def f():\n    import deepspeed\n    from .. import optim"
        ),
        "mixflow_fast/training/trainer.py": "def f():\n    from .. import objective",
        "kernels/runtime.py": "try:\n    import triton\nexcept ImportError:\n    triton = None",
        "mixflow_fast/cli/main.py": "import mixflow_fast\nfrom mixflow_fast import MixFlow, demo",
    }
    for name, source in permitted.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source, encoding="utf-8")
    assert violations(tmp_path) == []
