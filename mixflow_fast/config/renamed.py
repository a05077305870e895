"""Former names of keys and values: whoever still writes one is told the new one."""

from __future__ import annotations

_KEYS = {
    "optim.ema_decay": "the first of the list optim.ema_decays: optim.ema_decays=[0.9999]",
    "optim.ema_more_decays": "the rest of the list optim.ema_decays: "
    "optim.ema_decays=[0.9999,0.999]",
    "train.keep": "train.keep_last",
    "train.mirrors": "train.loggers",
}
_VALUES = {"model.checkpointing": {"activation": "elementwise", "blocks": "full"}}


def refuse_former_key(name: str) -> None:
    """ValueError for a dotted key that has another name now, with that name."""
    if name in _KEYS:
        raise ValueError(f"{name} is now {_KEYS[name]}")


def refuse_former_value(name: str, value: object) -> None:
    """ValueError for a value of the key `name` that has another name now, with that name."""
    now = _VALUES.get(name, {}).get(value) if isinstance(value, str) else None
    if now is not None:
        raise ValueError(f"{name}={value} is now {name}={now}")
