"""Four trainers as they are without MixFlow, and with it: SiT, REPA, RAE and SD3 in diffusers.

A plain loss is what that trainer computes, with one time more: the network is told t and shown the
interpolation at m. With m = t it is the trainer before MixFlow.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor, nn

from mixflow_fast import MixFlow
from mixflow_fast.flow import DATA_AT_1, NOISE_AT_1
from mixflow_fast.kernels import runtime
from mixflow_fast.models import SiT, repa_alignment_loss
from tests.support.golden import load

# The tensors here are on the CPU, where kernels run in Triton's interpreter alone; conftest.py asks
# for that where there is no GPU.
IMPLS = ("reference", "triton") if runtime.interpreting() else ("reference",)
TOLERANCE = 1e-6
PROJ_COEFF = 0.5
OTHER = {DATA_AT_1: NOISE_AT_1, NOISE_AT_1: DATA_AT_1}
Gradients = dict[str, Tensor]


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1, 1)


def relative(ours: Tensor, truth: Tensor, floor: float = 0.0) -> float:
    """|ours - truth| / max(|truth|, floor), in float64."""
    assert ours.shape == truth.shape
    norm = max(truth.double().norm().item(), floor)
    return (ours.double() - truth.double()).norm().item() / norm


def sit_losses(model: nn.Module, b: dict, x0: Tensor, t: Tensor, m: Tensor) -> Tensor:
    """SiT's transport, linear path: t = 1 is data."""
    x_m = spread(m) * b["x1"] + (1 - spread(m)) * x0
    return ((model(x_m, t, b["y"]) - (b["x1"] - x0)) ** 2).mean((1, 2, 3))


def rae_losses(model: nn.Module, b: dict, x0: Tensor, t: Tensor, m: Tensor) -> Tensor:
    """RAE's transport: t = 1 is noise."""
    x_m = (1 - spread(m)) * b["x1"] + spread(m) * x0
    return ((model(x_m, t, b["y"]) - (x0 - b["x1"])) ** 2).mean((1, 2, 3))


def repa_losses(
    model: nn.Module, b: dict, x0: Tensor, t: Tensor, m: Tensor
) -> tuple[Tensor, Tensor]:
    """REPA: t = 1 is noise; the second number is the projection term, sample by sample."""
    x_m = (1 - spread(m)) * b["x1"] + spread(m) * x0
    velocity, zs_tilde = model(x_m, t, b["y"])
    cosines = [
        (F.normalize(z[i], dim=-1) * F.normalize(z_tilde[i], dim=-1)).sum(-1).mean()
        for z, z_tilde in zip(b["zs"], zs_tilde, strict=True)
        for i in range(len(x_m))
    ]
    return ((velocity - (x0 - b["x1"])) ** 2).mean((1, 2, 3)), -torch.stack(cosines).mean()


def repa_loss(*arguments: Any) -> Tensor:
    denoising, projection = repa_losses(*arguments)
    return denoising.mean() + PROJ_COEFF * projection


def sd3_loss(model: nn.Module, b: dict, x0: Tensor, t: Tensor, m: Tensor) -> Tensor:
    """diffusers: sigma = 1 is noise, the transformer counts to 1000, weights of sigma."""
    noisy = (1 - spread(m)) * b["x1"].float() + spread(m) * x0.float()
    pred = model(
        hidden_states=noisy.to(b["x1"].dtype),
        timestep=t * 1000,
        encoder_hidden_states=b["text"],
        pooled_projections=b["pooled"],
        return_dict=False,
    )[0]
    square = (pred.float() - (x0.float() - b["x1"].float())) ** 2
    return (compute_loss_weighting_for_sd3(b["scheme"], spread(t)) * square).mean()


def with_mixflow(mix: MixFlow, model: nn.Module, b: dict, **given: Tensor) -> Tensor:
    it = mix.prepare(b["x1"], **given)
    return mix.loss(model(it.x, it.t, b["y"]), it)


def repa_with_mixflow(mix: MixFlow, model: nn.Module, b: dict, **given: Tensor) -> Tensor:
    it = mix.prepare(b["x1"], **given)
    pred, zs_tilde = model(it.x, it.t, b["y"])
    return mix.loss(pred, it) + PROJ_COEFF * repa_alignment_loss(zs_tilde, b["zs"])


def sd3_with_mixflow(mix: MixFlow, model: nn.Module, b: dict, **given: Tensor) -> Tensor:
    it = mix.prepare(b["x1"], **given)
    pred = model(
        hidden_states=it.x,
        timestep=it.t * 1000,
        encoder_hidden_states=b["text"],
        pooled_projections=b["pooled"],
        return_dict=False,
    )[0]
    return mix.loss(pred, it, weight=compute_loss_weighting_for_sd3(b["scheme"], it.t))


def golden_sit(name: str) -> SiT:
    tensors, config = load(name)
    config.pop("grad_of", None)
    model = SiT(**config)
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("state.")})
    return model


