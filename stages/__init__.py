"""One DVC stage per file, one Typer command per stage."""

import os

# Read by OpenMP when torch is loaded. Threads that spin while they wait made a training step seven
# times slower on a machine with anything else to do (3.7 s instead of 0.5 s).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
