"""Model variants of the paper's Table 1, and the names of models and activations.

Source: Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision", arXiv 2105.01601. The
paper rounds parameter counts to millions; these are exact.
"""

from typing import NamedTuple


class Variant(NamedTuple):
    """One column of Table 1.

    Attributes:
        depth: Number of mixer layers.
        dim: Channels C of every token.
        patch: Side of a square patch, in pixels.
        tokens_mlp_dim: Hidden width D_S of token mixing.
        channels_mlp_dim: Hidden width D_C of channel mixing.
        params_headless: Number of parameters without the head, for RGB images of 224×224.
        params_1000: Number of parameters with a head of 1000 classes, for the same images.
    """

    depth: int
    dim: int
    patch: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    params_headless: int
    params_1000: int


IMAGE_SHAPE = (224, 224)  # of Table 1

VARIANTS = {
    "S/32": Variant(8, 512, 32, 256, 2048, 18_591_624, 19_104_624),
    "S/16": Variant(8, 512, 16, 256, 2048, 18_015_264, 18_528_264),
    "B/32": Variant(12, 768, 32, 384, 3072, 59_524_428, 60_293_428),
    "B/16": Variant(12, 768, 16, 384, 3072, 59_111_472, 59_880_472),
    "L/32": Variant(24, 1024, 32, 512, 4096, 205_914_264, 206_939_264),
    "L/16": Variant(24, 1024, 16, 512, 4096, 207_171_168, 208_196_168),
    "H/14": Variant(32, 1280, 14, 640, 5120, 431_069_952, 432_350_952),
}

# "gelu" is the tanh approximation of the official code; "gelu_erf" is the exact one that timm uses.
ACTIVATIONS = ("gelu", "gelu_erf", "relu", "silu", "tanh")

MIXER = "mixer"
MODELS = (MIXER, "mlp", "cnn")  # the others are baselines
