"""The estimates of stages before they run, against what an H100 needed; and the commands that print them."""

import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig

from twice_rec.data.dataset import PreparedData
from twice_rec.errors import InputError
from twice_rec.grpo import estimate as of_grpo
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.llm.footprint import gpu_hours, memory, read_shape
from twice_rec.llm.prompt_builder import PromptBuilder
from twice_rec.llm.recipe import AdapterConfig, EstimateConfig
from twice_rec.llm.tokens import load_tokenizer
from twice_rec.recipe_reader import load_recipe
from twice_rec.records import Rationale
from twice_rec.sft import estimate as of_sft
from twice_rec.sft.dataset import training_rows
from twice_rec.sft.encoding import encode_rows, pack, share_prefixes
from twice_rec.sft.estimate import Population
from twice_rec.sft.recipe import SDPORecipe, SFTRecipe
from twice_rec.stages import command_line, stage0_prepare, stage2_sft, stage2b_sdpo, stage3b_serve, stage3c_grpo

ROOT = Path(__file__).parents[2]
RESULTS = [json.loads(line) for line in (ROOT / "benchmarks/results/gpu.jsonl").read_text().splitlines()]
GEMMA = EstimateConfig(model_shape=str(ROOT / "recipes/shapes/gemma-3-1b-it.json"))
FACTOR = 1.15  # how far an estimate may be from what was measured
MAINS = {"sft": stage2_sft.main, "sdpo": stage2b_sdpo.main, "grpo": stage3c_grpo.main, "serve": stage3b_serve.main}
TRAINING = sorted(
    path for folder in ("grocery", "amazon", "tiny") for path in ROOT.glob(f"recipes/{folder}/*.yaml")
    if path.stem.startswith(("sft", "sdpo", "grpo"))
)  # fmt: skip


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Recipes name files from the repository; no hub is asked."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("ACCELERATE_CONFIG", raising=False)


@pytest.fixture(scope="module")
def shape():
    return read_shape("google/gemma-3-1b-it", GEMMA)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    flags = ["--synthetic_users", "400", "--synthetic_items", "60", "--k_core", "2"]
    words = ["--config", str(ROOT / "recipes/tiny/prepare.yaml"), "--run_dir", str(run_dir), *flags]
    assert stage0_prepare.main(words) == 0
    return run_dir


def measured(name):
    """The run of ours that REPRODUCTION.md's table is of, the first one."""
    return next(run for run in RESULTS if run["name"] == name and run["who"] == "ours" and "note" not in run)


def recipe_of(name, recipe, *flags):
    return load_recipe(ROOT / "recipes" / name, recipe, list(flags), here=False)


def near(value, other):
    return other / FACTOR < value < other * FACTOR


def grocery_lengths():
    """The rows of benchmarks/sft.py: those of the released Grocery users."""
    found = {
        k: np.array(v, float) for k, v in json.loads((ROOT / "benchmarks/grocery_lengths.json").read_text()).items()
    }
    users, mean = found["users"], found["rationales"].mean()
    return {
        "item_info": found["items"],
        "direct": np.stack([users[:, 0] + users[:, 1], users[:, 2]], 1),
        "rationale": np.stack([users[:, 0] + users[:, 3], np.full(len(users), mean)], 1),
    }


