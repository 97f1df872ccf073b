"""Times on a card by its own clock, candidates in turns; on a CPU, where tests run it, by ours.

A candidate is captured as a CUDA graph: many kernels take less time than it takes to launch them.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Run = Callable[[], object]
Candidate = Run | Sequence[Run]
"""What is timed; several runs follow each other, each on memory of its own, so no cache helps."""


def in_turns(
    candidates: Mapping[str, Candidate], rounds: int, *, captured: bool = True
) -> dict[str, float]:
    """Return the median ms of a run of each candidate; the first two rounds do not count.

    What a library refuses (a width that cuDNN does not know) has no time: its name is left out.

    Args:
        candidates: by name.
        rounds: in which each has one turn.
        captured: as a graph, on a card; not for what asks the processor in between.
    """
    turns: dict[str, tuple[Run, int]] = {}
    for name, given in candidates.items():
        runs = list(given) if isinstance(given, Sequence) else [given]
        try:
            turns[name] = _prepare(runs, captured=captured), len(runs)
        except (RuntimeError, NotImplementedError) as error:
            print(f"  {name}: does not run: {str(error).splitlines()[0][:90]}")
    samples: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds + 2):
        for name, (run, n) in turns.items():
            samples[name].append(_time_ms(run) / n)
    return {name: round(statistics.median(taken[2:]), 5) for name, taken in samples.items()}


def _prepare(runs: Sequence[Run], *, captured: bool) -> Run:
    """Return all runs as one that has run before."""

    def all_runs() -> None:
        for run in runs:
            run()

    if not torch.cuda.is_available():
        all_runs()
        return all_runs
    beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(2):
            all_runs()
    torch.cuda.synchronize()
    if not captured:
        return all_runs
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_runs()
    return graph.replay


def _time_ms(run: Run) -> float:
    """Return the time of one run."""
    if not torch.cuda.is_available():
        started_s = time.perf_counter()
        run()
        return (time.perf_counter() - started_s) * 1e3
    begin, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
