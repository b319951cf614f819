"""Fused layers are exact: values, gradients and saved files of PEFT's and transformers' own."""

import functools
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from tiny_models import gemma3, llama, mistral, qwen3
from twice_rec.llm.fused import FusedLoraLinear, FusedNorm, fuse_layers, fuse_on_gpu
from twice_rec.llm.shared_prefix import continuation_logprobs
from twice_rec.llm.tokens import load_tokenizer
from twice_rec.recipe_reader import load_recipe
from twice_rec.sft.dataset import Row
from twice_rec.sft.recipe import SFTRecipe

FAMILIES = [gemma3, qwen3, llama, mistral, functools.partial(llama, attention_bias=True, mlp_bias=True)]
NAMES = ["gemma3", "qwen3", "llama", "mistral", "llama-bias"]
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def adapted(make, dtype=FLOAT32, fused=False, **settings):
    """A model with an adapter and norms whose weights are not the first ones."""
    torch.manual_seed(0)
    lora = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(make().to(dtype), LoraConfig(**lora))
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "norm" in name or "bias" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
    if fused:
        fuse_layers(model)
    return model.train()


def values_and_gradients(model, autocast=False):
    """Logits, and the gradients by name, of a sum over them."""
    ids = torch.randint(3, 99, (2, 20), generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    with torch.autocast("cpu", dtype=BFLOAT16, enabled=autocast):
        logits = model(input_ids=ids).logits
    (logits.float() * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert all(gradient.dtype == FLOAT32 for gradient in found.values())
    return logits.float().detach(), found


def assert_equal(found, expected):
    assert torch.allclose(found[0], expected[0], atol=1e-5, rtol=1e-5)
    assert found[1].keys() == expected[1].keys()
    largest = max(gradient.abs().max() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() <= 1e-5 * largest, name


def kinds(model, kind):
    return [module for module in model.modules() if type(module) is kind]


@pytest.mark.parametrize("make", FAMILIES, ids=NAMES)
def test_values_and_gradients_are_those_of_peft(make):
    plain, fused = adapted(make), adapted(make, fused=True)
    assert len(kinds(fused, FusedLoraLinear)) == 7 * plain.config.num_hidden_layers
    assert len(kinds(fused, FusedNorm)) == sum("RMSNorm" in type(module).__name__ for module in plain.modules())
    assert_equal(values_and_gradients(fused), values_and_gradients(plain))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("make", FAMILIES, ids=NAMES)
def test_bfloat16_is_as_close_as_peft(make, autocast, dtype):
    if dtype == FLOAT32 and not autocast:
        return
    exact = values_and_gradients(adapted(make))

    def distances(model):
        logits, gradients = values_and_gradients(model, autocast)
        of_gradients = torch.cat([(gradients[name] - g).flatten() for name, g in exact[1].items()])
        return (logits - exact[0]).norm(), of_gradients.norm()

    ours, theirs = distances(adapted(make, dtype, fused=True)), distances(adapted(make, dtype))
    for a, b in zip(ours, theirs, strict=True):
        assert 0 < a < 1.5 * b


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("make", [gemma3, qwen3])
def test_gradient_checkpointing(make, reentrant):
    model = adapted(make, fused=True)
    expected = values_and_gradients(model)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_equal(values_and_gradients(model), expected)


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("make", [gemma3, qwen3])
def test_shared_prompts_in_segments(make, reentrant):
    """As stages 2 and 3 train on GPUs: varlen, fused, with checkpointing or not."""
    found = []
    for fused in (False, True):
        model = adapted(functools.partial(make, "varlen"), fused=fused)
        if fused and reentrant is not None:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        scores = continuation_logprobs(model.get_base_model(), [5, 6, 7, 8], [[9, 10, 11], [9, 12], [40]])
        torch.cat(scores).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((torch.cat(scores).detach(), gradients))
    assert found[0][1]
    assert_equal(found[1], found[0])


@pytest.mark.parametrize(
    "settings",
    [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}],
    ids=lambda settings: next(iter(settings)),
)
def test_other_kinds_of_adapters_are_left_to_peft(settings):
    make = functools.partial(llama, attention_bias=True, mlp_bias=True)
    found = []
    for fused in (False, True):
        model = adapted(make, fused=fused, **settings)
        torch.manual_seed(3)
        found.append(values_and_gradients(model))
    assert_equal(*found)


def test_dropout_counts_in_training_only():
    plain, fused = adapted(llama, lora_dropout=0.9).eval(), adapted(llama, lora_dropout=0.9, fused=True).eval()
    assert_equal(values_and_gradients(fused), values_and_gradients(plain))
    layer = kinds(fused, FusedLoraLinear)[0]
    x = torch.ones(1, 3, layer.in_features)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def test_an_adapter_can_be_disabled_changed_and_merged():
    ids, model = torch.tensor([[5, 6, 7]]), adapted(gemma3, fused=True)
    with torch.no_grad():
        with_adapter = model(ids).logits
        with model.disable_adapter():
            without = model(ids).logits
        assert not torch.allclose(with_adapter, without)
        assert torch.allclose(model(ids).logits, with_adapter)
        model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))  # a new one changes nothing yet
        model.set_adapter("second")
        assert torch.allclose(model(ids).logits, without, atol=1e-5)
        model.base_model.set_adapter(["default", "second"])
        assert torch.allclose(model(ids).logits, with_adapter, atol=1e-5)
        model.set_adapter("default")
        model.merge_adapter()
        assert torch.allclose(model(ids).logits, with_adapter, atol=1e-4)
        model.unmerge_adapter()
        assert torch.allclose(model.merge_and_unload()(ids).logits, with_adapter, atol=1e-4)


