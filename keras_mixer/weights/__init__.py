"""From a checkpoint of any known format to a model, and back."""
