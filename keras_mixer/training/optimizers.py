"""Optimizers as Keras has them, with decay on kernels only and an average that stays apart."""

import keras


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
    rates=None,
):
    """Builds an optimizer for a model's weights.

    Args:
        name: string, one of `config.training.OPTIMIZERS`.
        learning_rate: float or a Keras schedule.
        weights: list of the model's trainable variables; decay applies to those called `kernel`.
        momentum: float. Momentum of sgd.
        decay: float. Decoupled weight decay, multiplied by the learning rate; 0 for none.
        clip_norm: float. Largest global norm of the gradients; 0 does not clip.
        ema: float. Decay per step of the moving average of the weights; 0 keeps none.
        scale_loss: bool. Scale the loss so that the gradients of float16 neither vanish nor
            overflow. A step whose gradients do overflow is left out, and counts for nothing.
        rates: list of floats, the share of the learning rate for each of the weights; None for all
            of it. Applied after clipping, and to the decay, too. (Adafactor caps what remains at
            1/sqrt(step), as it does any learning rate.)

    Returns:
        A built `keras.optimizers.Optimizer`.
    """
    arguments = {"momentum": momentum} if name == "sgd" else {}
    if name == "muon":  # it hands whatever is no matrix, such as the stem, to an Adam of its own
        arguments["adam_weight_decay"] = decay
    kind = type(keras.optimizers.get(name))
    kind = kind if rates is None else _rated(kind, rates)
    optimizer = kind(
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
    # still so in 3.15.1). Here the average stays apart; `callbacks.use_ema_weights` swaps it in.
    optimizer.finalize_variable_values = lambda variables: None
    if scale_loss:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    optimizer.build(weights)
    return optimizer


class _Rated:
    """An optimizer that trains every weight at its own share of the learning rate.

    It is the rate that is multiplied, not the gradient: most optimizers divide by the size of the
    gradients, so a factor of theirs would change nothing.
    """

    rates = ()

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient, variable, learning_rate * self._rate(variable))

    def _apply_weight_decay(self, variables):
        for variable in filter(self._use_weight_decay, variables):
            share = self.learning_rate * self._rate(variable) * self.weight_decay
            variable.assign(variable - variable * share)

    def _rate(self, variable):
        return self.rates[self._get_variable_index(variable)]


def _rated(kind, rates):
    """Returns an optimizer class of the same name, which is in the names of its variables."""
    return type(kind.__name__, (_Rated, kind), {"rates": tuple(rates)})


def ema_variables(optimizer):
    """Returns the variables of the moving average, in the order of the weights; [] without one."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return list(inner._model_variables_moving_average) if inner.use_ema else []
