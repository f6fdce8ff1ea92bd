"""The training loop: steps, validation, saving, and continuing exactly where a killed run stopped.

Everything random in a step follows from the seed and the step's number, and the order of the questions from the seed
and the epoch, so the only state to keep is that of model, optimizer and schedule.
"""

import math
import random
import resource
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from latentwire.conditions.base import Setting
from latentwire.data.squad import Question
from latentwire.models.latentwire import LatentWire, Slots, SoftPrompts
from latentwire.training.log import Metrics
from latentwire.training.losses import answer_sums, distillation_sum, span_sum
from latentwire.training.teacher import TeacherLine
from latentwire.utils.runs import reason
from latentwire.utils.settings import TUNED, TrainConfig

TERMINATED = 143  # exit status after SIGTERM, as shells have it: 128 + 15
_POOL = 50  # batches that are sorted by length together
_WEIGHT_DECAY = 0.01
# What each stage trains; everything else stays as the stage before left it.
_TRAINED = {
    "scores": ("backbone", "span"),
    "adapters": ("codebook", "residual", "adapter_"),
    "joint": ("",),
    **dict.fromkeys(TUNED, ("",)),
}


class Terminated(SystemExit):
    """SIGTERM came: the checkpoint is saved, and the program ends with status 143."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


@dataclass
class Job:
    """What a stage works with. teacher: by LLM and question id; empty without distillation.

    validate(): figures on the held-out questions, "score" (higher is better) among them.
    save(folder, training): writes a checkpoint; without `training` only what an evaluation needs.
    """

    config: TrainConfig
    model: LatentWire | SoftPrompts
    settings: Sequence[Setting]
    questions: Sequence[Question]
    validate: Callable[[], dict[str, float]]
    save: Callable[[Path, dict | None, dict], None]
    teacher: Mapping[str, Mapping[str, TeacherLine]]


def steps_of(config: TrainConfig, n: int, processes: int) -> tuple[int, int]:
    """Steps of an epoch and of the whole stage; the last, incomplete batch of an epoch is left out."""
    each = max(1, n // (config.batch_size * processes))
    return each, each * config.epochs


class Batches:
    """All processes' questions of each step: batches of similar length, in an order that is drawn anew each epoch."""

    def __init__(self, config: TrainConfig, questions: Sequence[Question], processes: int):
        self.questions, self.seed, self.size = questions, config.seed, config.batch_size * processes
        self.per_epoch, _ = steps_of(config, len(questions), processes)
        self._epoch, self._batches = -1, []

    def __getitem__(self, step: int) -> list[Question]:
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._draw(epoch)
        return [self.questions[i] for i in self._batches[place]]

    def _draw(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{self.seed} {epoch}")
        order = rng.sample(range(len(self.questions)), len(self.questions))[: self.per_epoch * self.size]
        pools = [order[i : i + _POOL * self.size] for i in range(0, len(order), _POOL * self.size)]
        order = [i for pool in pools for i in sorted(pool, key=lambda i: len(self.questions[i].context))]
        batches = [order[i : i + self.size] for i in range(0, len(order), self.size)]
        rng.shuffle(batches)
        return batches


class Trainer:
    """Runs one stage's steps. folder: the run folder; state: what `load_training` gave back, None at the start."""

    def __init__(self, job: Job, accelerator: Accelerator, folder: Path, state: dict | None):
        self.job, self.accelerator, self.folder, config = job, accelerator, folder, job.config
        self.per_epoch, self.total = steps_of(config, len(job.questions), accelerator.num_processes)
        self.batches = Batches(config, job.questions, accelerator.num_processes)
        components = job.model.components()
        self.components = {
            name: params for name, params in components.items() if name.startswith(_TRAINED[config.stage])
        }
        job.model.requires_grad_(False)
        for params in self.components.values():
            for param in params:
                param.requires_grad_(True)
        groups = [
            {"params": params, "lr": _rate(config, name), "weight_decay": _WEIGHT_DECAY if name == "backbone" else 0.0}
            for name, params in self.components.items()
        ]
        optimizer = torch.optim.AdamW(groups, fused=True)
        self.schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(config.warmup * self.total), self.total)
        self.model, self.optimizer = accelerator.prepare(job.model, optimizer)
        self.step, self.best = 0, None
        if state is not None:
            self.step, self.best = state["step"], state["best"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])

    def run(self) -> None:
        """All steps that are left. Raises Terminated after SIGTERM, ValueError at a loss that is not finite."""
        stopping = _Stop(self.accelerator)
        metrics = Metrics(self.folder / "metrics.jsonl", self.step or -1) if self.accelerator.is_main_process else None
        board = _board(self.folder) if self.job.config.tensorboard and metrics else None
        saved = time.monotonic()
        bar = tqdm(
            total=self.total, initial=self.step, desc=self.job.config.stage, unit="step", mininterval=1,
            disable=metrics is None,
        )  # fmt: skip
        while self.step < self.total:
            if self.step == 0 and metrics:
                self._validate(metrics, board)
            try:
                line = self.take_step()
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                raise ValueError(self._too_large(error)) from error
            self.step += 1
            if metrics:
                metrics.write(line)
                _show(board, line)
                bar.set_postfix(_short(line), refresh=False)
                bar.update()
            stop = stopping.asked()
            at_end = self.step % self.per_epoch == 0
            if at_end and metrics:
                self._validate(metrics, board)
            late = time.monotonic() - saved > 60 * self.job.config.save_minutes
            if metrics and (at_end or stop or late):
                self._save()
                saved = time.monotonic()
            if stop and self.step < self.total:
                raise Terminated
        bar.close()
        if metrics:
            metrics.close()

    def seconds_per_step(self, steps: int = 2) -> float:
        """Measured on the first batches; nothing is changed by it."""
        started = time.perf_counter()
        for step in range(steps):
            loss, _, _ = self._loss(step)
            self.accelerator.backward(loss)
            self.optimizer.zero_grad()
        return (time.perf_counter() - started) / steps

    def take_step(self) -> dict:
        """Step number `self.step`; what metrics.jsonl says of it."""
        started, config = time.perf_counter(), self.job.config
        self.model.train()
        if isinstance(self.job.model, LatentWire) and "backbone" not in self.components:
            self.job.model.encoder.backbone.eval()  # frozen: no dropout either
        loss, parts, ids = self._loss(self.step)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        device = self.accelerator.device
        norms = {f"grad_norm_{name}": _norm(params, device) for name, params in self.components.items()}
        trained = [p for params in self.components.values() for p in params]
        total = self.accelerator.clip_grad_norm_(trained, config.clip)
        parts = {"loss": loss.detach() / self.accelerator.num_processes} | parts
        values = torch.stack([value.detach().float() for value in parts.values()])
        values = self.accelerator.reduce(values, "sum") if self.accelerator.num_processes > 1 else values
        *values, length = torch.cat([values, torch.stack([*norms.values(), total])]).tolist()  # a GPU waits here alone
        figures = dict(zip([*parts, *norms], values, strict=True))
        self._require_finite("loss", figures["loss"], ids)
        self._require_finite("length of the gradient", length, ids)
        rate = self.schedule.get_last_lr()[-1]
        self.optimizer.step()
        self.schedule.step()
        return {
            "step": self.step + 1, "epoch": self.step // self.per_epoch + 1, **figures, "lr": rate,
            "examples_per_s": len(ids) / (time.perf_counter() - started), "memory_mb": _memory_mb(),
        }  # fmt: skip

    def _too_large(self, error: RuntimeError) -> str:
        """How large the step was that memory ran out in, and what to try."""
        config, batch = self.job.config, self.batches[self.step]
        smaller = f"BATCH_SIZE={config.batch_size // 2}" if config.batch_size > 1 else "fewer LLMS, or smaller ones,"
        return (
            f"out of memory at step {self.step}: {config.batch_size} questions a process, the longest context of "
            f"{max(len(q.context) for q in batch)} characters, {config.latent_len} latents each, "
            f"{', '.join(config.llm_names)} in {config.dtype} ({reason(error)}); try {smaller} in another folder; what "
            "was saved is kept"
        )

    def _require_finite(self, what: str, value: float, ids: Sequence[str]) -> None:
        if not math.isfinite(value):
            raise ValueError(
                f"the {what} is {value} at step {self.step} (questions {', '.join(ids)}); nothing was changed "
                "by this step. Lower LR, or look at these questions; --resume goes on from the last checkpoint"
            )

    def _loss(self, step: int) -> tuple[Tensor, dict[str, Tensor], list[str]]:
        """Loss of this process (divided by counts of all processes' questions, so that averaged gradients are those of
        the whole batch), its parts, and the ids of all questions."""
        config, rank, world = self.job.config, self.accelerator.process_index, self.accelerator.num_processes
        whole = self.batches[step]
        mine = whole[rank::world]
        torch.manual_seed((config.seed * 1_000_003 + step) * world + rank)
        slots = self.model(mine)
        parts: dict[str, Tensor] = {}
        total = torch.zeros((), device=self.accelerator.device)
        if config.stage != "scores":
            for setting in self.job.settings:
                loss, found = self._answer_loss(setting, slots, mine, whole)
                total = total + loss
                parts |= {f"{key}_{setting.llm.name}": value for key, value in found.items()}
        supervised = config.span_weight > 0 and slots.encoded is not None and slots.encoded.scores is not None
        if config.stage == "scores" or (config.stage == "joint" and supervised):
            parts["span"] = span_sum(slots.encoded, mine) / len(whole)
            total = total + (1.0 if config.stage == "scores" else config.span_weight) * parts["span"]
        return total * world, parts, [q.id for q in whole]

    def _answer_loss(
        self, setting: Setting, slots: Slots, mine: Sequence[Question], whole: Sequence[Question]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, llm, prompts = self.job.config, setting.llm, setting.prompts
        rows = slots.embeds[llm.name]
        labels = {q.id: prompts.label_ids(q.answers[0], config.k) for q in whole}
        tails = [prompts.tail(q.question) for q in mine]
        scored = llm.loss_with_prefix(prompts.head, rows, tails, [labels[q.id] for q in mine])
        count = sum(map(len, labels.values()))
        sums = answer_sums(scored)
        parts = {
            "ce": sums["ce"] / count,
            "first_ce": sums["first_ce"] / len(whole),
            "first_token_acc": sums["first_token_acc"] / len(whole),
        }
        loss = parts["ce"] + config.first_token_ce_weight * parts["first_ce"]
        if llm.name in self.job.teacher:
            lines = self.job.teacher[llm.name]
            right = max(1, sum(int(lines[q.id].right.sum()) for q in whole))
            parts["kd"] = distillation_sum(scored, [lines[q.id] for q in mine]) / right
            loss = loss + config.kd_weight * parts["kd"]
        spread = torch.cat([row.detach().float() for row in rows])
        scale = llm.embedding_rms()
        parts["prefix_rms"] = spread.square().mean().sqrt() / scale / self.accelerator.num_processes
        return loss, parts

    def _validate(self, metrics: Metrics, board: object) -> None:
        self.model.eval()
        figures = self.job.validate()
        metrics.write({"step": self.step, "validation": figures})
        _show(board, {"step": self.step} | {f"validation_{key}": value for key, value in figures.items()})
        tqdm.write(f"step {self.step}  held out: " + "  ".join(f"{key} {value:.3f}" for key, value in figures.items()))
        if self.best is None or figures["score"] > self.best:
            self.best = figures["score"]
            self.job.save(self.folder / "checkpoint_best", None, {"step": self.step, "validation": figures})

    def _save(self) -> None:
        state = {
            "step": self.step, "best": self.best, "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }  # fmt: skip
        self.job.save(self.folder / "checkpoint_last", state, {"step": self.step})


class _Stop:
    """Whether SIGTERM came, to any process."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.signalled = accelerator, False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: object) -> None:
        self.signalled = True

    def asked(self) -> bool:
        """The same answer in all processes."""
        if self.accelerator.num_processes == 1:
            return self.signalled
        flag = torch.tensor(float(self.signalled), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)


def _rate(config: TrainConfig, component: str) -> float:
    if component == "codebook":
        return config.codebook_lr
    if component.startswith("soft_prompt_"):
        return config.soft_prompt_lr
    return config.encoder_lr if component == "backbone" and config.encoder_type != "byte" else config.lr


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)  # a CPU has no type of its own


def _norm(params: Sequence[Tensor], device: torch.device) -> Tensor:
    """Length of the parameters' gradient, a scalar on the device."""
    found = [param.grad.float().norm() for param in params if param.grad is not None]
    return torch.stack(found).norm() if found else torch.zeros((), device=device)


def _memory_mb() -> float:
    """Most memory so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def _short(line: Mapping[str, float]) -> dict[str, str]:
    shown = ["loss", *(key for key in line if key.startswith("first_token_acc"))]
    return {key.replace("first_token_acc", "first"): f"{line[key]:.2f}" for key in shown}


def _board(folder: Path) -> object:
    try:
        from torch.utils.tensorboard import SummaryWriter  # an extra that few want
    except ImportError as error:
        raise ValueError(f"tensorboard=True: {error}; pip install tensorboard, or leave it out") from error
    return SummaryWriter(folder / "tensorboard")


def _show(board: object, line: Mapping[str, float]) -> None:
    if board is not None:
        for key, value in line.items():
            board.add_scalar(key, value, line["step"])
