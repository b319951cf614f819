"""The tiny recipes at a size for tests, run as a user runs them or in this process."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Stage -> (module, recipe, flags); in the order of reproduce.sh.
STAGES = {
    "prepare": ("twice_rec.stages.stage0_prepare", "prepare", "--synthetic_users 250 --synthetic_items 60 --k_core 2"),
    "base": (
        "tiny_base.stage",
        "base",
        "--vocab_size 500 --hidden_size 32 --intermediate_size 32 --num_hidden_layers 2 --head_dim 8 --steps 4 "
        "--tokens_per_step 600 --questions 3 --exam_documents 2 --save_steps 2 --publish_dir null",
    ),
    "rationales": ("twice_rec.stages.stage1_rationales", "rationales", "--max_rationales 60"),
    "sft": (
        "twice_rec.stages.stage2_sft",
        "sft",
        "--item_info_rows 8 --direct_rows 12 --rationale_rows 12 --save_steps 2 --per_device_train_batch_size 4 "
        "--gradient_accumulation_steps 1 "
        "--sample_every 3",
    ),
    "sasrec": (
        "twice_rec.stages.stage3a_sasrec",
        "sasrec",
        "--epochs 4 --hidden_size 16 --baselines random popularity itemknn",
    ),
    "serve": ("twice_rec.stages.stage3b_serve", "grpo", ""),
    "grpo": (
        "twice_rec.stages.stage3c_grpo",
        "grpo",
        "--max_steps 3 --save_steps 1 --num_generations 4 --per_device_train_batch_size 4 "
        "--gradient_accumulation_steps 1 --max_completion_length 16",
    ),
    "evaluate": (
        "twice_rec.stages.stage4_evaluate",
        "evaluate",
        "--num_users 6 --batch_size 2 --max_new_tokens 16 --rankings likelihood",
    ),
    "judge": ("twice_rec.stages.stage4b_judge", "judge", "--num_judged 5"),
    "report": ("twice_rec.stages.stage5_report", "report", "--bootstrap_samples 100"),
    "ab_test": ("twice_rec.stages.stage4c_ab_test", "ab_test", "--visits 400 --latency_calls 1 --aa_tests 100"),
    "share": ("twice_rec.stages.stage7_share", "share", "--bootstrap_samples 100"),
}  # fmt: skip

# Stages that reproduce.sh does not run.
OTHERS = {
    "sdpo": ("twice_rec.stages.stage2b_sdpo", "sdpo", "--max_steps 2"),
    "baselines": ("twice_rec.stages.stage3a_baselines", "baselines", "--models fossil --minutes 1"),
    "study": ("twice_rec.stages.stage6_study", "study", f"--seeds 1 --recipes_dir {ROOT}/recipes/tiny"),
}  # fmt: skip
ALL = {**STAGES, **OTHERS}


def words(stage, run_dir, base, *more):
    """The command line behind `python -m`."""
    _, recipe, flags = ALL[stage]
    model = ["--model_name_or_path", str(base)] if stage in ("sft", "evaluate") else []
    path = ROOT / "tiny_base" / "recipe.yaml" if stage == "base" else ROOT / "recipes" / "tiny" / f"{recipe}.yaml"
    return ["--config", str(path), "--run_dir", str(run_dir), *flags.split(), *model, *more]


def run(stage, run_dir, base, *more):
    """Run a stage in this process; returns its exit status."""
    module = importlib.import_module(ALL[stage][0])
    return module.main(words(stage, run_dir, base, *more))


def start(stage, run_dir, base, *more):
    """Start a stage as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", ALL[stage][0], *words(stage, run_dir, base, *more)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell would have it ignored
    )  # fmt: skip
