"""docs/scale.md: assumptions, training, a corpus, serving, and how far the arithmetic is from what was measured."""

import dataclasses
from collections.abc import Iterator, Mapping

from latentwire.llms.arithmetic import (
    ENCODER,
    HALF,
    HOUR,
    LLMS,
    MEASURED,
    Prompt,
    Shape,
    answer_flops,
    training_flops,
    two_terms,
)
from latentwire.reporting.tables import markdown
from latentwire.studies.scale.records import CORPUS, GPU, SERVICE, SHIPPED, SPEED, STEP, Records
from latentwire.studies.settings import PlanSettings
from latentwire.training.memory import training_bytes
from latentwire.training.settings import TrainSettings
from latentwire.utils.cli import listed, require

_GB = 1e9
_HEAD = """# Scale, on paper

`python latentwire/plan.py > docs/scale.md` writes this page. **Of these LLMs nothing but
prefill and decoding of one question at a time was measured on a GPU, with random weights.** It is arithmetic from the
shapes of models (`latentwire/llms/arithmetic.py`) and from records. [The last
section](#checked-against-what-was-measured) says how far such arithmetic is from what a CPU and a GPU took. Flags
change every assumption, for example `--gpu_price 3 --llms qwen2.5-7b`. Prices are assumptions, no offers.
"""
_CORPUS = """Encoding a document of {tokens} tokens takes {gflop:.1f} GFLOP. With source `prompt` a wire serves one
question: there a document is a paragraph with its question.
"""
_KEPT = """
Bytes of a document, mean of those that were measured (results/{record}). Ids and words come on top, and Parquet saves
some: on disk a byte of fp16 wires takes {disk:.2f}.
"""
_SERVED = """- The wire is sent in fp16 ({fp16:,.0f} bytes); {least} would send {bytes:,.0f} bytes. No prefill changes.
- Encoding is not in the tables: {gflop:.1f} GFLOP for the wire of a paragraph, once per document, or once per question
  with source `prompt`.
- Decoding is counted in operations; it waits for memory rather than for them, and for nearly the same from both.
- The tables compare costs, not answers: a wire of a long document is answered worse (LOG.md, entry 22)."""
_PREFILL = """Prefill on two cores (results/{record}: bfloat16, adapters of embeddings alone; results/47_serving has
others in float32), one question at a time. *operations*: the ratio of operations alone. *two terms*: a time that any
pass takes, and operations at a rate, fitted on the texts of the two shorter lengths; the wire and the longest text are
predicted.
"""
_READ = """
Operations alone promise too much on a CPU that reads one question at a time: a pass over the weights takes its time,
however few positions are read. A server that reads many questions at once shares that pass, so the tables above count
operations alone. **Read their ratios as the most that a wire can save.**
"""
_GPU_PREFILL = """The same on a GPU (results/{record}: random weights, bfloat16, an H200), one question at a time:
"""
_GPU_READ = """
There a pass takes nearly the same time for all but the longest text; many questions at once were not measured.
"""


def page(config: PlanSettings, records: Records | None = None) -> str:
    """The page as Markdown. Raises ValueError for an unknown LLM, FileNotFoundError for a record that is not there."""
    records, llms = records or Records(), {}
    for name in listed(config.llms):
        require(name in LLMS, "llms", name, f"choose among {', '.join(LLMS)}")
        llms[name] = LLMS[name]
    parts = [
        [_HEAD, "## Assumptions", "", *_assumptions(config, records)],
        ["", "## Training", "", *_training(config, llms, records)],
        ["", "## Encoding and keeping documents", "", *_corpus(config, records)],
        ["", "## Serving", "", *_serving(config, llms, records)],
        ["", "## Checked against what was measured", "", *_checks(records)],
    ]
    return "\n".join(line for part in parts for line in part) + "\n"


def _assumptions(config: PlanSettings, records: Records) -> list[str]:
    rows = [(f"`--{f.name}`", getattr(config, f.name), f.metadata["help"]) for f in dataclasses.fields(config)]
    around = "positions around what is read: worked examples, read once and shared; question and `Answer:`"
    rows += [
        ("head, tail", f"{Prompt().head}, {Prompt().tail}", around),
        ("text", f"{records.text_tokens:.0f}", f"tokens of a SQuAD paragraph with its question (results/{SHIPPED})"),
        (
            "core",
            f"{records.encoded_per_core:.1f}",
            f"such documents that a core encodes a second (results/{SERVICE}, encoder hf)",
        ),
        ("bfloat16", HALF, "bytes of a value of weights and cache"),
    ]
    return markdown(("assumption", "value", "what it is"), rows)


