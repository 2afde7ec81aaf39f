"""Checks of lm-eval's tasks whose scores would flatter or mislead; each is told before a run."""

import itertools

from lm_eval import utils

from gptjax.errors import Refused

MAX_DOCUMENTS = 1000  # looked at


def check(name: str, task) -> None:
    """Raises: Refused, for a task that shows a question with its answer, or takes numbers for indexes."""
    _check_examples(name, task)
    if task.OUTPUT_TYPE == "multiple_choice" and not task.multiple_input:
        _check_targets(name, task)


def _check_examples(name: str, task) -> None:
    """The examples before a question must not be the question. lm-eval leaves it out of a split that is named alone."""
    examples = task.get_config("num_fewshot") or 0
    if examples <= 0 or task.fewshot_cfg.split is not None or task.fewshot_cfg.samples is not None:
        return
    if task.has_training_docs() or (task.has_validation_docs() and task.has_test_docs()):
        return
    split = task.config.test_split or task.config.validation_split
    raise Refused(
        f"Task {name}: num_fewshot={examples} takes examples from {split}, whose documents are the questions, so that "
        f'the question may stand among them; write "fewshot_split: {split}" and "test_split: {split}" there, which '
        "leaves the question out, or set num_fewshot to 0."
    )


def _check_targets(name: str, task) -> None:
    """A target that a template writes as a number is an index for lm-eval, also where the choices are numbers."""
    template = task.config.doc_to_target
    if not isinstance(template, str) or template in task.features:
        return
    for document in itertools.islice(task.eval_docs, MAX_DOCUMENTS):
        target, choices = utils.apply_template(template, document), [str(each) for each in task.doc_to_choice(document)]
        if target.isdigit() and target in choices and choices.index(target) != int(target):
            raise Refused(
                f'Task {name}: doc_to_target gives "{target}", which lm-eval takes for the index of a choice, and the '
                f'choices are {", ".join(choices[:8])}; write the index, such as "{{{{choices.index(answer)}}}}".'
            )
