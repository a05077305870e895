"""What newcomers find their way by: import paths, commands, and documents that are true."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Import paths that users have in their code: they stay, wherever the code behind them moves.
PUBLIC = {
    "mixflow_fast": ("MixFlow", "mixflow_loss", "Moments", "Interpolation", "__version__"),
    "mixflow_fast.config": ("Config", "load_config", "recipe_names"),
    "mixflow_fast.data": ("Batch", "BatchLoader", "Dataset", "build_dataset", "sample_index"),
    "mixflow_fast.evaluation": ("FEATURES", "frechet_distance", "moments"),
    "mixflow_fast.flow": ("DATA_AT_1", "NOISE_AT_1", "get_path", "shift_time", "slow_time"),
    "mixflow_fast.kernels.interpolate": ("Moments", "interpolate"),
    "mixflow_fast.models": ("SiT", "DiTDH", "build", "load_weights", "load_model", "save_weights"),
    "mixflow_fast.models.text_to_image": ("Adapter", "load_adapter", "check_against_pipeline"),
    "mixflow_fast.objective": ("Interpolation", "MixFlow", "mixflow_loss"),
    "mixflow_fast.sampling": ("sample", "integrate", "time_grid", "model_velocity", "draw_labels"),
    "mixflow_fast.cli": ("main",),
}
COMMANDS = {
    "mixflow_fast.cli": ("--help",),
    "mixflow_fast.extension": (),
    "benchmarks.run": ("--help",),
    "benchmarks.compile_report": ("--help",),
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_can_be_imported(module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in PUBLIC[module] if not hasattr(found, name)] == []


@pytest.mark.parametrize("module", COMMANDS)
def test_commands_can_be_called(module: str) -> None:
    command = [sys.executable, "-m", module, *COMMANDS[module]]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert "usage" in (done.stdout + done.stderr).lower(), done.stderr
    assert done.returncode == (0 if COMMANDS[module] else 2)


DOCUMENTS = (
    "README.md",
    "benchmarks/README.md",
    "docs/design.md",
    "docs/drop-in.md",
    "docs/many_gpus.md",
    "docs/sampling.md",
    "docs/text_to_image.md",
)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_documents_exist(document: str) -> None:
    """Whatever stands in backticks and looks like a path of this repository."""
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|md|toml|sh))`", text))
    tops = ("mixflow_fast/", "kernels/", "benchmarks/", "tests/", "docs/", "csrc/")
    paths = {path for path in named if path.startswith(tops)}
    assert paths or document != "docs/design.md"
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


# Who decides about a whole run; everything else takes its section and finished objects.
WHOLE_CONFIG = {
    ("checkpoints/resume.py", "find"),
    ("comparison/real_data.py", "run_data"),
    ("config/validate.py", "validate"),
    ("demo/settings.py", "arm_config"),
    ("diagnostics/verify_resume.py", "verify_resume"),
    ("pilot.py", "arm_config"),
    ("pilot.py", "check_arms"),
    ("pilot.py", "planned_images"),
    ("pilot.py", "run_pilot"),
    ("training/build.py", "build_run"),
    ("training/build.py", "check"),
    ("training/rehearsal.py", "rehearse"),
    ("training/trainer.py", "__init__"),
    ("training/trainer.py", "train"),
}


def test_components_take_their_section() -> None:
    found = set()
    for path in sorted((ROOT / "mixflow_fast").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                hints = [ast.unparse(a.annotation) for a in arguments if a.annotation is not None]
                if any(re.search(r"(?<!\w)Config(?!\w)", hint) for hint in hints):
                    found.add((path.relative_to(ROOT / "mixflow_fast").as_posix(), node.name))
    assert found == WHOLE_CONFIG


def test_no_test_imports_a_test() -> None:
    """What tests share stands in tests/support/."""
    wrong = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in getattr(node, "names", ()) if hasattr(alias, "name")]
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            if isinstance(node, ast.Import | ast.ImportFrom):
                found = [n for n in names if re.search(r"(^|\.)test_", n)]
                wrong += [f"{path.relative_to(ROOT)}: {name}" for name in found]
    assert wrong == []


def test_helpers_stand_in_support() -> None:
    """Every other file of tests/ holds tests, so that a newcomer finds them by module."""
    files = [p.relative_to(ROOT / "tests") for p in (ROOT / "tests").rglob("*.py")]
    odd = [
        str(path)
        for path in files
        if path.parts[0] != "support" and not re.match(r"(test_.*|conftest)\.py", path.name)
    ]
    assert odd == []
