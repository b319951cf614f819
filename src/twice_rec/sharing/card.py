"""The card of a shared model: front matter that the hub reads, and what is known of the model, in words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from twice_rec.markdown import markdown_table
from twice_rec.masking import masked
from twice_rec.records import RANKED_LISTS
from twice_rec.sharing.facts import Facts
from twice_rec.sharing.origins import origin_of
from twice_rec.sharing.recipe import ShareRecipe
from twice_rec.sharing.scores import Evaluation, Summary

_PAPER = (
    'the paper "Think Wise, Collaborate Effectively: A Rationale-Aware LLM-Based Recommender with Reinforcement '
    'Learning from Collaborative Signals" (TWiCE-Rec, AAAI-26, pages 15609-15616)'
)
_FORM = "`<think> ... </think> <item_nm> title </item_nm> <item_id> id </item_id>`"
_ASK_CF = {"collaborative", "cf"}  # rewards of stage 3 that ask the CF model
_UNKNOWN = "not known: it is not in the run any more"


def card_of(recipe: ShareRecipe, facts: Facts, evaluations: Sequence[Evaluation], notes: str = "") -> str:
    """Return the whole card; no part of it holds a secret or a path of this machine."""
    title = f"TWiCE-Rec on {recipe.domain}: {recipe.variant}"
    parts = [
        f"# {title}",
        _intro(recipe, facts),
        notes.strip(),
        f"## Method\n\n{_bullets(_method(facts))}",
        f"## Data\n\n{_bullets(_data(recipe, facts))}",
        f"## Results\n\n{_results(recipe, evaluations)}",
        f"## Limits\n\n{_bullets(_limits(recipe, facts, evaluations))}",
        f"## Use\n\n{_use(recipe, facts)}",
        f"## Licence\n\n{_licence(facts)}",
        f"## All settings of the training\n\n{_settings(facts)}",
    ]
    text = "\n\n".join(part for part in parts if part)
    return f"---\n{front_matter(recipe, facts, evaluations)}\n---\n\n{masked(text)}\n"


def front_matter(recipe: ShareRecipe, facts: Facts, evaluations: Sequence[Evaluation]) -> str:
    """Return the YAML that the hub reads, written by the hub's own classes."""
    from huggingface_hub import ModelCardData

    is_adapter = recipe.weights == "adapter"
    base = recipe.base_model_id if is_adapter and recipe.base_model_id else facts.base.hub_id
    origin = origin_of(facts.source)
    more: dict[str, Any] = {"base_model_relation": "adapter" if is_adapter else "finetune"} if base else {}
    results = [result for evaluation in evaluations for result in _eval_results(recipe, facts, evaluation)]
    return ModelCardData(
        language=origin.language,
        license=facts.license.license if facts.license else None,
        license_name=facts.license.name if facts.license else None,
        license_link=facts.license.link if facts.license else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=base,
        datasets=[origin.dataset] if origin.dataset else None,
        tags=["twice-rec", "recommendation", "sequential-recommendation", "trl", _trainer(facts)],
        model_name=f"twice-rec-{recipe.domain}-{recipe.variant}",
        eval_results=results or None,
        **more,
    ).to_yaml(original_order=[])


def _eval_results(recipe: ShareRecipe, facts: Facts, evaluation: Evaluation) -> Iterable[Any]:
    from huggingface_hub import EvalResult

    origin = origin_of(facts.source)
    for key, found in evaluation.metrics.items():
        kind, _, metric = key.partition("/")
        yield EvalResult(
            task_type="text-generation",
            task_name="Sequential recommendation",
            dataset_type=origin.dataset or facts.source or "unknown",
            dataset_name=f"{origin.name}, {recipe.domain}",
            dataset_config=recipe.domain,
            dataset_split="test",
            metric_type=metric,
            metric_name=f"{metric.upper()}, {kind} lists ({evaluation.name})",
            metric_value=round(found["value"], 4),
            metric_args={"ci95": [round(end, 4) for end in found["ci95"]], "users": evaluation.users},
        )


def _trainer(facts: Facts) -> str:
    return {"sft": "sft", "sdpo": "dpo"}.get(facts.training.stage, "grpo")


def _intro(recipe: ShareRecipe, facts: Facts) -> str:
    made_by = {
        "sft": "stage 2 (multi-task SFT)", "dpo": "a baseline, a re-creation of S-DPO behind stage 2,",
        "grpo": f"stage 3 ({'confidence-weighted ' if _asks_cf(facts) else ''}GRPO)",
    }[_trainer(facts)]  # fmt: skip
    return (
        f"A language model that reads a user's history, reasons about it, and recommends one item of a list of "
        f"candidates. It is the result of {made_by} of twice_rec, an open reproduction of {_PAPER}; it is not the "
        f"authors' model. Domain: **{recipe.domain}**. Base model: {_base(facts)}."
    )


def _asks_cf(facts: Facts) -> bool:
    return not _ASK_CF.isdisjoint(facts.setting("reward_funcs") or [])


