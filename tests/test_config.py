"""Tests `keras_mixer/config.py`, `keras_mixer/resolve.py` and `keras_mixer/commandline.py`."""

import dataclasses
import inspect

import pytest
from conftest import GOLDEN

from keras_mixer.config.options import as_flags, describe, option, parse
from keras_mixer.config.training import ARCHITECTURE, PREPARATION, Config
from keras_mixer.data.sources import open_dataset
from keras_mixer.config.data import DataOptions, DatasetOptions
from keras_mixer.errors import InputError
from keras_mixer.model.variants import VARIANTS
from keras_mixer.config.resolve import resolve

FIELDS = dataclasses.fields(Config)


def parsed(*arguments):
    return parse(Config, arguments)[0]


# === Flags ===


@dataclasses.dataclass(frozen=True)
class Lists:
    """Options that are lists, as verbs have them."""

    shots: tuple[int, ...] = option((1, 5), "Numbers.", low=1)
    lrs: tuple[float, ...] | None = option(None, "Numbers.", above=0.0)
    datasets: tuple[str, ...] = option(("a",), "Names.")


def test_lists_are_separated_by_commas():
    options, _, _ = parse(Lists, ["--shots=3", "--lrs=0.1, 1e-2", "--datasets=a,b"])
    assert options == Lists((3,), (0.1, 0.01), ("a", "b"))
    assert as_flags(options) == ["--shots=3", "--lrs=0.1,0.01", "--datasets=a,b"]
    assert parse(Lists, as_flags(options))[0] == options
    assert parse(Lists, [])[0] == Lists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--shots=1,x",
            "--shots: expected one or more integer values, separated by commas, received 1,x",
        ),
        (
            "--shots=5,0",
            "--shots: expected one or more integer values, separated by commas "
            "at least 1, received 5,0",
        ),
        ("--lrs=0.1,nan", "--lrs: expected a finite number, received 0.1,nan"),
        ("--datasets=a,,b", "--datasets: expected a value, received nothing"),
        ("--shots=", "--shots: expected one or more integer values"),
    ],
)
def test_bad_lists_are_refused(argument, message):
    with pytest.raises(InputError, match=message):
        parse(Lists, [argument])


def test_options_of_the_data_are_what_the_data_are_asked_with():
    source, names = (
        {field.name for field in dataclasses.fields(options)}
        for options in (DatasetOptions, DataOptions)
    )
    elsewhere = {"num_classes", "batch_size", "seed", "label_smoothing"}
    assert source == set(inspect.signature(open_dataset).parameters)
    assert names == {*source, *PREPARATION, "class_weights"} - elsewhere


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("--depth=3", "depth", 3),
        ("--image_shape=16,24", "image_shape", (16, 24)),
        ("--image_shape=(16, 24)", "image_shape", (16, 24)),
        ("--image_shape=16x24", "image_shape", (16, 24)),
        ("--patch_shape=4", "patch_shape", (4, 4)),
        ("--lr=1e-2", "lr", 0.01),
        ("--flip", "flip", True),
        ("--noexport", "export", False),
        ("--export=false", "export", False),
        ("--token_mixing=false", "token_mixing", False),
        ("--scheduler=linear", "scheduler", "linear"),
    ],
)
def test_flags_are_read(argument, name, value):
    assert getattr(parsed(argument), name) == value
    assert getattr(Config(), name) != value, "else the test could not fail"


