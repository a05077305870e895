"""`mixflow-fast doctor`: what this machine has, whether it computes right, and what to do if not.

Sections of checks; one that fails, or raises, does not stop the others. "FAIL" means that training
would not run or would be wrong here; "warn", that something optional is missing or worth a look.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mixflow_fast import __version__
from mixflow_fast.environment import package_version
from mixflow_fast.kernels import runtime
from mixflow_fast.messages import error_line
from mixflow_fast.metrics.progress import Progress

if TYPE_CHECKING:
    from mixflow_fast.diagnostics.kernel_checks import Finding

OLDEST_PYTHON, OLDEST_TORCH = (3, 10), (2, 9)
# A build that is older than this holds its lock for nothing, most likely.
STALE_LOCK_S = 900.0
LOW_DISK_GIB, LOW_SHM_GIB = 20.0, 1.0
_MARKS = {"ok": "ok  ", "info": "-   ", "warn": "warn", "fail": "FAIL"}


@dataclass(frozen=True)
class Check:
    """One line: status "ok", "info", "warn" or "fail"; `found` in words; `do`, the way out."""

    name: str
    status: str
    found: str
    do: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All checks by section, in order."""

    sections: dict[str, list[Check]]
    seconds: float

    @property
    def healthy(self) -> bool:
        """Nothing failed; warnings are allowed."""
        return not self._count("fail")

    def _count(self, status: str) -> int:
        return sum(c.status == status for checks in self.sections.values() for c in checks)

    def as_json(self) -> dict[str, object]:
        """One object: version, healthy, seconds, sections -> lists of checks."""
        sections = {name: [asdict(c) for c in checks] for name, checks in self.sections.items()}
        return {
            "mixflow_fast": __version__,
            "healthy": self.healthy,
            "seconds": round(self.seconds, 1),
            "sections": sections,
        }

    def as_text(self) -> str:
        """Sections, a line for each check, the verdict last."""
        lines = []
        for section, checks in self.sections.items():
            lines += ["", section]
            width = max((len(c.name) for c in checks), default=0)
            for c in checks:
                way_out = f"  -> {c.do}" if c.do else ""
                lines.append(f"  {_MARKS[c.status]}  {c.name:{width}}  {c.found}{way_out}")
        warned, failed = self._count("warn"), self._count("fail")
        verdict = "healthy" if self.healthy else f"NOT healthy: {_number(failed, 'failure')}"
        if warned:
            verdict += f", {_number(warned, 'warning')}"
        return "\n".join([*lines[1:], "", f"{verdict} ({self.seconds:.0f} s)"])


def diagnose(quiet: bool = True) -> Diagnosis:
    """Run every check: some 10 s, on a GPU more where Triton has not compiled the kernels before.

    Args:
        quiet: do not say on stderr which section it is at.
    """
    started = time.perf_counter()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as a run on the CPU does
    sections = {}
    with Progress(len(SECTIONS), "doctor", "sections", even=False, quiet=quiet) as progress:
        for name, checks in SECTIONS.items():
            progress.show(name)
            sections[name] = _guarded(name, checks)
            progress.advance()
    return Diagnosis(sections, time.perf_counter() - started)


def _guarded(section: str, checks: Callable[[], Iterator[Check]]) -> list[Check]:
    """Checks of a section; an error becomes one too, and what libraries print is kept off."""
    found = []
    level = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    for check in checks():
                        found.append(check)
                # Also what a foreign library does at import: it must not hide the other sections.
                except (Exception, SystemExit) as error:
                    text = f"the check itself ended with {error_line(error)}"
                    found.append(Check(section, "fail", text, "a bug or a broken package"))
    finally:
        logging.disable(level)
    return found


