"""Tests that untrusted checkpoints are refused before anything in them runs or grows.

Every file here is made to harm a careless reader. One process reads them all; then it is asked what
it answered, what it imported, how much memory it took, and whether anything was run or written.
"""

import io
import json
import pickle
import re
import shutil
import struct
import subprocess
import sys
import types
import warnings
import zipfile

import h5py
import numpy as np
import pytest
from conftest import GOLDEN, ROOT, SMALL

from keras_mixer import InputError, build_mixer
from keras_mixer.files import pack
from keras_mixer.model.architecture import ModelSpec
from keras_mixer.weights import archives, model_folder
from keras_mixer.weights.pretrained import read_pretrained

HOSTILE = {}  # name of the file: (how it is made, what it is refused with)


def hostile(name, message):
    """Registers a function from (path, material) that writes a file."""

    def register(write):
        HOSTILE[name] = (write, message)
        return write

    return register


class Material:
    """What the hostile files are made of: honest ones, and the canary they would let out."""

    def __init__(self, folder):
        self.canary = folder / "canary"
        self.secret = folder / "secret.h5"
        self.keras = folder / "honest.keras"
        self.weights = folder / "honest.weights.h5"
        model = build_mixer((8, 8), (4, 4), depth=2, dim=6, num_classes=3)
        model.save(self.keras)
        model.save_weights(self.weights)
        with h5py.File(self.secret, "w") as file:
            file["stem"] = np.ones((4, 4, 3, 6), "float32")
        (folder / "secret.raw").write_bytes(bytes(4 * 4 * 3 * 6 * 4))

    def members(self):
        with zipfile.ZipFile(self.keras) as archive:
            return {name: archive.read(name) for name in archive.namelist()}


# === X1: .keras ===


def keras_with(change, name, message):
    """Registers a .keras file whose config went through a function."""

    @hostile(name, message)
    def write(path, material):
        members = material.members()
        config = json.loads(members["config.json"])
        change(config, config["config"]["layers"], material)
        members["config.json"] = json.dumps(config)
        write_zip(path, members.items())


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of duplicate names
        for name, content in members:
            archive.writestr(name, content)


def instead_of_stem(module, class_name, **config):
    def change(_, layers, material):
        config_ = {k: v(material) if callable(v) else v for k, v in config.items()}
        layers[1] |= {
            "module": module,
            "class_name": class_name,
            "config": layers[1]["config"] | config_,
        }

    return change


LAMBDA = {"class_name": "__lambda__", "config": {"code": "4wEAAAA=", "defaults": None}}
keras_with(
    instead_of_stem("keras.layers", "Lambda", function=LAMBDA), "lambda.keras", "layers are Lambda"
)
for class_name in ("TorchModuleWrapper", "TFSMLayer", "StringLookup", "TimeDistributed"):
    keras_with(
        instead_of_stem("keras.layers", class_name, filepath=lambda m: str(m.secret)),
        f"{class_name}.keras",
        f"layers are {class_name}",
    )
keras_with(instead_of_stem("os", "e\nvil"), "newline.keras", "layers are e.{1,2}vil")


def add_layer(config, layers, material):
    layers.append({**layers[-1], "name": "extra"})


def deepen(config, layers, material):
    config["config"] = {"layers": []}


def code_as_activation(config, layers, material):
    layers[3]["config"]["activation"] = {
        "module": "os", "class_name": "system", "config": [f"touch {material.canary}"],
    }  # fmt: skip


keras_with(add_layer, "added.keras", "its layers are in another order")
keras_with(deepen, "empty.keras", "its layers are in another order")
keras_with(code_as_activation, "activation.keras", "activation: expected one of gelu, ")

for name, member in (
    ("climbing", "../x"), ("absolute", "/etc/x"), ("extra", "assets/x"), ("nested", "x.zip"),
):  # fmt: skip

    @hostile(f"{name}.keras", f"expected .* received .*{re.escape(member)}")
    def write_extra(path, material, member=member):
        write_zip(path, [*material.members().items(), (member, b"x")])


@hostile("symlink.keras", "expected .* received")
def write_symlink(path, material):
    link = zipfile.ZipInfo("assets")
    link.external_attr = 0o120777 << 16
    write_zip(path, [*material.members().items(), (link, str(material.secret))])


@hostile("duplicates.keras", "several members have the same name")
def write_duplicates(path, material):
    members = material.members()
    write_zip(path, [*members.items(), ("config.json", members["config.json"])])


