"""A run's starting weights (`train.init`), refused where they do not fit, with what mends it.

What a checkpoint is and what the recipe makes are compared as constructor arguments, by the shapes;
a list of tensors would say less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from warnings import warn

from torch import Tensor

from mixflow_fast.models import Network, load_into
from mixflow_fast.models.registry import describe_model, published_size
from mixflow_fast.models.weights.files import WeightsFile
from mixflow_fast.models.weights.loading import CLASSES, NetworkSpec, spec_of_any_heads
from mixflow_fast.models.weights.metadata import Metadata
from mixflow_fast.models.weights.naming import ClassName
from mixflow_fast.models.weights.source_record import PREFIX, SourceRecord, predictor_of, split
from mixflow_fast.models.weights.sources import check_source, record_of, source_state

_SIZES = ("hidden_size", "depth", "num_heads")
# Recorded arguments that shapes do not show and that would train without an error.
_UNSEEN = ("clock", "num_heads", "encoder_depth")
# Arguments whose setting has their name or, for DiT-DH, another.
_SETTINGS = {
    **{name: name for name in ("in_channels", "input_size", "mlp_ratio", "qk_norm")},
    "use_qknorm": "qk_norm",
}
# Arguments of DiT-DH that no setting changes.
_FIXED = ("use_swiglu", "use_rope", "use_rmsnorm", "wo_shift", "use_pos_embed")
# Arguments of SongUNet, which have settings of other names or none.
_SONGUNET_SETTINGS = {
    "img_resolution": "input_size",
    "in_channels": "in_channels",
    "model_channels": "hidden_size",
    "channel_mult": "channel_mult",
    "num_blocks": "depth",
    "attn_resolutions": "attn_resolutions",
}
_SONGUNET_FIXED = ("channel_mult_emb", "channel_mult_noise", "activate_w_mode")
# Those that are told where they differ; others are in `describe_model`.
_FACTS = {
    "hidden_size": "{} wide",
    "depth": "{} blocks",
    "patch_size": "patch {}",
    "in_channels": "{} channels",
    "input_size": "input_size {}",
    "num_classes": "{} classes",
    "z_dims": "projectors to {}",
}
_RECIPES = {"SiT": "sit-xl2-256", "DiTDH": "rae-xl-256"}


def start_from(model: Network, path: str | Path, source: SourceRecord | None = None) -> None:
    """Start a network (and so its EMA) from the EMA weights of a checkpoint.

    A predictor that the network carries starts from the checkpoint's source; where that has none,
    the predictor stays as it is.

    Args:
        model: the network.
        path: the checkpoint.
        source: how the predictor is built; None for a network without one.

    Raises:
        ValueError: they cannot be read, are damaged or not finite, or do not fit; or were trained
            with another clock, head count or depth of REPA's encoder.
    """
    file = WeightsFile.open(path)
    state = file.state("ema")
    own = model.config | {"clock": model.clock}
    class_name = next(name for name, of in CLASSES.items() if isinstance(model, of))
    if text := misfit(spec_of_any_heads(file, state), class_name, own):
        raise ValueError(f"train.init={file.path} is {text}")
    recorded = file.model_config()
    # Where nothing is projected the depth has no meaning, and is recorded all the same.
    unseen = _UNSEEN if own.get("z_dims") else _UNSEEN[:2]
    for name in unseen:
        if name in recorded and recorded[name] != own[name]:
            raise ValueError(
                f"train.init={file.path} was trained with {name}={recorded[name]!r}, this model "
                f"has {own[name]!r}: set model.{name}"
            )
    file.check_values("ema", state)
    state = state | _start_of_source(model, file, source)
    try:
        load_into(model, state)
    except ValueError as error:
        raise ValueError(f"train.init={file.path}: {error}") from None


def _start_of_source(
    model: Network, file: WeightsFile, own: SourceRecord | None
) -> dict[str, Tensor]:
    """The predictor's first weights by the names that they have in the network; {} without one."""
    theirs = record_of(file)
    if own is None:
        if theirs is not None:
            warn(
                f"train.init={file.path} was trained with a source ({theirs.describe()}), which is "
                "left out here: source.kind=standard",
                stacklevel=2,
            )
        return {}
    frozen = not any(p.requires_grad for p in predictor_of(model).parameters())
    if theirs is None:
        if frozen:
            raise ValueError(
                f"source.frozen=true keeps the source of train.init, and {file.path} holds none: "
                "give a run with source.kind=mixed, or set source.frozen=false"
            )
        as_it_is = split(model.state_dict())[1]
        return {PREFIX + name: tensor for name, tensor in as_it_is.items()}
    if odd := own.differences(theirs):
        raise ValueError(
            f"train.init={file.path} holds another source than this run makes: {', '.join(odd)}: "
            "give the same source.* settings, or start from a file without a source"
        )
    # What a network that goes on was trained with; shapes do not show it.
    odd = [name for name in ("mode", "w") if getattr(own, name) != getattr(theirs, name)]
    if frozen and odd:
        settings = " ".join(f"source.{name}={getattr(theirs, name)}" for name in odd)
        raise ValueError(
            f"source.frozen=true keeps the source of train.init={file.path} as it is, and this run "
            f"mixes it otherwise: set {settings}, or source.frozen=false"
        )
    state = source_state(file)
    check_source(file, state, theirs)
    return {PREFIX + name: tensor for name, tensor in state.items()}


