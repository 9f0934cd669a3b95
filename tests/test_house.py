"""Tests the house itself: who may import whom, what importing costs, what is documented."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import keras_mixer

PACKAGE = ROOT / "keras_mixer"
FILES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = [ROOT / "train.py"]

# Floors, from the ground up: a file imports from its own folder or from floors below.
FLOORS = [
    *("errors", "files", "log", "signals", "backend", "model", "data", "preprocessing"),
    *("weights", "config", "compute", "runs", "training", "inference", "jobs", "reports"),
    *("benchmark", "studies", "commands", "__main__"),
]

# Imports within functions, each with what it would cost to import at the top (measured with
# `python -X importtime`, a warm start on two cores): what has to answer at once stays light.
LAZY = {
    "tensorflow": "4 s; errors in flags, data and files are reported before it starts",
    "keras": "3 s, with TensorFlow",
    "keras_mixer": "3 s: what imports TensorFlow, once a command has checked its input",
    "tensorflow_datasets": "0.5 s; only for its own datasets",
    "google": "0.1 s; only for record files, with tensorflow_datasets",
    "sklearn": "1.1 s; only to open a dataset",
    "scipy": "0.7 s; only to verify weights",
    "h5py": "0.15 s; only for .keras and .weights.h5 files",
    "requests": "0.1 s; only to download",
    "urllib3": "0.1 s; only to download",
    "optuna": "0.6 s; only for sweeps",
    "sqlalchemy": "0.3 s; only for sweeps",
    "keras_cv": "1.2 s; only for RandAugment",
    "matplotlib": "0.4 s; only to draw",
    "jax": "an optional dependency",
    "torch": "an optional dependency",
    "torchvision": "an optional dependency of timm",
    "timm": "an optional dependency, which measures beside ours",
}


def module_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def floor_of(module):
    return module.split(".")[0]


def imports_of(path):
    """The modules of this package that a file imports, wherever in it: `training.run`, `errors`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            if node.module.split(".")[0] == "keras_mixer":
                names = [node.module.partition(".")[2]]
                if names == [""] or (PACKAGE / names[0].replace(".", "/")).is_dir():
                    names = [f"{names[0]}.{alias.name}".strip(".") for alias in node.names]
                yield from names
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "keras_mixer":
                    yield alias.name.partition(".")[2]


