"""From gin files to reports: the work of `python -m famx.compile`."""

import copy
import dataclasses
import inspect
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import gin

from famx.base import gin_utils, tables
from famx.base.errors import ConfigError
from famx.base.files import write_json
from famx.modules import Decoder
from famx.modules.backends import resolve_backend
from famx.scale import fit, programs, topologies
from famx.scale.report import Report, compile_report
from famx.training import loop
from famx.training.setup import Setup, prepare


def run(
    topology: str,
    num_slices: int = 1,
    wanted: Sequence[str] = ("train",),
    inference_batch_size: int | None = None,
    find: str | None = None,
    json_file: str | None = None,
    hlo_dir: str | None = None,
) -> bool:
    """Compiles the programs that gin describes and prints what they need; whether all fit.

    Raises:
      ConfigError: with one sentence, before anything is compiled, if the settings do not fit.
    """
    devices, chip = topologies.devices(topology, num_slices)
    where = topology if num_slices == 1 else f"{num_slices} x {topology}"

    def compiled(name: str, **changes) -> Report:
        setup = setup_from_gin(devices, **changes)
        made = _lower(setup, name, inference_batch_size)
        return compile_report(made, setup.mesh, where, chip, hlo_dir and pathlib.Path(hlo_dir))

    if find is not None:
        setup = setup_from_gin(devices)
        parts = setup.num_microbatches * setup.mesh.shape["data"] * setup.mesh.shape["fsdp"]
        attempt = lambda size: compiled("train", batch_size=size)
        reports = [fit.largest_batch(attempt, setup.batch_size, parts, print)]
    else:
        reports = []
        for name in wanted:
            reports.append(compiled(name))
            print("\n\n".join(table.text() for table in reports[-1].tables()) + "\n", flush=True)
    for report in reports:
        print(report.line())
        if not report.fits:
            print(fit.advice(report))
    if json_file is not None:
        write_json(json_file, [report.plain() for report in reports])
    return all(report.fits for report in reports)


def fill_page(json_files: Sequence[str], markdown_file: str, table_name: str) -> None:
    """Fills a table of a page with what `run` wrote to JSON files, each program a row.

    Raises:
      ConfigError: the page has no such table, or a file is none of ours.
    """
    page, rows = pathlib.Path(markdown_file), []
    if not page.is_file() or tables.missing_markers(page, [table_name]):
        raise ConfigError(f"{markdown_file} has no place for a table named {table_name}.")
    for name in map(pathlib.Path, json_files):
        try:
            rows += [{"run": name.stem, **report["row"]} for report in json.loads(name.read_text())]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{name} holds no reports of famx.compile --json: {error}.") from error
    columns = dict.fromkeys(column for row in rows for column in row)
    rows = [{column: row.get(column, "-") for column in columns} for row in rows]
    tables.fill_markdown(page, tables.Table(table_name, "", (), rows))


def setup_from_gin(devices, **changes: Any) -> Setup:
    """`prepare` with what gin binds `loop.train` to, and with `changes`."""
    names = [name for name in inspect.signature(prepare).parameters if name != "devices"]
    bound = gin.get_bindings(loop.train, resolve_references=False)
    found = {name: bound[name] for name in names if name in bound} | changes
    for name, parameter in inspect.signature(prepare).parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in found:
            raise ConfigError(f"loop.train.{name} is not set: the gin files are not those of a training.")

    def make():
        # gin makes what a reference stands for when the reference is copied.
        setup = prepare(**copy.deepcopy(found), devices=devices)
        # "auto" would be the way of this machine, not of the devices compiled for.
        config = setup.model.config
        backend = resolve_backend(config, devices[0].platform, len(devices))
        setup.model.config = dataclasses.replace(config, attention_backend=backend)
        setup.model.module = Decoder(setup.model.config)
        return setup

    return gin_utils.call(make)


def _lower(setup: Setup, name: str, inference_batch_size: int | None) -> programs.Program:
    if name == "train":
        return programs.train(setup)
    size = inference_batch_size or setup.mesh.shape["data"] * setup.mesh.shape["fsdp"]
    reading, writing = programs.read_and_write(setup, size)
    return reading if name == "prefill" else writing
