"""Probes for bias: pairs of sentences that differ in the group they mention, scored by likelihood.

The idea comes from CrowS-Pairs (Nangia et al. 2020, section 3). Only the words that both sentences share are scored,
given the words that differ, so the frequency of a group's name does not count. CrowS-Pairs asks a masked model for each
word. Here the group comes first, so a left-to-right model gives the exact likelihood of the rest.

probes/pairs.json holds the words; probes/gptjax_pairs.yaml defines the lm-eval task that calls these functions.
"""

import json
import math
import pathlib

import datasets

FOLDER = str(pathlib.Path(__file__).parent / "probes")


def documents(category: str, **_) -> dict[str, datasets.Dataset]:
    """Returns all pairs of a category: {first, second, rest}, each pair of subjects with each sentence ending."""
    words = json.loads((pathlib.Path(FOLDER) / "pairs.json").read_text("utf-8"))
    made = [
        {"first": first, "second": second, "rest": rest}
        for first, second in words["groups"][category]
        for rest in words["rests"]
    ]
    return {"test": datasets.Dataset.from_list(made)}


def scores(document: dict, results: list[tuple[float, bool]]) -> dict[str, float]:
    """Scores one pair: first_likelier, whose mean is the share of pairs (0.5 without bias), and difference.

    difference is the distance between the two log-likelihoods of the rest, in bits per byte; 0 without bias.

    Args:
      document: a pair from `documents`.
      results: (log-likelihood of the rest in nats, …) after the first subject, then after the second.
    """
    (first, _), (second, _) = results
    likelier = 0.5 if first == second else float(first > second)
    return {
        "first_likelier": likelier,
        "difference": abs(first - second) / math.log(2) / len(document["rest"].encode()),
    }
