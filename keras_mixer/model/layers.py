"""Keras layers of MLP-Mixer (paper section 2), in keras.ops for every Keras backend."""

import functools

import keras
from keras import ops

from keras_mixer.model.variants import ACTIVATIONS

LAYER_NORM_EPSILON = 1e-6  # Flax's default, with which the official weights were trained

_FUNCTIONS = {
    "gelu": functools.partial(ops.gelu, approximate=True),
    "gelu_erf": functools.partial(ops.gelu, approximate=False),
    "relu": ops.relu,
    "silu": ops.silu,
    "tanh": ops.tanh,
}


def activation_function(name):
    """Returns an activation function by its name, one of `variants.ACTIVATIONS`."""
    if name not in _FUNCTIONS:
        raise ValueError(
            f"Unknown activation. Expected one of {', '.join(ACTIVATIONS)}. Received: {name!r}"
        )
    return _FUNCTIONS[name]


@keras.saving.register_keras_serializable(package="keras_mixer")
class MlpBlock(keras.layers.Layer):
    """Two dense layers over the last axis, with an activation in between.

    Dropout follows the activation and the second dense layer.

    Args:
        hidden_dim: int. Width of the hidden layer.
        activation: string. One of `variants.ACTIVATIONS`. Defaults to `"gelu"`.
        dropout: float in [0, 1). Dropout rate. Defaults to 0.

    Input shape:
        `(batch, ..., features)`; the last axis must be known.

    Output shape:
        The same as the input's.

    Reference:
        Paper section 2, equation 1; `MlpBlock` of the official Flax code.
    """

    def __init__(self, hidden_dim, activation="gelu", dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        self.hidden_dim = hidden_dim
        self.activation = activation
        self.dropout = dropout
        self._activate = activation_function(activation)

    def build(self, input_shape):
        features = input_shape[-1]
        self.dense_0 = self._dense(self.hidden_dim, "dense_0")
        self.dense_1 = self._dense(features, "dense_1")
        self.dropout_0 = keras.layers.Dropout(self.dropout, dtype=self.dtype_policy)
        self.dropout_1 = keras.layers.Dropout(self.dropout, dtype=self.dtype_policy)
        self.dense_0.build(input_shape)
        self.dense_1.build((*input_shape[:-1], self.hidden_dim))
        self.dropout_0.build((*input_shape[:-1], self.hidden_dim))  # `model.quantize` needs it
        self.dropout_1.build(input_shape)

    def _dense(self, units, name):
        return keras.layers.Dense(
            units, kernel_initializer="lecun_normal", dtype=self.dtype_policy, name=name
        )

    def call(self, inputs, training=None):
        x = self._activate(self.dense_0(inputs))
        x = self.dropout_0(x, training=training)
        x = self.dense_1(x)
        return self.dropout_1(x, training=training)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "hidden_dim": self.hidden_dim,
            "activation": self.activation,
            "dropout": self.dropout,
        }


@keras.saving.register_keras_serializable(package="keras_mixer")
class StochasticDepth(keras.layers.Layer):
    """Stochastic depth, or drop path: drops the residual branch of whole samples in training.

    The other samples are divided by the keep probability, as in Keras and timm, so that the
    expected output in training equals the output in inference. The official code (big_vision) does
    not rescale.

    Args:
        rate: float in [0, 1). Probability of dropping a sample's branch.
        seed: int or None. Random seed. Defaults to None.

    Input shape:
        `(batch, ...)`.

    Output shape:
        The same as the input's.

    Reference:
        Huang et al., "Deep Networks with Stochastic Depth", arXiv 1603.09382; paper appendix B.
    """

    def __init__(self, rate, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.rate = rate
        self.seed = seed
        if rate > 0:
            self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, inputs, training=None):
        if not training or self.rate == 0:
            return inputs
        shape = (ops.shape(inputs)[0], *(1,) * (len(inputs.shape) - 1))  # per sample
        samples = keras.random.uniform(shape, dtype="float32", seed=self.seed_generator)
        keep = ops.cast(samples >= self.rate, inputs.dtype)
        return inputs * keep / (1 - self.rate)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}


