"""All commands, in the order of `--help`."""

from typing import NamedTuple

from keras_mixer.commands import (
    few_shot,
    launch,
    models,
    report,
    studies,
    sweep,
    training,
    weights,
)
from keras_mixer.config.training import Config


class Command(NamedTuple):
    """A command of the command line.

    Attributes:
        run: Function of (options, arguments) that returns an exit status, or None for 0.
        options: Dataclass of its flags.
        arguments: Names of its positional arguments; None if it takes none.
        examples: Command lines for `--help`.
    """

    run: object
    options: type
    arguments: str | None
    examples: tuple[str, ...]


COMMANDS = {
    "train": Command(
        training.train,
        Config,
        None,
        (
            "python train.py --depth=6 --dim=512 --scheduler=cosine",
            "python train.py --dataset=folder --data_dir=photos --output_dir=runs/photos",
            "python train.py --flagfile=flags/mnist.flags --output_dir=runs/mnist",
        ),
    ),
    "launch": Command(
        launch.launch,
        launch.LaunchOptions,
        "-- train [TRAIN_FLAG...]",
        ("keras-mixer launch --processes=2 -- train --preset=digits --output_dir=runs/two",),
    ),
    "evaluate": Command(
        models.evaluate,
        models.EvaluateOptions,
        "RUN|CHECKPOINT",
        (
            "keras-mixer evaluate runs/photos",
            "keras-mixer evaluate runs/photos --temperature --corruptions=all",
            "keras-mixer evaluate runs/photos --dataset=folder --data_dir=new_photos",
            "keras-mixer evaluate mixer.safetensors --dataset=csv --data_dir=new_photos",
            "keras-mixer evaluate official:imagenet1k/Mixer-B_16 --dataset=imagenet2012 "
            "--expected=published",
        ),
    ),
    "fewshot": Command(
        few_shot.few_shot,
        few_shot.FewShotOptions,
        "CHECKPOINT",
        ("keras-mixer fewshot runs/photos --dataset=folder --data_dir=photos --shots=1,5,10",),
    ),
    "predict": Command(
        models.predict,
        models.PredictOptions,
        "RUN IMAGE...",
        ("keras-mixer predict runs/photos holiday.jpg 'more/*.png' --top_k=3",),
    ),
    "export": Command(
        models.export,
        models.ExportOptions,
        "RUN",
        ("keras-mixer export runs/photos --name=photos",),
    ),
    "convert": Command(
        weights.convert,
        weights.ConvertOptions,
        "SOURCE TARGET",
        ("keras-mixer convert runs/photos mixer.safetensors",),
    ),
    "preview": Command(
        training.preview,
        training.PreviewOptions,
        None,
        ("keras-mixer preview --flip --mixup=0.2 --output=preview.png",),
    ),
    "sweep": Command(
        sweep.sweep,
        sweep.SweepOptions,
        "[-- TRAIN_FLAG...]",
        (
            "keras-mixer sweep --space='lr=0.001,0.01; dropout=0,0.1' -- --epochs=5",
            "keras-mixer sweep --space='lr=1e-4..1e-1:log' --sampler=tpe --trials=30 --prune",
        ),
    ),
    "report": Command(
        report.report,
        report.ReportOptions,
        "RUN...",
        (
            "keras-mixer report runs/* --output=results/runs.md",
            "keras-mixer report runs/* --html=report",
        ),
    ),
    "transfer": Command(
        studies.transfer,
        studies.TransferOptions,
        "[-- TRAIN_FLAG...]",
        (
            "keras-mixer transfer --checkpoint=official:imagenet21k/Mixer-B_16",
            "keras-mixer transfer --checkpoint=preset:cifar10 --datasets=photos --lrs=1e-3,3e-3 "
            "--scratch -- --data_dir=photos",
        ),
    ),
    "resizing": Command(
        studies.resizing,
        studies.ResizingOptions,
        "RUN...",
        ("keras-mixer resizing runs/photos --shapes=56/4,56x28/4",),
    ),
    "benchmark": Command(
        studies.benchmark,
        studies.BenchmarkOptions,
        None,
        (
            "keras-mixer benchmark --preset=digits",
            "keras-mixer benchmark --variant=S/16 --channels=3 --batch_size=16 --compare=timm",
            "keras-mixer benchmark --vary=image_size,depth,dim,batch_size --plot=cost.png",
        ),
    ),
}
