"""Tests `keras_mixer/weights/`: whole or refused, never half."""

import json
import os
import shutil

import keras
import numpy as np
import pytest
from conftest import GOLDEN, SMALL, randomize

from keras_mixer import InputError, build_mixer, load_mixer
from keras_mixer.model.architecture import Architecture, ModelSpec, Preprocessing
from keras_mixer.weights import model_folder, official
from keras_mixer.weights.load import assign_weights, model_weights
from keras_mixer.weights.pretrained import read_pretrained

SPEC = ModelSpec(SMALL.replace(activation="silu"), ("a", "b", "ü"), Preprocessing(eval_crop=0.875))


@pytest.fixture
def model():
    return randomize(build_mixer(**vars(SPEC.architecture)))


@pytest.fixture
def saved(model, tmp_path):
    model_folder.write_spec(tmp_path, SPEC)
    model_folder.write_weights(tmp_path, model_weights(model), epoch=3)
    return tmp_path


def test_folder_gives_back_the_model(model, saved):
    images = np.random.default_rng(1).uniform(-1, 1, (2, 8, 12, 2)).astype("float32")
    again = load_mixer(saved)
    np.testing.assert_array_equal(again(images), model(images))
    assert again.spec == read_pretrained(saved).spec == SPEC
    arrays, metadata = model_folder.read_weights(saved)
    assert metadata == {"epoch": 3, "sha256": model_folder.digest(arrays)}
    assert model_folder.read_metadata(saved) == metadata


def test_overrides_leave_the_weights_alone(model, saved):
    half = load_mixer(saved, dtype="mixed_bfloat16", dropout=0.5)
    for one, other in zip(half.weights, model.weights, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("position", [0.05, 0.5, 0.999])
def test_flipped_bits_in_weights_are_noticed(saved, position):
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 4
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged|cannot be read"):
        load_mixer(saved)


@pytest.mark.parametrize(
    "change", [lambda a: a.astype("int8"), lambda a: a > 0, lambda a: a * np.nan]
)
def test_weights_that_are_no_finite_floats_are_refused(saved, change):
    arrays, _ = model_folder.read_weights(saved)
    model_folder.write_weights(saved, {name: change(array) for name, array in arrays.items()})
    with pytest.raises(InputError, match="contains NaN or infinity|is (int8|bool), expected"):
        load_mixer(saved)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_pipes_never_block(saved, name):
    (saved / name).unlink()
    os.mkfifo(saved / name)
    with pytest.raises(InputError, match="not a checkpoint|not a regular file"):
        load_mixer(saved)


def test_a_huge_spec_is_not_read(saved):
    os.truncate(saved / "model.json", 1 << 40)
    with pytest.raises(
        InputError, match=r"model\.json has 1,099,511,627,776 bytes, expected at most"
    ):
        load_mixer(saved)


def test_truncated_weights_are_noticed(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="cannot be read"):
        load_mixer(saved)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"format": 1}', '{"format": 9, "architecture": {}}']
)
def test_damaged_specs_are_noticed(saved, content):
    (saved / "model.json").write_text(content)
    with pytest.raises(InputError, match=r"model\.json: "):
        load_mixer(saved)


def test_everything_that_does_not_fit_is_listed(model):
    arrays = model_weights(model)
    arrays["extra/kernel"] = arrays.pop("stem/bias")
    arrays["head/bias"] = np.zeros(4)
    with pytest.raises(InputError) as error:
        assign_weights(model, arrays, "here")
    assert str(error.value) == (
        "here does not fit the model: - stem/bias; + extra/kernel; ! head/bias (4,), expected (3,)"
    )


def test_a_new_head_stays_zero(model):
    other = build_mixer(**vars(SPEC.architecture.replace(num_classes=7)))
    assign_weights(other, model_weights(model), "here", new_head=True)
    np.testing.assert_array_equal(other.get_layer("head").kernel, np.zeros((6, 7)))
    np.testing.assert_array_equal(other.get_layer("stem").kernel, model.get_layer("stem").kernel)


@pytest.mark.parametrize("num_classes", [0, 4])
def test_the_number_of_classes_may_be_another(model, saved, num_classes):
    """The body is kept; the head is new and zero, or left out."""
    image = np.ones((1, *model.input_shape[1:]))
    other = load_mixer(saved, num_classes=num_classes)
    body = [keras.Model(m.input, m.get_layer("pre_logits").output)(image) for m in (model, other)]
    np.testing.assert_array_equal(*body)
    np.testing.assert_array_equal(other(image), np.zeros((1, 4)) if num_classes else body[0])
    assert other.spec.architecture.num_classes == num_classes
    assert other.spec.class_names is None
    same = load_mixer(saved, num_classes=model.output_shape[1])
    np.testing.assert_array_equal(same(image), model(image))
    assert same.spec.class_names is not None


def test_one_number_is_a_square(saved):
    assert load_mixer(saved, 24, 4).input_shape == (None, 24, 24, 2)


def test_what_is_no_option_of_a_loaded_model_is_named(saved):
    with pytest.raises(InputError, match="load_mixer: expected only .*dropout.*received depth, w"):
        load_mixer(saved, depth=3, width=4)


def test_official_architecture_is_inferred():
    spec, arrays, _ = official.read(GOLDEN / "official_mixer.npz", (24, 16))
    assert spec == ModelSpec(
        Architecture(image_shape=(24, 16), patch_shape=(4, 4), depth=3, dim=24, num_classes=5,
                     channels_mlp_dim=48)
    )  # fmt: skip
    shapes = {v.path: tuple(v.shape) for v in build_mixer(**vars(spec.architecture)).weights}
    assert {name: array.shape for name, array in arrays.items()} == shapes


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "no such checkpoint"),
        ("https://example.org/x.npz", "only local files"),
        ("gs://bucket/x.npz", "only local files"),
        (
            str(GOLDEN),
            "not a checkpoint; expected a run directory, model folder, offi",
        ),
    ],
)
def test_what_is_no_checkpoint_is_refused(path, message):
    with pytest.raises(InputError, match=message):
        load_mixer(path)


def test_weights_of_another_model_are_refused(saved, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(saved, other, dirs_exist_ok=True)
    spec = json.loads((other / "model.json").read_text())
    spec["architecture"]["depth"] = 4
    (other / "model.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match="does not fit the model: - mixer_block_3/"):
        load_mixer(other)
