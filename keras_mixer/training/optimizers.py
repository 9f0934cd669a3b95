"""Optimizers as Keras has them, with decay on kernels only and an average that stays apart."""

import keras

# All of Keras's but Ftrl, which computes weights from sums of gradients alone: its first step
# forgets what they were initialised with, or fine-tuned from.
OPTIMIZERS = {
    "sgd": keras.optimizers.SGD,
    "adam": keras.optimizers.Adam,
    "adamw": keras.optimizers.AdamW,
    "lion": keras.optimizers.Lion,
    "lamb": keras.optimizers.Lamb,
    "nadam": keras.optimizers.Nadam,
    "adamax": keras.optimizers.Adamax,
    "adagrad": keras.optimizers.Adagrad,
    "adadelta": keras.optimizers.Adadelta,
    "rmsprop": keras.optimizers.RMSprop,
    "adafactor": keras.optimizers.Adafactor,
    "muon": keras.optimizers.Muon,
}


def build_optimizer(
    name,
    learning_rate,
    weights,
    *,
    momentum=0.9,
    decay=0.0,
    clip_norm=0.0,
    ema=0.0,
    scale_loss=False,
):
    """Builds an optimizer for a model's weights.

    Args:
        name: string, a key of `OPTIMIZERS`.
        learning_rate: float or a Keras schedule.
        weights: list of the model's trainable variables; decay applies to those called `kernel`.
        momentum: float. Momentum of sgd.
        decay: float. Decoupled weight decay, multiplied by the learning rate; 0 for none.
        clip_norm: float. Largest global norm of the gradients; 0 does not clip.
        ema: float. Decay per step of the moving average of the weights; 0 keeps none.
        scale_loss: bool. Scale the loss so that the gradients of float16 neither vanish nor
            overflow. A step whose gradients do overflow is left out, and counts for nothing.

    Returns:
        A built `keras.optimizers.Optimizer`.
    """
    arguments = {"momentum": momentum} if name == "sgd" else {}
    if name == "muon":  # it hands whatever is no matrix, such as the stem, to an Adam of its own
        arguments["adam_weight_decay"] = decay
    optimizer = OPTIMIZERS[name](
        learning_rate,
        weight_decay=decay,
        global_clipnorm=clip_norm or None,
        use_ema=ema > 0,
        ema_momentum=ema or 0.99,
        **arguments,
    )
    optimizer.exclude_from_weight_decay([v for v in weights if v.name != "kernel"])
    # Keras copies the average over the weights at the end of every fit(), so a run that is stopped
    # and continued would go on from other weights (https://github.com/keras-team/keras/issues/18949,
    # still so in 3.15.1). Here the average stays apart; `callbacks.averaged` lends it out.
    optimizer.finalize_variable_values = lambda variables: None
    if scale_loss:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    optimizer.build(weights)
    return optimizer


def averaged_weights(optimizer):
    """Returns the variables of the moving average, in the order of the weights; [] without one."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return list(inner._model_variables_moving_average) if inner.use_ema else []
