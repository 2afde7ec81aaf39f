"""The parser of the command line, and flags that several commands share."""

import argparse

from gptjax.errors import Refused

WEIGHTS = {
    "choices": ("float", "int8"),
    "default": "float",
    "help": "int8 keeps them in a quarter of float32's bytes, rounded",
}


class Parser(argparse.ArgumentParser):
    """One whose complaints are refusals like any other."""

    def error(self, message: str):
        raise Refused(f"{message}: see {self.prog} --help.")


def step(text: str) -> int | str:
    """A checkpoint, by its step or as the one with the lowest held-out loss."""
    return text if text == "best" else int(text)
