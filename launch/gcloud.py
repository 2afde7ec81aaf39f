"""Runs gcloud and reports what happens."""

import subprocess
import sys
import time

ANSWER = "gptjax-done"


class Unreachable(Exception):
    """A gcloud command failed: the machine, the network or the request. The text is the end of gcloud's stderr."""


def say(text: str) -> None:
    """Prints a line of the launcher to stderr; stdout carries the log of the run."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


class Gcloud:
    at_once = 4  # commands

    def run(self, command: list[str], answers: int = 0) -> str:
        """Returns the stdout of a command without the ANSWER lines.

        Raises: Unreachable if the command fails or prints fewer than `answers` ANSWER lines.
        """
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise Unreachable(last_words(done.stderr) or f"exit code {done.returncode}")
        lines = done.stdout.splitlines(keepends=True)
        others = [line for line in lines if line.rstrip() != ANSWER]
        if len(lines) - len(others) < answers:
            raise Unreachable(f"{len(lines) - len(others)} of {answers} workers did it: {last_words(done.stderr)}")
        return "".join(others)

    def stream(self, command: list[str]) -> tuple[int, int]:
        """Passes a command's stdout on as it comes. Returns (exit code, bytes)."""
        count = 0
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            while chunk := process.stdout.read1():
                count += len(chunk)
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
        return process.returncode, count

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def last_words(stderr: str) -> str:
    """Returns the lines from gcloud's ERROR on, or else the last three, joined to one line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    error = next((number for number, line in enumerate(lines) if line.startswith("ERROR")), -3)
    return " ".join(lines[error:])
