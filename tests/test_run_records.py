"""Tests `keras_mixer/runs/run_records.py`."""

from keras_mixer.runs.run import OURS
from keras_mixer.runs.run_records import clear


def test_what_killed_processes_left_is_cleared_and_all_else_stays(tmp_path):
    left = [".config.json.tmp-12", ".flags.txt.tmp-1", "best/.model.json.tmp-7"]
    kept = ["config.json", "best/model.json", "mine.log", ".mine.tmp-3", "logs/other/events"]
    for name in (*left, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    clear(tmp_path, overwrite=False)
    assert [name for name in (*left, *kept) if (tmp_path / name).exists()] == kept


def test_to_overwrite_a_run_clears_its_files_alone(tmp_path):
    for name in (*OURS, "mine.log", "logs/other"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    clear(tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["logs", "mine.log", "other"]
