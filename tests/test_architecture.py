"""Tests `keras_mixer/model/architecture.py`: complete and sensible, or refused in one line."""

import json

import numpy as np
import pytest
from conftest import SMALL

from keras_mixer import Config, InputError, build_mixer
from keras_mixer.__main__ import main
from keras_mixer.model.architecture import Architecture, ModelSpec, Preprocessing
from keras_mixer.model.variants import VARIANTS
from keras_mixer.weights import model_folder
from keras_mixer.weights.pretrained import read_pretrained

SPEC = ModelSpec(SMALL, ("a", "b", "ü"), Preprocessing(0.875, "bicubic"), "sigmoid", "trained on ü")
JSON = {
    "format": 2,
    "architecture": {
        "image_shape": [8, 12], "patch_shape": [4, 2], "channels": 2, "depth": 3, "dim": 6,
        "tokens_mlp_dim": 5, "channels_mlp_dim": 7, "num_classes": 3, "activation": "gelu",
        "token_mixing": True, "channel_mixing": True,
    },
    "class_names": ["a", "b", "ü"],
    "preprocessing": {"eval_crop": 0.875, "interpolation": "bicubic"},
    "loss": "sigmoid",
    "provenance": "trained on ü",
}  # fmt: skip


# === Sizes ===


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_have_the_parameters_of_the_paper(name):
    row = VARIANTS[name]
    architecture = Architecture.create(name, num_classes=1000)
    assert architecture.parameters == row.params_1000
    assert architecture.replace(num_classes=0).parameters == row.params_headless
    built = build_mixer(variant=name, depth=1, num_classes=0)
    assert built.count_params() == architecture.replace(depth=1, num_classes=0).parameters


@pytest.mark.parametrize("changed", [
    {}, {"depth": 1}, {"num_classes": 0}, {"channels": 1}, {"patch_shape": (8, 12)},
    {"patch_shape": (1, 1)}, {"token_mixing": False}, {"channel_mixing": False},
    {"token_mixing": False, "channel_mixing": False},
], ids=str)  # fmt: skip
def test_parameters_are_those_of_the_built_model(changed):
    architecture = SMALL.replace(**changed)
    assert build_mixer(**vars(architecture)).count_params() == architecture.parameters


@pytest.mark.parametrize("dim, tokens, channels", [(1, 1, 4), (2, 1, 8), (3, 1, 12), (8, 4, 32)])
def test_widths_default_to_multiples_of_dim(dim, tokens, channels):
    sizes = {"image_shape": (8, 8), "patch_shape": (4, 4), "depth": 1, "num_classes": 2}
    architecture = Architecture(dim=dim, **sizes)
    assert (architecture.tokens_mlp_dim, architecture.channels_mlp_dim) == (tokens, channels)
    assert build_mixer(dim=dim, **sizes).count_params() == architecture.parameters


def test_default_widths_are_those_of_the_paper():
    for name in VARIANTS:
        architecture = Architecture.create(name, num_classes=0)
        defaults = architecture.replace(tokens_mlp_dim=None, channels_mlp_dim=None)
        assert architecture == defaults


def test_a_variant_fills_what_is_not_given():
    assert Architecture.create("S/32", depth=1, patch_shape=None, num_classes=3) == Architecture(
        image_shape=(224, 224), patch_shape=(32, 32), depth=1, dim=512, tokens_mlp_dim=256,
        channels_mlp_dim=2048, num_classes=3,
    )  # fmt: skip
    assert (SMALL.grid, SMALL.patches) == ((2, 6), 12)


# === What is refused ===


@pytest.mark.parametrize("variant, message", [
    (None, "missing: image_shape, patch_shape, dim, num_classes; a variant gives all but num_clas"),
    ("B/16", "missing: num_classes; a variant"),
    ("B/17", r"Unknown variant. Expected one of S/32, .*, H/14. Received: 'B/17'"),
])  # fmt: skip
def test_missing_values_are_named(variant, message):
    with pytest.raises(InputError, match=message):
        Architecture.create(variant, depth=1)


@pytest.mark.parametrize("image_shape, patch_shape, side", [
    ((8, 8), (3, 3), "height 8 is no multiple of 3; the nearest that are: 6 and 9"),
    ((8, 12), (4, 5), "width 12 is no multiple of 5; the nearest that are: 10 and 15"),
    ((8, 2), (4, 5), "width 2 is no multiple of 5; the nearest that are: 5"),
])  # fmt: skip
def test_patches_that_do_not_divide_the_image_are_refused(image_shape, patch_shape, side):
    with pytest.raises(InputError) as error:
        SMALL.replace(image_shape=image_shape, patch_shape=patch_shape)
    assert str(error.value) == (
        f"patch_shape={patch_shape[0]},{patch_shape[1]} does not divide "
        f"image_shape={image_shape[0]},{image_shape[1]}: the {side}"
    )


SIZE, SIDES = "an integer from 1 to 1048576", "two positive integers, height and width"


