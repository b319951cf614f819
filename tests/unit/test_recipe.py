"""Recipes are read strictly, and every error is reported at once."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_base.recipe import BaseModelRecipe
from twice_rec.cf.baselines import BASELINES
from twice_rec.cf.confidence import CONFIDENCES
from twice_rec.cf.recipe import BaselinesRecipe, SASRecRecipe
from twice_rec.data.candidates import CANDIDATE_LISTS
from twice_rec.data.recipe import PrepareRecipe
from twice_rec.data.sources import SOURCES
from twice_rec.errors import InputError
from twice_rec.evaluation.recipe import AbTestRecipe, EvaluateRecipe, JudgeRecipe, ReportRecipe
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.grpo.rewards import REWARDS
from twice_rec.rationales.recipe import RationalesRecipe
from twice_rec.recipe import Settings, TrainerRecipe
from twice_rec.recipe_reader import describe_keys, load_recipe, show_recipe
from twice_rec.records import CONDITIONS, RANKED_LISTS, VERDICTS
from twice_rec.sft.dataset import TASKS
from twice_rec.sft.recipe import SDPORecipe, SFTRecipe
from twice_rec.sharing.recipe import ShareRecipe
from twice_rec.stages.cost import CostRecipe
from twice_rec.study.recipe import StudyRecipe

ROOT = Path(__file__).parents[2]
CLASSES = {
    "prepare": PrepareRecipe,
    "recipe": BaseModelRecipe,
    "base": BaseModelRecipe,
    "rationales": RationalesRecipe,
    "sft": SFTRecipe,
    "sft_qwen3": SFTRecipe,
    "rationales_self_verified": RationalesRecipe,
    "sft_self_verified": SFTRecipe,
    "sdpo": SDPORecipe,
    **dict.fromkeys(("grpo_rank", "grpo_certainty", "grpo_distilled", "grpo_combined", "grpo_hinted"), GRPORecipe),
    **dict.fromkeys(("sft_4gpus", "sft_8gpus"), SFTRecipe),
    "sasrec": SASRecRecipe,
    "sasrec_release": SASRecRecipe,
    "baselines": BaselinesRecipe,
    "grpo": GRPORecipe,
    "grpo_improved": GRPORecipe,
    "grpo_server": GRPORecipe,
    "grpo_one_gpu": GRPORecipe,
    **dict.fromkeys(("grpo_4gpus", "grpo_8gpus", "grpo_two_nodes", "grpo_ray"), GRPORecipe),
    "cost": CostRecipe,
    "evaluate": EvaluateRecipe,
    "judge": JudgeRecipe,
    "report": ReportRecipe,
    "study": StudyRecipe,
    "ab_test": AbTestRecipe,
    "share": ShareRecipe,
}
MODULES = [*ROOT.glob("src/twice_rec/**/*.py"), *ROOT.glob("tiny_base/*.py")]
FOLDERS = ("tiny", "synthetic", "grocery", "amazon", "smollm")
RECIPES = sorted(
    [
        *(path for folder in FOLDERS for path in ROOT.glob(f"recipes/{folder}/*.yaml")),
        ROOT / "tiny_base" / "recipe.yaml",
    ]
)


def cpu(recipe):
    """A CPU cannot check a GPU recipe's bf16."""
    return ["--bf16", "false", "--use_cpu", "true"] if issubclass(recipe, TrainerRecipe) else []


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_recipe_fits_its_class_and_states_every_key(path):
    recipe = CLASSES[path.stem]
    flags = ["--source_dir", "anywhere"] if path.stem == "prepare" else []
    assert load_recipe(path, recipe, [*flags, *cpu(recipe)])
    shown = show_recipe(path, recipe, flags)  # on any machine
    assert not re.findall(r"^(\w+):.*# default$", shown, re.MULTILINE), "keys that neither recipe nor base state"


