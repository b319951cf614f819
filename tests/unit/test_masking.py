"""What looks like a secret and what does not, and that no recipe can hold or repeat one."""

import base64
import dataclasses
import json
from urllib.parse import quote

import pytest
import yaml

from tiny_base.recipe import BaseModelRecipe
from twice_rec.cf.recipe import SASRecRecipe
from twice_rec.data.recipe import PrepareRecipe
from twice_rec.errors import InputError, Unfinished
from twice_rec.evaluation.recipe import AbTestRecipe, EvaluateRecipe, JudgeRecipe, ReportRecipe
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.masking import Secrets, looks_secret, masked, masked_values, masked_words, secret_keys
from twice_rec.rationales.faults import Fault
from twice_rec.rationales.recipe import ClientConfig, RationalesRecipe
from twice_rec.recipe_reader import load_recipe
from twice_rec.sft.recipe import SFTRecipe
from twice_rec.sharing.recipe import ShareRecipe

RANDOM = "Xk29fJq03LmZp81QwErT7"  # as a key of no known provider
TOKENS = [
    "sk-" + "proj-planted-4711-never",
    "sk-" + "abcdefghijklmno1",
    "hf" + "_planted4711NeverShownAnywhere",
    "ghp" + "_planted4711NeverShown",
    "github" + "_pat_11PLANTED_4711nevershown",
    "gsk" + "_planted4711NeverShown",
    "xai-" + "planted4711nevershown",
    "AIza" + "SyPlanted4711never_shown",
    "eyJ" + "hbGciOiJIUzI1NiJ9.eyJzdWIiOiI0NzExIn0.planted_4711",
    RANDOM,
]
RECIPES = [BaseModelRecipe, PrepareRecipe, RationalesRecipe, SFTRecipe, SASRecRecipe, GRPORecipe, EvaluateRecipe]
RECIPES = [*RECIPES, JudgeRecipe, AbTestRecipe, ReportRecipe, ShareRecipe]


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("around", ["{}", "found '{}'", "a={}&b", "[{}]", "https://h/{}/x", "words: {}.", "--a {}\n"])
def test_tokens_are_masked_wherever_they_are(token, around):
    text = masked(around.format(token))
    assert token not in text
    assert "[hidden]" in text
    assert masked(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pass-word@hub/a", "https://[hidden]@hub/a"),
        ("https://pass-word@hub/a", "https://[hidden]@hub/a"),
        ("https:/user:pass-word@hub/a", "https:/[hidden]@hub/a"),  # as a path writes it
        ("'user:pass-word@10.0.0.1:80'", "'[hidden]@10.0.0.1:80'"),
        ("http://h/v1?api-version=1&api-key=pass-word", "http://h/v1?api-version=1&api-key=[hidden]"),
        ("sft: r.yaml --hub_token pass-word --seed 1", "sft: r.yaml --hub_token [hidden] --seed 1"),
        ("--openai-api-key=pass-word", "--openai-api-key=[hidden]"),
        ("{'token': 'pass-word', 'a': 'b'}", "{'token': '[hidden]', 'a': 'b'}"),
        ('{\\"hf_token\\": \\"pass-word\\"}', '{\\"hf_token\\": \\"[hidden]\\"}'),
        ("Client(api_key='pass-word')", "Client(api_key='[hidden]')"),
        ("Authorization: Bearer pass-word-1", "Authorization: Bearer [hidden]"),
        ("run password=pass-word", "run password=[hidden]"),
        ("found ['R', 'token=pass-word']", "found ['R', 'token=[hidden]']"),
        ("password: pass-word", "password: [hidden]"),
        ("http://h/v1#access_token=pass-word", "http://h/v1#access_token=[hidden]"),
        ("-----BEGIN RSA PRIVATE KEY-----\npass-word", "[hidden]"),
    ],
)
def test_forms_are_masked(text, shown):
    assert masked(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "hf_hub_download(repo_id, token=token, api_key=self._api_key)",
        "{'message': 'Incorrect API key provided', 'code': 'invalid_api_key'}",
        "model Qwen3-30B-A3B-Instruct-2507-FP8 of hub/google/gemma-3-1b-it@main",
        "commit 8d1e4c9e23ab7786a15b2c3d8d1e4c9e23ab7786",
        "user AE222BBOVZIF42YOOPNBXL4UUMYA, item B00GRMTZE4",
        "--api_key_env OPENAI_API_KEY --max_tokens 600",
        "'eos_token': '<|im_end|>', \"pad_token\": \"<pad>\"",
        "/tmp/pytest-of-root/pytest-3/test_forms0/run: no such folder",
        "2026-01-01 10:20:30 INFO http://127.0.0.1:8000/v1 answers",
        "runs/hf_runs_2024_08_Llama3Instruct8BQuantized",
    ],
)
def test_what_is_no_secret_stays(text):
    assert masked(text) == text


def test_values_of_the_environment_are_stored_nowhere(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "correcthorse")
    stored = masked_values({"wandb_run_name": "correcthorse", "deep": [{"a": ("correcthorse", 1, None, 2.5)}]})
    assert stored == {"wandb_run_name": "[MY_TOKEN]", "deep": [{"a": ["[MY_TOKEN]", 1, None, 2.5]}]}


