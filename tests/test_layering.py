"""Who may import whom: holds the architecture's table against every import in the sources.

Lazy imports inside functions count like any other; those under `if TYPE_CHECKING:` do not run
and do not count.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "mixflow_fast"

# Each row may import itself, the rows it names, and third parties; the longest name wins. Rows
# stand from the bottom to the top, and a row names only rows above it in this list.
LAYERS: dict[str, tuple[str, ...]] = {
    "flow": (),
    "kernels.runtime": (),
    "kernels.philox": ("kernels.runtime",),
    "kernels.layout": ("kernels.runtime",),
    "kernels": ("kernels.runtime", "kernels.philox", "kernels.layout", "flow"),
    "models": ("kernels",),
    "data": ("kernels.philox", "kernels.runtime"),
    "images": (),
    "optional": (),
    "extension": (),
    "ema": (),
    "adamw": ("extension", "ema"),
    "optim": ("kernels", "optional", "adamw"),
    "skipping": ("adamw",),
    "distributed": (),
    "agreement": (),
    "manifest": (),
    "checkpoint": ("agreement", "manifest"),
    "metrics": ("manifest",),
    "mirrors": ("metrics",),
    "flops": ("models",),
    "config": (),
    "validation": ("config", "models", "optional", "mirrors", "extension", "adamw", "ema"),
    "arguments": ("kernels",),
    "objective": ("flow", "kernels", "arguments"),
    "inspection": ("checkpoint", "models"),
    "inspection_text": ("inspection",),
    "export": ("checkpoint", "inspection", "models"),
    "sampling": ("flow", "kernels"),
    "evaluation": ("sampling", "images", "kernels"),
    "build": ("kernels", "flow", "models", "data", "config", "objective", "validation"),
    "alignment": ("models", "data", "config", "objective", "build"),
    "consolidation": ("checkpoint", "manifest", "models"),
    "engine": (
        *("models", "config", "optim", "skipping", "distributed", "consolidation", "checkpoint"),
    ),
    "doctor_kernels": ("kernels", "objective", "adamw"),
    "doctor": ("kernels", "doctor_kernels", "engine", "extension", "optional"),
    "previews": ("config", "images", "models", "sampling"),
    "monitoring": (
        *("kernels", "flow", "models", "data", "config", "objective", "agreement", "build"),
        *("engine", "flops", "metrics", "mirrors", "previews"),
    ),
    "snapshots": (
        *("checkpoint", "manifest", "agreement", "config", "consolidation", "ema", "engine"),
        "models",
    ),
    "run_plots": ("evaluation",),
    "run_record": ("config", "metrics"),
    "run_report": ("config", "evaluation", "images", "previews", "run_plots", "run_record"),
    "nonfinite": (
        *("checkpoint", "manifest", "agreement", "config", "data", "engine", "objective"),
    ),
    "safety": ("distributed", "nonfinite", "agreement", "config", "data", "engine", "objective"),
    "stopping": (),
    "resuming": ("config", "checkpoint", "consolidation", "models"),
    "trainer": (
        *("kernels", "flow", "models", "data", "optim", "distributed", "checkpoint", "metrics"),
        *("config", "objective", "build", "alignment", "validation", "engine", "stopping"),
        *("resuming", "consolidation", "agreement", "manifest", "monitoring"),
        *("safety", "nonfinite", "snapshots"),
    ),
    "verify_resume": (
        *("checkpoint", "manifest", "build", "config", "consolidation", "distributed", "trainer"),
    ),
    "__init__": ("kernels", "flow", "models", "optim", "objective", "sampling"),
    "demo": (
        *("kernels", "flow", "models", "data", "images", "optim", "distributed", "checkpoint"),
        *(
            "metrics",
            "config",
            "objective",
            "sampling",
            "evaluation",
            "build",
            "trainer",
            "__init__",
        ),
    ),
    "cli_arguments": ("__init__",),
    "cli": (
        "cli_arguments",
        *("kernels", "flow", "models", "data", "images", "optim", "distributed", "checkpoint"),
        *(
            "metrics",
            "config",
            "objective",
            "sampling",
            "evaluation",
            "build",
            "trainer",
            "__init__",
        ),
        "demo",
        "inspection",
        "inspection_text",
        "export",
        "consolidation",
        "verify_resume",
        "doctor",
        "extension",
        "snapshots",
        "run_report",
    ),
    "__main__": ("cli",),
}
# A distribution that only one row may import.
OWNED = {"deepspeed": "engine", "triton": "kernels.runtime"}
# They belong to extras, so a module must import without them: only inside functions, or where an
# ImportError is caught.
OPTIONAL = {
    *("triton", "deepspeed", "torchdiffeq", "nvidia", "sklearn", "matplotlib", "scipy"),
    *("transformers", "apex", "tensorboard", "wandb"),
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
            wrong.append(f"{where}: no row for it in tests/test_layering.py: add one to LAYERS")
            continue
        for line, name, lazy in _imports(path, importer):
            top, _, below = name.partition(".")
            at = f"{where}:{line}: {row}"
            if top == "kernels":
                wrong.append(f"{at} imports the distribution `kernels`, not {PACKAGE}.kernels")
            elif top != PACKAGE:
                if OWNED.get(top, row) != row:
                    wrong.append(f"{at} imports {top}, which only {OWNED[top]} may")
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
    for upper in ("objective", "trainer", "sampling", "evaluation"):
        assert upper not in LAYERS["models"] + LAYERS["kernels"]
    siblings = {"trainer", "sampling"}
    assert all(not siblings - {row} & set(LAYERS[row]) for row in siblings)


def test_nothing_imports_a_top_level_kernels():
    for folder in ("tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            names = [name.partition(".")[0] for _, name, _ in _imports(path, "")]
            assert "kernels" not in names, path.name


PLANTED = {
    "plain": ("mixflow_fast/models/sit.py", "import mixflow_fast.objective", "objective"),
    "from": ("mixflow_fast/models/sit.py", "from mixflow_fast.trainer import fit", "trainer"),
    "from package": ("mixflow_fast/models/sit.py", "from mixflow_fast import trainer", "trainer"),
    "relative": ("mixflow_fast/models/sit.py", "from ..objective import MixFlow", "objective"),
    "relative module": ("mixflow_fast/models/__init__.py", "from .. import sampling", "sampling"),
    "lazy": ("mixflow_fast/flow/path.py", "def f():\n    from .. import models", "models"),
    "in a method": (
        "mixflow_fast/sampling.py",
        "class A:\n    async def f(self):\n        import mixflow_fast.trainer",
        "trainer",
    ),
    "after TYPE_CHECKING": (
        "mixflow_fast/metrics.py",
        "if TYPE_CHECKING:\n    pass\nelse:\n    from .trainer import fit",
        "trainer",
    ),
    "import_module": (
        "mixflow_fast/metrics.py",
        "import importlib\nx = importlib.import_module('.trainer', 'mixflow_fast')",
        "trainer",
    ),
    "root from below": ("mixflow_fast/optim.py", "from mixflow_fast import MixFlow", "__init__"),
    "kernel knows a model": ("kernels/norm.py", "from mixflow_fast.models import SiT", "models"),
    "philox knows a kernel": ("kernels/philox.py", "from .norm import norm", "kernels"),
    "data and another kernel": (
        "mixflow_fast/data/loader.py",
        "from mixflow_fast.kernels.norm import norm",
        "kernels",
    ),
    "foreign kernels": ("mixflow_fast/objective.py", "from kernels.philox import normal", "dist"),
    "deepspeed elsewhere": (
        "mixflow_fast/optim.py",
        "def f():\n    import deepspeed.comm",
        "only engine may",
    ),
    "optional at the top": (
        "mixflow_fast/evaluation/report.py",
        "from matplotlib import pyplot",
        "outside a function",
    ),
    "triton elsewhere": (
        "kernels/norm.py",
        "try:\n    import triton\nexcept ImportError:\n    triton = None",
        "only kernels.runtime may",
    ),
    "unknown module": ("mixflow_fast/helpers.py", "", "add one to LAYERS"),
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
        "mixflow_fast/objective.py": "from .flow.path import linear\nimport torch, numpy",
        "mixflow_fast/models/sit.py": (
            "from typing import TYPE_CHECKING\nfrom mixflow_fast import __version__\n"
            "from . import checkpoints\nfrom ..kernels.norm import norm\n"
            "if TYPE_CHECKING:\n    from ..objective import MixFlow"
        ),
        "mixflow_fast/data/order.py": "from mixflow_fast.kernels.philox import Stream",
        "mixflow_fast/engine.py": "def f():\n    import deepspeed\n    from . import optim",
        "mixflow_fast/trainer.py": "def f():\n    from . import objective",
        "kernels/runtime.py": "try:\n    import triton\nexcept ImportError:\n    triton = None",
        "mixflow_fast/cli.py": "import mixflow_fast\nfrom mixflow_fast import MixFlow, demo",
    }
    for name, source in permitted.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source, encoding="utf-8")
    assert violations(tmp_path) == []
