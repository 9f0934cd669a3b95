"""Tests `keras_mixer/data/tfrecords.py` and `tfds.py`: tensorflow-datasets, without a network."""

import builtins
import dataclasses
import io
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from conftest import ROOT, SMALL
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

import keras_mixer
from keras_mixer.data.datasets import DATASETS, dataset_row
from keras_mixer.data.sources import open_dataset
from keras_mixer.data.splits import ArrayImages
from keras_mixer.data.tfds import flag_of
from keras_mixer.data.tfrecords import TFRecordStore, overlap
from keras_mixer.errors import InputError
from keras_mixer.inference.few_shot import score_few_shot
from keras_mixer.model.architecture import ModelSpec
from keras_mixer.preprocessing.bad_images import broken_images_named, find_bad
from keras_mixer.preprocessing.input_pipeline import evaluation_batches

SIZES = SMALL.replace(image_shape=(6, 5), patch_shape=(3, 5), channels=3, depth=1)


def write_set(
    directory,
    set_name="shapes",
    sizes=None,
    features=None,
    label=lambda index: index % 3,
    file_format="tfrecord",
    **kwargs,
):
    """Prepares a small set of tensorflow-datasets, each split in 3 files."""
    sizes = sizes or {"train": 21, "test": 9}
    features = features or {
        "image": tfds.features.Image(shape=(6, 5, 3), encoding_format="png"),
        "label": tfds.features.ClassLabel(names=["disc", "ring", "star"]),
        "number": tfds.features.Scalar(np.int64),
    }
    image = features.get("image")
    drawn = np.random.default_rng(0)

    def examples(split):
        for index in range(sizes[split]):
            values = {"label": label(index), "number": index}
            if image is not None:
                values["image"] = drawn.integers(0, 256, image.shape, image.np_dtype)
            yield index, {key: values.get(key, index) for key in features}

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = set_name
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), **kwargs
            )

        def _split_generators(self, dl_manager):
            return {split: examples(split) for split in sizes}

        def _generate_examples(self):
            pass

    Builder(data_dir=directory).download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=3), file_format=file_format
    )


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path_factory):
    def refuse(*arguments, **options):
        raise OSError("the network is off in this test")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("KERAS_MIXER_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Folder with a prepared set that no code is registered for."""
    directory = tmp_path_factory.mktemp("tfds")
    write_set(directory)
    return directory


@pytest.fixture
def own_shapes(shapes, tmp_path):
    """A copy that may be damaged, and the folder of its files."""
    shutil.copytree(shapes, tmp_path / "tfds")
    return tmp_path / "tfds", tmp_path / "tfds" / "shapes" / "1.0.0"


def load(directory, dataset="shapes", validation_fraction=0.0, **options):
    return open_dataset(dataset, directory, validation_fraction, **options)


def images_of(split):
    spec = ModelSpec(SIZES.replace(channels=split.channels))
    batches = [x for x, _ in evaluation_batches(split, spec, 4)]
    return np.round(np.concatenate(batches) * 127.5 + 127.5).astype(np.uint8)


def tfds_numpy(directory, expression, name="shapes"):
    builder = tfds.builder_from_directory(directory / name / "1.0.0")
    examples = list(builder.as_dataset(split=expression).as_numpy_iterator())
    return np.stack([e["image"] for e in examples]), np.array([e["label"] for e in examples])


# === The same records as tensorflow-datasets itself ===


@pytest.mark.parametrize(
    "expression",
    ["train", "train[:90%]", "train[5:17]", "train[-4:]", "test+train[:3]", "train[1shard]"],
)
def test_split_expressions_mean_what_they_mean_to_tfds(shapes, expression):
    part = "test" if "test" not in expression else "train[3:]"
    train = load(shapes, train_split=expression, test_split=part).train
    images, labels = tfds_numpy(shapes, expression)
    np.testing.assert_array_equal(images_of(train), images)
    np.testing.assert_array_equal(train.read_labels(), labels)


def test_prepared_data_need_neither_network_nor_code_nor_tensorflow(shapes):
    dataset = load(shapes)
    assert dataset.class_names == ("disc", "ring", "star")
    assert [len(dataset.train), dataset.validation, len(dataset.test)] == [21, None, 9]
    assert dataset.channels == 3
    assert len(os.listdir(shapes / "shapes" / "1.0.0")) >= 6, "several shards"
    code = (
        "import sys; from keras_mixer.data.sources import open_dataset; "
        f"open_dataset('shapes', {str(shapes)!r}); assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_name_may_have_a_version(shapes):
    assert load(shapes, "shapes:1.*.*").identity == load(shapes).identity
    with pytest.raises(InputError, match="--dataset=shapes:2"):
        load(shapes, "shapes:2.0.0")


def test_a_version_prepared_by_another_release_of_tfds_is_found(tmp_path, capsys):
    write_set(tmp_path, "cifar10")  # 1.0.0; the code that tfds has is for 3.0.2
    assert len(load(tmp_path, "cifar10").train) == 21
    assert "cifar10/1.0.0 is already prepared and will be used" in capsys.readouterr().err


def test_validation_is_set_aside_at_random_and_shares_no_image(shapes):
    dataset, again = load(shapes, validation_fraction=0.3), load(shapes, validation_fraction=0.3)
    other = load(shapes, validation_fraction=0.3, split_seed=1)
    assert [len(dataset.train), len(dataset.validation)] == [15, 6]
    both = np.concatenate([images_of(dataset.train), images_of(dataset.validation)])
    everything, _ = tfds_numpy(shapes, "train")
    assert {i.tobytes() for i in both} == {i.tobytes() for i in everything}
    assert dataset.identity == again.identity != other.identity
    with pytest.raises(
        InputError, match="--validation_fraction=0.01: .* of the 21 images .* aside 0"
    ):
        load(shapes, validation_fraction=0.01)


def test_a_single_split_is_divided(tmp_path):
    write_set(tmp_path, sizes={"train": 20})
    dataset = load(tmp_path, validation_fraction=0.25)
    assert [len(dataset.train), len(dataset.validation), len(dataset.test)] == [12, 4, 4]
    given = load(tmp_path, train_split="train[:50%]", test_split="train[50%:]")
    assert [len(given.train), given.validation, len(given.test)] == [10, None, 10]


def test_the_sets_validation_split_is_dropped_where_train_takes_it(tmp_path):
    write_set(tmp_path, sizes={"train": 6, "validation": 6, "test": 6})
    assert len(load(tmp_path).validation) == 6
    dataset = load(tmp_path, train_split="train+validation")
    assert [len(dataset.train), dataset.validation, len(dataset.test)] == [12, None, 6]


# === Refusals ===


@pytest.mark.parametrize(
    "splits, message",
    [
        (
            {"train_split": "train[:90%]", "validation_split": "train[80%:]"},
            r"--train_split=train\[:90%\] and --validation_split=train\[80%:\] have 2 images",
        ),
        ({"train_split": "train+test"}, "--test_split=test have 9 images in common"),
        ({"train_split": "train+train[:2]"}, "contains images twice"),
        ({"test_split": "trian"}, r"--test_split=trian: not a split .* train \(21\), test \(9\)"),
        ({"train_split": "train[:"}, r"--train_split=train\[:: not a split"),
        ({"train_split": "train[5:5]"}, r"train\[5:5\]: there are no images"),
    ],
)
def test_splits_are_checked(shapes, splits, message):
    with pytest.raises(InputError, match=message):
        load(shapes, **splits)


def test_split_flags_are_for_tfds_only():
    with pytest.raises(InputError, match="--test_split=test is for sets of tensorflow-datasets"):
        open_dataset("digits", test_split="test")
    assert [flag_of(name) for name in ("all", "test")] == ["train_split", "test_split"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("stanford_dog", "did you mean stanford_dogs"),
        ("fodler", "expected one of digits, .*did you mean folder"),
        ("a b", "--dataset=a b"),
        ("cifar10/none", "--dataset=cifar10/none"),
        ("photos", "for the images in photos give --dataset=folder --data_dir=photos"),
    ],
)
def test_unknown_names_are_refused(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path, name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["cifar10", "imagenet2012", "mnist"])
def test_what_cannot_be_prepared_is_explained_at_once(tmp_path, name):
    with pytest.raises(InputError, match=f"--dataset={name}: not in {tmp_path}.*--data_dir") as e:
        load(tmp_path, name)
    assert "\n" not in str(e.value)
    assert ("IDX" in str(e.value)) == (name == "mnist")
    assert ("ILSVRC2012" in str(e.value)) == (name == "imagenet2012")


def test_other_tasks_are_refused(tmp_path):
    text = {
        "text": tfds.features.Scalar(np.int64),
        "label": tfds.features.ClassLabel(num_classes=3),
    }
    write_set(tmp_path, "texts", features=text)
    with pytest.raises(InputError, match=r"texts: not a set .*label \(ClassLabel\), text"):
        load(tmp_path, "texts")


def test_images_of_other_kinds_are_refused(tmp_path):
    image = tfds.features.Image(shape=(6, 5, 4), encoding_format="png")
    label = tfds.features.ClassLabel(num_classes=3)
    write_set(tmp_path, "clear", features={"image": image, "label": label})
    with pytest.raises(InputError, match="expected images of 1 or 3 channels"):
        load(tmp_path, "clear")


def test_unlabeled_splits_are_refused(tmp_path):
    write_set(tmp_path, label=lambda index: -1)
    with pytest.raises(InputError, match="--train_split=train: its images have no labels"):
        load(tmp_path)


def test_gray_images_and_numbered_classes(tmp_path):
    image = tfds.features.Image(shape=(6, 5, 1), encoding_format="png")
    label = tfds.features.ClassLabel(num_classes=3)
    write_set(tmp_path, features={"image": image, "label": label})
    dataset = load(tmp_path)
    assert (dataset.channels, dataset.class_names) == (1, ("0", "1", "2"))
    np.testing.assert_array_equal(images_of(dataset.train), tfds_numpy(tmp_path, "train")[0])


def test_supervised_keys_choose_among_labels(tmp_path):
    features = {
        "image": tfds.features.Image(shape=(6, 5, 3), encoding_format="png"),
        "coarse": tfds.features.ClassLabel(num_classes=50),
        "label": tfds.features.ClassLabel(num_classes=3),
    }
    write_set(tmp_path, features=features, supervised_keys=("image", "label"))
    assert len(load(tmp_path).class_names) == 3


# === Files ===


def shard_of(folder, split="train", number=1):
    return next(folder.glob(f"*{split}.tfrecord-0000{number}*"))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: p.unlink(), "No such file"),
        (
            lambda p: p.write_bytes(p.read_bytes()[:-7]),
            "does not end where it should.*prepare the dataset",
        ),
        (lambda p: p.write_bytes(b"\xff" * 8 + p.read_bytes()[8:]), "length of record 0 is"),
        (lambda p: p.write_bytes(p.read_bytes() * 2), "holds 14 records, expected 7"),
    ],
)
def test_damaged_shards_are_named(own_shapes, damage, message):
    directory, folder = own_shapes
    load(directory)
    damage(shard_of(folder))
    with pytest.raises(InputError, match=f"00001-of-00003.*{message}"):
        load(directory)


