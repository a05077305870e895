"""What users hand over in place of a checkpoint: its name in the field, and the next step.

By content, in three stages: files that cannot be read as weights (`unreadable`), entries that are
no state dict (`entries_that_are`), state dicts of networks that this engine does not have
(`network_that_is`). Folders are in `places.py`; what is read by renaming is in `state_dicts.py`.
"""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path

from mixflow_fast.messages import shorten
from mixflow_fast.models.weights.diffusers_dit import is_diffusers_dit

_TRAIN = (
    "give the checkpoint of a SiT, REPA SiT, DiT-DH or unconditional SongUNet, or the folder of a "
    "text-to-image pipeline of diffusers"
)
_AUTOENCODER = f"an autoencoder (VAE), which makes latents of images and not samples: {_TRAIN}"
_UNET = f"a UNet, which this engine does not train: {_TRAIN}"
_TEXT_TO_IMAGE = f"a text-to-image transformer, which this engine does not train: {_TRAIN}"
_TRAINED_FROM_FOLDER = (
    "a text-to-image transformer: it is trained from its folder of diffusers, with "
    "model.folder=FOLDER, and mixflow-fast inspect says which it is"
)
_VIT = (
    "an image encoder (ViT, such as DINOv2): REPA's teacher is the folder of one in transformers' "
    "layout (teacher.path=FOLDER)"
)
_ADAPTER = (
    "an adapter (LoRA), which is the difference to a network and not one: merge it into its "
    "network with the program that trained it, and give what that writes"
)
_OPTIMIZER = f"an optimizer's state, without a network's weights: {_TRAIN} itself"
ZERO_SHARD = (
    "a part of what DeepSpeed saved under ZeRO, without whole weights: run the zero_to_fp32.py "
    "that lies beside the folder global_stepN (python zero_to_fp32.py . OUT) and give OUT"
)
_SNAPSHOT = (
    "an EMA snapshot of a run of this engine, from which an average is made: mixflow-fast ema RUN "
    "--sigma-rel S --out FILE.pt"
)
_DIFFUSERS_DIT = (
    "a DiT in diffusers' layout (DiTTransformer2DModel); only a folder that mixflow-fast export "
    "wrote, with mixflow.json in it, is read back: give the checkpoint in its own code's layout"
)
# Beginnings of parts of tensors' names, all of which a state dict has, and what it then is. The
# first row that matches counts: a Stable Diffusion checkpoint holds a UNet and an autoencoder.
_NETWORKS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("lora_",), _ADAPTER),
    (("lokr_",), _ADAPTER),
    (("hada_w1",), _ADAPTER),
    (("diffusion_model.input_blocks.",), f"Stable Diffusion, with {_UNET}"),
    (("down_blocks.", "up_blocks.", "time_embedding."), _UNET),
    (("input_blocks.", "output_blocks.", "time_embed."), _UNET),
    (("enc.", "dec.", "map_layer0."), f"EDM's network, {_UNET}"),
    (("double_blocks.", "single_blocks."), f"FLUX, {_TRAINED_FROM_FOLDER}"),
    (("single_transformer_blocks.",), f"FLUX, {_TRAINED_FROM_FOLDER}"),
    (("joint_blocks.",), f"Stable Diffusion 3, {_TRAINED_FROM_FOLDER}"),
    (("transformer_blocks.", "context_embedder."), f"Stable Diffusion 3, {_TRAINED_FROM_FOLDER}"),
    (("transformer_blocks.", "caption_projection."), f"PixArt, {_TEXT_TO_IMAGE}"),
    (("decoder_embed.", "decoder_pred."), f"RAE's decoder, half of {_AUTOENCODER}"),
    (("encoder.", "decoder.", "conv_in."), _AUTOENCODER),
    (("decoder.conv_in.", "decoder.conv_out."), f"half of {_AUTOENCODER}"),
    (("feat_rope.", "mlp.w12."), f"LightningDiT, which this engine does not train: {_TRAIN}"),
    (("patch_embeddings.", "encoder.layer.0."), _VIT),
    (("patch_embed.proj.", "cls_token", "blocks.0.attn."), _VIT),
)
# First bytes of files that are no weights; some are archives of them.
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "it is a Git LFS pointer, not the file itself: run `git lfs pull`",
    ),
    (b"<", "it is a web page, not weights: the download was answered with HTML, repeat it"),
    (b"\x1f\x8b", "it is compressed with gzip: unpack it (gunzip, or tar xzf for a .tar.gz)"),
    (b"BZh", "it is compressed with bzip2: unpack it (bunzip2, or tar xjf for a .tar.bz2)"),
    (b"\xfd7zXZ", "it is compressed with xz: unpack it (unxz, or tar xJf for a .tar.xz)"),
    (b"\x28\xb5\x2f\xfd", "it is compressed with zstd: unpack it with unzstd"),
    (b"7z\xbc\xaf", "it is a 7z archive: unpack it, and give the weights file in it"),
    (b"\x93NUMPY", "it is a numpy array (.npy), not weights; latents are given as data.path"),
    (
        b"\x89HDF",
        "it is an HDF5 file (.h5), which Keras writes: this engine reads PyTorch's weights",
    ),
    (
        b"GGUF",
        "it is a GGUF file, whose weights are quantised: give the PyTorch or safetensors file",
    ),
    (b"\x89PNG", "it is a picture, not weights"),
    (b"\xff\xd8\xff", "it is a picture, not weights"),
)
_WEIGHTS_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".pkl")


