"""What prompts of the tests show."""

from twice_rec.prompts import PromptFormat


def prompt_format(**shown):
    """Titles, ratings and item ids, nothing cut; `shown` are the fields that differ."""
    plain = {
        "prompt_history_items": None, "prompt_history_fields": ["title"], "prompt_review_fields": ["rating"],
        "prompt_candidate_fields": ["title", "item_id"], "prompt_description_chars": None,
        "prompt_details_chars": None, "prompt_review_chars": None,
    }  # fmt: skip
    return PromptFormat(**{**plain, **shown})
