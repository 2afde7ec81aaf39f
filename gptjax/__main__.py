"""`python -m gptjax` is `gptjax`."""

from gptjax.cli import main

main()
