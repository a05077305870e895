"""A network's forward and backward pass and the optimizer's step as CUDA graphs: mode "graph".

With few images a GPU waits for the host, which launches a thousand kernels and more in each pass.
Recorded once, a pass is one launch. What is recorded reads and writes the same memory each time, so
inputs are copied into place first, the outputs hold until the next forward pass, and the gradients
until the next backward pass.

    forward   inputs -> their place, replay        backward   gradient of the outputs -> its place,
                                                              replay, gradients of the parameters
    step      learning rate, bias corrections, decays of EMAs -> their place, replay
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from mixflow_fast.optim.adamw_ema import AdamWEMA

# What a network returns: a tensor, or REPA's (prediction, projections).
Output = Tensor | tuple[Tensor, list[Tensor]]
Work = Callable[[], Sequence[Tensor]]
# So often a pass runs before it is recorded: compilers, workspaces and autotuners are done then.
REHEARSALS = 3


class Recorder(Protocol):
    """Records what work launches, so that it can be launched again."""

    def rehearse(self, work: Work) -> None:
        """Run work as it will be recorded."""
        ...

    def record(self, work: Work) -> tuple[list[Tensor], Callable[[], None]]:
        """Record work.

        Returns:
            what it returned, in memory that stays; and what runs it again on the same memory.
        """
        ...


class CudaRecorder:
    """Records CUDA graphs, all in one memory pool.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def rehearse(self, work: Work) -> None:
        """On the stream of the recording, because libraries keep a workspace for each."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Work) -> tuple[list[Tensor], Callable[[], None]]:
        """A graph. Threads that copy batches or save meanwhile do not disturb it."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            kept = list(work())
        return kept, graph.replay


class CapturedNetwork:
    """A network whose passes with gradients are recorded at the first call of each shape.

    The parameters must stay where they are in memory: an optimizer that writes in place. Calls
    without gradients, and inputs that want one, run the network as it is.

    Args:
        net: called with tensors.
        recorder: what records.
    """

    def __init__(self, net: nn.Module, recorder: Recorder) -> None:
        self._net, self._recorder, self._memory = net, recorder, _Memory()
        self._passes: dict[tuple[object, ...], _Passes] = {}

    def __call__(self, *args: Tensor) -> Output:
        """The network's output; it holds until the next call."""
        if not torch.is_grad_enabled() or any(arg.requires_grad for arg in args):
            return self._net(*args)
        key = tuple((arg.shape, arg.dtype, arg.device) for arg in args)
        if key not in self._passes:
            self._passes[key] = _Passes(self._net, self._recorder, self._memory, args)
        return self._passes[key](args)


@dataclass
class _Memory:
    """Whose results lie in the memory that all recordings share.

    Attributes:
        turn: number of replays so far. Each one overwrites what others left there.
    """

    turn: int = 0


class _Passes:
    """Both passes for one shape of inputs.

    Attributes:
        memory: that of all shapes.
    """

    def __init__(
        self, net: nn.Module, recorder: Recorder, memory: _Memory, args: Sequence[Tensor]
    ) -> None:
        self._net, self.memory = net, memory
        self._params = [p for p in net.parameters() if p.requires_grad]
        self._inputs = [arg.detach().clone() for arg in args]
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._out_gradients: list[Tensor] = []
        self._projects = False
        for _ in range(REHEARSALS):
            recorder.rehearse(self._both)
        kept, self._replay_forward = recorder.record(self._forward)
        self._outputs = [output.detach() for output in kept]
        self._gradients, self._replay_backward = recorder.record(self._backward)

    def _forward(self) -> Sequence[Tensor]:
        output = self._net(*self._inputs)
        self._projects = isinstance(output, tuple)
        self._live = (output[0], *output[1]) if isinstance(output, tuple) else (output,)
        return self._live

    def _backward(self) -> Sequence[Tensor]:
        return torch.autograd.grad(self._live, self._params, self._out_gradients)

    def _both(self) -> Sequence[Tensor]:
        outputs = self._forward()
        self._out_gradients = [torch.zeros_like(output) for output in outputs]
        return self._backward()

    def __call__(self, args: Sequence[Tensor]) -> Output:
        outputs = _Replay.apply(self, *args, *self._params)
        return (outputs[0], list(outputs[1:])) if self._projects else outputs[0]

    def forward(self, args: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Replay the forward pass; fresh names for the memory that holds what it made."""
        for place, arg in zip(self._inputs, args, strict=False):
            place.copy_(arg)
        self._replay_forward()
        self.memory.turn += 1
        return tuple(output.detach() for output in self._outputs)

    def backward(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Replay the backward pass; gradients of the parameters, which autograd may keep as such.

        A parameter that still has the gradient of an earlier pass, because micro-batches are added
        up there, has this very memory for it: it gets a copy before the memory is written. In every
        step it is the same copy, where a recorded step of the optimizer finds it.
        """
        for param, gradient in zip(self._params, self._gradients, strict=True):
            if param.grad is not None and param.grad.data_ptr() == gradient.data_ptr():
                if param not in self._sums:
                    self._sums[param] = torch.empty_like(param.grad)
                param.grad = self._sums[param].copy_(param.grad)
        for place, gradient in zip(self._out_gradients, gradients, strict=True):
            place.copy_(gradient)
        self._replay_backward()
        self.memory.turn += 1
        return [gradient.detach() for gradient in self._gradients]

    @property
    def inputs(self) -> int:
        """How many tensors the network is called with."""
        return len(self._inputs)


class CapturedStep:
    """Steps of an optimizer: a few numbers to the device, and a replay.

    A step that finds gradients, weights, state or copies in other memory than the last one, as the
    first does, runs as it is; the next one is recorded.

    Args:
        optimizer: one that is `capturable`.
        recorder: what records.
    """

    def __init__(self, optimizer: AdamWEMA, recorder: Recorder) -> None:
        self._optimizer, self._recorder = optimizer, recorder
        self._replay: Callable[[], None] | None = None

    @torch.no_grad()
    def __call__(self) -> None:
        """One step with the gradients that the parameters have."""
        if self._optimizer.advance():
            self._replay = None
            self._recorder.rehearse(self._update)
            return
        if self._replay is None:
            _, self._replay = self._recorder.record(self._update)
        self._replay()

    def _update(self) -> Sequence[Tensor]:
        self._optimizer.update()
        return ()


class _Replay(torch.autograd.Function):
    """Both replays as one node of autograd's graph, between the inputs and the parameters."""

    @staticmethod
    def forward(ctx: FunctionCtx, passes: _Passes, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = passes.forward(tensors)
        ctx.passes, ctx.turn = passes, passes.memory.turn
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        passes: _Passes = ctx.passes
        if ctx.turn != passes.memory.turn:
            raise RuntimeError(
                "a captured network ran again before the backward pass of this output, which needs "
                "what its own forward pass kept and can be made once: use another mode than graph "
                "for such a step"
            )
        return None, *[None] * passes.inputs, *passes.backward(gradients)


def check_device(device: torch.device) -> None:
    """Refuse a device that has no CUDA graphs.

    Raises:
        ValueError: it has none.
    """
    if device.type != "cuda":
        raise ValueError(
            f"model.mode=graph records CUDA graphs, got a run on {device.type}: set "
            "model.mode=eager or compile"
        )
