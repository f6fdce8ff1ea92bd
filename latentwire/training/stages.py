"""Train one stage of LatentWire, or a rival's soft prompts.

    torchrun --nproc_per_node=1 latentwire/train.py --stage codebook --save_dir runs/lw/codebook
    torchrun --nproc_per_node=1 latentwire/train.py --stage scores --init runs/lw/codebook/checkpoint_best ...

Writes config.json, metrics.jsonl (as it goes), checkpoint_last/, checkpoint_best/ (by F1 on held-out articles of
train), first_token_accuracy.png and loss.png. With --resume a killed run continues and ends with the same weights. Ends
with status 143 after SIGTERM, when the checkpoint is saved.
"""

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from latentwire.conditions.base import CONDITIONS, Sender, Setting
from latentwire.data.squad import Question, load_questions, split_by_article, subset
from latentwire.evaluation.answering import answer, batches
from latentwire.evaluation.scores import f1_score
from latentwire.llms.frozen import device_map, load_llm
from latentwire.llms.prompts import PromptBuilder
from latentwire.models.backbones import ByteBackbone, load_backbone
from latentwire.models.checkpoint import (
    checkpoint_sha256,
    load_checkpoint,
    load_soft_prompts,
    load_training,
    read_config,
    save_checkpoint,
    save_soft_prompts,
)
from latentwire.models.encoders.base import CodebookEncoder, Encoder, ResamplingEncoder, SelectingEncoder, answer_edges
from latentwire.models.latentwire import LatentWire, SoftPrompts
from latentwire.models.stage0 import closed_form, fit_texts
from latentwire.training.log import draw_curves
from latentwire.training.memory import require_memory
from latentwire.training.teacher import teach
from latentwire.training.trainer import Job, Trainer, steps_of
from latentwire.utils.runs import SCHEMA, RunFolder, default_device, default_dtype, set_seed
from latentwire.utils.settings import FULL_SQUAD, LONGEST_S, TUNED, TrainConfig, parse, require

_PROBE = 8  # questions that time the teacher


def main() -> None:
    """Command line: one stage."""
    train(parse(TrainConfig))


def train(config: TrainConfig) -> None:
    """Run one stage, or what is left of it."""
    device = config.device or default_device()
    dtype = config.dtype or default_dtype(device)
    config = dataclasses.replace(config, device=device, dtype=dtype)
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision="bf16" if dtype == "bfloat16" else "no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],  # others wait while one validates
    )
    set_seed(config.seed)
    dataset, everything = load_questions(config.dataset, "train")
    pool, held = split_by_article(everything)
    questions = subset(pool, config.samples or FULL_SQUAD, config.seed)
    held = subset(held, config.val_samples, config.seed)
    accelerator.print(
        f"data: {dataset} train, {len(questions)} questions to train on, {len(held)} of other articles held out"
    )
    identity = _identity(config, dataset, questions, held)
    if accelerator.num_processes > 1:
        identity["processes"] = accelerator.num_processes  # they share a step, so there are fewer of them
    run = _claim(config, identity) if accelerator.is_main_process else None
    accelerator.wait_for_everyone()
    try:
        _train(config, accelerator, questions, held, run)
    finally:
        if run:
            run.close()


def _train(
    config: TrainConfig,
    accelerator: Accelerator,
    questions: list[Question],
    held: list[Question],
    run: RunFolder | None,
) -> None:
    folder = Path(config.save_dir)
    last = folder / "checkpoint_last"
    state = load_training(last) if config.resume and _exists(last) else None
    if config.stage == "codebook" and config.resume and _exists(folder / "checkpoint_best"):
        accelerator.print(f"{folder / 'checkpoint_best'} is there already")
        return
    if state and state["step"] == steps_of(config, len(questions), accelerator.num_processes)[1]:
        accelerator.print(f"{folder} is finished already")
        if run:
            draw_curves(folder)  # a kill may have come just before
        return
    if config.stage != "codebook":
        accelerator.print(require_memory(config, questions))
    names = {} if config.stage == "scores" else config.llm_ids
    require(
        not device_map() or accelerator.num_processes == 1, "DEVICE_MAP", device_map(),
        "it gives one process all GPUs: set NPROC=1",
    )  # fmt: skip
    where = str(accelerator.device)
    llms = {name: load_llm(name, llm_id, where, config.dtype) for name, llm_id in names.items()}
    frozen = {name: llm.weights_sha256() for name, llm in llms.items()}
    origin = {
        "schema": SCHEMA, "stage": config.stage, "source": config.source, "latent_len": config.latent_len,
        "d_z": config.d_z, "llms": config.llm_ids, "wordings": config.llm_wordings, "train_seed": config.seed,
        "samples": len(questions), "encoder_id": config.encoder_id, "frozen_sha256": frozen,
        "settings": dataclasses.asdict(config), **(run.origin if run else {}),
    }  # fmt: skip
    if config.stage == "codebook":
        seed = config.seed if config.interface == "random" else None
        encoder, adapters, report = closed_form(llms, fit_texts(config.dataset), config.d_z, seed)
        if run:
            save_checkpoint(folder / "checkpoint_best", encoder, adapters, origin | {"interface": report})
        accelerator.print(f"wrote {folder / 'checkpoint_best'}")
        return
    settings = [
        Setting(llm, PromptBuilder(llm.tokenizer, config.source, config.llm_wordings[name]),
                None, None, "fp16", config.d_z, (), (), config.seed)
        for name, llm in llms.items()
    ]  # fmt: skip
    start = _Start(config, settings, questions, held, origin, last if state else None)
    job = _rival(start) if config.stage in TUNED else _latentwire(start)
    trainer = Trainer(job, accelerator, folder, state)
    seconds = _announce(trainer, job, config, accelerator, held)
    if config.estimate:
        return
    if config.kd_weight and settings:
        accelerator.print(f"the teacher reads {len(questions)} texts ({seconds / 60:.0f} minutes, kept on disk) ...")
        for setting in settings:
            name = setting.llm.name
            with accelerator.main_process_first():  # it writes the cache that the others read
                job.teacher[name] = teach(setting.llm, frozen[name], setting.prompts, questions, config.k)
    trainer.run()
    changed = [name for name, llm in llms.items() if llm.weights_sha256() != frozen[name]]
    assert not changed, f"the frozen weights of {changed} changed"
    if run:
        for path in draw_curves(folder):
            print(f"drew {path}")
        best = read_config(folder / "checkpoint_best")
        print(f"best: step {best['step']}, {best['validation']}; wrote {folder / 'checkpoint_best'}")


