"""From a configuration to the objects of a run, each built once. Nothing is written.

Components take these objects and their own section of the configuration, never the whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from mixflow_fast.checkpoints.resume import ResumePoint
from mixflow_fast.config.cond_section import CondConfig
from mixflow_fast.config.data_sections import (
    DATA_FIELDS,
    DataConfig,
    EncoderConfig,
    TeacherConfig,
)
from mixflow_fast.config.lora_section import LoraConfig
from mixflow_fast.config.schema import (
    Config,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    TrainConfig,
)
from mixflow_fast.config.validate import validate
from mixflow_fast.data import Dataset, build_dataset
from mixflow_fast.data.captioned import CaptionedLatents
from mixflow_fast.data.dataset import without_flips
from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.distributed.read_once import read_once_a_machine
from mixflow_fast.evaluation.validation_loss import ValidationData
from mixflow_fast.files import existing_path
from mixflow_fast.flow.source import MixedSource
from mixflow_fast.models import Execution, Network, Transformer, build
from mixflow_fast.models.dinov2 import PRECISIONS, Dinov2Files, Precision
from mixflow_fast.models.teacher import TEACHER, Teacher, teacher_resolution
from mixflow_fast.models.text_to_image.lora import set_initial
from mixflow_fast.models.text_to_image.network import TextToImage
from mixflow_fast.models.text_to_image.prompts import (
    PromptEncoder,
    layout_for,
    prompt_encoder,
)
from mixflow_fast.models.text_to_image.spec import TransformerSpec, with_storage
from mixflow_fast.models.weights.source_record import SourceRecord
from mixflow_fast.objective.mixflow import MixFlow
from mixflow_fast.training.alignment import Alignment
from mixflow_fast.training.cache_fit import check_cache, check_encoders
from mixflow_fast.training.capture import check_device
from mixflow_fast.training.conditions import Conditions, Prompts
from mixflow_fast.training.ddp_engine import DDPEngine
from mixflow_fast.training.encoders import build_encoder, check_encoder, image_size
from mixflow_fast.training.engine import DeepSpeedEngine
from mixflow_fast.training.engines import Engine
from mixflow_fast.training.inputs import Inputs
from mixflow_fast.training.loading import check_loading
from mixflow_fast.training.source import carry_predictor, mixed_source, source_record, wants_labels

# Fields of the section `model` that are not arguments of the class.
_NOT_ARGUMENTS = (
    "name",
    "folder",
    "adapter",
    "init_seed",
    "mode",
    "compile_unit",
    "attention",
    "checkpointing",
)
# Fields of the section `model` that have another name in SongUNet, and those that it has not.
_SONGUNET = {"input_size": "img_resolution", "hidden_size": "model_channels", "depth": "num_blocks"}
_NOT_SONGUNETS = ("num_classes", "class_dropout_prob")
# Fields of a data kind that are no arguments of its class.
_HOW_IT_COMES = ("loader", "resident")
# Data kinds with a held-out set of their own.
_HELD_OUT = ("photos", "digits")


@dataclass(frozen=True)
class RunParts:
    """What a run is made of.

    Attributes:
        model: the network on the meta device, without weights, with the predictor of its source;
            see `FirstNetwork`.
        execution: how it is run on the device.
        mix: the objective, in the model's clock.
        conditions: what the network is told beside x and t, from a batch on the device.
        alignment: REPA's term; zero where the configuration has none.
        dataset: training examples.
        inputs: what the network trains on, from a batch on the device.
        validation: examples to validate on; None where the run does not validate.
        source: how the mixed source is built; None where it is N(0, I).
    """

    model: Network
    execution: Execution
    mix: MixFlow
    conditions: Conditions
    alignment: Alignment
    dataset: Dataset
    inputs: Inputs
    validation: ValidationData | None
    source: SourceRecord | None


def build_run(config: Config, device: torch.device) -> RunParts:
    """Everything that a run needs, from a validated configuration.

    Args:
        config: configuration of the run.
        device: where it trains. Nothing is moved there yet.

    Raises:
        ValueError: data, encoder, teacher or network that are not there or do not fit each other.
    """
    c = config
    model = build_model(c.model, "meta", c.lora)
    source = source_record(c.source, c.model)
    carry_predictor(model, source, c.source.frozen, c.model.init_seed)
    mix = build_objective(
        c.objective, model.clock, c.train.seed, mixed_source(source, model, c.source.dropout)
    )
    encoder = build_encoder(c.encoder, c.model)
    dataset = build_data(c.data, c.model, c.encoder, c.cond.drop)
    if wants_labels(mix):  # a SongUNet takes any, its source does not
        _check_classes(dataset, c.model)
    check_loading(c.data, dataset, device)
    if c.model.is_text_to_image:
        check_encoders(dataset.info, c.model.folder)
    prompts = build_prompt_encoder(c.model, dataset, device)
    teacher = None
    if c.teacher.path is not None:
        precision = c.teacher.precision or c.train.precision
        teacher = build_teacher(c.teacher, c.model, precision)
    elif c.objective.alignment_weight:
        _check_features(dataset, c.model, _token_side(model))
    return RunParts(
        model=model,
        execution=build_execution(c.model, c.train.zero_stage, device),
        mix=mix,
        conditions=build_conditions(model, c.cond, c.train.seed, dataset, prompts),
        alignment=Alignment(c.objective, teacher, mix, device),
        dataset=dataset,
        inputs=Inputs(encoder),
        validation=build_validation(c.data, c.model, dataset) if c.train.validate_every else None,
        source=source,
    )


def build_model(
    section: ModelConfig, device: str | torch.device = "cpu", lora: LoraConfig | None = None
) -> Network:
    """The network of a configuration with its random initial weights (a function of init_seed).

    That of a folder, TextToImage, has no weights: see `FirstNetwork`. It is on the meta device
    whole where `device` is that, and else has no storage for what files hold.
    """
    if section.is_text_to_image:
        on_meta = torch.device(device).type == "meta"
        spec = TransformerSpec.read(section.folder, section.adapter, warns=on_meta)
        if lora is not None and lora.rank:
            spec = spec.with_lora(section.folder, lora.rank, lora.alpha, lora.targets)
        return spec.on_meta() if on_meta else spec.without_weights()
    options = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    options = {k: v for k, v in options.items() if v is not None and k not in _NOT_ARGUMENTS}
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    if section.name.startswith("DiTDH") and "qk_norm" in options:
        options["use_qknorm"] = options.pop("qk_norm")
    if section.is_songunet:
        options = _songunet_arguments(options)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(section.init_seed)
        return build(section.name, **options)


def _songunet_arguments(options: Mapping[str, object]) -> dict[str, object]:
    """Fields of the section `model` as arguments of `SongUNet`."""
    given = {_SONGUNET.get(k, k): v for k, v in options.items() if k not in _NOT_SONGUNETS}
    return given | {"out_channels": given["in_channels"]}


@dataclass(frozen=True)
class FirstNetwork:
    """Makes the network with the weights that a run, or a part of it, begins with.

    Attributes:
        section: the network's section of the configuration.
        init: checkpoint whose EMA weights start a new run (`train.init`), or None.
        start: where the run begins.
        source: how the predictor of its source is built; None for N(0, I).
        frozen: whether the source is not trained.
        lora: the section of that name; None trains the whole network.
        precision: of training, in which what adapters stand beside is kept.
    """

    section: ModelConfig
    init: str | None
    start: ResumePoint
    source: SourceRecord | None = None
    frozen: bool = False
    lora: LoraConfig | None = None
    precision: Precision = "fp32"

    @property
    def weights(self) -> str:
        """What a new run starts from, in words."""
        if self.init is not None:
            return f"the EMA weights of {self.init}"
        folder = self.section.folder
        if folder is None:
            return "random weights"
        rank = 0 if self.lora is None else self.lora.rank
        return f"the weights in {folder}" + f", with new adapters of rank {rank}" * bool(rank)

    def __call__(self, host_group: HostGroup, whole: bool = False) -> Network:
        """The network on the CPU. Every rank of the group must call it.

        Args:
            host_group: all ranks, or this one alone.
            whole: False leaves undefined what the engine loads by itself when the run is resumed.

        Raises:
            ValueError: weights that are damaged or do not fit; on all ranks.
        """
        new = self.start.checkpoint is None and self.init is None
        if self.section.is_text_to_image:
            model = build_model(self.section, lora=self.lora)
            model = with_storage(model, frozen=PRECISIONS[self.precision])
            if new or model.has_adapters:
                self._fill_from_folder(model, host_group)
            if new:
                set_initial(model, self.section.init_seed)
                return model
        else:
            # Else without random weights, because every tensor of it comes from a file.
            model = build_model(self.section, "cpu" if new else "meta")
            if not new:
                model = model.to_empty(device="cpu")
        # A file may hold no source: then its first weights are its own.
        carry_predictor(model, self.source, self.frozen, self.section.init_seed)
        if not new:
            self.start.fill(model, self.init, host_group, whole, self.source)
        return model

    def _fill_from_folder(self, model: TextToImage, host_group: HostGroup) -> None:
        """The weights of `model.folder`, read once a machine."""
        spec = TransformerSpec.from_config(model.config)
        read = partial(spec.fill, model, self.section.folder)
        read_once_a_machine(host_group, read, model.state_dict().values())


def build_execution(section: ModelConfig, zero_stage: int, device: torch.device) -> Execution:
    """How the network of a configuration is run on a device.

    Raises:
        ValueError: a setting of torch.compile where it is not used.
    """
    mode = section.mode
    if mode == "auto":
        # ZeRO 3 gathers weights in the modules' own forward pass, which the other modes leave out.
        mode = "compile" if device.type == "cuda" and zero_stage < 3 else "eager"
    if mode == "graph":
        check_device(device)
    if mode == "eager" and section.compile_unit != "block":
        auto = ", which auto is here" if section.mode == "auto" else ""
        raise ValueError(
            f"model.compile_unit={section.compile_unit} needs model.mode=compile or fused, got "
            f"eager{auto}: set model.mode, or leave model.compile_unit out"
        )
    return Execution(
        mode=mode,
        attention=section.attention,
        checkpointing=section.checkpointing,
        compile_unit=section.compile_unit,
    )


def build_engine(train: TrainConfig, optim: OptimConfig, microbatch: int, model: Network) -> Engine:
    """The engine of a configuration around a network, which `start` hands over to it.

    Args:
        train, optim: sections of the configuration.
        microbatch: examples of this rank in one forward pass.
        model: on the CPU.

    Raises:
        ValueError: DeepSpeed is wanted and not installed.
    """
    kind = DDPEngine if train.engine == "ddp" else DeepSpeedEngine
    return kind(train, optim, microbatch, model)


def build_objective(
    section: ObjectiveConfig, clock: str, seed: int, source: MixedSource | None = None
) -> MixFlow:
    """The objective of a configuration, in the clock of its model.

    Args:
        section: the section `objective`.
        clock: of the model.
        seed: of its draws.
        source: of the noise end; None for N(0, I).
    """
    options = dataclasses.asdict(section)
    # Belong to alignment.py and to objective/rollout.py.
    for name in ("alignment_weight", "alignment_input", "rollout_steps"):
        options.pop(name)
    return MixFlow(**options, clock=clock, seed=seed, source=source)


def build_conditions(
    model: Network,
    section: CondConfig,
    seed: int,
    dataset: Dataset,
    encoder: PromptEncoder | None = None,
) -> Conditions:
    """What a network is told beside x and t.

    Args:
        model: the network.
        section: the section `cond`.
        seed: of the run.
        dataset: the examples.
        encoder: of `build_prompt_encoder`.

    Raises:
        ValueError: a text encoder that the network has not; as `check_cache`.
    """
    if not isinstance(model, TextToImage):
        return Conditions()
    layout = layout_for(model.config["class"], model.config["transformer"])
    check_cache(dataset, model, layout, encoder)
    return Prompts(layout, section.drop_by_encoder(), seed, encoder)


def build_prompt_encoder(
    section: ModelConfig, dataset: Dataset, device: torch.device
) -> PromptEncoder | None:
    """What embeds prompts during training; None where the data hold embeddings, or no prompts.

    It loads an encoder when it is first asked for what that gives.

    Args:
        section: names the folder with the encoders.
        dataset: the examples.
        device: where it works.

    Raises:
        ValueError: encoders that are not in the folder.
    """
    if not section.is_text_to_image or dataset.info.text != "online":
        return None
    return prompt_encoder(section.folder, dataset.info.length, device=device)


def build_data(
    section: DataConfig,
    model: ModelConfig,
    encoder: EncoderConfig | None = None,
    drop: float = 0.0,
) -> Dataset:
    """The training examples.

    Args:
        section: the section `data` of the configuration.
        model: what takes them.
        encoder: what makes latents of them before that; None as with `encoder.kind=none`.
        drop: probability of the empty prompt, `cond.drop`.

    Raises:
        ValueError: data that are not there or of another format, with the settings that name them;
            data that do not fit the model.
    """
    encoder = encoder or EncoderConfig()
    given = {name: getattr(section, name) for name in ("path", "images", "features")}
    given = {f"data.{name}": path for name, path in given.items() if path is not None}
    for name, path in given.items():  # before a word about formats
        existing_path(path, name)
    options = {name: getattr(section, name) for name in DATA_FIELDS[section.kind]}
    for name in _HOW_IT_COMES:
        options.pop(name, None)
    for name in ("moments", "scale", "mirrors", "buckets"):  # null: the data say
        if name in options and options[name] is None:
            options.pop(name)
    if section.kind == "latents":
        options["features"] = section.features or False
        options["images"] = section.images
    elif section.kind == "captioned":
        options["drop"] = drop
    elif options["size"] is None:
        options["size"] = image_size(encoder, model)
    try:
        dataset = build_dataset(section.kind, **options)
    except ValueError as error:
        settings = ", ".join(f"{name}={path}" for name, path in given.items())
        raise ValueError(f"{error} ({settings})" if settings else str(error)) from error
    if model.is_text_to_image:  # latents of any sides
        pass
    elif encoder.kind == "none":
        _check_shape(dataset, section, model)
    else:
        _check_images(dataset, encoder, model)
    if model.has_classes:
        _check_classes(dataset, model)
    return dataset


def _check_classes(dataset: Dataset, model: ModelConfig) -> None:
    if dataset.num_classes > model.num_classes:
        raise ValueError(
            f"data has {dataset.num_classes} classes, the model only {model.num_classes}: set "
            "model.num_classes"
        )


def _check_shape(dataset: Dataset, section: DataConfig, model: ModelConfig) -> None:
    shape = dataset.shape
    expected = (model.in_channels, model.input_size, model.input_size)
    if tuple(shape) == expected:
        return
    same_width = shape[0] == model.in_channels
    way_out = f"set model.input_size={shape[1]}"
    way_out += "" if same_width else f" model.in_channels={shape[0]}"
    if section.kind != "latents":
        way_out += f", or data.size={model.input_size}" if same_width else ""
    moments = getattr(dataset, "moments", False)
    doubled = (2 * shape[0], *shape[1:]) if moments else (shape[0] / 2, *shape[1:])
    if section.kind == "latents" and doubled == expected:
        way_out = (
            "they are plain latents, not mean | std: set data.moments=false"
            if moments
            else "they are mean | std of a posterior: set data.moments=true"
        )
    raise ValueError(
        f"data gives examples of shape {tuple(shape)}, the model takes {expected}: {way_out}"
    )


def _check_images(dataset: Dataset, encoder: EncoderConfig, model: ModelConfig) -> None:
    size = image_size(encoder, model)
    if tuple(dataset.shape) != (3, size, size):
        raise ValueError(
            f"data gives images of shape {tuple(dataset.shape)}, encoder.kind={encoder.kind} needs "
            f"{(3, size, size)} for latents of side model.input_size = {model.input_size}: give "
            f"images of {size} pixels, or set model.input_size"
        )


def build_validation(section: DataConfig, model: ModelConfig, dataset: Dataset) -> ValidationData:
    """A set that training does not see where the data kind has one; else training examples.

    Args:
        section, model: sections of the configuration.
        dataset: the training examples.
    """
    if section.kind in _HELD_OUT:
        size = section.size or model.input_size
        try:
            heldout = build_dataset(section.kind, size=size, split="heldout")
            return ValidationData(heldout, "held-out examples")
        except ValueError:  # windows larger than the held-out bands
            pass
    plain = without_flips(dataset)
    if isinstance(plain, CaptionedLatents):
        plain = plain.without_drop()
    return ValidationData(plain, "training examples")


def build_teacher(section: TeacherConfig, model: ModelConfig, precision: str) -> Teacher:
    """The frozen teacher of a configuration, on the CPU.

    Args:
        section: names the teacher.
        model: whose tokens it must fit.
        precision: "fp32" or "bf16".

    Raises:
        ValueError: files that are missing, or tokens that do not fit the model's.
    """
    side = _token_side(build_model(model, "meta"))
    _check_teacher(section, model, side)
    options = dataclasses.asdict(section) | {"precision": precision}
    return Teacher(options.pop("path"), side, **options)


def check(config: Config, world_size: int = 1) -> None:
    """`validate`, and that network and objective can be built; reads no data or weights.

    Of a teacher and an encoder it reads the config.json.
    """
    validate(config, world_size)
    model = build_model(config.model, "meta", config.lora)
    source = source_record(config.source, config.model)
    carry_predictor(model, source, config.source.frozen, config.model.init_seed)
    objective = config.objective, model.clock, config.train.seed
    build_objective(*objective, mixed_source(source, model, config.source.dropout))
    check_encoder(config.encoder, config.model)
    if config.teacher.path is not None:
        _check_teacher(config.teacher, config.model, _token_side(model))


def _token_side(model: Transformer) -> int:
    return model.input_size // model.patch_size


def _check_features(dataset: Dataset, model: ModelConfig, side: int) -> None:
    """Features from a file must be one row per token."""
    index = torch.zeros(1, dtype=torch.int64)
    features = dataset.get(index, index, 0).features
    fits = None if features is None else tuple(features.shape[1:])
    if fits != (side**2, *model.z_dims):
        raise ValueError(
            f"data.features must be (N, {side**2}, {model.z_dims[0]}): one row per token and "
            f"model.z_dims channels, got (N, *{fits})"
        )


def _check_teacher(section: TeacherConfig, model: ModelConfig, side: int) -> None:
    """What the teacher's config.json can tell."""
    files, (width,) = Dinov2Files.read(section.path, TEACHER), model.z_dims
    teacher_resolution(files, side, section.resolution)
    if files.hidden_size != width:
        raise ValueError(
            f"the teacher {section.path} has {files.hidden_size} channels, the model's "
            f"projector {width}: set model.z_dims=[{files.hidden_size}], or take another teacher"
        )
