"""`mixflow-fast sample --prompts`: pictures of prompts, from a run or from a pipeline's folder.

    OUT/00000.png, ...       by number of the prompt; OUT/00000_0.png, ... with several of each
    OUT/settings.json        prompts, and all that the pictures depend on

or, with --layout geneval, OUT/00000/samples/00000.png and OUT/00000/metadata.jsonl. Text encoders
are read one at a time and freed before the network is read.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mixflow_fast.files import existing_folder, user_path, write_json, write_text

if TYPE_CHECKING:
    import torch

    from mixflow_fast.models.autoencoders.decoding import Decoder
    from mixflow_fast.models.text_to_image import Adapter, Condition
    from mixflow_fast.models.text_to_image.prompts import PromptEncoder

# Repeated from the sampling package, whose import takes seconds that --help should not; tested.
GRIDS = ("diffusers", "linear")
LAYOUTS = ("flat", "geneval")
STEPS, CFG_SCALE, BATCH_SIZE = 28, 4.5, 4
_PROMPT_KEYS = ("prompt", "text", "caption")
_ENCODED_AT_ONCE = 16
_SETTINGS = "settings.json"
# Options of networks with classes, which say nothing here.
_OF_CLASSES = (
    *("label", "preset", "method", "grid_start", "grid_end", "last_size", "rtol", "atol"),
    *("sde_form", "sde_norm", "sde_last", "path", "cfg_channels", "cfg_interval", "guide"),
    *("remedy", "source_w", "decoder_stats", "decoder_scale", "reference"),
)
_FLAGS = ("keep_shards", "keep_latents", "png", "evaluate")


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of text-to-image networks."""
    group = command.add_argument_group("text to image")
    group.add_argument(
        "--prompts",
        nargs="+",
        metavar="FILE|TEXT",
        help="prompts, or files of them: a .txt with one a line, a .jsonl with prompt in each line",
    )
    group.add_argument(
        "--negative", metavar="TEXT", help="what guidance leads away from (default: no text)"
    )
    group.add_argument(
        "--grid",
        choices=GRIDS,
        help="noise levels: those of diffusers' scheduler, whose last step is next to nothing, or "
        "of linspace(1, 1/N, N) (default: as the pipeline; SD3 diffusers, others linear)",
    )
    group.add_argument(
        "--size",
        metavar="WxH",
        help="pixels (default: of the largest images of the run's data, else the model's)",
    )
    group.add_argument("--per-prompt", type=int, metavar="K", help="pictures of each (default 1)")
    group.add_argument(
        "--t5-length",
        type=int,
        metavar="L",
        help="tokens of T5 or Qwen3 (default: those of the run's data, else the pipeline's)",
    )
    group.add_argument(
        "--model",
        type=user_path,
        metavar="FOLDER",
        help="the pipeline with text encoders and autoencoder (default: the one that the run was "
        "trained from)",
    )
    group.add_argument(
        "--layout", choices=LAYOUTS, help="geneval: a folder a prompt, for its scorer"
    )