def test_what_is_trained_and_saved_stays_as_it_is(tmp_path):
    plain, fused = adapted(gemma3), adapted(gemma3)
    parameters = dict(fused.named_parameters())
    fuse_layers(fused)
    assert all(fused.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert fused.state_dict().keys() == plain.state_dict().keys()
    fused.save_pretrained(tmp_path / "fused")
    plain.save_pretrained(tmp_path / "plain")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("fused", "plain")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(gemma3(), tmp_path / "fused")
    assert loaded.peft_config["default"].r == 4


def test_layers_that_others_watch_shard_or_quantise_are_left_to_peft():
    model, seen = adapted(llama, fused=True), []
    layer = kinds(model, FusedLoraLinear)[0]
    layer.base_layer.register_forward_pre_hook(lambda module, inputs: seen.append(module))  # as ZeRO-3 does
    expected = values_and_gradients(adapted(llama))
    assert_equal(values_and_gradients(model), expected)
    assert seen == [layer.base_layer]

    class Packed(torch.nn.Parameter):
        """As bitsandbytes' weights: a parameter of another class."""

    other = kinds(model, FusedLoraLinear)[1]
    x = torch.randn(2, other.in_features)
    assert other._is_plain(x)
    other.base_layer.weight = Packed(other.base_layer.weight.data, requires_grad=False)
    assert not other._is_plain(x)


def test_trained_norms_and_those_of_others_stay():
    model = gemma3()  # all weights are trained
    fuse_layers(model)
    assert not kinds(model, FusedNorm)
    model.requires_grad_(False)
    model.model.norm.forward = model.model.norm.forward  # as Liger replaces a norm's
    fuse_layers(model)
    assert type(model.model.norm) is not FusedNorm
    assert kinds(model, FusedNorm)


class GatedRMSNorm(torch.nn.Module):
    """A norm that is one of ours as long as it is called without its gate."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 2, 8), requires_grad=False)
        self.eps = 1e-6

    def forward(self, x, gate=None):
        normed = self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return normed if gate is None else normed * torch.sigmoid(gate)


class PlainRMSNorm(GatedRMSNorm):
    """The same without a gate."""

    def forward(self, x):
        return super().forward(x)


class HeadsRMSNorm(GatedRMSNorm):
    """A norm of one argument that takes only [tokens, 2, 4]."""

    def forward(self, x):
        return super().forward(x.view(-1, 2, 4).flatten(1).view(-1, 8)) if x.shape[-1] == 4 else x.view(-1, 3)


class OtherEpsRMSNorm(GatedRMSNorm):
    """A norm that adds eps in another place, which shows in small values only."""

    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps * 100)


@pytest.mark.parametrize(
    ("norm", "is_fused"), [(PlainRMSNorm, True), (GatedRMSNorm, False), (HeadsRMSNorm, False), (OtherEpsRMSNorm, False)]
)
def test_only_norms_that_a_trial_shows_to_be_equal_are_fused(norm, is_fused):
    model = torch.nn.Sequential(norm())
    fuse_layers(model)
    assert (type(model[0]) is FusedNorm) == is_fused


def test_a_model_with_gated_norms_keeps_its_values():
    config = AutoConfig.for_model(
        "qwen3_5_text", vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip

    def make():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)

    plain, fused = adapted(make), adapted(make, fused=True)
    assert len(kinds(fused, FusedNorm)) == 7  # two in each layer, of queries, of keys, the last one
    assert any("RMSNormGated" in type(module).__name__ for module in fused.modules())
    assert_equal(values_and_gradients(fused), values_and_gradients(plain))


def test_heads_in_any_order():
    """As queries come: [B, L, H, D] transposed, cut out of a wider tensor, or both."""
    norm = FusedNorm(torch.nn.Parameter(torch.linspace(0.5, 2, 8), requires_grad=False), 1e-6, 0)
    wide = torch.randn(2, 5, 3, 16)
    for x in (wide[..., :8], wide[..., :8].transpose(1, 2), wide[..., :8].contiguous().transpose(1, 2)):
        assert not x.is_contiguous()
        assert torch.allclose(norm(x), norm(x.contiguous()), atol=1e-6)


def test_models_that_are_trained_on_a_cpu_stay_as_they_are():
    model = adapted(llama)
    fuse_on_gpu(model, torch.device("cpu"))
    assert not kinds(model, FusedLoraLinear)
    fuse_on_gpu(model, torch.device("cuda"))  # also if a trainer moves it there later
    assert kinds(model, FusedLoraLinear)


def test_a_compiler_sees_through_them():
    model = adapted(gemma3, fused=True)
    expected = values_and_gradients(model)
    torch._dynamo.reset()
    model.base_model.model.model.layers[1].compile(backend="aot_eager", dynamic=True, fullgraph=True)
    assert_equal(values_and_gradients(model), expected)


class Count(TorchDispatchMode):
    """How many operations run that read or write memory."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.number += not any(word in str(function) for word in ("view", "t.default", "permute", "empty", "detach"))
        return out


def test_a_lora_layer_takes_five_operations_forward_and_seven_backward():
    model = adapted(llama, BFLOAT16, fused=True)
    layer = kinds(model, FusedLoraLinear)[0]
    x = torch.randn(1, 9, layer.in_features, dtype=BFLOAT16, requires_grad=True)
    with Count() as forward:
        y = layer(x)
    gradient = torch.randn_like(y)
    with Count() as backward:
        y.backward(gradient)
    assert (forward.number, backward.number) == (5, 7)  # two and two are for the adapter's float32 weights


def test_no_float32_copy_of_an_activation_is_kept():
    kept = []
    layer = kinds(adapted(llama, BFLOAT16, fused=True), FusedLoraLinear)[0]
    x = torch.randn(64, layer.in_features, dtype=BFLOAT16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    of_tokens = [tensor for tensor in kept if tensor.shape[0] == 64 and tensor.ndim == 2 and tensor.requires_grad]
    assert {tensor.data_ptr() for tensor in of_tokens if tensor.shape[1] != 4} == {x.data_ptr()}
    assert all(tensor.dtype == BFLOAT16 for tensor in of_tokens)


def test_checkpoints_of_a_single_layer_recompute_the_same():
    layer = kinds(adapted(llama, fused=True), FusedLoraLinear)[0]
    x = torch.randn(3, layer.in_features, requires_grad=True)
    (plain,) = torch.autograd.grad(layer(x).square().sum(), x)
    (again,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(plain, again)


def test_stage_2_fuses_what_it_trains(tmp_path, monkeypatch):
    from twice_rec.sft import trainer

    asked = []
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(trainer, "fuse_on_gpu", lambda *arguments: asked.append(arguments))
    recipe = load_recipe("recipes/tiny/sft.yaml", SFTRecipe, ["--use_peft", "true"])
    rows = [Row("direct", [{"role": "user", "content": "tea?"}], "tea", user) for user in ("u", "v")]
    built = trainer.sft_trainer(recipe, rows, load_tokenizer(recipe.model_name_or_path), tmp_path)
    assert asked == [(built.model, torch.device("cpu"))]
    assert isinstance(built.model, PeftModel)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("make", FAMILIES, ids=NAMES)
def test_on_a_gpu_bfloat16_is_as_close_as_peft(make):
    ids = torch.randint(3, 99, (2, 20), generator=torch.Generator().manual_seed(2)).cuda()

    def found(model, autocast):
        model = model.cuda()
        with torch.autocast("cuda", dtype=BFLOAT16, enabled=autocast):
            logits = model(input_ids=ids).logits
        (logits.float() * torch.linspace(-1, 1, logits.shape[-1], device="cuda")).sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return logits.float().detach(), torch.cat(gradients)

    exact = found(adapted(make), False)
    theirs, ours = (found(adapted(make, BFLOAT16, fused=fused), True) for fused in (False, True))
    for a, b, e in zip(ours, theirs, exact, strict=True):
        assert 0 < (a - e).norm() < 1.5 * (b - e).norm()
