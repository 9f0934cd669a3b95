"""Gradient accumulation: one optimizer step computed in parts, when a batch exceeds the memory.

Keras's `gradient_accumulation_steps` counts every part as a step of the learning-rate schedule and
of the EMA (3.15.1), so both run too fast. Here `model.fit` and the optimizer see whole batches.
"""

import tensorflow as tf


class _Accumulation:
    """Mixin: a functional model that sums the gradients of equal parts of every batch.

    The result equals that of the whole batch up to rounding. Random draws, as of dropout, differ.
    """

    accumulated = 1

    def train_step(self, data):
        """Takes one optimizer step on a batch `(images, labels[, weights])`."""
        batch = [tensor for tensor in data if tensor is not None]
        size = batch[0].shape[0] // self.accumulated
        batch = [tf.reshape(t, (self.accumulated, size, *t.shape[1:])) for t in batch]
        loss, gradients, logits = self._add_up(batch, size)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        self._loss_tracker.update_state(loss, sample_weight=self.accumulated * size)
        x, y, *weights = (tf.reshape(t, (-1, *t.shape[2:])) for t in batch)
        return self.compute_metrics(x, y, logits, sample_weight=weights[0] if weights else None)

    def _add_up(self, batch, size):
        """Returns the mean loss, its gradients, and the logits in the order of the batch."""

        def add(index, loss, gradients, logits):
            x, y, *weights = (tf.gather(t, index) for t in batch)
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                sample_weight = weights[0] if weights else None
                part = (
                    self._compute_loss(x, y, y_pred, sample_weight, training=True)
                    / self.accumulated
                )
                scaled = self.optimizer.scale_loss(part)
            part_gradients = tape.gradient(scaled, self.trainable_weights)
            gradients = [a + b for a, b in zip(gradients, part_gradients, strict=True)]
            return index + 1, loss + part, gradients, logits.write(index, y_pred)

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


def accumulate_gradients(model, parts):
    """Returns a model that computes each batch in parts, and shares layers and weights of another.

    Args:
        model: functional `keras.Model`.
        parts: int. Number of parts; must divide the batch size.
    """
    kind = type("AccumulatingModel", (_Accumulation, type(model)), {"accumulated": parts})
    return kind(model.inputs, model.outputs, name=model.name)
