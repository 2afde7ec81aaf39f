"""Runs tasks of EleutherAI's lm-eval on a model: `gptjax eval --tasks=…`, and the section `tasks` of a config.

lm-eval makes the requests of a task and scores the answers. This module answers: log-likelihoods of continuations and
whole texts, and generated text. Texts are cut and encoded as in lm-eval's back end for Hugging Face models, so a
converted model gets equal scores. One thing differs: here the name of a special token inside a text is plain text.

With several processes, each process makes the same requests, and all compute together.
"""

import functools
import logging
import math
import pathlib

import datasets
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec, reshard
from lm_eval import evaluator, utils
from lm_eval.api import task as lm_eval_task
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager

from gptjax.errors import Failed, Preempted, Refused, nearest
from gptjax.evaluation import bias_pairs, classification, task_checks
from gptjax.evaluation.config import TasksConfig
from gptjax.inference import generate
from gptjax.inference.decoder import doubled
from gptjax.inference.generate import Sampling
from gptjax.models.interface import Inputs, LanguageModel
from gptjax.models.loss import next_token_scores
from gptjax.parallel import sharding, trees
from gptjax.parallel.batches import row_shards
from gptjax.runtime import heartbeat, preemption
from gptjax.tokenizers.tokenizer import encode_prompt

MIN_LENGTH = 64  # tokens of the shortest compiled program; longer programs double up to the context
FEWSHOT_SEED = 1234  # lm-eval's default; it chooses the same examples before a question
MAX_GENERATED = 256  # tokens, unless a task says otherwise; lm-eval's default
KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}  # supported keys of generation_kwargs

logging.getLogger("lm_eval").setLevel(logging.ERROR)
datasets.disable_progress_bars()


def _no_bar(documents, **_):
    """Stands in for lm-eval's progress bar, which would draw over the run's progress line."""
    return documents


lm_eval_task.tqdm = _no_bar


def load(config: TasksConfig, seq_len: int) -> dict:
    """Loads the tasks of a config and their data by lm-eval.

    Raises: Refused, for an unknown name, and for a task that can't be loaded or does not fit this context.
    """
    names = [name.strip() for name in config.names.split(",")]
    if config.folder and not pathlib.Path(config.folder).is_dir():
        raise Refused(f"tasks.folder={config.folder} must be a folder with lm-eval's YAML files; no folder is there.")
    try:
        manager = TaskManager(include_path=[bias_pairs.FOLDER, *filter(None, [config.folder])], include_defaults=False)
        if not set(names) <= set(manager.all_tasks):  # scanning lm-eval's own tasks takes 20 s
            manager = TaskManager(include_path=manager.include_path)
        for name in names:
            if name not in manager.all_tasks:
                raise Refused(f'Task "{name}" is unknown.{nearest(name, manager.all_tasks)}')
        loaded = manager.load(names)
        for name, task in loaded["tasks"].items():
            _check(name, task, seq_len)
            own = task.get_config("num_fewshot")
            if own is None or (config.num_fewshot >= 0 and own != 0):  # a task's own 0 is a requirement
                task.set_config(key="num_fewshot", value=max(config.num_fewshot, 0))
            task_checks.check(name, task)
    except Refused:
        raise
    except Exception as error:  # files of tasks may raise anything, and so may a failed download
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise Refused(
            f"Tasks {config.names} can't be loaded ({reason}); correct their files, or leave the tasks out."
        ) from error
    return loaded


def _check(name: str, task, seq_len: int) -> None:
    if task.OUTPUT_TYPE != "generate_until":
        return
    asked = normalize_gen_kwargs(task.config.generation_kwargs or {}, MAX_GENERATED)
    unknown = sorted(key for key in asked.keys() - KNOWN if asked[key] is not None)
    if unknown:
        raise Refused(
            f"Task {name}: generation_kwargs must be among {', '.join(sorted(KNOWN))}; found {', '.join(unknown)}."
        )
    if asked["max_gen_toks"] >= seq_len:
        raise Refused(
            f"Task {name}: generation_kwargs.max_gen_toks={asked['max_gen_toks']} must be below the context of "
            f"{seq_len} tokens."
        )


