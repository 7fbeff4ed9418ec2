"""A table of bad inputs: what a user gets wrong, or a file that is not what it should be.

Each row is a command, what its sentence must say, and what makes the files that it needs. In a command,
{here} is the folder of the case, which is also the working directory, and the other names in braces are
files that all cases share; see `Files`. A case that needs files of its own makes them in {here}.
"""

import dataclasses
import json
import pathlib
import shlex
import shutil
import struct
from collections.abc import Callable, Mapping

import numpy as np
from chat_templates import CHATML, make_vocabulary
from lora.trees import adapters_of
from published import train_bpe, write_source
from tiny import make_model, make_params
from trained import write_model_dir

from famx.data import ByteVocabulary
from famx.decoding import Streamer
from famx.lora import Lora, combine, save_adapter
from famx.model_dir.loading import TrainedModel
from famx.model_dir.memory_file import save_memory

Make = Callable[[pathlib.Path, "Files"], object]


@dataclasses.dataclass(frozen=True)
class Files:
    """What the cases share; nothing may change them.

    Attributes:
      model: MODEL_DIR of a tiny model of bytes with one checkpoint.
      other: MODEL_DIR of another such model.
      talking: MODEL_DIR of a model with a chat template.
      memory: memory file of `model`.
      adapter: LoRA adapter of `model`.
      hf: directory of Hugging Face with a tiny Llama and its tokenizer.
      text: a text file.
      prompts: JSON lines for `famx infer`.
    """

    model: pathlib.Path
    other: pathlib.Path
    talking: pathlib.Path
    memory: pathlib.Path
    adapter: pathlib.Path
    hf: pathlib.Path
    text: pathlib.Path
    prompts: pathlib.Path

    @classmethod
    def make(cls, folder: pathlib.Path) -> "Files":
        paths = {field.name: folder / field.name for field in dataclasses.fields(cls)}
        files = cls(**paths)
        vocabulary = ByteVocabulary()
        lora = Lora(rank=2)
        model = make_model(vocabulary=vocabulary)
        params = make_params(model.module)
        write_model_dir(files.model, model, params, vocabulary)
        other = make_model(vocabulary=vocabulary, embed_dim=8)
        write_model_dir(files.other, other, make_params(other.module), vocabulary)
        words = make_vocabulary(folder / "words", CHATML)
        talking = make_model(vocabulary=words, vocab_size=words.vocab_size)
        write_model_dir(files.talking, talking, make_params(talking.module), words)
        save_adapter(files.adapter, combine(params, adapters_of(params, lora)), lora, None, "tiny")
        trained = TrainedModel(model, params, 1, files.model / "checkpoint_1")
        streamer = Streamer(model.module)
        logits, state = streamer.read(
            params, streamer.initial_state(params, 1), np.ones((1, 20), np.int32)
        )
        save_memory(files.memory, trained, logits, state)
        write_source(files.hf)
        train_bpe(files.hf / "tokenizer.json")
        files.text.write_text("A text of some words.\n" * 20)
        files.prompts.write_text('{"inputs": "What is it?"}\n')
        return files


