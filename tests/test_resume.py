"""Tests `keras_mixer/runs/resume.py` in several processes, of which threads stand in here."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import TINY

from keras_mixer import Config, fit
from keras_mixer.compute.plan import resolve_plan
from keras_mixer.compute.process_group import ProcessGroup
from keras_mixer.compute.rank import Rank, free_port
from keras_mixer.errors import RunError
from keras_mixer.runs.open_run import read_run
from keras_mixer.runs.resume import last_state


def states_of(runs):
    """What `last_state` returns, or raises, in processes with these runs."""
    port = free_port()

    def find(index):
        try:
            with ProcessGroup(Rank("127.0.0.1", port, len(runs), index)) as group:
                object.__setattr__(runs[index], "group", group)
                return last_state(runs[index], resolve_plan(runs[index].config))
        except RunError as error:
            return error

    with ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(find, range(len(runs))))


@pytest.fixture
def run(tmp_path):
    """Returns a function that opens the same run again."""
    fit(
        Config(
            **TINY, export=False, output_dir=str(tmp_path / "run"), early_stopping=1, patch_shape=4
        )
    )
    return lambda: read_run(tmp_path / "run")


def test_the_others_read_the_checkpoint_that_process_0_finds(run):
    """A damaged newer one is left out by all."""
    newest, older = sorted(run().checkpoints.iterdir(), reverse=True)
    (newest / "arrays.safetensors").write_bytes(b"")
    (first, arrays), *others = states_of([run(), run(), run()])
    assert first.step == int(older.name.removeprefix("step-"))
    for progress, own in others:
        assert progress == first
        assert {n: a.tobytes() for n, a in own.items()} == {
            n: a.tobytes() for n, a in arrays.items()
        }


def test_a_folder_that_is_not_shared_is_refused_by_name(run, tmp_path):
    elsewhere = run()
    object.__setattr__(elsewhere, "directory", tmp_path / "elsewhere")
    (progress, _), error = states_of([run(), elsewhere])
    assert f"elsewhere/checkpoints/step-{progress.step:010d} cannot be read here" in str(error)
    assert "--output_dir must be a folder that all processes share" in str(error)
