"""The harness's side of a measuring process: start it, run rounds, end it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from types import TracebackType
from typing import TypeVar

import msgspec

from edgefg import errors
from edgefg.benchmarks.worker import BOOTSTRAP, Failure, MeasuringJob, Ready, Round, RoundResult
from edgefg.errors import EdgefgError, RuntimeUnavailableError

_Answer = TypeVar("_Answer", Ready, RoundResult)


class MeasuringProcess:
    """A fresh process with one artifact in it; a context manager.

    Args:
        job: the artifact, and how it is measured.

    Raises:
        EdgefgError: raised by the artifact's `Classifier` there.
        RuntimeUnavailableError: the process ended without an answer.
    """

    def __init__(self, job: MeasuringJob) -> None:
        self._path = job.path
        command = [sys.executable, "-c", BOOTSTRAP, msgspec.json.encode(job).decode()]
        start = time.perf_counter()
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            self.ready = self._answer(Ready)
        except BaseException:
            self.close()
            raise
        self.start_ms = (time.perf_counter() - start) * 1e3
        """From nothing to the first prediction, in milliseconds."""

    def run(self, turn: Round) -> RoundResult:
        """Run one round in the process and return its measurements."""
        assert self._process.stdin is not None  # Popen was told to make it
        with contextlib.suppress(BrokenPipeError):  # the answer will be missing too, and says more
            os.write(self._process.stdin.fileno(), msgspec.json.encode(turn) + b"\n")
        return self._answer(RoundResult)

    def close(self) -> None:
        """End the process. Idempotent."""
        self._process.kill()
        with self._process:  # closes the pipes and waits
            pass

    def _answer(self, kind: type[_Answer]) -> _Answer:
        assert self._process.stdout is not None  # Popen was told to make it
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeUnavailableError(
                f"the process that measured {self._path} ended with status {self._process.wait()} instead of an answer;"
                " see its message above (status -9 usually means too little memory)"
            )
        answer = msgspec.json.decode(line, type=Ready | RoundResult | Failure)
        if isinstance(answer, Failure):
            raise _error(answer)
        assert isinstance(answer, kind)  # the worker answers each question in its turn
        return answer

    def __enter__(self) -> MeasuringProcess:
        """Return the process itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        self.close()


def _error(failure: Failure) -> EdgefgError:
    """Recreate the exception that was raised in the other process."""
    kind = getattr(errors, failure.kind, None)
    if isinstance(kind, type) and issubclass(kind, EdgefgError):
        return kind(failure.message)
    return EdgefgError(failure.message)
