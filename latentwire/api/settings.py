"""Settings of the programs that send, read and inspect wires, of corpora, long documents and serving engines."""

from dataclasses import dataclass
from pathlib import Path

from latentwire.llms.known import DTYPES
from latentwire.models.wire import CODECS
from latentwire.utils.cli import Settings, is_file, option, require

SHIPPED = "checkpoints/latentwire_m32"


def is_folder(name: str) -> bool:
    """Whether a checkpoint's name is meant as a folder: a hub id is OWNER/NAME, and there is no folder OWNER here."""
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).parent.is_dir()


@dataclass(kw_only=True)
class CheckpointSettings(Settings):
    """Which checkpoint, and where it runs."""

    ckpt: str = option(
        SHIPPED, "checkpoint: a folder or a hub id; the default is the one that ships here", there=is_folder
    )
    device: str = option("", "cpu, cuda, cuda:1, ...; default: cuda where there is one")


@dataclass(kw_only=True)
class EncodingSettings(CheckpointSettings):
    """How texts become wires."""

    latent_len: int | None = option(None, "M, latents per block; default: the checkpoint's", least=1)
    budget: float | None = option(None, "latents per 100 words, instead of M", above=0)
    blocks: int | None = option(None, "most parts of a long text; default: 1 if the question is known", least=1)
    codec: str = option("fp16", "wire codec", choices=tuple(CODECS))

    @property
    def how(self) -> dict:
        """As arguments of `LatentWire.encode`."""
        return {"m": self.latent_len, "codec": self.codec, "budget": self.budget, "blocks": self.blocks}


@dataclass(kw_only=True)
class SendSettings(EncodingSettings):
    """Encode a text to a wire, on standard output. Without --context: JSON lines in ("context", "question", further
    keys stay), and JSON lines out (the same with "wire" in base64 in the context's place)."""

    context: str = option("", "file with the text; - is standard input", env="", there=is_file)
    question: str = option("", "what will be asked, for checkpoints of source prompt or aware", env="")
    out: str = option("", "file for the wire; default: standard output", env="")

    def check(self) -> None:
        require(bool(self.context) or not self.question, "question", self.question, "needs --context FILE beside it")
        require(bool(self.context) or not self.out, "out", self.out, "JSON lines go to standard output; leave it out")


@dataclass(kw_only=True)
class CorpusSettings(EncodingSettings):
    """Encode many documents to a folder of Parquet files, by Ray Data on this machine or on a cluster (RAY_ADDRESS).
    Killed at any time, the same command continues. A row that is damaged is named, and kept out (errors.parquet)."""

    input: str = option(
        "", "files (.jsonl, .csv, .parquet, SQuAD's .json, .txt; .gz), folders, patterns, a data set's name, or a hub "
        "id (ID or ID:CONFIGURATION); several with commas between", env="",
    )  # fmt: skip
    output: str = option("", "folder of the corpus", env="")
    split: str = option("train", "which split, of a data set or a hub id")
    text_column: str = option("text", "column of the documents")
    question_column: str = option("", "column of what will be asked, for checkpoints of source prompt or aware")
    id_column: str = option("", "column of the documents' ids; default: FILE:ROW")
    keep_words: bool = option(True, "keep the words that the latents came from")
    shard_rows: int = option(512, "rows of one Parquet file", least=1)
    workers: int | None = option(None, "encoders at work; default: one per GPU, or one per processor", least=1)
    worker_gpus: float | None = option(
        None, "GPUs of an encoder, also a part of one; default: 1 where there are any, else 0", least=0
    )

    def check(self) -> None:
        require(bool(self.input), "input", self.input, "name files, a data set or a hub id")
        require(bool(self.output), "output", self.output, "name a folder")


@dataclass(kw_only=True)
class AnswerSettings(CheckpointSettings):
    """Answer from a wire: a file, or standard input. JSON lines as send.py makes them ("wire", "question", further keys
    stay) come out with "answer" in the wire's place."""

    wire: str = option("-", "the wire, or JSON lines; - is standard input", env="", positional=True, there=is_file)
    corpus: str = option("", "folder of a corpus (encode_corpus.py), instead of a wire", env="", there=bool)
    id: str = option("", "which document of the corpus", env="")
    llm: str = option("", "which of the checkpoint's LLMs reads; default: its first", env="")
    dtype: str = option("", "of the LLM; default: float32 on a CPU, bfloat16 on a GPU", choices=DTYPES)
    question: str = option("", "what is asked, for checkpoints of source context or aware", env="")
    max_new_tokens: int = option(12, "longest answer, in tokens", least=1)
    batch_size: int = option(16, "wires per batch", least=1)

    def check(self) -> None:
        require(bool(self.corpus) == bool(self.id), "id", self.id, "--corpus FOLDER and --id X go together")
        require(self.wire == "-" or not self.corpus, "wire", self.wire, "the corpus has the wire; leave one out")


@dataclass(kw_only=True)
class InspectSettings(CheckpointSettings):
    """Say what a wire holds: header, sizes, checksum, words, and after how many questions it has paid for itself."""

    wire: str = option("-", "the wire; - is standard input", env="", positional=True, there=is_file)
    json: bool = option(False, "one JSON object on standard output", env="")


@dataclass(kw_only=True)
class DocumentSettings(EncodingSettings):
    """Answers from the wire of one long document."""

    words: int = option(5000, "length of the document", least=100, env="")
    each: int = option(1, "questions on each passage", least=1, env="")
    dtype: str = option("", "of the LLMs; default: float32 on a CPU, bfloat16 on a GPU", choices=DTYPES)
    save_dir: str = option("runs/documents", "output folder", env="OUTPUT_DIR")


@dataclass(kw_only=True)
class EngineSettings(CheckpointSettings):
    """Answers of vLLM from wires, beside those of transformers."""

    llm: str = option("", "which of the checkpoint's LLMs reads; default: its first", env="")
    samples: int = option(20, "questions of the sample set", least=1)
    max_new_tokens: int = option(12, "longest answer, in tokens", least=1)


PROGRAMS = {
    "send": SendSettings, "answer": AnswerSettings, "inspect_wire": InspectSettings, "documents": DocumentSettings,
    "engine": EngineSettings, "encode_corpus": CorpusSettings,
}  # fmt: skip
