"""Sampling a batch, ours against SiT's official loops: `python -m benchmarks.sampling`.

Each call draws starting noise and labels and goes to the samples. The network is the same object
for all that are not compiled, and so are steps and guidance. What is timed is right first: from the
same noise ours and the official loop end at the same samples. On the CPU the numbers that count are
the ratios, of one process in which the two take turns.

Exit status: 0 measured, 1 a wrong result (which has no speed), 2 it cannot be measured here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import rows, timing
from benchmarks.flops import PEAK_TFLOPS
from benchmarks.plain_sampling import sample_ode, sample_sde
from benchmarks.rows import CellRows, percentiles
from mixflow_fast.cli.errors import quiet_without_reader
from mixflow_fast.messages import error_line
from mixflow_fast.models import Transformer, build
from mixflow_fast.models.flops import count
from mixflow_fast.sampling.execution import Mode, network_for
from mixflow_fast.sampling.guidance import Guidance, guided_velocity
from mixflow_fast.sampling.prepared import PreparedSampling
from mixflow_fast.sampling.sampler import Sampler

OURS, OFFICIAL = "mixflow_fast", "official"
ROUNDS = 7
# Relative, between two orders of the same float32 operations; bf16 networks amplify them.
_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
_SMALL = dict(input_size=16, in_channels=3, num_classes=2, learn_sigma=False)
_TOY = dict(input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=10)


@dataclass(frozen=True)
class Cell:
    """One network, batch and sampler.

    Attributes:
        name: of the network, in the rows.
        network: name and arguments of `build`.
        steps: intervals.
        method: "euler", "heun" or "sde_euler".
    """

    name: str
    network: tuple[str, dict[str, int | bool]]
    batch: int
    steps: int
    method: str
    cfg_scale: float

    @property
    def sampler(self) -> Sampler:
        return Sampler(self.method, self.steps)

    @property
    def guidance(self) -> Guidance:
        return Guidance(self.cfg_scale, 3)

    @property
    def label(self) -> str:
        guided = "" if self.cfg_scale == 1.0 else f", cfg {self.cfg_scale:g}"
        return f"{self.name}, {self.steps} steps{guided}"


def cells(device: torch.device, smoke: bool) -> list[Cell]:
    """What is measured: the cells that tell most come first."""
    if smoke:
        found = [("toy", ("SiT-S/2", _TOY), 2, 2, (1.0, 1.5))]
    elif device.type == "cuda":
        xl = "SiT-XL/2", {"input_size": 32}
        found = [("SiT-XL/2-256", xl, 64, 10, (1.5, 1.0)), ("SiT-XL/2-256", xl, 8, 10, (1.5,))]
    else:
        small = "SiT-S/4", dict(_SMALL, depth=4, hidden_size=96, num_heads=4)
        found = [
            ("recipe photos", small, 64, 10, (1.0, 1.5)),
            ("SiT-S/2-128", ("SiT-S/2", {"input_size": 16}), 1, 5, (1.0, 1.5)),
        ]
    return [
        Cell(name, network, batch, steps, method, scale)
        for name, network, batch, steps, scales in found
        for method in ("euler", "sde_euler", "heun")
        for scale in scales
    ]


@torch.no_grad()
def make_network(cell: Cell, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A network whose weights are not the zeros of the start."""
    torch.manual_seed(0)
    name, arguments = cell.network
    model = build(name, **arguments).to(device, dtype).eval()
    for value in model.parameters():
        value += 0.02 * torch.randn_like(value)
    return model


def official(cell: Cell, model: Transformer) -> Callable[[], Tensor]:
    """A call of the official loop, noise and labels included."""
    device = next(model.parameters()).device
    shape = (cell.batch, model.in_channels, model.input_size, model.input_size)

    def call() -> Tensor:
        z = torch.randn(shape, device=device)
        y = torch.randint(0, model.num_classes, (cell.batch,), device=device)
        if cell.method == "sde_euler":
            return sample_sde(model, z, y, cell.steps, cell.cfg_scale).cpu()
        theirs = {"euler": "euler", "heun": "heun2"}[cell.method]
        return sample_ode(model, z, y, cell.steps, theirs, cell.cfg_scale).cpu()

    return call


