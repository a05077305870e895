"""What stands in a weights file beside the tensors: our own record, or an official `args`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mixflow_fast.models.weights.source_record import SETTINGS, SourceRecord

# What `save_weights` and a JSON file can hold under a name.
Scalar = str | int | float | bool | None
_OFFICIAL_PREDICTIONS = ("velocity", "noise", "score")
# SiT's and REPA's `path_type`, in small letters.
_OFFICIAL_PATHS = {"linear": "linear", "gvp": "gvp", "cosine": "gvp", "vp": "vp"}


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Record of this engine about the weights that it wrote.

    Attributes:
        kwargs: constructor arguments of the network, the clock excepted.
        clock: the network's; None in a file that leaves it to the class.
        prediction: "velocity", "noise", "data" or "score".
        steps, images_seen: progress of the run.
        config: run configuration as a JSON text; None outside a run.
        source: how the mixed source beside the network is built; None where it is N(0, I).
    """

    kwargs: Mapping[str, object]
    clock: str | None
    prediction: str = "velocity"
    steps: int = 0
    images_seen: int = 0
    config: str | None = None
    source: SourceRecord | None = None

    @staticmethod
    def is_in(record: Mapping[str, object]) -> bool:
        """Whether this engine wrote a record; in an official one `model` is a name, not JSON."""
        arguments = _arguments(record)
        return isinstance(arguments, str) and arguments.startswith("{")

    @classmethod
    def from_record(cls, record: Mapping[str, object], path: str | Path) -> Metadata:
        """The record under `args` of a .pt file, in a .safetensors header or in a state.json.

        Raises:
            ValueError: it cannot be read.
        """
        config, source = record.get("config"), record.get(SETTINGS)
        try:
            kwargs = json.loads(_arguments(record))
            run = json.loads(config) if isinstance(config, str) else {}
            prediction = record.get("prediction") or run.get("objective", {}).get("prediction")
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"what {path} says of its network is damaged ({error}): write the file again"
            ) from None
        return cls(
            kwargs={name: value for name, value in kwargs.items() if name != "clock"},
            clock=record.get("clock"),
            prediction=prediction or "velocity",
            steps=count(record.get("steps")) or 0,
            images_seen=count(record.get("images_seen")) or 0,
            config=config if isinstance(config, str) else None,
            source=SourceRecord.from_json(source, path) if isinstance(source, str) else None,
        )

    def to_record(self) -> dict[str, str | int]:
        """The record as `from_record` reads it; of a run, the configuration says the prediction."""
        record: dict[str, str | int] = {"steps": self.steps, "images_seen": self.images_seen}
        if self.clock is not None:
            record["clock"] = self.clock
        # With the clock, so that the text is a whole `model.config`.
        record["model"] = json.dumps({**self.kwargs, "clock": self.clock})
        if self.source is not None:
            record[SETTINGS] = self.source.to_json()
        if self.config is None:
            return record | {"prediction": self.prediction}
        return record | {"config": self.config}

    @property
    def path(self) -> str | None:
        """Interpolation path of the run; None outside one, and in a record from before there was
        a choice."""
        run = json.loads(self.config) if self.config is not None else {}
        return run.get("objective", {}).get("path")

    def at(self, steps: int | None) -> Metadata:
        """The same record after `steps` steps, which a .pt file keeps outside `args`."""
        return self if steps is None else replace(self, steps=steps)

    def model_config(self) -> dict[str, object]:
        """`kwargs`, clock and prediction in one dict, as `read_model_config` returns them."""
        return {**self.kwargs, "clock": self.clock, "prediction": self.prediction}


@dataclass(frozen=True)
class OfficialArgs:
    """What the `args` of an official training checkpoint say that its shapes do not.

    Attributes:
        prediction: "velocity" (REPA writes "v"), "noise" or "score".
        encoder_depth: number of the block that REPA projects; None where the file does not say it.
        path: "linear", "gvp" (REPA writes "cosine") or "vp"; None where the file does not say it.
    """

    prediction: str = "velocity"
    encoder_depth: int | None = None
    path: str | None = None

    @classmethod
    def from_args(cls, args: Mapping[str, object]) -> OfficialArgs:
        recorded, depth = args.get("prediction"), args.get("encoder_depth")
        prediction = str(recorded) if recorded in _OFFICIAL_PREDICTIONS else "velocity"
        # A bool is an int too, and no number of a block.
        path = _OFFICIAL_PATHS.get(str(args.get("path_type")).lower())
        return cls(prediction, depth if type(depth) is int else None, path)


def _arguments(record: Mapping[str, object]) -> object:
    return record.get("kwargs", record.get("model"))


def count(value: object) -> int | None:
    """A number of steps or images, which a .safetensors header keeps as text; None for others."""
    if isinstance(value, str) and value.isdigit():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
