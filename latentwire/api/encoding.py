"""The package's face: a checkpoint that encodes texts to wires, and readers that answer from wires.

    lw = LatentWire.from_pretrained("checkpoints/latentwire_m32")
    z = lw.encode("The mill was built in 1794.", "When was the mill built?")
    lw.reader("qwen").answer(z)

Encoding loads no LLM. A reader loads one LLM, and neither the encoder nor another LLM. What they share is bytes.
"""

import shutil
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, overload

from huggingface_hub import ModelHubMixin, snapshot_download
from tqdm import tqdm

from latentwire.api.chunks import chunks
from latentwire.api.message import Wire
from latentwire.api.settings import is_folder
from latentwire.data.content import encoder_reads_question, question_in_tail
from latentwire.data.question import Question
from latentwire.data.relevance import relevance
from latentwire.models.weights import FORMS, TABLES, asked, read_config, wire_id
from latentwire.models.wire import CODECS, COMPACT, SCALAR
from latentwire.utils.cli import reason, require, require_text
from latentwire.utils.machine import device_of
from latentwire.utils.surroundings import hub_answers

if TYPE_CHECKING:
    from latentwire.api.corpus import Corpus
    from latentwire.api.reading import WireReader
    from latentwire.models.encoders.base import Encoder
    from latentwire.models.wire.compact import Compact

_BATCH = 50_000  # characters between two steps of the progress bar
_NOT_KEPT = ("training.*", "eval_*", *(f"*{form}" for form in FORMS))  # weights are written anew