def ours(cell: Cell, model: Transformer, mode: Mode) -> Callable[[], Tensor]:
    """A call of ours; compilation and capture happen in the first."""
    prepared = PreparedSampling(
        model, cell.sampler, cell.guidance, batch_size=cell.batch, mode=mode
    )
    return lambda: prepared.draw(torch.arange(cell.batch)).x


@torch.no_grad()
def difference(cell: Cell, model: Transformer) -> float:
    """Relative difference of the two loops' samples from the same noise."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(2)
    shape = (cell.batch, model.in_channels, model.input_size, model.input_size)
    z, *noises = (torch.randn(shape, generator=generator).to(device) for _ in range(cell.steps + 1))
    y = (torch.arange(cell.batch) % model.num_classes).to(device)
    velocity = guided_velocity(model, y, cell.guidance)
    own, _ = cell.sampler.run(velocity, z, lambda step: noises[step])
    if cell.method == "sde_euler":
        left = iter(noises)

        def draw(x: Tensor) -> Tensor:
            return next(left).repeat(len(x) // cell.batch, 1, 1, 1)

        theirs = sample_sde(model, z, y, cell.steps, cell.cfg_scale, draw)
    else:
        method = {"euler": "euler", "heun": "heun2"}[cell.method]
        theirs = sample_ode(model, z, y, cell.steps, method, cell.cfg_scale)
    return float((own - theirs).double().norm() / theirs.double().norm())


class SamplingSuite:
    """Times every cell; `refused` are those without a speed, and why."""

    def __init__(
        self,
        device: torch.device,
        writer: rows.Writer,
        deadline: rows.Deadline,
        smoke: bool = False,
        rounds: int = ROUNDS,
    ) -> None:
        self.refused: list[str] = []
        self._device, self._writer, self._deadline = device, writer, deadline
        self._smoke, self._rounds = smoke, 2 if smoke else rounds
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._networks: tuple[object, Transformer, Transformer] | None = None
        self._matmul = timing.matmul_tflops(8192) if device.type == "cuda" else None

    def run(self) -> None:
        """Every cell in turn, as far as the deadline goes."""
        if self._device.type == "cuda":
            # A batch has one shape; the default of 8 would fall back to eager.
            torch._dynamo.config.automatic_dynamic_shapes = False
            torch._dynamo.config.recompile_limit = 256
        expected = rows.Expectation(first=1.0 if self._smoke else 60.0)
        for cell in cells(self._device, self._smoke):
            if self._deadline.fits(f"{cell.method}: {cell.label}", expected.seconds()):
                start = self._deadline.spent()
                try:
                    self._measure(cell)
                except Exception as error:  # the next one may run
                    self._refuse(cell, error_line(error))
                expected.saw(self._deadline.spent() - start)

    def _refuse(self, cell: Cell, why: str) -> None:
        self.refused.append(f"sampling {cell.method}, {cell.label}: {why}")
        print(f"{self.refused[-1]}: RED, no speed", flush=True)

    def _measure(self, cell: Cell) -> None:
        model, compiled = self._network(cell)
        shape = [cell.batch, model.in_channels, model.input_size, model.input_size]
        dtype = str(self._dtype).removeprefix("torch.")
        how = timing.rounds_method(0.0)
        out = CellRows(self._writer, "sampling", cell.method, cell.label, shape, dtype, how)
        error = difference(cell, model)
        if not error <= _LIMITS[self._dtype]:
            self._refuse(cell, f"the two loops differ by {error:.2g}")
            return
        calls, notes = self._calls(cell, model, compiled, out)
        times = timing.rounds_ms(calls, self._device, 0.0, self._rounds)
        flops = count(model).forward * (1 if cell.cfg_scale == 1.0 else 2) * cell.sampler.nfe
        for provider, samples in times.items():
            latency = percentiles(samples)
            out.add(provider, "latency_ms", latency, notes[provider])
            out.add(provider, "samples_per_s", latency.rate(1e3 * cell.batch), notes[provider])
            if self._device.type == "cuda":
                # Of the calls that are needed: those that the official SDE makes twice count once.
                reached = latency.rate(flops * cell.batch / 1e9)
                out.add(provider, "model_tflops", reached, notes[provider])
                of_matmul = reached.times(100 / self._matmul)
                out.add(provider, "percent_of_matmul", of_matmul, notes[provider])
                out.add(provider, "percent_of_989", reached.times(100 / PEAK_TFLOPS),
                        notes[provider])  # fmt: skip
        for provider in times:
            if provider != OFFICIAL:
                ratio = rows.paired_ratio(times[OFFICIAL], times[provider])
                out.add_ratio(provider, OFFICIAL, ratio, notes[OFFICIAL])
                print(f"  {cell.method:10} {cell.label:34} {provider:22} {ratio}", flush=True)

    def _network(self, cell: Cell) -> tuple[Transformer, Transformer]:
        """The cell's network, and the same with compiled blocks on a GPU; kept for later cells."""
        if self._networks is None or self._networks[0] != cell.network:
            model = make_network(cell, self._device, self._dtype)
            on_gpu = self._device.type == "cuda"
            self._networks = cell.network, model, network_for(model, on_gpu, None)
        return self._networks[1:]

    def _modes(self) -> tuple[Mode, ...]:
        """What takes part beside the eager loop. On a CPU compiling takes longer than the rest."""
        return ("compile", "graph") if self._device.type == "cuda" else ()

    def _calls(
        self, cell: Cell, model: Transformer, compiled: Transformer, out: CellRows
    ) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
        """What takes turns, warm, and a note on each; what cannot be run has a row with why."""
        makers = {
            OFFICIAL: partial(official, cell, model),
            OURS: partial(ours, cell, model, "eager"),
        }
        notes = {
            OFFICIAL: f"{cell.steps} steps, the network as it is",
            OURS: f"{cell.steps} steps, mode eager",
        }
        for mode in self._modes():
            makers[f"{OURS}_{mode}"] = partial(ours, cell, compiled, mode)
            notes[f"{OURS}_{mode}"] = f"{cell.steps} steps, mode {mode}"
        calls, eager = {}, None
        for provider, make in makers.items():
            try:
                call = make()
                for _ in range(2):  # a graph is checked at its second step, and complete then
                    made = call()
                eager = made if provider == OURS else eager
                if provider not in (OURS, OFFICIAL):
                    self._check(made, eager)
                calls[provider] = call
            except Exception as error:
                if provider in (OURS, OFFICIAL):
                    raise
                why = error_line(error)
                out.add(provider, "latency_ms", None, why, timed=False)
                self._refuse(cell, f"{provider}: {why}")
        return calls, notes

    def _check(self, made: Tensor, eager: Tensor) -> None:
        """RuntimeError where a mode's samples are not those of the eager loop."""
        error = float((made - eager).double().norm() / eager.double().norm())
        if not error <= _LIMITS[self._dtype]:
            raise RuntimeError(f"its samples differ from those of the eager loop by {error:.2g}")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default %(default)s")
    parser.add_argument("--deadline", type=float, metavar="S", help="seconds")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path("runs/sampling"))
    parser.add_argument("--smoke", action="store_true", help="toy sizes, a test of the harness")
    options = parser.parse_args(argv)
    try:
        device, deadline = rows.pick(options.device), rows.Deadline(options.deadline)
        import torchdiffeq  # noqa: F401 (the official loops' solver)
    except (ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    environment = rows.environment(device)
    note = "smoke: not a speed" if options.smoke else ""
    writer = rows.Writer(options.out / "rows.jsonl", environment, note)
    print(", ".join(f"{key} {value}" for key, value in environment.items()), flush=True)
    before = rows.conditions(device)
    print("times faster than the official loop, paired by round [95% interval]:", flush=True)
    suite = SamplingSuite(device, writer, deadline, options.smoke, options.rounds)
    rows.keep_state(options.out, "sampling", environment | {"before": before, "after": None})
    suite.run()
    after = rows.conditions(device)
    rows.keep_state(options.out, "sampling", environment | {"before": before, "after": after})
    print(f"device before: {before}\ndevice after:  {after}")
    print(f"{writer.count} rows in {writer.path}")
    if deadline.left_out:
        print(deadline.report())
    return 1 if suite.refused else 0


if __name__ == "__main__":
    sys.exit(quiet_without_reader(main))
