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