def test_flagfile_is_read_and_later_flags_win(tmp_path):
    preset = tmp_path / "preset.flags"
    preset.write_text("# a preset\n--depth=3\n--dim=64\n")
    config = parsed(f"--flagfile={preset}", "--dim=32")
    assert (config.depth, config.dim) == (3, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depht=3"], "unknown command line flag 'depht'. Did you mean: depth ?"),
        (["--depth=abc"], "--depth: expected an integer, received abc"),
        (["--depth"], "missing value for flag --depth"),
        (["--depth="], "--depth: expected an integer, received nothing"),
        (["--depth=0"], "--depth: expected an integer at least 1 and at most 1000, received 0"),
        (["--lr=nan"], "--lr: expected a finite number, received nan"),
        (["--lr=-1"], "--lr: expected a number at most 1000.0 and above 0.0, received -1.0"),
        (["--dropout=1"], "--dropout: expected a number at least 0.0 and below 1.0, received 1.0"),
        (["--image_shape=1,2,3"], "--image_shape: expected height,width as positive integers"),
        (
            ["--image_shape=0"],
            "--image_shape: expected height,width as positive integers at least 1",
        ),
        (["--randaugment=2"], "--randaugment: expected n,m as integers, received 2"),
        (["--randaugment=2,31"], "--randaugment: expected n,m as integers at least 0 and at most"),
        (["--scheduler=cosin"], "one of cosine, linear, received cosin; did you mean cosine?"),
        (["--flip=maybe"], "--flip: expected true or false, received maybe"),
        (["--noflip=true"], "noflip"),
        (["--output_dir="], "--output_dir: expected a value, received nothing"),
        (["--name=a/b"], "--name: expected a plain folder name, received a/b"),
        (["flags/digits.flags"], "unexpected argument 'flags/digits.flags'"),
        (["flags/digits.flags"], "presets --flagfile=flags/digits.flags"),
        (["--flagfile=/nowhere.flags"], "unable to open flagfile"),
        ([f"--flagfile={GOLDEN / 'official_mixer.npz'}"], "--flagfile: not a text file"),
    ],
)
def test_mistakes_are_one_line_that_names_the_flag(arguments, message):
    with pytest.raises(InputError) as error:
        parsed(*arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


NUMBERS = [f.name for f in FIELDS if f.type in (int, float, int | None)]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e308", "9" * 30, "", "x"])
def test_no_number_may_be_nonsense(name, value):
    with pytest.raises(InputError, match=f"--{name}: expected"):
        parsed(f"--{name}={value}")


def test_library_users_get_the_same_checks():
    with pytest.raises(InputError, match="--depth: expected an integer at least 1"):
        Config(depth=0)
    with pytest.raises(InputError, match="--scheduler: expected one of"):
        Config(scheduler="step")
    with pytest.raises(InputError, match="--depth: expected an integer, received 6"):
        Config(depth="6")
    with pytest.raises(InputError, match="--image_shape: expected height,width"):
        Config(image_shape=(8, 8, 3))


def test_help_names_every_flag_with_its_default():
    text = describe(Config, "usage")
    for field in FIELDS:
        section = text.split(f"  --{field.name}\n")[1].split("\n  --")[0]
        flat = " ".join(section.split())
        if field.default is not None:
            assert "(default:" in flat, field.name
        if field.metadata["choices"]:
            assert all(choice in flat for choice in field.metadata["choices"])
    for sentence in ("(default: 6)", "(default: 512)", "(default: 0.001)", "(default: output/)"):
        assert sentence in " ".join(text.split())


def test_defaults_are_those_of_the_public_readme():
    config = resolve(Config(), 10)
    expected = {
        "depth": 6, "dim": 512, "batch_size": 16, "lr": 1e-3, "momentum": 0.9, "decay": 0,
        "num_steps": 30, "warmup_step": 10, "scheduler": "cosine", "output_dir": "output/",
        "checkpoint": None,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    photos = resolve(Config(dataset="folder"), 120)
    assert (photos.image_shape, photos.patch_shape, photos.num_classes) == (
        (256, 256), (16, 16), 120,
    )  # fmt: skip


# === Resolving ===


def test_widths_follow_dim():
    config = resolve(Config(dim=48), 10)
    assert (config.tokens_mlp_dim, config.channels_mlp_dim) == (24, 192)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_set_patch_depth_and_widths(name):
    config = resolve(Config(variant=name), 10)
    row = VARIANTS[name]
    assert config.image_shape == (224, 224)
    assert config.patch_shape == (row.patch, row.patch)
    for field in ("depth", "dim", "tokens_mlp_dim", "channels_mlp_dim"):
        assert getattr(config, field) == getattr(row, field)
    assert resolve(Config(variant=name, depth=2), 10).depth == 2


@pytest.mark.parametrize(("num_steps", "warmup"), [(30, 10), (100, 10), (10, 3), (2, 0), (1, 0)])
def test_warmup_left_open_fits_short_runs(num_steps, warmup):
    assert resolve(Config(num_steps=num_steps), 10).warmup_step == warmup


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": 5}, "--num_classes=5: the data hold 10 classes"),
        (
            {"patch_shape": (3, 2)},
            "the height 8 is no multiple of 3; the nearest that are: 6 and 9",
        ),
        ({"patch_shape": (2, 16)}, "the width 8 is no multiple of 16; the nearest that are: 16"),
        ({"randaugment": (1, 9), "image_shape": (2, 2)}, "at least 3 pixels a side"),
        ({"eval_crop": 0.01}, "--eval_crop=0.01: expected 0, or at least 0.1"),
        ({"randaugment": (0, 9)}, "--randaugment=0,9: expected n,m with n at least 1"),
        ({"warmup_step": 30}, "--warmup_step=30 must be below --num_steps=30"),
        ({"optimizer": "adam", "momentum": 0.5}, "--momentum=0.5 is for --optimizer=sgd"),
        ({"token_mixing": False, "channel_mixing": False}, "leave nothing to train"),
    ],
)
def test_contradictions_are_named(fields, message):
    with pytest.raises(InputError) as error:
        resolve(Config(**fields), 10)
    assert message in str(error.value)


CHECKPOINT = {
    "image_shape": (8, 8), "patch_shape": (4, 4), "channels": 1, "depth": 2, "dim": 6,
    "tokens_mlp_dim": 5, "channels_mlp_dim": 7, "num_classes": 3, "activation": "relu",
    "token_mixing": True, "channel_mixing": False,
}  # fmt: skip


def test_a_checkpoint_brings_its_architecture():
    config = resolve(Config(checkpoint="x"), 10, CHECKPOINT)
    for name in set(ARCHITECTURE) - {"num_classes"}:
        assert getattr(config, name) == CHECKPOINT[name]
    assert config.num_classes == 10


def test_flags_that_contradict_the_checkpoint_are_named():
    with pytest.raises(InputError, match=r"--depth=3: the checkpoint x has depth=2"):
        resolve(Config(checkpoint="x", depth=3), 10, CHECKPOINT)


def test_a_variant_that_contradicts_the_checkpoint_is_named():
    with pytest.raises(InputError, match="--variant=B/16 has .*; leave --variant out"):
        resolve(Config(checkpoint="x", variant="B/16"), 10, CHECKPOINT)


def test_json_round_trip():
    config = resolve(Config(image_shape=(16, 8), flip=True, ema=0.9), 10)
    assert Config.from_json(config.to_json()) == config
    with pytest.raises(InputError, match="unknown options: colour"):
        Config.from_json({"colour": 1})
