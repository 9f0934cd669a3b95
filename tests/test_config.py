"""Tests `keras_mixer/config/`: flags, their checks, and what is filled in."""

import dataclasses
import inspect
import os
import tomllib
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, SMALL, data_of

from keras_mixer.config.command_line import describe, parse
from keras_mixer.config.data import AugmentationOptions, DatasetOptions
from keras_mixer.config.options import OTHER_NAMES, as_flags, flags_of, option
from keras_mixer.config.presets import OF_MIXER_TRAINING, preset_folder, preset_names, preset_path
from keras_mixer.config.resolve import resolve
from keras_mixer.config.training import Config
from keras_mixer.data.sources import READERS, open_dataset
from keras_mixer.errors import InputError
from keras_mixer.model.architecture import FIELDS as ARCHITECTURE
from keras_mixer.model.architecture import MIXER_FIELDS
from keras_mixer.model.variants import VARIANTS

FIELDS = flags_of(Config)


def parsed(*arguments):
    return parse(Config, arguments)[0]


CHECKPOINT = SMALL.replace(activation="relu", channel_mixing=False)


def resolved(classes=10, **fields):
    """Returns the filled config for data of so many classes; any checkpoint is CHECKPOINT."""
    names, start = tuple(map(str, range(classes))), CHECKPOINT if "checkpoint" in fields else None
    return resolve(Config(**fields), data_of(names, CHECKPOINT.channels), start)[0]


# === Flags ===


@dataclasses.dataclass(frozen=True)
class Lists:
    """Options that are lists, as several commands have them."""

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


def test_options_are_the_arguments_of_the_functions_they_are_passed_to():
    from keras_mixer.preprocessing.augment import augment
    from keras_mixer.preprocessing.input_pipeline import training_batches

    dataset, augmentation = (
        {field.name for field in dataclasses.fields(options)}
        for options in (DatasetOptions, AugmentationOptions)
    )
    batches, augmented = (
        inspect.signature(function).parameters for function in (training_batches, augment)
    )
    dataset = dataset - {"bad_images"} | {"find_bad"}
    named = {*inspect.signature(open_dataset).parameters} - {"least_classes", "options"}
    assert dataset == named.union(*(reader.options for reader in READERS.values()))
    augmented = {*augmented} - {"images", "seed", "part"}
    assert augmentation == {"inception_crop", "mixup", "cutmix"} | augmented
    assert augmentation - augmented < set(batches)


