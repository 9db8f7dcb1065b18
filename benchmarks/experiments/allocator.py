"""Training speed of EfficientNet-Lite0 at 128 px with freed memory kept in the process, against glibc's defaults.

    python -m edgefg.benchmarks.experiments.allocator [--rounds 3] [--steps 8]

Both take turns, each in a process of its own. Prints the images per CPU second of each round and the median ratio.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--keep", type=int, choices=(0, 1), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.keep is not None:
        print(images_per_second(bool(given.keep), given.steps))
        return
    command = [sys.executable, "-m", "edgefg.benchmarks.experiments.allocator", "--steps", str(given.steps)]
    ratios = []
    for _ in range(given.rounds):
        off, on = (
            float(subprocess.run([*command, "--keep", keep], check=True, capture_output=True).stdout) for keep in "01"
        )
        ratios.append(on / off)
        print(f"{off:.1f} → {on:.1f} images per CPU second: {on / off:.2f}×", flush=True)
    print(f"median {statistics.median(ratios):.2f}× ({min(ratios):.2f}–{max(ratios):.2f})")


def images_per_second(keep: bool, steps: int) -> float:
    """Train in this process; return images per CPU second, the first two steps left out."""
    import timm
    import torch

    from edgefg.training.allocator import keep_freed_memory

    if keep:
        keep_freed_memory()
    network = timm.create_model("tf_efficientnet_lite0", num_classes=81)
    optimizer = torch.optim.AdamW(network.parameters())
    images, labels = torch.randn(32, 3, 128, 128), torch.randint(0, 81, (32,))
    since = 0.0
    for step in range(steps + 2):
        if step == 2:
            since = time.process_time()
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return 32 * steps / (time.process_time() - since)


if __name__ == "__main__":
    main()
