"""Answers a question of test_backends.py in a process of its own: a process has one Keras backend.

    KERAS_BACKEND=jax python tests/on_backend.py QUESTION ANSWERS.npz [ARGUMENT...]
"""

import os
import sys

import numpy as np

from keras_mixer import build_mixer, load_mixer

BASE = {
    "image_shape": (8, 8), "patch_shape": (2, 2), "channels": 3, "depth": 2, "dim": 6,
    "tokens_mlp_dim": 5, "channels_mlp_dim": 7, "num_classes": 3,
}  # fmt: skip
ARCHITECTURES = {
    "square": {},
    "neither image nor patch square": {"image_shape": (8, 15), "patch_shape": (4, 3)},
    "gray": {"channels": 1},
    "token mixing only": {"channel_mixing": False},
    "channel mixing only": {"token_mixing": False},
    "one layer": {"depth": 1},
    **{name: {"activation": name} for name in ("gelu_erf", "relu", "silu", "tanh")},
}
BATCH = 4


def logits_and_gradients():
    """Answers with logits, loss and the loss's gradients by every weight and by the images."""
    differentiate = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[BACKEND]
    answers = {}
    for name, changed in ARCHITECTURES.items():
        model, images, targets = _case({**BASE, **changed})
        logits, gradients = differentiate(model, images, targets)
        paths = [variable.path for variable in model.trainable_variables]
        answers[f"{name}: logits"] = logits
        for path, gradient in zip([*paths, "images"], gradients, strict=True):
            answers[f"{name}: gradient by {path}"] = gradient
    return answers


def _case(architecture):
    """A model and inputs that are the same on every backend, and of a size that says something."""
    generator = np.random.default_rng(0)
    model = build_mixer(**architecture)
    for variable in model.weights:
        variable.assign(generator.normal(scale=0.4, size=variable.shape))
    images = generator.uniform(-1, 1, (BATCH, *model.input_shape[1:])).astype("float32")
    return model, images, np.eye(architecture["num_classes"], dtype="float32")[[0, 1, 2, 0]]


def _loss(logits, targets):
    from keras import ops

    return ops.mean(ops.categorical_crossentropy(targets, logits, from_logits=True))


def _tensorflow(model, images, targets):
    import tensorflow as tf

    images = tf.constant(images)
    with tf.GradientTape() as tape:
        tape.watch(images)
        logits = model(images)
        loss = _loss(logits, targets)
    weights = [variable.value for variable in model.trainable_variables]
    return logits, tape.gradient(loss, [*weights, images])


def _jax(model, images, targets):
    import jax

    def loss(weights, images):
        logits, _ = model.stateless_call(weights, [], images)
        return _loss(logits, targets), logits

    weights = [variable.value for variable in model.trainable_variables]
    gradients, logits = jax.grad(loss, argnums=(0, 1), has_aux=True)(weights, images)
    return logits, [*gradients[0], gradients[1]]


def _torch(model, images, targets):
    import torch

    images = torch.tensor(images, requires_grad=True)
    logits = model(images)
    weights = [variable.value for variable in model.trainable_variables]
    gradients = torch.autograd.grad(_loss(logits, torch.tensor(targets)), [*weights, images])
    return logits.detach(), gradients


def loaded(checkpoint, images):
    """Answers with what a checkpoint's model predicts and weighs, and with what was imported."""
    images = np.load(images)["images"]
    model = load_mixer(checkpoint, image_shape=images.shape[1:3])
    logits = model.predict(images, verbose=0)
    from keras_mixer.weights.load import model_weights
    from keras_mixer.weights.native import digest

    foreign = {"tensorflow", "jax", "torch"} - {BACKEND}
    return {
        "logits": logits,
        "digest": digest(model_weights(model)),
        "foreign": sorted(foreign & set(sys.modules)),
    }


def trained():
    """Answers with the losses of Keras's own `fit`, every source of randomness switched on."""
    import keras

    keras.utils.set_random_seed(0)
    labels = np.arange(64) % 3
    images = np.random.default_rng(0).normal(size=(64, 8, 8, 3)) * 0.1
    images[..., :] += labels[:, None, None, None] - 1.0
    model = build_mixer(**BASE, dropout=0.1, stochastic_depth=0.2)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.optimizer.learning_rate = 0.01
    history = model.fit(images, labels, batch_size=16, epochs=8, verbose=0)
    draws = [model(images[:4].astype("float32"), training=True) for _ in range(2)]
    return {
        "losses": history.history["loss"],
        "draws": [keras.ops.convert_to_numpy(draw) for draw in draws],
    }


if __name__ == "__main__":
    BACKEND = os.environ["KERAS_BACKEND"]
    question, answers, *arguments = sys.argv[1:]
    np.savez(answers, **globals()[question](*arguments))
