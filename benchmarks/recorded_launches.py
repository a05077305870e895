"""Launches of kernels that are recorded instead of made, on a machine without a GPU.

Triton itself specialises each launch for an architecture, and would then compile it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch

from mixflow_fast.kernels import runtime


@dataclass(frozen=True)
class Launch:
    """A launch that was not made: the arguments of `triton.compile`."""

    function: object
    key: str = field(repr=False)
    source: tuple[dict, dict, dict]  # signature, constants, attributes
    options: dict
    arguments: dict[str, object] = field(repr=False)
    programs: int

    @property
    def kernel(self) -> str:
        return self.function.fn.__name__

    @property
    def threads(self) -> int:
        return self.programs * 32 * self.options["num_warps"]

    @property
    def moved_bytes(self) -> int:
        """Of all tensors that it is given, each once."""
        tensors = [x for x in self.arguments.values() if isinstance(x, torch.Tensor) and x.numel()]
        return sum({x.data_ptr(): x.numel() * x.element_size() for x in tensors}.values())


class _NoDevice:
    """What Triton asks a driver before it compiles, answered for an architecture."""

    def __init__(self, arch: int) -> None:
        self.target = target_of(arch)

    def get_current_device(self) -> str:
        # Triton keeps a launcher for each device: one that no real device has, for each target.
        return f"offline sm_{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> object:
        return self.target


def target_of(arch: int) -> object:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", arch, 32)


@contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Inside, kernels can be launched on CPU tensors: the list grows, outputs stay unwritten."""
    triton, launches, given = runtime.triton, [], {}
    run = triton.runtime.jit.JITFunction.run

    def remember(kernel, *args, grid, warmup, **kwargs):
        names = zip(kernel.arg_names, args, strict=False)
        given.update(arguments={**dict(names), **kwargs}, programs=math.prod(grid))
        return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    def record(*, fn, key, compile, **_) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        # JSON knows no tuples, and Triton hashes the options.
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        source = (compile["signature"], compile["constants"], compile["configs"][0])
        launches.append(Launch(fn.jit_function, key, source, options, **given))
        return True  # Triton then neither compiles nor launches.

    driver = triton.runtime.driver
    active = driver._active
    with (
        triton.knobs.runtime.scope(),
        mock.patch.object(runtime, "can_launch", lambda _: True),
        mock.patch.object(triton.runtime.jit.JITFunction, "run", remember),
    ):
        triton.knobs.runtime.jit_cache_hook = record
        driver.set_active(_NoDevice(arch))
        try:
            yield launches
        finally:
            driver.set_active(active)
