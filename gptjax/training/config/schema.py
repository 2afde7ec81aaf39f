"""The Config: the sections of all packages, checked together before anything is computed.

Config files and the command line use a locked `ConfigDict` (`default()`), so an unknown key fails where it is
written. The program uses a tree of frozen dataclasses (`parse()`). This file and the sections import no JAX, so that
a mistake is refused before JAX is loaded.
"""

import dataclasses
import json
import math
from typing import TYPE_CHECKING, cast

from ml_collections import ConfigDict

from gptjax.checkpoints.config import CheckpointConfig
from gptjax.data.cleaning import pipeline
from gptjax.data.cleaning.pipeline import CleanConfig
from gptjax.data.sources.documents import DataConfig
from gptjax.data.stream import augment, curriculum, packing
from gptjax.data.stream.augment import AugmentConfig
from gptjax.data.stream.curriculum import CurriculumConfig, Phase
from gptjax.data.stream.mixture import MixtureConfig
from gptjax.data.stream.packing import PackingConfig
from gptjax.errors import Refused, shown
from gptjax.evaluation import config as tasks
from gptjax.evaluation.config import TasksConfig
from gptjax.models import build
from gptjax.models.config import ModelConfig
from gptjax.models.sections import LoraConfig, LossConfig, check_lora
from gptjax.parallel.config import MeshConfig
from gptjax.parallel.xla import options
from gptjax.runtime.files import flatten, user_path
from gptjax.runtime.watchdog import WatchdogConfig
from gptjax.tokenizers.tokenizer import TokenizerConfig, special_names
from gptjax.training.config import synonyms
from gptjax.training.monitoring import early_stopping
from gptjax.training.monitoring.config import RecoveryConfig, check_recovery
from gptjax.training.monitoring.early_stopping import StoppingConfig
from gptjax.training.optim import config as optimizer
from gptjax.training.optim.config import OptimizerConfig

if TYPE_CHECKING:  # configs are parsed before JAX is imported
    import jax


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    seed: int = 0  # of the initial weights, dropout and the order of the data
    num_steps: int = 1000  # updates of the whole run
    batch_size: int = 32  # sequences in the whole update, over all devices
    seq_len: int = 256  # tokens in a sequence
    grad_accum_steps: int = 1  # micro-batches that an update is summed from
    log_every: int = 10  # steps between two rows of metrics
    eval_every: int = 200  # steps between two evaluations
    eval_batches: int = 0  # an evaluation reads this × batch_size held-out sequences; 0 is all
    checkpoint_every: int = 200  # steps between two checkpoints
    tracker: str = ""  # a tracker that gets the rows too: wandb, or package.module:function
    num_samples: int = 2  # texts that a finished run writes to samples.txt
    sample_prompt: str = ""  # text that the samples continue; cut to its end if longer than half a sequence
    init_from: str = ""  # workdir whose model a new run starts from; empty: random weights
    init_step: int = -1  # checkpoint of init_from; -1 is the newest
    compiler_options: str = ""  # XLA options for the train step: xla_NAME=VALUE …
    lora: LoraConfig = LoraConfig()
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    clean: CleanConfig = CleanConfig()
    mixture: MixtureConfig = MixtureConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    packing: PackingConfig = PackingConfig()
    augment: AugmentConfig = AugmentConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tasks: TasksConfig = TasksConfig()
    stopping: StoppingConfig = StoppingConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    watchdog: WatchdogConfig = WatchdogConfig()

    @property
    def micro_batch_size(self) -> int:
        """Sequences in one forward and backward pass, over all devices."""
        return self.batch_size // self.grad_accum_steps

    @property
    def phases(self) -> list[Phase]:
        """The phases of a new run of this config, in order."""
        return curriculum.phases(self.mixture, self.curriculum, self.seq_len, self.batch_size)

    @property
    def largest(self) -> "Config":
        """This config with the batch of the phase that has the most tokens per step."""
        return self.at(max(self.phases, key=lambda phase: phase.batch_size * phase.seq_len))

    def at(self, phase: Phase) -> "Config":
        """This config with the batch of a phase, and without a curriculum."""
        return dataclasses.replace(
            self, seq_len=phase.seq_len, batch_size=phase.batch_size, curriculum=CurriculumConfig()
        )


# Keys in the config.json of earlier versions that never changed the computed function. They are ignored, so that old
# checkpoints stay readable.
RETIRED_KEYS = ("model.isolate_products",)

# Keys that are a path; those of mixture.stores are read by mixture.folders.
PATHS = ("init_from", "data.path", "data.store", "clean.blocked_words", "tokenizer.path", "tasks.folder")

MAX_JSON_BYTES = 1 << 20  # of a config.json


def default() -> ConfigDict:
    """The defaults as a ConfigDict that knows its keys and their types."""
    return ConfigDict(dataclasses.asdict(Config())).lock()


def parse(config) -> Config:
    """The frozen, checked, resolved Config of a ConfigDict or a dict. Raises: Refused."""
    return resolve(_build(Config, config, ""))


