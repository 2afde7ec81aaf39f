"""One Config: the sections of the rooms that read them, checked together before anything is computed.

Outside, in config files and on the command line, it is a locked `ConfigDict` (`default()`), so an unknown key fails
where it is written. Inside it is a tree of frozen dataclasses (`parse()`).
"""

import ast
import dataclasses
import difflib
import json
import math
import re
import runpy

import jax
from etils import epath
from ml_collections import ConfigDict

from gptjax import optimizer, sharding
from gptjax.checkpoint import CheckpointConfig
from gptjax.data.prepare import DataConfig
from gptjax.errors import Refused, nearest
from gptjax.loss import LossConfig
from gptjax.models.transformer import ModelConfig
from gptjax.optimizer import OptimizerConfig
from gptjax.sharding import MeshConfig
from gptjax.tokenizer import TokenizerConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    seed: int = 0
    num_steps: int = 1000  # updates
    batch_size: int = 32  # sequences in the whole update, over all devices
    seq_len: int = 256  # tokens in a sequence
    grad_accum_steps: int = 1  # micro-batches that an update is summed from
    log_every: int = 10
    eval_every: int = 200
    eval_batches: int = 0  # an evaluation reads this × batch_size held-out sequences; 0 is all
    checkpoint_every: int = 200
    num_samples: int = 2  # texts that a finished run writes
    sample_prompt: str = ""  # what they go on from; of a longer one than half a sequence, its end
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def micro_batch_size(self) -> int:
        """Sequences in one forward and backward pass, over all devices."""
        return self.batch_size // self.grad_accum_steps


# What a run may change when it goes on: neither the parameters, nor the optimizer's state, nor which tokens a step
# sees depends on these. A section stands for all its keys.
FREE_KEYS = (
    "num_steps", "grad_accum_steps", "log_every", "eval_every", "eval_batches", "checkpoint_every", "num_samples", "sample_prompt",
    "mesh", "loss", "checkpoint", "model.dropout", "model.remat", "model.scan_unroll", "model.isolate_products", "model.dtype",
    "optimizer.peak_learning_rate", "optimizer.schedule", "optimizer.warmup_steps", "optimizer.decay_fraction",
    "optimizer.final_fraction", "optimizer.weight_decay", "optimizer.beta1", "optimizer.beta2", "optimizer.eps", "optimizer.clip_norm",
    "optimizer.state_dtype", "optimizer.offload", "data.store",
)  # fmt: skip


def default() -> ConfigDict:
    """The defaults as a ConfigDict that knows its keys and their types."""
    return ConfigDict(dataclasses.asdict(Config())).lock()


def load(path: str, overrides: dict[str, str]) -> Config:
    """The Config of a file's `get_config()`, with `KEY: TEXT` overrides from the command line.

    Raises: Refused, for a file that is missing or broken, an unknown key, or a value of the wrong type.
    """
    if not epath.Path(path).is_file():
        beside = epath.Path(path).parent
        names = [p.name for p in beside.glob("*.py")] if beside.is_dir() else []
        raise Refused(f"--config={path} does not exist.{nearest(epath.Path(path).name, names)}")
    try:
        module = runpy.run_path(path)
        config = module["get_config"]() if "get_config" in module else None
    except Exception as error:  # whatever a user's file raises is a fault of the file
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
    for key, text in overrides.items():
        override(config, key, text)
    return parse(config)


def _fault(error: Exception) -> str:
    """What is wrong with a config file, from an exception; ConfigDict's own lists every field of the section."""
    text = str(error)
    unknown = re.search(r'Key "(\w+)" does not exist', text) or re.fullmatch(r"\W*(\w+)\W*(nDid you mean.*)?", text)
    if unknown and isinstance(error, (AttributeError, KeyError)):
        return f'unknown key "{unknown[1]}".{_nearest_key(unknown[1])}'
    mistyped = re.search(r"override field '(\w+)' .*\. (.*) is of original type .* type <class '.*?(\w+)'>", text)
    if mistyped:
        return f"{mistyped[1]}={mistyped[2]} is not of type {mistyped[3]}."
    return f"{type(error).__name__}: {' '.join(text.split())}."


