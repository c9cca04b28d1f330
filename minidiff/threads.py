"""Values that an object has in each thread. They are kept outside it, so its copies and pickles do not carry them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")

RUN: "ContextVar[Any]" = ContextVar("run", default=None)  # the pipeline's run that a network is computing a step of


class PerThread(Generic[T]):
    """One value per thread and owner, for as long as both are there."""

    def __init__(self) -> None:
        self._local = threading.local()

    def get(self, owner: object) -> T | None:
        """Return this thread's value of ``owner``, None if it has none."""
        return self._table().get(owner)

    def set(self, owner: object, value: T) -> None:
        """Give ``owner`` a value in this thread."""
        self._table()[owner] = value

    def _table(self) -> "WeakKeyDictionary[object, T]":
        if not hasattr(self._local, "table"):
            self._local.table = WeakKeyDictionary()
        return self._local.table


@contextmanager
def computing(run: Any) -> Iterator[None]:
    """Let what is called by this thread know, as ``RUN``, which run it computes a step of."""
    token = RUN.set(run)
    try:
        yield
    finally:
        RUN.reset(token)