def network_that_is(names: Collection[str]) -> str | None:
    """What network a state dict is of, by its names, and the next step; None if unknown."""
    if names and all(re.match(r"(\d+|frozen)/", name) for name in names):
        return _SNAPSHOT
    if is_diffusers_dit(names):
        return _DIFFUSERS_DIT
    text = "\n".join(f".{name}" for name in names)
    for marks, what in _NETWORKS:
        if all(f".{mark}" in text for mark in marks):
            return what
    return None


def describe_unknown(path: Path, names: Collection[str]) -> str:
    """An error on a state dict of a network that this engine does not have."""
    what = network_that_is(names)
    if what is not None:
        return f"{path} is {what}"
    return (
        f"{path} holds {len(names)} tensors of no network that this engine knows "
        f"({shorten(names, 3)}): {_TRAIN}, or load it into one with load_into"
    )


def entries_that_are(entries: Mapping[object, object]) -> str | None:
    """What the entries of a file are where they hold no state dict of tensors; None if unknown."""
    if {"state", "param_groups"} <= entries.keys():
        return _OPTIMIZER
    if "optimizer_state_dict" in entries and "ds_version" in entries:
        return ZERO_SHARD
    return None


def unreadable(path: Path, error: Exception) -> str:
    """One line: what kind of file this is instead, or the reader's own words; what to do."""
    with open(path, "rb") as file:
        head = file.read(512)
    if not head.strip():
        return "the file is empty: download it again"
    if path.name.endswith(("_optim_states.pt", "_model_states.pt")):
        return f"it is {ZERO_SHARD}"
    for magic, what in _MAGIC:
        if head.lstrip().startswith(magic):
            return what
    return _archive(path) or _text(head) or _readers_words(str(error).strip(), error)


def _archive(path: Path) -> str | None:
    """A .zip, .npz or .tar, of which torch.save's own files are one kind."""
    try:
        # A tar with a .pt at its end ends as a zip does.
        if tarfile.is_tarfile(path):
            with tarfile.open(path) as archive:
                names, kind, unpack = archive.getnames(), "tar", "tar xf"
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names, kind, unpack = archive.namelist(), "zip", "unzip"
        else:
            return None
    except (zipfile.BadZipFile, tarfile.TarError, OSError, EOFError):
        return None
    if any(name.endswith("/constants.pkl") for name in names):
        return (
            "it is a TorchScript program, not weights: save its state dict where it was made: "
            "torch.save(module.state_dict(), PATH)"
        )
    if any(name.endswith("data.pkl") for name in names):
        return None
    if names and all(name.endswith(".npy") for name in names):
        arrays = shorten(name.removesuffix(".npy") for name in names)
        return (
            f"it is a numpy archive (.npz) of {arrays}, such as samples or latents, not weights; "
            "latents are given as data.path"
        )
    inside = [name for name in names if name.endswith(_WEIGHTS_SUFFIXES)]
    held = f"that holds {shorten(inside or names)}" if names else "with nothing in it"
    return f"it is a {kind} archive {held}: unpack it ({unpack}), and give the weights file in it"


def _text(head: bytes) -> str | None:
    text = all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head)
    kind = "JSON" if head.lstrip().startswith(b"{") else "text"
    return f"it is a {kind} file, not weights: give the file that it belongs to" if text else None


def unsafe_name(text: str) -> str | None:
    """What `torch.load(weights_only=True)` refused by name, from its error; None if nothing."""
    for mark in ("Unsupported global: GLOBAL ", "unsupported GLOBAL "):
        if mark in text:
            return text.split(mark, 1)[1].split()[0]
    return None


def _readers_words(text: str, error: Exception) -> str:
    if name := unsafe_name(text):
        return (
            f"it holds {name}, which is not safe to load: an unknown file with such content "
            "can run programs. If it is your own, re-save its weights alone where they were "
            'made: torch.save({"ema": ema.state_dict()}, PATH)'
        )
    first = (text.splitlines() or [""])[0][:200]
    return (
        f"{type(error).__name__}: {first}: the file is damaged, not a weights file, or holds "
        "classes that are not safe to load; download it again, or re-save its state dict alone "
        "with torch.save"
    )