def test_stage_2_takes_what_was_measured(shape):
    run, recipe = measured("sft_run"), recipe_of("grocery/sft.yaml", SFTRecipe)
    population = Population(run["users"], run["users"] * 3 // 4, round(run["users"] * 163 / 300))
    found = of_sft.estimate(recipe, shape, grocery_lengths(), population)
    seconds = gpu_hours(found.flops, recipe) * 3600
    assert near(found.tokens / seconds, run["row_tokens"])
    assert near(found.computed / seconds, run["computed_tokens"])
    assert near(sum(found.memory.values()) * 1024, run["mib"])


def test_stage_3_takes_what_was_measured(shape):
    run = measured("shared_prefix_run")
    flags = ["--vllm_importance_sampling_correction", "false", "--beta", "0.04", "--gradient_accumulation_steps", "1"]
    recipe = recipe_of("grocery/grpo_improved.yaml", GRPORecipe, *flags, "--num_train_epochs", "1")
    lengths = dict.fromkeys(of_sft.TASKS, np.array([[run["prompt"], run["completion"]]], float))
    found = of_grpo.estimate(recipe, shape, lengths, users=100)
    assert found.steps == 15  # prompts, one per step
    assert found.flops / found.steps == pytest.approx(run["flops"], rel=0.01)
    assert near(gpu_hours(found.flops, recipe) * 3600 / found.steps, run["seconds"])
    assert near(sum(found.memory.values()) * 1024, run["mib"])


def test_a_prompt_is_computed_once_for_all_answers_of_s_dpo(shape):
    flags = ["--num_negatives", "3", "--preference_rows", "100", "--gradient_checkpointing", "false"]
    flags += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "5", "--num_train_epochs", "2"]
    recipe = load_recipe(str(ROOT / "recipes/grocery/sdpo.yaml"), SDPORecipe, flags, here=False)
    lengths = {"direct": np.array([[1000.0, 50.0], [2000.0, 30.0]])}  # answers of 40 tokens on average
    found = of_sft.estimate_preferences(recipe, shape, lengths, 5000)
    assert found.rows == {"users": 100}
    assert (found.batch, found.steps) == (10, 20)
    assert found.computed == 2 * 100 * (1500 + 4 * 40)
    assert found.tokens == 2 * 100 * 4 * (1500 + 40)
    assert found.at_once == 2 * (2000 + 4 * 40)
    # Of each weight and token: forward, backward to the activations, the reference's forward; attention comes on top.
    of_weights = 6 * (shape.arithmetic.layers * found.computed + shape.arithmetic.head * 2 * 100 * 4 * 40)
    assert of_weights < found.flops < 1.1 * of_weights
    once = load_recipe(str(ROOT / "recipes/grocery/sdpo.yaml"), SDPORecipe, flags[:-2], here=False)  # one epoch
    assert of_sft.estimate_preferences(once, shape, lengths, 5000).steps == 10


def test_the_packs_are_those_that_stage_2_makes(shape, prepared):
    recipe = recipe_of("tiny/sft.yaml", SFTRecipe, "--pack_tokens", "3000")
    data = PreparedData(prepared / "data")
    lengths, population, how = of_sft.measure(data, recipe, "assets/tiny_base")
    found = of_sft.estimate(recipe, shape, lengths, population)
    assert how == "the tokenizer of assets/tiny_base"
    assert population == Population(len(data.sequences), len(data.sequences), len(data.catalog))
    assert sum(found.rows.values()) == 2 * population.users + min(population.items, recipe.item_info_rows or 10**9)
    tokenizer = load_tokenizer("assets/tiny_base")
    examples = list(data.training_examples())
    reasons = [Rationale(e.user_id, e.target, "x" * 980, "relevant", (), 1.0, "none") for e in examples]
    builder = PromptBuilder(data.catalog, data.prompt_format, tokenizer, recipe)
    rows = training_rows(builder, examples, reasons, recipe, 0)
    packs = pack(share_prefixes(rows, encode_rows(tokenizer, rows, None)), 3000, 0)
    assert near(found.steps, len(packs) / recipe.trainer_value("gradient_accumulation_steps"))
    assert near(found.computed, sum(len(one["labels"]) for one in packs))
    _, _, how = of_sft.measure(data, recipe, None)
    assert how == "4 characters per token, assumed"


def test_the_user_with_the_longest_prompt_is_in_the_sample(prepared):
    data, recipe = PreparedData(prepared / "data"), recipe_of("tiny/sft.yaml", SFTRecipe)
    lengths, population, _ = of_sft.measure(data, recipe, None)
    builder = PromptBuilder(data.catalog, data.prompt_format, None, recipe)
    written = [builder.recommend(example, True) for example in data.training_examples()]
    longest = max(sum(len(message["content"]) for message in prompt) for prompt in written)
    assert population.users > of_sft.SAMPLE == len(lengths["rationale"])
    assert lengths["rationale"][:, 0].max() == longest / 4