@hostile("nesting.keras", "not a Mixer of keras_mixer")
def write_nested_json(path, material):
    write_zip(path, (material.members() | {"config.json": "[" * 1_000_000}).items())


# === X2: HDF5 ===


def h5_with(name, message):
    """Registers an HDF5 file whose stem went through a function of (layer, material)."""

    def register(change):
        @hostile(name, message)
        def write(path, material):
            shutil.copy(material.weights, path)
            with h5py.File(path, "r+") as file:
                group = file["layers/conv2d/vars"]
                del group["0"]
                change(group, material)

        return change

    return register


@h5_with(
    "external_link.weights.h5",
    ": - layers/conv2d/vars/0",
)
def external_link(group, material):
    group["0"] = h5py.ExternalLink(str(material.secret), "/stem")


@h5_with(
    "soft_link.weights.h5",
    ": - layers/conv2d/vars/0",
)
def soft_link(group, material):
    group["0"] = h5py.SoftLink("/layers/conv2d/vars/1")


@h5_with("external_storage.weights.h5", "lie in another file")
def external_storage(group, material):
    raw = str(material.secret.with_suffix(".raw"))
    group.create_dataset("0", (4, 4, 3, 6), "f4", external=[(raw, 0, 4 * 4 * 3 * 6 * 4)])


@h5_with("virtual.weights.h5", "lie in another file")
def virtual(group, material):
    layout = h5py.VirtualLayout((4, 4, 3, 6), "f4")
    layout[...] = h5py.VirtualSource(str(material.secret), "stem", (4, 4, 3, 6))
    group.create_virtual_dataset("0", layout)


@h5_with("bomb_4GiB.weights.h5", "declares 4187593113 bytes|declares .* but holds")
def bomb_below_the_floor_of_keras(group, material):
    group.create_dataset("0", (4, 4, 3, 21_000_000), "f4")


@h5_with("bomb_1TiB.weights.h5", "declares .* bytes, but holds")
def bomb(group, material):
    group.create_dataset("0", (4, 4, 3, 6 << 30), "f4")


@h5_with("deflated.weights.h5", "compressed or in chunks")
def deflated(group, material):
    group.create_dataset("0", data=np.zeros((4, 4, 3, 6), "f4"), compression="gzip")


@h5_with("loop.weights.h5", ": - layers/conv2d/vars/0")
def loop(group, material):
    group["0"] = group.parent


@h5_with("objects.weights.h5", "expected one of float16|does not fit")
def strings(group, material):
    group.create_dataset("0", data=np.array([b"x"] * 288).reshape(4, 4, 3, 6))


@h5_with("newline.weights.h5", "does not fit .*x.{1,2}y")
def newline(group, material):
    group["0"], group["x\ny"] = np.ones((4, 4, 3, 6), "f4"), np.ones(1, "f4")


@hostile(
    "nested_link.keras",
    ": - layers/conv2d/vars/0",
)
def write_link_within_archive(path, material):
    content = io.BytesIO(material.weights.read_bytes())
    with h5py.File(content, "r+") as file:
        del file["layers/conv2d/vars/0"]
        file["layers/conv2d/vars/0"] = h5py.ExternalLink(str(material.secret), "/stem")
    write_zip(path, (material.members() | {"model.weights.h5": content.getvalue()}).items())


# === X3: .npz ===


