"""Which adapter a network gets, what is refused and warned of, and a user's own class."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel, PixArtTransformer2DModel
from torch import nn

from mixflow_fast.models.text_to_image import (
    Adapter,
    FluxAdapter,
    LatentMap,
    SD3Adapter,
    ZImageAdapter,
    adapter_class,
    adapter_for,
    check_adapter,
    check_against_pipeline,
    load_adapter,
)
from mixflow_fast.models.text_to_image.loading import ADAPTERS
from tests.support.text_to_image import FAMILIES, numbers, sd3, text, vae

OWN = """
import torch
from mixflow_fast.models.text_to_image import LatentMap


class Mine:
    def __init__(self, network):
        self.network = network
        self.latents = LatentMap(0.0609, 1.5305)
        self.encode, self.decode = self.latents.encode, self.latents.decode

    @property
    def checkpointable(self):
        return (type(self.network.transformer_blocks[0]),)

    def velocity(self, x, t, cond):
        return SIGN self.network(
            hidden_states=x,
            timestep=SCALE * t,
            encoder_hidden_states=cond["prompt_embeds"],
            pooled_projections=cond["pooled_prompt_embeds"],
        ).sample

    def empty(self, cond):
        return {key: torch.zeros_like(value) for key, value in cond.items()}


class Half:
    network = torch.nn.Linear(1, 1)
"""


def own_file(folder: Path, sign: str = "", scale: str = "1000") -> Path:
    file = folder / "mine.py"
    file.write_text(OWN.replace("SIGN", sign).replace("SCALE", scale), encoding="utf-8")
    return file


def test_each_class_has_its_adapter() -> None:
    expected = {"sd3.5 medium": SD3Adapter, "sd3.5 large": SD3Adapter, "z-image": ZImageAdapter}
    for name, adapter in expected.items():
        network = FAMILIES[name].build()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made = adapter_for(network)
        assert type(made) is adapter and made.network is network
        assert check_adapter(made) is made and isinstance(made, Adapter)
    with pytest.warns(UserWarning, match="distilled"):
        assert type(adapter_for(FAMILIES["flux"].build())) is FluxAdapter
    assert {"SD3Transformer2DModel", "FluxTransformer2DModel"} < set(ADAPTERS)


@pytest.mark.parametrize(
    ("family", "name", "why"),
    [
        ("sd3.5 large", "stable-diffusion-3.5-large-turbo", "turbo in its name"),
        ("z-image", "Z-Image-Turbo", "turbo in its name"),
        ("flux", "FLUX.1-schnell", "schnell in its name"),
        ("flux", "", "guidance_embeds=False, as FLUX.1-schnell has"),
        ("flux with guidance", "my-flux", "guidance_embeds=True, as FLUX.1-dev has"),
    ],
)
def test_distilled_models_warn(family: str, name: str, why: str) -> None:
    with pytest.warns(UserWarning, match="seems to be distilled") as found:
        adapter_for(FAMILIES[family].build(), name=name)
    assert len(found) == 1 and why in str(found[0].message)
    assert found[0].filename == __file__


def pixart() -> nn.Module:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=16,
    )


def test_networks_that_predict_noise_are_refused() -> None:
    with pytest.raises(ValueError, match="PixArtTransformer2DModel predicts noise"):
        adapter_for(pixart())


def test_a_class_without_adapter_says_how_to_bring_one() -> None:
    network = AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
    )
    with pytest.raises(ValueError, match="no adapter for AuraFlow.*my_file.py:MyAdapter"):
        adapter_for(network)


def test_own_class_passes_or_fails_the_same_check(tmp_path: Path) -> None:
    network, cond = sd3(), text(2)
    steps = FAMILIES["sd3.5 medium"].record(network, numbers(2, 16, 8, 6), cond, 3)
    mine = check_adapter(adapter_class(f"{own_file(tmp_path)}:Mine")(network))
    assert check_against_pipeline(mine, steps, cond, tolerance=0.0) == 0.0
    for sign, scale, message in (("-", "1000", "other sign"), ("", "1", "scale of the time")):
        wrong = adapter_class(f"{own_file(tmp_path, sign, scale)}:Mine")(network)
        with pytest.raises(ValueError, match=message):
            check_against_pipeline(wrong, steps, cond)


def test_what_is_no_class_of_a_file(tmp_path: Path) -> None:
    file = own_file(tmp_path)
    with pytest.raises(ValueError, match="must be 'file.py:Class'"):
        adapter_class("mine.Mine")
    with pytest.raises(ValueError, match="does not exist"):
        adapter_class(f"{tmp_path / 'none.py'}:Mine")
    with pytest.raises(ValueError, match="no class 'Mien'; did you mean 'Mine'"):
        adapter_class(f"{file}:Mien")
    (tmp_path / "broken.py").write_text("1 / 0\n", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be run: ZeroDivisionError"):
        adapter_class(f"{tmp_path / 'broken.py'}:Mine")
    with pytest.raises(
        ValueError, match="missing: velocity, encode, decode, empty, checkpointable"
    ):
        check_adapter(adapter_class(f"{file}:Half")())
    adapter = adapter_class(f"{file}:Mine")(sd3())
    adapter.network = sd3
    with pytest.raises(ValueError, match="network must be a torch.nn.Module"):
        check_adapter(adapter)
    # Blocks that are not in the network would leave all of it without checkpointing.
    adapter = adapter_for(sd3())
    adapter._checkpointable = (nn.Conv3d,)
    with pytest.raises(ValueError, match="checkpointable must be"):
        check_adapter(adapter)


def saved(folder: Path) -> nn.Module:
    network = sd3()
    network.save_pretrained(folder / "transformer")
    (folder / "vae").mkdir()
    config = dict(vae().config) | {"scaling_factor": 2.0}
    (folder / "vae" / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
    return network


def test_load_adapter(tmp_path: Path) -> None:
    """Of a pipeline's folder, of the transformer's alone, and with a class of one's own."""
    network = saved(tmp_path / "model")
    adapter = load_adapter(tmp_path / "model", empty_prompt=text(1, seed=40))
    assert adapter.empty(text(3))["prompt_embeds"].shape[0] == 3
    assert type(adapter) is SD3Adapter and adapter.latents == LatentMap(0.0609, 2.0)
    state = adapter.network.state_dict()
    assert all(torch.equal(state[k], v) for k, v in network.state_dict().items())
    alone = load_adapter(tmp_path / "model" / "transformer", dtype=torch.bfloat16)
    assert alone.latents == SD3Adapter.LATENTS and alone.network.dtype == torch.bfloat16
    mine = load_adapter(tmp_path / "model", f"{own_file(tmp_path)}:Mine")
    assert type(mine).__name__ == "Mine" and type(mine.network) is type(network)
    (tmp_path / "model").rename(tmp_path / "my-turbo")
    with pytest.warns(UserWarning, match="turbo in its name") as found:
        load_adapter(tmp_path / "my-turbo")
    assert found[0].filename == __file__


