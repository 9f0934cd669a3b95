"""Measures the speed of the cases in results/speed.md, or in speed_of_fit.md, and writes it.

    python tools/measure_speed.py results/speed.md [--compare=timm --timm_python=PYTHON]
    python tools/measure_speed.py results/speed_of_fit.md [--compare=timm --timm_python=PYTHON]

Flags after the file are those of `keras-mixer benchmark`. Cases whose images are not under data/
are left out. It takes about 25 minutes on two cores; of `fit`, 8.
"""

import argparse
import contextlib
import io
import math
import os
import re
import sys

from keras_mixer.__main__ import main
from keras_mixer.commands.table import COMMANDS
from keras_mixer.compute.environment import environment
from keras_mixer.config.command_line import parse
from keras_mixer.files import write_through
from keras_mixer.model.architecture import Architecture

MNIST = "mnist, batch 64"
CASES = {
    "a": "--image_shape=28 --patch_shape=4 --depth=8 --dim=16 --tokens_mlp_dim=1024 "
    "--channels_mlp_dim=512 --channels=1 --batch_size=256",
    "b": "--image_shape=32 --patch_shape=4 --depth=8 --dim=128 --tokens_mlp_dim=64 "
    "--channels_mlp_dim=512 --channels=3 --batch_size=128",
    "c": "--image_shape=64 --patch_shape=8 --depth=6 --dim=256 --tokens_mlp_dim=128 "
    "--channels_mlp_dim=1024 --channels=3 --batch_size=64",
    "d": "--variant=S/16 --channels=3 --batch_size=16",
    "m": "--image_shape=28 --patch_shape=14 --depth=10 --dim=128 --tokens_mlp_dim=128 "
    "--channels_mlp_dim=128 --channels=1 --batch_size=64",
    MNIST: "--dataset=mnist --data_dir=data/mnist --patch_shape=14 --depth=10 --dim=128 "
    "--tokens_mlp_dim=128 --channels_mlp_dim=128 --crop_padding=2 --optimizer=sgd --batch_size=64",
    "digits": "--preset=digits",
    "mnist": "--preset=mnist --data_dir=data/mnist",
    "fashion_mnist": "--preset=fashion_mnist --data_dir=data/fashion_mnist",
    "cifar10": "--preset=cifar10 --dataset=folder --data_dir=data/cifar10",
    "photos": "--preset=photos_scratch --data_dir=data/photos_small",
}
PRESETS = ("digits", "mnist", "fashion_mnist", "cifar10", "photos")
SECTIONS = {  # title: cases, flags
    "Training, momentum SGD, float32": ("abcdm", ""),
    "Training, momentum SGD, bfloat16": ("abcdm", "--precision=bfloat16"),
    "Training, AdamW, float32": ("bm", "--optimizer=adamw"),
    "Training, AdamW, bfloat16": ("bm", "--optimizer=adamw --precision=bfloat16"),
    "Inference, float32": ("bm", "--measure=inference,latency,exported --batch_size=64"),
    "Inference, bfloat16": (
        "bm",
        "--measure=inference,latency --batch_size=64 --precision=bfloat16",
    ),
}
OF_FIT = {
    "A small model, beside a loop over images in memory": ((MNIST,), "--measure=fit"),
    "Presets": (PRESETS, "--measure=training,input,fit"),
}
COSTS = "--vary=image_size,depth,dim,batch_size --measure=training"
GPU_FLOPS = 989e12  # an H100's published peak in bfloat16, without sparsity
SHARE = 0.45  # of it, the aim
PAPER_IMAGES = 300 * 1_281_167  # paper, appendix B: 300 epochs of ImageNet


