"""Runs one of the programs of famx: `famx train ...`, which is `python -m famx.train ...`."""

import importlib
import os
import runpy
import sys

COMMANDS = {
    "examples": "famx.examples",
    "tasks": "famx.tasks",
    "train": "famx.train",
    "ablate": "famx.ablate",
    "eval": "famx.eval",
    "lm-eval": "famx.lm_eval",
    "infer": "famx.infer",
    "chat": "famx.chat",
    "memory": "famx.memory",
    "verify": "famx.verify",
    "convert": "famx.convert",
    "average": "famx.average",
    "export": "famx.export",
    "attention-maps": "famx.attention_maps",
    "heatmap": "famx.heatmap",
    "cache": "famx.cache",
    "prepare": "famx.prepare",
    "inspect-data": "famx.inspect_data",
    "compile": "famx.compile",
    "profile": "famx.profile",
    "replay": "famx.replay",
    "doctor": "famx.doctor",
}


def main() -> None:
    """Runs the command that the first argument names; lists all commands if there is none."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        from famx.base import unread_output

        with unread_output.exits_quietly():
            print(usage())
        return
    name = sys.argv[1].replace("_", "-")
    if name not in COMMANDS:
        from famx.base.gin_checks import nearest

        hint = nearest(name, list(COMMANDS)) or " See famx --help."
        print(f"famx: error: There is no command {sys.argv[1]}.{hint}", file=sys.stderr)
        sys.exit(2)
    if os.getcwd() not in sys.path and not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: gin files may import modules from here
    sys.argv = [f"famx {name}", *sys.argv[2:]]
    runpy.run_module(COMMANDS[name], run_name="__main__")


def usage() -> str:
    """List of the commands, each with the first sentence and command of its module's docstring."""
    from famx.base.command_line import example

    lines = ["Usage: famx COMMAND [--FLAG=VALUE ...]", ""]
    for name, module in COMMANDS.items():
        doc = str(importlib.import_module(module).__doc__)
        lines += [f"  {name:<16}{doc.splitlines()[0]}", f"{'':18}{example(doc)}"]
    return "\n".join([*lines, "", "famx COMMAND --help lists the flags of a command."])


if __name__ == "__main__":
    main()
