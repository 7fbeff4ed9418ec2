"""Holds a conversation with a trained model, from an empty state or from a memory file.

    famx chat --checkpoint /tmp/famx/model --memory book.famem
    echo "What is the pass key? The pass key is" | famx chat --checkpoint /tmp/famx/model

Each line of standard input is a message; /help lists the commands. Answers go to standard output, errors
to standard error; a script with a line that failed ends with exit code 1. An instruct model reads
messages in its own chat template, if it was imported with one.
"""

import sys

from absl import flags

from famx.base import gin_utils
from famx.base.command_line import define
from famx.base.ranges import Amount, Directory, Path, Positive, PositiveShare, Seed


def define_flags() -> None:
    define("checkpoint", Directory, None, "Model to talk to: MODEL_DIR or MODEL_DIR/checkpoint_<step>.")
    define("adapter", Directory, None, "Saved LoRA adapter to apply, or the name of one of famx's own.")
    define("memory", Path, None, "Memory file whose state the conversation starts from.")
    flags.DEFINE_bool("fresh", False, "Answer each message from the same state and keep neither.")
    define("temperature", Amount, 0.0, "Sampling temperature; 0 always takes the likeliest token.")
    define("top_k", Positive, None, "Number of likeliest tokens to sample from; all by default.")
    define("top_p", PositiveShare, 1.0, "Total probability of the likeliest tokens to sample from.")
    define("max_new_tokens", Positive, 256, "Maximum number of tokens of an answer.")
    define("seed", Seed, 0, "Random seed for sampling.")
    flags.DEFINE_string(
        "template", None,
        r"Text read for each message, with {message} in it and \n for a line end; by default the chat"
        " template of the model, or {message} alone if it has none.",
    )  # fmt: skip
    flags.DEFINE_string("system", None, "System message, for models with a chat template.")
    flags.DEFINE_multi_string("stop", [], r"Text that ends an answer; \n is a line end.")


def main() -> None:
    from famx.inference.terminal import chat

    names = (
        "checkpoint", "adapter", "memory", "fresh", "max_new_tokens", "temperature", "top_k", "top_p",
        "seed", "template", "system", "stop",
    )  # fmt: skip
    answered = chat(**{name: flags.FLAGS[name].value for name in names})
    if not answered:
        sys.exit(1)


if __name__ == "__main__":
    gin_utils.run(main, define_flags, gin_flags=False)