@dataclasses.dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
      line: command line after `famx`, as a shell reads it.
      words: texts that the sentence must have.
      make: makes the files of the case, given its folder and the shared ones; may return a function
        that is called when all cases are done.
      environment: environment variables.
    """

    line: str
    words: tuple[str, ...]
    make: Make | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def arguments(self, here: pathlib.Path, files: Files) -> list[str]:
        paths = {name: str(path) for name, path in vars(files).items()}
        parts = shlex.split(self.line)
        for name, path in {**paths, "here": str(here)}.items():
            parts = [part.replace("{" + name + "}", path) for part in parts]
        return parts


CASES: dict[str, Case] = {}


def case(name: str, line: str, *words: str, make: Make | None = None, **environment: str) -> None:
    assert name not in CASES, name
    CASES[name] = Case(line, words, make, environment)


def write(name: str, content: str | bytes) -> Make:
    """Makes a file with this content."""

    def make(here: pathlib.Path, files: Files) -> None:
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def folder(name: str) -> Make:
    return lambda here, files: (here / name).mkdir()


def copy(shared: str, change: Callable[[pathlib.Path], object]) -> Make:
    """Makes {here}/copy, a copy of a shared file or directory, and changes it."""

    def make(here: pathlib.Path, files: Files) -> None:
        source, target = getattr(files, shared), here / "copy"
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        change(target)

    return make


def edit_json(name: str, **changes) -> Callable[[pathlib.Path], object]:
    """Changes entries of a JSON file in a directory; Ellipsis removes one."""

    def change(directory: pathlib.Path) -> None:
        path = directory / name
        value = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))

    return change


def cut(path: pathlib.Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def flip(path: pathlib.Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)


def largest(directory: pathlib.Path) -> pathlib.Path:
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


# ---------------------------------------------------------------- command line

TRAIN = """train --gin_file=gin_configs/examples/passkey_aged.gin --gin.MODEL_DIR="'{here}/run'" """
OWN = """train --gin_file=gin_configs/examples/own_text.gin --gin.MODEL_DIR="'{here}/run'" """
EVAL = """eval --gin_file=gin_configs/runs/eval.gin --gin.CHECKPOINT_PATH="'{model}'" """
INFER = (
    """infer --gin_file=gin_configs/runs/infer.gin --gin.OUTPUT_FILE="'{here}/out.jsonl'" """
    """--gin.CHECKPOINT_PATH="'{model}'" """
)
PROMPTS = INFER + """--gin.INPUT_FILE="'{prompts}'" """

case("command that does not exist", "trian", "no command trian", "train")
case("flag that does not exist", TRAIN + "--gin_fil=x", "--gin_fil", "--gin_file")
case("stray argument", TRAIN + "--resume_from=1 stray", "stray")
case("no gin file for eval", "eval", "--gin")
case("no gin file for infer", "infer", "--gin")
case("binding without a value", TRAIN + "--gin.TRAIN_STEPS", "--gin.TRAIN_STEPS", "--gin.NAME=VALUE")
case("binding without a name", TRAIN + "--gin.=3", "--gin.NAME=VALUE")
case("boolean flag with a word", TRAIN + "--multiprocess=maybe", "--multiprocess", "maybe")
case("steps to profile in the wrong order", TRAIN + "--profile_steps=13:10", "profile_steps", "13:10")
case("steps to profile that are no numbers", TRAIN + "--profile_steps=first", "profile_steps", "first")
case("steps to profile after the last", TRAIN + "--profile_steps=6000:6001", "profile_steps")
case("negative step to resume from", TRAIN + "--resume_from=-1", "--resume_from", "-1")
case("step to resume from that is not there", TRAIN + "--resume_from=7", "7", "checkpoint")
case("no processes", TRAIN + "--num_processes=0", "--num_processes", "0")
case("a fraction of a process", TRAIN + "--num_processes=1.5", "--num_processes", "1.5")
case(
    "process beyond the last",
    TRAIN + "--num_processes=2 --process_id=2 --coordinator_address=localhost:9",
    "process_id",
    "2",
)
case("processes without a coordinator", TRAIN + "--num_processes=2 --process_id=0", "coordinator_address")
case(
    "coordinator without a port",
    TRAIN + "--num_processes=2 --process_id=0 --coordinator_address=host",
    "coordinator_address",
    "HOST:PORT",
)
case("no patience with peers", TRAIN + "--peer_timeout_seconds=0", "--peer_timeout_seconds")
case("exit code beyond 255", TRAIN + "--exit_code_if_stopped=300", "--exit_code_if_stopped", "300")
case("chat without a checkpoint", "chat", "--checkpoint")
case(
    "chat with a negative temperature",
    "chat --checkpoint={model} --temperature=-1",
    "--temperature",
    "-1",
)
case(
    "chat with no temperature at all",
    "chat --checkpoint={model} --temperature=nan",
    "--temperature",
    "nan",
)
case("chat with top_k 0", "chat --checkpoint={model} --top_k=0", "--top_k", "0")
case("chat with top_p above 1", "chat --checkpoint={model} --top_p=1.5", "--top_p", "1.5")
case("answers of no tokens", "chat --checkpoint={model} --max_new_tokens=0", "--max_new_tokens", "0")
case(
    "number of tokens in words",
    "chat --checkpoint={model} --max_new_tokens=many",
    "--max_new_tokens",
    "many",
)
case("negative seed", "chat --checkpoint={model} --seed=-1", "--seed", "-1")
case("template without the message", "chat --checkpoint={model} --template='Question:'", "{message}")
case("template with another field", "chat --checkpoint={model} --template='{message} {name}'", "name")
case("template with a lone brace", "chat --checkpoint={model} --template='{message} {'", "template")
case("system message without a chat template", "chat --checkpoint={model} --system=Be", "chat template")
case("empty stop text", "chat --checkpoint={model} --stop=", "--stop")
case("memory without flags", "memory", "--read")
case("memory without a text", "memory --checkpoint={model} --out={here}/a.famem", "--read")
case("memory without a place", "memory --checkpoint={model} --read={text}", "--out")
case(
    "memory over an older file",
    "memory --checkpoint={model} --read={text} --out={here}/a.famem",
    "a.famem",
    "--overwrite",
    make=write("a.famem", "x"),
)
case(
    "memory into no directory",
    "memory --checkpoint={model} --read={text} --out={here}/no/a.famem",
    "no/a.famem",
)
case(
    "memory of a missing text",
    "memory --checkpoint={model} --read={here}/no.txt --out={here}/a.famem",
    "no.txt",
)
case(
    "memory of a directory",
    "memory --checkpoint={model} --read={here} --out={here}/a.famem",
    "not a file",
)
case(
    "memory over the text",
    "memory --checkpoint={model} --read={here}/a --out={here}/a --overwrite",
    "{here}/a",
    make=write("a", "Words."),
)
case("description and reading at once", "memory --show={memory} --read={text}", "--show")
case("verify without a path", "verify", "PATH")
case("verify with a flag", "verify --quick {model}", "PATH")
case("verify of nothing", "verify {here}/none", "{here}/none")
case("convert from nowhere", "convert --to={here}/m", "--from")
case("convert to nowhere", "convert --from={hf}", "--to")
case("convert from a missing path", "convert --from={here}/none --to={here}/m", "{here}/none")
case(
    "convert from an empty directory",
    "convert --from={here}/e --to={here}/m",
    "config.json",
    make=folder("e"),
)
case(
    "convert into a full directory",
    "convert --from={hf} --to={here}/m",
    "{here}/m",
    make=write("m/x", "x"),
)
case("blocks of no tokens", "convert --from={hf} --to={here}/m --block_size=0", "--block_size", "0")
case(
    "blocks of half a token", "convert --from={hf} --to={here}/m --block_size=1.5", "--block_size", "1.5"
)
case("unknown memory", "convert --from={hf} --to={here}/m --memory=fem", "fem", "fam")
case("memory of length 0", "convert --from={hf} --to={here}/m --memory=fam:length=0", "length", "0")
case(
    "misspelt field of a memory",
    "convert --from={hf} --to={here}/m --memory=fam:lenght=4",
    "lenght",
    "length",
)
case(
    "field of a memory without a value", "convert --from={hf} --to={here}/m --memory=fam:length", "length"
)
case(
    "field of a memory with a word",
    "convert --from={hf} --to={here}/m --memory=fam:length=long",
    "length",
    "long",
)
case(
    "dtype that does not exist",
    "convert --from={hf} --to={here}/m --param_dtype=float8",
    "--param_dtype",
    "float8",
)
case("setting without a value", "convert --from={hf} --to={here}/m --set=rope", "--set", "rope")
case("setting that does not exist", "convert --from={hf} --to={here}/m --set=dropuot=0.1", "dropuot")
case(
    "plain text that is missing",
    "convert --from={hf} --to={here}/m --prompt=text --plain_text={here}/no",
    "{here}/no",
)
case(
    "plain text that is empty",
    "convert --from={hf} --to={here}/m --prompt=text --plain_text={here}/e",
    "{here}/e",
    make=write("e", ""),
)
case(
    "tokenizer that is missing", "convert --from={hf} --to={here}/m --tokenizer={here}/no.json", "no.json"
)
case("tokenizer of no known kind", "convert --from={hf} --to={here}/m --tokenizer={text}", "{text}")
case("pad that is no token", "convert --from={hf} --to={here}/m --pad_id=1000000", "1000000")
case("negative pad", "convert --from={hf} --to={here}/m --pad_id=-1", "pad_id", "-1")
case("axis that does not exist", "convert --from={hf} --to={here}/m --mesh=fdsp=8", "fdsp", "fsdp")
case("axis of no devices", "convert --from={hf} --to={here}/m --mesh=fsdp=0", "fsdp", "0")
case("mesh without a number", "convert --from={hf} --to={here}/m --mesh=fsdp", "fsdp")
case("export of nothing", "export --to={here}/m", "--checkpoint")
case("export to nowhere", "export --checkpoint={model}", "--to")
case(
    "export into a full directory",
    "export --checkpoint={model} --to={here}/m",
    "{here}/m",
    make=write("m/x", "x"),
)
case("export into a file", "export --checkpoint={model} --to={here}/m", "{here}/m", make=write("m", "x"))
case("export of integers", "export --checkpoint={model} --to={here}/m --dtype=int8", "--dtype", "int8")
case("shards of a strange size", "export --checkpoint={model} --to={here}/m --max_shard_size=5QB", "5QB")
case(
    "shards of no bytes", "export --checkpoint={model} --to={here}/m --max_shard_size=0", "max_shard_size"
)
case(
    "source without a config",
    "export --checkpoint={model} --to={here}/m --source={here}/s",
    "{here}/s",
    make=folder("s"),
)
MAPS = "attention-maps --checkpoint={model} --text={text} --out={here}/maps "
case("maps without a text", "attention-maps --checkpoint={model} --out={here}/maps", "--text")
case("layers in words", MAPS + "--layers=first", "--layers", "first")
case("layer beyond the last", MAPS + "--layers=9", "9", "layer")
case("head beyond the last", MAPS + "--heads=9", "9", "head")
case("block beyond the last", MAPS + "--blocks=9999", "9999", "block")
case("maps over older ones", MAPS, "--overwrite", make=write("maps/maps.npz", "x"))
case(
    "maps of an empty text",
    "attention-maps --checkpoint={model} --text={here}/e --out={here}/maps",
    "{here}/e",
    make=write("e", ""),
)
HEAT = "heatmap --checkpoint={model} --out={here}/heat "
case("heat map of no model", "heatmap --out={here}/heat", "--checkpoint")
case("heat map of a missing model", "heatmap --checkpoint={here}/no --out={here}/heat", "{here}/no")
case("heat map nowhere", "heatmap --checkpoint={model}", "--out")
case("heat map into a file", "heatmap --checkpoint={model} --out={text}", "{text}", "is a file")
case("heat map of an unknown probe", HEAT + "--probe=paskey", "paskey", "passkey")
case("heat map of a probe without depth", HEAT + "--probe=ruler_vt", "VariableProbe", "no depth")
case(
    "heat map of several values", HEAT + "--probe=ruler_niah_multivalue", "NeedleProbe", "several values"
)
case("heat map of keys wider than a block", HEAT, "--probe 'passkey'", "a block of 8")
case("heat map of half a block", HEAT + "--lengths=1020", "--lengths has 1020", "8 tokens: 1016 and 1024")
NEEDLES = HEAT + "--probe=ruler_niah_single_1 "
case("heat map of rows that are too short", NEEDLES + "--lengths=8", "--lengths begin with 8")
case("heat map of too many tokens", NEEDLES + "--lengths=4294967296", "positions end")
case("heat map of lengths in words", HEAT + "--lengths=long", "--lengths=long")
case("heat map below the end", HEAT + "--depths=0,1.5", "--depths", "1.5", "from 0 to 1")
case("heat map of depths in words", HEAT + "--depths=deep", "--depths=deep")
case("heat map of negative seeds", HEAT + "--seeds=-1", "--seeds", "-1")
case("heat map of no documents", HEAT + "--examples=0", "--examples", "0")
case("heat map with a strange option", HEAT + """--probe_options='{"digit": 3}'""", "digit")
case(
    "heat map over other cells",
    NEEDLES,
    "heatmap.jsonl",
    "choose another directory",
    make=write("heat/heatmap.jsonl", "other\n"),
)
PROFILE = "profile --out={here}/profile "
case("profile nowhere", "profile --sizes=tiny", "--out")
case("profile into a file", "profile --out={text}", "{text}", "is a file")
case("profile of an unknown size", PROFILE + "--sizes=7b", "--sizes", "7b", "tiny")
case("profile of half a block", PROFILE + "--lengths=1000", "--lengths has 1000", "multiples of 32")
case("profile of lengths in words", PROFILE + "--lengths=long", "--lengths=long")
case("profile of an unknown variant", PROFILE + "--variants=rnn", "--variants", "rnn", "bswa")
case("profile of an unknown pass", PROFILE + "--passes=flying", "--passes", "flying", "at_once")
case("profile of no rows", PROFILE + "--rows=0", "--rows", "0")
case("profile for no such chip", PROFILE + "--topology=v9:1x1", "v9:1x1", "h100")
case("profile with no such optimiser", PROFILE + "--optimizer=sgd", "--optimizer", "sgd", "adafactor")
case(
    "profile over another file",
    PROFILE,
    "profile.jsonl",
    "choose another directory",
    make=write("profile/profile.jsonl", "other\n"),
)
case("cache of nothing", "cache --output_dir={here}/c", "--task")
case("cache nowhere", "cache --task=passkey_words", "--output_dir")
case(
    "cache in no files",
    "cache --task=passkey_words --output_dir={here}/c --num_shards=0",
    "--num_shards",
    "0",
)
case(
    "options that are no JSON",
    "cache --task=passkey_words --output_dir={here}/c --task_options={",
    "--task_options",
)
case(
    "options that are a list",
    "cache --task=passkey_words --output_dir={here}/c --task_options=[1]",
    "--task_options",
    "object",
)
case(
    "module that does not exist",
    "cache --task=x --output_dir={here}/c --import=no_such_module",
    "no_such_module",
)
case("preparing nothing", "prepare --source={here} --data_dir={here}/d", "--task")
case(
    "preparing an unknown task",
    "prepare --task=scrolls_quasper --source={here} --data_dir={here}/d",
    "scrolls_quasper",
    "scrolls_qasper",
)
case(
    "preparing from a missing place",
    "prepare --task=scrolls_qasper --source={here}/no --data_dir={here}/d",
    "{here}/no",
)
case(
    "preparing from an empty folder",
    "prepare --task=scrolls_qasper --source={here}/e --data_dir={here}/d",
    "{here}/e",
    make=folder("e"),
)
case(
    "preparing from no archive",
    "prepare --task=scrolls_qasper --source={text} --data_dir={here}/d",
    "{text}",
)
case(
    "preparing a damaged archive",
    "prepare --task=scrolls_qasper --source={here}/a.zip --data_dir={here}/d",
    "a.zip",
    make=write("a.zip", b"PK\3\4" + b"\0" * 40),
)
case(
    "preparing what is generated",
    "prepare --task=passkey_words --source={here} --data_dir={here}/d",
    "passkey_words",
)
SHOW = "inspect-data --task=passkey_words --length=256 "
case("no task to show", "inspect-data", "--task")
case("unknown task to show", "inspect-data --task=paskey", "paskey", "passkey")
case(
    "option of a task that does not exist", SHOW + """--task_options='{"digit": 3}'""", "digit", "digits"
)
case("option of a task of a wrong type", SHOW + """--task_options='{"digits": "3"}'""", "digits", "'3'")
case("rows of no tokens", "inspect-data --task=passkey_words --length=0", "--length", "0")
case("rows that are too short", "inspect-data --task=passkey_words --length=4", "4")
case("no examples", SHOW + "--examples=0", "--examples", "0")
case("negative example", SHOW + "--first=-1", "--first", "-1")
case("figure in no directory", SHOW + "--plot={here}/no/x.png", "no/x.png")
case("unknown split to show", SHOW + "--split=tset", "tset")
case("vocabulary that is no tokenizer", SHOW + "--vocabulary={text}", "{text}")
PAGE = "<!-- table: x -->\n<!-- end -->\n"
COMPILE = "compile --gin_file=gin_configs/examples/pretrain_1b.gin "
case("no topology", COMPILE, "--topology")
case("unknown device", COMPILE + "--topology=h101", "h101", "h100")
case("unknown shape of a slice", COMPILE + "--topology=v5p:a", "v5p:a")
case("unknown program", COMPILE + "--topology=cpu:8 --programs=fly", "fly")
case("no slices", COMPILE + "--topology=cpu:8 --num_slices=0", "--num_slices", "0")
case("search of something else", COMPILE + "--topology=cpu:8 --find=length", "--find", "length")
case(
    "report that is missing",
    "compile --reports={here}/no.json --markdown={here}/p.md --name=x",
    "no.json",
    make=write("p.md", PAGE),
)
case(
    "report that is no JSON",
    "compile --reports={here}/r.json --markdown={here}/p.md --name=x",
    "r.json",
    make=lambda here, files: [write("r.json", "{")(here, files), write("p.md", PAGE)(here, files)],
)
case("replay of nothing", "replay", "MODEL_DIR")
case("replay of a missing run", "replay {here}/none", "{here}/none")
case("replay of no run", "replay {here}", "config.gin")

# ---------------------------------------------------------------- gin

case("missing gin file", "train --gin_file=gin_configs/examples/passkey_tny.gin", "passkey_tny.gin")
case("directory as a gin file", "train --gin_file={here}", "{here}")
case("gin file with an error", "train --gin_file={here}/a.gin", "a.gin", make=write("a.gin", "A = (1,\n"))
case(
    "gin file in another encoding",
    "train --gin_file={here}/a.gin",
    "a.gin",
    make=write("a.gin", "A = 'ä'".encode("latin-1")),
)
case(
    "include of a missing file",
    "train --gin_file={here}/a.gin",
    "none.gin",
    make=write("a.gin", "include 'none.gin'\n"),
)
case(
    "import of a missing module",
    "train --gin_file={here}/a.gin",
    "no_such_module",
    make=write("a.gin", "from __gin__ import dynamic_registration\nimport no_such_module\n"),
)
case(
    "gin file that includes itself",
    "train --gin_file={here}/a.gin",
    "a.gin",
    make=write("a.gin", "include 'a.gin'\n"),
)
case("unknown macro", TRAIN + "--gin.TRAIN_STEP=3", "TRAIN_STEP", "TRAIN_STEPS")
case("unknown configurable", TRAIN + "--gin.Fem.length=3", "Fem", "Fam")
case("unknown parameter", TRAIN + "--gin.Fam.lenght=3", "lenght", "length")
case("macro that is not defined", TRAIN + "--gin.TRAIN_STEPS=%STEPS", "STEPS")
case("value that is no gin", TRAIN + "--gin.TRAIN_STEPS=(3", "TRAIN_STEPS")
case("text for a whole number", TRAIN + """--gin.BATCH_SIZE="'4'" """, "BATCH_SIZE", "'4'")
case("fraction for a whole number", TRAIN + "--gin.BATCH_SIZE=4.0", "BATCH_SIZE", "4.0")
MELODY = """train --gin_file=gin_configs/examples/melody_tiny.gin --gin.MODEL_DIR="'{here}/run'" """
case("vectors of another width than the task's", MELODY + "--gin.Vectors.width=5", "frames", "17", "5")
case("vectors of no width", MELODY + "--gin.Vectors.width=0", "Vectors.width", "0")
case("frontend that is a word", MELODY + """--gin.DecoderConfig.frontend="'vectors'" """, "Frontend")
case(
    "task of edges for a model of vectors",
    MELODY + """--gin.MIXTURE_OR_TASK_NAME="'reachable_tree'" """,
    "edges",
    "frames",
)
case("values that no task has", MELODY + "--gin.DecoderConfig.values=@heads.Values()", "values")
case("melodies without end", MELODY + """--gin.TASK_OPTIONS="{'melodies': 17}" """, "melodies")
case(
    "evaluation of melodies that are too short",
    MELODY + "--gin.TaskEvaluation.more_lengths='(64, 4)'",
    "more_lengths",
    "17",
)
case("no MODEL_DIR", "train --gin_file=gin_configs/examples/passkey_aged.gin", "MODEL_DIR")
case("heads that do not divide the width", TRAIN + "--gin.DecoderConfig.num_heads=3", "num_heads", "3")
case("rows that are no whole blocks", TRAIN + """--gin.TASK_FEATURE_LENGTHS="{'targets': 130}" """, "130")
case("microbatches that do not divide", TRAIN + "--gin.run.Run.microbatches=3", "3", "16")
case("vocabulary larger than the model", TRAIN + "--gin.DecoderConfig.vocab_size=8", "8")
case("stage that does not divide", TRAIN + """--gin.STAGES="({'steps': 10, 'block_size': 48},)" """, "48")
case("curriculum of half a block", TRAIN + "--gin.Curriculum.blocks='(1.5, 4)'", "blocks[0]", "1.5")
case("reference to a class in place of an object", TRAIN + "--gin.OPTIMIZER=@adamw", "OPTIMIZER", "()")
case("checkpoints to keep 0", TRAIN + "--gin.run.Run.checkpoints_to_keep=0", "checkpoints_to_keep", "0")
case(
    "loss chunk that does not divide", TRAIN + "--gin.models.DecoderModel.loss_chunk=0", "loss_chunk", "0"
)

# ---------------------------------------------------------------- data


def own(content: str | bytes, task: str = "own_text") -> tuple[str, Make]:
    line = OWN + f"""--gin.MIXTURE_OR_TASK_NAME="'{task}'" --gin.TEXT_FILES="'{{here}}/data.jsonl'" """
    return line, write("data.jsonl", content)


def own_case(name: str, content: str | bytes, task: str, *words: str) -> None:
    line, make = own(content, task)
    case(name, line, *words, make=make)


case("missing text", OWN + """--gin.TEXT_FILES="'{here}/no*.txt'" """, "no*.txt")
own_case("empty text", "", "own_text", "data.jsonl")
own_case("text of blanks", " \n\t\n", "own_text", "data.jsonl")
own_case("bytes that are no text", bytes(range(128, 256)) * 4, "own_text", "data.jsonl")
own_case("record that is null", '{"text": "a"}\nnull\n', "own_records", "data.jsonl", "2")
own_case("record that is broken", '{"text": "a"}\n{"text": \n', "own_records", "data.jsonl", "2")
own_case("record without its text", '{"text": "a"}\n{"txt": "b"}\n', "own_records", "data.jsonl", "2")
own_case(
    "record with a number for a text", '{"text": "a"}\n{"text": 5}\n', "own_records", "data.jsonl", "2"
)
own_case("records that are a list", '[{"text": "a"}]\n', "own_records", "data.jsonl")
own_case("conversation without messages", '{"text": "a"}\n', "own_chat", "messages", "text")
case(
    "data that were not prepared",
    TRAIN + """--gin.DecoderConfig.vocab_size=260 --gin.MIXTURE_OR_TASK_NAME="'scrolls_qasper'" """
    """--gin.TASK_OPTIONS="{'data_dir': '{here}/no'}" """,
    "{here}/no",
)
case(
    "task that does not exist", TRAIN + """--gin.MIXTURE_OR_TASK_NAME="'paskey'" """, "paskey", "passkey"
)
case("missing prompts", INFER + """--gin.INPUT_FILE="'{here}/no.jsonl'" """, "no.jsonl")
for name, content, words in (
    ("no prompts", "", ("a.jsonl",)),
    ("prompt that is broken", '{"inputs": "a"}\n{"inputs"\n', ("a.jsonl", "2")),
    ("prompt that is a number", '{"inputs": 5}\n', ("a.jsonl", "inputs")),
    ("prompt without its text", '{"input": "a"}\n', ("inputs",)),
    ("prompt that is a list", '["a"]\n', ("a.jsonl", "1")),
    ("prompt in another encoding", '{"inputs": "ä"}\n'.encode("latin-1"), ("a.jsonl",)),
):
    case(name, INFER + """--gin.INPUT_FILE="'{here}/a.jsonl'" """, *words, make=write("a.jsonl", content))
case("score without targets", PROMPTS + """--gin.MODE="'score'" """, "targets")
case(
    "prompt template with another field",
    PROMPTS + """--gin.PROMPT_TEMPLATE="'{question}'" """,
    "question",
)
case(
    "prompt template with a lone brace",
    PROMPTS + """--gin.PROMPT_TEMPLATE="'{inputs'" """,
    "PROMPT_TEMPLATE",
)
case(
    "answers over the prompts",
    """infer --gin_file=gin_configs/runs/infer.gin --gin.CHECKPOINT_PATH="'{model}'" """
    """--gin.INPUT_FILE="'{here}/a.jsonl'" --gin.OUTPUT_FILE="'{here}/a.jsonl'" """,
    "a.jsonl",
    make=write("a.jsonl", '{"inputs": "a"}\n'),
)
case(
    "answers into no directory",
    """infer --gin_file=gin_configs/runs/infer.gin --gin.CHECKPOINT_PATH="'{model}'" """
    """--gin.INPUT_FILE="'{prompts}'" --gin.OUTPUT_FILE="'/proc/no/a.jsonl'" """,
    "/proc/no",
)
case("end token beyond the vocabulary", PROMPTS + "--gin.STOP_TOKENS='(9999,)'", "9999")
case(
    "evaluation of an unknown task",
    EVAL + """--gin.EVALUATIONS="{'a': @TaskEvaluation()}" """
    """--gin.TaskEvaluation.task="'paskey'" --gin.TaskEvaluation.length=64 """,
    "paskey",
)
case("chat template where there is none", PROMPTS + "--gin.CHAT_TEMPLATE=True", "chat template")

# ---------------------------------------------------------------- checkpoints


def chat_copy(name: str, change: Callable[[pathlib.Path], object], *words: str) -> None:
    case(name, "chat --checkpoint={here}/copy", *words, make=copy("model", change))


case("checkpoint that is missing", "chat --checkpoint={here}/none", "{here}/none")
case("checkpoint that is a file", "chat --checkpoint={text}", "{text}")
case("checkpoint that is an empty directory", "chat --checkpoint={here}/e", "{here}/e", make=folder("e"))
case("step that was not saved", "chat --checkpoint={model}/checkpoint_7", "step 7")
case("URL of a checkpoint", "chat --checkpoint=s3://bucket/run", "s3://bucket/run", "mount")
case("bucket as a checkpoint", "chat --checkpoint=gs://bucket", "gs://bucket/name")
NO_STORE = "http://127.0.0.1:1"  # where no server answers
case(
    "checkpoint in a store that does not answer",
    "chat --checkpoint=gs://bucket/run",
    "gs://bucket/run",
    "no connection",
    TENSORSTORE_GCS_HTTP_URL=NO_STORE,
)
case(
    "run in a store that does not answer",
    "verify gs://bucket/run",
    "gs://bucket/run",
    "no connection",
    TENSORSTORE_GCS_HTTP_URL=NO_STORE,
)
case("directory of Hugging Face as a checkpoint", "chat --checkpoint={hf}", "convert")
chat_copy("no model.json", lambda path: (path / "model.json").unlink(), "model.json")
chat_copy("model.json that is no JSON", lambda path: (path / "model.json").write_text("{"), "model.json")
chat_copy("model.json that is a list", lambda path: (path / "model.json").write_text("[]"), "model.json")
chat_copy(
    "model.json with a word for a width",
    edit_json("model.json", embed_dim="wide", sha256=...),
    "model.json",
    "embed_dim",
)
chat_copy("model.json of a newer famx", edit_json("model.json", telepathy=True, sha256=...), "telepathy")
VECTORS = {"kind": "vectors", "name": "frames", "width": 2}
chat_copy(
    "model that reads vectors",
    edit_json("model.json", frontend=VECTORS, sha256=...),
    "'frames'",
    "Streamer",
)
chat_copy(
    "model.json with a list for a frontend",
    edit_json("model.json", frontend=[1], sha256=...),
    "model.json",
    "frontend",
)
chat_copy(
    "model.json with a word for a width of vectors",
    edit_json("model.json", frontend={**VECTORS, "width": "two"}, sha256=...),
    "model.json",
    "frontend.width",
)
chat_copy(
    "model.json with a frontend that is not known",
    edit_json("model.json", frontend={"kind": "waves"}, sha256=...),
    "waves",
    "--import",
)
chat_copy("no vocabulary", lambda path: (path / "vocabulary.json").unlink(), "vocabulary")
chat_copy(
    "vocabulary that is no JSON",
    lambda path: (path / "vocabulary.json").write_text("{"),
    "vocabulary.json",
)
chat_copy("vocabulary of an unknown kind", edit_json("vocabulary.json", kind="runes"), "vocabulary.json")
chat_copy(
    "weights with one other bit",
    lambda path: flip(largest(path / "checkpoint_1")),
    "checkpoint_1",
    "damaged",
)
chat_copy(
    "weights that are cut", lambda path: cut(largest(path / "checkpoint_1")), "checkpoint_1", "damaged"
)
chat_copy("weights that are gone", lambda path: largest(path / "checkpoint_1").unlink(), "checkpoint_1")
chat_copy(
    "no checkpoint beside the model", lambda path: shutil.rmtree(path / "checkpoint_1"), "{here}/copy"
)
chat_copy(
    "empty checkpoint",
    lambda path: [shutil.rmtree(path / "checkpoint_1"), (path / "checkpoint_1").mkdir()],
    "checkpoint_1",
)
chat_copy("model.json of another model", edit_json("model.json", embed_dim=32, sha256=...), "{here}/copy")
case(
    "export of a damaged checkpoint",
    "export --checkpoint={here}/copy --to={here}/out",
    "damaged",
    make=copy("model", lambda path: flip(largest(path / "checkpoint_1"))),
)
case(
    "memory with a damaged checkpoint",
    "memory --checkpoint={here}/copy --read={text} --out={here}/a.famem",
    "damaged",
    make=copy("model", lambda path: cut(largest(path / "checkpoint_1"))),
)
case(
    "MODEL_DIR of another model",
    TRAIN.replace("{here}/run", "{here}/copy"),
    "{here}/copy",
    make=copy("model", lambda path: None),
)
case(
    "MODEL_DIR that is a file", TRAIN.replace("{here}/run", "{here}/f"), "{here}/f", make=write("f", "x")
)
case(
    "MODEL_DIR below a file",
    TRAIN.replace("{here}/run", "{here}/f/run"),
    "{here}/f",
    make=write("f", "x"),
)
case("MODEL_DIR where nothing can be written", TRAIN.replace("{here}/run", "/proc/run"), "/proc/run")
case("MODEL_DIR that is a URL", TRAIN.replace("{here}/run", "s3://bucket/run"), "s3://bucket/run")
case("MODEL_DIR that is a bucket", TRAIN.replace("{here}/run", "gs://bucket"), "gs://bucket/name")
case("MODEL_DIR that is no whole URL", TRAIN.replace("{here}/run", "gs:/bucket/run"), "gs://bucket/name")
case(
    "MODEL_DIR in a store that does not answer",
    TRAIN.replace("{here}/run", "gs://bucket/run"),
    "gs://bucket/run",
    "no connection",
    TENSORSTORE_GCS_HTTP_URL=NO_STORE,
)
case(
    "MODEL_DIR with a name that is too long",
    TRAIN.replace("{here}/run", "{here}/" + "x" * 300),
    "too long",
)


def locked(here: pathlib.Path, files: Files):
    """A run's directory that this process holds the lock of."""
    from famx.model_dir.lock import RunLock

    (here / "run").mkdir()
    lock = RunLock(here / "run", beat_seconds=3600.0)
    lock.acquire()
    return lock.release