def _versions() -> Iterator[Check]:
    words = f"{platform.python_version()}, {platform.platform(terse=True)}, {platform.machine()}"
    if sys.version_info < OLDEST_PYTHON:
        yield Check("python", "fail", words, "Python 3.10 or newer is needed")
    else:
        yield Check("python", "ok", words)
    yield Check("mixflow_fast", "ok", f"{__version__}, {Path(__file__).resolve().parents[1]}")
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        found = f"{torch.__version__}, {built}"
        yield Check("torch", "fail", found, "pip install 'torch>=2.9'")
    else:
        yield Check("torch", "ok", f"{torch.__version__}, {built}")
    for name in ("numpy", "pyyaml", "tqdm", "safetensors", "pillow"):
        version = package_version(name)
        if version is None:
            yield Check(name, "fail", "not installed", f"pip install {name}")
        else:
            yield Check(name, "ok", version)


def _devices() -> Iterator[Check]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    driver = _nvidia_smi()
    cpu = f"{os.cpu_count()} cores, {_memory_gib():.0f} GiB of memory, {torch.get_num_threads()} "
    yield Check("cpu", "ok", cpu + "threads for PyTorch")
    for number in range(count):
        p = torch.cuda.get_device_properties(number)
        words = (
            f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}, driver {driver}"
        )
        if p.major < 8:
            do = "bfloat16 and the kernels are made for sm_80 (A100) and newer"
            yield Check(f"cuda:{number}", "warn", words, do)
        else:
            yield Check(f"cuda:{number}", "ok", words)
    if count:
        return
    if driver and torch.version.cuda is None:
        do = "install PyTorch for CUDA (https://pytorch.org/get-started/locally)"
        yield Check("cuda", "warn", f"a GPU (driver {driver}), but PyTorch's CPU build", do)
    elif driver:
        do = f"a driver for CUDA {torch.version.cuda}, and see CUDA_VISIBLE_DEVICES"
        yield Check("cuda", "fail", f"driver {driver}, but PyTorch sees no GPU", do)
    else:
        yield Check("cuda", "info", "no GPU: training runs on the CPU, slowly")


def _kernels() -> Iterator[Check]:
    from mixflow_fast.diagnostics.kernel_checks import check_kernels, worst

    device = _device()
    version = package_version("triton")
    if runtime.can_launch(device):
        where = "in its interpreter (TRITON_INTERPRET=1)" if runtime.interpreting() else "compiled"
        yield Check("triton", "ok", f"{version}, kernels run {where} on {device}")
    elif device.type == "cuda":
        do = "pip install triton; without it PyTorch's own operations compute the same"
        yield Check("triton", "warn", "not installed: the kernels are not used", do)
    else:
        found = f"{version or 'not installed'}; on a CPU its kernels are not used"
        yield Check("triton", "info", f"{found}, the operators' own path is checked instead")
    by_op: dict[str, list[Finding]] = {}
    for finding in check_kernels(device):
        by_op.setdefault(finding.op, []).append(finding)
    for op, findings in by_op.items():
        if all(finding.passed for finding in findings):
            of_dtypes = {
                f.dtype: worst(x for x in findings if x.dtype == f.dtype) for f in findings
            }
            yield Check(op, "ok", "; ".join(_finding(f) for f in of_dtypes.values()))
            continue
        # One line of each case: an operator that is wrong is wrong in many tensors.
        failed = {f.check + f.dtype: f for f in reversed(findings) if not f.passed}
        text = "; ".join(f"{f.check}: {_finding(f)}" for f in reversed(failed.values()))
        do = "do not train with it: objective.impl=reference, model.mode=eager; please report"
        yield Check(op, "fail", text, do)


def _finding(f: Finding) -> str:
    dtype = {"bfloat16": "bf16", "float32": "fp32"}.get(f.dtype, f.dtype)
    if math.isinf(f.error) and not f.limit:  # it did not run
        return f"{dtype} {f.tensor}"
    return f"{dtype} error {f.error:.1e} of {f.limit:.1e} allowed ({f.tensor})"


