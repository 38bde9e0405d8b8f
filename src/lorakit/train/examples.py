"""What a recipe's data is turned into: examples, with a conversation, the answer to learn, and how to score one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lorakit.tasks.execution import Case

Role = Literal["system", "user", "assistant"]
Message = dict[str, str]
"""``{"role": ..., "content": ...}``, as chat templates take it."""


@dataclass(frozen=True)
class Example:
    """One conversation with its last answer.

    Attributes:
        id: Names it in messages.
        messages: What comes before the answer; ends with a turn that is not the assistant's.
        answer: What the model should write.
        references: All answers that are right, for scoring; the first is ``answer`` where there is just one.
        learn_all: Whether earlier answers in ``messages`` are learnt too.
        case: Makes what a predicted query is judged against, for text-to-SQL.
    """

    id: str
    messages: tuple[Message, ...]
    answer: str
    references: tuple[str, ...] = ()
    learn_all: bool = False
    case: Callable[[], Case] | None = None