def scores(
    tasks: dict, model: LanguageModel, tokenizer, *, seq_len: int, batch_size: int, limit: int
) -> dict[str, dict[str, float]]:
    """Returns the metrics of each task and group by name, and `samples`, the number of documents.

    Call this under the model's mesh.

    Args:
      tasks: the result of `load`.
      batch_size: rows at a time, rounded up to a multiple of the mesh's row shards.
      limit: documents of a task; 0 is all.

    Raises:
      Failed: a task's own files fail on a document.
      Preempted: the run is asked to stop meanwhile.
    """
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    lm = LanguageModel(model, tokenizer, seq_len, batch_size)
    try:
        with heartbeat.phase("evaluating tasks"):
            found = evaluator.evaluate(lm=lm, task_dict=tasks, limit=limit or None, bootstrap_iters=0)
        results = {name: _metrics(row, tasks["tasks"].get(name), found) for name, row in found["results"].items()}
        return {name: row for name, row in results.items() if row}  # a group may have no metrics
    except (Preempted, Refused, Failed, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise Failed(
            f"Tasks {', '.join(tasks['tasks'])} can't be evaluated ({reason}); correct their files."
        ) from error


def _metrics(row: dict, task, found: dict) -> dict[str, float]:
    """Returns the finite metrics in a row of results; task is None for the row of a group."""
    # "acc,none" names a metric, then the filter that the answers passed through.
    named = {key.removesuffix(",none"): value for key, value in row.items() if "," in key and "_stderr," not in key}
    numbers = {key: float(value) for key, value in named.items() if isinstance(value, (int, float))}
    numbers |= _classification(task, found["samples"][row["name"]]) if task else {}
    finite = {key: value for key, value in numbers.items() if math.isfinite(value)}  # a perplexity may overflow
    return finite | {"samples": row["sample_len"]} if finite else {}


def _classification(task, samples: list[dict]) -> dict[str, float]:
    """Returns `classification.metrics` of a multiple-choice task with one correct choice, else nothing.

    A class is the position of a choice. Positions are labels if all documents list the same choices in the same order.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or callable(task.config.process_results) or task.multiple_target:
        return {}
    rows, gold = [], []
    for sample in samples:
        choices = task.doc_to_choice(sample["doc"])
        right = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
        rows.append([loglikelihood for loglikelihood, _ in sample["filtered_resps"][: len(choices)]])
        gold.append(right if isinstance(right, int) else choices.index(right) if right in choices else -1)
    return classification.metrics(rows, gold)


def table(step: int, found: dict[str, dict[str, float]]) -> str:
    """Formats the result of `scores` at a step as text."""
    width = max(map(len, found), default=0)
    lines = [f"step {step}"]
    for name, row in found.items():
        each = " · ".join(f"{metric} {value:.4f}" for metric, value in row.items() if metric != "samples")
        lines.append(f"{name:<{width}}  {row['samples']:>6} documents  {each}")
    return "\n".join(lines)


class LanguageModel(TemplateLM):
    """A model behind lm-eval's interface."""

    def __init__(self, model: LanguageModel, tokenizer, seq_len: int, batch_size: int):
        super().__init__()
        mesh = jax.sharding.get_mesh()
        shards = row_shards(mesh)
        self._model, self._text, self._seq_len = model, tokenizer, seq_len
        self._batch_size, self._unit = -(-batch_size // shards) * shards, MIN_LENGTH * mesh.shape["tensor"]

    @property
    def eot_token_id(self) -> int:
        return self._text.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """The token from which the first token of a text is predicted."""
        return self._text.begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        opening = () if add_special_tokens is False else self._text.opening
        return [*opening, *encode_prompt(self._text, string).tolist()]

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Scores each continuation after its context, encoded together.

        Where a tokenizer merges the end of a context with a continuation, all continuations of this context are scored
        from the last token that they share with the context. lm-eval would score the merged one from the end of the
        context, where nothing of it may be left, so that it would count as certain.
        """
        pairs, shared = [], {}
        for context, continuation in (request.args for request in requests):
            if not context:
                pairs.append(([self.prefix_token_id], self._of_empty(continuation)))
                continue
            spaces = len(context) - len(context.rstrip())  # belong to the next word
            alone = self.tok_encode(context[: len(context) - spaces])
            whole = self.tok_encode(context + continuation)
            common = next((n for n, pair in enumerate(zip(alone, whole, strict=False)) if len({*pair}) > 1), len(alone))
            shared[context] = min(common, len(whole) - 1, shared.get(context, len(alone)))
            pairs.append(([], whole))
        cut = []
        for request, (opening, whole) in zip(requests, pairs, strict=True):
            at = shared.get(request.args[0], 0)
            cut.append((request.args, [*opening, *whole[:at]], whole[at:]))
        return self._loglikelihood_tokens(cut)

    def _of_empty(self, continuation: str) -> list[int]:
        """A text without context, which is predicted from the token that opens documents."""
        ids = self.tok_encode(continuation, add_special_tokens=False)
        return ids[1:] if ids[:1] == [self.prefix_token_id] else ids

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = True) -> list[float]:
        """Scores each text in windows whose scored tokens do not overlap; the last window overlaps in context."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            cut = utils.get_rolling_token_windows(ids, self.prefix_token_id, self._seq_len, 1)
            windows += [(None, *utils.make_disjoint_window(pair)) for pair in cut]
            owners += [number] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for number, (loglikelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += loglikelihood
        return totals

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        """Returns (log-likelihood of the continuation in nats, whether the model ranks each token first) by request.

        A context that is too long loses its beginning. The longest requests come first: a lack of memory shows early.
        """
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        batches = [order[first : first + self._batch_size] for first in range(0, len(order), self._batch_size)]
        found = {}
        for batch in batches:
            preemption.tick()
            # One program at a time: nothing orders independent programs. CPU devices of several processes could enter
            # collectives of different programs, and then wait for ever.
            with heartbeat.waiting():
                loglikelihoods, greedy = jax.device_get(self._scores([requests[i][1:] for i in batch]))
            found |= {i: (float(loglikelihoods[row]), bool(greedy[row])) for row, i in enumerate(batch)}
        return [found[i] for i in range(len(requests))]

    def _scores(self, pairs: list[tuple[list[int], list[int]]]):
        """Dispatches `score_step` for at most a batch of (context, continuation)."""
        longest = max(len(context) + len(continuation) for context, continuation in pairs) - 1
        length = doubled(self._unit, longest, self._seq_len)
        inputs, targets, positions = (np.zeros((self._batch_size, length), np.int32) for _ in range(3))
        weights = np.zeros((self._batch_size, length), np.float32)
        positions[:] = np.arange(length)
        for row, (context, continuation) in enumerate(pairs):
            context = context or [self.prefix_token_id]
            if len(continuation) > length:
                raise Failed(
                    f"A continuation must have at most {self._seq_len} tokens, the context; found {len(continuation)}; "
                    "leave the task out."
                )
            ids = (context + continuation)[-(length + 1) :]
            inputs[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
            weights[row, len(ids) - 1 - len(continuation) : len(ids) - 1] = 1
        mesh = jax.sharding.get_mesh()
        placed = jax.NamedSharding(mesh, sharding.spec("act_batch", "act_seq"))
        arrays = [trees.put(array, placed) for array in (inputs, targets, positions, weights)]
        return score_step(self._model, *arrays, vocab_size=self._text.vocab_size)

    def generate_until(self, requests, disable_tqdm: bool = True) -> list[str]:
        made: dict[int, str] = {}
        model = self._model.for_decoding()  # copies the blocks, once for all batches
        ids = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        alike = {}  # numbers of requests by their settings
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(number)
        eos = next((name for name, i in self._text.special.items() if i == self._text.end_of_text), None)
        for numbers in alike.values():
            asked = normalize_gen_kwargs(requests[numbers[0]].args[1], MAX_GENERATED)
            until = handle_stop_sequences(asked["until"], eos)
            temperature = asked["temperature"] if asked["do_sample"] else 0.0
            sampling = Sampling(temperature or 0.0, asked.get("top_k") or 0, asked.get("top_p") or 1.0)
            length = asked["max_gen_toks"]
            numbers.sort(key=lambda number: -len(ids[number]))
            for first in range(0, len(numbers), self._batch_size):
                batch = numbers[first : first + self._batch_size]
                preemption.tick()
                with heartbeat.waiting():
                    more = generate.generate(
                        model,
                        [ids[number][-(self._seq_len - length) :] for number in batch],
                        self._text,
                        generate.Request(self._seq_len, length, sampling, first, tuple(until), opened=True),
                    )
                # If the tokenizer adds a leading space, decoding drops it; drop it from continuations too.
                texts = (self._text.decode(tokens).removeprefix(" " * bool(self._text.prefix)) for tokens in more)
                answers = (postprocess_generated_text(text, until, None) for text in texts)
                made |= dict(zip(batch, answers, strict=True))
        return [made[number] for number in range(len(requests))]


@functools.partial(jax.jit, static_argnames="vocab_size")
def score_step(model: LanguageModel, inputs_BT, targets_BT, positions_BT, weights_BT, *, vocab_size: int):
    """Returns, each of shape [B], the sum of the weighted targets' log probabilities and whether all rank first."""
    x_BTD = model.hidden(Inputs(inputs_BT, positions_BT, jnp.zeros_like(inputs_BT)), None).x_BTD
    scores_BT, best_BT = next_token_scores(x_BTD, model.output(), targets_BT, vocab_size=vocab_size)
    found = (scores_BT * weights_BT).sum(-1), (best_BT | (weights_BT == 0)).all(-1)
    return jax.tree.map(lambda each_B: reshard(each_B, PartitionSpec()), found)  # replicated to every process
