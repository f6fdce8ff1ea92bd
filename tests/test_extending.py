"""An encoder, an adapter, a condition, a data set and a stage, each added by one registered thing and nothing else."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from training.run_tools import LLMS, changed, lines_of, steps_in

from latentwire.conditions.base import CONDITIONS, condition, text_slot
from latentwire.conditions.texts import content_ids
from latentwire.conditions.tuned import tuned
from latentwire.data.content import content
from latentwire.data.question import Question
from latentwire.data.registry import DATASETS, dataset
from latentwire.evaluation.evaluate import evaluate
from latentwire.evaluation.settings import EvalSettings
from latentwire.models.adapters import ADAPTERS, SOFT_VECTORS, Adapter, adapter
from latentwire.models.checkpoint import load_checkpoint
from latentwire.models.components import component
from latentwire.models.encoders.base import ENCODERS, Encoded, Encoder, encoder
from latentwire.models.weights import load_soft_prompts, read_config
from latentwire.training.running import stages_of, train
from latentwire.training.settings import TrainSettings
from latentwire.training.stages import STAGES, Stage, stage
from latentwire.utils.cli import Settings, option, parse

pytestmark = pytest.mark.usefixtures("surroundings")
M, D_Z = 16, 24
SMALL = {"samples": 8, "batch_size": 4, "val_samples": 2}  # two steps per epoch


@pytest.fixture(autouse=True)
def _unregister():
    """What a test registers is known to this test alone."""
    registries = ENCODERS, ADAPTERS, CONDITIONS, DATASETS, STAGES
    before = [dict(registry) for registry in registries]
    yield
    for registry, known in zip(registries, before, strict=True):
        registry.clear()
        registry.update(known)


@pytest.fixture
def rows_of(tmp_path):
    """rows_of(**settings): the rows of results.json by condition and LLM, of a short evaluation."""

    def evaluated(**changes):
        defaults = {"dataset": "sample", "samples": 6, "max_new_tokens": 2, "batch_size": 3, "device": "cpu"}
        folder = tmp_path / "eval" / str(len(list(tmp_path.glob("eval/*"))))
        evaluate(EvalSettings(**(defaults | {"save_dir": str(folder)} | changes)))
        return {
            (row["condition"], row["llm"]): row for row in json.loads((folder / "results.json").read_text())["results"]
        }

    return evaluated


def ids_of(config):
    return {name: config.llm_ids[name] for name in LLMS}


def test_an_encoder_of_ones_own_with_a_setting_trains_is_kept_and_evaluated(short, rows_of, tmp_path):
    @encoder("mean")
    class MeanEncoder(Encoder):
        """Each latent is the mean code of one window of the text."""

        @dataclass(kw_only=True)
        class Settings(Settings):
            leave_out: int = option(0, "tokens at the beginning that are not sent", least=0)

        def __init__(self, tokenizer, d_z, vocabulary, leave_out):
            super().__init__(tokenizer, d_z)
            self.codebook, self.leave_out = nn.Embedding(vocabulary, d_z), leave_out

        @classmethod
        def begin(cls, before, settings, m):
            made = cls(before.tokenizer, before.d_z, before.codebook.num_embeddings, settings.leave_out)
            made.codebook.load_state_dict(before.codebook.state_dict())
            return made

        def shape(self):
            return {"vocabulary": self.codebook.num_embeddings, "leave_out": self.leave_out}

        def components(self):
            return [component("codebook", self.codebook, rate="codebook_lr")]

        def forward(self, questions, source, m):
            rows = []
            for q in questions:
                text = content(source, q.context, q.question).text
                ids = self.tokenizer(text, add_special_tokens=False)["input_ids"][self.leave_out :]
                rows.append(
                    torch.stack([part.mean(dim=0) for part in self.codebook(torch.tensor(ids)).tensor_split(m)])
                )
            return Encoded(torch.stack(rows), torch.ones(len(rows), m, dtype=torch.bool))

    assert (
        parse(TrainSettings, ["--stage", "codebook", "--encoder_type", "mean", "--leave_out", "3"]).encoder.leave_out
        == 3
    )
    config = short(tmp_path / "r", **SMALL, stage="all", encoder_type="mean", encoder=MeanEncoder.Settings(leave_out=2))
    assert [one.stage for one in stages_of(config)] == ["codebook", "joint"], "it has neither tokens nor answers"
    train(config)
    assert steps_in(tmp_path / "r")[0]["grad_norms"].keys() == {"codebook", "adapter llama", "adapter qwen"}
    loaded, _, made = load_checkpoint(tmp_path / "r" / "checkpoint_last", ids_of(config))
    assert type(loaded) is MeanEncoder and loaded.leave_out == 2
    assert made["encoder"] == {"type": "mean", "vocabulary": loaded.codebook.num_embeddings, "leave_out": 2}
    assert changed(tmp_path / "r/stages/codebook/checkpoint_best", tmp_path / "r/checkpoint_last", "encoder") == {
        "codebook.weight"
    }
    rows = rows_of(ckpt=str(tmp_path / "r" / "checkpoint_last"), conditions="learned")
    assert {name for name, _ in rows} == {"latentwire", "untrained", "shuffled_z", "shuffled_context_z"}
    for name in LLMS:
        assert rows["latentwire", name]["llm_positions"] == M and rows["latentwire", name]["m"] == M
        assert rows["latentwire", name]["nll_per_token"] != rows["untrained", name]["nll_per_token"]


def test_an_adapter_of_ones_own_begins_in_closed_form_trains_and_is_kept(short, rows_of, tmp_path):
    @adapter("linear")
    class LinearAdapter(Adapter):
        """The closed form's linear map, nothing else."""

        def __init__(self, d_z, width):
            super().__init__(d_z, width)
            self.map = nn.Linear(d_z, width)

        @classmethod
        def from_closed_form(cls, weight, bias):
            made = cls(weight.shape[1], weight.shape[0])
            made.map.load_state_dict({"weight": weight, "bias": bias})
            return made

        def forward(self, z):
            return self.map(z)

    kinds = {"encoder_type": "codebook", "adapter_type": "linear"}
    config = short(tmp_path / "r", **SMALL, stage="all", epochs=2, **kinds)
    assert [one.stage for one in stages_of(config)] == ["codebook", "adapters", "joint"]
    train(config)
    begun, last = tmp_path / "r" / "stages" / "codebook" / "checkpoint_best", tmp_path / "r" / "checkpoint_last"
    assert read_config(begun)["adapters"] == read_config(last)["adapters"] == dict.fromkeys(LLMS, "linear")
    _, adapters, _ = load_checkpoint(last, ids_of(config))
    assert all(type(found) is LinearAdapter and found.d_z == D_Z for found in adapters.values())
    for name in LLMS:
        assert changed(begun, last, f"adapter_{name}") == {"map.weight", "map.bias"}
    before, after = (rows_of(ckpt=str(folder), conditions="latentwire") for folder in (begun, last))
    untrained = rows_of(conditions="latentwire", latent_len=M, d_z=D_Z)
    for name in LLMS:
        assert before["latentwire", name]["nll_per_token"] == pytest.approx(
            untrained["latentwire", name]["nll_per_token"]
        )
        assert after["latentwire", name]["nll_per_token"] != before["latentwire", name]["nll_per_token"]


