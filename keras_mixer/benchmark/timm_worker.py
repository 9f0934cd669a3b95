"""Process of a benchmark of timm's Mixer, with the protocol of worker.py.

A script for a Python with torch and timm: it imports nothing of this package, so what both workers
share is here. Its first line of input has the `measure`, the sizes of the model, `batch_size`,
`precision`, `optimizer`, `momentum`, `lr` and whether the model is `compiled`; for `fit`, also
`train_images` and `crop_padding`.
"""

import itertools
import json
import os
import re
import resource
import sys
import time

_WARM_UP = 0.3  # seconds


def import_timm():
    """Imports timm's `MlpMixer`, also where torchvision's binary does not fit torch's.

    timm imports torchvision, which fails at the first operator that its binary lacks. Each of these
    is defined here without an implementation; the model does not use them.
    """
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    while True:
        try:
            import torchvision  # noqa: F401
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if not missing:
                raise
            library.define(missing[1] + "(Tensor a) -> Tensor")
            for name in [name for name in sys.modules if name.startswith("torchvision")]:
                del sys.modules[name]
        else:
            break
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer


def build(options, device):
    """Builds timm's model, as it is shipped: with the exact GELU."""
    model = import_timm()(
        num_classes=options["num_classes"],
        img_size=tuple(options["image_shape"]),
        in_chans=options["channels"],
        patch_size=tuple(options["patch_shape"]),
        num_blocks=options["depth"],
        embed_dim=options["dim"],
        mlp_ratio=tuple(
            options[name] / options["dim"] for name in ("tokens_mlp_dim", "channels_mlp_dim")
        ),
    )
    return model.to(device)


def calls(options, device):
    """Returns (call, wait, images per call) for what is measured."""
    import torch

    model = build(options, device)
    size = 1 if options["measure"] == "latency" else options["batch_size"]
    images = torch.randn(size, options["channels"], *options["image_shape"], device=device)
    labels = torch.arange(size, device=device) % options["num_classes"]
    types = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
    kind = types[options["precision"]]
    cast = torch.autocast(device, kind, enabled=kind is not None)
    forward = torch.compile(model) if options["compiled"] else model
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    kinds = {
        "sgd": lambda p: torch.optim.SGD(p, options["lr"], options["momentum"]),
        "adamw": lambda p: torch.optim.AdamW(p, options["lr"]),
    }
    if options["measure"] in ("inference", "latency"):
        model.eval()
        host = images.cpu()  # results are fetched, and images sent, as with predict_on_batch

        def infer():
            with torch.inference_mode(), cast:
                forward(host.to(device)).float().cpu()

        return infer, wait, size

    optimizer = kinds[options["optimizer"]](model.parameters())
    loss = torch.nn.CrossEntropyLoss()
    batches = {
        "training": lambda: itertools.repeat((images, labels)),
        "fit": lambda: cropped_batches(options, device),
    }[options["measure"]]()

    def step():
        images, labels = next(batches)
        with cast:
            value = loss(forward(images), labels)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()

    return step, wait, size


def cropped_batches(options, device):
    """Yields batches of images in memory, in random order, each cropped at random after padding."""
    import torch

    (height, width), size = options["image_shape"], options["batch_size"]
    count, pad, channels = options["train_images"], options["crop_padding"], options["channels"]
    images = torch.randn(count, channels, height, width, device=device)
    labels = torch.arange(count, device=device) % options["num_classes"]
    image, channel, row, column = torch.meshgrid(
        *(torch.arange(n, device=device) for n in (size, channels, height, width)), indexing="ij"
    )
    while True:
        order = torch.randperm(count, device=device)
        for chosen in order[: count // size * size].split(size):
            padded = torch.nn.functional.pad(images[chosen], 4 * [pad])
            top, left = torch.randint(2 * pad + 1, (2, size, 1, 1, 1), device=device)
            yield padded[image, channel, row + top, column + left], labels[chosen]


# === Shared by both workers ===


def answer_lines(lines, answer, call, wait, images, memory):
    """Calls once and answers with its time, then measures for the seconds of every line.

    Args:
        lines: Iterable of numbers as strings.
        answer: Function that takes a dict of JSON values.
        call: Function to measure.
        wait: Function that returns once all calls are done.
        images: int. Images per call.
        memory: Function that returns the peak of memory in bytes.
    """
    started = time.perf_counter()
    call()
    wait()
    answer({"first_call": time.perf_counter() - started, "images": images})
    for line in lines:
        repeat(call, wait, _WARM_UP)  # also empties buffers that were filled in between
        start, worked = time.perf_counter(), time.process_time()
        count = repeat(call, wait, float(line))
        passed = time.perf_counter() - start
        cores = (time.process_time() - worked) / passed
        rate = count * images / passed
        answer({"images_per_second": rate, "cores": cores, "memory": memory()})


def repeat(call, wait, seconds):
    """Calls for some seconds, at least once; returns how often."""
    count, end = 0, time.perf_counter() + seconds
    while not count or time.perf_counter() < end:
        call()
        count += 1
    wait()
    return count


def process_memory():
    """Returns the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def take_standard_output():
    """Returns a function that prints JSON to standard output; all else goes to standard error."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return lambda values: print(json.dumps(values), file=output, flush=True)


def main():
    """Answers lines of standard input until it is closed."""
    answer = take_standard_output()
    import torch

    options = json.loads(sys.stdin.readline())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    memory = torch.cuda.max_memory_allocated if device == "cuda" else process_memory
    answer_lines(sys.stdin, answer, *calls(options, device), memory)


if __name__ == "__main__":
    main()
