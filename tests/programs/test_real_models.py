"""The real SmolLM2, downloaded on first use: what holds for random models holds for a trained one."""

from pathlib import Path

import pytest
import torch
from llms.test_frozen import prompts_of, reference_answers

from latentwire.data.squad import load
from latentwire.evaluation.evaluate import evaluate
from latentwire.evaluation.settings import EvalSettings
from latentwire.llms.known import DEFAULT_LLMS
from latentwire.llms.loading import load_llm

SMOL = DEFAULT_LLMS["llama"]
SHIPPED = Path(__file__).parents[2] / "checkpoints" / "latentwire_m32"


@pytest.fixture(scope="module")
def smol():
    return load_llm("llama", SMOL, "cpu", "float32")


def test_real_embeddings_through_the_latent_path_give_its_text_answers(smol):
    questions = load("sample", "dev").questions[:40:10]
    head, slots, tails, _ = prompts_of(smol, questions)
    ours = smol.generate_with_prefix(head, [smol.embed(s) for s in slots], tails, 8)
    assert ours == reference_answers(smol, head, slots, tails, 8)
    assert all(ours)


def test_one_gradient_step_through_it_changes_a_latent_and_no_weight(smol):
    before = {key: value.clone() for key, value in smol.model.state_dict().items()}
    head, _, tails, answers = prompts_of(smol, load("sample", "train").questions[:2])
    slots = torch.randn(2, 4, smol.width, requires_grad=True)
    loss = smol.loss_with_prefix(head, list(slots), tails, answers)
    (loss.nll.sum() / loss.mask.sum()).backward()
    assert slots.grad.abs().amax(dim=(1, 2)).min() > 0
    assert all(torch.equal(value, before[key]) for key, value in smol.model.state_dict().items())


def test_it_answers_from_text_and_from_the_untrained_wire_but_not_from_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_ID", SMOL)
    results = evaluate(
        EvalSettings(
            dataset="sample",
            source="context",
            samples=24,
            llms="llama",
            device="cpu",
            save_dir=str(tmp_path / "run"),
            conditions="oracle_text,oracle_wire,no_context",
        )
    )
    f1 = {row["condition"]: row["f1"] for row in results["results"]}
    assert f1["oracle_text"] > f1["no_context"] + 0.1
    assert f1["oracle_wire"] > f1["no_context"] + 0.1


def test_the_shipped_checkpoint_answers_passages_that_it_has_never_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_ID", SMOL)
    results = evaluate(
        EvalSettings(
            ckpt=str(SHIPPED),
            dataset="sample",
            samples=24,
            llms="llama",
            device="cpu",
            save_dir=str(tmp_path / "run"),
            conditions="latentwire,shuffled_z,no_context",
        )
    )
    f1 = {row["condition"]: row["f1"] for row in results["results"]}
    assert f1["latentwire"] > max(f1["shuffled_z"], f1["no_context"]) + 0.1