class LatentWire(ModelHubMixin, library_name="latentwire", tags=["prompt-compression", "soft-prompt"]):
    """A checkpoint in use. folder: where it lies; device: of the encoder and, unless they say otherwise, of readers
    ("": CUDA where there is a GPU)."""

    def __init__(self, folder: str | Path, device: str = ""):
        self.folder, self.device = Path(folder), device
        config = read_config(self.folder)
        self.source: str = asked(config, "source", self.folder)
        self.m: int = asked(config, "latent_len", self.folder)
        self.d_z: int = asked(config, "d_z", self.folder)
        self.llms: dict[str, str] = asked(config, "llms", self.folder)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str = "", **hub: object) -> "LatentWire":
        """The checkpoint in a folder, or of a hub's repository; hub: what `snapshot_download` takes (revision, token,
        cache_dir, ...). Raises FileNotFoundError or ValueError where there is none."""
        if Path(name).is_dir():
            return cls(name, device)
        if is_folder(str(name)):
            raise FileNotFoundError(f"no checkpoint in {str(name)!r}: there is no such folder; name another")
        try:
            hub = hub if "local_files_only" in hub else hub | {"local_files_only": not hub_answers()}
            found = snapshot_download(str(name), **hub)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no checkpoint {str(name)!r}: there is no such folder, and the hub gave none ({reason(error)})"
            ) from error
        return cls(found, device)

    @staticmethod
    def open_corpus(folder: str | Path, ckpt: str | Path = "") -> "Corpus":
        """The wires that encode_corpus.py wrote to a folder, by the ids of their documents; ckpt: the checkpoint that
        reads them, "" for the one that made them."""
        from latentwire.api.corpus import Corpus  # imports pyarrow

        return Corpus(folder, ckpt)

    @cached_property
    def encoder(self) -> "Encoder":
        """The encoder, loaded when it is first needed."""
        from latentwire.models.checkpoint import load_encoder  # slow to import; readers need none of it

        return load_encoder(self.folder).to(device_of(self.device)).eval()

    @cached_property
    def wire_id(self) -> bytes:
        """What its wires name it by."""
        return wire_id(self.folder)

    @property
    def codecs(self) -> tuple[str, ...]:
        """Codecs that this checkpoint can send: those that need tables, where they were fitted (fit_codec.py)."""
        return tuple(CODECS) if (self.folder / TABLES).is_file() else SCALAR

    @overload
    def encode(self, context: str, question: str | None = None, **how: object) -> bytes: ...
    @overload
    def encode(self, context: Sequence[str], question: Sequence[str] | None = None, **how: object) -> list[bytes]: ...
    def encode(
        self,
        context: str | Sequence[str],
        question: str | Sequence[str] | None = None,
        *,
        m: int | None = None,
        codec: str = "fp16",
        budget: float | None = None,
        blocks: int | None = None,
        progress: bool = False,
    ) -> bytes | list[bytes]:
        """The wire of a text, or of each of many; a text's bytes do not depend on what else is encoded with it.

        question: what will be asked, where the checkpoint's source is "prompt" or "aware"; None where it is "context".
        m: latents per block, the checkpoint's own unless given; budget: latents per 100 words instead. A text that the
        encoder cannot read at once is cut at ends of sentences into parts, and each is a block; blocks: how many of
        them are sent, those that fit the question best (TF-IDF). Default: one where the question is known, else all.
        progress: a bar on stderr.
        Raises ValueError for an empty text, a question too many or too few, or an unknown codec.
        """
        if isinstance(context, str):
            questions = None if question is None else [question]
            how = {"m": m, "codec": codec, "budget": budget, "blocks": blocks, "progress": progress}
            (one,) = self.encode([context], questions, **how)
            return one
        fit = f"; compact ones need tables: python latentwire/fit_codec.py --ckpt {self.folder}"
        more = "" if CODECS.keys() == set(self.codecs) else fit
        require(codec in self.codecs, "codec", codec, f"choose one of {', '.join(self.codecs)}{more}")
        compact = self._compact() if codec in COMPACT else None
        require(m is None or m > 0, "m", m, "must be at least 1")
        require(budget is None or budget > 0, "budget", budget, "must be above 0 latents per 100 words")
        require(m is None or budget is None, "budget", budget, f"m={m} says already how many latents; leave one out")
        require(blocks is None or blocks > 0, "blocks", blocks, "must be at least 1")
        most = self._most(blocks)
        asked_for = list(self._questions(context, question))
        with tqdm(total=len(asked_for), unit="text", desc="encoding", disable=not progress) as bar:
            wires = []
            for some in _grouped(asked_for):
                wires += self._encode(some, m or self.m, codec, compact, budget, most)
                bar.update(len(some))
        return wires

    def parts(self, context: str, question: str | None = None, blocks: int | None = None) -> list[str]:
        """The parts of a text that `encode` sends, one for each block, in reading order."""
        (asked_for,) = self._questions([context], None if question is None else [question])
        return [part.context for part in _fitting(asked_for, self._parts(asked_for), self._most(blocks))]

    def wire(self, data: bytes) -> Wire:
        """What these bytes hold. Raises ValueError if they are no wire, or another encoder's."""
        return require_readable(Wire.unpack(data, self.folder), self.folder, self.wire_id.hex(), self.source)

    def reader(self, llm: str, device: str = "", dtype: str = "") -> "WireReader":
        """One LLM that reads this checkpoint's wires; `device` and `dtype` as in the programs' flags.

        Raises ValueError for an LLM that the checkpoint has no adapter for.
        """
        from latentwire.api.reading import WireReader  # imports transformers

        return WireReader(self.folder, llm, device or self.device, dtype)

    def _compact(self) -> "Compact":
        """The tables of compact codecs, also where they were fitted anew since."""
        from latentwire.models.wire.compact import tables_of  # imports torch

        return tables_of(self.folder)

    def _most(self, blocks: int | None) -> int | None:
        """How many parts of a long text are sent at most."""
        return blocks or (1 if encoder_reads_question(self.source) else None)

    def _encode(
        self,
        questions: Sequence[Question],
        m: int,
        codec: str,
        compact: "Compact | None",
        budget: float | None,
        most: int | None,
    ) -> list[bytes]:
        parts = [(number, part) for number, q in enumerate(questions) for part in _fitting(q, self._parts(q), most)]
        sizes = [_places(part.context, budget) if budget else m for _, part in parts]
        latents = self.encoder.encode([part for _, part in parts], self.source, sizes)
        blocks: list[list] = [[] for _ in questions]
        for (number, _), z in zip(parts, latents, strict=True):
            blocks[number].append(z.cpu().numpy())
        return [bytes(self._packed(q, some, codec, compact)) for q, some in zip(questions, blocks, strict=True)]

    def _packed(self, q: Question, blocks: list, codec: str, compact: "Compact | None") -> Wire:
        text = q.context if question_in_tail(self.source) else f"{q.context}\n{q.question}"
        tokens = len(self.encoder.tokenizer(text, add_special_tokens=False)["input_ids"])
        return Wire.pack(blocks, codec, self.source, self.wire_id, len(text.encode()), tokens, compact)

    def _parts(self, q: Question) -> list[Question]:
        """The question on each part of its context that the encoder reads at once."""

        def on(context: str) -> Question:
            return Question(q.id, q.title, q.paragraph, context, q.question, q.answers)

        return [on(part) for part in chunks(q.context, lambda part: self.encoder.fits(on(part), self.source))]

    def _questions(self, contexts: Sequence[str], questions: Sequence[str] | None) -> Iterator[Question]:
        known = encoder_reads_question(self.source)
        if known and questions is None:
            raise ValueError(
                f"question: the source of {self.folder} is {self.source!r}, so encoding needs the question"
            )
        if not known and questions is not None:
            raise ValueError(
                f"question: the source of {self.folder} is {self.source!r}: the question is asked when answering"
            )
        require(
            not known or (not isinstance(questions, str) and len(questions) == len(contexts)), "question", questions,
            f"{len(contexts)} contexts need as many questions",
        )  # fmt: skip
        for number, (context, question) in enumerate(zip(contexts, questions or [""] * len(contexts), strict=True), 1):
            require_text("context", context)
            if known:
                require_text("question", question)
            # Nothing scores these answers, so any reference will do.
            yield Question(f"number {number}", "", "", context.strip(), question.strip(), ("-",))

    def _save_pretrained(self, save_directory: Path) -> None:
        from latentwire.models.exporting import as_safetensors  # imports torch

        require(
            save_directory.resolve() != self.folder.resolve(), "folder", str(save_directory),
            "the checkpoint lies there already; name another",
        )  # fmt: skip
        shutil.copytree(self.folder, save_directory, ignore=shutil.ignore_patterns(*_NOT_KEPT), dirs_exist_ok=True)
        as_safetensors(self.folder, save_directory)
        if (self.folder / TABLES).is_file():
            shutil.copy(self.folder / TABLES, save_directory / TABLES)


