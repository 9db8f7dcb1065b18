"""The fixtures of these tests."""

from tests.simulated.plans import built, plan, qdq

__all__ = ["built", "plan", "qdq"]