def _build(kind, values, prefix):
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(values, (dict, ConfigDict)):
        raise Refused(f"{prefix.removesuffix('.') or 'config'}={shown(values)} must be a section of keys.")
    made = {}
    for key, value in values.items():
        if prefix + str(key) in RETIRED_KEYS:
            continue
        if key not in fields:
            keys = flatten(dataclasses.asdict(Config()))
            raise Refused(f'unknown key "{prefix}{key}".{synonyms.hint(prefix + str(key), keys)}')
        expected = cast(type, fields[key].type)  # a class, never a text: no section quotes its annotations
        if prefix + str(key) == "model":
            expected = build.architecture(value)
        if dataclasses.is_dataclass(expected):
            made[key] = _build(expected, value, f"{prefix}{key}.")
        elif type(value) is int and value.bit_length() > 63:
            raise Refused(f"{prefix}{key} must have at most 63 bits; found {value.bit_length()}.")
        elif expected is float and type(value) is int:
            made[key] = float(value)
        elif type(value) is not expected:
            raise Refused(f"{prefix}{key}={shown(value)} must be of type {expected.__name__}.")
        elif isinstance(value, str) and not _is_text(value):
            raise Refused(f"{prefix}{key}={shown(value)} must be UTF-8 text without NUL.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise Refused(f"{prefix}{key}={value} must be a finite number.")
        else:
            made[key] = user_path(cast(str, value)) if prefix + str(key) in PATHS else value
    return kind(**made)


def _is_text(value: str) -> bool:
    """Whether a text can be printed, encoded and used in a path."""
    return not any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value)


def resolve(config: Config) -> Config:
    """Checks values across sections and fills in derived values. Raises: Refused."""
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
    if config.num_steps >= 1 << 31:
        raise Refused(f"num_steps={config.num_steps} must be at most {(1 << 31) - 1}, the largest step.")
    for key in ("seed", "eval_batches", "num_samples"):
        if getattr(config, key) < 0:
            raise Refused(f"{key}={getattr(config, key)} must not be negative.")
    if config.seed >= 1 << 32:
        raise Refused(f"seed={config.seed} must be below {1 << 32}: a JAX key has 32 bits.")
    if config.checkpoint.keep < 1:
        raise Refused(f"checkpoint.keep={config.checkpoint.keep} must be at least 1: a run resumes from the newest.")
    for key in ("checkpoint.keep_every", "checkpoint.write_seconds", "loss.z_loss"):
        value = flatten(dataclasses.asdict(config))[key]
        if value < 0:
            raise Refused(f"{key}={value} must not be negative.")
    for key in ("watchdog.silent_seconds", "watchdog.step_seconds", "watchdog.phase_seconds"):
        value = flatten(dataclasses.asdict(config))[key]
        if value < 2:
            raise Refused(f"{key}={value} must be at least 2: processes send a beat once a second.")
    for phase in (config, *config.phases):
        if config.loss.num_chunks < 1 or phase.seq_len % config.loss.num_chunks:
            raise Refused(
                f"seq_len={phase.seq_len} is not divisible by loss.num_chunks={config.loss.num_chunks}: choose a "
                "divisor."
            )
        if phase.batch_size % config.grad_accum_steps:
            raise Refused(
                f"batch_size={phase.batch_size} is not divisible by grad_accum_steps="
                f"{config.grad_accum_steps}: change one of them."
            )
    if config.mixture.stores and config.data.store:
        raise Refused(
            f"data.store={config.data.store} and mixture.stores={config.mixture.stores} are both set: leave data.store "
            "empty, and name it in the mixture."
        )
    if config.init_step < -1 or (config.init_step >= 0 and not config.init_from):
        raise Refused(
            f"init_step={config.init_step} must be a checkpoint of a workdir in init_from, or -1 for the newest; found "
            f'init_from="{config.init_from}".'
        )
    if config.init_from and config.tokenizer.kind != "byte" and not config.tokenizer.path:
        tokenizer = dataclasses.replace(config.tokenizer, path=f"{config.init_from.rstrip('/')}/tokenizer")
        config = dataclasses.replace(config, tokenizer=tokenizer)
    if config.data.prompt_field and config.clean.steps():
        raise Refused(
            f"data.prompt_field={config.data.prompt_field} and clean.{config.clean.steps()[0]} are both set, and "
            "cleaning would not know where prompts end: turn cleaning off."
        )
    options.options(config.compiler_options)
    check_lora(config.lora, config.init_from)
    optimizer.check(config.optimizer, config.num_steps)
    if config.model.mup_base_width and config.optimizer.name == "adafactor":
        raise Refused(
            f"model.mup_base_width={config.model.mup_base_width} with optimizer.name=adafactor: adafactor has no rule "
            "for its rate by width; choose adamw, lion or muon."
        )
    tasks.check(config.tasks)
    early_stopping.check(config.stopping)
    check_recovery(config.recovery)
    pipeline.check(config.clean)
    packing.check(config.packing)
    augment.check(config.augment)
    if not config.tokenizer.path and not config.mixture.stores:  # otherwise the tokenizer may have more special tokens
        augment.check_special(config.augment, special_names(config.tokenizer.special_tokens))
    return config


def check_batch(config: Config, mesh: "jax.sharding.Mesh") -> None:
    """Checks that the batch of every phase divides over the mesh. Raises: Refused."""
    for phase in config.phases:
        _check_batch(config.at(phase), mesh)


def _check_batch(config: Config, mesh: "jax.sharding.Mesh") -> None:
    from gptjax.parallel import batches

    shards = batches.row_shards(mesh)
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
