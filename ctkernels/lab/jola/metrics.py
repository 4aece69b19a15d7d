"""Metrics of generated answers against the right ones."""

from __future__ import annotations

import importlib.util
import re
import string
from collections.abc import Sequence

from ..._extras import require


def extracted(text: str, pattern: str | None) -> str:
    """The first match of a regular expression in ``text``, or its first group if it has one; empty without a match.

    Without a pattern, the text stripped of surrounding white space.

    Examples:
        >>> extracted("The answer is (B).", r"\\b([A-J])\\b")
        'B'
    """
    if pattern is None:
        return text.strip()
    match = re.search(pattern, text)
    if match is None:
        return ""
    return (match.group(1) if match.re.groups else match.group(0)) or ""


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def exact_matches(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 for each prediction that equals its reference apart from case, punctuation and spacing, else 0.

    Examples:
        >>> exact_matches(["Paris."], ["paris"])
        [1.0]
    """
    return [float(_plain(p) == _plain(r)) for p, r in zip(predictions, references)]


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU in [0, 100], by sacrebleu with its defaults."""
    sacrebleu = require("sacrebleu", "lab", "BLEU")
    return float(sacrebleu.corpus_bleu(list(predictions), [list(references)]).score)


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L F-measure of each prediction, in [0, 1], by rouge-score without stemming."""
    scorer = require("rouge_score.rouge_scorer", "lab", "ROUGE-L").RougeScorer(["rougeL"])
    return [float(scorer.score(r, p)["rougeL"].fmeasure) for p, r in zip(predictions, references)]


def bert_scores(
    predictions: Sequence[str], references: Sequence[str], model: str, layer: int | None = None
) -> list[float]:
    """BERTScore F1 of each prediction, by bert-score, from the output of a layer of an encoder (folder or name).

    ``layer``: None: the package's default. ValueError if it has none for this model.
    """
    bert_score = require("bert_score", "bertscore", "BERTScore")
    try:
        *_, f1 = bert_score.score(list(predictions), list(references), model_type=model, num_layers=layer)
    except KeyError:
        raise ValueError(f"bertscore_layer must be given: bert-score has no default for {model}") from None
    return [float(value) for value in f1]


def available(bertscore_model: str | None) -> list[str]:
    """The metrics of free text whose packages are installed."""
    names = ["exact_match"]
    if importlib.util.find_spec("sacrebleu"):
        names.append("bleu")
    if importlib.util.find_spec("rouge_score"):
        names.append("rouge_l")
    if bertscore_model is not None:
        require("bert_score", "bertscore", "BERTScore")
        names.append("bertscore")
    return names
