"""RAE's decoder against images that the official code computed, also with a table of its own."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixflow_fast.models.autoencoders.rae import RAEEncoder
from mixflow_fast.models.autoencoders.rae_decoder import RAEDecoder
from tests.support.golden import load
from tests.support.kernels import relative_rms
from tests.support.rae import save_decoder, save_encoder, save_statistics

GOLDEN = {"rae_stage1_4x4": 4, "rae_stage1_8x8": 8}
ROUNDING = 1e-6


@pytest.fixture(scope="module", params=GOLDEN)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Tensor], Path, int]:
    folder = tmp_path_factory.mktemp("rae")
    for save in (save_encoder, save_statistics, save_decoder):
        save(folder, request.param)
    return load(request.param)[0], folder, GOLDEN[request.param]


def decoder_in(folder: Path, **options: object) -> RAEDecoder:
    given = {"stats": folder / "stat.pt"} | options
    return RAEDecoder(folder / "model.pt", folder / "decoder.json", **given)


def test_it_decodes_as_the_official_code(case: tuple[dict[str, Tensor], Path, int]) -> None:
    golden, folder, side = case
    decoder = decoder_in(folder)
    assert decoder.shape == (32, side, side)
    assert relative_rms(decoder.patches(golden["latent"]), golden["logits"].double()) < ROUNDING
    decoded = decoder.decode(golden["latent"])
    assert relative_rms(decoded, golden["decoded"].double()) < ROUNDING
    pixels = decoder(golden["latent"])
    assert torch.equal(pixels, decoded.clamp(0, 1)) and not torch.equal(pixels, decoded)


def test_encoded_and_decoded(case: tuple[dict[str, Tensor], Path, int]) -> None:
    golden, folder, side = case
    z = RAEEncoder(folder, side, stats=folder / "stat.pt").encode(golden["x"])
    ours = decoder_in(folder).decode(z)
    assert relative_rms(ours, golden["reconstruction"].double()) < ROUNDING


def test_the_table_is_the_files(case: tuple[dict[str, Tensor], Path, int]) -> None:
    """diffusers makes its own and ignores the file's; that one fails here."""
    golden, folder, side = case
    state = torch.load(folder / "model.pt", weights_only=True)
    torch.save(state | {"decoder_pos_embed": golden["other_table"]}, folder / "other.pt")
    decoder = RAEDecoder(folder / "other.pt", folder / "decoder.json", stats=folder / "stat.pt")
    truth = golden["decoded_other_table"].double()
    assert relative_rms(decoder.decode(golden["latent"]), truth) < ROUNDING
    own = type(decoder.model)(
        hidden_size=32,
        decoder_hidden_size=48,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=96,
        num_patches=side * side,
        patch_size=8,
        image_size=8 * side,
    ).decoder_pos_embed
    decoder.model.decoder_pos_embed.copy_(own)
    with_own = decoder.decode(golden["latent"])
    assert relative_rms(with_own, truth) > 1e-2
    # Nor is it the official table of this size: diffusers scales the grid to 16 x 16.
    assert relative_rms(with_own, golden["decoded"].double()) > 1e-2


def test_without_statistics_latents_are_taken_as_they_are(
    case: tuple[dict[str, Tensor], Path, int],
) -> None:
    golden, folder, _ = case
    z = golden["latent"].double() * (golden["stat.var"].double() + 1e-5).sqrt()
    z = (z + golden["stat.mean"].double()).float()
    ours = decoder_in(folder, stats=None).decode(z)
    assert relative_rms(ours, golden["decoded"].double()) < 1e-5


def test_files_and_latents_that_do_not_fit(tmp_path: Path) -> None:
    for save in (save_statistics, save_decoder):
        save(tmp_path, "rae_stage1_4x4")
    with pytest.raises(ValueError, match=r"latents must be \(B, \*\(32, 4, 4\)\), got \(1, 4, 4"):
        decoder_in(tmp_path)(torch.zeros(1, 4, 4, 4))
    state = torch.load(tmp_path / "model.pt", weights_only=True)

    def refused(match: str, **changes: Tensor | None) -> None:
        content = {k: v for k, v in (state | changes).items() if v is not None}
        torch.save(content, tmp_path / "changed.pt")
        with pytest.raises(ValueError, match=match):
            RAEDecoder(tmp_path / "changed.pt", tmp_path / "decoder.json")

    refused("holds no decoder_pos_embed: give the file", decoder_pos_embed=None)
    refused("does not fit RAE's decoder.*decoder_norm.bias", **{"decoder_norm.bias": None})
    nan = torch.full_like(state["decoder_norm.bias"], torch.nan)
    refused("decoder_norm.bias has 48 values that are not", **{"decoder_norm.bias": nan})
    (tmp_path / "decoder.json").write_text(json.dumps({"hidden_act": "gelu"}))
    with pytest.raises(ValueError, match=r"must be the config.json of RAE's decoder"):
        decoder_in(tmp_path)
