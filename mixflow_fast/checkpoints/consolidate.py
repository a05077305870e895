"""One official-layout file from the shards of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from mixflow_fast.checkpoints import manifest, run_folder
from mixflow_fast.checkpoints.shards import COPY_AGAIN, gather
from mixflow_fast.files import check_writable, existing_folder
from mixflow_fast.models import save_weights
from mixflow_fast.models.weights.damage import refuse_not_finite
from mixflow_fast.models.weights.metadata import Metadata


def consolidate(run: Path, out: Path, force: bool = False) -> Metadata:
    """Write the weights.pt that the trainer writes online, from the shards alone.

    Args:
        run: a run folder (its newest checkpoint is taken) or a checkpoint folder.
        out: the file; same content as the trainer's, bit for bit.
        force: replace what is there.

    Returns:
        what the file records of the run.

    Raises:
        ValueError: no checkpoint there, one that is damaged, weights that are not finite, or `out`
            exists.
    """
    wanted = "a run folder or one of its checkpoints/step_N"
    folder = existing_folder(run, wanted)
    check_writable(out, force)
    if not (run / "state.json").is_file():
        newest = run_folder.newest_checkpoint(run)
        if newest is None:
            raise ValueError(f"{run} holds no checkpoint: give {wanted}")
        folder = newest
    if reason := manifest.damage(folder, checksums=(0, 1)):
        raise ValueError(f"{folder} is damaged ({reason}): {COPY_AGAIN}")
    record = run_folder.read_state(folder).metadata
    found = gather(folder, ("weight", "ema"))
    model_state = {name: values["weight"] for name, values in found.items()}
    ema_state = {name: values.get("ema", values["weight"]) for name, values in found.items()}
    for state in (model_state, ema_state):
        refuse_not_finite(state, folder, "take an older checkpoint of the run")
    save_weights(out, model_state, ema_state, record)
    return Metadata.from_record(record, folder)
