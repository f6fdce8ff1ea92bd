"""Settings of the service and of its load test."""

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from latentwire.api.settings import CheckpointSettings
from latentwire.llms.known import DTYPES
from latentwire.utils.cli import Settings, option, require

ROLES = ("both", "encoder", "reader")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LAST_PORT = 65535
MOST_CLIENTS, LONGEST_LOAD_S = 256, 600  # of a load test


def secret() -> str:
    """LATENTWIRE_TOKEN, without the line end that a file brings along; "" for none."""
    return os.environ.get("LATENTWIRE_TOKEN", "").strip()


@dataclass(kw_only=True)
class ServeSettings(CheckpointSettings):
    """An HTTP service that encodes texts and answers from wires, and its page."""

    host: str = option("127.0.0.1", "address to listen on; others than this need LATENTWIRE_TOKEN", env="BIND")
    port: int = option(8000, "port to listen on; 0: any free one", least=0)
    role: str = option("both", "what this process does: encode, read, or both", choices=ROLES)
    llm: str = option("", "comma-separated LLMs that read here; default: all of the checkpoint's", env="")
    dtype: str = option("", "of the LLMs; default: float32 on a CPU, bfloat16 on a GPU", choices=DTYPES)
    page: bool = option(True, "show the page at /; needs role both")
    batch: int = option(16, "texts or wires worked on together at most", least=1)
    queue: int = option(256, "texts or wires that may wait; more are told to come back later (429)", least=1)
    body_bytes: int = option(2_000_000, "longest body of a request (413)", least=1)
    items: int = option(64, "texts or wires in one request at most (413)", least=1)

    def check(self) -> None:
        require(self.queue >= self.items, "queue", self.queue, f"a request of items={self.items} would never fit")
        require(self.port <= LAST_PORT, "port", self.port, f"at most {LAST_PORT}")
        require(
            self.host in LOOPBACK or bool(secret()), "host", self.host,
            "anybody could use it: set LATENTWIRE_TOKEN to a secret that clients send, or listen on 127.0.0.1",
        )  # fmt: skip


@dataclass(kw_only=True)
class LoadSettings(Settings):
    """A load test of a service on this machine: requests per second and times at several numbers of clients."""

    url: str = option("http://127.0.0.1:8000", "the service; only this machine's own addresses are allowed")
    one_url: str = option("", "a second service that works on one request at a time (BATCH=1), to compare with")
    clients: str = option("1,8,32", "numbers of clients, one after the other")
    # SECONDS is bash's own.
    seconds: float = option(20.0, "how long each number of clients asks", env="LOAD_SECONDS", above=0)
    llm: str = option("", "LLM that answers; default: the service's first", env="")
    save_dir: str = option("runs/load", "output folder", env="OUTPUT_DIR")

    def check(self) -> None:
        for name in ("url", "one_url"):
            value = getattr(self, name)
            host = urlsplit(value).hostname
            remedy = "a load test asks this machine only: http://127.0.0.1:PORT"
            require(host in LOOPBACK or (name == "one_url" and not value), name, value, remedy)
        counts = self.clients.split(",")
        fine = all(count.strip().isdigit() and 0 < int(count) <= MOST_CLIENTS for count in counts)
        require(fine, "clients", self.clients, f"numbers from 1 to {MOST_CLIENTS} with commas between them")
        require(self.seconds <= LONGEST_LOAD_S, "seconds", self.seconds, f"at most {LONGEST_LOAD_S}")


PROGRAMS = {"serve": ServeSettings, "load_test": LoadSettings}
