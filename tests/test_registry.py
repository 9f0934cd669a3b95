"""Tests `keras_mixer/weights/registry.py`: what is written down about the released files."""

import math

import pytest

from keras_mixer.model.architecture import Architecture
from keras_mixer.weights.official import LINEN
from keras_mixer.weights.registry import OFFICIAL, release_of


def shapes_of(release):
    """The shapes of a release's variables, by the paper's table; S/8 is S/16 with other patches."""
    size, patch = release.variant.split("/")
    architecture = Architecture.create(
        f"{size}/16", patch_shape=(int(patch), int(patch)), num_classes=release.num_classes
    )
    return architecture.shapes


@pytest.mark.parametrize("release", OFFICIAL.values(), ids=OFFICIAL)
def test_sizes_are_those_of_the_architecture(release):
    """Four bytes a weight; around each array a header, a member's name twice, and zip's records."""
    shapes = shapes_of(release)
    weights = 4 * sum(map(math.prod, shapes.values()))
    names = sum(2 * len(f"{LINEN.rename(name)}.npy") for name in shapes)
    low, high = release.sizes
    least, most = 80 + 30 + 46, 128 + 20 + 24 + 30 + 46  # that NumPy and zip add to an array
    assert weights + names + least * len(shapes) + 22 <= high
    assert weights + names + most * len(shapes) + 22 >= low
    assert high - low == pytest.approx(0.01 * 2**20, abs=2)


def test_sizes_add_up_to_the_total_of_the_listing():
    """3,489,219,014 bytes, with an empty marker of a folder."""
    bounds = [release.sizes for release in OFFICIAL.values()]
    assert sum(low for low, _ in bounds) <= 3_489_219_014 <= sum(high for _, high in bounds)


def test_there_are_eleven_files_under_their_own_names():
    assert len(OFFICIAL) == 11
    for name, release in OFFICIAL.items():
        folder, _, file = name.partition("/")
        assert release.name == name
        assert file == f"Mixer-{release.variant.replace('/', '_')}"
        assert release.num_classes == (21843 if folder == "imagenet21k" else 1000)
        assert ("ImageNet-21k" in release.pretraining) == (folder == "imagenet21k")
        assert (" SAM" in release.pretraining) == (folder == "sam")
        assert ("GSAM" in release.pretraining) == (folder == "gsam")


def test_figures_are_fractions_with_sources():
    figures = [
        figure
        for release in OFFICIAL.values()
        for figure in (*release.published.values(), *release.finetuned.values())
    ]
    assert len(figures) == 4 + 4 * 3
    assert OFFICIAL["sam/Mixer-B_16"].published["imagenet2012"].rounding == 0.0005, "77.4%"
    for figure in figures:
        assert 0.7 < figure.top1 < 1 and figure.source and figure.preprocessing
        digits = 100 * figure.top1 / (200 * figure.rounding)
        assert digits == pytest.approx(round(digits), abs=1e-6), "it has the digits it says"


def test_what_was_not_published_is_not_claimed():
    for name, release in OFFICIAL.items():
        own = release.finetuned.get("imagenet2012")
        if name.startswith("imagenet1k/"):
            assert release.published == {"imagenet2012": own}, "of these files it is their own"
        if name.startswith(("imagenet21k/", "gsam/")):
            assert not release.published


@pytest.mark.parametrize("path, name", [
    ("official:sam/Mixer-B_32", "sam/Mixer-B_32"), ("official:sam/Mixer-B_32.npz", None),
    ("official:nothing", None), ("somewhere/sam/Mixer-B_32.npz", "sam/Mixer-B_32"),
    ("sam/Mixer-B_32", None), ("Mixer-B_32.npz", None), ("sam_Mixer-B_32.npz", None),
    ("sam/Mixer-B_32.npz/", "sam/Mixer-B_32"), ("gsam/Mixer-B_32.keras", None),
])  # fmt: skip
def test_releases_are_known_by_their_last_two_names(path, name):
    assert release_of(path) == OFFICIAL.get(name)


def test_a_file_of_another_size_is_another_file(tmp_path):
    path = tmp_path / "gsam" / "Mixer-S_16.npz"
    path.parent.mkdir()
    low, high = OFFICIAL["gsam/Mixer-S_16"].sizes
    for size, known in ((low - 1, False), (low, True), (high, True), (high + 1, False)):
        with open(path, "wb") as file:
            file.truncate(size)  # no disk is used
        assert (release_of(path) is not None) == known
    assert round(low / 2**20, 2) == round(high / 2**20, 2) == 70.71
    assert round((low - 1) / 2**20, 2) < 70.71 < round((high + 1) / 2**20, 2)


def test_wrong_names_are_told_where_they_were_found():
    assert "goog_in21k_ft_in1k" in OFFICIAL["imagenet1k/Mixer-L_16"].provenance
    assert "80.64%" in OFFICIAL["imagenet21k/Mixer-B_16"].provenance
    for release in OFFICIAL.values():
        assert not release.mislabeled or "#651" in release.mislabeled
        assert release.mislabeled in release.provenance
