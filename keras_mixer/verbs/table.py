"""All verbs of the command line, in the order in which `--help` lists them."""

from typing import NamedTuple

from keras_mixer.config import Config
from keras_mixer.verbs import fewshot, models, studies, training


class Verb(NamedTuple):
    """A command: what it does, what it takes."""

    run: object
    options: type
    arguments: str | None


VERBS = {
    "train": Verb(training.train, Config, None),
    "evaluate": Verb(models.evaluate, models.EvaluateOptions, "RUN"),
    "fewshot": Verb(fewshot.fewshot, fewshot.FewshotOptions, "CHECKPOINT"),
    "predict": Verb(models.predict, models.PredictOptions, "RUN IMAGE..."),
    "export": Verb(models.export, models.ExportOptions, "RUN"),
    "convert": Verb(models.convert, models.ConvertOptions, "SOURCE TARGET"),
    "preview": Verb(training.preview, training.PreviewOptions, None),
    "report": Verb(studies.report, studies.ReportOptions, "RUN..."),
}
