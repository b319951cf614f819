"""Text and token ids: tokenizers, chat templates, and the ids that end a completion.

Templates and end-of-turn tokens come from the model's files. transformers is imported late, so recipes stay light.
A control token structures a prompt (`<|im_end|>`, `[INST]`). Its text in a title or a review never becomes one.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twice_rec.answer_format import TAGS
from twice_rec.errors import InputError
from twice_rec.prompts import Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ANY_TEXT = "1. Cr\u00e8me <b> \u8336 \U0001f375\n"
_LOOKS_LIKE_CONTROL = re.compile(r"<\S+>|\[\S+\]")


_GATED = re.compile(r"gated repo|\b40[13] (Client Error|Forbidden|Unauthorized)", re.IGNORECASE)


def load_tokenizer(name: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; it pads on the left, as generation needs it.

    Raises:
        InputError: if there is none, if it is gated, or if it has no chat template.
    """
    import transformers

    tokenizer = from_pretrained(transformers.AutoTokenizer, name, revision=revision, padding_side="left")
    try:
        tokenizer(_ANY_TEXT)  # a damaged one stumbles here, not in the middle of the work
    except Exception as error:  # the tokenizers library raises bare exceptions for damaged files
        raise InputError(
            f"{name}: the tokenizer does not work ({first_line(error)}); fetch it again (tokenizer.json, "
            "tokenizer_config.json)"
        ) from error
    if not tokenizer.chat_template:
        raise InputError(
            f"{name}: the tokenizer has no chat template, so prompts cannot be written; use an instruction-tuned model "
            "(gemma-3-1b-it, Qwen3-0.6B), or add a chat_template to its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def from_pretrained(factory: Any, name: str | Path, **options: Any) -> Any:
    """Call a factory of transformers for a folder or a name on the hub; InputError if it cannot load."""
    looks_local = str(name).startswith((".", "/")) or str(name).count("/") != 1
    if looks_local and not Path(name).is_dir():
        raise InputError(f"{name}: no such model folder; make it first, or name a model of the hub (owner/name)")
    try:
        return factory.from_pretrained(name, **options)
    except Exception as error:  # what damaged files, or those of different models, make of transformers
        text = str(error)
        if isinstance(error, MemoryError) or "out of memory" in text:
            raise
        if not Path(name).is_dir() and _GATED.search(text.replace(str(name), "")):
            raise InputError(
                f"{name} is gated: accept its licence on the hub and log in (`hf auth login`, or HF_TOKEN), or use an "
                "ungated model such as Qwen/Qwen3-0.6B"
            ) from error
        raise InputError(f"{name}: cannot be loaded: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error, and what it is if that says little."""
    lines = str(error).strip().splitlines() or [""]
    text = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return text if text and isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}".strip(": ")


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], completion: str = "") -> list[int]:
    """Return the token ids of a prompt, opened for the model's turn, and of the beginning of a completion.

    The chat template writes the BOS token itself, so nothing is added to its text. Prompt and completion are encoded
    apart, since that is how a model meets them: the prompt's last token never depends on the completion. Only the
    template writes control tokens; the text of one in a message is encoded as text.

    Raises:
        InputError: if the chat template changes or drops the text of a message.
    """
    return [*_encode_prompt(tokenizer, messages), *encode_text(tokenizer, completion)]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text, none of them a control token; nothing is added."""
    ids = _encode_as_is(tokenizer, text)
    if not _controls_in(tokenizer, ids):
        return ids
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if not (controls := _controls_in(tokenizer, ids)):
        return ids
    # The tokenizer counts some control tokens as ordinary ones (`<tool_call>` of Qwen): cut them after one character.
    cuts = [match.start() + 1 for match in re.finditer(_either(controls), text)]
    pieces = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
    return [index for piece in pieces for index in encode_text(tokenizer, piece)]


def _encode_as_is(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text in which the texts of control tokens are meant as such."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    text = _write_prompt(tokenizer, messages)
    ids = _encode_as_is(tokenizer, text)
    contents = "\0".join(message["content"] for message in messages)
    found = [control for control in _controls_in(tokenizer, ids) if control in contents]
    return _encode_around(tokenizer, messages, found) if found else ids


def _write_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    for message in messages:
        if message["content"].strip() not in text:
            raise InputError(
                f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} changes or drops the text of the "
                f"{message['role']} message {message['content'][:60]!r}; use a template that keeps it"
            )
    return text


def _encode_around(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], controls: Sequence[str]
) -> list[int]:
    """Return the ids of a prompt whose messages hold the texts of control tokens.

    These texts are replaced by stand-ins, so every control token that the template then writes is its own. The prompt
    is cut at those, and what is between them is encoded as text, with the texts put back.
    """
    marker = _unused_character("".join(message["content"] for message in messages))
    stand_ins = {control: f"{marker}{number}{marker}" for number, control in enumerate(controls)}
    texts = {stand_in: control for control, stand_in in stand_ins.items()}
    hidden = [Message(role=message["role"], content=_replace(message["content"], stand_ins)) for message in messages]
    written = _write_prompt(tokenizer, hidden)
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    own = {text: added[text] for text in _controls_in(tokenizer, _encode_as_is(tokenizer, written))}
    parts = re.split(f"({_either(own)})", written) if own else [written]  # text, control, text, control, ..., text
    ids: list[int] = []
    for position, part in enumerate(parts):
        if position % 2:
            ids.append(tokenizer.convert_tokens_to_ids(part))
            continue
        if position and own[parts[position - 1]].rstrip:  # such a token takes the white space behind it
            part = part.lstrip()
        if position + 1 < len(parts) and own[parts[position + 1]].lstrip:
            part = part.rstrip()
        ids += encode_text(tokenizer, _replace(part, texts))
    return ids


def _unused_character(text: str) -> str:
    """Return a character for private use that a text does not hold."""
    return next(character for character in map(chr, range(0xE000, 0xF900)) if character not in text)


def _either(texts: Iterable[str]) -> str:
    """Return a pattern that matches any of some texts, the longest first."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))


