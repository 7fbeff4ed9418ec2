"""Trains for hours, killed every few minutes, and compares with a run that nothing disturbs.

    python -m tests.soak --hours=4
    python -m tests.soak --hours=4        # again, after an interruption: continues

A piece is one start of the run, from its newest checkpoint until it is killed. Of three pieces two have
two processes of one device, the third has one process of two devices: the same mesh, so that the same
numbers come out, bit for bit. Memory, threads, open files and the files of the run are watched. When the
time is over, the run is finished at a round number of steps, and a run of as many steps that nothing
disturbs, on one process, is compared with it: the last checkpoint bit for bit, the metrics line for line.

`<out>/soak.json` has the result, and `<out>/soak.md` a table of it.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from reliable_runs import (  # noqa: E402
    Child,
    committed,
    files_below,
    finish,
    history,
    last_step,
    result,
    start,
    tiny_run,
)

_ROUND = 100  # steps that the number of all steps is a multiple of
_SAMPLE = 2.0  # seconds between two looks at the processes
_SETTLED = 0.5  # share of a piece after which its memory should not grow
_PAGE = os.sysconf("SC_PAGE_SIZE")
_FOREVER = 10**9
_WAIT = 900  # seconds in which the processes of a killed one must end, and a run must begin


@dataclasses.dataclass
class Piece:
    """A start of the run.

    Attributes:
      processes: number of its processes.
      seconds: time until it was killed.
      first, last: newest checkpoint before and after it.
      rss: resident bytes of all processes from `_SETTLED` of the piece on: first, last and largest.
      threads: largest number of threads of a process.
      open_files: largest number of open files of a process.
      files: number of files of the run at its end, without those of TensorBoard.
      event_files: number of TensorBoard's files, one more for each start.
    """

    processes: int
    seconds: float
    first: int
    last: int
    rss: tuple[int, int, int]
    threads: int
    open_files: int
    files: int
    event_files: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a soak does.

    Attributes:
      folder: directory for runs and records.
      hours: time of all pieces.
      minutes: shortest and longest time of a piece.
      mode: mode of state passing.
      seed: seed of the draws.
    """

    folder: pathlib.Path
    hours: float = 4.0
    minutes: tuple[float, float] = (2.0, 5.0)
    mode: str = "continuous"
    seed: int = 0

    def start(self, folder: pathlib.Path, steps: int, processes: int) -> list[Child]:
        """Starts the run on a mesh of two devices."""

        run = lambda: tiny_run(folder, self.mode, steps, checkpoint=50, log=20, learning_rate=1e-3)
        return start(run, processes, folder.with_suffix(".log"), 2 // processes)


def soak(plan: Plan) -> dict[str, Any]:
    """Runs the pieces that are missing and the undisturbed run; returns the result."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    run, path = plan.folder / "run", plan.folder / "pieces.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    pieces = [Piece(**json.loads(line)) for line in lines]
    while sum(piece.seconds for piece in pieces) < 3600 * plan.hours:
        pieces.append(_piece(plan, run, len(pieces)))
        with path.open("a") as file:
            file.write(f"{json.dumps(dataclasses.asdict(pieces[-1]))}\n")
        print(f"piece {len(pieces)}: {pieces[-1]}", flush=True)
    steps = _steps(plan, run)
    codes = finish(plan.start(run, steps, 2), _FOREVER)
    whole = plan.folder / "whole"
    if committed(whole)[-1:] != [steps] or not whole.with_suffix(".json").exists():
        _run_whole(plan, whole, steps)
    found = {"codes": codes, "steps": steps, **_compared(run, whole, steps, plan.folder)}
    found |= _watched(pieces) | {"mode": plan.mode, "seed": plan.seed}
    sizes = json.loads(whole.with_suffix(".json").read_text())
    found["rss_of_whole"] = [sizes[int(share * (len(sizes) - 1))] for share in (0.1, 0.5, 1)]
    (plan.folder / "soak.json").write_text(json.dumps(found, indent=2) + "\n")
    (plan.folder / "soak.md").write_text(table(found) + "\n")
    return found


def _piece(plan: Plan, run: pathlib.Path, number: int) -> Piece:
    """Starts the run, watches it for some minutes, and kills it."""
    draw = random.Random(f"{plan.seed}/{number}")
    processes = 1 if number % 3 == 2 else 2
    seconds, first = 60 * draw.uniform(*plan.minutes), max(committed(run), default=0)
    log = run.with_suffix(".log")
    before = pathlib.Path(f"{log}.0").stat().st_size if pathlib.Path(f"{log}.0").exists() else 0
    children, samples = plan.start(run, _FOREVER, processes), []
    begun = time.monotonic()
    while all(child.poll() is None for child in children) and not last_step(log, before):
        if time.monotonic() > begun + _WAIT:
            break
        time.sleep(0.1)
    end = time.monotonic() + seconds
    while all(child.poll() is None for child in children) and time.monotonic() < end:
        samples.append(_sample(children))
        time.sleep(_SAMPLE)
    if not samples or any(child.poll() is not None for child in children):
        for child in children:
            child.kill()
        codes = [child.code for child in children]
        raise RuntimeError(f"A piece ended by itself, with the codes {codes}; see {log}.0.")
    for child in draw.choice([children, [draw.choice(children)]]):
        child.send(signal.SIGKILL)
    took = time.monotonic() - begun
    finish(children, _WAIT)
    for child in children:
        child.kill()
    settled = samples[int(_SETTLED * (len(samples) - 1)) :]
    sizes = [size for size, _, _ in settled]
    event_files = files_below(run / "tensorboard")
    return Piece(
        processes, took, first, max(committed(run), default=0), (sizes[0], sizes[-1], max(sizes)),
        max(threads for _, threads, _ in samples), max(files for _, _, files in samples),
        files_below(run) - event_files, event_files,
    )  # fmt: skip


def _sample(children: Sequence[Child]) -> tuple[int, int, int]:
    """Resident bytes of all processes, and the most threads and open files of one; 0 if one has ended."""
    sizes, threads, files = [], [], []
    for child in children:
        try:
            folder = pathlib.Path(f"/proc/{child.pid}")
            sizes.append(int((folder / "statm").read_text().split()[1]) * _PAGE)
            threads.append(len(os.listdir(folder / "task")))
            files.append(len(os.listdir(folder / "fd")))
        except OSError:
            return 0, 0, 0
    return sum(sizes), max(threads), max(files)


def _steps(plan: Plan, run: pathlib.Path) -> int:
    """The number of steps that the run is finished with; the same one if this is called again then."""
    path, newest = plan.folder / "steps.json", max(committed(run), default=0)
    steps = json.loads(path.read_text()) if path.exists() else 0
    if newest > steps or not steps:
        steps = (newest // _ROUND + 1) * _ROUND
        path.write_text(json.dumps(steps))
    return steps


def _run_whole(plan: Plan, whole: pathlib.Path, steps: int) -> None:
    """The undisturbed run, which begins from nothing if this was interrupted."""
    shutil.rmtree(whole, ignore_errors=True)
    children, sizes = plan.start(whole, steps, 1), []  # which takes less time than two
    while all(child.poll() is None for child in children):
        sizes += [_sample(children)[0]]
        time.sleep(_SAMPLE)
    codes = finish(children, _FOREVER)
    whole.with_suffix(".json").write_text(json.dumps([size for size in sizes if size] or [0]))
    if codes != [0]:
        raise RuntimeError(f"The undisturbed run ended with {codes}; see {whole}.log.0.")


def _compared(run: pathlib.Path, whole: pathlib.Path, steps: int, folder: pathlib.Path) -> dict[str, Any]:
    ours, theirs = (result(x, steps, folder / "digest.log") for x in (run, whole))
    counts = [collections.Counter(json.dumps(line) for line in history(x)) for x in (run, whole)]
    differing = sum(((counts[0] - counts[1]) + (counts[1] - counts[0])).values())
    return {
        "same_checkpoint": ours.digest == theirs.digest, "same_metrics": ours.history == theirs.history,
        "differing_lines": differing, "lines": sum(counts[1].values()),
    }  # fmt: skip


def _watched(pieces: Sequence[Piece]) -> dict[str, Any]:
    lost = sum(later.first < piece.last for piece, later in zip(pieces, pieces[1:], strict=False))
    growth = [(piece.rss[1] - piece.rss[0]) / piece.rss[0] for piece in pieces]
    of_two = [piece.rss[2] for piece in pieces if piece.processes == 2]
    return {
        "hours": sum(piece.seconds for piece in pieces) / 3600, "pieces": len(pieces), "lost": lost,
        "largest_growth_within_a_piece": max(growth, default=0.0),
        "rss_of_two_processes": [min(of_two, default=0), max(of_two, default=0)],
        "threads": [min(x.threads for x in pieces), max(x.threads for x in pieces)],
        "open_files": [min(x.open_files for x in pieces), max(x.open_files for x in pieces)],
        "files": [min(x.files for x in pieces), max(x.files for x in pieces)],
        "event_files": max(x.event_files for x in pieces),
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """Markdown of a result."""
    mb = lambda size: f"{size / 1e6:.0f} MB"
    span = lambda low, high: str(low) if low == high else f"{low} to {high}"
    yes = lambda value: "yes" if value else "no"
    rows = {
        "time": f"{found['hours']:.2f} h in {found['pieces']} pieces, each ended by SIGKILL",
        "steps": found["steps"],
        "last checkpoint bit for bit that of the undisturbed run": yes(found["same_checkpoint"]),
        "differing lines of metrics": f"{found['differing_lines']} of {found['lines']}",
        "complete checkpoints lost": found["lost"],
        "resident memory of two processes, by piece": " to ".join(map(mb, found["rss_of_two_processes"])),
        "its largest growth in the second half of a piece": (
            f"{100 * found['largest_growth_within_a_piece']:.1f}%"
        ),
        "that of the undisturbed run, after a tenth, a half and all of it": ", ".join(
            map(mb, found["rss_of_whole"])
        ),
        "threads of a process, most of a piece": span(*found["threads"]),
        "open files of a process, most of a piece": span(*found["open_files"]),
        "files of the run, without TensorBoard's": span(*found["files"]),
        "TensorBoard's files, one for each start": found["event_files"],
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--hours", type=float, default=4.0)
    parser.add_argument("--minutes", type=float, nargs=2, default=[2.0, 5.0], help="times of a piece")
    parser.add_argument("--mode", default="continuous")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="directory for runs and records")
    args = parser.parse_args()
    folder = pathlib.Path(args.out or pathlib.Path(tempfile.gettempdir()) / f"famx-soak-{args.seed}")
    found = soak(Plan(folder.absolute(), args.hours, tuple(args.minutes), args.mode, args.seed))
    print(f"\n{table(found)}")
    good = found["same_checkpoint"] and found["same_metrics"] and not found["lost"]
    return 0 if good and found["codes"] == [0, 0] else 1


if __name__ == "__main__":
    sys.exit(main())