def misfit(spec: NetworkSpec, class_name: ClassName, own: Mapping[str, object]) -> str:
    """What a checkpoint is, what the recipe makes, and the settings; "" where the shapes agree.

    Args:
        spec: the checkpoint's network; num_heads None where the shapes do not tell.
        class_name, own: class and constructor arguments of the recipe's.
    """
    theirs, other = spec.kwargs, spec.class_name != class_name
    if "TextToImage" in (spec.class_name, class_name):
        return _text_to_image_misfit(spec, class_name, own)
    if "SongUNet" in (spec.class_name, class_name):
        return _songunet_misfit(spec, class_name, own)
    settings = [
        *_size_settings(spec, class_name, own),
        *(["model.learn_sigma=null"] if other and class_name == "SiT" else []),
        *_plain_settings(theirs, own),
        *_projector_settings(theirs, own),
    ]
    fixed = [] if other else [n for n in _FIXED if n in theirs and theirs[n] != own[n]]
    if not settings and not fixed:
        return ""
    told = [name for name in _FACTS if _flat(theirs.get(name)) != _flat(own.get(name))]
    text = (
        f"{_describe(spec.class_name, theirs, told)}; the recipe makes "
        f"{_describe(class_name, own, told)}: "
    )
    if fixed:
        listed = ", ".join(f"{name}={theirs[name]}" for name in fixed)
        return f"{text}it has {listed}, which no setting makes: choose another checkpoint"
    recipe = _RECIPES[spec.class_name] if not theirs.get("z_dims") else "repa-xl2-256"
    kind = other or bool(theirs.get("z_dims")) != bool(own.get("z_dims"))
    also = f", or take a recipe of its kind, such as {recipe}" if kind else ""
    return f"{text}set {' '.join(settings)}{also}"


def _text_to_image_misfit(
    spec: NetworkSpec, class_name: ClassName, own: Mapping[str, object]
) -> str:
    theirs = spec.kwargs
    if spec.class_name != class_name:
        what = f"{describe_model(spec.class_name, theirs)}; the recipe makes "
        what += f"{describe_model(class_name, own)}: "
        if class_name == "TextToImage":
            return f"{what}give a run of the network in model.folder, or train.init=null"
        return f"{what}set model.name=TextToImage and model.folder to the folder of that network"
    odd = _other_network(theirs, own)
    if odd:
        return f"{odd}: give the folder that run started from"
    odd = _other_adapters(theirs.get("lora"), own.get("lora"))
    return f"{odd}: {_whole('that run')}" if odd else ""


def check_same_network(model: Network, record: Mapping[str, object], checkpoint: Path) -> None:
    """Refuse to go on with another text-to-image network than a checkpoint's.

    Args:
        model: the network, built of model.folder.
        record: metadata of the checkpoint.
        checkpoint: its folder.

    Raises:
        ValueError: another class, or other arguments of it.
    """
    theirs = Metadata.from_record(record, checkpoint).kwargs
    if odd := _other_network(theirs, model.config):
        raise ValueError(f"{checkpoint} is of {odd}: give the folder that the run started from")
    if odd := _other_adapters(theirs.get("lora"), model.config.get("lora")):
        raise ValueError(f"{checkpoint} is of {odd}: {_whole('the run')}")


def _other_network(theirs: Mapping[str, object], own: Mapping[str, object]) -> str:
    """How a text-to-image network differs from that in model.folder, in words; "" if it is it."""
    if theirs.get("class") != own.get("class"):
        return f"a {theirs.get('class')}, the network in model.folder is a {own.get('class')}"
    before, now = (record.get("transformer") or {} for record in (theirs, own))
    odd = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    listed = ", ".join(f"{name}={before.get(name)} instead of {now.get(name)}" for name in odd[:5])
    return f"another {own.get('class')} than that in model.folder ({listed})" if odd else ""


def _other_adapters(theirs: object, own: object) -> str:
    """How a run's adapters differ from those of the configuration, in words; "" if they do not."""
    if theirs == own:
        return ""
    if not isinstance(theirs, dict):
        return "a run that trained the whole network, and lora.rank asks for adapters beside it"
    if not isinstance(own, dict):
        return f"a run of adapters (lora.rank={theirs.get('rank')}), and lora.rank is 0"
    names = [name for name in ("rank", "alpha", "targets") if theirs.get(name) != own.get(name)]
    if names:
        listed = ", ".join(f"lora.{n}={_text(theirs.get(n))}, now {_text(own[n])}" for n in names)
        return f"a run of other adapters ({listed})"
    return (
        f"a run of adapters beside another network (hash {theirs.get('base')}) than that in "
        f"model.folder ({own.get('base')})"
    )


