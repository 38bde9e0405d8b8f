"""Entities: runs of words that belong together, from tags as ``B-place``, ``I-place``, ``O``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorakit.train.classifier_scores import LabelScore

Entity = tuple[str, int, int]
"""Kind, first word, and the word behind the last."""


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sentence, as the CoNLL shared tasks count them.

    One begins at a ``B-`` tag, and at an ``I-`` tag that does not go on with the kind before it.
    """
    return list(_found(tags))


def _found(tags: Sequence[str]) -> Iterator[Entity]:
    kind, start = "", 0
    for i, tag in enumerate([*tags, "O"]):
        mark, _, this = tag.partition("-")
        goes_on = mark == "I" and this == kind
        if kind and not goes_on:
            yield kind, start, i
        if not goes_on:
            kind, start = ("" if mark == "O" else this), i


def entity_scores(given: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]) -> LabelScore:
    """Entities counted as right where kind and both borders are: precision, recall and F1 over all of them.

    Args:
        given: The tags of each sentence as the model has them.
        gold: As they should be.
    """
    predicted = {(i, *entity) for i, tags in enumerate(given) for entity in entities(tags)}
    right = {(i, *entity) for i, tags in enumerate(gold) for entity in entities(tags)}
    return LabelScore("entities", len(right), len(predicted), len(predicted & right))
