"""Scores, computed by hand."""

from __future__ import annotations

import math

import pytest

from lorakit.errors import ConfigError
from lorakit.train.examples import Example
from lorakit.train.scores import bleu, exact_match, judge_sql, nist


def test_exact_match_takes_any_reference_and_any_spacing() -> None:
    assert exact_match(["a  b", "c", "D"], [["x", "a b"], ["c "], ["d"]]) == pytest.approx(2 / 3)


def test_bleu_of_the_references_themselves_and_of_another_case() -> None:
    references = [["The cat sat on the mat .", "A cat ."], ["It is five o'clock now ."]]
    assert bleu(["the cat sat on the mat .", "it is five o'clock now ."], references) == pytest.approx(100.0)


def test_bleu_by_hand() -> None:
    # 5 words, one of them wrong: n-gram precisions 4/5, 3/4, 2/3, 1/2; as long as the reference, so no penalty.
    answer, reference = "a b c d x", "a b c d e"
    expected = 100 * math.exp(sum(math.log(p) for p in (4 / 5, 3 / 4, 2 / 3, 1 / 2)) / 4)
    assert bleu([answer], [[reference]]) == pytest.approx(expected, abs=1e-6)


def test_a_missing_reference_is_not_a_short_one() -> None:
    # An empty text in its place would be the reference of the nearest length and take away the penalty.
    one = bleu(["a b c d", "p q r s"], [["a b c d e f g h", "a b c d e f g h"], ["p q r s t u v w"]])
    two = bleu(["a b c d", "p q r s"], [["a b c d e f g h"], ["p q r s t u v w"]])
    assert one == pytest.approx(two)
    assert one == pytest.approx(100 * math.exp(1 - 16 / 8))


def test_nist_by_hand() -> None:
    # References: "a b", "a c". Words: a twice, b and c once, 4 in all. info(a) = log2(4/2) = 1, info(b) =
    # log2(4/1) = 2,
    # info(a b) = log2(count(a) / count(a b)) = log2(2/1) = 1. Answers as long as the references: no penalty.
    references = [["a b"], ["a c"]]
    # "a b": 1 + 2 of unigrams, 1 of bigrams; "a x": 1. (3 + 1) / 4 + 1 / 2.
    assert nist(["a b", "a x"], references) == pytest.approx(4 / 4 + 1 / 2)


def test_nist_penalty_is_a_half_at_two_thirds() -> None:
    references = [["a b c"]]
    # "a b" of 3 words: info of each word log2(3); of "a b" 0. (2 log2 3) / 2 + 0, halved.
    assert nist(["a b"], references) == pytest.approx(0.5 * math.log2(3))
    assert nist([""], references) == 0.0


def test_nist_lengths_are_averaged_over_the_corpus_or_the_rows() -> None:
    # Row one has two references of 2 words, row two has one of 8. Corpus: 12 / (3/2) = 8; rows: 2 + 8 = 10.
    references = [["a b", "a b"], ["c d e f g h i j"]]
    answers = ["a b", "c d e f g h"]  # 8 words
    corpus, rows = nist(answers, references), nist(answers, references, mean_length="row")
    assert rows / corpus == pytest.approx(
        math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(8 / 10) ** 2)
    )


def test_sql_needs_databases() -> None:
    with pytest.raises(ConfigError, match="needs databases"):
        judge_sql(["SELECT 1"], [Example("a", (), "SELECT 1")])
