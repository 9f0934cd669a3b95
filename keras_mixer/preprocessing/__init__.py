"""Decodes, resizes and augments images, and makes batches of them with tf.data."""
