"""Disturbs training runs by kills and other faults, and compares them with undisturbed ones at their end.

    python -m tests.reliability --kills=1000 --seed=0
    python -m tests.reliability --kills=1000 --seed=0        # again: continues where it stopped

A case is one tiny run of a mode of state passing (`tests.reliable_runs.MODES`) on one process or two. It
is started, disturbed by a fault and started again by the same call, until it is finished. Then its last
checkpoint must be bit for bit, and its metrics line for line, those of a run that nothing disturbed; and
each start must continue from the newest checkpoint that was complete before it. Which faults come, and
when they are meant to, is a function of the seed and the number of the case; when they strike is not.

| fault | what |
|---|---|
| kill | SIGKILL of one process or all: at a step, while a checkpoint is written, or at any time |
| freeze | SIGSTOP of one process or all for up to a second, then SIGCONT, and soon SIGKILL |
| stop | SIGTERM of one process |
| full | from a step on no file can be written beyond some bytes, as on a full disk (RLIMIT_FSIZE) |
| damage | between starts a file of the newest checkpoint is changed, cut, emptied or deleted |

Damage is among the faults where checkpoints have digests (`famx.model_dir.digests`).
"""

import argparse
import collections
import dataclasses
import importlib.util
import json
import pathlib
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from reliable_runs import (  # noqa: E402
    MODES,
    Child,
    Result,
    being_saved,
    committed,
    finish,
    last_step,
    result,
    start,
    tiny_run,
)

STEPS = 120
DIGESTS = importlib.util.find_spec("famx.model_dir.digests") is not None
FAULTS = ("kill", "freeze", "stop", "full", *(("damage",) if DIGESTS else ()))
_WEIGHTS = {"kill": 6, "freeze": 1, "stop": 1, "full": 1, "damage": 1}
_MOMENTS = ("step", "step", "save", "save", "any")
_RESUMED = re.compile(rb"Resuming from step (\d+) of")
_LIMIT = 600  # seconds in which a start must end or be disturbed
_PEER_LIMIT = 150  # seconds in which the other process of a killed one must end


@dataclasses.dataclass
class Case:
    """A run that is disturbed until it is finished.

    Attributes:
      number: number of the case, which its draws depend on.
      mode: its mode of state passing.
      processes: number of its processes.
      faults: number of faults of each kind.
      findings: sentences about what went wrong.
    """

    number: int
    mode: str
    processes: int
    faults: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    findings: list[str] = dataclasses.field(default_factory=list)


