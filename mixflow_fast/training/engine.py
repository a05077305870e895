"""DeepSpeed around a network: settings, float32 master weights, state in and out.

The only file that imports deepspeed. Our `AdamWEMA` is the optimizer inside of ZeRO.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from mixflow_fast.checkpoints.shards import (
    DEEPSPEED_CLASSES,
    Fragment,
    Piece,
    ShardLayout,
    alignment,
    frozen_file,
    is_flat,
    iter_shards,
    layout_file,
    read_file,
    read_layout,
)
from mixflow_fast.checkpoints.writing import CheckpointWriter
from mixflow_fast.config.schema import OptimConfig, TrainConfig
from mixflow_fast.distributed import process_group
from mixflow_fast.models import Network
from mixflow_fast.training.engines import (
    Engine,
    build_optimizer,
    restore_float32,
    shapes_and_frozen,
)
from mixflow_fast.training.gathering import Gathering, gather, plan
from mixflow_fast.training.host_memory import keep_freed_memory, return_freed_memory

# The series whose internals are used here; tests/training/test_engine.py names them.
TESTED_DEEPSPEED = "0.19"


class DeepSpeedEngine(Engine):
    """`Engine` by DeepSpeed: ZeRO shares the state out among the ranks.

    Args:
        train, optim: sections of the configuration.
        microbatch: examples of this rank in one forward pass.
        model: on the CPU; DeepSpeed casts, moves and shards it.

    Attributes:
        module: the network as DeepSpeed runs it.
        optimizer: `AdamWEMA`, or apex's.
        initial: for what DeepSpeed rounds or empties.

    Raises:
        ValueError: DeepSpeed is not installed.
    """

    def __init__(
        self, train: TrainConfig, optim: OptimConfig, microbatch: int, model: Network
    ) -> None:
        self._deepspeed = import_deepspeed()
        if process_group.rank() == 0 and (text := untested(self._deepspeed.__version__)):
            warnings.warn(text, stacklevel=2)
        self._train, self._optim, self._microbatch = train, optim, microbatch
        self._model = model
        # No copies: DeepSpeed puts others in the place of those that it casts, moves or shards.
        self.shapes, self.initial = shapes_and_frozen(model)
        # Until the master weights are set: all digits of what DeepSpeed casts.
        state = model.saved_state()
        self._first = {name: state[name] for name in state.keys() - self.initial.keys()}
        # With adapters a run's files do not hold the network beside them.
        self._holds_all = model.state_dict().keys() == state.keys()

    def start(self, resume_from: Path | None, resharded: bool = False) -> None:
        """Hand the network to DeepSpeed; as `Engine.start`."""
        c = self._train
        self.optimizer = build_optimizer(
            self._optim,
            (parameter for parameter in self._model.parameters() if parameter.requires_grad),
            skips=c.on_nonfinite == "skip" and c.zero_stage < 3,  # DeepSpeed's own always skips
            clips=c.zero_stage < 3,
            sharded=c.zero_stage in (1, 2),
        )
        loads = resume_from is not None and not resharded
        if loads:
            self._first.clear()  # so that their memory goes where DeepSpeed casts them
        # ZeRO 3 puts its own there, for the whole process.
        self._linear = torch.nn.functional.linear
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, _, _, _ = self._deepspeed.initialize(
                model=self._model, optimizer=self.optimizer, config=self._settings()
            )
        # Its own would execute whatever a pickle holds.
        self._engine.checkpoint_engine = _safe_checkpoint_engine(self._engine.device)
        if c.zero_stage == 0 and process_group.world_size() == 1:
            # The sum over one rank: all gradients copied twice, and gloo's thread waited for.
            self._engine.allreduce_and_copy = lambda *_, **__: None
        process_group.same_timeout()
        self.module = self._engine.module
        restore_float32(self._model, self.initial)  # DeepSpeed casts every parameter
        if c.zero_stage == 3:
            self._clear_padding()
        if loads:
            self._load(resume_from)
        else:
            self._set_master_weights()
            self._first.clear()
            if resharded:
                self._set_optimizer_state(iter_shards(resume_from))
        return_freed_memory()
        if self._engine.device.type == "cpu":
            keep_freed_memory()

    def load(self, checkpoint: Path) -> bool:
        """As `Engine.load`."""
        c, ranks = self._train, process_group.world_size()
        if not read_layout(checkpoint).is_cut_like("deepspeed", c.zero_stage, ranks, c.precision):
            return False
        self._load(checkpoint)
        # ZeRO 1 and 2 looked at the state of before, once.
        link = getattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            self._engine.optimizer._hp_optimizer_states_linked = False
            if any(self.optimizer.state.values()):
                link()
        return True

    def _load(self, checkpoint: Path) -> None:
        path, _ = self._engine.load_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name, load_module_strict=self._holds_all
        )
        if path is None:
            raise ValueError(f"checkpoint {checkpoint} could not be loaded")

    def _clear_padding(self) -> None:
        """ZeRO 3 leaves as the memory was what rounds a rank's share up: other bits in each run."""
        zero = self._engine.optimizer
        for parameter in self.module.parameters():
            size = parameter.ds_tensor.numel()
            own = min(size, max(0, parameter.ds_numel - process_group.rank() * size))
            parameter.ds_tensor.data.view(-1)[own:].zero_()
            if parameter.requires_grad:
                partition, offset, size = zero.grad_position[zero.get_param_id(parameter)]
                self._partitions()[partition].data[offset + own : offset + size].zero_()

    def _settings(self) -> dict[str, object]:
        c, micro, ranks = self._train, self._microbatch, process_group.world_size()
        # A sum for each bucket; ZeRO 0, and 1 in bf16, take neither setting. One rank has nobody to
        # overlap with and would wait all the same. ZeRO 3's gathers stand in the forward pass too.
        zero: dict[str, object] = {
            "stage": c.zero_stage,
            "reduce_bucket_size": c.reduce_bucket_size,
            "parameter_alignment": alignment(c.zero_stage, c.precision) == 16,
            "overlap_comm": c.zero_stage == 3 or (c.overlap_comm and ranks > 1),
        }
        if c.zero_stage == 2 or (c.zero_stage == 1 and c.precision == "fp32"):
            zero["compute_grad_norm"] = False  # read on the host each step; AdamWEMA has its own
        settings: dict[str, object] = {
            "train_batch_size": c.global_batch_size,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": c.global_batch_size // (micro * ranks),
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            # Its overflow check reads a flag on the host each step; bf16 has float32's range.
            "bf16": {"enabled": c.precision == "bf16", "check_grad_overflow": False},
            "gradient_clipping": self._optim.grad_clip if c.zero_stage == 3 else 0.0,
            "steps_per_print": sys.maxsize,
            # It waits for the device twice in each micro-batch.
            "timers": {"throughput": {"enabled": False}},
        }
        if ranks > 1:
            settings["communication_data_type"] = c.reduce_dtype
        if c.precision == "bf16":
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        return settings

    def _set_master_weights(self) -> None:
        """Give bf16's float32 master weights the digits that the cast of the module took away."""
        if self._train.precision == "bf16":
            partitions = self._partitions()
            for name, partition, offset, start, numel in self._fragments():
                values = self._first[name].view(-1)[start : start + numel]
                partitions[partition].data.view(-1)[offset : offset + numel].copy_(values)

    def _set_optimizer_state(self, saved: Iterable[Piece]) -> None:
        """Fill the optimizer's state on this rank from shards that were cut otherwise."""
        partitions = self._partitions()
        own: dict[str, list[Fragment]] = {}
        for fragment in self._fragments():
            own.setdefault(fragment.name, []).append(fragment)
        for piece in saved:
            end = piece.start + piece.values["weight"].numel()
            for _, partition, offset, start, numel in own.get(piece.name, []):
                first, last = max(start, piece.start), min(start + numel, end)
                state = self.optimizer.state[partitions[partition]]
                for key, value in piece.values.items():
                    if key == "weight" or first >= last:
                        continue
                    if not is_flat(value):  # parameters of one partition count their steps together
                        state[key] = max(state.get(key, value), value)
                        continue
                    if key not in state:
                        state[key] = torch.zeros_like(partitions[partition], dtype=value.dtype)
                    place = slice(offset + first - start, offset + last - start)
                    part = value[first - piece.start : last - piece.start]
                    state[key].view(-1)[place].copy_(part)
        # ZeRO 1 and 2 look at the state once, after the first step: here it is there before.
        link = getattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None and any(self.optimizer.state.values()):
            link()

    def _partitions(self) -> list[Tensor]:
        """The float32 tensors that the optimizer updates, in its state_dict's order."""
        if self._train.zero_stage == 3:
            return self._engine.optimizer.fp32_partitioned_groups_flat
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _fragments(self) -> Iterator[Fragment]:
        """Where the trained parameters stand in this rank's partitions."""
        zero, stage = self._engine.optimizer, self._train.zero_stage
        trained = [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]
        for place, (name, parameter) in enumerate(trained):
            numel = math.prod(self.shapes[name])
            if stage == 0:
                yield Fragment(name, place, 0, 0, numel)
            elif stage == 3:
                partition, offset, size = zero.grad_position[zero.get_param_id(parameter)]
                start = min(process_group.rank() * size, numel)
                yield Fragment(name, partition, offset, start, min(size, numel - start))
            elif parameter._hp_mapping is not None:
                mapping = parameter._hp_mapping
                ours, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
                group = mapping.param_group_index
                yield Fragment(name, group, ours.start, whole.start, whole.numel)

    def __call__(
        self, *args: Tensor | Mapping[str, Tensor]
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """The network's forward pass."""
        return self._engine(*args)

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch, reduced over the ranks."""
        self._engine.backward(loss)

    def step(self) -> None:
        """The optimizer's step, where the micro-batch was the last of its batch."""
        self._engine.step()

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next step."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr

    def grad_norm(self) -> Tensor | float | None:
        """Global gradient norm of the last step before clipping; None before the first."""
        if getattr(self._engine.optimizer, "overflow", False):
            return math.inf  # bf16 at ZeRO 1, and ZeRO 3: DeepSpeed looked, and made no step
        norm = self.optimizer.grad_norm
        if norm is None or self._train.zero_stage == 3:
            norm = self._engine.get_global_grad_norm()
        return norm

    def save(self, writer: CheckpointWriter) -> None:
        """Give a writer DeepSpeed's sharded state, and what is needed to read it without DeepSpeed.

        Every rank must call it, with a writer that is ready on all of them.
        """
        engine, folder = self._engine, writer.folder
        # Errors are kept for the end: raised in here they would leave the other ranks in a barrier.
        engine.checkpoint_engine.save = functools.partial(self._write, writer)
        engine._copy_recovery_script = lambda _: None  # knows no EMA; `consolidate` does
        engine.save_checkpoint(
            str(folder.parent),
            tag=folder.name,
            save_latest=False,
            exclude_frozen_parameters=not self._holds_all,
        )
        stage, rank = self._train.zero_stage, process_group.rank()
        if stage or rank == 0:
            fragments = tuple(fragment for fragment in self._fragments() if fragment.numel)
            aligned = alignment(stage, self._train.precision)
            ranks = process_group.world_size()
            layout = ShardLayout(stage, ranks, self.shapes, fragments, aligned)
            writer.write(layout.to_dict(), layout_file(folder, rank))
        if rank == 0:
            writer.write(self.initial, frozen_file(folder))

    def _write(self, writer: CheckpointWriter, state_dict: dict[str, object], path: str) -> None:
        """One of DeepSpeed's files; of the network, buffers too, what a run's files hold."""
        module = state_dict.get("module")
        if not self._holds_all and isinstance(module, dict):
            own = {name: tensor for name, tensor in module.items() if name in self.shapes}
            state_dict = state_dict | {"module": own}
        writer.write(state_dict, path)

    def gathered(self, which: str, stepped: bool) -> Iterator[tuple[str, Tensor]]:
        """As `Engine.gathered`: put together from the ranks' shards."""
        # DeepSpeed may have left out the first step, as bad.
        averaged = which != "model" and stepped and any(self.optimizer.state.values())
        if self._train.zero_stage == 0:
            found = self._unsharded(which, averaged)
        elif self._train.zero_stage == 3:
            found = self._gathered_by_deepspeed(which, averaged)
        else:
            partitions = self._partitions()
            if averaged:
                partitions = [self.optimizer.state[partition][which] for partition in partitions]
            found = gather(self._plan, partitions)
        for name, value in found:
            # ZeRO 3 empties the parameter itself, so the shape is not its own.
            yield name, value.view(self.shapes[name]).float()

    @functools.cached_property
    def _plan(self) -> list[Gathering]:
        """How the ranks put parameters together; found out once, by all at the same time."""
        owned: list[list[Fragment]] = [[] for _ in range(process_group.world_size())]
        torch.distributed.all_gather_object(owned, list(self._fragments()))
        trained = (n for n, p in self.module.named_parameters() if p.requires_grad)
        return plan({name: math.prod(self.shapes[name]) for name in trained}, owned)

    def _unsharded(self, which: str, averaged: bool) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                value = parameter.detach()
                yield name, self.optimizer.state[parameter].get(which, value) if averaged else value

    def _gathered_by_deepspeed(self, which: str, averaged: bool) -> Iterator[tuple[str, Tensor]]:
        """ZeRO 3 has a part of each parameter on every rank: a gather for each."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            if averaged:
                yield name, safe_get_full_optimizer_state(parameter, which)
            else:
                yield name, safe_get_full_fp32_param(parameter)

    def close(self) -> None:
        """Take back what DeepSpeed changed for the whole process."""
        torch.nn.functional.linear = self._linear


def _safe_checkpoint_engine(device: torch.device) -> object:
    """DeepSpeed's `CheckpointEngine` that reads without executing anything; `save` as its own."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    found = (name.rpartition(".") for name in DEEPSPEED_CLASSES)
    classes = {f"{m}.{c}": getattr(importlib.import_module(m), c) for m, _, c in found}
    # On the CPU the optimizer takes tensors as they are: mapped, they would hang on the file.
    mapped = device.type != "cpu"

    class SafeCheckpointEngine(TorchCheckpointEngine):
        def load(self, path: str, map_location: object = None) -> object:
            return read_file(Path(path), classes, mapped)

    return SafeCheckpointEngine()


def untested(version: str) -> str:
    """A sentence where this is another series of DeepSpeed than the tested one; else ""."""
    if version.startswith(f"{TESTED_DEEPSPEED}."):
        return ""
    return (
        f"DeepSpeed {version} is not of the tested series {TESTED_DEEPSPEED}: master weights and "
        "shards are found by its internals, which another series may have changed without an "
        f'error: pip install "deepspeed=={TESTED_DEEPSPEED}.*"'
    )


def deepspeed_state() -> tuple[str, dict[str, bool]]:
    """DeepSpeed's version, and which of its compiled operators it could build; we need none.

    Raises:
        ValueError: it is not installed, or its import fails.
    """
    deepspeed = import_deepspeed()
    return deepspeed.__version__, dict(getattr(deepspeed.ops, "__compatible_ops__", {}))


def import_deepspeed() -> ModuleType:
    """DeepSpeed without its chatter; on the CPU, without compiling anything."""
    try:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):
            import deepspeed
    except ImportError as error:
        raise ValueError(
            f'training needs DeepSpeed ({error}): pip install "mixflow_fast[train]"'
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On the CPU DeepSpeed would compile its shared-memory collectives inside the first run; a build
    # that is killed leaves a lock that hangs every later run. Without them it uses gloo.
    compatible = getattr(deepspeed.ops, "__compatible_ops__", {})
    if os.environ.get("DS_ACCELERATOR") == "cpu" and "deepspeed_shm_comm" in compatible:
        compatible["deepspeed_shm_comm"] = False
    return deepspeed
