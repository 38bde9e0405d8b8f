"""The rule table: each rule reverses itself, and the documentation tells all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorakit.core.target import Shape
from lorakit.io.peft_config import REFUSED
from lorakit.io.peft_rules import (
    LOW_RANK_RULES,
    PARAMETER_ORDER,
    TOKEN_ROWS_KEY,
    Rule,
    convention,
    natural,
    transposed_pair,
)
from lorakit.methods import DoRA, LoRA

DOCS = (Path(__file__).parents[2] / "docs" / "files.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("rule", LOW_RANK_RULES, ids=lambda rule: rule.name)
def test_a_rule_reverses_itself(rule: Rule) -> None:
    shape = {
        "conv": Shape("conv", 5, 12, (), (2, 3)),
        "bare": Shape("parameter", 5, 6, (3,), stored=(3, 5, 6)),
    }.get(rule.name[:4], Shape("linear", 5, 6))
    method = DoRA(LoRA(r=2)) if "magnitude" in rule.keys else LoRA(r=2)
    sizes = method.shapes(shape)
    in_file = rule.sizes(sizes, shape)
    for name, size in sizes.items():
        tensor = torch.randn(size)
        kept = rule.to_file(name, tensor, in_file[name])
        assert tuple(kept.shape) == in_file[name]
        back = rule.from_file(name, kept, size)
        assert torch.equal(back, tensor)
        assert back.is_contiguous()


@pytest.mark.parametrize("rule", LOW_RANK_RULES, ids=lambda rule: rule.name)
def test_the_documentation_has_each_rule(rule: Rule) -> None:
    keys = ", ".join(f"`{key}`" for key in rule.keys.values())
    assert f"| {rule.name} | `{rule.configured}` | `{rule.site}` | {keys} |" in DOCS


def test_the_documentation_has_what_is_refused() -> None:
    for key in REFUSED:
        assert f"`{key}`" in DOCS, key
    assert TOKEN_ROWS_KEY in DOCS


def test_the_order_of_parameters_is_that_of_transformers() -> None:
    """The table is a convention of others: this looks whether the installed transformers still keeps to it."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    del transformers
    from transformers import GptOssConfig, MixtralConfig

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_local_experts": 2}
    for experts in (MixtralExperts(MixtralConfig(**sizes)), GptOssExperts(GptOssConfig(**sizes))):
        names = [name for name, _ in experts.named_parameters(recurse=False)]
        assert convention(sorted(names)) == names
    separate = [
        name
        for name, _ in torch.nn.MultiheadAttention(4, 2, kdim=3, vdim=3).named_parameters(recurse=False)
        if "weight" in name
    ]
    assert convention(sorted(separate)) == separate


def test_an_unknown_order_is_not_guessed() -> None:
    assert convention(["w3", "w1"]) is None
    assert convention(["anything"]) == ["anything"]
    assert len(set(PARAMETER_ORDER)) == len(PARAMETER_ORDER)


def test_transposing_a_product() -> None:
    A, B = torch.randn(3, 2, 6), torch.randn(3, 4, 2)
    At, Bt = transposed_pair(A, B)
    torch.testing.assert_close(Bt @ At, (B @ A).mT)


def test_paths() -> None:
    assert sorted(["l.10.q", "l.2.q", "a.q", "l.q"], key=natural) == ["a.q", "l.2.q", "l.10.q", "l.q"]
