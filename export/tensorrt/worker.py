"""Builds a TensorRT plan in a process of its own, since a build that fails can crash its process.

`edgefg.export.tensorrt.builder` starts it, with the arguments ``describe`` or ``build job.json``. Each line on standard
output is one JSON message: `BuildDevice`, `BuildStep` or `Outcome`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgefg.artifact.manifest import Batches, HardwareCompatible
from edgefg.artifact.plan import OUT_OF_MEMORY
from edgefg.errors import EdgefgError, one_line
from edgefg.files import atomic_file
from edgefg.runtimes.cuda import describe_gpu

if TYPE_CHECKING:
    import tensorrt as trt

_MIB = 1 << 20


class BuildConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a build; the same settings on the same device give the cached plan."""

    batches: Batches | None = None
    """Smallest, usual and greatest batch, for a network with a free batch; None: 1, or the network's own."""
    hardware_compatible: HardwareCompatible = "none"
    optimization_level: int = 3
    """0 builds quickest, 5 searches longest; 3 is TensorRT's default."""
    workspace: int | None = None
    """Memory limit of a layer while it runs, MiB; None starts at three quarters of the free memory."""


class BuildJob(msgspec.Struct, frozen=True, kw_only=True):
    """One build."""

    onnx: str
    target: str
    """Path of the plan."""
    precision: str
    settings: BuildConfig
    workspace: int
    """Of this attempt, MiB."""
    timing_cache: str | None = None
    """File with the timings of kernels on this device, read and written."""


class BuildDevice(msgspec.Struct, frozen=True, tag="device"):
    """The GPU and TensorRT of this machine."""

    gpu: str
    compute_capability: str
    memory: int
    """Bytes, of which ``free`` are free."""
    free: int
    tensorrt: str


class BuildStep(msgspec.Struct, frozen=True, tag="step"):
    """Progress of a build."""

    phase: str
    done: int
    steps: int


class Outcome(msgspec.Struct, frozen=True, tag="outcome"):
    """Result of a build."""

    built: bool
    error: str = ""
    out_of_memory: bool = False


Message = BuildDevice | BuildStep | Outcome


def describe() -> BuildDevice:
    """Describe this machine. Raises `EdgefgError` if TensorRT cannot be used on it."""
    import tensorrt as trt

    device, free = describe_gpu()
    return BuildDevice(device.name, device.compute_capability, device.memory, free, trt.__version__)


def build(job: BuildJob, send: Callable[[Message], None]) -> Outcome:
    """Build one plan and write it to ``job.target``."""
    import tensorrt as trt

    errors: list[str] = []
    try:
        return _build(trt, job, send, errors)
    except (TypeError, RuntimeError) as exc:  # by pybind, if a constructor fails: no memory, no device
        return _failed([*errors, one_line(exc)])


def _failed(errors: list[str]) -> Outcome:
    said = "; ".join(errors[-3:]) or "TensorRT gave no reason"
    return Outcome(False, said, out_of_memory=any(OUT_OF_MEMORY.search(error) for error in errors))


def _build(trt: Any, job: BuildJob, send: Callable[[Message], None], errors: list[str]) -> Outcome:
    settings = job.settings
    logger = _logger(trt, errors)
    builder: trt.Builder = trt.Builder(logger)
    # Required on 10.x, ignored on 11, which knows no other kind.
    network: trt.INetworkDefinition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser: trt.OnnxParser = trt.OnnxParser(network, logger)
    if not parser.parse(Path(job.onnx).read_bytes()):
        found = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        return Outcome(False, f"TensorRT cannot read the network: {'; '.join(found) or 'it gave no reason'}")
    config: trt.IBuilderConfig = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace * _MIB)
    config.builder_optimization_level = settings.optimization_level
    monitor = _monitor(trt, send)  # held here, since the config does not promise to
    config.progress_monitor = monitor
    if job.precision == "fp32":
        # FP32 is FP32: TF32 keeps 10 bits of 23.
        config.clear_flag(trt.BuilderFlag.TF32)
    if settings.hardware_compatible != "none":
        levels, ampere = trt.HardwareCompatibilityLevel, settings.hardware_compatible == "ampere-plus"
        try:
            level = levels.AMPERE_PLUS if ampere else levels.SAME_COMPUTE_CAPABILITY
        except AttributeError:
            return Outcome(
                False, f"TensorRT {trt.__version__} knows no hardware compatibility {settings.hardware_compatible}"
            )
        config.hardware_compatibility_level = level
    refused = _add_profile(builder, network, config, settings.batches)
    if refused:
        return Outcome(False, refused)
    cache = _read_timings(config, job.timing_cache)
    plan: trt.IHostMemory | None = builder.build_serialized_network(network, config)
    _write_timings(cache, job.timing_cache)  # after a failure too: the next try is quicker
    if plan is None:
        return _failed(errors)
    with atomic_file(Path(job.target)) as temporary:
        temporary.write_bytes(plan)
    return Outcome(True)


def _add_profile(
    builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, batches: Batches | None
) -> str:
    """Add the profile of a network with a free batch; return the problem, or an empty string."""
    images: trt.ITensor = network.get_input(0)
    batch, *rest = tuple(images.shape)
    if batch >= 0:
        fits = batches is None or batches[1:] == (batch, batch)
        return "" if fits else f"the network's batch is {batch}, but batches of {batches} were asked for"
    profile: trt.IOptimizationProfile = builder.create_optimization_profile()
    profile.set_shape(images.name, *((size, *rest) for size in batches or (1, 1, 1)))
    if config.add_optimization_profile(profile) < 0:
        return f"TensorRT refused a profile of batches {batches}"
    return ""


def _read_timings(config: trt.IBuilderConfig, path: str | None) -> trt.ITimingCache | None:
    """Give the build the timings of earlier builds on this device, or an empty cache."""
    if path is None:
        return None
    try:
        known = Path(path).read_bytes()
    except OSError:
        known = b""
    cache: trt.ITimingCache | None = config.create_timing_cache(known)
    # Another device's measurements would choose the wrong kernels: a mismatch starts an empty cache.
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _write_timings(cache: trt.ITimingCache | None, path: str | None) -> None:
    if cache is None or path is None:
        return
    try:
        with atomic_file(Path(path)) as temporary:
            temporary.write_bytes(cache.serialize())
    except OSError:  # only the next build's speed is lost
        return


def _parser_error(error: trt.ParserError) -> str:
    where = f"{error.node_operator()} {error.node_name()}".strip()
    return " ".join(f"{where}: {error.desc()}".split())


def _monitor(trt: Any, send: Callable[[Message], None]) -> trt.IProgressMonitor:
    """Make a progress monitor that sends the steps of the outermost phase."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._outermost: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self._outermost[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._outermost:
                send(BuildStep(phase_name, step + 1, self._outermost[phase_name]))
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._outermost.pop(phase_name, None)

    return Monitor()


def _logger(trt: Any, errors: list[str]) -> trt.ILogger:
    """Make a logger that keeps the errors."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                errors.append(" ".join(msg.split()))

    return Logger()


def _send(message: Message) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    """Run from the command line."""
    try:
        if sys.argv[1] == "describe":
            _send(describe())
        else:
            _send(build(msgspec.json.decode(Path(sys.argv[2]).read_bytes(), type=BuildJob), _send))
    except (EdgefgError, ImportError, OSError) as exc:
        _send(Outcome(False, one_line(exc)))
