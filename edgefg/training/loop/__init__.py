"""The training loop: optimiser, schedule, history, resume. Needs torch."""
