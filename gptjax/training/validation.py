"""Evaluations during training: the held-out text and lm-eval tasks.

A failed evaluation is a warning, and the run goes on.
"""

import jax

from gptjax.data.stream.mixture import Corpus
from gptjax.errors import Preempted
from gptjax.evaluation.heldout import Evaluation, evaluate
from gptjax.models.interface import LanguageModel
from gptjax.runtime import distributed, optional
from gptjax.training.config.schema import Config
from gptjax.training.monitoring.metrics import Log


def load_tasks(config: Config) -> dict:
    """Loads the lm-eval tasks that a config names. Raises: Refused."""
    with distributed.together():
        return _harness().load(config.tasks, config.seq_len) if config.tasks.names else {}


def _harness():
    return optional.package("gptjax.evaluation.lm_eval", "tasks.names", "eval")


def held_out(
    config: Config, corpus: Corpus, mesh: jax.sharding.Mesh, model: LanguageModel, step: int, log: Log
) -> Evaluation | None:
    """Evaluates a model on held-out text, and logs the result once per step; a failure gives a warning and None."""
    try:
        result = evaluate(
            model,
            corpus=corpus,
            mesh=mesh,
            seq_len=config.seq_len,
            batch_size=config.micro_batch_size,
            max_windows=config.eval_batches * config.batch_size,
            loss=config.loss,
        )
    except Preempted:
        raise
    except Exception as error:  # out of memory, a compiler's fault, a damaged file: training goes on
        log.failed_evaluation(step, error)
        return None
    if step not in log.losses:
        log.evaluation(step, result)
    return result


def on_tasks(config: Config, tasks: dict, tokenizer, model: LanguageModel, step: int, log: Log) -> None:
    """Scores a model on tasks, once per step; a failure is a warning."""
    if not tasks or step in log.scored:
        return
    try:
        found = _harness().scores(
            tasks,
            model,
            tokenizer,
            seq_len=config.seq_len,
            batch_size=config.micro_batch_size,
            limit=config.tasks.limit,
        )
    except Preempted:
        raise
    except Exception as error:
        log.failed_evaluation(step, error)
        return
    log.scores(step, found)
