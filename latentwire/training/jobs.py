"""What a stage works with: LatentWire or a rival's soft prompts, each with its validation and its way to save."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from latentwire.conditions.base import CONDITIONS, Reader, Sender, Shared
from latentwire.data.content import encoder_reads_question
from latentwire.data.question import Question, QuestionSet
from latentwire.evaluation.answering import answer, batches
from latentwire.models.checkpoint import load_checkpoint, save_checkpoint, save_soft_prompts
from latentwire.models.encoders.base import ENCODERS, Encoded, Encoder, answer_edges
from latentwire.models.latentwire import LatentWire
from latentwire.models.weights import load_soft_prompts
from latentwire.training import joining
from latentwire.training.settings import TrainSettings
from latentwire.training.soft_prompts import SoftPrompts
from latentwire.training.stages import STAGES
from latentwire.training.trainer import Job
from latentwire.utils.cli import require


@dataclass
class Start:
    """What a stage starts from. questions: to train on; held: to validate on; origin: what its checkpoints say of their
    making; last: the checkpoint at which it was stopped."""

    config: TrainSettings
    readers: Sequence[Reader]
    questions: QuestionSet
    held: QuestionSet
    origin: dict
    last: Path | None


def job_of(start: Start) -> Job:
    """The job of the stage that the settings name."""
    return _rival(start) if STAGES[start.config.stage].rival else _latentwire(start)


def _latentwire(start: Start) -> Job:
    """LatentWire from the stage before, or from where this one was stopped."""
    config, held = start.config, start.held
    joins = STAGES[config.stage].joins
    if joins and not start.last:
        encoder, adapters, made = joining.begin(config, start.readers)
    else:
        encoder, adapters, made = load_checkpoint(start.last or Path(config.init), config.llm_ids)
    require(made["d_z"] == config.d_z, "d_z", config.d_z, f"{config.init} has d_z={made['d_z']}; set that")
    kinds = {adapter.name for adapter in adapters.values()}
    there = joins or not config.adapter_type or kinds <= {config.adapter_type}
    remedy = f"{config.init} has {', '.join(sorted(kinds))}; it is chosen at stage codebook, or join"
    require(there, "adapter_type", config.adapter_type, remedy)
    if not (start.last or joins):
        encoder = _encoder(config, encoder)
    read = {name: adapters[name] for name in adapters if start.readers}  # where no LLM reads, adapters only take time
    model = LatentWire(encoder, read, config.source, config.latent_len)
    origin = start.origin | {"interface": made.get("interface"), "init": config.init}
    if made["encoder"]["type"] != "codebook":  # which has no backbone: there the settings name one
        origin["encoder_id"] = made.get("encoder_id")

    def validate() -> dict:
        if not start.readers:
            return _selection_figures(encoder, held, config)
        shared = Shared(held.questions, config.seed, Sender(encoder, config.source, "fp16"))
        ready = [dataclasses.replace(reader, adapter=adapters[reader.llm.name]) for reader in start.readers]
        return _answer_figures("latentwire", ready, shared, held, config)

    def save(folder: Path, training: dict | None, notes: dict) -> None:
        if joins:
            joining.save(folder, encoder, adapters, config, origin, training, notes)
        else:
            save_checkpoint(folder, encoder, adapters, origin | notes, training)

    return Job(config, model, start.readers, start.questions.questions, validate, save, start.questions.spans)


def _rival(start: Start) -> Job:
    """Soft prompts before the text that the rival sends."""
    config, held = start.config, start.held
    shared = Shared(held.questions, config.seed)
    if config.init:
        encoder, _, _ = load_checkpoint(Path(config.init), config.llm_ids)
        shared.sender = Sender(encoder.to(start.readers[0].llm.device), config.source, "fp16")
    model = SoftPrompts(start.readers, STAGES[config.stage].rival, config.latent_len, shared)
    if start.last:
        model.restore(load_soft_prompts(start.last, config.llm_ids))

    def validate() -> dict:
        shared.soft_prompts = {config.stage: model.prompts()}
        return _answer_figures(config.stage, start.readers, shared, held, config)

    def save(folder: Path, training: dict | None, notes: dict) -> None:
        save_soft_prompts(folder, model.prompts(), start.origin | notes, training)

    return Job(config, model, start.readers, start.questions.questions, validate, save, start.questions.spans)


def _encoder(config: TrainSettings, before: Encoder) -> Encoder:
    """The encoder to train: that of the stage before, or a new one where that was the codebook, or another that this
    kind begins from."""
    kind, found = ENCODERS[config.encoder_type], before
    if before.name in kind.begins_from:
        torch.manual_seed(config.seed)
        found = kind.begin(before, config.encoder, config.latent_len)
    remedy = f"{config.init} has {before.name!r}; set that"
    require(found.name == config.encoder_type, "encoder_type", config.encoder_type, remedy)
    rank, wanted = getattr(getattr(found, "backbone", None), "origin", None), getattr(config.encoder, "lora", 0)
    rank = rank["rank"] if rank else 0
    require(rank == wanted, "lora", wanted, f"{config.init} has {rank}; set that")
    for name, kept in found.shape().items() if before.name != "codebook" else ():
        given = getattr(config.encoder, name, kept)
        require(given == kept, name, given, f"{config.init} has {kept!r}; set that")
    return found


def _answer_figures(
    condition: str, readers: Sequence[Reader], shared: Shared, held: QuestionSet, config: TrainSettings
) -> dict:
    """F1, accuracy of the first token and of the first informative one, and NLL per answer token (nats) of each LLM on
    the held-out questions.

    "score" is the mean F1; the smallest share of the NLL breaks ties between F1s of zero.
    """
    llms = {}
    for reader in readers:
        lines = [
            line
            for batch in batches(held.questions, config.micro_batch or config.batch_size)
            for line in answer(
                CONDITIONS[condition], config.latent_len, reader, shared, held.score, batch, config.max_new_tokens
            )
        ]
        llms[reader.llm.name] = {
            "f1": float(np.mean([line["f1"] for line in lines])),
            "first_token_acc": float(np.mean([line["first_token_correct"] for line in lines])),
            "first_informative_acc": float(np.mean([line["first_informative_correct"] for line in lines])),
            "ce": sum(x["answer_nll"] for x in lines) / sum(x["answer_tokens"] for x in lines),
        }
    f1, ce = (float(np.mean([figures[key] for figures in llms.values()])) for key in ("f1", "ce"))
    return {"llms": llms, "ce": ce, "score": f1 - 1e-4 * ce}


def _selection_figures(encoder: Encoder, held: QuestionSet, config: TrainSettings) -> dict[str, float]:
    """How often all tokens of the answer are among the M sent, and how often some are; F1 of the encoder's own answer,
    where it has one to this question. An encoder that has none is judged by "answer_touched"."""
    kept = [
        _sent_of_answer(one, q).cpu()
        for some in batches(held.questions, config.micro_batch or config.batch_size)
        for one, q in zip(encoder.encoded(some, config.source, config.latent_len), some, strict=True)
    ]
    figures = {"answer_kept": float(np.mean([bool(sent.all()) for sent in kept]))}
    figures["answer_touched"] = float(np.mean([bool(sent.any()) for sent in kept]))
    if not encoder.reads_answers:
        return figures | {"score": figures["answer_touched"]}
    if encoder_reads_question(config.source):
        said = encoder.read(held.questions)
        f1 = [held.score(one, q.answers)["f1"] for one, q in zip(said, held.questions, strict=True)]
        figures["encoder_f1"] = float(np.mean(f1))
    return figures | {"score": figures["answer_kept"] + figures.get("encoder_f1", 0.0)}


def _sent_of_answer(encoded: Encoded, question: Question) -> torch.Tensor:
    """Which tokens of the first answer are sent: bool [their number]."""
    ((first, last),) = answer_edges(encoded.tokens, [question])
    return encoded.places[0].sum(dim=0)[first : last + 1] > 0.5
