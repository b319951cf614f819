"""The exam of the tiny base model: its share of right answers by kind of question, and whether it keeps to a format."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny_base.exercises import Document
from tiny_base.pretraining import encode_conversation
from twice_rec.answer_format import parse
from twice_rec.llm.generation import sample_completions
from twice_rec.llm.tokens import stop_token_ids
from twice_rec.sft.encoding import IGNORED

_MAX_TOKENS = 200  # of a completion; the longest right answers with a format have about 100


def examine(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document]
) -> dict[str, dict[str, float]]:
    """Return kind of question -> share of right answers, and number of questions.

    `format obeyed` is the share of the questions with a format whose greedy completion has that format (see `obeys`).
    All other kinds count the answers that are right to the letter. Each question comes after the right answers to
    those before it.
    """
    marks = dict[str, list[bool]]()
    stop = stop_token_ids(model, tokenizer)
    for document in documents:
        turns = [(turn.question, turn.answer) for turn in document.turns]
        ids, labels = encode_conversation(tokenizer, document.prompt, turns)
        starts = [i for i in range(1, len(labels)) if labels[i - 1] == IGNORED != labels[i]]
        asked, expected = [], []
        for turn, answer, start in zip(document.turns, greedy_answers(model, ids, labels), starts, strict=True):
            kind = "format" if turn.names_format else turn.kind
            marks.setdefault(kind, []).append(all(guess == right for guess, right in answer))
            if turn.names_format:
                asked.append(ids[:start])
                expected.append(turn.answer)
        if asked:
            written = sample_completions(model, asked, [1] * len(asked), stop, _MAX_TOKENS)
            for (sample,), right in zip(written, expected, strict=True):
                text = tokenizer.decode(sample.token_ids[:-1])
                obeyed = not sample.truncated and obeys(text, right, document.candidates)
                marks.setdefault("format obeyed", []).append(obeyed)
    return {kind: {"right": sum(rights) / len(rights), "questions": len(rights)} for kind, rights in marks.items()}


@torch.inference_mode()
def greedy_answers(model: PreTrainedModel, ids: Sequence[int], labels: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Return for each answer of an encoded conversation (the likeliest token, the right token) of each place.

    Each is the likeliest token after the right tokens before it; if all are right, generation gives the answer.
    """
    guesses = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].argmax(dim=-1)[:-1].tolist()
    answers: list[list[tuple[int, int]]] = []
    for guess, previous, label in zip(guesses, labels, labels[1:], strict=False):
        if label == IGNORED:
            continue
        if previous == IGNORED:
            answers.append([])
        answers[-1].append((guess, label))
    return answers


def obeys(text: str, right: str, candidates: Collection[str]) -> bool:
    """Return whether a completion has the tags of the right one, each once, in order, with text, and names a candidate.

    It need not be the right candidate.
    """
    answer, wanted = parse(text), parse(right)
    places = [text.find(tag) for tag in sorted(wanted.counts, key=right.index)]
    return (
        answer.counts == wanted.counts
        and answer.other_tags == 0
        and places == sorted(places)
        and answer.is_complete(tuple(wanted.fields))
        and answer.item_id in candidates
    )
