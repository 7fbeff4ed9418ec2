"""Flags of mains: declared per main, refused in one sentence, values read."""

import pytest
from absl import flags

from famx.base import command_line
from famx.base.errors import ConfigError
from famx.base.ranges import Path, Positive, Rate


def define():
    flags.DEFINE_string("famx_text", None, "A text.")
    command_line.define("famx_count", Positive, 3, "A number.")
    flags.DEFINE_bool("famx_fast", False, "A choice.")
    flags.DEFINE_enum("famx_kind", "a", ["a", "b"], "A kind.")
    flags.DEFINE_multi_string("famx_many", [], "Texts.")
    command_line.define("famx_rate", Rate, None, "A rate.")
    command_line.define("famx_place", Path, None, "A path.")
    command_line.define("famx_places", Path, [], "Paths.", several=True)


@pytest.fixture(autouse=True)
def declared():
    command_line.declare(define)
    yield
    command_line.declare()
    assert "famx_text" not in flags.FLAGS


def parse(*arguments):
    command_line.parse(["prog", *arguments], parse, "see --help.")
    return flags.FLAGS


def test_values_are_parsed_anew_by_each_main():
    assert parse("--famx_many=x", "--famx_many=y", "--famx_count=5").famx_many == ["x", "y"]
    command_line.declare(None, define)
    values = parse("--nofamx_fast", "--famx_many=z")
    assert values.famx_many == ["z"] and values.famx_count == 3 and values.famx_fast is False


@pytest.mark.parametrize("argument, sentence", [
    ("--famx_txt=x", "There is no flag --famx_txt. Did you mean --famx_text?"),
    ("--famx_count=x", "--famx_count must be a whole number of at least 1, not 'x'."),
    ("--famx_count=0", "--famx_count must be a whole number of at least 1, not 0."),
    ("--famx_count=2.0", "--famx_count must be a whole number of at least 1, not 2.0."),
    ("--famx_count=", "--famx_count must be a whole number of at least 1, not ''."),
    ("--famx_rate=nan", "--famx_rate must be a number above 0, not nan."),
    ("--famx_rate=fast", "--famx_rate must be a number above 0, not 'fast'."),
    ("--famx_place=", "--famx_place is an empty text: give a path, such as '/some/path'."),
    ("--famx_places=gs://a/b", "--famx_places is the URL gs://a/b, and famx reads and writes files of"
     " mounted file systems only: mount what gs:// names, and give the path of the mount."),
    ("--famx_fast=maybe", "--famx_fast must be true or false, not maybe."),
    ("--famx_kind=c", "--famx_kind must be one of a, b, not c."),
    ("--famx_text", "Missing value for flag --famx_text."),
    ("--nofamx_fast=1", "--nofamx_fast=1 does not take an argument."),
    ("stray", "Unknown argument stray: see --help."),
])  # fmt: skip
def test_a_bad_argument_is_one_sentence(argument, sentence):
    with pytest.raises(ConfigError) as caught:
        parse(argument)
    assert str(caught.value) == sentence


def test_numbers_and_paths_are_read_by_their_annotations(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    values = parse("--famx_count=7", "--famx_rate=2", "--famx_place=~/a", "--famx_places=b",
                   "--famx_places=~/5")  # fmt: skip
    assert (values.famx_count, values.famx_rate, values.famx_place) == (7, 2, "/home/me/a")
    assert values.famx_places == ["b", "/home/me/5"]
    assert parse("--famx_place=7").famx_place == "7"


def test_help_shows_flags_choices_and_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--famx_count=2", "--help")
    out = capsys.readouterr().out
    assert not caught.value.code
    assert "  --famx_count\n      A number. Default: 3.\n" in out
    assert "  --famx_kind=<a|b>\n      A kind. Default: a.\n" in out
    assert "  --[no]famx_fast\n      A choice. Default: false.\n" in out
    assert "  --famx_many\n      Texts. Repeatable.\n" in out
    with pytest.raises(SystemExit):
        parse("--helpfull")
    assert "--verbosity" in capsys.readouterr().out


def test_required_flags():
    parse()
    sentences = {"famx_count": "no count", "famx_text": "no text"}
    with pytest.raises(ConfigError, match="no text"):
        command_line.require(sentences)
    parse("--famx_text=x")
    command_line.require(sentences)


def test_lists_of_integers():
    assert command_line.integers(None, "blocks") is None
    assert command_line.integers(["0", "-1"], "blocks") == [0, -1]
    with pytest.raises(ConfigError, match="--blocks=0,x cannot be read: write numbers with commas"):
        command_line.integers(["0", "x"], "blocks")


def test_json_objects():
    assert command_line.json_object("", "options") == {}
    assert command_line.json_object('{"a": 1}', "options") == {"a": 1}
    with pytest.raises(ConfigError, match="--options must be a JSON object"):
        command_line.json_object("[]", "options")
