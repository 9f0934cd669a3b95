"""Builds and compiles the model of a run: weights to start from, optimizer, loss, metrics."""

import dataclasses

import keras

from keras_mixer.compute.tracing import forget_gradients
from keras_mixer.log import logger
from keras_mixer.model.baselines import build_model
from keras_mixer.training.finetuning import describe_trained, freeze_backbone, layer_rates
from keras_mixer.training.losses import KERAS_LOSSES
from keras_mixer.training.optimizers import build_optimizer
from keras_mixer.weights.load import assign_weights
from keras_mixer.weights.pretrained import adapt_pretrained, announce


def compile_model(run, plan, learning_rate, resumed=False):
    """Returns the compiled model of a run, and the variables of its metrics, the loss first.

    Args:
        run: `Run`.
        plan: `ComputePlan`.
        learning_rate: float or a Keras schedule.
        resumed: bool. Whether its weights will come from a checkpoint of the run.
    """
    model = _build(run, plan, resumed)
    forget_gradients(model)
    accuracy = keras.metrics.CategoricalAccuracy("accuracy")
    model.compile(
        _build_optimizer(run.config, model, learning_rate),
        KERAS_LOSSES[run.config.loss](),
        metrics=[accuracy],
        jit_compile=plan.jit_compile,
        auto_scale_loss=False,  # build_optimizer does it
    )
    return model, [*model.metrics[0].variables, *accuracy.variables]


def _build(run, plan, resumed):
    config = run.config
    model = build_model(
        run.spec.architecture,
        head_bias=config.head_bias,
        dropout=config.dropout,
        stochastic_depth=config.stochastic_depth,
        dtype=plan.policy,
    )
    if run.pretrained and not resumed:
        _assign_pretrained(run, model)
    if config.freeze == "backbone":
        freeze_backbone(model)
    return plan.prepare(model)


def _assign_pretrained(run, model):
    """Copies the pretrained weights into the model, adapted to its shapes."""
    config = run.config
    pretrained = announce(run.pretrained, config.checkpoint)
    shapes = config.image_shape, config.patch_shape
    adapted = adapt_pretrained(pretrained, *shapes, config.resize_tokens)
    new_head = adapted.spec.class_names != run.dataset.class_names
    assign_weights(model, adapted.arrays, config.checkpoint, new_head)
    run.pretrained.arrays.clear()  # frees up to a gigabyte
    if new_head:
        known = adapted.spec.class_names is not None
        reason = "was trained on other classes" if known else "does not name its classes"
        logger.info(f"new head: {config.checkpoint} {reason}")
    for name, value in dataclasses.asdict(adapted.spec.preprocessing).items():
        if value != (own := getattr(run.spec.preprocessing, name)):
            logger.info(
                f"{config.checkpoint} was trained with {name} {value}, this run has {own}; "
                f"--{name}={value} keeps it"
            )


def _build_optimizer(config, model, learning_rate):
    weights, rates = model.trainable_variables, None
    if config.layer_decay < 1:
        rates = layer_rates(weights, config.depth, config.layer_decay)
    logger.info(describe_trained(model, rates))
    return build_optimizer(
        config.optimizer,
        learning_rate,
        weights,
        momentum=config.momentum,
        decay=config.decay,
        clip_norm=config.clip_norm,
        ema=config.ema,
        scale_loss=config.precision == "float16",
        rates=rates,
    )
