"""lm-eval on our models, compared with lm-eval's back end for Hugging Face models; all tasks are defined here."""

import json
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest
from etils import epath
from lm_eval import evaluator
from support.command import corpus_text, training
from support.runs import mesh_of
from support.tokenizer_files import llama_2_json
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from gptjax.evaluation import lm_eval
from gptjax.evaluation.config import TasksConfig
from gptjax.interop.huggingface import convert
from gptjax.training import loading

SEQ_LEN = 48
ALL = "choices,labels,texts,answers,words"
QUESTIONS = [(a, b) for a in range(3, 9) for b in range(2, 6)]
TASKS = {
    # Each document has other choices, of different lengths, after two examples.
    "choices": (
        "output_type: multiple_choice\nfewshot_split: test\nnum_fewshot: 2\ndoc_to_text: question\n"
        "doc_to_choice: choices\ndoc_to_target: label",
        [
            {"question": f"{a} plus {b} is", "choices": [str(a + b), f"{a} plus {a}", str(a - b)], "label": 0}
            for a, b in QUESTIONS
        ],
    ),
    # All documents have the same choices, given by their text.
    "labels": (
        'output_type: multiple_choice\ndoc_to_text: "{{text}} Is it even? "\ndoc_to_target: label\n'
        'doc_to_choice: ["yes", "no", "maybe"]',
        [{"text": f"{a} plus {b}.", "label": "no" if (a + b) % 2 else "yes"} for a, b in QUESTIONS],
    ),
    # Whole texts, some longer than two contexts.
    "texts": (
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: text',
        [{"text": corpus_text()[700 * i : 700 * i + 100 * i + 9]} for i in range(8)],
    ),
    # Generated until a full stop; a context that has to be cut.
    "answers": (
        "output_type: generate_until\ndoc_to_text: text\ndoc_to_target: answer\ngeneration_kwargs:\n"
        '  until: ["."]\n  max_gen_toks: 12\nmetric_list:\n  - metric: exact_match',
        [{"text": f"{corpus_text()[: 20 * a]}{a} plus {b} is ", "answer": str(a + b)} for a, b in QUESTIONS],
    ),
    # A task that loads, but can't be scored.
    "broken": (
        "output_type: multiple_choice\ndoc_to_text: text\ndoc_to_choice: choices\ndoc_to_target: label",
        [{"text": "7 plus", "choices": list(choices), "label": 0} for choices in ("12", "")],
    ),
    # The last word of a text; one text has nothing before that word.
    "words": (
        "output_type: loglikelihood\ndoc_to_text: text\ndoc_to_target: last\nmetric_list:\n  - metric: perplexity\n"
        "    aggregation: perplexity\n  - metric: acc",
        [{"text": "", "last": "7 plus"}, {"text": "7 plus ", "last": "3"}, {"text": "7 plus 3 is", "last": "10."}],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, (text, rows) in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        head = (
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: '{data}'}}}}\ntest_split: test\n"
        )
        (folder / f"{name}.yaml").write_text(f"{head}{text}\n")
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache_of_datasets(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def byte_level(folder, *special):
    """Saves byte-level BPE. With two special tokens, a template puts the first before each text, as in Llama 3."""
    import transformers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=301, special_tokens=[*special], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([corpus_text()[:20_000]], trainer)
    if len(special) > 1:
        made.post_processor = processors.TemplateProcessing(f"{special[0]} $A", special_tokens=[(special[0], 0)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=special[0], eos_token=special[-1]
    )  # fmt: skip
    fast.save_pretrained(folder)


def gpt2(folder):
    import transformers

    byte_level(folder, "<|endoftext|>")
    return transformers.GPT2Config(
        vocab_size=301, n_positions=SEQ_LEN, n_embd=40, n_layer=2, n_head=2, initializer_range=0.3, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip


def llama(folder, vocab_size=301, begin=0, end=1):
    import transformers

    byte_level(folder, "<|begin_of_text|>", "<|end_of_text|>")
    return transformers.LlamaConfig(
        vocab_size=vocab_size, max_position_embeddings=SEQ_LEN, hidden_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=56, rms_norm_eps=1e-5,
        initializer_range=0.3, bos_token_id=begin, eos_token_id=end,
    )  # fmt: skip


def llama_2(folder):
    """Saves a tokenizer that puts a space before a text, besides the opening token."""
    config = llama(folder, 408, 1, 2)
    llama_2_json(folder)
    return config


@pytest.mark.parity
@pytest.mark.parametrize("make", [gpt2, llama, llama_2])
def test_scores_are_those_of_the_back_end_for_hugging_face(folder, make, tmp_path):
    """Both back ends score the same model; `-n0 -s` prints the table of benchmarks/NOTES.md."""
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(make(tmp_path / "theirs")).save_pretrained(tmp_path / "theirs")
    convert.from_hf(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    run = loading.load(epath.Path(tmp_path / "ours"), -1)
    loaded = lm_eval.load(TasksConfig(names=ALL, folder=str(folder)), SEQ_LEN)

    def answered(lm):
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=lm_eval.FEWSHOT_SEED)
        return evaluator.evaluate(lm=lm, task_dict=loaded, bootstrap_iters=0)

    expected = answered(HFLM(pretrained=str(tmp_path / "theirs"), dtype="float32", batch_size=24, device="cpu"))
    with jax.set_mesh(run.mesh):
        found = answered(lm_eval.LanguageModel(run.model, run.tokenizer, SEQ_LEN, batch_size=6))
    assert set(expected["samples"]) == set(ALL.split(","))
    for name, samples in expected["samples"].items():
        for one, other in zip(samples, found["samples"][name], strict=True):
            for response, ours in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
                case = name, one["arguments"], response, ours
                if name == "answers":  # generated text
                    # Around invalid UTF-8, the two decoders of a SentencePiece model print different signs.
                    start = response.partition("\ufffd")[0]
                    assert ours == response or (make is llama_2 and ours.startswith(start)), case
                elif name == "texts":
                    assert ours == pytest.approx(response, rel=1e-5), case
                else:
                    assert ours[0] == pytest.approx(response[0], rel=1e-5, abs=1e-4) and ours[1] == response[1], case
        for metric in (key for key in expected["results"][name] if key.endswith(",none") and "stderr" not in key):
            theirs, ours = (each["results"][name][metric] for each in (expected, found))
            print(f"| {make.__name__}, {name}: {metric.removesuffix(',none')} | {theirs:.7g} | {ours:.7g} |")
            assert ours == pytest.approx(theirs, rel=1e-4), metric
    answers = {sample["filtered_resps"][0] for sample in found["samples"]["answers"]}
    assert len(answers) > 1  # not always the same


def test_tasks_and_probes_on_the_command_line(folder, finished, gptjax_main):
    names = f"--workdir={finished}", f"--tasks_folder={folder}", "--tasks=answers,labels,gptjax_pairs", "--limit=5"
    code, out, _ = gptjax_main("eval", *names, "--json")
    found = json.loads(out)
    assert code == 0 and found["step"] == 4
    tasks = found["tasks"]
    assert set(tasks["labels"]) == {"acc", "acc_norm", "precision_macro", "recall_macro", "f1_macro", "ece", "samples"}
    assert tasks["answers"]["samples"] == tasks["labels"]["samples"] == 5
    parts = [name for name in tasks if name.startswith("gptjax_pairs::")]
    assert len(parts) == 5
    for metric in ("first_likelier", "difference"):
        mean = np.mean([tasks[name][metric] for name in parts])
        assert tasks["gptjax_pairs"][metric] == pytest.approx(mean) and 0 < mean < 1
    code, out, _ = gptjax_main("eval", *names)
    assert code == 0 and out.startswith("step 4\n") and f"acc {tasks['labels']['acc']:.4f}" in out
    code, out, _ = gptjax_main("eval", *names, "--json", "--weights=int8")
    rounded = json.loads(out)["tasks"]["gptjax_pairs"]["difference"]
    assert code == 0 and rounded != tasks["gptjax_pairs"]["difference"]
    assert rounded == pytest.approx(tasks["gptjax_pairs"]["difference"], rel=0.2)


@pytest.mark.parametrize("flags, words", [
    (["--tasks=lables"], 'Task "lables" is unknown. Did you mean "labels"?'),
    (["--tasks=labels", "--limit=-2"], "limit=-2 must be at least 0"),
    (["--tasks=labels", "--tasks_folder=nowhere"], "tasks.folder=nowhere must be a folder with lm-eval's YAML files"),
    (["--tasks=long"], "Task long: generation_kwargs.max_gen_toks=256 must be below the context of 32 tokens"),
    (["--tasks=beams"], "Task beams: generation_kwargs must be among do_sample"),
    (["--tasks=labels", "--num_fewshot=5"], "Task labels: num_fewshot=5 takes examples from test, whose documents are"),
    (["--tasks=numbers"], 'Task numbers: doc_to_target gives "2", which lm-eval takes for the index of a choice'),
    (["--tasks=odd"], "Tasks odd can't be loaded (ValueError: Got invalid output_type 'guess'"),
], ids=str)  # fmt: skip
def test_refused(folder, finished, refused, tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr(
        "lm_eval.tasks.manager.__file__", str(tmp_path / "manager.py")
    )  # lm-eval has 14,000 files of tasks
    head = (folder / "answers.yaml").read_text()
    changes = {
        "long": ("  max_gen_toks: 12\n", ""), "beams": ("max_gen_toks: 12", "num_beams: 2"),
        "odd": ("output_type: generate_until", "output_type: guess"),
    }  # fmt: skip
    for name, change in changes.items():
        (tmp_path / f"{name}.yaml").write_text(head.replace("task: answers", f"task: {name}").replace(*change))
    (tmp_path / "labels.yaml").write_text((folder / "labels.yaml").read_text())
    data = tmp_path / "numbers.jsonl"
    data.write_text(json.dumps({"text": "1 plus 1 is", "answer": "2"}) + "\n")
    (tmp_path / "numbers.yaml").write_text(
        f"task: numbers\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: '{data}'}}}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: text\ndoc_to_target: "{{answer}}"\n'
        'doc_to_choice: ["1", "2", "3"]\n'
    )
    assert words in refused(finished, "eval", f"--workdir={finished}", f"--tasks_folder={tmp_path}", *flags)


@pytest.mark.parametrize("flag", ["--limit=2", "--num_fewshot=0", "--tasks_folder=."])
def test_flags_of_tasks_without_tasks_are_refused(finished, refused, flag):
    assert f"{flag} needs --tasks=NAME." in refused(finished, "eval", f"--workdir={finished}", flag)


def test_a_run_is_scored_on_its_way(folder, corpus, tmp_path, gptjax_main):
    flags = ["--config.tasks.names=labels", f"--config.tasks.folder={folder}", "--config.tasks.limit=4"]
    run = training(corpus, tmp_path / "run", *flags, "--config.tasks.every=2")
    code, out, _ = gptjax_main(*run)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scored = {row["step"]: row for row in rows if "task/labels/acc" in row}
    assert code == 0 and set(scored) == {2, 4} and "step 2: labels acc " in out
    assert set(scored[2]) == {"step", "time"} | {
        f"task/labels/{metric}"
        for metric in ("acc", "acc_norm", "precision_macro", "recall_macro", "f1_macro", "ece", "samples")
    }
    found = json.loads(gptjax_main("eval", f"--workdir={tmp_path / 'run'}", f"--tasks_folder={folder}",
                                   "--tasks=labels", "--limit=4", "--json")[1])  # fmt: skip
    assert found["tasks"]["labels"] == pytest.approx(
        {key.rpartition("/")[2]: value for key, value in scored[4].items() if key not in ("step", "time")}
    )


def test_scores_that_fail_are_a_warning(folder, corpus, tmp_path, gptjax_main):
    flags = ["--config.tasks.names=broken", f"--config.tasks.folder={folder}"]
    code, out, _ = gptjax_main(*training(corpus, tmp_path / "run", *flags))
    assert code == 0 and "warning: step 4 could not be evaluated (Failed: Tasks broken can't be evaluated" in out


def test_tasks_are_found_before_anything_is_written(folder, corpus, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder / "manager.py"))
    flags = ["--config.tasks.names=labels, lables", f"--config.tasks.folder={folder}"]
    assert 'Task "lables" is unknown' in refused(tmp_path, *training(corpus, tmp_path / "run", *flags))
    monkeypatch.setitem(sys.modules, "gptjax.evaluation.lm_eval", None)  # as where lm-eval is missing
    assert "pip install 'gptjax[eval]'" in refused(tmp_path, *training(corpus, tmp_path / "run", *flags))


class Merging:
    """Letters, and the pair "ab" as one token."""

    begin = end_of_text = 0
    vocab_size = 100
    prefix, special, opening = "", {}, ()

    def encode(self, text):
        ids, rest = [], text
        while rest:
            size = 2 if rest.startswith("ab") else 1
            ids.append(99 if size == 2 else ord(rest[0]) % 90 + 1)
            rest = rest[size:]
        return np.array(ids)


class Asked(NamedTuple):
    args: tuple[str, str]


def test_a_continuation_that_merges_with_its_context_is_scored(monkeypatch):
    """`a` and `b` are one token, so nothing of the choice `b` follows the context `xa`."""
    found = []

    def scored(self, pairs, **_):
        found.extend((context, continuation) for _, context, continuation in pairs)
        return [(0.0, True)] * len(pairs)

    monkeypatch.setattr(lm_eval.LanguageModel, "_loglikelihood_tokens", scored)
    with jax.set_mesh(mesh_of(1, 1, 1)):
        model = lm_eval.LanguageModel(None, Merging(), 8, 1)
    choices = [("xa", "b"), ("xa", "c"), ("x ", "b"), ("x", "c"), ("", "ab"), ("a", "b")]
    model.loglikelihood([Asked(pair) for pair in choices])
    x, a, b, c, space = (int(Merging().encode(letter)[0]) for letter in "xabc ")
    assert found == [
        ([x], [99]), ([x], [a, c]), ([x], [space, b]), ([x], [c]), ([0], [99]), ([], [99]),
    ]  # fmt: skip
    assert all(continuation for _, continuation in found)


def test_a_changed_task_has_another_score(folder, finished, gptjax_main, tmp_path):
    """Neither lm-eval nor datasets answers from a cache."""
    text, data = (folder / "labels.yaml").read_text(), tmp_path / "labels.jsonl"
    (tmp_path / "labels.yaml").write_text(text.replace(str(folder / "labels.jsonl"), str(data)))
    found = []
    for label in ("yes", "no"):
        rows = [{"text": f"{a} plus {b}.", "label": label} for a, b in QUESTIONS]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        argv = "eval", f"--workdir={finished}", "--tasks=labels", f"--tasks_folder={tmp_path}", "--json"
        code, out, error = gptjax_main(*argv)
        assert code == 0, error
        found.append(json.loads(out)["tasks"]["labels"]["acc"])
    assert found[0] != found[1]
