"""What is looked at beside training: validation losses, previews, and what training costs.

Everything here reads a copy of the network, so that training's bits do not depend on whether, or
how often, it is looked at. The copy is made once, in eager mode and in training's own precision.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixflow_fast.config.schema import Config
from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.environment import environment
from mixflow_fast.evaluation.validation_loss import GRID, TIMES, ValidationLoss, bin_centers
from mixflow_fast.messages import error_line
from mixflow_fast.metrics.loggers import Loggers
from mixflow_fast.metrics.metrics_file import MetricsFile
from mixflow_fast.metrics.throughput import Stopwatch, peak_memory_mib
from mixflow_fast.models import Transformer
from mixflow_fast.models.flops import peak_tflops, train_flops
from mixflow_fast.reports.previews import caption, preview_file, write_preview
from mixflow_fast.training.build import build_objective
from mixflow_fast.training.engine import Engine


class Monitor:
    """Looks at a run while it goes: costs in each metrics row, previews, validation, loggers.

    Args:
        config: of the run.
        model: the network before DeepSpeed has it, with its starting weights.
        device: this rank's.
        agreement: of the ranks.

    Attributes:
        waiting: runs while the loop waits for data.

    Raises:
        ValueError: no data to validate on.
    """

    def __init__(
        self,
        config: Config,
        model: Transformer,
        device: torch.device,
        host_group: HostGroup,
    ) -> None:
        c = config.train
        self._config, self._device, self._host_group = config, device, host_group
        self._out = Path(config.out)
        self._flops = train_flops(model)
        self._clock = model.clock
        on_gpu = device.type == "cuda" and c.precision == "bf16"
        self._peak = peak_tflops(torch.cuda.get_device_name(device)) if on_gpu else None
        self.waiting = Stopwatch()
        self._validation = self._net = None
        if c.validate_every:
            mix = build_objective(config, model.clock)
            ranks = host_group.rank, host_group.ranks, host_group.share
            self._validation = ValidationLoss(config, mix, device, *ranks)
        if c.validate_every or (c.preview_every and host_group.rank == 0):
            self._net = _eager_copy(model, c.precision, device)
        self._seen = -1  # step of the last look
        self._metrics: MetricsFile | None = None
        self._log: Callable[[str], None] = lambda _: None

    def open(self, step: int, log: Callable[[str], None], **facts: Any) -> MetricsFile | None:
        """Start the record of this part of the run; None on ranks that do not write it.

        Args:
            step: steps done.
            say: prints a line.
            facts: what else the row of kind "start" is to tell.
        """
        self._log = log
        self._seen = step or -1  # a resumed run has looked at that step already
        if self._host_group.rank:
            return None
        c = self._config.train
        loggers = None
        if c.loggers:
            loggers = Loggers(c.loggers, self._out, self._config.to_dict(), step, log)
        self._metrics = MetricsFile(self._out / "metrics.jsonl", step, loggers)
        row = {
            "ranks": self._host_group.ranks,
            "clock": self._clock,
            "train_gflops_per_image": self._flops / 1e9,
        }
        self._write("start", step, **row, **facts, environment=environment(self._device))
        if c.preview_every:
            log(f"previews: {self._out / 'previews'}: {caption(self._config)}")
        return self._metrics

    def cost(self, images: int, seconds: float) -> dict[str, Any]:
        """What a window of training took, for its metrics row; every rank must call it.

        Returns:
            "seconds"; "images_per_s" over all ranks; "model_tflops" a device: FLOPs of the formula,
            nothing that is computed twice; "peak_tflops": dense bf16 of the device where that is
            known and what training uses; "data_wait_s" and "peak_memory_mib" (tensors of the GPU;
            on a CPU the process) of the rank that has most.
        """
        mine = self.waiting.take(), peak_memory_mib(self._device)
        waited, memory = (
            max(values) for values in zip(*self._host_group.all_gather(mine), strict=True)
        )
        rate = images / seconds
        return {
            "images_per_s": rate,
            "seconds": seconds,
            "model_tflops": rate * self._flops / 1e12 / self._host_group.ranks,
            "peak_tflops": self._peak,
            "data_wait_s": waited,
            "peak_memory_mib": memory,
            "time": time.time(),
        }

    def look(self, engine: Engine, step: int) -> float:
        """Preview and validate where it is time to; every rank must call it after each step.

        Returns:
            seconds that it took.
        """
        c = self._config.train
        preview, validate = (
            bool(every) and step != self._seen and (step % every == 0 or step == self._config.steps)
            for every in (c.preview_every, c.validate_every)
        )
        if not (preview or validate):
            return 0.0
        if self._device.type == "cuda":  # steps that are still queued are training's time
            torch.cuda.synchronize(self._device)
        started = time.perf_counter()
        self._seen = step
        self._take(engine.gathered("ema", stepped=step > 0))
        if preview and self._metrics is not None:
            self._preview(step)
        if preview:  # the others wait here, on the host, and not inside the next step's collective
            self._host_group.all_gather(None)
        if validate:
            found = {"ema": self._validation(self._net)}
            self._take(engine.gathered("model", stepped=step > 0))
            found["model"] = self._validation(self._net)
            self._tell(step, found)
        return time.perf_counter() - started

    @torch.no_grad()
    def _take(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Fill the copy; ranks without one go through the weights all the same."""
        own = {} if self._net is None else dict(self._net.named_parameters())
        for name, value in weights:
            if name in own:
                own[name].copy_(value)

    def _preview(self, step: int) -> None:
        path = preview_file(self._out, step)
        try:
            write_preview(self._net, self._config, path)
            self._metrics.picture(path, step)
        # A full disk, samples that are not finite, no room on the GPU: training does not need them.
        except (OSError, ValueError, torch.OutOfMemoryError) as error:
            self._log(f"warning: no preview of step {step} ({error_line(error, 200)})")

    def _tell(self, step: int, found: dict[str, Any]) -> None:
        if self._metrics is None:
            return
        data = {"examples": self._validation.examples, "data": self._validation.data}
        self._write(
            "validation", step, **data, t=bin_centers(TIMES), grid_t=bin_centers(GRID), **found
        )
        losses = ", ".join(f"{name} {loss['loss']:.4f}" for name, loss in found.items())
        what = f"{self._validation.examples} {self._validation.data}"
        self._log(f"{self._out.name}: step {step} validation loss {losses} ({what})")

    def _write(self, kind: str, step: int, **values: Any) -> None:
        images = step * self._config.train.global_batch_size
        now = time.time()
        self._metrics.write(
            {"kind": kind, "step": step, "images_seen": images, "time": now, **values}
        )


def _eager_copy(model: Transformer, precision: str, device: torch.device) -> Transformer:
    """The network once more, as training computes it, but eager and without gradients."""
    net = copy.deepcopy(model).set_execution(mode="eager").eval().requires_grad_(False)
    kept = {name: net.get_parameter(name).data.clone() for name in net.float32_names}
    net = net.to(device)
    if precision == "bf16":
        net = net.to(torch.bfloat16)
    for name, value in kept.items():
        net.get_parameter(name).data = value.to(device)
    return net
