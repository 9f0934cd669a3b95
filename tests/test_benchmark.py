"""Tests `keras-mixer benchmark`: its processes, table and counts; not speed itself."""

import importlib.util
import json
import sys

import pytest
from conftest import ROOT
from PIL import Image

from keras_mixer import Config, RunError
from keras_mixer.benchmark import measure, timm_worker
from keras_mixer.benchmark.worker import MEASURES, main
from keras_mixer.commands.studies import BenchmarkOptions
from keras_mixer.config.command_line import parse
from keras_mixer.config.options import options_of
from keras_mixer.model.architecture import Architecture
from keras_mixer.runs.open_run import plan_run

SIZES = {"depth": 1, "dim": 8, "image_shape": (8, 8), "patch_shape": (4, 4), "batch_size": 16}
FLAGS = ["--depth=1", "--dim=8", "--image_shape=8", "--patch_shape=4", "--batch_size=16"]


def measured(name, side, *rates, memory=0):
    return measure.Measurement(name, side, list(rates), 16, 0.5, 1.5, memory)


def test_multiply_adds_are_the_papers():
    """Table 1 of vision_transformer's README and timm: 12.6 G for B/16, 3.8 G for S/16."""
    sizes = {name: Architecture.create(name, num_classes=1000) for name in ("S/16", "B/16")}
    assert sizes["B/16"].multiply_adds == pytest.approx(12.60e9, rel=1e-3)
    assert sizes["S/16"].multiply_adds == pytest.approx(3.78e9, rel=1e-3)
    without = sizes["S/16"].replace(token_mixing=False, channel_mixing=False)
    assert without.multiply_adds == 196 * 512 * 768 + 512 * 1000


def test_table_shares_and_ratios():
    sizes = Architecture(**{k: v for k, v in SIZES.items() if k != "batch_size"}, num_classes=10)
    flops = 2 * sizes.multiply_adds
    rows = [
        measured("training", "keras_mixer", 90.0, 100.0, 140.0, memory=10**9),
        measured("input", "keras_mixer", 400.0),
        measured("fit", "keras_mixer", 72.0),
        measured("training", "timm", 50.0),
        measured("training", "timm, compiled", 80.0),
        measured("training", measure.ON_JAX, 200.0),
        measured("products", "keras_mixer", 100 * flops * 3 * 4),
    ]
    text = measure.as_table(rows, sizes, "float32")
    line = "| training | keras_mixer | 100.0 | 90.0–140.0 | 160.0 | 25% | 1.50 | 1,000 MB | 0.5 s |"
    assert line in text
    assert "training: 1.25 times timm, compiled" in text
    assert "training: 0.50 times keras_mixer on JAX" in text
    assert "fit: 0.90 of 1 / (1/training + 1/input)" in text
    assert text.index("| training | timm |") < text.index("| input |")


@pytest.mark.parametrize("name", sorted(MEASURES.keys() - {"fit"}))
def test_everything_can_be_measured(name, tmp_path):
    config = {**SIZES, "output_dir": str(tmp_path / "none"), "channels": 1}
    answers = []
    main(name, [json.dumps(config), "0.01", "0.01"], answers.append)
    start, *measured = answers
    assert start["images"] == {"latency": 1, "products": 2 * 2048**3}.get(name, 16)
    assert len(measured) == 2
    assert all(answer["images_per_second"] > 0 and answer["memory"] > 0 for answer in measured)
    assert not (tmp_path / "none").exists()


def test_command(run, tmp_path, monkeypatch):
    """In real processes, with another one that answers as timm's would."""
    monkeypatch.setattr(measure, "_FACTORS", (0.5, 4))
    fake = tmp_path / "python"
    answer = '{"first_call": 1, "images": 16, "images_per_second": 1e9, "cores": 1, "memory": 1}'
    fake.write_text(
        f"#!{sys.executable}\nimport sys\nfor _ in sys.stdin: print('{answer}', flush=1)"
    )
    fake.chmod(0o755)
    paths = {name: tmp_path / f"it.{name}" for name in ("md", "json", "png")}
    status, output, errors = run(
        *("benchmark", *FLAGS, "--repeats=2", "--seconds=0.01", "--measure=fit"),
        *("--compare=timm", f"--timm_python={fake}", "--vary=depth", f"--output={paths['md']}"),
        *(f"--json={paths['json']}", f"--plot={paths['png']}"),
    )
    assert status == 0, errors
    assert "| fit | timm, compiled | 1,000,000,000.0 |" in output
    assert "| depth | 4 |" in output
    assert output in paths["md"].read_text()
    found = json.loads(paths["json"].read_text())
    assert [len(r["rates"]) for r in found["measured"]] == [2] * 4
    assert [point["value"] for point in found["varied"]["depth"]] == [4], "half of 1 is none"
    with Image.open(paths["png"]) as picture:
        assert picture.width > 300


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--plot=it.png"], "nothing to draw without --vary"),
        (["--measure=walk"], "--measure: expected one of training"),
        (["--compare=timm", "--timm_python=/dev/null"], "--timm_python"),
    ],
)
def test_wrong_flags(run, flags, message):
    status, _, errors = run("benchmark", *FLAGS, "--repeats=1", "--seconds=0.01", *flags)
    assert status == 2
    assert message in errors


