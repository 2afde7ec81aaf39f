"""Packages that only some sources, settings and verbs need; `pip install 'gptjax[EXTRA]'` brings them."""

import importlib
from types import ModuleType

from gptjax.errors import Refused


def package(name: str, what: str, extra: str = "data") -> ModuleType:
    """The module `name`, imported when it is first asked for. Raises: Refused, where it is not installed.

    Args:
      what: what needs it, as a key and value, or a command. extra: that of pyproject.toml which has it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refused(f"{what} needs more packages than there are ({error}): pip install 'gptjax[{extra}]'.") from error
