"""Runs `edgefg.export.tensorrt.worker` as a child process, with less workspace if memory runs out, and caches plans."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import tempfile
import typing
from collections.abc import Callable
from pathlib import Path

import msgspec

from edgefg.artifact.hashes import FileInfo
from edgefg.artifact.manifest import HardwareCompatible
from edgefg.cache import cache_directory
from edgefg.errors import BuildError, DataError, RuntimeUnavailableError
from edgefg.export.tensorrt.worker import BuildConfig, BuildDevice, BuildJob, BuildStep, Message, Outcome
from edgefg.files import atomic_file
from edgefg.log import get_logger

_log = get_logger(__name__)
_MIB = 1 << 20
_LEAST_WORKSPACE = 32
_MOST_CACHED = 8


def settings_of(
    batch: int, max_batch: int | None, hardware_compatible: str, workspace: int | None, optimization_level: int
) -> BuildConfig:
    """Return settings from options. Raises `DataError` if the options contradict each other."""
    most = max_batch or batch
    levels = typing.get_args(HardwareCompatible)
    if most < batch:
        raise DataError(f"--max-batch {most} is less than --batch {batch}; it must be at least as large")
    if hardware_compatible not in levels:
        raise DataError(f"--hardware-compatible {hardware_compatible!r}: choose one of {', '.join(levels)}")
    if not 0 <= optimization_level <= 5:
        raise DataError(f"--optimization-level {optimization_level}: choose 0 to 5")
    return BuildConfig(
        batches=None if most == 1 else (1, batch, most),
        hardware_compatible=typing.cast(HardwareCompatible, hardware_compatible),
        optimization_level=optimization_level,
        workspace=workspace,
    )


def describe() -> BuildDevice:
    """Describe this machine, by a child process, so that this one keeps no memory of the GPU's.

    Raises:
        RuntimeUnavailableError: TensorRT, CUDA's bindings or a GPU are missing.
    """
    messages: list[Message] = []
    _run(["describe"], messages.append)
    for message in messages:
        if isinstance(message, BuildDevice):
            return message
    reasons = [message.error for message in messages if isinstance(message, Outcome)]
    raise RuntimeUnavailableError(
        f"cannot build here: {reasons[0] if reasons else 'TensorRT crashed the process'}; see `edgefg doctor`"
    )


def cached_plan(onnx: FileInfo, precision: str, settings: BuildConfig, here: BuildDevice) -> Path | None:
    """Return the cache path of the plan of this build, whether it exists or not; None without a cache."""
    cache = cache_directory()
    return cache / "plans" / f"{_key(onnx, precision, settings, here)}.plan" if cache else None


def keep_plan(plan: Path, kept: Path | None) -> None:
    """Put a proven plan into the cache and drop the oldest. A full disk only costs the next build's time."""
    if kept is None:
        return
    try:
        with atomic_file(kept) as temporary:
            temporary.write_bytes(plan.read_bytes())
        older = sorted(kept.parent.glob("*.plan"), key=lambda path: path.stat().st_mtime)
        for path in older[:-_MOST_CACHED]:
            path.unlink()
    except OSError:
        return


def build_plan(onnx: Path, target: Path, precision: str, settings: BuildConfig, here: BuildDevice) -> None:
    """Write the plan of an ONNX file to ``target``.

    A build that runs out of memory is tried again with half the workspace, down to 32 MiB.

    Raises:
        BuildError: TensorRT failed, whatever the workspace; the message has its reason.
    """
    cache = cache_directory()
    timings = cache / "plans" / f"{_digest(here.gpu, here.compute_capability, here.tensorrt)}.timing" if cache else None
    job = BuildJob(
        onnx=str(onnx),
        target=str(target),
        precision=precision,
        settings=settings,
        workspace=settings.workspace or max(_LEAST_WORKSPACE, here.free * 3 // 4 // _MIB),
        timing_cache=str(timings) if timings else None,
    )
    _ladder(job)


def _ladder(job: BuildJob) -> None:
    """Build with less and less workspace until memory suffices."""
    while True:
        _log.info("building %s with %d MiB of workspace; this takes minutes", job.precision, job.workspace)
        outcome = _build(job)
        if outcome.built:
            return
        if not outcome.out_of_memory:
            raise BuildError(f"TensorRT could not build {job.onnx}: {outcome.error[:500]}")
        if job.workspace <= _LEAST_WORKSPACE:
            raise BuildError(
                f"there is too little memory to build {job.onnx}, even with {job.workspace} MiB of workspace"
                f" ({outcome.error[:300]}); stop what else uses the GPU, or add swap"
            )
        _log.warning("out of memory: %s", outcome.error[:200])
        job = msgspec.structs.replace(job, workspace=max(_LEAST_WORKSPACE, job.workspace // 2))


def _build(job: BuildJob) -> Outcome:
    outcomes: list[Outcome] = []
    shown: dict[str, int] = {}

    def hear(message: Message) -> None:
        if isinstance(message, Outcome):
            outcomes.append(message)
        elif isinstance(message, BuildStep):
            tenth = 10 * message.done // max(message.steps, 1)
            if shown.get(message.phase, 0) < tenth:
                shown[message.phase] = tenth
                _log.info("  %s: %d %%", message.phase, 10 * tenth)

    with tempfile.TemporaryDirectory(prefix="edgefg-") as folder:
        path = Path(folder) / "job.json"
        path.write_bytes(msgspec.json.encode(job))
        code = _run(["build", str(path)], hear)
    if outcomes:
        return outcomes[-1]
    # Where memory runs out altogether, Linux kills the process.
    name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    return Outcome(False, f"the build process ended with {name}", out_of_memory=code == -signal.SIGKILL)


def _run(arguments: list[str], hear: Callable[[Message], None]) -> int:
    """Run the child process, pass on its messages, and return its exit status."""
    decoder = msgspec.json.Decoder(Message)
    # Not by -m, which warns if the package has already imported the module.
    command = [sys.executable, "-c", "from edgefg.export.tensorrt.worker import main; main()", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as child:
        try:
            assert child.stdout is not None
            for line in child.stdout:
                try:
                    message = decoder.decode(line)
                except msgspec.DecodeError:  # a library that prints
                    continue
                hear(message)
            return child.wait()
        except BaseException:  # Ctrl-C included
            child.kill()
            raise


def _key(onnx: FileInfo, precision: str, settings: BuildConfig, here: BuildDevice) -> str:
    flags = msgspec.json.encode(settings).decode()
    return _digest(onnx.sha256, precision, flags, here.tensorrt, here.gpu, here.compute_capability)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
