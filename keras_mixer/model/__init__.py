"""The Mixer model, its layers and its hyperparameters, on every Keras backend."""