def test_option_refuses_unknown_keywords():
    with pytest.raises(TypeError, match="hihg"):
        option(1, "A number.", hihg=3)


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("--depth=3", "depth", 3),
        ("--image_shape=16,24", "image_shape", (16, 24)),
        ("--image_shape=(16, 24)", "image_shape", (16, 24)),
        ("--image_shape=16x24", "image_shape", (16, 24)),
        ("--image_shape=16 24", "image_shape", (16, 24)),
        ("--data_dir=~/photos", "data_dir", os.path.expanduser("~/photos")),
        ("--patch_shape=4", "patch_shape", (4, 4)),
        ("--lr=1e-2", "lr", 0.01),
        ("--flip", "flip", True),
        ("--noexport", "export", False),
        ("--export=false", "export", False),
        ("--token_mixing=false", "token_mixing", False),
        ("--scheduler=linear", "scheduler", "linear"),
        ("--optimizer=adamW", "optimizer", "adamw"),
        ("--variant=b/16", "variant", "B/16"),
        ("--epochs=3", "num_steps", 3),
        ("--warmup_epochs=3", "warmup_step", 3),
        ("--learning_rate=0.1", "lr", 0.1),
        ("--weight_decay=0.1", "decay", 0.1),
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
        (
            ["--scheduler=cosin"],
            "one of cosine, linear, constant, step, received cosin; did you mean cosine?",
        ),
        (["--flip=maybe"], "--flip: expected true or false, received maybe"),
        (["--noflip=true"], "noflip"),
        (["--output_dir="], "--output_dir: expected a value, received nothing"),
        (["--name=a/b"], "--name: expected a plain folder name, received a/b"),
        (["--img_size=32"], "unknown flag --img_size; it is called --image_shape here"),
        (["--drop_path=0.1"], "unknown flag --drop_path; it is called --stochastic_depth here"),
        (["--workers=2"], "unknown flag --workers; leave it out: images are read by all cores"),
        ([str(GOLDEN)], f"a folder of photos --preset=photos --data_dir={GOLDEN}"),
        (["--resume"], "--resume: the same command continues its run"),
        (["flags/digits.flags"], "unexpected argument 'flags/digits.flags'"),
        (["flags/digits.flags"], "presets --flagfile=flags/digits.flags"),
        (["--flagfile=/nowhere.flags"], "unable to open flagfile"),
        ([f"--flagfile={GOLDEN / 'official_mixer.npz'}"], "--flagfile: not a text file"),
        (["--num_steps=0"], "--epochs: expected an integer at least 1"),
        (["--learning_rate=x"], "--lr: expected a number, received x"),
        (["--epochs=3", "--schedule_unit=step"], "--epochs counts epochs, --schedule_unit=step"),
        (["--warmup_epochs=1", "--schedule_unit=step"], "give --num_steps and --warmup_step with"),
    ],
)
def test_mistakes_are_one_line_that_names_the_flag(arguments, message):
    with pytest.raises(InputError) as error:
        parsed(*arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


NUMBERS = [f.metadata["title"] or f.name for f in FIELDS if f.type in (int, float, int | None)]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e308", "9" * 30, "", "x"])
def test_no_number_may_be_nonsense(name, value):
    with pytest.raises(InputError, match=f"--{name}: expected"):
        parsed(f"--{name}={value}")


def test_library_users_get_the_same_checks():
    with pytest.raises(InputError, match="--depth: expected an integer at least 1"):
        Config(depth=0)
    with pytest.raises(InputError, match="--scheduler: expected one of"):
        Config(scheduler="exponential")
    with pytest.raises(InputError, match="--depth: expected an integer, received '6'"):
        Config(depth="6")
    with pytest.raises(InputError, match="--image_shape: expected height,width"):
        Config(image_shape=(8, 8, 3))


def test_python_programs_may_write_what_python_programs_write():
    given = Config(
        epochs=np.int64(2), image_shape=64, patch_shape=[8, 4], optimizer="AdamW", variant="b/16",
        learning_rate=np.float32(0.5), data_dir=Path("photos"),
    )  # fmt: skip
    assert given == Config(
        num_steps=2, image_shape=(64, 64), patch_shape=(8, 4), optimizer="adamw", variant="B/16",
        lr=0.5, data_dir="photos",
    )  # fmt: skip
    assert type(given.num_steps) is int
    assert dataclasses.replace(given, num_steps=3).num_steps == 3


@pytest.mark.parametrize(
    "values, message",
    [
        ({"epoch": 2}, "Config has no option epoch; did you mean epochs?"),
        ({"colour": 2}, "Config has no option colour"),
        ({"epochs": 2, "num_steps": 2}, "an option is given twice: epochs, num_steps"),
        ({"image_shape": "64"}, "--image_shape: expected height,width as positive integers"),
        ({"randaugment": 2}, "--randaugment: expected n,m as integers, received 2"),
    ],
)
def test_python_programs_are_told_what_is_wrong(values, message):
    with pytest.raises(InputError, match=f"^{message}"):
        Config(**values)


def test_help_describes_every_flag_once_with_its_default():
    text = describe(Config, "usage")
    for field in FIELDS:
        names = [field.name, *field.metadata["aliases"]]
        names.sort(key=lambda name: name != field.metadata["title"])
        heading = ", ".join(f"--{name}" for name in names)
        _, section = text.split(f"\n  {heading}\n")
        flat = " ".join(section.split("\n  --")[0].split())
        if field.default is not None:
            assert "(default:" in flat, field.name
        if field.metadata["choices"]:
            assert all(choice in flat for choice in field.metadata["choices"])
    for sentence in ("(default: 6)", "(default: 512)", "(default: 0.001)", "(default: output/)"):
        assert sentence in " ".join(text.split())


def test_help_begins_with_examples_and_the_flags_to_start_with():
    title, examples, basic, *others = describe(Config, "usage", ("one", "two")).split("\n\n")
    assert (title, examples) == ("usage", "Examples:\n  one\n  two")
    assert basic.startswith("Flags to start with:\n  --preset\n")
    for name in ("dataset", "checkpoint", "depth", "lr", "epochs", "output_dir"):
        assert f"\n  --{name}" in basic
    assert [text.split(":")[0] for text in others] == [
        "Data", "Augmentation", "Model", "Optimization", "Run", "Flags of all commands",
    ]  # fmt: skip


def test_defaults_are_those_of_the_public_readme():
    config = resolved()
    expected = {
        "depth": 6, "dim": 512, "batch_size": 16, "lr": 1e-3, "momentum": 0.9, "decay": 0,
        "num_steps": 30, "warmup_step": 10, "scheduler": "cosine", "output_dir": "output/",
        "checkpoint": None,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    photos = resolved(120, dataset="folder")
    assert (photos.image_shape, photos.patch_shape, photos.num_classes) == (
        (256, 256), (16, 16), 120,
    )  # fmt: skip


# === Presets ===


def test_presets_are_the_flagfiles_of_this_clone():
    assert preset_folder() == ROOT / "flags"
    assert preset_path("digits") == ROOT / "flags" / "digits.flags"
    assert {f"{name}.flags" for name in preset_names()} == {
        path.name for path in (ROOT / "flags").glob("*.flags")
    }
    with pytest.raises(InputError, match="--preset=: expected one of cifar10, "):
        parse(Config, ["--preset"])


def test_the_name_of_a_preset_is_kept():
    path = preset_path("digits")
    for words in (["--preset=digits"], ["--flagfile", str(path)], [f"--flagfile={path}"]):
        assert parsed(*words, "--epochs=2").preset_name == "digits"
    assert parsed("--depth=2").preset_name is None
    config = parsed("--preset=digits")
    assert Config.from_json(config.to_json()).preset_name == "digits"
    assert not [flag for flag in as_flags(config) if "preset" in flag], "flags.txt has the values"


def test_a_preset_can_be_loaded_and_changed_from_python():
    config = Config.preset("photos", data_dir="photos", epochs=3)
    expected = parsed("--preset=photos", "--data_dir=photos", "--epochs=3")
    assert config == expected and config.preset_name == "photos"
    assert Config.preset("digits", model="mlp").patch_shape is None
    with pytest.raises(InputError, match="--preset=photo: expected one of .*mean photos"):
        Config.preset("photo")
    with pytest.raises(InputError, match="Config has no option epoch"):
        Config.preset("photos", epoch=3)


def test_a_warmup_of_a_preset_fits_the_epochs_that_are_given(capsys):
    assert parsed("--preset=photos", "--epochs=2").warmup_step is None
    assert "the preset's warm-up of 2 is shortened" in capsys.readouterr().err
    assert Config.preset("photos", epochs=1).warmup_step is None
    assert parsed("--preset=photos", "--epochs=3").warmup_step == 2
    assert parsed("--epochs=2", "--preset=photos", "--warmup_epochs=5").warmup_step == 5


@pytest.mark.parametrize("model", [["--model=mlp"], ["--model", "cnn"], ["--model=MLP"]])
def test_presets_of_mixers_are_for_baselines_without_what_is_of_mixer_layers(model):
    for name in preset_names():
        config, given, _ = parse(Config, [*model, f"--preset={name}"])
        mixer = parse(Config, [f"--preset={name}"])[0]
        assert not given.keys() & {*MIXER_FIELDS, *OF_MIXER_TRAINING}, name
        assert (config.dataset, config.lr, config.num_steps) == (
            mixer.dataset, mixer.lr, mixer.num_steps,
        )  # fmt: skip
    with pytest.raises(InputError, match="--preset=nothing: expected one of"):
        parse(Config, [*model, "--preset=nothing"])


def test_an_installed_package_has_them_inside(tmp_path, monkeypatch):
    """pyproject.toml puts flags/ into the wheel as keras_mixer/flags."""
    (tmp_path / "flags").mkdir()
    monkeypatch.setattr("keras_mixer.config.presets._PACKAGE", tmp_path)
    assert preset_folder() == tmp_path / "flags"
    assert '"keras_mixer.flags" = "flags"' in (ROOT / "pyproject.toml").read_text()


def test_every_package_is_in_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in (ROOT / "keras_mixer").rglob("*.py")}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(listed) == found | {"keras_mixer.flags"}


# === Resolving ===


def test_widths_follow_dim():
    config = resolved(dim=48)
    assert (config.tokens_mlp_dim, config.channels_mlp_dim) == (24, 192)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_set_patch_depth_and_widths(name):
    config = resolved(variant=name)
    row = VARIANTS[name]
    assert config.image_shape == (224, 224)
    assert config.patch_shape == (row.patch, row.patch)
    for field in ("depth", "dim", "tokens_mlp_dim", "channels_mlp_dim"):
        assert getattr(config, field) == getattr(row, field)
    assert resolved(variant=name, depth=2).depth == 2


@pytest.mark.parametrize(("num_steps", "warmup"), [(30, 10), (100, 10), (10, 3), (2, 0), (1, 0)])
def test_the_default_warmup_fits_short_runs(num_steps, warmup):
    assert resolved(num_steps=num_steps).warmup_step == warmup


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
        ({"eval_crop": 0.01}, "--eval_crop=0.01: expected 0, or a number from 0.1 to 1"),
        ({"randaugment": (0, 9)}, "--randaugment=0,9: expected n,m with n at least 1"),
        ({"warmup_step": 30}, "--warmup_epochs=30 must be below --epochs=30"),
        (
            {"warmup_step": 30, "schedule_unit": "step"},
            "--warmup_step=30 must be below --num_steps=30",
        ),
        ({"optimizer": "adam", "momentum": 0.5}, "--momentum=0.5 is for --optimizer=sgd"),
        ({"drop_every": 5}, "are for --scheduler=step and would change nothing with --scheduler=c"),
        ({"drop_factor": 0.5, "scheduler": "constant"}, "--scheduler=constant; leave them out"),
        ({"token_mixing": False, "channel_mixing": False}, "leave nothing to train"),
        (
            {"dim": 65536},
            "--image_shape=8,8, --patch_shape=2,2, --depth=6, --dim=65536: a layer's activations "
            "would have 2,147,483,648 values, expected at most 1,073,741,824",
        ),
        ({"checkpoint": "x", "depth": 2}, "--depth=2: the checkpoint x has depth 3; leave the"),
        (
            {
                "checkpoint": "x",
                "image_shape": (16, 24),
                "resize_tokens": "tile",
                "tokens_mlp_dim": 5,
            },
            "--tokens_mlp_dim=5: the checkpoint x has tokens_mlp_dim 20 once it is resized",
        ),
        (
            {"checkpoint": "x", "variant": "B/16"},
            "--variant=B/16 has image_shape 224,224, the checkpoint x image_shape 8,12; "
            "leave --variant out",
        ),
    ],
)
def test_contradictions_are_named(fields, message):
    with pytest.raises(InputError) as error:
        resolved(**fields)
    assert message in str(error.value)