def test_images_damaged_later_are_named(own_shapes):
    directory, folder = own_shapes
    split = load(directory).train.take(np.arange(20, -1, -1))
    content = bytearray(shard_of(folder).read_bytes())
    second = content.index(b"\x89PNG", content.index(b"\x89PNG") + 1)
    content[second : second + 4] = b"spam"
    shard_of(folder).write_bytes(content)
    message = r"prepare it again, .*: record 1 of .*00001-of-00003 \(its contents do not match"
    with pytest.raises(InputError, match=message), broken_images_named(split):
        images_of(split)


def test_every_flipped_bit_is_noticed(own_shapes):
    """In lengths when the set is opened, in contents and checksums when a record is read."""
    directory, folder = own_shapes
    content, dice = shard_of(folder).read_bytes(), random.Random(0)
    for place in [*range(12), *(dice.randrange(12, len(content)) for _ in range(150))]:
        changed = bytearray(content)
        changed[place] ^= 1 << dice.randrange(8)
        shard_of(folder).write_bytes(changed)
        with pytest.raises(InputError, match=r"00001-of-00003: damaged \("):
            load(directory).train.read_labels()


@pytest.mark.parametrize("label", [3, -2, 1 << 40])
def test_labels_without_a_class_are_named(shapes, tmp_path, label):
    """They would be classes of zeros in training."""
    record = tf_example_pb2.Example()
    record.features.feature["image"].bytes_list.value.append(load(shapes).train.content(0))
    record.features.feature["label"].int64_list.value.append(label)
    path = str(tmp_path / "x.tfrecord")
    with tf.io.TFRecordWriter(path) as writer:
        writer.write(record.SerializeToString())
    store = TFRecordStore("x", [(path, 0, 1, 1)])
    split = dataclasses.replace(load(shapes).train, store=store, numbers=np.arange(1))
    message = rf"record 0 of {path}: damaged \(label {label}, expected 0 to 2\)"
    with pytest.raises(InputError, match=message):
        split.read_labels()
    message = rf"record 0 of {path} \(label {label}, expected 0 to 2\)"
    with pytest.raises(InputError, match=message), broken_images_named(split):
        images_of(split)


