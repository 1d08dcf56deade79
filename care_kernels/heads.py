"""The weight and bias that a language-model head applies, whatever wraps it.

`linear_policy_loss` and `linear_log_probs` take a weight [V, D], not a module. A plain `nn.Linear`
has one; under PEFT, FSDP2 or tensor parallelism it has to be put together first:

    W = W_base + sum_adapters scaling * B A,    dA = scaling * B^T dW,    dB = scaling * dW A^T

Shape letters: V vocabulary, D hidden, r rank of an adapter.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from care_kernels.checks import FLOAT_DTYPES, wrong
from care_kernels.softmax import LogitTransform


def head_parameters(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The effective weight [V, D] and bias [V] of a language-model head, inside the graph.

    Gradients reach whatever the weight is made of: the parameter itself (tied or not), the shards
    of a `DTensor`, a LoRA adapter's A and B, the base weight under it unless that is frozen.

    - `nn.Linear`, or any module whose `weight` is [V, D] and applied as x W^T + b: its own tensors,
      nothing is copied. An optional `bias` is taken along. A transformers `Conv1D` is transposed.
    - `DTensor` parameters (FSDP2, tensor parallelism) are gathered, a collective call. Their
      gradient is the mean over the ranks of the mesh, which is FSDP's rule where ranks hold
      different data and changes nothing where they hold the same. Inside the forward of a module
      that FSDP manages the weight is gathered already and this function is not needed.
    - A PEFT LoRA layer: base weight plus every active adapter, as the layer's own forward adds
      them; the base alone where adapters are merged or disabled. Also PEFT's `modules_to_save`.

    Cost: a gathered weight takes [V, D]; an adapter forms the sum, another [V, D], and its backward
    the gradient dW [V, D], from which dA and dB follow in 2 V D r multiply-adds each. For LoRA on
    the head that dW is what a plain head would have needed too, but not what LoRA users expect.
    The sum is in the wider type of base and adapter: rounded to bfloat16 it would lose every delta
    under 1/512 of the weight it joins. Cast it if bfloat16 GEMMs matter more.

    Args:
        module: the head, such as `model.get_output_embeddings()`.

    Raises:
        ValueError: no such pair of tensors does what the module does: lora_dropout while training,
            a LoRA variant (DoRA and others), lora_bias, another PEFT method, a quantised or
            partitioned weight, no 2-D weight at all, parameters beside weight and bias.
    """
    module = _without_copies(getattr(module, "_orig_mod", module))  # torch.compile's wrapper
    if hasattr(module, "base_layer"):
        return _adapted(module)
    name = type(module).__name__
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        wanted = "a head with a weight [V, D], such as model.get_output_embeddings(), not quantised"
        raise wrong("module", f"{name} without a weight tensor", wanted)
    weight, bias = _plain(f"{name}.weight", weight, 2), getattr(module, "bias", None)
    known = ("weight", "bias", "parametrizations")
    if more := [key for key, _ in module.named_parameters() if key.split(".")[0] not in known]:
        raise wrong("module", f"{name} with {', '.join(more)} too", "x W^T + b alone")
    # transformers' Conv1D (GPT-2's layers) is a linear layer with its weight stored as [D, V].
    weight = weight.T if name == "Conv1D" and hasattr(module, "nf") else weight
    return weight, _plain(f"{name}.bias", bias, 1) if isinstance(bias, Tensor) else None


def output_head(model: Any) -> Any:
    """The head module of a transformers model, looked up anew since wrappers replace it."""
    head = model.get_output_embeddings()
    if head is None:
        got = f"{type(model).__name__} without output embeddings"
        raise wrong("model", got, "a language model")
    return head


def logit_options(config: Any) -> dict[str, Any]:
    """`logit_softcap` and `logit_scale` of a text config, under the names its family uses.

    Source: the forwards of Gemma 2-4, RecurrentGemma and xLSTM (softcap), Cohere (logit_scale),
    Muse Glimmer (output_multiplier), Falcon-H1 (lm_head_multiplier), Granite and MiniCPM3 (divide
    by logits_scaling), Inkling (divides by logits_mup_width_multiplier) and HyperCLOVA X
    (multiplies by logits_scaling) in transformers 5.19. `check_forward` refuses any other.
    """
    softcap = scale = None
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        softcap = getattr(config, name, None) if softcap is None else softcap
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None) if scale is None else scale
    for name in ("logits_scaling", "logits_mup_width_multiplier"):
        if scale is None and (divisor := getattr(config, name, None)) is not None:
            scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    return {"logit_softcap": softcap, "logit_scale": 1.0 if scale is None else scale}