def _base(facts: Facts) -> str:
    base = facts.base
    if base.hub_id is None:
        return f"`{base.name}`, a folder, not a model of the hub"
    commit = f", commit `{base.commit}`" if base.commit else ""
    return f"[{base.hub_id}](https://huggingface.co/{base.hub_id}){commit}"


def _method(facts: Facts) -> Iterable[str]:
    sft = facts.training if _trainer(facts) == "sft" else facts.sft
    if sft is not None:
        rows = [f"{sft.config[key]:,} {word}" for key, word in _ROWS.items() if sft.config.get(key) is not None]
        yield (
            "**Stage 2**, supervised fine-tuning on three tasks: describe an item, choose an item, reason and then "
            f"choose. Asked for at most: {', '.join(rows) or 'all rows'}. {_trained(sft.config)}, "
            f"{sft.figures.get('steps', '?')} steps."
        )
    if _trainer(facts) == "grpo":
        setting, figures = facts.setting, facts.training.figures
        rewards = zip(setting("reward_funcs") or [], setting("reward_weights") or [], strict=False)
        start = "the stage-2 model" if sft else f"`{Path(str(setting('model_name_or_path'))).name}`, without stage 2"
        behind = (
            f"The collaborative-filtering model behind them: `{setting('cf_model')}`, confidence "
            f"`{setting('confidence')}`, lambda {setting('reward_lambda'):g}, tau {figures.get('tau', '?')}. "
        )
        yield (
            f"**Stage 3**, GRPO from {start}. Rewards and weights: {', '.join(f'`{n}` {w:g}' for n, w in rewards)}. "
            f"{behind if _asks_cf(facts) else 'No collaborative-filtering model has a part in them. '}"
            f"{setting('num_generations')} completions per prompt, KL weight {setting('beta')}, loss "
            f"`{setting('loss_type')}`. {_ours(facts)}"
            f"{_trained(facts.training.config)}, {figures.get('steps', '?')} steps."
        )
    if _trainer(facts) == "dpo":
        setting, figures = facts.setting, facts.training.figures
        start = "the stage-2 model" if sft else f"`{Path(str(setting('model_name_or_path'))).name}`"
        yield (
            f"**S-DPO** from {start}, asked for the item alone: the target's answer above those of "
            f"{setting('num_negatives')} other candidates at once, {setting('preference_rows') or 'all'} users, beta "
            f"{setting('beta')}. {_trained(facts.training.config)}, {figures.get('steps', '?')} steps."
        )
    about = facts.training.about
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    commit = about.get("commit") or "not known"
    yield f"Code: twice_rec, commit `{commit}`; {versions}. Seed {facts.setting('seed')}."
    if about.get("seconds"):
        cores = about.get("machine", {}).get("cpus")
        yield f"This stage took {about['seconds']:,.0f} s by the clock, on a machine of {cores} CPU cores."


_ROWS = {
    "item_info_rows": "items to describe", "direct_rows": "choices", "rationale_rows": "choices with a rationale",
}  # fmt: skip


def _trained(config: Mapping[str, Any]) -> str:
    rank, alpha = config.get("lora_r"), config.get("lora_alpha")
    how = f"LoRA of rank {rank}, alpha {alpha}" if config.get("use_peft") else "All weights trained"
    return f"{how}, learning rate {config.get('learning_rate', 'the default')}, {config.get('dtype')}"


def _data(recipe: ShareRecipe, facts: Facts) -> Iterable[str]:
    origin = origin_of(facts.source)
    yield f"Source: {origin.name} (`{facts.source or 'unknown'}`), domain {recipe.domain}. {origin.says}"
    yield f"Licence of the data: {origin.licence}"
    if facts.data is None:
        yield f"Counts: {_UNKNOWN}."
    else:
        figures, config = facts.data.figures, facts.data.config
        counts = ", ".join(
            f"{figures[name]:,} {name}" for name in ("users", "items", "interactions") if name in figures
        )
        yield (
            f"{counts}, after filters ({config.get('k_core')}-core, histories of {config.get('min_history')} to "
            f"{config.get('max_history')} interactions). Split: {str(config.get('split')).replace('_', ' ')}; the "
            f"test interactions were not trained on. Candidates: {config.get('num_candidates')} per user, the target "
            "among them."
        )
    if facts.rationales is not None:
        config, figures = facts.rationales.config, facts.rationales.figures
        by_rule = dict.fromkeys(("offline", "themes"), "a rule, no language model")
        writer = {**by_rule, "released": "the authors, from their released files"}.get(
            str(config.get("annotator")), f"the language model `{config.get('model')}`"
        )
        yield f"Rationales of stage 1: {figures.get('accepted', 0):,} accepted, written by {writer}."


