"""The library of `csrc/`: built, found, refused, and missing."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from mixflow_fast import extension
from mixflow_fast.optim import adamw_ema
from mixflow_fast.optim.adamw_ema import AdamWEMA
from tests.support.csrc_library import require_library

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "tests", "docs", "*.so")


def run(*arguments: str, cwd: Path, expected: int = 0, **env: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MIXFLOW_BUILD")}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**inherited, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == expected, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("sources") / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return copy


def wheel(sources: Path, out: Path, **env: str) -> tuple[Path, str]:
    options = ("--no-deps", "--no-index", "--no-build-isolation", "-v", "-w", str(out))
    text = run("-m", "pip", "wheel", ".", *options, cwd=sources, **env)
    (built,) = out.glob("*.whl")
    return built, text


def test_wheel_with_the_library(sources: Path, tmp_path: Path) -> None:
    require_library()
    built, _ = wheel(sources, tmp_path)
    assert "linux" in built.name and "none-any" not in built.name
    with zipfile.ZipFile(built) as archive:
        archive.extractall(tmp_path / "site")
    names = [p.name for p in (tmp_path / "site" / "mixflow_fast").glob("*.so")]
    assert names == [extension.LIBRARY]
    code = (
        "import mixflow_fast, sys; assert 'mixflow_fast.extension' not in sys.modules\n"
        "from mixflow_fast import extension; print(extension.__file__, extension.load())"
    )
    nowhere = str(tmp_path / "empty")
    text = run("-c", code, cwd=tmp_path / "site", TORCH_EXTENSIONS_DIR=nowhere)
    assert str(tmp_path / "site") in text and "state='built'" in text, text


def test_compiler_that_fails_does_not_fail_the_installation(sources: Path, tmp_path: Path) -> None:
    broken = tmp_path / "bin" / "c++-that-fails"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho 'no such compiler today' >&2\nexit 1\n")
    broken.chmod(0o755)
    built, text = wheel(sources, tmp_path / "out", CXX=str(broken))
    assert "csrc/ was not built, the package works without it" in text
    names = zipfile.ZipFile(built).namelist()
    assert "mixflow_fast/csrc/binding.cpp" in names and not [n for n in names if n.endswith(".so")]
    target = tmp_path / "target"
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--target", str(target))
    run("-m", "pip", "install", *options, "-e", str(sources), cwd=tmp_path, CXX=str(broken))


def test_nothing_is_built_where_it_is_not_wanted(sources: Path, tmp_path: Path) -> None:
    built, _ = wheel(sources, tmp_path, MIXFLOW_BUILD="0")
    assert built.name.endswith("none-any.whl")


def test_built_on_request_past_the_lock_of_a_killed_build(tmp_path: Path) -> None:
    """The folder of a build that was killed half-way: PyTorch's lock file and part of a library."""
    cache, code = tmp_path / "cache", "from mixflow_fast import extension as e; print(e.load())"
    env = {"TORCH_EXTENSIONS_DIR": str(cache), "MIXFLOW_BUILD": "1"}
    key = f"{torch.__version__}-{extension.cuda_toolkit()[0] or 'cpu'}-{extension.sources_hash()}"
    folder = cache / f"{extension.NAME}-{key}"
    (folder / "build").mkdir(parents=True)
    (folder / "build" / "lock").touch()
    (folder / "build" / f"{extension.NAME}.so").write_bytes(b"half")
    (folder / "flock").touch()
    checkout = tmp_path / "checkout"
    for name in ("mixflow_fast", "kernels", "csrc"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    assert "state='jit'" in run("-c", code, cwd=checkout, **env)
    assert [p.name for p in sorted(folder.iterdir())] == [extension.LIBRARY, "flock"]
    # The next run finds it, builds nothing and needs no compiler.
    env = {"TORCH_EXTENSIONS_DIR": str(cache), "CXX": "/nonexistent/c++"}
    text = run("-c", code + "; e.main(['build'])", cwd=checkout, **env)
    assert "state='jit'" in text and f"{folder / extension.LIBRARY} (CUDA part: " in text


def test_one_process_builds_and_the_others_wait(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from mixflow_fast.extension import _locked\n"
    code += f"with _locked(Path({str(tmp_path)!r})): print('in', flush=True)"
    with open(tmp_path / "flock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
        time.sleep(0.5)
        assert child.poll() is None
    out, _ = child.communicate(timeout=60)
    assert out == b"in\n" and child.returncode == 0


def test_without_locks_each_process_builds_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    def compile_library(folder: Path, verbose: bool) -> Path:
        places.append(folder)
        folder.mkdir()
        (folder / "x.so").write_bytes(b"x")
        return folder / "x.so"

    places: list[Path] = []
    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setattr(extension, "compile_library", compile_library)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert extension.build().read_bytes() == b"x"
    assert places[0].name.endswith(f"-{os.getpid()}") and not places[0].exists()


def library_for(folder: Path, change: tuple[str, str]) -> Path:
    """A copy of the library whose record names another PyTorch or other sources."""
    path = folder / extension.LIBRARY
    old, new = (part.encode() for part in change)
    assert len(old) == len(new)
    data = require_library().path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    return path


def test_libraries_of_others_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_library()
    monkeypatch.setattr(extension, "HERE", tmp_path)
    monkeypatch.setattr(extension, "sources_folder", lambda: ROOT / "csrc")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("MIXFLOW_BUILD", raising=False)
    load = extension.load.__wrapped__

    assert load().state == "absent" and "has not been built" in load().reason
    own = f"torch={torch.__version__}"
    library_for(tmp_path, (own, own[:-1] + "?"))
    assert "was built for PyTorch" in load().reason
    library_for(tmp_path, (f"sources={extension.sources_hash()}", "sources=" + 16 * "0"))
    assert "was built of other sources" in load().reason
    (tmp_path / extension.LIBRARY).write_bytes(b"\x7fELF")
    assert "does not say what it was built of" in load().reason
    assert load().state == "absent" and not load().serves("cpu")
    monkeypatch.setenv("MIXFLOW_BUILD", "1")
    monkeypatch.setattr(extension, "build", lambda: (_ for _ in ()).throw(RuntimeError("no ninja")))
    assert "the build failed: no ninja" in load().reason


def test_a_library_that_others_could_have_written_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "shared" / "cache"
    folder = cache / f"{extension.NAME}-1"
    folder.mkdir(parents=True)
    library = folder / extension.LIBRARY
    shutil.copy(require_library().path, library)
    monkeypatch.setattr(extension, "HERE", tmp_path)
    monkeypatch.setattr(extension, "sources_folder", lambda: ROOT / "csrc")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(cache))
    monkeypatch.delenv("MIXFLOW_BUILD", raising=False)
    loaded: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(extension, "_registered", lambda: False)
    load = extension.load.__wrapped__

    assert load().state == "jit" and loaded == [str(library)]
    for place, mode in ((folder, 0o777), (library, 0o666), (tmp_path / "shared", 0o777)):
        before = place.stat().st_mode
        place.chmod(mode)
        status = load()
        assert status.state == "absent" and len(loaded) == 1
        assert f"passed over: every user may write {place}, and to load" in status.reason
        if place.name == "shared":  # nor is one built there
            monkeypatch.setenv("MIXFLOW_BUILD", "1")
            assert "the build failed: every user may write" in load().reason
            monkeypatch.delenv("MIXFLOW_BUILD")
        place.chmod(before)
    (tmp_path / "shared").chmod(0o1777)  # as /tmp
    assert load().state == "jit" and len(loaded) == 2
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    if library.stat().st_uid:
        assert f"{library} belongs to user {library.stat().st_uid}" in load().reason
    elif os.geteuid() == 0:
        os.chown(library, 12345, 0)
        assert f"{library} belongs to user 12345" in load().reason


def test_cuda_part_only_with_a_matching_nvcc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils import cpp_extension

    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert extension.cuda_toolkit() == (None, "PyTorch is a CPU build")
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    assert extension.cuda_toolkit()[0] is None and "no nvcc" in extension.cuda_toolkit()[1]
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    assert extension.cuda_toolkit()[0] == "12.8"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert extension.cuda_toolkit() == (None, "nvcc is of CUDA 12.8, PyTorch of 13.0")


def test_without_it_one_warning_and_foreach(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    absent = extension.Status("absent", "it has not been built for this PyTorch")
    monkeypatch.setattr(extension, "load", lambda: absent)
    monkeypatch.setattr(adamw_ema, "_warned", set())
    with pytest.raises(ValueError, match=r'impl="csrc" needs .* mixflow_fast.extension build'):
        AdamWEMA([torch.nn.Parameter(torch.ones(3))], impl="csrc")

    def steps(impl: str) -> torch.Tensor:
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = AdamWEMA([p], lr=0.1, impl=impl)
        for _ in range(2):
            p.grad = torch.ones(3)
            optimizer.step()
        return p.detach()

    # Another test may have left a process group, which would say the rank.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setenv("RANK", "1")
    steps("auto")
    monkeypatch.setenv("RANK", "0")
    steps("foreach")
    assert not [str(w.message) for w in recwarn if "AdamWEMA" in str(w.message)]
    found = steps("auto")
    assert torch.equal(found, steps("auto")) and torch.equal(found, steps("foreach"))
    (warning,) = (w for w in recwarn if "AdamWEMA" in str(w.message))
    assert f"`{extension.COMMAND}`" in str(warning.message)
    assert "has not been built" in str(warning.message)
