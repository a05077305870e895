"""RAE's encoder against latents that the official code computed, and what is refused."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from mixflow_fast.models.autoencoders.rae import RAEEncoder, Statistics, rae_files
from mixflow_fast.models.dinov2 import without_affine_norm
from tests.support.golden import load
from tests.support.kernels import relative_rms
from tests.support.rae import save_encoder, save_statistics
from tests.support.teacher import images, save_teacher

GOLDEN = {"rae_stage1_4x4": 4, "rae_stage1_8x8": 8}
# A repetition in float64 differs by up to 7e-6, since float32 places the bicubic taps; operation by
# operation in float32 it is less.
ROUNDING = 1e-6


@pytest.fixture(scope="module", params=GOLDEN)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Tensor], Path, int]:
    folder = tmp_path_factory.mktemp("rae")
    save_encoder(folder, request.param)
    save_statistics(folder, request.param)
    return load(request.param)[0], folder, GOLDEN[request.param]


def test_it_encodes_as_the_official_code(case: tuple[dict[str, Tensor], Path, int]) -> None:
    golden, folder, side = case
    encoder = RAEEncoder(folder, side, stats=folder / "stat.pt")
    z = encoder.encode(golden["x"])
    assert encoder.shape == (32, side, side) and z.is_contiguous() and not z.requires_grad
    assert relative_rms(z, golden["z"].double()) < ROUNDING
    # Images of the network's own size are not resized.
    z = encoder.encode(golden["x_encoder_size"])
    assert relative_rms(z, golden["z_encoder_size"].double()) < ROUNDING


def test_without_statistics_or_a_mean(case: tuple[dict[str, Tensor], Path, int]) -> None:
    golden, folder, side = case
    z = RAEEncoder(folder, side).encode(golden["x"])
    assert relative_rms(z, golden["z_no_stats"].double()) < ROUNDING
    torch.save({"var": golden["stat.var"]}, folder / "var.pt")
    z = RAEEncoder(folder, side, stats=folder / "var.pt").encode(golden["x"])
    assert relative_rms(z, golden["z_without_mean"].double()) < ROUNDING


def test_what_the_encoder_is_not(case: tuple[dict[str, Tensor], Path, int]) -> None:
    """Each of these would be seen by the tests above."""
    golden, folder, side = case
    encoder, truth = RAEEncoder(folder, side), golden["z_no_stats"].double()
    mean, var = golden["stat.mean"], golden["stat.var"]
    z = encoder.encode(golden["x"])
    assert relative_rms((z - mean) / (var.sqrt() + 1e-5), golden["z"].double()) > 10 * ROUNDING
    size = (encoder.resolution,) * 2
    smooth = F.interpolate(golden["x"], size, mode="bicubic", antialias=True)
    assert relative_rms(encoder.encode(smooth), truth) > 10 * ROUNDING
    resized = F.interpolate(golden["x"], size, mode="bicubic")
    assert relative_rms(encoder.encode(resized.clamp(0, 1)), truth) > 10 * ROUNDING
    norm = encoder.model.layernorm
    encoder.model.layernorm = torch.nn.LayerNorm(32, eps=norm.eps)
    weights = load_file(folder / "model.safetensors")
    encoder.model.layernorm.load_state_dict(
        {name: weights[f"layernorm.{name}"] for name in ("weight", "bias")}
    )
    assert relative_rms(encoder.encode(golden["x"]), truth) > 10 * ROUNDING


def test_bytes_are_images_in_0_1_and_autocast_changes_nothing(
    case: tuple[dict[str, Tensor], Path, int],
) -> None:
    _, folder, side = case
    encoder = RAEEncoder(folder, side, stats=folder / "stat.pt")
    x = images(2, 8 * side)
    z = encoder(x)
    assert z.dtype == torch.float32 and z.shape == (2, *encoder.shape)
    assert torch.equal(z, encoder.encode(x.float() / 255))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(x), z)


def test_in_bf16_only_the_network_is(case: tuple[dict[str, Tensor], Path, int]) -> None:
    golden, folder, side = case
    half = RAEEncoder(folder, side, precision="bf16")
    z = half.encode(golden["x"])
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert z.dtype == torch.float32
    assert 1e-3 < relative_rms(z, golden["z_no_stats"].double()) < 5e-2
    normalised = RAEEncoder(folder, side, stats=folder / "stat.pt", precision="bf16")
    std = (golden["stat.var"].double() + 1e-5).sqrt()
    truth = (z.double() - golden["stat.mean"].double()) / std
    assert relative_rms(normalised.encode(golden["x"]), truth) < 1e-6


def test_the_size_of_the_real_encoder() -> None:
    import transformers

    config = transformers.Dinov2WithRegistersConfig(image_size=518, patch_size=14)
    with torch.device("meta"):
        model = transformers.Dinov2WithRegistersModel(config)
    without_affine_norm(model)
    assert sum(p.numel() for p in model.parameters()) == 86_582_016
    assert model.layernorm.eps == 1e-6 and model.layernorm.weight is None


def test_256_pixels_give_16_by_16_tokens_of_224_pixels(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path, "dinov2_with_registers")
    for side, pixels in ((16, 224), (32, 448)):
        assert RAEEncoder(folder, side).resolution == pixels


def test_statistics_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path, shape = tmp_path / "stat.pt", (6, 4, 4)

    def read(**content: object) -> Statistics:
        torch.save(content, path)
        return Statistics.read(path, shape)

    one = read(mean=torch.ones(6, 1, 1))  # one number per channel
    assert torch.equal(one.normalise(torch.ones(2, *shape)), torch.zeros(2, *shape))
    assert one.std.item() == pytest.approx(1 + 5e-6, abs=1e-7)
    z = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    both = read(mean=torch.rand(shape), var=torch.rand(shape))
    assert relative_rms(both.denormalise(both.normalise(z)), z.double()) < 1e-5
    for wrong in ((6, 8, 8), (4,), (1, 6, 4, 4), (5, 4, 4)):
        with pytest.raises(ValueError, match=r"var of .* are \(6, 4, 4\): give encoder.stats"):
            read(var=torch.ones(wrong))
    with pytest.raises(ValueError, match="negative values"):
        read(var=-torch.ones(shape))
    with pytest.raises(ValueError, match="mean has 1 value that is not finite"):
        read(mean=torch.full((1, 1, 1), torch.nan))
    with pytest.raises(ValueError, match="must hold the tensors mean and var.*got mean, std"):
        read(mean=torch.ones(shape), std=torch.ones(shape))
    with pytest.raises(ValueError, match="encoder.stats.*does not exist"):
        Statistics.read(tmp_path / "none.pt", shape)


def test_other_networks_and_images_are_refused(tmp_path: Path) -> None:
    plain = save_teacher(tmp_path / "plain")
    with pytest.raises(ValueError, match="is a dinov2, RAE's encoder is a dinov2_with_registers"):
        rae_files(plain)
    with pytest.raises(ValueError, match=r"encoder.path .*dinov2-with-registers-base"):
        rae_files(tmp_path / "none")
    folder = save_teacher(tmp_path / "registers", "dinov2_with_registers")
    encoder = RAEEncoder(folder, 2)
    for bad in (images(1, 8).float(), images(1, 8)[:, :1], images(1, 8)[..., :4]):
        with pytest.raises(ValueError, match=r"images must be \(B, 3, H, H\) uint8"):
            encoder(bad)
