"""All verbs of the command line, in the order in which `--help` lists them."""

from typing import NamedTuple

from keras_mixer.config import Config
from keras_mixer.verbs import checkpoints, fewshot, models, studies, training


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
    "convert": Verb(checkpoints.convert, checkpoints.ConvertOptions, "SOURCE TARGET"),
    "verify": Verb(checkpoints.verify, checkpoints.VerifyOptions, "CHECKPOINT"),
    "preview": Verb(training.preview, training.PreviewOptions, None),
    "report": Verb(studies.report, studies.ReportOptions, "RUN..."),
    "transfer": Verb(studies.transfer, studies.TransferOptions, "[-- TRAIN_FLAG...]"),
    "resizing": Verb(studies.resizing, studies.ResizingOptions, "RUN..."),
}