@pytest.mark.parametrize("recipe", set(CLASSES.values()), ids=lambda c: c.__name__)
def test_every_key_is_read_somewhere(recipe):
    """Some line of code reads it as an attribute; a recipe's own declaration does not count."""
    source = "\n".join(re.sub(r"^    \w+: .*", "", path.read_text(), flags=re.MULTILINE) for path in MODULES)
    for name in recipe.model_fields:
        task = re.fullmatch(r"(?:item_info|direct|rationale)_(rows|weight)", name)  # read as f"{task}_rows"
        assert re.search(rf"\.{name}\b" if not task else rf"_{task[1]}\"", source), name


def test_a_setting_is_declared_once():
    """No class outside the recipes repeats a group's keys, and no key is declared by two groups of one recipe."""
    for recipe in CLASSES.values():
        owners = {}
        for group in recipe.__mro__:
            for name in vars(group).get("__annotations__", {}):
                if issubclass(group, Settings) and name in recipe.model_fields:
                    owners.setdefault(name, []).append(group.__name__)
        assert all(len(groups) == 1 for groups in owners.values()), owners
    keys = {name for recipe in CLASSES.values() for name in recipe.model_fields}
    for path in MODULES:
        for block in re.findall(r"@dataclass[^\n]*\nclass (\w+)[^\n]*\n((?:    .*\n|\n)*)", path.read_text()):
            fields = set(re.findall(r"^    (\w+): ", block[1], re.MULTILINE))
            assert len(fields & keys) <= 3, f"{path.name}: {block[0]} repeats {sorted(fields & keys)}"


@pytest.mark.parametrize(
    ("recipe", "name", "registry"),
    [
        (PrepareRecipe, "source", SOURCES),
        (PrepareRecipe, "candidate_lists", CANDIDATE_LISTS),
        (PrepareRecipe, "prompt_list", CANDIDATE_LISTS),
        (EvaluateRecipe, "lists", CANDIDATE_LISTS),
        (JudgeRecipe, "judged_list", CANDIDATE_LISTS),
        (JudgeRecipe, "conditions", CONDITIONS),
        (EvaluateRecipe, "score_lists", RANKED_LISTS),
        (AbTestRecipe, "shown_list", CANDIDATE_LISTS),
        (SASRecRecipe, "lists", RANKED_LISTS),
        (SASRecRecipe, "baselines", BASELINES),
        (GRPORecipe, "reward_funcs", REWARDS),
        (GRPORecipe, "confidence", CONFIDENCES),
        (RationalesRecipe, "accepted_verdicts", VERDICTS),
    ],
)
def test_choices_are_the_names_in_the_registry(recipe, name, registry):
    text = describe_keys(recipe).partition(f"--{name}\n")[2].splitlines()[0]
    assert f"one of {', '.join(registry)}" in text