def test_load_adapter_refuses_before_it_reads_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_adapter(tmp_path / "none")
    with pytest.raises(
        ValueError, match=r"holds neither model_index\.json nor config\.json; give a p"
    ):
        load_adapter(tmp_path)
    index, unet = tmp_path / "model_index.json", ["diffusers", "UNet2DConditionModel"]
    index.write_text(json.dumps({"_class_name": "StableDiffusionPipeline", "unet": unet}))
    words = "is a StableDiffusionPipeline, whose unet UNet2DConditionModel predicts noise"
    with pytest.raises(ValueError, match=words):
        load_adapter(tmp_path)
    index.write_text(json.dumps({"_class_name": "FluxPipeline", "transformer": ["diffusers", "F"]}))
    with pytest.raises(ValueError, match="is a FluxPipeline without transformer/: download the re"):
        load_adapter(tmp_path)
    index.unlink()
    config = tmp_path / "config.json"
    config.write_text('{"_class_name": "PixArtTransformer2DModel"}', encoding="utf-8")
    with pytest.raises(ValueError, match="predicts noise"):
        load_adapter(tmp_path)
    config.write_text('{"_class_name": "Flux9Transformer2DModel"}', encoding="utf-8")
    with pytest.raises(ValueError, match="did you mean 'FluxTransformer2DModel'"):
        load_adapter(tmp_path)
    with pytest.raises(ValueError, match="empty_prompt has no meaning"):
        load_adapter(tmp_path, f"{own_file(tmp_path)}:Mine", empty_prompt=text(1))
    with pytest.raises(ValueError, match="install a newer one"):
        load_adapter(tmp_path, f"{own_file(tmp_path)}:Mine")
    config.write_text('{"_class_name": "SD3Transformer2DModel"}', encoding="utf-8")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r'pip install "mixflow_fast\[text\]"'):
        load_adapter(tmp_path)
