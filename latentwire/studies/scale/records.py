"""What was measured, read from results/."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from latentwire.llms.arithmetic import LLMS
from latentwire.llms.known import LARGE_SHAPES
from latentwire.utils.files import read_json

RESULTS = Path(__file__).parents[3] / "results"
SPEED, STEP, SERVICE, SHIPPED, CORPUS = "16_speed", "31_speed", "24_service/encode", "15_shipped", "25_corpus"
GPU = "50_gpu_speed/large"  # random weights in the shapes of large LLMs
_TEXT = ("text", None)  # condition and M of the whole text


@dataclass(frozen=True)
class Records:
    """The records of a folder, as far as they are needed here; LLMs have the names of their models, "smollm2-135m".
    Raises FileNotFoundError for a record that is not there."""

    folder: Path = RESULTS

    @cached_property
    def prefill(self) -> dict[tuple[str, int, str], float]:
        """Median seconds by (LLM, tokens of the context, "z" or "text")."""
        return self._prefill(SPEED, self._models)

    @cached_property
    def gpu_prefill(self) -> dict[tuple[str, int, str], float]:
        """The same of large shapes on a GPU."""
        of_width = {shape.width: model for model, shape in LLMS.items()}
        large = {name: of_width[shape["hidden_size"]] for name, shape in LARGE_SHAPES.items()}
        return self._prefill(GPU, large)

    def _prefill(self, record: str, models: Mapping[str, str]) -> dict[tuple[str, int, str], float]:
        found: dict[tuple[str, int, str], list[float]] = {}
        for line in self._raw(record, "serving"):
            for what in ("z", "text"):
                key = (models[line["llm"]], line["text_positions"], what)
                found.setdefault(key, []).append(line["seconds"][f"prefill_{what}"])
        return {key: statistics.median(values) for key, values in found.items()}

    @cached_property
    def kv_bytes(self) -> dict[str, int]:
        """Bytes of a cache of M positions, by LLM."""
        return {self._models[line["llm"]]: line["kv_bytes_z"] for line in self._raw(SPEED, "serving")}

    @cached_property
    def step(self) -> tuple[float, float]:
        """(operations of a training step as they were counted, share of the machine's ceiling that it reached)."""
        lines = self._raw(STEP, "mfu")
        return lines[0]["flops"], statistics.median(line["other"] / line["ours"] for line in lines)

    @cached_property
    def step_size(self) -> tuple[int, int, int]:
        """Questions, M and K of that step."""
        config = read_json(self.folder / STEP / "config.json")["config"]
        return config["batch_size"], config["latent_len"], config["k"]

    @cached_property
    def encoded_per_core(self) -> float:
        """Paragraphs of SQuAD that one core encodes in a second, many at once."""
        record = read_json(self.folder / SERVICE / "results.json")
        lines = [line for line in record["raw"] if line["name"].endswith("paragraphs")]
        return statistics.median(line["questions"] / line["ours"] for line in lines) / record["hardware"]["threads"]

    @cached_property
    def text_tokens(self) -> float:
        """Tokens of a SQuAD paragraph with its question, mean of the LLMs that were measured."""
        rows = read_json(self.folder / SHIPPED / "results.json")["results"]
        return statistics.mean(row["llm_positions"] for row in rows if (row["condition"], row["m"]) == _TEXT)

    @cached_property
    def corpus(self) -> dict:
        """What encode_corpus.py wrote of a corpus in fp16."""
        return read_json(self.folder / CORPUS / "results.json")

    @cached_property
    def wire_bytes(self) -> dict[str, float]:
        """Mean bytes of the same wires in each codec."""
        return read_json(self.folder / CORPUS / "codecs.json")["bytes"]

    @cached_property
    def _speed(self) -> dict:
        return read_json(self.folder / SPEED / "config.json")["config"]

    @cached_property
    def _models(self) -> dict[str, str]:
        """The model of each LLM that the speed was measured of."""
        ids = self._speed["llm_ids"]
        return {name: llm.removeprefix("offline:").removesuffix("-instruct") for name, llm in ids.items()}

    def _raw(self, folder: str, part: str) -> list[dict]:
        lines: Iterable[dict] = read_json(self.folder / folder / "results.json")["raw"]
        return [line for line in lines if line["part"] == part]
