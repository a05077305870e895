"""The network whole on every rank: PyTorch's DistributedDataParallel, for models that fit.

    gradient of a step = mean over ranks and micro-batches
    fp32: AdamWEMA updates the network's own parameters
    bf16: AdamWEMA updates float32 masters and, in the same pass, writes the network's bf16 weights

DDP's part is to say when a bucket of gradients is complete, in the last micro-batch of a step; its
all-reduce then runs beside the rest of the backward pass. One process needs no process group.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mixflow_fast.checkpoints.shards import (
    COPY_AGAIN,
    Fragment,
    ParameterState,
    Piece,
    ShardLayout,
    alignment,
    ddp_file,
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
from mixflow_fast.models.weights.source_record import PREFIX
from mixflow_fast.training.capture import CapturedNetwork, CapturedStep, CudaRecorder
from mixflow_fast.training.engines import (
    Engine,
    build_optimizer,
    restore_float32,
    shapes_and_frozen,
)
from mixflow_fast.training.host_memory import keep_freed_memory, return_freed_memory

# Bytes of a gradient in the precision of training.
_ITEMSIZE = {"fp32": 4, "bf16": 2}


class DDPEngine(Engine):
    """`Engine` that shares nothing out: every rank has weights, moments and averages whole.

    Args:
        train, optim: sections of the configuration.
        microbatch: examples of this rank in one forward pass.
        model: on the CPU; it is cast and moved as it is, and keeps its parameters.

    Attributes:
        optimizer: `AdamWEMA`, or apex's, of the float32 masters.
    """

    def __init__(
        self, train: TrainConfig, optim: OptimConfig, microbatch: int, model: Network
    ) -> None:
        self._train, self._optim, self.module = train, optim, model
        self.shapes, self.initial = shapes_and_frozen(model)
        self._ranks = process_group.world_size()
        self._microsteps = train.global_batch_size // (microbatch * self._ranks)
        self._microstep = 0
        self._half = train.precision == "bf16"
        self._call: Callable[..., Tensor | tuple[Tensor, list[Tensor]]] = model
        self._reducer: _Reducer | None = None
        self._gradients: MasterGradients | None = None

    def start(self, resume_from: Path | None, resharded: bool = False) -> None:
        """Cast and move the network, and take its state up; as `Engine.start`."""
        c, net = self._train, self.module
        device = process_group.local_device(c.device)
        # The gradients of a source come last, through the network's input, as those of what stands
        # first: behind the network it would hold up the first sum over the ranks.
        named = sorted(net.named_parameters(), key=lambda item: not item[0].startswith(PREFIX))
        trained = {name: p for name, p in named if p.requires_grad}
        if self._half:  # before the cast takes their digits away
            masters = {name: _master_of(p, device) for name, p in trained.items()}
            net.to(device, torch.bfloat16)
            restore_float32(net, self.initial)
        else:
            net.to(device)
            masters = trained
        self._masters: dict[str, nn.Parameter] = masters
        self._params = list(trained.values())
        skips = c.on_nonfinite == "skip"
        self.optimizer = build_optimizer(self._optim, masters.values(), skips=skips)
        if self._half:
            pairs = zip(masters.values(), self._params, strict=True)
            self.optimizer.set_copies({master: p.detach() for master, p in pairs})
            self._gradients = MasterGradients(list(masters.values()), self._params)
        if resharded:
            self._set_optimizer_state(iter_shards(resume_from))
        elif resume_from is not None:
            self._load(resume_from)
        self._step: Callable[[], object] = self.optimizer.step
        if net.execution.mode == "graph":
            recorder = CudaRecorder(device)
            self._call = CapturedNetwork(net, recorder)
            if self.optimizer.capturable:
                self._step = CapturedStep(self.optimizer, recorder)
        if self._ranks > 1:
            self._reducer = _Reducer(self._params, self._gradients, self._microsteps, c)
        return_freed_memory()
        if device.type == "cpu":
            keep_freed_memory()

    def load(self, checkpoint: Path) -> bool:
        """As `Engine.load`."""
        if not read_layout(checkpoint).is_cut_like("ddp", 0, self._ranks, self._train.precision):
            return False
        self._load(checkpoint)
        return True

    @torch.no_grad()
    def _load(self, checkpoint: Path) -> None:
        content = read_file(ddp_file(checkpoint))
        found: dict[str, Tensor] = content["masters"]
        if list(found) != list(self._masters):
            raise ValueError(f"{ddp_file(checkpoint)} is of another network: {COPY_AGAIN}")
        saved: dict[int, ParameterState] = content["optimizer"]["state"]
        for number, (name, master) in enumerate(self._masters.items()):
            master.copy_(found[name])
            before = self.optimizer.state.pop(master, {})
            state = {k: _taken(v, before.get(k), master) for k, v in saved.get(number, {}).items()}
            if state:
                self.optimizer.state[master] = state
        if self._half:
            torch._foreach_copy_(self._params, list(self._masters.values()))

    @torch.no_grad()
    def _set_optimizer_state(self, saved: Iterable[Piece]) -> None:
        """Fill the optimizer's state from shards that were cut otherwise."""
        for piece in saved:
            master = self._masters[piece.name]
            state = self.optimizer.state[master]
            for key, value in piece.values.items():
                if key == "weight":
                    continue
                if not is_flat(value):
                    state[key] = max(state.get(key, value), value)
                    continue
                if key not in state:
                    state[key] = torch.zeros_like(master, dtype=value.dtype)
                state[key].view(-1)[piece.start : piece.start + value.numel()].copy_(value)

    def __call__(
        self, *args: Tensor | Mapping[str, Tensor]
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """The network's forward pass; in mode graph the output holds until the next one."""
        return self._call(*args)

    def backward(self, loss: Tensor) -> None:
        """As `Engine.backward`."""
        last = self._microstep + 1 == self._microsteps
        if self._reducer is not None and last:
            self._reducer.backward(loss / (self._microsteps * self._ranks))
            return
        (loss / (self._microsteps * self._ranks)).backward()
        if self._gradients is not None:
            self._gradients.add(self._microstep > 0)
            _clear_gradients(self._params)

    def step(self) -> None:
        """As `Engine.step`."""
        self._microstep = (self._microstep + 1) % self._microsteps
        if self._microstep == 0:
            self._step()
            _clear_gradients(self._params)

    def set_lr(self, lr: float) -> None:
        """As `Engine.set_lr`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def grad_norm(self) -> Tensor | None:
        """As `Engine.grad_norm`."""
        return self.optimizer.grad_norm

    def save(self, writer: CheckpointWriter) -> None:
        """As `Engine.save`: rank 0 has all of it."""
        if process_group.rank() != 0:
            return
        states = {n: dict(self.optimizer.state[p]) for n, p in enumerate(self._masters.values())}
        content = {
            "masters": {name: master.detach() for name, master in self._masters.items()},
            "optimizer": {"state": {number: state for number, state in states.items() if state}},
        }
        fragments = tuple(
            Fragment(name, number, 0, 0, master.numel())
            for number, (name, master) in enumerate(self._masters.items())
        )
        aligned = alignment(0, self._train.precision)
        layout = ShardLayout(0, self._ranks, self.shapes, fragments, aligned, "ddp")
        folder = writer.folder
        writer.write(content, ddp_file(folder))
        writer.write(layout.to_dict(), layout_file(folder, 0))
        writer.write(self.initial, frozen_file(folder))

    def gathered(self, which: str, stepped: bool) -> Iterator[tuple[str, Tensor]]:
        """As `Engine.gathered`; every rank has them already."""
        averaged = which != "model" and stepped
        for name, master in self._masters.items():
            value = master.detach()
            yield name, self.optimizer.state[master].get(which, value) if averaged else value

    def close(self) -> None:
        """Nothing of the process was changed."""


class MasterGradients:
    """float32 gradients of float32 masters, in one buffer in the order of the backward pass.

    The order is the reverse of the network's, so that what a bucket holds is one stretch.

    Args:
        masters: float32, in the network's order.
        params: the network's bf16 parameters beside them; their gradients are taken from here.
    """

    def __init__(self, masters: Sequence[nn.Parameter], params: Sequence[nn.Parameter]) -> None:
        self._params = list(params)
        total = sum(p.numel() for p in params)
        self._flat = torch.zeros(total, dtype=torch.float32, device=params[0].device)
        self._begin: dict[nn.Parameter, int] = {}
        begin = 0
        for master, param in zip(reversed(masters), reversed(params), strict=True):
            self._begin[param] = begin
            master.grad = self._flat[begin : begin + param.numel()].view_as(master)
            begin += param.numel()
        self._own = [master.grad for master in masters]

    def add(self, more: bool) -> None:
        """Take a micro-batch's gradients from the parameters: added to what is there, or alone."""
        gradients = [p.grad for p in self._params]
        (torch._foreach_add_ if more else torch._foreach_copy_)(self._own, gradients)

    def place_of(self, params: Sequence[nn.Parameter]) -> Tensor:
        """The stretch of the buffer that belongs to parameters which follow each other."""
        begin = end = self._begin[params[0]]
        for param in params:
            assert self._begin[param] == end, "a bucket holds neighbours"
            end += param.numel()
        return self._flat[begin:end]


class _Parameters(nn.Module):
    """What DDP is put around: parameters, and a forward pass that gives its input back.

    The network runs outside. Inside, torch.compile would cut its graphs by DDP's buckets, and each
    forward pass without a step's reduction would need `no_sync`.
    """

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.params = nn.ParameterList(params)

    def forward(self, loss: Tensor) -> Tensor:
        return loss


class _Reducer:
    """Adds gradients up over the ranks while the last backward pass of a step goes on.

    Args:
        params: the network's trained parameters in its order.
        gradients: where bf16 gradients are added up; None for float32 ones.
        microsteps: micro-batches of a step.
        section: size of the buckets, dtype of the sums.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        gradients: MasterGradients | None,
        microsteps: int,
        section: TrainConfig,
    ) -> None:
        self._params, self._gradients = params, gradients
        self._more = microsteps > 1
        self._narrow = section.reduce_dtype == "bf16"
        self._started = False
        itemsize = _ITEMSIZE[section.precision]
        options = {}
        if "batched_grad_copy" in inspect.signature(DistributedDataParallel).parameters:
            options["batched_grad_copy"] = True  # PyTorch 2.13: one launch a bucket, not one each
        self._ddp = DistributedDataParallel(
            _Parameters(params),
            bucket_cap_mb=section.reduce_bucket_size * itemsize / 2**20,
            gradient_as_bucket_view=True,
            **options,
        )
        # DDP compares a hook's annotations with classes, and ours are text.
        self._ddp.register_comm_hook(None, lambda _, bucket: self._reduce(bucket))
        self._settle_buckets()

    def backward(self, loss: Tensor) -> None:
        """The last backward pass of a step; the gradients are sums over the ranks after it."""
        self._ddp(loss).backward()
        if self._gradients is not None:
            _clear_gradients(self._params)

    def _settle_buckets(self) -> None:
        """Have DDP choose its buckets now, in the reverse of the network's order.

        It does so once, from the order in which the first backward pass makes gradients. Left to
        the first step of each start, that step would add up in other parts than the same step of a
        run that was never stopped, and sums of three and more ranks depend on the parts.
        """
        nothing = torch.stack([0.0 * p.sum(dtype=torch.float32) for p in self._params])
        self._ddp(nothing.sum()).backward()
        _clear_gradients(self._params)
        self._started = True

    def _reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        if not self._started:
            # A future of a GPU's tensor must know the GPU.
            devices = [buffer.device] if buffer.is_cuda else None
            done: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
            done.set_result(buffer)
            return done
        if self._gradients is None:
            return _summed(buffer).then(partial(_give, buffer))
        place = self._gradients.place_of(bucket.parameters())
        if self._more:
            place.add_(buffer)
        else:
            place.copy_(buffer)
        if not self._narrow:
            return _summed(place).then(partial(_give, buffer))
        if self._more:
            buffer.copy_(place)
        return _summed(buffer).then(partial(_widen, buffer, place))


def _summed(tensor: Tensor) -> torch.futures.Future[list[Tensor]]:
    """The sum over the ranks, in place."""
    return dist.all_reduce(tensor, async_op=True).get_future()


def _give(buffer: Tensor, _: torch.futures.Future[list[Tensor]]) -> Tensor:
    return buffer


def _widen(buffer: Tensor, place: Tensor, _: torch.futures.Future[list[Tensor]]) -> Tensor:
    place.copy_(buffer)
    return buffer


def _master_of(param: nn.Parameter, device: torch.device) -> nn.Parameter:
    return nn.Parameter(param.detach().to(device, torch.float32, copy=True))


def _taken(
    saved: Tensor | int | float, before: Tensor | int | float | None, master: Tensor
) -> Tensor | int | float:
    """An entry of the optimizer's state, in memory that was there already where it fits."""
    if not isinstance(saved, Tensor):
        return saved
    place = before if isinstance(before, Tensor) else torch.empty_like(saved, device=master.device)
    return place.copy_(saved)


def _clear_gradients(params: Iterable[nn.Parameter]) -> None:
    for param in params:
        param.grad = None
