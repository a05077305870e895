"""The frozen DINOv2 under teacher and encoder: its position table, its final norm, its compilation.

Its tokens are held against independent lines in `test_teacher.py`, and against the official RAE in
`autoencoders/test_rae.py`.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from mixflow_fast.models.dinov2 import Dinov2, Dinov2Files, Owner, resample_positions
from tests.support.kernels import relative_rms
from tests.support.teacher import PATCH, TABLE, WIDTH, save_teacher

OWNER = Owner("encoder", "get one")


def test_positions_are_resampled_like_timm_and_only_when_needed() -> None:
    table = torch.randn(1, 1 + 37 * 37, 8, generator=torch.Generator().manual_seed(1))
    assert resample_positions(table, 37) is table
    grid = table[:, 1:].double().reshape(1, 37, 37, 8).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (16, 16), mode="bicubic", antialias=True)
    ours = resample_positions(table, 16)
    assert torch.equal(ours[:, 0], table[:, 0]) and ours.shape == (1, 257, 8)
    assert relative_rms(ours[:, 1:], grid.permute(0, 2, 3, 1).reshape(1, 256, 8)) < 1e-6


def test_positions_are_resampled_like_torch_hub() -> None:
    """Cubic convolution (a = -3/4) at (i + 1/2) 37 / 16.1 - 1/2, borders repeated, in float64."""
    table = torch.randn(1, 1 + 37 * 37, 2, generator=torch.Generator().manual_seed(1))
    grid = table[0, 1:].double().reshape(37, 37, 2)

    def weight(d: float) -> float:
        d, a = abs(d), -0.75
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    matrix = torch.zeros(16, 37, dtype=torch.float64)
    for i in range(16):
        place = (i + 0.5) * 37 / 16.1 - 0.5
        for j in range(int(place) - 1, int(place) + 3):
            matrix[i, min(max(j, 0), 36)] += weight(place - j)
    expected = torch.einsum("ih,jw,hwd->ijd", matrix, matrix, grid).reshape(1, 256, 2)
    ours = resample_positions(table, 16, "hub")
    assert torch.equal(ours[:, 0], table[:, 0]) and ours.shape == (1, 257, 2)
    assert relative_rms(ours[:, 1:], expected) < 1e-5
    assert relative_rms(resample_positions(table, 16)[:, 1:], expected) > 0.1


def pixels(side: int, batch: int = 2) -> torch.Tensor:
    g = torch.Generator().manual_seed(2)
    return torch.randn(batch, 3, side * PATCH, side * PATCH, generator=g)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Dinov2Files:
    folder = save_teacher(tmp_path_factory.mktemp("dinov2"), "dinov2_with_registers")
    return Dinov2Files.read(folder, OWNER)


def test_without_its_weight_and_bias_the_final_norm_only_normalises(files: Dinov2Files) -> None:
    x = pixels(2)
    plain = Dinov2(files, "fp32", affine_norm=False)(x)
    assert plain.shape == (2, 4, WIDTH)
    assert plain.mean(-1).abs().max() < 1e-5 and (plain.var(-1, False) - 1).abs().max() < 1e-3
    weights = load_file(files.path / "model.safetensors")
    affine = plain.double() * weights["layernorm.weight"] + weights["layernorm.bias"]
    assert relative_rms(Dinov2(files, "fp32")(x), affine) < 1e-6
    assert relative_rms(plain, affine) > 0.1


def test_what_the_final_norm_does_not_use_may_be_missing(
    files: Dinov2Files, tmp_path: Path
) -> None:
    weights = load_file(files.path / "model.safetensors")
    (tmp_path / "config.json").write_text((files.path / "config.json").read_text())
    rest = {k: v for k, v in weights.items() if not k.startswith("layernorm.")}
    save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fewer = Dinov2Files.read(tmp_path, OWNER)
    x = pixels(TABLE, 1)
    assert torch.equal(
        Dinov2(fewer, "fp32", affine_norm=False)(x), Dinov2(files, "fp32", affine_norm=False)(x)
    )
    with pytest.raises(ValueError, match=r"lacks 2 of the encoder's weights.*layernorm.*: get one"):
        Dinov2(fewer, "fp32")
    del rest["encoder.layer.0.norm1.weight"]
    save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the .*layer.0.norm1.weight"):
        Dinov2(fewer, "fp32", affine_norm=False)


@pytest.mark.parametrize("side", [TABLE, 2])
def test_its_forward_pass_is_one_graph(files: Dinov2Files, side: int) -> None:
    """What torch.compile(fullgraph=True) needs, as on a GPU; a break would be an error here."""
    dinov2 = Dinov2(files, "bf16", affine_norm=False)
    x = pixels(side).bfloat16()
    with torch.no_grad():
        model = dinov2.model
        one = torch.compile(
            lambda x: model(pixel_values=x).last_hidden_state, fullgraph=True, backend="aot_eager"
        )
        assert torch.equal(one(x)[:, 5:], dinov2(x))
