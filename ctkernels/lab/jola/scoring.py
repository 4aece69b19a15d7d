"""Scoring: the likelihood of answers, multiple choice, generated text."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import metrics
from .config import Answering
from .texts import Example

MOST_LABELS = 50  # each costs a forward pass for every prompt, unless it is one token
Row = tuple[tuple[int, ...], tuple[int, ...]]  # tokens of a prompt, tokens that follow


def encode(prompt: str, answer: str, tokenizer: Any, how: Answering, *, end: bool) -> Row:
    """Tokens of a prompt (with its special tokens) and of the answer (with the end token if ``end``)."""
    glued = prompt[-1].isspace() or answer[0].isspace()
    after = list(tokenizer(answer if glued else how.separator + answer, add_special_tokens=False)["input_ids"])
    if end and tokenizer.eos_token_id is not None:
        after.append(tokenizer.eos_token_id)
    before = list(tokenizer(prompt)["input_ids"])
    if len(after) >= how.max_length:
        raise ValueError(
            f"max_length must leave room for a prompt: the answer {answer!r} alone has {len(after)} tokens"
        )
    return tuple(before[-(how.max_length - len(after)) :]), tuple(after)


def answer_row(example: Example, tokenizer: Any, how: Answering) -> Row:
    """The right answer of an example; free text ends with the end token, so that its end is learned."""
    return encode(example.prompt, example.answer, tokenizer, how, end=example.choices is None)


def collate(rows: Sequence[Row], pad: int) -> dict[str, Any]:
    """A batch, padded on the left: input_ids, attention_mask and labels (B, T), -100 outside the answers; and
    ``keep``, the number of positions at the end whose logits the loss needs."""
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
    """Tokens and attention mask, both (B, T), padded on the left: answers then end where the batch ends."""
    width = max(map(len, rows))
    ids = torch.tensor([[*[pad] * (width - len(row)), *row] for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def answer_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Mean cross-entropy over the answers' tokens of a batch from :func:`collate`; prompts do not count."""
    logits = tail_logits(model, batch["input_ids"], batch["attention_mask"], batch["keep"])
    labels = batch["labels"][:, -batch["keep"] :]
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def tail_logits(model: nn.Module, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
    """Logits of the last ``keep`` positions, (B, keep, vocabulary); the others are not computed where possible."""
    return model(**tail_inputs(model, ids, mask, keep)).logits[:, -keep:]


def tail_inputs(model: nn.Module, ids: Tensor, mask: Tensor, keep: int) -> dict[str, Any]:
    """The arguments for a forward pass over rows padded on the left, of which the last ``keep`` logits are wanted."""
    inner: Any = getattr(model, "module", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    known = inspect.signature(inner.forward).parameters
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "position_ids" in known:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    if "logits_to_keep" in known:
        # Positions rather than their number, by which models take a slice: a matrix product with rows that are not
        # contiguous copies the vocabulary's weight in every call.
        inputs["logits_to_keep"] = torch.arange(ids.shape[1] - keep, ids.shape[1], device=ids.device)
    return inputs


@torch.inference_mode()
def log_probabilities(
    model: Any, rows: Sequence[Row], pad: int, batch_size: int, advance: Callable[[int], object] = lambda step: None
) -> list[float]:
    """The log probability of each row's second part after its first.

    Rows that differ in their last token only share one forward pass: choices of one token cost what one prompt costs.

    Args:
        model: a causal language model, in evaluation mode.
        rows: tokens of prompts and of what follows.
        pad: the padding token.
        batch_size: sequences per forward pass.
        advance: called with the number of sequences done.

    Returns:
        natural logarithms, one per row.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for number, (before, after) in enumerate(rows):
        sharing.setdefault(before + after[:-1], []).append(number)
    inputs = sorted(sharing, key=len)
    device = next(model.parameters()).device
    values = [math.nan] * len(rows)
    for start in range(0, len(inputs), batch_size):
        some = inputs[start : start + batch_size]
        ids, mask = padded(some, pad)
        keep = max(len(rows[number][1]) for key in some for number in sharing[key])
        logs = tail_logits(model, ids.to(device), mask.to(device), keep).float().log_softmax(-1).cpu()
        for i, key in enumerate(some):
            for number in sharing[key]:
                target = torch.tensor(rows[number][1])
                chosen = logs[i, keep - len(target) :].gather(-1, target.unsqueeze(-1))
                values[number] = float(chosen.double().sum())
        advance(len(some))
    return values


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    how: Answering,
    advance: Callable[[int], object] = lambda step: None,
) -> list[str]:
    """Generate a text after each prompt: greedy or beam search, no sampling."""
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), how.batch_size):
        some = order[start : start + how.batch_size]
        batch = [list(tokenizer(prompts[i])["input_ids"])[-how.max_length :] for i in some]
        ids, mask = padded(batch, tokenizer.pad_token_id)
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=how.max_new_tokens,
            num_beams=how.beams,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
        )
        for i, tokens in zip(some, out[:, ids.shape[1] :].tolist()):
            texts[i] = tokenizer.decode(tokens, skip_special_tokens=True)
        advance(len(some))
    return texts


@dataclass(frozen=True)
class Scores:
    """Metrics of a model on examples; ``each`` is the primary metric of every example, in their order."""

    metrics: dict[str, float]
    each: tuple[float, ...]


def primary_metric(has_choices: bool, how: Answering) -> str:
    """The metric that validation and verdict go by: accuracy, exact match of extracted answers, or ROUGE-L."""
    if has_choices:
        return "accuracy"
    return "rouge_l" if how.extract is None and "rouge_l" in metrics.available(None) else "exact_match"


def score_choices(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    how: Answering,
    advance: Callable[[int], object] = lambda step: None,
) -> list[tuple[float, float]]:
    """Score each example: whether the right choice is the most probable (1 or 0), and its -log probability."""
    rows, counts = [], []
    for example in examples:
        choices = example.choices or (example.answer,)
        counts.append(len(choices))
        rows += [encode(example.prompt, c, tokenizer, how, end=example.choices is None) for c in choices]
    logs = iter(log_probabilities(model, rows, tokenizer.pad_token_id, how.batch_size, advance))
    scored = []
    for example, count in zip(examples, counts):
        values = [next(logs) for _ in range(count)]
        right = (example.choices or (example.answer,)).index(example.answer)
        scored.append((float(values.index(max(values)) == right), -values[right]))
    return scored


def labels(examples: Sequence[Example], how: Answering) -> tuple[str, ...]:
    """The answers of examples without choices, where they repeat as labels do; none for free text.

    A model that has seen no example cannot know which words are wanted: what it generates is a measure of that alone.
    Labels are at most `MOST_LABELS` answers, each given twice on average or more, which `how.extract` takes as they are.
    """
    answers = dict.fromkeys(example.answer for example in examples if example.choices is None)
    if not 2 <= len(answers) <= min(MOST_LABELS, len(examples) // 2):
        return ()
    as_they_are = all(metrics.extracted(answer, how.extract) == answer.strip() for answer in answers)
    return tuple(answers) if as_they_are else ()


def choose_labels(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    choices: tuple[str, ...],
    how: Answering,
    advance: Callable[[int], object] = lambda step: None,
) -> list[str]:
    """The most probable of the labels after each prompt."""
    rows = [encode(e.prompt, choice, tokenizer, how, end=False) for e in examples for choice in choices]
    logs = iter(log_probabilities(model, rows, tokenizer.pad_token_id, how.batch_size, advance))
    scores = [[next(logs) for _ in choices] for _ in examples]
    return [choices[values.index(max(values))] for values in scores]


def score_texts(predictions: Sequence[str], examples: Sequence[Example], how: Answering) -> Scores:
    """Exact match, BLEU, ROUGE-L and BERTScore of generated texts, in [0, 100], as far as their packages are here.

    Answers of one word each have no BLEU: it counts runs of up to four words.
    """
    references = [example.answer.strip() for example in examples]
    answers = [metrics.extracted(text, how.extract) for text in predictions]
    each: dict[str, list[float]] = {"exact_match": metrics.exact_matches(answers, references)}
    present = metrics.available(how.bertscore_model)
    if "rouge_l" in present:
        each["rouge_l"] = metrics.rouge_l(answers, references)
    if how.bertscore_model is not None:
        each["bertscore"] = metrics.bert_scores(answers, references, how.bertscore_model, how.bertscore_layer)
    values = {name: 100 * sum(scores) / len(scores) for name, scores in each.items()}
    if "bleu" in present and any(len(reference.split()) > 1 for reference in references):
        values["bleu"] = metrics.bleu(answers, references)
    return Scores(values, tuple(each[primary_metric(False, how)]))