def refuse_without_prompts(options: argparse.Namespace) -> None:
    """Refuse options of this command's other half.

    Raises:
        ValueError: names the option.
    """
    for name in ("negative", "grid", "size", "per_prompt", "t5_length", "model", "layout"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} belongs to --prompts: give both")


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the record of the file that it came from, for --layout geneval."""

    text: str
    record: Mapping[str, object]


def read_prompts(given: Sequence[str]) -> list[Prompt]:
    """Prompts of a command line, those of files in their places.

    Raises:
        ValueError: a file that cannot be read or has no prompts, an empty list.
    """
    found: list[Prompt] = []
    for text in given:
        path = user_path(text)
        named = path.suffix in (".txt", ".jsonl") and len(text) < 1000
        if not named:
            found.append(Prompt(text, {"prompt": text}))
            continue
        if not path.is_file():
            raise ValueError(f"--prompts {text}: there is no such file")
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"--prompts {text}: the file has no prompts")
        read = _of_json if path.suffix == ".jsonl" else _of_text
        found += [read(line, f"{text}, line {i + 1}") for i, line in enumerate(lines)]
    return found


def _of_text(line: str, where: str) -> Prompt:
    return Prompt(line.strip(), {"prompt": line.strip()})


def _of_json(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
        text = next(record[key] for key in _PROMPT_KEYS if isinstance(record.get(key), str))
    except (ValueError, AttributeError, StopIteration):
        raise ValueError(
            f"--prompts {where} must be a JSON object with one of {', '.join(_PROMPT_KEYS)}, got "
            f"{line[:60]}"
        ) from None
    return Prompt(text, record)


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of "1152x896".

    Raises:
        ValueError: another form, or sides that are no multiples of 16.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    sides = (int(match[1]), int(match[2])) if match else (0, 0)
    if min(sides) < 16 or any(side % 16 for side in sides):
        raise ValueError(f"--size must be WxH in multiples of 16 pixels, got {text!r}")
    return sides


def run(options: argparse.Namespace) -> int:
    """Make the pictures of all prompts that are not there yet.

    Raises:
        ValueError: options, files or folders that do not fit.
    """
    _check(options)
    from mixflow_fast.distributed.process_group import rank, world_size
    from mixflow_fast.models.text_to_image.prompts import prompt_encoder

    prompts, origin = read_prompts(options.prompts), _Origin.of(options)
    encoder = prompt_encoder(origin.folder, options.t5_length or origin.text_length)
    decoder = _decoder(origin, options)
    settings = _Settings.of(options, origin, encoder, decoder, prompts)
    _begin(options.out, settings, options.force)
    each = settings.per_prompt
    targets = _targets(options.out, len(prompts), each, settings.layout)
    mine = range(rank(), len(prompts), world_size())
    missing = [i for i in mine if not all(path.is_file() for path in targets[i])]
    if rank() == 0:
        print(settings.describe())
        if origin.weights != "pipeline" and not (origin.text_length or options.t5_length):
            print(
                f"note: the data of {options.checkpoint} are not there to say how long its prompts "
                f"were; the network sees their padding, so give --t5-length if it was not "
                f"{settings.text_length}"
            )
    if missing:
        work = [
            _Picture(row + 1, i * each + k, path)
            for row, i in enumerate(missing)
            for k, path in enumerate(targets[i])
        ]
        texts = [prompts[i].text for i in missing]
        _make(settings, origin, decoder, texts, work, options.batch_size or BATCH_SIZE)
    if settings.layout == "geneval":
        for i in missing:
            text = json.dumps(dict(prompts[i].record), ensure_ascii=False)
            write_text(targets[i][0].parent.parent / "metadata.jsonl", text + "\n")
    print(f"{options.out}: pictures {len(mine) * each}, made now {len(missing) * each}")
    return 0


@dataclass(frozen=True)
class _Picture:
    """One to be made: row of its prompt among what is encoded, id of its noise, file."""

    row: int
    id: int
    path: Path


def _make(
    settings: _Settings,
    origin: _Origin,
    decoder: Decoder,
    prompts: Sequence[str],
    work: Sequence[_Picture],
    batch_size: int,
) -> None:
    """Encode, sample, decode and write."""
    import torch

    from mixflow_fast.cli.data.encode import device_of_rank
    from mixflow_fast.reports.images import save_grid
    from mixflow_fast.sampling import sample_latents, sigma_grid
    from mixflow_fast.sampling.text_to_image import noise_of_ids

    device = device_of_rank("auto")
    # Row 0 is what guidance leads away from.
    texts = [settings.negative, *prompts]
    cond = _encoded(origin.folder, texts, settings.text_length, device)
    adapter = origin.adapter(settings.precision, device)
    decoder.to(device)
    sigmas = sigma_grid(settings.steps, settings.shift, settings.grid)
    width, height = parse_size(settings.size)
    side, scale = decoder.network.upsampling, settings.cfg_scale
    latent = (decoder.network.channels, height // side, width // side)
    for start in range(0, len(work), batch_size):
        part = work[start : start + batch_size]
        rows = torch.tensor([picture.row for picture in part])
        ids = torch.tensor([picture.id for picture in part], device=device)
        wanted = {name: value[rows].to(device) for name, value in cond.items()}
        away = {n: v[:1].to(device).expand(len(part), *v.shape[1:]) for n, v in cond.items()}
        x = sample_latents(
            adapter,
            noise_of_ids(settings.seed, ids, latent),
            wanted,
            sigmas,
            scale,
            away if scale != 1 else None,
        )
        for picture, pixels in zip(part, decoder(x), strict=True):
            save_grid(picture.path, pixels[None], columns=1)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """All that the pictures depend on; settings.json."""

    format: str = "mixflow-text-samples/1"
    checkpoint: str
    weights: str
    step: int | None
    model: str
    steps: int
    grid: str
    shift: float
    cfg_scale: float
    negative: str
    size: str
    seed: int
    per_prompt: int
    text_length: int
    precision: str | None
    decoder: str
    decoder_precision: str
    quantise: str
    layout: str
    prompts: tuple[str, ...]

    @classmethod
    def of(
        cls,
        options: argparse.Namespace,
        origin: _Origin,
        encoder: PromptEncoder,
        decoder: Decoder,
        prompts: Sequence[Prompt],
    ) -> _Settings:
        from mixflow_fast.models.text_to_image.folder import check_positions, pipeline_grid

        size = parse_size(options.size) if options.size else origin.size(decoder)
        check_positions(origin.folder, [size], decoder.network.upsampling, "--size")
        side = 2 * decoder.network.upsampling
        own = pipeline_grid(origin.folder, size[0] // side * (size[1] // side))
        # What guides Flux was distilled into the network, which is told its strength.
        scale = 1.0 if encoder.class_name == "FluxTransformer2DModel" else CFG_SCALE
        return cls(
            checkpoint=str(options.checkpoint),
            weights=origin.weights,
            step=origin.step,
            model=str(origin.folder),
            steps=options.steps or STEPS,
            grid=options.grid or own.grid,
            shift=options.shift or own.shift or origin.shift,
            cfg_scale=scale if options.cfg_scale is None else options.cfg_scale,
            negative=options.negative or "",
            size=f"{size[0]}x{size[1]}",
            seed=options.seed,
            per_prompt=options.per_prompt or 1,
            text_length=encoder.length,
            precision=options.precision,
            decoder=str(_autoencoder(origin, options)),
            decoder_precision=decoder.network.precision,
            quantise=decoder.quantisation,
            layout=options.layout or "flat",
            prompts=tuple(prompt.text for prompt in prompts),
        )

    def describe(self) -> str:
        """In a sentence."""
        pictures = "picture" if self.per_prompt == 1 else "pictures"
        prompts = "prompt" if len(self.prompts) == 1 else "prompts"
        return (
            f"{len(self.prompts)} {prompts}, {self.per_prompt} {pictures} of each, {self.size}: "
            f"{self.steps} Euler steps on the {self.grid} grid of shift {self.shift:.4g}, guidance "
            f"{self.cfg_scale:g}, text of {self.text_length} tokens"
        )


def _check(options: argparse.Namespace) -> None:
    """Refuse what the options alone show to be wrong, before anything is read."""
    for name in _OF_CLASSES:
        if getattr(options, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} has no meaning with --prompts: leave it out"
            )
    if options.num is not None:
        raise ValueError(
            "--num has no meaning with --prompts: --per-prompt N makes N pictures of each"
        )
    for name in _FLAGS:
        if getattr(options, name):
            raise ValueError(
                f"--{name.replace('_', '-')} belongs to sets of pictures by class: leave it out"
            )
    if options.mode not in ("auto", "eager"):
        raise ValueError(f"--mode must be eager with --prompts, got {options.mode}")
    if options.out.suffix:
        raise ValueError(f"--out must be a folder with --prompts, got {options.out}")
    for name, least in (("per_prompt", 1), ("steps", 1), ("batch_size", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be >= {least}, got {value}")


@dataclass(frozen=True)
class _Origin:
    """Where weights, text encoders and autoencoder come from.

    Attributes:
        checkpoint: a run or file, or the pipeline itself.
        folder: the pipeline.
        weights: "ema", "model" or "pipeline".
        step: of the run; None for a pipeline.
        shift: of the run's objective, for a pipeline without a scheduler.
        text_length: tokens that the run was trained with; None where its data are not there.
        trained_size: pixels (width, height) of the largest images of its data; None likewise.
    """

    checkpoint: Path
    folder: Path
    weights: str
    step: int | None = None
    shift: float = 1.0
    text_length: int | None = None
    trained_size: tuple[int, int] | None = None

    @classmethod
    def of(cls, options: argparse.Namespace) -> _Origin:
        checkpoint = options.checkpoint
        if checkpoint.is_dir() and (checkpoint / "model_index.json").is_file():
            return cls(checkpoint, options.model or checkpoint, "pipeline")
        from mixflow_fast.models.weights.files import WeightsFile

        file = WeightsFile.open(checkpoint)
        run = json.loads(file.metadata.config or "{}") if file.metadata is not None else {}
        folder = options.model or run.get("model", {}).get("folder")
        if folder is None:
            raise ValueError(
                f"{checkpoint} does not say which pipeline it was trained from: give the folder "
                "with text encoders and autoencoder with --model FOLDER"
            )
        length, size = _of_data(run.get("data", {}))
        return cls(
            checkpoint,
            existing_folder(folder, "the pipeline that the run was trained from, with --model"),
            options.weights,
            file.steps,
            float(run.get("objective", {}).get("shift", 1.0)),
            length,
            size,
        )

    def size(self, decoder: Decoder) -> tuple[int, int]:
        """Pixels (width, height) that the run was trained at, or that the model was made for."""
        if self.trained_size is not None:
            return self.trained_size
        from mixflow_fast.models.text_to_image.loading import read_config, transformer_folder

        config = read_config(transformer_folder(self.folder) / "config.json")
        side = config.get("sample_size")
        if not isinstance(side, int):
            raise ValueError(f"{self.folder} does not say its size: give --size WxH")
        return side * decoder.network.upsampling, side * decoder.network.upsampling

    def adapter(self, precision: str | None, device: torch.device) -> Adapter:
        """The network behind its adapter, in evaluation mode on the device."""
        import torch

        if self.weights == "pipeline":
            from mixflow_fast.models.text_to_image import load_adapter

            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that training would undo a distillation
                adapter = load_adapter(self.checkpoint, dtype=dtype)
        else:
            from mixflow_fast.models import load_model

            adapter = load_model(self.checkpoint, self.weights, base=self.folder).adapter
            if precision == "bf16":
                adapter.network.to(torch.bfloat16)
        adapter.network.eval().requires_grad_(False).to(device)
        return adapter


def _of_data(section: Mapping[str, object]) -> tuple[int | None, tuple[int, int] | None]:
    """Tokens of a prompt and pixels of the largest images of a run's cache, if it is there."""
    from mixflow_fast.data.captioned import CaptionedInfo

    path = section.get("path")
    if section.get("kind") != "captioned" or not isinstance(path, str):
        return None, None
    try:
        info = CaptionedInfo.read(user_path(path))
    except ValueError:  # copied away since, as it may be
        return None, None
    chosen = section.get("buckets") or [bucket.name for bucket in info.buckets]
    return info.length, max(map(parse_size, chosen), key=lambda size: (size[0] * size[1], size))


