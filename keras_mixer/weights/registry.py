"""Official pretrained Mixers: the files, how they were trained and their published accuracy.

The files do not contain this, and other projects give some of them wrong names. Values that are
missing here were not found in any publication.

Sources: for names and sizes, the listing of the bucket in google-research/vision_transformer,
`vit_jax/vit_jax.ipynb`; for training, its README.md and the papers below.
"""

import math
from pathlib import Path
from typing import NamedTuple

SCHEME = "official:"
SERVER = "https://storage.googleapis.com/mixer_models"
CLASSES_1K, CLASSES_21K = 1000, 21843


class Published(NamedTuple):
    """A published accuracy.

    Attributes:
        top1: float. Top-1 accuracy as a fraction.
        source: The publication.
        preprocessing: How images were resized, if known.
        rounding: float. Half a unit of the last published digit, as a fraction.
    """

    top1: float
    source: str
    preprocessing: str
    rounding: float = 0.00005


class Release(NamedTuple):
    """An official checkpoint.

    Attributes:
        name: Folder and file, without suffix: `"imagenet21k/Mixer-B_16"`.
        size: float, in MiB, as published with two decimals.
        variant: Such as `"B/16"`.
        num_classes: int.
        pretraining: Dataset and method of its training.
        mislabeled: Wrong name given by another project, with a source; empty if none was found.
        published: dict from dataset to `Published` accuracy of the file itself.
        finetuned: dict from dataset, or `avg5`, to `Published` accuracy after fine-tuning; of files
            trained on `imagenet2012`, the entry of that dataset is their own accuracy.
    """

    name: str
    size: float
    variant: str
    num_classes: int
    pretraining: str
    mislabeled: str = ""
    published: dict[str, Published] = {}  # noqa: RUF012
    finetuned: dict[str, Published] = {}  # noqa: RUF012

    @property
    def sizes(self):
        """Smallest and largest size in bytes that round to `size`."""
        return math.ceil((self.size - 0.005) * 2**20), math.floor((self.size + 0.005) * 2**20)

    @property
    def provenance(self):
        """How it was trained and, if any, its wrong name, as text."""
        return "; ".join(filter(None, [f"trained on {self.pretraining}", self.mislabeled]))


_CROP = "short side to 256 pixels, central 224"
_PAPER = "Tolstikhin et al., arXiv 2105.01601, Table 3"
_README = "google-research/vision_transformer, README.md"


def _table_3(top1, average):
    """Returns the figures of Table 3; avg5: ImageNet, CIFAR-10, CIFAR-100, Pets and Flowers."""
    return {
        "imagenet2012": Published(top1, _PAPER, f"{_CROP} (appendix C)"),
        "avg5": Published(average, _PAPER, "224 pixels"),
    }


def _cifar10(top1):
    return {"cifar10": Published(top1, _README, "squashed to 224×224")}


_B16_1K, _L16_1K = _table_3(0.7644, 0.8833), _table_3(0.7176, 0.8725)
_B16_21K, _L16_21K = _table_3(0.8064, 0.9250), _table_3(0.8289, 0.9363)

_SAM_B16 = Published(
    0.774,
    "Chen et al., arXiv 2106.01548, as google-research/vision_transformer#134 quotes it, which "
    "measured 68.9% on this file",
    f"not said; taken to be {_CROP}",
    rounding=0.0005,
)
_SAM_B32 = Published(
    0.7247,
    "leondgarse/keras_cv_attention_models, keras_cv_attention_models/mlp_family/README.md",
    f"not said; taken to be {_CROP}",
)


_1K = "ImageNet-1k alone, with RandAugment, mixup and stochastic depth"
_21K = "ImageNet-21k, with RandAugment, mixup and stochastic depth, and not fine-tuned since"
_SAM = "ImageNet-1k alone, by SAM with Inception crops (arXiv 2106.01548)"
_GSAM = "ImageNet-1k alone, by GSAM (arXiv 2203.08065)"

_NOT_21K = (
    "timm's mixer_{}16_224.goog_in21k_ft_in1k, whose name says ImageNet-21k, is this file "
    "(huggingface/pytorch-image-models#651)"
)
_NOT_1K = (
    "keras_cv_attention_models lists it as fine-tuned on ImageNet, with the {} of a model that was "
    "never released (huggingface/pytorch-image-models#651)"
)

_RELEASES = (
    Release(
        "imagenet1k/Mixer-B_16", 228.47, "B/16", CLASSES_1K, _1K, _NOT_21K.format("b"),
        {"imagenet2012": _B16_1K["imagenet2012"]}, _B16_1K | _cifar10(0.9672),
    ),
    Release(
        "imagenet1k/Mixer-L_16", 794.29, "L/16", CLASSES_1K, _1K, _NOT_21K.format("l"),
        {"imagenet2012": _L16_1K["imagenet2012"]}, _L16_1K | _cifar10(0.9659),
    ),
    Release(
        "imagenet21k/Mixer-B_16", 289.61, "B/16", CLASSES_21K, _21K, _NOT_1K.format("80.64%"),
        {}, _B16_21K | _cifar10(0.9682),
    ),
    Release(
        "imagenet21k/Mixer-L_16", 875.78, "L/16", CLASSES_21K, _21K, "",
        {}, _L16_21K | _cifar10(0.9834),
    ),
    Release(
        "sam/Mixer-B_16", 228.47, "B/16", CLASSES_1K, _SAM, "", {"imagenet2012": _SAM_B16},
    ),
    Release(
        "sam/Mixer-B_32", 230.04, "B/32", CLASSES_1K, _SAM, "", {"imagenet2012": _SAM_B32},
    ),
    Release("gsam/Mixer-B_16", 228.47, "B/16", CLASSES_1K, _GSAM),
    Release("gsam/Mixer-B_32", 230.04, "B/32", CLASSES_1K, _GSAM),
    Release("gsam/Mixer-S_16", 70.71, "S/16", CLASSES_1K, _GSAM),
    Release("gsam/Mixer-S_32", 72.91, "S/32", CLASSES_1K, _GSAM),
    Release("gsam/Mixer-S_8", 78.79, "S/8", CLASSES_1K, _GSAM),
)  # fmt: skip

OFFICIAL = {release.name: release for release in _RELEASES}


def release_of(path):
    """Returns the `Release` of a path, or None.

    Args:
        path: `official:NAME`, or a path that ends in NAME.npz; if that file exists, its size must
            match.
    """
    if str(path).startswith(SCHEME):
        return OFFICIAL.get(str(path).removeprefix(SCHEME))
    path = Path(path)
    release = OFFICIAL.get("/".join(path.parts[-2:]).removesuffix(".npz"))
    if release is None or path.suffix != ".npz" or not path.is_file():
        return release if path.suffix == ".npz" else None
    low, high = release.sizes
    return release if low <= path.stat().st_size <= high else None
