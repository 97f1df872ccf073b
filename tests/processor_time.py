"""Time that a busy machine does not make longer."""

import resource


def processor_s() -> float:
    """Return the seconds that ended children have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
