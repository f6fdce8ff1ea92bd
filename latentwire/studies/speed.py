"""How fast, as ratios that one run measures on one machine: ours beside the obvious way (`plain`), repeat by repeat.

Each of PARTS is measured by one function. Shapes: M latents.
"""

import copy
import dataclasses
import itertools
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import set_seed

from latentwire.conditions.base import CONDITIONS, Reader, Sender, Shared, reader_of
from latentwire.data.question import Question, subset
from latentwire.data.squad import load
from latentwire.evaluation.answering import answer
from latentwire.llms.frozen import FrozenLLM
from latentwire.llms.loading import load_llm, random_llm
from latentwire.models.checkpoint import load_checkpoint
from latentwire.models.closed_form import closed_form, fit_texts
from latentwire.models.encoders.base import ENCODERS
from latentwire.models.latentwire import LatentWire
from latentwire.reporting.charts import growth
from latentwire.reporting.labels import GROWTH
from latentwire.reporting.tables import speed_markdown
from latentwire.studies.plain import PlainLLM, answer_batched, answer_one_by_one, teach_now
from latentwire.studies.programs import Program, captured, torchrun, variables
from latentwire.studies.settings import BenchmarkSettings
from latentwire.training.settings import TrainSettings
from latentwire.training.teacher import teach
from latentwire.training.trainer import Job, Trainer
from latentwire.utils.cli import SCHEMA
from latentwire.utils.files import read_json, read_lines, write_json, write_text
from latentwire.utils.machine import forget_peak, machine, now, on_this_machine, peak_mb
from latentwire.utils.runs import RunFolder, identity

_ENCODER = "hf"  # that is trained
_EPOCHS = 3  # passes that share the cost of the teacher's cache
_LENGTHS = (150, 1000, 4000)  # tokens of a context
_WORDS = (20, 50, None)  # of a text to encode; None: whole paragraphs
_BATCHES, _SIZES = (4, 8, 16, 32), (8, 32, 64)  # growth: questions per step, and M
_GROWN_WORDS = (150, 1000, 4000, 16000)  # of a text
_NO_PART = ("save_dir", "parts", "llms")  # of what makes two benchmarks the same one
_MATRICES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384)}


def benchmark(config: BenchmarkSettings) -> dict:
    """Run the parts that are not there yet, and return what was written to results.json."""
    config = on_this_machine(config)
    set_seed(0)
    with RunFolder(config.save_dir, identity(config, _NO_PART, llm_ids=config.llm_ids)) as run:
        path = run.path / "results.json"
        results = read_json(path) if path.is_file() else {
            "schema": SCHEMA, "hardware": machine(config.device), "checkpoint": config.ckpt, "raw": [],
        }  # fmt: skip
        bench = Bench(config)
        for part in config.part_names:
            if any(line["part"] == part for line in results["raw"]):
                print(f"{part} is there already")
                continue
            print(f"{part} ...", flush=True)
            results["raw"] += [{"part": part} | line for line in PARTS[part](bench)]
            results["ratios"] = ratios(results["raw"])
            write_json(path, results)
            write_text(run.path / "table.md", speed_markdown(results))
        if grown := [line for line in results["raw"] if line["name"].startswith(GROWTH)]:
            growth(grown).savefig(run.path / "growth.png", dpi=130)
    print(speed_markdown(results), f"wrote {path} and table.md", sep="\n")
    return results