def test_long_texts_take_no_time():
    for part in ("a", "a:", "hf_", "sk-", "k=", "?", "://", "aB3"):
        masked(part * (200_000 // len(part)))


def test_the_values_of_the_environment_are_masked_however_they_are_written(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://user:p%C3%A4ss-word@proxy:3128")
    monkeypatch.setenv("ALL_PROXY", "me:other-word@proxy:3128")
    monkeypatch.setenv("WANDB_API_KEY", "plain words")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "slash/and+")
    monkeypatch.setenv("SSL_KEY", "/etc/ssl/private.pem")
    for value in ("päss-word", "p%C3%A4ss-word", "other-word", "plain words", "slash/and+"):
        for written in (value, quote(value, safe=""), base64.b64encode(value.encode()).decode(), json.dumps(value)):
            assert written.strip('"') not in masked(f"<{written}>")
    assert base64.b64encode(b"me:other-word").decode() not in masked(f"<{base64.b64encode(b'me:other-word').decode()}>")
    assert masked("/etc/ssl/private.pem") == "/etc/ssl/private.pem"
    secrets = Secrets()
    secrets.add("short", "NAME")  # is a part of everyday words
    assert secrets.hide("short") == "short"


def test_every_message_for_the_user_is_masked():
    for error in (InputError, Unfinished, Fault):
        assert RANDOM not in str(error(f"found {RANDOM}")) + repr(error(f"found {RANDOM}"))


def test_words_of_a_command():
    words = ["sft", "r.yaml", "--hub_token", "pass", "word", "--api_key=pass", "--seed", "1", "--name", RANDOM]
    hidden = ["--hub_token", "[hidden]", "[hidden]", "--api_key=[hidden]", "--seed", "1", "--name", "[hidden]"]
    assert masked_words(words) == ["sft", "r.yaml", *hidden]


def test_secrets_are_found_at_any_depth():
    values = {"a": [{"b": {"hf_token": "pass"}}], RANDOM: 1, "password": 123456, "logit_bias": {"key": 1}, "c": "d"}
    assert list(secret_keys(values)) == ["a[0].b.hf_token", "[hidden]", "password"]
    assert list(secret_keys({"token": "${NAME}", "url": "https://${USER}:${PASS}@h?key=${KEY}"})) == []
    assert looks_secret("wandb_project", "8d1e4c9e23ab7786a15b2c3d8d1e4c9e23ab7786")  # as the keys of wandb are
    assert not looks_secret("model_revision", "8d1e4c9e23ab7786a15b2c3d8d1e4c9e23ab7786")


def refused(folder, recipe, text, *flags):
    path = folder / "r.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipe(path, recipe, flags)
    assert caught.value.__cause__ is None
    return str(caught.value)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_every_key_refuses_a_secret(tmp_path, recipe):
    """Of ours, of TRL's and of nobody's; as text, in a list, in a mapping, in a mapping in a list."""
    theirs = dataclasses.fields(recipe.trainer_config()) if hasattr(recipe, "TRAINER_CONFIG") else ()
    names = [*recipe.model_fields, *(field.name for field in theirs), "openai_api_key", "nobodys"]
    for make in (lambda s: s, lambda s: [s], lambda s: {"a": s}, lambda s: [{"a": {"b": s}}]):
        given = {name: make(TOKENS[i % len(TOKENS)]) for i, name in enumerate(dict.fromkeys(names))}
        said = refused(tmp_path, recipe, yaml.safe_dump(given, width=10_000))
        assert not [token for token in TOKENS if token in said]
        missing = [n for n in given if n not in getattr(recipe, "OWNED", {}) and f": {n}" not in said]
        assert not missing
    assert "HF_TOKEN" in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 1\ntoken: 'pass-word-4711\n", "line 3"),
        ("seed: 1\ntoken: pass-word-4711: x\n", "mapping values are not allowed here (line 2"),
        ("token: *pass-word-4711\n", "line 1"),
        ("token: !pass-word-4711 x\n", "line 1"),
        ("token: !!int pass-word-4711\n", "invalid literal"),
        ("token: !!float pass-word-4711\n", "could not convert"),
        ("token: !!timestamp pass-word-4711\n", "not YAML"),
        ("token: [pass-word-4711\nseed: 1\n", "line 2"),
        ("\tpass-word-4711: 1\n", "line 1"),
        ("? [pass-word-4711]\n: 1\n", "unknown key [...]"),
        ("pass-word-4711\n", "found a text"),
        ("%pass-word-4711\n", "line 2"),
    ],
)
def test_yaml_that_is_wrong_is_not_repeated(tmp_path, text, says):
    said = refused(tmp_path, ReportRecipe, text)
    assert "pass-word" not in said
    assert says in said


def test_wrong_values_are_repeated_if_they_are_short(tmp_path):
    text = "run_dir: r\ndomain: D\nseed: many\nbootstrap_samples: the whole of my notes of yesterday\n"
    said = refused(tmp_path, ReportRecipe, text)
    assert "seed must be a whole number, found 'many'" in said
    assert "found a text of 34 characters" in said


def test_settings_refuse_secrets_without_a_recipe_too():
    for config in ({"extra_headers": {"X-Note": RANDOM}}, {"base_url": f"https://h/v1/{RANDOM}"}):
        with pytest.raises(ValueError, match="seems to hold a secret") as caught:
            ClientConfig(**config)
        assert RANDOM not in str(caught.value)
    with pytest.raises(ValueError) as caught:
        ClientConfig(concurrency=RANDOM)
    assert RANDOM not in str(caught.value)
