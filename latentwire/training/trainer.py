"""The training loop: steps, validation, saving, and continuing exactly where a killed run stopped.

Everything random in a step follows from the seed and the step's number, and the order of the questions from the seed
and the epoch, so the only state to keep is that of model, optimizer and schedule, and the best score so far.
"""

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from latentwire.conditions.base import Reader
from latentwire.data.content import encoder_reads_question
from latentwire.data.continuing import continuation
from latentwire.data.question import Question, grouped
from latentwire.models.components import require_complete
from latentwire.models.latentwire import LatentWire, Slots
from latentwire.training.log import TrainingLog, flat
from latentwire.training.losses import answer_sums, distillation_sum, span_sum
from latentwire.training.settings import TrainSettings
from latentwire.training.soft_prompts import SoftPrompts
from latentwire.training.stages import STAGES
from latentwire.training.teacher import TeacherLine
from latentwire.utils.cli import reason, require
from latentwire.utils.machine import now, peak_memory_mb
from latentwire.utils.stopping import Stop, Terminated

T = TypeVar("T")
_POOL = 50  # batches that are sorted by length together


@dataclass
class Job:
    """What a stage works with. spans: whether the answers are spans; teacher: by LLM and question id; empty without
    distillation.

    validate(): figures on the held-out questions, "score" (higher is better) among them.
    save(folder, training, notes): writes a checkpoint; without `training` only what an evaluation needs.
    """

    config: TrainSettings
    model: LatentWire | SoftPrompts
    readers: Sequence[Reader]
    questions: Sequence[Question]
    validate: Callable[[], dict] | None = None
    save: Callable[[Path, dict | None, dict], None] | None = None
    spans: bool = True
    teacher: dict[str, Mapping[str, TeacherLine]] = field(default_factory=dict)