def test_ranked_lists_are_the_candidate_lists_and_the_catalogue():
    assert set(RANKED_LISTS) == {*CANDIDATE_LISTS, "full"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_what_show_prints_is_the_same_recipe(path, tmp_path):
    recipe = CLASSES[path.stem]
    flags = ["--domain", "1e5", *(["--source_dir", "x"] if path.stem == "prepare" else []), *cpu(recipe)]
    again = write(tmp_path, show_recipe(path, recipe, flags))
    assert load_recipe(again, recipe).everything() == load_recipe(path, recipe, flags).everything()


def test_names_in_a_registry_stand_nowhere_else_as_a_list():
    """Two names of one registry in one line of code outside its own module are a second list."""
    homes = {"rewards": REWARDS, "baselines": BASELINES, "confidence": CONFIDENCES}
    for home, registry in homes.items():
        for path in MODULES:
            if path.stem in (home, "recipe"):
                continue
            for line in path.read_text().splitlines():
                named = [name for name in registry if re.search(rf"[\"']{name}[\"']", line)]
                assert len(named) < 3, f"{path.name}: {line.strip()}"
    assert len(TASKS) == 3


def write(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


MINIMAL = "run_dir: r\ndomain: D\nseed: 1\n"


def test_all_errors_at_once(tmp_path):
    path = write(
        tmp_path,
        MINIMAL
        + "seed: 2\nhiden_size: 64\ndropout: yes\nnum_layers: 1.5\nnum_heads: 3\nlists: [uniform, all]\n"
        + "learning_rate: 0\n",
    )
    with pytest.raises(InputError) as caught:
        load_recipe(path, SASRecRecipe, ["--batch_size", "many"])
    message = str(caught.value)
    assert "8 errors in the recipe" in message
    for part in (
        "line 4: seed is in line 3 already",
        "line 5: unknown key hiden_size; did you mean hidden_size?",
        "line 6: dropout must be a number, found True",
        "line 7: num_layers must be a whole number, found 1.5",
        "line 9: lists must be a list, each entry one of uniform, popularity, hard, full, found ['uniform', 'all']",
        "--batch_size: batch_size must be a whole number or null, found 'many'",
        "hidden_size 64 does not divide by num_heads 3",
        "learning_rate is 0.0; it must be above 0",
    ):
        assert part in message


def test_missing_keys_say_what_they_are(tmp_path):
    with pytest.raises(InputError, match="missing key seed: seed of everything that this stage draws"):
        load_recipe(write(tmp_path, "run_dir: r\ndomain: D\n"), SASRecRecipe)


def test_checks_over_wrong_keys_are_passed_over(tmp_path):
    with pytest.raises(InputError) as caught:
        load_recipe(write(tmp_path, MINIMAL + "hidden_size: wide\nnum_heads: 3\n"), SASRecRecipe)
    assert "does not divide" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the recipe is empty"),
        ("- a\n- b\n", "expected lines of `key: value`, found a list"),
        ("a: [1\n", "not YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        load_recipe(write(tmp_path, text), SASRecRecipe)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml", SASRecRecipe)
    with pytest.raises(InputError, match="a folder; give one of the recipes in it"):
        load_recipe(tmp_path, SASRecRecipe)


def test_overrides(tmp_path):
    path = write(tmp_path, MINIMAL)
    flags = ["--learning_rate", "1e-4", "--patience=null", "--lists", "uniform", "full", "--baselines=[ease]"]
    recipe = load_recipe(path, SASRecRecipe, [*flags, "--domain", "2014", "--overwrite", "--num-heads", "4"])
    assert (recipe.learning_rate, recipe.patience, recipe.num_heads) == (1e-4, None, 4)
    assert (recipe.lists, recipe.baselines, recipe.domain, recipe.overwrite) == (
        ["uniform", "full"],
        ["ease"],
        "2014",
        True,
    )


def test_one_word_makes_a_list(tmp_path):
    assert load_recipe(write(tmp_path, MINIMAL), SASRecRecipe, ["--lists", "hard"]).lists == ["hard"]


def test_abbreviated_flags_and_loose_words_are_errors(tmp_path):
    with pytest.raises(InputError) as caught:
        load_recipe(write(tmp_path, MINIMAL), SASRecRecipe, ["1", "--learn", "0.1"])
    assert "'1' on the command line belongs to no --key" in str(caught.value)
    assert "--learn: unknown key learn" in str(caught.value)


def test_numbers_without_a_dot_and_whole_floats(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL + "learning_rate: 1e-3\ndropout: 0\n"), SASRecRecipe)
    assert recipe.learning_rate == 0.001
    assert isinstance(recipe.dropout, float)


@pytest.mark.parametrize("value", [".inf", ".nan", "-.inf"])
def test_numbers_must_be_finite(tmp_path, value):
    with pytest.raises(InputError, match="learning_rate must be a number"):
        load_recipe(write(tmp_path, MINIMAL + f"learning_rate: {value}\n"), SASRecRecipe)


def test_domain_fills_run_dir(tmp_path):
    recipe = load_recipe(write(tmp_path, "run_dir: runs/{domain}\ndomain: D\nseed: 1\n"), SASRecRecipe)
    assert recipe.run_path == Path("runs/D")


def test_settings_leave_out_what_changes_no_result(tmp_path):
    settings = load_recipe(write(tmp_path, MINIMAL), SASRecRecipe).settings()
    assert "hidden_size" in settings
    assert not {"run_dir", "overwrite", "wandb", "device", "export_scores"} & settings.keys()


PREPARE = MINIMAL + "source: release\n"


@pytest.mark.parametrize(
    ("recipe", "keys", "message"),
    [
        (PrepareRecipe, {"source": "release"}, "source release reads files: set source_dir"),
        (PrepareRecipe, {"source": "synthetic", "min_history": 2}, "min_history is 2; leave_one_out needs at least 3"),
        (PrepareRecipe, {"source": "synthetic", "max_history": 4}, "max_history is 4; it must be at least min_history"),
        (
            PrepareRecipe,
            {"source": "synthetic", "prompt_list": "hard"},
            "prompt_list is hard; candidate_lists has only uniform",
        ),
        (
            PrepareRecipe,
            {"source": "synthetic", "temporal_test": 0.95},
            "must be above 0 and leave a share for training",
        ),
        (PrepareRecipe, {"source": "synthetic", "prompt_candidate_fields": ["title"]}, "both must be shown"),
        (
            PrepareRecipe,
            {"source": "synthetic", "candidate_lists": ["uniform", "hard"], "hard_pool": 5},
            "hard_pool is 5; num_candidates 30 draws 29",
        ),
        (RationalesRecipe, {"min_words": 9, "max_words": 8}, "leave no length that passes"),
        (RationalesRecipe, {"annotator": "release"}, "set source_dir, or pass --source_dir FOLDER"),
        (RationalesRecipe, {"annotator": "openai", "exemplars": "x.json"}, "annotator openai needs model, found null"),
        (RationalesRecipe, {"annotator": "batch", "model": "m"}, "annotator batch needs exemplars, found null"),
        (RationalesRecipe, {"self_check": "true"}, "annotator offline has no model that could check"),
        (RationalesRecipe, {"self_check": "guess"}, "self_check must be true or false or one of pick, found 'guess'"),
        (RationalesRecipe, {"annotator": "release", "source_dir": "d", "self_check": "pick"}, "release has no model"),
        (RationalesRecipe, {"variant": "answers"}, "variant is 'answers'; it must be rationales or rationales_NAME"),
        (
            SFTRecipe,
            {"model_name_or_path": "m", "rationales": "data"},
            "rationales is 'data'; it must be rationales or rationales_NAME",
        ),
        (RationalesRecipe, {"max_cost": 5}, "max_cost is 5.0, but price_per_million_input and .* are 0"),
        (RationalesRecipe, {"max_similarity": 0.1}, "max_similarity is 0.1; it must be between 0.3 and 1"),
        (RationalesRecipe, {"extra_body": "{model: m}"}, "extra_body may not hold model"),
        (EvaluateRecipe, {"variants": ["stage2", "bert"]}, "variants names bert; known are"),
        (EvaluateRecipe, {"variants": ["base"]}, "variants names base: set model_name_or_path"),
        (EvaluateRecipe, {"rankings": ["sampled", "sampled"]}, "rankings names one twice: sampled, sampled"),
        (EvaluateRecipe, {"precomputed_scores": {"oracle": "x.npz"}}, "precomputed_scores uses a name of ours"),
        (EvaluateRecipe, {"precomputed_scores": {"stage3_D": "x.npz"}}, "precomputed_scores uses a name of ours"),
        (EvaluateRecipe, {"variants": ["stage3_D", "stage2_D", "stage1_D"]}, "variants names stage1_D; known are"),
        (EvaluateRecipe, {"variants": ["stage3_sampled"]}, "variants names stage3_sampled; known are"),
        (ReportRecipe, {"comparisons": [["a"]]}, r"not a pair \[a, b\]"),
        (ReportRecipe, {"comparisons": [["a", "b", "c"]]}, r"names c behind a pair \[a, b\]"),
        (SASRecRecipe, {"variant": "../x"}, "it names folders"),
    ],
)
def test_combinations_that_cannot_work(tmp_path, recipe, keys, message):
    text = MINIMAL + "".join(f"{name}: {value}\n" for name, value in keys.items())
    with pytest.raises(InputError, match=message):
        load_recipe(write(tmp_path, text), recipe)


class TestTrainerKeys:
    """Keys of TRL's configurations beside ours."""

    MINIMAL = MINIMAL + "use_cpu: true\nbf16: false\n"

    def load(self, tmp_path, text, *flags):
        return load_recipe(write(tmp_path, self.MINIMAL + text), GRPORecipe, flags)

    def test_split(self, tmp_path):
        recipe = self.load(tmp_path, "lora_r: 4\nlearning_rate: 1e-5\nnum_train_epochs: 2\n")
        assert recipe.lora_r == 4
        assert recipe.trainer_keys == {"use_cpu": True, "bf16": False, "learning_rate": 1e-5, "num_train_epochs": 2.0}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("num_generation: 4\n", "unknown key num_generation; did you mean num_generations?"),
            ("num_generations: 4.5\n", "num_generations must be a whole number or null, found 4.5"),
            ("lr_scheduler_type: cosin\n", "lr_scheduler_type must be one of linear, cosine"),
            ("output_dir: x\n", "output_dir is set by the stage: results go to a folder of run_dir"),
            ("report_to: wandb\n", "use wandb: none, offline or online"),
            ("num_generations: 3\nper_device_train_batch_size: 8\n", "GRPOConfig refuses the values"),
            ("reward_weights: [1.0]\n", "reward_funcs has 4 names and reward_weights 1 values"),
            ("reward_weights: [0, 0, 0, 0]\n", "reward_weights are all 0"),
            ("reward_tau_quantile: 0.5\n", "set one of them and the other to null"),
            ("variant: D\n", "variant is 'D'; it must be stage3 or stage3_NAME"),
            ("variant: stage3_a/b\n", "it must be stage3 or stage3_NAME"),
            ("variant: stage3_D_sampled\n", "not sampled or likelihood"),
            ("model_revision: main\n", "model_name_or_path is null: the stage-2 model has no revisions"),
            ("reward_funcs: [rank]\nreward_weights: [1]\nitem_first: true\n", "would earn the same"),
            (
                "reward_funcs: [rank]\nreward_weights: [1]\nattn_implementation: flash_attention_2\n",
                "reward rank needs attn_implementation sdpa, chunked_sdpa, eager or varlen",
            ),
            ("reward_rank: hr\n", "reward_rank must be one of reciprocal_rank, ndcg"),
            ("sample_every: 0\n", "sample_every is 0; it must be at least 1"),
            ("log_completions: true\n", "all completions go to completions/ by themselves"),
            (
                "share_prefixes: true\nattn_implementation: flash_attention_2\n",
                "share_prefixes needs attn_implementation sdpa or chunked_sdpa or eager or varlen, ",
            ),
        ],
    )
    def test_errors(self, tmp_path, text, message):
        with pytest.raises(InputError, match=message):
            self.load(tmp_path, text)

    def test_variants_name_folders(self, tmp_path):
        assert self.load(tmp_path, "").folder == "grpo"
        assert self.load(tmp_path, "", "--variant", "stage3_lambda_0.5").folder == "grpo_lambda_0.5"


