"""A small base model of our own, for machines that cannot run or download a real one.

The architecture is Gemma 3, with sliding-window and full layers and a chat template that folds the system turn into the
user's, so that every code path of the paper's gemma-3-1b-it is used. The tokenizer is a byte-level BPE, trained on the
item texts of the domain and on the wording of the prompts. Runs of capital letters and digits (item ids, numbers) are
cut into pairs, and each pair is one token. Each answer tag is one token. A number is the same token everywhere, because
the space before it is a token of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from tiny_base.recipe import BaseModelRecipe, ShapeConfig
from twice_rec.answer_format import TAGS

PAD, EOS, BOS = "<pad>", "<eos>", "<bos>"
START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"

_ID_CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_PIECES = r" ?[A-Z][A-Z0-9](?![a-z])|\d[A-Z0-9](?![a-z])| ?[A-Za-z][a-z]*|\d| ?[^\sA-Za-z\d]+|\s"
_PAIR_COUNT = 20  # so that pairs become tokens before rare words do

# As Gemma's: the system message goes before the first user turn, roles are user and model, contents are trimmed.
CHAT_TEMPLATE = """\
{{ bos_token }}
{%- set prefix = '' -%}
{%- if messages[0]['role'] == 'system' -%}
  {%- set prefix = messages[0]['content'] + '\\n\\n' -%}
  {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{ raise_exception('roles must alternate, user first') }}
  {%- endif -%}
  {{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}
  {{ (prefix if loop.first else '') + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with Gemma's special tokens and the answer tags as tokens of their own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    pairs = [f"{a}{b}" for a in _ID_CHARACTERS for b in _ID_CHARACTERS]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, BOS, START_OF_TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chain(texts, pairs * _PAIR_COUNT), trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        additional_special_tokens=[START_OF_TURN, END_OF_TURN],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, shape: ShapeConfig, seed: int) -> Gemma3ForCausalLM:
    """Return a Gemma 3 with random weights for this tokenizer; it stops at EOS and at the end of a turn."""
    layers = range(1, shape.num_hidden_layers + 1)
    kinds = ["full_attention" if i % shape.full_attention_every == 0 else "sliding_attention" for i in layers]
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        query_pre_attn_scalar=shape.head_dim,
        sliding_window=shape.sliding_window,
        layer_types=kinds,
        max_position_embeddings=shape.max_position_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Gemma3ForCausalLM(config)
        _start_with_induction(model)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@torch.no_grad()
def _start_with_induction(model: Gemma3ForCausalLM) -> None:
    """Give the random weights the circuits that copying is made of, which random ones take millions of tokens to find.

    Layer 1 writes two things into the residual stream: the code (a random projection) of the token before, and the gist
    of the last dozen tokens, the mean of their codes. Layer 2, which has full attention, looks for places whose written
    code is the current token's, and for distant places whose gist is like the current one, and passes on the token
    at that place: induction (Olsson et al., "In-context learning and induction heads", 2022), exact and by context.
    All other heads look for tokens like their own (Trockman and Kolter, "Mimetic initialization of self-attention
    layers", 2023). Training is free to change all of it.

    Attention to a place rests on rotary positions: queries and keys are constants, from a direction that all embeddings
    share, with a phase between them. Looking for content uses the slow dimensions, which do not turn within a prompt.
    The strengths were chosen on a few documents: before any training, half of layer 2's attention is on the right line
    of a list where an id has to be found by its title.
    """
    config = model.config
    size, width, half = config.head_dim, config.hidden_size, config.head_dim // 2
    slow = torch.arange(half // 2, half)[-((width - 1) // 6) :]
    content = torch.cat([slow, slow + half])  # rotary pairs are (i, i + half)
    n = len(content)
    shared, code, written, gist = _orthonormal(1 + 3 * n, width).split([1, n, n, n])
    embeddings = model.model.embed_tokens.weight
    embeddings.mul_(4)
    embeddings.add_(shared * 0.5 * embeddings.norm(dim=1).mean())

    def constant(pairs: range, offset: float, kind: str, strength: float = 1.0) -> torch.Tensor:
        """Return rows whose products are largest if a query and a key are `offset` positions apart."""
        rows, index = torch.zeros(size, width), torch.tensor([i for i in pairs if i < half], dtype=torch.long)
        phase = offset * config.rope_parameters[kind]["rope_theta"] ** (-index / half)
        rows[index], rows[index + half] = (strength * part[:, None] * shared for part in (phase.cos(), phase.sin()))
        return rows

    def on_content(rows: torch.Tensor) -> torch.Tensor:
        return torch.zeros(size, width).index_copy(0, content, rows)

    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        layer.post_feedforward_layernorm.weight.fill_(-0.8)  # the norm's factor is 1 + weight
        attention.q_norm.weight.fill_(1.0)
        attention.k_norm.weight.fill_(1.0)
        for group in range(config.num_key_value_heads):
            query = key = on_content(_orthonormal(n, width))
            value = _orthonormal(size, width)
            output = 0.3 * value
            if number == 0 and group == 0:  # the token before
                kind = "sliding_attention"
                query, key = constant(range(6), 0, kind), constant(range(6), 1, kind)
                value, output = on_content(code), on_content(written)
            elif number == 0 and group == 1:  # the last dozen tokens
                still = constant(range(11, half), 0, kind)
                query, key = (constant(range(3, 7), offset, kind, 2.0) + still for offset in (0, 8))
                value, output = on_content(code), on_content(10 * gist)
            elif number == 1 and group <= 1:
                layer.post_attention_layernorm.weight.fill_(1.0)
                query, key, output = on_content(code), on_content(written), value
                if group == 1:
                    here = constant(range(1, 3), 0, "full_attention", 0.6)
                    query, key = on_content(gist) + here, on_content(gist) - here
            own = slice(group * size, (group + 1) * size)
            attention.k_proj.weight[own], attention.v_proj.weight[own] = key, value
            for head in range(group * attention.num_key_value_groups, (group + 1) * attention.num_key_value_groups):
                attention.q_proj.weight[head * size : (head + 1) * size] = query
                attention.o_proj.weight[:, head * size : (head + 1) * size] = output.T


def _orthonormal(rows: int, width: int) -> torch.Tensor:
    """Return random orthonormal rows [rows, width]."""
    return torch.linalg.qr(torch.randn(width, rows))[0].T


def model_card(recipe: BaseModelRecipe, figures: dict[str, Any], losses: Sequence[tuple[int, float]]) -> str:
    """Return the model card: what the model is, what it read, its losses, its exam.

    Args:
        figures: number of parameters, size of the vocabulary, and the exam: kind -> share right, number of questions.
        losses: (step, loss).
    """
    exam = "\n".join(
        f"| {kind} | {entry['right']:.3f} | {entry['questions']:,} |" for kind, entry in sorted(figures["exam"].items())
    )
    shown = [*losses[: -1 : max(1, len(losses) // 8)], *losses[-1:]]
    curve = "\n".join(["| step | loss |", "|---|---|", *(f"| {step:,} | {loss:.3f} |" for step, loss in shown)])
    return f"""---
license: apache-2.0
---
# Tiny base model

A Gemma 3 with {figures["parameters"]:,} parameters and {figures["vocabulary"]:,} tokens, made by
`bash base.sh recipes/tiny/base.yaml`. It stands in for gemma-3-1b-it where no weights can be downloaded, and is of no
use for anything else.

**Training data.** Made-up lists of purchases and candidates in the form of twice_rec's prompts, and questions that the
text itself answers: copy a candidate, find the candidate with an attribute or two, or the one that fits stated wishes,
say what each review says, name what was bought last and what its description goes well with, describe an item, answer
in the asked form. Items are random combinations of the synthetic shop's words with random ids. No purchase of any user
was read, and who buys what next is never asked.

**Training.** {recipe.steps:,} steps of about {recipe.tokens_per_step:,} tokens, float32, Muon at a learning rate of
{recipe.learning_rate:g}, embeddings and norms AdamW at a quarter of it. Loss per answer token:

{curve}

**Exam.** Greedy answers that are right to the letter, on {recipe.exam_documents} documents of items that occurred in no
training document, with {recipe.max_candidates} candidates and {recipe.max_purchases} purchases. "format": the questions
that say the form of the answer; "format obeyed": of these, those whose answer has the tags asked for and no others,
each once and in order, ends, and names a candidate, be it the right one or not.

| questions | right | number |
|---|---|---|
{exam}
"""
