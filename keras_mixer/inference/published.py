"""Published accuracies of released weights, for `evaluate --expected=published`."""

from keras_mixer.errors import InputError
from keras_mixer.weights.registry import release_of


def published_accuracy(path, dataset, split="test"):
    """Returns the `registry.Published` accuracy of released weights on a dataset.

    Args:
        path: `official:NAME`, or the path of a released file, as `load_mixer` takes it.
        dataset: Name of the dataset.
        split: Name of the split. Published accuracies are on `test`.

    Raises:
        InputError: If none is known.
    """
    release = release_of(path)
    if release and split == "test" and dataset in release.published:
        return release.published[dataset]
    if release is None:
        known = "it is none of the released files, so no published accuracy is known"
    elif release.published:
        known = (
            f"its accuracy is published on the test split of {', '.join(release.published)} only"
        )
    else:
        known = f"no published accuracy of this file is known ({release.provenance})"
    raise InputError(f"{path}: {known}; give the expected accuracy, as in --expected=0.76")
