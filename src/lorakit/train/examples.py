"""What a recipe's data is turned into: examples, with a conversation, the answer to learn, and how to score one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lorakit.models.conversation import Message, Tool
from lorakit.tasks.execution import Case


@dataclass(frozen=True)
class Example:
    """One conversation with its last answer; or, with no messages, a plain text that is learnt whole.

    Attributes:
        id: Names it in messages.
        messages: What comes before the answer; ends with a turn that is not the assistant's.
        answer: What the model should write; empty where it only calls tools.
        references: All answers that are right, for scoring; the first is ``answer`` where there is just one.
        learn_all: Whether earlier answers in ``messages`` are learnt too.
        case: Makes what a predicted query is judged against, for text-to-SQL.
        place: File and line, where it was read.
        tools: What the model may call.
        calls: The tools that the answer calls.
        learnt: The numbers of the turns that are learnt, the answer's being ``len(messages)``; None for what
            ``learn_all`` says.
        divide: Whether a plain text that is too long becomes several rows.
    """

    id: str
    messages: tuple[Message, ...]
    answer: str
    references: tuple[str, ...] = ()
    learn_all: bool = False
    case: Callable[[], Case] | None = None
    place: str = ""
    tools: tuple[Tool, ...] = ()
    calls: tuple[Message, ...] = ()
    learnt: tuple[int, ...] | None = None
    divide: bool = False

    @property
    def where(self) -> str:
        """What to call it in messages: its place, else its name."""
        return self.place or repr(self.id)

    @property
    def turns(self) -> list[Message]:
        """The whole conversation, with its answer."""
        answer: Message = {"role": "assistant", "content": self.answer}
        return [*self.messages, {**answer, "tool_calls": list(self.calls)} if self.calls else answer]

    @property
    def learnt_turns(self) -> tuple[int, ...]:
        """The numbers of the turns that are learnt, in their order."""
        if self.learnt is not None:
            return self.learnt
        if not self.learn_all:
            return (len(self.messages),)
        return tuple(i for i, turn in enumerate(self.turns) if turn["role"] == "assistant")
