"""S-DPO: its loss by hand and beside TRL's DPO, its rows, and a training that is killed and resumed."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from prompt_formats import prompt_format
from tiny_base.model import train_tokenizer
from tiny_models import qwen3
from twice_rec.catalog import ItemCatalog
from twice_rec.errors import InputError
from twice_rec.llm.prompt_builder import PromptBuilder
from twice_rec.llm.recipe import PromptConfig
from twice_rec.llm.shared_prefix import group_logprobs
from twice_rec.recipe_reader import load_recipe
from twice_rec.records import Example, Interaction, Item
from twice_rec.run import StageRun
from twice_rec.sft.recipe import SDPORecipe
from twice_rec.sft.sdpo import preference_loss, preference_rows, sdpo_trainer

WORDS = ["tea", "coffee", "milk", "bread", "honey", "sugar", "salt", "pepper"]
CATALOG = ItemCatalog([Item(f"I{number}", word) for number, word in enumerate(WORDS)])
EXAMPLES = [
    Example(f"u{user}", (Interaction("I0"),), tuple(f"I{1 + (user + i) % 7}" for i in range(5)), f"I{1 + user % 7}")
    for user in range(6)
]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with a very small stage-2 model, and its tokenizer."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = train_tokenizer([" ".join([*WORDS, "<item_nm> <item_id> I1 I2 I3"])] * 20, 300)
    model = qwen3(vocab_size=len(tokenizer), max_position_embeddings=1024)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, tokenizer


def recipe_of(folder, start="m", **keys):
    """The recipe of a short training, read as a user's."""
    values = {
        "run_dir": str(folder), "domain": "D", "seed": 1, "model_name_or_path": str(start), "dtype": "float32",
        "use_cpu": "true", "bf16": "false", "max_steps": 3, "save_steps": 1, "logging_steps": 1,
        "per_device_train_batch_size": 2, "learning_rate": 0.003, "lr_scheduler_type": "constant", **keys,
    }  # fmt: skip
    path = folder / "sdpo.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    return load_recipe(path, SDPORecipe)


def rows_of(tokenizer, recipe, examples=EXAMPLES):
    builder = PromptBuilder(CATALOG, prompt_format(), tokenizer, PromptConfig())
    return preference_rows(builder, examples, tokenizer, recipe)


def test_the_loss_by_hand():
    """Gains .5, -1, .5 with beta 2: -log sigmoid(-log(exp(-3) + exp(0))) = log(1 + exp(-3) + 1)."""
    policy = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -4.0, -4.0]], dtype=torch.float64)
    reference = torch.tensor([[-1.5, -1.0, -3.5], [-4.0, -4.0, -4.0]], dtype=torch.float64)
    expected = [math.log(2 + math.exp(-3)), math.log(3)]  # of three equal answers, the chosen one is one
    assert preference_loss(policy, reference, 2.0).tolist() == pytest.approx(expected, abs=1e-15)
    published = -math.log(1 / (1 + math.exp(math.log(math.exp(2 * -1.5) + math.exp(2 * 0.0)))))
    assert expected[0] == pytest.approx(published, abs=1e-15)


