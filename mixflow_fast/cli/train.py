"""`mixflow-fast train`: train or post-train from a recipe."""

from __future__ import annotations

import argparse
import atexit
import sys
import warnings

from mixflow_fast.cli.errors import FAILED, REFUSED, end_with_all_ranks, leave_at_once, report
from mixflow_fast.files import user_path
from mixflow_fast.recipes import recipe_names


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "train",
        help="train or post-train from a recipe",
        description="Train or post-train. Started again in the same folder, it resumes. Several "
        "processes: torchrun --nproc-per-node N -m mixflow_fast.cli train ... The train.keep_last "
        "newest checkpoints stay, and those of each train.keep_every steps. Ctrl-C, SIGTERM or "
        "SIGUSR1 saves and ends with exit code 0; a second one ends at once.",
        epilog="example: mixflow-fast train sit-xl2-256 data.path=latents/ "
        "train.init=SiT-XL-2-256x256.pt objective.gamma=0.8",
    )
    command.add_argument(
        "recipe", help=f"{', '.join(recipe_names())} (see `mixflow-fast recipes`), or a .yaml file"
    )
    command.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.field=value",
        help="settings other than the recipe's; `mixflow-fast settings` lists all",
    )
    command.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto continues the run in out= if there is one; never refuses such a folder",
    )
    command.add_argument(
        "--allow-data-change",
        action="store_true",
        help="resume though the data are not those of the checkpoint (other number of examples, "
        "classes or files); the order of examples is then another one",
    )
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="rehearse: open data, weights and checkpoint as the run would, say what was found, "
        "and print the resolved configuration; writes nothing",
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    return end_with_all_ranks(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    from mixflow_fast.checkpoints.run_folder import newest_checkpoint
    from mixflow_fast.checkpoints.writing import SaveError
    from mixflow_fast.config.loading import load_config
    from mixflow_fast.distributed.lost_ranks import RankLost, roll_call
    from mixflow_fast.distributed.process_group import leave, rank, world_size
    from mixflow_fast.training.build import check
    from mixflow_fast.training.rehearsal import rehearse
    from mixflow_fast.training.trainer import TrainingDiverged, train

    # DeepSpeed's own calls warn of themselves, once for each rank.
    warnings.filterwarnings("ignore", r".*`torch\.distributed.* is deprecated", FutureWarning)
    config = load_config(options.recipe, options.overrides)
    if options.dry_run:
        if rank() == 0:
            lines = rehearse(config, options.resume, options.allow_data_change)
            # What was found comes last: a hundred lines of settings would push it off the screen.
            print(config.to_yaml(), end="", flush=True)
            for line in lines:
                print(line, file=sys.stderr)
        return 0
    check(config, world_size())
    try:
        with roll_call():
            result = train(
                config,
                resume=options.resume,
                recipe=options.recipe,
                allow_data_change=options.allow_data_change,
            )
    except TrainingDiverged as error:
        return report(error, FAILED)
    except SaveError as error:
        return report(error, REFUSED)
    except KeyboardInterrupt:  # before the first step or after the last
        if (newest := newest_checkpoint(user_path(config.out))) is None:
            raise
        raise KeyboardInterrupt(f"{newest} is there to resume from") from None
    except RankLost as error:
        if error.speaks:
            report(error, FAILED)
        # The end of the process group would wait for the lost rank until its timeout.
        leave_at_once(FAILED)
    atexit.register(leave)  # not yet: who calls this function may train again
    if rank() == 0:
        newest = newest_checkpoint(result.out)
        # An older weights.pt may be there, of a run that was shorter.
        current = newest is not None and (newest / "weights.pt").exists()
        made = result.weights if current else result.out
        how = "" if current else f"; weights: mixflow-fast consolidate {result.out} --out FILE.pt"
        print(f"{made}: {result.images_seen} images, step {result.step}{how}")
    return 0  # also when it was asked to stop: its checkpoint is written