@pytest.mark.parametrize("recipe", CLASSES.values(), ids=lambda c: c.__name__)
def test_help_names_every_key(recipe):
    text = describe_keys(recipe)
    assert all(f"--{name}\n" in text for name in recipe.model_fields)


def test_every_variant_of_the_recipes_page_is_a_recipe():
    """The flags of each command in the table are accepted, and each names results of its own."""
    page = (ROOT / "recipes" / "README.md").read_text().partition("## Variants of stage 3")[2]
    commands = re.findall(r"`bash grpo_step2\.sh (recipes/\S+)(.*?)`", page)
    folders = []
    for path, flags in commands:
        words = [*flags.split(), "--bf16", "false", "--use_cpu", "true"]
        recipe = load_recipe(ROOT / path, GRPORecipe, words)
        folders.append((recipe.run_dir, recipe.folder))
    assert len(commands) >= 6
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("domain", ["grocery", "amazon"])
def test_paper_and_improved_recipes_differ_where_they_say_so(domain):
    paper, improved = (
        load_recipe(ROOT / "recipes" / domain / f"{name}.yaml", GRPORecipe, cpu(GRPORecipe)).everything()
        for name in ("grpo", "grpo_improved")
    )
    of_the_release = {
        "beta": 0.04, "temperature": 0.9, "epsilon": 0.2, "loss_type": "bnpo", "use_bias_correction_kl": False,
        "scale_rewards": "group", "num_iterations": 1, "num_generations": 16, "learning_rate": 2e-5,
        "reward_funcs": ["collaborative", "structure", "tags_release", "only_expected_tags"],
        "reward_weights": [4, 1, 1, 1], "reward_lambda": 3, "reward_tau": 0.3, "reward_tau_quantile": None,
        "confidence": "sigmoid", "confidence_debiased": False,
    }  # fmt: skip
    assert {name: paper[name] for name in of_the_release} == of_the_release
    differing = {name for name in paper.keys() | improved.keys() if paper.get(name) != improved.get(name)}
    assert differing == {
        "variant", "beta", "temperature", "epsilon_high", "loss_type", "use_bias_correction_kl", "scale_rewards",
        "reward_tau", "reward_tau_quantile", "confidence", "confidence_debiased", "cf_model", "gradient_checkpointing",
    }  # fmt: skip


