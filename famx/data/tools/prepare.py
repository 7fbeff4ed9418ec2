"""Records of a task made from the official download of its data set.

The source is a folder or an archive (zip, tar, tar.gz, tar.bz2, tar.xz), or a folder that contains such
archives. The records are written to DATA_DIR/TASK/SPLIT.tfrecord-00000-of-00001, each split completely or
not at all; an interrupted preparation resumes at the first split that was not written.
"""

import contextlib
import errno
import functools
import hashlib
import lzma
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from famx.base.errors import ConfigError
from famx.base.files import (
    move_into_place,
    new_directory,
    removed_if_unused,
    replacing,
    scratch_directory,
    write_json,
)
from famx.base.progress import Progress
from famx.base.ranges import Path, Positive
from famx.base.values import checked
from famx.data.beam import map_on_workers
from famx.data.formats.texts import EmptySplit
from famx.data.storage import (
    TFRecordRecords,
    complete_shards,
    shard_paths,
    write_tfrecord_file,
    write_tfrecords,
)
from famx.data.tasks import Mixture, Suite, TextTask, registry
from famx.data.tasks.examples import Examples, Records

_ARCHIVE = re.compile(r"\.(zip|tar|tar\.gz|tgz|tar\.bz2|tar\.xz)$", re.IGNORECASE)
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError)


@checked
def prepare(
    task: str | TextTask | Mixture,
    source: Path,
    data_dir: Path | None = None,
    allow_partial: bool = False,
    num_shards: Positive = 1,
    message: Callable[[str], None] = print,
    beam_options: str | None = None,
) -> dict[str, dict[str, int]]:
    """Write the records of a task, or of all tasks of a mixture, with `prepared.json` next to them.

    Args:
      task: task, or its name.
      source: folder or archive of the official files.
      data_dir: directory of the records; None: FAMX_DATA_DIR.
      allow_partial: accept missing splits, and other numbers of records than published.
      num_shards: number of files per split.
      message: called with each line of the report.
      beam_options: flags of Apache Beam, whose workers then write the files, each one at a time (see
        `famx.data.beam`); the files are the same. None: this process writes them.

    Returns:
      The number of examples per task and split.

    Raises:
      ConfigError: the task is unknown, a suite, or needs no preparation; the source or the data
        directory cannot be used; or files are missing or not the published ones.
      ValueError: a file is broken; the sentence names it and, for a text file, the line.
    """
    name = task
    if isinstance(task, str):
        try:
            task = registry.get(task)
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error)) from error
    if isinstance(task, Suite):
        members = ", ".join(member.name for member in task.tasks)
        raise ConfigError(f"'{task.name}' is a suite; prepare its tasks one by one: {members}.")
    if not isinstance(task, TextTask | Mixture):
        raise ConfigError(f"{name} reads no published data set; it needs no preparation.")
    data_dir = data_dir or os.environ.get("FAMX_DATA_DIR")
    if not data_dir:
        raise ConfigError("There is no directory for the records; give --data_dir or set FAMX_DATA_DIR.")
    source, data_dir = (os.path.abspath(os.path.expanduser(x)) for x in (source, data_dir))
    if not os.path.exists(source):
        raise ConfigError(f"The source {source} does not exist; give the folder or archive to read.")
    with removed_if_unused(data_dir):
        try:
            os.makedirs(data_dir, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"The data directory {data_dir} cannot be made: {error.strerror}."
            ) from error
        return _prepare(task, source, data_dir, allow_partial, num_shards, message, beam_options)


