"""`python -m gptjax` is `gptjax`."""

from gptjax.cli.main import main

main()