def test_packs_of_trl_count_as_packs(shape):
    """Of 40 users 30 have a row of 500 + 100 tokens, all one of 500 + 50; TRL puts 3 into 2,000 tokens."""
    lengths = {
        "item_info": np.array([[100.0, 50.0]]),
        "direct": np.array([[500.0, 50.0]]),
        "rationale": np.array([[500.0, 100.0]]),
    }
    flags = ["--share_prefixes", "false", "--pack_tokens", "null", "--num_train_epochs", "1", "--item_info_rows", "0"]
    flags += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--max_length", "2000"]

    def found(*more):
        recipe = recipe_of("grocery/sft.yaml", SFTRecipe, *flags, *more)
        return of_sft.estimate(recipe, shape, lengths, Population(40, 30, 0))

    single, packed = found(), found("--packing", "true")
    assert (single.steps, single.at_once) == (35, 2 * 600)
    assert packed.at_once == 2 * 2000
    assert packed.steps == pytest.approx(70 / 3 / 2, abs=1)
    assert packed.tokens / packed.steps == pytest.approx((40 * 550 + 30 * 600) / 12, rel=0.1)
    cut = found("--packing", "true", "--max_length", "550")  # a row each, the longer ones cut
    assert (cut.at_once, cut.steps) == (2 * 550, 35)


def test_smoothed_labels_take_the_logits_of_all_tokens(shape):
    """8 bytes for each of 262,144 tokens of the vocabulary: 2 MiB a token, 2 GiB for a tile of 1,024."""
    lengths = dict.fromkeys(of_sft.TASKS, np.array([[4000.0, 96.0]]))
    flags = ["--share_prefixes", "false", "--pack_tokens", "null", "--per_device_train_batch_size", "2"]
    logits = [
        of_sft.estimate(
            recipe_of("grocery/sft.yaml", SFTRecipe, *flags, "--label_smoothing_factor", factor),
            shape, lengths, Population(9, 9, 9),
        ).memory["logits"]
        for factor in ("0", "0.1")
    ]  # fmt: skip
    assert logits == [2.0, 16.0]


def test_bnpo_brings_several_prompts_into_a_micro_batch():
    paper, improved = (recipe_of(f"grocery/{name}.yaml", GRPORecipe) for name in ("grpo", "grpo_improved"))
    draw, completions = random.Random(0), [prompt for prompt in range(8) for _ in range(16)]
    seen = Counter()
    for _ in range(2000):
        draw.shuffle(completions)
        seen[len(set(completions[:16]))] += 1
    mean = sum(prompts * times for prompts, times in seen.items()) / 2000
    assert of_grpo.prompts_per_batch(paper) == pytest.approx(mean, rel=0.02)
    assert of_grpo.prompts_per_batch(improved) == 1
    alone = recipe_of("grocery/grpo.yaml", GRPORecipe, "--share_prefixes", "false")
    assert of_grpo.prompts_per_batch(alone) == 16
    of_eight = recipe_of("grocery/grpo_two_nodes.yaml", GRPORecipe)
    assert of_grpo.prompts_per_batch(of_eight) == 1  # a process has one group


def test_memory_by_part(shape):
    adapter = AdapterConfig()
    whole = memory(shape, adapter, 10_000, weights="bfloat16", checkpointing=False)
    assert list(whole) == ["weights", "adapter", "optimizer", "activations", "logits"]
    assert whole["weights"] == pytest.approx(2 * 0.999885952e9 / 2**30)
    less = memory(shape, adapter, 10_000, weights="4bit", checkpointing=True)
    assert less["weights"] == whole["weights"] / 4
    assert less["activations"] < whole["activations"] / 10
    full = AdapterConfig(use_peft=False)
    one, sharded = (
        memory(shape, full, 1, weights="bfloat16", checkpointing=True, zero=zero, gpus=8) for zero in (0, 3)
    )
    assert one["optimizer"] == pytest.approx(8 * 0.999885952e9 / 2**30)
    assert all(sharded[part] == one[part] / 8 for part in ("weights", "gradients", "optimizer"))


