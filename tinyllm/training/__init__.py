"""One training loop for every stage: schedules, optimizers, precision, exact resume."""
