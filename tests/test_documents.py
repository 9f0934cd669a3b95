"""Tests all documents: their commands, flags, links, Python and tables are what they say."""

import ast
import dataclasses
import functools
import glob
import importlib.util
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
from keras_mixer.weights.registry import OFFICIAL

PATHS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])
PATHS = [path for path in PATHS if path.name != "CHANGELOG.md"]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in PATHS}
README, STUDIES = PAGES["README.md"], PAGES["results/README.md"]
TABLES = sorted(set((ROOT / "results").glob("*.md")) - {ROOT / "results" / "README.md"})
BLOCK = re.compile(r"(?:<!-- (\w+) -->\n)?```(\w*)\n(.*?)```", re.DOTALL)
SHELL = {
    page: [(match[1], match[3]) for match in BLOCK.finditer(text) if match[2] == "bash"]
    for page, text in PAGES.items()
}
MARKED = [block for blocks in SHELL.values() for block in blocks]
CLASSES = tuple("0123456789")
TOOLS = {path.name for path in (ROOT / "tools").glob("*.py")}


# === Commands ===


def commands(block):
    """Yields the commands of a block that run this program or a tool, as lists of words."""
    joined = block.replace("\\\n", " ")
    outside_quotes = r"(?=(?:[^'\n]*'[^'\n]*')*[^'\n]*$)"
    for line in re.split(rf"\n|(?:&&|;|\|){outside_quotes}", joined, flags=re.MULTILINE):
        words = shlex.split(line, comments=True)
        words = [word for word in words if word not in ("do", "done")]
        while words and re.fullmatch(r"srun|[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words and words[0].endswith(("python", "keras-mixer")) and len(words) > 1:
            yield words


def check_command(words):
    """Parses a command against the flags it really has."""
    words = [word for word in words if not word.endswith("/flags.txt")]  # that of a run before
    if words[0].endswith("keras-mixer"):
        if words[1] not in COMMANDS:
            assert words[1] in ("--help", "--version"), f"no command {words[1]}"
            return
        command = COMMANDS[words[1]]
        if "--help" not in words:
            *_, rest = parse(command.options, words[2:], command.arguments)
            if "TRAIN_FLAG" in (command.arguments or ""):
                parse(Config, [word for word in rest if word != "train"])
    elif words[1] == "train.py" and "--help" not in words:
        config, _, _ = parse(Config, [re.sub(r"\$\w+", "1", word) for word in words[2:]])
        resolve(config, data_of(CLASSES, 3))
    elif words[1].startswith("tools/"):
        assert words[1].removeprefix("tools/") in TOOLS, f"no {words[1]}"


def inline_code(text):
    """Returns what stands between backquotes, outside of code blocks."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [code.replace("\n", " ").replace("\\|", "|") for code in re.findall(r"`([^`]+)`", prose)]


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_code_blocks_have_these_flags(page, monkeypatch):
    monkeypatch.chdir(ROOT)  # for --flagfile=flags/NAME
    text = "".join(block for _, block in SHELL[page])
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    for _, block in SHELL[page]:
        for words in commands(re.sub(r"<<'(\w+)'\n.*?\1", "", block, flags=re.DOTALL)):
            check_command(words)


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_sentences_have_these_flags(page):
    for code in inline_code(PAGES[page]):
        usage = "COMMAND" in code or "[" in code  # as in `keras-mixer COMMAND --help`
        for words in [] if usage else commands(code.replace("…", "0.5")):
            check_command(words)


# Flags of other programs that documents name.
OF_OTHERS = {"signal", "xla_force_host_platform_device_count", "port", "order", "files", "kills"}
OF_OTHERS |= {"logdir", "inputs", "flag"}


@pytest.mark.parametrize("page", PAGES)
def test_flags_in_sentences_exist(page):
    names = {"help", "helpfull", "version", "flagfile", "verbosity", "preset", "name", "noname"}
    for command in COMMANDS.values():
        for field in dataclasses.fields(command.options):
            names |= {field.name, *field.metadata["aliases"]}
    for code in inline_code(PAGES[page]):
        for name in re.findall(r"(?<![\w-])--([a-zA-Z_]\w*)", code):
            assert name in names | OF_OTHERS, f"{page}: {code}"


def write_flags():
    spec = importlib.util.spec_from_file_location("write_flags", ROOT / "tools" / "write_flags.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_flags_page_is_current():
    """After a change of flags or their help: `python tools/write_flags.py`."""
    assert PAGES["docs/flags.md"] == write_flags().flags_as_markdown()


# === Links ===


@functools.cache
def anchors(path):
    """Returns the anchors of a page, as GitHub makes them from headings."""
    text = re.sub(r"```.*?```", "", Path(path).read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    prose = re.sub(r"```.*?```|`[^`]+`", "", PAGES[page], flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page} links to {target}"


def test_every_page_is_linked_from_readme():
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", README))
    assert linked == {page for page in PAGES if page.startswith("docs/")}


def test_documents_are_short_and_free_of_traces_of_a_machine():
    assert README.count("\n") <= 120
    assert PAGES["BUILD.md"].count("\n") <= 130
    for page, text in PAGES.items():
        assert not re.search(r"/(root|home|work|tmp)/", text), page


# === Python ===


def python_blocks(page):
    return [match[3] for match in BLOCK.finditer(PAGES[page]) if match[2] == "python"]


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_python_compiles_and_uses_public_names(page):
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "keras_mixer":
                assert node.attr in keras_mixer.__all__, f"{page}: {node.attr}"


def test_python_page_runs(folder, tmp_path, monkeypatch, capsys):
    """Block after block, in one namespace, with a `photos/` of the reader."""
    monkeypatch.chdir(tmp_path)
    if (tmp_path / "data").is_dir():
        (tmp_path / "data").rename(tmp_path / "photos")
    names = {}
    for block in python_blocks("docs/python.md"):
        exec(block, names)
    assert names["run"].finished
    assert names["path"] == Path("saved_models/second/1")
    assert names["logits"].shape == (2, 10)
    assert names["features"].output_shape == (None, 16)
    assert names["larger"].input_shape == (None, 16, 16, 1)
    assert len(names["evaluation"].predictions) == 2
    assert names["config"].preset_name == "photos"
    assert names["config"].data_dir == "photos"
    assert "Run('runs/first': 10 classes, 2 epochs, validation:" in capsys.readouterr().out
    assert Path("report/index.html").exists()


# === Facts ===


def rows(text, heads):
    """Returns the rows of the table in a page whose header has these words."""
    [table] = re.findall(rf"\| {re.escape(heads)} .*\n\|[-|]+\n((?:\|.*\n)+)", text)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_released_files_are_those_of_the_registry():
    table = rows(PAGES["docs/fine_tuning.md"], "NAME in")
    assert [row[0].strip("`") for row in table] == list(OFFICIAL)
    for (_, size, _, top1), release in zip(table, OFFICIAL.values(), strict=True):
        assert float(size) == release.size
        published = release.published.get("imagenet2012")
        assert top1 == (f"{100 * published.top1:.2f}" if published else "–")


def test_quoted_messages_are_in_the_source():
    messages = set()
    for path in (ROOT / "keras_mixer").rglob("*.py"):
        tree = ast.parse(path.read_text())
        documented = [n for n in ast.walk(tree) if hasattr(n, "body") and isinstance(n.body, list)]
        docstrings = {id(n.body[0].value) for n in documented if isinstance(n.body[0], ast.Expr)}
        texts = (n for n in ast.walk(tree) if isinstance(n, ast.Constant))
        messages |= {n.value for n in texts if isinstance(n.value, str) and id(n) not in docstrings}
    for quoted, *_ in rows(PAGES["docs/troubleshooting.md"], "the message has"):
        assert any(quoted.strip("`") in message for message in messages), quoted


def test_floors_are_those_of_the_package():
    """Their order is that of `FLOORS` in test_house.py, which enforces it."""
    from test_house import FLOORS

    table = rows(PAGES["docs/architecture.md"], "floor")
    assert [row[0].strip("`") for row in table] == FLOORS
    for name in re.findall(r"`(keras_mixer/[\w/]+(?:\.py|/)?)`", PAGES["docs/architecture.md"]):
        assert (ROOT / name).exists(), name


def test_version_and_paper_are_cited():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == keras_mixer.__version__
    assert "2105.01601" in citation["references"][0]["url"]


def test_kubernetes_manifest_is_that_of_a_process_group():
    """Its pods find their ranks, and its command is one of this program."""
    [text] = [m[3] for m in BLOCK.finditer(PAGES["docs/clusters.md"]) if m[1] == "kubernetes"]
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
    [text] = [block for mark, block in SHELL["docs/clusters.md"] if mark == "slurm"]
    given = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", text, re.MULTILINE))
    assert given["ntasks-per-node"] == "1"
    assert given["signal"].startswith("TERM@")
    assert "KERAS_BACKEND=jax" in text
    [words] = commands(text)
    assert words[:2] == ["python", "train.py"]


# === Runs ===


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
    marked = [block for mark, block in MARKED if mark == "run"]
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
    """The lines of the blocks in README and quickstart.md that show what there is."""
    blocks = "".join(block for mark, block in MARKED if mark == "tour")
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


def test_readme_has_the_two_commands_that_ci_runs():
    marks = {mark: block for mark, block in SHELL["README.md"] if mark in ("train", "test")}
    assert marks["train"].count("\n") == marks["test"].count("\n") == 1
    assert "--flagfile=flags/digits.flags" in marks["train"]
    ci = (ROOT / ".ci" / "run").read_text()
    for mark in marks:
        assert f"readme_command {mark}" in ci


def test_results_in_readme_are_copied_from_generated_tables():
    results = README.split("## Three results")[1].split("\n## ")[0]
    lines = [line for line in results.splitlines() if line.startswith("|")]
    tables = [path.read_text() for path in TABLES]
    assert len(lines) == 5
    for line in lines:
        assert any(line in table.splitlines() for table in tables)
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