def test_a_shape_comes_from_this_machine_or_the_file_that_names_the_model():
    assert read_shape("assets/tiny_base", GEMMA).parameters == 2_209_920
    qwen = read_shape("Qwen/Qwen3-0.6B", EstimateConfig(model_shape="recipes/shapes/qwen3-0.6b.json"))
    assert qwen.parameters == 596_049_920
    assert read_shape(None, GEMMA).depth == 26
    with pytest.raises(InputError, match=r"config\.json of some/model is not on this machine, and model_shape is "):
        read_shape("some/model", GEMMA)


def test_a_model_that_is_not_counted_is_told(tmp_path):
    config = AutoConfig.for_model("lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"])
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"not counted \(no mask for layers of the kind conv\); no estimate$"):
        read_shape(str(tmp_path), GEMMA)


@pytest.mark.parametrize(
    "content", ["[1]", "{}", '{"model_type": "none"}', '{"model_type": "gemma3_text", "head_dim": "x"}']
)
def test_a_shape_that_is_none_is_told(content, tmp_path):
    (path := tmp_path / "shape.json").write_text(content)
    with pytest.raises(InputError, match=r"shape.json, which is no config.json of a language model"):
        read_shape(None, EstimateConfig(model_shape=str(path)))


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_dry_run_of_every_recipe_prints_and_writes_nothing(path, tmp_path, capsys, monkeypatch):
    stage = path.stem.split("_")[0]
    run_dir = tmp_path / "run"
    words = [str(path), "--dry_run", "--run_dir", str(run_dir)]
    monkeypatch.setattr("sys.argv", ["twice-rec", stage, *words])
    if path.parent.name == "tiny":
        words += ["--model_name_or_path", "assets/tiny_base"]
    assert MAINS[stage](words) == 0
    shown = capsys.readouterr().out
    for name in ("processes ", "effective batch ", "memory per GPU ", "activations ", "fits "):
        assert name in shown
    assert f"not known before {run_dir / 'data'} is there" in shown
    assert f"python -m twice_rec {stage} {path} --run_dir {run_dir}" in shown
    assert not run_dir.exists()


