"""Which objects a .pt file may hold besides tensors, and what they become: plain Python values.

`torch.load(weights_only=True)` builds nothing but tensors and plain containers. Training files of
others also hold bookkeeping: `argparse.Namespace`, paths, numpy scalars, OmegaConf containers.
Those names are bound here to stand-ins that only keep what they are given, so that not even numpy's
or OmegaConf's own code runs on a file's data (numpy's dtypes can be told to read raw bytes as
pointers). Any other class or function in a file is refused by torch.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import PurePosixPath

import torch
from torch import Tensor

_FORMATS = {
    **{"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q"},
    **{"u1": "B", "u2": "H", "u4": "I", "u8": "Q", "f2": "e", "f4": "f", "f8": "d"},
}
_OMEGACONF = (
    *("dictconfig.DictConfig", "listconfig.ListConfig"),
    *("base.ContainerMetadata", "base.Metadata", "nodes.AnyNode", "nodes.StringNode"),
    *("nodes.IntegerNode", "nodes.FloatNode", "nodes.BooleanNode", "nodes.PathNode"),
)
_BUILTINS = ("dict", "list", "tuple", "int", "float", "str", "bool")


class _Foreign:
    """An object of a class that is not built: what the file says of it, unused."""

    name = ""
    args: tuple[object, ...]
    state: Mapping[str, object]

    def __init__(self, *args: object) -> None:
        self.args, self.state = args, {}

    def __setstate__(self, state: object) -> None:
        self.state = state if isinstance(state, Mapping) else {}

    def __getattr__(self, name: str) -> object:  # NEWOBJ makes it without __init__
        if name in ("args", "state"):
            return () if name == "args" else {}
        raise AttributeError(name)


class _Dtype(_Foreign):
    """A numpy dtype: its code, such as "f8", and its byte order."""

    name, order = "numpy.dtype", "<"

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            self.order = ">"


class _Array(_Foreign):
    name = "numpy array"


def _scalar(dtype: object, data: object = None) -> object:
    """A numpy scalar as a Python number."""
    code = dtype.args[0] if isinstance(dtype, _Dtype) and dtype.args else None
    if code not in _FORMATS or not isinstance(data, bytes):
        return _Foreign()
    return struct.unpack(dtype.order + _FORMATS[code], data)[0]


def _array(*_args: object) -> _Array:
    return _Array()


def _path(*parts: str) -> str:
    return str(PurePosixPath(*parts)) if all(isinstance(part, str) for part in parts) else ""


def _dict(*_args: object) -> dict[object, object]:
    return {}


def _stand_in(full_name: str) -> type[_Foreign]:
    """A class for each name: a file may hold the class itself, whose name is all that is kept."""

    class StandIn(_Foreign):
        name = full_name

    return StandIn


_HARMLESS: dict[str, Callable[..., object]] = {
    "argparse.Namespace": argparse.Namespace,
    "collections.defaultdict": _dict,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,
    "typing.Any": _stand_in("typing.Any"),
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("_core", "core")},
    **{f"numpy.{core}.multiarray._reconstruct": _array for core in ("_core", "core")},
    **{
        f"pathlib.{local}{kind}": _path
        for local in ("", "_local.")  # Python 3.13 moved them there
        for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")
    },
    **{f"omegaconf.{name}": _stand_in(f"omegaconf.{name}") for name in _OMEGACONF},
    **{f"builtins.{name}": _stand_in(name) for name in _BUILTINS},
}


def harmless_globals() -> AbstractContextManager[None]:
    """Inside, `torch.load(weights_only=True)` takes the names above."""
    return torch.serialization.safe_globals([(value, name) for name, value in _HARMLESS.items()])


def plain(value: object) -> object:
    """Stand-ins turned into dicts, lists and numbers; tensors and containers of them as they are.

    An OmegaConf container becomes its dict or list with interpolations unresolved; what is not
    understood becomes a string that names its class.
    """
    if isinstance(value, argparse.Namespace):
        return plain(vars(value))
    if isinstance(value, _Foreign):
        if "_content" in value.state:
            return plain(value.state["_content"])
        return plain(value.state["_val"]) if "_val" in value.state else f"<{value.name}>"
    if isinstance(value, type) and issubclass(value, _Foreign):
        return f"<{value.name}>"
    if isinstance(value, dict):
        if all(isinstance(item, Tensor) for item in value.values()):
            return value  # a state dict, in the very class and order of the file
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    return value
