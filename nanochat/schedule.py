"""Learning rate, momentum and weight decay as pure functions of the step.

All three are fractions of the run, so a short run has the same shape as a long one.
"""


def lr_multiplier(
    step: int, num_steps: int, *, warmup: float, warmdown: float, final: float = 0.0
) -> float:
    """The factor on every learning rate at `step` in [0, num_steps): warm up, hold, cool down.

    `warmup` and `warmdown` are fractions of num_steps; the cool-down is linear and ends at `final`
    one step after the last. Never negative, and never 0 at the first step.

    >>> [lr_multiplier(s, 4, warmup=0.25, warmdown=0.5) for s in range(4)]
    [1.0, 1.0, 1.0, 0.5]
    """
    if num_steps < 1:
        raise ValueError(f"num_steps {num_steps} must be at least 1")
    step = min(max(step, 0), num_steps - 1)
    warmup_steps = round(warmup * num_steps)
    warmdown_steps = round(warmdown * num_steps)
    rise = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    remaining = num_steps - step
    if warmdown_steps and remaining < warmdown_steps:
        return min(rise, final + (1 - final) * remaining / warmdown_steps)
    return rise


def muon_momentum(
    step: int,
    num_steps: int,
    *,
    low: float,
    high: float,
    warmup: float = 0.1,
    cooldown: float = 0.02,
) -> float:
    """Momentum rising linearly from low to high, and back to low over the last steps.

    Early gradients are stale soon, so they are forgotten faster; at the end a shorter memory
    averages over the small steps only.
    """
    progress = min(max(step, 0), num_steps) / num_steps
    rise = min(1.0, progress / warmup) if warmup else 1.0
    fall = min(1.0, (1 - progress) / cooldown) if cooldown else 1.0
    return low + (high - low) * min(rise, fall)
