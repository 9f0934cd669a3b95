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

# Floors, from the ground up: a file imports from its own floor's folder or from floors below.
FLOORS = {
    "errors": set(),
    "files": set(),
    "console": set(),
    "commandline": {"errors"},
    "model": set(),
    "data": {"errors", "console", "files"},
    "weights": {"errors", "files", "console", "model"},
    "data_options": {"commandline"},
    "config": {
        *{"errors", "commandline", "data_options"},
        *{"data.datasets", "model.variants", "weights.resize"},
    },
    "resolve": {
        *{"errors", "commandline", "config"},
        *{"data.datasets", "model.variants", "weights.resize"},
    },
    "training": {
        *{"errors", "files", "console", "commandline", "config", "resolve"},
        *{"model", "data", "weights"},
    },
    "studies": {
        *{"errors", "files", "console", "config", "commandline"},
        *{"data", "weights", "training", "inference"},
    },
    "inference": {"errors", "files", "console", "model", "data", "weights", "training"},
    "verbs": {"*"},
    "__main__": {"*"},
    "__init__": set(),
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
    assert {floor_of(module_of(path)) for path in FILES} == set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_downward_only(path):
    floor = floor_of(module_of(path))
    allowed = FLOORS[floor]
    for module in imports_of(path):
        within = floor_of(module) == floor
        assert within or "*" in allowed or allowed & {module, floor_of(module)}, (
            f"{module_of(path)} imports {module}, which is not below it"
        )


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


def test_the_model_uses_keras_only():
    """So it runs on every Keras backend."""
    for path in (PACKAGE / "model").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.split(".")[0] in ("tensorflow", "numpy") for name in names), path


def test_flags_are_defined_and_read_in_one_place():
    """Below the entry points there are plain arguments and Configs."""
    for path in [*FILES, *SCRIPTS]:
        text = path.read_text()
        if path.name != "commandline.py":
            assert "absl" not in text, f"{path} knows of absl"
        assert "FLAGS =" not in text or path.name == "run.py"


HEAVY = ("tensorflow", "keras", "jax", "torch", "sklearn", "scipy")


@pytest.mark.parametrize(
    "module",
    [
        "keras_mixer", "keras_mixer.__main__", "keras_mixer.config.training", "keras_mixer.training.open_run",
        "keras_mixer.training.checkpoints", "keras_mixer.data.sources", "keras_mixer.weights.pretrained",
        "keras_mixer.weights.download", "keras_mixer.inference.verify",
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
        "Config", "InputError", "RunError", "build_mixer", "fit", "load_mixer",
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


@pytest.mark.parametrize("name", ["build_mixer", "fit", "load_mixer"])
def test_public_functions_explain_their_arguments(name):
    function = getattr(keras_mixer, name)
    text = inspect.getdoc(function)
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in text
    for argument in inspect.signature(function).parameters:
        assert f"{argument}:" in text, f"{name} does not explain {argument}"


def test_functions_read_like_paragraphs():
    """The admired codebases have a median of 7 to 16 lines and few functions above 45."""
    lengths = sorted(
        node.body[-1].end_lineno - node.body[bool(ast.get_docstring(node))].lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and len(node.body) > bool(ast.get_docstring(node))
    )
    assert lengths[len(lengths) // 2] <= 12
    assert lengths[int(0.97 * len(lengths))] <= 40


def test_every_module_has_its_tests():
    """Each is imported by a test, or is an entry point that the command-line tests start."""
    imported = set()
    for path in (ROOT / "tests").glob("*.py"):
        imported |= set(imports_of(path))
    for path in FILES:
        module = module_of(path)
        used = {module, *(f"{module}.{name.name}" for name in definitions(path))}
        used |= {name for name, home in keras_mixer._HOMES.items() if home.endswith(module)}
        assert path.name == "__init__.py" or used & imported, f"no test imports {module}"


def test_nothing_tracked_names_a_machine_or_a_registry():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in (".npz", ".pth", ".safetensors") or not path.exists():
            continue
        text = path.read_text()
        for place in ("/" + "work/", "/" + "root/", "/" + "tmp/"):
            assert place not in text, f"{name} names {place}"


def test_sizes_of_the_house():
    """Few files, each with one idea."""
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 400, f"{path} holds two ideas"
    assert Path(ROOT / "train.py").read_text().count("\n") <= 30
