"""A run of few bytes whose stages are finished, for tests of what is done with a run; no model is in it."""

import json
from pathlib import Path

from twice_rec.files import hash_file
from twice_rec.manifest import Manifest, chain

SFT = {
    "model_name_or_path": "base", "item_info_rows": 40, "direct_rows": 500, "rationale_rows": 500, "use_peft": False,
    "learning_rate": 0.0005, "dtype": "float32", "seed": 42,
}  # fmt: skip
GRPO = {
    "model_name_or_path": None, "reward_funcs": ["collaborative", "structure"], "reward_weights": [4.0, 1.0],
    "cf_model": "sasrec", "confidence": "sigmoid", "reward_lambda": 3.0, "num_generations": 8, "beta": 0.04,
    "loss_type": "bnpo", "use_peft": True, "lora_r": 8, "lora_alpha": 16, "learning_rate": 0.001, "dtype": "float32",
    "seed": 42,
}  # fmt: skip
RANKS = {"stage3": [1, 2, 1, 4], "sasrec": [1, 1, 1, 2]}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def finish(run_dir, stage, folder, config, inputs, outputs, **figures):
    """Write the manifest of a stage; inputs and outputs are names in the run's folder, or paths outside it."""
    places = {f"source/{path.name}" if path.is_absolute() else str(path): run_dir / path for path in inputs}
    hashes = {name: hash_file(path) for name, path in places.items()}
    rests_on, stamps = chain(run_dir, hashes, places)
    written = {str(name): hash_file(run_dir / name) for name in outputs}
    about = {"seconds": 12.0, "commit": "0" * 40, "versions": {"trl": "1.16.0"}, "machine": {"cpus": 2}}
    Manifest(stage, config, hashes, written, figures, about, rests_on, stamps).save(run_dir / folder)


def evaluate(run_dir, name, reads, asked, ranks):
    """An evaluation of users u0, u1, ... with these ranks."""
    rows = [{"user_id": f"u{i}", "target": f"t{i}", "ranks": {"uniform": rank}} for i, rank in enumerate(ranks)]
    file = write(run_dir / "eval" / name / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    config = {"ranking": "likelihood"} if asked else {}
    finish(run_dir, "evaluate", f"eval/{name}", config, [*reads], [file.relative_to(run_dir)])


def make_run(folder, source="synthetic", card="---\nlicense: apache-2.0\n---\n# Base\n"):
    """Make the run in `folder`/run, and the base model in `folder`/base; return the run's folder."""
    run_dir, base = folder / "run", folder / "base"
    write(base / "config.json", "{}")
    if card is not None:
        write(base / "README.md", card)
    sequences, rationales = Path("data/sequences.jsonl"), Path("rationales/accepted.jsonl")
    stage2, stage3, sasrec = Path("sft/merged"), Path("grpo/merged"), Path("sasrec/model.safetensors")
    data = {"source": source, "k_core": 5, "min_history": 6, "max_history": 20, "num_candidates": 10}
    write(run_dir / sequences, "{}\n")
    figures = {"users": 20000, "items": 500, "interactions": 210317}
    finish(run_dir, "prepare", "data", {**data, "split": "leave_one_out"}, [], [sequences], **figures)
    write(run_dir / rationales, "{}\n")
    finish(run_dir, "rationales", "rationales", {"annotator": "offline"}, [sequences], [rationales], accepted=3399)
    write(run_dir / sasrec, b"sasrec")
    finish(run_dir, "sasrec", "sasrec", {}, [sequences], [sasrec])
    write(run_dir / stage2 / "model.safetensors", b"stage 2" * 9)
    write(run_dir / stage2 / "config.json", "{}")
    sft = {**SFT, "model_name_or_path": str(base)}
    finish(run_dir, "sft", "sft", sft, [sequences, rationales, base], [stage2], steps=68)
    write(run_dir / stage3 / "model.safetensors", b"stage 3" * 999)
    write(run_dir / stage3 / "config.json", '{"model_type": "gemma3_text"}')
    adapter = [Path("grpo/adapter_model.safetensors"), Path("grpo/adapter_config.json")]
    write(run_dir / adapter[0], b"adapter")
    write(run_dir / adapter[1], json.dumps({"base_model_name_or_path": str(run_dir / stage2), "r": 8}))
    finish(run_dir, "grpo", "grpo", GRPO, [sequences, sasrec, stage2], [stage3, *adapter], steps=128, tau=0.3)
    return run_dir


def evaluated(run_dir):
    """Evaluate stage 3 and SASRec of the run."""
    sequences = Path("data/sequences.jsonl")
    evaluate(run_dir, "stage3", [sequences, Path("grpo/merged")], True, RANKS["stage3"])
    evaluate(run_dir, "sasrec", [sequences, Path("sasrec/model.safetensors")], False, [*RANKS["sasrec"], 9])
