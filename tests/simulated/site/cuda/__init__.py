"""Stands for cuda-python in child processes: the simulation."""

from tests.simulated.install import install_in_child

install_in_child("cuda", "cuda.bindings", "cuda.bindings.runtime")
