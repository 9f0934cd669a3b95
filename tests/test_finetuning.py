"""Tests `keras_mixer/training/finetuning.py`: rates per layer, freezing, official presets."""

import keras
import numpy as np
import pytest
from conftest import GOLDEN, ROOT, data_of
from test_tfrecords import write_set

from keras_mixer import Config, InputError, build_mixer, fit
from keras_mixer.config.command_line import parse
from keras_mixer.config.resolve import resolve
from keras_mixer.runs.checkpoints import newest_checkpoint
from keras_mixer.runs.open_run import plan_run
from keras_mixer.training.finetuning import describe_trained, freeze_backbone, layer_rates
from keras_mixer.weights import model_folder
from keras_mixer.weights.load import model_weights

# === The rate of each layer ===


def rates_of_beit(paths, depth, decay):
    """As BEiT numbers layers: 0 is the stem, i + 1 block i, the last one all that is above them."""
    values = [decay ** (depth + 1 - index) for index in range(depth + 2)]
    for path in paths:
        if path.startswith("stem/"):
            yield values[0]
        elif path.startswith("mixer_block_"):
            yield values[int(path.split("/")[0].split("_")[-1]) + 1]
        else:
            yield values[-1]


def test_rates_are_those_of_beit():
    depth = 12  # two digits
    model = build_mixer((4, 4), (2, 2), channels=1, depth=depth, dim=4, num_classes=2)
    paths = [weight.path for weight in model.weights]
    rates = layer_rates(model.weights, depth, 0.75)
    assert rates == list(rates_of_beit(paths, depth, 0.75))
    of = dict(zip(paths, rates, strict=True))
    assert of["head/bias"] == of["pre_head_layer_norm/gamma"] == 1
    assert of["mixer_block_11/token_mixing/dense_0/kernel"] == 0.75
    assert of["stem/kernel"] == pytest.approx(0.75 * of["mixer_block_0/layer_norm_0/gamma"])
    assert min(rates) == of["stem/kernel"]


# === Runs ===


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Weights for digits whose head knows something, so that every gradient is other than zero."""
    path = tmp_path_factory.mktemp("start")
    keras.utils.set_random_seed(0)
    spec = plan_run(Config(depth=2, dim=16)).spec
    model = build_mixer(**vars(spec.architecture))
    model.get_layer("head").kernel.assign(np.random.default_rng(0).normal(size=(16, 10)))
    model_folder.write_spec(path, spec)
    model_folder.write_weights(path, model_weights(model))
    return path


@pytest.fixture
def tune(tmp_path, start):
    """Trains on from these weights, by default for one step at the full rate."""

    def run(directory="run", **fields):
        defaults = {
            "checkpoint": str(start), "batch_size": 64, "num_steps": 1, "lr": 0.1,
            "warmup_step": 0, "schedule_unit": "step", "jit": "false",
        }  # fmt: skip
        return fit(Config(**{**defaults, **fields, "output_dir": str(tmp_path / directory)}))

    return run


def arrays_of(path):
    return model_folder.read_weights(path)[0]


COMMON = {"ema": 0.9, "clip_norm": 1.0, "decay": 0.1, "accumulation": 4}


def test_in_a_run_each_layer_moves_by_its_share_and_that_is_said(tune, start, capsys):
    before = arrays_of(start)
    total = sum(array.size for array in before.values())
    whole = arrays_of(tune("whole", **COMMON).best)
    assert f"training all 30 weights, {total:,} parameters\n" in capsys.readouterr().err

    shares = arrays_of(tune("shares", layer_decay=0.5, **COMMON).best)
    for name, rate in zip(before, rates_of_beit(before, depth=2, decay=0.5), strict=True):
        full, part = whole[name] - before[name], shares[name] - before[name]
        assert abs(full).max() > 0, name
        np.testing.assert_allclose(part, rate * full, rtol=1e-3, atol=1e-6, err_msg=name)

    said = capsys.readouterr().err.split(f"{total:,} parameters; share of --lr:\n")[1]
    rows = [line.split() for line in said.splitlines()[:5]]
    assert {row[0]: float(row[1]) for row in rows} == {
        "head": 1, "pre_head_layer_norm": 1, "mixer_block_1": 0.5, "mixer_block_0": 0.25,
        "stem": 0.125,
    }  # fmt: skip
    assert sum(int(row[2].replace(",", "")) for row in rows) == total


def test_a_frozen_backbone_keeps_every_bit_and_that_is_said(tune, start, capsys):
    fields = {"optimizer": "adamw", "precision": "float16", "num_steps": 5}
    run = tune(freeze="backbone", **fields, **COMMON)
    before, after = arrays_of(start), arrays_of(run.best)
    for name, array in before.items():
        same = array.tobytes() == after[name].tobytes()
        assert same == (not name.startswith("head/")), name
    state = newest_checkpoint(run.checkpoints).arrays
    slots = [name for name, array in state.items() if name.startswith("optimizer/") and array.ndim]
    assert len(slots) == 6 and all("head" in name for name in slots), "two moments, the average"
    total = sum(array.size for array in before.values())
    said = f"the head alone: 2 of 30 weights, 170 of {total:,} parameters; the rest is frozen\n"
    assert said in capsys.readouterr().err


def test_a_frozen_model_is_described_by_what_is_left():
    model = build_mixer((4, 4), (2, 2), channels=1, depth=2, dim=4, num_classes=3)
    freeze_backbone(model)
    assert [weight.path for weight in model.trainable_weights] == ["head/kernel", "head/bias"]
    assert "2 of 30 weights, 15 of" in describe_trained(model)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"freeze": "backbone"}, "--freeze=backbone without --checkpoint would train a head on"),
        ({"freeze": "backbone", "checkpoint": "x", "layer_decay": 0.9}, "--layer_decay=0.9 is for"),
        ({"freeze": "backbone", "checkpoint": "x", "dropout": 0.1}, "--dropout=0.1 is for"),
        ({"freeze": "backbone", "checkpoint": "x", "stochastic_depth": 0.1}, "--stochastic_depth="),
    ],
)
def test_what_would_change_nothing_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        resolve(Config(**fields), data_of("0123456789", 1))


@pytest.mark.parametrize("value", [0.0, 1.1, -0.5])
def test_layer_decay_is_a_share(value):
    with pytest.raises(InputError, match="--layer_decay: expected"):
        Config(layer_decay=value)


# === The official protocol ===

# Steps, warm-up, share held out to choose the learning rate with; the images that a set of the
# sizes below then has to train, choose and test with.
PROTOCOL = {
    "cifar10": (10_000, 500, 0.02, (98, 2, 12)),
    "cifar100": (10_000, 500, 0.02, (98, 2, 12)),
    "oxford_iiit_pet": (500, 100, 0.1, (90, 10, 12)),
    "oxford_flowers102": (500, 100, 0.1, (99, 11, 12)),
    "imagenet2012": (20_000, 500, 0.01, (99, 1, 10)),
}
SIZES = {
    "oxford_flowers102": {"train": 100, "validation": 10, "test": 12},
    "imagenet2012": {"train": 100, "validation": 10},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a small set under each of the names, made by tensorflow-datasets."""
    directory = tmp_path_factory.mktemp("tfds")
    for name in PROTOCOL:
        write_set(directory, name, SIZES.get(name, {"train": 100, "test": 12}))
    return directory