case("MODEL_DIR of a run that lives", TRAIN, "{here}/run", make=locked)

case(
    "finetuning from nowhere",
    """train --gin_file=gin_configs/runs/finetune.gin """
    """--gin_file=gin_configs/models/tiny.gin --gin.MODEL_DIR="'{here}/run'" --gin.TRAIN_STEPS=3 """
    """--gin.BATCH_SIZE=2 --gin.MIXTURE_OR_TASK_NAME="'passkey_words'" """
    """--gin.TASK_FEATURE_LENGTHS="{'targets': 128}" --gin.INITIAL_CHECKPOINT_PATH="'{here}/none'" """,
    "{here}/none",
)
case(
    "finetuning from another model",
    """train --gin_file=gin_configs/examples/passkey_aged.gin """
    """--gin.MODEL_DIR="'{here}/run'" --gin.run.Run.initial_checkpoint_path="'{model}'" """,
    "{model}",
)
case(
    "model of Hugging Face without weights",
    "convert --from={here}/copy --to={here}/m",
    "safetensors",
    make=copy("hf", lambda path: (path / "model.safetensors").unlink()),
)
case(
    "weights of Hugging Face that are cut",
    "convert --from={here}/copy --to={here}/m",
    "model.safetensors",
    make=copy("hf", lambda path: cut(path / "model.safetensors")),
)
case(
    "config of Hugging Face that is no JSON",
    "convert --from={here}/copy --to={here}/m",
    "config.json",
    make=copy("hf", lambda path: (path / "config.json").write_text("{")),
)
for name, changes, words in (
    ("no layers", {"num_hidden_layers": 0}, ("num_hidden_layers",)),
    ("too many layers", {"num_hidden_layers": 2**40}, ("num_hidden_layers",)),
    ("a width in words", {"hidden_size": "wide"}, ("hidden_size", "wide")),
    ("no width", {"hidden_size": ...}, ("model.embed_tokens.weight",)),
    ("another architecture", {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, ("Mamba",)),
    ("no architecture", {"architectures": [], "model_type": ...}, ("config.json",)),
    ("other widths than the weights", {"hidden_size": 32}, ("model.embed_tokens.weight",)),
    (
        "positions that are not known",
        {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}},
        ("spiral",),
    ),
):
    case(
        f"model of Hugging Face with {name}",
        "convert --from={here}/copy --to={here}/m",
        *words,
        make=copy("hf", edit_json("config.json", **changes)),
    )
