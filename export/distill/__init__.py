"""Knowledge distillation from teachers to a student. Needs torch."""