def small(prepared):
    """Flags for these images and for weights that are there."""
    return [
        f"--data_dir={prepared}", f"--checkpoint={GOLDEN / 'official_mixer.npz'}",
        "--image_shape=24,16", "--batch_size=16",
    ]  # fmt: skip


def preset(name, *flags):
    config, _, _ = parse(Config, [f"--flagfile={ROOT}/flags/finetune_{name}.flags", *flags])
    return config


@pytest.mark.parametrize("name", PROTOCOL)
def test_presets_are_the_protocol(name):
    config = preset(name)
    steps, warmup, held_out, _ = PROTOCOL[name]
    assert (config.num_steps, config.warmup_step, config.schedule_unit) == (steps, warmup, "step")
    assert config.validation_fraction == held_out
    assert (config.optimizer, config.momentum, config.scheduler) == ("sgd", 0.9, "cosine")
    assert (config.batch_size, config.clip_norm, config.decay) == (512, 1.0, 0.0)
    assert (config.dataset, config.image_shape) == (name, (224, 224))
    assert (config.inception_crop, config.flip) == (0.05, True)
    for other in ("mixup", "cutmix", "dropout", "stochastic_depth", "label_smoothing", "ema"):
        assert getattr(config, other) == 0, other


@pytest.mark.parametrize("name", PROTOCOL)
def test_presets_choose_on_a_share_of_what_the_last_run_learns_from(prepared, name):
    train, validation, test = PROTOCOL[name][3]
    first = plan_run(preset(name, *small(prepared))).dataset
    splits = (first.train, first.validation, first.test)
    assert [len(split) for split in splits] == [train, validation, test]
    last = plan_run(preset(name, *small(prepared), "--validation_fraction=0")).dataset
    assert last.validation is None
    assert (len(last.train), len(last.test)) == (train + validation, test)


TRAINED = [  # the others differ in names, numbers and splits only
    *(pytest.param(name, marks=pytest.mark.slow) for name in list(PROTOCOL)[:-1]),
    "imagenet2012",
]


@pytest.mark.parametrize("name", TRAINED)
def test_presets_train(prepared, tmp_path, name):
    """For three steps, from official weights."""
    flags = ["--num_steps=3", "--warmup_step=1", "--jit=false", f"--output_dir={tmp_path}"]
    after = arrays_of(fit(preset(name, *small(prepared), *flags)).best)
    assert after["head/kernel"].any()
    with np.load(GOLDEN / "official_mixer.npz") as before:
        assert 0 < abs(after["stem/kernel"] - before["stem/kernel"]).max() < 0.1
