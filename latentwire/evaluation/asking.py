"""Ask one question of one text, and see both answers of each LLM: from the text, and from the wire.

python latentwire/demo.py --context FILE --question "Who ...?"
python latentwire/demo.py                    # asks for a file and then for questions
"""

from pathlib import Path

from latentwire.conditions.base import CONDITIONS, Sender, Setting
from latentwire.data.squad import Question
from latentwire.llms.frozen import load_llm
from latentwire.llms.prompts import PromptBuilder
from latentwire.models.checkpoint import load_checkpoint
from latentwire.models.encoders.base import CodebookEncoder
from latentwire.utils.runs import default_device, default_dtype
from latentwire.utils.settings import DemoConfig, parse, require

_SHOWN = {"text": "text", "latentwire": "wire"}  # conditions, and what they are called here


def main() -> None:
    """Command line: one question, or a conversation."""
    config = parse(DemoConfig)
    if config.context:
        context = read_context(config.context)
        print(Demo(config).answers(context, config.question))
    else:
        converse(Demo(config))


class Demo:
    """A checkpoint and its LLMs, ready to answer."""

    def __init__(self, config: DemoConfig):
        device = config.device or default_device()
        dtype = config.dtype or default_dtype(device)
        encoder, adapters, made = load_checkpoint(Path(config.ckpt), config.llm_ids)
        source, self.m, self.longest = made.get("source", "prompt"), made["latent_len"], config.max_new_tokens
        sender = Sender(encoder.to(device), source, config.codec)
        llms = [load_llm(name, llm_id, device, dtype) for name, llm_id in config.llm_ids.items()]
        self.settings = [
            Setting(llm, PromptBuilder(llm.tokenizer, source, config.llm_wordings[llm.name]), sender,
                    adapters[llm.name].to(device), config.codec, made["d_z"], (), (), 0)
            for llm in llms
        ]  # fmt: skip

    def answers(self, context: str, question: str) -> str:
        """Printable lines: each LLM's answer from the text and from the wire, with positions and bytes, and the words
        that the latents came from. Raises ValueError for an empty question or a text beyond an LLM's window."""
        require(bool(question.strip()), "question", question, "ask something")
        # Nothing scores these answers, so any reference will do.
        asked = Question(f"{context}\n{question}", "demo", "demo", context, question.strip(), ("-",), (0,))
        lines = [line for setting in self.settings for line in self._both(setting, asked)]
        return "\n".join([*lines, *self._words(asked)])

    def _both(self, setting: Setting, asked: Question) -> list[str]:
        llm, prompts, tail = setting.llm, setting.prompts, setting.prompts.tail(asked.question)
        lines = []
        for condition, shown in _SHOWN.items():
            (slot,) = CONDITIONS[condition].build(setting, [asked], self.m)
            positions = len(prompts.head) + len(slot.embeds) + len(tail) + self.longest
            if llm.positions and positions > llm.positions:
                raise ValueError(
                    f"context: as {shown} the prompt takes {positions} positions, and {llm.name} ({llm.id}) reads "
                    f"{llm.positions}; shorten it"
                )
            (answer,) = llm.generate_with_prefix(prompts.head, [slot.embeds], [tail], self.longest)
            lines.append(
                f"{llm.name:>8} from {shown}  {len(slot.embeds):>5} positions  {slot.sent:>6} bytes   "
                f"{answer or '(nothing)'}"
            )
        return lines

    def _words(self, asked: Question) -> list[str]:
        """The token that leads each latent, in reading order."""
        encoder, source = self.settings[0].sender.encoder, self.settings[0].prompts.source
        if not isinstance(encoder, CodebookEncoder):
            return ["latents: free queries, which stand for no words"]
        words = [encoder.tokenizer.decode([i]) for i in encoder.select(asked, source, self.m)]
        return ["latents: " + "|".join(word.replace("\n", "\\n") for word in words)]


def read_context(path: str) -> str:
    """The text of a file; FileNotFoundError or ValueError that names it when there is none to read."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"context={path!r}: there is no such file")
    try:
        text = Path(path).read_text(encoding="utf-8")
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
