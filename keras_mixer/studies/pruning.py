"""Reports the epochs of a run to its trial in an Optuna study, which may stop it."""

from pathlib import Path

from keras_mixer.backend import quiet_tensorflow
from keras_mixer.log import logger
from keras_mixer.runs.run import HISTORY, read_history


def pruning_of(trial, directory):
    """Returns a callback that reports validation accuracy to a trial, and stops it if told to.

    Epochs that the run has behind it are reported, too, by `report_history`: they count for whether
    this setting is stopped, and for the medians of others.

    Args:
        trial: `optuna.Trial`.
        directory: Path of the run directory.
    """
    with quiet_tensorflow():
        import keras
    from optuna import TrialPruned

    class Pruning(keras.callbacks.Callback):
        reported = -1

        def report_history(self):
            history = Path(directory) / HISTORY
            for row in read_history(directory) if history.exists() else []:
                self.report(int(row["epoch"]) - 1, row["val_accuracy"])

        def report(self, epoch, accuracy):
            if epoch > self.reported:
                trial.report(float(accuracy), epoch)
                self.reported = epoch

        def on_train_begin(self, logs=None):
            self.report_history()

        def on_epoch_end(self, epoch, logs=None):
            if "val_accuracy" not in (logs or {}):  # stopped within the epoch
                return
            self.report(epoch, logs["val_accuracy"])
            if trial.should_prune():
                logger.info(f"stopped after epoch {epoch + 1}: below the median of others there")
                raise TrialPruned

    return Pruning()
