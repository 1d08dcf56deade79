"""`head_parameters` gives the weight and bias that a head's own forward applies."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from care_kernels import linear_log_probs, linear_policy_loss
from care_kernels.heads import head_parameters
from tests.kernels.cases import assert_same

WIDTH, VOCAB, RANK = 16, 50, 4


class TinyModel(nn.Module):
    """Something for PEFT to wrap: an embedding, perhaps tied, and a head."""

    def __init__(self, *, bias: bool = False, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=bias)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


class StandInLora(nn.Module):
    """The attributes of `peft.tuners.lora.Linear` (peft 0.17 to 0.21) and its forward."""

    def __init__(self, base_layer: nn.Linear, adapters: tuple[str, ...] = ("default",)) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({n: nn.Linear(WIDTH, RANK, bias=False) for n in adapters})
        self.lora_B = nn.ModuleDict({n: nn.Linear(RANK, VOCAB, bias=False) for n in adapters})
        self.lora_dropout = nn.ModuleDict({name: nn.Identity() for name in adapters})
        self.lora_embedding_A = nn.ParameterDict({})
        self.scaling = {name: 0.5 + index for index, name in enumerate(adapters)}
        self.lora_bias = dict.fromkeys(adapters, False)
        self.use_dora = dict.fromkeys(adapters, False)
        self.lora_variant: dict[str, Any] = {}
        self.fan_in_fan_out = False
        self.active_adapters = list(adapters)
        self.merged_adapters: list[str] = []
        self.disable_adapters = False

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def weight(self) -> Tensor:
        """As in PEFT: the base weight, without any adapter."""
        return self.base_layer.weight

    def forward(self, hidden: Tensor) -> Tensor:
        result = self.base_layer(hidden)
        if not self.disable_adapters and not self.merged:
            for name in self.active_adapters:
                if name in self.lora_A:
                    dropped = self.lora_dropout[name](hidden)
                    result = (
                        result
                        + self.lora_B[name](self.lora_A[name](dropped)) * (self.scaling[name])
                    )
        return result


def peft_layer(model: TinyModel, *, seed: int = 1, **options: Any) -> Any:
    """PEFT's own LoRA layer around the head, with a B that is not zero."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    options = {"r": RANK, "lora_alpha": 2, "target_modules": ["lm_head"]} | options
    layer = peft.get_peft_model(model, peft.LoraConfig(**options)).base_model.model.lm_head
    torch.manual_seed(seed)
    for up in layer.lora_B.values():
        nn.init.normal_(up.weight)
    return layer


def stand_in_layer(model: TinyModel) -> StandInLora:
    model.lm_head.requires_grad_(False)
    return StandInLora(model.lm_head)


LAYERS: dict[str, Callable[[TinyModel], Any]] = {"stand_in": stand_in_layer, "peft": peft_layer}


def check_follows_forward(module: nn.Module, *, dtype: torch.dtype = torch.float32) -> None:
    """x W^T + b of `head_parameters` is the module's forward, and so are all its gradients."""
    torch.manual_seed(2)
    hidden = torch.randn(20, WIDTH, dtype=dtype)
    targets = torch.randint(VOCAB, (20,))
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}

    weight, bias = head_parameters(module)
    assert type(weight) in (Tensor, nn.Parameter) and weight.shape == (VOCAB, WIDTH)
    got = linear_log_probs(hidden, weight, targets, bias=bias)
    gradients = torch.autograd.grad(got.sum(), list(trained.values()))

    logits = module(hidden).float()
    want = torch.log_softmax(logits, -1)[torch.arange(20), targets]
    want_gradients = torch.autograd.grad(want.sum(), list(trained.values()))
    assert_same(got.detach().to(dtype), want.detach().to(dtype))
    for got_grad, want_grad in zip(gradients, want_gradients, strict=True):
        assert_same(got_grad, want_grad)


@pytest.mark.parametrize("tied", (False, True), ids=("untied", "tied"))
@pytest.mark.parametrize("bias", (False, True), ids=("plain", "bias"))
def test_linear_is_itself(bias: bool, tied: bool) -> None:
    """A linear layer's own parameters, not copies of them."""
    model = TinyModel(bias=bias, tied=tied)
    weight, got_bias = head_parameters(model.lm_head)
    assert weight is model.lm_head.weight and got_bias is model.lm_head.bias
    check_follows_forward(model.lm_head)


