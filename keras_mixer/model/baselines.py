"""Baseline models, an MLP and a small CNN, and `build_model` for any architecture."""

import keras

from keras_mixer.model.architecture import CNN_FILTERS
from keras_mixer.model.layers import activation_function
from keras_mixer.model.mixer import build_mixer
from keras_mixer.model.variants import MIXER


def build_model(architecture, **options):
    """Builds the Keras model of any architecture.

    Args:
        architecture: `Architecture` or `Baseline`.
        **options: `dropout`, `stochastic_depth` (ignored for a baseline), `head_bias`, `dtype`,
            `name`; see `build_mixer`.

    Returns:
        A functional `keras.Model`; see `build_mixer`.
    """
    if architecture.model == MIXER:
        return build_mixer(**vars(architecture), **options)
    options.pop("stochastic_depth", None)
    return build_baseline(architecture, **options)


def build_baseline(architecture, dropout=0.0, head_bias=0.0, dtype=None, name=None):
    """Builds an MLP on the pixels, or a small CNN.

    The MLP has `depth` dense layers of `dim` units, each followed by the activation and dropout.
    The CNN has two 3×3 convolutions, max pooling by 2 and half the dropout rate before them. With
    `depth=1, activation="relu"`, `dim=256` gives the MLP of a study of MNIST (see Reference), and
    `dim=128, dropout=0.5` the CNN of PyTorch's MNIST example. Kernel initializers are Keras's.

    Args:
        architecture: `Baseline`.
        dropout: float in [0, 1). Dropout rate after each dense layer.
        head_bias: float. Initial bias of the head.
        dtype: Keras dtype or policy of the body; the head is always in float32.
        name: string. Name of the model. Defaults to `"mlp"` or `"cnn"`.

    Returns:
        A functional `keras.Model`: takes float images `(batch, height, width, channels)` in
        [-1, 1] and returns float32 logits `(batch, num_classes)`, or pre-logits `(batch, dim)`.

    Reference:
        github.com/sijan67/Exploring-the-MLP-Mixer-Architecture, baselines;
        github.com/pytorch/examples, mnist/main.py.
    """
    images = keras.Input((*architecture.image_shape, architecture.channels), name="images")
    activate = activation_function(architecture.activation)
    x = images
    if architecture.model == "cnn":
        for index, filters in enumerate(CNN_FILTERS):
            x = keras.layers.Conv2D(
                filters,
                3,
                activation=activate,
                data_format="channels_last",
                dtype=dtype,
                name=f"conv_{index}",
            )(x)
        x = keras.layers.MaxPooling2D(data_format="channels_last", dtype=dtype, name="pool")(x)
        x = keras.layers.Dropout(dropout / 2, dtype=dtype, name="pool_dropout")(x)
    x = keras.layers.Flatten("channels_last", dtype=dtype, name="pixels")(x)
    for index in range(architecture.depth):
        x = keras.layers.Dense(
            architecture.dim, activation=activate, dtype=dtype, name=f"dense_{index}"
        )(x)
        x = keras.layers.Dropout(dropout, dtype=dtype, name=f"dropout_{index}")(x)
    x = keras.layers.Identity(dtype="float32", name="pre_logits")(x)
    if architecture.num_classes:
        bias = keras.initializers.Constant(head_bias)
        x = keras.layers.Dense(
            architecture.num_classes, bias_initializer=bias, dtype="float32", name="head"
        )(x)
    return keras.Model(images, x, name=name or architecture.model)
