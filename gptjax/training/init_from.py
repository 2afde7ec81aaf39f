"""Starts a new run from the weights of another run or of a converted model.

Only the evaluated weights are taken: the moving average if there is one. Data, schedule, optimizer and steps belong to
the new run. Once the run has a checkpoint, `init_from` is no longer read.
"""

import dataclasses
import functools

import jax
from etils import epath

from gptjax.checkpoints.manager import Checkpoints
from gptjax.checkpoints.record import RunRecord
from gptjax.data.stream import mixture
from gptjax.errors import Refused
from gptjax.models.config import padded_vocab
from gptjax.runtime import distributed
from gptjax.tokenizers import tokenizer
from gptjax.tokenizers.exact import RESERVED
from gptjax.training import loading, workdir
from gptjax.training import step as update
from gptjax.training.config import schema
from gptjax.training.config.schema import Config
from gptjax.training.step import TrainState

# Model keys that may differ from the source run, because they do not change what the weights compute.
FREE = {"dropout", "remat", "scan_unroll", "dtype", "param_dtype"}


def check(config: Config, folder: epath.Path) -> None:
    """Checks `init_from` before a run in `folder` writes or computes anything. Raises: Refused."""
    if config.init_from and not Checkpoints(folder / "checkpoints").steps():
        with _checkpoints(config) as checkpoints:
            _chosen(config, checkpoints)


def begin(config: Config, vocab_size: int, mesh: jax.sharding.Mesh) -> TrainState:
    """The state of step 0 with the weights of `init_from`, placed on the mesh in use, whatever mesh saved them.

    Raises: Refused.
    """
    with _checkpoints(config) as checkpoints:
        step, source = _chosen(config, checkpoints)
        source = dataclasses.replace(source, model=config.model, seq_len=config.seq_len)
        model = loading.restore_model(checkpoints, step, source, vocab_size, mesh)
    # If the source has adapters, the merged weights are in float32.
    model = jax.tree.map(lambda weight: weight.astype(config.model.param_dtype), model)
    print(f"beginning with the weights of step {step} of {config.init_from}", flush=True)
    state = jax.jit(functools.partial(update.new_state, config), donate_argnums=0)(model)
    if config.lora.rank:
        count = sum(leaf.size for leaf in jax.tree.leaves(state.model))
        print(f"training adapters of {count / 1e6:.2f}M parameters", flush=True)
    return state


def _checkpoints(config: Config) -> Checkpoints:
    with distributed.together():
        workdir.read_config(epath.Path(config.init_from))  # refuses a folder that is not a workdir
    return Checkpoints(epath.Path(config.init_from) / "checkpoints")


def _chosen(config: Config, checkpoints: Checkpoints) -> tuple[int, Config]:
    """The step of `init_from` that a run can begin with, and the config that saved it. Raises: Refused."""
    step = checkpoints.choose(config.init_step)
    record = checkpoints.record(step)
    with distributed.together():
        source = schema.parse(record.config)
        _check_model(config, source)
        _check_tokenizer(config, record, step)
    return step, source


def _check_model(config: Config, source: Config) -> None:
    there, here = dataclasses.asdict(source.model), dataclasses.asdict(config.model)
    differing = [f"model.{key} ({there[key]} there, {here[key]} here)" for key in sorted(here.keys() - FREE)
                 if there[key] != here[key]]  # fmt: skip
    if differing:
        raise Refused(
            f"init_from={config.init_from} has another model, {', '.join(differing)}: use its values, as "
            f"--config={config.init_from}/config.json does."
        )
    if source.model.positions == "learned" and config.seq_len > source.seq_len:
        raise Refused(
            f"seq_len={config.seq_len} is more than the {source.seq_len} positions that the model of init_from="
            f"{config.init_from} has learned: use at most as many."
        )


def _check_tokenizer(config: Config, record: RunRecord, step: int) -> None:
    """A text must have the tokens that the model learned; each new token id must have a row in the embedding."""
    if config.mixture.stores:
        where = next(iter(mixture.folders(config.mixture.stores).values())) / "tokenizer"
        files = tokenizer.read_files(where)
    else:
        tokenizer.check(config.tokenizer)
        where, files = "the section tokenizer", tokenizer.given(config.tokenizer)
    here = tokenizer.from_files(files, str(where))
    there = loading.saved_tokenizer(record, f"{config.init_from} (step {step})")
    # tokenizer.json names the special tokens; the new run may have added some.
    same_files = files | {"tokenizer.json": b""} == record.tokenizer | {"tokenizer.json": b""}
    kept = all(here.special.get(name) == id for name, id in there.special.items() if not RESERVED.fullmatch(name))
    if not (same_files and kept):
        raise Refused(
            f"init_from={config.init_from} was trained with tokenizer {there.hash[:12]}, and {where} has "
            f"{here.hash[:12]}: use {config.init_from}/tokenizer, as an empty tokenizer.path does."
        )
    if here.vocab_size > padded_vocab(there.vocab_size):
        raise Refused(
            f"tokenizer.special_tokens={config.tokenizer.special_tokens} makes {here.vocab_size} ids, and the "
            f"embedding of init_from={config.init_from} has {padded_vocab(there.vocab_size)} rows: name fewer."
        )
