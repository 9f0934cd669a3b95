"""Tests README.md, BUILD.md, results/ and flags/: files they name exist, their commands work."""

import glob
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, data_of

import keras_mixer
from keras_mixer.commands.table import COMMANDS
from keras_mixer.compute.rank import Rank, find_rank
from keras_mixer.config.command_line import parse
from keras_mixer.config.resolve import resolve
from keras_mixer.config.training import Config

README, BUILD = (ROOT / "README.md").read_text(), (ROOT / "BUILD.md").read_text()
STUDIES = (ROOT / "results" / "README.md").read_text()
TABLES = sorted(set((ROOT / "results").glob("*.md")) - {ROOT / "results" / "README.md"})
BLOCK = re.compile(r"(<!-- (\w+) -->\n)?```bash\n(.*?)```", re.DOTALL)
BLOCKS = [
    (match[2], match[3]) for text in (README, BUILD, STUDIES) for match in BLOCK.finditer(text)
]
CLASSES = tuple("0123456789")


def commands(block):
    """Yields the commands of a block that run this program, as lists of words."""
    joined = block.replace("\\\n", " ")
    outside_quotes = r"(?=(?:[^'\n]*'[^'\n]*')*[^'\n]*$)"
    for line in re.split(rf"\n|(?:&&|;){outside_quotes}", joined, flags=re.MULTILINE):
        words = shlex.split(line, comments=True)
        words = [word for word in words if word not in ("do", "done")]
        while words and re.fullmatch(r"srun|[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words and words[0].endswith(("python", "keras-mixer", "find")):
            yield words


@pytest.mark.parametrize("mark, block", BLOCKS)
def test_blocks_parse_and_every_flag_in_them_exists(mark, block):
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    if "<<" in block:
        return
    for words in commands(block):
        if words[0] == "find":
            words = words[words.index("|") + 1 :]
        if words[0].endswith("keras-mixer"):
            command = COMMANDS[words[1]]
            parse(command.options, words[2:], command.arguments)
        elif words[1] == "train.py" and "--help" not in words:
            known = [re.sub(r"\$\w+", "1", w) for w in words[2:] if "=smoke/" not in w]
            config, _, _ = parse(Config, known)
            resolve(config, data_of(CLASSES, 3))


def test_kubernetes_manifest_is_that_of_a_team():
    """Its pods find their places, and its command is one of this program."""
    [text] = re.findall(r"<!-- kubernetes -->\n```yaml\n(.*?)```", BUILD, re.DOTALL)
    service, job = yaml.safe_load_all(text)
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert all(isinstance(value, str) for value in variables.values())
    for index in range(spec["completions"]):
        rank = find_rank({**variables, "JOB_COMPLETION_INDEX": str(index)})
        first = f"{job['metadata']['name']}-0.{pod['subdomain']}"
        assert rank == Rank(first, 9000, spec["completions"], index)
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert {v["name"] for v in pod["volumes"]} == {v["name"] for v in container["volumeMounts"]}
    program, command, *flags = container["command"]
    assert program == "keras-mixer"
    parse(COMMANDS[command].options, flags)


def test_slurm_script_gives_every_host_one_task():
    [text] = re.findall(r"<!-- slurm -->\n```bash\n(.*?)```", BUILD, re.DOTALL)
    given = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", text, re.MULTILINE))
    assert given["ntasks-per-node"] == "1"
    assert given["signal"].startswith("TERM@")
    assert "KERAS_BACKEND=jax" in text
    [words] = commands(text)
    assert words[:2] == ["python", "train.py"]


@pytest.mark.slow
def test_marked_blocks_run(tmp_path):
    """They run in order and in one folder, as a reader would type them."""
    for name in ("train.py", "flags"):
        os.symlink(ROOT / name, tmp_path / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tools / "keras-mixer").write_text(f'#!/bin/sh\nexec {sys.executable} -m keras_mixer "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    marked = [block for mark, block in BLOCKS if mark == "run"]
    assert len(marked) >= 3
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(marked)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "top-1" in done.stdout
    assert "b'0'" in done.stdout, "class names come out of the SavedModel"


# What needs a network or an accelerator, or is as long as many runs and has tests of its own.
ELSEWHERE = ("official:", "--preset=finetune_cifar10", "keras-mixer sweep", "keras-mixer launch")
# What makes the others short enough for a test, and fit for a few images.
SHORT = {
    "train": (
        *("--num_steps=2", "--schedule_unit=step", "--warmup_step=0", "--batch_size=16"),
        "--jit=false",
    ),
    "benchmark": ("--measure=input,inference", "--batch_size=8", "--image_shape=16", "--repeats=1"),
}


def tour():
    """The lines of the blocks in README that show what there is."""
    blocks = "".join(block for mark, block in BLOCKS if mark == "tour")
    return [line for line in blocks.splitlines() if not any(word in line for word in ELSEWHERE)]


@pytest.mark.slow
def test_commands_of_readme_run_one_after_the_other(
    folder, run, tmp_path, monkeypatch, write_image
):
    """As written but for `SHORT`: in one folder, where the runs of one are the input of another."""
    monkeypatch.setattr(sys, "stdin", None)
    (tmp_path / "data").rename(tmp_path / "photos")
    shutil.copytree(tmp_path / "photos", tmp_path / "new_photos")
    for name in ("holiday.jpg", "more/one.png"):
        write_image(tmp_path / name, (40, 30, 3))
    assert len(tour()) >= 14
    for line in tour():
        words = shlex.split(line, comments=True)
        if words[0] == "find":
            names = io.TextIOWrapper(io.BytesIO(b"more/one.png\n"))
            monkeypatch.setattr(sys, "stdin", names)
            words = words[words.index("|") + 1 :]
        verb = ["train"] if words[0] == "python" else [words[1]]
        words = [
            name for word in words[2:] for name in (glob.glob(word) if word == "runs/*" else [word])
        ]
        short = () if "--help" in words else SHORT.get(verb[0], ())
        status, out, err = run(*verb, *words, *short)
        assert status == 0, f"{line}\n{err}"
        assert out, line
    assert (tmp_path / "saved_models" / "photos" / "2").is_dir(), "as the comment says"


def test_library_example_in_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    training, job = example.split("run = keras_mixer.run_job")
    exec(training, names)
    assert names["model"].count_params() > 0
    assert names["run"].finished is False, "fit neither evaluates nor exports"
    exec(f"run = keras_mixer.run_job{job}", names)
    assert names["run"].finished
    assert names["model"].input_shape == (None, 16, 16, 1)
    assert names["logits"].shape == (2, 10)


def test_readme_has_the_two_commands_that_ci_runs():
    marks = {mark: block for mark, block in BLOCKS if mark in ("train", "test")}
    assert marks["train"].count("\n") == marks["test"].count("\n") == 1
    assert "--flagfile=flags/digits.flags" in marks["train"]
    ci = (ROOT / ".ci" / "run").read_text()
    for mark in marks:
        assert f"readme_command {mark}" in ci


def test_map_shows_all_modules_tools_and_commands():
    drawn = README.split("## The map")[1].split("```")[1]
    paths = [*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")]
    names = {path.name for path in [*paths, *(ROOT / "keras_mixer").rglob("*.py")]}
    shown = set(re.findall(r"\b(\w+\.py)\b", drawn))
    assert shown == names - {"__init__.py"}
    for command in COMMANDS:
        assert command in drawn


def test_results_in_readme_are_copied_from_generated_tables():
    results = README.split("## Results")[1].split("\n## ")[0]
    rows = [line for line in results.splitlines() if line.startswith("|")]
    tables = [path.read_text() for path in TABLES]
    assert len(rows) > 5
    for row in rows:
        assert any(row in table.splitlines() for table in tables)
    assert all(re.search("Generated by `(keras-mixer|python tools/)", table) for table in tables)


def test_studies_name_every_result_and_the_command_of_every_table():
    names = {path.name for path in (ROOT / "results").iterdir()} - {"README.md"}
    assert set(re.findall(r"\((\w+\.\w+)\)", STUDIES)) == names
    for path in TABLES:
        command = re.search("Generated by `(.*)`", path.read_text())[1]
        assert "measure_speed" in command or f"results/{path.name}" in STUDIES, path.name


def test_presets_name_results_that_exist():
    for path in (ROOT / "flags").glob("*.flags"):
        for name in re.findall(r"results/\w+\.md", path.read_text()):
            assert (ROOT / name).exists(), f"{path.name} names {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "flags").glob("*.flags")), ids=lambda p: p.name)
def test_presets_are_documented_and_valid(path):
    text = path.read_text()
    head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    for word in ("Expected:", "Time:", "Command:"):
        assert word in head, f"{path.name} lacks {word}"
    assert f"--flagfile=flags/{path.name}" in head
    config, given, _ = parse(Config, [f"--flagfile={path}"])
    assert given
    resolve(config, data_of(CLASSES, 3))
    assert path.name in (ROOT / "flags" / "README.md").read_text()


def test_versions_are_equal():
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{keras_mixer.__version__}"' in project


def test_keras_has_its_security_fixes():
    from importlib.metadata import version

    installed = tuple(map(int, version("keras").split(".")[:3]))
    assert installed >= (3, 15, 1), "earlier versions have known vulnerabilities"
    assert "keras>=3.15.1" in (ROOT / "pyproject.toml").read_text()


def test_git_ignores_runs_and_exports():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"/runs/", "/output*/", "/saved_models/*"} <= set(ignored)
    assert Path(ROOT / "saved_models" / "README.md").exists()