class Disturbed:
    """Starts the run of a case again and again, with a fault each time.

    Args:
      case: the case; its faults and findings are added to.
      folder: directory for the run and its logs.
      seed: seed of all cases.
      faults: kinds of faults.
      kills: number of kills after which the run is left in peace.
    """

    def __init__(self, case: Case, folder: pathlib.Path, seed: int, faults: Iterable[str], kills: int):
        self.case, self.folder, self.kills = case, folder / "run", kills
        self.log, self.faults = folder / "log", list(faults)
        self.random = random.Random(f"{seed}/{case.number}")
        self.newest = self._begun_with = 0  # newest complete checkpoint: now, and at the last start

    def run(self) -> None:
        """Runs to the end."""
        while True:
            kind = None
            if self.case.faults["kill"] < self.kills:
                weights = [_WEIGHTS[fault] for fault in self.faults]
                kind = self.random.choices(self.faults, weights)[0]
            if kind == "damage":
                self._damage()
                kind = None
            before, self._begun_with = self._size(), self.newest
            children = start(
                lambda: tiny_run(self.folder, self.case.mode, STEPS), self.case.processes, self.log
            )
            codes = self._disturb(children, kind, before)
            self._check(before, kind, codes)
            if codes == [0] * self.case.processes and committed(self.folder)[-1:] == [STEPS]:
                return
            if kind is None and any(code != 0 for code in codes):
                self.case.findings.append(f"an undisturbed start ended with {codes}")
                return

    def _size(self) -> int:
        path = pathlib.Path(f"{self.log}.0")
        return path.stat().st_size if path.exists() else 0

    # ------ Faults

    def _disturb(self, children: list[Child], kind: str | None, before: int) -> list[int | None]:
        """Waits for the moment of the fault, and for the end; the exit codes."""
        random_, alive = self.random, lambda: all(child.poll() is None for child in children)
        moment, delay = random_.choice(_MOMENTS), random_.uniform(0, 0.05)
        step = self.newest + random_.randint(1, 20)
        victims = random_.choice([children, [random_.choice(children)]])
        seconds, size = random_.uniform(0.02, 1), random_.choice([0, 512, 4096, 20_000])
        early, after = random_.uniform(0, 2), random_.uniform(0, 0.3)
        end = time.monotonic() + _LIMIT
        if kind is not None:
            if moment == "any":
                while alive() and not self._size() > before and time.monotonic() < end:
                    time.sleep(0.005)  # until the run has something to say
                delay = early
            while moment == "step" and alive() and last_step(self.log, before) < step:
                time.sleep(0.005)
            while moment == "save" and alive():
                if being_saved(self.folder) and last_step(self.log, before) >= step - 7:
                    break
                time.sleep(0.001)
            time.sleep(delay)
        self._seen()
        if kind is not None and alive():
            self.case.faults[kind] += 1
            if kind == "kill":
                for child in victims:
                    child.send(signal.SIGKILL)
            elif kind == "stop":
                victims[0].send(signal.SIGTERM)
            elif kind == "full":
                for child in children:
                    limits = resource.prlimit(child.pid, resource.RLIMIT_FSIZE)
                    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (size, limits[1]))
            elif kind == "freeze":
                for child in victims:
                    child.send(signal.SIGSTOP)
                time.sleep(seconds)
                for child in victims:
                    child.send(signal.SIGCONT)
                time.sleep(after)
                self._seen()
                if alive():  # it went on; so that one start has two faults
                    self.case.faults["kill"] += 1
                    victims[0].send(signal.SIGKILL)
        short = kind in ("kill", "full", "freeze")
        codes = finish(children, _PEER_LIMIT if short else max(end - time.monotonic(), 1))
        if None in codes:
            self.case.findings.append(f"a process of {len(codes)} still ran after a {kind or 'start'}")
            for child in children:
                child.kill()
        return [child.code for child in children]

    def _damage(self) -> None:
        steps = committed(self.folder)
        if len(steps) < 2:
            return
        newest = (self.folder / f"checkpoint_{steps[-1]}").rglob("*")
        files = sorted(path for path in newest if path.is_file() and path.stat().st_size)
        path, how = self.random.choice(files), self.random.choice(("flip", "cut", "empty", "delete"))
        data = bytearray(path.read_bytes())
        if how == "flip":
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        elif how == "cut":
            data = data[: len(data) // 2]
        path.unlink()
        if how != "delete":
            path.write_bytes(b"" if how == "empty" else data)
        self.case.faults["damage"] += 1
        self.newest = steps[-2]  # the newest is no longer complete

    # ------ Checks

    def _seen(self) -> None:
        """Notes the newest complete checkpoint."""
        newest = max(committed(self.folder), default=0)
        if newest < self.newest:
            self.case.findings.append(f"checkpoint {self.newest} was lost; the newest is {newest}")
        self.newest = newest

    def _check(self, before: int, kind: str | None, codes: list[int | None]) -> None:
        """Compares what the start says with what was there before, and what it has left."""
        wanted, path = self._begun_with, pathlib.Path(f"{self.log}.0")
        with path.open("rb") as file:
            file.seek(before)
            text = file.read()
        resumed = _RESUMED.search(text)
        if resumed is not None and int(resumed[1]) != wanted:
            self.case.findings.append(f"resumed from {int(resumed[1])}, not from {wanted}")
        if resumed is None and wanted and b"train step" in text:
            self.case.findings.append(f"began from nothing, though checkpoint {wanted} was complete")
        self._seen()
        told = [int(step) for step in re.findall(rb"Stopped at step (\d+);", text)]
        if told and told[-1] > self.newest:
            self.case.findings.append(f"checkpoint {told[-1]} was announced and does not exist")
        if kind == "full" and DIGESTS and b"Traceback" in text:
            self.case.findings.append("a full disk ended in a traceback")
        if kind == "full" and any(codes) and not any(code and code > 0 for code in codes):
            self.case.findings.append(f"a full disk ended with the codes {codes}")


def _outcome(case: Case, folder: pathlib.Path, whole: Result) -> None:
    if committed(folder / "run")[-1:] != [STEPS]:
        return  # as a finding says
    found = result(folder / "run", STEPS, folder / "digest.log")
    if found.digest != whole.digest:
        case.findings.append("the last checkpoint differs")
    if found.history != whole.history:
        case.findings.append("the metrics differ")


# ---------------------------------------------------------------- all cases


class Records:
    """The finished cases, one JSON object a line, from which an interrupted trial continues.

    Args:
      folder: directory of the trial.
      settings: what it is made with; another file is used for other settings.
    """

    def __init__(self, folder: pathlib.Path, settings: dict[str, Any]):
        self._path = folder / "cases.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        head, *cases = [json.loads(line) for line in lines] or [settings]
        if head != settings:
            raise SystemExit(f"{self._path} was made with other settings, {head}: choose another --out.")
        if not lines:
            self._append(settings)
        self.cases = [Case(**{**x, "faults": collections.Counter(x["faults"])}) for x in cases]

    def add(self, case: Case) -> None:
        """Adds a finished case."""
        self.cases.append(case)
        self._append(vars(case))

    def _append(self, value: Any) -> None:
        with self._path.open("a") as file:
            file.write(f"{json.dumps(value)}\n")

    def count(self, fault: str) -> int:
        """Number of faults of a kind."""
        return sum(case.faults[fault] for case in self.cases)

    def table(self, faults: Iterable[str]) -> str:
        """Markdown of what was tried and found, by mode and number of processes."""
        faults = list(faults)
        rows = [["mode", "processes", "runs", *faults, "findings"]]
        rows.append(["---"] * len(rows[0]))
        for mode, processes in sorted({(case.mode, case.processes) for case in self.cases}):
            of_row = [x for x in self.cases if (x.mode, x.processes) == (mode, processes)]
            counts = [sum(case.faults[fault] for case in of_row) for fault in faults]
            findings = sum(len(case.findings) for case in of_row)
            rows.append([mode, processes, len(of_row), *counts, findings])
        totals = [self.count(fault) for fault in faults]
        findings = sum(len(case.findings) for case in self.cases)
        rows.append(["all", "", len(self.cases), *totals, findings])
        return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def trial(
    folder: pathlib.Path,
    kills: int,
    seed: int = 0,
    modes: Iterable[str] = tuple(MODES),
    processes: Iterable[int] = (1, 2),
    faults: Iterable[str] = FAULTS,
    kills_per_run: int = 8,
) -> Records:
    """Runs cases until there were enough kills; continues with those that `folder` has.

    Args:
      folder: directory for runs and records.
      kills: number of kills of all cases.
      seed: seed of the draws.
      modes: modes of state passing.
      processes: numbers of processes.
      faults: kinds of faults.
      kills_per_run: number of kills after which a run is left in peace.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [(mode, count) for count in processes for mode in modes]
    settings = dict(seed=seed, kinds=[list(kind) for kind in kinds], faults=list(faults), steps=STEPS)
    records = Records(folder, settings)
    wholes: dict[tuple[str, int], Result] = {}
    while records.count("kill") < kills:
        number = len(records.cases)
        case = Case(number, *kinds[number % len(kinds)])
        kind = (case.mode, case.processes)
        if kind not in wholes:
            wholes[kind] = _whole(folder / f"whole_{case.mode}_{case.processes}", *kind)
        place = folder / f"case_{number}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        begin = time.monotonic()
        share = max(2, -(-kills // len(kinds)))  # so that a short trial comes to every kind
        left = min(kills - records.count("kill"), kills_per_run, share)
        Disturbed(case, place, seed, settings["faults"], left).run()
        _outcome(case, place, wholes[kind])
        records.add(case)
        told = ", ".join(f"{n} {fault}" for fault, n in case.faults.items() if n)
        found = "; ".join(case.findings) or "nothing found"
        seconds = time.monotonic() - begin
        about = f"case {number}: {case.mode} on {case.processes}"
        print(f"{about}: {told} in {seconds:.0f} s: {found}", flush=True)
        if not case.findings:
            shutil.rmtree(place)
    return records


def _whole(folder: pathlib.Path, mode: str, processes: int) -> Result:
    """The result of a run that nothing disturbs."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    children = start(lambda: tiny_run(folder / "run", mode, STEPS), processes, folder / "log")
    codes = finish(children, _LIMIT)
    if codes != [0] * processes:
        raise RuntimeError(f"An undisturbed run ended with {codes}; see {folder}/log.0.")
    return result(folder / "run", STEPS, folder / "digest.log")


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--out", help="directory for runs and records")
    args = parser.parse_args()
    name = f"famx-reliability-{args.seed}"
    folder = pathlib.Path(args.out or pathlib.Path(tempfile.gettempdir()) / name).absolute()
    records = trial(folder, args.kills, args.seed, args.modes, args.processes, args.faults)
    print(f"\n{records.table(args.faults)}")
    for case in records.cases:
        for finding in case.findings:
            print(f"case {case.number} ({case.mode} on {case.processes}): {finding}")
    return 1 if any(case.findings for case in records.cases) else 0


if __name__ == "__main__":
    sys.exit(main())
