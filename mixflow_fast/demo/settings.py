"""What the demo trains: its arms, its sizes, and the configuration of each training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mixflow_fast.config.loading import load_config
from mixflow_fast.config.schema import Config
from mixflow_fast.environment import is_installed
from mixflow_fast.optim.lr_schedule import LrSchedule
from mixflow_fast.sampling.remedies import Remedy, parse_remedy
from mixflow_fast.training.build import check


@dataclass(frozen=True)
class Arm:
    """A way to continue the base model's training, or to sample a model that is trained already.

    Attributes:
        label: for people.
        gamma, timesteps, interval: distribution of the two times; None marks the base itself.
        weights_of: the arm whose weights this one samples, with the remedy of the settings; None
            for an arm that is trained.
        folded: of the sweep, hence folded away in the report.
    """

    label: str
    gamma: float | None = None
    timesteps: str | None = None
    interval: str = "shifted"
    weights_of: str | None = None
    folded: bool = False


# A remedy for each number of Euler steps, as `parse_remedy` reads it; none where it does not help.
Remedies = tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Settings:
    """Sizes of a demo, chosen on seeds other than the published ones."""

    data: str = "photos"
    size: int = 16
    gamma: float = 0.3
    base_images: int = 160_000
    post_images: int = 64_000
    base_lr: float = 1e-3
    post_lr: float = 5e-4
    post_schedule: LrSchedule = "constant"  # of the arms' learning rate; the base's is constant
    post_ema_decay: float = 0.995
    samples: int = 1000
    steps: tuple[int, ...] = (5, 10, 20, 50)
    picture_steps: tuple[int, ...] = (5, 10)  # few, where the arms differ most
    control_remedy: Remedies = ()
    mixflow_remedy: Remedies = ()

    def remedy(self, arm: str, steps: int) -> Remedy | None:
        """What the samples of a remedy's arm are corrected by."""
        chosen = {"control_remedy": self.control_remedy, "mixflow_remedy": self.mixflow_remedy}
        text = dict(chosen.get(arm, ())).get(steps)
        return None if text is None else parse_remedy(text)


# Chosen on seeds 112 and 113, before seeds 0 to 4 ran with them: gamma between 0.15 and 0.3 (there
# and on 110 and 111; seeds 0 to 4 had been seen with 0.3, seed 0 with 0.15), the arms' schedule,
# the EMA, and for each number of steps the remedy with the lowest mean distance of pooled pixels.
# At 50 steps none that was tried (ssc 0.05, label_scale 0.95) lowers the control's. docs/evidence
# has the numbers.
CHOSEN_ON = (110, 111, 112, 113)
PHOTOS = Settings(
    gamma=0.15,
    post_schedule="cosine",
    control_remedy=((5, "ssc=0.1,1"), (10, "ssc=0.05,1"), (20, "ssc=0.02,1")),
    mixflow_remedy=(
        (5, "ssc=0.05,1"),
        (10, "label_scale=1.03"),
        (20, "ssc=-0.05,1"),
        (50, "ssc=-0.05,1"),
    ),
)
SETTINGS = {"photos": PHOTOS, "digits": Settings(data="digits", size=8)}


def arms_of(settings: Settings, sweep: bool) -> dict[str, Arm]:
    """The arms by name, the base first. The sweep adds gammas and the paper's ablation rows."""
    g = settings.gamma
    arms = {
        "base": Arm("base, no post-training"),
        "control": Arm("control: plain continued training", 0.0, "uniform"),
        "mixflow": Arm(f"MixFlow, gamma {g:g}", g, "beta21"),
    }
    if settings.control_remedy:
        arms["control_remedy"] = Arm("control + remedy", weights_of="control")
    if settings.mixflow_remedy:
        arms["mixflow_remedy"] = Arm("MixFlow + remedy", weights_of="mixflow")
    order = ("base", "control", "control_remedy", "mixflow", "mixflow_remedy")
    arms = {name: arms[name] for name in order if name in arms}
    return arms | _sweep(g) if sweep else arms


def _sweep(chosen: float) -> dict[str, Arm]:
    arms = {
        f"gamma_{gamma:g}": Arm(f"Beta(2,1) label, gamma {gamma:g}", gamma, "beta21", folded=True)
        for gamma in (0.0, 0.15, 0.3, 0.5, 0.8)
        if gamma != chosen
    }
    below = "ablation: t ~ Beta, m ~ U[0, t] (gamma 1)"
    return arms | {
        "uniform_any": Arm("ablation: t ~ U, m ~ U[0, 1]", None, "uniform", "full", folded=True),
        "beta_any": Arm("ablation: t ~ Beta, m ~ U[0, 1]", None, "beta21", "full", folded=True),
        "uniform_below": Arm("ablation: t ~ U, m ~ U[0, t]", 1.0, "uniform", folded=True),
        "beta_below": Arm(below, 1.0, "beta21", folded=True),
    }


def base_config(settings: Settings, seed: int, out: Path) -> Config:
    """Configuration of the base model's training."""
    return load_config(
        settings.data,
        [
            f"out={out}",
            f"data.size={settings.size}",
            f"model.input_size={settings.size}",
            f"model.init_seed={seed}",
            # Even for the base, odd for its arms: they see other examples and noise than it did.
            f"train.seed={2 * seed}",
            f"train.images={settings.base_images}",
            f"optim.lr={settings.base_lr}",
        ],
    )


def arm_config(base: Config, arm: Arm, settings: Settings, seed: int, out: Path) -> Config:
    """Configuration of an arm's post-training: the base's, with other data positions."""
    return base.replace(
        **{
            "out": str(out),
            "train.init": str(Path(base.out) / "weights.pt"),
            "train.seed": 2 * seed + 1,
            "train.images": settings.post_images,
            "optim.lr": settings.post_lr,
            "optim.schedule": settings.post_schedule,
            "optim.ema_decays": (settings.post_ema_decay,),
            "objective.gamma": 0.0 if arm.gamma is None else arm.gamma,
            "objective.timesteps": arm.timesteps,
            "objective.interval": arm.interval,
        }
    )


def check_settings(settings: Settings, arms: dict[str, Arm], out: Path) -> None:
    """Refuse settings that some arm, the sampling or the report could not work with."""
    if settings.samples < 2:
        raise ValueError(f"samples must be >= 2, got {settings.samples}")
    for name in ("picture_steps", "control_remedy", "mixflow_remedy"):
        named = getattr(settings, name)
        steps = set(named) if name == "picture_steps" else set(dict(named))
        if not steps <= set(settings.steps):
            raise ValueError(f"{name} must be of some of steps = {settings.steps}, got {named}")
    for name in arms:
        for steps in settings.steps:
            settings.remedy(name, steps)
    base = base_config(settings, 0, out / "base")
    for arm in arms.values():
        if arm.weights_of is None:
            # The base is not post-trained; any distribution will do to check the sizes.
            trained = replace(arm, gamma=0.0, timesteps="uniform") if arm.timesteps is None else arm
            check(arm_config(base, trained, settings, 0, out / "arm"))
    if not is_installed("matplotlib"):
        raise ValueError('the report needs matplotlib: pip install "mixflow_fast[eval]"')
