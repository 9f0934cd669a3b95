"""Tests `keras_mixer/runs/run.py` and `open_run.py`: who may train where."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil

import pytest
from conftest import GOLDEN, rewrite

import keras_mixer.runs.open_run as open_module
import keras_mixer.runs.run as run_module
from keras_mixer import Config, InputError
from keras_mixer.compute.environment import environment
from keras_mixer.compute.process_group import SINGLE
from keras_mixer.config.command_line import parse
from keras_mixer.files import unseal
from keras_mixer.runs.open_run import (
    COMMON_OPTIONS,
    check_same_in_all,
    open_run,
    plan_run,
    read_run,
)
from keras_mixer.runs.run import (
    FORMAT,
    HISTORY,
    read_history,
    read_metrics,
    read_record,
    write_history,
    write_metrics,
)
from keras_mixer.weights import model_folder
from keras_mixer.weights.pretrained import read_pretrained

RECORD = '{"config": {}, "data": {"identity": ""}, "environment": {}}'


@pytest.fixture
def config(tmp_path):
    def make(**fields):
        return Config(**{"output_dir": str(tmp_path / "run"), "depth": 2, "dim": 8, **fields})

    return make


def opened(config):
    with open_run(config) as run:
        return run


def test_a_new_run_records_what_it_is(config):
    run = opened(config(flip=True, image_shape=(16, 8)))
    record = json.loads((run.directory / "config.json").read_text())
    assert record["format"] == FORMAT
    assert record["config"]["tokens_mlp_dim"] == 4, "values are resolved"
    assert record["data"]["images"] == {"train": 1293, "validation": 144, "test": 360}
    assert record["environment"].keys() >= {"tensorflow", "keras", "cpu", "cores"}


def test_flags_txt_repeats_the_run(config):
    given = config(flip=True, image_shape=(16, 8), export=False, lr=0.02)
    run = opened(given)
    again, _, _ = parse(Config, [f"--flagfile={run.directory / 'flags.txt'}"])
    assert again == given


def test_the_same_config_continues(config):
    opened(config())
    assert opened(config(save_every=5, export=False)).config.save_every == 5


def test_a_run_of_a_version_without_one_of_the_options_continues(config):
    path = opened(config()).directory / "config.json"
    for name in ("head_bias", "ema"):
        rewrite(path, lambda record, name=name: record["config"].pop(name))
    opened(config())
    with pytest.raises(InputError, match="--head_bias was 0.0, now 1.0"):
        opened(config(head_bias=1.0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0.5}, "--lr was 0.001, now 0.5"),
        ({"seed": 7}, "--seed was 0, now 7"),
        ({"num_steps": 31}, "--num_steps was 30, now 31"),
        ({"flip": True}, "--flip was false, now true"),
        ({"image_shape": (16, 8)}, "--image_shape was 8,8, now 16,8"),
        ({"precision": "bfloat16"}, "--precision was float32, now bfloat16"),
    ],
)
def test_another_config_is_refused_with_both_fixes(config, fields, message):
    opened(config())
    with pytest.raises(InputError) as error:
        opened(config(**fields))
    assert message in str(error.value)
    assert "--output_dir" in str(error.value)
    assert "--overwrite" in str(error.value)


def test_overwrite_discards_our_files_and_no_others(config):
    run = opened(config())
    (run.directory / "notes.txt").write_text("mine")
    write_metrics(run, {"test": {}})
    opened(config(lr=0.5, overwrite=True))
    assert (run.directory / "notes.txt").read_text() == "mine"
    assert run.scores == {}
    assert opened(config(lr=0.5)).config.lr == 0.5


def test_changed_data_are_noticed(folder, config):
    fields = {"dataset": "folder", "data_dir": str(folder), "image_shape": (8, 8),
              "patch_shape": (4, 4)}  # fmt: skip
    run = opened(config(**fields))
    (run.directory / HISTORY).touch()  # else it would start over
    (folder / "ant" / "0.png").rename(folder / "ant" / "renamed.png")
    with pytest.raises(InputError, match="was trained on other data"):
        opened(config(**fields))


def test_moved_data_are_the_same_data(folder, config, tmp_path):
    fields = {"dataset": "folder", "image_shape": (8, 8), "patch_shape": (4, 4)}
    run = opened(config(**fields, data_dir=str(folder)))
    folder.rename(tmp_path / "moved")
    opened(config(**fields, data_dir=str(tmp_path / "moved")))
    assert read_run(run.directory, tmp_path / "moved").dataset.class_names == ("ant", "bee", "cat")


def test_another_environment_is_printed(config, capsys):
    record = opened(config()).directory / "config.json"
    assert json.loads(record.read_text())["environment"] == environment()
    opened(config())
    assert capsys.readouterr().err == "", "the same environment"
    rewrite(record, lambda values: values["environment"].update(cores="9"))
    opened(config())
    said = capsys.readouterr().err
    assert "cores was 9" in said
    assert "last bits" in said


@pytest.mark.parametrize(
    "content, message",
    [
        *(
            (text, "or was not written by keras_mixer")
            for text in ("", "[]", '{"config": {}}', "<", RECORD)
        ),
        (RECORD[:-1] + ', "format": 2}', f"expected format {FORMAT}, received 2; another version"),
        (RECORD[:-1] + f', "format": {FORMAT}}}', "json: damaged"),
    ],
)
def test_a_config_that_is_not_of_this_version_is_not_touched(config, tmp_path, content, message):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(content)
    for overwrite in (False, True):
        with pytest.raises(InputError, match=message) as error:
            opened(config(overwrite=overwrite))
        assert "give another --output_dir" in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=message):
        read_run(tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_text() == content


def test_somebody_elses_checkpoints_are_not_touched(config, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(
        InputError, match="holds other files but no config.json, so it is not a run: checkpoints"
    ):
        opened(config())


def test_a_file_in_the_way_is_named(config, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(InputError, match=r"run: File exists"):
        opened(config())


def test_a_folder_in_place_of_the_lock_is_named(config, tmp_path):
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    with pytest.raises(InputError, match=r"run: Is a directory"):
        opened(config())


def test_a_directory_in_use_is_refused_before_any_data_are_read(config):
    with open_run(config()), pytest.raises(InputError, match="is in use"):
        opened(config(dataset="folder", data_dir="nowhere", checkpoint="nowhere"))


def test_no_run_can_end_in_a_directory_while_another_is_opened_there(config, trained, monkeypatch):
    """Its scores would be taken for those of the one that came late."""

    def meanwhile(*arguments):
        with contextlib.suppress(InputError), open_run(config(lr=0.5)) as other:
            write_metrics(other, {"test": {"top1": 1.0}})
        return read_pretrained(*arguments)

    monkeypatch.setattr(open_module, "read_pretrained", meanwhile)
    run = opened(Config(checkpoint=str(trained.directory), output_dir=config().output_dir))
    assert run.scores == {}
    assert json.loads((run.directory / "config.json").read_text())["config"]["lr"] == 0.001


@pytest.mark.parametrize("name", ["mine/new", "new/run"])
def test_a_refused_run_leaves_no_directory_behind(config, tmp_path, name):
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="--batch_size=1294: there are only 1293 training images"):
        opened(config(output_dir=str(tmp_path / name), batch_size=1294))
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_a_split_that_is_missing_is_named_before_training(folder, config, tmp_path):
    (tmp_path / "split").mkdir()
    folder.rename(tmp_path / "split" / "train")
    fields = {"dataset": "folder", "data_dir": str(tmp_path / "split"), "image_shape": (8, 8)}
    fields |= {"patch_shape": (4, 4)}
    with pytest.raises(InputError, match="no test split; give one of train, validation"):
        opened(config(**fields, eval_split="test"))
    with pytest.raises(InputError, match="no test split; give one of train$"):
        opened(config(**fields, validation_fraction=0.0))
    assert opened(config(**fields)).config.eval_split == "validation"


def test_a_folder_of_other_files_is_refused(config, folder, monkeypatch, tmp_path):
    for name in (".DS_Store", "job.log"):
        (tmp_path / name).touch()
    with pytest.raises(
        InputError,
        match="holds other files but no config.json, so it is not a run: ant, bee, cat; give a new",
    ):
        opened(config(output_dir=str(folder)))
    assert sorted(path.name for path in folder.iterdir()) == ["ant", "bee", "cat"]
    folder.rename(tmp_path.parent / f"{tmp_path.name}-moved")
    opened(config(output_dir=str(tmp_path)))


def test_a_run_inside_its_own_data_is_refused(config, folder):
    fields = {"dataset": "folder", "data_dir": str(folder), "image_shape": 8, "patch_shape": 4}
    with pytest.raises(InputError, match=f"lies inside --data_dir={folder}, where it would be tak"):
        opened(config(**fields, output_dir=str(folder / "run")))
    assert not (folder / "run").exists()


def test_data_are_found_from_any_working_directory(folder, config, monkeypatch, tmp_path):
    fields = {"dataset": "folder", "image_shape": (8, 8), "patch_shape": (4, 4)}
    monkeypatch.chdir(tmp_path)
    run = opened(config(**fields, data_dir="data"))
    assert f"--data_dir={folder}\n" in (run.directory / "flags.txt").read_text()
    monkeypatch.chdir("/")
    assert read_run(run.directory).dataset.class_names == ("ant", "bee", "cat")
    folder.rename(tmp_path / "moved")
    with pytest.raises(
        InputError, match=f"was trained on {folder}, which does not exist.*with --data_dir$"
    ):
        read_run(run.directory)
    assert read_run(run.directory, data_dir=tmp_path / "moved").config.depth == 2


def test_reading_what_is_no_run(tmp_path):
    with pytest.raises(InputError, match="not a run directory"):
        read_run(tmp_path)


def test_steps_of_epochs_and_of_steps(config):
    run = opened(config(batch_size=100, num_steps=5, warmup_step=2))
    assert (run.steps_per_epoch, run.total_steps, run.warmup_steps) == (12, 60, 24)
    run = opened(
        config(batch_size=100, num_steps=5, warmup_step=2, schedule_unit="step", overwrite=True)
    )
    assert (run.total_steps, run.warmup_steps) == (5, 2)


# === Starting points ===


def test_a_checkpoint_that_is_the_output_dir_is_refused_and_kept(trained, tmp_path):
    shutil.copytree(trained.directory, tmp_path / "run")
    for overwrite in (False, True):
        for checkpoint in (tmp_path / "run", tmp_path / "run" / "best"):
            with pytest.raises(InputError, match="is --output_dir=.* itself"):
                opened(Config(checkpoint=str(checkpoint), output_dir=str(tmp_path / "run"),
                              overwrite=overwrite))  # fmt: skip
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()


def test_a_changed_starting_point_is_noticed_until_there_are_checkpoints(trained, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(trained.directory, start)
    config = Config(checkpoint=str(start), output_dir=str(tmp_path / "run"), batch_size=64)
    run = opened(config)
    arrays, facts = model_folder.read_weights(start / "best")
    model_folder.write_weights(start / "best", {n: a + 1 for n, a in arrays.items()}, **facts)
    with pytest.raises(InputError, match="has changed since"):
        opened(config)
    shutil.copytree(start / "best", tmp_path / "other")
    with pytest.raises(InputError, match=f"has other weights than {start}, from which"):
        opened(dataclasses.replace(config, checkpoint=str(tmp_path / "other")))
    (run.checkpoints / "step-0000000001").mkdir(parents=True)
    shutil.rmtree(start)
    assert opened(config).config.dim == trained.config.dim, "it continues without its start"


# === Awkward moments ===


def test_remains_of_a_kill_are_cleared_and_the_run_is_usable(config):
    run = opened(config())
    (run.directory / ".history.csv.tmp-77").write_text("x")
    run.best.mkdir()
    (run.best / ".model.safetensors.tmp-77").write_text("x")
    (run.directory / "flags.txt").unlink()  # killed between the two
    opened(config())
    assert (run.directory / "flags.txt").exists()
    assert not list(run.directory.rglob(".*.tmp-*"))


def test_overwriting_spares_what_a_link_points_to(config, tmp_path):
    run = opened(config())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    (run.directory / "checkpoints").symlink_to(elsewhere)
    opened(config(lr=0.5, overwrite=True))
    assert (elsewhere / "mine").read_text() == "mine"
    opened(config(lr=0.5))


def test_logs_of_others_are_not_ours(config, tmp_path):
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "logs" / "job.out").write_text("mine")
    opened(config(overwrite=True))
    assert (tmp_path / "run" / "logs" / "job.out").exists()


def test_metrics_keep_scores_apart_from_facts(config):
    run = opened(config())
    write_metrics(run, {"validation": {"top1": 0.5}}, selected_epoch=3)
    write_metrics(run, {"test": {"top1": 0.25}})
    write_metrics(run, saved_model="x")
    scores = {"validation": {"top1": 0.5}, "test": {"top1": 0.25}}
    facts = {"selected_epoch": 3, "saved_model": "x"}
    assert read_metrics(run.directory) == (run.scores, facts) == (scores, facts)
    assert (run.selected_epoch, run.saved_model) == (3, "x")
    written = unseal(json.loads((run.directory / "metrics.json").read_text()))
    assert written == {**scores, "facts": facts, "seals": {}}


@pytest.mark.parametrize(
    "content",
    ["", "[]", "[" * 100_000, '{"test": 5}', '{"test": {"top1": 5}}', '{"test": {"top1": NaN}}',
     '{"test": {"top1": "x"}}', '{"test": null}', '{"facts": []}'],
)  # fmt: skip
def test_damaged_metrics_are_one_line(tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(InputError, match="metrics.json: damaged; "):
        read_metrics(tmp_path)


@pytest.mark.parametrize("name", ["history.csv", "metrics.json", "config.json"])
def test_every_changed_byte_of_a_scored_run_is_noticed(config, name):
    run = opened(config())
    write_history(run.directory, [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}])
    write_metrics(run, {"test": {"top1": 0.5, "n": 8}}, selected_epoch=2)
    content = (run.directory / name).read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        (run.directory / name).write_bytes(changed)
        read = read_record if name == "config.json" else read_history
        with pytest.raises(InputError, match=f"{name}.*(damaged|expected format)"):
            read(run.directory)


def test_a_file_that_cannot_be_read_now_is_not_damaged(config, monkeypatch):
    """The advice to remove it would lose what is intact."""
    run = opened(config())
    write_metrics(run, {"test": {"top1": 0.5}})
    write_history(run.directory, [{"epoch": 1}])

    def refuse(path, most):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for read, name in (
        (read_record, "config"),
        (read_metrics, "metrics"),
        (read_history, "metrics"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(run_module, "read_regular", refuse)
            message = f"{name}.json cannot be read now, nothing was changed: Input/output error$"
            with pytest.raises(InputError, match=message):
                read(run.directory)


def test_files_of_others_are_kept(config):
    directory = opened(config()).directory
    (directory / ".notes.tmp-mine").write_text("")
    (directory / ".history.csv.tmp-12").write_text("")
    opened(config())
    assert (directory / ".notes.tmp-mine").exists()
    assert not (directory / ".history.csv.tmp-12").exists()


def test_a_run_scored_on_another_split_can_be_finished(config):
    run = opened(config(eval_split="validation", export=False))
    assert not run.finished
    write_metrics(run, {"validation": {"top1": 0.5}})
    assert run.finished


@pytest.mark.parametrize("name", ["file/sub", "x" * 300, "new/" + "x" * 300])
def test_impossible_paths_are_named(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--output_dir=.*: (Not a directory|File name too long)"):
        opened(Config(output_dir=str(tmp_path / name)))
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_names_that_are_no_text_work(tmp_path):
    """A name in Latin-1, say; absl reads flagfiles as UTF-8, so that one cannot repeat it."""
    run = opened(Config(output_dir=str(tmp_path / "caf\udce9")))
    assert (run.directory / "flags.txt").read_bytes().endswith(b"caf\xe9\n")


def test_history_is_replaced_whole_and_read_as_numbers(config):
    run = opened(config())
    assert run.history == []
    write_history(run.directory, [{"epoch": 1, "loss": 0.5, "val_loss": None}])
    write_history(
        run.directory, [{"epoch": 1, "loss": 0.5, "val_loss": None}, {"epoch": 2, "loss": 0.4}]
    )
    assert (run.directory / HISTORY).read_text() == "epoch,loss,val_loss\n1,0.5,\n2,0.4,\n"
    assert run.history == [
        {"epoch": 1, "loss": 0.5, "val_loss": None},
        {"epoch": 2, "loss": 0.4, "val_loss": None},
    ]


def test_a_checkpoint_of_other_images_is_refused(config, tmp_path):
    fields = {"checkpoint": str(GOLDEN / "official_mixer.npz"), "image_shape": (24, 16)}
    with pytest.raises(InputError, match="images of 3 channels, --dataset=digits has 1"):
        opened(config(**fields))
    assert not (tmp_path / "run").exists()


# === Several processes ===


class OtherGroup:
    """A group of this process and another one, whose answer is that of this one, changed."""

    count = 2
    names = ("process 0 (a)", "process 1 (b)")

    def __init__(self, **changes):
        self.changes = changes

    def exchange(self, own):
        changed = {
            name: value | change if isinstance(value := own[name], dict) else change
            for name, change in self.changes.items()
        }
        return [own, own | changed]


@pytest.fixture
def run(tmp_path):
    return plan_run(Config(output_dir=str(tmp_path), depth=2, dim=8, lr=0.01))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"lr": "0.02"}}, "--lr is 0.02, on process 0 0.01"),
        ({"software": {"keras": "3.0"}}, r"keras is 3.0, on process 0 \d"),
        ({"software": {"keras_mixer": "abc"}}, "keras_mixer is abc, on process 0 [0-9a-f]{12}"),
        ({"data": "x"}, "its data have other files, sizes, labels or classes"),
        ({"start": "x"}, "its --checkpoint holds other weights"),
        ({"data": "x", "options": {"dim": "9"}}, "--dim is 9, on process 0 8; its data"),
    ],
)
def test_what_differs_is_named(run, changes, message):
    with pytest.raises(InputError, match=rf"process 1 \(b\) would train another run: {message}"):
        check_same_in_all(OtherGroup(**changes), run, None)


def test_equal_ones_are_accepted(run):
    check_same_in_all(OtherGroup(), run, {"sha256": "x"})
    check_same_in_all(SINGLE, run, None)


def test_options_that_change_no_result_may_differ(run):
    """Such as --data_dir, which may be another path on each host."""
    assert {"lr", "seed", "dataset"} <= set(COMMON_OPTIONS)
    assert not {"data_dir", "output_dir", "export_dir", "save_every"} & set(COMMON_OPTIONS)


def test_a_run_shows_what_users_need(run):
    """The other functions of runs/run.py are not its methods."""
    assert [name for name in dir(run) if not name.startswith("_")] == [
        *("best", "checkpoints", "config", "dataset", "directory", "finished", "group", "history"),
        *("identity", "logs", "pretrained", "saved_model", "scores", "selected_epoch", "spec"),
        *("steps_per_epoch", "total_steps", "warmup_steps"),
    ]
