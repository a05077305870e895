"""Estimates of memory, held against the specification's table and against real passes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from mixflow_fast.config.schema import OptimConfig, TrainConfig
from mixflow_fast.models.text_to_image.lora import add_lora, lora_spec
from mixflow_fast.models.text_to_image.network import TextToImage
from mixflow_fast.training.memory import kept_bytes, memory_table, state_bytes
from tests.support.released_sd3 import LARGE, MEDIUM, cond, on_meta
from tests.support.text_to_image import FAMILIES, SD3

BF16 = TrainConfig(precision="bf16", zero_stage=2)
ONE, THREE = OptimConfig(ema_decays=(0.999,)), OptimConfig(
    ema_decays=(0.999,), ema_sigma_rel=(0.05, 0.1)
)  # fmt: skip


@pytest.fixture(scope="module", params=["medium", "large"])
def released(request: pytest.FixtureRequest) -> tuple[str, TextToImage]:
    return request.param, on_meta(MEDIUM if request.param == "medium" else LARGE)


def test_states_of_the_released_models(released: tuple[str, TextToImage]) -> None:
    """GB of 1, 2, 4 and 8 GPUs with ZeRO 2, and of 8 with ZeRO 3."""
    name, net = released
    table = {"medium": (49, 27, 16, 10, 6.2), "large": (177, 97, 56, 36, 22)}[name]
    ways = [(1, 2), (2, 2), (4, 2), (8, 2), (8, 3)]
    for expected, (ranks, stage) in zip(table, ways, strict=True):
        found = state_bytes(net, BF16, ONE, ranks, stage) / 1e9
        assert round(found, 1 if expected < 10 else 0) == expected
    more = [state_bytes(net, BF16, THREE, n) - state_bytes(net, BF16, ONE, n) for n in (1, 8)]
    each = [round(bytes / 2 / 1e9, 1) for bytes in more]
    assert each == {"medium": [9.0, 1.1], "large": [32.2, 4.0]}[name]


def test_states_that_nothing_trains_are_weights_alone() -> None:
    net = on_meta(SD3)
    whole = state_bytes(net, BF16, ONE, 1)
    assert whole == 134_656 * (2 + 4 + 16)
    net.requires_grad_(False)
    net.transformer.proj_out.requires_grad_(True)
    trained = sum(p.numel() for p in net.transformer.proj_out.parameters())
    assert state_bytes(net, BF16, ONE, 2) == 134_656 * 2 + trained * 20 / 2
    assert state_bytes(net, BF16, ONE, 2, stage=3) == 134_656 + trained * 20 / 2


@pytest.mark.parametrize(
    ("config", "parameters", "gb"), [(MEDIUM, 11_943_936, 4.7), (LARGE, None, 17)]
)
def test_states_of_adapters(config: dict[str, object], parameters: int | None, gb: float) -> None:
    """Of rank 16; without the second attention of medium there would be 9,388,032."""
    net = on_meta(config)
    add_lora(net.transformer, lora_spec(net.transformer, 16))
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert parameters in (None, trained)
    assert round(state_bytes(net, BF16, ONE, 1) / 1e9, 1 if gb < 10 else 0) == gb


@pytest.mark.parametrize(
    ("config", "side", "whole", "inputs", "block"),
    [
        (MEDIUM, 64, 3.0, (0.09, 0.10), 0.15),
        (MEDIUM, 128, 10.8, (0.30, 0.33), None),
        (LARGE, 64, 6.3, (0.22, 0.23), None),
        (LARGE, 128, 21.7, (0.76, 0.80), 0.57),
    ],
)
def test_activations_of_the_released_models(
    config: dict[str, object],
    side: int,
    whole: float,
    inputs: tuple[float, float],
    block: float | None,
) -> None:
    """GiB of 512 and 1024 pixels at 231 tokens. The table has the blocks' inputs alone, and not
    what stands around the blocks."""
    net = on_meta(config).to(torch.bfloat16)
    found = kept_bytes(net, (16, side, side), cond(231, 4096, 2048))
    assert round(found.whole / 2**30, 1) == whole
    assert round(found.inputs / 2**30, 2) == inputs[1]
    assert block is None or round(found.block / 2**30, 2) == block
    tokens = (side // 2) ** 2 + 231
    width, depth = config["caption_projection_dim"], config["num_layers"]
    assert depth * tokens * width * 2 / 2**30 == pytest.approx(inputs[0], rel=0.05)


def saved_on_cpu(net: TextToImage, told: dict[str, Tensor], x: Tensor) -> int:
    """Bytes of the distinct storages that a real pass saves, weights and buffers aside."""
    own = {t.untyped_storage().data_ptr() for t in [*net.parameters(), *net.buffers()]}
    found: dict[int, torch.UntypedStorage] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        net(x, torch.full((1,), 0.5), told)
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_pass_on_the_cpu_keeps_as_much(checkpointing: str) -> None:
    """The same network with storage, whose attention is a flash kernel on the CPU too."""
    family = FAMILIES["sd3.5 medium"]
    real = TextToImage(family.adapter(family.build())).train()
    told, x = family.cond(1), torch.zeros(1, 16, 8, 8)
    real.set_execution(checkpointing=checkpointing)
    found = saved_on_cpu(real, told, x)
    meta = copy.deepcopy(real).to("meta")
    estimated = kept_bytes(meta, (16, 8, 8), {n: t.to("meta") for n, t in told.items()})
    assert meta.execution == real.execution
    own = estimated.whole if checkpointing == "none" else estimated.inputs
    assert own == pytest.approx(found, rel=0.01)
    assert estimated.inputs < estimated.block < estimated.whole


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_counted_or_said_not_to_be(name: str) -> None:
    family = FAMILIES[name]
    net = TextToImage(family.adapter(family.build())).train().to("meta")
    told = {n: t.to("meta") for n, t in family.cond(1).items()}
    found = kept_bytes(net, (16, 8, 8), told)
    assert found is None if name == "z-image" else found.whole > found.inputs > 0


def test_twice_the_blocks_keep_twice_as_much() -> None:
    by_depth = [
        kept_bytes(on_meta(LARGE | {"num_layers": n}), (16, 64, 64), cond(231, 4096, 2048))
        for n in (2, 3, 4)
    ]
    whole = [kept.whole for kept in by_depth]
    assert whole[2] - whole[1] == whole[1] - whole[0]
    # A few vectors are saved between the blocks.
    assert by_depth[0].block == pytest.approx(whole[1] - whole[0], rel=1e-4)


def test_attention_keeps_no_table_of_products() -> None:
    """The plain one keeps tokens x tokens of each head; memory grows with the tokens alone."""
    net = on_meta(SD3 | {"pos_embed_max_size": 64})
    small, large = (kept_bytes(net, (16, n, n), cond(12, 32, 64)) for n in (64, 128))
    assert large.block < 4.01 * small.block


def test_lines_of_the_table() -> None:
    lines = [*memory_table(BF16, THREE, on_meta(MEDIUM), ({(16, 64, 64): 3, (16, 32, 48): 9},
             cond(231, 4096, 2048)), (16, True))]  # fmt: skip
    text = "\n".join(lines)
    assert "in GiB on 1, 2, 4, 8 GPUs: weights, gradients, optimizer and 3 averages" in text
    assert (
        "    ZeRO 2: 62.7, 33.4, 18.8, 11.5" in text and "    ZeRO 3: 62.7, 31.3, 15.7, 7.8" in text
    )
    assert "each average of these: 8.4, 4.2, 2.1, 1.0" in text
    assert "lora.rank=16 instead, 11,943,936 parameters: 4.5, 4.4, 4.3, 4.2" in text
    assert "for 16 latents of 64x64; each keeps 3.0 GiB" in text and "of one block" in text
    ddp = TrainConfig(precision="bf16", engine="ddp", zero_stage=0)
    named = "\n".join(
        memory_table(ddp, ONE, on_meta(SD3), ({(16, 8, 8): 1}, cond(12, 32, 64)), (1, False))
    )
    assert "    ddp: " in named and "    ZeRO 1: " in named and "ZeRO 2" not in named
