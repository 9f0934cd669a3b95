"""Keras optimizers, with weight decay on kernels only and EMA weights kept apart."""

import keras

from keras_mixer.compute.private_apis import private


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
        clip_norm: float. Largest global norm of the gradients; 0 for no clipping.
        ema: float. Decay per step of the EMA of the weights; 0 for no EMA.
        scale_loss: bool. Use loss scaling, for float16. A step whose gradients overflow is skipped
            and does not count.
        rates: list of floats. Each weight's factor of the learning rate; None for 1. Applied after
            clipping, and to the weight decay, too. (Adafactor caps the product at 1/sqrt(step), as
            it does any learning rate.)

    Returns:
        A built `keras.optimizers.Optimizer`.
    """
    arguments = {"momentum": momentum} if name == "sgd" else {}
    if name == "muon":  # it uses Adam for weights that are no matrices, such as the stem
        arguments["adam_weight_decay"] = decay
    # Not keras.optimizers.get: it does not know Lamb (3.15.1).
    kind = next(k for n, k in vars(keras.optimizers).items() if n.lower() == name)
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
    # Keras overwrites the weights with the EMA at the end of every fit(), so a run that is stopped
    # and resumed would continue from other weights (https://github.com/keras-team/keras/issues/18949,
    # still so in 3.15.1). Here the EMA stays apart; `callbacks.use_ema_weights` swaps it in.
    optimizer.finalize_variable_values = lambda variables: None
    if scale_loss:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    optimizer.build(weights)
    return optimizer


class _Rated:
    """Mixin: an optimizer with a factor of the learning rate for every weight.

    Gradients are not multiplied instead: most optimizers normalize them, so a factor would cancel.
    """

    rates = ()

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient, variable, learning_rate * self._rate(variable))

    def _apply_weight_decay(self, variables):
        for variable in filter(private(self, "_use_weight_decay"), variables):
            share = self.learning_rate * self._rate(variable) * self.weight_decay
            variable.assign(variable - variable * share)

    def _rate(self, variable):
        return self.rates[private(self, "_get_variable_index")(variable)]


def _rated(kind, rates):
    """Returns a class of the same name and module, which name variables and saved optimizers."""
    private(kind, "_apply_weight_decay")  # which `_Rated` overrides
    return type(
        kind.__name__, (_Rated, kind), {"rates": tuple(rates), "__module__": kind.__module__}
    )


def ema_variables(optimizer):
    """Returns the EMA variables, in the order of the weights; [] without EMA."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return list(private(inner, "_model_variables_moving_average")) if inner.use_ema else []