def check_forward(model: Any, head_weight: Tensor, *, with_loss: bool = False) -> None:
    """Refuse a transformers model whose forward is more than backbone, head and `logit_options`.

    It runs over three tokens between stand-ins for the backbone and the head (random hidden states,
    a random matrix [V, D] of rank one), so that nothing large is computed or moved.

    Args:
        head_weight: [V, D], of `output_head(model)`; its shape alone is read.
        with_loss: the loss must be the mean cross-entropy of these logits, too.
    """
    name, backbone, head = type(model).__name__, model.base_model, output_head(model)
    if backbone is model:
        raise wrong("model", f"{name} without a backbone of its own", "a language model with one")
    vocab_size, width = head_weight.shape
    # The caller's default device and type may be others, and its random numbers stay its own.
    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "device": "cpu"}
    sizes = ((1, 3, width), (width,), (vocab_size,))
    hidden, into, out = (torch.randn(n, **options, dtype=torch.float32) for n in sizes)
    ids = torch.randint(vocab_size, (1, 3), **options)

    embedded = []

    def embed(*args: Any, input_ids: Tensor | None = None, **kwargs: Any) -> _BackboneOutput:
        embedded.append(args[0] if args else input_ids)
        return _BackboneOutput(hidden)

    def project(rows: Tensor) -> Tensor:
        return (rows @ into)[..., None] * out * (8 / width**0.5)

    transform = logit_options(model.config.get_text_config())
    # OPT's forward calls its backbone's decoder.
    parts = {backbone, getattr(backbone, "decoder", backbone)}
    stand_ins = {part: _StandIn(part, embed) for part in parts}
    stand_ins[head] = _StandIn(head, project, weight=into)
    labels, wanted = ids if with_loss else None, "a backbone and a head over token ids alone"
    try:
        logits = project(hidden)
        LogitTransform(1.0, transform["logit_softcap"], transform["logit_scale"]).apply_(logits)
        with _replaced(model, stand_ins), torch.no_grad(), torch.device("cpu"):
            own = type(model).forward(model, input_ids=ids, labels=labels, return_dict=True)
        is_same = own.logits.shape == logits.shape and _is_close(own.logits, logits)
        if with_loss:
            is_same = is_same and _is_close(own.loss, F.cross_entropy(logits[0, :-1], ids[0, 1:]))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        got = f"{name}, whose forward fails on three tokens between stand-ins ({e})"
        raise wrong("model", got, wanted) from e
    if not (embedded and embedded[0] is ids):
        raise wrong("model", f"{name}, whose forward embeds its inputs itself, images too", wanted)
    if not is_same:
        got = f"{name}, whose forward makes other logits or another loss of its head's output"
        raise wrong("model", got, f"cross-entropy, and logits by {transform} alone")


