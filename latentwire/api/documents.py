"""One long document, made of passages of the sample set: each question is answered from the wire of the whole, and from
that of its own passage."""

import json
import random
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from latentwire.api.encoding import LatentWire
from latentwire.api.settings import DocumentSettings
from latentwire.data.content import encoder_reads_question, question_in_tail
from latentwire.data.question import Question
from latentwire.data.squad import load
from latentwire.evaluation.scores import mean_ci
from latentwire.reporting.labels import f1_label
from latentwire.reporting.tables import markdown
from latentwire.utils.cli import SCHEMA
from latentwire.utils.files import write_json, write_text
from latentwire.utils.machine import device_of, git_sha, machine, machine_line


def document_of(words: int, each: int) -> tuple[str, list[Question]]:
    """A text of so many words, passages of dev first and of train as far as needed, and the questions on dev's, `each`
    for a passage; always the same."""
    dev, train = (load("sample", split).questions for split in ("dev", "train"))
    passages = [*dict.fromkeys(q.context for q in dev), *dict.fromkeys(q.context for q in train)]
    kept: list[str] = []
    while passages and sum(len(p.split()) for p in kept) < words:
        kept.append(passages.pop(0))
    of = {context: [q for q in dev if q.context == context][:each] for context in kept}
    random.Random(0).shuffle(kept)
    return "\n".join(kept), [q for some in of.values() for q in some]


def measure(config: DocumentSettings) -> dict:
    """Predictions, results.json and table.md in save_dir. Each LLM is asked all questions before the next is loaded."""
    lw = LatentWire.from_pretrained(config.ckpt, device=config.device)
    document, questions = document_of(config.words, config.each)
    known, later = encoder_reads_question(lw.source), question_in_tail(lw.source)
    how = config.how
    asked = [q.question for q in questions] if known else None
    lw.encoder.eval()  # it is loaded now, not while it is timed
    started = time.perf_counter()
    if known:
        whole = lw.encode([document] * len(questions), asked, progress=True, **how)
    else:
        whole = [lw.encode(document, **how)] * len(questions)
    seconds = time.perf_counter() - started
    wires = {"document": whole, "passage": lw.encode([q.context for q in questions], asked, progress=True, **how)}
    score, rows, lines = load("sample", "dev").score, [], []
    for llm in lw.llms:
        reader = lw.reader(llm, dtype=config.dtype)
        for name, some in wires.items():
            found = []
            for q, wire in zip(tqdm(questions, desc=f"{llm} {name}"), some, strict=True):
                answer = reader.answer(wire, q.question if later else None)
                found.append(score(answer, q.answers) | {"id": q.id, "llm": llm, "from": name, "answer": answer})
            f1, held = [line["f1"] for line in found], list(map(lw.wire, some))
            sizes = {
                "blocks": [len(one.blocks) for one in held], "latents": [one.m for one in held],
                "wire_bytes": [len(one.packed) for one in held], "text_tokens": [one.text_tokens for one in held],
            }  # fmt: skip
            rows.append({
                "llm": llm, "from": name, "f1": float(np.mean(f1)),
                "f1_ci95": mean_ci(f1, [q.paragraph for q in questions]),
                **{name: float(np.mean(each)) for name, each in sizes.items()},
            })  # fmt: skip
            lines += found
    results = {
        "schema": SCHEMA, "dataset": "sample", "split": "dev", "n": len(questions), "words": len(document.split()),
        "source": lw.source, "checkpoint": config.ckpt, "codec": config.codec, "encode_seconds": seconds,
        "encodings": len(questions) if known else 1, "git": git_sha(), "machine": machine(device_of(lw.device)),
        "results": rows,
    }  # fmt: skip
    folder = Path(config.save_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "predictions.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_json(folder / "results.json", results)
    write_text(folder / "table.md", table(results))
    return results


def table(results: dict) -> str:
    """The rows in Markdown, with what they were measured on."""
    sizes = ("blocks", "latents", "wire_bytes", "text_tokens")  # means
    head = ("LLM", "read from", "F1 [95% interval]", "blocks", "latents", "wire bytes", "tokens of the text")
    rows = [
        (row["llm"], row["from"], f1_label(row, results["n"]), *(round(row[size]) for size in sizes))
        for row in results["results"]
    ]  # fmt: skip
    sent = f"wire {results['codec']}; " if "codec" in results else ""  # older ones were float16
    about = (
        f"A document of {results['words']:,} words from the sample set, {results['n']} questions on it; source "
        f"{results['source']}; checkpoint {results['checkpoint']}; {sent}"
        f"{results['encode_seconds'] / results['encodings']:.1f} s per encoding; "
        f"commit {results['git']}; {machine_line(results['machine'])}."
    )
    return "\n".join([about, "", *markdown(head, rows)]) + "\n"
