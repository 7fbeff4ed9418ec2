"""Lists the gin files that come with famx, or shows the command and the cost of one.

    famx examples passkey_tiny
    famx examples

`famx train NAME` runs an example; parts are further gin files of a run.
"""

from absl import flags

from famx.base import gin_utils


def define_flags() -> None:
    flags.DEFINE_string("name", None, "Name of a gin file; it may also be given without the flag.")


def main() -> None:
    from famx.base.examples import example_table, example_text

    root = gin_utils.gin_root()
    name = flags.FLAGS["name"].value
    print(example_text(name, root, [str(root)]) if name else example_table(root))


if __name__ == "__main__":
    gin_utils.run(main, define_flags, gin_flags=False, argument="name")
