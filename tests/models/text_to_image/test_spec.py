"""A network of diffusers without its weights: from a folder, in a record, and filled again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixflow_fast.models.text_to_image import LatentMap
from mixflow_fast.models.text_to_image.spec import TransformerSpec, with_storage
from tests.support.captioned import model_folder
from tests.support.text_to_image import FAMILIES, SD3, numbers, sd3, text

TIMES = torch.tensor([0.3, 0.81])
FILE = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def filled(folder: Path) -> torch.nn.Module:
    spec = TransformerSpec.read(folder)
    net = spec.without_weights()
    net.load_state_dict({n: torch.full(t.shape, 7.0) for n, t in net.state_dict().items()},
                        assign=True)  # fmt: skip
    spec.fill(net, folder)
    return net


def test_a_folder_says_the_network_and_fills_it(folder: Path) -> None:
    spec = TransformerSpec.read(folder)
    assert spec.class_name == "SD3Transformer2DModel" and spec.latents == LatentMap(0.0609, 1.5305)
    assert all(tensor.is_meta for tensor in spec.on_meta().state_dict().values())
    net, own = filled(folder), sd3()
    assert net.adapter.latents == LatentMap(0.0609, 1.5305)
    state = own.state_dict()
    assert "pos_embed.pos_embed" in state and "pos_embed.pos_embed" not in dict(
        own.named_parameters()
    )
    for name, tensor in net.transformer.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    x, cond = numbers(2, 16, 8, 6), text(2)
    expected = own(x, cond["prompt_embeds"], cond["pooled_prompt_embeds"], 1000 * TIMES).sample
    assert torch.equal(net(x, TIMES, cond), expected)


@pytest.mark.parametrize("family", ["sd3.5 large", "flux with guidance", "z-image"])
@pytest.mark.filterwarnings("ignore:.*seems to be distilled")
def test_every_family_goes_through_a_record(family: str, tmp_path: Path) -> None:
    own = FAMILIES[family].build()
    own.save_pretrained(tmp_path)
    spec = TransformerSpec.read(tmp_path)
    again = TransformerSpec.from_config(json.loads(json.dumps(spec.to_config())))
    assert again.to_config() == spec.to_config()
    net = again.without_weights()
    net.load_state_dict({f"transformer.{n}": t for n, t in own.state_dict().items()}, assign=True)
    cond, x = FAMILIES[family].cond(2), numbers(2, 16, 8, 6)
    theirs = FAMILIES[family].adapter(own)
    assert torch.equal(net(x, TIMES, cond), theirs.velocity(x, TIMES, cond))


def test_a_buffer_that_no_file_holds_is_computed(folder: Path, tmp_path: Path) -> None:
    """Of a table of positions that the state dict leaves out, and of one that a file lacks."""
    model_folder(tmp_path)
    state = load_file(tmp_path / FILE)
    table = state.pop("pos_embed.pos_embed")
    save_file(state, tmp_path / FILE)
    assert torch.equal(filled(tmp_path).transformer.pos_embed.pos_embed, table)

    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    # Without a largest size the class keeps its table out of the state dict.
    config |= {"pos_embed_max_size": None}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    net = TransformerSpec.read(tmp_path).without_weights()
    assert "transformer.pos_embed.pos_embed" not in net.state_dict()
    assert not net.transformer.pos_embed.pos_embed.is_meta
    assert next(net.parameters()).is_meta


def test_shards_with_an_index(folder: Path, tmp_path: Path) -> None:
    sd3().save_pretrained(tmp_path / "transformer", max_shard_size="200KB")
    assert (tmp_path / f"{FILE}.index.json").is_file()
    state = sd3().state_dict()
    found = filled(tmp_path).transformer.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_weights_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    model_folder(tmp_path)
    state = load_file(tmp_path / FILE)
    name = "transformer_blocks.1.attn.to_q.weight"
    for change, words in (
        ({name: state[name][:3]}, f"{name} is \\(3, 32\\), expected \\(32, 32\\)"),
        ({"more": state[name].clone()}, "more is \\(32, 32\\), expected no such tensor"),
        ({name: state[name] * torch.nan}, f"{name} holds numbers that are not finite"),
    ):
        save_file(state | change, tmp_path / FILE)
        with pytest.raises(ValueError, match=words):
            filled(tmp_path)
    save_file({k: v for k, v in state.items() if k != name}, tmp_path / FILE)
    with pytest.raises(ValueError, match=f"lacks 1 tensors of SD3Transformer2DModel: {name}"):
        filled(tmp_path)
    (tmp_path / FILE).write_bytes(b"not weights")
    with pytest.raises(ValueError, match="cannot be read"):
        filled(tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.raises(ValueError, match="holds no diffusion_pytorch_model.safetensors"):
        filled(tmp_path)


def test_a_record_that_is_none() -> None:
    with pytest.raises(ValueError, match="must hold class and transformer, got input_size"):
        TransformerSpec.from_config({"input_size": 32})
    with pytest.raises(ValueError, match="cannot be built from its configuration"):
        TransformerSpec(class_name="SD3Transformer2DModel", config={"num_layers": "many"}).on_meta()
    with pytest.raises(ValueError, match="which diffusers .* does not have"):
        TransformerSpec(class_name="SD9Transformer2DModel", config={}).on_meta()


def test_integers_of_a_network_stay_integers() -> None:
    network = TransformerSpec(class_name="SD3Transformer2DModel", config=SD3).without_weights()
    places = torch.zeros(2, dtype=torch.int64, device="meta")
    network.transformer.register_buffer("places", places)
    made = with_storage(network).transformer
    assert made.places.dtype == torch.int64 and not made.places.is_meta
    assert {p.dtype for p in made.parameters()} == {torch.float32}
