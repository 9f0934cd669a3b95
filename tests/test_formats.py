"""Tests the formats of `keras_mixer/weights/`: exact numbers from every one, exact bits into it.

The files in golden/ were written, and their logits computed, by the real Flax and timm models.
"""

import functools
import json
import re
import shutil
import subprocess
import sys

import keras
import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN, ROOT, SMALL, randomize
from safetensors.numpy import load_file, save_file

import keras_mixer
from keras_mixer import InputError, build_mixer, load_mixer
from keras_mixer.__main__ import main
from keras_mixer.model.architecture import Architecture, ModelSpec, Preprocessing
from keras_mixer.model.variants import VARIANTS
from keras_mixer.weights import (
    keras_files,
    model_folder,
    official,
    tensor_layouts,
    timm,
    timm_config,
)
from keras_mixer.weights.convert import convert_weights
from keras_mixer.weights.formats import FORMATS
from keras_mixer.weights.load import model_weights
from keras_mixer.weights.model_folder import digest
from keras_mixer.weights.pretrained import INCLUDED, Pretrained, read_pretrained, summary

DEEP = SMALL.replace(depth=11)  # as text, the names of its blocks sort otherwise


def random_model(architecture, **options):
    return randomize(build_mixer(**vars(architecture), **options))


def assert_same_bits(arrays, others):
    assert digest(arrays) == digest(others)


# === Golden numbers ===


GOLDEN_FILES = [
    ("official_mixer.npz", "official", "gelu"),
    ("official_mixer_prelinen.npz", "official", "gelu"),
    ("timm_mixer.safetensors", "timm", "gelu_erf"),
    pytest.param("timm_mixer.pth", "timm", "gelu_erf", marks=pytest.mark.backends),
]


def difference(path, expected, **overrides):
    """How far logits and pre-logits of a checkpoint are from those expected, at most."""
    expected = np.load(GOLDEN / f"{expected}_mixer_expected.npz")
    model = load_mixer(path, image_shape=expected["images"].shape[1:3], **overrides)
    both = keras.Model(model.input, [model.get_layer("pre_logits").output, model.output])
    received = map(keras.ops.convert_to_numpy, both(expected["images"]))
    wanted = (expected["pre_logits"], expected["logits"])
    return max(np.abs(r - w).max() for r, w in zip(received, wanted, strict=True))


@pytest.mark.parametrize("name, expected, activation", GOLDEN_FILES)
def test_logits_and_pre_logits_are_those_of_the_source(name, expected, activation):
    assert difference(GOLDEN / name, expected) < 1e-5
    pretrained = read_pretrained(GOLDEN / name, (24, 16) if expected == "official" else None)
    assert pretrained.spec.architecture.activation == activation


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ""])
def test_logits_survive_conversion(tmp_path, suffix):
    target = tmp_path / f"converted{suffix}"
    convert_weights(GOLDEN / "official_mixer_prelinen.npz", target, (24, 16))
    assert difference(target, "official") < 1e-5


@pytest.mark.parametrize("name, save", [
    ("official_mixer.npz", "model.keras"), ("official_mixer.npz", "model.weights.h5"),
    ("timm_mixer.safetensors", "model.keras"),
])  # fmt: skip
def test_logits_survive_keras_own_files(tmp_path, name, save):
    """Of timm, those in .weights.h5 would not: no tensor tells the activation."""
    model = load_mixer(GOLDEN / name, (24, 16) if name.startswith("official") else None)
    (model.save if save.endswith(".keras") else model.save_weights)(tmp_path / save)
    assert difference(tmp_path / save, name.partition("_")[0]) < 1e-5


@pytest.mark.parametrize("mean, std", [
    ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
])  # fmt: skip
def test_stem_takes_over_the_scale_of_a_config_beside(tmp_path, mean, std):
    """The weights called miil see images in [0, 1]; the logits stay those of the source."""
    shutil.copy(GOLDEN / "timm_mixer.safetensors", tmp_path)
    config = {"pretrained_cfg": {"mean": mean, "std": std, "crop_pct": 0.9}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = np.load(GOLDEN / "timm_mixer_expected.npz")
    model = load_mixer(tmp_path / "timm_mixer.safetensors")
    pixels = np.array(std) * expected["images"] + mean  # what timm scales to these images
    logits = keras.ops.convert_to_numpy(model((2 * pixels - 1).astype("float32")))
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5)
    spec = read_pretrained(tmp_path / "timm_mixer.safetensors").spec
    assert spec.preprocessing == Preprocessing(0.9, "bicubic")


def timm_with_config(folder, values):
    """Copies the golden file of timm beside a config.json with these values."""
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": values}))
    return shutil.copy(GOLDEN / "timm_mixer.safetensors", folder)


NORMAL = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.875}


@pytest.mark.parametrize("values, interpolation, assumed", [
    (NORMAL | {"interpolation": "bilinear"}, "bilinear", ""),
    (NORMAL | {"interpolation": "bicubic"}, "bicubic", ""),
    (NORMAL, "bicubic", " (assumed: interpolation bicubic)"),
    ({"std": [1, 1, 1], "interpolation": "bilinear"}, "bilinear",
     " (assumed: mean 0.5, crop_pct 0.875)"),
], ids=str)  # fmt: skip
def test_configs_beside_are_followed_and_what_they_lack_is_told(
    tmp_path, values, interpolation, assumed
):
    pretrained = read_pretrained(timm_with_config(tmp_path, values))
    assert pretrained.spec.preprocessing == Preprocessing(0.875, interpolation)
    assert pretrained.source == f"a Mixer of timm with its config.json{assumed}"


def test_other_interpolations_in_a_config_are_refused(tmp_path):
    path = timm_with_config(tmp_path, NORMAL | {"interpolation": "lanczos"})
    with pytest.raises(InputError) as error:
        read_pretrained(path)
    assert str(error.value) == (
        f"{tmp_path / 'config.json'}: invalid timm config (interpolation='lanczos': expected one "
        f"of bilinear, bicubic); fix or remove it"
    )


