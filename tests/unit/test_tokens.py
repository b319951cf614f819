"""User text never becomes a control token, for the kinds of tokenizers and chat templates that users run."""

import functools
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tiny_base.model import train_tokenizer
from twice_rec.answer_format import TAGS
from twice_rec.errors import InputError
from twice_rec.llm.tokens import encode_chat, encode_text, end_of_turn_ids

GEMMA = (
    "{{ bos_token }}{% set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for m in (messages[1:] if system else messages) %}<start_of_turn>{{ m['role'] }}\n"
    "{{ system if loop.first else '' }}{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}<start_of_turn>model\n"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"
)
MISTRAL = "<s>{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
PHI = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}<|assistant|>\n"
TEXTS = ["I <3 tea and coffee > water, <|im_ end|> [INST x] </s> <tool_call> </ think>\n\n" + string.printable] * 9


def tokenizer_of(template, special, ordinary=(), rstrip=False):
    """A byte-level BPE; `ordinary` are added tokens that the tokenizer does not call special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, rstrip=rstrip) for text in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in ordinary])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], bos_token=special[1])
    made.add_special_tokens({"additional_special_tokens": [AddedToken(t, rstrip=rstrip) for t in special[2:]]})
    made.chat_template = template
    return made


FAMILIES = {
    "tiny": lambda: train_tokenizer(TEXTS, 300),
    "gemma": lambda: tokenizer_of(
        GEMMA, ["<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], ["<unused1>", "[multimodal]", "\n\n"]
    ),
    "qwen": lambda: tokenizer_of(
        CHATML,
        ["<|im_end|>", "<|endoftext|>", "<|im_start|>"],
        ["<think>", "</think>", "<tool_call>", "<|fim_prefix|>"],
    ),
    "llama": lambda: tokenizer_of(
        LLAMA, ["<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    ),
    "mistral": lambda: tokenizer_of(MISTRAL, ["</s>", "<s>", "[INST]", "[/INST]"]),
    "phi": lambda: tokenizer_of(PHI, ["<|end|>", "<s>", "<|user|>", "<|system|>", "<|assistant|>"], rstrip=True),
}
made = functools.cache(lambda name: FAMILIES[name]())


def controls(tokenizer):
    """Texts of the tokens that user text must not become."""
    texts = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return [text for text in texts if text not in TAGS and text[0] in "<["]


def chat(user, system="You recommend tea."):
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def control_ids(tokenizer, ids):
    return [index for index in ids if tokenizer.added_tokens_decoder.get(index, "x") != "x"
            and tokenizer.added_tokens_decoder[index].content in controls(tokenizer)]  # fmt: skip


@pytest.fixture(params=FAMILIES)
def tokenizer(request):
    return made(request.param)


def test_texts_of_control_tokens_in_messages_stay_text(tokenizer):
    harmless = control_ids(tokenizer, encode_chat(tokenizer, chat("x")))
    for control in controls(tokenizer):
        for text in (f"tea {control} and {control}{control}x", control, f"a\n{control}\nb"):
            ids = encode_chat(tokenizer, chat(text, system=f"s {control} t"))
            assert control_ids(tokenizer, ids) == harmless
            whole = tokenizer.apply_chat_template(
                chat(text, f"s {control} t"), tokenize=False, add_generation_prompt=True
            )
            assert tokenizer.decode(ids).replace(" ", "").replace("\n", "") == whole.replace(" ", "").replace("\n", "")


def test_texts_of_control_tokens_in_completions_stay_text(tokenizer):
    text = " ".join(controls(tokenizer)) + " <think> likes tea </think> <item_id> B1 </item_id>"
    ids = encode_text(tokenizer, text)
    assert not control_ids(tokenizer, ids)
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text
    assert encode_chat(tokenizer, chat("x"), text)[-len(ids) :] == ids


def test_special_tokens_are_split_as_the_tokenizer_splits_them(tokenizer):
    text = f"tea {tokenizer.eos_token} and coffee"
    assert (
        encode_text(tokenizer, text)
        == tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    )


@pytest.mark.parametrize("name", FAMILIES)
@given(
    text=st.text(st.characters(exclude_characters="<[", exclude_categories=["Cs"]), max_size=60),
    system=st.sampled_from(["", "I <3 tea", "< think > [x]\n\n"]),
)
def test_other_texts_have_the_ids_that_the_template_gives_them(name, text, system):
    tokenizer, prompt = made(name), chat(text, system)
    options = {"add_generation_prompt": True, "return_dict": True}
    theirs = tokenizer.apply_chat_template(prompt, tokenize=True, **options)["input_ids"]
    assert encode_chat(tokenizer, prompt) == theirs
    assert encode_text(tokenizer, text) == (tokenizer(text, add_special_tokens=False)["input_ids"] if text else [])


def test_the_end_of_a_turn_is_still_a_control_token():
    tokenizer = made("qwen")
    assert tokenizer.convert_ids_to_tokens(end_of_turn_ids(tokenizer)) == ["<|im_end|>"]


def test_whitespace_that_a_control_token_swallows_is_swallowed_around_marked_text_too():
    tokenizer, marked = made("phi"), "<|end|>"
    around = encode_chat(tokenizer, chat(f"tea{marked}"))
    plain = encode_chat(tokenizer, chat("tea"))
    start = len(plain) - 2  # `<|end|>` and `<|assistant|>` are the last two
    assert around[:start] == plain[:start]
    assert around[-2:] == plain[-2:]


def test_many_control_texts_take_no_deep_recursion():
    text = "<tool_call>" * 3000
    assert made("qwen").decode(encode_text(made("qwen"), text)) == text


@pytest.mark.parametrize("change", ["| upper", "| replace('tea', '')", "[:3]"])
def test_a_template_that_changes_a_message_is_refused(change):
    tokenizer = tokenizer_of(f"{{% for m in messages %}}{{{{ m['content'] {change} }}}}{{% endfor %}}", ["</s>", "<s>"])
    with pytest.raises(InputError, match="changes or drops the text of the system message 'You recommend tea.'"):
        encode_chat(tokenizer, chat("green tea"))
