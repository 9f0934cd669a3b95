"""`Config`: every option of a training run, with its name, default and bounds.

A field of `Config` is a flag of `train.py` of the same name. Values that depend on others (the
patch on the dataset, the widths on `dim`) are None until `resolve.resolve` fills them.
"""

import dataclasses
import json

from keras_mixer.config.command_line import parse
from keras_mixer.config.data import AugmentationOptions, DatasetOptions, PreprocessingOptions
from keras_mixer.config.options import (
    COUNT,
    PIXELS,
    RATE,
    SEED,
    STEPS,
    accept_aliases,
    check,
    convert,
    option,
    options_of,
    resolve_aliases,
)
from keras_mixer.data.datasets import SPLITS
from keras_mixer.errors import InputError
from keras_mixer.model.architecture import FIELDS, LOSSES, Preprocessing, drop_permutation
from keras_mixer.model.variants import ACTIVATIONS, MODELS, VARIANTS
from keras_mixer.weights.resize import RESIZE_TOKENS

DEFAULT_DEPTH = 6
DEFAULT_DIM = 512
DEFAULT_WARMUP = 10

# Those of Keras, without ScheduleFreeAdamW, which ignores a schedule, and Ftrl, whose first step
# discards initial and pretrained weights, since it computes weights from sums of gradients alone.
OPTIMIZERS = (
    *("sgd", "adam", "adamw", "lion", "lamb", "nadam", "adamax", "adagrad", "adadelta"),
    *("rmsprop", "adafactor", "muon"),
)
SCHEDULERS = ("cosine", "linear", "constant", "step")
CLASS_WEIGHTS = ("none", "balanced")
FREEZES = ("none", "backbone")
OF_CHECKPOINTS = ("checkpoint", "resize_tokens", "freeze", "layer_decay")  # need a checkpoint
UNITS = ("epoch", "step")
PRECISIONS = ("float32", "bfloat16", "float16")
JIT_MODES = ("auto", "true", "false")


