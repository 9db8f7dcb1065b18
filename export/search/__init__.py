"""The search for the best student within a latency budget. Needs torch."""
