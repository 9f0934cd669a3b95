"""Hyperparameters of a model (`Architecture`), and the content of its model.json (`ModelSpec`).

Shapes of tokens are given as `(batch, patches, channels)`.
"""

import dataclasses
import itertools
import math
import operator
import re

from keras_mixer.errors import InputError
from keras_mixer.model.variants import ACTIVATIONS, IMAGE_SHAPE, MIXER, MODELS, VARIANTS

LOSSES = ("softmax", "sigmoid")
INTERPOLATIONS = ("bilinear", "bicubic")
CNN_FILTERS = (32, 64)  # of the convolutions of a CNN baseline
FORMAT = 2  # version of model.json; a new field with a default needs no new version
SMALLEST_CROP = 0.1

# Sizes beyond these numbers of values do not fit the memory of any machine.
_MOST_VALUES = {"an image": 1 << 26, "a layer's activations": 1 << 30, "the weights": 1 << 35}


# === Checks of one field: a function of its value that returns it converted ===


def _integer(low=1, high=1 << 20):
    def check(value):
        if isinstance(value, bool) or not hasattr(value, "__index__") or not low <= value <= high:
            raise ValueError(f"an integer from {low} to {high}")
        return operator.index(value)

    return check


def _height_and_width(value):
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError("two positive integers, height and width")
    return tuple(map(_integer(), value))


def _boolean(value):
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _one_of(names):
    def check(value):
        if value not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return value

    return check


def _field(check, **options):
    return dataclasses.field(metadata={"check": check}, **options)


# === Architecture ===


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """Hyperparameters of a Mixer, complete and validated; see `build_mixer` for each of them.

    Raises:
        InputError: If a value has a wrong type or is out of range, if patches do not divide the
            image, or if the sizes together need more memory than any machine has.
    """

    image_shape: tuple[int, int] = _field(_height_and_width)
    patch_shape: tuple[int, int] = _field(_height_and_width)
    channels: int = _field(_integer(), default=3)
    depth: int = _field(_integer(high=1000))
    dim: int = _field(_integer())
    tokens_mlp_dim: int = _field(_integer(), default=None)  # half of dim
    channels_mlp_dim: int = _field(_integer(), default=None)  # 4 * dim
    num_classes: int = _field(_integer(low=0))
    activation: str = _field(_one_of(ACTIVATIONS), default="gelu")
    token_mixing: bool = _field(_boolean, default=True)
    channel_mixing: bool = _field(_boolean, default=True)

    model = MIXER  # a constant, not a field: only a `Baseline` has another model

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.name in _WIDTHS:
                value = _WIDTHS[field.name](self.dim)
            try:
                object.__setattr__(self, field.name, field.metadata["check"](value))
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"{field.name}: expected {error}, received {value!r:.60}"
                ) from error
        self._check_division()
        self._check_memory()

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
        values = variant_values(variant) | given
        if missing := [name for name in _REQUIRED if name not in values]:
            raise InputError(f"missing: {', '.join(missing)}; a variant gives all but num_classes")
        return cls(**values)

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
    def shapes(self):
        """Dict from variable path to shape of every weight, in the model's order."""
        dim, mixings = self.dim, []
        if self.token_mixing:
            mixings += [("layer_norm_0", "token_mixing", self.patches, self.tokens_mlp_dim)]
        if self.channel_mixing:
            mixings += [("layer_norm_1", "channel_mixing", dim, self.channels_mlp_dim)]
        shapes = {"stem/kernel": (*self.patch_shape, self.channels, dim), "stem/bias": (dim,)}
        for block in [f"mixer_block_{index}" for index in range(self.depth)]:
            for norm, mixing, features, hidden in mixings:
                shapes |= {f"{block}/{norm}/gamma": (dim,), f"{block}/{norm}/beta": (dim,)}
                shapes |= _dense_shapes(f"{block}/{mixing}/dense_0", features, hidden)
                shapes |= _dense_shapes(f"{block}/{mixing}/dense_1", hidden, features)
        shapes |= {"pre_head_layer_norm/gamma": (dim,), "pre_head_layer_norm/beta": (dim,)}
        return shapes | _dense_shapes("head", dim, self.num_classes)

    @property
    def parameters(self):
        """Number of parameters, including the head."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def multiply_adds(self):
        """Multiply-adds of matrix products and convolutions for one image, forward.

        Training takes 3 times as many.
        """
        return sum(
            math.prod(shape) * self._applications(name)
            for name, shape in self.shapes.items()
            if name.endswith("kernel")
        )

    def _applications(self, kernel):
        """Returns how many times a kernel is applied to one image."""
        if "token_mixing" in kernel:
            return self.dim
        return 1 if kernel.startswith("head") else self.patches

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
        return kind(**_read_fields(kind, values))

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

    def _check_memory(self):
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

    It has `depth` dense layers of `dim` units. The fields in `MIXER_FIELDS` mean nothing to it and
    are set to constants, whatever is given.

    Raises:
        InputError: As `Architecture`, or if the image is too small for the convolutions of a CNN.
    """

    model: str = _field(_one_of(MODELS[1:]))

    def __post_init__(self):
        constants = {**dict.fromkeys(_WIDTHS), **DEFAULTS, "patch_shape": self.image_shape}
        for name in MIXER_FIELDS:
            object.__setattr__(self, name, constants[name])
        super().__post_init__()
        if self.model == "cnn" and min(self.image_shape) < 6:
            raise InputError(
                f"image_shape={format_shape(self.image_shape)}: expected at least 6 pixels a side, "
                f"for two convolutions of 3×3 and pooling"
            )

    @property
    def shapes(self):
        """Dict from variable path to shape of every weight, in the model's order."""
        height, width = self.image_shape
        inputs, shapes = height * width * self.channels, {}
        if self.model == "cnn":
            inputs = (height - 4) // 2 * ((width - 4) // 2) * CNN_FILTERS[-1]
            for index, pair in enumerate(itertools.pairwise((self.channels, *CNN_FILTERS))):
                shapes |= {f"conv_{index}/kernel": (3, 3, *pair), f"conv_{index}/bias": pair[1:]}
        for index in range(self.depth):
            shapes |= _dense_shapes(f"dense_{index}", inputs, self.dim)
            inputs = self.dim
        return shapes | _dense_shapes("head", inputs, self.num_classes)

    def _applications(self, kernel):
        if not kernel.startswith("conv_"):
            return 1
        border = 2 * (int(kernel[5]) + 1)
        return (self.image_shape[0] - border) * (self.image_shape[1] - border)


