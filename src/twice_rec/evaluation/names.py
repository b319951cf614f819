"""The names that readers see: of variants, metrics and lists. Files and the terminal keep the short ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Short name -> what readers see. A variant that is not here is named after the longest name that it begins with.
VARIANTS: Mapping[str, str] = {
    "random": "Random",
    "popularity": "Popularity",
    "itemknn": "Item-kNN",
    "ease": "EASE",
    "sasrec": "SASRec",
    "bert4rec": "BERT4Rec",
    "s3rec": "S3Rec",
    "nextitnet": "NextItNet",
    "sine": "SINE",
    "transrec": "TransRec",
    "lightsans": "LightSANs",
    "fossil": "FOSSIL",
    "gru4rec": "GRU4Rec",
    "base": "A: base model",
    "stage2": "B: stage 2",
    "stage3_C": "C: stage 3 without stage 2",
    "stage3_D": "D: stage 3, match reward",
    "stage3": "E: stage 3",
    "stage2_item_only": "Stage 2, asked for the item alone",
    "stage3_item_only": "Stage 3, asked for the item alone",
    "stage2_no_rationale": "Stage 2, trained without rationales",
    "stage2_sdpo": "S-DPO, our re-creation",
    "stage2_self_verified": "Rec-SAVER-like, our re-creation",
    "stage3_rank": "Rec-R1-like, our re-creation",
    "stage3_certainty": "Intuitor-like, our re-creation",
    "stage3_improved": "Stage 3, improved rewards",
    **{f"stage3_lambda{value}": f"Stage 3, lambda {value}" for value in range(6)},
    "ceiling_text": "Ceiling: text",
    "ceiling_popularity": "Ceiling: text, popularity",
    "ceiling_cohort": "Ceiling: text, popularity, cohort",
    "oracle": "Ceiling: everything",
}
# How a language model is ranked -> what readers see; a second ranking's variants end with an underscore and its name.
RANKINGS: Mapping[str, str] = {"sampled": "by votes", "likelihood": "by likelihood"}
SUFFIXES: Mapping[str, str] = {f"_{ranking}": says for ranking, says in RANKINGS.items()}

LISTS: Mapping[str, str] = {
    "uniform": "Uniform lists",
    "popularity": "Popularity lists",
    "hard": "Hard lists",
    "full": "Full catalogue",
}

CF, LLM, CEILING = "Models without language", "Language models", "Ceilings: the best that such knowledge allows"
GROUPS = (CF, LLM, CEILING)  # in table order


def variant_name(variant: str) -> str:
    """Return what readers see of a variant."""
    for suffix, says in SUFFIXES.items():
        if variant.endswith(suffix) and variant != suffix:
            return f"{variant_name(variant.removesuffix(suffix))}, {says}"
    if variant in VARIANTS:
        return VARIANTS[variant]
    known = max((name for name in VARIANTS if variant.startswith(f"{name}_")), key=len, default=None)
    if known is None:
        return variant
    return f"{VARIANTS[known]}, {variant.removeprefix(f'{known}_').replace('_', ' ')}"


def domain_name(domain: str) -> str:
    """Return what readers see of a domain, `Office Products` for `Office_Products`."""
    return domain.replace("_", " ")


def metric_name(metric: str) -> str:
    """Return what readers see of a metric, `HR@1` for `uniform/hr@1`."""
    return metric.rpartition("/")[2].upper()


def metric_with_list(metric: str) -> str:
    """Return metric and list, `HR@1 on uniform lists` for `uniform/hr@1`."""
    kind, _, name = metric.rpartition("/")
    if not kind:
        return name.upper()
    return f"{name.upper()} {'in the' if kind == 'full' else 'on'} {LISTS.get(kind, kind).lower()}"


_ASKED = {"sampled": "votes", "with_rationale True": "rationale first", "with_rationale False": "item alone"}


def asked_name(asked: str) -> str:
    """Return what readers see of how a language model was asked, see `equals.labels`."""
    return ", ".join(_ASKED.get(part, part.replace("_", " ")) for part in asked.split(", ") if part)


def group_of(variant: str) -> str:
    """Return which of `GROUPS` a variant belongs to."""
    if variant == "oracle" or variant.startswith("ceiling_"):
        return CEILING
    return LLM if variant.partition("_")[0] in ("base", "stage2", "stage3") else CF


def chosen(variants: Sequence[str], most: int) -> list[str]:
    """Return the variants of a figure that has room for so many lines: the paper's first, in the given order."""
    first = ("sasrec", "base", "stage2", "stage3", "stage3_D", "stage3_C", "popularity")
    order = sorted(variants, key=lambda name: (first.index(name) if name in first else len(first), name))
    kept = set(order[:most])
    return [name for name in variants if name in kept]
