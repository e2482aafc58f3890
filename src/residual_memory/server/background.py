"""Work that takes longer than a request: begun by the first who asks, kept until it no longer fits."""

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Background(Generic[Result]):
    """One result at a time, worked out on a thread of its own.

    Parameters
    ----------
    work : takes what reports its progress from 0 to 1.
    fits : of what the result is; when this changes it is worked out anew, and the old one is given meanwhile.
    """

    def __init__(self, work: Callable[[Callable[[float], None]], Result], fits: Callable[[], Hashable]) -> None:
        self._work, self._fits = work, fits
        self._lock = threading.Lock()
        self._running = False
        self._of: Hashable = None
        self._result: Result | None = None
        self._error: Exception | None = None
        self.progress = 0.0

    @property
    def ready(self) -> bool:
        """Whether it has been worked out, be it of an earlier version."""
        with self._lock:
            return self._of is not None

    def get(self) -> Result | None:
        """What there is; None while the first is worked out.

        Raises
        ------
        Exception : what the work failed with.
        """
        with self._lock:
            wanted = self._fits()
            if self._of != wanted and not self._running:
                self._running, self.progress, self._error = True, 0.0, None
                threading.Thread(target=self._run, args=(wanted,), name="resmem-background", daemon=True).start()
            if self._error is not None:
                raise self._error
            return self._result

    def _run(self, wanted: Hashable) -> None:
        result: Result | None = None
        failed: Exception | None = None
        try:
            result = self._work(self._advance)
        except Exception as error:
            failed = error
        with self._lock:
            self._running, self._of, self._error = False, wanted, failed
            self._result = result if failed is None else self._result

    def _advance(self, done: float) -> None:
        self.progress = done
