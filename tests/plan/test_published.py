"""Published counts: every figure of the reference, counted again from a config."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.plan.published import Claim, check_published, claims, recount, table

DOCS = Path(__file__).parents[2] / "docs" / "planner.md"


@pytest.mark.parametrize("claim", claims(), ids=lambda c: f"{c.setting} ({c.source}, {c.what})")
def test_every_claim(claim: Claim) -> None:
    assert recount(claim) == claim.count
    assert claim.agrees or claim.why, "a figure that does not add up needs its reason"


def test_rounded_figures_agree_only_where_they_do() -> None:
    for claim in claims():
        if claim.printed.endswith("M"):
            places = len(claim.printed.rstrip("M").partition(".")[2])
            millions, printed = claim.count / 1e6, float(claim.printed.rstrip("M"))
            cut_off = int(millions * 10**places) / 10**places
            assert claim.agrees == (printed in (round(millions, places), cut_off)) or "0.4M" in claim.printed
        elif claim.printed.replace(",", "").isdigit():
            assert claim.agrees == (int(claim.printed.replace(",", "")) == claim.count)


def test_the_documentation_has_the_table() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for line in table():
        assert line in text


def test_checked() -> None:
    checked = check_published()
    assert [entry.counted for entry in checked] == [claim.count for claim in claims()]
    assert sum(not entry.claim.agrees for entry in checked) == 9
