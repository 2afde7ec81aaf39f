"""Packages that only some sources, settings and commands need; `pip install 'gptjax[EXTRA]'` installs them."""

import importlib
from types import ModuleType

from gptjax.errors import Refused


def package(name: str, what: str, extra: str = "data") -> ModuleType:
    """Imports a module on first use. Raises: Refused, if a package is not installed.

    Args:
      name: the module.
      what: the key and value, or the command, that needs the module.
      extra: the extra of pyproject.toml that has the package.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refused(
            f"{what} needs packages that are not installed ({error}): pip install 'gptjax[{extra}]'."
        ) from error
