"""`benchmarks/gpu_suite.sh` by a stand-in for Python, and what only a GPU would find missing."""

import inspect
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity

ROOT = Path(__file__).resolve().parents[2]


def _calls(folder: Path) -> list[str]:
    """What the stand-in for Python was called with, without pages and the folder of the plots."""
    lines = (folder / "calls").read_text().splitlines()
    lines = [line for line in lines if "-m benchmarks.page" not in line]
    return [re.sub(r" --plots \S+/plots", "", line) for line in lines]


def _pages(folder: Path) -> int:
    return (folder / "calls").read_text().count("-m benchmarks.page")


@pytest.mark.parametrize("probe", [0, 3])
def test_gpu_suite_fits_nine_minutes_and_reports_red(monkeypatch, tmp_path, probe) -> None:
    """The script with a stand-in for Python that notes its arguments and fails the second part."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"#!/bin/sh\necho $PYTORCH_CUDA_ALLOC_CONF, $@ >> {tmp_path}/calls\n"
        f'case "$*" in -c*) exit {probe} ;; *kernels*) exit 1 ;; esac\n'
    )
    stand_in.chmod(0o755)
    out = tmp_path / "out"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    environment = os.environ | {"PYTHON": str(stand_in)}
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_suite.sh"), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    calls = _calls(tmp_path)
    segments = "expandable_segments:True"
    assert calls.pop(0).startswith(f"{segments}, -c import")  # a GPU, and such segments
    # What AdamWEMA's rows need, beside all else.
    (build,) = (call for call in calls if "mixflow_fast.extension build" in call)
    calls.remove(build)
    calls[1:3] = sorted(calls[1:3])  # side by side
    assert [call.split("--deadline")[0].strip() for call in calls] == [
        ", -m benchmarks.first_contact",
        ", -m benchmarks.checks --family blocks --level smoke",
        ", -m benchmarks.checks --family objective --level smoke",
        ", -m benchmarks.run --suite kernels",
        f"{'' if probe else segments}, -m benchmarks.run --suite step",
    ]
    assert all(f"--device cuda --out {out}" in call for call in calls)
    deadlines = [float(call.split("--deadline ")[1].split()[0]) for call in calls]
    assert "exit status 1" in (out / "suite.log").read_text()
    # Each part may overrun by 25 s; the last has what the others leave of 530 s, here all of it.
    assert deadlines[:4] == [35, 125, 125, 130] and 480 <= deadlines[4] <= 505
    assert 60 + 150 + 155 + 165 == 530 and _pages(tmp_path) == 4
    assert "total=530\n" in (ROOT / "benchmarks" / "gpu_suite.sh").read_text()


@pytest.mark.parametrize(
    ("parts", "status", "modules"),
    [
        (["kernels"], 1, ["run --suite kernels"]),
        (["step", "kernels"], 1, ["run --suite kernels", "run --suite step"]),
        (["correctness"], 3, ["checks --family blocks", "checks --family objective"]),
        (["first-contact"], 0, ["first_contact"]),
        (["sampling"], 0, ["sampling"]),
        (["loaders", "sampling"], 0, ["loaders", "sampling"]),
        (["speed"], 2, []),
    ],
)
def test_parts_of_the_gpu_suite(tmp_path, parts, status, modules) -> None:
    """One part has the whole time; the blocks' checks run in the background and are waited for."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"#!/bin/sh\necho $@ >> {tmp_path}/calls\n"
        'case "$*" in *kernels*) exit 1 ;; *blocks*) sleep 0.5; exit 3 ;; esac\n'
    )
    stand_in.chmod(0o755)
    script = str(ROOT / "benchmarks" / "gpu_suite.sh")
    done = subprocess.run(
        ["bash", script, str(tmp_path / "out"), *parts],
        env=os.environ | {"PYTHON": str(stand_in)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == status, done.stdout + done.stderr
    calls = _calls(tmp_path) if modules else []
    assert ("-m mixflow_fast.extension build" in calls) == ("step" in parts)
    calls = sorted(call for call in calls if call.startswith("-m benchmarks"))
    assert [call.split(" --deadline")[0] for call in calls] == [
        f"-m benchmarks.{m}" for m in modules
    ]
    if len(parts) == 1 and parts != ["first-contact"]:  # which is short by itself
        # All the time is its own: not less than the probe needed.
        assert all(float(c.split("--deadline ")[1].split()[0]) >= 485 for c in calls)


def test_few_files_come_back_and_plots_add_up(tmp_path) -> None:
    """A stand-in that writes what a run writes; the parts one by one, into one folder."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        "#!/bin/bash\n"
        'out=/dev/null; while [ $# -gt 0 ]; do case "$1" in\n'
        "  --out) out=$2 ;; --plots) plots=$2 ;; --suite) name=$2 ;; --family) name=$2 ;;\n"
        '  benchmarks.page) touch "$2/page.html"; exit 0 ;; esac\n'
        "shift; done\n"
        '[ -z "$name" ] || touch "$out"/correctness_{blocks,objective}.jsonl\n'
        '[ -z "$plots" ] || for op in 1 2 3 4 5 6 7 8; do echo $op > "$plots/$name$op.png"; done\n'
        '[ -z "$plots" ] || touch "$out"/{rows.jsonl,environment.json}\n'
        "case $name in '') echo compiler missing; exit 1 ;; esac\n"
    )
    stand_in.chmod(0o755)
    out = tmp_path / "out"
    for part in ("correctness", "kernels", "step", "kernels"):
        done = subprocess.run(
            ["bash", str(ROOT / "benchmarks" / "gpu_suite.sh"), "--smoke", str(out), part],
            env=os.environ | {"PYTHON": str(stand_in)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in out.iterdir()} == {
        *("suite.log", "correctness_blocks.jsonl", "correctness_objective.jsonl"),
        *("rows.jsonl", "environment.json", "plots.tgz", "page.html"),
    }
    with tarfile.open(out / "plots.tgz") as packed:
        names = {Path(name).name for name in packed.getnames() if name.endswith(".png")}
    assert names == {f"{part}{op}.png" for part in ("kernels", "step") for op in range(1, 9)}


def test_smoke_run_of_the_gpu_suite(tmp_path) -> None:
    """Every part on the CPU, GPUs hidden; `test_run.py` and `test_checks.py` run what it calls."""
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES, $@" >> {tmp_path}/calls\n')
    stand_in.chmod(0o755)
    script, out = str(ROOT / "benchmarks" / "gpu_suite.sh"), tmp_path / "out"
    environment = os.environ | {"PYTHON": str(stand_in), "CUDA_VISIBLE_DEVICES": "0"}
    options = dict(env=environment, capture_output=True, text=True, timeout=60)
    done = subprocess.run(["bash", script, "--smoke", str(out)], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no speeds" in done.stdout
    calls = sorted(_calls(tmp_path))
    assert [call.split(" --deadline")[0] for call in calls] == [
        ", -m benchmarks.checks --family blocks --level timed",
        ", -m benchmarks.checks --family objective --level timed",
        ", -m benchmarks.first_contact --smoke",
        ", -m benchmarks.loaders --smoke",
        ", -m benchmarks.run --suite kernels --smoke",
        ", -m benchmarks.run --suite step --smoke",
        ", -m benchmarks.sampling --smoke",
    ]
    assert _pages(tmp_path) == 6
    assert all(call.endswith(f"--device cpu --out {out}") for call in calls)
    done = subprocess.run(["bash", script, "--fast"], **options)
    assert done.returncode == 2 and "got --fast" in done.stderr


def test_what_is_called_on_a_gpu_only_is_there() -> None:
    """Names that no test on a CPU reaches, in the torch that is installed."""
    cuda = (
        *("_sleep", "Event", "CUDAGraph", "graph", "Stream", "stream", "current_stream"),
        *("synchronize", "empty_cache", "memory_stats", "memory_allocated"),
        *("max_memory_allocated", "max_memory_reserved", "reset_peak_memory_stats"),
        *("get_device_name", "get_device_properties", "is_available"),
        *("graph_pool_handle", "device"),
    )
    assert {"pool", "capture_error_mode"} <= set(inspect.signature(torch.cuda.graph).parameters)
    assert [name for name in cuda if not hasattr(torch.cuda, name)] == []
    assert '"num_alloc_retries"' in torch.cuda.memory_stats.__doc__
    assert issubclass(torch.OutOfMemoryError, RuntimeError)
    assert ProfilerActivity.CUDA and torch.autograd.DeviceType.CUDA
    for name in ("recompile_limit", "automatic_dynamic_shapes"):
        assert hasattr(torch._dynamo.config, name)
    assert "max_autotune" in torch._inductor.list_options()
    assert "max-autotune-no-cudagraphs" in torch._inductor.list_mode_options()
    # Set only where a GPU is measured; reading it back shows that the name is not a new attribute.
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        assert isinstance(backend.allow_tf32, bool)


@pytest.mark.long
def test_the_whole_suite_on_the_cpu(tmp_path) -> None:
    """Every part with the real Python; few files come back, and the page has all of them."""
    script, out = str(ROOT / "benchmarks" / "gpu_suite.sh"), tmp_path / "out"
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", script, "--smoke", str(out)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(out.iterdir())) == 7
    text = (out / "page.html").read_text()
    assert "no number here is a speed" in text and "not measured" not in text
    assert text.count("data:image/png;base64") == 10  # eight ops of kernels, the step, sampling
