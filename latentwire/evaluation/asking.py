"""One question of one text: both answers of each LLM, from the text and from the wire."""

from pathlib import Path

from latentwire.conditions.base import CONDITIONS, Reader, Sender, Shared, readers
from latentwire.data.question import Question
from latentwire.evaluation.settings import DemoSettings
from latentwire.models.checkpoint import load_checkpoint
from latentwire.models.wire import COMPACT
from latentwire.models.wire.compact import tables_of
from latentwire.utils.cli import require, require_text
from latentwire.utils.machine import on_this_machine

_SHOWN = {"text": "text", "latentwire": "wire"}  # conditions, and what they are called here


class Demo:
    """A checkpoint and its LLMs, ready to answer."""

    def __init__(self, config: DemoSettings):
        config = on_this_machine(config)
        encoder, adapters, made = load_checkpoint(Path(config.ckpt), config.llm_ids)
        self.source, self.m, self.longest = made.get("source", "prompt"), made["latent_len"], config.max_new_tokens
        compact = tables_of(Path(config.ckpt)) if config.codec in COMPACT else None
        self.shared = Shared(sender=Sender(encoder.to(config.device), self.source, config.codec, compact))
        self.readers = readers(config, self.source, adapters)

    def answers(self, context: str, question: str) -> str:
        """Printable lines: each LLM's answer from the text and from the wire, with positions and bytes, and the words
        that the latents came from. Raises ValueError for an empty question or a text beyond an LLM's window."""
        require_text("question", question)
        # Nothing scores these answers, so any reference will do.
        asked = Question(f"{context}\n{question}", "demo", "demo", context, question.strip(), ("-",))
        lines = [line for reader in self.readers for line in self._both(reader, asked)]
        return "\n".join([*lines, self._words(asked)])

    def _both(self, reader: Reader, asked: Question) -> list[str]:
        llm, prompts, tail = reader.llm, reader.prompts, reader.prompts.tail(asked.question)
        lines = []
        for name, shown in _SHOWN.items():
            (slot,) = CONDITIONS[name].slots(reader, [asked], self.m, self.shared)
            positions = len(prompts.head) + len(slot.embeds) + len(tail) + self.longest
            llm.require_positions(positions, f"context: as {shown} the prompt takes", "shorten it")
            (answer,) = llm.generate_with_prefix(
                prompts.head, [slot.embeds], [tail], self.longest, [slot.deltas], slot.constant
            )
            lines.append(
                f"{llm.name:>8} from {shown}  {len(slot.embeds) - slot.constant:>5} positions  {slot.sent:>6} bytes   "
                f"{answer or '(nothing)'}"
            )
        return lines

    def _words(self, asked: Question) -> str:
        """The token that leads each latent, in reading order."""
        encoder = self.shared.sender.encoder
        if not encoder.chooses_tokens:
            return "latents: free queries, which stand for no words"
        (ids,) = encoder.select([asked], self.source, self.m)
        words = [encoder.tokenizer.decode([i]) for i in ids]
        return "latents: " + "|".join(word.replace("\n", "\\n") for word in words)


def show(config: DemoSettings) -> None:
    """Print the answers to the question that the settings name, or ask for a text and questions."""
    if config.context:
        text = read_context(config.context)
        print(Demo(config).answers(text, config.question))
    else:
        converse(Demo(config))


def read_context(path: str) -> str:
    """The text of a file; FileNotFoundError or ValueError that names it when there is none to read."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"context={path!r}: there is no such file")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"context={path!r}: not UTF-8 text ({error}); convert it") from error
    require(bool(text.strip()), "context", path, "the file is empty; name one with text")
    return text.strip()


def converse(demo: Demo) -> None:
    """Ask for a file, then for questions on it, until an empty line or the end of input. A mistake is only said."""
    context = ""
    while not context:
        path = _ask("file with the text: ")
        if not path:
            return
        try:
            context = read_context(path)
        except (OSError, ValueError) as error:
            print(error)
    while question := _ask("question (empty to end): "):
        try:
            print(demo.answers(context, question))
        except ValueError as error:
            print(error)


def _ask(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        return ""
