"""Proof that a run goes on to the bit: N steps against N/2 + save + a fresh process + N/2.

Everything in the two last checkpoints is compared (weights, every tensor of the optimizer's state
in every shard, counters, the exported file), and what every step saw: positions, labels, times,
network input, loss. All of it is real runs in processes of their own.

    python -m mixflow_fast.diagnostics.verify_resume CONFIG RECORDS     one rank of one of them
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mixflow_fast.checkpoints import run_folder
from mixflow_fast.checkpoints.shards import read_file
from mixflow_fast.config.loading import load_config
from mixflow_fast.config.schema import Config
from mixflow_fast.metrics.progress import Progress
from mixflow_fast.training.build import check
from mixflow_fast.training.step_record import StepOutput

Leaf = Tensor | int | float | str | None
# By (rank, step): a hash of each thing that the step saw.
Records = Mapping[tuple[int, int], Mapping[str, str]]
# What names the folder or the software and nothing of the run.
_IGNORED = ("args/config", "metadata/config", "ds_version")
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK",
             "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")  # fmt: skip


@dataclass
class Row:
    """One kind of thing that was compared.

    Attributes:
        what: its name.
        things: how many tensors, numbers or steps it has.
        numbers: how many in them.
        differing: how many of those are not the same bits.
        first: where the first of these is.
    """

    what: str
    things: int = 0
    numbers: int = 0
    differing: int = 0
    first: str = ""

    def add(self, where: str, numbers: int, differing: int) -> None:
        """Count one more thing."""
        self.things += 1
        self.numbers += numbers
        self.differing += differing
        self.first = self.first or (where if differing else "")


def verify_resume(
    config: Config, out: Path, steps: int = 6, ranks: int = 1, quiet: bool = True
) -> list[Row]:
    """Run both ways and compare.

    Args:
        config: configuration of the run; its length, folder and saving are set here, its learning
            rate still descends as if the run were whole.
        out: an empty folder, or one to make; both runs and their logs stay in it.
        steps: N, at least 2.
        ranks: processes of each run.
        quiet: do not say on stderr which run it is at.

    Returns:
        the comparison; nothing differs if every row's `differing` is 0.

    Raises:
        ValueError: a setting that cannot work, a run that failed, or weights that do not move.
    """
    if steps < 2:
        raise ValueError(f"--steps must be >= 2, got {steps}")
    if ranks < 1:
        raise ValueError(f"--ranks must be >= 1, got {ranks}")
    if "RANK" in os.environ:
        raise ValueError("verify-resume starts its processes itself: give --ranks N, no torchrun")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose another folder")
    batch, p = config.train.global_batch_size, config.optim
    common: dict[str, object] = {
        "train.save_every": 0,
        "train.keep_every": 0,  # a multiple of save_every
        "train.keep_last": 2,
        "train.save_weights": "always",
        "train.loggers": [],
    }
    if p.schedule != "constant":
        common["optim.decay_images"] = p.decay_images or config.train.images
    half, whole = batch * (steps // 2), batch * steps
    with Progress(3, "verify-resume", "runs", even=False, quiet=quiet) as progress:
        for name, folder, images in (
            ("whole", "whole", whole),
            ("first", "parts", half),
            ("second", "parts", whole),
        ):
            run = config.replace(**common, **{"train.images": images, "out": str(out / folder)})
            if name == "whole":
                check(run, ranks)
            recipe = out / f"{name}.yaml"
            recipe.parent.mkdir(parents=True, exist_ok=True)
            recipe.write_text(run.to_yaml())
            progress.log(f"verify-resume: to step {images // batch} in {out / folder}")
            _run(recipe, ranks)
            progress.advance()
    _require_movement(out / "parts", steps // 2)
    rows = compare_checkpoints(_newest(out / "whole"), _newest(out / "parts"))
    return rows + compare_streams(
        _records(out / "whole.records"),
        _records(out / "first.records") | _records(out / "second.records"),
    )


def compare_checkpoints(first: Path, second: Path) -> list[Row]:
    """Every tensor and number of two checkpoint folders, bit for bit, by kind."""
    rows: dict[str, Row] = {}
    files = [{f.name for f in d.iterdir() if f.suffix in (".pt", ".json")} for d in (first, second)]
    for name in sorted(files[0] | files[1]):
        if name == "manifest.json":  # sizes and checksums of files that hold the folder's name
            continue
        a, b = (
            dict(_leaves(_content(folder / name))) if name in found else {}
            for folder, found in zip((first, second), files, strict=True)
        )
        for path in [*a, *(path for path in b if path not in a)]:
            if any(path.endswith(ignored) for ignored in _IGNORED):
                continue
            what = _kind(name, path)
            same = _compare(a[path], b[path]) if path in a and path in b else (1, 1)
            rows.setdefault(what, Row(what)).add(f"{name}/{path}", *same)
    return sorted(rows.values(), key=lambda row: _ORDER.index(row.what.split(" ")[0]))


def compare_streams(first: Records, second: Records) -> list[Row]:
    """What the steps of every rank saw, by (rank, step)."""
    rows: dict[str, Row] = {}
    for key in sorted(first.keys() | second.keys()):
        a, b = first.get(key, {}), second.get(key, {})
        for what in a | b:
            row = rows.setdefault(what, Row(f"each step's {what}"))
            row.add(f"rank {key[0]}, step {key[1]}", 1, int(a.get(what) != b.get(what)))
    return list(rows.values())


def table(rows: list[Row]) -> str:
    """The comparison as text."""
    lines = [f"{'':34}{'compared':>9} {'numbers':>12} {'differing':>10}"]
    for row in rows:
        where = f"   first: {row.first}" if row.first else ""
        lines.append(f"{row.what:34}{row.things:9,} {row.numbers:12,} {row.differing:10,}{where}")
    return "\n".join(lines)


_ORDER = ("network", "master", "optimizer", "exported", "everything")


# Keys of the float32 weights in DeepSpeed's shards and in that of ddp.
_MASTERS = {"single_partition_of_fp32_groups", "fp32_flat_groups", "masters"}


def _kind(file: str, path: str) -> str:
    parts = path.split("/")
    if file == "weights.pt" and parts[0] in ("model", "ema", "source", "source_ema"):
        return f"exported {parts[0]} (weights.pt)"
    if _MASTERS & set(parts):
        return "master weights"
    if "state" in parts and parts.index("state") + 2 < len(parts):
        return f"optimizer {parts[parts.index('state') + 2]}"
    if parts[0] == "module" or file == "frozen.pt":
        return "network"
    return "everything else"


def _content(file: Path) -> object:
    return json.loads(file.read_text()) if file.suffix == ".json" else read_file(file)


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, Leaf]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}/{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            yield from _leaves(item, f"{path}/{place}")
    elif value is None or isinstance(value, (Tensor, int, float, str)):
        yield path, value


def _compare(a: Leaf, b: Leaf) -> tuple[int, int]:
    """(numbers, how many of them differ)."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 1, int(type(a) is not type(b) or repr(a) != repr(b))
    if a.shape != b.shape or a.dtype != b.dtype:
        return a.numel(), max(a.numel(), 1)
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    differ = a.contiguous().view(-1).view(ints) != b.contiguous().view(-1).view(ints)
    return a.numel(), int(differ.sum())


