"""Cost of `import edgefg` on top of `import numpy`: time and resident memory.

    python -m edgefg.benchmarks.experiments.import_cost [--runs 15]

Each run is a pair of fresh processes: one imports only NumPy, the other imports NumPy and then edgefg. The time is
measured inside the second, around edgefg, so that it does not include NumPy. The memory is the difference between the
two. Prints a table of medians, then one JSON line.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import msgspec

from edgefg.benchmarks.device import load_average
from edgefg.benchmarks.report import json_line
from edgefg.benchmarks.stats import percentile
from edgefg.evaluation.tables import table

_SCRIPT = """
import sys, time
import numpy
start = time.perf_counter()
if sys.argv[1] == "edgefg":
    import edgefg
seconds = time.perf_counter() - start
modules = len(sys.modules)
import psutil
print(seconds * 1e3, psutil.Process().memory_info().rss, modules)
"""


class ImportCost(msgspec.Struct, frozen=True, kw_only=True):
    """Medians over the runs."""

    runs: int
    edgefg_ms: float
    """``import edgefg`` in a process that has NumPy already."""
    edgefg_ms_p90: float
    edgefg_bytes: int
    """Resident memory with both, minus that with only NumPy."""
    numpy_bytes: int
    """Resident memory of an interpreter with NumPy."""
    modules: int
    """Modules that ``import edgefg`` adds."""
    load_before: float | None


def measure_import(runs: int = 15) -> ImportCost:
    """Start ``runs`` pairs of processes, in turns, after one pair that fills the disk cache and writes bytecode.

    Memory is read by psutil (the extra ``bench``).
    """
    load_before = load_average()
    pairs = [(_start("numpy"), _start("edgefg")) for _ in range(runs + 1)][1:]
    milliseconds = [both[0] for _, both in pairs]
    return ImportCost(
        runs=runs,
        edgefg_ms=percentile(milliseconds, 50),
        edgefg_ms_p90=percentile(milliseconds, 90),
        edgefg_bytes=int(percentile([both[1] - alone[1] for alone, both in pairs], 50)),
        numpy_bytes=int(percentile([alone[1] for alone, _ in pairs], 50)),
        modules=int(pairs[0][1][2] - pairs[0][0][2]),
        load_before=load_before,
    )


def _start(what: str) -> tuple[float, float, float]:
    command = [sys.executable, "-c", _SCRIPT, what]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    milliseconds, memory, modules = map(float, output.split())
    return milliseconds, memory, modules


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m edgefg.benchmarks.experiments.import_cost")
    parser.add_argument("--runs", type=int, default=15)
    cost = measure_import(parser.parse_args().runs)
    row = {
        "import edgefg": "on top of import numpy",
        "p50 ms": f"{cost.edgefg_ms:.1f}",
        "p90 ms": f"{cost.edgefg_ms_p90:.1f}",
        "memory MB": f"{cost.edgefg_bytes / 1e6:.1f}",
        "modules": str(cost.modules),
    }
    print(table([row]))
    print(json_line(cost))


if __name__ == "__main__":
    main()
