"""Makes a folder of very many tiny images and shows what indexing and reading it costs.

    python tools/index_many.py --files=200000

Indexing is what happens before the first step: listing, checking headers and ends, splitting, the
identity. It is done twice, each time in a process of its own: cold, with an empty cache of readable
images, and warm. After the second, 300 steps are read as training reads them. While they are, the
resident memory must not grow by more than MOST_GROWTH after the tenth step. (Cold refers to
that cache: the files were just written, so the operating system still holds them.)

Memory is read from /proc, so this runs on Linux. About 4 KB of disk are needed for each file; the
folder is removed in the end.
"""

import argparse
import io
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 20
BATCH_SIZE = 64
STEPS = 300
MOST_GROWTH = 48  # MB


def make_folder(folder, files):
    """Writes class folders with JPEGs of 24×24 pixels, about 1 KB each, 64 different ones."""
    generator = np.random.default_rng(0)
    contents = []
    for _ in range(64):
        content = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (24, 24, 3), np.uint8)).save(content, "JPEG")
        contents.append(content.getvalue())
    for label in range(CLASSES):
        (folder / f"class_{label:02}").mkdir(parents=True)
    for index in range(files):
        path = folder / f"class_{index % CLASSES:02}" / f"{index:07}.jpg"
        path.write_bytes(contents[index % len(contents)])


def resident():
    """Memory of this process that is in use, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def index(folder):
    """Opens the folder as a dataset; returns it, the seconds and the memory before and after."""
    from keras_mixer.data.sources import open_dataset

    before, began = resident(), time.monotonic()
    dataset = open_dataset("folder", folder)
    return dataset, {"seconds": time.monotonic() - began, "before": before, "after": resident()}


def index_only(folder):
    """Returns what `index` measured."""
    return index(folder)[1]


def index_and_read(folder, steps):
    """Indexes, then reads training batches; returns what `index` measured and the memory then."""
    dataset, measured = index(folder)
    from keras_mixer.model.architecture import Architecture, ModelSpec
    from keras_mixer.preprocessing.input_pipeline import training_batches

    architecture = Architecture(
        image_shape=(24, 24), patch_shape=(8, 8), depth=1, dim=8, num_classes=CLASSES
    )
    recipe = {"batch_size": BATCH_SIZE, "seed": 0, "flip": True, "crop_padding": 2}
    batches = training_batches(dataset.train, ModelSpec(architecture), **recipe)
    for step, _ in enumerate(batches.take(steps), start=1):
        if step == 10:
            measured["step 10"] = resident()
    return measured | {"end": resident()}


def in_new_process(function, *arguments):
    """Calls a function of this file in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def show(files, steps):
    """Makes the folder, measures, prints; returns the growth of memory in MB."""
    with tempfile.TemporaryDirectory() as root:
        os.environ["KERAS_MIXER_CACHE"] = str(Path(root) / "cache")
        folder, began = Path(root) / "images", time.monotonic()
        make_folder(folder, files)
        print(f"{files:,} files written in {time.monotonic() - began:.1f} s", flush=True)
        cold = in_new_process(index_only, folder)
        (cache,) = Path(root).glob("cache/*/*.npz")
        cached = cache.stat().st_size / 2**20
        warm = in_new_process(index_and_read, folder, steps)
    for name, measured in (("cold", cold), ("warm", warm)):
        print(
            f"{name} index: {measured['seconds']:.1f} s, {files / measured['seconds']:,.0f} files/s"
            f", memory {measured['before']:.0f} MB before, {measured['after']:.0f} MB after"
        )
    growth = warm["end"] - warm["step 10"]
    print(f"cache of readable images on disk: {cached:.2f} MB")
    print(
        f"memory after step 10: {warm['step 10']:.0f} MB, after step {steps}: {warm['end']:.0f} MB"
    )
    print(f"growth: {growth:.1f} MB, at most {MOST_GROWTH} MB allowed")
    return growth


def main():
    """Shows it; the exit status is 1 if memory grew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    return 0 if show(options.files, options.steps) <= MOST_GROWTH else 1


if __name__ == "__main__":
    sys.exit(main())
