"""`head_parameters` gives the weight and bias that a head's own forward applies."""

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


def peft_head(
    config: str = "LoraConfig", *, bias: bool = False, more: tuple[str, ...] = (), **options: Any
) -> Any:
    """The head of a model that PEFT wraps, by a method's configuration, with more adapters."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    made = getattr(peft, config)(**({"target_modules": ["lm_head"]} | options))
    model = peft.get_peft_model(TinyModel(bias=bias), made)
    for name in more:
        model.add_adapter(name, made)
    return model.base_model.model.lm_head


def lora_head(**options: Any) -> Any:
    """PEFT's own LoRA layer around the head, with a B that is not zero."""
    layer = peft_head(**({"r": RANK, "lora_alpha": 2} | options))
    torch.manual_seed(1)
    for up in layer.lora_B.values():
        nn.init.normal_(up.weight)
    return layer


def check_follows_forward(module: nn.Module) -> None:
    """x W^T + b of `head_parameters` is the module's forward, and so are all its gradients."""
    torch.manual_seed(2)
    hidden, targets = torch.randn(20, WIDTH), torch.randint(VOCAB, (20,))
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    weight, bias = head_parameters(module)
    assert type(weight) in (Tensor, nn.Parameter) and weight.shape == (VOCAB, WIDTH)
    got = linear_log_probs(hidden, weight, targets, bias=bias)
    want = torch.log_softmax(module(hidden), -1)[torch.arange(20), targets]
    assert_same(got.detach(), want.detach())
    gradients = (torch.autograd.grad(values.sum(), trained) for values in (got, want))
    for got_grad, want_grad in zip(*gradients, strict=True):
        assert_same(got_grad, want_grad)


@pytest.mark.parametrize(("bias", "tied"), ((True, False), (False, True)))
def test_linear_is_itself(bias: bool, tied: bool) -> None:
    """A linear layer's own parameters, which may be an embedding's too, not copies of them; under
    torch.compile's wrapper too."""
    model = TinyModel(bias=bias, tied=tied)
    for module in (model.lm_head, changed(nn.Module(), _orig_mod=model.lm_head)):
        weight, got_bias = head_parameters(module)
        assert weight is model.lm_head.weight and got_bias is model.lm_head.bias
    check_follows_forward(model.lm_head)


@pytest.mark.parametrize("frozen", (True, False), ids=("frozen", "trained"))
@pytest.mark.parametrize("bias", (False, True), ids=("plain", "bias"))
def test_lora(bias: bool, frozen: bool) -> None:
    """weight + scaling B A, with gradients for A, B and a base that is not frozen."""
    layer = lora_head(bias=bias)
    layer.base_layer.requires_grad_(not frozen)
    check_follows_forward(layer)


def test_lora_states() -> None:
    """Disabled and merged adapters leave the base; a disabled but merged one is refused."""
    layer = lora_head()
    before = layer.base_layer.weight.detach().clone()
    layer.enable_adapters(False)
    assert head_parameters(layer)[0] is layer.base_layer.weight
    layer.enable_adapters(True)
    expected = head_parameters(layer)[0].detach()
    layer.merge()
    merged, _ = head_parameters(layer)
    assert not torch.equal(merged, before)
    assert_same(merged.detach(), expected)
    layer.enable_adapters(False)
    with pytest.raises(ValueError, match="still merged"):
        head_parameters(layer)


@pytest.mark.parametrize(
    "active", (["default"], ["second", "default"], ["elsewhere", "second"], []), ids="-".join
)
def test_several_adapters(active: list[str]) -> None:
    """Every active adapter is added, one that this layer lacks is passed over."""
    layer = lora_head(more=("second",))
    layer._active_adapter = active
    layer.requires_grad_(False)
    for name in set(active) & set(layer.lora_A):
        layer.lora_A[name].requires_grad_()
        layer.lora_B[name].requires_grad_()
    layer.base_layer.requires_grad_()
    check_follows_forward(layer)


def test_small_delta_survives_bfloat16() -> None:
    """A delta under bfloat16's spacing still counts: the sum is in the adapter's float32."""
    layer = lora_head()
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
    head = peft_head(target_modules=["embed"], modules_to_save=["lm_head"])
    assert head_parameters(head)[0] is head.modules_to_save["default"].weight
    check_follows_forward(head.modules_to_save["default"])
    head.enable_adapters(False)
    assert head_parameters(head)[0] is head.original_module.weight