class Touch:
    """Unpickled, it would let the canary out."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        import pathlib

        return pathlib.Path.touch, (self.canary,)


def npy_header(shape, descr="<f4", version=(1, 0), padding=0):
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    header += b" " * padding + b"\n"
    length = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    return b"\x93NUMPY" + bytes(version) + length + header


def npz_with(name, message, *members, method=zipfile.ZIP_STORED):
    @hostile(name, message)
    def write(path, material):
        with zipfile.ZipFile(path, "w", method) as archive:
            for member, content in members:
                archive.writestr(f"{member}.npy", content() if callable(content) else content)


@hostile("pickle.npz", "Python objects, which are never unpickled")
def write_objects(path, material):
    np.savez(path, **{"stem/kernel": np.array([Touch(material.canary)], dtype=object)})


npz_with("bomb_4TiB.npz", "declares .* but holds 0 bytes", ("stem/kernel", npy_header((1 << 40,))))
npz_with("negative.npz", "declares", ("stem/kernel", npy_header((-1, -1)) + bytes(4)))
npz_with(
    "deflate_bomb.npz", "expand to more than 20 times",
    ("stem/kernel", lambda: npy_header((100 << 20,), "|i1") + bytes(100 << 20)),
    method=zipfile.ZIP_DEFLATED,
)  # fmt: skip
npz_with(
    "header_1MB.npz", "not a readable .npz",
    ("stem/kernel", npy_header((1,), version=(2, 0), padding=1 << 20) + bytes(4)),
)  # fmt: skip
npz_with("not_an_array.npz", "not a readable .npz", ("stem/kernel", b"import os"))
npz_with(
    "code.npz", "not a readable .npz",
    ("stem/kernel", npy_header((1,)).replace(b"(1,)", b"exit()") + bytes(4)),
)  # fmt: skip


npz_with(
    "nested.npz", "stem/kernel.npy has no readable header",
    ("stem/kernel", b"\x93NUMPY\1\0" + struct.pack("<H", 9000) + b"-" * 8999 + b"1"),
)  # fmt: skip
npz_with("long_name.npz", "not an official Mixer", ("x" * 60_000, npy_header((1,)) + bytes(4)))
npz_with("newline.npz", "it contains x.{1,2}y", ("x\ny", npy_header((1,)) + bytes(4)))


@hostile("duplicates.npz", "several members have the same name")
def write_same_names(path, material):
    content = npy_header((1,)) + bytes(4)
    write_zip(path, [("stem/kernel.npy", content), ("stem/kernel.npy", content)])


# === X4: .safetensors ===


def safetensors_with(name, message, header, data=b""):
    @hostile(name, message)
    def write(path, material):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(shape=(1,), offsets=(0, 4), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


UNREADABLE = "not a readable .safetensors"
safetensors_with("overlapping.safetensors", UNREADABLE, {"a": entry(), "b": entry()}, bytes(8))
safetensors_with("out_of_range.safetensors", UNREADABLE, {"a": entry((9,), (0, 36))}, bytes(4))
safetensors_with("negative.safetensors", UNREADABLE, {"a": entry((-1,))}, bytes(4))
safetensors_with("overflow.safetensors", UNREADABLE, {"a": entry((1 << 62, 16))}, bytes(4))
safetensors_with("not_utf8.safetensors", UNREADABLE, b'{"\xff": {}}')
safetensors_with("not_json.safetensors", UNREADABLE, b"{" * 5000)


@hostile("length.safetensors", UNREADABLE)
def write_header_length(path, material):
    path.write_bytes(struct.pack("<Q", 1 << 63) + b"{}")


safetensors_with(
    "newline.safetensors", "it contains stem.{1,2}error", {"stem\nerror: none": entry()}, bytes(4)
)


# === Specs: model.json of a folder, and the metadata of .safetensors ===


def spec_with(name, value):
    """Returns a spec as JSON, with one of its values, or one more, replaced by other JSON."""
    spec = ModelSpec(SMALL, ("a", "b", "c")).to_json()
    places = (spec, spec["architecture"], spec["preprocessing"])
    next((place for place in places if name in place), spec)[name] = "@"
    return json.dumps(spec).replace('"@"', value)


SIZE = "dim: expected an integer from 1 to 1048576, received "
NAMES = "class_names: expected 3 names, received "
SPECS = {
    "list": ("[]", r"expected model\.json of format 2, received \[\]"),
    "nan": ("NaN", r"expected model\.json of format 2, received nan"),
    "deep": ("[" * 100_000, "not a readable .*recursion"),
    "half": ('{"format": 2,', "not a readable .*line 1 column 1"),
    "digits": (spec_with("format", "2" * 5000), "not a readable .*4300 digits"),
    "fields": (spec_with("a\nb", "1"), "expected the fields architecture, .*, received .*a.{1,2}b"),
    "no_architecture": (spec_with("architecture", "null"), "fields image_shape, .* NoneType"),
    "inf": (spec_with("dim", "1e999"), f"{SIZE}inf"),
    "large": (spec_with("dim", "9" * 4000), f"{SIZE}9{{60}}$"),
    "nested": (spec_with("dim", "[" * 900 + "]" * 900), rf"{SIZE}\("),
    "function": (spec_with("activation", '{"os": "system"}'), "activation: expected one of gelu"),
    "crop": (spec_with("eval_crop", "NaN"), "eval_crop=nan: expected 0, or a number from 0.1 to 1"),
    "no_names": (spec_with("class_names", "3"), f"{NAMES}3"),
    "one_name": (spec_with("class_names", '"abc"'), f"{NAMES}'abc'"),
    "named_names": (spec_with("class_names", '{"a": 1, "b": 2, "c": 3}'), NAMES),
    "lists_of_names": (spec_with("class_names", '[["a"], ["b"], ["c"]]'), NAMES),
    "surrogates": (spec_with("class_names", r'["a", "\ud800", "c"]'), NAMES),
    "long": (spec_with("loss", f'"{"x" * 10_000}"'), "loss: expected one of softmax, sigmoid"),
}
for name, (text, message) in SPECS.items():
    safetensors_with(
        f"{name}_spec.safetensors", message,
        {"__metadata__": {"keras_mixer": text}, "a": entry()}, bytes(4),
    )  # fmt: skip

    @hostile(f"{name}_spec", message)
    def write_folder_of_spec(path, material, text=text):
        path.mkdir()
        (path / "model.json").write_text(text)


NUMBER = {"a": np.zeros(1, "float32")}
for name, record in {
    "list": "[]", "nested": "[" * 100_000, "half": "{",
    "no_facts": json.dumps({"sha256": model_folder.digest(NUMBER)}),
}.items():  # fmt: skip

    @hostile(f"{name}_record", "cannot be read|damaged|does not fit")
    def write_folder_of_record(path, material, record=record):
        model_folder.write_spec(path, ModelSpec(SMALL))
        (path / "model.safetensors").write_bytes(pack(NUMBER, {"keras_mixer": record}))


for dtype, size in (("BF16", 2), ("F8_E4M3", 1)):

    @hostile(f"{dtype}_folder", "cannot be read|damaged")
    def write_folder_of_type(path, material, dtype=dtype, size=size):
        model_folder.write_spec(path, ModelSpec(SMALL))
        header = json.dumps({"a": entry(offsets=(0, size), dtype=dtype)}).encode()
        content = struct.pack("<Q", len(header)) + header + bytes(size)
        (path / "model.safetensors").write_bytes(content)


# === X5 without torch, X6: zip files ===


def patched_zip(name, message, change):
    """Registers an official checkpoint whose bytes went through a function."""

    @hostile(name, message)
    def write(path, material):
        content = bytearray((GOLDEN / "official_mixer.npz").read_bytes())
        path.write_bytes(change(content))


def patch(offset_from_end, layout, value):
    def change(content):
        struct.pack_into(layout, content, len(content) - offset_from_end, value)
        return content

    return change


def rename_locally(content):
    place = content.index(b"stem/kernel.npy")
    content[place : place + 4] = b"stum"
    return content


def encrypt(content):
    place = content.index(b"PK\x01\x02")
    content[place + 8] |= 1
    return content


def lie_about_size(content):
    place = content.index(b"PK\x01\x02")
    struct.pack_into("<L", content, place + 24, 1 << 31)
    return content


def overlap(content):
    first = content.index(b"PK\x01\x02")
    second = content.index(b"PK\x01\x02", first + 1)
    struct.pack_into("<L", content, second + 42, 0)
    return content


def flip(content):
    content[300] ^= 1
    return content


END = "not a readable .npz checkpoint, or a damaged one"
patched_zip("directory.npz", END, patch(6, "<L", 77))
patched_zip("local_name.npz", "File name in directory", rename_locally)
patched_zip("encrypted.npz", "encrypted", encrypt)
patched_zip("size.npz", "expand to more than 20 times", lie_about_size)
patched_zip("overlap.npz", END, overlap)
patched_zip("bit.npz", "Bad CRC-32", flip)
patched_zip("cut.npz", "not a zip file", lambda content: content[:-1000])

READER = """
import contextlib, json, pathlib, sys, time
with contextlib.suppress(ImportError):  # a reader that fails must not take the machine with it
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from keras_mixer import InputError
from keras_mixer.weights.pretrained import read_pretrained
answers = {}
for path in sys.argv[1:]:
    begin = time.process_time()
    try:
        read_pretrained(path, (24, 16) if path.endswith(".npz") else None)
        answer = "was read"
    except InputError as error:
        answer = str(error)
    except Exception as error:
        answer = f"not caught: {error!r}"
    answers[path] = [answer, time.process_time() - begin]