def test_a_base_gives_what_a_recipe_does_not(tmp_path):
    (tmp_path / "paper.yaml").write_text(MINIMAL + "epochs: 3\nnum_heads: 1\n")
    path = write(tmp_path, "base: paper.yaml\nepochs: 4\n")
    recipe = load_recipe(path, SASRecRecipe, ["--dropout", "0.1"])
    assert (recipe.epochs, recipe.num_heads, recipe.dropout, recipe.seed) == (4, 1, 0.1, 1)
    shown = show_recipe(path, SASRecRecipe, ["--dropout", "0.1"])
    for line in (
        r"epochs: 4 +# line 2",
        rf"num_heads: 1 +# {tmp_path}/paper.yaml, line 5",
        r"dropout: 0.1 +# --dropout",
    ):
        assert re.search(line, shown)
    assert re.search(r"max_length: 50 +# default", shown)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: none.yaml\n", "line 1: base: .*none.yaml: no such recipe"),
        ("seed: !foo [a]\n", "not YAML: could not determine a constructor"),
        ("wandb_project: 2026-13-45\n", "not YAML: month must be in 1..12"),
        ("? [a, b]\n: 1\n", r"unknown key \["),
        (MINIMAL + "variant: eval\n", "variant is 'eval', the name of a baseline or of another stage's results"),
        (MINIMAL + "variant: stage2\n", "or of another stage's results"),
        ("base: r.yaml\n", "a recipe cannot be its own base: r.yaml"),
        ("seed: &a [*a]\n", "nested too deeply, or a value that holds itself"),
        ("seed: &a {b: *a}\n", "nested too deeply, or a value that holds itself"),
        ("seed: " + "[" * 3000 + "\n", "nested too deeply"),
        ("base: 3\n" + MINIMAL, "line 1: base must be the path of another recipe, found 3"),
        ("base: wrong.yaml\n", r"wrong.yaml, line 4: unknown key epoch; did you mean epochs\?"),
    ],
)
def test_bases_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "wrong.yaml").write_text(MINIMAL + "epoch: 3\n")
    with pytest.raises(InputError, match=message):
        load_recipe(write(tmp_path, text), SASRecRecipe)