BAD_VALUES = {
    int: (-1, (1 << 20) + 1, 2.0, True), tuple: ((0, 4), (4, (1 << 20) + 1), (4, 4, 4), "4"),
    str: ("swish",), bool: (1, "yes"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURE) - {"channels"}))
def test_what_an_architecture_refuses_is_refused_in_terms_of_flags(name):
    for value in BAD_VALUES[type(getattr(SMALL, name))]:
        with pytest.raises(InputError, match=f"^{name}: expected"):
            SMALL.replace(**{name: value})
        with pytest.raises(InputError, match=f"^--{name}: expected"):
            Config(**{name: value})


def test_a_checkpoint_brings_its_architecture():
    config = resolved(checkpoint="x")
    for name in set(ARCHITECTURE) - {"num_classes", "channels"}:
        assert getattr(config, name) == getattr(CHECKPOINT, name)
    assert config.num_classes == 10


def test_json_round_trip():
    config = resolved(image_shape=(16, 8), flip=True, ema=0.9)
    assert Config.from_json(config.to_json()) == config
    with pytest.raises(InputError, match="unknown options: colour"):
        Config.from_json({"colour": 1})


def test_runs_of_earlier_versions_are_read():
    """They had an option for permuted pixels."""
    config = resolved(flip=True)
    assert Config.from_json(config.to_json() | {"permutation": "none"}) == config
    with pytest.raises(InputError, match="permuted pixels, which this version no longer supports"):
        Config.from_json({"permutation": "global"})


def test_every_name_of_other_libraries_is_answered_by_a_field_and_shadows_none():
    names = {name for field in FIELDS for name in (field.name, *field.metadata["aliases"])}
    assert set(OTHER_NAMES.values()) <= names
    with pytest.raises(InputError, match="has no option smoothing; it is called label_smoothing"):
        Config(smoothing=0.1)
    assert Config(data_dir="~/photos").data_dir == os.path.expanduser("~/photos")