def test_a_condition_of_ones_own_is_evaluated_and_its_rival_may_train(short, rows_of, tmp_path):
    @condition("token_last", colour="#557799", cost="places", uses=("m",), default_in=(), groups=("baselines",))
    def token_last(reader, questions, m, shared):
        """The last M tokens of context and question."""
        return [text_slot(reader, content_ids(reader, q)[-m:]) for q in questions]

    tuned("token_last", "#99aabb")
    stage(Stage("token_last_tuned", None, losses=("answers",), needs_checkpoint=False, rival="token_last"))
    assert CONDITIONS["token_last"].about == "The last M tokens of context and question."

    config = short(tmp_path / "tuned" / "token_last_tuned", **SMALL, stage="token_last_tuned")
    train(config)
    prompts = load_soft_prompts(tmp_path / "tuned" / "token_last_tuned" / "checkpoint_best", ids_of(config))
    assert {len(prompt) for prompt in prompts.values()} == {SOFT_VECTORS}
    line = steps_in(tmp_path / "tuned" / "token_last_tuned")[0]
    assert line["grad_norms"].keys() == {"soft_prompt llama", "soft_prompt qwen"}

    rows = rows_of(
        conditions="token_last,token_last_tuned,baselines", tuned=str(tmp_path / "tuned"), latent_len=M, d_z=D_Z
    )
    assert {"token_budget", "text"} < {name for name, _ in rows} and ("token_last", "qwen") in rows
    for name in LLMS:
        row, rival = rows["token_last", name], rows["token_last_tuned", name]
        assert (row["m"], row["d_z"], row["llm_positions"], row["colour"]) == (M, None, M, "#557799")
        assert (rival["llm_positions"], rival["constant_positions"]) == (M, SOFT_VECTORS)
        assert rival["wire_bytes"] == row["wire_bytes"]
        assert rival["colour"] == "#99aabb"
    assert rows_of(conditions="token_last@5")["token_last", "llama"]["llm_positions"] == 5


