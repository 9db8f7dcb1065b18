"""Measuring artifacts: latency, throughput, memory, cold start. No torch."""
