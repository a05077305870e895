"""The command `mixflow-fast`; what its parts take stands in `cli_arguments.py`."""

from __future__ import annotations

import argparse
import atexit
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from mixflow_fast.cli.arguments import parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        the exit code: 0 done, or stopped by a signal with a checkpoint; 1 training diverged
        (inspect: the weights do not fit); 2 refused input, or a full disk; 130 interrupted. A
        second signal to a training run ends it with 128 + its number (130, 143).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = parser()
    options, rest = commands.parse_known_args(arguments)
    # argparse takes overrides before the options or after them, not both.
    if rest and hasattr(options, "overrides") and not any(a.startswith("-") for a in rest):
        options.overrides += rest
    elif rest:
        flags = [a for a in rest if a.startswith("-")]
        commands.error(f"unrecognized arguments: {' '.join(flags or rest)}")
    try:
        return _COMMANDS[options.run](options, arguments)
    except (ValueError, OSError, ImportError) as error:
        return _report(error, 2)
    except KeyboardInterrupt:
        print("mixflow-fast: interrupted; the same command resumes", file=sys.stderr)
        return 130


def _report(error: Exception, code: int) -> int:
    if os.environ.get("MIXFLOW_DEBUG"):
        raise error
    print(f"mixflow-fast: error: {error}", file=sys.stderr)
    return code


def _train(options: argparse.Namespace, _arguments: list[str]) -> int:
    from mixflow_fast.checkpoints.writing import SaveError
    from mixflow_fast.config.loading import load_config
    from mixflow_fast.distributed.lost_ranks import RankLost, roll_call
    from mixflow_fast.distributed.process_group import leave, rank, world_size
    from mixflow_fast.training.build import check
    from mixflow_fast.training.trainer import TrainingDiverged, train

    # Of DeepSpeed's own calls, once for each rank.
    warnings.filterwarnings("ignore", r".*`torch\.distributed.* is deprecated", FutureWarning)
    config = load_config(options.recipe, options.overrides)
    check(config, world_size())
    if options.dry_run:
        print(config.to_yaml(), end="")
        return 0
    try:
        with roll_call():
            result = train(config, resume=options.resume, recipe=options.recipe)
    except TrainingDiverged as error:
        return _report(error, 1)
    except SaveError as error:  # all ranks have it
        return _report(error, 2) if rank() == 0 else 2
    except RankLost as error:
        if error.speaks:
            _report(error, 1)
        _leave_at_once(1)
    atexit.register(leave)  # not yet: who calls this function may train again
    if rank() == 0:
        made = result.weights if result.weights.exists() else result.out  # train.save_weights
        print(f"{made}: {result.images_seen} images, step {result.step}")
    return 0  # also when it was asked to stop: its checkpoint is written