def _attention() -> Iterator[Check]:
    from mixflow_fast.kernels.attention.choice import choose_backend

    device = _device()
    batch, tokens, heads = (4, 256, 16) if device.type == "cuda" else (2, 16, 2)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        shape = f"{tokens} tokens, {heads} heads of 72"
        try:
            choice = choose_backend(batch, tokens, heads, 72, dtype, device)
        except ValueError as error:
            yield Check(name, "fail", str(error), "another PyTorch, or please report it")
            continue
        yield Check(name, "ok", f"{choice.backend} at {shape}, forward and backward")
        for backend, text in choice.tested.items():
            wrong = text.startswith(("NaN", "error"))
            do = "it is not used; a newer cuDNN or flash-attn may be right" if wrong else ""
            yield Check(f"  {backend}", "warn" if wrong else "info", text, do)


def _compiled_blocks() -> Iterator[Check]:
    device = _device()
    if device.type == "cuda":
        yield from compiled_gradients(device)
        return
    found = "not checked: a network runs uncompiled on a CPU (model.mode=auto)"
    yield Check("gradients", "info", found)


def compiled_gradients(device: torch.device) -> Iterator[Check]:
    """Gradients of a block as torch.compile makes it, against eager ones."""
    from mixflow_fast.diagnostics.compiled_block import check_compiled_block
    from mixflow_fast.models.inductor import block_options

    off = ", mix-order reductions off: this PyTorch gets them wrong" if block_options() else ""
    for finding in check_compiled_block(device):
        do = "do not train compiled: model.mode=eager, or another PyTorch; please report"
        status, do = ("ok", "") if finding.passed else ("fail", do)
        yield Check(finding.check, status, _finding(finding) + off, do)


def _library() -> Iterator[Check]:
    try:
        from mixflow_fast import extension
    except ImportError as error:
        yield Check("csrc", "warn", f"no library ({error})", "plain PyTorch is used instead")
        return
    from mixflow_fast.diagnostics.kernel_checks import check_draws, check_optimizer

    status = extension.load()
    device = _device().type
    if status.state == "absent":
        slower = "AdamW takes several passes, and random numbers on a CPU ten times as long"
        yield Check("csrc", "warn", f"not built: {status.reason}; {slower}", extension.COMMAND)
        return
    if status.serves(device):
        yield Check("csrc", "ok", f"{status.reason} ({status.path})")
        findings = [check_draws(), check_optimizer(_device())]
    else:
        yield Check("csrc", "warn", f"{status.reason}: not for {device}", extension.COMMAND)
        findings = [check_draws()]
    for finding in findings:
        do = "" if finding.passed else "delete that file, and build it again: " + extension.COMMAND
        yield Check(finding.op, "ok" if finding.passed else "fail", _finding(finding), do)


def _deepspeed() -> Iterator[Check]:
    try:
        from mixflow_fast.training.engine import deepspeed_state, untested

        version, ops = deepspeed_state()
        yield Check("deepspeed", "warn" if untested(version) else "ok", version, untested(version))
        buildable = ", ".join(sorted(name for name, fits in ops.items() if fits))
        yield Check("its operators", "info", f"none is needed; buildable here: {buildable or '-'}")
    except Exception as error:
        do = 'pip install "mixflow_fast[train]"; training needs it'
        yield Check("deepspeed", "fail", error_line(error), do)
    locks = stale_locks(_extensions_folder())
    for lock, age_s in locks:
        found = f"{lock}, {age_s / 60:.0f} minutes old: builds wait for it without end"
        yield Check("build lock", "warn", found, f"if no build is running: rm {lock}")
    if not locks:
        yield Check("build lock", "ok", f"none left in {_extensions_folder()}")


def stale_locks(folder: Path) -> list[tuple[Path, float]]:
    """(file, age in seconds) of locks that a killed build of an extension seems to have left."""
    found = []
    for lock in sorted([*folder.glob("*/lock"), *folder.glob("*/*/lock")]):
        with contextlib.suppress(OSError):
            age = time.time() - lock.stat().st_mtime
            if age > STALE_LOCK_S:
                found.append((lock, age))
    return found