def _training(config: PlanSettings, llms: Mapping[str, Shape], records: Records) -> list[str]:
    flops = training_flops(llms, Prompt(), round(records.text_tokens), config.latent_len, config.k)
    rows, total = [], 0.0
    for part, n in flops.items():
        passes = 1 if "once" in part else config.epochs
        hours = passes * config.samples * n / _speed(config, config.share) / HOUR
        rows.append((part, f"{n / 1e9:.0f}", passes, f"{60 * hours:.1f}", _dollars(_price(config, hours))))
        total += hours
    rows.append(("all", "", "", f"{60 * total:.1f}", _dollars(_price(config, total))))
    memory = training_bytes(
        TrainSettings(
            init="-", batch_size=config.batch_size, latent_len=config.latent_len, k=config.k, dtype="bfloat16",
            device="cuda",
        ),
        llms, longest=0, at_once=config.batch_size,
    )  # fmt: skip
    held = [(what, f"{n / _GB:.1f}") for what, n in memory.items()]
    held.append((f"all, of {config.gpu_gb:.0f}", f"{sum(memory.values()) / _GB:.1f}"))
    return [
        f"{config.samples:,} questions, {config.epochs} passes, M={config.latent_len}, K={config.k}. "
        f"{' and '.join(llms)} are frozen.",
        f"{config.gpus} GPUs hold all LLMs each, and take {config.batch_size} questions per step.",
        "",
        *markdown(("part", "GFLOP per question and pass", "passes", "minutes", "dollars"), rows),
        "",
        "Validations, loading, and stage `scores` (which needs no LLM) come on top.",
        "",
        *markdown(("memory of each GPU", "GB"), held),
        "",
        "The memory is what `train.py` estimates before it loads anything (`latentwire/training/memory.py`).",
    ]


def _corpus(config: PlanSettings, records: Records) -> list[str]:
    tokens, counts = round(records.text_tokens), config.numbers("documents")
    flops, rows = ENCODER.forward(tokens), []
    for n in counts:
        hours, cores = n * flops / _speed(config, config.encoder_share) / HOUR, n / records.encoded_per_core / HOUR
        rows.append(
            (f"{n:,.0f}", f"{hours:.2f}", _dollars(_price(config, hours)), f"{cores:,.0f}",
             _dollars(cores * config.core_price))
        )  # fmt: skip
    whole = records.corpus
    text = whole["text_bytes"] / whole["rows"]
    sizes = {"text, UTF-8": text, "text, zstd": whole["text_zstd_bytes"] / whole["rows"]} | records.wire_bytes
    kept = []
    for way, size in sizes.items():
        months = [f"{_bytes(n * size)}, {_dollars(n * size / _GB * config.storage_price)} a month" for n in counts]
        kept.append((way, f"{size:,.0f}", f"{size / text:.2f}", *months))
    many = [f"{n:,.0f} documents, dollars" for n in counts]
    return [
        _CORPUS.format(tokens=tokens, gflop=flops / 1e9),
        *markdown(("documents", f"hours on {config.gpus} GPUs", "dollars", "core hours", "dollars on cores"), rows),
        _KEPT.format(record=CORPUS, disk=whole["disk_bytes"] / whole["wire_bytes"]),
        *markdown(("kept as", "bytes", "of the text", *many), kept),
    ]


def _serving(config: PlanSettings, llms: Mapping[str, Shape], records: Records) -> list[str]:
    head = ("read from", "prefill, GFLOP", "decoding, GFLOP", "GPUs", "dollars an hour", "KV cache, GB", "MB sent/s",
            "dollars an hour, sent")  # fmt: skip
    lines: list[str] = []
    for name, llm in llms.items():
        lines += [f"{name}, {config.questions:,.0f} questions a second:", ""]
        lines += [*markdown(head, list(_served(config, llm, records))), ""]
    least = "compact8"  # fewer bytes than it has cost F1
    sizes = {"fp16": records.wire_bytes["fp16"], "least": least, "bytes": records.wire_bytes[least]}
    return [*lines, _SERVED.format(gflop=ENCODER.forward(round(records.text_tokens)) / 1e9, **sizes)]