@pytest.mark.parametrize("stage", ["sft", "sdpo", "grpo"])
def test_a_dry_run_with_data_has_tokens_steps_and_time(stage, prepared, capsys):
    before = sorted(prepared.rglob("*"))
    words = [f"recipes/tiny/{stage}.yaml", "--run_dir", str(prepared), "--model_name_or_path", "assets/tiny_base"]
    assert MAINS[stage]([*words, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^rows +.*\d", shown, re.MULTILINE)
    assert re.search(r"^steps +[\d,]+$", shown, re.MULTILINE)
    assert re.search(
        r"^prompts +[\d,]+ / [\d,]+ / [\d,]+ / [\d,]+ tokens at .* of 200 users, .* tokenizer of assets",
        shown,
        re.MULTILINE,
    )
    assert re.search(r"^training .*h at 10% of 989 TFLOP/s \[assumed", shown, re.MULTILINE)
    assert ("rollouts" in shown) == (stage == "grpo")
    assert sorted(prepared.rglob("*")) == before


def test_a_dry_run_may_be_true(tmp_path, capsys):
    words = ["recipes/grocery/sft.yaml", "--run_dir", str(tmp_path / "run"), "--dry_run", "true", "--seed", "1"]
    assert command_line.without_dry_run(words) == [*words[:3], "--seed", "1"]
    assert command_line.without_dry_run(words[:3]) == words[:3]
    assert stage2_sft.main(words) == 0
    assert "fits" in capsys.readouterr().out


def test_a_dry_run_counts_the_processes_of_accelerate(tmp_path, capsys, monkeypatch):
    for config, flags, says in (
        ("gpus_4", "", "4, a GPU each, on 1 machines; ZeRO stage 0"),
        ("two_nodes", "--machine_rank 1", "8, a GPU each, on 2 machines; ZeRO stage 0"),
        ("zero3", "--num_processes 6", "6, a GPU each, on 1 machines; ZeRO stage 3"),
        ("zero3", "--num_processes=6", "6, a GPU each, on 1 machines; ZeRO stage 3"),
    ):
        monkeypatch.setenv("ACCELERATE_CONFIG", f"recipes/accelerate_configs/{config}.yaml")
        monkeypatch.setenv("ACCELERATE_FLAGS", flags)
        assert stage2_sft.main(["recipes/grocery/sft.yaml", "--dry_run", "--run_dir", str(tmp_path / "run")]) == 0
        shown = capsys.readouterr().out
        assert says in shown
        assert re.search(
            rf"^accelerate launch --quiet --config_file \S+{config}.yaml {flags} ?-m twice_rec", shown, re.M
        )
    monkeypatch.setenv("ACCELERATE_FLAGS", "")
    for content in (None, "", "[1]", "num_processes: auto", "num_processes: -1", "deepspeed_config: 3"):
        path = tmp_path / "odd.yaml"
        if content is not None:
            path.write_text(content)
        monkeypatch.setenv("ACCELERATE_CONFIG", str(path))
        assert stage2_sft.main(["recipes/grocery/sft.yaml", "--dry_run"]) == 2
        assert "ACCELERATE_CONFIG is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "flags", "line"),
    [
        ("sft", [], "it fits 80 GiB"),
        (
            "sft",
            ["--gpu_memory_gib", "24"],
            "IT DOES NOT FIT 24 GiB (gpu_memory_gib): set gradient_checkpointing to true",
        ),
        ("grpo", [], "it fits 80 GiB"),
        ("grpo", ["--gradient_checkpointing", "false"], "IT DOES NOT FIT 80 GiB"),
        ("grpo_improved", [], "it fits 80 GiB"),
        ("grpo", [], "72.0 GiB on each of its GPUs\n"),
        ("grpo", ["--rollout_gpu_memory_utilization", "0.05"], "TOO SMALL: its weights and least room take 5.9 GiB; "),
        ("grpo", ["--rollout_gpu_memory_utilization", "0.05"], "use --rollout_gpu_memory_utilization 0.08\n"),
        ("grpo_one_gpu", [], "logits 2.00, vLLM 20.00\n"),
        ("grpo_one_gpu", [], "it fits 80 GiB (assumed, since this machine has no GPU), with vLLM on the same GPU"),
        ("grpo_one_gpu", ["--gpu_memory_gib", "12"], "IT DOES NOT FIT 12 GiB (gpu_memory_gib), with vLLM on the same"),
        ("grpo_one_gpu", ["--rollout", "trl_colocate"], "logits 2.00, vLLM 20.00\n"),
        ("grpo", ["--rollout", "trl_colocate"], "IT DOES NOT FIT 80 GiB"),
        ("grpo", ["--candidate_loss", "distillation"], "candidate_loss distillation: its operations and memory\n"),
        (
            "grpo",
            ["--gradient_accumulation_steps", "7", "--per_device_train_batch_size", "3"],
            "WHICH DOES NOT DIVIDE by 16",
        ),
    ],
)
def test_a_dry_run_says_whether_it_fits(name, flags, line, tmp_path, capsys):
    words = [f"recipes/grocery/{name}.yaml", "--dry_run", "--run_dir", str(tmp_path / "run"), *flags]
    assert MAINS[name.split("_")[0]](words) == 0
    assert line in capsys.readouterr().out


def test_a_gpu_that_trainer_and_server_share_counts_once(prepared, capsys):
    """A server of its own doubles the GPU-hours of one trainer; one on the trainer's GPU, or inside of it, does not."""
    words = ["recipes/tiny/grpo.yaml", "--run_dir", str(prepared), "--model_name_or_path", "assets/tiny_base"]
    words += ["--dry_run", "--use_peft", "true", "--rollout_tokens_per_second", "0.5"]
    hours = {}
    for rollout, shares in (("vllm_server", "false"), ("vllm_server", "true"), ("trl_colocate", "false")):
        assert stage3c_grpo.main([*words, "--rollout", rollout, "--rollout_shares_gpu", shares]) == 0
        shown = capsys.readouterr().out
        hours[rollout, shares] = float(re.search(r"^GPU-hours +([\d,.]+)$", shown, re.M)[1].replace(",", ""))
        assert ("vLLM's share" in shown) == (shares == "false" and rollout == "vllm_server")
    apart, together, within = hours.values()
    assert apart == pytest.approx(2 * together, rel=1e-3)
    assert together == within > 1


def test_pieces_of_a_micro_batch_take_less_memory_and_more_work(shape):
    """Prompts of 1,000 tokens with 8 completions of 100, 16 completions at once: 2 prompts, 3,600 tokens."""
    flags = ["--num_generations", "8", "--per_device_train_batch_size", "16", "--gradient_checkpointing", "false"]
    flags += ["--max_completion_length", "100", "--beta", "0", "--vllm_importance_sampling_correction", "false"]
    lengths = dict.fromkeys(of_sft.TASKS, np.array([[1000.0, 100.0]]))

    def found(*more):
        recipe = recipe_of("grocery/grpo_improved.yaml", GRPORecipe, *flags, *more)
        return of_grpo.estimate(recipe, shape, lengths, users=100)

    whole, same, groups, parts = (
        found(*more) for more in ([], *(["--tokens_at_once", n] for n in ("3600", "1800", "1400")))
    )
    assert (whole.at_once, same.at_once, groups.at_once, parts.at_once) == (3600, 3600, 1800, 1400)
    assert same == whole
    assert groups.computed == whole.computed
    assert groups.flops == pytest.approx(1.5 * whole.flops, rel=0.01)  # a forward of three
    assert parts.computed / whole.computed == pytest.approx(5600 / 3600)  # 4 completions a piece: each prompt twice
    assert groups.memory["activations"] == pytest.approx(whole.memory["activations"] / 2)


@pytest.mark.parametrize("name", ["grpo", "grpo_4gpus", "grpo_8gpus", "grpo_two_nodes", "grpo_ray"])
def test_a_dry_run_of_the_servers_has_their_commands(name, tmp_path, capsys):
    path = f"recipes/grocery/{name}.yaml"
    assert stage3b_serve.main([path, "--dry_run", "--run_dir", str(tmp_path / "run")]) == 0
    shown, recipe = capsys.readouterr().out, load_recipe(path, GRPORecipe, [], here=False)
    assert shown.count("vllm_process --model ") == len(recipe.rollout_servers)
    assert ("--distributed-executor-backend ray" in shown) == (name == "grpo_ray")
    assert "72.0 of 80.0 GiB" in shown
    assert not (tmp_path / "run").exists()
    assert stage3b_serve.main(["recipes/tiny/grpo.yaml", "--dry_run", "--run_dir", str(tmp_path / "run")]) == 0
    assert "transformers: no server" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "config"),
    [("grpo", None), ("grpo_4gpus", "gpus_2"), ("grpo_8gpus", "gpus_4"), ("grpo_two_nodes", "gpus_8")],
)
def test_the_effective_batch_of_stage_3_is_the_papers_on_any_number_of_gpus(
    name, config, tmp_path, capsys, monkeypatch
):
    if config:
        monkeypatch.setenv("ACCELERATE_CONFIG", f"recipes/accelerate_configs/{config}.yaml")
    assert stage3c_grpo.main([f"recipes/grocery/{name}.yaml", "--dry_run", "--run_dir", str(tmp_path / "run")]) == 0
    assert "= 128 completions, 8 prompts x 16" in capsys.readouterr().out


