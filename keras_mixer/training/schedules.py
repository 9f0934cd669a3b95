"""Learning-rate schedules: linear warm-up from 0, then a decay, drops, or a constant rate."""

import math

import keras
from keras import ops

# Fraction of the peak after the warm-up: functions of a `WarmupDecay` and the step.
DECAYS = {
    "cosine": lambda schedule, step: 0.5 * (1 + ops.cos(math.pi * schedule.passed(step))),
    "linear": lambda schedule, step: 1 - schedule.passed(step),
    "constant": lambda schedule, step: ops.ones_like(step),
    "step": lambda schedule, step: schedule.drop_factor ** ops.floor(step / schedule.drop_steps),
}


@keras.saving.register_keras_serializable(package="keras_mixer")
class WarmupDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up followed by a decay, evaluated at every optimizer step.

    During the warm-up it is `peak * step / warmup_steps`, then `peak` times one of `DECAYS`.

    Args:
        peak: float. Learning rate at the end of the warm-up.
        warmup_steps: int. Optimizer steps of warm-up.
        total_steps: int. Optimizer steps in all; above `warmup_steps`.
        scheduler: string. A key of `DECAYS`. Defaults to `"cosine"`.
        drop_steps: int. Optimizer steps between drops; required for `"step"`.
        drop_factor: float in (0, 1). Factor of each drop. Defaults to 0.1.

    Reference:
        Paper section 3 (pre-training: linear decay; fine-tuning: cosine).
    """

    def __init__(
        self, peak, warmup_steps, total_steps, scheduler="cosine", drop_steps=None, drop_factor=0.1
    ):
        super().__init__()
        self.peak = peak
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.scheduler = scheduler
        self.drop_steps = drop_steps
        self.drop_factor = drop_factor

    def __call__(self, step):
        step = ops.cast(step, "float32")
        rising = step / max(self.warmup_steps, 1)
        falling = DECAYS[self.scheduler](self, step)
        return self.peak * ops.where(step < self.warmup_steps, rising, falling)

    def passed(self, step):
        """Returns the fraction of the decay that has passed at a step, from 0 to 1."""
        passed = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return ops.clip(passed, 0.0, 1.0)

    def get_config(self):
        names = ("peak", "warmup_steps", "total_steps", "scheduler", "drop_steps", "drop_factor")
        return {name: getattr(self, name) for name in names}


def schedule_of(run):
    """Returns the `WarmupDecay` of a run."""
    config, drops = run.config, None
    if config.drop_every:
        drops = config.drop_every * run.total_steps // config.num_steps
    steps = run.warmup_steps, run.total_steps
    return WarmupDecay(config.lr, *steps, config.scheduler, drops, config.drop_factor)