for name, content in (
    ("is empty", b""),
    ("is a text", b"A text of some length, which is no model at all."),
    ("is cut", b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 1 << 40)),
    ("is of version 1", b"GGUF" + struct.pack("<I", 1) + b"\0" * 64),
):
    case(
        f"GGUF file that {name}",
        "convert --from={here}/m.gguf --to={here}/m",
        "m.gguf",
        make=write("m.gguf", content),
    )

# ---------------------------------------------------------------- adapters, templates, memory files


def adapter_case(name: str, change: Callable[[pathlib.Path], object], *words: str) -> None:
    case(
        f"adapter {name}",
        "chat --checkpoint={model} --adapter={here}/copy",
        *words,
        make=copy("adapter", change),
    )


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
case("adapter that is missing", "chat --checkpoint={model} --adapter={here}/none", "{here}/none")
case("adapter that is a text", "chat --checkpoint={model} --adapter={text}", "{text}")
case("adapter of another model", "chat --checkpoint={other} --adapter={adapter}", "{adapter}")
case(
    "adapter of another model for export",
    "export --checkpoint={other} --adapter={adapter} --to={here}/m",
    "{adapter}",
)
case("adapter that is a model", "chat --checkpoint={model} --adapter={hf}", "{hf}")
adapter_case("without a config", lambda path: (path / CONFIG).unlink(), CONFIG)
adapter_case("without weights", lambda path: (path / WEIGHTS).unlink(), WEIGHTS)
adapter_case("whose config is no JSON", lambda path: (path / CONFIG).write_text("{"), CONFIG)
adapter_case("whose weights are cut", lambda path: cut(path / WEIGHTS), WEIGHTS)
adapter_case("whose weights are a text", lambda path: (path / WEIGHTS).write_text("x" * 100), WEIGHTS)
adapter_case("of no rank", edit_json(CONFIG, r=0), CONFIG, "0")
adapter_case("of another rank than its weights", edit_json(CONFIG, r=4), "{here}/copy")
adapter_case("with a rank in words", edit_json(CONFIG, r="two"), CONFIG, "two")
adapter_case("of another kind", edit_json(CONFIG, peft_type="IA3"), "IA3")
adapter_case("with DoRA", edit_json(CONFIG, use_dora=True), "use_dora")
adapter_case("with a start that changes the base", edit_json(CONFIG, init_lora_weights="pissa"), "pissa")
adapter_case("with a key from the future", edit_json(CONFIG, use_telepathy=True), "use_telepathy")
adapter_case("for no module", edit_json(CONFIG, target_modules=[], r=1), "{here}/copy")
TWICE = "average --adapter={adapter} --adapter={adapter}"
case("average of nothing", "average --to={here}/a", "--adapter")
case("average to nowhere", TWICE, "--to")
case("average of one adapter", "average --adapter={adapter} --to={here}/a", "two adapters")
case("average over an adapter", f"{TWICE} --to={{adapter}}", "{adapter}")
case("average with one weight", f"{TWICE} --weight=2 --to={{here}}/a", "2 adapters")
case("average with a weight of 0", f"{TWICE} --weight=0 --weight=1 --to={{here}}/a", "--weight")
case(
    "average with an adapter that is missing",
    "average --adapter={adapter} --adapter={here}/none --to={here}/a",
    "{here}/none",
)