@pytest.mark.parametrize("text", [
    "[]", "<html>", "[" * 10_000, '{"pretrained_cfg": 1}', '{"pretrained_cfg": {"mean": [1]}}',
    '{"pretrained_cfg": {"mean": [%s]}}' % ("0.123456, " * 50 + "1"),
    '{"pretrained_cfg": {"mean": [NaN, 0, 0]}}', '{"pretrained_cfg": {"mean": [1e308, 0, 0]}}',
    '{"pretrained_cfg": {"std": [0, 0, 0]}}', '{"pretrained_cfg": {"std": [1, 1, Infinity]}}',
    '{"pretrained_cfg": {"std": [1, 1, 1e-60]}}', '{"pretrained_cfg": {"crop_pct": NaN}}',
    '{"pretrained_cfg": {"crop_pct": 1%s}}' % ("0" * 400),
], ids=lambda text: text[:50])  # fmt: skip
def test_unusable_configs_beside_are_refused(tmp_path, text):
    shutil.copy(GOLDEN / "timm_mixer.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json: invalid timm config .*; fix or remove"):
        read_pretrained(tmp_path / "timm_mixer.safetensors")


FOLLOWED = NORMAL | {"interpolation": "bicubic"}


@pytest.mark.parametrize("values, message", [
    ({"crop_mode": "border"}, "crop_mode='border': expected center"),
    ({"crop_mode": "squash"}, "crop_mode='squash': expected center"),
    ({"crop_pct": 0}, "crop_pct=0: expected a number from 0.1 to 1"),
    ({"test_crop_pct": 1.0}, "test_crop_pct=1.0: expected 0.875"),
    ({"num_classes": 1000}, "num_classes=1000: expected 5"),
    ({"label_offset": 1}, "label_offset=1: expected 0"),
    ({"label_names": ["a", "b"]}, "2 label_names: expected 5"),
    ({"global_pool": "max"}, "global_pool='max': expected avg"),
    ({"model_args": {"act_layer": "relu"}}, "model_args={'act_layer': 'relu'}: expected {}"),
    ({"input_size": [3, 32, 32]}, r"input_size=\[32, 32\]: expected \[3, 24, 24\]"),
    ({"model_args": 1}, "invalid timm config"),
], ids=str)  # fmt: skip
def test_values_of_a_config_that_are_not_followed_are_refused_by_name(tmp_path, values, message):
    with pytest.raises(InputError, match=message):
        read_pretrained(timm_with_config(tmp_path, FOLLOWED | values))


def test_values_of_a_config_are_followed(tmp_path):
    values = {"crop_mode": "squash", "crop_pct": 1.0, "pool_size": None, "fixed_input_size": True}
    values |= {"label_names": list("vwxyz"), "input_size": [3, 24, 24], "num_classes": 5}
    spec = read_pretrained(timm_with_config(tmp_path, FOLLOWED | values)).spec
    assert spec.preprocessing == Preprocessing(0.0, "bicubic")
    assert spec.class_names == tuple("vwxyz")
    values["label_names"] = {str(4 - i): name for i, name in enumerate("vwxyz")}
    spec = read_pretrained(timm_with_config(tmp_path, FOLLOWED | values)).spec
    assert spec.class_names == tuple("zyxwv")