def _autoencoder(origin: _Origin, options: argparse.Namespace) -> Path:
    """Folder of what decodes."""
    from mixflow_fast.models.text_to_image.folder import autoencoder_folder

    vae = user_path(options.decoder) if options.decoder else autoencoder_folder(origin.folder)
    if vae is None:
        raise ValueError(
            f"{origin.folder} has no vae/ to decode latents with: give its folder with --decoder"
        )
    return vae


def _decoder(origin: _Origin, options: argparse.Namespace) -> Decoder:
    from mixflow_fast.models.autoencoders.decoding import load_decoder

    return load_decoder(
        _autoencoder(origin, options),
        precision=options.decoder_precision or "fp32",
        quantisation=options.quantise or "round_even",
    )


def _encoded(
    folder: Path, prompts: Sequence[str], length: int | None, device: torch.device
) -> Condition:
    """What the network is told of each prompt, on the CPU; one encoder in memory at a time."""
    import torch

    from mixflow_fast.models.text_to_image.prompts import prompt_encoder

    encoder = prompt_encoder(folder, length, device=device)
    parts: dict[str, torch.Tensor] = {}
    for stage in encoder.stages:
        made = []
        for start in range(0, len(prompts), _ENCODED_AT_ONCE):
            tokens = encoder.tokens(prompts[start : start + _ENCODED_AT_ONCE])
            embedded = encoder.embed(stage.name, tokens)
            made.append({name: value.cpu() for name, value in embedded.items()})
        encoder.release(stage.name)
        parts |= {name: torch.cat([one[name] for one in made]) for name in made[0]}
    return encoder.layout.assemble(parts)