def template_case(name: str, template: object, *words: str) -> None:
    line = PROMPTS.replace("{model}", "{here}/copy") + "--gin.CHAT_TEMPLATE=True"
    change = edit_json("vocabulary.json", chat_template=template)
    case(f"chat template {name}", line, *words, make=copy("talking", change))


template_case("with an error", "{% for m in messages %}", "chat template")
template_case("that is a number", 5, "vocabulary.json", "chat_template")
template_case("that refuses", "{{ raise_exception('Not with me') }}", "Not with me")
template_case(
    "that never ends",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "chat template",
)
template_case(
    "that writes without end", "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "chat template"
)
template_case("that takes all memory", "{{ 'x' * 10 ** 12 }}", "chat template")
template_case(
    "that reaches for Python", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template"
)
template_case("with an unknown filter", "{{ messages | telepathy }}", "telepathy")
template_case("that divides by zero", "{{ 1 / 0 }}", "chat template")
template_case("that leaves out the message", "{{ '<|im_start|>' }}", "chat template")


def memory_case(name: str, change: Callable[[pathlib.Path], object], *words: str) -> None:
    case(
        f"memory file {name}",
        "chat --checkpoint={model} --memory={here}/copy",
        "{here}/copy",
        *words,
        make=copy("memory", change),
    )
    case(
        f"shown memory file {name}",
        "memory --show={here}/copy",
        "{here}/copy",
        *words,
        make=copy("memory", change),
    )


