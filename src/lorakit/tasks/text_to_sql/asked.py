"""What the wordings of a question have to work with."""

from __future__ import annotations

from dataclasses import dataclass

from .dice import Dice
from .phrases import Phrase, column_noun, rows_phrase
from .query import Query
from .schema import Table

_SHOW = ("List", "Display", "Show", "Give", "Show me", "Give me", "Find", "Return", "Get", "Tell me")


@dataclass(frozen=True)
class Asked:
    """What a wording has to work with: the plan, its table, its conditions in words, and the dice."""

    query: Query
    table: Table
    phrases: tuple[Phrase, ...]
    dice: Dice

    def rows(self, *, many: bool = True, superlative: str = "", ending: str = "") -> str:
        return rows_phrase(self.table, self.phrases, many=many, superlative=superlative, ending=ending)

    def subject_and_predicate(self) -> tuple[str, str] | None:
        """The rows without their last condition, and that one as a predicate: ("cities in Peru", "have 3 parks")."""
        if not self.phrases or not self.phrases[-1].predicate:
            return None
        return rows_phrase(self.table, self.phrases[:-1], many=True), self.phrases[-1].predicate

    def nouns(self) -> list[str]:
        """What the selected columns are called."""
        return [column_noun(self.table.column(term.column), self.dice) for term in self.query.select]

    def show(self, *, many: bool = True) -> str:
        """The opening of a request; one for a single value lists nothing."""
        return self.dice.choice(_SHOW if many else _SHOW[2:])
