"""Reads the config files of users and runs, and writes config files that change keys of others."""

import contextlib
import dataclasses
import inspect
import math
import os
import pathlib
import re
import runpy
import sys
from typing import cast

from etils import epath
from ml_collections import ConfigDict

from gptjax.errors import Refused, nearest
from gptjax.runtime import untrusted
from gptjax.runtime.files import flatten, listed, write_whole
from gptjax.training.config import synonyms
from gptjax.training.config.schema import MAX_JSON_BYTES, Config, default, parse


def split(path: str) -> tuple[str, list[str]]:
    """Splits FILE[:ARGUMENT…], the value of --config, into the file and the arguments of get_config(), all texts."""
    file, dot, arguments = path.partition(".py:")
    return (f"{file}.py", arguments.split(":")) if dot else (path, [])


def load(path: str, overrides: dict[str, str]) -> Config:
    """The Config of a file, with `KEY: TEXT` overrides from the command line.

    Args:
      path: a Python file with a `get_config()`, and arguments, as in `split`; or the config.json of a run, for a new
        run like that run.
      overrides: texts by key.

    Raises:
      Refused: for a file that is missing or broken, too few or too many arguments, an unknown key, or a value of the
        wrong type.
    """
    path, arguments = split(path)
    if not epath.Path(path).is_file():
        names = [p.name for p in listed(epath.Path(path).parent, ".py")]
        raise Refused(f"--config={path} does not exist.{nearest(epath.Path(path).name, names)}")
    config = _of_run(path) if path.endswith(".json") else _of_module(path, arguments)
    for key, text in overrides.items():
        override(config, key, text)
    return parse(config)


def _of_run(path: str) -> ConfigDict:
    values = untrusted.read_json(epath.Path(path), MAX_JSON_BYTES, "give a config.json that a run wrote")
    try:
        return ConfigDict(dataclasses.asdict(parse(values))).lock()
    except Refused as refusal:
        raise Refused(f"{path}: {refusal}") from refusal


def _of_module(path: str, arguments: list[str]) -> ConfigDict:
    try:
        with beside(path):
            module = runpy.run_path(path)
            _check_arguments(path, module.get("get_config"), arguments)
            config = module["get_config"](*arguments) if "get_config" in module else None
    except Refused:
        raise
    except (Exception, SystemExit) as error:  # any exception in a user's file is a fault of the file
        raise Refused(f"{path}: {_fault(error)}") from error
    if "get_config" not in module:
        raise Refused(
            f"{path} has no get_config(): define one that returns gptjax.config.default() with its own values."
        )
    if not isinstance(config, ConfigDict):
        raise Refused(
            f"get_config() of {path} returns a {type(config).__name__}: return gptjax.config.default() with "
            "its own values."
        )
    return config


@contextlib.contextmanager
def beside(path: str):
    """Context manager in which a Python file can import its neighbours, as a script can.

    Afterwards they are forgotten: a file in another folder may have neighbours of the same names.
    """
    folder, known = os.path.dirname(os.path.abspath(path)), set(sys.modules)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - known:
            if os.path.dirname(getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
                del sys.modules[name]


def _check_arguments(path: str, get_config, arguments: list[str]) -> None:
    """Raises: Refused, if get_config() takes fewer or more arguments than were given."""
    parameters = inspect.signature(get_config).parameters.values() if callable(get_config) else []
    needed = [each.name.upper() for each in parameters if each.default is each.empty]
    if not len(needed) <= len(arguments) <= len(parameters):
        form = ":".join([path, *needed]) + "".join(
            f"[:{each.name.upper()}]" for each in list(parameters)[len(needed) :]
        )
        raise Refused(f"--config={':'.join([path, *arguments])} has {len(arguments)} arguments: write --config={form}.")


def _fault(error: BaseException) -> str:
    """The fault in a config file, from an exception; ConfigDict's own message lists every field of the section."""
    text = str(error)[:2000]  # the patterns below are slow on long texts
    unknown = re.search(r'Key "(\w+)" does not exist', text) or re.fullmatch(r"\W*(\w+)\W*(nDid you mean.*)?", text)
    if unknown and isinstance(error, (AttributeError, KeyError)):
        return f'unknown key "{unknown[1]}".{synonyms.hint(unknown[1], flatten(default()))}'
    mistyped = re.search(r"override field '(\w+)' .*\. (.*) is of original type .* type <class '.*?(\w+)'>", text)
    if mistyped:
        return f"{mistyped[1]}={mistyped[2]} must be of type {mistyped[3]}."
    return f"{type(error).__name__}: {' '.join(text.split())}."


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets `config.KEY` from a text of the command line, read as the type of the key.

    Raises: Refused.
    """
    keys = flatten(config)
    if key not in keys:
        inside = [k for k in keys if k.startswith(key + ".")]
        hint = f" It is a section: set {inside[0]}, for example." if inside else synonyms.hint(key, keys)
        raise Refused(f"--config.{key} is unknown.{hint}")
    old = keys[key]
    read = {str: str, int: lambda text: int(text, 0), float: _finite, bool: {"true": True, "false": False}.__getitem__}
    try:
        value = read[type(old)](text.lower() if type(old) is bool else text)
    except (KeyError, ValueError) as error:
        raise Refused(f"--config.{key}={text} must be of type {type(old).__name__}: the default is {old!r}.") from error
    section, _, name = key.rpartition(".")
    target = config
    for part in section.split(".") if section else ():
        target = cast(ConfigDict, target[part])  # `section` comes from a flat key, so every part is a section
    target[name] = value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def write(path: pathlib.Path, original: str, docstring: str, values: dict[str, object]) -> None:
    """Writes a config file that is `original` (as in `split`) with these values by key, whole or not at all."""
    file, arguments = split(original)
    lines = "".join(f"    config.{key} = {value!r}\n" for key, value in values.items())
    text = (
        f'"""{docstring}"""\n\nimport runpy\n\n\ndef get_config():\n'
        f'    config = runpy.run_path({str(pathlib.Path(file).resolve())!r})["get_config"](*{arguments!r})\n'
        f"{lines}    return config\n"
    )
    write_whole(path, text.encode())
