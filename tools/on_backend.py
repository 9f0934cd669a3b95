"""Answers a question of test_backends.py in a process of its own: a process has one Keras backend.

KERAS_BACKEND=jax python tools/on_backend.py QUESTION ANSWERS.npz [ARGUMENT...]
"""

import argparse
import os
import sys

import numpy as np

from keras_mixer import build_mixer, load_mixer
from keras_mixer.model.architecture import Architecture

BASE = Architecture(
    image_shape=(8, 8), patch_shape=(2, 2), depth=2, dim=6, tokens_mlp_dim=5, channels_mlp_dim=7,
    num_classes=3,
)  # fmt: skip
ARCHITECTURES = {
    "square": {},
    "neither image nor patch square": {"image_shape": (8, 15), "patch_shape": (4, 3)},
    "gray": {"channels": 1},
    "token mixing only": {"channel_mixing": False},
    "channel mixing only": {"token_mixing": False},
    **{f"activation {name}": {"activation": name} for name in ("gelu_erf", "relu", "silu", "tanh")},
}
BATCH = 4


def logits_and_gradients():
    """Answers with logits, and gradients of a cross-entropy by every weight and by the images."""
    differentiate = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[BACKEND]
    answers = {}
    for name, changed in ARCHITECTURES.items():
        model, images, targets = _case(BASE.replace(**changed))
        logits, gradients = differentiate(model, images, targets)
        paths = [variable.path for variable in model.trainable_variables]
        answers[f"{name}: logits"] = logits
        for path, gradient in zip([*paths, "images"], gradients, strict=True):
            answers[f"{name}: gradient by {path}"] = gradient
    return answers


def _case(architecture):
    """A model and inputs that are the same on every backend, and of a size that says something."""
    generator = np.random.default_rng(0)
    model = build_mixer(**vars(architecture))
    for variable in model.weights:
        variable.assign(generator.normal(scale=0.4, size=variable.shape))
    images = generator.uniform(-1, 1, (BATCH, *model.input_shape[1:])).astype("float32")
    return model, images, np.eye(architecture.num_classes, dtype="float32")[[0, 1, 2, 0]]


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
    gradients, logits = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(weights, images)
    return logits, [*gradients[0], gradients[1]]


def _torch(model, images, targets):
    import torch

    images = torch.tensor(images, requires_grad=True)
    logits = model(images)
    weights = [variable.value for variable in model.trainable_variables]
    gradients = torch.autograd.grad(_loss(logits, torch.tensor(targets)), [*weights, images])
    return logits.detach(), gradients


def loaded(checkpoint, images):
    """Answers with what a checkpoint's model predicts and weighs, and what it took."""
    from keras_mixer.weights.load import model_weights
    from keras_mixer.weights.model_folder import digest

    images = np.load(images)["images"]
    model = load_mixer(checkpoint, image_shape=images.shape[1:3])
    return {
        "logits": model.predict(images, verbose=0),
        "sha256": digest(model_weights(model)),
        "tensorflow": "tensorflow" in sys.modules,
    }


def trained():
    """Answers with what Keras's own `fit` does: its losses, and its random states."""
    import keras

    keras.utils.set_random_seed(0)
    labels = np.arange(64) % 3
    noise = np.random.default_rng(0).normal(scale=0.1, size=(64, 8, 8, 3))
    model = build_mixer(**vars(BASE), dropout=0.1, stochastic_depth=0.2)
    model.compile(
        keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    before = _seeds(model)
    history = model.fit(
        labels[:, None, None, None] - 1 + noise, labels, batch_size=16, epochs=6, verbose=0
    )
    return {"losses": history.history["loss"], "before": before, "after": _seeds(model)}


def _seeds(model):
    """Stochastic depth's, in the last layer; on torch dropout draws from a generator of torch's."""
    block = model.get_layer("mixer_block_1")
    return [b.seed_generator.state.numpy() for b in (block.drop_path_0, block.drop_path_1)]


QUESTIONS = {f.__name__: f for f in (logits_and_gradients, loaded, trained)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("answers", help="file to write, .npz")
    parser.add_argument("arguments", nargs="*", help="of the question")
    words = parser.parse_args()
    BACKEND = os.environ["KERAS_BACKEND"]
    np.savez(words.answers, **QUESTIONS[words.question](*words.arguments))
