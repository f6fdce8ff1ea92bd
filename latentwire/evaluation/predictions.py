"""predictions.jsonl: what is finished, so that it is never computed twice."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from latentwire.conditions.base import CONDITIONS, Condition
from latentwire.evaluation.results import row_key
from latentwire.utils.cli import require
from latentwire.utils.files import append_lines, drop_cut_line, json_line, read_json, read_lines, write_text

_KEYS = ("condition", "m", "llm", "id")  # of every line
_OF_CHECKPOINT = {"wire", "untrained", "tuned"}  # what a condition may use that another evaluation has otherwise
# Unless these are the same: what config.json calls the weights, by what a condition uses.
WEIGHTS = {"wire": "checkpoint_sha256", "tuned": "tuned_sha256"}
_FREE = ("ckpt", "checkpoint_sha256", "tuned", "tuned_sha256", "latent_len", "batch_size", "device")  # M is the line's


class Predictions:
    """Appended batch by batch; a line cut off by a kill is dropped and computed again.

    read_only: the file stays as it is, which another process may be writing.

    Raises ValueError naming the line when one that was finished is damaged.
    """

    def __init__(self, path: Path, read_only: bool = False):
        self.path = path
        self._lines: dict[tuple, dict[str, dict]] = {}
        self.keep(found := read_lines(path))
        if read_only:
            return
        if not path.is_file() and found:  # a record's, packed, which further lines are added to
            write_text(path, "".join(map(json_line, found)))
        drop_cut_line(path)

    def of(self, row: dict) -> dict[str, dict]:
        """Finished lines, by question id, of the condition, M and LLM that `row` names."""
        return self._lines.setdefault(row_key(row), {})

    def finished(
        self, conditions: Sequence[tuple[Condition, int]], default_m: int, llms: Sequence[str], ids: set[str]
    ) -> list[tuple[Condition, int]]:
        """Conditions beyond the given ones that hold all questions for all LLMs: a later call keeps their rows.

        Raises ValueError for a line of a condition that is not known.
        """
        wanted = {(c.name, m if "m" in c.uses else None) for c, m in conditions}
        found = dict.fromkeys((name, m) for name, m, _ in self._lines)
        others = [(CONDITIONS.pick(name), m) for name, m in found if (name, m) not in wanted]
        return [
            (other, m or default_m)
            for other, m in others
            if all(
                ids <= self.of({"condition": other.name, "m": m, "llm": llm}).keys()
                for llm in (llms if other.by_llm else [None])
            )
        ]

    def append(self, lines: list[dict]) -> None:
        """Write lines so that they survive a crash of the machine."""
        append_lines(self.path, lines)
        self.keep(lines)

    def keep(self, lines: list[dict]) -> None:
        """Take lines for finished, and write nothing."""
        for line in lines:
            lacking = [key for key in _KEYS if key not in line]
            remedy = f"a line lacks {', '.join(lacking)}; evaluate again with --fresh_eval"
            require(not lacking, "run", str(self.path), remedy)
            self.of(line)[line["id"]] = line


def reusable(
    folder: str, identity: Mapping, conditions: Sequence[tuple[Condition, int]], llms: Sequence[str]
) -> list[dict]:
    """Lines of the evaluation in `folder` for those of the conditions that read no checkpoint, or the same one, each
    with where it is `taken_from`.

    Raises FileNotFoundError if there is none, ValueError naming what differs from the evaluation of this identity.
    """
    lines = read_lines(Path(folder) / "predictions.jsonl")
    if not lines:
        raise FileNotFoundError(f"reuse={folder!r} holds no predictions.jsonl; name the folder of an evaluation")
    record = read_json(Path(folder) / "config.json")
    before, now = (_comparable(config, llms) for config in (record["config"], identity))
    changes = "; ".join(f"{k}: {before.get(k)!r} there, {now[k]!r} now" for k in now if now[k] != before.get(k))
    require(not changes, "reuse", folder, f"is an evaluation of something else ({changes}); name another")
    where = (
        f"{folder}, commit {record['git']}, {', '.join(record['machine']['gpus']) or record['machine']['processor']}"
    )
    same = {part for part, files in WEIGHTS.items() if identity[files] and identity[files] == record["config"][files]}
    keys = {
        (condition.name, m if "m" in condition.uses else None, llm)
        for condition, m in conditions
        if not (_OF_CHECKPOINT - same) & set(condition.uses)
        for llm in (llms if condition.by_llm else [None])
    }
    return [{"taken_from": where} | line for line in lines if row_key(line) in keys]


def _comparable(config: Mapping, llms: Sequence[str]) -> dict:
    """What two evaluations must have in common to share answers of these LLMs, as JSON gives it back."""
    kept = {name: value for name, value in config.items() if name not in _FREE}
    kept |= {"llm_ids": {name: llm_id for name, llm_id in config["llm_ids"] if name in llms}}
    kept |= {"wordings": {name: config["wordings"].get(name) for name in llms}}
    return json.loads(json.dumps(kept))