def _extensions_folder() -> Path:
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(home) / "torch_extensions"


def _optional() -> Iterator[Check]:
    from mixflow_fast import environment

    for name, version in (
        ("flash-attn 2", environment.flash_attn_version()),
        ("flash-attn 3", environment.flash_attn_3_version()),
    ):
        yield Check(name, "ok" if version else "info", version or "not installed; not needed")
    apex = environment.detect_apex()
    message, _, do = environment.apex_message().partition("; ")
    status = {"nvidia": "ok", "absent": "info", "unrelated": "warn"}[apex]
    yield Check("apex", status, message, do)
    yield _dali()
    for name, use, what in (
        ("diffusers", "autoencoders and text-to-image networks", "'mixflow_fast[text]'"),
        ("transformers", "REPA's teacher and text encoders", "'mixflow_fast[text]'"),
        ("peft", "LoRA", "'mixflow_fast[text]'"),
        ("torchdiffeq", "comparisons of samplers", "'mixflow_fast[eval]'"),
        ("matplotlib", "figures", "'mixflow_fast[eval]'"),
        ("scikit-learn", "the demo's photographs", "'mixflow_fast[data]'"),
        ("tensorboard", "watching runs", "tensorboard"),
        ("wandb", "watching runs", "wandb"),
    ):
        version = package_version(name)
        do = "" if version else f"for {use}: pip install {what}"
        yield Check(name, "ok" if version else "info", version or "not installed", do)


def _dali() -> Check:
    if importlib.util.find_spec("nvidia") is None or not any(
        (Path(folder) / "dali").is_dir()
        for folder in importlib.util.find_spec("nvidia").submodule_search_locations or ()
    ):
        return Check("DALI", "info", "not installed; not needed")
    try:
        from nvidia import dali

        return Check("DALI", "ok", dali.__version__)
    except Exception as error:
        do = "reinstall nvidia-dali for this CUDA, or uninstall it: it is optional"
        return Check("DALI", "warn", f"does not import: {error_line(error)}", do)


def _room() -> Iterator[Check]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free / 2**30
    if not os.access(here, os.W_OK):
        yield Check("disk", "warn", f"{here} cannot be written", "give out= another folder")
    elif free < LOW_DISK_GIB:
        do = "a checkpoint of SiT-XL/2 takes about 15 GiB, and two stay: give out= a larger disk"
        yield Check("disk", "warn", f"{free:.1f} GiB free in {here}", do)
    else:
        yield Check("disk", "ok", f"{free:.0f} GiB free in {here}")
    shared = Path("/dev/shm")
    if not shared.is_dir():
        yield Check("shared memory", "warn", "no /dev/shm", "NCCL needs it on one machine")
        return
    free = shutil.disk_usage(shared).free / 2**30
    if free < LOW_SHM_GIB:
        do = "NCCL and DALI need some: docker run --shm-size=8g (or --ipc=host)"
        yield Check("shared memory", "warn", f"{free * 1024:.0f} MiB free in /dev/shm", do)
    else:
        yield Check("shared memory", "ok", f"{free:.1f} GiB free in /dev/shm")


def _network() -> Iterator[Check]:
    found = "not tested: torchrun's port between machines, GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
    yield Check("several machines", "info", found)


SECTIONS: dict[str, Callable[[], Iterator[Check]]] = {
    "versions": _versions,
    "devices": _devices,
    "kernels against float64": _kernels,
    "attention backends": _attention,
    "compiled blocks": _compiled_blocks,
    "library of csrc": _library,
    "DeepSpeed": _deepspeed,
    "optional packages": _optional,
    "room": _room,
    "network": _network,
}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _nvidia_smi() -> str:
    """The driver's version, "" where there is none."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else ""


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _number(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