@dataclass
class _Start:
    """What a stage starts from. origin: what its checkpoints say of their making; last: where it was stopped."""

    config: TrainConfig
    settings: Sequence[Setting]
    questions: list[Question]
    held: list[Question]
    origin: dict
    last: Path | None


def _latentwire(start: _Start) -> Job:
    """LatentWire from the stage before, or from where this one was stopped."""
    config, held = start.config, start.held
    encoder, adapters, made = load_checkpoint(start.last or Path(config.init), config.llm_ids)
    require(made["d_z"] == config.d_z, "d_z", config.d_z, f"{config.init} has d_z={made['d_z']}; set that")
    if not start.last:
        encoder = _encoder(config, encoder, made["encoder"])
    model = LatentWire(encoder, adapters, config.source, config.latent_len)
    origin = start.origin | {"interface": made.get("interface"), "init": config.init}

    def validate() -> dict[str, float]:
        if config.stage == "scores":
            return _selection_figures(encoder, held, config)
        sender = Sender(encoder, config.source, "fp16")
        ready = [dataclasses.replace(s, sender=sender, adapter=adapters[s.llm.name], pool=held) for s in start.settings]
        return _answer_figures("latentwire", ready, held, config)

    def save(folder: Path, training: dict | None, notes: dict) -> None:
        save_checkpoint(folder, encoder, adapters, origin | notes, training)

    return Job(config, model, start.settings, start.questions, validate, save, {})


def _rival(start: _Start) -> Job:
    """Soft prompts before the text that the rival sends."""
    config, held = start.config, start.held
    if config.init:
        encoder, _, _ = load_checkpoint(Path(config.init), config.llm_ids)
        sender = Sender(encoder.to(start.settings[0].llm.device), config.source, "fp16")
        start.settings = [dataclasses.replace(setting, sender=sender) for setting in start.settings]
    model = SoftPrompts(start.settings, config.stage.removesuffix("_tuned"), config.latent_len)
    if start.last:
        model.restore(load_soft_prompts(start.last, config.llm_ids))

    def validate() -> dict[str, float]:
        ready = [
            dataclasses.replace(s, soft_prompts={config.stage: model.prompts()[s.llm.name]}, pool=held)
            for s in start.settings
        ]
        return _answer_figures(config.stage, ready, held, config)

    def save(folder: Path, training: dict | None, notes: dict) -> None:
        save_soft_prompts(folder, model.prompts(), start.origin | notes, training)

    return Job(config, model, start.settings, start.questions, validate, save, {})


def _encoder(config: TrainConfig, before: Encoder, shape: dict) -> Encoder:
    """The encoder to train: that of the stage before (of this shape), or a new one where that was the codebook."""
    if isinstance(before, SelectingEncoder | ResamplingEncoder):
        for name, kept in (("encoder_type", shape["type"]), ("pooling", shape.get("pooling", config.pooling))):
            require(getattr(config, name) == kept, name, getattr(config, name), f"{config.init} has {kept!r}; set that")
        return before
    assert isinstance(before, CodebookEncoder)
    tokenizer, codebook = before.tokenizer, before.codebook.weight.detach()
    torch.manual_seed(config.seed)
    if config.encoder_type == "hf":
        encoder = SelectingEncoder(tokenizer, *codebook.shape, load_backbone(config.encoder_id), config.pooling)
        with torch.no_grad():
            encoder.codebook.weight.copy_(codebook)
        return encoder
    backbone = ByteBackbone() if config.encoder_type == "byte" else load_backbone(config.encoder_id)
    return ResamplingEncoder(tokenizer, config.d_z, backbone, config.latent_len, codebook.std(dim=0))


