"""A method counts as finished when it has an oracle, a canonical setting, a card, and reasons for what it cannot do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lorakit.core import METHODS, method_from_json
from tests.contracts.kinds import KINDS
from tests.contracts.pairs import SUPPORTED, UNSUPPORTED
from tests.contracts.settings import SETTINGS
from tests.oracles import LAYER_OUTPUTS, ORACLES, OUTPUTS

CARDS = Path(__file__).parents[2] / "docs" / "methods"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_has_an_oracle_a_setting_and_a_card(name: str) -> None:
    assert name in {**ORACLES, **OUTPUTS, **LAYER_OUTPUTS}, (
        f"{name}: add its dense formula to tests/oracles.py"
    )
    assert any(s.method.name == name for s in SETTINGS.values()), (
        f"{name}: add it to tests/contracts/settings.py"
    )
    slug = name.replace("_", "-")
    headings = {
        heading.strip().lower().replace(" ", "-")
        for card in CARDS.glob("*.md")
        for heading in re.findall(r"^#{1,2} (.+)$", card.read_text("utf-8"), flags=re.MULTILINE)
    }
    assert (CARDS / f"{slug}.md").exists() or slug in headings, f"{name}: write docs/methods/{slug}.md"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_in_the_table_of_methods(name: str) -> None:
    assert f"({name.replace('_', '-')}.md" in (table := (CARDS / "index.md").read_text("utf-8")) or (
        f"#{name.replace('_', '-')})" in table
    )


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_survives_json(setting: str) -> None:
    method = SETTINGS[setting].method
    assert method_from_json(method.to_json()) == method


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_works_somewhere(setting: str) -> None:
    assert any(s == setting for s, _ in SUPPORTED)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_adapted_by_something(kind: str) -> None:
    assert any(k == kind for _, k in SUPPORTED)


@pytest.mark.parametrize(("setting", "kind"), UNSUPPORTED, ids=[f"{s}-{k}" for s, k in UNSUPPORTED])
def test_a_pair_that_is_not_supported_says_why(setting: str, kind: str) -> None:
    reason = UNSUPPORTED[setting, kind]
    assert len(reason.split()) >= 4, reason


@pytest.mark.parametrize("kind", [k for k, v in KINDS.items() if not v.whole and v.adapts == "layer"])
@pytest.mark.parametrize("setting", ["lora", "rslora", "dora", "dora_rslora", "full"])
def test_the_general_methods_work_on_every_matrix(setting: str, kind: str) -> None:
    if KINDS[kind].lossy and setting == "full":
        assert (setting, kind) in UNSUPPORTED  # codes cannot be trained
    else:
        assert (setting, kind) in SUPPORTED