class Bench:
    """The models and questions that all parts share."""

    def __init__(self, config: BenchmarkSettings):
        self.config = config
        train = load(config.dataset, "train")
        self.score, self.spans = train.score, train.spans
        self.questions = subset(train.questions, config.steps * config.batch_size, 0)
        loaded = random_llm if config.random_weights else load_llm
        llms = {name: loaded(name, llm_id, config.device, config.dtype) for name, llm_id in config.llm_ids.items()}
        if config.ckpt:
            self.encoder, self.adapters, _ = load_checkpoint(Path(config.ckpt), config.llm_ids)
        else:
            before, self.adapters, _ = closed_form(llms, fit_texts(config.dataset), config.d_z)
            kind = ENCODERS[_ENCODER]
            settings = kind.Settings(encoder_id=config.encoder_id) if config.encoder_id else kind.Settings()
            self.encoder = kind.begin(before, settings, config.latent_len)
        self.encoder.to(config.device)
        self.readers = [reader_of(llm, config, "prompt") for llm in llms.values()]

    def trainer(self, readers: Sequence[Reader], teacher: Mapping | None, **changes: object) -> Trainer:
        """A trainer of stage joint on a copy of the model; changes: of its settings."""
        c = self.config
        config = TrainSettings(
            init="-", batch_size=c.batch_size, epochs=1000, latent_len=c.latent_len, d_z=c.d_z, k=c.k, device=c.device,
            dtype=c.dtype, kd_weight=0.5 if teacher is not None else 0.0,
        )  # fmt: skip
        config = dataclasses.replace(config, **changes)
        model = copy.deepcopy(LatentWire(self.encoder, self.adapters, "prompt", config.latent_len)).to(c.device)
        job = Job(config, model, readers, self.questions, spans=self.spans, teacher=teacher or {})
        mixed = "bf16" if c.dtype == "bfloat16" else "no"
        return Trainer(job, Accelerator(cpu=c.device == "cpu", mixed_precision=mixed), Path(c.save_dir), None)

    def seconds(self, work: Callable[[], object]) -> float:
        """Wall time of one call, the device's queue included."""
        started = now(self.config.device)
        work()
        return now(self.config.device) - started

    def side_by_side(self, ways: Mapping[str, Callable[[], object]]) -> list[dict[str, float]]:
        """Seconds of each way, repeat by repeat in turns, after one round that is not counted."""
        rounds = [
            {name: self.seconds(work) for name, work in ways.items()}
            for _ in tqdm(range(self.config.repeats + 1), unit="repeat")
        ]
        return rounds[1:]


def train_part(bench: Bench) -> list[dict]:
    """Seconds of the same training steps: ours (with its share of the teacher's cache) and plainly."""
    config, teacher, teaching = bench.config, {}, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for reader in bench.readers:
            llm, weights = reader.llm, reader.llm.weights_sha256()
            started = now(config.device)
            teacher[llm.name] = teach(llm, weights, reader.prompts, bench.questions, config.k, cache=Path(folder))
            teaching += now(config.device) - started
    ours = bench.trainer(bench.readers, teacher)
    readers = [dataclasses.replace(reader, llm=PlainLLM(reader.llm, config.recompute)) for reader in bench.readers]
    plain = bench.trainer(readers, {})

    def plain_steps() -> None:
        for step in range(config.steps):
            batch = plain.batches[step]
            plain.job.teacher = {reader.llm.name: teach_now(reader, batch, config.k) for reader in readers}
            _take(plain, step)

    ways = {"ours": lambda: [_take(ours, step) for step in range(config.steps)], "plain": plain_steps}
    n = config.steps * config.batch_size
    return [
        {"name": "train_step_vs_plain", "unit": "s", "questions": n, "ours": found["ours"] + teaching / _EPOCHS,
         "teacher_share": teaching / _EPOCHS, "other": found["plain"]}
        for found in bench.side_by_side(ways)
    ]  # fmt: skip


def text_eval_part(bench: Bench) -> list[dict]:
    """Seconds to answer the same questions from text: ours, transformers.generate one by one, and in batches."""
    config, lines = bench.config, []
    questions = sorted(bench.questions, key=lambda q: len(q.context))
    for reader in bench.readers:
        llm, prompts = reader.llm, reader.prompts
        slots = [prompts.plain(prompts.content_text(q.context, q.question)) for q in questions]
        tails = [prompts.tail(q.question) for q in questions]
        whole = [[*prompts.head, *slot, *tail] for slot, tail in zip(slots, tails, strict=True)]
        batches = [slice(i, i + config.batch_size) for i in range(0, len(questions), config.batch_size)]

        def ours(llm=llm, head=prompts.head, slots=slots, tails=tails, batches=batches) -> None:
            for batch in batches:
                embeds = [llm.embed(slot) for slot in slots[batch]]
                llm.generate_with_prefix(head, embeds, tails[batch], config.max_new_tokens)

        def batched(llm=llm, whole=whole, batches=batches) -> None:
            for batch in batches:
                answer_batched(llm, whole[batch], config.max_new_tokens)

        def loop(llm=llm, whole=whole) -> None:
            answer_one_by_one(llm, whole, config.max_new_tokens)

        for found in bench.side_by_side({"ours": ours, "loop": loop, "batched": batched}):
            same = {"llm": llm.name, "unit": "s", "questions": len(questions), "ours": found["ours"]}
            lines += [same | {"name": f"text_eval_vs_{way}", "other": found[way]} for way in ("loop", "batched")]
    return lines


