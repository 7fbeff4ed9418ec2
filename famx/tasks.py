"""Lists the tasks that a model can be trained and evaluated on, or the options of one.

    famx tasks passkey_words
    famx tasks xlsum

Tasks of your own appear with --import=my_module. docs/data.md says more about each.
"""

from absl import flags

from famx.base import gin_utils


def define_flags() -> None:
    flags.DEFINE_string("name", "", "Name of a task, or a part of names; may be given without the flag.")


def main() -> None:
    from famx.data.tools.listing import is_task, task_options, task_table

    name = flags.FLAGS["name"].value
    print(task_options(name) if is_task(name) else task_table(name))


if __name__ == "__main__":
    gin_utils.run(main, define_flags, gin_flags=False, argument="name")