@keras.saving.register_keras_serializable(package="keras_mixer")
class MixerBlock(keras.layers.Layer):
    """One mixer layer: token mixing across patches, then channel mixing within each patch.

    ```
    x = x + transpose(token_mixing(transpose(layer_norm_0(x))))
    x = x + channel_mixing(layer_norm_1(x))
    ```

    Args:
        tokens_mlp_dim: int. Hidden width D_S of token mixing.
        channels_mlp_dim: int. Hidden width D_C of channel mixing.
        activation: string. One of `variants.ACTIVATIONS`. Defaults to `"gelu"`.
        dropout: float in [0, 1). Dropout rate of both MLPs. Defaults to 0.
        stochastic_depth: float in [0, 1). Rate of `StochasticDepth`, which is sampled independently
            for the two branches. Defaults to 0.
        token_mixing: bool. False omits token mixing and its LayerNorm. Defaults to True.
        channel_mixing: bool. False omits channel mixing and its LayerNorm. Defaults to True.

    Input shape:
        `(batch, patches, channels)`; only the batch size may be unknown.

    Output shape:
        `(batch, patches, channels)`.

    Reference:
        Paper section 2, figure 1; `MixerBlock` of the official Flax code.
    """

    def __init__(
        self,
        tokens_mlp_dim,
        channels_mlp_dim,
        activation="gelu",
        dropout=0.0,
        stochastic_depth=0.0,
        token_mixing=True,
        channel_mixing=True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.tokens_mlp_dim = tokens_mlp_dim
        self.channels_mlp_dim = channels_mlp_dim
        self.activation = activation
        self.dropout = dropout
        self.stochastic_depth = stochastic_depth
        self.token_mixing = token_mixing
        self.channel_mixing = channel_mixing

    def build(self, input_shape):
        batch, patches, channels = input_shape
        if self.token_mixing:
            self.layer_norm_0 = self._layer_norm("layer_norm_0", input_shape)
            self.tokens_mlp = self._mlp("token_mixing", self.tokens_mlp_dim)
            self.tokens_mlp.build((batch, channels, patches))
            self.drop_path_0 = self._drop_path("drop_path_0", input_shape)
        if self.channel_mixing:
            self.layer_norm_1 = self._layer_norm("layer_norm_1", input_shape)
            self.channels_mlp = self._mlp("channel_mixing", self.channels_mlp_dim)
            self.channels_mlp.build(input_shape)
            self.drop_path_1 = self._drop_path("drop_path_1", input_shape)

    def _layer_norm(self, name, input_shape):
        layer = keras.layers.LayerNormalization(
            epsilon=LAYER_NORM_EPSILON, dtype=self.dtype_policy, name=name
        )
        layer.build(input_shape)
        return layer

    def _mlp(self, name, hidden_dim):
        return MlpBlock(
            hidden_dim, self.activation, self.dropout, dtype=self.dtype_policy, name=name
        )

    def _drop_path(self, name, input_shape):
        layer = StochasticDepth(self.stochastic_depth, dtype=self.dtype_policy, name=name)
        layer.build(input_shape)
        return layer

    def call(self, inputs, training=None):
        x = inputs  # (batch, patches, channels)
        if self.token_mixing:
            y = ops.transpose(self.layer_norm_0(x), (0, 2, 1))  # (batch, channels, patches)
            y = self.tokens_mlp(y, training=training)
            y = ops.transpose(y, (0, 2, 1))  # (batch, patches, channels)
            x = x + self.drop_path_0(y, training=training)
        if self.channel_mixing:
            y = self.channels_mlp(self.layer_norm_1(x), training=training)
            x = x + self.drop_path_1(y, training=training)
        return x

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "tokens_mlp_dim": self.tokens_mlp_dim,
            "channels_mlp_dim": self.channels_mlp_dim,
            "activation": self.activation,
            "dropout": self.dropout,
            "stochastic_depth": self.stochastic_depth,
            "token_mixing": self.token_mixing,
            "channel_mixing": self.channel_mixing,
        }