def serving_part(bench: Bench) -> list[dict]:
    """One question on a context of each length: seconds from Z and from text, the cache that each keeps, and how many
    questions on the same context pay for encoding it."""
    config, lines = bench.config, []
    for length, reader in itertools.product(_LENGTHS, bench.readers):
        llm, prompts = reader.llm, reader_of(reader.llm, config, "context").prompts
        context = _long_context(bench.questions, llm, length)
        asked = dataclasses.replace(bench.questions[0], context=context, id=f"long {length}")
        text = llm.embed(prompts.plain(prompts.content_text(context, asked.question)))
        (z,) = bench.encoder.encode([asked], "context", config.latent_len)
        adapter, tail = bench.adapters[llm.name].to(config.device), [prompts.tail(asked.question)]
        with torch.no_grad():
            wired = [adapter(z)], tail, [adapter.deltas(z)], adapter.constant
        read_z, read_text = llm.prefill(prompts.head, *wired), llm.prefill(prompts.head, [text], tail)
        ways = {
            "encode": lambda asked=asked: bench.encoder.encode([asked], "context", config.latent_len),
            "prefill_z": lambda llm=llm, p=prompts, wired=wired: llm.prefill(p.head, *wired),
            "prefill_text": lambda llm=llm, p=prompts, x=text, t=tail: llm.prefill(p.head, [x], t),
            # of two tokens to score one is read: a step of decoding
            "decode_z": lambda llm=llm, read=read_z: llm.answer_nll(read, [[0, 0]]),
            "decode_text": lambda llm=llm, read=read_text: llm.answer_nll(read, [[0, 0]]),
        }
        for found in bench.side_by_side(ways):
            lines.append(
                {"name": f"prefill_text_vs_z_{length}", "llm": llm.name, "unit": "s", "ours": found["prefill_z"],
                 "other": found["prefill_text"], "seconds": found, "text_positions": len(text),
                 "kv_bytes_z": llm.kv_bytes * len(z), "kv_bytes_text": llm.kv_bytes * len(text)}
            )  # fmt: skip
    return lines


def together_part(bench: Bench) -> list[dict]:
    """Seconds to answer BATCH_SIZE questions at once, each on a context of its own, as an evaluation does (the NLL
    of the reference, too): from Z, encoding included, and from text."""
    config, lines = bench.config, []
    for length, plain in itertools.product(_LENGTHS[:2], bench.readers):
        adapter = bench.adapters[plain.llm.name].to(config.device)
        reader = dataclasses.replace(reader_of(plain.llm, config, "context"), adapter=adapter)
        some = [
            dataclasses.replace(q, context=_long_context(bench.questions[i:], plain.llm, length), id=f"{length} {i}")
            for i, q in enumerate(bench.questions[: config.batch_size])
        ]
        conditions = {"ours": "latentwire", "other": "text"}
        ways = {way: partial(_answer, bench, name, reader, "context", some) for way, name in conditions.items()}
        same = {"name": f"answer_text_vs_z_{length}_at_once", "llm": plain.llm.name, "unit": "s",
                "questions": len(some), "text_positions": length}  # fmt: skip
        lines += [same | found for found in bench.side_by_side(ways)]
    return lines


