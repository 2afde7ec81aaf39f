"""Loads the model of a checkpoint."""

import base64

import jax
from etils import epath

from gptjax.checkpoints import retention
from gptjax.checkpoints.manager import Checkpoints
from gptjax.errors import Refused
from gptjax.inference.model import Run
from gptjax.models.build import abstract_model, check_divides
from gptjax.models.interface import LanguageModel
from gptjax.models.lora import Adapters, merged
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.parallel.trees import placed
from gptjax.runtime import distributed
from gptjax.tokenizers import tokenizer
from gptjax.training.config import schema
from gptjax.training.config.schema import Config
from gptjax.training.workdir import losses, read_config


def saved_tokenizer(saved: dict, where: str) -> tokenizer.Tokenizer:
    """The tokenizer that a checkpoint brings. Raises: Refused."""
    try:
        files = {name: base64.b64decode(text, validate=True) for name, text in saved["tokenizer"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Refused(f"{where} brings no tokenizer ({error}): put back the checkpoint that the run wrote.") from error
    if tokenizer.hash_of(files) != saved.get("tokenizer_hash"):
        raise Refused(
            f"{where} brings tokenizer {tokenizer.hash_of(files)[:12]}, and was trained with "
            f"{str(saved.get('tokenizer_hash'))[:12]}: put back the checkpoint that the run wrote."
        )
    return tokenizer.from_files(files, where)


def chosen(checkpoints: Checkpoints, folder: epath.Path, step: int | str) -> int:
    """A checkpoint that verifies: of a step, the newest for -1, or the `best`, with the lowest held-out loss.

    Raises: Refused.
    """
    if step != "best":
        return checkpoints.choose(step)
    steps = checkpoints.steps()
    best = retention.best(losses(folder), steps)
    if steps and not best:
        raise Refused(
            f"{folder / 'metrics.jsonl'} has no held-out loss of a step that has a checkpoint, so none is the best: give "
            f"one of {', '.join(map(str, steps))}."
        )
    return checkpoints.choose(best)


def load(folder: epath.Path, step: int | str) -> Run:
    """The model of a checkpoint: of a step, of the newest for -1, or of the `best`. Raises: Refused."""
    with distributed.together():
        latest = read_config(folder)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        step = chosen(checkpoints, folder, step)
        saved = checkpoints.run(step)
        config = schema.parse(saved["config"])
        its_tokenizer = saved_tokenizer(saved, f"{checkpoints.folder} (step {step})")
        mesh = mesh_that_fits(config, its_tokenizer.vocab_size)
        with jax.set_mesh(mesh):
            model = restore_model(checkpoints, step, config, its_tokenizer.vocab_size, mesh)
    return Run(config, step, mesh, model, its_tokenizer, schema.parse(latest))


def restore_model(
    checkpoints: Checkpoints, step: int, config: Config, vocab_size: int, mesh: jax.sharding.Mesh
) -> LanguageModel:
    """What is evaluated of a step, placed on the mesh in use.

    config: that of the step; of learned positions a shorter seq_len takes the first. Raises: Refused.
    """
    part = "ema" if config.optimizer.ema_decay else "model"
    shapes = {part: abstract_model(config.model, vocab_size, config.seq_len)}
    if config.lora.rank:
        adapters = jax.eval_shape(lambda model: Adapters(model, config.lora, 0), shapes[part])
        shapes = {"base": shapes[part], part: adapters}
    found = checkpoints.restore(step, placed(shapes, mesh), cut=[f"{name}.positions" for name in shapes])
    return merged(found["base"], found[part]) if config.lora.rank else found[part]


def mesh_that_fits(config: Config, vocab_size: int) -> jax.sharding.Mesh:
    """The mesh of the run; on other devices than it was trained on, the model cut over all of them, or else whole."""
    for axes in (config.mesh, MeshConfig()):
        try:
            mesh = make_mesh(axes, jax.devices())
            check_divides(config.model, vocab_size, config.seq_len, mesh)
            return mesh
        except Refused:
            continue
    return make_mesh(MeshConfig(data=-1, fsdp=1), jax.devices())
