"""Tests `keras_mixer/runs/teamwork.py`: processes that differ are refused, by what differs."""

import pytest
from conftest import TINY

from keras_mixer import Config, InputError
from keras_mixer.compute.process_group import ALONE
from keras_mixer.runs import teamwork
from keras_mixer.runs.open_run import plan_run


class OtherTeam:
    """A team of this process and another one, whose answer is that of this one, changed."""

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
    return plan_run(Config(**TINY, output_dir=str(tmp_path)))


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
        teamwork.refuse_differences(OtherTeam(**changes), run, None)


def test_equal_ones_are_accepted(run):
    teamwork.refuse_differences(OtherTeam(), run, {"sha256": "x"})
    teamwork.refuse_differences(ALONE, run, None)


def test_options_that_change_no_result_may_differ(run):
    """Such as --data_dir, which may be another path on each host."""
    names = {field.name for field in teamwork._OPTIONS}
    assert {"lr", "seed", "dataset"} <= names
    assert not {"data_dir", "output_dir", "export_dir", "save_every"} & names
