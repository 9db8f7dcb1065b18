"""Stands for cuda-python in child processes: the simulation."""

import sys

from tests.simulated.install import modules_of_process

for _name, _module in modules_of_process().items():
    if _name.startswith("cuda"):
        sys.modules[_name] = _module
