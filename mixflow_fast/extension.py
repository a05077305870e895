"""Build and load of the C++/CUDA operators of `csrc/`, which are optional and faster.

`setup.py` builds them where it finds PyTorch, ninja and a compiler. Where it did not, or for
another PyTorch than that of the installation,

    python -m mixflow_fast.extension build

builds them into PyTorch's extension cache, where later runs find them; with MIXFLOW_BUILD=1 in its
environment, a run does so by itself. The file of the library records the PyTorch and the sources
that it was built from, and is not used where either differs. `setup.py` builds nothing under
MIXFLOW_BUILD=0. To load a library is to run it: from the cache, which may be shared, only one is
loaded that nobody else could have put there.

The CUDA part is built where PyTorch is a CUDA build and nvcc is of the same major version. This
module imports without PyTorch, because `setup.py` runs it by its path.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = "_csrc.so"
NAME = "mixflow_fast_csrc"
COMMAND = "python -m mixflow_fast.extension build"
CPU_SOURCES = ("binding.cpp", "adamw_ema_cpu.cpp", "philox_binding.cpp", "philox_cpu.cpp")
CUDA_SOURCES = ("adamw_ema_cuda.cu",)
# Without contraction CPU, GPU and every width of vector round alike. The two -fno-*math flags let
# gcc vectorise roots and conditions, and change no result.
CXX_FLAGS = (
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-g0",
)
NVCC_FLAGS = ("-O3", "-fmad=false")
# Architectures compiled for in addition to the GPUs of this machine, unless TORCH_CUDA_ARCH_LIST
# is set.
GPU_ARCHITECTURES = ("80", "90", "100")
_KEY = re.compile(rb"mixflow_fast-build-key:torch=([^ ;]+) cuda=([^ ;]+) sources=([^ ;]+);")


@dataclass(frozen=True)
class Status:
    """State of the library: "built" (with the package), "jit" (on request) or "absent", and why."""

    state: str
    reason: str
    path: Path | None = None
    cuda: bool = False

    def serves(self, device_type: str) -> bool:
        """Whether the operators run on tensors of this device type."""
        return self.state != "absent" and (
            device_type == "cpu" or self.cuda and device_type == "cuda"
        )


def sources_folder() -> Path:
    """`csrc/`: inside the package in a wheel, beside it in a checkout."""
    inside = HERE / "csrc"
    return inside if inside.is_dir() else HERE.parent / "csrc"


def sources_hash() -> str:
    """Hash of the sources and of the flags that they are compiled with."""
    digest = hashlib.sha256(repr((CXX_FLAGS, NVCC_FLAGS)).encode())
    folder = sources_folder()
    for path in sorted(p for p in folder.glob("*") if p.suffix in (".h", ".cpp", ".cu")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def cache_root() -> Path:
    """PyTorch's extension cache, which TORCH_EXTENSIONS_DIR moves elsewhere."""
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(own) if own else Path(home) / "torch_extensions"


def cuda_toolkit() -> tuple[str | None, str]:
    """(version of nvcc if it fits PyTorch, else None; a description of nvcc or the lack of it)."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return None, "PyTorch is a CPU build"
    nvcc = Path(CUDA_HOME or "/nonexistent") / "bin" / "nvcc"
    if not nvcc.is_file():
        return None, f"no nvcc (CUDA_HOME is {CUDA_HOME})"
    text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", text)
    version = ".".join(match.groups()) if match else "unknown"
    if version.partition(".")[0] != torch.version.cuda.partition(".")[0]:
        return None, f"nvcc is of CUDA {version}, PyTorch of {torch.version.cuda}"
    return version, f"nvcc of CUDA {version}"


def _architecture_flags() -> list[str]:
    """Flags of nvcc; none where TORCH_CUDA_ARCH_LIST is set, which PyTorch follows.

    For more than the GPUs of this machine, because a home or an environment may be shared with
    machines that have others.
    """
    import torch

    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []
    known = [a for a in GPU_ARCHITECTURES if f"sm_{a}" in torch.cuda.get_arch_list()]
    here = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    known += [f"{major}{minor}" for major, minor in here]
    known = sorted(set(known), key=int) or ["80"]
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in known]
    return [*flags, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """One process at a time; the system releases the lock of a process that is killed.

    Yields False on a file system without locks, where others may be in it, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "flock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
                raise
            locked = False
        yield locked


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Puts the `ninja` of this Python environment on PATH: it may not have been activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def compile_library(folder: Path, verbose: bool = False) -> Path:
    """Compiles into `folder`, and loads the result to see that it can be.

    Raises:
        RuntimeError, OSError: no ninja or no compiler, or it failed; its output is in the text.
    """
    import torch
    from torch.utils import cpp_extension

    folder = folder.resolve()
    cuda, _ = cuda_toolkit()
    names = [*CPU_SOURCES, *(CUDA_SOURCES if cuda else ())]
    key = f"torch={torch.__version__} cuda={cuda or 'none'} sources={sources_hash()}"
    with _locked(folder), _ninja_on_path():
        # PyTorch's own lock is a file: a killed build leaves it behind, and all later ones wait.
        # Whoever holds our lock knows that nobody builds here.
        (folder / "lock").unlink(missing_ok=True)
        (folder / "mixflow_build_key.h").write_text(f'#define MIXFLOW_BUILD_KEY "{key}"\n')
        cpp_extension.load(
            name=NAME,
            sources=[str(sources_folder() / name) for name in names],
            extra_cflags=[*CXX_FLAGS, *(["-DMIXFLOW_WITH_CUDA"] if cuda else [])],
            extra_cuda_cflags=[*NVCC_FLAGS, *_architecture_flags()] if cuda else None,
            extra_ldflags=["-fopenmp", "-Wl,--as-needed", "-s"],
            extra_include_paths=[str(folder)],
            build_directory=str(folder),
            with_cuda=bool(cuda),
            is_python_module=False,
            verbose=verbose,
        )
    return folder / f"{NAME}.so"