def require_readable(wire: Wire, folder: Path, encoder: str, source: str) -> Wire:
    """The wire itself; ValueError if it is of another encoder or source than the checkpoint's. What a wire of version 1
    does not say cannot be checked."""
    if wire.encoder and (wire.encoder, wire.source) != (encoder, source):
        raise ValueError(
            f"the wire is of encoder {wire.encoder}, source {wire.source}; {folder} reads those of encoder {encoder}, "
            f"source {source}: read it with a checkpoint of its own"
        )
    return wire


def _grouped(questions: Sequence[Question]) -> Iterator[list[Question]]:
    """The same questions in groups of about _BATCH characters."""
    group: list[Question] = []
    for question in questions:
        group.append(question)
        if sum(len(q.context) for q in group) >= _BATCH:
            yield group
            group = []
    if group:
        yield group


def _fitting(question: Question, parts: list[Question], most: int | None) -> list[Question]:
    """At most so many of the parts, those that fit the question best, in reading order."""
    if most is None or len(parts) <= most:
        return parts
    scores = relevance(question.question, [part.context for part in parts])
    best = sorted(range(len(parts)), key=lambda i: -scores[i])[:most]
    return [parts[i] for i in sorted(best)]


def _places(text: str, budget: float) -> int:
    """Latents for a text of so many per 100 words."""
    return max(1, round(budget * len(text.split()) / 100))
