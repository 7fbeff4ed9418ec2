"""From gin files to reports: the work of `famx compile`."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence

import jax

from famx.base import gin_utils, tables
from famx.base.errors import ConfigError
from famx.base.files import write_json
from famx.modules import Decoder
from famx.modules.backends import resolve_backend
from famx.scale import fit, programs, topologies
from famx.scale.report import Report, compile_report
from famx.training.run import Run
from famx.training.stages import Stage, stages_of


def check_programs(names: Sequence[str]) -> None:
    """Checks names of programs.

    Raises:
      ConfigError: there are none, or a name is unknown.
    """
    choice = f"choose from {', '.join(programs.PROGRAMS)}."
    if not names:
        raise ConfigError(f"--programs is empty: {choice}")
    for name in names:
        if name not in programs.PROGRAMS:
            raise ConfigError(f"There is no program {name!r}: {choice}")


def compile_programs(
    topology: str,
    num_slices: int = 1,
    wanted: Sequence[str] = ("train",),
    inference_batch_size: int | None = None,
    find: str | None = None,
    json_file: str | None = None,
    hlo_dir: str | None = None,
) -> bool:
    """Compiles the programs that gin describes, prints their reports, and returns whether all fit.

    Stages of a run are programs of their own where their shapes differ; text is read and written with the
    model of the last one.

    Raises:
      ConfigError: the settings do not fit together; known before anything is compiled.
    """
    if json_file is not None and not pathlib.Path(json_file).absolute().parent.is_dir():
        raise ConfigError(f"The directory of --json={json_file} does not exist: create it first.")
    devices, chip = topologies.devices(topology, num_slices)
    place = topology if num_slices == 1 else f"{num_slices} x {topology}"

    stages = stages_of(run_from_gin())
    for stage in stages:
        with stage.errors():
            run_on(stage.run, devices)

    def compiled(name: str, stage: Stage, batch_size: int | None = None) -> Report:
        run = run_on(stage.run, devices, batch_size)
        program = _lower(run, name, inference_batch_size)
        if name == "train" and stage.count > 1:
            program = dataclasses.replace(program, name=f"train_stage_{stage.index + 1}")
        return compile_report(program, run.mesh, place, chip, hlo_dir and pathlib.Path(hlo_dir))

    reports = []
    if find is not None:
        for stage in _of_other_shapes(stages):
            run = run_on(stage.run, devices)
            parts = run.microbatches * run.mesh.shape["data"] * run.mesh.shape["fsdp"]
            attempt = functools.partial(compiled, "train", stage)
            reports.append(fit.largest_batch(attempt, run.data.batch_size, parts, print))
    else:
        for name in wanted:
            for stage in _of_other_shapes(stages) if name == "train" else stages[-1:]:
                reports.append(compiled(name, stage))
                print("\n\n".join(table.text() for table in reports[-1].tables()) + "\n", flush=True)
    for report in reports:
        print(report.line())
        if not report.fits:
            print(fit.advice(report))
    if json_file is not None:
        write_json(json_file, [report.plain() for report in reports])
    return all(report.fits for report in reports)


def fill_page(json_files: Sequence[str], markdown_file: str, table_name: str) -> None:
    """Fills a table of a page with the reports of `compile_programs` in JSON files, one row per program.

    Raises:
      ConfigError: the page has no such table, a file holds other data, or there are no reports.
    """
    page, rows = pathlib.Path(markdown_file), []
    if not page.is_file() or tables.missing_markers(page, [table_name]):
        raise ConfigError(f"{markdown_file} has no place for a table named {table_name}.")
    for name in map(pathlib.Path, json_files):
        try:
            rows += [{"run": name.stem, **report["row"]} for report in json.loads(name.read_text())]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{name} holds no reports of famx.compile --json: {error}.") from error
    if not rows:
        raise ConfigError(f"There are no reports in {', '.join(map(str, json_files))}.")
    tables.fill_markdown(page, tables.Table(table_name, "", (), rows))


def run_from_gin() -> Run:
    """The run that gin describes, without its evaluation and directory, which compiling does not need.

    Raises:
      ConfigError: the gin files are not those of a training run.
    """
    return gin_utils.call(lambda: Run(model_dir=None, evaluation=None))


def run_on(run: Run, devices: Sequence[jax.Device], batch_size: int | None = None) -> Run:
    """`run`, ready for `devices`, which need not exist; with another batch size if one is given."""
    if batch_size is not None:
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, batch_size=batch_size))
    run = run.ready(devices)
    # "auto" would be resolved for this machine, not for the devices that are compiled for.
    config = run.model.config
    backend = resolve_backend(config, devices[0], len(devices))
    module = Decoder(dataclasses.replace(config, attention_backend=backend))
    return dataclasses.replace(run, model=dataclasses.replace(run.model, module=module))


def _of_other_shapes(stages: Sequence[Stage]) -> list[Stage]:
    """The stages without those that train with the program of a stage before; prints which these are."""
    found: dict[int, tuple] = {}
    for stage in stages:
        run = stage.run
        program = (
            run.model, run.state_passing, run.microbatches, run.data.batch_size, run.data.length
        )  # fmt: skip
        same = next((index for index, other in found.items() if other == program), None)
        if same is None:
            found[stage.index] = program
        else:
            print(f"Stage {stage.index + 1} has the program of stage {same + 1}.")
    return [stages[index] for index in found]


def _lower(run: Run, name: str, inference_batch_size: int | None) -> programs.Program:
    if name == "train":
        return programs.train(run)
    if inference_batch_size is None:
        inference_batch_size = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    reading, writing = programs.read_and_write(run, inference_batch_size)
    return reading if name == "prefill" else writing
