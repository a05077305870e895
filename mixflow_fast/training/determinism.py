"""`train.deterministic`: a GPU that repeats its bits, and what they depend on besides.

On a CPU runs repeat their bits anyway, with as many threads. On a GPU three things do not: sums by
atomics (backward passes of attention, of some gathers), algorithms that cuBLAS, cuDNN or Inductor
choose by timing, and cuBLAS' sums where several streams share its workspace. PyTorch can be told to
leave all of them out; an operator that has no other way then ends the run with its name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.backends import cuda, cudnn

from mixflow_fast.checkpoints.run_folder import RunState
from mixflow_fast.config.schema import TrainConfig
from mixflow_fast.environment import current_environment
from mixflow_fast.models import Execution

_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
# Those with which cuBLAS promises to repeat its bits: (size in KiB, number) of its buffers.
WORKSPACES = (":4096:8", ":16:8")


@dataclass(frozen=True)
class _Switches:
    """Settings of this process, as PyTorch keeps them."""

    algorithms: bool
    warn_only: bool
    filled: bool
    cudnn: bool
    benchmark: bool
    efficient: bool
    cudnn_attention: bool

    @classmethod
    def now(cls) -> _Switches:
        return cls(
            algorithms=torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
            filled=torch.utils.deterministic.fill_uninitialized_memory,
            cudnn=cudnn.deterministic,
            benchmark=cudnn.benchmark,
            efficient=cuda.mem_efficient_sdp_enabled(),
            cudnn_attention=cuda.cudnn_sdp_enabled(),
        )

    def set(self) -> None:
        torch.use_deterministic_algorithms(self.algorithms, warn_only=self.warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = self.filled
        cudnn.deterministic, cudnn.benchmark = self.cudnn, self.benchmark
        cuda.enable_mem_efficient_sdp(self.efficient)
        cuda.enable_cudnn_sdp(self.cudnn_attention)


# PyTorch's own choice of attention is left with flash, which has a deterministic backward pass, and
# math. Memory without values is not filled: that costs a pass each, and finds errors, not bits.
_ON = _Switches(
    algorithms=True,
    warn_only=False,
    filled=False,
    cudnn=True,
    benchmark=False,
    efficient=False,
    cudnn_attention=False,
)


class Determinism:
    """What `train.deterministic` changes in this process; nothing where it is off.

    To be made before anything runs on a GPU: cuBLAS reads its setting once.

    Args:
        wanted: `train.deterministic`.

    Raises:
        ValueError: cuBLAS has, or may have, another setting already.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._before: _Switches | None = None
        if wanted:
            _set_workspace()

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Switch it on, until `off`; an error inside switches it off at once."""
        if self._wanted:
            self._before = _Switches.now()
            _ON.set()
        try:
            yield
        except BaseException:
            self.off()
            raise

    def off(self) -> None:
        """Everything as it was before; again does nothing."""
        if self._before is not None:
            self._before.set()
            self._before = None


def _set_workspace() -> None:
    found = os.environ.get(_VARIABLE)
    if found in WORKSPACES:
        return
    if found is not None:
        raise ValueError(
            f"train.deterministic=true needs {_VARIABLE} to be {' or '.join(WORKSPACES)}, got "
            f"{found!r}: unset it, or export {_VARIABLE}={WORKSPACES[0]}"
        )
    if torch.cuda.is_initialized():
        raise ValueError(
            f"train.deterministic=true came too late: this process has used the GPU without "
            f"{_VARIABLE}, which cuBLAS reads once: export {_VARIABLE}={WORKSPACES[0]} before the "
            "program starts"
        )
    os.environ[_VARIABLE] = WORKSPACES[0]


def describe_determinism(wanted: bool, device: torch.device) -> str:
    """What `train.deterministic` does here, for people; "" where it is off.

    Args:
        wanted: `train.deterministic`.
        device: where the run trains.
    """
    if not wanted:
        return ""
    if device.type != "cuda":
        return "on a CPU it changes nothing but operators without such a way, which end the run"
    return (
        "deterministic algorithms alone, no choice by timing, attention by flash or math where "
        f"PyTorch chooses; {_VARIABLE}={os.environ.get(_VARIABLE)}. The same bits hold for the "
        "same kind of GPU, versions, ranks and micro-batch"
    )


def what_bits_depend_on(
    section: TrainConfig,
    split: tuple[int, int],
    device: torch.device,
    execution: Execution,
    objective: str,
) -> dict[str, str] | None:
    """What a deterministic run's last bits depend on and may change on a resume, by name.

    Args:
        section: the section `train`.
        split: number of ranks, and images in a micro-batch.
        device: where the run trains.
        execution: how the network is run.
        objective: which implementation runs, in words.

    Returns:
        None for a run that is not deterministic.
    """
    if not section.deterministic:
        return None
    here, (ranks, microbatch) = current_environment(device), split
    found = {
        "device": here.device,
        "torch": here.torch,
        "CUDA": here.cuda,
        "cuDNN": here.cudnn,
        "Triton": here.triton,
        "threads": here.threads,
        "ranks": ranks,
        "micro-batch": microbatch,
        "engine": "ddp" if section.engine == "ddp" else f"ZeRO {section.zero_stage}",
        "sums over the ranks": section.reduce_dtype,
        "mode": execution.mode,
        "compiled at once": execution.compile_unit,
        "checkpointing": execution.checkpointing,
        "objective": objective,
    }
    return {name: str(value) for name, value in found.items()}


def compare_bits(out: Path, state: RunState | None, now: Mapping[str, str] | None) -> list[str]:
    """A line for a deterministic run that goes on, but not with the bits that it would have had.

    Args:
        out: run folder.
        state: of the checkpoint it goes on from; None for a new run.
        now: of `what_bits_depend_on`.
    """
    before = state.bits if state is not None else None
    if before is None or now is None:
        return []
    names = [*before, *(name for name in now if name not in before)]
    changed = [f"{n} {before.get(n)} -> {now.get(n)}" for n in names if before.get(n) != now.get(n)]
    if not changed:
        return []
    return [f"{out}: deterministic, but from here on with other last bits: {', '.join(changed)}"]
