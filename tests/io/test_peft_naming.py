"""How a configuration names things: briefly, and never too much."""

from __future__ import annotations

import re

from lorakit.io.outline import Outline
from lorakit.io.peft_naming import (
    Naming,
    module_list,
    number,
    parameter_list,
    target_modules,
    token_indices,
)


def test_target_modules_without_a_model() -> None:
    assert target_modules(["l.10.q", "l.2.q"], {}, None) == {"target_modules": ["l.2.q", "l.10.q"]}
    expression = target_modules(["fc", "a.b+c"], {}, None)["target_modules"]
    assert re.fullmatch(expression, "fc")
    assert re.fullmatch(expression, "a.b+c")
    assert not re.fullmatch(expression, "deep.fc")
    assert target_modules([], {}, None) == {"target_modules": []}


def test_target_modules_with_a_model() -> None:
    outline = Outline(
        {
            "l.0.q.weight": (1,),
            "l.1.q.weight": (1,),
            "l.0.k.weight": (1,),
            "fc.weight": (1,),
            "l.0.fc.weight": (1,),
        }
    )
    assert target_modules(["l.0.q", "l.1.q"], {}, outline) == {"target_modules": ["q"]}
    assert target_modules(["l.0.q"], {}, outline) == {"target_modules": ["l.0.q"]}
    assert target_modules(["fc"], {}, outline) == {
        "target_modules": "fc"
    }  # as a list it would end l.0.fc too
    assert target_modules(["fc", "l.0.fc"], {}, outline) == {"target_modules": ["fc"]}


def test_what_was_read_is_given_back_while_it_fits() -> None:
    hints = {
        "target_modules": ["q", "v"],
        "layers_to_transform": [0],
        "modules_to_save": ["score", "classifier"],
        "target_parameters": ["up"],
    }
    assert target_modules(["l.0.q"], hints, None) == {
        "target_modules": ["q", "v"],
        "layers_to_transform": [0],
    }
    assert target_modules(["l.0.q", "l.0.k"], hints, None) == {"target_modules": ["l.0.k", "l.0.q"]}
    assert target_modules(["l.0.q"], {"target_modules": r".*\.q"}, None) == {"target_modules": r".*\.q"}
    assert target_modules(["l.0.q"], {"target_modules": "all-linear"}, None) == {"target_modules": ["l.0.q"]}
    assert target_modules(["l.0.q"], {"target_modules": "("}, None) == {"target_modules": ["l.0.q"]}
    assert module_list(["m.score"], hints) == ["score", "classifier"]
    assert module_list(["classifier.dense"], hints) == ["score", "classifier"]
    assert module_list(["head"], hints) == ["head"]
    assert module_list([], hints) is None
    assert parameter_list(["m.up"], hints) == ["up"]
    assert parameter_list(["m.up", "m.down"], hints) == ["m.down", "m.up"]


def test_tokens() -> None:
    assert token_indices({}, {}) is None
    assert token_indices({"m.wte": [1, 2]}, {}) == {"m.wte": [1, 2]}
    assert token_indices({"m.wte": [1, 2]}, {"trainable_token_indices": [1, 2]}) == [1, 2]
    assert token_indices({"m.wte": [1, 3]}, {"trainable_token_indices": [1, 2]}) == {"m.wte": [1, 3]}
    tied = {"wte": [1, 2], "lm_head": [1, 2]}
    assert token_indices({"m.wte": [1, 2]}, {"trainable_token_indices": tied}) == tied


def test_paths_inside_wrappers() -> None:
    naming = Naming({"mlp": 2, "mlp.attn": 1})
    assert naming.start("mlp") == "mlp"
    assert naming.start("mlp.gate") == "mlp.base_layer.base_layer.gate"
    assert naming.start("mlp.attn.out_proj") == "mlp.base_layer.base_layer.attn.base_layer.out_proj"
    assert naming.start("other.fc") == "other.fc"
    assert naming.inside_wrapper("mlp.gate")
    assert not naming.inside_wrapper("mlp")


def test_numbers() -> None:
    assert repr(number(16.0)) == "16"
    assert repr(number(0.5)) == "0.5"