def test_tied_gradient_joins_the_embedding() -> None:
    """With tied weights the embedding's gradient includes the head's."""
    model = TinyModel(tied=True)
    nn.init.normal_(model.embed.weight, std=0.3)
    ids, targets = torch.arange(5), torch.arange(3, 8)
    weight, _ = head_parameters(model.lm_head)
    linear_log_probs(model.embed(ids), weight, targets).sum().backward()
    reference = model.embed.weight.detach().clone().requires_grad_()
    torch.log_softmax(reference[ids] @ reference.T, -1)[ids, targets].sum().backward()
    assert model.embed.weight.grad is not None and reference.grad is not None
    assert_same(model.embed.weight.grad, reference.grad)


@pytest.mark.parametrize("frozen", (True, False), ids=("frozen", "trained"))
@pytest.mark.parametrize("bias", (False, True), ids=("plain", "bias"))
@pytest.mark.parametrize("kind", LAYERS)
def test_lora(kind: str, bias: bool, frozen: bool) -> None:
    """weight + scaling B A, with gradients for A, B and a base that is not frozen."""
    layer = LAYERS[kind](TinyModel(bias=bias))
    layer.base_layer.requires_grad_(not frozen)
    check_follows_forward(layer)


@pytest.mark.parametrize("kind", LAYERS)
def test_lora_states(kind: str) -> None:
    """Disabled and merged adapters leave the base; a disabled but merged one is refused."""
    layer = LAYERS[kind](TinyModel())
    before = layer.base_layer.weight.detach().clone()
    if kind == "peft":
        layer.enable_adapters(False)
    else:
        layer.disable_adapters = True
    weight, _ = head_parameters(layer)
    assert weight is layer.base_layer.weight
    if kind == "peft":
        layer.enable_adapters(True)
        expected = head_parameters(layer)[0].detach()
        layer.merge()
        merged, _ = head_parameters(layer)
        assert not torch.equal(merged, before)
        assert_same(merged.detach(), expected)
        layer.enable_adapters(False)
    else:
        layer.merged_adapters = ["default"]
    with pytest.raises(ValueError, match="still merged"):
        head_parameters(layer)


def test_several_adapters() -> None:
    """Every active adapter is added, one that this layer lacks is passed over."""
    layer = StandInLora(TinyModel().lm_head, ("first", "second"))
    for active in (["first"], ["second", "first"], ["elsewhere", "second"], []):
        layer.active_adapters = active
        named = [n for n in active if n in layer.lora_A]
        layer.requires_grad_(False)
        for name in named:
            layer.lora_A[name].requires_grad_()
            layer.lora_B[name].requires_grad_()
        layer.base_layer.requires_grad_()
        check_follows_forward(layer)


def test_small_delta_survives_bfloat16() -> None:
    """A delta under bfloat16's spacing still counts: the sum is in the adapter's float32."""
    model = TinyModel()
    layer = stand_in_layer(model)
    layer.base_layer.bfloat16()
    for part in (layer.lora_A, layer.lora_B):
        nn.init.constant_(part["default"].weight, 1e-3)
    weight, _ = head_parameters(layer)
    assert weight.dtype == torch.float32
    delta = weight - layer.base_layer.weight.float()
    assert torch.allclose(delta, torch.full_like(delta, 0.5 * RANK * 1e-6), rtol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head_parameters(layer)[0], weight)


def test_modules_to_save() -> None:
    """A head that PEFT trains in full: the trained copy while it is active, else the original."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(target_modules=["embed"], modules_to_save=["lm_head"])
    head = peft.get_peft_model(TinyModel(), config).base_model.model.lm_head
    assert head_parameters(head)[0] is head.modules_to_save["default"].weight
    check_follows_forward(head.modules_to_save["default"])
    head.enable_adapters(False)
    assert head_parameters(head)[0] is head.original_module.weight


def test_dropout_only_matters_in_training() -> None:
    """lora_dropout is refused while it drops anything, and no longer in evaluation."""
    for layer in (stand_in_layer(TinyModel()), peft_layer(TinyModel(), lora_dropout=0.1)):
        layer.lora_dropout["default"] = nn.Dropout(0.1)
        with pytest.raises(ValueError, match=r"'default' with lora_dropout 0\.1 while training"):
            head_parameters(layer)
        layer.eval()
        check_follows_forward(layer)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"use_dora": True}, "'default' of the LoRA variant DoraLinearVariant"),
        ({"lora_bias": True}, "'default' with lora_bias=True"),
    ),
    ids=("dora", "lora_bias"),
)
def test_lora_forms_that_no_weight_expresses(options: dict[str, bool], message: str) -> None:
    """DoRA and a LoRA bias are refused by name."""
    layer = peft_layer(TinyModel(bias=True), **options)
    with pytest.raises(ValueError, match=message):
        head_parameters(layer)


def test_older_dora_flag() -> None:
    """PEFT before variants: `use_dora` alone says so."""
    layer = stand_in_layer(TinyModel())
    layer.use_dora["default"] = True
    with pytest.raises(ValueError, match="LoRA variant DoRA"):
        head_parameters(layer)


@pytest.mark.parametrize("method", ("IA3Config", "LoHaConfig", "VeraConfig", "LoKrConfig"))
def test_other_peft_methods(method: str) -> None:
    """Another PEFT method on the head is refused, naming its layer; disabled it is the base."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    options = {"feedforward_modules": []} if method == "IA3Config" else {}
    config = getattr(peft, method)(target_modules=["lm_head"], **options)
    layer = peft.get_peft_model(TinyModel(), config).base_model.model.lm_head
    name = method.removesuffix("Config").lower()
    with pytest.raises(ValueError, match=rf"peft\.tuners\.{name}\..*wanted a plain head"):
        head_parameters(layer)
    layer.enable_adapters(False)
    assert head_parameters(layer)[0] is layer.base_layer.weight


