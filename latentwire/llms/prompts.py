"""Every prompt is built here, for training and evaluation alike: chat template, wording, anchor, BOS, labels.

    head            | slot                              | tail
    chat header,    | the only part that differs        | (the question, unless the slot holds it),
    instruction     | between conditions                | end of turn, assistant header, anchor "Answer:"

The head is constant, so its keys and values are computed once. The slot is text or latents. Source "prompt" puts the
whole content, question included, into the slot; sources "context" and "aware" put only the context there and the
question, as text, into the tail.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from latentwire.data.content import SOURCES, content, question_in_tail

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANCHOR = "Answer:"
IGNORE = -100  # label of every position that is not an answer token
AS_TEXT = {"add_special_tokens": False, "split_special_tokens": True}  # how a tokenizer reads users' text
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
_TODAY = datetime(2024, 7, 26)  # for every run
_DATE = re.compile(r"strftime_now\s*\(")
_DATES = re.compile(_DATE.pattern + r"\s*(['\"])(.*?)\1\s*\)")
_MARK = "\u241f"  # stands for the slot while the chat template is rendered


def ends_line(token: str) -> bool:
    """Whether a token of a vocabulary holds a new line, after which an answer is over."""
    return any(sign in token for sign in ("\u010a", "\n", "<0x0A>"))


@dataclass(frozen=True)
class Wording:
    """One way to ask. `shots` are worked examples (context, question, answer), shown as earlier turns of the chat.

    Without `chat` the prompt is plain text, although the tokenizer has a chat template.
    """

    instruction: str
    shots: tuple[tuple[str, str, str], ...] = ()
    chat: bool = True


_SHOTS = (
    ("The Amberley mill was built in 1794 beside the river Tarn. Its wheel drove four looms until 1911.",
     "When was the mill built?", "1794"),
    ("Dr. Ines Falk led the survey of the northern marsh. She counted 62 herons, far more than her brother had seen.",
     "Who counted the herons?", "Dr. Ines Falk"),
    ("Ferries leave Port Lowen twice a day because the channel is too shallow at low tide.",
     "Why do ferries leave only twice a day?", "the channel is too shallow at low tide"),
)  # fmt: skip

_INSTRUCTION = (
    "Read the context and answer the question. Reply with only the exact words of the answer, copied from the context, "
    "and nothing else."
)
WORDINGS = {
    "chat": Wording(_INSTRUCTION, _SHOTS),
    "plain": Wording(_INSTRUCTION, _SHOTS, chat=False),
    "zero_shot": Wording(_INSTRUCTION),
}


@dataclass(frozen=True)
class Labels:
    """One answer to learn. ids: its tokens, and what ends it; learned: which of them are labels; informative: the place
    of its first token that says anything."""

    ids: list[int]
    learned: list[bool]
    informative: int


class PromptBuilder:
    """Token ids of everything around the slot, for one LLM's tokenizer, one source and one wording.

    Raises ValueError for an unknown source or wording, and for a tokenizer without a token that ends an answer, or one
    that reads special tokens out of users' text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", source: str, wording: str):
        if source not in SOURCES:
            raise ValueError(f"source={source!r}: unknown; choose one of {', '.join(SOURCES)}")
        if wording not in WORDINGS:
            raise ValueError(f"wordings={wording!r}: unknown; choose one of {', '.join(WORDINGS)}")
        self.tokenizer, self.source = tokenizer, source
        # Not `all_special_tokens`, which leaves out those that have no role of their own, such as Qwen's <|im_start|>.
        self._special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._require_text_is_text()
        # Beside a question in the tail the label stands in the head: only the context itself is in the slot.
        slot = f"Context:{_MARK}" if question_in_tail(source) else _MARK
        self._before, self._after = self._render(WORDINGS[wording], slot).split(_MARK)
        self.head: tuple[int, ...] = tuple(self.ids(self._before))
        self.end_id = self._end_id(WORDINGS[wording])

    def ids(self, text: str) -> list[int]:
        """Token ids of a piece of the prompt's own; special tokens written in it count, none are added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def plain(self, text: str) -> list[int]:
        """Token ids of a user's text: a special token spelled in it is text like any other."""
        return self.tokenizer(text, **AS_TEXT)["input_ids"]

    def content_text(self, context: str, question: str) -> str:
        """The slot's full text: everything that a wire stands for."""
        return content(self.source, context, question).text

    def question_first_text(self, context: str, question: str) -> str:
        """The same content with the question first, so that a cut at M tokens keeps it."""
        return f" {context}" if question_in_tail(self.source) else f"Question: {question}\nContext: {context}"

    def tail(self, question: str) -> list[int]:
        """Token ids from the slot's end to the anchor's."""
        asked = f"\nQuestion: {question}" if question_in_tail(self.source) else ""
        if any(token in question for token in self._special):
            return self.plain(asked) + self.ids(self._after)
        return self.ids(asked + self._after)  # together: a tokenizer may join the last sign and the new line

    def answer_ids(self, answer: str) -> list[int]:
        """Token ids of an answer as it continues the anchor, without an end of sequence."""
        return self.plain(f" {answer.strip()}")

    def labels(self, answer: str, k: int) -> Labels:
        """The first k tokens of the answer, and what ends it in this wording, are learned.

        The LLM reads the whole answer, so the end is learned where it stands, however long the answer is. What lies
        between is mostly copied word by word, and long answers would outweigh short ones by it. The first token that
        says anything is learned even where k would leave it out.
        """
        ids = [*self.answer_ids(answer), self.end_id]
        informative = next((place for place, token in enumerate(ids) if self.informative(token)), 0)
        learned = [place < max(k, informative + 1) for place in range(len(ids) - 1)]
        return Labels(ids, [*learned, True], informative)

    def first_token_ids(self, answers: Sequence[str]) -> set[int]:
        """The first token of each reference: any of them counts as a right first token."""
        return {self.answer_ids(answer)[0] for answer in answers}

    def first_informative(self, ids: Sequence[int]) -> int | None:
        """The first token that says anything, None where there is none."""
        return next(filter(self.informative, ids), None)

    def informative(self, token: int) -> bool:
        """Whether a token says anything of an answer. White space alone says nothing, nor does a word's start: some
        tokenizers put one before every number."""
        return bool(self.tokenizer.decode([token]).strip())

    def _require_text_is_text(self) -> None:
        """ValueError where a special token that a user spells would count as one: in a unigram vocabulary it is a piece
        like any other."""
        for token in self._special:
            number, read = self.tokenizer.convert_tokens_to_ids(token), self.plain(token)
            if number != self.tokenizer.unk_token_id and number in read and len(read) <= 2:  # a word's start is one
                raise ValueError(
                    f"the tokenizer {self.tokenizer.name_or_path!r} reads {token!r} in a user's text as a control "
                    "token; choose another model"
                )

    def _end_id(self, wording: Wording) -> int:
        """What follows an answer: the end of the turn, or in plain text the empty line between two examples; where the
        vocabulary has no such token, the end of sequence. Raises ValueError where it has neither."""
        if self.tokenizer.chat_template is None or not wording.chat:
            vocabulary = self.tokenizer.convert_ids_to_tokens(self.ids("\n\n"))
            ends = [i for i, token in zip(self.ids("\n\n"), vocabulary, strict=True) if ends_line(token)]
        else:
            vocabulary = self.tokenizer.get_vocab()
            ends = [vocabulary[token] for token in END_OF_TURN if token in vocabulary]
        end = (ends or [self.tokenizer.eos_token_id])[0]
        if end is None:
            raise ValueError(
                f"the tokenizer {self.tokenizer.name_or_path!r} has no token that ends an answer (new line, end of "
                "turn, end of sequence); give it an eos_token, or choose another model"
            )
        return end

    def _render(self, wording: Wording, slot: str) -> str:
        turns = []
        for context, question, answer in wording.shots:
            turns.append((f"Context: {context}\nQuestion: {question}", f"{ANCHOR} {answer}"))
        if self.tokenizer.chat_template is None or not wording.chat:
            shown = "".join(f"{asked}\n{answered}\n\n" for asked, answered in turns)
            return f"{self.tokenizer.bos_token or ''}{wording.instruction}\n\n{shown}{slot}\n{ANCHOR}"
        messages = []
        for asked, answered in turns:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        messages.append({"role": "user", "content": slot})
        messages[0]["content"] = f"{wording.instruction}\n\n{messages[0]['content']}"
        # A template that prints today's date would make another prompt of the same run on the next day.
        dated = _DATES.sub(lambda m: repr(_TODAY.strftime(m[2])), self.tokenizer.get_chat_template())
        if _DATE.search(dated):
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path!r} asks for today's date in a way that no run can "
                "keep; give the format to strftime_now itself, or name the wording plain (WORDINGS=LLM=plain)"
            )
        rendered = self.tokenizer.apply_chat_template(
            messages, chat_template=dated, tokenize=False, add_generation_prompt=True
        )
        return rendered + ANCHOR
