"""`python -m gptjax` is `gptjax`."""

from gptjax.cli.importing import process
from gptjax.cli.main import main


def command() -> None:
    """The command `gptjax`, in a process of its own."""
    process(main)


if __name__ == "__main__":
    command()