status = pathlib.Path("/proc/self/status")
peak = status.read_text().partition("VmHWM:")[2] if status.exists() else "0"
print(json.dumps({
    "answers": answers,
    "imported": sorted({"keras", "tensorflow", "torch"} & set(sys.modules)),
    "megabytes": int((peak or "0").split()[0]) / 1024,
}))
"""


@pytest.fixture(scope="module")
def verdict(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    material = Material(folder)
    for name, (write, _) in HOSTILE.items():
        write(folder / name, material)
    before = sorted(folder.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", READER, *(str(folder / name) for name in HOSTILE)],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert sorted(folder.rglob("*")) == before, "nothing was written, the canary least of all"
    assert not material.canary.exists()
    return json.loads(done.stdout), folder


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused(verdict, name):
    answers, folder = verdict[0]["answers"], verdict[1]
    answer, seconds = answers[str(folder / name)]
    assert re.search(HOSTILE[name][1], answer), answer
    assert answer.startswith(str(folder / name))
    assert "\n" not in answer and len(answer) < 1000
    assert seconds < 5


def test_nothing_was_deserialized_and_no_memory_taken(verdict):
    assert verdict[0]["imported"] == []
    assert verdict[0]["megabytes"] < 300


def test_honest_files_beside_them_are_read(tmp_path):
    material = Material(tmp_path)
    for path in (material.keras, material.weights):
        assert read_pretrained(path).spec.architecture.depth == 2


# === X5: .pth ===


def test_pth_without_torch_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"torch, which is not installed: pip install .*\[torch\]"):
        read_pretrained(GOLDEN / "timm_mixer.pth")


@pytest.mark.parametrize("version", ["1.13.1", "2.6.0", "2.9.1+cpu"])
def test_pth_with_an_old_torch_is_not_opened(monkeypatch, version):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__=version))
    with pytest.raises(InputError, match=f"expected torch >= 2.10, found {re.escape(version)}"):
        read_pretrained(GOLDEN / "timm_mixer.pth")


@pytest.mark.backends
class TestWithTorch:
    """What torch itself is asked to refuse."""

    @pytest.fixture(autouse=True)
    def torch(self):
        return pytest.importorskip("torch", minversion="2.10")

    def test_reduce_canary(self, torch, tmp_path):
        torch.save({"stem.proj.weight": Touch(tmp_path / "canary")}, tmp_path / "x.pth")
        with pytest.raises(InputError, match=r"holds more than weights.*save its state_dict as"):
            read_pretrained(tmp_path / "x.pth")
        assert not (tmp_path / "canary").exists()

    def test_training_file_with_a_namespace(self, torch, tmp_path):
        import argparse

        state = torch.load(GOLDEN / "timm_mixer.pth", weights_only=True)
        content = {"state_dict": state, "args": argparse.Namespace(lr=1)}
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(InputError, match="holds more than weights"):
            read_pretrained(tmp_path / "x.pth")

    def test_files_of_old(self, torch, tmp_path):
        with open(tmp_path / "x.pth", "wb") as file:
            pickle.dump({"a": Touch(tmp_path / "canary")}, file)
        torch.save({}, tmp_path / "y.pth", _use_new_zipfile_serialization=False)
        for name in "xy":
            with pytest.raises(InputError, match=r"not a .pth file of torch 1.6 or later"):
                read_pretrained(tmp_path / f"{name}.pth")
        assert not (tmp_path / "canary").exists()

    def test_views_that_pretend_to_any_shape(self, torch, tmp_path):
        state = torch.load(GOLDEN / "timm_mixer.pth", weights_only=True)
        state["stem.proj.weight"] = torch.zeros(1).expand(1 << 20, 3, 512, 512)
        torch.save(state, tmp_path / "x.pth")
        with pytest.raises(InputError, match="declares .* bytes of weights, holds"):
            read_pretrained(tmp_path / "x.pth")

    def test_deflated_bomb(self, torch, tmp_path):
        with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x/data.pkl", bytes(100 << 20))
        with pytest.raises(InputError, match="expand to more than"):
            read_pretrained(tmp_path / "x.pth")

    @pytest.mark.parametrize("content", [[], {"a": 1}, {1: None}, "text"])
    def test_anything_but_a_state_dict(self, torch, tmp_path, content):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(InputError, match="expected a dict from names to tensors"):
            read_pretrained(tmp_path / "x.pth")


def test_archives_take_what_numpy_and_keras_write(tmp_path):
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", a=np.zeros(3), b=np.ones((2, 2)))
        with archives.open_archive(tmp_path / "x.npz", "a zip file") as (_, members):
            assert members.keys() == {"a.npy", "b.npy"}
