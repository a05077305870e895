"""What every network of this package offers to those who train, sample, measure and save it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mixflow_fast.kernels.attention.choice import AttentionChoice
from mixflow_fast.models.execution import Execution

# A constructor's arguments by name, as JSON keeps them. `SiTConfig` and `DiTDHConfig` say which.
ModelArgument = int | float | str | list[int] | None
ModelConfig = dict[str, ModelArgument]


def check(ok: bool, message: str) -> None:
    """ValueError unless `ok`."""
    if not ok:
        raise ValueError(message)


class Network(nn.Module):
    """Base of the networks; a subclass builds the layers, runs them and says how.

    Attributes:
        clock: what t = 1 means. The velocity is the derivative by the time of this clock.
        input_size, in_channels, num_classes: as given; None for num_classes has no classes.
        null_class: int, or None without a null row.
        cfg_channels: how many leading channels the official sampler guides; None = all.
        float32_names: parameters that stay float32 in a network of half precision.
        config: the constructor's arguments as a JSON-able dict; `type(model)(**model.config)`.
        prediction: what the network was trained to give; set by `load_model` alone.
        path: interpolation path of its training, None where that is not known; set likewise.
        execution: see `set_execution`.
    """

    clock: str
    input_size: int
    in_channels: int
    num_classes: int | None
    null_class: int | None
    cfg_channels: int | None
    float32_names: tuple[str, ...] = ()
    config: Mapping[str, object]
    prediction: str
    path: str | None
    execution: Execution

    def set_execution(self, execution: Execution | None = None, **options: str | bool) -> Network:
        """Choose how the network is run; returns it. Weights and their names do not change.

        Args:
            execution, options: an `Execution`, or its fields by name.

        Raises:
            ValueError: unknown values, or ways in which this network does not run.
        """
        raise NotImplementedError

    @property
    def product_dtype(self) -> torch.dtype:
        """Dtype of the weights that are multiplied by activations."""
        raise NotImplementedError

    @property
    def has_adapters(self) -> bool:
        """Whether LoRA's adapters are trained, beside a network that is not."""
        return False

    def saved_state(self) -> dict[str, Tensor]:
        """What checkpoints and weights files of a run hold of it: its whole state, usually."""
        return self.state_dict()

    @property
    def tokens(self) -> int | None:
        """Tokens that an input is cut into; None for a network that does not cut it."""
        return None

    def set_draws(self, seed: int, positions: Tensor) -> None:
        """What random masks inside the network are drawn from, in the forward passes that follow.

        Nothing, for networks without such masks.

        Args:
            seed: of the run.
            positions: (B,) int64 global positions of the examples, on the network's device.

        Raises:
            ValueError: a seed or positions of another kind.
        """
        return None

    def choose_attention(
        self,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        names: Sequence[str] | None = None,
    ) -> list[AttentionChoice]:
        """Tests attention backends for a training shape now, and keeps to the ones that win.

        Args:
            batch: B.
            dtype, device: dtype and device of the activations.
            names: what an earlier process chose, to take instead.

        Returns:
            the choices; empty where PyTorch chooses.
        """
        return []

    def velocity(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The velocity alone, for sampling."""
        raise NotImplementedError

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float,
        channels: int | None = 3,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> Tensor:
        """Classifier-free guidance as the official samplers batch it.

        The first half of `x` is fed twice, with the labels of both halves; on the first `channels`
        channels both halves of the result are u + cfg_scale (c - u), with c of the first half and u
        of the second. The other channels keep each half's own prediction.

        Args:
            x, t, y: a batch of 2 B: [z; z], [t; t], [labels; null_class]. The second z is unused.
            cfg_scale: 1 is the conditional prediction.
            channels: how many leading channels are guided: 3 as in SiT, None = all as in REPA's
                and RAE's samplers.
            interval: times (in the model's clock, ends included) at which samples are guided;
                elsewhere both halves are the conditional prediction (RAE's `cfg_interval`).

        Returns:
            (2 B, in_channels, input_size, input_size); the first half is the one to keep.
        """
        check(
            x.shape[0] % 2 == 0,
            f"x must hold an even batch [z; z], got {x.shape[0]} samples: concatenate z with "
            "itself and the labels with null_class",
        )
        guided = self.in_channels if channels is None else channels
        check(
            1 <= guided <= self.in_channels,
            f"channels must be in 1..{self.in_channels} or None for all, got {channels}",
        )
        size = x.shape[0] // 2
        half = x[:size]
        out = self.velocity(torch.cat([half, half]), t, y)
        cond, uncond = out[:, :guided].chunk(2)
        mixed = uncond + cfg_scale * (cond - uncond)
        if tuple(interval) != (0.0, 1.0):
            inside = (t[:size] >= interval[0]) & (t[:size] <= interval[1])
            mixed = torch.where(inside.view(-1, 1, 1, 1), mixed, cond)
        return torch.cat([torch.cat([mixed, mixed]), out[:, guided:]], dim=1)

    def _check_image(self, x: Tensor, t: Tensor) -> None:
        image = (self.in_channels, self.input_size, self.input_size)
        check(
            x.ndim == 4 and tuple(x.shape[1:]) == image and x.is_floating_point(),
            f"x must be a floating (B, C, H, W) = (B, {', '.join(map(str, image))}), got {x.dtype} "
            f"{tuple(x.shape)}; another resolution needs a model with another input_size",
        )
        batch = x.shape[0]
        check(
            tuple(t.shape) == (batch,) and t.dtype in (torch.float32, torch.float64),
            f"t must be (B,) = ({batch},) float32, got {tuple(t.shape)} {t.dtype}: one time per "
            "sample, never in half precision",
        )

    def _check_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        self._check_image(x, t)
        batch = x.shape[0]
        check(
            tuple(y.shape) == (batch,) and y.dtype == torch.int64,
            f"y must be (B,) = ({batch},) int64 labels, got {tuple(y.shape)} {y.dtype}",
        )
        # Reading a label on a GPU would wait for the device in every step.
        if y.device.type != "cpu" or torch.compiler.is_compiling() or batch == 0:
            return
        top = self.num_classes - (self.null_class is None)
        low, high = int(y.min()), int(y.max())
        null = f"null class {top}" if self.null_class is not None else "no null class"
        check(
            low >= 0 and high <= top,
            f"y must be in 0..{top} ({self.num_classes} classes, {null}), got {low}..{high}",
        )


def check_sizes(config: Mapping[str, object], names: Sequence[str]) -> None:
    """ValueError unless the named entries are positive ints."""
    for name in names:
        value = config[name]
        is_int = isinstance(value, int) and not isinstance(value, bool)  # True is an int too
        check(is_int and value >= 1, f"{name} must be a positive int, got {value!r}")


@torch.no_grad()
def zero_(layers: Iterable[nn.Linear]) -> None:
    """Weights and biases to zero: what adaLN-Zero starts from."""
    for linear in layers:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
