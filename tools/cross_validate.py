"""Compares recipes by cross-validation on the images of a dataset outside its test set.

    python tools/cross_validate.py --recipe='--preset=photos' --recipe='--preset=photos --depth=8' \
        --output=results/photos.md -- --dataset=folder --data_dir=data/photos

Every recipe is trained once per fold on the other folds, and its last weights are scored on the
fold. Flags after -- go to every run. A finished run is not repeated, so the same command continues
a study that was stopped. The test images are never read.
"""

import argparse
import csv
import hashlib
import os
import shlex
import sys
from pathlib import Path

import numpy as np
from documents import add_output, write_document
from sklearn.model_selection import StratifiedKFold

from keras_mixer.config.command_line import parse
from keras_mixer.config.training import Config
from keras_mixer.data.sources import open_dataset
from keras_mixer.errors import InputError
from keras_mixer.jobs import JobSequence
from keras_mixer.reports.markdown import code, spread, table
from keras_mixer.reports.report import made_on
from keras_mixer.runs.run import read_history


def write_folds(config, folds, folder):
    """Writes a label file for each fold of the images outside the test set; returns their paths."""
    names, labels = read_images(config)
    paths = []
    splits = StratifiedKFold(folds, shuffle=True, random_state=config.split_seed)
    for index, (_, held_out) in enumerate(splits.split(names, labels)):
        split = np.full(len(names), "train", object)
        split[held_out] = "validation"
        paths.append(folder / f"fold-{index}.csv")
        with open(paths[-1], "w", newline="") as file:
            csv.writer(file).writerows(
                [("image", "label", "split"), *zip(names, labels, split, strict=True)]
            )
    return paths


def read_images(config):
    """Returns the names, relative to data_dir, and the class names of the images to train on."""
    dataset = open_dataset(**config.dataset_options() | {"validation_fraction": 0.0})
    images = dataset.train
    if not hasattr(images, "listing"):
        raise InputError(f"--dataset={config.dataset}: expected folder or csv, images in files")
    names = list(map(os.fsdecode, images.listing.names))
    return names, [dataset.class_names[label] for label in images.labels]


def read_flags(recipe):
    """Returns the words of a recipe, as a shell reads it."""
    try:
        return shlex.split(recipe)
    except ValueError as error:
        raise InputError(f"--recipe={recipe}: {error}") from error


def cross_validate(recipes, common, folds, folder):
    """Trains every recipe on every fold; returns a dict from recipe to its runs.

    The folds are those of the first recipe's data, which all share.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flags_of = {recipe: [*read_flags(recipe), *common] for recipe in recipes}
    label_files = write_folds(parse(Config, flags_of[recipes[0]])[0], folds, folder)
    jobs = JobSequence(len(recipes) * folds)
    runs = {}
    for recipe, flags in flags_of.items():
        name = hashlib.sha256(" ".join(flags).encode()).hexdigest()[:12]
        for index, labels in enumerate(label_files):
            own = ["--dataset=csv", f"--labels={labels}", "--export=false"]
            own += [f"--output_dir={folder / name / f'fold-{index}'}"]
            config, _, _ = parse(Config, [*flags, *own])
            runs.setdefault(recipe, []).append(jobs.run(f"{recipe}, fold {index}", config))
    return runs


def as_table(runs):
    """Returns a Markdown table with a row per recipe, the best first."""
    rows = []
    for recipe, folds in runs.items():
        histories = [read_history(run.directory) for run in folds]
        accuracies = [100 * float(epochs[-1]["val_accuracy"]) for epochs in histories]
        seconds = np.mean([sum(float(epoch["seconds"]) for epoch in h) for h in histories])
        parameters = folds[0].spec.architecture.parameters
        cells = code(recipe), spread(accuracies), f"{parameters:,}", f"{seconds:.0f} s"
        rows.append((np.mean(accuracies), cells))
    columns = ("recipe", "accuracy", "parameters", "training time")
    return "\n".join(table(columns, (cells for _, cells in sorted(rows, reverse=True))))


def main():
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    common = arguments[end + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", action="append", required=True, help="flags of train.py")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/folds"))
    add_output(parser)
    words = parser.parse_args(arguments[:end])
    if words.folds < 2:
        raise InputError(f"--folds={words.folds}: expected at least 2")
    runs = cross_validate(words.recipe, common, words.folds, words.output_dir)
    write_document(
        words.output,
        f"Accuracy of the last weights in percent on the images held out, mean ± standard "
        f"deviation of {words.folds} folds. Test images are not among them.",
        as_table(runs),
        *made_on(run.directory for folds in runs.values() for run in folds),
    )


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