def sit() -> tuple[nn.Module, dict]:
    return golden_sit("sit_0"), {"x1": images(3, 4, 8, 8), "y": torch.tensor([1, 7, 10])}


def repa() -> tuple[nn.Module, dict]:
    return golden_sit("repa_0"), {
        "x1": images(3, 4, 8, 8),
        "y": torch.tensor([1, 7, 10]),
        "zs": [images(3, 16, 40, seed=3)],
    }


def rae() -> tuple[nn.Module, dict]:
    """RAE's kind of latent, patch 1 and many channels; its own network is not needed for the loss.

    The released weights' zeros in the modulation would hide most gradients.
    """
    torch.manual_seed(0)
    model = SiT(4, 1, 24, 32, 2, 4, num_classes=10, learn_sigma=False, clock=NOISE_AT_1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model, {"x1": images(3, 24, 4, 4), "y": torch.tensor([1, 7, 10])}


def sd3() -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    return model, {
        "x1": images(3, 4, 8, 8),
        "text": images(3, 5, 16, seed=4),
        "pooled": images(3, 16, seed=5),
        "scheme": "sigma_sqrt",
    }


@dataclass(frozen=True)
class Trainer:
    """A trainer: its convention, its network and batch, its loss before and after."""

    options: dict[str, Any]
    build: Callable[[], tuple[nn.Module, dict]]
    plain: Callable[..., Tensor]
    after: Callable[..., Tensor]
    levels: Callable[[Tensor], tuple[Tensor, Tensor]]  # of data and noise, by its convention
    section: str  # of docs/drop-in.md, and the names which that takes for granted
    names: dict[str, Any]


class Before:
    """`create_transport(...)` and REPA's loss object: draw noise and time, return the losses."""

    def __init__(self, losses: Callable[..., Any], time_dist_shift: float = 1.0) -> None:
        self.losses, self.shift = losses, time_dist_shift

    def __call__(self, model: nn.Module, x1: Tensor, kwargs: dict, **more: Any) -> Any:
        self.x0 = torch.randn_like(x1)
        t = torch.rand(len(x1))
        self.t = self.shift * t / (1 + (self.shift - 1) * t)
        return self.losses(model, {"x1": x1, **kwargs, **more}, self.x0, self.t, self.t)

    def training_losses(self, *arguments: Any) -> dict[str, Tensor]:
        return {"loss": self(*arguments)}


TRAINERS = {
    "sit": Trainer(
        {"gamma": 0.8, "clock": DATA_AT_1},
        sit,
        lambda *a: sit_losses(*a).mean(),
        with_mixflow,
        lambda t: (t, 1 - t),
        "SiT, LightningDiT",
        {"create_transport": lambda path, prediction: Before(sit_losses)},
    ),
    "repa": Trainer(
        {"gamma": 0.8, "clock": NOISE_AT_1},
        repa,
        repa_loss,
        repa_with_mixflow,
        lambda t: (1 - t, t),
        "REPA",
        {"loss_fn": Before(repa_losses), "proj_coeff": PROJ_COEFF},
    ),
    "rae": Trainer(
        {"gamma": 0.4, "clock": NOISE_AT_1, "shift": math.sqrt(48)},
        rae,
        lambda *a: rae_losses(*a).mean(),
        with_mixflow,
        lambda t: (1 - t, t),
        "RAE",
        {
            "create_transport": lambda path, prediction, **more: Before(rae_losses, **more),
            "latent_dim": 768 * 16 * 16,
        },
    ),
    "sd3": Trainer(
        {"gamma": 0.8, "clock": NOISE_AT_1, "shift": 3.0},
        sd3,
        sd3_loss,
        sd3_with_mixflow,
        lambda t: (1 - t, t),
        "SD3 and Flux with diffusers",
        {
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
            "weighting_scheme": "sigma_sqrt",
        },
    ),
}


def trained_gradients(model: nn.Module) -> Gradients:
    """Copies of what backward left, for every parameter that is trained."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def loss_and_gradients(model: nn.Module, loss: Tensor) -> tuple[Tensor, Gradients]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return loss.detach(), trained_gradients(model)


def assert_same(ours: tuple[Tensor, Gradients], plain: tuple[Tensor, Gradients]) -> None:
    """Loss and gradients of all parameters.

    The bias of a key has no gradient in exact arithmetic: what is there is rounding, so a tensor's
    error is measured against at least a hundredth of the whole gradient.
    """
    torch.testing.assert_close(ours[0], plain[0], rtol=TOLERANCE, atol=0)
    whole = torch.cat([g.flatten() for g in plain[1].values()]).double().norm().item()
    assert whole > 0 and ours[1].keys() == plain[1].keys()
    errors = {k: relative(ours[1][k], g, floor=whole / 100) for k, g in plain[1].items()}
    assert {k: e for k, e in errors.items() if e > TOLERANCE} == {}
