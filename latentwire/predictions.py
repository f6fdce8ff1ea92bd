"""predictions.jsonl: what is finished, so that it is never computed twice."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from latentwire.conditions import CONDITIONS, Condition
from latentwire.results import row_key


class Predictions:
    """Appended batch by batch; a line cut off by a kill is dropped and computed again.

    Raises ValueError naming the line when one that was finished is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        written = path.read_bytes() if path.is_file() else b""
        whole = written[: written.rfind(b"\n") + 1]
        if len(whole) < len(written):
            os.truncate(path, len(whole))
        self._lines: dict[tuple, dict[str, dict]] = {}
        for number, text in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                line = json.loads(text)
            except ValueError as error:  # not JSON, or not UTF-8
                raise ValueError(f"{path}:{number} is damaged ({error}); use --fresh_eval to start over") from error
            self.of(line)[line["id"]] = line

    def of(self, row: dict) -> dict[str, dict]:
        """Finished lines, by question id, of the condition, M and LLM that `row` names."""
        return self._lines.setdefault(row_key(row), {})

    def finished(
        self, conditions: Sequence[tuple[Condition, int]], default_m: int, llms: Sequence[str], ids: set[str]
    ) -> list[tuple[Condition, int]]:
        """Conditions beyond the given ones that hold all questions for all LLMs: a later call keeps their rows."""
        wanted = {(c.name, m if "m" in c.uses else None) for c, m in conditions}
        found = dict.fromkeys((name, m) for name, m, _ in self._lines)
        return [
            (CONDITIONS[name], m or default_m)
            for name, m in found
            if (name, m) not in wanted
            and all(
                ids <= self.of({"condition": name, "m": m, "llm": llm}).keys()
                for llm in (llms if CONDITIONS[name].by_llm else [None])
            )
        ]

    def append(self, lines: list[dict]) -> None:
        """Write lines so that they survive a crash of the machine."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
