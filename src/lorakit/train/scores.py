"""Scores of answers: execution accuracy, exact match, BLEU and NIST."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lorakit.errors import ConfigError, MissingDependencyError
from lorakit.tasks.execution import ExecutionReport, execution_accuracy
from lorakit.tasks.text_to_sql import extract_sql
from lorakit.train.examples import Example
from lorakit.train.results import Answer


def judge_sql(answers: Sequence[str], examples: Sequence[Example]) -> ExecutionReport:
    """Run the query in each answer and compare what it returns with what the gold query returns.

    Raises:
        ConfigError: An example has no database to run on.
    """
    cases = [example.case for example in examples]
    if any(case is None for case in cases):
        raise ConfigError("execution_accuracy needs databases: set data.databases, or use a built-in task.")
    return execution_accuracy(
        [extract_sql(a) for a in answers], [case() for case in cases if case is not None]
    )


def text_scores(
    metrics: Sequence[str], texts: Sequence[str], examples: Sequence[Example]
) -> tuple[dict[str, float], list[Answer]]:
    """Written answers compared with what would have been right.

    Args:
        metrics: Which of ``execution_accuracy``, ``exact_match``, ``bleu``, ``nist``; others are left alone.
        texts: What was written.
        examples: What was asked.

    Raises:
        ConfigError: An example has no database to run on.
    """
    references = [example.references for example in examples]
    answers = [
        Answer(e.id, e.messages[-1]["content"], text, e.references)
        for e, text in zip(examples, texts, strict=True)
    ]
    scores: dict[str, float] = {}
    if "execution_accuracy" in metrics:
        report = judge_sql(texts, examples)
        scores["execution_accuracy"] = report.accuracy
        scores["failed_to_run"] = report.failed / len(texts)
        answers = [
            replace(a, correct=verdict.correct, error=verdict.error)
            for a, verdict in zip(answers, report.verdicts, strict=True)
        ]
    if "exact_match" in metrics:
        scores["exact_match"] = exact_match(texts, references)
    if "bleu" in metrics:
        scores["bleu"] = bleu(texts, references)
    if "nist" in metrics:
        scores["nist"] = nist(texts, references)
        scores["nist_row_lengths"] = nist(texts, references, mean_length="row")
    return scores, answers


def exact_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share of answers that equal one of their references, runs of white space taken as one space; 0 to 1."""
    right = sum(_spaced(a) in {_spaced(r) for r in rs} for a, rs in zip(answers, references, strict=True))
    return right / len(answers)


def _spaced(text: str) -> str:
    return " ".join(text.split())


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 with several references, lower-cased, mteval-v13a tokens, 0 to 100 (sacrebleu's).

    Rows may have different numbers of references: the missing ones are None, which sacrebleu leaves out; an empty text
    would count as a very short reference.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise MissingDependencyError("BLEU needs sacrebleu: pip install 'lorakit[train]'") from error
    most = max(len(r) for r in references)
    streams: list[list[str | None]] = [
        [r[i] if i < len(r) else None for r in references] for i in range(most)
    ]
    # force: whether the answers look tokenized, as E2E's references do, is none of its business.
    score = sacrebleu.corpus_bleu(list(answers), streams, force=True, lowercase=True, tokenize="13a")  # type: ignore[arg-type]
    return float(score.score)


_PENALTY = math.log(0.5) / math.log(1.5) ** 2
_LONGEST = 5


def nist(
    answers: Sequence[str], references: Sequence[Sequence[str]], *, mean_length: str = "corpus"
) -> float:
    """Corpus NIST-5: matched n-grams weighted by how much they tell.

    ``sum_n (sum of info over matched n-grams) / (number of n-grams) * penalty``, where ``info(w1..wn) =
    log2(count(w1..wn-1) / count(w1..wn))`` over all references, and the penalty is 1/2 for answers 2/3 as long as the
    references. Lower-cased, mteval-v13a tokens. Source: Doddington 2002.

    Args:
        answers: One a row.
        references: One or more for each.
        mean_length: How the references' length is averaged, on which implementations differ: ``"corpus"`` divides
            the sum of all lengths by the mean number of references (mteval-v13a.pl); ``"row"`` adds up the means of
            the rows (the Python scorer of the E2E challenge, which the LoRA paper's repository runs).
    """
    tokenized = [[_tokens(text) for text in texts] for texts in references]
    counts: Counter[tuple[str, ...]] = Counter()
    for texts in tokenized:
        for words in texts:
            for n in range(1, _LONGEST + 1):
                counts.update(_ngrams(words, n))
    total_words = sum(len(words) for texts in tokenized for words in texts)

    def information(ngram: tuple[str, ...]) -> float:
        return math.log2((counts[ngram[:-1]] if len(ngram) > 1 else total_words) / counts[ngram])

    matched, possible, length = [0.0] * _LONGEST, [0] * _LONGEST, 0
    for answer, texts in zip(answers, tokenized, strict=True):
        words = _tokens(answer)
        length += len(words)
        for n in range(1, _LONGEST + 1):
            most: Counter[tuple[str, ...]] = Counter()
            for reference in texts:
                most |= Counter(_ngrams(reference, n))
            found = Counter(_ngrams(words, n)) & most
            matched[n - 1] += sum(information(ngram) * count for ngram, count in found.items())
            possible[n - 1] += max(0, len(words) - n + 1)
    if mean_length == "corpus":
        expected = total_words / (sum(len(texts) for texts in tokenized) / len(tokenized))
    else:
        expected = sum(sum(map(len, texts)) / len(texts) for texts in tokenized)
    if length == 0:
        return 0.0
    score = sum(m / p for m, p in zip(matched, possible, strict=True) if p)
    return score * math.exp(_PENALTY * math.log(min(length / expected, 1.0)) ** 2)


def _tokens(text: str) -> list[str]:
    try:
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    except ImportError as error:
        raise MissingDependencyError("NIST needs sacrebleu's tokens: pip install 'lorakit[train]'") from error
    return str(Tokenizer13a()(text.lower())).split()


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
