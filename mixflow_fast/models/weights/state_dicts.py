"""State dicts among the entries of a training checkpoint, found by what is in them.

A network that is known is found under whatever key or prefix a trainer keeps it: DDP, FSDP,
torch.compile, DeepSpeed (`module`), Lightning (`state_dict` with `model.` or `ema_model.` in the
names), torch_ema (a list of values without names).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mixflow_fast.messages import shorten
from mixflow_fast.models.weights.naming import prefixes_of_networks, without_wrappers

# Taken for state dicts whatever is in them: the keys of SiT, REPA and RAE, and Lightning's.
_USUAL_KEYS = ("ema", "model", "state_dict")
# How far below the top a network is looked for: {"ema": {"module": {...}}}.
_DEEPEST = 2
_SHADOWS = "shadow_params"  # torch_ema's and diffusers' EMAModel, in the order of the parameters
_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel
# Of the official networks: buffers, and parameters that are not trained.
_BUFFERS = ("freqs_cos", "freqs_sin")
_FROZEN = ("pos_embed", "t_embedder.W")
_EMA = re.compile(r"(?<![a-z])ema(?![a-z])")


@dataclass(frozen=True)
class StateDict:
    """A state dict in a file.

    Attributes:
        place: the keys that lead to it, such as "ema" or "ema.module"; "" for a bare file.
        raw: as the file has it; empty, with a note, where it cannot be read.
        prefix: what stands before the network's names.
        note: on how it was read, for a user.
    """

    place: str
    raw: Mapping[object, object]
    prefix: str = ""
    note: str = ""

    @property
    def name(self) -> str:
        """Where it stands, in words."""
        if not self.prefix:
            return self.place
        return f"{self.place}: {self.prefix}" if self.place else self.prefix

    @property
    def is_readable(self) -> bool:
        """Whether it has names; of a list without, the note says why not."""
        return bool(self.raw) or not self.note

    @property
    def is_ema(self) -> bool:
        """Whether its place is named after an average."""
        return _EMA.search(self.name.lower()) is not None

    def values(self, owner: str) -> dict[str, object]:
        """Its values by the network's own names, without wrappers and prefix.

        Raises:
            ValueError: two names are the same then. `owner` names the file.
        """
        out, prefix = unwrapped(self.raw, owner), self.prefix
        if prefix:
            return {n.removeprefix(prefix): v for n, v in out.items() if n.startswith(prefix)}
        if prefixes_of_networks(out):
            out.pop(_COUNTER, None)
        return out


def unwrapped(state: Mapping[object, object], owner: str) -> dict[str, object]:
    """A state dict without what wrappers put into its names.

    Raises:
        ValueError: two names are the same then. `owner` names the file.
    """
    out: dict[str, object] = {}
    for raw, value in state.items():
        name = without_wrappers(raw)
        if name in out:
            raise ValueError(f"{owner} holds {name} twice, with and without a wrapper prefix")
        out[name] = value
    return out


def find_state_dicts(entries: Mapping[object, object]) -> list[StateDict]:
    """Every network among the entries, and what stands under the usual keys; [] for a bare file.

    A bare file is one whose entries are the tensors themselves.
    """
    found = list(_networks(entries, ""))
    for key in _USUAL_KEYS:
        value = entries.get(key)
        known = any(state.place.partition(".")[0] == key for state in found)
        if isinstance(value, Mapping) and not known and _SHADOWS not in value:
            found.append(StateDict(key, value))
    lists = [
        _with_names(str(key), value[_SHADOWS], found)
        for key, value in entries.items()
        if isinstance(value, Mapping) and isinstance(value.get(_SHADOWS), list | tuple)
    ]
    bare = all(state.place == state.prefix == "" for state in found) and not lists
    return [] if bare else found + lists


def _networks(entries: Mapping[object, object], place: str, level: int = 0) -> Iterator[StateDict]:
    prefixes = prefixes_of_networks(map(without_wrappers, entries))
    for prefix in prefixes:
        yield StateDict(place, entries, prefix)
    if not prefixes and level < _DEEPEST:
        for key, value in entries.items():
            if isinstance(value, Mapping):
                below = f"{place}.{key}" if place else str(key)
                yield from _networks(value, below, level + 1)


def _with_names(place: str, values: Sequence[object], found: Sequence[StateDict]) -> StateDict:
    """A list of values under the names of the network beside it; no values where they do not fit.

    The list has the parameters in the module's order, which is that of its state dict: all of
    them, or those that are trained.
    """
    what = f"{place!r} is a list of {len(values)} values without names"
    online = next((state for state in found if not state.is_ema), None)
    if online is None:
        return StateDict(
            place, {}, note=f"{place!r} is a list of {len(values)} values without names"
        )
    own = online.values(place)
    for left_out in ((), _BUFFERS, (*_BUFFERS, *_FROZEN)):
        names = [name for name in own if not name.endswith(left_out)]
        if _fits(values, [own[name] for name in names]):
            named = own | dict(zip(names, values, strict=True))
            note = f"{what}: read in the order of {online.name!r}, whose shapes it has"
            return StateDict(place, named, note=note)
    note = f"{what}, which does not fit the {len(own)} names and shapes of {online.name!r}"
    return StateDict(place, {}, note=note)


def _fits(values: Sequence[object], own: Sequence[object]) -> bool:
    """Whether both are tensors of the same shapes."""
    return len(values) == len(own) and all(
        isinstance(value, Tensor) and isinstance(mine, Tensor) and value.shape == mine.shape
        for value, mine in zip(values, own, strict=True)
    )


def choose(found: Sequence[StateDict], key: str, path: object) -> tuple[StateDict, str]:
    """The state dict that a user means by "ema" or "model" (or by a key of the file).

    Returns:
        the state dict; a sentence where it is not simply what stands under that key, else "".

    Raises:
        ValueError: there is none.
    """
    usable = [state for state in found if state.is_readable]
    why = "; ".join(state.note for state in found if not state.is_readable)
    wants_ema, notes = key == "ema", []
    matches = [state for state in usable if state.place == key]
    if not matches and key in ("ema", "model"):
        matches = [state for state in usable if state.is_ema == wants_ema]
    # A file without keys holds what it holds; of a training checkpoint, only the EMA is replaced.
    bare = len(usable) == 1 and not usable[0].place
    if not matches and (bare or wants_ema):
        matches = usable[:1]
        if matches and not bare:
            notes.append(f"{why or f'it has no {key!r} weights'}: took {usable[0].name!r}")
    if not matches:
        what = f"got {sorted(s.name for s in usable)}: choose one of these" if usable else why
        raise ValueError(f"{path} has no weights under {key!r}, {what}")
    # Under one key, Lightning keeps the network and its EMA.
    chosen = min(matches, key=lambda state: state.is_ema != wants_ema)
    if chosen.note:
        notes.append(chosen.note)
    if not notes and chosen.place not in (key, ""):
        notes.append(f"took {chosen.place!r} for {key!r}")
    if chosen.prefix:
        others = [state.name for state in usable if state is not chosen]
        also = f" (also there: {shorten(others)})" if others else ""
        notes.append(f"names read without their prefix {chosen.prefix!r}{also}")
    return chosen, f"{path}: {'; '.join(notes)}" if notes else ""
