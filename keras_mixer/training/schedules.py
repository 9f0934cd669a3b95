"""Learning-rate schedules: linear warm-up from 0, then cosine or linear decay to 0."""

import math

import keras
from keras import ops

# Fraction of the peak after a fraction t of the decay.
DECAYS = {"cosine": lambda t: 0.5 * (1 + ops.cos(math.pi * t)), "linear": lambda t: 1 - t}


@keras.saving.register_keras_serializable(package="keras_mixer")
class WarmupDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up followed by a decay to 0, evaluated at every optimizer step.

    ```
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * decay((step - warmup_steps) / (total_steps - warmup_steps))
    ```

    Args:
        peak: float. Learning rate at the end of the warm-up.
        warmup_steps: int. Optimizer steps of warm-up.
        total_steps: int. Optimizer steps in all; above `warmup_steps`.
        scheduler: string. A key of `DECAYS`. Defaults to `"cosine"`.

    Reference:
        Paper section 3 (pre-training: linear decay; fine-tuning: cosine).
    """

    def __init__(self, peak, warmup_steps, total_steps, scheduler="cosine"):
        super().__init__()
        self.peak = peak
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.scheduler = scheduler

    def __call__(self, step):
        step = ops.cast(step, "float32")
        rising = step / max(self.warmup_steps, 1)
        passed = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        falling = DECAYS[self.scheduler](ops.clip(passed, 0.0, 1.0))
        return self.peak * ops.where(step < self.warmup_steps, rising, falling)

    def get_config(self):
        return {
            "peak": self.peak,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
            "scheduler": self.scheduler,
        }
