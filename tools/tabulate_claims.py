"""Tabulates what public projects claimed beside what was measured here, from results/*.md.

python tools/tabulate_claims.py --output=results/claims.md
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from documents import add_output, write_document

from keras_mixer.errors import InputError
from keras_mixer.reports.markdown import code, table

RESULTS = Path(__file__).parents[1] / "results"


class Claim(NamedTuple):
    """A published accuracy, and where ours is.

    Attributes:
        what: What was claimed.
        published: Top-1 accuracy in percent, as published.
        how: How the published number was chosen.
        table: Name of a table by `keras-mixer report` in results/.
        experiment: The row of that table, its first cell.
    """

    what: str
    published: str
    how: str
    table: str
    experiment: str


_ADAM = "--optimizer=adam --batch_size=32 --num_steps=5 --warmup_step=0 --scheduler=constant"
CLAIMS = (
    Claim(
        "MNIST in ten epochs",
        "97.79",
        "one run, model chosen on the test images",
        "mnist.md",
        "--preset=mnist",
    ),
    Claim(
        "MNIST, its Mixer and training; ours five epochs",
        "97.79",
        "the same",
        "mnist_published.md",
        "--preset=mnist_published --num_steps=5",
    ),
    Claim(
        "MNIST, token mixing alone; ours five epochs",
        "97.63",
        "one run, test images every epoch",
        "mnist_published.md",
        "--preset=mnist_published --channel_mixing=false --num_steps=5",
    ),
    Claim(
        "MNIST, channel mixing alone; ours five epochs",
        "97.57",
        "a second run of token mixing, by mistake",
        "mnist_published.md",
        "--preset=mnist_published --token_mixing=false --num_steps=5",
    ),
    Claim(
        "MNIST, its MLP; ours five epochs, trained as its Mixer",
        "93.83",
        "one run, another optimizer than its Mixer",
        "mnist_published.md",
        "--dataset=mnist --image_shape=28,28 --model=mlp --depth=1 --dim=256 --activation=relu "
        f"{_ADAM}",
    ),
    Claim(
        "MNIST, its CNN; ours five epochs, trained as its Mixer",
        "97.75",
        "one run, another optimizer than its Mixer",
        "mnist_published.md",
        "--dataset=mnist --image_shape=28,28 --model=cnn --depth=1 --dim=128 --activation=relu "
        f"--dropout=0.5 {_ADAM}",
    ),
    Claim(
        "Fashion-MNIST; ours in 40 epochs",
        "89.17",
        "best of 480 evaluations on the test images, 60 epochs",
        "fashion_mnist.md",
        "--preset=fashion_mnist --precision=bfloat16",
    ),
    Claim(
        "CIFAR-10 in ten epochs; ours on JPEG copies",
        "55.62",
        "one run, test images every epoch",
        "cifar10.md",
        "--preset=cifar10 --dataset=folder --precision=bfloat16",
    ),
)


def as_table(claims):
    """Returns a Markdown table with a row per claim; raises InputError if a result is missing."""
    columns = ("claim", "published top-1", "how", "test top-1 here", "runs", "command")
    return "\n".join(table(columns, map(_row, claims)))


def _row(claim):
    command = code(f"keras-mixer train {claim.experiment}")
    return claim.what, claim.published, claim.how, *_measured(claim), command


def _measured(claim):
    """Returns (test top-1, number of runs) in the row of an experiment."""
    lines = (RESULTS / claim.table).read_text().splitlines()
    tables = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if "|" in line
    ]
    for cells in tables:
        if cells[0] == f"`{claim.experiment}`":
            values = dict(zip(tables[0], cells, strict=True))
            return values["test top-1"], values["runs"]
    raise InputError(f"results/{claim.table}: expected a row of {claim.experiment}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_output(parser)
    write_document(
        parser.parse_args().output,
        as_table(CLAIMS),
        "Accuracy in percent, mean ± standard deviation over runs that differ in their seed; each "
        "was scored on the test images once, with the epoch chosen on validation images. Unless a "
        "row says so, data and number of epochs are those of the claim. Rows that say its, or name "
        "one kind of mixing, have the model and training of the claim; in the others, model, "
        "augmentation and optimizer are ours, chosen on validation images.",
    )


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
