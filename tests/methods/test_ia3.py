"""IA3: which side of which layer is scaled, and PEFT's numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.core import Shape
from lorakit.errors import ConfigError, UnmatchedTargetError, UnsupportedTargetError
from tests.attach.architectures import llama, run_text
from tests.contracts.kinds import Host
from tests.contracts.pairs import Case, close, randomise
from tests.contracts.test_merging import test_changes_of_the_output_and_of_the_weight_add_up


class Block(nn.Module):
    """Layers named as in a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.k_proj, self.down_proj = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.tanh(self.k_proj(x)))


def sides(model: nn.Module, method: lk.IA3, targets: list[str]) -> dict[str, str]:
    lk.attach(model, method, targets)
    return {path: m.side for path, m in lk.extract(model).spec.methods.items()}  # type: ignore[attr-defined]


def test_the_input_of_feed_forward_layers_is_scaled() -> None:
    both = ["k_proj", "down_proj"]
    assert sides(Block(), lk.IA3(), both) == {"k_proj": "output", "down_proj": "input"}
    assert sides(Block(), lk.IA3(feedforward=()), both) == {"k_proj": "output", "down_proj": "output"}
    assert sides(Block(), lk.IA3(feedforward=("k_proj",)), both) == {"k_proj": "input", "down_proj": "output"}
    assert sides(Block(), lk.IA3(side="input"), both) == {"k_proj": "input", "down_proj": "input"}
    assert sides(Block(), lk.IA3(feedforward=("^down.*",)), both) == {
        "k_proj": "output",
        "down_proj": "input",
    }


def test_one_pattern_may_be_a_word() -> None:
    assert lk.IA3(feedforward="down_proj") == lk.IA3(feedforward=["down_proj"])  # type: ignore[arg-type]
    assert hash(lk.IA3(feedforward=["down_proj"])) == hash(lk.IA3(feedforward=("down_proj",)))  # type: ignore[arg-type]


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(UnmatchedTargetError, match=r"'down_porj' of IA3.*down_proj"):
        lk.attach(Block(), lk.IA3(feedforward=("down_porj",)), ["k_proj", "down_proj"])


def test_by_default_keys_values_and_feed_forward_are_adapted() -> None:
    model = llama()
    report = lk.attach(model, lk.IA3(), name="a")
    methods = lk.extract(model, "a").spec.methods
    ends = {path.rsplit(".", 1)[-1]: method.side for path, method in methods.items()}  # type: ignore[attr-defined]
    assert ends == {"k_proj": "output", "v_proj": "output", "down_proj": "input"}
    config = model.config
    kv = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    assert report.parameters == config.num_hidden_layers * (2 * kv + config.intermediate_size)
    before = run_text(model)
    lk.detach(model)
    assert torch.equal(run_text(model), before)


def test_an_unknown_model_needs_names() -> None:
    with pytest.raises(UnmatchedTargetError, match=r"a Block without config is not known\. Name the targets"):
        lk.attach(Block(), lk.IA3())