@accept_aliases
@dataclasses.dataclass(frozen=True)
class Config(AugmentationOptions, PreprocessingOptions, DatasetOptions):  # fields: last base first
    """Configuration of a training run. `python train.py --help` says what each field means.

    Fields are given by name, or by the alias of their flag: `Config(epochs=5, image_shape=64)`.

    Raises:
        InputError: If a value is out of bounds; the message names the flag.
    """

    preset_name: str | None = option(
        None, "Name of the preset that the flags are from, if any.", result=False, flag=False
    )
    model: str | None = option(
        None,
        "Model (default: mixer), or a baseline. mlp: depth dense layers of dim units on the "
        "pixels, each followed by the activation and dropout. cnn: the same after two "
        "convolutions of 3x3 with 32 and 64 filters, pooling, and half the dropout.",
        choices=MODELS,
        heading="Model",
    )
    variant: str | None = option(
        None,
        "Variant of the paper's Table 1: sets image_shape, patch_shape, depth and widths.",
        choices=tuple(VARIANTS),
        basic=True,
    )
    patch_shape: tuple[int, int] | None = option(
        None,
        "height,width of a patch, in pixels; must divide image_shape (default: the dataset's, "
        "such as 2,2 for digits; 16,16 for photos).",
        basic=True,
        **PIXELS,
    )
    depth: int | None = option(
        None, f"Number of mixer layers (default: {DEFAULT_DEPTH}).", basic=True, low=1, high=1000
    )
    dim: int | None = option(
        None,
        f"Embedding dimension: channels per token (default: {DEFAULT_DIM}).",
        basic=True,
        **PIXELS,
    )
    tokens_mlp_dim: int | None = option(
        None, "Hidden width of the token-mixing MLP (default: dim/2).", **COUNT
    )
    channels_mlp_dim: int | None = option(
        None, "Hidden width of the channel-mixing MLP (default: 4*dim).", **COUNT
    )
    num_classes: int | None = option(
        None,
        "Number of classes (default: that of the data, the only value allowed).",
        low=2,
        high=1_000_000,
    )
    activation: str | None = option(
        None,
        "Activation of both MLPs (default: gelu, the tanh form of the official code; gelu_erf"
        " is the exact one).",
        choices=ACTIVATIONS,
    )
    token_mixing: bool | None = option(
        None, "Token mixing (across patches); false omits it from every layer (default: true)."
    )
    channel_mixing: bool | None = option(
        None, "Channel mixing (within a patch); false omits it from every layer (default: true)."
    )
    dropout: float = option(0.0, "Dropout rate of the MLPs.", **RATE)
    stochastic_depth: float = option(
        0.0,
        "Stochastic depth (drop path): rate at the last layer, linearly from 0 at the first.",
        **RATE,
    )
    checkpoint: str | None = option(
        None,
        "Pretrained weights to fine-tune: a run directory, official .npz, timm's .safetensors or "
        ".pth, .keras or .weights.h5 of keras_mixer, official:NAME, which is downloaded once, or "
        "preset:cifar10, which is included. "
        "The architecture is that of the checkpoint; weights are adapted to image_shape and "
        "patch_shape if given; if the classes differ, the head is new.",
        basic=True,
    )
    resize_tokens: str = option(
        "auto",
        "How token mixing is adapted to another grid of patches. interpolate: resized weights, for "
        "any grid, usable without training. tile: block-diagonal copies, if the grid grows by "
        "integer factors; tokens_mlp_dim grows with it; must be trained before use (paper, "
        "appendix C). auto: interpolate.",
        choices=RESIZE_TOKENS,
    )

    optimizer: str = option(
        "sgd", "Optimizer.", choices=OPTIMIZERS, heading="Optimization", basic=True
    )
    batch_size: int = option(16, "Images per optimizer step.", basic=True, **COUNT)
    accumulation: int = option(
        1, "Gradient accumulation: number of parts per batch. Must divide batch_size.", **COUNT
    )
    lr: float = option(
        1e-3, "Peak learning rate.", aliases=("learning_rate",), basic=True, above=0.0, high=1000.0
    )
    layer_decay: float = option(
        1.0,
        "Layer-wise learning-rate decay factor, from the head down to the stem. 1: none.",
        above=0.0,
        high=1.0,
    )
    freeze: str = option(
        "none",
        "What to freeze. backbone: everything but the head (linear probe); needs --checkpoint.",
        choices=FREEZES,
    )
    momentum: float = option(0.9, "Momentum of SGD.", **RATE)
    decay: float = option(
        0.0,
        "Decoupled weight decay of the kernels, multiplied by the learning rate.",
        aliases=("weight_decay",),
        basic=True,
        low=0.0,
        high=1000.0,
    )
    num_steps: int = option(
        30,
        "Number of epochs (with --schedule_unit=step, of optimizer steps).",
        aliases=("epochs",),
        title="epochs",
        basic=True,
        low=1,
        high=10**9,
    )
    warmup_step: int | None = option(
        None,
        "Number of epochs (with --schedule_unit=step, of steps) of linear warm-up from 0 (default: "
        f"{DEFAULT_WARMUP}, but at most a third of epochs).",
        aliases=("warmup_epochs",),
        title="warmup_epochs",
        low=0,
        high=1_000_000_000,
    )
    schedule_unit: str = option("epoch", "Unit of epochs and warmup_epochs.", choices=UNITS)
    scheduler: str = option(
        "cosine",
        "Learning-rate schedule after warm-up. cosine and linear decay to 0; step drops by "
        "drop_factor every drop_every.",
        choices=SCHEDULERS,
        basic=True,
    )
    drop_every: int | None = option(
        None,
        "With --scheduler=step: number of epochs (with --schedule_unit=step, of steps) between "
        "drops, counted from the start (default: a third of epochs).",
        **STEPS,
    )
    drop_factor: float = option(
        0.1, "With --scheduler=step: factor of each drop.", above=0.0, below=1.0
    )
    loss: str = option(
        "softmax",
        "Softmax cross-entropy, or sigmoid cross-entropy summed over the classes, as in the "
        "official pre-training.",
        choices=LOSSES,
    )
    class_weights: str = option(
        "none",
        "Class weights in the loss. balanced: inverse class frequency, with mean 1 over images.",
        choices=CLASS_WEIGHTS,
    )
    head_bias: float | None = option(
        None,
        "Initial bias of the head (default: 0; with --loss=sigmoid: -log(num_classes)).",
        low=-100.0,
        high=100.0,
    )
    clip_norm: float = option(
        0.0, "Gradient clipping: maximum global norm. 0: none.", low=0.0, high=1e9
    )
    label_smoothing: float = option(0.0, "Label smoothing.", **RATE)
    ema: float = option(
        0.0,
        "Exponential moving average of the weights (EMA): decay per step. The EMA weights "
        "are then evaluated and exported. 0: none.",
        **RATE,
    )
    early_stopping: int = option(
        0,
        "Early stopping: patience in epochs; compares validation accuracy, then loss. 0: none.",
        low=0,
        high=1_000_000,
    )
    precision: str = option(
        "float32",
        "Compute precision; weights are always float32. float16 uses loss scaling.",
        choices=PRECISIONS,
    )
    remat: bool = option(
        False,
        "Rematerialization (gradient checkpointing): recompute mixer layers in the backward pass, "
        "which takes less memory and more time.",
        result=False,
    )
    jit: str = option(
        "auto",
        "Compile the training step with XLA. auto: on a GPU; on a CPU, parts of each batch are "
        "computed in parallel, with XLA between the matrix products of oneDNN.",
        choices=JIT_MODES,
    )
    seed: int = option(0, "Random seed: initial weights, order, augmentation, dropout.", **SEED)
    devices: str = option(
        "all",
        "Devices that share every batch: all, a number, or indices, as in 0,2. Several need "
        "KERAS_BACKEND=jax; TensorFlow uses the first.",
        result=False,
    )
    deterministic: bool = option(
        False,
        "Use only deterministic operations of TensorFlow, which are slower: runs on the same type "
        "of GPU are then equal bit for bit. On a CPU they are without it.",
    )

    output_dir: str = option(
        "output/",
        "Run directory. The same command resumes an interrupted run.",
        heading="Run",
        basic=True,
        result=False,
    )
    overwrite: bool = option(
        False,
        "Delete the run in output_dir and start over; without it, that run is resumed.",
        result=False,
    )
    save_every: int = option(
        1, "Epochs (or steps, with --save_unit=step) between checkpoints.", **STEPS, result=False
    )
    save_unit: str = option("epoch", "Unit of save_every.", choices=UNITS, result=False)
    tensorboard: bool = option(
        False, "Write curves and the graph to output_dir/logs for TensorBoard.", result=False
    )
    eval_split: str | None = option(
        None,
        "Split to evaluate once, at the end, with the selected weights (default: test; validation "
        "if the data have no test images).",
        choices=SPLITS,
        result=False,
    )
    name: str = option("mlp_mixer", "Name of the exported model.", plain_name=True, result=False)
    export: bool = option(
        True, "Export a SavedModel to export_dir/name/version/ at the end.", result=False
    )
    export_dir: str = option("saved_models", "Folder for exports.", result=False)

    def __post_init__(self):
        convert(self)
        check(self)

    @classmethod
    def preset(cls, name, **overrides):
        """Returns the Config of a preset, one of the recipes in flags/.

        Args:
            name: Such as `"photos"`; `python train.py --help` lists all.
            **overrides: Options to set or change, such as `data_dir`.

        Raises:
            InputError: If there is no such preset, or an option is unknown or out of bounds.
        """
        overrides = resolve_aliases(cls, overrides)
        names = ("model", "num_steps", "warmup_step")  # which change what the preset gives
        known = [f"--{n}={overrides[n]}" for n in names if overrides.get(n) is not None]
        _, given, _ = parse(cls, [f"--preset={name}", *known])
        return cls(**given | overrides, preset_name=name)

    def check_spelling(self, spelled):
        """Refuses names of flags that say epochs where steps are counted.

        Args:
            spelled: dict from field to the name it was given under.
        """
        wrong = [name for name in spelled.values() if "epochs" in name]
        if wrong and self.schedule_unit == "step":
            raise InputError(
                f"--{wrong[0]} counts epochs, --schedule_unit=step steps; give --num_steps and "
                f"--warmup_step with it"
            )

    def architecture(self):
        """Returns the arguments of `Architecture.of_model` as a dict; some may be None."""
        return {name: getattr(self, name) for name in ("model", *FIELDS) if hasattr(self, name)}

    def preprocessing(self):
        """Returns the `Preprocessing`."""
        return Preprocessing(eval_crop=self.eval_crop, interpolation=self.interpolation)

    def augmentation(self):
        """Returns the keyword arguments of `training_batches` that are augmentation."""
        return options_of(self, AugmentationOptions)

    # === As text ===

    def to_json(self):
        """Returns the fields as a dict of JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, values):
        """Returns the Config that `to_json` described.

        Raises:
            InputError: If a field is unknown or out of bounds.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict):
            raise InputError(f"config.json: expected options, received {values!r:.60}")
        values = drop_permutation(values)
        if unknown := sorted(set(values) - known):
            raise InputError(f"config.json holds unknown options: {', '.join(unknown)}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
