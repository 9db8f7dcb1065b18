"""Stands for tensorrt in child processes: the simulation."""

from tests.simulated.install import install_in_child

install_in_child("tensorrt")