class PackedWeight(nn.Parameter):
    """What bitsandbytes makes of a weight: a subclass, packed, with a `quant_state`."""

    quant_state = None


def refused_modules() -> dict[str, tuple[nn.Module, str]]:
    int8, packed, partitioned, thick = (nn.Linear(WIDTH, VOCAB) for _ in range(4))
    int8.weight = nn.Parameter(int8.weight.to(torch.int8), requires_grad=False)
    packed.weight = PackedWeight(torch.zeros(VOCAB * WIDTH // 2, 1))
    partitioned.weight = nn.Parameter(torch.empty(0))
    partitioned.weight.ds_id = 3  # pyright: ignore[reportAttributeAccessIssue]
    thick.weight = nn.Parameter(torch.zeros(VOCAB, WIDTH, 1))
    on_quantised = StandInLora(packed)
    embedding_adapter = StandInLora(nn.Linear(WIDTH, VOCAB))
    del embedding_adapter.lora_A["default"]
    embedding_adapter.lora_embedding_A["default"] = nn.Parameter(torch.zeros(RANK, VOCAB))
    fan_out = StandInLora(nn.Linear(WIDTH, VOCAB))
    fan_out.fan_in_fan_out = True
    tokens = nn.Module()
    tokens.original_module = nn.Linear(WIDTH, VOCAB)
    return {
        "no_weight": (TinyModel(), "got TinyModel without a weight tensor"),
        "int8": (int8, r"Linear\.weight: got a Parameter of torch\.int8"),
        "packed": (packed, r"Linear\.weight: got a PackedWeight of torch\.float32"),
        "on_quantised": (on_quantised, r"Linear\.weight: got a PackedWeight"),
        "partitioned": (partitioned, r"got shape \(0,\) \(a partitioned weight: gather it first\)"),
        "thick": (thick, r"got shape \(50, 16, 1\); wanted \[V, D\]"),
        "embedding": (embedding_adapter, "LoRA on an embedding"),
        "fan_in_fan_out": (fan_out, "with fan_in_fan_out"),
        "trainable_tokens": (tokens, "got Module; wanted a plain head or LoRA"),
    }


@pytest.mark.parametrize("name", refused_modules())
def test_refused(name: str) -> None:
    """What is no pair of tensors is refused, saying what came."""
    module, message = refused_modules()[name]
    with pytest.raises(ValueError, match=message):
        head_parameters(module)


def test_never_imports_peft() -> None:
    """`care_kernels.heads` needs no peft, whatever it is shown."""
    code = (
        "import sys; from care_kernels.heads import head_parameters; import torch;"
        "head_parameters(torch.nn.Linear(2, 3)); assert 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_conv1d_head_is_transposed() -> None:
    """transformers' Conv1D keeps [D, V]: the head's matrix is its transpose, and trains."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    head = transformers.pytorch_utils.Conv1D(7, 5)
    weight, bias = head_parameters(head)
    hidden = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.nn.functional.linear(hidden, weight, bias), head(hidden))
    loss = linear_policy_loss(
        hidden, weight, torch.tensor([0, 3, 6]), torch.ones(3), bias=bias
    ).loss
    loss.backward()
    assert head.weight.grad is not None and head.weight.grad.shape == (5, 7)
    assert (head.weight.grad != 0).any()
