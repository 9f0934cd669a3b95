"""Writes a copy of a dataset in which the pixels of every image are in another, fixed order.

    python tools/permute_images.py data/fashion_mnist data/fashion_global --order=global
    python tools/permute_images.py data/photos data/photos_patches --order=patches --patch_shape=16

The source holds IDX files, as MNIST's, or images in class folders; the copy has the same layout.
The orders are those of the study of inductive biases in the paper (Tolstikhin et al. 2021, section
3.4, https://arxiv.org/abs/2105.01601). A Mixer with patches of `--patch_shape` learns as well from
permuted patches, and permuted pixels within patches, as from the images themselves.
"""

import argparse
import gzip
import shutil
import struct
import sys
from pathlib import Path

import numpy as np

ORDERS = ("patches", "patches+pixels", "global")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")


def pixel_order(order, image_shape, patch_shape, seed):
    """Returns the indices of an image's pixels, in row-major order, in the order of the copy.

    Args:
        order: One of `ORDERS`. "patches": whole patches are permuted. "patches+pixels": the pixels
            of each patch are permuted as well, in the same way in all patches. "global": all
            pixels are permuted.
        image_shape: (height, width) of an image.
        patch_shape: (height, width) of a patch; not used by "global".
        seed: int, not negative.

    Raises:
        ValueError: If patches do not divide the image.
    """
    # NumPy guarantees that RandomState returns the same numbers in all its versions.
    generator = np.random.RandomState([seed, *order.encode()])
    (height, width), (rows, columns) = image_shape, patch_shape
    if order == "global":
        return generator.permutation(height * width)
    if height % rows or width % columns:
        raise ValueError(f"patches of {patch_shape} do not divide an image of {image_shape} pixels")
    grid = (height // rows, rows, width // columns, columns)
    patches = np.arange(height * width).reshape(grid).swapaxes(1, 2).reshape(-1, rows * columns)
    patches = generator.permutation(patches)
    if order == "patches+pixels":
        patches = patches[:, generator.permutation(rows * columns)]
    shape = (height // rows, width // columns, rows, columns)
    return patches.reshape(shape).swapaxes(1, 2).ravel()


def permute(images, order, patch_shape, seed):
    """Permutes the pixels of images `(batch, height, width, ...)`; channels stay together."""
    batch, height, width = images.shape[:3]
    indices = pixel_order(order, (height, width), patch_shape, seed)
    return images.reshape(batch, height * width, -1)[:, indices].reshape(images.shape)


def copy_idx(source, target, how):
    """Copies an IDX file, gzipped or not; permutes it if it holds images."""
    gzipped, content = source.suffix == ".gz", source.read_bytes()
    content = gzip.decompress(content) if gzipped else content
    if content[:4] == b"\0\0\x08\x03":  # unsigned bytes in three dimensions
        shape = struct.unpack(">3I", content[4:16])
        images = np.frombuffer(content, np.uint8, offset=16).reshape(shape)
        content = content[:16] + permute(images, *how).tobytes()
    target.write_bytes(gzip.compress(content, mtime=0) if gzipped else content)


def copy_image(source, target, how):
    """Copies an image as PNG, permuted."""
    from PIL import Image, ImageOps

    with Image.open(source) as image:
        upright = ImageOps.exif_transpose(image)
        pixels = np.asarray(upright if upright.mode == "L" else upright.convert("RGB"))
    suffix = "" if target.suffix.lower() == ".png" else ".png"
    Image.fromarray(permute(pixels[None], *how)[0]).save(f"{target}{suffix}", "PNG")


def copy(source, target, how):
    """Copies a dataset; files that are neither images nor IDX files are copied as they are."""
    for path in sorted(source.rglob("*")):
        copied = target / path.relative_to(source)
        if path.is_dir():
            continue
        copied.parent.mkdir(parents=True, exist_ok=True)
        if "-idx" in path.name:
            copy_idx(path, copied, how)
        elif path.suffix.lower() in SUFFIXES:
            copy_image(path, copied, how)
        else:
            shutil.copyfile(path, copied)


def main():
    """Copies a dataset as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of a dataset")
    parser.add_argument("target", type=Path, help="folder of the copy, which does not exist")
    parser.add_argument("--order", choices=ORDERS, required=True)
    parser.add_argument(
        "--patch_shape", type=int, nargs="+", default=[1], help="height and width of a patch"
    )
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    try:
        words.target.mkdir(parents=True)
        patch_shape = words.patch_shape[0], words.patch_shape[-1]
        copy(words.source, words.target, (words.order, patch_shape, words.seed))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
