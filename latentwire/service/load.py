"""A load test: what a service on this machine bears, at several numbers of clients that ask one after the other.

Each client sends its next request when it has the answer to its last, so the service decides the pace (a closed loop).
Two services, one of them with BATCH=1, are measured in turns, forwards and backwards.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
from matplotlib.figure import Figure

from latentwire.data.content import encoder_reads_question, question_in_tail
from latentwire.data.question import subset
from latentwire.data.squad import load
from latentwire.reporting.tables import markdown
from latentwire.service.settings import LoadSettings, secret
from latentwire.utils.cli import SCHEMA, reason
from latentwire.utils.files import write_json, write_text
from latentwire.utils.machine import git_sha, machine, machine_line

_TEXTS = 40  # of the sample set, asked in turns
_PATIENCE_S = 120.0  # for one response
_KINDS = ("encode", "answer")
_SHOWN = {"batched": "requests worked on together", "one": "one at a time"}


def run_load(config: LoadSettings) -> dict:
    """Measure, and leave results.json, table.md and load.png in the output folder; returns the results.

    Raises ValueError where there is no service, or one that cannot both encode and answer.
    """
    results = asyncio.run(_measured(config))
    folder = Path(config.save_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    write_text(folder / "table.md", table(results))
    chart(results).savefig(folder / "load.png", dpi=150)
    return results


async def _measured(config: LoadSettings) -> dict:
    urls = {"batched": config.url} | ({"one": config.one_url} if config.one_url else {})
    services = {name: _Target(url, config.llm) for name, url in urls.items()}
    clients = [int(number) for number in config.clients.split(",")]
    try:
        for target in services.values():
            await target.begin(max(clients))
        rows: dict[tuple, _Asked] = {}
        order = [*services, *reversed(services)]
        for number in clients:
            for kind in _KINDS:
                for name in order:
                    asked = await services[name].ask(kind, number, config.seconds / 2)
                    rows[name, kind, number] = asked + rows.get((name, kind, number), _Asked())
        found = [asked.row(*key) for key, asked in rows.items()]
        return {
            "schema": SCHEMA, "git": git_sha(), "machine": machine(), "seconds": config.seconds,
            "services": {name: await target.end() for name, target in services.items()},
            "rows": found, "ratios": _ratios(found),
        }  # fmt: skip
    finally:
        for target in services.values():
            await target.http.aclose()


class _Asked:
    """Requests of one kind, by one number of clients, to one service."""

    def __init__(self, times: Sequence[float] = (), errors: Mapping | None = None, seconds: float = 0.0):
        self.times, self.errors, self.seconds = list(times), Counter(errors), seconds

    def __add__(self, other: "_Asked") -> "_Asked":
        return _Asked(self.times + other.times, self.errors + other.errors, self.seconds + other.seconds)

    def row(self, service: str, kind: str, clients: int) -> dict:
        """per_second: of good ones; times in milliseconds, None where there is none; errors: by status."""
        return {
            "service": service, "kind": kind, "clients": clients, "requests": len(self.times),
            "per_second": len(self.times) / self.seconds, "p50_ms": _quantile(self.times, 0.5),
            "p95_ms": _quantile(self.times, 0.95), "errors": dict(self.errors),
        }  # fmt: skip


class _Target:
    """One service under test."""

    def __init__(self, url: str, llm: str):
        token = secret()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self.url, self.llm = url, llm
        self.http = httpx.AsyncClient(
            base_url=url, headers=headers, limits=limits, timeout=_PATIENCE_S, trust_env=False  # no proxy
        )  # fmt: skip
        self.bodies: dict[str, list[dict]] = {}

    async def begin(self, most: int) -> None:
        """What will be asked; each request once, and then so many clients at once, so that all is warm."""
        self.about = (await self._good("GET", "/v1/models")).json()
        readers = self.about["readers"]
        if self.about["role"] != "both" or (self.llm and self.llm not in readers):
            raise ValueError(
                f"url={self.url!r}: role {self.about['role']}, LLMs {', '.join(readers)}; needs both roles"
            )
        self.llm = self.llm or next(iter(readers))
        some = subset(load("sample", "dev").questions, _TEXTS, seed=0)
        known, later = encoder_reads_question(self.about["source"]), question_in_tail(self.about["source"])
        self.bodies["encode"] = [{"context": q.context} | ({"question": q.question} if known else {}) for q in some]
        self.bodies["answer"] = []
        for q, body in zip(some, self.bodies["encode"], strict=True):
            asked = {"wire": (await self._good("POST", "/v1/encode", json=body)).json()["wire"], "llm": self.llm}
            self.bodies["answer"].append(asked | {"question": q.question} if later else asked)
        await self._good("POST", "/v1/answer", json=self.bodies["answer"][0])
        # The largest batches take their memory now: what grows after that is a leak.
        self.warm = {kind: await self.ask(kind, most, 0.1) for kind in _KINDS}
        self.before = self._memory()

    async def end(self) -> dict:
        """What the service is, and its memory before and after, in bytes (None where it cannot be seen)."""
        warm = {kind: {"requests": len(asked.times), "errors": dict(asked.errors)} for kind, asked in self.warm.items()}
        memory = {"rss_before": self.before, "rss_after": self._memory()}
        return {"about": self.about, "llm": self.llm, "warm": warm, **memory}

    async def ask(self, kind: str, clients: int, seconds: float) -> _Asked:
        """So many clients, for so long; requests that run at the end are waited for and counted."""
        asked, numbers, begun = _Asked(), count(), time.perf_counter()

        async def client() -> None:
            while time.perf_counter() < begun + seconds:
                body, sent = self.bodies[kind][next(numbers) % _TEXTS], time.perf_counter()
                try:
                    status = (await self.http.post(f"/v1/{kind}", json=body)).status_code
                except httpx.HTTPError as error:
                    status = type(error).__name__
                if status == httpx.codes.OK:
                    asked.times.append(time.perf_counter() - sent)
                else:
                    asked.errors[str(status)] += 1
                    await asyncio.sleep(0.1)  # a service that fails at once is not asked a million times

        await asyncio.gather(*(client() for _ in range(clients)))
        asked.seconds = time.perf_counter() - begun
        return asked

    async def _good(self, method: str, path: str, **how: object) -> httpx.Response:
        """A response of status 200; ValueError for any other, and for none."""
        try:
            found = await self.http.request(method, path, **how)
        except httpx.HTTPError as error:
            raise ValueError(f"url={self.url!r}: no service there ({reason(error)}); start scripts/serve.sh") from error
        if found.status_code != httpx.codes.OK:
            raise ValueError(f"url={self.url!r}: {path} says {found.status_code}: {found.text[:200]}")
        return found

    def _memory(self) -> int | None:
        port = urlsplit(self.url).port or 80
        listeners = [c.pid for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port]
        return psutil.Process(listeners[0]).memory_info().rss if listeners and listeners[0] else None


def _quantile(times: Sequence[float], share: float) -> float | None:
    """Milliseconds that this share of the requests took at most."""
    return 1000 * sorted(times)[max(0, math.ceil(share * len(times)) - 1)] if times else None


def _ratios(rows: Sequence[Mapping]) -> list[dict]:
    """Batched against one at a time: how often as many requests per second, and how often as long p95."""
    one = {(row["kind"], row["clients"]): row for row in rows if row["service"] == "one"}
    found = []
    for row in rows:
        other = one.get((row["kind"], row["clients"]))
        if row["service"] == "batched" and other and row["requests"] and other["requests"]:
            ratios = {key: row[key] / other[key] for key in ("per_second", "p95_ms")}
            found.append({"kind": row["kind"], "clients": row["clients"]} | ratios)
    return found


def table(results: Mapping) -> str:
    """Markdown: what was measured, and the ratios."""
    head = ("service", "request", "clients", "requests", "per second", "p50 ms", "p95 ms", "errors")
    rows = [
        (_SHOWN[row["service"]], row["kind"], row["clients"], row["requests"], f"{row['per_second']:.2f}",
         *("" if row[key] is None else f"{row[key]:.0f}" for key in ("p50_ms", "p95_ms")),
         ", ".join(f"{number} x {status}" for status, number in row["errors"].items()) or "none")
        for row in results["rows"]
    ]  # fmt: skip
    about = f"{machine_line(results['machine'])}; commit {results['git']}; {results['seconds']:g} s per line."
    lines = [about, "", *markdown(head, rows)]
    if results["ratios"]:
        head = ("request", "clients", "requests per second", "p95")
        rows = [
            (row["kind"], row["clients"], f"{row['per_second']:.2f}", f"{row['p95_ms']:.2f}")
            for row in results["ratios"]
        ]
        lines += ["", "Together, as a multiple of one at a time:", "", *markdown(head, rows)]
    lines.append("")
    for name, found in results["services"].items():
        sizes = [found["rss_before"], found["rss_after"]]
        memory = (
            "not seen" if None in sizes else " before, ".join(f"{size / 2**20:,.0f} MiB" for size in sizes) + " after"
        )
        lines.append(f"Memory of the service, {_SHOWN[name]} ({found['llm']} answers): {memory}.")
    return "\n".join(lines) + "\n"


def chart(results: Mapping) -> Figure:
    """Requests per second and p95 against the number of clients."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = {"per_second": "requests per second", "p95_ms": "p95, ms"}
    for panels, (key, label) in zip(figure.subplots(2, len(_KINDS), squeeze=False), axes.items(), strict=True):
        for panel, kind in zip(panels, _KINDS, strict=True):
            for name in results["services"]:
                rows = [row for row in results["rows"] if (row["service"], row["kind"]) == (name, kind)]
                rows = [row for row in rows if row[key] is not None]
                panel.plot([row["clients"] for row in rows], [row[key] for row in rows], "o-", label=_SHOWN[name])
            panel.set_xscale("log", base=2)
            panel.set_xticks(sorted({row["clients"] for row in results["rows"]}))
            panel.xaxis.set_major_formatter("{x:.0f}")
            panel.set_ylim(0, 1.1 * max([row[key] or 0 for row in results["rows"] if row["kind"] == kind]) or 1)
            panel.set(title=kind, xlabel="clients", ylabel=label)
            panel.legend(fontsize=8)
    return figure
