"""Your conversations as a task: lists of messages, with the loss on the assistant's turns alone.

    from __gin__ import dynamic_registration
    include "gin_configs/runs/finetune.gin"
    MIXTURE_OR_TASK_NAME = "own_chat"
    TASK_FEATURE_LENGTHS = {"targets": 4096}
    STATE_PASSING = "continuous"
    TASK_OPTIONS = {"files": "/data/chats/*.jsonl"}

Give the model's gin file, INITIAL_CHECKPOINT_PATH, MODEL_DIR, BATCH_SIZE and TRAIN_STEPS on the command
line. A record is `{"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}`, with the
roles that the chat template knows, such as system and tool, and optionally `tools`, their descriptions.
The chat template of the vocabulary spells them; see `famx.data.vocabularies.chat_template`. With
`STATE_PASSING` "continuous" a conversation is read over as many rows as it needs, and no row holds two.
"""

import json
from collections.abc import Mapping
from typing import Any

from famx.base.ranges import Name, Paths, Seed, ShareBelowOne
from famx.base.values import checked
from famx.data.formats.own_records import OwnSplits
from famx.data.storage.paths import listed
from famx.data.tasks.examples import Example
from famx.data.tasks.text_task import TextTask
from famx.data.vocabularies import AnyVocabulary


@checked
def own_chat(
    files: Paths,
    messages: Name = "messages",
    tools: Name = "tools",
    validation_files: Paths | None = None,
    validation_fraction: ShareBelowOne = 0.05,
    seed: Seed = 0,
    name: Name = "own_chat",
    vocabulary: AnyVocabulary = "bytes",
    **options: Any,
) -> TextTask:
    """Make the task of your conversations.

    Args:
      files, validation_files, validation_fraction, seed: see `OwnSplits`.
      messages: name of the column with the messages, as a list or as JSON text.
      tools: name of the column with the descriptions of tools, as a list or as JSON text; it may be
        missing.
      name: name for messages.
      vocabulary: see `famx.data.vocabularies.as_vocabulary`; documents need one with a chat template.
      **options: other settings of the task, such as `max_tokens`.

    Raises:
      ConfigError: an option is out of range, or a package is missing.
      ValueError: no file matches, there is no record, a line is broken, the column of messages is
        missing, or the first conversation has no turn of the assistant.
    """
    splits = OwnSplits(files, validation_files, validation_fraction, seed)

    def preprocess(record: Mapping[str, Any]) -> Example:
        if messages not in record:
            raise ValueError(
                f"The records have no column '{messages}' of messages; their columns are "
                f"{listed(record)}. Give the name of the column."
            )
        example = {"inputs": "", "targets": "", "references": []}
        turns, functions = _list(record[messages], messages), _list(record.get(tools), tools)
        return {**example, "messages": turns, "tools": functions}

    first = splits.first()
    turns = preprocess(first)["messages"]
    roles = [turn.get("role") for turn in turns if isinstance(turn, Mapping)]
    if "assistant" not in roles:
        raise ValueError(
            "The first conversation has no turn of the role 'assistant', which is trained on; its roles "
            f"are {listed(dict.fromkeys(map(str, roles)))}. Write messages as "
            '{"role": ..., "content": ...}.'
        )
    # In JSON lines, only some records may have tools.
    columns = tuple(name for name in (messages, tools) if name in first) if splits.are_tables else None
    return splits.task(name, columns, preprocess, "chat", vocabulary, **options)


def _list(value: Any, column: str) -> list[Any]:
    """The list in a column, which may be written as JSON text; [] if it is missing."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            pass
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"Column '{column}' contains {str(value)[:50]!r}, which is not a list.")
    return value


TASKS = {"own_chat": own_chat}