def _results(recipe: ShareRecipe, evaluations: Sequence[Evaluation]) -> str:
    if not evaluations:
        return "Not evaluated yet: nothing is claimed about how well it recommends."
    says = [
        "Means over test users with 95 % bootstrap intervals over users. Ties count against the target. The other rows "
        "are models of the same run on the same users and lists."
    ]
    for evaluation in evaluations:
        asked = ", ".join(f"{name} {_value(value)}" for name, value in evaluation.asked.items())
        says.append(f"**{evaluation.name}**, {evaluation.users:,} users ({asked}):")
        for kind in RANKED_LISTS:
            if rows := _rows(evaluation, kind):
                says.append(f"{RANKED_LISTS[kind]}\n\n{markdown_table(*rows)}")
    return "\n\n".join(says)


def _rows(evaluation: Evaluation, kind: str) -> tuple[list[str], list[list[str]]] | None:
    keys = [key for key in evaluation.metrics if key.startswith(f"{kind}/")]
    if not keys:
        return None
    models: dict[str, Summary] = {f"this model ({evaluation.name})": evaluation.metrics, **evaluation.others}
    rows = [[name, *(_cell(found[key]) for key in keys)] for name, found in models.items() if set(keys) <= found.keys()]
    return ["model", *(key.partition("/")[2].upper() for key in keys)], rows


def _cell(found: Mapping[str, Any]) -> str:
    return "{:.4f} [{:.4f}, {:.4f}]".format(found["value"], *found["ci95"])


def _ours(facts: Facts) -> str:
    """What of stage 3 the paper has not."""
    setting, says = facts.setting, ""
    if (loss := setting("candidate_loss") or "none") != "none":
        says += f"Beside them a loss on all candidates, `{loss}`, weight {setting('candidate_weight'):g}. "
    if setting("cf_hints"):
        says += f"Its prompts name the {setting('cf_hints')} candidates that `{setting('cf_model')}` ranks first. "
    return says


def _limits(recipe: ShareRecipe, facts: Facts, evaluations: Sequence[Evaluation]) -> Iterable[str]:
    if facts.source == "synthetic":
        yield (
            "**A synthetic domain.** Users, items and reviews are made up by a program. The model knows nothing of any "
            "real product or person, and is of no use but to try the method."
        )
    yield (
        f"It chooses among the candidates in its prompt; it does not search a catalogue. It knows items of "
        f"{recipe.domain} only, as they were when the data was collected."
    )
    yield (
        "Its rationale need not be why it chose the item, and may say untrue things of the user or of items. "
        "It may name an item that is no candidate, or break the answer format: check both before you show anything."
    )
    yield (
        "Prompts must have the form that twice_rec writes. Other forms, longer histories and other languages than "
        f"{origin_of(facts.source).language_name} were not tried."
    )
    if facts.source != "synthetic":
        yield (
            "It was trained on texts that people wrote about products. It can repeat parts of them and their biases, "
            "and may favour popular items. No filter for harmful content was added."
        )
    yield "It was evaluated offline only: no user was shown its recommendations. Do not use it to judge people."
    if evaluations and min(evaluation.users for evaluation in evaluations) < 1000:
        yield "Fewer than 1,000 users were asked in an evaluation above; its intervals are wide."


def _use(recipe: ShareRecipe, facts: Facts) -> str:
    if recipe.weights == "adapter":
        base = recipe.base_model_id or facts.base.hub_id
        load = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
            'model = PeftModel.from_pretrained(base, "THIS_MODEL")\n'
        )
    else:
        load = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("THIS_MODEL")\n'
        )
    load += 'tokenizer = AutoTokenizer.from_pretrained("THIS_MODEL")'
    return (
        f"It answers by {_FORM}.\n\n```python\n{load}\n```\n\ntwice_rec writes the prompts and reads the answers: set "
        f"`model_name_or_path` of `evaluate.yaml` to this model and ask variant `base`{_as_trained(facts)}."
    )


def _as_trained(facts: Facts) -> str:
    """The settings of its prompts that an evaluation needs, if they are not the defaults."""
    names = ("max_prompt_tokens", "item_first", "cf_hints", *(["cf_model"] if facts.setting("cf_hints") else []))
    given = [f"`{name}: {_value(facts.setting(name))}`" for name in names if facts.setting(name)]
    return f", with {', '.join(given)} as in its training" if given else ""


def _licence(facts: Facts) -> str:
    if facts.license is None:
        return (
            f"Not known: no card of the base model {facts.base.name} was found that names one. The licence of the base "
            "holds for this model too; see to it before you use or share it. The data has terms of its own, above."
        )
    name = facts.license.name or facts.license.license
    source = (
        "as given by who shared it" if facts.license.source == "the recipe" else f"read from {facts.license.source}"
    )
    return f"`{name}`, that of the base model ({source}). The data has terms of its own, see above."


def _settings(facts: Facts) -> str:
    rows = [[f"`{name}`", _value(value)] for name, value in sorted(facts.training.config.items())]
    return f"<details>\n\n{markdown_table(['setting', 'value'], rows)}\n\n</details>"


def _value(value: Any) -> str:
    """A setting as JSON, of a path outside the hub its last part only."""
    if isinstance(value, str) and (value.startswith(("/", "~", ".")) or Path(value).exists()):
        value = Path(value).name
    return json.dumps(value, ensure_ascii=False).replace("|", "\\|").replace("<", "&lt;")


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
