"""Measures one thing of a model in a process of its own, as `benchmark` asks for it line by line.

Started as `python -m keras_mixer.benchmark.worker MEASURE`, it reads lines of standard
input. The first is a JSON object, the fields of a `Config`. Once what is measured has run once, it
answers with a JSON line of `first_call` in seconds and `images` per call. Every further line is a
number of seconds to measure for, answered by a JSON line of `images_per_second`, `cores` (processor
time by wall time) and `memory`, the peak so far in bytes.
"""

import json
import os
import sys
import tempfile
import threading

import numpy as np

from keras_mixer.benchmark.timm_worker import answer_lines, process_memory, take_standard_output
from keras_mixer.config.training import Config
from keras_mixer.log import progress_bar
from keras_mixer.runs.open_run import plan_run
from keras_mixer.runs.run import Run

_PRODUCT = 2048  # rows and columns of the matrices whose product is the peak


def main(measure, lines, answer):
    """Measures until there are no more lines.

    Args:
        measure: string, a key of `MEASURES`.
        lines: Iterable of lines, see above.
        answer: Function that takes a dict of JSON values.
    """
    lines = iter(lines)
    values = json.loads(next(lines))
    channels = values.pop("channels", None)
    run = plan_run(Config(**values))
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    answer_lines(lines, answer, *MEASURES[measure](_with_channels(run, channels)), _memory)


def _with_channels(run, channels):
    if channels is None:
        return run
    architecture = run.spec.architecture.replace(channels=channels)
    spec = run.spec.replace(architecture=architecture)
    return Run(run.directory, run.config, spec, run.dataset)


def _memory():
    """Returns the peak of memory in bytes: of the first GPU, or else of this process."""
    import tensorflow as tf

    if tf.config.list_physical_devices("GPU"):
        return tf.config.experimental.get_memory_info("GPU:0")["peak"]
    return process_memory()


def _random_images(run, count):
    sizes = run.spec.architecture
    shape = (count, *sizes.image_shape, sizes.channels)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def random_batch(run, count):
    """Returns random images and one-hot labels of a run's shapes, float32 arrays."""
    classes = run.spec.architecture.num_classes
    return _random_images(run, count), np.eye(classes, dtype=np.float32)[np.arange(count) % classes]


# === What is measured: functions of a run to (call, wait, images per call) ===


def _training(run):
    """Steps on one batch of random images: forward, backward, optimizer."""
    import keras
    import tensorflow as tf

    from keras_mixer.compute.plan import resolve_plan
    from keras_mixer.training.compile import compile_model

    size = run.config.batch_size
    images, labels = random_batch(run, size)
    if keras.backend.backend() != "tensorflow":
        return _training_by_keras(run, images, labels)
    plan = resolve_plan(run.config)
    plan.set_threads()
    model, _ = compile_model(run, plan, run.config.lr)
    batches = tf.data.Dataset.from_tensors((images, labels)).repeat()
    batches, logs = iter(batches.prefetch(2)), {}
    model.make_train_function()
    return (lambda: logs.update(model.train_function(batches)), lambda: float(logs["loss"]), size)


def _training_by_keras(run, images, labels):
    """The same on another backend of Keras, by its own trainer, compiled."""
    from keras_mixer.compute.plan import POLICIES
    from keras_mixer.model.baselines import build_model
    from keras_mixer.training.losses import KERAS_LOSSES
    from keras_mixer.training.optimizers import build_optimizer

    config = run.config
    model = build_model(run.spec.architecture, dtype=POLICIES[config.precision])
    weights = model.trainable_variables
    options = {"momentum": config.momentum, "decay": config.decay, "clip_norm": config.clip_norm}
    optimizer = build_optimizer(config.optimizer, config.lr, weights, **options)
    model.compile(optimizer, KERAS_LOSSES[config.loss](), jit_compile=True)
    return lambda: model.train_on_batch(images, labels), lambda: None, len(images)