def _replace(text: str, replacements: Mapping[str, str]) -> str:
    return re.sub(_either(replacements), lambda match: replacements[match[0]], text)


def _controls_in(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[str]:
    """Return the texts of the control tokens among some ids, each once."""
    controls = _control_tokens(tokenizer)
    return [controls[index] for index in sorted(controls.keys() & set(ids))]


@functools.lru_cache(maxsize=8)
def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return id -> text of the tokens that structure a prompt: special ones, and others written `<...>` or `[...]`.

    Our answer tags are none, even if a model has tokens for them. Texts from data hold no answer tag; see `clean_text`.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})  # a tokenizer of another kind may have none
    return {
        index: token.content
        for index, token in added.items()
        if (token.special or _LOOKS_LIKE_CONTROL.fullmatch(token.content))
        and token.content not in TAGS
        and len(token.content) > 1
    }


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the chat template writes after a completion, up to the first special token: what ends training rows.

    It is `<end_of_turn>` for Gemma, `<|im_end|>` for Qwen; the EOS token if the template writes no special one.
    """
    mark = "answer"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
    after = _encode_as_is(tokenizer, tokenizer.apply_chat_template(turns, tokenize=False).rpartition(mark)[2])
    special = set(tokenizer.all_special_ids)
    first = next((i for i, token in enumerate(after) if token in special), None)
    return [tokenizer.eos_token_id] if first is None else after[: first + 1]


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every id that ends a completion: the tokenizer's EOS, and those of the model's generation settings.

    Both are needed: Gemma ends a turn with 106, but its tokenizer's EOS is 1.
    """
    ids = {tokenizer.eos_token_id}
    declared = model.generation_config.eos_token_id
    ids.update(declared if isinstance(declared, list) else [declared])
    return sorted(index for index in ids if index is not None)