def test_shards_cut_short_later_are_named(own_shapes):
    directory, folder = own_shapes
    split = load(directory).train
    shard_of(folder).write_bytes(b"")
    message = "00001-of-00003.*became shorter"
    with pytest.raises(InputError, match=message), broken_images_named(split):
        images_of(split)


def test_identity_follows_the_records_and_not_their_folder(own_shapes, shapes, tmp_path):
    before = load(shapes).identity
    assert load(own_shapes[0]).identity == before
    assert load(shapes, train_split="train[1:]").identity != before
    write_set(tmp_path / "other", sizes={"train": 22, "test": 9})
    assert load(tmp_path / "other").identity != before


def test_records_are_found_once_until_a_file_changes(own_shapes, monkeypatch):
    directory, folder = own_shapes
    opened = []

    def note(path, *arguments, open=open, **options):
        opened.extend([Path(path)] * (Path(path).parent == folder and "tfrecord" in str(path)))
        return open(path, *arguments, **options)

    def identity():
        opened.clear()
        return load(directory).identity

    monkeypatch.setattr(builtins, "open", note)
    before = identity()
    first = [shard_of(folder, split, 0) for split in ("train", "test")]  # for the first label
    assert sorted(opened) == sorted([*folder.glob("*.tfrecord-*"), *first])
    assert identity() == before
    assert opened == first
    os.utime(shard_of(folder), (1, 1))
    assert identity() == before
    assert sorted(opened) == sorted([*first, shard_of(folder)])
    monkeypatch.setenv("KERAS_MIXER_CACHE", os.devnull)  # nothing can be kept there
    assert identity() == before


