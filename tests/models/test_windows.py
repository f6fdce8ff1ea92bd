"""Windows of wire tokens: each gives one latent, whatever M is asked for, and the question stays out of the wire."""

import dataclasses
from itertools import pairwise

import pytest
import torch

from latentwire.data.content import content
from latentwire.models.adapters import ADAPTERS
from latentwire.models.checkpoint import load_encoder, save_checkpoint
from latentwire.models.closed_form import closed_form
from latentwire.models.encoders.base import ENCODERS
from latentwire.models.encoders.windows import windows

KINDS = ("anchors", "lead", "windows")


@pytest.fixture(scope="module")
def made(llms, texts, encoder_folder):
    torch.manual_seed(0)
    before, *_ = closed_form(llms, texts, 24)
    return {
        kind: ENCODERS[kind].begin(before, ENCODERS[kind].Settings(encoder_id=encoder_folder), 8).eval()
        for kind in KINDS
    }


def test_windows_cut_a_text_into_runs_of_nearly_equal_length():
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0, 0], [0] * 8], dtype=torch.bool)
    member, used = windows(mask, 3)
    assert used.tolist() == [[True] * 3, [True, True, False], [False] * 3]
    assert member.sum(dim=2).tolist() == [[3, 2, 2], [1, 1, 0], [0, 0, 0]]
    assert member[0].int().argmax(dim=1).tolist() == [0, 3, 5] and torch.equal(member.any(dim=1), mask)


@pytest.mark.parametrize("m", [1, 7, 16, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_one_checkpoint_serves_any_m_and_a_text_is_encoded_alike_in_any_batch(made, kind, short_questions, m):
    encoder, some = made[kind], short_questions[:3]
    together = encoder.encode(some, "context", m)
    for q, z in zip(some, together, strict=True):
        assert z.shape[1] == 24 and 1 <= len(z) <= m
        assert torch.equal(z, encoder.encode([q], "context", m)[0])
        batch = encoder(some, "context", m)
        torch.testing.assert_close(batch.z[some.index(q)][batch.used[some.index(q)]], z, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_with_source_context_the_question_changes_nothing(made, kind, short_questions):
    q = short_questions[0]
    other = dataclasses.replace(q, question="Something else?")
    assert torch.equal(made[kind].encode([q], "context", 9)[0], made[kind].encode([other], "context", 9)[0])


def test_at_the_start_an_anchors_latent_is_the_code_of_its_windows_rarest_token(made, short_questions):
    encoder, q = made["anchors"], short_questions[0]
    (z,), chosen = encoder.encode([q], "context", 6), encoder.select([q], "context", 6)[0]
    torch.testing.assert_close(z, encoder.codebook.weight[chosen])
    ids = encoder.tokenizer(content("context", q.context, q.question).text, add_special_tokens=False)["input_ids"]
    at = [len(ids) * n // 6 + (len(ids) * n % 6 > 0) for n in range(7)]
    assert chosen == [max(ids[a:b]) for a, b in pairwise(at)]


def test_lead_begins_as_the_first_tokens_and_what_follows_reaches_its_residual_alone(made, short_questions):
    encoder, q = made["lead"], short_questions[0]
    ids = encoder.tokenizer(content("context", q.context, q.question).text, add_special_tokens=False)["input_ids"]
    (z,), chosen = encoder.encode([q], "context", 6), encoder.select([q], "context", 6)[0]
    assert chosen == ids[:6] and len(ids) > 7
    torch.testing.assert_close(z, encoder.codebook.weight[chosen])
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        patch.setattr(encoder.residual, "forward", lambda x: seen.append(x) or torch.zeros(*x.shape[:2], 24))
        (whole,) = encoder.encoded([q], "context", 6)
        encoder.encoded([q], "context", len(ids))
    width, last = encoder.backbone.width, (len(ids) - 6) // 6
    hidden = encoder._align(encoder.backbone([q], "context"), whole.tokens)[0]
    torch.testing.assert_close(seen[0][0, :, :width], hidden[:6])
    torch.testing.assert_close(seen[0][0, -1, width : 2 * width], hidden[-last:].mean(dim=0))
    torch.testing.assert_close(seen[0][0, -1, 2 * width :], encoder.codebook.weight[max(ids[-last:])])
    assert not seen[1][..., width:].any(), "nothing follows where all is sent"


@pytest.mark.parametrize("kind", ["anchors", "lead"])
def test_an_oracle_anchors_the_answer(made, kind, short_questions):
    q = next(q for q in short_questions if q.answers[0] in q.context and q.context.find(q.answers[0]) == q.starts[0])
    encoder = made[kind]
    z, text = encoder.perfect([q], "context", 4)[0]
    answer = encoder.tokenizer(q.answers[0], add_special_tokens=False)["input_ids"]
    assert len(z) == 4 and any(encoder.tokenizer.decode([i]).strip() in text for i in answer)


def test_the_salience_learns_which_token_of_a_window_leads(made, short_questions):
    encoder = made["anchors"].train()
    encoded = encoder(short_questions[:2], "context", 6)
    encoded.z.square().sum().backward()
    assert encoder.score.weight.grad.abs().sum() > 0
    encoder.zero_grad()
    encoder.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_gives_the_same_latents(made, kind, short_questions, tmp_path, llms):
    torch.manual_seed(1)
    for parameter in made[kind].parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    adapters = {"llama": ADAPTERS["residual_mlp"](24, 48)}
    config = {"schema": 1, "stage": "joint", "source": "context", "latent_len": 8, "d_z": 24, "llms": {"llama": "x"}}
    save_checkpoint(tmp_path / "c", made[kind], adapters, config)
    again = load_encoder(tmp_path / "c")
    for z, other in zip(*(e.encode(short_questions[:2], "context", 5) for e in (made[kind], again)), strict=True):
        assert torch.equal(z, other)


def test_without_the_residual_the_codes_alone_are_sent(llms, texts, encoder_folder, short_questions):
    before, *_ = closed_form(llms, texts, 24)
    settings = ENCODERS["anchors"].Settings(encoder_id=encoder_folder, dense=False)
    encoder = ENCODERS["anchors"].begin(before, settings, 8).eval()
    assert encoder.shape()["dense"] is False and "residual" not in [part.kind for part in encoder.components()]
    (z,) = encoder.encode(short_questions[:1], "context", 6)
    assert torch.equal(z, encoder.codebook.weight[encoder.select([short_questions[0]], "context", 6)[0]])


def test_training_draws_its_m_anew_each_step_and_one_checkpoint_serves_all(short, run_of, tmp_path, encoder_folder):
    how = {"adapter_type": "deep", "source": "context", "encoder_type": "anchors"}
    how["encoder"] = ENCODERS["anchors"].Settings(encoder_id=encoder_folder)
    first = run_of(short(tmp_path / "codebook", stage="codebook", **how)) / "checkpoint_best"
    joint = short(tmp_path / "joint", stage="joint", init=str(first), latent_lens="4,9", epochs=2, **how)
    seen = []
    forward = ENCODERS["anchors"].forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ENCODERS["anchors"], "forward", lambda self, *a, **k: seen.append(a[2]) or forward(self, *a, **k))
        run_of(joint)
    assert set(seen) == {4, 9, 16}, "16: validation"
    with pytest.raises(ValueError, match="latent_lens='4,many'"):
        short(tmp_path / "r", latent_lens="4,many")