def test_dropout_only_matters_in_training() -> None:
    """lora_dropout is refused while it drops anything, and no longer in evaluation."""
    layer = lora_head(lora_dropout=0.1)
    with pytest.raises(ValueError, match=r"'default' with lora_dropout 0\.1 while training"):
        head_parameters(layer)
    check_follows_forward(layer.eval())


@pytest.mark.parametrize("method", ("IA3Config", "LoKrConfig"))
def test_other_peft_methods(method: str) -> None:
    """Another PEFT method on the head is refused, naming its layer; disabled it is the base."""
    layer = peft_head(method, **({"feedforward_modules": []} if method == "IA3Config" else {}))
    name = method.removesuffix("Config").lower()
    with pytest.raises(ValueError, match=rf"peft\.tuners\.{name}\..*wanted a plain head"):
        head_parameters(layer)
    layer.enable_adapters(False)
    assert head_parameters(layer)[0] is layer.base_layer.weight


class PackedWeight(nn.Parameter):
    """What bitsandbytes makes of a weight: a subclass, packed, with a `quant_state`."""

    quant_state = None


def with_weight(weight: Tensor, **attributes: Any) -> nn.Linear:
    """A head of this weight, which has further attributes."""
    parameter = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, False)
    return changed(nn.Linear(WIDTH, VOCAB), weight=changed(parameter, **attributes))


def changed(owner: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(owner, name, value)
    return owner


PACKED = PackedWeight(torch.zeros(VOCAB * WIDTH // 2, 1))
LINEAR = nn.Linear(WIDTH, VOCAB)
REFUSED: dict[str, Callable[[], Any]] = {
    "got TinyModel without a weight tensor": TinyModel,
    "Linear.weight: got a Parameter of torch.int8": lambda: with_weight(
        torch.zeros(VOCAB, WIDTH).to(torch.int8)
    ),
    "Linear.weight: got a PackedWeight of torch": lambda: with_weight(PACKED),
    "Linear.weight: got a PackedWeight": lambda: changed(
        lora_head(), base_layer=with_weight(PACKED)
    ),
    "got shape (0,) (a partitioned weight: gather it first)": lambda: with_weight(
        torch.empty(0), ds_id=3
    ),
    "got shape (50, 16, 1); wanted [V, D]": lambda: with_weight(torch.zeros(VOCAB, WIDTH, 1)),
    # IDEFICS's has rows for added tokens there.
    "got Linear with more.weight, more.bias too": lambda: changed(
        nn.Linear(WIDTH, VOCAB), more=nn.Linear(WIDTH, 2)
    ),
    "LoRA on an embedding": lambda: changed(
        lora_head(), lora_embedding_A=nn.ParameterDict({"default": PACKED})
    ),
    "with fan_in_fan_out": lambda: changed(lora_head(), fan_in_fan_out=True),
    # Trainable tokens.
    "got Module; wanted a plain head or LoRA": lambda: changed(nn.Module(), original_module=LINEAR),
    "'default' of the LoRA variant DoraLinearVariant": lambda: lora_head(use_dora=True),
    # PEFT before variants: `use_dora` alone says so.
    "LoRA variant DoRA": lambda: changed(lora_head(), use_dora={"default": True}),
    "'default' with lora_bias=True": lambda: lora_head(bias=True, lora_bias=True),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message: str) -> None:
    """What no pair of tensors expresses is refused, saying what came."""
    head = REFUSED[message]()
    with pytest.raises(ValueError) as refusal:
        head_parameters(head)
    assert message in str(refusal.value)


def test_a_conv1d_head_is_transposed() -> None:
    """transformers' Conv1D keeps [D, V]: the head's matrix is its transpose, and trains."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    head = transformers.pytorch_utils.Conv1D(7, 5)
    weight, bias = head_parameters(head)
    hidden = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(nn.functional.linear(hidden, weight, bias), head(hidden))
    linear_policy_loss(
        hidden, weight, torch.tensor([0, 3, 6]), torch.ones(3), bias=bias
    ).loss.backward()
    assert head.weight.grad is not None and head.weight.grad.shape == (5, 7)
    assert head.weight.grad.any()