@pytest.mark.parametrize("name, expected, values", [
    ("depth", "an integer from 1 to 1000", (0, -1, 1001, True, 1.0, "1", None, [1], float("nan"))),
    ("dim", SIZE, (0, (1 << 20) + 1, True, 6.0, np.float32(6), "6", None, [], {}, 10**4000)),
    ("channels", SIZE, (0, None)),
    ("tokens_mlp_dim", SIZE, (0, True)),
    ("channels_mlp_dim", SIZE, (0, 24.0)),
    ("num_classes", "an integer from 0 to 1048576", (-1, False, None)),
    ("image_shape", SIDES, (8, None, (8,), (8, 12, 3), "88", {8: 12}, np.array([8, 12]))),
    ("image_shape", SIZE, ((0, 12), (8, 12.0), (True, 12), ("8", "12"), ([8], [12]), (8, None))),
    ("patch_shape", SIDES, (4, [])),
    ("activation", "one of gelu, gelu_erf, relu, silu, tanh", ("geluu", None, ["gelu"], {}, 1)),
    ("token_mixing", "true or false", (1, 0, "true", None, np.True_)),
    ("channel_mixing", "true or false", (1, "x" * 1000)),
])  # fmt: skip
def test_values_of_other_types_and_sizes_are_refused(name, expected, values):
    for value in values:
        with pytest.raises(InputError) as error:
            SMALL.replace(**{name: value})
        assert str(error.value) == f"{name}: expected {expected}, received {value!r:.60}"


def test_lists_and_numpy_integers_are_sizes():
    sizes = vars(SMALL) | {"image_shape": [np.int64(8), 12], "dim": np.uint8(6)}
    architecture = Architecture(**sizes)
    assert architecture == SMALL
    assert json.loads(json.dumps(architecture.to_json())) == JSON["architecture"]


