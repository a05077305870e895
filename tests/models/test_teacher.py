"""The frozen teacher: REPA's preprocessing and tokens against independent float64, and refusals."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixflow_fast.models.dinov2 import Dinov2Files
from mixflow_fast.models.teacher import TEACHER, Teacher, preprocess, teacher_resolution
from tests.support.kernels import relative_rms
from tests.support.teacher import PATCH, TABLE, WIDTH, images, save_teacher

KINDS = {"dinov2": 1, "dinov2_with_registers": 5}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    return {kind: save_teacher(root / kind, kind) for kind in KINDS}


def reference_input(x: Tensor, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """uint8 -> float64: normalise, then bicubic, as REPA."""
    mean, std = (torch.tensor(v, dtype=dtype).view(1, 3, 1, 1) for v in (MEAN, STD))
    return F.interpolate((x.to(dtype) / 255 - mean) / std, (size, size), mode="bicubic")


@pytest.mark.parametrize(("size", "resolution"), [(32, 28), (16, 56), (1, 14), (64, 56)])
def test_preprocessing_is_repas(size: int, resolution: int) -> None:
    x = images(2, size)
    truth = reference_input(x, resolution)
    ours = preprocess(x, resolution)
    # float32 places the bicubic taps to about 1e-6 of a pixel only.
    most = 2 * relative_rms(reference_input(x, resolution, torch.float32), truth) + 1e-6
    assert most < 2e-5 and ours.dtype == torch.float32 and relative_rms(ours, truth) < most
    # A model of pixels hands over what it trains on.
    assert relative_rms(preprocess(x.float() / 127.5 - 1, resolution), truth) < most
    assert relative_rms(preprocess(x.double() / 127.5 - 1, resolution), truth) < 1e-14
    half = preprocess((x.float() / 127.5 - 1).bfloat16(), resolution)
    assert half.dtype == torch.float32 and relative_rms(half, truth) < 1e-2


def test_what_preprocessing_is_not() -> None:
    """Resizing the bytes first, or with antialiasing, would be seen by the test above."""
    x = images(2, 64)
    truth = reference_input(x, 56)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    bytes_first = F.interpolate(x, (56, 56), mode="bicubic").float() / 255  # rounds and clamps
    assert relative_rms((bytes_first - mean) / std, truth) > 1e-3
    normalised = (x.float() / 255 - mean) / std
    smoothed = F.interpolate(normalised, (56, 56), mode="bicubic", antialias=True)
    assert relative_rms(smoothed, truth) > 1e-3


def plain_dinov2(folder: Path, x: Tensor, kind: str, antialias: bool) -> Tensor:
    """DINOv2's patch tokens in float64, from the file of weights: x is preprocessed."""
    w = {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}
    h = F.conv2d(
        x,
        w["embeddings.patch_embeddings.projection.weight"],
        w["embeddings.patch_embeddings.projection.bias"],
        stride=PATCH,
    )
    side = h.shape[-1]
    h = h.flatten(2).mT
    table = w["embeddings.position_embeddings"]
    grid = table[:, 1:].view(1, TABLE, TABLE, WIDTH).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=antialias)
    patches = h + grid.permute(0, 2, 3, 1).reshape(1, -1, WIDTH)
    first = w["embeddings.cls_token"] + table[:, :1]
    if "registers" in kind:
        first = torch.cat([first, w["embeddings.register_tokens"]], dim=1)
    h = torch.cat([first.expand(len(x), -1, -1), patches], dim=1)

    def linear(h: Tensor, name: str) -> Tensor:
        return F.linear(h, w[name + ".weight"], w[name + ".bias"])

    def norm(h: Tensor, name: str) -> Tensor:
        return F.layer_norm(h, (WIDTH,), w[name + ".weight"], w[name + ".bias"], 1e-6)

    for number in range(2):
        at = f"encoder.layer.{number}."
        n = norm(h, at + "norm1")
        q, k, v = (
            linear(n, f"{at}attention.attention.{name}").unflatten(-1, (2, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        a = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        a = linear(a.transpose(1, 2).flatten(2), at + "attention.output.dense")
        h = h + a * w[at + "layer_scale1.lambda1"]
        m = linear(F.gelu(linear(norm(h, at + "norm2"), at + "mlp.fc1")), at + "mlp.fc2")
        h = h + m * w[at + "layer_scale2.lambda1"]
    return norm(h, "layernorm")[:, first.shape[1] :]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", ["repa", "model"])
@pytest.mark.parametrize("side", [TABLE, 2, 6])
def test_features_are_the_normalised_patch_tokens(
    folders: dict[str, Path], kind: str, positions: str, side: int
) -> None:
    x = images(2, 32)
    teacher = Teacher(folders[kind], side, positions=positions)
    antialias = positions == "repa" or "registers" in kind
    truth = plain_dinov2(folders[kind], reference_input(x, side * PATCH), kind, antialias)
    ours = teacher(x)
    assert ours.shape == (2, side * side, WIDTH) == (2, teacher.tokens, teacher.hidden_size)
    assert relative_rms(ours, truth) < 1e-5
    if side < TABLE:  # the two ways differ where the table shrinks
        other = plain_dinov2(folders[kind], reference_input(x, side * PATCH), kind, not antialias)
        assert relative_rms(ours, other) > 1e-3


def test_256_pixels_give_16_by_16_tokens_of_224_pixels(folders: dict[str, Path]) -> None:
    files = Dinov2Files.read(folders["dinov2"], TEACHER)
    assert [teacher_resolution(files, side) for side in (16, 32)] == [224, 448]
    for positions in ("repa", "model"):
        teacher = Teacher(folders["dinov2"], 16, positions=positions)
        assert teacher.resolution == 224
        assert teacher(images(1, 256)).shape == (1, 256, WIDTH)
    assert Teacher(folders["dinov2"], 4, resolution=60)(images(1, 16)).shape == (1, 16, WIDTH)


def test_it_is_frozen_and_its_tokens_enter_a_graph_as_constants(folders: dict[str, Path]) -> None:
    state = torch.get_rng_state()
    teacher = Teacher(folders["dinov2"], 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert not isinstance(teacher, torch.nn.Module)
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not any(module.training for module in teacher.model.modules())
    x = (images(2, 16).float() / 127.5 - 1).requires_grad_()
    features = teacher(x)
    assert not features.requires_grad and not features.is_inference()
    z = torch.ones_like(features, requires_grad=True)
    (z * features).sum().backward()
    assert torch.equal(z.grad, features)
    assert torch.equal(teacher(x), features)


def test_precision_and_autocast(folders: dict[str, Path]) -> None:
    x = images(2, 16)
    truth = Teacher(folders["dinov2"], 4)(x)
    teacher = Teacher(folders["dinov2"], 4, precision="bf16")
    half = teacher(x)
    assert half.dtype == torch.bfloat16
    assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16}
    assert relative_rms(half, truth.double()) < 3e-2
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Teacher(folders["dinov2"], 4)(x), truth)


def test_loading_is_silent_and_needs_no_torchvision(
    folders: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    Teacher(folders["dinov2"], 4)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")
    assert "torchvision" not in sys.modules


def altered(dataset: Path, folder: Path, **config: object) -> Path:
    shutil.copytree(dataset, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | config))
    return folder


def test_missing_and_foreign_files_say_what_to_download(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    tiny = folders["dinov2"]
    with pytest.raises(ValueError, match=r"teacher.path .*does not exist.*facebook/dinov2-base"):
        Teacher(tmp_path / "none", 4)
    with pytest.raises(ValueError, match=r"holds no config.json: .*facebook/dinov2-base"):
        Teacher(tmp_path, 4)
    bare = altered(tiny, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model.safetensors: .*facebook/dinov2-base"):
        Teacher(bare, 4)
    with pytest.raises(ValueError, match="model_type 'vit', expected dinov2 or"):
        Teacher(altered(tiny, tmp_path / "vit", model_type="vit"), 4)
    broken = altered(tiny, tmp_path / "broken")
    (broken / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="must be the config.json of a DINOv2"):
        Teacher(broken, 4)
    torn = altered(tiny, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="cannot load the teacher .*torn"):
        Teacher(torn, 4)


def test_weights_that_are_missing_are_not_made_up(folders: dict[str, Path], tmp_path: Path) -> None:
    """transformers would go on with random numbers."""
    weights = load_file(folders["dinov2"] / "model.safetensors")
    for key, refused in (("layernorm.weight", True), ("embeddings.mask_token", False)):
        folder = altered(folders["dinov2"], tmp_path / key)
        rest = {k: v for k, v in weights.items() if k != key}
        save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
        if refused:
            with pytest.raises(ValueError, match=f"lacks 1 of the teacher's weights.*{key}"):
                Teacher(folder, 4)
        else:
            Teacher(folder, 4)


def test_weights_that_are_not_finite_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    weights = load_file(folders["dinov2"] / "model.safetensors")
    weights["layernorm.weight"][:3] = torch.nan
    folder = altered(folders["dinov2"], tmp_path / "nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="nan: layernorm.weight has 3 values that are not finite"):
        Teacher(folder, 4)


def test_arguments_that_do_not_fit(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = folders["dinov2"]
    with pytest.raises(ValueError, match=r"224 gives 256 tokens .* has 16: set .*resolution=56"):
        Teacher(tiny, 4, resolution=224)
    with pytest.raises(ValueError, match="teacher's resolution 0 gives 0 tokens"):
        Teacher(tiny, 4, resolution=0)
    with pytest.raises(ValueError, match="precision must be one of"):
        Teacher(tiny, 4, precision="fp16")
    with pytest.raises(ValueError, match="positions must be one of"):
        Teacher(tiny, 4, positions="own")
    for bad in (images(1, 8)[:, :1], images(1, 8)[0], images(1, 8)[..., :4], images(1, 8).long()):
        with pytest.raises(ValueError, match=r"images must be \(B, 3, H, H\), uint8 or floating"):
            preprocess(bad, 28)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install \"mixflow_fast\[repa\]\""):
        Teacher(tiny, 4)