def test_every_file_stands_on_a_known_floor():
    assert {floor_of(module_of(path)) for path in FILES} == {*FLOORS, "__init__"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_downward_only(path):
    for module in imports_of(path):
        if floor_of(module) != floor_of(module_of(path)):
            above, below = (FLOORS.index(floor_of(m)) for m in (module_of(path), module))
            assert below < above, f"{module_of(path)} imports {module}, which is not below it"


def test_within_a_folder_imports_go_one_way():
    graph = {module_of(path): set(imports_of(path)) for path in FILES}
    done, under_way = set(), []

    def visit(module):
        assert module not in under_way, f"a circle: {' -> '.join([*under_way, module])}"
        if module in graph and module not in done:
            under_way.append(module)
            for other in graph[module]:
                visit(other)
            done.add(under_way.pop())

    for module in graph:
        visit(module)


def outer_imports(path):
    """(library, function or None) for every import in a file, with the function it stands in."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    within = {id(n): f.name for f in functions for n in ast.walk(f)}
    for node in ast.walk(tree):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from ((name.split(".")[0], within.get(id(node))) for name in names)


def test_tensorflow_begins_in_preprocessing():
    """The model runs on every Keras backend, and data and weights are read before it starts."""
    banned = {"model": {"tensorflow", "numpy"}, "data": {"tensorflow", "keras"}}
    banned |= {"weights": {"tensorflow"}, "config": {"tensorflow", "keras"}}
    for path in FILES:
        libraries = {library for library, _ in outer_imports(path)}
        assert not libraries & banned.get(floor_of(module_of(path)), set()), path


def test_imports_within_functions_are_those_that_a_measurement_defends():
    for path in FILES:
        lazy = {library for library, function in outer_imports(path) if function}
        assert lazy <= LAZY.keys(), path


def test_flags_are_defined_and_read_in_one_place():
    """Below the entry points there are plain arguments and Configs."""
    for path in [*FILES, *SCRIPTS]:
        text = path.read_text()
        if path.name not in ("options.py", "command_line.py"):
            assert "absl" not in text, f"{path} knows of absl"
        assert "FLAGS =" not in text or path.name == "run.py"


HEAVY = ("tensorflow", "keras", "jax", "torch", "sklearn", "scipy")


@pytest.mark.parametrize(
    "module",
    [
        "keras_mixer", "keras_mixer.__main__", "keras_mixer.jobs", "keras_mixer.config.training",
        "keras_mixer.runs.open_run", "keras_mixer.runs.checkpoints",
        "keras_mixer.data.sources", "keras_mixer.weights.pretrained",
        "keras_mixer.inference.verify", "keras_mixer.inference.export.versions",
    ],
)  # fmt: skip
def test_light_modules_import_nothing_heavy(module):
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_public_names_are_loaded_when_used():
    assert set(keras_mixer.__all__) == {
        "Config", "InputError", "RunError", "build_mixer", "fit", "load_mixer", "predict",
        "preprocess", "run_job",
    }  # fmt: skip
    for name in keras_mixer.__all__:
        assert callable(getattr(keras_mixer, name))
    assert set(keras_mixer.__all__) <= set(dir(keras_mixer))
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        keras_mixer.colour  # noqa: B018


# === Documentation ===


def definitions(path):
    """Public functions and classes of a file, and public methods of public classes."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node
            for part in getattr(node, "body", []):
                if isinstance(part, ast.FunctionDef) and isinstance(node, ast.ClassDef):
                    yield part


INHERITED = {"build", "call", "compute_output_shape", "get_config", "parse"}


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=str)
def test_files_and_public_names_have_docstrings(path):
    assert ast.get_docstring(ast.parse(path.read_text())), path
    for node in definitions(path):
        inherited = node.name in INHERITED or node.name.startswith(("_", "on_"))
        assert inherited or ast.get_docstring(node), f"{path}: {node.name} has no docstring"


@pytest.mark.parametrize(
    "name", ["build_mixer", "fit", "load_mixer", "predict", "preprocess", "run_job"]
)
def test_public_functions_explain_their_arguments(name):
    function = getattr(keras_mixer, name)
    text = inspect.getdoc(function)
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in text
    for argument in inspect.signature(function).parameters:
        assert f"{argument}:" in text, f"{name} does not explain {argument}"


def test_functions_read_like_paragraphs():
    """Well-known codebases have a median of 7 to 16 lines and few functions above 45."""
    lengths = sorted(
        node.body[-1].end_lineno - node.body[bool(ast.get_docstring(node))].lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and len(node.body) > bool(ast.get_docstring(node))
    )
    assert lengths[len(lengths) // 2] <= 8
    assert lengths[int(0.97 * len(lengths))] <= 25


def test_every_module_has_its_tests():
    """Each has a test file of its name, or is imported by a test or by data.sources."""
    imported = set(imports_of(PACKAGE / "data" / "sources.py"))
    for path in (ROOT / "tests").glob("*.py"):
        imported |= set(imports_of(path))
    for path in FILES:
        module = module_of(path)
        used = {module, *(f"{module}.{name.name}" for name in definitions(path))}
        used |= {name for name, home in keras_mixer._HOMES.items() if home.endswith(module)}
        own = (ROOT / "tests" / f"test_{path.stem}.py").exists()
        assert path.name == "__init__.py" or own or used & imported, f"no test imports {module}"


def test_nothing_tracked_names_a_machine_or_a_registry():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in (".npz", ".pth", ".png", ".safetensors") or not path.exists():
            continue
        text = path.read_text()
        for place in ("/" + "work/", "/" + "root/", "/" + "tmp/"):
            assert place not in text, f"{name} names {place}"


def test_sizes_of_the_house():
    """Few files, each with one idea."""
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 600, f"{path} holds two ideas"
    assert Path(ROOT / "train.py").read_text().count("\n") <= 30
