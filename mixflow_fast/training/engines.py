"""What a run asks of the engine around its network, whichever it is.

`train.engine` chooses: `training/engine.py` is DeepSpeed's ZeRO, which shares a run's state out
among the ranks; `training/ddp_engine.py` keeps all of it on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from mixflow_fast.checkpoints.writing import CheckpointWriter
from mixflow_fast.config.schema import OptimConfig, TrainConfig
from mixflow_fast.distributed import process_group
from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.models import Network
from mixflow_fast.optim.adamw_ema import AdamWEMA
from mixflow_fast.optim.apex import OPTIMIZERS
from mixflow_fast.optim.skip_nonfinite import skipping


class Engine(Protocol):
    """A network with its optimizer, from its weights at this moment or from a checkpoint.

    A step is, for each micro-batch: the call, `backward`, `step`.

    Attributes:
        module: the network as it computes, in the precision of training.
        shapes: official name -> shape of the whole tensor, trained or not, in official order, of
            what a run's files hold.
        initial: those of them that are not trained, float32.
    """

    module: nn.Module
    shapes: Mapping[str, tuple[int, ...]]
    initial: Mapping[str, Tensor]

    def start(self, resume_from: Path | None, resharded: bool = False) -> None:
        """Take the network over.

        Args:
            resume_from: checkpoint folder, or None for the weights as they are.
            resharded: its shards were cut otherwise (for another number of ranks, ZeRO stage or
                engine): the network has its weights already, the optimizer's state is put
                together here.

        Raises:
            ValueError: the checkpoint could not be loaded.
        """
        ...

    def load(self, checkpoint: Path) -> bool:
        """Go back to a checkpoint of this run, after steps too; every rank must call it.

        Returns:
            whether it did: not where the shards were cut otherwise than this engine's.

        Raises:
            ValueError: the checkpoint could not be loaded.
        """
        ...

    def __call__(
        self, *args: Tensor | Mapping[str, Tensor]
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """The network's forward pass."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch; at the last of a step they are the mean over the ranks."""
        ...

    def step(self) -> None:
        """The optimizer's step, where the micro-batch was the last of its batch."""
        ...

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next step."""
        ...

    def grad_norm(self) -> Tensor | float | None:
        """Global gradient norm of the last step before clipping; None before the first."""
        ...

    def save(self, writer: CheckpointWriter) -> None:
        """Give a writer this rank's part of the state, and what is needed to read it by name.

        Every rank must call it, with a writer that is ready on all of them.
        """
        ...

    def gathered(self, which: str, stepped: bool) -> Iterator[tuple[str, Tensor]]:
        """Whole trained tensors by official name, float32 on the device, one after the other.

        Every rank must go through all of them: they may be put together from the ranks' shards.

        Args:
            which: "model" (master weights), or an EMA's key in the optimizer's state.
            stepped: a step was made, so that there is an EMA; without one it is the weights.
        """
        ...

    def full_states(
        self, stepped: bool, keep: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Master weights and EMA by official name, on the CPU. Every rank must call it.

        Args:
            stepped: a step was made, so that there is an EMA.
            keep: False only takes part in the gathering, which every rank must, and copies nothing.
        """
        model_state = {name: self.initial.get(name) for name in self.shapes}
        ema_state = dict(model_state)
        for state, which in ((model_state, "model"), (ema_state, "ema")):
            for name, value in self.gathered(which, stepped):
                if keep:  # a copy, on the CPU too: training goes on in the memory of `value`
                    state[name] = value.to("cpu", copy=True)
        return model_state, ema_state

    def close(self) -> None:
        """Take back what the engine changed for the whole process."""
        ...


def meet(section: TrainConfig, ranks: int) -> tuple[HostGroup, HostGroup]:
    """Join the other ranks, in the process group that the engine works in.

    Args:
        section: the section `train`; ddp on one rank needs no process group and makes none.
        ranks: processes of the run.

    Returns:
        exchange of values between the ranks: for the loop, and for the thread that saves.

    Raises:
        ValueError: ranks that did not come or cannot reach each other.
    """
    if section.engine == "ddp" and ranks == 1:
        return HostGroup.alone(), HostGroup.alone()
    process_group.init_process_group(section.device, 60 * section.timeout_minutes)
    limit = process_group.timeout()
    return HostGroup(limit), HostGroup(limit, separate=True)


def shapes_and_frozen(
    model: Network,
) -> tuple[dict[str, tuple[int, ...]], dict[str, Tensor]]:
    """`Engine.shapes` and `Engine.initial` of a network; the tensors are its own."""
    state = model.saved_state()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return shapes, {name: tensor for name, tensor in state.items() if name not in trained}


def restore_float32(model: Network, initial: Mapping[str, Tensor]) -> None:
    """Put back the digits of what stays float32 in a network that was cast as a whole."""
    for name in model.float32_names:
        parameter = model.get_parameter(name)
        parameter.data = initial[name].to(parameter.device)


def build_optimizer(
    section: OptimConfig,
    parameters: Iterable[nn.Parameter],
    *,
    skips: bool,
    clips: bool = True,
    sharded: bool = False,
) -> AdamWEMA:
    """The optimizer of a configuration.

    Args:
        section: the section `optim`.
        parameters: what is trained.
        skips: whether a step whose gradient is not finite changes nothing.
        clips: whether it clips the gradient, where the configuration says so.
        sharded: the parameters become this rank's partition of the whole.
    """
    kind = OPTIMIZERS[section.name]
    own = {"impl": section.impl} if section.name == "adamw_ema" else {}
    return (skipping(kind) if skips else kind)(
        list(parameters),
        lr=section.lr,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        weight_decay=section.weight_decay,
        ema_decay=section.ema_decays if len(section.ema_decays) > 1 else section.ema_decays[0],
        ema_sigma_rel=section.ema_sigma_rel,
        **own,
        grad_clip=section.grad_clip if clips else 0.0,
        sharded=sharded,
    )