def _prepare(
    task: TextTask | Mixture,
    source: str,
    data_dir: str,
    allow_partial: bool,
    num_shards: int,
    message: Callable[[str], None],
    beam_options: str | None,
) -> dict[str, dict[str, int]]:
    """`prepare` for a task object and absolute paths of directories that exist."""
    tasks = list(task.tasks) if isinstance(task, Mixture) else [task]
    message(f"Reading {source}.")
    folders = _folders(source, tasks)
    opened = {member.name: _open(member, folders) for member in tasks}
    incomplete = [member for member in tasks if len(opened[member.name][0]) < len(member.splits)]
    unpacked = [_unpack(archive, data_dir, message) for archive in _archives(source, incomplete)]
    folders = [inner for folder in unpacked for inner in _folders(folder, tasks)] + folders
    if unpacked:
        opened |= {member.name: _open(member, folders) for member in incomplete}
    problems = [text for _, texts in opened.values() for text in texts]
    nothing = not any(splits for splits, _ in opened.values())
    if nothing or (problems and not allow_partial):
        more = f" (and {len(problems) - 10} more)" if len(problems) > 10 else ""
        hint = "" if nothing else " To prepare it nevertheless, add --allow_partial."
        raise ConfigError(
            f"{source} does not contain all of '{task.name}': {'; '.join(problems[:10])}{more}. It is "
            f"published at {tasks[0].published}.{hint}"
        )
    for text in problems:
        message(f"Not as published: {text}.")
    written: set[str] = set()
    if beam_options is not None:
        jobs = [
            _Job(member, split, found.folder, member.prepared_name(split, data_dir))
            for member in tasks
            for split, found in opened[member.name][0].items()
        ]
        records_of = lambda job: opened[job.task.name][0][job.split].records
        missing = [job for job in jobs if not _exists(job.name, records_of(job))]
        _write_on_workers(missing, data_dir, num_shards, beam_options)
        written = {job.name for job in missing}
    counts = {
        member.name: _write(member, opened[member.name][0], data_dir, num_shards, message, written)
        for member in tasks if opened[member.name][0]
    }  # fmt: skip
    for folder in unpacked:
        shutil.rmtree(folder)
    return counts


class _Split(NamedTuple):
    """The records of a split, and the folder in which they were found."""

    records: Records
    folder: str


def _open(task: TextTask, folders: Sequence[str]) -> tuple[dict[str, _Split], list[str]]:
    """Open the splits of a task; return them by name, and part of a sentence for each problem."""
    splits, problems = {}, []
    for split in task.splits:
        missing, empty = None, None
        for folder in folders:
            try:
                splits[split] = _Split(task.open_split(folder, split), folder)
                break
            except FileNotFoundError as error:
                missing = missing or error.filename
            except EmptySplit as error:
                empty = empty or str(error).rstrip(".")
        else:
            problems.append(empty or f"{missing or f'its {split} split'} is missing")
            continue
        records = splits[split].records
        rows, wanted = getattr(records, "num_rows", len(records)), task.counts.get(split)
        files = getattr(records, "missing", ())
        if files:
            problems.append(f"{len(files)} files of the {split} split are missing, first {files[0]}")
        if wanted is not None and rows != wanted:
            problems.append(f"the {split} split of '{task.name}' has {rows} rows instead of {wanted}")
    if not splits:  # one problem says enough
        problems = [f"'{task.name}' has no split ({problems[0]})"]
    return splits, problems


class _Job(NamedTuple):
    """A split to write.

    Attributes:
      task, split: the split.
      source: the folder in which its records were found.
      name: path of its files without their numbers.
    """

    task: TextTask
    split: str
    source: str
    name: str


def _write(task, splits, data_dir, num_shards, message, written) -> dict[str, int]:
    """Write the splits of a task, except for those whose names are in `written`."""
    folder = os.path.join(data_dir, task.name)
    os.makedirs(folder, exist_ok=True)
    for split, (records, _) in splits.items():
        name = task.prepared_name(split, data_dir)
        if name not in written:
            before = complete_shards(name)
            if _exists(name, records):
                count = len(records)
                message(f"{name}: {count} examples exist already; delete them to write them again.")
                continue
            examples = Examples(records, task.preprocess)
            rows = (examples[i] for i in range(len(examples)))
            with Progress(f"{task.name} {split}", len(examples)) as progress:
                _remove_others(before, write_tfrecords(name, progress.each(rows), num_shards))
        message(f"{name}: {len(records)} examples.")
    counts = {split: len(opened.records) for split, opened in splits.items()}
    write_json(os.path.join(folder, "prepared.json"), {"task": task.name, "examples": counts})
    return counts