def test_a_data_set_of_ones_own_has_its_own_score_and_needs_no_spans(short, rows_of, tmp_path):
    asked = []

    def close(prediction, references):
        """1 for the right answer, 0.25 for any other."""
        asked.append(prediction)
        right = prediction.strip().lower() == references[0]
        return {"f1": 1.0 if right else 0.25, "em": float(right)}

    @dataset("parity", score=close, spans=False)
    def parity(split):
        """Is a number even?"""
        return [
            Question(
                f"{split}{n}", f"title {n // 10}", f"paragraph {n}", f"The number {n} is written here.",
                "Is it even?", ("yes" if n % 2 == 0 else "no",),
            )
            for n in range(60)
        ]  # fmt: skip

    config = short(tmp_path / "r", **SMALL, stage="all", dataset="parity", epochs=2)
    assert [one.stage for one in stages_of(config)] == ["codebook", "adapters", "joint"], (
        "no spans to learn scores from"
    )
    train(config)
    assert all("span" not in line for line in steps_in(tmp_path / "r"))
    held = [line["validation"] for line in lines_of(tmp_path / "r") if "validation" in line]
    assert asked and all(figures["llms"][name]["f1"] >= 0.25 for figures in held for name in LLMS)
    with pytest.raises(ValueError, match=r"dataset='parity': its answers are no spans .*stage scores"):
        train(replace(config, stage="scores", init="x", save_dir=str(tmp_path / "s")))

    ckpt = str(tmp_path / "r" / "checkpoint_best")
    with pytest.raises(ValueError, match="'oracle_text': needs answers that are spans of their contexts"):
        rows_of(ckpt=ckpt, dataset="parity", conditions="oracle_text")
    rows = rows_of(ckpt=ckpt, dataset="parity", conditions="latentwire,text,oracles,encoder_only")
    assert rows.keys() == {(c, name) for c in ("latentwire", "text") for name in LLMS} | {("encoder_only", None)}
    assert {row["n"] for row in rows.values()} == {6} and all(row["f1"] >= 0.25 for row in rows.values())
    assert all(row["f1"] == pytest.approx(0.25 + 0.75 * row["em"]) for row in rows.values())


def test_a_stage_of_ones_own_trains_its_component_and_no_other_bit(short, scores, rows_of, tmp_path):
    stage(Stage("residual_only", trains=("residual",), losses=("answers",)))
    before, after = scores / "checkpoint_best", tmp_path / "r" / "checkpoint_last"
    with pytest.raises(ValueError, match="init='': stage residual_only starts from a checkpoint"):
        short(tmp_path / "r", stage="residual_only")
    train(short(tmp_path / "r", **SMALL, stage="residual_only", init=str(before)))
    assert changed(before, after, "encoder") == {"residual.weight", "residual.bias"}
    assert not any(changed(before, after, f"adapter_{name}") for name in LLMS)
    line = steps_in(tmp_path / "r")[0]
    assert line["grad_norms"].keys() == {"residual"} and line["grad_norms"]["residual"] > 0
    assert read_config(after)["stage"] == "residual_only"
    assert read_config(after)["frozen_sha256"] == read_config(tmp_path / "r" / "checkpoint_best")["frozen_sha256"]
    old, new = (rows_of(ckpt=str(folder), conditions="latentwire,selected_text") for folder in (before, after))
    for name in LLMS:
        assert old["latentwire", name]["nll_per_token"] != new["latentwire", name]["nll_per_token"]
        same = ("nll_per_token", "wire_bytes", "f1")  # which tokens are chosen has not changed
        assert [old["selected_text", name][key] for key in same] == [new["selected_text", name][key] for key in same]
