"""What the engine asks of a text-to-image network: `Adapter`, and what diffusers' classes share.

    x = (1 - s) x1 + s eps,   velocity = d x / d s = eps - x1       (SD3, arXiv 2403.03206)

At this border t is always the noise level s (clock noise_at_1) and the sign always noise - data.
Networks want other things: 1000 s or 1 - s, the other sign, packed tokens, lists. An adapter hides
them, and is held against the official pipeline by `check_against_pipeline`.

Shapes: B batch, C latent channels, h and w sides of a latent, L text tokens, D width of the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mixflow_fast.kernels.interpolate import Moments

# What a network is told beside x and t, under the names of diffusers' pipelines; batch first.
Condition = dict[str, Tensor]


@runtime_checkable
class Adapter(Protocol):
    """A text-to-image network as the engine sees it. Bring your own class with these members.

    Attributes:
        network: what is trained, sharded and saved.
        checkpointable: classes of its blocks, for checkpointing, compiling and ZeRO 3.
    """

    network: nn.Module

    @property
    def checkpointable(self) -> tuple[type[nn.Module], ...]: ...

    def velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """d x / d t, noise - data, in the shape of x.

        Args:
            x: (B, C, h, w) latents.
            t: (B,) float32 noise levels in [0, 1]; 1 is noise.
            cond: the prompts' embeddings, B of each.
        """
        ...

    def encode(self, z: Tensor) -> Tensor:
        """x1 of the autoencoder's latents z, both (B, C, h, w)."""
        ...

    def decode(self, x1: Tensor) -> Tensor:
        """The autoencoder's latents of x1, both (B, C, h, w)."""
        ...

    def empty(self, cond: Condition) -> Condition:
        """The condition that stands for no prompt, in the shapes of `cond`."""
        ...


@dataclass(frozen=True)
class LatentMap:
    """Affine map between an autoencoder's latents z and what is trained: x1 = (z - shift) scale.

    Attributes:
        shift, scale: numbers, or one for each of the C channels.

    Raises:
        ValueError: a shift that is not finite; a scale that is not finite and positive.
    """

    shift: float | tuple[float, ...] = 0.0
    scale: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        for name, value in (("shift", self.shift), ("scale", self.scale)):
            numbers = value if isinstance(value, tuple) else (value,)
            good = all(isinstance(n, Real) and math.isfinite(n) for n in numbers)
            if not numbers or not good or (name == "scale" and min(numbers) <= 0):
                what = "positive and finite" if name == "scale" else "finite"
                raise ValueError(
                    f"{name} must be a {what} number or a tuple of them, one a channel, got "
                    f"{value!r}"
                )

    @classmethod
    def of_vae(cls, config: Mapping[str, object]) -> LatentMap:
        """The map that the configuration of diffusers' autoencoder states.

        Args:
            config: `vae.config`, or what its config.json holds.

        Raises:
            ValueError: no scaling_factor, or statistics of the channels beside it.
        """
        scale, shift = config.get("scaling_factor"), config.get("shift_factor")
        if not isinstance(scale, Real) or config.get("latents_mean"):
            raise ValueError(
                "the autoencoder's configuration must state a scaling_factor and no latents_mean, "
                f"got scaling_factor={scale!r}, latents_mean={config.get('latents_mean')!r}: give "
                "LatentMap(shift, scale) with a number for each channel"
            )
        return cls(float(shift) if isinstance(shift, Real) else 0.0, float(scale))

    def encode(self, z: Tensor) -> Tensor:
        """x1 = (z - shift) scale, (B, C, h, w) in z's dtype."""
        return (z - _per_channel("shift", self.shift, z)) * _per_channel("scale", self.scale, z)

    def decode(self, x1: Tensor) -> Tensor:
        """z = x1 / scale + shift, (B, C, h, w) in x1's dtype, as pipelines compute it."""
        return x1 / _per_channel("scale", self.scale, x1) + _per_channel("shift", self.shift, x1)

    def moments(self, mean: Tensor, std: Tensor) -> Moments:
        """`Moments` of x1 for `MixFlow.prepare`, which draws the posterior.

        The shift goes into the mean: scale ((mean - shift) + std eps). So a cache of latents holds
        the shifted mean, and no kernel knows of shifts.

        Args:
            mean, std: (B, C, h, w) of the posterior of z; float32, because the shift rounds.
        """
        mean = mean - _per_channel("shift", self.shift, mean)
        if not isinstance(self.scale, tuple):
            return Moments(mean, std, float(self.scale))
        scale = _per_channel("scale", self.scale, mean)
        return Moments(mean * scale, std * scale, 1.0)


def _per_channel(name: str, value: float | tuple[float, ...], like: Tensor) -> float | Tensor:
    if not isinstance(value, tuple):
        return value
    if like.dim() != 4 or like.shape[1] != len(value):
        raise ValueError(
            f"latents must be (B, C, h, w) with C = {len(value)}, one number of {name} for each "
            f"channel, got {tuple(like.shape)}"
        )
    return torch.tensor(value, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)