def test_cases_of_the_results_are_valid():
    spec = importlib.util.spec_from_file_location("speed", ROOT / "tools" / "measure_speed.py")
    speed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(speed)
    used = [*speed.SECTIONS.values(), *speed.OF_FIT.values()]
    assert {name for names, _ in used for name in names} == speed.CASES.keys()
    for names, extra in used:
        for name in names:
            flags = [*speed.CASES[name].split(), *extra.split()]
            if "--data_dir" in speed.CASES[name]:
                parse(BenchmarkOptions, flags)
                continue
            plan_run(Config(**options_of(parse(BenchmarkOptions, flags)[0], Config)))
    assert "2.91e+19" in speed.papers_run(), "6 × 12.6e9 × 300 × 1,281,167"
    assert speed.mean([0.5, 2.0]) == "geometric mean 1.00, least 0.50, of 2 cases"


def test_failure_of_a_process_is_told(tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho Traceback >&2; echo 'No module named torch' >&2")
    fake.chmod(0o755)
    config = Config(**SIZES, output_dir=str(tmp_path / "none"))
    with pytest.raises(RunError, match="timm: training cannot be measured: No module named torch"):
        measure.measure(config, ["training"], ["timm"], str(fake), 1, 0.01)


def test_calls_are_counted_and_waited_for():
    calls = []
    assert timm_worker.repeat(lambda: calls.append("call"), lambda: calls.append("wait"), 0.0) == 1
    assert calls == ["call", "wait"]


def test_timm_is_built_with_the_same_sizes():
    pytest.importorskip("timm")
    sizes = Architecture(**{k: v for k, v in SIZES.items() if k != "batch_size"}, num_classes=10)
    model = timm_worker.build(sizes.to_json(), "cpu")
    assert sum(p.numel() for p in model.parameters()) == sizes.parameters


def test_batches_of_the_loop_are_whole_images_moved_within_their_padding():
    torch = pytest.importorskip("torch")
    options = {"image_shape": (4, 5), "channels": 3, "batch_size": 8, "train_images": 20}
    batches = timm_worker.cropped_batches({**options, "num_classes": 20, "crop_padding": 1}, "cpu")
    torch.manual_seed(0)
    seen = [next(batches) for _ in range(4)]
    assert all(images.shape == (8, 3, 4, 5) for images, _ in seen)
    for first in (0, 2):  # an epoch has two batches, of other images
        assert len({int(label) for _, labels in seen[first : first + 2] for label in labels}) == 16
    plain = timm_worker.cropped_batches({**options, "num_classes": 20, "crop_padding": 0}, "cpu")
    assert not any((row == 0).all() for images, _ in [next(plain)] for row in images.flatten(0, 2))
    edges = [image[:, edge] for images, _ in seen for image in images for edge in (0, -1)]
    assert 10 < sum(bool((edge == 0).all()) for edge in edges) < len(edges) - 10


@pytest.mark.backends
def test_training_on_jax_is_measured(run, tmp_path):
    words = ("--measure=training,inference", "--compare=jax", "--repeats=1", "--seconds=0.01")
    status, output, errors = run("benchmark", *FLAGS, *words)
    assert status == 0, errors
    assert output.count("| training | keras_mixer on JAX | ") == 1
    assert "times keras_mixer on JAX" in output


def test_timm_is_measured(tmp_path):
    pytest.importorskip("timm")
    config = Config(**SIZES, output_dir=str(tmp_path / "none"))
    rows = measure.measure(config, ["training"], ["timm"], sys.executable, 1, 0.01)
    assert {found.side for found in rows} == {"keras_mixer", *measure.TIMM}
