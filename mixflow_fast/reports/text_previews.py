"""Pictures of a text-to-image run's EMA weights, from the same prompts and noise each time.

OUT/previews/step_N.png, and OUT/previews/settings.json, which says how they come about. Sampled as
the official pipeline samples: Euler on diffusers' noise levels, with guidance v_u + w (v_c - v_u)
away from the empty prompt.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixflow_fast.files import write_json
from mixflow_fast.models.autoencoders.decoding import Decoder, load_decoder
from mixflow_fast.models.text_to_image import Adapter, Condition
from mixflow_fast.reports.images import save_grid
from mixflow_fast.sampling import sigma_grid
from mixflow_fast.sampling.grids import SigmaGrid
from mixflow_fast.sampling.text_to_image import noise_of_ids, sample_latents

SEED = 0
SETTINGS = "settings.json"
_LATENT_RANGE = 3.0  # as other previews'
_SMALLEST = 64  # pixels a side, by enlargement
_SHOWN, _LETTERS = 8, 60  # prompts in a caption, and letters of each


@dataclass(frozen=True, kw_only=True)
class TextPreviewOptions:
    """How the pictures of a text-to-image run come about.

    Attributes:
        prompts: one a picture.
        rows: of the cache's prompts, one a picture.
        steps: Euler steps.
        cfg_scale: guidance away from the empty prompt; 1 is none.
        shift: of the grid, as the pipeline's scheduler has it.
        grid: "diffusers" or "linear", see `sigma_grid`.
        batch_size: pictures in one forward pass, at most.
        latent: (C, h, w) of one picture.
        decoder: folder of the autoencoder; None shows channels of the latents.
    """

    prompts: tuple[str, ...]
    rows: tuple[int, ...]
    steps: int
    cfg_scale: float
    shift: float
    grid: SigmaGrid
    batch_size: int
    latent: tuple[int, int, int]
    decoder: str | None = None

    def load_decoder(self) -> Decoder | None:
        """What makes pictures of the latents; None where there is none.

        Raises:
            ValueError: it cannot be read.
        """
        if self.decoder is None:
            return None
        # The pipelines' own rule of rounding.
        return load_decoder(self.decoder, quantisation="round_even", name="train.preview_decoder")

    def caption(self) -> str:
        """How the pictures came about, in sentences."""
        guidance = "no guidance" if self.cfg_scale == 1 else f"guidance {self.cfg_scale:g}"
        words = (
            f"{self.steps} Euler steps on the {self.grid} grid of shift {self.shift:.4g}, "
            f"{guidance}, from EMA weights, the same prompts and noise each time"
        )
        if self.decoder is not None:
            words += f", decoded by {self.decoder}"
        else:
            channels = self.latent[0]
            words += (
                f". These are latents, not pictures: the first {min(3, channels)} of {channels} "
                f"channels, values from -{_LATENT_RANGE:g} to {_LATENT_RANGE:g}, without the "
                "decoder"
            )
        shown = [_cut(prompt) for prompt in self.prompts[:_SHOWN]]
        more = f" and {len(self.prompts) - _SHOWN} more" * (len(self.prompts) > _SHOWN)
        return f"{words}. Prompts: {'; '.join(shown)}{more}"


def _cut(prompt: str) -> str:
    text = " ".join(prompt.split())
    return repr(text if len(text) <= _LETTERS else text[: _LETTERS - 3] + "...")


def write_settings(options: TextPreviewOptions, folder: Path) -> None:
    """Write how the pictures in a folder come about.

    Raises:
        OSError: it could not be written.
    """
    write_json(folder / SETTINGS, asdict(options))


def read_settings(folder: Path) -> TextPreviewOptions | None:
    """What `write_settings` wrote; None where nothing, or nothing readable, is there."""
    try:
        record = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        record |= {name: tuple(record[name]) for name in ("prompts", "rows", "latent")}
        return TextPreviewOptions(**record)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def preview_latents(
    adapter: Adapter, options: TextPreviewOptions, cond: Condition, negative: Condition
) -> Tensor:
    """Latents of all pictures, bit for bit those of the official pipeline in float32.

    The noise of picture i is that of the sample i of the seed 0.

    Args:
        adapter: of the network.
        options: how they come about.
        cond: the prompts, one a picture.
        negative: the empty prompt, (1, ...) of each.

    Returns:
        (pictures, C, h, w) float32 x1, on the device of `cond`.
    """
    device = next(iter(cond.values())).device
    sigmas = sigma_grid(options.steps, options.shift, options.grid)
    guided = options.cfg_scale != 1
    made = []
    for start in range(0, len(options.prompts), options.batch_size):
        ids = torch.arange(start, min(start + options.batch_size, len(options.prompts)))
        noise = noise_of_ids(SEED, ids.to(device), options.latent)
        rows = {name: value[ids.to(device)] for name, value in cond.items()}
        away = {name: v.expand(len(ids), *v.shape[1:]) for name, v in negative.items()}
        made.append(
            sample_latents(
                adapter, noise, rows, sigmas, options.cfg_scale, away if guided else None
            )
        )
    return torch.cat(made)


def write_text_preview(
    adapter: Adapter,
    options: TextPreviewOptions,
    cond: Condition,
    negative: Condition,
    path: Path,
    decoder: Decoder | None = None,
) -> None:
    """Sample and write one preview, whole or not at all.

    Args:
        adapter: of the network with the weights to show.
        options: how the pictures come about.
        cond: the prompts, one a picture.
        negative: the empty prompt, (1, ...) of each.
        path: the PNG; its folder is made.
        decoder: `options.load_decoder()`, on the device where it is to work.

    Raises:
        ValueError: the samples are not finite, or not what the decoder takes.
        OSError: the file could not be written.
    """
    x = preview_latents(adapter, options, cond, negative)
    # Decoders take x1 and know the map to the autoencoder's latents.
    x = x[:, :3] / _LATENT_RANGE if decoder is None else decoder(x)
    columns = min(8, math.isqrt(len(x) - 1) + 1)
    save_grid(path, x, columns=columns, scale=max(1, _SMALLEST // x.shape[-1]))
