"""From questions to prediction lines: one batch of one condition, read and answered by one LLM."""

import time
from collections.abc import Iterator, Mapping, Sequence

from tqdm import tqdm

from latentwire.conditions.base import Condition, Setting
from latentwire.data.squad import Question
from latentwire.evaluation.predictions import Predictions
from latentwire.evaluation.scores import exact_match, f1_score


def batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Batches of similar length, longest first: little padding, and too little memory shows at once."""
    ordered = sorted(questions, key=lambda q: (-len(q.context) - len(q.question), q.id))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def complete(
    predictions: Predictions,
    label: Mapping[str, object],
    setting: Setting,
    condition: Condition,
    m: int,
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, dict]:
    """Lines by question id of one condition on the setting's pool, the missing ones computed and kept under `label`
    (condition, m, llm).

    The batches are always the same, so that a continued run gives the same numbers as an uninterrupted one.
    """
    lines = predictions.of(label)
    title = " ".join([label["llm"] or "", label["condition"], *([f"M={m}"] if label["m"] else [])])
    with tqdm(total=len(setting.pool), desc=title, unit="q", mininterval=1) as bar:
        for batch in batches(setting.pool, batch_size):
            missing = {q.id for q in batch} - lines.keys()
            if missing:
                found = answer(condition, setting, batch, m, max_new_tokens)
                predictions.append([{"id": x["id"]} | label | x for x in found if x["id"] in missing])
            bar.update(len(batch))
    return lines


def answer(
    condition: Condition, setting: Setting, batch: Sequence[Question], m: int, max_new_tokens: int
) -> list[dict]:
    """Prediction lines of one batch (see `results` for their keys)."""
    started = time.perf_counter()
    lines = (_read if condition.by_llm else _quote)(condition, setting, batch, m, max_new_tokens)
    seconds = (time.perf_counter() - started) / len(batch)
    asked = setting.prompts.source == "prompt"
    return [
        {
            "id": q.id, "prediction": line["prediction"], "references": list(q.answers),
            "f1": f1_score(line["prediction"], q.answers), "em": exact_match(line["prediction"], q.answers),
            **line, "answer_bytes": len(q.answers[0].encode()),
            "text_bytes": len(q.context.encode()) + (len(q.question.encode()) if asked else 0), "seconds": seconds,
        }
        for q, line in zip(batch, lines, strict=True)
    ]  # fmt: skip


def _read(condition: Condition, setting: Setting, batch: Sequence[Question], m: int, max_new_tokens: int) -> list[dict]:
    """The LLM reads the slots and answers."""
    llm, prompts = setting.llm, setting.prompts
    slots = condition.build(setting, batch, m)
    answers = [prompts.answer_ids(q.answers[0]) for q in batch]
    prefill = llm.prefill(prompts.head, [slot.embeds for slot in slots], [prompts.tail(q.question) for q in batch])
    first = prefill.logits.argmax(-1).tolist()
    nll = llm.answer_nll(prefill, answers).tolist()
    texts = llm.generate(prefill, max_new_tokens)
    return [
        {
            "prediction": texts[i], "first_token_correct": first[i] in prompts.first_token_ids(q.answers),
            "answer_nll": nll[i], "answer_tokens": len(answers[i]),
            "llm_positions": len(slots[i].embeds), "wire_bytes": slots[i].sent,
        }
        for i, q in enumerate(batch)
    ]  # fmt: skip


def _quote(condition: Condition, setting: Setting, batch: Sequence[Question], m: int, _: int) -> list[dict]:
    """No LLM: the condition answers by itself, so nothing is known of tokens or likelihoods."""
    return [
        {
            "prediction": text, "first_token_correct": None, "answer_nll": None, "answer_tokens": None,
            "llm_positions": 0, "wire_bytes": len(text.encode()),
        }
        for text in condition.build(setting, batch, m)
    ]  # fmt: skip
