"""Running commands and writing files, or saying in a dry run which these would be."""

import contextlib
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterable, Iterator, Sequence

from famx.base.errors import ConfigError

_SHORTEST_SECRET = 6  # of those looked for in any output: a shorter one would mask half of it
_INSTALL = {
    "gcloud": "install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install)",
    "xpk": "install it with `pip install xpk`",
    "sbatch": "run this on a login node of the Slurm cluster",
}


class Commands:
    """Runs argument lists, never a shell; every one is printed first, as `$ words`.

    Args:
      dry_run: print only.
      secrets: values that are masked in whatever is printed, output of commands included.
    """

    def __init__(self, dry_run: bool, secrets: Iterable[str] = ()):
        self.dry_run = dry_run
        self.environment: dict[str, str] = {}  # that commands have beside this process's own
        self._asked: tuple[str, ...] = ()
        long = (secret for secret in secrets if len(secret) >= _SHORTEST_SECRET)
        self._secrets = sorted(long, key=len, reverse=True)

    def mask(self, text: str) -> str:
        """The text with asterisks for secrets."""
        for secret in self._secrets:
            for form in (shlex.quote(secret), secret):
                text = text.replace(form, "***")
        return text

    def say(self, text: str) -> None:
        print(self.mask(text), flush=True)

    def require(self, *tools: str) -> None:
        """Raises ConfigError for a tool that is missing; a dry run needs none."""
        for tool in tools:
            if not self.dry_run and shutil.which(tool) is None:
                raise ConfigError(f"{tool} is not installed: {_INSTALL[tool]}.")

    def run(self, *command: str, harmless: bool = False) -> int:
        """Runs to the end, its output passed on line by line; returns the exit code.

        A dry run does it only if it is `harmless`.
        """
        return self.stream(*command, harmless=harmless)[0]

    def stream(self, *command: str, harmless: bool = False) -> tuple[int, int]:
        """As `run`; returns the exit code and the number of lines of its standard output."""
        self._asked = ()
        self.say(f"$ {shlex.join(command)}")
        if self.dry_run and not harmless:
            return 0, 0
        lines = 0
        with _ending(self._start(command)) as process:
            errors = threading.Thread(target=self._pass_on, args=(process.stderr,), daemon=True)
            errors.start()
            for line in process.stdout:
                lines += 1
                self.say(line.rstrip("\n"))
            code = process.wait()
            errors.join(timeout=5)
        return code, lines

    def _start(self, command: Sequence[str]) -> subprocess.Popen:
        # A session of its own: Ctrl-C reaches this process alone, which then ends the command.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True, env={**os.environ, **self.environment},
        )  # fmt: skip

    def _pass_on(self, stream) -> None:
        with contextlib.suppress(ValueError):  # closed meanwhile
            for line in stream:
                self.say(line.rstrip("\n"))

    def capture(self, *command: str, assume: str) -> tuple[int, str, str]:
        """Exit code, standard output and error; in a dry run 0, `assume` and ''.

        A question that is asked over and over is printed once.
        """
        if self.dry_run or command != self._asked:
            self.say(f"$ {shlex.join(command)}")
        self._asked = command
        if self.dry_run:
            return 0, assume, ""
        with _ending(self._start(command)) as process:
            out, err = process.communicate()
        return process.returncode, out.strip(), err.strip()

    def make_directory(self, path: pathlib.Path) -> None:
        """Makes it anew, empty, for the user alone."""
        if self.dry_run:
            return
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True, mode=0o700)

    def write(self, path: pathlib.Path, text: str, mode: int = 0o600, shown: str | None = None) -> None:
        """Writes a file; a dry run prints it instead, or `shown` if that is given."""
        if self.dry_run:
            self.say(f"# file {path} (mode {mode:o})")
            for line in (text if shown is None else shown).splitlines():
                self.say(f"  | {line}")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
            file.write(text)

    def copy(self, source: pathlib.Path, path: pathlib.Path) -> None:
        """Copies a file."""
        if self.dry_run:
            self.say(f"# file {path} (copy of {source})")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)


@contextlib.contextmanager
def _ending(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    try:
        yield process
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    finally:
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
