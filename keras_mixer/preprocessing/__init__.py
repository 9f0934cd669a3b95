"""From decoded images to batches that a model takes; TensorFlow begins here."""