class _StandIn:
    """Answers calls in a module's place, and otherwise is that module."""

    def __init__(self, module: nn.Module, answer: Callable[..., Any], **attributes: Any) -> None:
        self.__dict__.update(attributes, module=module, answer=answer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class _BackboneOutput:
    """Last hidden states, and None for whatever else a backbone may return."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, key: Any) -> Any:
        return self.last_hidden_state if key == 0 else ()


@contextmanager
def _replaced(model: nn.Module, by: dict[nn.Module, Any]) -> Iterator[None]:
    """`model`, not in training, with some of its modules replaced wherever they are registered."""
    tables = [module._modules for module in model.modules()]
    places = [
        (table, key, child) for table in tables for key, child in table.items() if child in by
    ]
    for table, key, child in places:
        table[key] = by[child]
    # In training Liger's forwards make no logits.
    was_training, model.training = model.training, False
    try:
        yield
    finally:
        model.training = was_training
        for table, key, child in places:
            table[key] = child


def _is_close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.float(), b, rtol=1e-2, atol=1e-2)


def _adapted(module: Any) -> tuple[Tensor, Tensor | None]:
    """Base and active adapters of a PEFT layer; read by attributes: peft is never imported."""
    weight, bias = head_parameters(module.base_layer)
    is_off, is_merged = (getattr(module, name, False) for name in ("disable_adapters", "merged"))
    if is_off and is_merged:
        got = "with adapters disabled but still merged into its base weight"
        raise wrong("module", f"{type(module).__name__} {got}", "unmerge() first")
    if is_off or is_merged:
        return weight, bias
    kind = f"{type(module).__module__}.{type(module).__name__}"
    is_lora = all(hasattr(module, name) for name in ("lora_A", "lora_B", "scaling"))
    if not is_lora or hasattr(module, "parameter_name"):
        wanted = "a plain head or a LoRA linear layer: merge this adapter, or keep it off the head"
        raise wrong("module", kind, wanted)
    if getattr(module, "fan_in_fan_out", False):
        raise wrong("module", f"{kind} with fan_in_fan_out", "a weight [V, D]")
    for name in module.active_adapters:
        if name in getattr(module, "lora_embedding_A", ()):
            raise wrong("module", f"{kind}, LoRA on an embedding", "it on a linear")
        if name in module.lora_A:
            _check_expressible(module, name)
            down = _plain(f"lora_A[{name!r}]", module.lora_A[name].weight, 2)
            up = _plain(f"lora_B[{name!r}]", module.lora_B[name].weight, 2)
            dtype = torch.promote_types(weight.dtype, up.dtype)
            # Autocast would round the sum to its own type.
            with torch.autocast(weight.device.type, enabled=False):
                scaling, delta = module.scaling[name], (up.to(dtype), down.to(dtype))
                weight = torch.addmm(weight.to(dtype), *delta, alpha=scaling)
    return weight, bias


def _check_expressible(module: Any, name: str) -> None:
    """scaling * B A says all that adapter `name` does."""
    variant = getattr(module, "lora_variant", {}).get(name)
    if variant is not None or getattr(module, "use_dora", {}).get(name, False):
        kind = "DoRA" if variant is None else type(variant).__name__
        raise wrong("module", f"adapter {name!r} of the LoRA variant {kind}", "plain LoRA")
    if getattr(module.lora_B[name], "bias", None) is not None:
        raise wrong("module", f"adapter {name!r} with lora_bias=True", "False")
    dropout = getattr(module, "lora_dropout", {})
    dropout = dropout[name] if name in dropout else None
    probability = getattr(dropout, "p", 0.0)
    if dropout is not None and dropout.training and probability > 0:
        raise wrong(
            "module",
            f"adapter {name!r} with lora_dropout {probability} while training",
            "0 on the head (dropout masks each row, which no weight expresses), or eval()",
        )


def _without_copies(module: Any) -> Any:
    """The module that runs where PEFT keeps a trained copy beside the original."""
    if not hasattr(module, "original_module"):
        return module
    if not hasattr(module, "modules_to_save"):
        raise wrong("module", type(module).__name__, "a plain head or LoRA")
    active = module.active_adapters
    if module.disable_adapters or not active or active[0] not in module.modules_to_save:
        return module.original_module
    return module.modules_to_save[active[0]]


def _plain(name: str, value: Tensor, num_dims: int) -> Tensor:
    """`value` as an ordinary tensor, gathered if it is a `DTensor`."""
    if hasattr(value, "full_tensor"):
        value = _gathered(value)
    # Quantised weights are subclasses that dequantise on use, or floats that hold packed bits.
    is_ordinary = type(value) in (Tensor, nn.Parameter) and not hasattr(value, "quant_state")
    if not is_ordinary or value.dtype not in FLOAT_DTYPES:
        got = f"a {type(value).__name__} of {value.dtype}"
        raise wrong(name, got, "an ordinary floating tensor: dequantise the head")
    if value.dim() != num_dims:
        hint = " (a partitioned weight: gather it first)" if hasattr(value, "ds_id") else ""
        got = f"shape {tuple(value.shape)}{hint}"
        raise wrong(name, got, "[V, D]" if num_dims == 2 else "[V]")
    return value


def _gathered(value: Any) -> Tensor:
    """A `DTensor` in full; its gradient is the mean over the mesh, sent back to the shards."""
    from torch.distributed.tensor import Partial

    mesh = value.device_mesh
    full = value.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda grad: grad / mesh.size())
    return full