@pytest.mark.parametrize(
    "content",
    [
        lambda bounds: np.zeros_like(bounds),
        lambda bounds: bounds + (np.arange(len(bounds)) == len(bounds) - 1),
        lambda bounds: np.r_[0, bounds[-2:0:-1], bounds[-1]],
    ],
)
def test_cached_offsets_that_cannot_be_right_are_found_again(shapes, content):
    before = load(shapes).identity
    kept = sorted(Path(os.environ["KERAS_MIXER_CACHE"]).glob("records/*.npz"))
    assert len(kept) == 6
    for path in kept:
        np.savez(path, bounds=content(np.load(path)["bounds"]))
    dataset = load(shapes)
    assert dataset.identity == before
    np.testing.assert_array_equal(images_of(dataset.train), tfds_numpy(shapes, "train")[0])


def test_array_records_are_read_too(tmp_path, shapes):
    pytest.importorskip("array_record")
    write_set(tmp_path, file_format="array_record")
    dataset, expected = (load(place, train_split="train[3:]") for place in (tmp_path, shapes))
    np.testing.assert_array_equal(images_of(dataset.train), images_of(expected.train))
    np.testing.assert_array_equal(dataset.train.read_labels(), expected.train.read_labels())
    assert dataset.identity != load(tmp_path).identity


def test_formats_without_random_access_are_refused(tmp_path):
    write_set(tmp_path, file_format="parquet")
    with pytest.raises(InputError, match="format that cannot be read in any order"):
        load(tmp_path)


def test_overlap_counts_records():
    one = [("a", 0, 10, 20), ("b", 5, 5, 10)]
    assert overlap(one, [("a", 8, 4, 20), ("b", 0, 6, 10), ("c", 0, 9, 9)]) == 3
    assert overlap(one, one) == 15


# === tfds's own mocking ===


@pytest.mark.parametrize(
    "name, classes",
    [("stanford_dogs", 120), ("cifar100", 100), ("oxford_flowers102", 102), ("mnist", 10)],
)
def test_mocked_data_are_read(name, classes):
    row = DATASETS[name]
    sizes = SMALL.replace(image_shape=row.image_shape, patch_shape=row.patch_shape)
    with tfds.testing.mock_data(num_examples=12):
        dataset = open_dataset(name, None, 0.25)
        images, labels = next(iter(evaluation_batches(dataset.train, ModelSpec(sizes), 4)))
    assert images.shape == (4, *row.image_shape, row.channels)
    np.testing.assert_array_equal(labels, dataset.train.read_labels()[:4])
    assert len(dataset.class_names) == classes


def test_a_whole_run_on_mocked_data(tmp_path):
    from keras_mixer.inference.evaluate import score_run

    with tfds.testing.mock_data(num_examples=20):
        config = keras_mixer.Config(
            dataset="cifar10", depth=1, dim=8, num_steps=2, warmup_step=0, jit="false",
            output_dir=str(tmp_path / "run"), export=False, batch_size=4,
        )  # fmt: skip
        run = keras_mixer.fit(config)
        assert set(score_run(run)) >= {"validation", "test"}


# === The table ===


