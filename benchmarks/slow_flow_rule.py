"""Does the rule for gamma hold on other seeds? The demo's base, its arms over gamma, its slow flow.

For every seed the photo demo's base model is trained, then post-trained with the Beta(2,1) label
and each gamma on the same examples and noise, sampled with each number of Euler steps, and measured
as the demo measures. Beside it stands what `slow_flow` finds on the base alone and what
`recommend_gamma` makes of it, so that the gamma that was best can be held against the one that was
recommended. Finished parts are kept: the same command goes on, and more seeds or gammas only add.

    python -m benchmarks.slow_flow_rule --seeds 110 111 112 113 114 --out runs/slow-flow-rule
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from mixflow_fast.demo import METRIC_OF_FEATURE, SETTINGS, Arm, Measure, arm_config, base_config
from mixflow_fast.files import write_json
from mixflow_fast.models import load_model
from mixflow_fast.sampling.samples import sample
from mixflow_fast.training.trainer import train

PHOTOS = SETTINGS["photos"]
GAMMAS = (0.0, 0.15, 0.3, 0.5)
FRECHET = "frechet.json"


def arm_name(gamma: float) -> str:
    return f"gamma_{gamma:g}"


def train_arm(out: Path, seed: int, gamma: float | None) -> Path:
    """The finished run of an arm, None being the base; nothing is trained twice.

    Raises:
        KeyboardInterrupt: a signal ended the training, with a checkpoint.
    """
    base = base_config(PHOTOS, seed, out / f"seed_{seed}" / "base")
    config = base
    if gamma is not None:
        arm = Arm(f"gamma {gamma:g}", gamma, "beta21")
        config = arm_config(base, arm, PHOTOS, seed, out / f"seed_{seed}" / arm_name(gamma))
    if not train(config).finished:
        raise KeyboardInterrupt
    return Path(config.out)


def distances(folder: Path, seed: int, measure: Measure) -> dict[str, dict[str, float]]:
    """Distances of an arm's samples by metric and number of steps, as the demo measures them."""
    done = folder / FRECHET
    if done.exists():
        return json.loads(done.read_text())
    model = load_model(folder / "weights.pt")
    table: dict[str, dict[str, float]] = {name: {} for name in METRIC_OF_FEATURE.values()}
    for steps in PHOTOS.steps:
        drawn = sample(
            model, num=PHOTOS.samples, steps=steps, seed=seed, balanced=True, batch_size=250
        )
        for metric, value in measure(drawn.x).items():
            table[metric][str(steps)] = value
    write_json(done, table)
    return table


def run_seed(out: Path, seed: int, gammas: Sequence[float], measure: Measure) -> None:
    """Train and measure the base and every arm of a seed."""
    distances(train_arm(out, seed, None), seed, measure)
    for gamma in gammas:
        distances(train_arm(out, seed, gamma), seed, measure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[110, 111, 112, 113, 114])
    parser.add_argument("--gammas", type=float, nargs="+", default=list(GAMMAS))
    parser.add_argument("--out", type=Path, default=Path("runs/slow-flow-rule"))
    options = parser.parse_args(argv)
    measure = Measure(PHOTOS.data, PHOTOS.size)
    for seed in options.seeds:
        run_seed(options.out, seed, options.gammas, measure)


if __name__ == "__main__":
    main()