def benchmark(flags):
    """Runs `keras-mixer benchmark` and returns what it prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = main(["benchmark", *flags])
    if status:
        sys.exit(status)
    return output.getvalue()


def mean(ratios):
    """Returns the geometric mean of ratios and the smallest, as text."""
    center = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return f"geometric mean {center:.2f}, least {min(ratios):.2f}, of {len(ratios)} cases"


def section(title, cases, flags):
    """Yields the lines of a section: what every case prints, then the means of the ratios."""
    ratios = {}
    yield f"## {title}\n"
    for name, sizes in cases.items():
        if (folder := re.search(r"--data_dir=(\S+)", sizes)) and not os.path.isdir(folder[1]):
            yield f"Case {name} is left out: there is no folder {folder[1]}.\n"
            continue
        print(f"{title}: {name}", file=sys.stderr)
        text = benchmark([*sizes.split(), *flags])
        yield f"Case {name}, `{' '.join([*sizes.split(), *flags])}`: {text}"
        for measure, ratio in re.findall(r"^(\w+): ([\d.]+) times timm", text, re.MULTILINE):
            ratios.setdefault(measure, []).append(float(ratio))
    for measure, values in ratios.items():
        yield f"**{title}: {measure} is {mean(values)}, over the better of both of timm.**\n"


def papers_run():
    """Returns a sentence on the time of the paper's ImageNet run, predicted from its products."""
    flops = 6 * Architecture.create("B/16", num_classes=1000).multiply_adds * PAPER_IMAGES
    days = flops / (GPU_FLOPS * SHARE) / 86400
    gpu = f"{GPU_FLOPS / 1e12:.0f} TFLOP/s at {SHARE:.0%} of its peak"
    return (
        f"Predicted, not measured: B/16 at 224×224 for 300 epochs of ImageNet takes {flops:.2e} "
        f"FLOPs in matrix products (forward once, backward twice): {days:.1f} days on a GPU of "
        f"{gpu}, {days / 8:.2f} on eight that scale perfectly.\n"
    )


def introduction():
    """Yields the first lines of a document."""
    machine = environment()
    yield "# Speed\n"
    yield (
        f"Measured on {machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, "
        f"TensorFlow {machine['tensorflow']}, Keras {machine['keras']}. Medians of processes that "
        f"take turns. timm is as shipped, with the exact GELU.\n"
    )


def measured_fit(flags):
    """Yields the parts of a document on `model.fit` with the data and augmentation of presets."""
    small, presets = OF_FIT
    yield from section(small, {MNIST: CASES[MNIST]}, [*flags, OF_FIT[small][1]])
    flags = [*without_timm(flags), OF_FIT[presets][1]]
    yield from section(presets, {name: CASES[name] for name in PRESETS}, flags)


def without_timm(flags):
    """Returns flags of `benchmark` without those that measure timm, too."""
    return [flag for flag in flags if not flag.startswith(("--compare", "--timm_python"))]


def measured(flags, picture):
    """Yields the parts of a document on steps and inference with random images in memory."""
    for title, (names, extra) in SECTIONS.items():
        yield from section(title, {name: CASES[name] for name in names}, [*flags, *extra.split()])
    flags = [*COSTS.split(), f"--plot={picture}", *without_timm(flags)]
    yield from section("How cost grows", {"b": CASES["b"]}, flags)
    yield f"![time and memory by size]({os.path.basename(picture)})\n\n{papers_run()}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("target", help="file to write: results/speed.md or speed_of_fit.md")
    words, rest = parser.parse_known_args()
    target = words.target
    parse(COMMANDS["benchmark"].options, rest)  # refuses wrong flags before half an hour of work
    picture = os.path.splitext(target)[0] + ".png"
    flags = ["--measure=training", *rest]
    of_fit = os.path.basename(target) == "speed_of_fit.md"
    parts = [*introduction(), *(measured_fit(flags) if of_fit else measured(flags, picture))]
    command = " ".join(["python tools/measure_speed.py", target, *rest])
    text = "\n".join([*parts, f"Generated by `{command}`.\n"])
    text = re.sub(r"--timm_python=[^ `]+", "--timm_python=PYTHON", text)
    write_through(target, text.encode())
