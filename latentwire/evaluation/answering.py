"""From questions to prediction lines: one batch of one condition, read and answered by one LLM."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from tqdm import tqdm

from latentwire.conditions.base import Condition, Reader, Shared
from latentwire.data.content import question_in_tail
from latentwire.data.question import Question, Scorer
from latentwire.evaluation.predictions import Predictions


def batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Batches of similar length, longest first: little padding, and too little memory shows at once."""
    ordered = sorted(questions, key=lambda q: (-len(q.context) - len(q.question), q.id))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def complete(
    predictions: Predictions,
    label: Mapping[str, object],
    condition: Condition,
    m: int,
    reader: Reader,
    shared: Shared,
    score: Scorer,
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, dict]:
    """Lines by question id of one condition on the shared questions, the missing ones computed and kept under `label`
    (condition, m, llm).

    The batches are always the same, so that a continued run gives the same numbers as an uninterrupted one.
    """
    lines = predictions.of(label)
    title = " ".join([label["llm"] or "", label["condition"], *([f"M={m}"] if label["m"] else [])])
    with tqdm(total=len(shared.questions), desc=title, unit="q", mininterval=1) as bar:
        for batch in batches(shared.questions, batch_size):
            missing = {q.id for q in batch} - lines.keys()
            if missing:
                found = answer(condition, m, reader, shared, score, batch, max_new_tokens)
                if bar.n == 0:
                    tqdm.write(_shown(title, batch[0], found[0]), file=sys.stderr)
                predictions.append([{"id": x["id"]} | label | x for x in found if x["id"] in missing])
            bar.update(len(batch))
    return lines


def _shown(title: str, question: Question, line: Mapping[str, object]) -> str:
    """One answer, for who waits: whether anything sensible comes out is seen at once."""
    return f"{title}: {question.question!r} {line['prediction']!r} (right: {question.answers[0]!r})"


def answer(
    condition: Condition,
    m: int,
    reader: Reader,
    shared: Shared,
    score: Scorer,
    batch: Sequence[Question],
    max_new_tokens: int,
) -> list[dict]:
    """Prediction lines of one batch (see `results` for their keys)."""
    started = time.perf_counter()
    slots = condition.slots(reader, batch, m, shared)
    lines = _read(reader, slots, batch, max_new_tokens) if condition.by_llm else _quote(slots)
    seconds = (time.perf_counter() - started) / len(batch)
    return [scored(q, line, reader.prompts.source, score, seconds) for q, line in zip(batch, lines, strict=True)]


def scored(question: Question, line: Mapping[str, object], source: str, score: Scorer, seconds: float) -> dict:
    """The prediction line of what an LLM said (`said_line`, and what it read)."""
    asked = not question_in_tail(source)
    return {
        "id": question.id, "prediction": line["prediction"], "references": list(question.answers),
        **score(line["prediction"], question.answers), **line, "answer_bytes": len(question.answers[0].encode()),
        "text_bytes": len(question.context.encode()) + (len(question.question.encode()) if asked else 0),
        "seconds": seconds,
    }  # fmt: skip


def said_line(reader: Reader, question: Question, said: Sequence[int], nll: float) -> dict:
    """What a line tells of an answer's token ids. nll: of the first reference, in nats."""
    prompts, answers = reader.prompts, question.answers
    telling = {prompts.first_informative(prompts.answer_ids(answer)) for answer in answers} - {None}
    return {
        "prediction": reader.llm.text(said), "first_token_correct": said[0] in prompts.first_token_ids(answers),
        "first_informative_correct": prompts.first_informative(said) in telling,
        "answer_nll": nll, "answer_tokens": len(prompts.answer_ids(answers[0])),
    }  # fmt: skip


def _read(reader: Reader, slots: Sequence, batch: Sequence[Question], max_new_tokens: int) -> list[dict]:
    """The LLM reads the slots and answers."""
    llm, prompts = reader.llm, reader.prompts
    answers = [prompts.answer_ids(q.answers[0]) for q in batch]
    tails = [prompts.tail(q.question) for q in batch]
    (constant,) = {s.constant for s in slots}
    prefill = llm.prefill(prompts.head, [s.embeds for s in slots], tails, [s.deltas for s in slots], constant)
    nll = llm.answer_nll(prefill, answers).tolist()
    said = llm.generate_ids(prefill, max_new_tokens)
    return [
        said_line(reader, q, said[i], nll[i])
        | {"llm_positions": len(slots[i].embeds) - slots[i].constant, "constant_positions": slots[i].constant}
        | {"wire_bytes": slots[i].sent}
        for i, q in enumerate(batch)
    ]


def _quote(answers: Sequence[str]) -> list[dict]:
    """No LLM: the condition answered by itself, so nothing is known of tokens or likelihoods."""
    return [
        {
            "prediction": text, "first_token_correct": None, "first_informative_correct": None, "answer_nll": None,
            "answer_tokens": None,
            "llm_positions": 0, "constant_positions": 0, "wire_bytes": len(text.encode()),
        }
        for text in answers
    ]  # fmt: skip
