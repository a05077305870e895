"""Keys and values under other names, former ones and other trainers': the error gives ours."""

from __future__ import annotations

_FORMER = {
    "optim.ema_decay": "the first of the list optim.ema_decays: optim.ema_decays=[{value}]",
    "optim.ema_more_decays": "the rest of the list optim.ema_decays: "
    "optim.ema_decays=[0.9999,0.999]",
    "train.keep": "train.keep_last",
    "data.threads": "data.workers={value}",
    "train.mirrors": "train.loggers",
}
_FORMER_VALUES = {"model.checkpointing": {"activation": "elementwise", "blocks": "full"}}
_LENGTH = (
    "the length of a run is counted in images: train.images=N, where a step takes "
    "train.global_batch_size of them and an epoch of ImageNet 1,281,167"
)
_BATCH = (
    "train.global_batch_size=N is what one optimizer step takes over all ranks and micro-batches, "
    "train.microbatch_size=N what one rank takes at once"
)
_EMA = "optim.ema_decays=[{value}]"
_INIT = (
    "train.init=FILE starts from a checkpoint; the same command with the same out= resumes a run"
)
# Names that other trainers give, without their section, and what to write here.
_ELSEWHERE = {
    **dict.fromkeys(("steps", "max_steps", "num_steps", "train_steps", "max_train_steps"), _LENGTH),
    **dict.fromkeys(("iterations", "max_iters", "total_steps", "epochs", "num_epochs"), _LENGTH),
    **dict.fromkeys(("batch_size", "bs", "batch", "train_batch_size", "local_batch_size"), _BATCH),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "grad_accum"),
        "accumulation follows from the two sizes: " + _BATCH,
    ),
    **dict.fromkeys(("ema_decay", "ema_rate", "ema"), _EMA),
    **dict.fromkeys(("ckpt", "checkpoint", "pretrained", "resume", "resume_from"), _INIT),
    **dict.fromkeys(("learning_rate", "base_lr"), "optim.lr={value}"),
    **dict.fromkeys(("max_grad_norm", "clip_grad", "grad_norm"), "optim.grad_clip={value}"),
    **dict.fromkeys(
        ("warmup", "warmup_steps", "lr_warmup_steps"), "optim.warmup_images=N (images)"
    ),
    **dict.fromkeys(
        ("output_dir", "results_dir", "outdir", "exp_name", "logging_dir"), "out={value}"
    ),
    **dict.fromkeys(
        ("data_dir", "data_path", "feature_path", "dataset", "image_folder"), "data.path={value}"
    ),
    **dict.fromkeys(("num_workers",), "data.workers={value}"),
    **dict.fromkeys(("prefetch", "prefetch_factor", "prefetch_depth"), "data.depth={value}"),
    **dict.fromkeys(("vae", "vae_path"), "encoder.kind=sdvae encoder.path=FOLDER"),
    **dict.fromkeys(
        ("mixed_precision", "dtype", "bf16", "fp16", "amp"),
        "train.precision=bf16 or train.precision=fp32",
    ),
    **dict.fromkeys(("communication_data_type", "grad_reduce_dtype"), "train.reduce_dtype={value}"),
    **dict.fromkeys(("global_seed", "random_seed"), "train.seed={value}"),
    **dict.fromkeys(
        ("gpus", "num_gpus", "nproc", "world_size", "devices", "n_gpus"),
        "several GPUs take a launcher: torchrun --nproc-per-node N -m mixflow_fast.cli train ...",
    ),
    **dict.fromkeys(("report_to", "wandb", "tensorboard", "logger"), "train.loggers=[wandb]"),
    **dict.fromkeys(
        ("save_steps", "checkpointing_steps", "ckpt_every"), "train.save_every=N (steps)"
    ),
    **dict.fromkeys(("sample_every", "sampling_steps"), "train.preview_every=N (steps)"),
    **dict.fromkeys(("cfg_prob", "label_drop", "cfg_dropout"), "train.label_dropout={value}"),
    **dict.fromkeys(("arch", "model_type", "network"), "model.name={value}"),
    **dict.fromkeys(
        ("resolution", "image_size"), "model.input_size=N (side of the latent or image)"
    ),
    **dict.fromkeys(("gradient_checkpointing",), "model.checkpointing=full"),
    **dict.fromkeys(("compile", "use_compile"), "model.mode=compile"),
}


def refuse_former_key(name: str, value: object = None) -> None:
    """ValueError for a dotted key that has another name now, with that name."""
    if name in _FORMER:
        raise ValueError(f"{name} is now {_with_value(_FORMER[name], value)}")


def name_elsewhere(name: str, value: object = None) -> str | None:
    """What to write here for a name that other trainers give; None for any other name."""
    own = name.rpartition(".")[2].lstrip("-").replace("-", "_").lower()
    known = _ELSEWHERE.get(own)
    return None if known is None else _with_value(known, value)


def refuse_former_value(name: str, value: object) -> None:
    """ValueError for a value of the key `name` that has another name now, with that name."""
    now = _FORMER_VALUES.get(name, {}).get(value) if isinstance(value, str) else None
    if now is not None:
        raise ValueError(f"{name}={value} is now {name}={now}")


def _with_value(text: str, value: object) -> str:
    return text.replace("{value}", "VALUE" if value in (None, "") else str(value))