def test_the_effective_batch_of_stage_2_stays_about_the_same(shape):
    lengths, population = grocery_lengths(), Population(11_334, 11_334, 6_149)
    batches = [
        of_sft.estimate(recipe_of(f"grocery/{name}.yaml", SFTRecipe), shape, lengths, population, processes).batch
        for name, processes in (("sft", 1), ("sft_4gpus", 4), ("sft_8gpus", 8))
    ]
    assert max(batches) < 1.35 * min(batches)
    assert 12 < batches[0] < 20  # release: 16


def test_the_table_of_domains_in_the_readme_is_what_the_command_prints(capsys):
    assert command_line.main(["cost", "recipes/amazon/cost.yaml"]) == 0
    table = capsys.readouterr().out.strip()
    assert table.count("\n") == 9
    assert table in (ROOT / "README.md").read_text()


def test_the_cost_of_one_domain_says_what_is_assumed(capsys):
    assert command_line.main(["cost", "recipes/amazon/cost.yaml", "--domain", "Musical_Instruments"]) == 0
    shown = capsys.readouterr().out
    for stage in (
        "prepare",
        "rationales",
        "sft",
        "sasrec",
        "sasrec_release",
        "grpo",
        "grpo_improved",
        "evaluate",
        "all",
    ):
        assert re.search(rf"^\| {stage} +\|", shown, re.MULTILINE), stage
    assert "Assumed: 26,404 users (46% of 57,400), 24,600 items" in shown
    assert "10% of 989 TFLOP/s" in shown
    assert command_line.main(["cost", "recipes/amazon/cost.yaml", "--domain", "Amazon_Fashion"]) == 0
    assert "The number of users is not known." in capsys.readouterr().out


