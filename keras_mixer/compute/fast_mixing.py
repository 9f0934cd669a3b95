"""Fast mixing: mixer layers on a CPU, with the same outputs and gradients in less time.

Every batch is computed in parts, side by side, with a thread each, as threads that share an
operation wait for each other. In training, matrix products are TensorFlow's own (oneDNN, twice or
more as fast as XLA's in bfloat16). The operations between them are a few functions compiled by XLA,
which compute in float32 and write each result once. Gradients are written by hand, so that only
what they need is kept.
"""

import contextlib
import itertools
import os
import weakref

import keras
import tensorflow as tf

from keras_mixer.compute.environment import cores
from keras_mixer.model.layers import LAYER_NORM_EPSILON, MixerBlock, activation_function
from keras_mixer.model.mixer import computed_by

IMAGES_PER_PART = 8
_THREADS = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")  # environment variables
_FAST_MODELS = weakref.WeakKeyDictionary()  # of `fast_inference`, by model and parts
_compiled = tf.function(jit_compile=True, autograph=False)


class _FastMixing:
    """Mixin: a functional Mixer that computes its mixer layers by this module."""

    parts = 1
    remat = False

    def call(self, inputs, training=None, mask=None):
        parts = _split(inputs, self.parts)
        for layer in self.layers[1:]:  # a chain; the first is the input
            if isinstance(layer, MixerBlock):
                parts = self._block(layer, parts, training)
            else:
                parts = [layer(part, training=training) for part in parts]
        return tf.concat(parts, 0)

    def _block(self, layer, parts, training):
        if training:
            return mix(layer, parts, self.remat)
        return [infer(layer, part) for part in parts]


def use_fast_mixing(model, batch_size, remat=False):
    """Returns a model with the same layers and weights that computes by this module.

    It uses the same random numbers, too, but for dropout.

    Args:
        model: `keras.Model` from `build_mixer`, in float32 or mixed_bfloat16, on Keras's TensorFlow
            backend.
        batch_size: int, for `number_of_parts`.
        remat: bool. Compute the inside of mixer layers again in the backward pass; see `mix`.
    """
    values = {"parts": number_of_parts(batch_size), "remat": remat}
    return computed_by(_FastMixing, model, values)


def fast_inference(model, batch_size):
    """Returns a Mixer with the same outputs that is faster on a CPU; other models unchanged.

    The batch size is for `number_of_parts`.
    """
    is_mixer = any(isinstance(layer, MixerBlock) for layer in getattr(model, "layers", ()))
    on_gpu = bool(tf.config.list_physical_devices("GPU"))
    if on_gpu or not is_mixer or keras.backend.backend() != "tensorflow":
        return model
    models, parts = _FAST_MODELS.setdefault(model, {}), number_of_parts(batch_size)
    if parts not in models:
        models[parts] = use_fast_mixing(model, batch_size)
    return models[parts]


