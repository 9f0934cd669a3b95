"""Hyperparameters of a model (`Architecture`), and all that its model.json holds (`ModelSpec`).

A `Baseline` is the architecture of a model that a Mixer is compared with.
"""

import dataclasses
import itertools
import math
import re

from keras_mixer.errors import InputError
from keras_mixer.model.checks import format_shape, read_fields, validate
from keras_mixer.model.variants import IMAGE_SHAPE, MIXER, VARIANTS

LOSSES = ("softmax", "sigmoid")
INTERPOLATIONS = ("bilinear", "bicubic")
PERMUTATIONS = ("none", "patches+pixels", "global")  # of pixels; see preprocessing/permute.py
CNN_FILTERS = (32, 64)  # of the convolutions of a CNN baseline
FORMAT = 2  # version of model.json; a new field with a default needs no new version
SMALLEST_CROP = 0.1

# Beyond these numbers of values, no machine has enough memory.
_MOST_VALUES = {"an image": 1 << 26, "a layer's activations": 1 << 30, "the weights": 1 << 35}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """Hyperparameters of a Mixer, complete and validated; see `build_mixer` for each of them.

    Raises:
        InputError: If a value has a wrong type or is out of range, if patches do not divide the
            image, or if the sizes together need more memory than any machine has.
    """

    image_shape: tuple[int, int]
    patch_shape: tuple[int, int]
    channels: int = 3
    depth: int
    dim: int
    tokens_mlp_dim: int = None  # half of dim
    channels_mlp_dim: int = None  # 4 * dim
    num_classes: int
    activation: str = "gelu"
    token_mixing: bool = True
    channel_mixing: bool = True

    model = MIXER  # no field: that of every architecture but a `Baseline`

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None or field.name not in _WIDTHS:
                object.__setattr__(self, field.name, validate(field, getattr(self, field.name)))
        for name, width in _WIDTHS.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, width(self.dim))
        self._check_division()
        self._check_products()

    @classmethod
    def create(cls, variant=None, **values):
        """Creates an architecture from some fields; a variant fills in the rest.

        Args:
            variant: string, a key of `VARIANTS` such as `"B/16"`, or None.
            **values: Fields; None means not given.

        Raises:
            InputError: As the class does, or if the variant is unknown or a field is missing.
        """
        given = {name: value for name, value in values.items() if value is not None}
        filled = variant_values(variant) | given
        if missing := [name for name in _REQUIRED if name not in filled]:
            raise InputError(f"missing: {', '.join(missing)}; a variant gives all but num_classes")
        return cls(**filled)

    @property
    def grid(self):
        """Shape of the patch grid: (rows, columns)."""
        (height, width), (rows, columns) = self.image_shape, self.patch_shape
        return height // rows, width // columns

    @property
    def patches(self):
        """Number of patches S: the sequence length."""
        return math.prod(self.grid)

    @property
    def parameters(self):
        """Number of parameters, including the head."""
        patches, dim = self.patches, self.dim
        tokens, channels = self.tokens_mlp_dim, self.channels_mlp_dim
        mixings = self.token_mixing * (2 * patches * tokens + tokens + patches + 2 * dim)
        mixings += self.channel_mixing * (2 * dim * channels + channels + 3 * dim)
        stem = (math.prod(self.patch_shape) * self.channels + 1) * dim
        return stem + self.depth * mixings + 2 * dim + (dim + 1) * self.num_classes

    @property
    def multiply_adds(self):
        """Multiply-adds of the matrix products for one image, forward; those of training are 3×."""
        mixings = (
            self.token_mixing * self.tokens_mlp_dim + self.channel_mixing * self.channels_mlp_dim
        )
        stem = math.prod(self.patch_shape) * self.channels
        tokens = self.patches * self.dim
        return tokens * (stem + 2 * self.depth * mixings) + self.dim * self.num_classes

    def replace(self, **changes):
        """Returns a copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_json(self):
        """Returns the fields as a dict of JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values):
        """Creates an architecture from the dict of `to_json`; missing fields get their defaults.

        Raises:
            InputError: As the class does, or if a field is unknown.
        """
        kind = Baseline if isinstance(values, dict) and "model" in values else cls
        return kind(**read_fields(kind, values))

    @staticmethod
    def of_model(model, **values):
        """Creates the architecture of a model, one of `variants.MODELS`, from all its fields."""
        return Architecture(**values) if model == MIXER else Baseline(model=model, **values)

    def _check_division(self):
        for side, image, patch in zip(
            ("height", "width"), self.image_shape, self.patch_shape, strict=True
        ):
            if image % patch:
                below = image // patch * patch
                nearest = " and ".join(str(n) for n in (below, below + patch) if n)
                raise InputError(
                    f"patch_shape={format_shape(self.patch_shape)} does not divide "
                    f"image_shape={format_shape(self.image_shape)}: the {side} {image} is no "
                    f"multiple of {patch}; the nearest that are: {nearest}"
                )

    def _check_products(self):
        widest = max(self.dim, self.channels_mlp_dim)
        counts = (
            math.prod(self.image_shape) * self.channels,
            max(self.patches * widest, self.tokens_mlp_dim * self.dim),
            self.parameters,
        )
        for (what, most), count in zip(_MOST_VALUES.items(), counts, strict=True):
            if count > most:
                raise InputError(
                    f"image_shape={format_shape(self.image_shape)}, patch_shape="
                    f"{format_shape(self.patch_shape)}, depth={self.depth}, dim={self.dim}: {what} "
                    f"would have {count:,} values, expected at most {most:,}; choose smaller sizes"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline(Architecture):
    """Hyperparameters of a baseline; see `baselines.build_baseline`.

    It has `depth` dense layers of `dim` units. The image is one patch, and the other fields of
    mixer layers have their defaults, whatever is given.

    Raises:
        InputError: As `Architecture`, or if the image is too small for the convolutions of a CNN.
    """

    model: str

    def __post_init__(self):
        neutral = {"patch_shape": self.image_shape, **dict.fromkeys(_WIDTHS), **DEFAULTS}
        for name in OF_MIXER_LAYERS:
            object.__setattr__(self, name, neutral[name])
        super().__post_init__()
        if self.model == "cnn" and min(self.image_shape) < 6:
            raise InputError(
                f"image_shape={format_shape(self.image_shape)}: expected at least 6 pixels a side, "
                f"for two convolutions of 3×3 and pooling"
            )

    @property
    def shapes(self):
        """Shape of every weight, by its path, in the model's order."""
        height, width = self.image_shape
        inputs, shapes = height * width * self.channels, {}
        if self.model == "cnn":
            inputs = (height - 4) // 2 * ((width - 4) // 2) * CNN_FILTERS[-1]
            for index, pair in enumerate(itertools.pairwise((self.channels, *CNN_FILTERS))):
                shapes[f"conv_{index}/kernel"] = (3, 3, *pair)
                shapes[f"conv_{index}/bias"] = pair[1:]
        widths = [inputs, *[self.dim] * self.depth, self.num_classes]
        names = [*(f"dense_{index}" for index in range(self.depth)), "head"]
        for name, pair in zip(names, itertools.pairwise(widths), strict=True):
            if pair[1]:
                shapes |= {f"{name}/kernel": pair, f"{name}/bias": pair[1:]}
        return shapes

    @property
    def parameters(self):
        """Number of parameters, including the head."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def multiply_adds(self):
        """Multiply-adds of matrix products and convolutions for one image, forward."""
        height, width = self.image_shape
        positions = {  # of each convolution; dense layers have one
            f"conv_{i}/kernel": (height - 2 * (i + 1)) * (width - 2 * (i + 1)) for i in (0, 1)
        }
        return sum(
            math.prod(shape) * positions.get(name, 1)
            for name, shape in self.shapes.items()
            if name.endswith("kernel")
        )


_WIDTHS = {"tokens_mlp_dim": lambda dim: max(1, dim // 2), "channels_mlp_dim": lambda dim: 4 * dim}
FIELDS = tuple(field.name for field in dataclasses.fields(Architecture))
DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(Architecture)
    if field.default not in (dataclasses.MISSING, None)
}
OF_MIXER_LAYERS = ("patch_shape", *_WIDTHS, "token_mixing", "channel_mixing")
_REQUIRED = [name for name in FIELDS if name not in DEFAULTS and name not in _WIDTHS]


def variant_values(variant):
    """Returns a dict of the `Architecture` fields that a variant sets; {} for None."""
    if variant is None:
        return {}
    if variant not in VARIANTS:
        raise InputError(
            f"Unknown variant. Expected one of {', '.join(VARIANTS)}. Received: {variant!r}"
        )
    row = VARIANTS[variant]
    values = {name: getattr(row, name) for name in row._fields if name in FIELDS}
    return {"image_shape": IMAGE_SHAPE, "patch_shape": (row.patch, row.patch), **values}


# === Model spec ===


_RANGE = "pixels 0 to 255 scaled to [-1, 1]"
_CHOICES = {"interpolation": INTERPOLATIONS, "permutation": PERMUTATIONS}


def drop_permutation(values):
    """Returns JSON values of an earlier version without the field `permutation`.

    Raises:
        InputError: If pixels were permuted.
    """
    if not isinstance(values, dict) or "permutation" not in values:
        return values
    if values["permutation"] != "none":
        raise InputError(
            "this model was trained on permuted pixels, which this version no longer supports"
        )
    return {name: value for name, value in values.items() if name != "permutation"}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How images are resized to the model's image shape; see `preprocessing.resize`.

    The pixels, from 0 to 255, are then scaled to [-1, 1] for every model, and permuted for those of
    the paper's study of inductive biases.

    Attributes:
        eval_crop: float. 0: the whole image is resized, ignoring its aspect ratio. From 0.1 to 1:
            share of each side kept by a center crop after resizing (timm's `crop_pct`).
        interpolation: string, one of `INTERPOLATIONS`; both are antialiased.
        permutation: string, one of `PERMUTATIONS`: the order of pixels.
    """

    eval_crop: float = 0.0
    interpolation: str = "bilinear"
    permutation: str = "none"

    def __post_init__(self):
        crop = self.eval_crop
        number = isinstance(crop, int | float) and not isinstance(crop, bool)
        if not number or not (crop == 0 or SMALLEST_CROP <= crop <= 1):
            raise InputError(
                f"eval_crop={crop!r:.60}: expected 0, or a number from {SMALLEST_CROP} to 1; every "
                f"image is enlarged by its inverse"
            )
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise InputError(f"{name}={value!r:.60}: expected one of {', '.join(choices)}")

    def __str__(self):
        return f"eval_crop {self.eval_crop:.4g}, {self.interpolation}, {_RANGE}{self._permuted}"

    @property
    def sentence(self):
        """Description in words."""
        crop, how = f"{self.eval_crop:.4g}", " whole, without its aspect ratio"
        if self.eval_crop:
            how = f", and the central {crop} of each side cropped"
        filtered = f"(eval_crop {crop}), {self.interpolation} and antialiased"
        return f"resized{how} {filtered}; {_RANGE}{self._permuted}"

    @property
    def _permuted(self):
        return "" if self.permutation == "none" else f", permuted: {self.permutation}"


def _is_text(value):
    """Tells whether a value is a string that UTF-8 can encode: without half a surrogate pair."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything about a model but its weights: enough to build it and to prepare its inputs.

    Attributes:
        architecture: `Architecture`.
        class_names: One name per class; None if unknown.
        preprocessing: `Preprocessing`.
        loss: One of `LOSSES`; also the function that turns logits into probabilities.
        provenance: How the weights were trained, and their scores; empty if it is not known.
    """

    architecture: Architecture
    class_names: tuple[str, ...] | None = None
    preprocessing: Preprocessing = Preprocessing()
    loss: str = "softmax"
    provenance: str = ""

    def __post_init__(self):
        names, count = self.class_names, self.architecture.num_classes
        if names is not None:
            listed = isinstance(names, tuple | list) and len(names) == count
            if not listed or not all(map(_is_text, names)):
                raise InputError(f"class_names: expected {count} names, received {names!r:.60}")
            object.__setattr__(self, "class_names", tuple(names))
        if self.loss not in LOSSES:
            raise InputError(
                f"loss: expected one of {', '.join(LOSSES)}, received {self.loss!r:.60}"
            )
        if not _is_text(self.provenance):
            raise InputError(f"provenance: expected text, received {self.provenance!r:.60}")

    @property
    def names(self):
        """Class names, or numbers if they are unknown."""
        return self.class_names or tuple(map(str, range(self.architecture.num_classes)))

    def replace(self, **changes):
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_json(self):
        """Returns the content of model.json as a dict of JSON values."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, values):
        """Creates a spec from the dict of `to_json`; missing fields get their defaults.

        Raises:
            InputError: If the format is another one, or a value is invalid.
        """
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else values
            raise InputError(
                f"expected model.json of format {FORMAT}, received {found!r:.60}; it was written "
                f"by another version of keras_mixer"
            )
        fields = read_fields(cls, {name: v for name, v in values.items() if name != "format"})
        fields["architecture"] = Architecture.from_json(fields["architecture"])
        fields["preprocessing"] = Preprocessing(
            **read_fields(Preprocessing, fields.get("preprocessing", {}))
        )
        return cls(**fields)
