"""The one place where every option of a training run is defined: its name, default and bounds.

A field of `Config` is a flag of `train.py` of the same name. Values that depend on others (the
patch on the data set, the widths on `dim`) are None until `resolve.resolve` fills them.
"""

import dataclasses
import json

from keras_mixer.commandline import check, option
from keras_mixer.data.datasets import SPLITS
from keras_mixer.data_options import DataOptions
from keras_mixer.errors import InputError
from keras_mixer.model.variants import ACTIVATIONS, VARIANTS
from keras_mixer.weights.resize import RESIZE_TOKENS

DEFAULT_DEPTH = 6
DEFAULT_DIM = 512
DEFAULT_WARMUP = 10

OPTIMIZERS = (
    *("sgd", "adam", "adamw", "lion", "lamb", "nadam", "adamax", "adagrad", "adadelta"),
    *("rmsprop", "adafactor", "muon"),
)
SCHEDULERS = ("cosine", "linear")
LOSSES = ("softmax", "sigmoid")
FREEZES = ("none", "backbone")
UNITS = ("epoch", "step")
PRECISIONS = ("float32", "bfloat16", "float16")
JIT_MODES = ("auto", "true", "false")


@dataclasses.dataclass(frozen=True)
class Config(DataOptions):
    """Everything that determines a run. See `python train.py --help` for what each field means.

    Raises:
        InputError: If a value is out of bounds; the message names the flag.
    """

    # Model
    variant: str | None = option(
        None,
        "A variant of the paper's Table 1; sets patch, depth and widths where they are not given.",
        choices=tuple(VARIANTS),
        heading="Model",
    )
    patch_shape: tuple[int, int] | None = option(
        None,
        "height,width of a patch, in pixels; must divide image_shape (default: the data set's, "
        "as 2,2 for digits; 16,16 for photos).",
        low=1,
        high=65536,
    )
    depth: int | None = option(
        None, f"Number of mixer layers (default: {DEFAULT_DEPTH}).", low=1, high=1000
    )
    dim: int | None = option(
        None, f"Channels of every token (default: {DEFAULT_DIM}).", low=1, high=65536
    )
    tokens_mlp_dim: int | None = option(
        None, "Hidden width of token mixing (default: dim/2).", low=1, high=1048576
    )
    channels_mlp_dim: int | None = option(
        None, "Hidden width of channel mixing (default: 4*dim).", low=1, high=1048576
    )
    num_classes: int | None = option(
        None,
        "Size of the head (default: the number of classes in the data, the only value allowed).",
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
        None,
        "Mix tokens across patches; false leaves token mixing out of every layer (default: true).",
    )
    channel_mixing: bool | None = option(
        None,
        "Mix channels within a patch; false leaves channel mixing out of every layer "
        "(default: true).",
    )
    dropout: float = option(
        0.0, "Share of values dropped within both MLPs in training.", low=0.0, below=1.0
    )
    stochastic_depth: float = option(
        0.0,
        "Probability that a sample skips a branch of the last layer; it rises linearly from 0"
        " at the first.",
        low=0.0,
        below=1.0,
    )
    checkpoint: str | None = option(
        None,
        "Weights to start from: a run directory, official .npz, timm's .safetensors or .pth, our "
        ".keras or .weights.h5, or official:NAME, a released file that is downloaded once and "
        "in BUILD.md. Its architecture is taken over, its weights are adapted to image_shape "
        "and patch_shape where given; a head for other classes starts anew.",
    )
    resize_tokens: str = option(
        "auto",
        "How token mixing is adapted to another grid of patches. tile: copies of it side by side, "
        "for a grid larger by whole factors, by which tokens_mlp_dim grows (paper, appendix C); "
        "they need training. interpolate: its weights resized, for any grid; usable "
        "from the start. auto: tile where possible.",
        choices=RESIZE_TOKENS,
    )

    # Optimization
    optimizer: str = option("sgd", "Optimizer.", choices=OPTIMIZERS, heading="Optimization")
    batch_size: int = option(16, "Images in each optimizer step.", low=1, high=1048576)
    accumulation: int = option(
        1,
        "Compute each step in this many parts, whose gradients are added up: less memory, the "
        "same step. Must divide batch_size.",
        low=1,
        high=1048576,
    )
    lr: float = option(1e-3, "Peak learning rate.", above=0.0, high=1000.0)
    layer_decay: float = option(
        1.0,
        "Learning rate of every mixer layer as a share of that of the layer above; the head and "
        "the LayerNorm before it have the whole of --lr, the stem the least. 1: all the same.",
        above=0.0,
        high=1.0,
    )
    freeze: str = option(
        "none",
        "backbone: train the head alone, on features of --checkpoint that stay as they are (a "
        "linear probe).",
        choices=FREEZES,
    )
    momentum: float = option(0.9, "Momentum of sgd.", low=0.0, below=1.0)
    decay: float = option(
        0.0,
        "Decoupled weight decay of the kernels, multiplied by the learning rate.",
        low=0.0,
        high=1000.0,
    )
    num_steps: int = option(
        30, "Number of epochs; of optimizer steps with --schedule_unit=step.", low=1, high=10**9
    )
    warmup_step: int | None = option(
        None,
        "Number of epochs (or steps, as above) of linear warm-up from 0 (default: "
        f"{DEFAULT_WARMUP}, but at most a third of num_steps).",
        low=0,
        high=1_000_000_000,
    )
    schedule_unit: str = option("epoch", "What num_steps and warmup_step count.", choices=UNITS)
    scheduler: str = option(
        "cosine", "Decay of the learning rate to 0 after warm-up.", choices=SCHEDULERS
    )
    loss: str = option(
        "softmax",
        "Cross-entropy of the softmax, or of a sigmoid for every class, as the official "
        "pre-training has it.",
        choices=LOSSES,
    )
    head_bias: float | None = option(
        None,
        "Initial bias of the head (default: 0; with --loss=sigmoid the logarithm of "
        "1/num_classes, so that every class starts at that probability).",
        low=-100.0,
        high=100.0,
    )
    clip_norm: float = option(
        0.0, "Largest global norm of the gradients; 0 does not clip.", low=0.0, high=1e9
    )
    label_smoothing: float = option(
        0.0, "Share of every training label spread evenly over all classes.", low=0.0, below=1.0
    )
    ema: float = option(
        0.0,
        "Decay per step of an exponential moving average of the weights, which is then what "
        "is validated, tested and exported; 0 keeps none.",
        low=0.0,
        below=1.0,
    )
    early_stopping: int = option(
        0,
        "Stop after this many epochs without a better validation accuracy, or the same with a "
        "lower loss; those of the warm-up count, too. 0: never.",
        low=0,
        high=1_000_000,
    )
    precision: str = option(
        "float32",
        "Precision of the computation; weights are always float32. float16 scales the loss.",
        choices=PRECISIONS,
    )
    jit: str = option(
        "auto", "Compile with XLA. auto: yes, except for bfloat16 on a CPU.", choices=JIT_MODES
    )
    seed: int = option(
        0, "Seed of initial weights, order, augmentation and dropout.", low=0, high=2**31 - 1
    )

    # Run
    output_dir: str = option(
        "output/",
        "The run directory. The same command continues a run that was interrupted.",
        heading="Run",
        result=False,
    )
    overwrite: bool = option(
        False,
        "Discard the run that is in output_dir and begin anew; leave it out to continue.",
        result=False,
    )
    save_every: int = option(
        1,
        "Epochs (or steps, with --save_unit=step) between checkpoints.",
        low=1,
        high=1_000_000_000,
        result=False,
    )
    save_unit: str = option("epoch", "What save_every counts.", choices=UNITS, result=False)
    tensorboard: bool = option(
        False, "Write curves and the graph to output_dir/logs for TensorBoard.", result=False
    )
    eval_split: str = option(
        "test",
        "Split that is scored once, at the end, with the selected weights.",
        choices=SPLITS,
        result=False,
    )
    name: str = option("mlp_mixer", "Name of the exported model.", plain_name=True, result=False)
    export: bool = option(
        True, "Export a SavedModel to export_dir/name/version/ at the end.", result=False
    )
    export_dir: str = option("saved_models", "Where exports land.", result=False)

    def __post_init__(self):
        check(self)

    # === Architecture ===

    def architecture(self):
        """Returns the keyword arguments for `build_mixer`; for resolved configs only."""
        return self._only(ARCHITECTURE)

    # === Data ===

    def preparation(self):
        """Returns what the pipeline's keyword arguments for training images have from here."""
        return self._only(PREPARATION)

    def _only(self, names):
        return {name: getattr(self, name) for name in names}

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
        if unknown := sorted(set(values) - known):
            raise InputError(f"config.json holds unknown options: {', '.join(unknown)}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


ARCHITECTURE = (
    "image_shape", "patch_shape", "depth", "dim", "tokens_mlp_dim", "channels_mlp_dim",
    "num_classes", "activation", "token_mixing", "channel_mixing",
)  # fmt: skip

PREPARATION = (
    "image_shape", "num_classes", "batch_size", "seed", "label_smoothing", "eval_crop", "flip",
    "crop_padding", "inception_crop", "randaugment", "color_jitter", "random_erasing", "mixup",
    "cutmix",
)  # fmt: skip
