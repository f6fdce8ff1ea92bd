"""Run one stage of training, or all of them in order; continue what was begun; say how long it will take."""

import dataclasses
import gc
import importlib.util
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor
from transformers import set_seed

from latentwire.conditions.base import CONDITIONS, Reader, begin_adapters, readers, require_heads, require_positions
from latentwire.data.content import encoder_reads_question
from latentwire.data.question import QuestionSet, split_by_article, subset
from latentwire.data.squad import load
from latentwire.llms.arithmetic import Prompt, training_flops
from latentwire.llms.loading import device_map, shape_of
from latentwire.llms.pace import TRAINING, Work, text_tokens
from latentwire.models.adapters import ADAPTERS, SOFT_VECTORS
from latentwire.models.checkpoint import load_encoder, save_checkpoint
from latentwire.models.closed_form import closed_form, fit_texts
from latentwire.models.encoders.base import ENCODERS
from latentwire.models.encoders.tokens import TokenEncoder
from latentwire.models.weights import checkpoint_sha256, load_soft_prompts, load_training, read_config, wire_id
from latentwire.training import joining
from latentwire.training.jobs import Start, job_of
from latentwire.training.memory import within_memory
from latentwire.training.settings import TrainSettings, require_first_gpu
from latentwire.training.stages import ALL, STAGES, Stage, needed
from latentwire.training.teacher import teach
from latentwire.training.trainer import Job, Trainer, is_judged, steps_of
from latentwire.utils.cli import SCHEMA, refuse_long, require
from latentwire.utils.machine import now, on_this_machine
from latentwire.utils.runs import RunFolder, digest, identity

_PROBE = 8  # questions that time the teacher
# Settings that do not make two runs different ones.
_NO_PART = (
    "save_dir", "resume", "estimate", "json", "save_minutes", "tracker", "ignore_memory", "llms", "scores_epochs",
    "scores_samples", "micro_batch",
)  # fmt: skip


def train(config: TrainSettings) -> dict[str, dict[str, float]]:
    """Run what the settings name, or what is left of it; with `estimate` only say, by stage, how long it would take:
    {"steps", "seconds", "teacher_seconds"}."""
    if config.stage != "all":
        return {config.stage: found} if (found := _stage(config)) else {}
    if config.estimate:
        return _estimate_all(config)
    for one in stages_of(config):
        _stage(one)
    return {}


def stages_of(config: TrainSettings, spans: bool | None = None) -> list[TrainSettings]:
    """The settings of each stage of `--stage all`. Of several passes through the LLMs the first trains the adapters
    alone. Stage scores is left out without span supervision, and like `codebook` where --init names a checkpoint.
    spans: whether the data set's answers are spans; it is read unless somebody knows."""
    spans = load(config.dataset, "train").spans if spans is None else spans
    names = [stage.name for stage in needed(ALL, ENCODERS.pick(config.encoder_type), spans)]
    left_out = {name for name in ("codebook", "scores") if config.init}
    left_out |= {"scores"} if config.span_weight == 0 else set()
    left_out |= {"adapters"} if config.epochs == 1 else set()
    names = [name for name in names if name not in left_out]
    epochs = {"scores": config.scores_epochs, "adapters": 1, "joint": config.epochs - ("adapters" in names)}
    found, init = [], config.init
    for name in names:
        folder = Path(config.save_dir) if name == "joint" else Path(config.save_dir) / "stages" / name
        samples = config.scores_samples or config.samples if name == "scores" else config.samples
        found.append(
            dataclasses.replace(
                config, stage=name, init=init, save_dir=str(folder), samples=samples, epochs=epochs.get(name, 1)
            )
        )
        init = str(folder / "checkpoint_best")
    return found


