"""The operator mixed_source in the registry of `benchmarks/ops.py`, which says what an entry is.

Its source is what a predictor returns, float32 (B, 2 C, H, W), and its noise every provider draws
itself.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks import plain
from mixflow_fast.diagnostics.kernel_cases import SEED, Draw, Inputs, Tensors
from mixflow_fast.flow.source import bounded_log_var, halves
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.mixed_source import mix_and_interpolate, mix_and_interpolate_reference
from mixflow_fast.kernels.philox import Stream

if TYPE_CHECKING:
    from benchmarks.ops import Call, Cell, Made, Wrap

LOG_VAR_RANGE = (-12.0, 6.0)
OPTIONS = {"clock": "data_at_1", "path": "linear", "mode": "moments"}


class SourceEntry:
    """Input, noise end and KL of a mixed source in mode "moments", linear path; and the gradient
    of the source from those of the three.
    """

    name = "mixed_source"

    def providers(self, cell: Cell) -> tuple[str, ...]:
        return ("eager", "compile", "mixflow_fast")

    def bytes(self, cell: Cell) -> int:
        """Of any implementation that stores no noise: each tensor once in each direction.

        Forward reads x1 and the source and writes x_m and x0; backward reads the gradients of x_m
        and x0 and the source and writes the source's.
        """
        x1 = cell.dtype.itemsize
        forward, backward = 2 * x1 + 8 + 4, x1 + 4 + 8 + 8
        return cell.elements * (forward + (backward if cell.mode == "full" else 0))

    def result_dtype(self, cell: Cell, name: str) -> torch.dtype:
        return cell.dtype if name == "x" else torch.float32

    def inputs(self, cell: Cell, device: torch.device) -> Inputs:
        draw = Draw(device, cell.dtype, empty=False)
        B, C, *rest = cell.shape
        single = partial(draw.normal, dtype=torch.float32)
        tensors = {
            "x1": draw.normal(*cell.shape, mean=0.5),
            "predicted": single(B, 2 * C, *rest).requires_grad_(),
            "w": draw.uniform(B),
            "slowed_t": draw.uniform(B),
            "ids": torch.arange(B, device=device) + 10_000,
        }
        return Inputs(tensors, (draw.normal(*cell.shape), single(*cell.shape), draw.uniform(B)))

    def plain(self, cell: Cell, inputs: Inputs, wrap: Wrap | None = None) -> Call:
        function = plain.mixed_source if wrap is None else wrap(plain.mixed_source)
        given = {name: inputs.tensors[name] for name in ("x1", "predicted", "w", "slowed_t")}

        def call() -> Made:
            with torch.set_grad_enabled(cell.mode == "full"):
                x, x0, kl, eps = function(**given)
            return _with_gradient({"x": x, "x0": x0, "kl": kl}, inputs) | {"eps": eps}

        return call

    def ours(self, cell: Cell, inputs: Inputs, impl: str) -> tuple[Call, str]:
        given = inputs.tensors
        seed = philox.seed_tensor(SEED, given["x1"].device)

        def eps() -> Tensor:
            numel = given["x1"].shape[1:].numel()
            noise = philox.normal(seed, Stream.NOISE, given["ids"], numel, impl)
            return noise.view(given["x1"].shape)

        def call() -> Made:
            with torch.set_grad_enabled(cell.mode == "full"):
                made = mix_and_interpolate(
                    given["x1"],
                    given["predicted"],
                    None,
                    given["w"],
                    given["slowed_t"],
                    seed,
                    given["ids"],
                    log_var_range=LOG_VAR_RANGE,
                    impl=impl,
                    **OPTIONS,
                )
            made = dict(zip(("x", "x0", "kl"), made, strict=True))
            return _with_gradient(made, inputs) | {"eps": eps}

        return call, f"mix_and_interpolate(impl={impl!r})"

    def truth(self, cell: Cell, inputs: Inputs, made: Made | None) -> Tensors:
        """The reference in float64 on the noise that the provider itself used."""
        exact = inputs.double()
        given = exact.tensors
        eps = made["eps"]() if callable(made["eps"]) else made["eps"]
        with torch.set_grad_enabled(cell.mode == "full"):
            mean, log_var = halves(given["predicted"], None)
            log_var = bounded_log_var(log_var, LOG_VAR_RANGE)
            found = mix_and_interpolate_reference(
                given["x1"],
                mean,
                log_var,
                given["w"],
                given["slowed_t"],
                SEED,
                None,
                eps=eps.double(),
                **OPTIONS,
            )
        return _with_gradient(dict(zip(("x", "x0", "kl"), found, strict=True)), exact)


def _with_gradient(made: Tensors, inputs: Inputs) -> Tensors:
    """The results and, where they carry one, the gradient of the source."""
    found = {name: value.detach() for name, value in made.items()}
    if made["x"].requires_grad:
        predicted = inputs.tensors["predicted"]
        results = list(made.values())
        (found["dpredicted"],) = torch.autograd.grad(results, predicted, inputs.upstream)
    return found