def _served(config: PlanSettings, llm: Shape, records: Records) -> Iterator[tuple]:
    """One row for the wire, and one for each length of text."""
    per_token = records.corpus["text_bytes"] / records.corpus["rows"] / records.text_tokens
    ways = [(f"wire, M={config.latent_len}", float(config.latent_len), records.wire_bytes["fp16"])]
    ways += [(f"{n:,.0f} tokens of text", n, n * per_token) for n in config.numbers("tokens")]
    for what, slot, sent in ways:
        prefill, decoding = answer_flops(llm, Prompt(), slot, config.answer_tokens)
        gpus = config.questions * (prefill + decoding) / (config.gpu_tflops * 1e12 * config.share)
        kept = config.questions * config.in_flight * (slot + Prompt().tail + config.answer_tokens) * llm.kv_bytes
        network = config.questions * sent
        yield (
            what, f"{prefill / 1e9:,.0f}", f"{decoding / 1e9:,.0f}", f"{gpus:,.1f}", _dollars(gpus * config.gpu_price),
            f"{kept / _GB:,.1f}", f"{network / 1e6:.2f}", _dollars(network * HOUR / _GB * config.network_price),
        )  # fmt: skip


def _checks(records: Records) -> list[str]:
    """Tables of predicted and measured figures, with the error of each."""
    counted, share = records.step
    batch, m, k = records.step_size
    step = training_flops({name: LLMS[name] for name in MEASURED}, Prompt(), round(records.text_tokens), m, k)
    predicted = batch * (step["LLMs"] + step["encoder"])
    shown = (f"{predicted / 1e9:.0f} G", f"{counted / 1e9:.0f} G")
    rows = [("operations of a training step", *shown, _error(predicted, counted))]
    for name, measured in records.kv_bytes.items():
        kv = LLMS[name].kv_bytes * m
        rows.append((f"cache of {m} positions, {name}", f"{kv:,}", f"{measured:,}", _error(kv, measured)))
    head = ("LLM", "tokens", "text over wire, measured", "operations", "error", "two terms", "error")
    return [
        _PREFILL.format(record=SPEED),
        *markdown(head, list(_prefill_rows(records))),
        _READ,
        _GPU_PREFILL.format(record=GPU),
        *markdown(head[:5], list(_gpu_rows(records))),
        _GPU_READ,
        *markdown(("what", "predicted", "measured", "error"), rows),
        "",
        f"The step (results/{STEP}) reached {share:.2f} of what the best matrix product reached on that CPU; `--share` "
        "is of a GPU's peak on paper.",
    ]


def _prefill_rows(records: Records) -> Iterator[tuple]:
    seconds, (_, m, _) = records.prefill, records.step_size
    for name, prompt in MEASURED.items():
        lengths = sorted({tokens for model, tokens, _ in seconds if model == name})
        flops = {n: answer_flops(LLMS[name], prompt, n, 0)[0] for n in (m, *lengths)}
        fixed, rate = two_terms(*((flops[n], seconds[name, n, "text"]) for n in lengths[:2]))
        for n in lengths:
            measured = seconds[name, n, "text"] / seconds[name, n, "z"]
            alone, both = flops[n] / flops[m], (fixed + flops[n] / rate) / (fixed + flops[m] / rate)
            errors = _error(alone, measured), _error(both, measured)
            yield name, f"{n:,}", f"{measured:.1f}", f"{alone:.1f}", errors[0], f"{both:.1f}", errors[1]


def _gpu_rows(records: Records) -> Iterator[tuple]:
    seconds, (_, m, _) = records.gpu_prefill, records.step_size
    for name, n in sorted({(name, n) for name, n, _ in seconds}):
        measured = seconds[name, n, "text"] / seconds[name, n, "z"]
        text, wire = (answer_flops(LLMS[name], Prompt(), slot, 0)[0] for slot in (n, m))
        yield name, f"{n:,}", f"{measured:.1f}", f"{text / wire:.1f}", _error(text / wire, measured)


def _speed(config: PlanSettings, share: float) -> float:
    """Operations per second of all GPUs."""
    return config.gpus * config.gpu_tflops * 1e12 * share


def _price(config: PlanSettings, hours: float) -> float:
    """Dollars of all GPUs."""
    return hours * config.gpus * config.gpu_price


def _error(predicted: float, measured: float) -> str:
    return f"{100 * (predicted / measured - 1):+.0f}%"


def _dollars(n: float) -> str:
    return f"{n:,.2f}" if n < 100 else f"{n:,.0f}"


def _bytes(n: float) -> str:
    size, unit = next(
        (size, unit) for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (0.0, "bytes")) if n >= size
    )
    return f"{n / size:,.1f} {unit}" if size else f"{n:,.0f} bytes"
