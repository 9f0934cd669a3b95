"""MLP-Mixer as a functional Keras model: stem, mixer layers, head."""

import keras

from keras_mixer.model.architecture import Architecture
from keras_mixer.model.layers import LAYER_NORM_EPSILON, MixerBlock


def build_mixer(
    image_shape=None,
    patch_shape=None,
    *,
    channels=3,
    depth=None,
    dim=None,
    tokens_mlp_dim=None,
    channels_mlp_dim=None,
    num_classes=None,
    variant=None,
    activation="gelu",
    token_mixing=True,
    channel_mixing=True,
    dropout=0.0,
    stochastic_depth=0.0,
    head_bias=0.0,
    dtype=None,
    name="mlp_mixer",
):
    """Builds an MLP-Mixer.

    Args:
        image_shape: (height, width) of the images, in pixels. Defaults to the variant's 224×224.
        patch_shape: (height, width) of a patch, in pixels; divides `image_shape`.
        channels: int. Color channels of the images. Defaults to 3.
        depth: int. Number of mixer layers.
        dim: int. Channels C of every token.
        tokens_mlp_dim: int. Hidden width D_S of token mixing. Defaults to half of `dim`.
        channels_mlp_dim: int. Hidden width D_C of channel mixing. Defaults to `4 * dim`.
        num_classes: int. Number of classes; 0 omits the head, and the model returns pre-logits.
        variant: string, a key of `variants.VARIANTS` such as `"B/16"`, for all arguments above that
            are not given.
        activation: string. One of `variants.ACTIVATIONS`. Defaults to `"gelu"`, its tanh form.
        token_mixing: bool. False omits token mixing from every layer.
        channel_mixing: bool. False omits channel mixing from every layer.
        dropout: float in [0, 1). Dropout rate of both MLPs.
        stochastic_depth: float in [0, 1). Stochastic depth rate of the last layer; rises linearly
            from 0 at the first layer (paper appendix B).
        head_bias: float. Initial bias of the head. Defaults to 0.
        dtype: Keras dtype or policy of the body, such as `"mixed_bfloat16"`; pooling and head are
            always in float32. Defaults to Keras's global policy.
        name: string. Name of the model.

    Returns:
        A functional `keras.Model`: takes float images `(batch, height, width, channels)` in
        [-1, 1], as the official code, and returns float32 logits `(batch, num_classes)`, or
        pre-logits `(batch, dim)`.

    Raises:
        InputError: A `ValueError`, if a size is missing or out of range, if patches do not divide
            the image, or if the sizes together need more memory than any machine has.

    Example:
        >>> model = build_mixer(variant="B/16", num_classes=1000)
        >>> model.count_params()
        59880472

    Reference:
        Paper figure 1 and appendix E; `MlpMixer` of the official Flax code for the order of
        operations, LayerNorm's epsilon, the tanh GELU, lecun-normal kernels and the zero head.
    """
    architecture = Architecture.create(
        variant,
        image_shape=image_shape,
        patch_shape=patch_shape,
        channels=channels,
        depth=depth,
        dim=dim,
        tokens_mlp_dim=tokens_mlp_dim,
        channels_mlp_dim=channels_mlp_dim,
        num_classes=num_classes,
        activation=activation,
        token_mixing=token_mixing,
        channel_mixing=channel_mixing,
    )
    dim, depth = architecture.dim, architecture.depth

    images = keras.Input((*architecture.image_shape, architecture.channels), name="images")
    x = keras.layers.Conv2D(
        dim,
        architecture.patch_shape,
        strides=architecture.patch_shape,
        data_format="channels_last",  # whatever Keras is set to
        kernel_initializer="lecun_normal",
        dtype=dtype,
        name="stem",
    )(images)
    tokens = (architecture.patches, dim)  # row-major
    x = keras.layers.Reshape(tokens, dtype=dtype, name="tokens")(x)

    for index in range(depth):
        x = MixerBlock(
            architecture.tokens_mlp_dim,
            architecture.channels_mlp_dim,
            activation=architecture.activation,
            dropout=dropout,
            stochastic_depth=stochastic_depth * index / max(depth - 1, 1),
            token_mixing=architecture.token_mixing,
            channel_mixing=architecture.channel_mixing,
            dtype=dtype,
            name=f"mixer_block_{index}",
        )(x)  # (batch, patches, channels)

    x = keras.layers.LayerNormalization(
        epsilon=LAYER_NORM_EPSILON, dtype=dtype, name="pre_head_layer_norm"
    )(x)
    x = keras.layers.GlobalAveragePooling1D("channels_last", dtype="float32", name="pre_logits")(x)
    if architecture.num_classes:
        x = keras.layers.Dense(
            architecture.num_classes,
            kernel_initializer="zeros",
            bias_initializer=keras.initializers.Constant(head_bias),
            dtype="float32",
            name="head",
        )(x)
    return keras.Model(images, x, name=name)


def computed_by(mixin, model, values=None):
    """Returns a model with the same layers and weights whose class has a mixin, and attributes.

    Keras saves a model by the name of its class: the same as before, so files hold the plain model.
    """
    kind = type(model)
    values = {"__module__": kind.__module__, **(values or {})}
    return type(kind.__name__, (mixin, kind), values)(model.inputs, model.outputs, name=model.name)