def test_the_keys_of_cost_are_explained(capsys):
    assert command_line.main(["cost", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "usage: twice-rec cost RECIPE" in shown
    assert "--users_share" in shown


def test_the_cost_of_a_prepared_run_has_its_own_counts(prepared, tmp_path, capsys):
    folder = tmp_path / "recipes"
    shutil.copytree(ROOT / "recipes", folder)
    recipe = folder / "tiny" / "cost.yaml"
    recipe.write_text(f"base: ../grocery/cost.yaml\nrun_dir: {prepared}\ndomain: Synthetic\n")
    shutil.copy(ROOT / "recipes/grocery/grpo_improved.yaml", folder / "tiny/grpo_improved.yaml")
    assert command_line.main(["cost", str(recipe)]) == 0
    shown = capsys.readouterr().out
    users = len(PreparedData(prepared / "data").sequences)
    assert f"{users:,} users, " in shown
    assert "tokens by the tokenizer of assets/tiny_base" in shown


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "cost: expected RECIPE, such as recipes/amazon/cost.yaml, found no word"),
        (["recipes/amazon/cost.yaml", "--domain", "Music"], "nothing is known of domain Music: prepare it first"),
        (["recipes/amazon/none.yaml"], "none.yaml: no such recipe"),
        (["recipes/amazon/cost.yaml", "--users_share", "2"], "--users_share"),
        (["recipes/amazon/cost.yaml", "--domains", "{X: {users: 5}}"], "domains has users of X; give some of reviews"),
        (["recipes/amazon/cost.yaml", "--domains", "{X: {user: 5}}"], "domains has user of X; give some of reviews"),
        (["recipes/amazon/cost.yaml", "--domains", "{X: {users: 0, items: 3}}"], "domains has 0 users of X"),
        (["recipes/amazon/cost.yaml", "--row_tokens", "{direct: [1, 2]}"], "row_tokens of item_info is []"),
        (["recipes/amazon/cost.yaml", "--annotation_tokens", "1", "2", "3"], "annotation_tokens is [1.0, 2.0, 3.0]"),
    ],
)
def test_what_cost_cannot_use_is_told_in_one_line(words, line, capsys):
    assert command_line.main(["cost", *words]) == 2
    assert line in capsys.readouterr().err