def test_renamed_keys_and_values_work_with_a_warning(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    recipe = load_recipe(write(tmp_path, MINIMAL + "source: world\nworld_users: 9\n"), PrepareRecipe)
    assert (recipe.source, recipe.synthetic_users) == ("synthetic", 9)
    assert "line 5: world_users is called synthetic_users now; the old name still works in this version" in caplog.text
    assert "line 4: source world is called synthetic now" in caplog.text
    path = write(tmp_path, MINIMAL + "source: synthetic\nsynthetic_users: 9\n")
    assert load_recipe(path, PrepareRecipe, ["--world_users", "7"]).synthetic_users == 7  # a flag wins under any name
    (tmp_path / "old.yaml").write_text(MINIMAL + "cf_variant: sasrec_release\n")
    child = write(tmp_path, "base: old.yaml\ncf_model: ease\n")
    assert load_recipe(child, GRPORecipe, cpu(GRPORecipe)).cf_model == "ease"  # its own key wins under any name
    with pytest.raises(InputError, match="line 5: cf_variant is called cf_model now, which is given too"):
        load_recipe(write(tmp_path, MINIMAL + "cf_model: ease\ncf_variant: sasrec\n"), GRPORecipe, cpu(GRPORecipe))
    flags = ["--cf_variant", "sasrec_release", *cpu(GRPORecipe)]
    assert load_recipe(write(tmp_path, MINIMAL), GRPORecipe, flags).cf_model == "sasrec_release"
    flags = ["--outside_scores", "{mine: x.npz}", "--variants", "mine"]
    assert load_recipe(write(tmp_path, MINIMAL), EvaluateRecipe, flags).precomputed_scores == {"mine": "x.npz"}


def test_results_need_a_folder(tmp_path):
    with pytest.raises(InputError, match="run_dir is empty"):
        load_recipe(write(tmp_path, MINIMAL), SASRecRecipe, ["--run_dir", "''"])
    recipe = load_recipe(write(tmp_path, MINIMAL), SASRecRecipe, ["--run_dir", "~/{domain}"])
    assert recipe.run_path.is_relative_to(Path.home())


def test_groups_are_checked_without_a_recipe_too():
    with pytest.raises(ValueError, match="hidden_size 64 does not divide by num_heads 3"):
        SASRecRecipe(run_dir="r", domain="D", seed=0, num_heads=3)
    with pytest.raises(ValueError, match="frozen"):
        SASRecRecipe(run_dir="r", domain="D", seed=0).epochs = 3


@pytest.mark.parametrize("value", ["2020-13-45", "&a [*a]", "[" * 3000, "!!int x"])
def test_a_flag_that_yaml_stumbles_over_is_text(tmp_path, value):
    path = write(tmp_path, MINIMAL)
    assert load_recipe(path, SASRecRecipe, ["--wandb_group", value]).wandb_group == value
    with pytest.raises(InputError, match="--epochs: epochs must be a whole number"):
        load_recipe(path, SASRecRecipe, ["--epochs", value])


def test_the_recipe_of_another_stage_is_one_error():
    with pytest.raises(InputError) as caught:
        load_recipe(ROOT / "recipes/tiny/grpo.yaml", SASRecRecipe)
    assert "1 error in the recipe" in str(caught.value)
    assert re.search(r"\d\d of \d\d keys are unknown: another stage's recipe\?$", str(caught.value))


def test_a_recipe_for_gpus_says_on_a_cpu_which_ones_run_there():
    command = [sys.executable, "-m", "twice_rec", "sft", "recipes/grocery/sft.yaml", "--check"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.rstrip().endswith("On a CPU take recipes/tiny or recipes/smollm")
