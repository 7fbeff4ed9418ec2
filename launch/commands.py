"""Running commands and writing files; a dry run only prints them."""

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

_SHORTEST_SECRET = 6  # characters: masking shorter secrets would garble ordinary output
_INSTALL = {
    "gcloud": "install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install)",
    "xpk": "install it with `pip install xpk`",
    "sbatch": "run this on a login node of the Slurm cluster",
}


class Commands:
    """Runs commands given as argument lists, never through a shell, and prints each as `$ words`.

    Args:
      dry_run: print commands and files without running or writing them.
      secrets: values to mask in everything that is printed, including the output of commands.

    Attributes:
      environment: variables added to the environment of the commands.
    """

    def __init__(self, dry_run: bool, secrets: Iterable[str] = ()):
        self.dry_run = dry_run
        self.environment: dict[str, str] = {}
        self._last_captured: tuple[str, ...] = ()
        maskable = (secret for secret in secrets if len(secret) >= _SHORTEST_SECRET)
        # Longest first, so that a secret that contains another is masked completely.
        self._secrets = sorted(maskable, key=len, reverse=True)

    def mask(self, text: str) -> str:
        """Replaces secrets in the text, plain or quoted for a shell, by `***`."""
        for secret in self._secrets:
            for form in (shlex.quote(secret), secret):
                text = text.replace(form, "***")
        return text

    def say(self, text: str) -> None:
        """Prints the text with secrets masked."""
        print(self.mask(text), flush=True)

    def require(self, *tools: str) -> None:
        """Raises ConfigError if a tool is not installed. A dry run needs none."""
        for tool in tools:
            if not self.dry_run and shutil.which(tool) is None:
                raise ConfigError(f"{tool} is not installed: {_INSTALL[tool]}.")

    def run(self, *command: str, harmless: bool = False) -> int:
        """Runs a command to its end, printing its output line by line.

        Args:
          *command: program and arguments.
          harmless: run it even in a dry run.

        Returns:
          The exit code; 0 in a dry run.
        """
        return self.stream(*command, harmless=harmless)[0]

    def stream(self, *command: str, harmless: bool = False) -> tuple[int, int]:
        """Like `run`, but returns the exit code and the number of lines of standard output."""
        self._last_captured = ()
        self.say(f"$ {shlex.join(command)}")
        if self.dry_run and not harmless:
            return 0, 0
        lines = 0
        with _terminated_on_error(self._start(command)) as process:
            errors = threading.Thread(target=self._print_lines, args=(process.stderr,), daemon=True)
            errors.start()
            for line in process.stdout:
                lines += 1
                self.say(line.rstrip("\n"))
            code = process.wait()
            errors.join(timeout=5)
        return code, lines

    def _start(self, command: Sequence[str]) -> subprocess.Popen:
        # In its own session, the command does not receive Ctrl-C; this process does and terminates it.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True, env={**os.environ, **self.environment},
        )  # fmt: skip

    def _print_lines(self, stream) -> None:
        with contextlib.suppress(ValueError):  # the stream was closed while being read
            for line in stream:
                self.say(line.rstrip("\n"))

    def capture(self, *command: str, assume: str) -> tuple[int, str, str]:
        """Runs a command and captures its output.

        A command that is repeated, to poll a state, is printed only once.

        Args:
          *command: program and arguments.
          assume: standard output to report in a dry run.

        Returns:
          Exit code, standard output and standard error; `(0, assume, '')` in a dry run.
        """
        if self.dry_run or command != self._last_captured:
            self.say(f"$ {shlex.join(command)}")
        self._last_captured = command
        if self.dry_run:
            return 0, assume, ""
        with _terminated_on_error(self._start(command)) as process:
            out, err = process.communicate()
        return process.returncode, out.strip(), err.strip()

    def make_directory(self, path: pathlib.Path) -> None:
        """Creates an empty directory that only the user can access, replacing an existing one."""
        if self.dry_run:
            return
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True, mode=0o700)

    def write(self, path: pathlib.Path, text: str, mode: int = 0o600, shown: str | None = None) -> None:
        """Writes a file with permissions `mode`.

        A dry run prints `shown` instead, by default the text itself.
        """
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
        """Copies a file; a dry run prints the names."""
        if self.dry_run:
            self.say(f"# file {path} (copy of {source})")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)


@contextlib.contextmanager
def _terminated_on_error(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """Sends SIGTERM to the process group if the block raises, including on Ctrl-C."""
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
