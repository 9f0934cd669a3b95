"""What is computed: the Mixer and its layers, on every Keras backend."""
