"""Gradient accumulation: one optimizer step from several micro-batches, to save memory.

Keras's `gradient_accumulation_steps` counts every micro-batch as a step of the learning-rate
schedule and of the EMA (3.15.1), so both run too fast. Here `model.fit` and the optimizer see whole
batches.
"""

import keras
import tensorflow as tf

from keras_mixer.compute.private_apis import private
from keras_mixer.model.mixer import computed_by


class _Accumulation:
    """Mixin: a functional model that sums the gradients of the micro-batches of every batch."""

    accumulated = 1

    def train_step(self, data):
        """Takes one optimizer step on a batch `(images, labels[, weights])`."""
        batch = [tensor for tensor in data if tensor is not None]
        size = batch[0].shape[0] // self.accumulated
        batch = [tf.reshape(t, (self.accumulated, size, *t.shape[1:])) for t in batch]
        loss, gradients, logits = self._add_up(batch, size)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        private(self, "_loss_tracker").update_state(loss, sample_weight=self.accumulated * size)
        x, y, *weights = (tf.reshape(t, (-1, *t.shape[2:])) for t in batch)
        return self.compute_metrics(x, y, logits, sample_weight=weights[0] if weights else None)

    def _add_up(self, batch, size):
        """Returns the mean loss, its gradients, and the logits in the order of the batch."""
        compute_loss = private(self, "_compute_loss")

        def add(index, loss, gradients, logits):
            x, y, *weights = (tf.gather(t, index) for t in batch)
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                sample_weight = weights[0] if weights else None
                whole = compute_loss(x, y, y_pred, sample_weight, training=True)
                share = whole / self.accumulated
                scaled = self.optimizer.scale_loss(share)
            added = tape.gradient(scaled, self.trainable_weights)
            gradients = [a + b for a, b in zip(gradients, added, strict=True)]
            return index + 1, loss + share, gradients, logits.write(index, y_pred)

        shape = (size, *self.output_shape[1:])
        state = (
            tf.constant(0),
            tf.constant(0.0),
            [tf.zeros(w.shape, w.dtype) for w in self.trainable_weights],
            tf.TensorArray(tf.float32, self.accumulated, element_shape=shape),
        )
        state = tf.while_loop(
            lambda index, *_: index < self.accumulated, add, state, parallel_iterations=1
        )
        _, loss, gradients, logits = state
        return loss, gradients, tf.reshape(logits.stack(), (-1, shape[-1]))


class _JaxAccumulation:
    """The same on Keras's JAX backend, whose training step has its state as an argument.

    A micro-batch takes every n-th image, so that devices that share a batch exchange no images.
    """

    accumulated = 1

    def train_step(self, state, data):
        """Takes one optimizer step; see `keras.Model.train_step` on this backend."""
        import jax

        weights, others, optimizer_variables, metrics = state
        batches = [self._split(tensor) for tensor in data if tensor is not None]
        compute = jax.value_and_grad(private(self, "compute_loss_and_updates"), has_aux=True)
        update_metrics = private(self, "_update_metrics_variables")

        def add(carry, batch):
            loss, gradients, others = carry
            (_, aux), added = compute(
                weights, others, metrics, *_x_y_weight(batch), True, optimizer_variables
            )
            added_loss, y_pred, others, _ = aux
            gradients = [a + b / self.accumulated for a, b in zip(gradients, added, strict=True)]
            return (loss + added_loss / self.accumulated, gradients, others), y_pred

        zeros = [jax.numpy.zeros_like(weight) for weight in weights]
        (loss, gradients, others), y_pred = jax.lax.scan(add, (0.0, zeros, others), batches)
        weights, optimizer_variables = self.optimizer.stateless_apply(
            optimizer_variables, gradients, weights
        )
        x, y, weight = _x_y_weight([self._join(tensor) for tensor in batches])
        logs, metrics = update_metrics(metrics, loss, x, y, self._join(y_pred), weight)
        return logs, (weights, others, optimizer_variables, metrics)

    def _split(self, tensor):
        return tensor.reshape(-1, self.accumulated, *tensor.shape[1:]).swapaxes(0, 1)

    def _join(self, tensor):
        return tensor.swapaxes(0, 1).reshape(-1, *tensor.shape[2:])


def _x_y_weight(tensors):
    x, y, *weights = tensors
    return x, y, weights[0] if weights else None


_KINDS = {"tensorflow": _Accumulation, "jax": _JaxAccumulation}


def accumulate_gradients(model, count):
    """Returns a model with the same layers and weights that splits each batch into micro-batches.

    The result equals that of the whole batch up to rounding. Random numbers, as of dropout, differ.
    The number of micro-batches must divide the batch size.
    """
    mixin = _KINDS[keras.backend.backend()]
    return computed_by(mixin, model, {"accumulated": count})