def test_a_config_tells_the_shape_of_images_that_weights_leave_open(tmp_path):
    model = random_model(SMALL.replace(image_shape=(8, 16), patch_shape=(4, 4), channels=3))
    save_file(tensor_layouts.store(timm.LAYOUT, model_weights(model)), tmp_path / "x.safetensors")
    config = {"pretrained_cfg": FOLLOWED | {"input_size": [3, 8, 16]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = read_pretrained(tmp_path / "x.safetensors", (16, 8)).spec
    assert spec.architecture.image_shape == (8, 16)


def test_three_means_for_one_channel_are_averaged_and_folders_of_the_hub_are_read(tmp_path):
    model = random_model(SMALL.replace(channels=1))
    tensors = tensor_layouts.store(timm.LAYOUT, model_weights(model))
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"pretrained_cfg": FOLLOWED | {"mean": [0.25, 0.5, 0.75], "std": [0.1, 0.2, 0.45]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arrays, source = read_pretrained(tmp_path, SMALL.image_shape)[1:]
    np.testing.assert_allclose(
        arrays["stem/kernel"], 2 * model_weights(model)["stem/kernel"], rtol=1e-6
    )
    assert source.endswith("config.json, its mean and std averaged to one channel")


# === Files of training programs ===


@pytest.mark.parametrize("prefix, note", [
    ("module.", "weights under module."),
    ("_orig_mod.module.", "weights under _orig_mod.module."),
    ("state_dict.model.", "weights under state_dict.model."),
    ("state_dict_ema.", "EMA weights under state_dict_ema."),
])  # fmt: skip
def test_prefixes_of_training_programs_are_taken_off(tmp_path, prefix, note):
    tensors = load_file(GOLDEN / "timm_mixer.safetensors")
    save_file({prefix + name: t for name, t in tensors.items()}, tmp_path / "x.safetensors")
    pretrained = read_pretrained(tmp_path / "x.safetensors")
    assert_same_bits(pretrained.arrays, read_pretrained(GOLDEN / "timm_mixer.safetensors").arrays)
    assert pretrained.source == f"{timm_config.unconfigured(timm.LAYOUT.source)}, {note}"


def test_ema_weights_are_preferred_aloud_and_strangers_refused(tmp_path):
    tensors = load_file(GOLDEN / "timm_mixer.safetensors")
    both = {f"model.{name}": 0 * t for name, t in tensors.items()}
    both |= {f"model_ema.module.{name}": t for name, t in tensors.items()}
    save_file(both, tmp_path / "x.safetensors")
    pretrained = read_pretrained(tmp_path / "x.safetensors")
    assert_same_bits(pretrained.arrays, read_pretrained(GOLDEN / "timm_mixer.safetensors").arrays)
    assert pretrained.source.endswith(", EMA weights under model_ema.module., not model.")
    save_file(both | {"loss.weight": np.ones(3, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"does not fit the model: \+ loss\.weight"):
        read_pretrained(tmp_path / "x.safetensors")


@pytest.mark.parametrize("end, prefix, state", [
    ("", "params/", "opt/0/mu/"), ("_prelinen", "opt/target/", "opt/state/"),
])  # fmt: skip
def test_training_states_of_big_vision_and_their_bfloat16_are_read(tmp_path, end, prefix, state):
    arrays = dict(np.load(GOLDEN / f"official_mixer{end}.npz"))
    halves = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    content = {prefix + name: half for name, half in halves.items()}
    np.savez(tmp_path / "x.npz", **content, **{state + name: a for name, a in arrays.items()})
    assert np.load(tmp_path / "x.npz")[f"{prefix}head/kernel"].dtype == "V2"
    pretrained = read_pretrained(tmp_path / "x.npz", (24, 16))
    np.testing.assert_array_equal(
        pretrained.arrays["head/kernel"], halves["head/kernel"].astype(np.float32)
    )
    assert pretrained.source.endswith(f", weights under {prefix}, without the optimizer's state")


@pytest.mark.backends
def test_pth_of_a_training_program_gives_its_ema_weights(tmp_path):
    torch = pytest.importorskip("torch")
    state = torch.load(GOLDEN / "timm_mixer.pth", weights_only=True)
    ema = {f"module.{name}": tensor for name, tensor in state.items()}
    zeros = {name: 0 * tensor for name, tensor in state.items()}
    torch.save({"state_dict": zeros, "state_dict_ema": ema, "epoch": 3}, tmp_path / "x.pth.tar")
    one, other = map(read_pretrained, (tmp_path / "x.pth.tar", GOLDEN / "timm_mixer.safetensors"))
    assert_same_bits(one.arrays, other.arrays)


# === Exact bits ===


def test_older_layout_holds_the_same_weights():
    one, other = (
        read_pretrained(GOLDEN / f"official_mixer{end}.npz", (24, 16)) for end in ("", "_prelinen")
    )
    assert one.spec == other.spec
    assert_same_bits(one.arrays, other.arrays)


def test_converting_there_and_back_gives_the_same_file_contents(tmp_path):
    for name, suffix in (("official_mixer.npz", ".npz"), ("timm_mixer.safetensors", "")):
        source, between = GOLDEN / name, tmp_path / f"{name}.between{suffix}"
        between = between.with_name(f"between_{suffix[1:]}") if not suffix else between
        convert_weights(source, between, (24, 16) if suffix else None)
        convert_weights(between, tmp_path / name, (24, 16) if suffix else None)
        load = load_file if name.endswith("safetensors") else lambda path: dict(np.load(path))
        before, after = load(source), load(tmp_path / name)
        assert before.keys() == after.keys()
        for tensor, array in before.items():
            assert array.dtype == after[tensor].dtype
            np.testing.assert_array_equal(array, after[tensor])


@pytest.mark.parametrize("changed", [
    {}, {"num_classes": 0}, {"activation": "silu"}, {"image_shape": (8, 8), "patch_shape": (4, 4)},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ""])
def test_round_trips_are_exact(tmp_path, suffix, changed):
    architecture = DEEP.replace(**changed)
    arrays = model_weights(random_model(architecture))
    names = ("a", "b", "ü") if architecture.num_classes else None
    spec = ModelSpec(architecture, names, Preprocessing(eval_crop=0.9), "sigmoid")
    source, target = tmp_path / "source", tmp_path / f"target{suffix}"
    model_folder.write(source, spec, arrays)
    if suffix == ".npz" and "activation" in changed:
        with pytest.raises(
            InputError, match="only store a Mixer with activation=gelu, received silu"
        ):
            convert_weights(source, target)
        assert not target.exists()
        return
    written = convert_weights(source, target)
    assert_same_bits(written.arrays, arrays)
    assert written.spec.architecture == architecture
    if suffix != ".npz":  # which has room for weights only
        assert written.spec == spec


@pytest.mark.parametrize("changed", [
    {}, {"num_classes": 0}, {"activation": "relu"}, {"token_mixing": False, "depth": 1},
    {"channel_mixing": False, "tokens_mlp_dim": 3},
], ids=str)  # fmt: skip
def test_keras_files_of_any_of_our_models_are_read(tmp_path, changed):
    architecture = DEEP.replace(**changed)
    model = random_model(
        architecture, dropout=0.1, stochastic_depth=0.2, name="other", head_bias=1.0
    )
    model.compile("adam")
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "x.keras")
    model.save_weights(tmp_path / "x.weights.h5")
    archive = read_pretrained(tmp_path / "x.keras")
    weights = read_pretrained(tmp_path / "x.weights.h5", (8, 12))
    unused = {"tokens_mlp_dim": None} if "token_mixing" in changed else {}
    unused |= {"channels_mlp_dim": None} if "channel_mixing" in changed else {}
    assert archive.spec.architecture == architecture.replace(**unused)
    assert weights.spec.architecture == architecture.replace(**unused, activation="gelu")
    for read in (archive, weights):
        assert_same_bits(read.arrays, model_weights(model))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_read_value_by_value(tmp_path, dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    halves = {n: a.astype(dtype) for n, a in load_file(GOLDEN / "timm_mixer.safetensors").items()}
    save_file(halves, tmp_path / "half.safetensors")
    arrays = read_pretrained(tmp_path / "half.safetensors").arrays
    assert arrays["head/kernel"].dtype == np.float32
    np.testing.assert_array_equal(arrays["head/kernel"], halves["head.weight"].T.astype("float32"))


def test_fortran_order_and_big_endian_are_read_value_by_value(tmp_path):
    arrays = dict(np.load(GOLDEN / "official_mixer.npz"))
    turned = {n: np.asfortranarray(a).astype(">f4", order="K") for n, a in arrays.items()}
    np.savez_compressed(tmp_path / "x.npz", **turned)
    expected = read_pretrained(GOLDEN / "official_mixer.npz", (24, 16)).arrays
    assert_same_bits(read_pretrained(tmp_path / "x.npz", (24, 16)).arrays, expected)


# === What is inferred ===


@pytest.mark.parametrize("changed", [
    {}, {"token_mixing": False}, {"channel_mixing": False}, {"num_classes": 0},
], ids=str)  # fmt: skip
def test_expected_shapes_are_those_of_the_model(changed):
    architecture = DEEP.replace(**changed)
    shapes = {v.path: tuple(v.shape) for v in build_mixer(**vars(architecture)).weights}
    assert list(architecture.shapes.items()) == list(shapes.items())


@pytest.mark.parametrize("layout", [
    official.LINEN, official.BEFORE_LINEN, timm.LAYOUT, keras_files.LAYOUT,
], ids=lambda layout: layout.source)  # fmt: skip
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_inferred_from_its_shapes(variant, layout):
    architecture = Architecture.create(variant, num_classes=21843 if variant == "B/16" else 1000)
    tensors = {
        layout.rename(name): tensor_layouts.Tensor(
            tuple(shape[axis] for axis in layout.axes(name, len(shape))), "float32"
        )
        for name, shape in architecture.shapes.items()
    }
    assert len(tensors) == 12 * architecture.depth + 6, "names are unique"
    assert tensor_layouts.infer_architecture("x", layout, tensors, None, "gelu") == architecture
    pretrained = Pretrained(ModelSpec(architecture), {}, "x")
    assert f": {variant}, images of 224×224" in summary(pretrained)


@pytest.mark.parametrize("classes, crop", [(1000, 0.875), (21843, 0.875), (10, 0.0)])
def test_released_official_files_are_evaluated_as_released(tmp_path, classes, crop):
    spec = ModelSpec(SMALL.replace(image_shape=(8, 8), patch_shape=(4, 4), num_classes=classes))
    arrays = model_weights(build_mixer(**vars(spec.architecture)))
    official.write(tmp_path / "x.npz", spec, arrays)
    released = spec.replace(preprocessing=Preprocessing(eval_crop=crop))
    assert read_pretrained(tmp_path / "x.npz").spec == released


def test_loading_says_what_was_understood_in_one_line(capfd):
    load_mixer(GOLDEN / "timm_mixer.safetensors")
    assert capfd.readouterr().err == (
        f"{GOLDEN / 'timm_mixer.safetensors'}: a Mixer of timm without the config.json of the "
        f"Hugging Face hub beside it (assumed: mean 0.5, std 0.5, crop_pct 0.875, interpolation "
        f"bicubic; otherwise put it there, or use keras-mixer convert FILE FOLDER "
        f"--mean=M --std=S): 3 layers of 24 channels, patches of 4×4, images of 24×24 (eval_crop "
        f"0.875, bicubic, pixels 0 to 255 scaled to [-1, 1]), 5 classes, gelu_erf, "
        f"LayerNorm epsilon 1e-06\n"
    )


def test_timms_files_that_we_wrote_assume_nothing(tmp_path, capfd):
    own = tmp_path / "own.safetensors"
    convert_weights(GOLDEN / "timm_mixer.safetensors", own)
    load_mixer(own)
    err = capfd.readouterr().err
    assert err.startswith(f"{own}: a Mixer of keras_mixer in timm's format: 3 layers")
    assert "assumed" not in err and "eval_crop 0.875, bicubic" in err


def test_our_own_weights_speak_for_themselves(tmp_path, capfd):
    convert_weights(GOLDEN / "timm_mixer.safetensors", tmp_path / "own")
    load_mixer(tmp_path / "own")
    assert capfd.readouterr().err == ""


# === What does not fit ===


def changed_golden(path, change):
    """Writes one of the golden files again, its tensors changed in place."""
    name = f"{'official' if path.suffix == '.npz' else 'timm'}_mixer{path.suffix}"
    if path.suffix == ".npz":
        arrays = dict(np.load(GOLDEN / name))
        save = functools.partial(np.savez, path)
        names = ("stem/kernel", "MixerBlock_1/token_mixing/Dense_0/kernel", "head/bias")
    else:
        arrays = load_file(GOLDEN / name)
        save = lambda **arrays: save_file(arrays, path)  # noqa: E731
        names = ("stem.proj.weight", "blocks.1.mlp_tokens.fc1.weight", "head.bias")
    change(arrays, *names)
    save(**{name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return names


def transpose(arrays, stem, kernel, bias):
    arrays[kernel] = arrays[kernel].T


def rename(arrays, stem, kernel, bias):
    arrays[f"{kernel}s"] = arrays.pop(kernel)


def spoil(arrays, stem, kernel, bias):
    arrays[bias] = arrays[bias] * np.float32("nan")


def overflow(arrays, stem, kernel, bias):
    arrays[stem][0, 0] = np.inf


def widen(arrays, stem, kernel, bias):
    arrays[stem] = arrays[stem].astype("float64")


def number(arrays, stem, kernel, bias):
    arrays[stem] = arrays[stem].astype("int32")


def skip_block(arrays, stem, kernel, bias):
    for name in [name for name in arrays if re.search(r"(_|\.)1(/|\.)", name[:14])]:
        del arrays[name]


def behead(arrays, stem, kernel, bias):
    del arrays[bias]


def flatten(arrays, stem, kernel, bias):
    arrays[stem] = arrays[stem].ravel()


def empty(arrays, stem, kernel, bias):
    arrays[stem] = arrays[stem][:0]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("change, message", [
    (transpose, r"does not fit the model: ! {1} \(\d+, \d+\), expected \(\d+, \d+\)$"),
    (rename, "does not fit the model: - {1}; [+] {1}s$"),
    (spoil, "{2} contains NaN or infinity: the file is damaged"),
    (overflow, "{0} contains NaN or infinity"),
    (widen, "{0} is float64|{0} is F64"),
    (number, "{0} is int32|{0} is I32"),
    (skip_block, "does not fit the model: - .*1.*; and 0 more|does not fit the model: - "),
    (behead, "does not fit the model: [+] head.(kernel|weight)$"),
    (flatten, r"not .*: ! {0} \(1152,\), expected 4 positive sizes"),
    (empty, r"not .*: ! {0} \(\d+, \d+, \d+, \d+\), expected 4 positive sizes"),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_wrong_tensors_are_refused_by_name(tmp_path, suffix, change, message):
    path = tmp_path / f"weights{suffix}"
    names = changed_golden(path, change)
    with pytest.raises(InputError) as error:
        read_pretrained(path, (24, 16) if suffix == ".npz" else None)
    assert re.search(message.format(*map(re.escape, names)), str(error.value)), error.value


def test_long_lists_of_faults_are_cut(tmp_path):
    path = tmp_path / "x.npz"
    changed_golden(path, skip_block)
    with pytest.raises(InputError, match=r"^[^;]*- MixerBlock_1/LayerNorm_0/scale;") as error:
        read_pretrained(path, (24, 16))
    assert str(error.value).count("- ") == 12


@pytest.mark.parametrize("name", [
    "x.npz", "x.safetensors", "x.keras", "x.weights.h5",
    pytest.param("x.pth", marks=pytest.mark.backends),
])  # fmt: skip
@pytest.mark.parametrize("content, message", [
    (b"", "not weights, but empty; download it again"),
    (b"\n<!DOCTYPE html><title>Sign in</title>", "a web page; download the file itself"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "run `git lfs pull`"),
    (b"\0" * 5000, "not a"),
    ("another format", "not a"),
], ids=["empty", "html", "lfs", "zeros", "another"])  # fmt: skip
def test_what_is_no_such_file_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        other = "timm_mixer.safetensors" if name != "x.safetensors" else "official_mixer.npz"
        shutil.copy(GOLDEN / other, path)
    with pytest.raises(InputError, match=re.escape(message)):
        read_pretrained(path)


@pytest.mark.parametrize("name, cuts", [
    ("official_mixer.npz", (1, 21, 22, 5000, 54000)),
    ("timm_mixer.safetensors", (7, 8, 3000, 49000)),
    pytest.param("timm_mixer.pth", (30, 50000), marks=pytest.mark.backends),
])  # fmt: skip
def test_truncated_files_are_refused(tmp_path, name, cuts):
    for cut in cuts:
        path = tmp_path / name
        path.write_bytes((GOLDEN / name).read_bytes()[:cut])
        with pytest.raises(InputError, match=rf"{name}: not a "):
            read_pretrained(path, (24, 16))


@pytest.mark.parametrize("name, message", [
    ("official_mixer.npz", "24 patches, not a square number,.*give image_shape to"),
    ("without_tokens.weights.h5", "no token mixing so .*give image_shape to"),
])  # fmt: skip
def test_open_image_shapes_are_asked_for(tmp_path, name, message):
    model = random_model(SMALL.replace(token_mixing=False))
    model.save_weights(tmp_path / "without_tokens.weights.h5")
    folder = tmp_path if name.endswith(".h5") else GOLDEN
    with pytest.raises(InputError, match=message):
        read_pretrained(folder / name)


@pytest.mark.parametrize("shape", [(24, 24), (23, 17), (4, 4)])
def test_image_shapes_that_do_not_fit_are_refused(shape):
    with pytest.raises(InputError, match="patches are 4×4 pixels, and there are 24 of them"):
        read_pretrained(GOLDEN / "official_mixer.npz", shape)


WIDE = SMALL.replace(image_shape=(8, 32), patch_shape=(4, 4))  # 2×8 patches, which 4×4 are, too


def write_wide(path):
    """Writes the same random model of `WIDE` in a format that has no image shape."""
    model = random_model(WIDE)
    arrays = model_weights(model)
    if path.suffix == ".npz":
        official.write(path, ModelSpec(WIDE), arrays)
    elif path.suffix == ".safetensors":
        save_file(tensor_layouts.store(timm.LAYOUT, arrays), path)
    else:
        model.save_weights(path)
    return model


@pytest.mark.parametrize("name", ["x.npz", "x.safetensors", "x.weights.h5"])
def test_the_image_shape_given_is_taken_where_it_fits(tmp_path, name):
    model, path = write_wide(tmp_path / name), tmp_path / name
    square = (16, 16)
    for given, taken in {
        None: square, square: square, (8, 32): (8, 32), (32, 8): (32, 8), (4, 64): (4, 64),
        (24, 24): square, (8, 30): square, (2, 128): square, (64,): square, 64: square,
    }.items():  # fmt: skip
        architecture = read_pretrained(path, given).spec.architecture
        assert architecture.image_shape == taken
        if taken == (8, 32) and name == "x.npz":
            assert architecture == WIDE
    images = np.random.default_rng(1).uniform(-1, 1, (2, 8, 32, 2)).astype("float32")
    loaded = load_mixer(path, (8, 32), activation="gelu")  # of timm's, it is another
    np.testing.assert_allclose(loaded(images), model(images), atol=1e-5)
    assert load_mixer(path, (24, 24)).input_shape == (None, 24, 24, 2), "adapted from 16×16"
    for wrong, message in (
        ((64,), "image_shape: expected two positive"),
        ((8, 30), "does not divide"),
    ):
        with pytest.raises(InputError, match=message):
            load_mixer(path, wrong)


def test_without_token_mixing_every_image_of_whole_patches_fits(tmp_path):
    model = random_model(SMALL.replace(token_mixing=False))
    model.save_weights(tmp_path / "x.weights.h5")
    for shape in ((8, 12), (4, 2), (40, 4)):
        assert (
            read_pretrained(tmp_path / "x.weights.h5", shape).spec.architecture.image_shape == shape
        )
    with pytest.raises(InputError, match="image_shape=8,11 does not fit: .* 4×2 pixels$"):
        read_pretrained(tmp_path / "x.weights.h5", (8, 11))


def test_whole_models_in_hdf5_are_refused(tmp_path):
    (tmp_path / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(InputError, match=r"execute code: save it with model\.save_weights"):
        read_pretrained(tmp_path / "x.h5")


# === Weights in the package ===


@pytest.mark.parametrize("name", INCLUDED)
def test_included_weights_are_small_and_say_where_they_come_from(name):
    spec, arrays, _ = read_pretrained(f"preset:{name}")
    assert INCLUDED[name].stat().st_size <= 5e6
    assert sum(array.size for array in arrays.values()) == spec.architecture.parameters
    assert len(spec.class_names) == spec.architecture.num_classes
    start = rf"trained by --preset={name} .*; validation: .*, test: [0-9.]+% of"
    assert re.match(start, spec.provenance)
    assert "/" not in spec.provenance, "no path of a machine"


def test_cifar10_is_in_the_package(capfd):
    assert "cifar10" in INCLUDED
    model = load_mixer("preset:cifar10", num_classes=3)
    assert model.output_shape == (None, 3)
    assert "preset:cifar10: " in capfd.readouterr().err


def test_included_weights_classify_as_they_were_scored():
    folder = ROOT / "data" / "cifar10"
    if not folder.exists():
        pytest.skip("needs data/cifar10, JPEG copies in class folders")
    model = load_mixer("preset:cifar10")
    names = model.spec.class_names
    paths = [path for name in names for path in sorted((folder / "test" / name).iterdir())[:50]]
    found = keras_mixer.predict(model, paths, top_k=1)
    right = [found[i][0]["class"] == path.parent.name for i, path in enumerate(paths)]
    scored = float(re.search("test: ([0-9.]+)%", model.spec.provenance)[1])
    assert abs(100 * np.mean(right) - scored) < 8, "four standard errors of 500 images"


def test_unknown_included_weights_are_one_line(tmp_path, capfd):
    assert main(["predict", "preset:cifar", "x.png"]) == 2
    assert capfd.readouterr().err == "error: preset:cifar: expected one of cifar10\n"


# === convert ===


def test_convert_command(tmp_path, capfd):
    target = tmp_path / "new" / "folder.safetensors"
    assert main(["convert", str(GOLDEN / "official_mixer.npz"), str(target)]) == 2
    assert "give image_shape to load_mixer" in capfd.readouterr().err
    arguments = [str(GOLDEN / "official_mixer.npz"), str(target), "--image_shape=24,16"]
    assert main(["convert", *arguments]) == 0
    out, err = capfd.readouterr()
    assert out == f"{target}\n"
    assert "3 layers of 24 channels" in err and "gelu" in err
    assert main(["convert", *arguments]) == 2
    assert "exists already; give another name" in capfd.readouterr().err


def test_weights_of_a_run_say_where_they_come_from(trained, tmp_path, capfd):
    target = tmp_path / "mixer.safetensors"
    assert main(["convert", str(trained.directory), str(target)]) == 0
    scores = trained.scores
    expected = (
        rf"trained by --.*--dim=16 .* on digits: 1,293, 144, 360 images \(training, validation, "
        rf"test\); validation: {scores['validation']['top1']:.2%} of 144 images, "
        rf"test: {scores['test']['top1']:.2%} of 360 images"
    )
    provenance = load_mixer(target).spec.provenance
    assert re.fullmatch(expected, provenance)
    assert str(trained.directory) not in provenance, "no path of this machine"
    capfd.readouterr()
    assert main(["convert", str(target), str(tmp_path / "folder")]) == 0
    assert f"\n{provenance}\n" in capfd.readouterr().err
    assert load_mixer(tmp_path / "folder").spec.provenance == provenance


def test_weights_without_a_finished_run_have_no_provenance(trained, tmp_path):
    shutil.copytree(trained.directory, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    for source in (tmp_path / "run", trained.best):
        target = tmp_path / f"{source.name}.safetensors"
        assert main(["convert", str(source), str(target)]) == 0
        assert load_mixer(target).spec.provenance == ""


@pytest.mark.parametrize("arguments, message", [
    (["x"], "expected SOURCE and TARGET"),
    ([str(GOLDEN / "timm_mixer.safetensors"), "x.pth"], "name of one of: model folder, "),
    ([str(GOLDEN / "timm_mixer.safetensors"), "x.npz"], "with activation=gelu"),
    (["nowhere.npz", "y.npz"], "no such checkpoint"),
])  # fmt: skip
def test_convert_refuses_in_one_line(tmp_path, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *arguments]) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_grids_that_could_be_square_survive_conversion(tmp_path):
    arrays = model_weights(random_model(WIDE))
    model_folder.write(tmp_path / "a", ModelSpec(WIDE), arrays)
    written = convert_weights(tmp_path / "a", tmp_path / "b.npz")
    assert written.spec.architecture == WIDE
    back = convert_weights(tmp_path / "b.npz", tmp_path / "c", (8, 32))
    assert back.spec == ModelSpec(WIDE) == read_pretrained(tmp_path / "c").spec
    assert_same_bits(read_pretrained(tmp_path / "c").arrays, arrays)


def test_image_shapes_are_not_ignored_where_nothing_is_adapted(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    convert_weights(GOLDEN / "timm_mixer.safetensors", tmp_path / "own")
    assert main(["convert", "own", "y", "--image_shape=16,36"]) == 2
    assert capfd.readouterr().err == (
        "error: own: its images have the shape 24,24, received --image_shape=16,36, to which this "
        "command does not adapt weights; leave it out, or train with --checkpoint\n"
    )


def left_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def write_another_model(path, spec, arrays, write):
    assert path.parent.name.startswith(".convert-"), "hidden"
    assert path.parent.parent.name == "there", "where it can be renamed from"
    write(path, spec, arrays | {"head/bias": arrays["head/bias"] + 1})


def write_and_run_out_of_space(path, spec, arrays, write):
    write(path, spec, arrays)
    raise OSError(28, "No space left on device")


def write_and_be_interrupted(path, spec, arrays, write):
    write(path, spec, arrays)
    raise KeyboardInterrupt


@pytest.mark.parametrize("write, error, message", [
    (write_another_model, InputError, "{}: was read back as another model; please report this"),
    (write_and_run_out_of_space, InputError, "{}: No space left on device"),
    (write_and_be_interrupted, KeyboardInterrupt, ""),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_failed_conversions_leave_nothing_behind(tmp_path, monkeypatch, write, error, message):
    form = FORMATS[".npz"]
    failing = form._replace(write=functools.partial(write, write=form.write))
    monkeypatch.setitem(FORMATS, ".npz", failing)
    target = tmp_path / "there" / "x.npz"
    with pytest.raises(error) as raised:
        convert_weights(GOLDEN / "official_mixer.npz", target, (24, 16))
    assert str(raised.value) == message.format(target)
    assert left_in(tmp_path) == ["there"]


def test_weights_that_diverged_are_not_converted(tmp_path):
    arrays = model_weights(random_model(WIDE))
    arrays["head/bias"] = arrays["head/bias"] * np.float32("nan")
    model_folder.write(tmp_path / "run", ModelSpec(WIDE), arrays)
    before = left_in(tmp_path)
    with pytest.raises(InputError) as error:
        convert_weights(tmp_path / "run", tmp_path / "new" / "x.npz")
    assert str(error.value).startswith(f"{tmp_path / 'run'}: head/bias contains NaN")
    assert left_in(tmp_path) == before


@pytest.mark.parametrize("suffix", ["", ".npz", ".safetensors"])
def test_conversions_leave_the_target_only(tmp_path, suffix):
    convert_weights(GOLDEN / "official_mixer.npz", tmp_path / "new" / f"x{suffix}", (24, 16))
    inside = [] if suffix else ["new/x/model.json", "new/x/model.safetensors"]
    assert left_in(tmp_path) == ["new", f"new/x{suffix}", *inside]
    assert (tmp_path / "new" / f"x{suffix}").stat().st_mode & 0o044, "others may read it"


def test_an_older_config_of_timm_has_its_values_at_the_top(tmp_path):
    shutil.copy(GOLDEN / "timm_mixer.safetensors", tmp_path / "x.safetensors")
    values = {"mean": [0.1] * 3, "std": [0.2] * 3, "crop_pct": 0.9, "interpolation": "bilinear"}
    found = []
    for content in (values, {"pretrained_cfg": values}):
        (tmp_path / "config.json").write_text(json.dumps(content))
        spec, arrays, source = read_pretrained(tmp_path / "x.safetensors")
        assert spec.preprocessing == Preprocessing(0.9, "bilinear")
        assert source.endswith("with its config.json")
        found.append(arrays["stem/kernel"])
    np.testing.assert_array_equal(*found)
    (tmp_path / "config.json").write_text('{"pretrained_cfg": null}')
    with pytest.raises(InputError, match="its pretrained_cfg is not an object"):
        read_pretrained(tmp_path / "x.safetensors")


def test_class_names_that_a_format_cannot_hold_are_pointed_out(tmp_path, capsys):
    spec = ModelSpec(WIDE, tuple(map(str, range(WIDE.num_classes))))
    model_folder.write(tmp_path / "run", spec, model_weights(random_model(WIDE)))
    for suffix, lost in ((".npz", True), (".safetensors", False), ("", False)):
        convert_weights(tmp_path / "run", tmp_path / f"x{suffix}", WIDE.image_shape)
        assert ("cannot store class names" in capsys.readouterr().err) == lost


# === convert --mean --std ===


@pytest.mark.parametrize("flags, mean, std, told", [
    (["--mean=0", "--std=1"], [0, 0, 0], [1, 1, 1], "mean 0 and std 1"),
    (["--mean=0.485,0.456,0.406", "--std=0.229,0.224,0.225"], [0.485, 0.456, 0.406],
     [0.229, 0.224, 0.225], "mean 0.485,0.456,0.406 and std 0.229,0.224,0.225"),
    (["--mean=0"], [0, 0, 0], [0.5, 0.5, 0.5], "mean 0 and std 0.5 (assumed)"),
    (["--std=1"], [0.5, 0.5, 0.5], [1, 1, 1], "mean 0.5 (assumed) and std 1"),
])  # fmt: skip
@pytest.mark.parametrize("target", ["own", "own.safetensors"])
def test_convert_takes_a_mean_and_std_as_a_config_has_them(
    tmp_path, capfd, flags, mean, std, told, target
):
    source, own = GOLDEN / "timm_mixer.safetensors", tmp_path / target
    assert main(["convert", str(source), str(own), *flags]) == 0
    assert f"own: converted from a Mixer of timm with {told}: 3 layers" in (
        capfd.readouterr().err.replace(".safetensors", "")
    )
    configured = read_pretrained(timm_with_config(tmp_path, {"mean": mean, "std": std}))
    assert_same_bits(read_pretrained(own).arrays, configured.arrays)
    assert read_pretrained(own).spec == configured.spec


def test_convert_says_what_it_assumed(tmp_path, capfd):
    assert main(["convert", str(GOLDEN / "timm_mixer.safetensors"), str(tmp_path / "own")]) == 0
    assert "(assumed: mean 0.5, std 0.5, crop_pct 0.875, inter" in capfd.readouterr().err


@pytest.fixture
def known_scales(tmp_path):
    """Sources whose scale of images is known."""
    timm_file, official_file = GOLDEN / "timm_mixer.safetensors", GOLDEN / "official_mixer.npz"
    convert_weights(timm_file, tmp_path / "folder")
    convert_weights(timm_file, tmp_path / "own.safetensors")
    convert_weights(official_file, tmp_path / "official.npz", (24, 16))
    (tmp_path / "hub").mkdir()
    timm_with_config(tmp_path / "hub", NORMAL)
    return tmp_path


@pytest.mark.parametrize("name, what", [
    ("folder", "a model folder of keras_mixer"),
    ("own.safetensors", "a Mixer of keras_mixer in timm's form"),
    ("official.npz", "an official Mixer checkpoint"),
    ("hub/timm_mixer.safetensors", "a Mixer of timm with its config.json"),
])  # fmt: skip
@pytest.mark.parametrize("flags, given", [
    (["--mean=0", "--std=1"], "--mean and --std"), (["--mean=0.5"], "--mean"),
])  # fmt: skip
def test_mean_and_std_are_for_files_without_them(known_scales, capfd, name, what, flags, given):
    source, before = known_scales / name, left_in(known_scales)
    flags = [*flags, "--image_shape=24,16"] if name.endswith("npz") else flags
    assert main(["convert", str(source), str(known_scales / "y"), *flags]) == 2
    error = capfd.readouterr().err
    assert f"{source}: {given} cannot change {what}" in error and error.count("\n") == 1
    advice = "change them there" if "config.json" in what else "leave the flag out"
    assert error.endswith(f", whose mean and std are known; {advice}\n")
    assert left_in(known_scales) == before


@pytest.mark.parametrize("flags, message", [
    (["--mean=0,0"], "--mean=0,0: expected one number for each of 3 channels, from -1000 to 1000"),
    (["--mean=1e6"], "--mean=1e+06,1e+06,1e+06: expected"), (["--std=0"], "--std=0,0,0: expected"),
    (["--std=1,1,-1"], "--std=1,1,-1: expected one number for each of 3 channels, from 0.001 to"),
    (["--std=nan"], "--std: expected a finite number"), (["--mean=a"], "--mean: expected one or"),
])  # fmt: skip
def test_means_and_stds_out_of_bounds_are_refused(tmp_path, capfd, flags, message):
    source = GOLDEN / "timm_mixer.safetensors"
    assert main(["convert", str(source), str(tmp_path / "own"), *flags]) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not left_in(tmp_path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("missing", ["token_mixing", "channel_mixing"])
def test_formats_without_ablations_refuse_them(tmp_path, suffix, missing):
    model = random_model(SMALL.replace(**{missing: False}))
    model.save(tmp_path / "x.keras")
    with pytest.raises(InputError, match=f"with {missing}="):
        convert_weights(tmp_path / "x.keras", tmp_path / f"x{suffix}")
    convert_weights(tmp_path / "x.keras", tmp_path / "own")
    assert_same_bits(read_pretrained(tmp_path / "own").arrays, model_weights(model))


def test_converting_imports_neither_keras_nor_torch(tmp_path):
    """The weights are bfloat16, which NumPy knows from a package that Keras would import."""
    halves = load_file(GOLDEN / "timm_mixer.safetensors")
    halves = {name: array.astype(ml_dtypes.bfloat16) for name, array in halves.items()}
    save_file(halves, tmp_path / "x.safetensors")
    code = (
        "import sys; from keras_mixer.__main__ import main; status = main(sys.argv[1:]);"
        "print(status, {'keras', 'tensorflow', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", tmp_path / "x.safetensors", tmp_path / "own"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0 set()"


def test_converted_weights_are_exported_with_numbers_for_names(tmp_path):
    import tensorflow as tf

    convert_weights(GOLDEN / "timm_mixer.safetensors", tmp_path / "own")
    assert main(["export", str(tmp_path / "own"), f"--export_dir={tmp_path}", "--name=x"]) == 0
    serve = tf.saved_model.load(str(tmp_path / "x" / "1")).signatures["serving_default"]
    names = serve(images=tf.zeros((1, 9, 9, 3), tf.uint8))["class_names"].numpy()
    assert names.tolist() == [[b"0", b"1", b"2", b"3", b"4"]]


# === The other way: timm reads what we write ===


@pytest.mark.backends
@pytest.mark.parametrize("name, activation", [
    ("timm_mixer.safetensors", "gelu"), ("official_mixer.npz", "gelu_tanh"),
])  # fmt: skip
def test_timm_computes_the_same_logits_from_our_file(tmp_path, name, activation):
    torch, mlp_mixer = (pytest.importorskip(m) for m in ("torch", "timm.models.mlp_mixer"))
    from timm.layers import get_act_layer
    from timm.models import load_checkpoint

    source = name.partition("_")[0]
    expected = np.load(GOLDEN / f"{source}_mixer_expected.npz")
    shape = expected["images"].shape[1:3]
    convert_weights(GOLDEN / name, tmp_path / "x.safetensors", shape)
    model = mlp_mixer.MlpMixer(
        num_classes=5, img_size=shape, patch_size=4, num_blocks=3, embed_dim=24,
        mlp_ratio=(0.5, 2.0), act_layer=get_act_layer(activation),
    ).eval()  # fmt: skip
    load_checkpoint(model, str(tmp_path / "x.safetensors"), strict=True)
    with torch.no_grad():
        logits = model(torch.tensor(expected["images"].transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5)


@pytest.mark.backends
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_pth_holds_the_same_weights_as_safetensors(tmp_path, wrapper):
    torch = pytest.importorskip("torch")
    state = torch.load(GOLDEN / "timm_mixer.pth", weights_only=True)
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "x.pth")
    one, other = map(read_pretrained, (tmp_path / "x.pth", GOLDEN / "timm_mixer.safetensors"))
    assert one.spec == other.spec
    assert_same_bits(one.arrays, other.arrays)