def _dense_shapes(name, features, units):
    """Returns the shapes of a dense layer's weights; {} without units, as of a missing head."""
    return {f"{name}/kernel": (features, units), f"{name}/bias": (units,)} if units else {}


_WIDTHS = {"tokens_mlp_dim": lambda dim: max(1, dim // 2), "channels_mlp_dim": lambda dim: 4 * dim}
FIELDS = tuple(field.name for field in dataclasses.fields(Architecture))
DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(Architecture)
    if field.default not in (dataclasses.MISSING, None)
}
MIXER_FIELDS = ("patch_shape", *_WIDTHS, "token_mixing", "channel_mixing")
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


def format_shape(shape):
    """Returns a shape as text, as in flags."""
    return ",".join(map(str, shape))


def _read_fields(kind, values):
    """Returns the keyword arguments of a dataclass from a JSON dict of its fields."""
    names = [field.name for field in dataclasses.fields(kind)]
    if not isinstance(values, dict) or not values.keys() <= set(names):
        given = ", ".join(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise InputError(f"expected the fields {', '.join(names)}, received {given:.200}")
    required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise InputError(f"expected the fields {', '.join(names)}, missing: {', '.join(missing)}")
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}


# === Model spec ===


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

    The pixels, from 0 to 255, are then scaled to [-1, 1] for every model.

    Attributes:
        eval_crop: float. 0: the whole image is resized, ignoring its aspect ratio. From 0.1 to 1:
            fraction of each side kept by a center crop after resizing (timm's `crop_pct`).
        interpolation: string, one of `INTERPOLATIONS`; both are antialiased.
    """

    eval_crop: float = 0.0
    interpolation: str = "bilinear"

    def __post_init__(self):
        crop = self.eval_crop
        number = isinstance(crop, int | float) and not isinstance(crop, bool)
        if not number or not (crop == 0 or SMALLEST_CROP <= crop <= 1):
            raise InputError(
                f"eval_crop={crop!r:.60}: expected 0, or a number from {SMALLEST_CROP} to 1; every "
                f"image is enlarged by its inverse"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(
                f"interpolation={self.interpolation!r:.60}: expected one of "
                f"{', '.join(INTERPOLATIONS)}"
            )

    def __str__(self):
        resizing = f"eval_crop {self.eval_crop:.4g}, {self.interpolation}"
        return f"{resizing}, pixels 0 to 255 scaled to [-1, 1]"


def _is_text(value):
    """Returns whether a value is a string that UTF-8 can encode: without lone surrogates."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything about a model except its weights: how to build it and to preprocess its images.

    Attributes:
        architecture: `Architecture`.
        class_names: One name per class; None if unknown.
        preprocessing: `Preprocessing`.
        loss: One of `LOSSES`; also the function that turns logits into probabilities.
        provenance: How the weights were trained, and their scores; empty if unknown.
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
        fields = _read_fields(cls, {name: v for name, v in values.items() if name != "format"})
        preprocessing = drop_permutation(fields.get("preprocessing", {}))
        fields["architecture"] = Architecture.from_json(fields["architecture"])
        fields["preprocessing"] = Preprocessing(**_read_fields(Preprocessing, preprocessing))
        return cls(**fields)