def _nearest_key(key: str) -> str:
    """A hint at the key, in whatever section, or the section that `key` is probably meant to be."""
    keys = flatten(default())
    sections = {key.partition(".")[0] for key in keys}
    by_name = {key.rpartition(".")[2]: key for key in keys} | dict(zip(sections, sections))
    close = difflib.get_close_matches(key.rpartition(".")[2], list(by_name), n=1)
    return f' Did you mean "{by_name[close[0]]}"?' if close else ""


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets `config.KEY` from the text of a command line, as the type that the key has.

    Raises: Refused.
    """
    keys = flatten(config)
    if key not in keys:
        inside = [k for k in keys if k.startswith(key + ".")]
        hint = f" It is a section: set {inside[0]}, for example." if inside else nearest(key, keys) or _nearest_key(key)
        raise Refused(f"--config.{key} is unknown.{hint}")
    old = keys[key]
    value = text
    if not isinstance(old, str):
        try:
            value = ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
        except (SyntaxError, TypeError, ValueError):
            pass
    if isinstance(old, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(old):
        raise Refused(f"--config.{key}={text} is not of type {type(old).__name__}: its default is {old!r}.")
    section, _, name = key.rpartition(".")
    target = config
    for part in section.split(".") if section else ():
        target = target[part]
    target[name] = value


def flatten(config, prefix: str = "") -> dict[str, object]:
    """Nested keys as dotted ones: {"model.num_layers": 6, …}."""
    flat = {}
    for key, value in config.items():
        nested = isinstance(value, (dict, ConfigDict))
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def parse(config) -> Config:
    """The frozen, checked, resolved Config of a ConfigDict or a dict. Raises: Refused."""
    return resolve(_build(Config, config, ""))


def _build(kind, values, prefix):
    fields = {field.name: field for field in dataclasses.fields(kind)}
    made = {}
    for key, value in values.items():
        if key not in fields:
            raise Refused(f'unknown key "{prefix}{key}".{nearest(key, fields)}')
        expected = fields[key].type
        if dataclasses.is_dataclass(expected):
            made[key] = _build(expected, value, f"{prefix}{key}.")
        elif expected is float and type(value) is int:
            made[key] = float(value)
        elif type(value) is not expected:
            raise Refused(f"{prefix}{key}={value!r} is not of type {expected.__name__}.")
        elif expected is float and not math.isfinite(value):
            raise Refused(f"{prefix}{key}={value} is not a finite number.")
        else:
            made[key] = value
    return kind(**made)


def resolve(config: Config) -> Config:
    """Checks values across sections and works out what is derived. Raises: Refused."""
    config = dataclasses.replace(config, model=config.model.resolved())
    for key in (
        "num_steps",
        "batch_size",
        "seq_len",
        "grad_accum_steps",
        "log_every",
        "eval_every",
        "checkpoint_every",
    ):
        if getattr(config, key) < 1:
            raise Refused(f"{key}={getattr(config, key)} must be at least 1.")
    for key in ("seed", "eval_batches", "num_samples"):
        if getattr(config, key) < 0:
            raise Refused(f"{key}={getattr(config, key)} must not be negative.")
    if config.seed >= 1 << 32:
        raise Refused(f"seed={config.seed} has more than the 32 bits of a JAX key: use one below {1 << 32}.")
    if config.checkpoint.keep < 1:
        raise Refused(f"checkpoint.keep={config.checkpoint.keep} must be at least 1: a run goes on from the newest.")
    for key in ("checkpoint.keep_every", "loss.z_loss"):
        value = flatten(dataclasses.asdict(config))[key]
        if value < 0:
            raise Refused(f"{key}={value} must not be negative.")
    if config.loss.num_chunks < 1 or config.seq_len % config.loss.num_chunks:
        raise Refused(
            f"seq_len={config.seq_len} is not divisible by loss.num_chunks={config.loss.num_chunks}: choose a divisor."
        )
    if config.batch_size % config.grad_accum_steps:
        raise Refused(
            f"batch_size={config.batch_size} is not divisible by grad_accum_steps="
            f"{config.grad_accum_steps}: change one of them."
        )
    optimizer.check(config.optimizer, config.num_steps)
    return config


def check_batch(config: Config, mesh: jax.sharding.Mesh) -> None:
    """The batch divides over the mesh. Raises: Refused."""
    shards = sharding.row_shards(mesh)
    if config.micro_batch_size % shards:
        raise Refused(
            f"A micro-batch of {config.micro_batch_size} sequences (batch_size={config.batch_size} / "
            f"grad_accum_steps={config.grad_accum_steps}) does not divide over the {shards} devices of "
            f"mesh.slices × mesh.data × mesh.fsdp: make batch_size a multiple of {shards * config.grad_accum_steps}."
        )
    if config.seq_len % mesh.shape["tensor"]:
        raise Refused(
            f"seq_len={config.seq_len} is not divisible by mesh.tensor={mesh.shape['tensor']}, over which it is cut "
            "between blocks: change one of them."
        )


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def differences(old: dict, new: Config) -> list[str]:
    """Keys that a run must not change when it goes on, as `key (old there, new here)`.

    Args:
      old: the resolved config that the run was started with, as a dict.
    """

    def bound(key: str) -> bool:
        return not any(key == free or key.startswith(free + ".") for free in FREE_KEYS)

    old, new = flatten(old), flatten(dataclasses.asdict(new))
    # One average of the weights is kept or none; how fast it moves is free.
    for flat in (old, new):
        flat["optimizer.ema_decay"] = "on" if flat.get("optimizer.ema_decay") else "off"
    return [
        f"{key} ({old.get(key, 'not set')} there, {new.get(key, 'not set')} here)"
        for key in sorted(old.keys() | new.keys())
        if bound(key) and old.get(key) != new.get(key)
    ]