def _whole(run: str) -> str:
    """The way out where adapters do not fit."""
    return (
        f"give the model.folder and the lora.* settings of {run}, or write its whole network "
        "(mixflow-fast export RUN --to diffusers --out FOLDER) and start a new run from that with "
        "model.folder=FOLDER"
    )


def _songunet_misfit(spec: NetworkSpec, class_name: ClassName, own: Mapping[str, object]) -> str:
    theirs = spec.kwargs
    what = (
        f"{describe_model(spec.class_name, theirs)}; the recipe makes "
        f"{describe_model(class_name, own)}: "
    )
    if spec.class_name != class_name:
        size = published_size(spec.class_name, theirs)
        # Most settings of the one have no meaning for the other.
        return f"{what}take a recipe of a {spec.class_name}{f'-{size}' if size else ''}"
    settings = [
        f"model.{setting}={_text(theirs[name])}"
        for name, setting in _SONGUNET_SETTINGS.items()
        if theirs[name] != own[name]
    ]
    if settings:
        return f"{what}set {' '.join(settings)}"
    odd = [n for n in _SONGUNET_FIXED if n in theirs and theirs[n] != own[n]]
    listed = ", ".join(f"{name}={theirs[name]}" for name in odd)
    return (
        f"{what}it has {listed}, which no setting makes: choose another checkpoint" if odd else ""
    )


def _size_settings(
    spec: NetworkSpec, class_name: ClassName, own: Mapping[str, object]
) -> Iterator[str]:
    theirs = spec.kwargs
    patch = theirs["patch_size"]
    named = spec.class_name != class_name or patch != own["patch_size"]
    if not named and all(_flat(theirs[n]) == _flat(own[n]) for n in ("hidden_size", "depth")):
        return
    size = published_size(spec.class_name, theirs)
    name = f"SiT-{size or 'S'}/{patch}" if spec.class_name == "SiT" else f"DiTDH-{size or 'S'}"
    # A recipe of another size than a published one sets its sizes, which a name would not change.
    whole = size is not None and published_size(class_name, own) is not None
    if named or whole:
        yield f"model.name={name}"
    if not whole:
        for key in _SIZES:
            # Shapes without heads: of the same width, the recipe's are the best guess there is.
            if theirs[key] is None and _flat(theirs["hidden_size"]) == _flat(own["hidden_size"]):
                continue
            if named or _flat(theirs[key]) != _flat(own[key]):
                value = "N (the shapes do not tell it)" if theirs[key] is None else theirs[key]
                yield f"model.{key}={_text(value)}"


def _plain_settings(theirs: Mapping[str, object], own: Mapping[str, object]) -> Iterator[str]:
    for name, setting in _SETTINGS.items():
        if name in theirs and name in own and theirs[name] != own[name]:
            yield f"model.{setting}={_text(theirs[name])}"
    # A file that does not say whether it has a null class is taken to have one.
    recorded = "class_dropout_prob" in theirs
    if not recorded and _label_rows(theirs) == _label_rows(own):
        return
    if theirs["num_classes"] != own["num_classes"]:
        yield f"model.num_classes={theirs['num_classes']}"
    if recorded and _has_null(theirs) != _has_null(own):
        yield f"model.class_dropout_prob={theirs['class_dropout_prob']}"


def _has_null(kwargs: Mapping[str, object]) -> bool:
    return kwargs.get("class_dropout_prob", 0.1) > 0


def _label_rows(kwargs: Mapping[str, object]) -> int:
    return kwargs["num_classes"] + _has_null(kwargs)


def _projector_settings(theirs: Mapping[str, object], own: Mapping[str, object]) -> Iterator[str]:
    """REPA's projectors: as they are in the checkpoint, or none and no loss that needs them."""
    if theirs.get("z_dims"):
        for name in ("z_dims", "projector_dim"):
            if theirs[name] != own.get(name) or not own.get("z_dims"):
                yield f"model.{name}={_text(theirs[name])}"
        if "encoder_depth" in theirs and not own.get("z_dims"):
            yield f"model.encoder_depth={theirs['encoder_depth']}"
    elif own.get("z_dims"):
        yield from (f"model.{n}=null" for n in ("z_dims", "encoder_depth", "projector_dim"))
        yield from ("objective.alignment_weight=0", "data.features=null", "teacher.path=null")


def _describe(class_name: ClassName, kwargs: Mapping[str, object], told: list[str]) -> str:
    facts = [
        _FACTS[name].format("+".join(map(str, _flat(kwargs[name]))))
        for name in told
        if kwargs.get(name) is not None
    ]
    return describe_model(class_name, kwargs) + (f" ({', '.join(facts)})" if facts else "")


def _flat(value: object) -> tuple[object, ...]:
    """One number, or the two of a DiT-DH, in one form."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _text(value: object) -> str:
    """A value as an override has it."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