def _remove_others(before: Sequence[str], written: Sequence[str]) -> None:
    """Remove files of an earlier set of another number of files."""
    for path in set(before) - set(written):
        os.remove(path)


def _exists(name: str, records: Records) -> bool:
    shards = complete_shards(name)
    return bool(shards) and len(TFRecordRecords(shards)) == len(records)


def _write_on_workers(
    jobs: Sequence[_Job], data_dir: str, num_shards: int, beam_options: str
) -> None:
    """Write all splits in one pipeline of Beam, whose workers open the sources themselves."""
    before = {job.name: complete_shards(job.name) for job in jobs}
    paths = {job.name: shard_paths(job.name, num_shards) for job in jobs}
    with contextlib.ExitStack() as stack:
        unfinished = [stack.enter_context(scratch_directory(job.name)) for job in jobs]
        write = functools.partial(_write_shard, jobs, list(map(str, unfinished)), num_shards)
        map_on_workers(write, len(jobs) * num_shards, data_dir, beam_options)
        for folder, job in zip(unfinished, jobs):
            move_into_place({folder / str(k): path for k, path in enumerate(paths[job.name])})
            _remove_others(before[job.name], paths[job.name])


def _write_shard(jobs: Sequence[_Job], folders: Sequence[str], num_shards: int, i: int) -> None:
    """Write one file, counted over all jobs: the examples `k`, `k + num_shards`, ... of a split."""
    job, k = jobs[i // num_shards], i % num_shards
    examples = Examples(job.task.open_split(job.source, job.split), job.task.preprocess)
    rows = (examples[n] for n in range(k, len(examples), num_shards))
    with replacing(os.path.join(folders[i // num_shards], str(k))) as path:  # Beam may repeat a call
        write_tfrecord_file(path, rows)


# ------ The official files


def _names(tasks: Sequence[TextTask]) -> set[str]:
    """Names, in lower case, of the folders and archives of these tasks."""
    folders = [x for task in tasks for x in task.folders if isinstance(x, str)]
    return {os.path.basename(folder).lower() for folder in folders} - {""}


def _folders(source: str, tasks: Sequence[TextTask]) -> list[str]:
    """The source and its folders, two levels deep; those with the name of a task come first."""
    if os.path.isfile(source):
        return []
    folders, level = [source], [source]
    for _ in range(2):
        inner = [x.path for folder in level for x in os.scandir(folder) if x.is_dir()]
        level = sorted(path for path in inner if not os.path.basename(path).startswith("."))
        folders += level
    names = _names(tasks)
    return sorted(folders, key=lambda path: os.path.basename(path).lower() not in names)


def _archives(source: str, tasks: Sequence[TextTask]) -> list[str]:
    """The source, if it is an archive, or the archives in it whose names contain that of a task."""
    if os.path.isfile(source):
        return [source] if tasks else []
    archives = sorted(name for name in os.listdir(source) if _ARCHIVE.search(name))
    names = _names(tasks)
    return [os.path.join(source, x) for x in archives if any(name in x.lower() for name in names)]


def _unpack(archive: str, data_dir: str, message: Callable[[str], None]) -> str:
    """Unpack an archive; return the folder, which is kept until all records are written."""
    facts = os.stat(archive)
    key = hashlib.sha256(f"{archive} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = os.path.join(data_dir, f".unpacked-{key}")
    if os.path.isdir(folder):
        return folder
    message(f"Unpacking {archive} into {folder}.")
    with new_directory(folder, sync=False) as inner:
        try:
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as file:
                    file.extractall(inner)
            else:
                with tarfile.open(archive) as file:
                    file.extractall(inner, filter="data")
        except (*_DAMAGED, OSError) as error:
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise
            reason = getattr(error, "strerror", None) or "it is no whole zip or tar archive"
            raise ConfigError(f"{archive} cannot be unpacked: {reason}; download it again.") from error
    return folder