def test_any_name_has_a_row():
    assert dataset_row("anything") == dataset_row("any/thing:1.0.0")
    assert dataset_row("anything").image_shape == (256, 256)
    assert dataset_row("cifar10:3.*.*") is DATASETS["cifar10"]
    assert dataset_row("digits/x").origin == "tfds", "only the very name is ours"
    names = tfds.list_builders(with_community_datasets=False)
    assert {name for name, row in DATASETS.items() if row.origin == "tfds"} <= set(names)


def test_few_shots_are_those_of_the_same_images_in_memory(shapes):
    """Labels lie with the records, so drawing them reads the records first."""
    dataset = load(shapes)
    in_memory = {
        name: ArrayImages(images_of(split), split.read_labels())
        for name, split in (("train", dataset.train), ("test", dataset.test))
    }
    model = keras_mixer.build_mixer(**vars(SIZES))
    model.spec = ModelSpec(SIZES)
    scores, expected = (
        score_few_shot(model, data, (2, 4), (0, 1), (1.0, 16.0))
        for data in (dataset, dataclasses.replace(dataset, **in_memory))
    )
    assert scores == expected
    assert [row["images"] for row in scores["shots"]] == [6, 12]


def rewritten(files, **changes):
    """Changes examples of the first shard by functions of their features; returns its path."""
    path = sorted(files.glob("*train*tfrecord*"))[0]
    examples = [tf.train.Example.FromString(r.numpy()) for r in tf.data.TFRecordDataset(str(path))]
    for number, change in changes.items():
        change(examples[int(number.removeprefix("record_"))].features.feature)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for example in examples:
            writer.write(example.SerializeToString())
    return path


def enlarge(features):
    """Makes an image a PNG of 200 million pixels, in 25 kB."""
    file = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(file, "PNG")
    features["image"].bytes_list.value[:] = [file.getvalue()]


def cut(features):
    features["image"].bytes_list.value[:] = [features["image"].bytes_list.value[0][:-30]]


def relabel(features):
    features["label"].int64_list.value[:] = [7]


def test_records_of_large_images_are_refused_by_their_header(own_shapes):
    directory, files = own_shapes
    rewritten(files, record_2=enlarge)
    split = load(directory).train
    message = r"1 unreadable image, .*: record 2 of .* \(.*more than 89478485 pixels"
    with pytest.raises(InputError, match=message), broken_images_named(split):
        images_of(split)


def test_records_are_skipped_by_checksum_label_and_pixels(own_shapes):
    directory, files = own_shapes
    path = rewritten(files, record_1=relabel, record_2=cut, record_3=enlarge)
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    dataset = open_dataset("shapes", directory, 0.0, find_bad=find_bad)
    assert [reason for _, reason in dataset.skipped] == [
        "its contents do not match its checksum", "label 7, expected 0 to 2", "truncated",
        "more than 89478485 pixels",
    ]  # fmt: skip
    assert len(dataset.train) == 17
    assert len(dataset.train.read_labels()) == 17


def label_twice(features):
    features["label"].int64_list.value.append(1)


def add_an_image(features):
    features["image"].bytes_list.value.append(b"x")


def remove_the_image(features):
    del features["image"].bytes_list.value[:]


@pytest.mark.parametrize(
    "change, reason",
    [
        (label_twice, "label 1, 1, expected 0 to 2"),
        (add_an_image, "it holds 2 images, expected one"),
        (remove_the_image, "it holds 0 images, expected one"),
    ],
)
def test_records_that_hold_no_single_value_are_damaged(own_shapes, change, reason):
    directory, files = own_shapes
    rewritten(files, record_2=change)
    assert [why for _, why in load(directory, find_bad=find_bad).skipped] == [reason]
    split = load(directory).train
    with (
        pytest.raises(InputError, match=rf"unreadable image.*\({reason}\)"),
        broken_images_named(split),
    ):
        images_of(split)


@pytest.mark.parametrize("number", [0, 3])
def test_damaged_array_records_are_named_or_skipped(tmp_path, number):
    write_set(tmp_path, file_format="array_record")
    path = sorted((tmp_path / "shapes" / "1.0.0").glob("*train*array_record*"))[0]
    content = bytearray(path.read_bytes())
    starts = [match.start() for match in re.finditer(b"PNG", content)]
    content[starts[number] + 40] ^= 255
    path.write_bytes(content)
    [(place, reason)] = load(tmp_path, find_bad=find_bad).skipped
    assert place == f"record {number} of shapes/1.0.0 train"
    assert "\n" not in reason
    split = load(tmp_path).train
    with (
        pytest.raises(InputError, match=rf"unreadable image.*: {place} \("),
        broken_images_named(split),
    ):
        images_of(split)