def _newest(out: Path) -> Path:
    newest = run_folder.newest_checkpoint(out)
    if newest is None:
        raise ValueError(f"{out} holds no checkpoint")
    return newest


def _require_movement(out: Path, half: int) -> None:
    earlier = out / "checkpoints" / run_folder.checkpoint_name(half)
    rows = compare_checkpoints(earlier, _newest(out))
    if not any(row.differing for row in rows if row.what.startswith("exported model")):
        raise ValueError(
            "no weight moved after the save, so this proves nothing: give more --steps, or a "
            "larger rate (optim.lr=, optim.warmup_images=0)"
        )


def _records(folder: Path) -> Records:
    found = {}
    for file in sorted(folder.glob("rank_*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            found[int(file.stem.removeprefix("rank_")), row.pop("step")] = row
    return found


def _run(recipe: Path, ranks: int) -> None:
    """One run in fresh processes, which meet as torchrun's do; ends when all or one of them did.

    Args:
        recipe: OUT/NAME.yaml; OUT/NAME.records and OUT/NAME_RANK.log are written beside it.
        ranks: processes.
    """
    records = recipe.with_suffix(".records")
    records.mkdir(parents=True)
    env = {key: value for key, value in os.environ.items() if key not in _LAUNCHER}
    env["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).resolve().parents[2]), *env.get("PYTHONPATH", "").split(os.pathsep)]
    ).rstrip(os.pathsep)
    if ranks > 1:  # the store is opened here, on a free port; no rank opens one
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        env |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        env.setdefault("OMP_NUM_THREADS", "1")
    command = [
        sys.executable,
        "-m",
        "mixflow_fast.diagnostics.verify_resume",
        str(recipe),
        str(records),
    ]
    logs = [recipe.with_name(f"{recipe.stem}_{rank}.log") for rank in range(ranks)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            with log.open("wb") as file:
                processes.append(subprocess.Popen(command, env=env | own, stdout=file, stderr=file))
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            time.sleep(0.05)
        failed = [rank for rank, p in enumerate(processes) if p.poll()]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    if failed:
        log = logs[failed[0]]
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
        raise ValueError(f"the run of {recipe} failed, see {log}: {' | '.join(last)}")


def _child(recipe: str, records: Path) -> None:
    """One rank: a run like any other that writes down what its steps see."""
    from mixflow_fast.distributed import process_group
    from mixflow_fast.training.trainer import Trainer

    rows: list[dict[str, str | int]] = []

    def write_down(step: int, outputs: list[StepOutput], means: Tensor) -> None:
        seen = {
            "positions": [made.it.ids for made in outputs],
            "images": [made.it.x1 for made in outputs],
            "t": [made.it.t for made in outputs],
            "slowed time m": [made.it.slowed_t for made in outputs],
            "network input": [made.it.x for made in outputs],
            "labels": [made.y for made in outputs],
            "loss": [means],
        }
        if prompts := [made.cond[name] for made in outputs for name in sorted(made.cond)]:
            seen["prompts"] = prompts
        rows.append({"step": step} | {what: _hash(tensors) for what, tensors in seen.items()})

    trainer = Trainer(load_config(recipe), quiet=True)
    trainer.on_step = write_down
    trainer.run()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (records / f"rank_{process_group.rank()}.jsonl").write_text(lines)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _hash(tensors: list[Tensor]) -> str:
    """SHA-256 of the bytes of some tensors, one after the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    _child(sys.argv[1], Path(sys.argv[2]))
