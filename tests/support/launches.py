"""How many kernels a piece of code would launch on a GPU, counted on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from benchmarks.census import FREE, TWO_LAUNCHES


class Launches(TorchDispatchMode):
    """Counts by name while it is entered and not `paused`.

    An operator of PyTorch below autograd that is no view and computes something is one launch, as
    in `benchmarks.census`. An operator of this library counts as the Triton kernels that it starts:
    in the interpreter they are started as they would be on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._paused = False

    def __enter__(self) -> Launches:
        self._start = start = GridExecutor.__call__

        def started(executor: GridExecutor, *args: object, **kwargs: object) -> object:
            self.counts[executor.fn.__name__] += not self._paused
            return start(executor, *args, **kwargs)

        GridExecutor.__call__ = started
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        GridExecutor.__call__ = self._start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Counts nothing in here."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if not (self._paused or func.is_view or name in FREE or func.namespace == "mixflow_fast"):
            self.counts[name] += 2 if name in TWO_LAUNCHES else 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """All launches."""
        return self.counts.total()


class Operators(TorchDispatchMode):
    """Names of the operators that are called while it is entered and not `paused`; no views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Notes nothing in here."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        bookkeeping = func.is_view or name.startswith(("detach", "_record_function"))
        if not (self._paused or bookkeeping):
            self.names.append(name)
        return func(*args, **(kwargs or {}))