class DiffusersAdapter:
    """What the adapters of diffusers' classes share. A class of your own may begin here too.

    A subclass says `BLOCKS` (class names of the repeated blocks), `NEEDS` (keys of a condition),
    `LATENTS` (map of the released autoencoder) and `velocity`.

    Args:
        network: an instance of the class; it may be wrapped later, its configuration is read now.
        latents: map between the autoencoder's latents and x1; None: the released model's.
        empty_prompt: condition of the prompt "" with a batch of one, for `empty`: what the
            pipeline's `encode_prompt("")` gives. None where no prompt is dropped or guided.

    Raises:
        ValueError: an empty prompt without the keys that the network needs, or of several samples.
    """

    BLOCKS: tuple[str, ...] = ()
    NEEDS: tuple[str, ...] = ()
    LATENTS = LatentMap()

    def __init__(
        self,
        network: nn.Module,
        latents: LatentMap | None = None,
        empty_prompt: Condition | None = None,
    ) -> None:
        self.network = network
        self.latents = self.LATENTS if latents is None else latents
        if empty_prompt is not None:
            self._check_keys("empty_prompt", empty_prompt)
            for key, value in empty_prompt.items():
                if len(value) != 1:
                    raise ValueError(
                        f"empty_prompt[{key!r}] must be one sample, (1, ...), got "
                        f"{tuple(value.shape)}"
                    )
        self._empty_prompt = empty_prompt
        self._checkpointable = _classes_named(self.BLOCKS, network)

    @property
    def checkpointable(self) -> tuple[type[nn.Module], ...]:
        """Classes of the network's repeated blocks."""
        return self._checkpointable

    def encode(self, z: Tensor) -> Tensor:
        """`LatentMap.encode`."""
        return self.latents.encode(z)

    def decode(self, x1: Tensor) -> Tensor:
        """`LatentMap.decode`."""
        return self.latents.decode(x1)

    def empty(self, cond: Condition) -> Condition:
        """The embeddings of the empty prompt for each sample of `cond`; other entries are kept.

        Never zeros: guidance asks the network for the prompt "", which must have been trained.

        Raises:
            ValueError: there is no empty prompt, or it has another shape than the prompts.
        """
        self._check_keys("cond", cond)
        prompt = self._empty_prompt_for(cond)
        return cond | {key: _expanded(key, prompt[key], cond[key]) for key in self.NEEDS}

    def _empty_prompt_for(self, cond: Condition) -> Condition:
        """The empty prompt, (1, ...) of each."""
        if self._empty_prompt is None:
            raise ValueError(
                "dropping a prompt needs the embeddings of the empty one: give empty_prompt, what "
                "the pipeline's encode_prompt gives for the prompt '' at the same length"
            )
        return self._empty_prompt

    def _check_keys(self, name: str, cond: Condition) -> None:
        missing = [key for key in self.NEEDS if key not in cond]
        if missing:
            raise ValueError(
                f"{name} of {type(self).__name__} must hold {', '.join(self.NEEDS)}, got "
                f"{', '.join(cond) or 'nothing'}"
            )

    def _inputs(
        self, x: Tensor, t: Tensor, cond: Condition, channels: int
    ) -> tuple[Tensor, Tensor, Condition]:
        """x and floating conditions in the network's dtype, and t in float32; errors as said."""
        self._check_keys("cond", cond)
        check_latents(x, t, channels)
        wrong = {k: tuple(v.shape) for k, v in cond.items() if len(v) != len(x)}
        if wrong:
            raise ValueError(f"cond must hold {len(x)} samples, as many as x, got {wrong}")
        dtype = input_dtype(self.network, x.device)
        cond = {k: v.to(dtype) if v.is_floating_point() else v for k, v in cond.items()}
        return x.to(dtype), t.to(torch.float32), cond


def input_dtype(network: nn.Module, device: torch.device) -> torch.dtype:
    """The dtype that a network computes in: autocast's where it is on, else its parameters'.

    Inputs go in in it, because some classes round their time to the dtype of what comes in.
    """
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return next(p.dtype for p in network.parameters() if p.is_floating_point())


def _expanded(key: str, value: Tensor, like: Tensor) -> Tensor:
    """An empty prompt's (1, ...) entry for each sample of `like` (B, ...), in its dtype."""
    if value.shape[1:] != like.shape[1:]:
        raise ValueError(
            f"empty_prompt[{key!r}] is {tuple(value.shape)}, the prompts are {tuple(like.shape)}: "
            "encode both at the same length (their padding is seen)"
        )
    return value.to(like.device, like.dtype).expand_as(like)


def check_latents(x: Tensor, t: Tensor, channels: int) -> None:
    """ValueError unless x is (B, channels, h, w) with even sides and t (B,) noise levels.

    Values of t are looked at on the CPU alone: no device is made to wait.
    """
    if x.dim() != 4 or x.shape[1] != channels or x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(
            f"x must be (B, {channels}, h, w) latents with even h and w, got {tuple(x.shape)}"
        )
    if t.shape != x.shape[:1] or t.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"t must be (B,) = ({len(x)},) float32 (half-precision times lose the noise level), "
            f"got {tuple(t.shape)} {t.dtype}"
        )
    if t.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(((t >= 0) & (t <= 1)).all()):
            raise ValueError(
                f"t must lie in [0, 1], got values from {t.min().item():.6g} to "
                f"{t.max().item():.6g}: divide by 1000 if your times are 0..1000"
            )


def _classes_named(names: Iterable[str], network: nn.Module) -> tuple[type[nn.Module], ...]:
    """Classes of these names among a network's modules, in the order of the names."""
    classes = {type(module).__name__: type(module) for module in network.modules()}
    return tuple(classes[name] for name in names if name in classes)
