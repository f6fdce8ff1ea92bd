"""How long a training or an evaluation will take, by the cost model (`llms.pace`): no model is loaded, nothing runs.

Only the counting of the programs' files is needed, and their libraries take seconds to import, so they are glanced at.
"""

import dataclasses
from functools import cache
from pathlib import Path

from latentwire.data.question import QuestionSet, split_by_article
from latentwire.data.squad import load
from latentwire.evaluation.settings import DEFAULT_LATENT_LEN, DEFAULT_SAMPLES, EvalSettings
from latentwire.llms.arithmetic import known_shape
from latentwire.llms.pace import ANSWERING, Work, answer_operations, text_tokens
from latentwire.studies.programs import Program
from latentwire.training.settings import TrainSettings
from latentwire.training.stages import STAGES
from latentwire.utils.cli import has_gpu, parse
from latentwire.utils.glance import glance
from latentwire.utils.machine import on_this_machine

SAYS = "from a cost model, corrected by what ran on this machine before; --time measures"


def predicted(wanted: Program, processes: int = 1) -> dict:
    """What a train.py or eval.py with --estimate --json would print, without running it; processes: of a training.

    Raises ValueError or FileNotFoundError for settings that are wrong.
    """
    at = next(i for i, part in enumerate(wanted.command) if part.endswith(("train.py", "eval.py")))
    trains = Path(wanted.command[at]).name == "train.py"
    config = parse(
        TrainSettings if trains else EvalSettings, [*wanted.command[at + 1 :]], environment=wanted.everything
    )
    if not all(map(known_shape, config.llm_ids.values())):
        import torch  # noqa: F401 - an LLM's configuration is to be read, so the glances have to be real imports
    config = on_this_machine(dataclasses.replace(config, device=config.device or ("cuda" if has_gpu() else "cpu")))
    return _training(config, processes) if trains else _evaluation(config)


def _training(config: TrainSettings, processes: int) -> dict:
    running, data = glance("latentwire.training.running"), _questions(config.dataset, "train")
    pool, _ = split_by_article(data.questions)
    text = text_tokens(pool)
    stages = [config]
    if config.stage == "all":
        stages = running.stages_of(dataclasses.replace(config, estimate=False), data.spans)
    found = {}
    for one in (one for one in stages if STAGES[one.stage].losses):
        size = one.batch_size * processes
        n = len(pool) if one.samples is None else min(one.samples, len(pool))
        steps = max(1, n // size) * one.epochs
        step, teaching = running.question_flops(one, text)
        work = running.work_of(one)
        found[one.stage] = {
            "steps": steps, "seconds": work.seconds(steps * one.batch_size * step),
            # GPUs share its texts; the processes of a CPU share the CPU.
            "teacher_seconds": work.seconds(n * teaching) / (1 if one.device == "cpu" else processes),
        }  # fmt: skip
    return running.altogether(found)


def _evaluation(config: EvalSettings) -> dict:
    data = _questions(config.dataset, config.split)
    n = min(config.samples or DEFAULT_SAMPLES, len(data.questions) - config.skip)
    hf = glance("latentwire.models.encoders.base").ENCODERS["hf"]
    shape_of = glance("latentwire.llms.loading").shape_of
    # An encoder of kind hf has all that a condition can ask for.
    able = {what for what in ("chooses_tokens", "reads_answers") if getattr(hf, what)}
    able |= {"two_articles"} | ({"spans"} if data.spans else set())
    m, text = config.latent_len or DEFAULT_LATENT_LEN, text_tokens(data.questions)
    conditions = glance("latentwire.conditions.base").parse_conditions(config.conditions, config.source, m, able)
    asked = [(condition.cost, places) for condition, places in conditions if condition.by_llm]
    seconds = 0.0
    for name, llm_id in config.llm_ids.items():
        model, work = shape_of(name, llm_id), Work(ANSWERING, config.device, config.dtype, (llm_id,))
        each = [answer_operations(model, cost, places, text, config.max_new_tokens) for cost, places in asked]
        seconds += work.seconds(n * sum(each))
    return {"answers": n * len(asked) * len(config.llm_names), "seconds": seconds}


@cache
def _questions(dataset: str, split: str) -> QuestionSet:
    return load(dataset, split)
