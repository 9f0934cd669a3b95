"""Reads the dataset that needs no files: scikit-learn's 1,797 handwritten digits."""

import numpy as np

from keras_mixer.data.splits import ArrayImages


def read_digits(request):
    """Returns the class names and the images, not split yet."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]  # levels 0 to 16
    return request.row.class_names, {"all": ArrayImages(images, bunch.target.astype(np.int64))}