def _leave_at_once(code: int) -> None:
    """End without the clean-up that would wait for ranks that never answer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _sample(options: argparse.Namespace, _arguments: list[str]) -> int:
    import torch

    from mixflow_fast.checkpoints.run_folder import weights_file
    from mixflow_fast.models import load_model
    from mixflow_fast.reports.images import save_grid
    from mixflow_fast.sampling.samples import sample

    if options.num < 1:
        raise ValueError(f"--num must be >= 1, got {options.num}")
    out = Path(options.out)
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out must end in .png (picture) or .npz (array), got {options.out}")
    model = load_model(weights_file(options.checkpoint), options.weights, clock=options.clock)
    if out.suffix == ".png" and model.in_channels not in (1, 3):
        raise ValueError(
            f"{options.checkpoint} makes {model.in_channels}-channel latents, not pictures: use "
            "--out FILE.npz and decode them with the autoencoder they were made by"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    labels = None
    if options.label is not None:
        labels = torch.tensor([options.label[i % len(options.label)] for i in range(options.num)])
    result = sample(
        model.to(device),
        labels=labels,
        num=options.num,
        steps=options.steps,
        method=options.method,
        cfg_scale=options.cfg_scale,
        cfg_channels=options.cfg_channels,
        shift=options.shift,
        seed=options.seed,
        balanced=True,
        batch_size=options.batch_size,
        progress=True,
    )
    if out.suffix == ".png":
        columns = min(options.num, 8)
        save_grid(out, result.x, columns=columns, scale=max(1, 64 // result.x.shape[-1]))
    else:
        _save_npz(out, result.x, result.labels)
    print(f"{out}: {options.num} samples, {options.method}, {result.nfe} network evaluations each")
    return 0


def _save_npz(path: Path, x: object, labels: object) -> None:
    import io

    import numpy as np

    from mixflow_fast.files import write_bytes

    buffer = io.BytesIO()
    np.savez(buffer, x=x.numpy(), y=labels.numpy())
    write_bytes(path, buffer.getvalue())


def _demo(options: argparse.Namespace, arguments: list[str]) -> int:
    from dataclasses import replace

    from mixflow_fast.demo import SETTINGS, run_demo

    if options.seeds < 1:
        raise ValueError(f"--seeds must be >= 1, got {options.seeds}")
    settings = SETTINGS[options.data]
    changes = {
        name: value
        for name in ("gamma", "size", "base_images", "post_images", "base_lr", "post_lr", "samples")
        if (value := getattr(options, name)) is not None
    }
    result = run_demo(
        out=options.out,
        seeds=range(options.seed, options.seed + options.seeds),
        sweep=options.sweep,
        settings=replace(settings, **changes),
        command=shlex.join(["mixflow-fast", *arguments]),
        fresh=options.fresh,
    )
    print(Path(options.out, "report.md").read_text())
    print(f"{result['seconds']:.0f} s. Report: {Path(options.out, 'report.html')}")
    return 0


def _verify_resume(options: argparse.Namespace, _arguments: list[str]) -> int:
    import tempfile

    from mixflow_fast.config.loading import load_config
    from mixflow_fast.diagnostics.verify_resume import table, verify_resume

    config = load_config(options.recipe, options.overrides)
    out = Path(options.out or tempfile.mkdtemp(prefix="verify-resume-"))
    rows = verify_resume(config, out, options.steps, options.ranks)
    half, steps = options.steps // 2, options.steps
    print(
        f"{options.recipe}, ZeRO {config.train.zero_stage}, {config.train.precision}, "
        f"{options.ranks} rank{'s' * (options.ranks > 1)}: {steps} steps against {half}, a save, "
        f"fresh processes and {steps - half} more\n\n{table(rows)}\n"
    )
    differing = sum(row.differing for row in rows)
    print(f"{differing:,} differ" if differing else "the same bits", f"(both runs: {out})")
    return 1 if differing else 0


def _consolidate(options: argparse.Namespace, _arguments: list[str]) -> int:
    from mixflow_fast.checkpoints.consolidate import consolidate

    metadata = consolidate(Path(options.checkpoint), Path(options.out), options.force)
    print(f"{options.out}: {metadata.images_seen} images, step {metadata.steps}")
    return 0


def _ema(options: argparse.Namespace, _arguments: list[str]) -> int:
    from mixflow_fast.checkpoints import ema_snapshots

    run = Path(options.folder)
    if options.sigma_rel is None and options.decay is None:
        found = ema_snapshots.snapshots(run)
        print(ema_snapshots.table(found) if found else f"{run} holds no snapshots")
        return 0
    if options.out is None:
        raise ValueError("--out must be given with --sigma-rel and --decay: the .pt to write")
    out = Path(options.out)
    if options.decay is not None:
        step = ema_snapshots.extract(run, options.decay, out, options.force)
        print(f"{out}: EMA of decay {options.decay:g} after step {step}")
        return 0
    made = ema_snapshots.reconstruct(run, options.sigma_rel, out, options.step, options.force)
    print(
        f"{out}: EMA of relative width {made.sigma_rel:g} after step {made.step}, made of "
        f"snapshots whose profile is {made.error:.1%} off"
    )
    if made.error > 0.1:
        print("warning: more snapshots, or a width between the saved ones, come closer")
    return 0


def _inspect(options: argparse.Namespace, _arguments: list[str]) -> int:
    import json

    from mixflow_fast.checkpoints.inspect import as_json, inspect_file
    from mixflow_fast.cli.inspect import as_text

    found = inspect_file(options.checkpoint, options.weights, options.against)
    print(json.dumps(as_json(found), indent=1) if options.json else as_text(found))
    return 0 if found.fits else 1


def _export(options: argparse.Namespace, _arguments: list[str]) -> int:
    from mixflow_fast.checkpoints.export import export
    from mixflow_fast.cli.inspect import size_text

    heads = options.num_heads
    done = export(
        options.checkpoint,
        options.to,
        options.out,
        weights=options.weights,
        head=options.head,
        bare=options.bare,
        clock=options.clock,
        num_heads=heads if heads is None or len(heads) > 1 else heads[0],
        force=options.force,
    )
    size = size_text(done.size_bytes)
    print(f"{done.path}: {done.model}, clock {done.clock}, {done.tensors} tensors, {size}")
    for note in done.notes:
        print(f"  {note}")
    return 0


def _run_report(options: argparse.Namespace, _arguments: list[str]) -> int:
    from mixflow_fast.reports.run_report import write_run_report

    print(write_run_report(Path(options.run_folder), options.out and Path(options.out)))
    return 0


def _doctor(options: argparse.Namespace, _arguments: list[str]) -> int:
    import json

    from mixflow_fast.diagnostics.doctor import diagnose

    tell = sys.stderr.isatty()
    found = diagnose(lambda section: print(f"{section} ...", file=sys.stderr) if tell else None)
    print(json.dumps(found.as_json(), indent=1) if options.json else found.as_text())
    return 0 if found.healthy else 1


_COMMANDS = {
    "consolidate": _consolidate,
    "demo": _demo,
    "doctor": _doctor,
    "ema": _ema,
    "export": _export,
    "inspect": _inspect,
    "run_report": _run_report,
    "sample": _sample,
    "train": _train,
    "verify_resume": _verify_resume,
}
