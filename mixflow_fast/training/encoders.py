"""The frozen encoder of a run that makes its latents of images, during training.

It stands outside of the network: in no checkpoint, not in DeepSpeed, without an optimizer.
"""

from __future__ import annotations

from mixflow_fast.config.data_sections import EncoderConfig
from mixflow_fast.config.schema import ModelConfig
from mixflow_fast.models.autoencoders import Encoder
from mixflow_fast.models.autoencoders.rae import PIXELS_PER_TOKEN, RAEEncoder, rae_files
from mixflow_fast.models.autoencoders.sdvae import SDVAE, SDVAEFiles


def image_size(section: EncoderConfig, model: ModelConfig) -> int:
    """Side in pixels of the images that the data have to give.

    Args:
        section: the encoder; without one the network trains on the images themselves.
        model: the network.

    Raises:
        ValueError: as `check_encoder`.
    """
    if section.kind == "none":
        return model.input_size
    if section.kind == "rae":
        return PIXELS_PER_TOKEN * model.input_size
    return SDVAEFiles.read(section.path).downsampling * model.input_size


def check_encoder(section: EncoderConfig, model: ModelConfig) -> None:
    """What the encoder's config.json can tell; reads no weights.

    Raises:
        ValueError: files that are missing or foreign, latents that do not fit the model.
    """
    if section.kind == "none":
        return
    if section.kind == "rae":
        channels = rae_files(section.path).hidden_size
    else:
        channels = SDVAEFiles.read(section.path).latent_channels
    side = model.input_size
    made, taken = (channels, side, side), (model.in_channels, side, side)
    if made != taken:
        raise ValueError(
            f"encoder.kind={section.kind} ({section.path}) makes latents of {made}, the model "
            f"takes {taken}: set model.in_channels={made[0]}, or give another encoder"
        )


def build_encoder(section: EncoderConfig, model: ModelConfig) -> Encoder | None:
    """The encoder of a configuration, on the CPU; None where it has none.

    Args:
        section: the section `encoder` of the configuration.
        model: whose input its latents must be.

    Raises:
        ValueError: as `check_encoder`; weights or statistics that are missing, damaged or others.
    """
    if section.kind == "none":
        return None
    check_encoder(section, model)
    if section.kind == "rae":
        side, precision = model.input_size, section.precision
        return RAEEncoder(section.path, side, stats=section.stats, precision=precision)
    return SDVAE(section.path, image_size(section, model), precision=section.precision)


def describe_encoder(section: EncoderConfig, encoder: Encoder | None) -> str:
    """What makes the latents, and what it takes on the device; "" without an encoder.

    Args:
        section: the section `encoder` of the configuration.
        encoder: as `build_encoder` made it.
    """
    if encoder is None:
        return ""
    parameters = list(encoder.model.parameters())
    size = sum(p.numel() * p.element_size() for p in parameters)
    normalised = f", normalised by {section.stats}" if section.stats is not None else ""
    return (
        f"{section.kind} {section.path}, {sum(p.numel() for p in parameters):,} parameters, "
        f"{size / 2**20:,.1f} MiB per rank in {section.precision}; latents "
        f"{' x '.join(map(str, encoder.shape))}{normalised}"
    )
