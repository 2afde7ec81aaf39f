"""A new run that begins with a model that there is: of another run, or converted.

Only weights come over, those that are evaluated (the moving average where there is one). Data, schedule, optimizer and
steps are the new run's own, and once it has a checkpoint, `init_from` is looked at no more.
"""

import base64
import dataclasses
import functools

import jax
from etils import epath

from gptjax.checkpoints.manager import Checkpoints
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

# What a model may be trained with otherwise: the same weights, with these, are the same function of a text.
FREE = {"dropout", "remat", "scan_unroll", "dtype", "param_dtype"}


def check(config: Config, folder: epath.Path) -> None:
    """What of `init_from` can be refused before a run in `folder` writes or computes anything. Raises: Refused."""
    if config.init_from and not Checkpoints(folder / "checkpoints").steps():
        with _checkpoints(config) as checkpoints:
            _chosen(config, checkpoints)


def begin(config: Config, vocab_size: int, mesh: jax.sharding.Mesh) -> TrainState:
    """The state of step 0 with the weights of `init_from`, placed on the mesh in use, whatever the one there was.

    Raises: Refused.
    """
    with _checkpoints(config) as checkpoints:
        step, its = _chosen(config, checkpoints)
        its = dataclasses.replace(its, model=config.model, seq_len=config.seq_len)
        model = loading.restore_model(checkpoints, step, its, vocab_size, mesh)
    # Of a run with adapters the sums are in float32.
    model = jax.tree.map(lambda weight: weight.astype(config.model.param_dtype), model)
    print(f"beginning with the weights of step {step} of {config.init_from}", flush=True)
    state = jax.jit(functools.partial(update.new_state, config), donate_argnums=0)(model)
    if config.lora.rank:
        count = sum(leaf.size for leaf in jax.tree.leaves(state.model))
        print(f"training adapters of {count / 1e6:.2f}M parameters", flush=True)
    return state


def _checkpoints(config: Config) -> Checkpoints:
    with distributed.together():
        workdir.read_config(epath.Path(config.init_from))  # by its words where this is no workdir
    return Checkpoints(epath.Path(config.init_from) / "checkpoints")


def _chosen(config: Config, checkpoints: Checkpoints) -> tuple[int, Config]:
    """The step of `init_from` that a run can begin with, and the config that it was trained with. Raises: Refused."""
    step = checkpoints.choose(config.init_step)
    saved = checkpoints.run(step)
    with distributed.together():
        its = schema.parse(saved["config"])
        _check_model(config, its)
        _check_tokenizer(config, saved, step)
    return step, its


def _check_model(config: Config, its: Config) -> None:
    there, here = dataclasses.asdict(its.model), dataclasses.asdict(config.model)
    differing = [f"model.{key} ({there[key]} there, {here[key]} here)" for key in sorted(here.keys() - FREE)
                 if there[key] != here[key]]  # fmt: skip
    if differing:
        raise Refused(
            f"init_from={config.init_from} has another model, {', '.join(differing)}: use its values, as "
            f"--config={config.init_from}/config.json does."
        )
    if its.model.positions == "learned" and config.seq_len > its.seq_len:
        raise Refused(
            f"seq_len={config.seq_len} is more than the {its.seq_len} positions that the model of init_from="
            f"{config.init_from} has learned: use at most as many."
        )


def _check_tokenizer(config: Config, saved: dict, step: int) -> None:
    """A text has the tokens that it had for the model, and ids that it hadn't have rows in its embedding."""
    if config.mixture.stores:
        where = next(iter(mixture.folders(config.mixture.stores).values())) / "tokenizer"
        files = tokenizer.read_files(where)
    else:
        tokenizer.check(config.tokenizer)
        where, files = "the section tokenizer", tokenizer.given(config.tokenizer)
    here = tokenizer.from_files(files, str(where))
    its = loading.saved_tokenizer(saved, f"{config.init_from} (step {step})")
    # What describes a tokenizer names its special tokens, of which there may be more by now.
    new = {name: base64.b64encode(content).decode() for name, content in files.items()} | {"tokenizer.json": ""}
    kept = all(here.special.get(name) == id for name, id in its.special.items() if not RESERVED.fullmatch(name))
    if not kept or new != saved["tokenizer"] | {"tokenizer.json": ""}:
        raise Refused(
            f"init_from={config.init_from} was trained with tokenizer {its.hash[:12]}, and {where} has "
            f"{here.hash[:12]}: use {config.init_from}/tokenizer, as an empty tokenizer.path does."
        )
    if here.vocab_size > padded_vocab(its.vocab_size):
        raise Refused(
            f"tokenizer.special_tokens={config.tokenizer.special_tokens} makes {here.vocab_size} ids, and the embedding "
            f"of init_from={config.init_from} has {padded_vocab(its.vocab_size)} rows: name fewer."
        )
