"""Whether a model reads and predicts what a task has."""

from typing import Any

from famx.base.errors import ConfigError
from famx.base.features import features_of, values_of
from famx.models.decoder_model import DecoderModel


def check_features(task: Any, model: DecoderModel, name: str) -> None:
    """Raises ConfigError unless a model reads the features of a task, and predicts its values.

    Args:
      task: the opened task, or documents.
      model: the model.
      name: how the task is named in the sentence.
    """
    config = model.config
    read, given = features_of(config.frontend), features_of(task)
    text = lambda features: ", ".join(map(str, features)) or "tokens alone"
    if set(read) != set(given):
        raise ConfigError(
            f"{name} has {text(given)}, but the model reads {text(read)}: set DecoderConfig.frontend to"
            " what the task has, or choose another task."
        )
    wanted, predicted = values_of(task), 0 if config.values is None else config.values.width
    if wanted != predicted:
        has = f"{wanted} values to predict" if wanted else "no values to predict"
        raise ConfigError(
            f"{name} has {has} at each position, but the model predicts {predicted}: set"
            f" DecoderConfig.values to {f'@heads.Values() with width {wanted}' if wanted else None}."
        )


def check_reads_text(model: DecoderModel, what: str, alone: bool = False) -> None:
    """Raises ConfigError unless a model reads texts.

    Args:
      model: the model.
      what: what needs it, a plural, for the sentence.
      alone: whether the model must also read nothing else, and predict no values.
    """
    config = model.config
    reads = ", ".join(map(str, features_of(config.frontend)))
    if not config.frontend.reads_tokens:
        raise ConfigError(
            f"{what} need a model of text, but this one reads {reads}: read its sequences from Python,"
            " with famx.decoding.Streamer."
        )
    if alone and (reads or config.values is not None):
        more = f"reads {reads}" if reads else "predicts values"
        raise ConfigError(f"{what} need a model of text alone, but this one also {more}.")
