"""The prepared data that later stages read."""

import json

import pytest

from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData, required_files, save_prompt_format
from twice_rec.errors import InputError
from twice_rec.prompts import PromptFormat


def test_required_files_say_who_makes_them(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / dataset.CATALOG).touch()
    assert required_files(tmp_path, dataset.CATALOG) == [tmp_path / "data" / dataset.CATALOG]
    with pytest.raises(InputError, match=r"sequences.jsonl: no such file .* made by prepare.sh, which must run first"):
        required_files(tmp_path, dataset.CATALOG, dataset.SEQUENCES)


def test_prompt_format_is_stored_under_short_names(tmp_path):
    shown = PromptFormat(prompt_history_items=6, prompt_history_fields=["title"], prompt_review_chars=None)
    save_prompt_format(tmp_path / dataset.PROMPT, shown)
    assert json.loads((tmp_path / dataset.PROMPT).read_text()) == {
        "history_items": 6, "history_fields": ["title"], "review_fields": ["review_title", "rating"],
        "candidate_fields": ["title", "item_id", "description", "details"], "description_chars": 300,
        "details_chars": 300, "review_chars": None,
    }  # fmt: skip
    assert PreparedData(tmp_path).prompt_format == shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"review_chars": ...}, "prompt.json: expected the keys history_items, .*; run prepare.sh again"),
        ({"colour": 1}, "prompt.json: expected the keys history_items, .*; run prepare.sh again"),
        ({"history_fields": ["colour"]}, "prompt.json: .*; run prepare.sh again"),
        ({"candidate_fields": ["title"]}, "both must be shown; run prepare.sh again"),
    ],
)
def test_prompt_formats_of_other_versions(tmp_path, changes, message):
    save_prompt_format(tmp_path / dataset.PROMPT, PromptFormat())
    values = {**json.loads((tmp_path / dataset.PROMPT).read_text()), **changes}
    values = {name: value for name, value in values.items() if value is not ...}
    (tmp_path / dataset.PROMPT).write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        _ = PreparedData(tmp_path).prompt_format