def _inference(run, size=None):
    """Logits of one batch of random images, in NumPy, as evaluation and prediction compute them."""
    from keras_mixer.compute.fast_mixing import fast_inference, use_threads_for
    from keras_mixer.compute.plan import POLICIES
    from keras_mixer.model.baselines import build_model

    size = size or run.config.batch_size
    use_threads_for(size)
    policy = POLICIES[run.config.precision]
    model = fast_inference(build_model(run.spec.architecture, dtype=policy), size)
    images = _random_images(run, size)
    return lambda: model.predict_on_batch(images), lambda: None, size


def _exported(run):
    """The SavedModel, called with one batch of uint8 images of the model's shape; in float32."""
    import tensorflow as tf

    from keras_mixer.inference.export.saved_model import build_archive
    from keras_mixer.model.baselines import build_model

    model = build_model(run.spec.architecture, dtype="float32")
    model.spec = run.spec
    with tempfile.TemporaryDirectory() as folder:
        build_archive(model).write_out(folder, verbose=False)
        serve = tf.saved_model.load(folder).signatures["serving_default"]
    images = _random_images(run, run.config.batch_size)
    images = tf.constant(np.clip(images * 64 + 128, 0, 255).astype(np.uint8))
    return lambda: serve(images=images)["logits"].numpy(), lambda: None, len(images)


def _input(run):
    """The input pipeline alone, with all augmentation."""
    from keras_mixer.compute.plan import resolve_plan
    from keras_mixer.training.batches import batches_of, training_images

    resolve_plan(run.config).set_threads()
    batches = iter(batches_of(run, training_images(run)))
    return lambda: next(batches), lambda: None, run.config.batch_size


def _fit(run):
    """`model.fit` on the input pipeline, with the callbacks of a run but validation and saving."""
    from keras_mixer.compute.plan import resolve_plan
    from keras_mixer.runs.resume import Progress
    from keras_mixer.training.batches import batches_of, training_images
    from keras_mixer.training.callbacks import Clock, ProgressBar
    from keras_mixer.training.compile import compile_model

    plan = resolve_plan(run.config)
    plan.set_threads()
    model, _ = compile_model(run, plan, run.config.lr)
    batches, progress = batches_of(run, training_images(run)), Progress()
    gate = _gate()

    def fit():
        with progress_bar() as bar:
            callbacks = [gate, Clock(progress), ProgressBar(run, progress, bar)]
            model.fit(batches, steps_per_epoch=10**9, callbacks=callbacks, verbose=0)

    threading.Thread(target=fit, daemon=True).start()
    return gate.let_one_pass, lambda: None, run.config.batch_size


def _gate():
    """Returns a callback that holds `model.fit` after every step until it may go on."""
    import keras

    class Gate(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.asked, self.done = threading.Semaphore(0), threading.Semaphore(0)

        def on_train_batch_begin(self, batch, logs=None):
            self.asked.acquire()

        def on_train_batch_end(self, batch, logs=None):
            self.done.release()

        def let_one_pass(self):
            self.asked.release()
            self.done.acquire()

    return Gate()


def _products(run):
    """Products of two large matrices, in the precision of the run: the peak. Counts in FLOPs."""
    import tensorflow as tf

    matrix = tf.cast(tf.random.normal((_PRODUCT, _PRODUCT)), run.config.precision)
    results = [matrix]
    product = tf.function(lambda x: tf.matmul(matrix, x))
    return (
        lambda: results.__setitem__(0, product(matrix)),
        lambda: float(tf.cast(results[0][0, 0], tf.float32)),
        2 * _PRODUCT**3,
    )


MEASURES = {
    "training": _training,
    "inference": _inference,
    "latency": lambda run: _inference(run, 1),
    "exported": _exported,
    "input": _input,
    "fit": _fit,
    "products": _products,
}


if __name__ == "__main__":
    main(sys.argv[1], sys.stdin, take_standard_output())
