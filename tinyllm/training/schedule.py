"""The learning rate as a pure function of the step: nothing to store, nothing to restore.

Step 0 is the first update. The warm-up gives it 1 / warmup_steps of the peak, not 0, so that no
step is wasted.
"""

import math

from tinyllm.training.params import TrainingParams


def lr_share(step: int, params: TrainingParams) -> float:
    """Return the learning rate of an update as a share of its peak, in [0, 1].

    Args:
        step: index of the update, from 0 to steps - 1.
        params: the schedule's name and its numbers.
    """
    if step < params.warmup_steps:
        return (step + 1) / params.warmup_steps
    if params.schedule == "cosine":
        share = cosine(step - params.warmup_steps, params.steps - params.warmup_steps)
    else:
        share = wsd(step, params.steps, params.decay_share)
    return params.min_lr_share + (1 - params.min_lr_share) * share


def cosine(step: int, n_steps: int) -> float:
    """Return half a cosine from 1 down to 0: 0.5 (1 + cos(pi step / n_steps)).

    Loshchilov & Hutter 2016, arXiv:1608.03983, eq. 5, without restarts. `cosine(5, 10)` is 0.5.
    """
    return 0.5 * (1 + math.cos(math.pi * step / max(n_steps, 1)))


def wsd(step: int, n_steps: int, decay_share: float) -> float:
    """Return 1 until the last `decay_share` of the steps, then a line that reaches 0 at the end.

    Warm-up, stable, decay: Hu et al. 2024, arXiv:2404.06395, section 4.2; with a linear decay as
    Hägele et al. 2024, arXiv:2405.18392, section 3. `wsd(8, 10, 0.4)` is 0.5.
    """
    n_decay = decay_share * n_steps
    return 1.0 if step < n_steps - n_decay else (n_steps - step) / n_decay