memory_case("that is empty", lambda path: path.write_bytes(b""))
memory_case("that is a text", lambda path: path.write_text("A text of some length, " * 10))
memory_case("that is cut", cut)
memory_case("that is cut at its end", lambda path: cut(path, 0.99))
memory_case("with one other bit", flip)
memory_case("with one other bit at its end", lambda path: flip(path, 0.999))
memory_case("with one other bit in its header", lambda path: flip(path, 0.02))
case("memory file that is missing", "chat --checkpoint={model} --memory={here}/none", "{here}/none")
case("memory file that is a directory", "chat --checkpoint={model} --memory={here}", "{here}")
case("memory file of another model", "chat --checkpoint={other} --memory={memory}", "{memory}")
case(
    "memory file of another model to read on from",
    "memory --checkpoint={other} --memory={memory} --read={text} --out={here}/a.famem",
    "{memory}",
)

# ---------------------------------------------------------------- devices

case(
    "mesh of more devices than there are",
    TRAIN + "--gin.make_mesh.fsdp=8 --gin_file=gin_configs/meshes/fsdp.gin",
    "8",
)
case("two axes that take the rest", TRAIN + "--gin.make_mesh.fsdp=-1 --gin.make_mesh.data=-1", "-1")
case("accelerator that is not there", TRAIN, "tpu", JAX_PLATFORMS="tpu")
case("platform that does not exist", TRAIN, "abacus", JAX_PLATFORMS="abacus")
case(
    "attention of GPUs on a CPU", TRAIN + """--gin.DecoderConfig.attention_backend="'cudnn'" """, "cudnn"
)
case(
    "attention of TPUs on a CPU",
    TRAIN + """--gin.DecoderConfig.attention_backend="'splash'" """,
    "splash",
)
case("batch that the devices do not divide", COMPILE + "--topology=cpu:4 --gin.BATCH_SIZE=3", "3")
case("options of XLA for another platform", TRAIN + """--gin.XLA_OPTIONS="'graphs'" """, "graphs")