def test_the_gradient_raises_the_chosen_answer_and_lowers_the_nearest_rejected_most():
    """d loss / d logprob is beta (p - 1) for the chosen answer and beta p for the others, p = softmax(beta gains)."""
    gains = torch.tensor([[0.0, 1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    preference_loss(gains, torch.zeros(1, 3, dtype=torch.float64), 0.5).sum().backward()
    weights = [math.exp(0.5 * gain) for gain in (0, 1, -1)]
    p = [weight / sum(weights) for weight in weights]
    assert gains.grad.tolist()[0] == pytest.approx([0.5 * (p[0] - 1), 0.5 * p[1], 0.5 * p[2]], abs=1e-15)


def test_with_one_rejected_answer_it_is_the_loss_of_trl(start, tmp_path):
    _, tokenizer = start
    pairs = [([5, 6, 7, 8], [9, 10, 11], [9, 12]), ([5, 6, 9], [13], [14, 15, 16, 17])]
    trainer = DPOTrainer(
        model=qwen3(vocab_size=len(tokenizer)),
        args=DPOConfig(str(tmp_path), beta=0.3, report_to="none", use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list([{"prompt": "tea", "chosen": " milk", "rejected": " salt"}]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    batch = trainer.data_collator([dict(zip(names, pair, strict=True)) for pair in pairs])
    groups = [(prompt, answers) for prompt, *answers in pairs]
    with torch.no_grad():
        theirs = trainer.compute_loss(trainer.model, batch)
        policy = group_logprobs(trainer.model, groups).view(2, 2)
        with trainer.model.disable_adapter():
            reference = group_logprobs(trainer.model, groups).view(2, 2)
    assert (policy - reference).abs().min() > 1e-3
    assert float(theirs) == pytest.approx(float(preference_loss(policy, reference, 0.3).mean()), abs=1e-5)
    assert float(theirs) != pytest.approx(math.log(2), abs=1e-3)


def test_rows_have_the_target_first_and_other_candidates_behind(start, tmp_path):
    _, tokenizer = start
    recipe = recipe_of(tmp_path, num_negatives=3)
    rows = rows_of(tokenizer, recipe)
    named = []
    for row in rows:
        texts = [tokenizer.decode(ids) for ids in row["answers"]]
        named.append([next(item.item_id for item in CATALOG if f" {item.item_id} " in text) for text in texts])
    by_target = {example.target: example for example in EXAMPLES}
    assert sorted(target for target, *_ in named) == sorted(by_target)
    for target, *rejected in named:
        assert len(set(rejected)) == 3
        assert set(rejected) <= set(by_target[target].candidates) - {target}
    assert rows_of(tokenizer, recipe) == rows
    assert rows_of(tokenizer, recipe.model_copy(update={"seed": 2})) != rows
    assert len(rows_of(tokenizer, recipe.model_copy(update={"preference_rows": 2}))) == 2
    with pytest.raises(InputError, match="num_negatives is 5, but user u. has 4 candidates beside the target"):
        rows_of(tokenizer, recipe.model_copy(update={"num_negatives": 5}))


class EndsAt(TrainerCallback):
    """Stands for a kill right behind the checkpoint of a step."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **others):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def train(start, folder, kill_at=None):
    model, tokenizer = start
    folder.mkdir(exist_ok=True)
    recipe = recipe_of(folder, model)
    with StageRun(recipe, "sdpo", recipe.folder) as run:
        run.begin()
        trainer = sdpo_trainer(recipe, rows_of(tokenizer, recipe, EXAMPLES[:2]), tokenizer, model, run.path)
        if kill_at:
            trainer.add_callback(EndsAt(kill_at))
        run.train(trainer)
    return trainer.state.log_history, load_file(run.path / "adapter_model.safetensors")


def test_it_learns_and_a_killed_training_ends_with_the_same_adapter(start, tmp_path):
    log, weights = train(start, tmp_path / "whole")
    steps = [line for line in log if "loss" in line]
    assert steps[0]["loss"] == pytest.approx(math.log(4), abs=1e-4)  # the policy still is the reference
    assert steps[0]["rewards/accuracies"] == 0
    assert steps[2]["loss"] < steps[0]["loss"]
    assert steps[2]["rewards/margins"] > 0
    with pytest.raises(KeyboardInterrupt):
        train(start, tmp_path / "killed", kill_at=2)
    _, resumed = train(start, tmp_path / "killed")
    assert weights.keys() == resumed.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, resumed[name]), name


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"variant": "stage2"}, "variant is 'stage2'; it must be stage2_NAME"),
        ({"use_peft": "false"}, "use_peft is false, but the reference is the model without its adapter"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation must be sdpa or"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is set by the stage"),
        ({"num_negatives": 0}, "num_negatives is 0; it must be at least 1"),
        ({"loss_type": "sigmoid"}, "unknown key loss_type"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, keys, message):
    with pytest.raises(InputError, match=message):
        recipe_of(tmp_path, **keys)
    assert recipe_of(tmp_path, variant="stage2_other").folder == "sft_other"