def encode_part(bench: Bench) -> list[dict]:
    """Seconds to encode the same texts, all at once and one by one, by the words of each: the bytes are the same. On a
    GPU a text by itself is read in a batch of its copies."""
    config, lines = bench.config, []
    for words in _WORDS:
        some = [dataclasses.replace(q, context=" ".join(q.context.split()[:words])) for q in bench.questions]
        ways = {
            "ours": lambda some=some: bench.encoder.encode(some, "context", config.latent_len),
            "other": lambda some=some: [bench.encoder.encode([q], "context", config.latent_len) for q in some],
        }
        of = f"{words}_words" if words else "paragraphs"
        same = {"name": f"encode_one_by_one_vs_together_{of}", "unit": "s", "questions": len(some)}
        lines += [same | found for found in bench.side_by_side(ways)]
    return lines


def mfu_part(bench: Bench) -> list[dict]:
    """Floating point operations a second of a training step, beside the best matrix product of the same type."""
    config = bench.config
    trainer = bench.trainer(bench.readers, None)
    flops = _operations(lambda: _take(trainer, 0))
    ceilings = []
    for size in _MATRICES["cuda" if config.device.startswith("cuda") else "cpu"]:
        a = torch.randn(size, size, device=config.device, dtype=getattr(torch, config.dtype))
        ceilings += [2 * size**3 / found["product"] for found in bench.side_by_side({"product": lambda a=a: a @ a})]
    steps = bench.side_by_side({"step": lambda: _take(trainer, 0)})
    return [
        {"name": "mfu_share_of_ceiling", "unit": "FLOP/s", "flops": flops, "seconds": found["step"],
         "ours": max(ceilings), "other": flops / found["step"]}
        for found in steps
    ]  # fmt: skip