def build(verbose: bool = False) -> Path:
    """Builds into the extension cache, unless the same build is there already. Returns its path.

    Raises:
        RuntimeError, OSError: as `compile_library`.
    """
    import torch

    cuda, _ = cuda_toolkit()
    asked = re.sub(r"\W+", "_", os.environ.get("TORCH_CUDA_ARCH_LIST", "")) if cuda else ""
    key = f"{torch.__version__}-{cuda or 'cpu'}-{sources_hash()}{asked and '-' + asked}"
    folder = cache_root() / f"{NAME}-{key}"
    library = folder / LIBRARY
    with _locked(folder) as locked:
        if who := _writable_by_others(folder):
            raise OSError(
                f"{who}, and to load a library from there is to run it: set TORCH_EXTENSIONS_DIR "
                "to a folder of your own"
            )
        if not library.is_file():
            place = folder / ("build" if locked else f"build-{socket.gethostname()}-{os.getpid()}")
            built = compile_library(place, verbose)
            # Renamed at the end, so that the name stands for a whole library only.
            os.replace(built, library)
            shutil.rmtree(place, ignore_errors=True)
    return library


def _problem(path: Path) -> tuple[str | None, bool]:
    """(why the library cannot be used here, or None; whether it has the CUDA part)."""
    import torch

    found = _KEY.search(path.read_bytes())
    if found is None:
        return "does not say what it was built of", False
    built_for, cuda, sources = (part.decode() for part in found.groups())
    if built_for != torch.__version__:
        return f"was built for PyTorch {built_for}, this is {torch.__version__}", False
    if sources != sources_hash():
        return "was built of other sources than those in csrc/", False
    return None, cuda != "none"


def _writable_by_others(path: Path) -> str | None:
    """Who else than this user and root could have put a file there; None if nobody could."""
    me = os.getuid()
    for place in (path.resolve(), *path.resolve().parents):
        status = place.stat()
        if status.st_uid not in (me, 0):
            return f"{place} belongs to user {status.st_uid}"
        # In a folder such as /tmp all may write, but nobody touches the files of others.
        if place != path.resolve() and status.st_mode & stat.S_ISVTX:
            continue
        if status.st_mode & stat.S_IWOTH:
            return f"every user may write {place}"
        if status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid):
            return f"the group {status.st_gid} may write {place}"
    return None


def _is_private(group: int) -> bool:
    """Whether a group is root's or the user's own, as many systems make one for each user."""
    import grp
    import pwd

    try:
        found, me = grp.getgrgid(group), pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return group == 0
    return group == 0 or (found.gr_name == me and not set(found.gr_mem) - {me})


def _registered() -> bool:
    import torch

    return hasattr(torch.ops.mixflow_fast, "adamw_ema_")


def _try(state: str, path: Path) -> Status:
    """Loads one library; "absent" with the reason where it cannot be used."""
    import torch

    problem, cuda = _problem(path)
    # Beside the package's own library its Python files are run, too.
    if problem is None and state == "jit" and (who := _writable_by_others(path)):
        problem = f"was passed over: {who}, and to load a library is to run it"
    if problem is None and not _registered():
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            problem = f"does not load ({error})"
    if problem is not None:
        return Status("absent", f"{path} {problem}")
    parts = "CPU and CUDA" if cuda else "CPU"
    words = {"built": "built with the package", "jit": "built on request"}[state]
    return Status(state, f"{words}: {parts}", path, cuda)


def _candidates() -> list[tuple[str, Path]]:
    """(state, path) of every library: usable ones first, and of these the ones with CUDA."""
    found = [("built", HERE / LIBRARY)]
    found += [("jit", path) for path in sorted(cache_root().glob(f"{NAME}-*/{LIBRARY}"))]
    found = [(state, path) for state, path in found if path.is_file()]

    def order(candidate: tuple[str, Path]) -> tuple[bool, bool]:
        problem, cuda = _problem(candidate[1])
        return problem is not None, not cuda

    return sorted(found, key=order)


@functools.lru_cache(maxsize=1)
def load() -> Status:
    """Makes `torch.ops.mixflow_fast.adamw_ema_` available if it can, and returns the result.

    Never raises and, unless MIXFLOW_BUILD=1, never compiles. Later calls return the first result.
    """
    reasons = []
    for state, path in _candidates():
        status = _try(state, path)
        if status.state != "absent":
            return status
        # The common cache holds libraries of other environments, which are no reason to report.
        if state == "built" or "passed over" in status.reason:
            reasons.append(status.reason)
    if os.environ.get("MIXFLOW_BUILD") == "1":
        try:
            return _try("jit", build())
        except Exception as error:
            reasons.append(f"MIXFLOW_BUILD=1, but the build failed: {error}")
    return Status("absent", "; ".join(reasons) or "it has not been built for this PyTorch")


def main(arguments: list[str]) -> int:
    """`python -m mixflow_fast.extension build | status`."""
    if arguments not in (["build"], ["status"]):
        print("usage: python -m mixflow_fast.extension build | status", file=sys.stderr)
        return 2
    if arguments == ["build"]:
        try:
            path = build(verbose=True)
        except (RuntimeError, OSError) as error:
            print(f"mixflow_fast.extension: the build failed: {error}", file=sys.stderr)
            return 1
        print(f"{path} (CUDA part: {'yes' if _problem(path)[1] else 'no, ' + cuda_toolkit()[1]})")
        return 0
    status = load()
    print(f"{status.state}: {status.reason}" + (f" ({status.path})" if status.path else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
