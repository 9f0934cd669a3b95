#!/usr/bin/env python
"""Trains an MLP-Mixer: `python train.py --depth 6 --dim 512 --scheduler cosine`.

The flags are the fields of `Config` in keras_mixer/config/training.py; the job is `run_job` in
keras_mixer/jobs.py: train, evaluate the test set once, export. The results are a run directory
(output/) and a SavedModel (saved_models/).

    python train.py --help                            every flag with its default
    python train.py --flagfile=flags/digits.flags     a preset; flags after it change it
    python train.py ... (the same command again)      continues a run that was interrupted
"""

import sys

from keras_mixer.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
