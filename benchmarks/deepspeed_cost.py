"""What DeepSpeed costs a training step: `python -m benchmarks.deepspeed_cost RECIPE [a.b=c ...]`.

The same network, objective, batch and `AdamWEMA` on one rank, under DeepSpeed as the trainer has it
and in a bare loop, in turns: a round times both, and ratios are paired by round. In bf16 the bare
loop has float32 masters and float32 gradients of its own (`benchmarks/step_optimizers.py`), as DeepSpeed
has. No data loading, logging or saving in either. On a CPU only the ratio is shown: a test of the
harness, no speed.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.rows import paired_ratio, percentiles
from benchmarks.step_optimizers import OptimizerStep, Weights, describe_adamwema
from mixflow_fast.config.loading import load_config
from mixflow_fast.config.schema import Config
from mixflow_fast.distributed import process_group
from mixflow_fast.training.build import build_execution, build_model, build_objective
from mixflow_fast.training.engine import Engine

WARM_UP = 3


def steps(config: Config, device: torch.device) -> dict[str, Callable[[], None]]:
    """The two training steps, on one batch that stays on the device."""
    c = config.train
    model = build_model(config)
    twin = copy.deepcopy(model)
    mix = build_objective(config, model.clock)
    side = model.input_size
    x1 = torch.randn(c.global_batch_size, model.in_channels, side, side, device=device)
    ids = torch.arange(c.global_batch_size, device=device)
    y = ids % model.num_classes
    half = c.precision == "bf16"
    execution = build_execution(config, device)

    def loss_of(net: Callable) -> torch.Tensor:
        it = mix.prepare(x1.to(torch.bfloat16) if half else x1, ids=ids)
        out = net(it.x, it.t, y)
        return mix.loss(out[0] if isinstance(out, tuple) else out, it)

    model.set_execution(execution)
    engine = Engine(config, model, device)
    engine.start(None)

    def deepspeed() -> None:
        engine.set_lr(config.optim.lr)
        engine.backward(loss_of(engine))
        engine.step()

    weights = Weights(twin.to(device))
    net = weights.half if half else weights.single
    net.set_execution(execution)
    optimizer = OptimizerStep("adamwema", weights, half)

    def bare() -> None:
        loss_of(net).backward()
        optimizer.step()
        net.zero_grad(set_to_none=True)

    return {"deepspeed": deepspeed, "bare": bare}


def measure(config: Config, rounds: int, each: int) -> dict[str, object]:
    """Times of both, in turns, and their ratio.

    Args:
        config: one rank's, with one micro-batch a step.
        rounds: in which each has its turn.
        each: steps of a turn.
    """
    device = process_group.init_process_group(config.train.device)
    arms = steps(config, device)
    for _ in range(WARM_UP):
        for step in arms.values():
            step()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        order = list(arms) if number % 2 else list(reversed(arms))
        for name in order:
            times[name].append(_seconds(arms[name], each, device) / each)
    ratio = paired_ratio(times["deepspeed"], times["bare"])
    c = config.train
    return {
        "op": "deepspeed_cost",
        "model": config.model.name,
        "precision": c.precision,
        "zero_stage": c.zero_stage,
        "batch": c.global_batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "optimizer": describe_adamwema(device.type),
        "deepspeed_over_bare": ratio.p50,
        "low95": ratio.low95,
        "high95": ratio.high95,
        "rounds": rounds,
        **({n: percentiles(t).p50 for n, t in times.items()} if device.type == "cuda" else {}),
    }


def _seconds(step: Callable[[], None], count: int, device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    started = time.perf_counter()
    for _ in range(count):
        step()
    wait()
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one JSON object and one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="name of a recipe, or a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5, help="of a turn (default %(default)s)")
    options = parser.parse_args(argv)
    config = load_config(options.recipe, options.overrides)
    if config.microbatch(1) != config.train.global_batch_size:
        parser.error("the batch must be one micro-batch: raise train.microbatch_size")
    found = measure(config, options.rounds, options.steps)
    print(json.dumps(found))
    print(
        f"a step under DeepSpeed takes {found['deepspeed_over_bare']:.3f} times a bare one "
        f"({found['low95']:.3f} to {found['high95']:.3f}), {found['model']}, "
        f"{found['precision']}, ZeRO {found['zero_stage']}, {found['device']}"
        + ("" if "bare" in found else ": a ratio of one run on a CPU, no speed")
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
