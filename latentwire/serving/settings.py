"""Settings of the programs that send, read and serve wires."""

import os
from dataclasses import dataclass

from latentwire.models.wire import CODECS
from latentwire.utils.cli import Settings, option, require

SHIPPED = "checkpoints/latentwire_m32"
ROLES = ("both", "encoder", "reader")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(kw_only=True)
class CheckpointSettings(Settings):
    """Which checkpoint, and where it runs."""

    ckpt: str = option(SHIPPED, "checkpoint: a folder or a hub id; the default is the one that ships here")
    device: str = option("", "cpu, cuda, cuda:1, ...; default: cuda where there is one")


@dataclass(kw_only=True)
class SendSettings(CheckpointSettings):
    """Encode a text to a wire, on standard output. Without --context: JSON lines in ("context", "question", further
    keys stay), and JSON lines out (the same with "wire" in base64 in the context's place)."""

    context: str = option("", "file with the text; - is standard input", env="")
    question: str = option("", "what will be asked, for checkpoints of source prompt", env="")
    out: str = option("", "file for the wire; default: standard output", env="")
    latent_len: int | None = option(None, "M, latents per block; default: the checkpoint's", least=1)
    budget: float | None = option(None, "latents per 100 words, instead of M", above=0)
    blocks: int | None = option(None, "most parts of a long text; default: 1 if the question is known", least=1)
    codec: str = option("fp16", "wire codec", choices=tuple(CODECS))

    def check(self) -> None:
        require(bool(self.context) or not self.question, "question", self.question, "needs --context FILE beside it")
        require(bool(self.context) or not self.out, "out", self.out, "JSON lines go to standard output; leave it out")


@dataclass(kw_only=True)
class AnswerSettings(CheckpointSettings):
    """Answer from a wire: a file, or standard input. JSON lines as send.py makes them ("wire", "question", further keys
    stay) come out with "answer" in the wire's place."""

    wire: str = option("-", "the wire, or JSON lines; - is standard input", env="", positional=True)
    llm: str = option("", "which of the checkpoint's LLMs reads; default: its first", env="")
    dtype: str = option("", "of the LLM; default: float32 on a CPU, bfloat16 on a GPU")
    question: str = option("", "what is asked, for checkpoints of source context", env="")
    max_new_tokens: int = option(12, "longest answer, in tokens", least=1)
    batch_size: int = option(16, "wires per batch", least=1)


@dataclass(kw_only=True)
class InspectSettings(CheckpointSettings):
    """Say what a wire holds: header, sizes, checksum, words, and after how many questions it has paid for itself."""

    wire: str = option("-", "the wire; - is standard input", env="", positional=True)
    json: bool = option(False, "one JSON object on standard output", env="")


@dataclass(kw_only=True)
class ServeSettings(CheckpointSettings):
    """An HTTP service that encodes texts and answers from wires, and its page."""

    host: str = option("127.0.0.1", "address to listen on; any but this machine's own needs LATENTWIRE_TOKEN")
    port: int = option(8000, "port to listen on; 0: any free one", least=0)
    role: str = option("both", "what this process does: encode, read, or both", choices=ROLES)
    llm: str = option("", "comma-separated LLMs that read here; default: all of the checkpoint's", env="")
    dtype: str = option("", "of the LLMs; default: float32 on a CPU, bfloat16 on a GPU")
    page: bool = option(True, "show the page at /; needs role both")
    batch: int = option(16, "texts or wires worked on together at most", least=1)
    queue: int = option(256, "texts or wires that may wait; more are told to come back later (429)", least=1)
    body_bytes: int = option(1_000_000, "longest body of a request (413)", least=1)
    items: int = option(64, "texts or wires in one request at most (413)", least=1)

    def check(self) -> None:
        require(self.queue >= self.items, "queue", self.queue, f"a request of items={self.items} would never fit")
        require(
            self.host in LOOPBACK or bool(os.environ.get("LATENTWIRE_TOKEN")), "host", self.host,
            "anybody could use it: set LATENTWIRE_TOKEN to a secret that clients send, or listen on 127.0.0.1",
        )  # fmt: skip


@dataclass(kw_only=True)
class LoadSettings(Settings):
    """A load test of a service on this machine: requests per second and times at several numbers of clients."""

    url: str = option("http://127.0.0.1:8000", "the service; only this machine's own addresses are allowed")
    clients: str = option("1,8,32", "numbers of clients, one after the other")
    seconds: float = option(20.0, "how long each number of clients asks", above=0)
    llm: str = option("", "LLM that answers; default: the service's first", env="")
    save_dir: str = option("runs/load", "output folder", env="OUTPUT_DIR")


PROGRAMS = {
    "send": SendSettings, "answer": AnswerSettings, "inspect_wire": InspectSettings, "serve": ServeSettings,
    "load_test": LoadSettings,
}  # fmt: skip
