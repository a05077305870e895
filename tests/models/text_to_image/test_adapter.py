"""Adapters against the official pipelines, and wrong ones that the comparison must refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixflow_fast import MixFlow, Moments
from mixflow_fast.flow import NOISE_AT_1
from mixflow_fast.models.text_to_image import (
    Adapter,
    Condition,
    LatentMap,
    SD3Adapter,
    ZImageAdapter,
    check_against_pipeline,
)
from mixflow_fast.models.text_to_image.flux import pack, unpack
from mixflow_fast.models.text_to_image.pipeline_check import RecordedStep
from tests.support.text_to_image import (
    FAMILIES,
    HEIGHT,
    SD3_LARGE,
    TOKENS,
    VAE,
    WIDTH,
    Family,
    captions,
    numbers,
    sd3,
    text,
    vae,
)

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def in_dtype(cond: Condition, dtype: torch.dtype) -> Condition:
    """The text as a bf16 pipeline gets it; a guidance stays float32."""
    return {k: v.to(dtype) if k.endswith("embeds") else v for k, v in cond.items()}


def recorded(family: Family, dtype: torch.dtype) -> tuple[Adapter, list[RecordedStep], Condition]:
    network = family.build().to(dtype)
    noise, cond = numbers(2, 16, HEIGHT, WIDTH, seed=7), in_dtype(family.cond(2), dtype)
    # Z-Image's pipeline keeps its latents in float32, whatever the network computes in.
    noise = noise if family.adapter is ZImageAdapter else noise.to(dtype)
    return family.adapter(network), family.record(network, noise, cond, 3), cond


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_velocity_is_the_pipeline_s(family: Family, dtype: torch.dtype) -> None:
    """Bit for bit, in both dtypes, at the noise end and at two other noise levels."""
    adapter, steps, cond = recorded(family, dtype)
    assert len(steps) == 3 and steps[0].sigma == 1 and 0 < steps[2].sigma < steps[1].sigma < 1
    assert check_against_pipeline(adapter, steps, cond, tolerance=0.0) == 0.0
    assert adapter.velocity(steps[1].x, torch.full((2,), 0.5), cond).dtype == dtype


class Wrong:
    """An adapter with one mistake."""

    def __init__(
        self, adapter: Adapter, mistake: Callable[[Adapter, Tensor, Tensor, Condition], Tensor]
    ):
        self.adapter, self.mistake = adapter, mistake

    def velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.mistake(self.adapter, x, t, cond)


MISTAKES = {
    "sign": (lambda a, x, t, c: -a.velocity(x, t, c), "with the other sign it does fit"),
    "clock": (lambda a, x, t, c: a.velocity(x, 1 - t, c), "with the other clock it does fit"),
    "sign and clock": (
        lambda a, x, t, c: -a.velocity(x, 1 - t, c),
        "with the other sign and clock it does fit",
    ),
    "time scale": (lambda a, x, t, c: a.velocity(x, t / 1000, c), "the scale of the time"),
    "half precision": (lambda a, x, t, c: a.velocity(x, t.bfloat16().float(), c), "relative RMS"),
    "prompts swapped": (
        lambda a, x, t, c: a.velocity(x, t, {k: v.flip(0) for k, v in c.items()}),
        "not the pipeline's",
    ),
    "height and width": (
        lambda a, x, t, c: a.velocity(x.transpose(2, 3), t, c).transpose(2, 3),
        "the layout",
    ),
    "shape": (lambda a, x, t, c: a.velocity(x, t, c).flatten(2), "must have the shape of x"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", ["sd3.5 medium", "flux", "z-image"])
def test_a_wrong_adapter_is_refused(name: str, mistake: str) -> None:
    adapter, steps, cond = recorded(FAMILIES[name], torch.float32)
    wrong, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        check_against_pipeline(Wrong(adapter, wrong), steps, cond)


def test_one_step_is_not_enough() -> None:
    adapter, steps, cond = recorded(FAMILIES["sd3.5 medium"], torch.float32)
    with pytest.raises(ValueError, match="at least 2"):
        check_against_pipeline(adapter, steps[:1], cond)


@pytest.mark.parametrize("name", ["sd3.5 medium", "flux", "z-image"])
def test_a_network_trains_behind_its_adapter(name: str) -> None:
    """The objective in the clock of adapters trains the network towards the velocity of an example.

    A rough check that needs no pipeline: gradients pass through the adapter, and the loss falls.
    """
    family = FAMILIES[name]
    network = family.build()
    adapter, cond = family.adapter(network), family.cond(4)
    mix = MixFlow(gamma=0.0, clock=NOISE_AT_1, timesteps="uniform")
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    x1 = numbers(1, 16, 4, 4, seed=3).expand(4, -1, -1, -1)
    losses = []
    for step in range(12):
        it = mix.prepare(x1, ids=torch.arange(4) + 4 * step)
        loss = mix.loss(adapter.velocity(it.x, it.t, cond), it)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_packed_latents_are_the_pipeline_s() -> None:
    x = numbers(2, 16, HEIGHT, WIDTH)
    tokens = pack(x)
    assert torch.equal(tokens, FluxPipeline._pack_latents(x, 2, 16, HEIGHT, WIDTH))
    assert torch.equal(unpack(tokens, HEIGHT, WIDTH), x)


@pytest.mark.parametrize("autocast", [False, True])
def test_sd3_s_label_is_float32_at_the_sinusoid(autocast: bool) -> None:
    """bf16 has eight digits: 1000 s would be wrong by up to 2."""
    network = sd3() if autocast else sd3().bfloat16()
    labels: list[Tensor] = []
    network.time_text_embed.time_proj.register_forward_pre_hook(lambda _, a: labels.append(a[0]))
    t = torch.tensor([0.12345, 0.9971])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = SD3Adapter(network).velocity(numbers(2, 16, 4, 4), t, text())
    assert labels[0].dtype == torch.float32 and torch.equal(labels[0], 1000 * t)
    assert out.dtype == torch.bfloat16


def test_flux_rounds_its_label_under_autocast_too() -> None:
    """Float32 latents under autocast: the label is what a bf16 network would round it to."""
    family, t = FAMILIES["flux"], torch.tensor([0.12345, 0.9971])
    labels: list[Tensor] = []
    for autocast in (False, True):
        network = family.build() if autocast else family.build().bfloat16()
        network.time_text_embed.time_proj.register_forward_pre_hook(
            lambda _, a: labels.append(a[0])
        )
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            family.adapter(network).velocity(numbers(2, 16, 4, 4), t, text())
    assert torch.equal(labels[0], labels[1]) and labels[0].dtype == labels[1].dtype
    assert not torch.equal(labels[1].float(), 1000 * t)


@pytest.mark.parametrize("name", ["sd3.5 medium", "flux", "z-image"])
def test_checkpointable_are_the_blocks(name: str) -> None:
    """The classes that diffusers itself does not split, and the gradients with checkpointing on."""
    family = FAMILIES[name]
    network = family.build()
    adapter, cond = family.adapter(network), family.cond(2)
    names = [block.__name__ for block in adapter.checkpointable]
    assert names == network._no_split_modules
    x, t = numbers(2, 16, 4, 4), torch.tensor([0.3, 0.8])
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            network.enable_gradient_checkpointing()
        network.zero_grad(set_to_none=True)
        adapter.velocity(x, t, cond).square().mean().backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)) and gradients[0]


# Latents.


def test_latent_map_is_diffusers_arithmetic() -> None:
    z, shift, scale = numbers(2, 16, 4, 4), VAE["shift_factor"], VAE["scaling_factor"]
    latents = LatentMap.of_vae(vae().config)
    assert latents == SD3Adapter.LATENTS
    x1 = latents.encode(z)
    assert torch.equal(x1, (z - shift) * scale)
    assert torch.equal(latents.decode(x1), x1 / scale + shift)
    torch.testing.assert_close(latents.decode(x1), z)


def test_moments_draw_the_posterior_behind_the_map() -> None:
    """The kernel's affine draw of shifted moments is the map of a draw of the posterior."""
    mean, std = numbers(3, 16, 4, 4), numbers(3, 16, 4, 4, seed=1).exp()
    plain = MixFlow(clock=NOISE_AT_1).prepare(Moments(mean, std, 1.0), ids=torch.arange(3)).x1
    channels = LatentMap(tuple(0.1 * n for n in range(16)), tuple(1.0 + n for n in range(16)))
    for latents in (SD3Adapter.LATENTS, channels):
        moments = latents.moments(mean, std)
        x1 = MixFlow(clock=NOISE_AT_1).prepare(moments, ids=torch.arange(3)).x1
        torch.testing.assert_close(x1, latents.encode(plain), rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(latents.decode(x1), plain, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0.0}, "scale must be a positive"),
        ({"scale": (1.0, -1.0)}, "scale must be a positive"),
        ({"shift": float("nan")}, "shift must be a finite"),
        ({"shift": "0.1"}, "shift must be a finite"),
    ],
)
def test_a_map_that_is_none(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentMap(**arguments)


def test_other_channels_and_other_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="C = 2"):
        LatentMap((0.0, 0.1)).encode(numbers(1, 3, 4, 4))
    with pytest.raises(ValueError, match="latents_mean"):
        LatentMap.of_vae({"scaling_factor": 1.0, "latents_mean": [0.1], "latents_std": [1.0]})