def test_the_count_of_the_paper() -> None:
    """T0-3B: keys and values of encoder, decoder and cross attention, and the feed-forward blocks: 540,672."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=2048, d_kv=64, num_heads=32, d_ff=5120, num_layers=24, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    method = lk.IA3()
    targets = lk.find(model, method.default_targets)
    shapes = [size for t in targets for size in method.for_path(t.path).shapes(t.shape).values()]
    assert sum(torch.Size(size).numel() for size in shapes) == 540_672


@pytest.mark.parametrize("setting", ["ia3", "ia3_input"])
def test_ones_keep_every_bit_also_of_a_merge(setting: str) -> None:
    case = Case("linear", torch.bfloat16)
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    y = case.model(case.x)
    case.attach(setting, random=False)
    assert torch.equal(case.model(case.x), y)
    lk.merge(case.model)
    after = case.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_zero_can_be_unmerged() -> None:
    """Where PEFT divides by 1e-8."""
    case = Case("linear")
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    case.attach("ia3")
    with torch.no_grad():
        case.parameters("a")["ia3_l"].zero_()
    assert not case.model(case.x).any()
    lk.merge(case.model)
    assert not case.model(case.x).any()
    lk.unmerge(case.model)
    assert all(torch.equal(case.model.state_dict()[name], value) for name, value in before.items())


def test_a_gain_near_one_is_not_rounded_to_bf16() -> None:
    """1.003 has no neighbour in bf16 but 1 and 1.0078: the product is rounded, and not the gain."""
    case = Case("linear", torch.bfloat16)
    base = case.model(case.x)
    case.attach("ia3", random=False)
    with torch.no_grad():
        case.parameters("a")["ia3_l"].fill_(1.003)
    y = case.model(case.x)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, (base.float() * 1.003).bfloat16())
    assert not torch.equal(y, base)


@pytest.mark.parametrize("second", ["bitfit", "token_rows", "lora", "lorabias", "ia3_input", "dora"])
def test_changes_of_it_and_of_others_add_up(second: str) -> None:
    test_changes_of_the_output_and_of_the_weight_add_up("ia3", second)


def test_several_at_once_are_added_and_not_multiplied() -> None:
    case = Case("linear")
    y = case.model(case.x)
    for name, gain in (("a", 2.0), ("b", 3.0)):
        case.attach("ia3", name, random=False)
        with torch.no_grad():
            case.parameters(name)["ia3_l"].fill_(gain)
    with lk.use(case.model, ["a", "b"]):
        close(case.model(case.x), (1 + (2 - 1) + (3 - 1)) * y, 1e-12)


def test_the_fast_forward_of_inputs_saves_the_input_and_not_a_weight() -> None:
    """The derived one keeps a scaled copy of the weight for backward."""
    model = Host(nn.Linear(300, 200))
    lk.attach(model, lk.IA3(side="input"), ["layer"])
    x = torch.randn(4, 300)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        model(x).sum().backward()
    weight = model.layer.weight
    assert [n for n in sizes if n == weight.numel()] == [weight.numel()], "the base weight itself, once"
    p = model.layer.lorakit.output.default.ia3_l
    close(p.grad, (torch.ones(4, 200) @ weight * x).sum(0), 1e-5)


# ---- PEFT
PEFT_LAYERS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 9), (4, 7)),
    "hfconv1d": (lambda: Conv1D(9, 7), (4, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1), (2, 3, 6, 7)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 2, 3, 4, 3)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("kind", PEFT_LAYERS)
def test_outputs_gradients_and_merged_weights_are_those_of_peft(kind: str, side: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    build, size = PEFT_LAYERS[kind]
    layer, x = build(), torch.randn(size)
    feedforward = ["layer"] if side == "input" else []
    theirs = peft.get_peft_model(
        Host(copy.deepcopy(layer)), peft.IA3Config(target_modules=["layer"], feedforward_modules=feedforward)
    )
    wrapped = theirs.base_model.model.layer
    ours = Host(layer)
    lk.attach(ours, lk.IA3(feedforward=tuple(feedforward)), ["layer"])
    gain = layer.lorakit.output.default.ia3_l
    with torch.no_grad():
        gain.copy_(torch.randn(gain.shape))
        wrapped.ia3_l["default"].copy_(gain.reshape(wrapped.ia3_l["default"].shape))
    y, z = ours(x), theirs(x)
    close(y, z, 1e-5)
    G = torch.randn(y.shape)
    (y * G).sum().backward()
    (z * G).sum().backward()
    close(gain.grad.flatten(), wrapped.ia3_l["default"].grad.flatten(), 1e-4)
    lk.merge(ours)
    wrapped.merge()
    close(layer.weight, wrapped.base_layer.weight, 1e-6)
    close(layer.bias, wrapped.base_layer.bias, 1e-6)


# ---- what cannot be
def test_an_index_has_no_features() -> None:
    with pytest.raises(UnsupportedTargetError, match="an index, which has no features to scale"):
        lk.attach(Host(nn.Embedding(5, 4)), lk.IA3(side="input"), ["layer"])
    lk.attach(Host(nn.Embedding(5, 4)), lk.IA3(), ["layer"])


@pytest.mark.parametrize(("name", "bias"), [("in_proj_weight", "in_proj_bias"), ("out_proj", "bias")])
def test_a_bias_out_of_reach_is_said(name: str, bias: str) -> None:
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(UnsupportedTargetError, match=f"adds {bias}, which would not be scaled along"):
        lk.attach(attention, lk.IA3(), [name])
    lk.attach(attention, lk.IA3(side="input"), [name])
    lk.attach(nn.MultiheadAttention(4, 2, bias=False), lk.IA3(), [name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"side": "inside"}, "'output' or 'input'"), ({"feedforward": (1,)}, "takes patterns")],
    ids=str,
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lk.IA3(**settings)


def test_one_number_for_each_feature_or_channel() -> None:
    conv = Shape("conv", out=3, in_=2 * 9, batch=(2,), kernel=(3, 3))
    assert lk.IA3().shapes(conv) == {"ia3_l": (2, 3)}
    assert lk.IA3(side="input").shapes(conv) == {"ia3_l": (2, 2)}


def test_gains_never_decay() -> None:
    """Decay pulls to zero, and a gain of zero switches its feature off."""
    case = Case("conv2d-groups")
    case.attach("ia3")
    (group,) = lk.parameter_groups(case.model, lr=1e-3, lora_plus_ratio=1, weight_decay=0.1)
    assert group["weight_decay"] == 0


def test_a_slice_scales_its_own_part_of_the_bias() -> None:
    case = Case("linear-slice")
    base = case.model(case.x)
    case.attach("ia3", random=False)
    randomise(case.parameters("a").values(), case.draw)
    gain = case.parameters("a")["ia3_l"]
    y = case.model(case.x)
    close(y[..., 2:7], base[..., 2:7] * gain, 1e-14)
    assert torch.equal(y[..., :2], base[..., :2])
    lk.merge(case.model)
    close(case.model(case.x), y, 1e-12)