def number_of_parts(batch_size):
    """Returns the number of parts of a batch: one per core, of at least `IMAGES_PER_PART`."""
    return max(1, min(cores(), batch_size // IMAGES_PER_PART))


def use_threads_for(batch_size):
    """Sets the threads of every TensorFlow operation to those of a part: cores by parts.

    Does nothing if the user has set them, or TensorFlow has started its threads: then only the
    speed differs.
    """
    threading = tf.config.threading
    if any(name in os.environ for name in _THREADS) or threading.get_intra_op_parallelism_threads():
        return
    with contextlib.suppress(RuntimeError):  # TensorFlow has started its threads
        threading.set_inter_op_parallelism_threads(cores())
        threading.set_intra_op_parallelism_threads(max(1, cores() // number_of_parts(batch_size)))


def _split(x, parts):
    size = tf.shape(x)[0] if x.shape[0] is None else x.shape[0]
    bounds = [size * index // parts for index in range(parts + 1)]
    return [x[start:end] for start, end in itertools.pairwise(bounds)]


def infer(layer, inputs):
    """Computes a built `MixerBlock` in inference, by operations that TensorFlow fuses, without XLA.

    Inputs and outputs are tensors `(batch, patches, channels)` of the layer's compute dtype.
    """
    x = inputs
    for norm, mlp, _, tokens in _branches(layer):
        rows = _flat(_swap(norm(x), tokens))
        for dense, function in ((mlp.dense_0, mlp.activation), (mlp.dense_1, None)):
            kernel, bias = (tf.cast(w, rows.dtype) for w in (dense.kernel, dense.bias))
            rows = tf.nn.bias_add(tf.matmul(rows, kernel), bias)
            rows = activation_function(function)(rows) if function else rows
        x = x + _swap(_like(rows, x, tokens), tokens)
    return x


def _branches(layer):
    """Returns (norm, mlp, drop_path, whether across patches) of a layer's residual branches."""
    branches = []
    if layer.token_mixing:
        branches.append((layer.layer_norm_0, layer.tokens_mlp, layer.drop_path_0, True))
    if layer.channel_mixing:
        branches.append((layer.layer_norm_1, layer.channels_mlp, layer.drop_path_1, False))
    return branches


def mix(layer, parts, remat=False):
    """Computes a built `MixerBlock` in training.

    Stochastic depth uses the random numbers of the layer itself. Dropout uses others, from a faster
    generator, with the same seeds.

    Args:
        layer: `MixerBlock`.
        parts: list of tensors `(images, patches, channels)` of the layer's compute dtype, the parts
            of a batch.
        remat: bool. Keep the inputs of both branches (and masks of dropout) alone, and compute the
            rest again in the backward pass, with the same bits.

    Returns:
        A list of tensors of the same shapes and dtype.
    """
    for norm, mlp, drop_path, tokens in _branches(layer):
        weights = [tf.convert_to_tensor(w) for w in (norm.gamma, norm.beta)]
        for dense in (mlp.dense_0, mlp.dense_1):
            weights += [tf.cast(w, mlp.compute_dtype) for w in (dense.kernel, dense.bias)]
        masks = _sample_masks(parts, mlp, drop_path, tokens)
        compute = [_branch(mlp.activation, part_masks, tokens, remat) for part_masks in masks]
        parts = [f(part, *weights) for f, part in zip(compute, parts, strict=True)]
    return parts


def _branch(activation, masks, tokens, remat):
    """Returns `x + drop_path(mlp(norm(x)))` of a part, as a function of x and the weights."""
    hidden_mask, output_mask = masks.get("hidden"), masks.get("output")

    @tf.custom_gradient
    def compute(x, gamma, beta, kernel_0, bias_0, kernel_1, bias_1):
        def inside(x):
            rows = _normalize(x, gamma, beta, tokens)  # (rows, features)
            hidden = tf.matmul(rows, kernel_0)
            return rows, hidden, _activate(hidden, bias_0, hidden_mask, activation)

        kept = inside(x)
        output = _add(x, tf.matmul(kept[-1], kernel_1), bias_1, output_mask, tokens)

        def backward(d):
            with tf.control_dependencies([d] if remat else []):  # not before it is needed
                rows, hidden, active = inside(tf.identity(x)) if remat else kept
            d_rows = _to_rows(d, output_mask, tokens)
            d_active = tf.matmul(d_rows, kernel_1, transpose_b=True)
            d_hidden = _activate_back(hidden, bias_0, hidden_mask, d_active, activation)
            d_normalized = tf.matmul(d_hidden, kernel_0, transpose_b=True)
            dx, d_gamma, d_beta = _normalize_back(x, gamma, d_normalized, d, tokens)
            return (
                dx,
                *(tf.cast(_sum_rows(d), gamma.dtype) for d in (d_gamma, d_beta)),
                *(tf.matmul(rows, d_hidden, transpose_a=True), _sum_rows(d_hidden)),
                *(tf.matmul(active, d_rows, transpose_a=True), _sum_rows(d_rows)),
            )

        return output, backward

    return compute


def _sample_masks(parts, mlp, drop_path, tokens):
    """Returns the factors of dropout and stochastic depth by tensor, a dict for every part."""
    sizes = [tf.shape(part)[0] if part.shape[0] is None else part.shape[0] for part in parts]
    batch, dtype = sum(sizes), parts[0].dtype
    _, patches, channels = parts[0].shape
    rows, features = (channels, patches) if tokens else (patches, channels)
    masks = {}
    if mlp.dropout:
        shapes = {"hidden": (batch, rows, mlp.hidden_dim), "output": (batch, rows, features)}
        layers = (mlp.dropout_0, mlp.dropout_1)
        for (name, shape), layer in zip(shapes.items(), layers, strict=True):
            masks[name] = _dropout_mask(layer, shape, dtype)
    if drop_path.rate:
        kept = drop_path(tf.ones((batch, 1, 1), dtype), training=True)
        masks["output"] = kept * masks["output"] if masks else kept
    split = {name: tf.split(mask, sizes, num=len(sizes)) for name, mask in masks.items()}
    return [{name: masks[i] for name, masks in split.items()} for i in range(len(parts))]


def _dropout_mask(layer, shape, dtype):
    """Returns 1 / (1 - rate) where a dropout layer keeps a value, else 0; uses the layer's seed."""
    seed = tf.cast(layer.seed_generator.next(), tf.int32)
    return _sample_mask(seed, tf.stack(shape), 1.0 - layer.rate, dtype)


def _sum_rows(rows):
    """Returns the sum of all rows, as a product: faster than a reduction."""
    return tf.matmul(tf.ones((1, tf.shape(rows)[0]), rows.dtype), rows)[0]


# === Compiled by XLA ===


@_compiled
def _sample_mask(seed, shape, kept, dtype):
    """Samples a mask of dropout by Threefry: three times as fast as TensorFlow's own Philox."""
    uniform = tf.random.stateless_uniform(shape, seed, alg="threefry")
    return tf.cast(uniform < kept, dtype) * tf.cast(1 / kept, dtype)


def _up(x):
    return tf.cast(x, tf.float32)


def _down(x, dtype):
    """Rounds float32 to nearest even by integers: XLA's cast to bfloat16 is slower on a CPU.

    Infinity and NaN remain, but for a NaN whose highest 17 mantissa bits are all set; no arithmetic
    makes one.
    """
    if dtype != tf.bfloat16:
        return tf.cast(x, dtype)
    bits, half = tf.bitcast(x, tf.uint32), tf.constant(16, tf.uint32)
    odd = tf.bitwise.bitwise_and(tf.bitwise.right_shift(bits, half), tf.constant(1, tf.uint32))
    bits = tf.bitwise.right_shift(bits + odd + tf.constant(0x7FFF, tf.uint32), half)
    return tf.bitcast(tf.cast(bits, tf.uint16), tf.bfloat16)


def _mean(x):
    """Returns the mean over the last axis, in two steps: XLA does not vectorize it in one."""
    size = x.shape[-1]
    if size % 16 == 0:
        parts = tf.reshape(x, (*_shape(x)[:-1], size // 16, 16))
        x = tf.reduce_mean(parts, axis=-2)
    return tf.reduce_mean(x, axis=-1, keepdims=True)


def _shape(x):
    dynamic = tf.shape(x)
    return [dynamic[i] if size is None else size for i, size in enumerate(x.shape)]


def _standardize(x):
    """Returns a tensor with mean 0 and variance 1 over the last axis, and its factor."""
    centered = x - _mean(x)
    factor = tf.math.rsqrt(_mean(centered * centered) + LAYER_NORM_EPSILON)
    return centered * factor, factor


def _swap(x, tokens):
    return tf.transpose(x, (0, 2, 1)) if tokens else x


def _flat(x):
    return tf.reshape(x, (-1, x.shape[-1]))


def _like(rows, x, tokens):
    """Returns rows `(rows, features)` in the shape of `x`, `(batch, patches, channels)`."""
    batch, patches, channels = _shape(x)
    shape = (batch, channels, patches) if tokens else (batch, patches, channels)
    return tf.reshape(rows, shape)


@_compiled
def _normalize(x, gamma, beta, tokens):
    normalized, _ = _standardize(_up(x))
    y = _down(normalized * _up(gamma) + _up(beta), x.dtype)
    return _flat(_swap(y, tokens))


@_compiled
def _normalize_back(x, gamma, d_rows, d_skip, tokens):
    """Returns the gradient of the input, and the terms whose row sums are those of gamma, beta."""
    d = _swap(_like(d_rows, x, tokens), tokens)
    normalized, factor = _standardize(_up(x))
    inner = _up(d) * _up(gamma)
    dx = (inner - _mean(inner) - normalized * _mean(inner * normalized)) * factor
    terms = _down(_up(d) * normalized, x.dtype)
    return _down(_up(d_skip) + dx, x.dtype), _flat(terms), _flat(d)


@_compiled
def _activate(hidden, bias, mask, activation):
    y = activation_function(activation)(_up(hidden) + _up(bias))
    return _down(_masked(y, mask), hidden.dtype)


@_compiled
def _activate_back(hidden, bias, mask, d, activation):
    x = _up(hidden) + _up(bias)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = activation_function(activation)(x)
    return _down(tape.gradient(y, x, output_gradients=_masked(_up(d), mask)), hidden.dtype)


def _masked(rows, mask):
    return rows if mask is None else rows * _flat(_up(mask))


@_compiled
def _add(x, rows, bias, mask, tokens):
    y = _like(_up(rows) + _up(bias), x, tokens)
    if mask is not None:
        y = y * _up(mask)
    return _down(_up(x) + _swap(y, tokens), x.dtype)


@_compiled
def _to_rows(d, mask, tokens):
    rows = _swap(d, tokens)
    return _flat(rows if mask is None else _down(_up(rows) * _up(mask), d.dtype))
