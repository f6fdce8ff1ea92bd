"""Diagnostics on small random models: figures that must hold by construction, findings that follow from them."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from latentwire.conditions.base import Slot
from latentwire.models.adapters import DeepAdapter, grown
from latentwire.models.checkpoint import save_checkpoint
from latentwire.models.closed_form import closed_form
from latentwire.models.encoders.queries import ByteEncoder
from latentwire.studies import embeddings
from latentwire.studies.embeddings import diagnose
from latentwire.studies.findings import findings_markdown
from latentwire.studies.geometry import INTERVENTIONS
from latentwire.studies.settings import DiagnosticsSettings

M, D_Z = 12, 24


@pytest.fixture(scope="module")
def parts(llms, texts):
    return closed_form(llms, texts, D_Z)[:2]


@pytest.fixture(scope="module")
def saved(parts, llm_folders, tmp_path_factory):
    """saved(encoder, adapters): a checkpoint folder with them."""

    def save(encoder, adapters=parts[1]):
        folder = tmp_path_factory.mktemp("checkpoints") / "one"
        ids = {name: llm_folders[f"{name.upper()}_ID"] for name in parts[1]}
        made = {"schema": 1, "stage": "joint", "source": "prompt", "latent_len": M, "d_z": D_Z, "llms": ids}
        save_checkpoint(folder, encoder, adapters, made)
        return folder

    return save


@pytest.fixture(scope="module")
def config(saved, parts, tmp_path_factory):
    def make(**changes):
        folder = tmp_path_factory.mktemp("runs") / "out"
        defaults = {
            "dataset": "sample",
            "eval_samples": 5,
            "max_new_tokens": 3,
            "device": "cpu",
            "save_dir": str(folder),
        }
        return DiagnosticsSettings(**({"ckpt": str(saved(parts[0]))} | defaults | changes))

    return make


@pytest.fixture(scope="module")
def finished(config, surroundings):
    settings = config()
    return settings, diagnose(settings)


def test_everything_is_written_and_findings_cite_the_figures(finished):
    settings, results = finished
    folder = Path(settings.save_dir)
    assert json.loads((folder / "diagnostics.json").read_text()) == json.loads(json.dumps(results))
    findings = (folder / "findings.md").read_text()
    for llm in results["llms"].values():
        assert f"{llm['vocabulary_rms']:.4f}" in findings
        assert f"{llm['embeddings']['latentwire']['nearest_cosine']['p50']:.2f}" in findings
    for row in results["interventions"]:
        assert f"| {row['llm']} | {row['embeddings']} | {row['intervention']} | {row['f1']:.3f} " in findings
    assert "support no claim" in findings
    for chart in ("embeddings.png", "interventions.png"):
        assert (folder / chart).read_bytes().startswith(b"\x89PNG")


def test_the_figures_of_text_are_those_of_the_vocabulary(finished, llms):
    for name, found in finished[1]["llms"].items():
        text = found["embeddings"]["text"]
        assert text["nearest_cosine"]["p5"] == pytest.approx(1, abs=1e-4), "tokens are their own nearest tokens"
        vocabulary = float(llms[name].embedding_table().square().mean().sqrt())
        assert found["vocabulary_rms"] == pytest.approx(vocabulary, rel=1e-5)
        assert text["first_norm"]["p50"] == pytest.approx(1, abs=0.05), "the weights of a new norm are 1"
        assert sum(text["rms_per_token"]["counts"]) > 5 * M
        assert sum(found["embeddings"]["latentwire"]["rms_per_token"]["counts"]) == 5 * M
        assert 1 < text["effective_rank"] <= llms[name].width
        assert found["magnitudes"]["a vector after a LayerNorm (RMS 1)"] == pytest.approx(
            1 / float(vocabulary), rel=1e-5
        )
        assert found["gradient_norms"]["codebook"] > 0 and found["gradient_norms"][f"adapter {name}"] > 0
        others = set(llms) - {name}
        assert not any(f"adapter {other}" in found["gradient_norms"] for other in others)


def test_every_intervention_is_scored_for_both_kinds_and_none_is_the_evaluations_answer(finished):
    rows = finished[1]["interventions"]
    assert [(r["llm"], r["embeddings"], r["intervention"]) for r in rows] == [
        (llm, kind, name) for llm in finished[1]["llms"] for kind in ("text", "latentwire") for name in INTERVENTIONS
    ]
    for row in rows:
        assert row["n"] == 5 and row["nll_per_token"] > 0 and 0 <= row["empty_answers"] <= 1
        if row["intervention"] == "none":
            assert row["f1_minus_none"] == 0
    by = {(r["llm"], r["embeddings"], r["intervention"]): r for r in rows}
    for llm in finished[1]["llms"]:
        projected, text = by[llm, "text", "nearest_token"], by[llm, "text", "none"]
        assert projected["nll_per_token"] == pytest.approx(text["nll_per_token"], rel=1e-4), "tokens stay themselves"
        moved = by[llm, "text", "whitening"]
        assert abs(moved["nll_per_token"] - text["nll_per_token"]) > 1e-3


def test_an_interventions_difference_is_what_it_has_more_than_none(monkeypatch):
    asked = [SimpleNamespace(id=str(i), paragraph=str(i)) for i in range(4)]
    subject = SimpleNamespace(
        shared=SimpleNamespace(questions=asked), config=SimpleNamespace(seed=0), slots=lambda *_: [torch.randn(3, 4)]
    )
    reader = SimpleNamespace(llm=SimpleNamespace(name="x", embedding_table=lambda: torch.randn(9, 4)))

    def scored(subject, reader, kind, change, *_):
        return {q.id: {"f1": float(change[0] == "none")} for q in asked}

    monkeypatch.setattr(embeddings, "_answers", scored)
    monkeypatch.setattr(embeddings, "summarise", lambda *_: dict.fromkeys(embeddings._KEPT))
    rows = embeddings._interventions(subject, reader, None)
    others = [row for row in rows if row["intervention"] != "none"]
    assert others and all((row["f1_minus_none"], row["f1_minus_none_ci95"]) == (-1, [-1, -1]) for row in others)


def test_an_intervention_leaves_the_constant_vectors_as_they_are():
    slot = Slot(torch.randn(20, 4), 0, constant=16)
    changed = embeddings._changed(slot, lambda rows, _: rows + 1, None)
    assert torch.equal(changed[:16], slot.embeds[:16]) and torch.equal(changed[16:], slot.embeds[16:] + 1)


def test_latents_name_their_words_and_neighbours(finished):
    results = finished[1]
    assert len(results["latents"]) == 5
    for one in results["latents"]:
        assert len(one["words"]) == M and one["predictions"].keys() == results["llms"].keys()
        shown = "".join(place["word"] for place in one["words"])
        assert "Question: " in shown
        assert all(-1 <= cosine <= 1.0001 for place in one["words"] for _, cosine in place["nearest"].values())


def test_what_deep_adapters_have_before_the_latents_is_no_latent_and_stays_as_it_is(
    finished, config, saved, parts, surroundings, llms
):
    deep = {name: grown(adapter, DeepAdapter, llms[name], range(16)) for name, adapter in parts[1].items()}
    results, before = diagnose(config(ckpt=str(saved(parts[0], deep)))), finished[1]
    for now, was in zip(results["latents"], before["latents"], strict=True):
        for ours, theirs in zip(now["words"], was["words"], strict=True):
            words = [[place["word"], *(found[0] for found in place["nearest"].values())] for place in (ours, theirs)]
            assert words[0] == words[1]
    assert results["compression"]["positions"] == before["compression"]["positions"]


def test_bytes_and_positions_add_up(finished, llms):
    found = finished[1]["compression"]
    assert found["zlib_bytes"] < found["text_bytes"]
    assert found["wire_bytes"]["fp16"] > found["wire_bytes"]["int8"] > found["wire_bytes"]["int4"] > M * D_Z / 2
    for name, llm in llms.items():
        config = llm.model.config
        each = 2 * 2 * config.num_key_value_heads * (config.hidden_size // 4) * 4  # both, layers, float32
        assert llm.kv_bytes == each
        assert found["positions"][name]["latentwire"] == M < found["positions"][name]["text"]
        assert found["kv_bytes"][name]["latentwire"] == M * each


def test_a_second_run_answers_nothing_again(finished, monkeypatch):
    settings, results = finished
    monkeypatch.setattr("latentwire.evaluation.answering.answer", lambda *a: pytest.fail("answered again"))
    again = diagnose(settings)
    assert again == results


def test_another_checkpoint_in_the_same_folder_is_refused(finished, config, saved, parts):
    encoder = copy.deepcopy(parts[0])
    with torch.no_grad():
        encoder.codebook.weight += 1
    with pytest.raises(ValueError, match="checkpoint_sha256"):
        diagnose(config(ckpt=str(saved(encoder)), save_dir=finished[0].save_dir))


def test_a_checkpoint_is_looked_at_with_the_source_that_it_was_trained_for(config, surroundings, capsys):
    results = diagnose(config(source="context", eval_samples=2, llms="qwen"))
    assert results["source"] == "prompt" and "trained with source 'prompt'" in capsys.readouterr().out


def test_free_queries_have_no_words_but_all_other_figures(config, saved, parts, surroundings):
    torch.manual_seed(0)
    encoder = ByteEncoder.begin(parts[0], ByteEncoder.Settings(), M)
    results = diagnose(config(ckpt=str(saved(encoder)), eval_samples=2, llms="qwen"))
    assert results["latents"] == [] and len(results["interventions"]) == 2 * len(INTERVENTIONS)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"ckpt": ""}, "ckpt"), ({"eval_samples": 0}, "samples=0"), ({"dtype": "int8"}, "dtype='int8'")],
)
def test_wrong_settings_are_named(changes, says):
    with pytest.raises(ValueError, match=says):
        DiagnosticsSettings(**({"ckpt": "x"} | changes))


def scored(results, changes):
    """A copy of the results in which rows (embeddings, intervention) have other F1s and differences."""
    results = copy.deepcopy(results)
    for row in results["interventions"]:
        base, difference, ci = changes.get((row["embeddings"], row["intervention"]), (0.4, 0.0, [-0.05, 0.05]))
        row |= {"f1": base, "f1_minus_none": difference, "f1_minus_none_ci95": ci}
    return results


def test_findings_follow_the_figures(finished):
    results = finished[1]
    quiet = findings_markdown(scored(results, {}))
    assert "is within the noise" in quiet and "destroys" not in quiet and "No loss is shown" in quiet
    broken = scored(results, {("latentwire", "rms_token x1.0"): (0.04, -0.36, [-0.4, -0.3])})
    assert "rms_token x1.0 destroys 90% of it (-0.360 [-0.400, -0.300])" in findings_markdown(broken)
    harmed = scored(results, {("text", "rms_token x0.5"): (0.3, -0.1, [-0.15, -0.05])})
    assert "costs 25% (-0.100 [-0.150, -0.050]): harm, not destruction" in findings_markdown(harmed)
    silent = {(kind, name): (0.0, 0.0, None) for kind in ("text", "latentwire") for name in INTERVENTIONS}
    nothing = findings_markdown(scored(results, silent))
    assert "nothing follows" in nothing and "no intervention can show" in nothing
    for llm in (large := copy.deepcopy(results))["llms"].values():
        llm["magnitudes"]["the learned prefix"] = 117.0
        llm["embeddings"]["latentwire"]["mean_cosine"] = 0.99
    assert "117.00 times that: it is off" in findings_markdown(large) and "collapsed" in findings_markdown(large)
