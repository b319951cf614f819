"""Sample completions of stage 2."""

import json
from types import SimpleNamespace

from twice_rec.sft import samples


def test_a_resumed_run_replaces_the_samples_of_steps_that_it_repeats(tmp_path, monkeypatch):
    class Generator:
        def __init__(self, *arguments):
            pass

        def generate(self, prompts):
            return [[SimpleNamespace(text=f"to {prompt}")] for prompt in prompts]

    monkeypatch.setattr(samples, "TransformersGenerator", Generator)
    rows = [SimpleNamespace(prompt=name, task="choose", completion="tea") for name in "ab"]
    callback = samples.SampleCompletions(rows, 2, tmp_path / "samples.jsonl")
    model = SimpleNamespace(training=True, train=lambda mode: None)
    for step in (1, 2, 3, 4, 6, 4, 5, 6, 7):  # killed behind step 6, resumed from step 3; 7 is the last
        state = SimpleNamespace(global_step=step, max_steps=7, is_world_process_zero=True)
        callback.on_step_end(SimpleNamespace(report_to=[]), state, None, model, processing_class=None)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["answer"]) for line in lines] == [
        (s, f"to {name}") for s in (2, 4, 6, 7) for name in "ab"
    ]


def test_samples_go_to_wandb_with_their_prompts(tmp_path, monkeypatch):
    import wandb

    class Generator:
        def __init__(self, *arguments):
            pass

        def generate(self, prompts):
            return [[SimpleNamespace(text="tea")] for _ in prompts]

    logged = []
    monkeypatch.setattr(samples, "TransformersGenerator", Generator)
    monkeypatch.setattr(wandb, "log", lambda values, commit: logged.append((values["samples"], commit)))
    prompt = [{"role": "user", "content": "which item?"}]
    rows = [SimpleNamespace(prompt=prompt, task="choose", completion="coffee")]
    callback = samples.SampleCompletions(rows, 5, tmp_path / "samples.jsonl")
    state = SimpleNamespace(global_step=5, max_steps=7, is_world_process_zero=True)
    model = SimpleNamespace(training=True, train=lambda mode: None)
    callback.on_step_end(SimpleNamespace(report_to=["wandb"]), state, None, model, processing_class=None)
    ((table, commit),) = logged
    assert table.columns == ["step", "task", "answer", "expected", "prompt"]
    assert table.data == [[5, "choose", "tea", "coffee", "which item?"]]
    assert not commit
