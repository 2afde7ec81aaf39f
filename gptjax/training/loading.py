"""Loads the model of a checkpoint."""

import jax
from etils import epath

from gptjax.checkpoints import retention
from gptjax.checkpoints.manager import Checkpoints
from gptjax.checkpoints.record import REMEDY, RunRecord
from gptjax.errors import Refused
from gptjax.inference.model import Run
from gptjax.models.build import abstract_model, check_divides
from gptjax.models.interface import LanguageModel
from gptjax.models.lora import Adapters, merged
from gptjax.parallel.mesh import MeshConfig, devices, make_mesh
from gptjax.parallel.trees import placed
from gptjax.runtime import distributed
from gptjax.tokenizers import tokenizer
from gptjax.training.config import schema
from gptjax.training.config.schema import Config
from gptjax.training.workdir import losses, read_config


def saved_tokenizer(record: RunRecord, where: str) -> tokenizer.Tokenizer:
    """The tokenizer that a checkpoint brings. Raises: Refused."""
    if not record.tokenizer:
        raise Refused(f"{where} brings no tokenizer: {REMEDY}.")
    found = tokenizer.hash_of(record.tokenizer)
    if found != record.tokenizer_hash:
        raise Refused(
            f"{where} brings tokenizer {found[:12]}, but was trained with {record.tokenizer_hash[:12]}: {REMEDY}."
        )
    return tokenizer.from_files(record.tokenizer, where)


def chosen(checkpoints: Checkpoints, folder: epath.Path, step: int | str) -> int:
    """Chooses a checkpoint that verifies.

    Args:
      checkpoints: the checkpoints of a run.
      folder: the run's workdir.
      step: a step, -1 for the newest, or "best" for the lowest held-out loss.

    Raises: Refused.
    """
    if step != "best":
        return checkpoints.choose(step)
    steps = checkpoints.steps()
    best = retention.best(losses(folder), steps)
    if steps and not best:
        raise Refused(
            f"{folder / 'metrics.jsonl'} has no held-out loss for any step with a checkpoint: instead of best, give a "
            f"step among {', '.join(map(str, steps))}."
        )
    return checkpoints.choose(best)


def load(folder: epath.Path, step: int | str) -> Run:
    """Loads the model of a checkpoint, whose `step` is as in `chosen`. Raises: Refused."""
    with distributed.together():
        latest = read_config(folder)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        step = chosen(checkpoints, folder, step)
        record = checkpoints.record(step)
        config = schema.parse(record.config)
        known = saved_tokenizer(record, f"{checkpoints.folder} (step {step})")
        mesh = mesh_that_fits(config, known.vocab_size)
        with jax.set_mesh(mesh):
            model = restore_model(checkpoints, step, config, known.vocab_size, mesh)
    return Run(config, step, mesh, model, known, schema.parse(latest))


def restore_model(
    checkpoints: Checkpoints, step: int, config: Config, vocab_size: int, mesh: jax.sharding.Mesh
) -> LanguageModel:
    """Restores the weights that are evaluated, placed on the mesh in use.

    Args:
      checkpoints: the checkpoints of a run.
      step: the step to restore.
      config: the config saved with the step. With learned positions, a shorter seq_len uses the first rows.
      vocab_size: the vocabulary size of the run.
      mesh: the mesh in use.

    Raises: Refused.
    """
    part = "ema" if config.optimizer.ema_decay else "model"
    shapes = {part: abstract_model(config.model, vocab_size, config.seq_len)}
    if config.lora.rank:
        adapters = jax.eval_shape(lambda model: Adapters(model, config.lora, 0), shapes[part])
        shapes = {"base": shapes[part], part: adapters}
    found = checkpoints.restore(step, placed(shapes, mesh), cut=[f"{name}.positions" for name in shapes])
    return merged(found["base"], found[part]) if config.lora.rank else found[part]


def mesh_that_fits(config: Config, vocab_size: int) -> jax.sharding.Mesh:
    """The mesh of the run. On other devices the model is cut over all, or whole on each if it does not divide."""
    for axes in (config.mesh, MeshConfig()):
        try:
            mesh = make_mesh(axes, devices())
            check_divides(config.model, vocab_size, config.seq_len, mesh)
            return mesh
        except Refused:
            continue
    return make_mesh(MeshConfig(data=-1, fsdp=1), devices())