@pytest.mark.parametrize("changed, message", [
    ({"image_shape": (30_000, 30_000)}, "an image would have 1,800,000,000 values, expected at "),
    ({"image_shape": (1024, 1024), "patch_shape": (1, 1), "channels_mlp_dim": 2048},
     "a layer's activations would have 2,147,483,648 values, expected at most 1,073,741,824"),
    ({"dim": 1 << 18, "tokens_mlp_dim": 1 << 13},
     "a layer's activations would have 2,147,483,648 values, expected at most 1,073,741,824"),
    ({"depth": 1000, "dim": 1 << 13, "channels_mlp_dim": 1 << 14},
     "the weights would have 268,493,117,227 values, expected at most 34,359,738,368"),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_sizes_that_no_machine_can_hold_together_are_refused(changed, message):
    with pytest.raises(InputError, match=rf"^image_shape=\d+,\d+, .*: {message}.*; choose smaller"):
        SMALL.replace(**changed)


@pytest.mark.parametrize("shape", [(30_000, 30_000), (65_536, 65_536)])
def test_a_small_folder_that_declares_huge_images_is_refused(tmp_path, write_image, capfd, shape):
    """Without token mixing, its weights fit images of any size."""
    architecture = SMALL.replace(dim=1, depth=1, token_mixing=False)
    arrays = {name: np.zeros(s, "float32") for name, s in architecture.shapes.items()}
    folder = tmp_path / "model"
    model_folder.write(folder, ModelSpec(architecture), arrays)
    values = json.loads((folder / "model.json").read_text())
    values["architecture"]["image_shape"] = shape
    (folder / "model.json").write_text(json.dumps(values))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4096
    message = f"{folder}/model.json: image_shape={shape[0]},{shape[1]}, patch_shape=4,2, depth=1"
    with pytest.raises(InputError, match=f"^{message}, dim=1: an image would have"):
        read_pretrained(folder)
    write_image(tmp_path / "image.png")
    assert main(["predict", str(folder), str(tmp_path / "image.png")]) == 2
    out, err = capfd.readouterr()
    assert err.startswith(f"error: {message}") and err.count("\n") == 1 and not out


# === JSON ===


def test_json_is_that_of_this_format_and_comes_back():
    assert json.loads(json.dumps(SPEC.to_json())) == JSON
    assert ModelSpec.from_json(JSON) == SPEC
    assert Architecture.from_json(JSON["architecture"]) == SMALL
    headless = ModelSpec(SMALL.replace(num_classes=0, token_mixing=False))
    assert ModelSpec.from_json(json.loads(json.dumps(headless.to_json()))) == headless


def test_fields_with_defaults_may_be_missing():
    needed = ("image_shape", "patch_shape", "depth", "dim", "num_classes")
    sizes = {name: JSON["architecture"][name] for name in needed}
    spec = ModelSpec.from_json({"format": 2, "architecture": sizes})
    assert spec == ModelSpec(Architecture(**sizes))
    assert spec.architecture == Architecture(
        **sizes, channels=3, tokens_mlp_dim=3, channels_mlp_dim=24, activation="gelu",
        token_mixing=True, channel_mixing=True,
    )  # fmt: skip
    assert (spec.class_names, spec.preprocessing.eval_crop, spec.loss) == (None, 0.0, "softmax")
    assert spec.names == ("0", "1", "2")


def test_folders_written_before_there_was_bicubic_are_bilinear():
    spec = ModelSpec.from_json(JSON | {"preprocessing": {"eval_crop": 0.875}})
    assert spec.preprocessing == Preprocessing(0.875, "bilinear")


@pytest.mark.parametrize("name", ["image_shape", "patch_shape", "depth", "dim", "num_classes"])
def test_missing_fields_are_named(name):
    values = {key: value for key, value in JSON["architecture"].items() if key != name}
    with pytest.raises(InputError, match=f"^expected the fields image_shape, .*, missing: {name}$"):
        ModelSpec.from_json(JSON | {"architecture": values})


@pytest.mark.parametrize("values, message", [
    ({"format": 2}, "^expected the fields architecture, class_names, .*, missing: architecture$"),
    (JSON | {"mean": 0.5}, "^expected the fields architecture, .*, received .*, provenance, mean$"),
    (JSON | {"architecture": JSON["architecture"] | {"heads": 8}}, "received .*, heads$"),
    (JSON | {"preprocessing": {"mean": 0.5}}, "^expected the fields eval_crop, .*, received mean$"),
    (JSON | {"preprocessing": None}, "^expected the fields eval_crop, .*, received NoneType$"),
    (JSON | {"architecture": [8, 12]}, "^expected the fields image_shape, .*, received tuple$"),
])  # fmt: skip
def test_unknown_fields_and_missing_ones_are_named(values, message):
    with pytest.raises(InputError, match=message):
        ModelSpec.from_json(values)


@pytest.mark.parametrize("values, found", [
    (JSON | {"format": 1}, "1"), (JSON | {"format": 3}, "3"), (JSON | {"format": "2"}, "'2'"),
    (JSON["architecture"], "None"), ([], r"\[\]"), (None, "None"), (2, "2"),
], ids=str)  # fmt: skip
def test_other_formats_are_refused(values, found):
    with pytest.raises(InputError, match=f"^expected model.json of format 2, received {found}; "):
        ModelSpec.from_json(values)


# === Classes, loss, preprocessing ===


@pytest.mark.parametrize("names", [
    (), ("a", "b"), ("a", "b", "c", "d"), ("a", "b", 3), ("a", "b", None), "abc", 3, True,
    {"a": 1, "b": 2, "c": 3}, (("a",), ("b",), ("c",)),
], ids=str)  # fmt: skip
def test_class_names_are_one_for_each_class(names):
    with pytest.raises(InputError) as error:
        SPEC.replace(class_names=names)
    assert str(error.value) == f"class_names: expected 3 names, received {names!r:.60}"


@pytest.mark.parametrize("provenance", [None, 1, ["a"], "\ud800"])
def test_provenance_is_text(provenance):
    with pytest.raises(InputError, match="^provenance: expected text, received "):
        SPEC.replace(provenance=provenance)


@pytest.mark.parametrize("loss", ["hinge", None, ["softmax"], "x" * 1000])
def test_unknown_losses_are_refused(loss):
    with pytest.raises(InputError) as error:
        SPEC.replace(loss=loss)
    assert str(error.value) == f"loss: expected one of softmax, sigmoid, received {loss!r:.60}"


def test_preprocessing_says_what_it_does():
    scaled = "pixels 0 to 255 scaled to [-1, 1]"
    assert str(Preprocessing()) == f"eval_crop 0, bilinear, {scaled}"
    assert str(Preprocessing(0.875, "bicubic")) == f"eval_crop 0.875, bicubic, {scaled}"


@pytest.mark.parametrize("name", ["lanczos", "", None, 1, ["bicubic"], "x" * 1000])
def test_unknown_interpolations_are_refused(name):
    with pytest.raises(InputError) as error:
        Preprocessing(interpolation=name)
    expected = f"interpolation={name!r:.60}: expected one of bilinear, bicubic"
    assert str(error.value) == expected


def test_permuted_pixels_of_earlier_versions_are_refused():
    how = JSON["preprocessing"]
    spec = ModelSpec.from_json(JSON | {"preprocessing": how | {"permutation": "none"}})
    assert spec == SPEC
    assert Config.from_json({"permutation": "none"}) == Config()
    for read, values in (
        (ModelSpec.from_json, JSON | {"preprocessing": how | {"permutation": "global"}}),
        (Config.from_json, {"permutation": "patches+pixels"}),
    ):
        with pytest.raises(InputError, match="^this model was trained on permuted pixels, which"):
            read(values)


@pytest.mark.parametrize("crop", [
    0.0999, 1.0001, -0.5, float("nan"), float("inf"), 10**400, True, False, "0.5", None, [0.5],
], ids=lambda crop: f"{crop!r:.20}")  # fmt: skip
def test_crops_out_of_bounds_are_refused(crop):
    with pytest.raises(InputError) as error:
        Preprocessing(eval_crop=crop)
    assert str(error.value) == (
        f"eval_crop={crop!r:.60}: expected 0, or a number from 0.1 to 1; every image is enlarged "
        f"by its inverse"
    )
