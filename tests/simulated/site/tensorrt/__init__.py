"""Stands for tensorrt in child processes: the simulation."""

import sys

from tests.simulated.install import modules_of_process

sys.modules[__name__] = modules_of_process()["tensorrt"]
