"""The command for pretrained weights: convert."""

import dataclasses

from keras_mixer.config.options import PIXELS, named_as_flags, option
from keras_mixer.errors import InputError
from keras_mixer.log import logger, printable
from keras_mixer.reports.experiments import provenance_of
from keras_mixer.weights.convert import convert_weights
from keras_mixer.weights.pretrained import summary


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """Flags of `convert`."""

    image_shape: tuple[int, int] | None = option(
        None,
        "height,width of the images that the weights are for, in pixels. Needed where a file has "
        "only the number of patches (.npz, timm's, .weights.h5) and their grid is not square, as "
        "in 2×8 patches, which would be taken for 4×4.",
        **PIXELS,
    )
    mean: tuple[float, ...] | None = option(
        None,
        "Mean that timm subtracts from images in [0, 1]: one number, or one for each channel "
        "(default: 0.5). Only for files of timm without the config.json of the Hugging Face hub "
        "beside them. --mean and --std are folded into the weights, which then take images in "
        "[-1, 1] like all others; such as 0 and 1 for timm's miil weights "
        "(mixer_b16_224.miil_in21k and its ImageNet-1k version).",
    )
    std: tuple[float, ...] | None = option(
        None, "Standard deviation that timm then divides by, likewise (default: 0.5)."
    )


def convert(options, arguments):
    """Converts weights to official .npz, timm's .safetensors or, without suffix, a model folder."""
    if len(arguments) != 2:
        raise InputError(f"expected SOURCE and TARGET, received {len(arguments)} arguments")
    with named_as_flags(type(options)):
        written = convert_weights(
            *arguments, options.image_shape, options.mean, options.std, provenance_of(arguments[0])
        )
    logger.info(f"{arguments[1]}: {summary(written)}")
    if written.spec.provenance:
        logger.info(printable(written.spec.provenance))
    print(printable(arguments[1]))
