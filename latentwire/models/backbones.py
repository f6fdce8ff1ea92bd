"""What reads the text before it is compressed: a pretrained encoder, an LLM's layers, or bytes from scratch.

Shapes: B batch, S states of a text, w width of a state.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from latentwire.data.content import Content, encoder_reads_question, reading
from latentwire.data.question import Question
from latentwire.llms.arithmetic import Shape, shape_in
from latentwire.llms.attention import without_cudnn
from latentwire.llms.offline import OFFLINE_ENCODERS, OFFLINE_LLMS, ensure_offline_model
from latentwire.llms.prompts import AS_TEXT
from latentwire.models.components import Component, component
from latentwire.models.lora import add_lora, read_origin, write_origin
from latentwire.utils.cli import Settings, option, reason
from latentwire.utils.surroundings import hub_answers

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

    from latentwire.models.packing import FewShapes

WEIGHT_DECAY = 0.01  # of backbones; all other parts are trained without
_PACKED = 16  # texts at once: more take more memory and are no faster
_OVERLAP = 128  # word pieces that neighbouring windows of a long text share
# Dropping attention weights rules out the fused kernels: twice the time on a CPU, and far more memory.
_ATTENTION_DROPOUT = {"attention_probs_dropout_prob", "attention_dropout"}
_BYTE_WIDTH, _BYTE_LAYERS, _BYTE_HEADS = 256, 4, 4


@dataclass(kw_only=True)
class BackboneSettings(Settings):
    """Of encoders with a pretrained backbone."""

    encoder_id: str = option(
        "offline:all-minilm-l6-v2", "pretrained encoder, or an LLM, which then looks both ways: offline:..., a folder, "
        "or a hub id",
    )  # fmt: skip
    lora: int = option(
        0, "rank of LoRA in the backbone's linear layers; its own weights stay; 0: all are trained", least=0
    )


@dataclass
class States:
    """hidden: [B, S, w]; mask: [B, S] bool; spans: per text, the characters [S_i, 2] of what the encoder reads that
    each state stands for, in reading order."""

    hidden: Tensor
    mask: Tensor
    spans: list[np.ndarray]


class PretrainedBackbone(nn.Module):
    """A pretrained encoder over word pieces, or the layers of an LLM, which then look both ways (as in LLM2Vec,
    arXiv:2404.05961). Texts beyond its window are read in overlapping windows, never cut.

    origin: with LoRA, where the frozen weights come from, as `write_origin` takes it.
    """

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"):
        super().__init__()
        without_cudnn()
        self.origin: dict | None = None
        self._causal = any(getattr(module, "is_causal", False) for module in model.modules())
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"  # some models count positions from padding on
        model.pooler = None  # sentence vectors are not used, and unused weights confuse data parallel training
        self.model, self.tokenizer = model, tokenizer
        self.width: int = model.config.hidden_size
        self.window = min(tokenizer.model_max_length, model.config.max_position_embeddings - _first_position(model))
        self._errors: dict[bool, float] = {}  # of packing, with and without autocast; each is asked for once

    def forward(self, questions: Sequence[Question], source: str) -> States:
        """States of the context and, where the encoder reads it, the question, word piece by word piece."""
        if self.training and self.model.device.type == "cpu" and self._packs_nearly():
            each = self._each(questions, source, self._packed)
            hidden, mask = (pad_sequence([getattr(s, of)[0] for s in each], True) for of in ("hidden", "mask"))
            return States(hidden, mask, [spans for states in each for spans in states.spans])
        encoded = self._tokenize(questions, source)
        device, hidden = self.model.device, self._read(encoded)
        chosen = _chosen_pieces(questions, source, encoded)
        rows = [hidden[torch.as_tensor(w, device=device), torch.as_tensor(p, device=device)] for _, w, p in chosen]
        lengths = torch.tensor([len(row) for row in rows], device=device)
        padded = pad_sequence(rows, batch_first=True)
        mask = torch.arange(padded.shape[1], device=device) < lengths[:, None]
        return States(padded, mask, [spans for spans, *_ in chosen])

    def each(self, questions: Sequence[Question], source: str) -> list[States]:
        """States of each question, whose bits do not depend on the others; only in evaluation mode. Many are read at
        once: a GPU, which chooses other sums for each shape, reads batches of few shapes; a CPU packs, where that keeps
        the bits that a text has alone (some processors round bfloat16 by a batch's shape)."""
        if not questions:
            return []
        if self._on_gpu:
            return self._each(questions, source, self._few_shapes)
        if self._packing_error() > 0:
            return [self([question], source) for question in questions]
        groups = [questions[i : i + _PACKED] for i in range(0, len(questions), _PACKED)]
        return [states for group in groups for states in self._each(group, source, self._packed)]

    @property
    def _on_gpu(self) -> bool:
        return self.model.device.type != "cpu"

    @cached_property
    def _few_shapes(self) -> "FewShapes":
        from latentwire.models.packing import FewShapes  # imports transformers, which is slow

        return FewShapes(self.tokenizer, self.window, self._read, self.model.device.type)

    def _read(self, encoded: Mapping[str, Tensor]) -> Tensor:
        """Last states [windows, L, w] of a padded batch."""
        device = self.model.device
        inputs = {key: encoded[key].to(device) for key in self.tokenizer.model_input_names if key in encoded}
        if self._causal:  # each position sees all of its text
            hidden = 1.0 - inputs["attention_mask"][:, None, None].to(self.model.dtype)  # [windows, 1, 1, L]
            seen = (hidden * torch.finfo(hidden.dtype).min).expand(-1, 1, hidden.shape[-1], -1)
            inputs |= {"attention_mask": seen, "use_cache": False}
        return self.model(**inputs).last_hidden_state

    def _packs_nearly(self) -> bool:
        """The same up to rounding in full precision, which is enough for training."""
        with torch.autocast(self.model.device.type, enabled=False):
            return self._packing_error() < 1e-3

    def _packing_error(self) -> float:
        from latentwire.models.packing import packing_error  # imports transformers, which is slow

        if self._causal:
            return math.inf
        precision = torch.is_autocast_enabled(self.model.device.type)
        if precision not in self._errors:
            self._errors[precision] = packing_error(self.model, self.window, _first_position(self.model))
        return self._errors[precision]

    def fits(self, question: Question, source: str) -> bool:
        """Whether a text is read in one window."""
        return len(self._tokenize([question], source)["input_ids"]) == 1

    def _packed(self, windows: list[dict]) -> list[Tensor]:
        """Last states [L_i, w] of each window, packed."""
        from latentwire.models.packing import packed_states

        texts = [
            {key: torch.tensor(ids, device=self.model.device) for key, ids in window.items() if key != "attention_mask"}
            for window in windows
        ]
        return packed_states(self.model, texts, _first_position(self.model))

    def _each(
        self, questions: Sequence[Question], source: str, read: Callable[[list[dict]], list[Tensor]]
    ) -> list[States]:
        """States of each question; read: gives the last states of windows of token ids."""
        encoded = self._tokenize(questions, source, padding=False, return_tensors=None)
        device, windows = self.model.device, range(len(encoded["input_ids"]))
        names = [key for key in self.tokenizer.model_input_names if key in encoded]
        hidden = read([{key: encoded[key][w] for key in names} for w in windows])
        begins = np.cumsum([0, *map(len, hidden)])  # of each window in the row of all
        everything = torch.cat(hidden)
        states = []
        for spans, window, position in _chosen_pieces(questions, source, encoded):
            row = everything[torch.as_tensor(begins[window] + position, device=device)][None]
            states.append(States(row, torch.ones(row.shape[:2], dtype=torch.bool, device=device), [spans]))
        return states

    def _tokenize(self, questions: Sequence[Question], source: str, **how: object) -> "BatchEncoding":
        settings = {"max_length": self.window, "return_overflowing_tokens": True, "return_offsets_mapping": True}
        settings |= {"padding": True, "return_tensors": "pt", "split_special_tokens": True} | how  # users' text is text
        contexts = [q.context for q in questions]
        stride = min(_OVERLAP, self.window // 4)  # the same in every batch
        if not encoder_reads_question(source):
            return self.tokenizer(contexts, truncation=True, stride=stride, **settings)
        asked = [q.question for q in questions]
        lengths = [len(ids) for ids in self.tokenizer(asked, **AS_TEXT)["input_ids"]]
        longest = max(range(len(asked)), key=lengths.__getitem__)
        if lengths[longest] > self.window // 2:
            raise ValueError(
                f"question {questions[longest].id}: {lengths[longest]} word pieces, and the encoder reads "
                f"{self.window} at once; a question may take half of them: shorten it, or choose another ENCODER_ID"
            )
        return self.tokenizer(asked, contexts, truncation="only_second", stride=stride, **settings)


def _first_position(model: "PreTrainedModel") -> int:
    """How many position embeddings a model never gives to a word piece: the RoBERTa family counts behind padding's."""
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


def _chosen_pieces(
    questions: Sequence[Question], source: str, encoded: "BatchEncoding"
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per text, its word pieces once each: spans [S, 2], windows [S], positions [S]."""
    pieces = [_Pieces(reading(source, q.context, q.question)) for q in questions]
    for window, text in enumerate(encoded["overflow_to_sample_mapping"]):
        pieces[text].add(window, np.asarray(encoded["offset_mapping"][window]), encoded.sequence_ids(window))
    return [p.best() for p in pieces]


class _Pieces:
    """The word pieces of one text, gathered from its windows."""

    def __init__(self, text: Content):
        self.text = text
        self.rows: list[np.ndarray] = []  # start, end, margin, window, position

    def add(self, window: int, offsets: np.ndarray, segments: list[int | None]) -> None:
        last = 0 if self.text.question_at is None else 1  # the segment that holds the context
        for segment in range(last + 1):
            at = np.array([i for i, s in enumerate(segments) if s == segment], dtype=int)
            base = self.text.context_at if segment == last else self.text.question_at
            margin = np.minimum(np.arange(len(at)), np.arange(len(at))[::-1])  # distance to the window's edge
            self.rows.append(np.column_stack([offsets[at] + base, margin, np.full(len(at), window), at]))

    def best(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each piece once, from the window that shows most on both sides of it."""
        rows = np.concatenate(self.rows)
        if not len(rows):
            raise ValueError(f"nothing to encode in {self.text.text[:40]!r}; give a text with letters or digits")
        rows = rows[np.lexsort((-rows[:, 2], rows[:, 1], rows[:, 0]))]
        first = np.ones(len(rows), dtype=bool)
        first[1:] = (rows[1:, :2] != rows[:-1, :2]).any(axis=1)
        rows = rows[first]
        return rows[:, :2], rows[:, 3], rows[:, 4]


class ByteBackbone(nn.Module):
    """A small transformer over UTF-8 bytes, trained from scratch."""

    def __init__(self):
        super().__init__()
        self.width = _BYTE_WIDTH
        self.embedding = nn.Embedding(256, _BYTE_WIDTH)
        layer = nn.TransformerEncoderLayer(
            _BYTE_WIDTH, _BYTE_HEADS, 4 * _BYTE_WIDTH, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        layer.self_attn.dropout = 0.0  # as in _ATTENTION_DROPOUT
        self.layers = nn.TransformerEncoder(
            layer, _BYTE_LAYERS, norm=nn.LayerNorm(_BYTE_WIDTH), enable_nested_tensor=False
        )

    def forward(self, questions: Sequence[Question], source: str) -> States:
        """A state for each byte of what is read."""
        texts = [reading(source, q.context, q.question).text for q in questions]
        device = self.embedding.weight.device
        rows = [torch.tensor(list(text.encode()), device=device) for text in texts]
        lengths = torch.tensor([len(row) for row in rows], device=device)
        ids = pad_sequence(rows, batch_first=True)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        hidden = self.embedding(ids) + _sinusoids(ids.shape[1], self.width).to(device)
        hidden = self.layers(hidden, src_key_padding_mask=~mask)
        ends = [np.cumsum([len(sign.encode()) for sign in text]) for text in texts]
        character = [np.searchsorted(e, np.arange(e[-1]), side="right") for e in ends]  # of each byte
        return States(hidden, mask, [np.column_stack([c, c + 1]) for c in character])

    def each(self, questions: Sequence[Question], source: str) -> list[States]:
        """States of each question in a batch of its own."""
        return [self([question], source) for question in questions]

    def fits(self, question: Question, source: str) -> bool:
        """Whether a text is read at once: any is."""
        return True


def load_backbone(encoder_id: str, lora: int = 0) -> PretrainedBackbone:
    """A pretrained encoder or LLM: "offline:all-minilm-l6-v2", a folder, or a hub id, with LoRA of a rank above 0.
    Raises ValueError with the remedy."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer  # slow to import

    where, how, remedy = _place(encoder_id)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **how)
        config = AutoConfig.from_pretrained(where, **how)
        for name in _ATTENTION_DROPOUT & set(config.to_dict()):
            setattr(config, name, 0.0)
        model, loaded = AutoModel.from_pretrained(
            where, config=config, dtype=torch.float32, output_loading_info=True, **how
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load the encoder {encoder_id!r} ({reason(error)}); {remedy}") from error
    missing = [key for key in loaded["missing_keys"] if "pooler" not in key]
    if missing:
        raise ValueError(f"the encoder {encoder_id!r} lacks the weights {sorted(missing)}; {remedy}")
    if not tokenizer.is_fast:
        raise ValueError(
            f"the encoder {encoder_id!r} has no fast tokenizer, which tells where a piece stands; {remedy}"
        )
    backbone = PretrainedBackbone(model, tokenizer)
    if lora:
        backbone.origin = {"encoder_id": encoder_id, "rank": lora, "sha256": add_lora(backbone.model, lora)}
    return backbone


@cache  # a plan of memory asks for each size of a batch
def backbone_shape(encoder_id: str) -> Shape:
    """The shape of what `load_backbone` would load, its weights counted; none is read. Raises as that does."""
    from transformers import AutoConfig, AutoModel  # slow to import

    where, how, remedy = _place(encoder_id)
    try:
        config = AutoConfig.from_pretrained(where, **how)
        with torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the encoder {encoder_id!r} ({reason(error)}); {remedy}") from error
    return replace(shape_in(config), counted=sum(weight.numel() for weight in model.parameters()))


def _place(encoder_id: str) -> tuple[str, dict, str]:
    """Where transformers finds an encoder, how, and what to do when it does not."""
    offline = OFFLINE_ENCODERS | OFFLINE_LLMS
    remedy = f"set ENCODER_ID to a hub id of an encoder or an LLM, a folder, or one of {', '.join(offline)}"
    if encoder_id.startswith("offline:") and encoder_id not in offline:
        raise ValueError(f"unknown offline encoder {encoder_id!r}; {remedy}")
    where = str(ensure_offline_model(encoder_id)) if encoder_id in offline else encoder_id
    return where, {"local_files_only": Path(where).is_dir() or not hub_answers(), "trust_remote_code": False}, remedy


def save_backbone_shape(backbone: PretrainedBackbone, folder: Path) -> None:
    """Config and tokenizer: with a state dict, all that is needed to rebuild it without the hub. With LoRA, where its
    frozen weights come from."""
    backbone.model.config.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    if backbone.origin:
        write_origin(folder, backbone.origin)


def backbone_of_shape(folder: Path) -> PretrainedBackbone:
    """The reverse of `save_backbone_shape`, with random weights; with LoRA its frozen weights are loaded again. Raises
    ValueError if the folder cannot be read, or where those are others."""
    if made := read_origin(folder):
        with torch.device("cpu"):  # whoever rebuilds without weights does so on the meta device
            try:
                found = load_backbone(made["encoder_id"], made["rank"])
            except ValueError as error:
                raise ValueError(f"{folder} needs {made['encoder_id']!r} as it was trained on it: {error}") from error
        if found.origin["sha256"] != made["sha256"]:
            raise ValueError(
                f"{folder} was trained on other weights of {made['encoder_id']}; restore them or train again"
            )
        return found
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    how = {"local_files_only": True, "trust_remote_code": False}
    try:
        config, tokenizer = (kind.from_pretrained(folder, **how) for kind in (AutoConfig, AutoTokenizer))
        model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} cannot be read ({reason(error)}); restore it or train again") from error
    return PretrainedBackbone(model, tokenizer)


class OnPretrained:
    """What encoders on a pretrained backbone, `backbone`, share: how a checkpoint keeps it, and how it is trained."""

    @classmethod
    def of_shape(cls, tokenizer: "PreTrainedTokenizerBase", d_z: int, folder: Path, **shape: object) -> nn.Module:
        """As `Encoder.of_shape`."""
        return cls(tokenizer, d_z, backbone=backbone_of_shape(folder / "backbone"), **shape)

    def save_parts(self, folder: Path) -> None:
        """As `Encoder.save_parts`."""
        save_backbone_shape(self.backbone, folder / "backbone")

    def ready(self, questions: Sequence[Question], source: str) -> list[dict[str, States]]:
        """As `Encoder.ready`: the backbone's states."""
        return [{"states": states} for states in self.backbone.each(questions, source)]

    def fits(self, question: Question, source: str) -> bool:
        """As `Encoder.fits`."""
        return self.backbone.fits(question, source)

    def backbone_component(self) -> Component:
        """At a learning rate of its own, with weight decay; with LoRA, its matrices alone."""
        return component("backbone", self.backbone, rate="encoder_lr", weight_decay=WEIGHT_DECAY)


def _sinusoids(length: int, width: int) -> Tensor:
    """Positions [length, width] (Vaswani et al. 2017, section 3.5): no longest text."""
    rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angle = torch.arange(length)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)
