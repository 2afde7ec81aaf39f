"""Reads the space of a sweep: the `get_space()` of a Python file gives a range or choices for keys of the config.

def get_space():
    return {
        "optimizer.peak_learning_rate": ("log", 1e-3, 1e-1),
        "optimizer.weight_decay": ("linear", 0.0, 0.2),
        "model.num_layers": [2, 4, 6],
    }
"""

import itertools
import math
import runpy

from etils import epath
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from gptjax.errors import Refused, nearest, shown
from gptjax.runtime import files
from gptjax.training.config import schema, synonyms
from gptjax.training.config.files import beside

# These make the store that all trials share; with another, a loss is of another text or in another unit.
SHARED = ("data.", "clean.", "tokenizer.", "mixture.stores")
MAX_GRID = 10_000  # points


def load(path: str) -> dict[str, BaseDistribution]:
    """Reads the space of a file. Raises: Refused, for an unusable file, key, type or range."""
    if not epath.Path(path).is_file():
        names = [p.name for p in files.listed(epath.Path(path).parent, ".py")]
        raise Refused(f"--space={path} does not exist.{nearest(epath.Path(path).name, names)}")
    try:
        with beside(path):
            module = runpy.run_path(path)
            space = module["get_space"]() if "get_space" in module else None
    except (Exception, SystemExit) as error:  # whatever a user's file raises is a fault of the file
        raise Refused(f"{path}: {type(error).__name__}: {' '.join(str(error)[:2000].split())}.") from error
    if "get_space" not in module:
        raise Refused(
            f'{path} has no get_space(): define one that returns a dict such as {{"model.num_layers": [2, 4]}}.'
        )
    if not isinstance(space, dict) or not space:
        raise Refused(f"get_space() of {path} returns {shown(space)}: return a dict of at least one key of the config.")
    defaults = files.flatten(schema.default())
    return {key: _distribution(path, key, values, defaults) for key, values in space.items()}


def _distribution(path: str, key: str, values, defaults: dict[str, object]) -> BaseDistribution:
    if key not in defaults:
        inside = [known for known in defaults if isinstance(key, str) and known.startswith(key + ".")]
        hint = f" It is a section: name {inside[0]}, for example." if inside else synonyms.hint(str(key), defaults)
        raise Refused(f"{path}: {shown(key)} must be a key of the config.{hint}")
    if key.startswith(SHARED):
        raise Refused(
            f"{path}: {key} makes the tokens that all trials share, and losses on others can't be compared: leave it "
            "out, and give it as --config.KEY=VALUE."
        )
    kind = type(defaults[key])
    if isinstance(values, list):
        return _choices(f"{path}: {key}", values, kind)
    if isinstance(values, tuple) and len(values) == 3 and values[0] in ("log", "linear"):
        return _range(f"{path}: {key}", *values, kind)
    raise Refused(
        f'{path}: {key} is {shown(values)}: write ("log", LOW, HIGH) or ("linear", LOW, HIGH) for a range, or a list '
        "of values to choose from."
    )


def _value(where: str, value, kind: type):
    """Checks a value against the type of the key."""
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise Refused(f"{where} must have values of type {kind.__name__}; found {shown(value)}.")
    return value


def _choices(where: str, values: list, kind: type) -> CategoricalDistribution:
    values = [_value(where, value, kind) for value in values]
    if not values:
        raise Refused(f"{where} must be a list of at least one value; found an empty list.")
    if len(set(values)) < len(values):
        raise Refused(f"{where} has a value twice in {shown(values)}: name each once.")
    return CategoricalDistribution(values)


def _range(where: str, scale: str, low, high, kind: type) -> FloatDistribution | IntDistribution:
    if kind not in (int, float):
        raise Refused(f"{where} is of type {kind.__name__}, which has no ranges: give a list of values.")
    low, high = _value(where, low, kind), _value(where, high, kind)
    if low >= high:
        raise Refused(f"{where} must have LOW below HIGH; found {low} and {high}.")
    if scale == "log" and low <= 0:
        raise Refused(f'{where} must have LOW above 0 for "log"; found {low}; raise LOW, or write "linear".')
    return {int: IntDistribution, float: FloatDistribution}[kind](low, high, log=scale == "log")


def grid(path: str, space: dict[str, BaseDistribution]) -> list[dict]:
    """Returns every combination of the choices; the last key changes fastest. Raises: Refused, for ranges."""
    ranges = [key for key, values in space.items() if not isinstance(values, CategoricalDistribution)]
    if ranges:
        raise Refused(
            f"{path}: {ranges[0]} is a range, and a grid takes lists of values: write one, or use another --sampler."
        )
    size = math.prod(len(values.choices) for values in space.values())
    if size > MAX_GRID:
        raise Refused(f"{path} has {size:,} combinations, and a grid at most {MAX_GRID:,}: use another --sampler.")
    return [
        dict(zip(space, point, strict=True))
        for point in itertools.product(*(values.choices for values in space.values()))
    ]


def described(space: dict[str, BaseDistribution]) -> dict[str, list]:
    """Returns the space as JSON values, in the form of the file."""
    return {
        key: list(values.choices)
        if isinstance(values, CategoricalDistribution)
        else ["log" if values.log else "linear", values.low, values.high]
        for key, values in space.items()
    }


def contains(space: dict[str, BaseDistribution], point: dict[str, object]) -> bool:
    """Tells whether a point, given as values by key, lies in the space."""
    return all(
        point[key] in values.choices
        if isinstance(values, CategoricalDistribution)
        else values.low <= point[key] <= values.high
        for key, values in space.items()
    )