# Dropped prompts.


def test_empty_is_the_empty_prompt_for_every_sample() -> None:
    nothing = text(1, seed=40)
    adapter = SD3Adapter(sd3(), empty_prompt=nothing)
    cond = text(3) | {"image_size": torch.ones(3, 2)}
    empty = adapter.empty(cond)
    assert list(empty) == list(cond)
    for key in nothing:
        assert torch.equal(empty[key], nothing[key].repeat(3, *[1] * (nothing[key].dim() - 1)))
    assert torch.equal(empty["image_size"], cond["image_size"])


def test_z_image_s_empty_prompt_is_padded() -> None:
    """What is behind the captions, and the padding of the empty prompt, changes no velocity."""
    family = FAMILIES["z-image"]
    short = {"prompt_embeds": numbers(1, 3, 32, seed=9), "prompt_mask": torch.ones(1, 3).bool()}
    adapter = ZImageAdapter(family.build(), empty_prompt=short)
    empty = adapter.empty(captions(2))
    assert empty["prompt_embeds"].shape == (2, TOKENS, 32)
    assert empty["prompt_mask"].sum(1).tolist() == [3, 3]
    x, t = numbers(2, 16, 4, 4), torch.tensor([0.3, 0.8])
    alone = {key: value.expand(2, *value.shape[1:]) for key, value in short.items()}
    assert torch.equal(adapter.velocity(x, t, empty), adapter.velocity(x, t, alone))