def _estimate_all(config: TrainSettings) -> dict[str, dict[str, float]]:
    """Each stage is timed from the codebook: what a stage has learned does not change its successor's time."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:  # of each process its own
        stages = stages_of(dataclasses.replace(config, estimate=False, save_dir=folder))
        begun = config.init or str(Path(folder) / "stages" / "codebook" / "checkpoint_best")
        for one in stages:
            if STAGES[one.stage].losses:
                found |= train(dataclasses.replace(one, init=begun, estimate=True))
            else:
                _stage(one, shared=False)
    return found


def _stage(config: TrainSettings, shared: bool = True) -> dict[str, float] | None:
    """shared: whether all processes have one folder, which the first of them writes."""
    require_first_gpu(config.device)
    config = on_this_machine(joining.of_the_wire(config) if STAGES[config.stage].joins else config)
    accelerator = _accelerator(config)
    set_seed(config.seed)
    everything = load(config.dataset, "train")
    pool, held = split_by_article(everything.questions)
    together = not encoder_reads_question(config.source)  # a text is read once for all questions on it
    chosen = [] if config.samples == 0 else subset(pool, config.samples, config.seed, together)
    questions = dataclasses.replace(everything, questions=chosen)
    held = dataclasses.replace(everything, questions=subset(held, config.val_samples, config.seed))
    _say(
        config, accelerator,
        f"data: {questions.name} train, {len(questions.questions)} questions to train on, "
        f"{len(held.questions)} of other articles held out",
    )  # fmt: skip
    _require_fits(config, questions, accelerator)
    run = None
    if (accelerator.is_main_process or not shared) and not config.estimate:
        run = _claim(config, _identity(config, questions, held, accelerator.num_processes))
    accelerator.wait_for_everyone()
    try:
        return _run(config, accelerator, questions, held, run)
    finally:
        if run:
            run.close()
        gc.collect()  # hooks of a training and of DEVICE_MAP keep LLMs, which the next stage needs the room of


def _run(
    config: TrainSettings, accelerator: Accelerator, questions: QuestionSet, held: QuestionSet, run: RunFolder | None
) -> dict[str, float] | None:
    folder, stage = Path(config.save_dir), STAGES[config.stage]
    last = folder / "checkpoint_last"
    state = load_training(last) if config.resume and not config.estimate and _exists(last) else None
    closed = not stage.losses or config.samples == 0  # in closed form: there are no steps
    if closed and config.resume and _exists(folder / "checkpoint_best"):
        _say(config, accelerator, f"{folder / 'checkpoint_best'} is there already")
        return None
    steps = 0 if closed else steps_of(config, len(questions.questions), accelerator.num_processes)[1]
    if state and state["step"] == steps and is_judged(state):
        _say(config, accelerator, f"{folder} is finished already")
        return None
    if state and config.micro_batch is None and "micro_batch" in (made := _settings_of(last, config)):
        config = dataclasses.replace(config, micro_batch=made["micro_batch"] or config.batch_size)  # the same parts
    if not closed:
        config, said = within_memory(config, questions.questions)
        _say(config, accelerator, said)
    if closed and not run:
        return None  # the next stage waits for the main process
    there = dataclasses.replace(config, device=str(accelerator.device))
    ready = readers(there, config.source) if stage.needs_llms else []
    frozen = {reader.llm.name: reader.llm.weights_sha256() for reader in ready}
    before = read_config(last).get("frozen_sha256", frozen) if state else frozen
    others = ", ".join(name for name in frozen if before.get(name) != frozen[name])
    require(not others, "llms", others, f"{last} was begun with other weights of these; restore them or start over")
    origin = _origin(config, questions, frozen) | (run.origin if run else {})
    if run:
        require_heads(folder, ready)
    if closed:
        _closed_form(config, ready, origin, run)
        _say(config, accelerator, f"wrote {folder / 'checkpoint_best'}")
        return None
    whole = bool(config.kd_weight) or (bool(stage.rival) and CONDITIONS[stage.rival].cost == "whole")
    asked = [*questions.questions, *held.questions]
    for reader in ready:
        require_positions(reader, asked, config.most_latents, whole, config.max_new_tokens + _constant(config, stage))
    job = job_of(Start(config, ready, questions, held, origin, last if state else None))
    trainer = Trainer(job, accelerator, folder, state)
    estimate = _estimate(trainer, job, config, accelerator, len(held.questions))
    if config.estimate:
        return estimate
    _teach(job, frozen, accelerator, estimate["teacher_seconds"])
    accelerator.init_trackers("latentwire", config=_plain(config))
    trainer.run()
    for tracker in accelerator.trackers:  # end_training would end the process group too, which the next stage needs
        tracker.finish()
    changed = [reader.llm.name for reader in ready if reader.llm.weights_sha256() != frozen[reader.llm.name]]
    assert not changed, f"the frozen weights of {changed} changed"
    if run:
        best = read_config(folder / "checkpoint_best")
        print(f"best: step {best['step']}, score {best['validation']['score']:.3f}; wrote {folder / 'checkpoint_best'}")
    return None


def _settings_of(last: Path, config: TrainSettings) -> dict:
    """The settings of the training that left this checkpoint, which keeps those of the wire that an LLM joins."""
    made = read_config(last)
    return (made["joined"][config.llm_names[0]] if STAGES[config.stage].joins else made)["settings"]


def _accelerator(config: TrainSettings) -> Accelerator:
    found = not config.tracker or importlib.util.find_spec(config.tracker)
    remedy = f'needs the package {config.tracker}: pip install -e ".[{config.tracker}]", or leave --tracker out'
    require(bool(found), "tracker", config.tracker, remedy)
    return Accelerator(
        cpu=config.device == "cpu",
        mixed_precision="bf16" if config.dtype == "bfloat16" else "no",
        log_with=config.tracker or None,
        project_dir=config.save_dir,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(hours=2)),  # others wait while one validates
            DistributedDataParallelKwargs(broadcast_buffers=False),  # none changes, and with LoRA they are large
        ],
    )


def _require_fits(config: TrainSettings, questions: QuestionSet, accelerator: Accelerator) -> None:
    """ValueError where stage, encoder, data and processes do not fit each other."""
    stage, kind = STAGES[config.stage], ENCODERS[config.encoder_type]
    _teachers_prompts(config)
    lacking = [what for what in stage.needs if not getattr(kind, what)]
    require(
        not lacking, "stage", stage.name,
        f"encoder_type {config.encoder_type} has no such stage ({', '.join(lacking)}); go on with joint",
    )  # fmt: skip
    require(
        questions.spans or stage.losses != ("spans",), "dataset", config.dataset,
        f"its answers are no spans of the context, from which stage {stage.name} learns; go on with joint",
    )  # fmt: skip
    n, processes = len(questions.questions), accelerator.num_processes
    remedy = f"fewer than NPROC={processes}; raise SAMPLES (--samples) or lower NPROC"
    require(n >= processes or config.samples == 0, "samples", n, remedy)
    require(
        not device_map() or accelerator.num_processes == 1, "DEVICE_MAP", device_map(),
        "it gives one process all GPUs: set NPROC=1",
    )  # fmt: skip


def _origin(config: TrainSettings, questions: QuestionSet, frozen: dict[str, str]) -> dict:
    """What a checkpoint says of its making."""
    return {
        "schema": SCHEMA, "stage": config.stage, "source": config.source, "latent_len": config.latent_len,
        "d_z": config.d_z, "llms": config.llm_ids, "wordings": config.llm_wordings, "train_seed": config.seed,
        "samples": len(questions.questions), "encoder_id": getattr(config.encoder, "encoder_id", None),
        "frozen_sha256": frozen, "settings": dataclasses.asdict(config),
    } | ({"wire": wire_id(Path(config.init)).hex()} if _reads_wire(config) else {})  # fmt: skip


def _reads_wire(config: TrainSettings) -> bool:
    """Whether a rival is trained, on the tokens that the encoder of --init selects."""
    rival = STAGES[config.stage].rival
    return bool(rival) and "wire" in CONDITIONS[rival].uses


def _closed_form(config: TrainSettings, ready: list[Reader], origin: dict, run: RunFolder) -> None:
    """What there is without steps: the codebook, or the adapters of LLMs that join one."""
    if STAGES[config.stage].joins:
        encoder, adapters, made = joining.begin(config, ready)
        whole = origin | {"interface": made["interface"]}
        joining.save(run.path / "checkpoint_best", encoder, adapters, config, whole)
        return
    llms = {reader.llm.name: reader.llm for reader in ready}
    seed = config.seed if config.codes == "random" else None
    encoder, adapters, figures = closed_form(llms, fit_texts(config.dataset), config.d_z, seed, config.adapter_type)
    begin_adapters(adapters, ready)
    if config.init:
        before = load_encoder(Path(config.init))
        remedy = f"its encoder {before.name!r} has no choice of tokens to keep; leave --init out"
        require(isinstance(before, TokenEncoder), "init", config.init, remedy)
        require(
            before.name == config.encoder_type, "encoder_type", config.encoder_type, f"that of --init is {before.name}"
        )
        encoder = before.with_codes_of(encoder, config.encoder)
        origin = origin | {"encoder_id": read_config(Path(config.init)).get("encoder_id")}
    save_checkpoint(run.path / "checkpoint_best", encoder, adapters, origin | {"interface": figures})


def _constant(config: TrainSettings, stage: Stage) -> int:
    """Most vectors before what differs between questions: of a soft prompt (a rival's, the teacher's) or a preamble."""
    if stage.rival or config.teacher or not config.init:
        return SOFT_VECTORS
    kinds = [*read_config(Path(config.init)).get("adapters", {}).values(), config.adapter_type]
    return max((ADAPTERS[kind].constant for kind in kinds if kind in ADAPTERS), default=0)


def _estimate(
    trainer: Trainer, job: Job, config: TrainSettings, accelerator: Accelerator, held: int
) -> dict[str, float]:
    """Time a few steps and say how long all will take.

    Raises ValueError where that is too long for a CPU and the number of questions was not chosen by hand.
    """
    steps, each = trainer.total - trainer.step, trainer.seconds_per_step()
    seconds = steps * each
    validations = config.epochs - trainer.step // trainer.per_epoch + (not trainer.judged)
    if accelerator.is_main_process and not config.first_latent_len:  # whose steps differ
        work_of(config).note(config.batch_size * question_flops(config, text_tokens(job.questions))[0], each)
    teaching = sum(_teaching_seconds(reader, job) for reader in job.readers) if config.kd_weight else 0.0
    teaching /= accelerator.num_processes if config.device != "cpu" else 1  # a CPU's processes share it
    _say(
        config, accelerator,
        f"estimate: {(seconds + teaching) / 60:.0f} minutes for {steps} steps ({teaching / 60:.0f} of them for the "
        f"teacher, unless its cache holds them), and {validations} validations on {held} questions",
    )  # fmt: skip
    by_hand = config.samples is not None or config.estimate
    refuse_long(seconds + teaching, config.device, by_hand, f"{len(job.questions)} questions")
    return {"steps": steps, "seconds": seconds, "teacher_seconds": teaching}


def work_of(config: TrainSettings) -> Work:
    """What a stage computes on; config: with its device and dtype set."""
    llms = config.llm_ids.values() if STAGES[config.stage].needs_llms else ()
    return Work(TRAINING, config.device, config.dtype, tuple(llms), not encoder_reads_question(config.source))


def question_flops(config: TrainSettings, text: float) -> tuple[float, float]:
    """Operations of one question in one step of a stage, and of the teacher that reads it once; text: its tokens."""
    stage = STAGES[config.stage]
    whole = bool(stage.rival) and CONDITIONS[stage.rival].cost == "whole"
    llms = {name: shape_of(name, llm_id) for name, llm_id in config.llm_ids.items()} if stage.needs_llms else {}
    parts = training_flops(llms, Prompt(), text, text if whole else config.latent_len, config.k)
    step = parts["LLMs"] + (0.0 if stage.rival else parts["encoder"])
    return step, parts["teacher, once"] if config.kd_weight else 0.0


def _teaching_seconds(reader: Reader, job: Job) -> float:
    """How long an LLM reads the whole texts of all questions, from a few of them."""
    llm, prompts, probe = reader.llm, reader.prompts, job.questions[:_PROBE]
    started = now(llm.device)
    texts = [llm.embed(prompts.plain(prompts.content_text(q.context, q.question))) for q in probe]
    llm.prefill(prompts.head, texts, [prompts.tail(q.question) for q in probe])
    return (now(llm.device) - started) / len(probe) * len(job.questions)


def _teach(job: Job, frozen: dict[str, str], accelerator: Accelerator, seconds: float) -> None:
    """Let each LLM read the whole texts, where it is to be distilled from."""
    config = job.config
    if not config.kd_weight or not job.readers:
        return
    accelerator.print(f"the teacher reads {len(job.questions)} texts ({seconds / 60:.0f} minutes, kept on disk) ...")
    tuned = _teachers_prompts(config)
    for reader in job.readers:
        name = reader.llm.name
        share = accelerator.process_index, accelerator.num_processes
        job.teacher[name] = teach(
            reader.llm, frozen[name], reader.prompts, job.questions, config.k, soft=tuned.get(name), share=share
        )


def _teachers_prompts(config: TrainSettings) -> dict[str, Tensor]:
    """The soft prompt of each LLM that the teacher reads before a text; none without one. ValueError for what was not
    trained before whole texts of the same source and wordings."""
    if not config.teacher:
        return {}
    folder = Path(config.teacher)
    made, wordings = read_config(folder), config.llm_wordings
    found = (made.get("stage"), made.get("source"), {name: made.get("wordings", {}).get(name) for name in wordings})
    wanted = ("text_tuned", config.source, wordings)
    remedy = f"its stage, source and wordings are {found}; name a checkpoint of {wanted}"
    require(found == wanted, "teacher", config.teacher, remedy)
    return load_soft_prompts(folder, config.llm_ids)


def _identity(config: TrainSettings, questions: QuestionSet, held: QuestionSet, processes: int) -> dict:
    """What makes two runs the same one."""
    found = identity(
        config, _NO_PART,
        dataset=questions.name,
        samples=len(questions.questions),
        llm_ids=list(config.llm_ids.items()),
        wordings=config.llm_wordings,
        questions_sha256=digest(questions.questions, held.questions),
        init_sha256=checkpoint_sha256(Path(config.init))[:16] if config.init else None,
        teacher_sha256=checkpoint_sha256(Path(config.teacher))[:16] if config.teacher else None,
    )  # fmt: skip
    return found | ({"processes": processes} if processes > 1 else {})  # they share a step, so there are fewer of them


def _claim(config: TrainSettings, found: dict) -> RunFolder:
    folder = Path(config.save_dir)
    begun = [name for name in ("checkpoint_last", "checkpoint_best") if _exists(folder / name)]  # undoes a killed save
    if begun and not config.resume:
        raise ValueError(
            f"{folder} holds a run already; --resume continues it; to start over remove it, or choose another folder"
        )
    return RunFolder(folder, found)


def _exists(checkpoint: Path) -> bool:
    try:
        read_config(checkpoint)
    except FileNotFoundError:
        return False
    return True


def _plain(config: TrainSettings) -> dict[str, str | int | float]:
    """Settings as trackers take them."""
    return {key: value for key, value in dataclasses.asdict(config).items() if isinstance(value, str | int | float)}


def _say(config: TrainSettings, accelerator: Accelerator, line: str) -> None:
    """A line for people, once; aside, when standard output is for JSON."""
    if accelerator.is_main_process:
        print(line, file=sys.stderr if config.json else sys.stdout, flush=True)


def altogether(found: dict[str, dict[str, float]]) -> dict:
    """An estimate for programs: seconds altogether and by stage."""
    total = {key: sum(one[key] for one in found.values()) for key in ("steps", "seconds", "teacher_seconds")}
    return total | {"stages": found}
