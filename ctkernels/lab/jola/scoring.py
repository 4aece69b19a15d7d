"""Scoring of answers: by likelihood, as multiple choice, and as generated text."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import metrics
from .config import Answering
from .texts import Example

MOST_LABELS = 50  # each of several tokens costs a forward pass per prompt
Row = tuple[tuple[int, ...], tuple[int, ...]]  # tokens of a prompt, and those of the answer


def encode(prompt: str, answer: str, tokenizer: Any, answering: Answering, *, end: bool) -> Row:
    """The tokens of a prompt (with its special tokens) and of an answer (with the end token if ``end``)."""
    glued = prompt[-1].isspace() or answer[0].isspace()
    after = list(tokenizer(answer if glued else answering.separator + answer, add_special_tokens=False)["input_ids"])
    if end and tokenizer.eos_token_id is not None:
        after.append(tokenizer.eos_token_id)
    before = list(tokenizer(prompt)["input_ids"])
    if len(after) >= answering.max_length:
        raise ValueError(
            f"max_length must leave room for a prompt: the answer {answer!r} alone has {len(after)} tokens"
        )
    return tuple(before[-(answering.max_length - len(after)) :]), tuple(after)


def answer_row(example: Example, tokenizer: Any, answering: Answering) -> Row:
    """The tokens of an example and its answer; free text gets the end token, so that its end is learned."""
    return encode(example.prompt, example.answer, tokenizer, answering, end=example.choices is None)


def collate(rows: Sequence[Row], pad: int) -> dict[str, Any]:
    """A batch, padded on the left: input_ids, attention_mask and labels (B, T), -100 outside the answers, and ``keep``, the
    number of positions at the end whose logits the loss needs."""
    ids, mask = padded([before + after for before, after in rows], pad)
    labels = torch.full_like(ids, -100)
    for i, (_, after) in enumerate(rows):
        labels[i, -len(after) :] = torch.tensor(after)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "keep": max(len(after) for _, after in rows) + 1,
    }


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask, both (B, T), padded on the left, so that all answers end at the same position."""
    width = max(map(len, rows))
    ids = torch.tensor([[*[pad] * (width - len(row)), *row] for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def padded_batches(
    rows: Sequence[Sequence[int]], pad: int, batch_size: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Batches of consecutive rows: their slice, and tokens and attention mask on ``device``, see :func:`padded`."""
    for start in range(0, len(rows), batch_size):
        ids, mask = padded(rows[start : start + batch_size], pad)
        yield slice(start, start + batch_size), ids.to(device), mask.to(device)


def training_inputs(model: nn.Module, rows: Sequence[Row], pad: int, batch_size: int) -> Iterator[dict[str, Any]]:
    """Batches of the model's inputs, on the CPU, for prompts with their answers."""
    for _, ids, mask in padded_batches([before + after for before, after in rows], pad, batch_size):
        yield tail_inputs(model, ids, mask, 1)


def answer_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Mean cross-entropy over the answers' tokens of a batch from :func:`collate`; prompts do not count."""
    logits = tail_logits(model, batch["input_ids"], batch["attention_mask"], batch["keep"])
    labels = batch["labels"][:, -batch["keep"] :]
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def tail_logits(model: nn.Module, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
    """Logits of the last ``keep`` positions, (B, keep, vocabulary); the model computes no others if it can avoid it."""
    return model(**tail_inputs(model, ids, mask, keep)).logits[:, -keep:]


def tail_inputs(model: nn.Module, ids: Tensor, mask: Tensor, keep: int) -> dict[str, Any]:
    """The arguments of a forward pass over rows padded on the left that computes the last ``keep`` logits."""
    inner: Any = getattr(model, "module", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    parameters = inspect.signature(inner.forward).parameters
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "position_ids" in parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    if "logits_to_keep" in parameters:
        # Positions instead of their number, for which models take a slice: the matrix product with rows that are not
        # contiguous would copy the weight of the vocabulary in every call.
        inputs["logits_to_keep"] = torch.arange(ids.shape[1] - keep, ids.shape[1], device=ids.device)
    return inputs


@torch.inference_mode()
def log_probabilities(
    model: Any, rows: Sequence[Row], pad: int, batch_size: int, advance: Callable[[int], object] = lambda step: None
) -> list[float]:
    """The log probability of each answer after its prompt.

    Rows that differ only in their last token share one forward pass, so choices of one token cost no more than one prompt.
    ``advance`` is called with the number of finished sequences.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}  # rows by the input that they share
    for number, (before, after) in enumerate(rows):
        sharing.setdefault(before + after[:-1], []).append(number)
    inputs = sorted(sharing, key=len)
    values = [math.nan] * len(rows)
    for batch, ids, mask in padded_batches(inputs, pad, batch_size, next(model.parameters()).device):
        keep = max(len(rows[number][1]) for key in inputs[batch] for number in sharing[key])
        logs = tail_logits(model, ids, mask, keep).float().log_softmax(-1).cpu()
        for i, key in enumerate(inputs[batch]):
            for number in sharing[key]:
                target = torch.tensor(rows[number][1])
                chosen = logs[i, keep - len(target) :].gather(-1, target.unsqueeze(-1))
                values[number] = float(chosen.double().sum())
        advance(len(ids))
    return values


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    answering: Answering,
    advance: Callable[[int], object] = lambda step: None,
) -> list[str]:
    """Generates a text after each prompt, by greedy or beam search."""
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    rows = [list(tokenizer(prompts[i])["input_ids"])[-answering.max_length :] for i in order]
    texts = [""] * len(prompts)
    for batch, ids, mask in padded_batches(rows, tokenizer.pad_token_id, answering.batch_size, device):
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=answering.max_new_tokens,
            num_beams=answering.beams,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
        )
        for i, tokens in zip(order[batch], out[:, ids.shape[1] :].tolist()):
            texts[i] = tokenizer.decode(tokens, skip_special_tokens=True)
        advance(len(ids))
    return texts


@dataclass(frozen=True)
class Scores:
    """The metrics of a model on examples, and the primary metric of ``each`` example, in order."""

    metrics: dict[str, float]
    each: tuple[float, ...]


def primary_metric(has_choices: bool, answering: Answering) -> str:
    """The metric of the verdict: accuracy, exact match of extracted answers, or ROUGE-L."""
    if has_choices:
        return "accuracy"
    return "rouge_l" if answering.extract is None and "rouge_l" in metrics.available(None) else "exact_match"


def score_choices(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    answering: Answering,
    advance: Callable[[int], object] = lambda step: None,
) -> list[tuple[float, float]]:
    """For each example, whether the right choice is the most probable (1 or 0), and its -log probability."""
    rows, counts = [], []
    for example in examples:
        choices = example.choices or (example.answer,)
        counts.append(len(choices))
        rows += [encode(example.prompt, c, tokenizer, answering, end=example.choices is None) for c in choices]
    logs = iter(log_probabilities(model, rows, tokenizer.pad_token_id, answering.batch_size, advance))
    scored = []
    for example, count in zip(examples, counts):
        values = [next(logs) for _ in range(count)]
        right = (example.choices or (example.answer,)).index(example.answer)
        scored.append((float(values.index(max(values)) == right), -values[right]))
    return scored


def labels(examples: Sequence[Example], answering: Answering) -> tuple[str, ...]:
    """The distinct answers of examples without choices, if they repeat as labels do; empty for free text.

    They are labels if there are at most `MOST_LABELS`, each given twice on average or more, and if `answering.extract`
    leaves them unchanged. An untrained model cannot know labels, and can only be compared if it chooses among them.
    """
    answers = dict.fromkeys(example.answer for example in examples if example.choices is None)
    if not 2 <= len(answers) <= min(MOST_LABELS, len(examples) // 2):
        return ()
    unchanged = all(metrics.extracted(answer, answering.extract) == answer.strip() for answer in answers)
    return tuple(answers) if unchanged else ()


def choose_labels(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    choices: tuple[str, ...],
    answering: Answering,
    advance: Callable[[int], object] = lambda step: None,
) -> list[str]:
    """The most probable of ``choices`` after each prompt."""
    rows = [encode(e.prompt, choice, tokenizer, answering, end=False) for e in examples for choice in choices]
    logs = iter(log_probabilities(model, rows, tokenizer.pad_token_id, answering.batch_size, advance))
    scores = [[next(logs) for _ in choices] for _ in examples]
    return [choices[values.index(max(values))] for values in scores]


def score_texts(predictions: Sequence[str], examples: Sequence[Example], answering: Answering) -> Scores:
    """Exact match, BLEU, ROUGE-L and BERTScore of generated texts, in [0, 100], as far as their packages are installed.

    BLEU, which counts runs of up to four words, is left out if all answers are single words.
    """
    references = [example.answer.strip() for example in examples]
    answers = [metrics.extracted(text, answering.extract) for text in predictions]
    each: dict[str, list[float]] = {"exact_match": metrics.exact_matches(answers, references)}
    available = metrics.available(answering.bertscore_model)
    if "rouge_l" in available:
        each["rouge_l"] = metrics.rouge_l(answers, references)
    if answering.bertscore_model is not None:
        each["bertscore"] = metrics.bert_scores(
            answers, references, answering.bertscore_model, answering.bertscore_layer
        )
    values = {name: 100 * sum(scores) / len(scores) for name, scores in each.items()}
    if "bleu" in available and any(len(reference.split()) > 1 for reference in references):
        values["bleu"] = metrics.bleu(answers, references)
    return Scores(values, tuple(each[primary_metric(False, answering)]))