def test_empty_prompts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="needs the embeddings of the empty one"):
        SD3Adapter(sd3()).empty(text())
    longer = text(1) | {"prompt_embeds": numbers(1, TOKENS + 1, 32)}
    with pytest.raises(ValueError, match="encode both at the same length"):
        SD3Adapter(sd3(), empty_prompt=longer).empty(text())
    with pytest.raises(ValueError, match="must be one sample"):
        SD3Adapter(sd3(), empty_prompt=text(2))
    with pytest.raises(ValueError, match="must hold prompt_embeds, pooled_prompt_embeds"):
        SD3Adapter(sd3(), empty_prompt={"prompt_embeds": numbers(1, TOKENS, 32)})


@pytest.mark.parametrize(
    ("x", "t", "cond", "message"),
    [
        (numbers(2, 4, 8, 8), torch.rand(2), text(), r"\(B, 16, h, w\)"),
        (numbers(2, 16, 8, 7), torch.rand(2), text(), "even h and w"),
        (numbers(2, 16, 8, 8), torch.rand(2).bfloat16(), text(), "half-precision times"),
        (numbers(2, 16, 8, 8), torch.rand(1), text(), r"t must be \(B,\)"),
        (numbers(2, 16, 8, 8), 1000 * torch.ones(2), text(), "divide by 1000"),
        (numbers(2, 16, 8, 8), torch.rand(2), text(1), "must hold 2 samples"),
        (numbers(2, 16, 8, 8), torch.rand(2), {}, "got nothing"),
    ],
)
def test_what_velocity_refuses(x: Tensor, t: Tensor, cond: Condition, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SD3Adapter(sd3()).velocity(x, t, cond)


def test_guidance_is_neither_forgotten_nor_ignored() -> None:
    x, t, guidance = numbers(2, 16, 4, 4), torch.rand(2), {"guidance": torch.full((2,), 3.5)}
    guided, plain = FAMILIES["flux with guidance"], FAMILIES["flux"]
    with pytest.raises(ValueError, match="must hold guidance"):
        guided.adapter(guided.build()).velocity(x, t, text())
    with pytest.raises(ValueError, match="leave it out"):
        plain.adapter(plain.build()).velocity(x, t, text() | guidance)


class Reads(TorchDispatchMode):
    """Notes boolean indices, for which the host waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        bools = name in ("index", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if bools or name == "nonzero":
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_z_image_s_captions_are_cut_without_boolean_indices() -> None:
    """Which would make the host wait once a sample; masks need not have the padding behind."""
    adapter = ZImageAdapter(FAMILIES["z-image"].build())
    given: list[list[Tensor]] = []

    class Recorded(torch.nn.Module):
        dtype = torch.float32

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, t, captions, return_dict):
            given.append(captions)
            return (x,)

    adapter.network = Recorded()
    cond = captions(4)
    mask = torch.rand(4, TOKENS, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[0], mask[1, :] = True, torch.arange(TOKENS) < 3
    cond["prompt_mask"] = mask
    with Reads() as reads:
        adapter.velocity(numbers(4, 16, 4, 4), torch.full((4,), 0.5), cond)
    assert not reads.found
    for cut, tokens, real in zip(given[0], cond["prompt_embeds"], mask, strict=True):
        assert torch.equal(cut, tokens[real])


def test_z_image_s_mask_must_be_one() -> None:
    family = FAMILIES["z-image"]
    cond = captions(2) | {"prompt_mask": torch.ones(2, TOKENS)}
    with pytest.raises(ValueError, match="prompt_mask must be"):
        family.adapter(family.build()).velocity(numbers(2, 16, 4, 4), torch.rand(2), cond)


def test_large_has_no_dual_attention() -> None:
    assert SD3_LARGE["dual_attention_layers"] == ()
    assert sum(p.numel() for p in sd3().parameters()) == 134_656
    large = FAMILIES["sd3.5 large"].build()
    assert sum(p.numel() for p in large.parameters()) == 119_808