def _targets(out: Path, prompts: int, each: int, layout: str) -> list[list[Path]]:
    """Files of each prompt."""
    if layout == "geneval":
        return [
            [out / f"{i:05d}" / "samples" / f"{k:05d}.png" for k in range(each)]
            for i in range(prompts)
        ]
    if each == 1:
        return [[out / f"{i:05d}.png"] for i in range(prompts)]
    return [[out / f"{i:05d}_{k}.png" for k in range(each)] for i in range(prompts)]


def _begin(out: Path, settings: _Settings, force: bool) -> None:
    """Write the settings, or see that what is there was made by the same ones.

    Raises:
        ValueError: other things are there, or pictures of other settings.
    """
    if force:
        raise ValueError("pictures of prompts are never replaced: leave --force out")
    file, own = out / _SETTINGS, asdict(settings)
    # Hidden names are those of another rank, which is writing the same settings.
    if not out.exists() or all(path.name.startswith(".") for path in out.iterdir()):
        write_json(file, own)
        return
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{out} holds other things: choose another --out") from None
    # As JSON holds them: it has no tuples.
    own = json.loads(json.dumps(own))
    if other := [name for name in own if there.get(name) != own[name]]:
        raise ValueError(
            f"{out} holds pictures of another {other[0]} ({str(there.get(other[0]))[:60]}): choose "
            "another --out, or delete it"
        )
