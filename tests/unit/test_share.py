"""A shared model: its folder, its card, and what is refused."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from shared_run import GRPO, SFT, evaluated, finish, make_run, write
from twice_rec.files import hash_file
from twice_rec.manifest import Hashes, stale_because
from twice_rec.records import Prediction
from twice_rec.sharing.scores import ranks_of, summary
from twice_rec.stages import stage7_share

ROOT = Path(__file__).parents[2]


def share(run_dir, *flags):
    """Call the stage; returns its exit status."""
    return stage7_share.main([str(ROOT / "recipes/tiny/share.yaml"), "--run_dir", str(run_dir), *flags])


def test_the_folder_has_the_model_its_card_and_its_results(tmp_path):
    run_dir = make_run(tmp_path)
    evaluated(run_dir)
    before = hash_file(run_dir / "grpo" / "merged")
    assert share(run_dir) == 0
    folder = run_dir / "share" / "stage3"
    names = {"README.md", "results.json", "model.safetensors", "config.json", "manifest.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "model.safetensors").read_bytes() == b"stage 3" * 999
    assert (folder / "model.safetensors").samefile(run_dir / "grpo" / "merged" / "model.safetensors")  # no second copy
    assert hash_file(run_dir / "grpo" / "merged") == before
    assert stale_because(run_dir / "eval" / "stage3", Hashes()) is None  # the card makes nothing stale
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert share(run_dir) == 0
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_the_hub_reads_the_card(tmp_path):
    run_dir = make_run(tmp_path)
    evaluated(run_dir)
    assert share(run_dir, "--base_model_id", "owner/base") == 0
    card = ModelCard.load(run_dir / "share" / "stage3" / "README.md")
    data = card.data.to_dict()
    expected = {
        "license": "apache-2.0", "library_name": "transformers", "pipeline_tag": "text-generation", "language": "en",
        "base_model": "owner/base", "base_model_relation": "finetune",
        "tags": ["twice-rec", "recommendation", "sequential-recommendation", "trl", "grpo"],
    }  # fmt: skip
    assert {name: data[name] for name in expected} == expected
    assert "datasets" not in data
    ranks = {"hr@1": 2 / 4, "hr@5": 1.0, "mrr": (1 + 1 / 2 + 1 + 1 / 4) / 4}  # of 1, 2, 1, 4
    found = {result.metric_type: result for result in card.data.eval_results}
    assert {name: found[name].metric_value for name in ranks} == {n: round(value, 4) for n, value in ranks.items()}
    assert found["hr@5"].metric_args == {"ci95": [1.0, 1.0], "users": 4}
    assert (found["hr@1"].dataset_name, found["hr@1"].dataset_split) == (
        "the synthetic domain of twice_rec, Synthetic", "test",
    )  # fmt: skip
    assert card.data.model_name == "twice-rec-Synthetic-stage3"
    for part in (
        "GRPO from the stage-2 model", "`collaborative` 4, `structure` 1", "lambda 3, tau 0.3", "128 steps",
        "68 steps", "500 choices with a rationale", "LoRA of rank 8, alpha 16",
        "20,000 users, 500 items, 210,317 interactions", "3,399 accepted, written by a rule, no language model",
        "**A synthetic domain.**", "Fewer than 1,000 users", "read from the card of owner/base",
        "| this model (stage3) |", "| 0.5000 [", "| sasrec", "| 0.7500 [",
    ):  # fmt: skip
        assert part in card.text, part
    assert str(tmp_path) not in card.content  # no path of this machine


def test_a_baseline_of_stage_2_and_rewards_without_cf_are_told_as_what_they_are(tmp_path):
    run_dir = make_run(tmp_path)
    sequences, start = Path("data/sequences.jsonl"), Path("sft/merged")
    for stage, folder, config in (
        ("sdpo", "sft_sdpo", {"num_negatives": 3, "preference_rows": 48, "beta": 1.0, "seed": 42}),
        ("grpo", "grpo_D", {**GRPO, "reward_funcs": ["match", "structure"]}),
    ):
        model = Path(folder) / "merged"
        write(run_dir / model / "model.safetensors", b"weights")
        finish(run_dir, stage, folder, config, [sequences, start], [model], steps=6)
    assert share(run_dir, "--variant", "stage2_sdpo") == share(run_dir, "--variant", "stage3_D") == 0
    sdpo, match = (ModelCard.load(run_dir / "share" / name / "README.md") for name in ("stage2_sdpo", "stage3_D"))
    assert "**S-DPO** from the stage-2 model, asked for the item alone" in sdpo.text
    assert "a baseline, a re-creation of S-DPO" in sdpo.text
    assert "GRPO" not in sdpo.text
    assert sdpo.data.tags[-1] == "dpo"
    assert "No collaborative-filtering model has a part in them" in match.text
    assert "confidence-weighted" not in match.text
    assert "lambda 3" not in match.text


def test_a_card_tells_of_hints_and_how_to_ask_with_them(tmp_path):
    run_dir = make_run(tmp_path)
    model = Path("grpo_hinted/merged")
    write(run_dir / model / "model.safetensors", b"weights")
    ours = {"cf_hints": 3, "candidate_loss": "distillation", "candidate_weight": 1.0}
    inputs = [Path("data/sequences.jsonl"), Path("sft/merged")]
    finish(run_dir, "grpo", "grpo_hinted", {**GRPO, **ours}, inputs, [model], steps=6)
    assert share(run_dir, "--variant", "stage3_hinted") == share(run_dir) == 0
    hinted, plain = (
        ModelCard.load(run_dir / "share" / name / "README.md").text for name in ("stage3_hinted", "stage3")
    )
    assert (
        "a loss on all candidates, `distillation`, weight 1. Its prompts name the 3 candidates that `sasrec`" in hinted
    )
    assert 'ask variant `base`, with `cf_hints: 3`, `cf_model: "sasrec"` as in its training.' in hinted
    assert "hints" not in plain
    assert "ask variant `base`." in plain


def test_a_card_tells_of_the_rationales_that_were_read(tmp_path):
    run_dir = make_run(tmp_path)
    other, sequences, model = Path("rationales_own/accepted.jsonl"), Path("data/sequences.jsonl"), Path("sft/merged")
    write(run_dir / other, "{}\n")
    finish(run_dir, "rationales", "rationales_own", {"annotator": "openai", "model": "m"}, [], [other], accepted=7)
    finish(run_dir, "sft", "sft", {**SFT, "model_name_or_path": str(tmp_path / "base")}, [sequences, other], [model])
    assert share(run_dir, "--variant", "stage2") == 0
    card = (run_dir / "share" / "stage2" / "README.md").read_text()
    assert "7 accepted, written by the language model `m`" in card


def test_results_are_also_numbers_of_the_same_users(tmp_path):
    run_dir = make_run(tmp_path)
    evaluated(run_dir)
    assert share(run_dir) == 0
    row = json.loads((run_dir / "share" / "stage3" / "results.json").read_text())["stage3"]
    assert row["n"] == 4
    assert row["asked"] == {"ranking": "likelihood", "permutations": 1, "cf_hints": 0}
    assert row["metrics"]["uniform/hr@1"]["value"] == 2 / 4
    assert row["others"]["sasrec"]["uniform/hr@1"]["value"] == 3 / 4  # without the fifth user, whom it misses


def test_a_user_counts_once_by_the_mean_of_its_trainings():
    rows = [("a", 1, 1), ("a", 2, 3), ("b", 1, 3), ("b", 2, 3), ("c", 1, 1)]
    predictions = [Prediction(user, "t", {"uniform": rank}, seed) for user, seed, rank in rows]
    found = summary(ranks_of(predictions), ["a", "b"], ["uniform", "hard"], 100, 1)
    assert found["uniform/hr@1"]["value"] == (1 / 2 + 0) / 2
    assert found["uniform/mrr"]["value"] == pytest.approx(((1 + 1 / 3) / 2 + 1 / 3) / 2)
    assert not any(key.startswith("hard/") for key in found)


def test_before_an_evaluation_nothing_is_claimed_and_after_it_the_card_is_made_anew(tmp_path, caplog):
    run_dir = make_run(tmp_path, source="amazon2023")
    assert share(run_dir, "--variant", "stage2") == share(run_dir) == 0
    stage2, stage3 = (ModelCard.load(run_dir / "share" / name / "README.md") for name in ("stage2", "stage3"))
    assert "Not evaluated yet" in stage3.text
    assert stage3.data.eval_results is None
    assert stage3.data.datasets == ["McAuley-Lab/Amazon-Reviews-2023"]
    assert "no licence is known to us" in stage3.text
    assert "A synthetic domain" not in stage3.text
    assert "All weights trained, learning rate 0.0005" in stage2.text
    assert "**Stage 3**" not in stage2.text
    evaluated(run_dir)
    assert share(run_dir) == 2
    assert "input eval/stage3/predictions.jsonl is new" in caplog.text
    assert share(run_dir, "--overwrite", "true") == 0
    assert "| 0.5000 [" in (run_dir / "share" / "stage3" / "README.md").read_text()


@pytest.mark.parametrize("card", [None, "no front matter", "---\nlicense: [odd\n---\n", "---\ntags: [x]\n---\n"])
def test_an_unknown_licence_is_told(tmp_path, caplog, card):
    run_dir = make_run(tmp_path, card=card)
    assert share(run_dir) == 0
    read = ModelCard.load(run_dir / "share" / "stage3" / "README.md")
    assert read.data.license is None
    assert "Not known: no card of the base model base was found that names one" in read.text
    assert "the licence of base is not known" in caplog.text


def test_licences_without_a_word_of_the_hub_keep_their_name_and_link(tmp_path):
    run_dir = make_run(tmp_path, card="---\nlicense: other\nlicense_name: shop\nlicense_link: https://x.y/z\n---\n")
    assert share(run_dir) == 0
    data = ModelCard.load(run_dir / "share" / "stage3" / "README.md").data
    assert (data.license, data.license_name, data.license_link) == ("other", "shop", "https://x.y/z")


def test_a_base_of_the_hub_is_named_with_its_commit_and_licence(tmp_path, monkeypatch):
    run_dir, asked = make_run(tmp_path), []
    path, base = run_dir / "sft" / "manifest.json", "google/gemma-3-1b-it"
    row = json.loads(path.read_text())
    row["config"]["model_name_or_path"] = base
    row["inputs"] = {"rationales/accepted.jsonl": "0" * 64, f"hub/{base}": "c" * 40}
    write(path, json.dumps(row))
    card = write(tmp_path / "card.md", "---\nlicense: gemma\n---\n")

    def download(name, file, revision):
        asked.append((name, file, revision))
        return str(card)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for variant in ("stage2", "stage3"):
        assert share(run_dir, "--variant", variant) == 0
        read = ModelCard.load(run_dir / "share" / variant / "README.md")
        assert (read.data.base_model, read.data.license) == (base, "gemma")
        assert f"[{base}](https://huggingface.co/{base}), commit `{'c' * 40}`" in read.text
    assert asked == [(base, "README.md", "c" * 40)] * 2
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *arguments, **others: 1 / 0)
    assert share(run_dir, "--license", "mit", "--overwrite", "true") == 0  # then nobody asks the hub
    assert ModelCard.load(run_dir / "share" / "stage3" / "README.md").data.license == "mit"


def test_an_adapter_names_its_base_on_the_hub(tmp_path):
    run_dir = make_run(tmp_path)
    assert share(run_dir, "--weights", "adapter", "--base_model_id", "me/stage2") == 0
    folder = run_dir / "share" / "stage3"
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings == {"base_model_name_or_path": "me/stage2", "r": 8}
    assert (folder / "adapter_model.safetensors").read_bytes() == b"adapter"
    assert not (folder / "model.safetensors").exists()
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert (data["library_name"], data["base_model"], data["base_model_relation"]) == ("peft", "me/stage2", "adapter")
    assert str(run_dir) in (run_dir / "grpo" / "adapter_config.json").read_text()  # the run's own is as it was


def test_words_of_ones_own_are_part_of_the_card(tmp_path):
    run_dir = make_run(tmp_path)
    notes = write(tmp_path / "notes.md", "Made for the course of 2026.\n")
    assert share(run_dir, "--card_notes", str(notes)) == 0
    assert "\n\nMade for the course of 2026.\n\n" in (run_dir / "share" / "stage3" / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--variant", "base"], "variant is 'base'; it must be stage2, stage3, or one of them with _NAME"),
        (["--variant", "stage3_D"], "it is made by grpo_step2.sh with --variant stage3_D"),
        (["--variant", "stage2_x"], "it is made by sft.sh"),
        (["--hub_model_id", "mine"], "hub_model_id is 'mine'; it must be OWNER/NAME"),
        (["--hub_model_id", "a/b/c"], "hub_model_id is 'a/b/c'; it must be OWNER/NAME"),
        (["--weights", "adapter"], "share that first (--variant stage2), and give its name on the hub"),
        (["--weights", "adapter", "--variant", "stage2"], "has none: all weights were trained; use --weights merged"),
        (["--card_notes", "nowhere.md"], "card_notes is nowhere.md, which cannot be read as text"),
    ],
)
def test_what_cannot_be_shared_is_told_before_anything_is_written(tmp_path, caplog, flags, words):
    run_dir = make_run(tmp_path)
    assert share(run_dir, *flags) == 2
    assert words in caplog.text
    assert not (run_dir / "share").exists()


def test_stale_models_are_not_shared(tmp_path, caplog):
    run_dir = make_run(tmp_path)
    write(run_dir / "grpo" / "merged" / "config.json", "{ }")
    assert share(run_dir) == 2
    assert "was changed since the grpo stage finished" in caplog.text
    assert not (run_dir / "share" / "stage3").exists()


def test_without_a_token_nothing_begins(tmp_path, caplog, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    run_dir = make_run(tmp_path)
    assert share(run_dir, "--hub_model_id", "me/model") == 2
    assert "there is no token for the hub; log in by `hf auth login`, or set HF_TOKEN" in caplog.text
    assert not (run_dir / "share").exists()