def _answer_figures(
    condition: str, settings: Sequence[Setting], held: Sequence[Question], config: TrainConfig
) -> dict[str, float]:
    """F1, first-token accuracy and NLL per answer token (nats) of each LLM on the held-out questions.

    "score" is the mean F1; the smallest share of the NLL breaks ties between F1s of zero.
    """
    figures: dict[str, float] = {}
    for setting in settings:
        lines = [
            line
            for batch in batches(held, config.batch_size)
            for line in answer(CONDITIONS[condition], setting, batch, config.latent_len, config.max_new_tokens)
        ]
        name = setting.llm.name
        figures[f"f1_{name}"] = float(np.mean([line["f1"] for line in lines]))
        figures[f"first_token_acc_{name}"] = float(np.mean([line["first_token_correct"] for line in lines]))
        figures[f"ce_{name}"] = sum(x["answer_nll"] for x in lines) / sum(x["answer_tokens"] for x in lines)
    mean = {key: float(np.mean([v for k, v in figures.items() if k.startswith(key)])) for key in ("f1_", "ce_")}
    return figures | {"ce": mean["ce_"], "score": mean["f1_"] - 1e-4 * mean["ce_"]}


def _selection_figures(encoder: SelectingEncoder, held: Sequence[Question], config: TrainConfig) -> dict[str, float]:
    """F1 of the encoder's own span (source "prompt"), and how often all tokens of the answer are among the M sent."""
    figures = {}
    if config.source == "prompt":
        figures["encoder_f1"] = float(np.mean([f1_score(encoder.read(q), q.answers) for q in held]))
    kept = []
    for question, encoded in zip(held, encoder.encoded(held, config.source, config.latent_len), strict=True):
        ((first, last),) = answer_edges(encoded.tokens, [question])
        kept.append(bool((encoded.places[0].sum(dim=0)[first : last + 1] > 0.5).all()))
    figures["answer_kept"] = float(np.mean(kept))
    return figures | {"score": figures["answer_kept"] + figures.get("encoder_f1", 0.0)}


def _announce(
    trainer: Trainer, job: Job, config: TrainConfig, accelerator: Accelerator, held: Sequence[Question]
) -> float:
    """Time a few steps and say how long all will take; the teacher's seconds are returned.

    Raises ValueError where it is over LONGEST_S on a CPU, unless the number of questions was chosen by hand.
    """
    steps = trainer.total - trainer.step
    seconds, teaching = steps * trainer.seconds_per_step(), 0.0
    if config.kd_weight:
        for setting in job.settings:
            llm, prompts = setting.llm, setting.prompts
            probe = job.questions[:_PROBE]
            started = time.perf_counter()
            texts = [llm.embed(prompts.ids(prompts.content_text(q.context, q.question))) for q in probe]
            llm.prefill(prompts.head, texts, [prompts.tail(q.question) for q in probe])
            teaching += (time.perf_counter() - started) / len(probe) * len(job.questions)
    accelerator.print(
        f"estimate: {(seconds + teaching) / 60:.0f} minutes for {steps} steps ({teaching / 60:.0f} of them for the "
        f"teacher, unless its cache holds them), and {config.epochs} validations on {len(held)} questions"
    )
    if seconds + teaching > LONGEST_S and config.device == "cpu" and config.samples is None:
        raise ValueError(
            f"samples: {len(job.questions)} questions would take about {(seconds + teaching) / 3600:.1f} hours on this "
            "CPU; choose fewer, or the same number by hand to run it anyway (SAMPLES=..., --samples ...)"
        )
    return teaching


def _claim(config: TrainConfig, identity: dict) -> RunFolder:
    folder = Path(config.save_dir)
    begun = [name for name in ("checkpoint_last", "checkpoint_best") if _exists(folder / name)]  # undoes a killed save
    if begun and not config.resume:
        raise ValueError(
            f"{folder} holds a run already; --resume continues it; to start over remove it, or choose another folder"
        )
    return RunFolder(folder, identity, restart="by removing it (rm -r)")


def _exists(checkpoint: Path) -> bool:
    try:
        read_config(checkpoint)
    except FileNotFoundError:
        return False
    return True


def _identity(config: TrainConfig, dataset: str, questions: list[Question], held: list[Question]) -> dict:
    """What makes two runs the same one."""
    identity = dataclasses.asdict(config) | {
        "dataset": dataset,
        "samples": len(questions),
        "llm_ids": list(config.llm_ids.items()),
        "wordings": config.llm_wordings,
        "questions_sha256": hashlib.sha256(repr([questions, held]).encode()).hexdigest()[:16],
        "init_sha256": checkpoint_sha256(Path(config.init))[:16] if config.init else None,
    }
    for name in ("save_dir", "resume", "estimate", "save_minutes", "tensorboard", "llms"):
        del identity[name]
    return identity
