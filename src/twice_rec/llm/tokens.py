"""Text and token ids: tokenizers, chat templates, and the ids that end a completion.

Templates and end-of-turn tokens come from the model's files. transformers is imported late, so recipes stay light.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twice_rec.errors import InputError
from twice_rec.prompts import Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_GATED = re.compile(r"gated repo|\b40[13] (Client Error|Forbidden|Unauthorized)", re.IGNORECASE)


def load_tokenizer(name: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; it pads on the left, as generation needs it.

    Raises:
        InputError: if there is none, if it is gated, or if it has no chat template.
    """
    import transformers

    try:
        tokenizer = from_pretrained(transformers.AutoTokenizer, name, revision=revision, padding_side="left")
    except InputError:
        raise
    except Exception as error:  # the tokenizers library raises bare exceptions for damaged files
        raise InputError(
            f"{name}: the tokenizer cannot be read ({str(error).splitlines()[0] if str(error) else error!r}); fetch it "
            "again (tokenizer.json, tokenizer_config.json)"
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
    except (OSError, ValueError) as error:
        text = str(error)
        if not Path(name).is_dir() and _GATED.search(text.replace(str(name), "")):
            raise InputError(
                f"{name} is gated: accept its licence on the hub and log in (`hf auth login`, or HF_TOKEN), or use an "
                "ungated model such as Qwen/Qwen3-0.6B"
            ) from error
        raise InputError(f"{name}: cannot be loaded: {text.splitlines()[0]}") from error


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], completion: str = "") -> list[int]:
    """Return the token ids of a prompt, opened for the model's turn, and of the beginning of a completion.

    The chat template writes the BOS token itself, so nothing is added to its text. Prompt and completion are encoded
    apart, since that is how a model meets them: the prompt's last token never depends on the completion.
    """
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return [*encode_text(tokenizer, text), *encode_text(tokenizer, completion)]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text; nothing is added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the chat template writes after a completion, up to the first special token: what ends training rows.

    It is `<end_of_turn>` for Gemma, `<|im_end|>` for Qwen; the EOS token if the template writes no special one.
    """
    mark = "answer"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
    after = encode_text(tokenizer, tokenizer.apply_chat_template(turns, tokenize=False).rpartition(mark)[2])
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