def steps_of(config: TrainSettings, n: int, processes: int) -> tuple[int, int]:
    """Steps of an epoch and of the whole stage; the last, incomplete batch of an epoch is left out."""
    each = max(1, n // (config.batch_size * processes))
    return each, each * config.epochs


class Batches:
    """All processes' questions of each step: batches of similar length, in an order that is drawn anew each epoch.
    Where the encoder does not read the question, all questions on a text stand together: it is encoded once for them.
    """

    def __init__(self, config: TrainSettings, questions: Sequence[Question], processes: int):
        self.questions, self.seed, self.size = questions, config.seed, config.batch_size * processes
        self.together = not encoder_reads_question(config.source)
        learns = "answers" in STAGES[config.stage].losses  # else from spans, which a continuation has none of
        self.continuation_share = config.continuation_share if learns else 0.0
        self.per_epoch, _ = steps_of(config, len(questions), processes)
        self._epoch, self._batches = -1, []

    def __getitem__(self, step: int) -> list[Question]:
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._draw(epoch)
        rng = random.Random(f"{self.seed} {step} continuation")
        return [
            continuation(self.questions[i], rng) if rng.random() < self.continuation_share else self.questions[i]
            for i in self._batches[place]
        ]

    def _draw(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{self.seed} {epoch}")
        order = rng.sample(range(len(self.questions)), len(self.questions))
        if self.together:
            order = grouped(order, lambda i: self.questions[i].context)
        order = order[: self.per_epoch * self.size]
        pools = [order[i : i + _POOL * self.size] for i in range(0, len(order), _POOL * self.size)]
        order = [i for pool in pools for i in sorted(pool, key=self._length)]
        batches = [order[i : i + self.size] for i in range(0, len(order), self.size)]
        rng.shuffle(batches)
        return batches

    def _length(self, i: int) -> tuple[int, str]:
        q = self.questions[i]
        return (len(q.context), q.context) if self.together else (len(q.context) + len(q.question), "")


class Trainer:
    """Runs one stage's steps. folder: the run folder; state: what `load_training` gave back, None at the start."""

    def __init__(self, job: Job, accelerator: Accelerator, folder: Path, state: dict | None):
        self.job, self.accelerator, self.folder, config = job, accelerator, folder, job.config
        self.stage = STAGES[config.stage]
        self.per_epoch, self.total = steps_of(config, len(job.questions), accelerator.num_processes)
        self.batches = Batches(config, job.questions, accelerator.num_processes)
        everything = job.model.components()
        require_complete(job.model, everything)
        kinds = self.stage.trains
        self.components = [found for found in everything if kinds is None or found.kind in kinds]
        there = ", ".join(dict.fromkeys(found.kind for found in everything))
        require(bool(self.components), "stage", config.stage, f"trains {kinds}, and the parts here are {there}")
        job.model.requires_grad_(False)
        for param in (param for found in self.components for param in found.parameters):
            param.requires_grad_(True)
        groups = [
            {"params": found.parameters, "lr": getattr(config, found.rate), "weight_decay": found.weight_decay}
            for found in self.components
        ]
        optimizer = torch.optim.AdamW(groups, fused=True)
        rising = math.ceil(config.warmup * self.total)
        total = self.total  # a function that knew self would keep the LLMs in memory until they are collected
        self.schedule = LambdaLR(optimizer, lambda step: rate_share(step, rising, total))
        self.model, self.optimizer = accelerator.prepare(job.model, optimizer)
        self.step, self.best, self.judged = 0, None, False  # judged: this step was validated, or need not be
        if state is not None:
            self.step, self.best, self.judged = state["step"], state["best"], is_judged(state)
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])

    def run(self) -> None:
        """All steps that are left. Raises Terminated after SIGTERM, ValueError at a loss that is not finite."""
        main, path = self.accelerator.is_main_process, self.folder / "metrics.jsonl"
        log = TrainingLog(path, self.step or -1, self.judged) if main else None
        with Stop(self.accelerator) as stopping:
            self._run(stopping, log)
        if log:
            log.close()

    def _run(self, stopping: Stop, log: TrainingLog | None) -> None:
        saved = time.monotonic()
        bar = tqdm(
            total=self.total, initial=self.step, desc=self.stage.name, unit="step", mininterval=1, disable=log is None
        )
        self._judge(log)  # before the first step, or what a kill cut short
        while self.step < self.total:
            line = self._within_memory(self.take_step)
            self.step += 1
            if log:
                self._note(log, line)
                bar.set_postfix(_short(line), refresh=False)
                bar.update()
            stop = stopping.asked()
            self.judged = self.step % self.per_epoch > 0
            late = time.monotonic() - saved > 60 * self.job.config.save_minutes
            keep = stop or late or not self.judged
            if log and keep:
                self._save()
            if stop:
                raise Terminated
            self._judge(log)
            if keep:
                saved = time.monotonic()
        bar.close()
        if stopping.asked():  # while the last step was validated: no next stage begins
            raise Terminated

    def _judge(self, log: TrainingLog | None) -> None:
        """Validate what was not validated yet. It is saved already, so a kill meanwhile loses no step."""
        if self.judged:
            return
        self.judged = True
        if log:
            self._validate(log)
            if self.step:
                self._save()

    def seconds_per_step(self, steps: int = 2) -> float:
        """Measured on the first batches, or where M is in the middle of its fall; nothing is changed by it."""
        self._in_training()
        first = self.total // 3 if self.job.config.first_latent_len else 0
        for step in range(first - (self.accelerator.device.type == "cuda"), first + steps):  # a GPU's first one is slow
            if step == first:
                started = now(self.accelerator.device)
            self._within_memory(self._backward, max(step, 0))
            self.optimizer.zero_grad()
        return (now(self.accelerator.device) - started) / steps

    def take_step(self) -> dict:
        """Step number `self.step`; what metrics.jsonl says of it."""
        started, config = time.perf_counter(), self.job.config
        self._in_training()
        self.optimizer.zero_grad()
        parts, ids = self._backward(self.step)
        device = self.accelerator.device
        norms = {found.name: _norm(found.parameters, device) for found in self.components}
        trained = [param for found in self.components for param in found.parameters]
        total = self.accelerator.clip_grad_norm_(trained, config.clip)
        values = torch.stack([value.float() for value in parts.values()])
        values = self.accelerator.reduce(values, "sum") if self.accelerator.num_processes > 1 else values
        *values, length = torch.cat([values, torch.stack([*norms.values(), total])]).tolist()  # a GPU waits here alone
        figures = dict(zip(parts, values, strict=False))
        self._require_finite("loss", figures["", "loss"], ids)
        self._require_finite("length of the gradient", length, ids)
        rate = self.schedule.get_last_lr()[-1]
        self.optimizer.step()
        self.schedule.step()
        llms: dict[str, dict[str, float]] = {}
        for (llm, key), value in figures.items():
            if llm:
                llms.setdefault(llm, {})[key] = value
        return {
            "step": self.step + 1, "epoch": self.step // self.per_epoch + 1,
            **{key: value for (llm, key), value in figures.items() if not llm},
            "llms": llms, "grad_norms": dict(zip(norms, values[len(parts) :], strict=True)), "lr": rate,
            "examples_per_s": len(ids) / (time.perf_counter() - started), "memory_mb": peak_memory_mb(str(device)),
        }  # fmt: skip

    def _in_training(self) -> None:
        """Everything as it learns; what is frozen works as it will in use, without dropout."""
        self.model.train()
        for module in self.job.model.modules():
            params = list(module.parameters())
            if params and not any(param.requires_grad for param in params):
                module.eval()

    def _within_memory(self, work: Callable[..., T], *given: object) -> T:
        try:
            return work(*given)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            raise ValueError(self._too_large(error)) from error

    def _too_large(self, error: RuntimeError) -> str:
        """How large the step was that memory ran out in, and what to try."""
        config, batch = self.job.config, self.batches[self.step]
        size = config.micro_batch or config.batch_size
        smaller = f"MICRO_BATCH={size // 2}" if size > 1 else "fewer LLMS, or smaller ones, in another folder"
        return (
            f"out of memory at step {self.step}: {size} questions of a process at once, the longest context of "
            f"{max(len(q.context) for q in batch)} characters, {self.job.model.m} latents each, "
            f"{', '.join(config.llm_names)} in {config.dtype} ({reason(error)}); try {smaller}; what was saved is "
            "kept"
        )

    def _require_finite(self, what: str, value: float, ids: Sequence[str]) -> None:
        if not math.isfinite(value):
            raise ValueError(
                f"the {what} is {value} at step {self.step} (questions {', '.join(ids)}); nothing was changed "
                "by this step. Lower LR, or look at these questions; --resume goes on from the last checkpoint"
            )

    def _backward(self, step: int) -> tuple[dict[tuple[str, str], Tensor], list[str]]:
        """Add up the gradients of a step, micro_batch questions at a time. What it is made of by LLM and name, the loss
        among it, and the ids of all questions."""
        figures, world = {}, self.accelerator.num_processes
        least, more = divmod(len(self.batches[step]), world)
        most = least + (more > 0)  # of a process: all of them take as many parts, and none is empty
        parts = max(1, min(-(-most // (self.job.config.micro_batch or most)), least))
        for part in range(parts):
            with nullcontext() if part == parts - 1 else self.accelerator.no_sync(self.model):
                loss, found, ids = self._loss(step, part, parts)
                self.accelerator.backward(loss)
            found = {("", "loss"): loss / world} | found
            figures = {key: figures.get(key, 0.0) + value.detach() for key, value in found.items()}
        return figures, ids

    def _loss(self, step: int, part: int = 0, of: int = 1) -> tuple[Tensor, dict[tuple[str, str], Tensor], list[str]]:
        """Loss of one part of this process's questions (divided by counts of all processes' questions, so that averaged
        gradients are those of the whole batch), what it is made of by LLM ("" for what concerns none) and name, and the
        ids of all questions."""
        config, rank, world = self.job.config, self.accelerator.process_index, self.accelerator.num_processes
        whole = self.batches[step]
        mine = whole[len(whole) * rank // world : len(whole) * (rank + 1) // world]
        mine = mine[len(mine) * part // of : len(mine) * (part + 1) // of]
        if part == 0:
            torch.manual_seed((config.seed * 1_000_003 + step) * world + rank)
        if config.latent_lens or config.first_latent_len:
            self.job.model.m = self._latents(step)
        slots = self.model(mine)
        parts: dict[tuple[str, str], Tensor] = {}
        total = torch.zeros((), device=self.accelerator.device)
        if "answers" in self.stage.losses:
            for reader in self.job.readers:
                loss, found = self._answer_loss(reader, slots, mine, whole)
                total = total + loss
                parts |= {(reader.llm.name, key): value for key, value in found.items()}
        weight = 1.0 if self.stage.losses == ("spans",) else config.span_weight
        learns = slots.encoded is not None and self.job.model.encoder.learns_spans
        if "spans" in self.stage.losses and learns and self.job.spans and weight > 0:
            parts["", "span"] = span_sum(slots.encoded, mine) / len(whole)
            total = total + weight * parts["", "span"]
        return total * world, parts, [q.id for q in whole]

    def _latents(self, step: int) -> int:
        """M of a step: drawn among latent_lens, the same in all processes, and over the first half of the steps between
        first_latent_len and that."""
        config = self.job.config
        m = random.Random(f"{config.seed} {step} M").choice(config.lens or [config.latent_len])
        done = min(1.0, 2 * step / self.total)
        return round((config.first_latent_len or m) ** (1 - done) * m**done)

    def _answer_loss(
        self, reader: Reader, slots: Slots, mine: Sequence[Question], whole: Sequence[Question]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, llm, prompts = self.job.config, reader.llm, reader.prompts
        rows = slots.embeds[llm.name]
        labels = {q.id: prompts.labels(q.answers[0], config.k) for q in whole}
        own = [labels[q.id] for q in mine]
        tails = [prompts.tail(q.question) for q in mine]
        deltas = slots.deltas.get(llm.name, ())
        scored = llm.loss_with_prefix(
            prompts.head, rows, tails, [one.ids for one in own], deltas, [one.learned for one in own],
            slots.constant.get(llm.name, 0),
        )  # fmt: skip
        count = sum(sum(one.learned) for one in labels.values())
        sums = answer_sums(scored, [one.informative for one in own])
        parts = {
            "ce": sums["ce"] / count,
            "first_ce": sums["first_ce"] / len(whole),
            "first_token_acc": sums["first_token_acc"] / len(whole),
            "first_informative_acc": sums["first_informative_acc"] / len(whole),
        }
        loss = parts["ce"] + config.first_token_ce_weight * parts["first_ce"]
        if llm.name in self.job.teacher:
            lines = self.job.teacher[llm.name]
            right = max(1, sum(int(lines[q.id].right.sum()) for q in whole if q.id in lines))
            parts["kd"] = distillation_sum(scored, [lines.get(q.id) for q in mine]) / right
            loss = loss + config.kd_weight * parts["kd"]
        spread = torch.cat([row.detach().float() for row in rows])
        scale = llm.embedding_rms()
        parts["prefix_rms"] = spread.square().mean().sqrt() / scale * len(mine) / len(whole)
        return loss, parts

    def _note(self, log: TrainingLog, line: dict) -> None:
        """Into the log, and to the tracker where there is one."""
        log.write(line)
        held = {f"validation {key}": value for key, value in flat(line.get("validation", {})).items()}
        self.accelerator.log(held or flat(line), step=line["step"])

    def _validate(self, log: TrainingLog) -> None:
        self.model.eval()
        figures = self.job.validate()
        self._note(log, {"step": self.step, "validation": figures})
        shown = "  ".join(f"{key} {value:.3f}" for key, value in flat(figures).items())
        tqdm.write(f"step {self.step}  held out: {shown}")
        if self.best is None or figures["score"] > self.best:
            self.best = figures["score"]
            self.job.save(self.folder / "checkpoint_best", None, {"step": self.step, "validation": figures})

    def _save(self) -> None:
        state = {
            "step": self.step, "best": self.best, "judged": self.judged, "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }  # fmt: skip
        self.job.save(self.folder / "checkpoint_last", state, {"step": self.step})


def is_judged(state: Mapping) -> bool:
    """Whether a saved step was validated, or need not be; older runs saved after the validation."""
    return state.get("judged", True)


def rate_share(step: int, rising: int, total: int) -> float:
    """Share of the learning rate at a step: it rises over the first `rising` steps, the first of which learns already,
    then falls to 0 along half a cosine."""
    if step < rising:
        return (step + 1) / (rising + 1)
    done = (step - rising) / max(1, total - rising)
    return 0.5 * (1.0 + math.cos(math.pi * done))


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)  # a CPU has no type of its own


def _norm(params: Sequence[Tensor], device: torch.device) -> Tensor:
    """Length of the parameters' gradient, a scalar on the device."""
    found = [param.grad.float().norm() for param in params if param.grad is not None]
    return torch.stack(found).norm() if found else torch.zeros((), device=device)


def _short(line: Mapping) -> dict[str, str]:
    shown = {"loss": line["loss"]} | {f"first {llm}": f["first_token_acc"] for llm, f in line["llms"].items()}
    return {key: f"{value:.2f}" for key, value in shown.items()}