def growth_part(bench: Bench) -> list[dict]:
    """Seconds and peak memory as one thing grows: of a training step with one LLM (questions, M) or more; of evaluating
    more questions; of encoding, and of the encoder's own answer, with longer texts."""
    config, lines = bench.config, []
    changes = [("batch", "batch_size", n) for n in _BATCHES if n <= len(bench.questions)]
    changes += [("m", "latent_len", m) for m in _SIZES]
    for kind, name, value in changes:
        trainer = bench.trainer(bench.readers[:1], None, **{name: value})
        lines.append(_grown(bench, kind, value, lambda trainer=trainer: _take(trainer, 0)))
    for n in range(1, len(bench.readers) + 1):
        trainer = bench.trainer(bench.readers[:n], None)
        lines.append(_grown(bench, "llms", n, lambda trainer=trainer: _take(trainer, 0)))
    first = bench.readers[0]
    reader = dataclasses.replace(first, adapter=bench.adapters[first.llm.name].to(config.device))
    for share in (4, 2, 1):
        some = bench.questions[: max(1, len(bench.questions) // share)]

        def evaluate(some=some) -> None:
            for start in range(0, len(some), config.batch_size):
                _answer(bench, "latentwire", reader, "prompt", some[start : start + config.batch_size])

        lines.append(_grown(bench, "questions", len(some), evaluate))
    there = " ".join(dict.fromkeys(q.context for q in bench.questions)).split()
    for words in _GROWN_WORDS:
        context = " ".join(itertools.islice(itertools.cycle(there), words))
        long = dataclasses.replace(bench.questions[0], context=context, id=f"{words} words")
        ways = {"words_encoded": lambda long=long: bench.encoder.encode([long], "prompt", config.latent_len)}
        if bench.encoder.reads_answers:
            ways["words_read"] = lambda long=long: bench.encoder.read([long])
        lines += [_grown(bench, kind, words, work) for kind, work in ways.items()]
    return lines


def processes_part(bench: Bench) -> list[dict]:
    """Seconds of a step of `train.py` under torchrun, and memory of the main process, with more and more processes and
    the same batch for each. None with random weights, which train.py has not."""
    config, lines = bench.config, []
    if config.random_weights:
        return lines
    models = [reader.llm.model.to("cpu") for reader in bench.readers]  # other processes need the room on the GPU
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        begun = Path(folder) / "codebook"
        _train(config, 1, begun, "--stage", "codebook")
        for processes in range(1, (torch.cuda.device_count() if config.device != "cpu" else 2) + 1):
            run = Path(folder) / str(processes)
            samples = str((config.steps + 1) * config.batch_size * processes)
            _train(
                config, processes, run, "--stage", "joint", "--init", str(begun / "checkpoint_best"), "--samples",
                samples, "--val_samples", "1", "--kd_weight", "0", "--epochs", "1",
            )  # fmt: skip
            taken = [line for line in read_lines(run / "metrics.jsonl") if "loss" in line][1:]  # the first one warms up
            speed = statistics.median(line["examples_per_s"] for line in taken)
            lines.append({
                "name": f"{GROWTH}processes", "value": processes, "unit": "s", "examples_per_s": speed,
                "seconds": config.batch_size * processes / speed, "peak_memory_mb": taken[-1]["memory_mb"],
            })  # fmt: skip
    for model in models:
        model.to(config.device)
    return lines


PARTS: dict[str, Callable[[Bench], list[dict]]] = {
    "train": train_part, "text_eval": text_eval_part, "serving": serving_part, "together": together_part,
    "encode": encode_part, "mfu": mfu_part, "growth": growth_part, "processes": processes_part,
}  # fmt: skip


def _train(config: BenchmarkSettings, processes: int, folder: Path, *flags: str) -> None:
    """One stage of training in processes of its own: with these settings, and else the defaults. Raises ValueError with
    its reason where it fails."""
    same = ("device", "dtype", "dataset", "llms", "wordings", "batch_size", "latent_len", "d_z", "k", "encoder_id")
    given = {name: getattr(config, name) for name in same}
    command = torchrun(processes, "--standalone", "--save_dir", str(folder), *flags)
    captured(Program("train.py", command, variables(TrainSettings, given, config.llm_ids)))


def _operations(work: Callable[[], object]) -> int:
    """Floating point operations of one call. Attention is computed by plain products: of fused kernels PyTorch counts
    none on a CPU, and refuses those with fewer heads of keys than of queries on a GPU (seen with 2.11)."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def _take(trainer: Trainer, step: int) -> None:
    """One training step, on the batch of this number."""
    trainer.step = step
    trainer.take_step()


def _answer(bench: Bench, condition: str, reader: Reader, source: str, some: Sequence[Question]) -> None:
    """One batch of an evaluation; what is encoded, is encoded anew."""
    shared, config = Shared(some, 0, Sender(bench.encoder, source, "fp16")), bench.config
    answer(CONDITIONS[condition], config.latent_len, reader, shared, bench.score, some, config.max_new_tokens)


def _grown(bench: Bench, kind: str, value: int, work: Callable[[], object]) -> dict:
    """One measurement of growth; peak memory is that of this work alone where the system can tell."""
    work()
    forget_peak(bench.config.device)
    seconds = statistics.median(bench.seconds(work) for _ in range(bench.config.repeats))
    return {"name": f"{GROWTH}{kind}", "value": value, "unit": "s", "seconds": seconds,
            "peak_memory_mb": peak_mb(bench.config.device)}  # fmt: skip


def _long_context(questions: Sequence[Question], llm: FrozenLLM, tokens: int) -> str:
    """Contexts of the questions, one after another, cut to so many tokens of this LLM."""
    ids: list[int] = []
    for context in itertools.cycle(dict.fromkeys(q.context for q in questions)):
        ids += llm.tokenizer(f" {context}", add_special_tokens=False)["input_ids"]
        if len(ids) >= tokens:
            return llm.tokenizer.decode(ids[:tokens]).strip()
    raise AssertionError("cycle ended")


def ratios(raw: Sequence[Mapping]) -> dict[str, dict[str, float]]:
    """Smallest, median and largest ratio other / ours of each name over the repeats, LLMs added up."""
    found: dict[str, list[float]] = {}
    named = [line for line in raw if "other" in line]
    for name in dict.fromkeys(line["name"] for line in named):
        by_llm: dict[str | None, list[Mapping]] = {}
        for line in (line for line in named if line["name"] == name):
            by_llm.setdefault(line.get("llm"), []).append(line)
        for repeat in zip(*by_llm.values(), strict=True):
            found.setdefault(name, []).append(sum(x["other"] for x in repeat) / sum(x["ours"] for x in repeat))
    return {
        name: {"min": min(values), "median": statistics.median(values), "max": max(values)}
        for name, values in found.items()
    }
