"""The package's face: encoding without an LLM, reading without an encoder, and nothing but bytes between them."""

import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import latentwire
from latentwire import LatentWire, Wire
from latentwire.api.costs import break_even
from latentwire.conditions.base import Sender, Shared, readers
from latentwire.conditions.latents import latents
from latentwire.llms.known import LLMSettings
from latentwire.llms.prompts import PromptBuilder
from latentwire.models.adapters import SOFT_VECTORS, PreambleAdapter, grown
from latentwire.models.checkpoint import load_checkpoint, save_checkpoint
from latentwire.models.weights import read_config
from latentwire.models.wire import pack
from latentwire.models.wire.compact import Compact, codebook_of
from latentwire.utils.machine import on_this_machine

M = 12
pytestmark = pytest.mark.usefixtures("surroundings")


@pytest.fixture(scope="module")
def later(checkpoint_of):
    """A checkpoint whose wires do not know the question."""
    return LatentWire.from_pretrained(checkpoint_of("context"))


@pytest.fixture(scope="module")
def reader(lw):
    return lw.reader("qwen")


def test_a_text_has_the_same_bytes_alone_and_among_others(lw, short_questions, monkeypatch):
    monkeypatch.setattr("latentwire.api.encoding._BATCH", 300)  # characters: several groups
    some = short_questions[:20]
    contexts, asked = [q.context for q in some], [q.question for q in some]
    contexts[3] = " ".join(contexts)  # too long to be read at once
    together = lw.encode(contexts, asked, blocks=99)
    assert together == [lw.encode(c, q, blocks=99) for c, q in zip(contexts, asked, strict=True)]
    assert together[::-1] == lw.encode(contexts[::-1], asked[::-1], blocks=99)
    assert len(lw.wire(together[3]).blocks) > 1


def test_texts_of_any_number_of_latents_are_read_together(lw, short_questions, monkeypatch):
    contexts, asked = [q.context for q in short_questions[:10]], [q.question for q in short_questions[:10]]
    contexts[3] = "A text."
    alone = [lw.encode(c, q, budget=20) for c, q in zip(contexts, asked, strict=True)]
    assert len({lw.wire(wire).m for wire in alone}) > 1
    counts, ready = [], lw.encoder.ready
    monkeypatch.setattr(lw.encoder, "ready", lambda some, source: counts.append(len(some)) or ready(some, source))
    assert lw.encode(contexts, asked, budget=20) == alone and counts == [10]


def test_its_latents_are_those_of_an_evaluation(lw, short_questions):
    q = short_questions[0]
    (z,) = lw.encoder.encode([q], "prompt", M)
    wire = lw.wire(lw.encode(q.context, q.question))
    assert torch.equal(torch.from_numpy(wire.z), z.half().float())
    assert (wire.blocks, wire.text_bytes) == ((M,), len(f"{q.context}\n{q.question}".encode()))


@pytest.mark.parametrize("llm", ["llama", "qwen"])
def test_a_reader_answers_as_an_evaluation_does(lw, short_questions, llm):
    some = short_questions[:6]
    encoder, adapters, _ = load_checkpoint(lw.folder, read_config(lw.folder)["llms"])
    (ready,) = readers(on_this_machine(LLMSettings(llms=llm)), "prompt", adapters)
    slots = latents(ready, some, M, Shared(sender=Sender(encoder, "prompt", "fp16")))
    tails = [ready.prompts.tail(q.question) for q in some]
    expected = ready.llm.generate_with_prefix(ready.prompts.head, [slot.embeds for slot in slots], tails, 8)
    wires = lw.encode([q.context for q in some], [q.question for q in some])
    assert lw.reader(llm).answer(wires, max_new_tokens=8) == expected
    assert len(set(expected)) > 1


def test_with_source_context_the_question_is_asked_when_answering(later, short_questions):
    q, other = short_questions[0], short_questions[1]
    z, ready = later.encode(q.context), later.reader("qwen")
    both = ready.answer([z, z], [q.question, other.question])
    assert both == [ready.answer(z, q.question), ready.answer(z, other.question)]
    with pytest.raises(ValueError, match="question=None"):
        ready.answer(z)
    with pytest.raises(ValueError, match="asked when answering"):
        later.encode(q.context, q.question)
    with pytest.raises(ValueError, match="nothing to encode"):
        later.encode("\u200b")  # a sign, but none that the encoder's tokenizer keeps


def _read(reader, wire, question):
    """What the LLM says to all latents of a wire."""
    slot, tail = reader.adapter(torch.from_numpy(wire.z)), reader.prompts.tail(question)
    return reader.llm.generate_with_prefix(reader.prompts.head, [slot], [tail], 12)[0]


def test_with_source_aware_the_question_is_needed_on_both_sides(checkpoint_of, short_questions):
    aware = LatentWire.from_pretrained(checkpoint_of("aware"))
    q, other = short_questions[0], short_questions[1]
    z, ready = aware.encode(q.context, q.question), aware.reader("qwen")
    wire = aware.wire(z)
    assert (wire.source, wire.blocks, wire.text_bytes) == ("aware", (M,), len(q.context.encode())), "the context alone"
    assert z != aware.encode(q.context, other.question), "the encoder reads the question"
    assert ready.prompt_embeds(z, q.question).shape != ready.prompt_embeds(z, other.question).shape, "and so the LLM"
    assert ready.answer(z, q.question) == _read(ready, wire, q.question)
    with pytest.raises(ValueError, match="question=None"):
        ready.answer(z)
    with pytest.raises(ValueError, match=r"the source of .* is 'aware', so encoding needs the question"):
        aware.encode(q.context)
    assert len(aware.parts(" ".join(q.context for q in short_questions[:12]), q.question)) == 1


def test_free_continuation_goes_through_generate(reader, lw, short_questions):
    z = lw.encode(short_questions[0].context, short_questions[0].question)
    assert reader.prefix(z).shape == (M, reader.llm.width)
    one = reader.generate(z, max_new_tokens=5, do_sample=False)
    assert one.strip().startswith(reader.answer(z, max_new_tokens=1))
    assert reader.generate(z, " and so", max_new_tokens=5, do_sample=False) != one


def test_the_whole_prompt_as_embeddings_is_continued_with_the_answer(reader, lw, short_questions):
    """What a serving engine does with them, here by transformers' own generate."""
    z = lw.encode(short_questions[0].context, short_questions[0].question)
    embeds = reader.prompt_embeds(z)[None]
    assert embeds.shape[1:] == (len(reader.prompts.head) + M + len(reader.prompts.tail("")), reader.llm.width)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    (ids,) = reader.llm.model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=6, do_sample=False)
    found = reader.llm.tokenizer.decode(ids, skip_special_tokens=True)
    assert found.lstrip(" ").split("\n")[0].strip() == reader.answer(z, max_new_tokens=6)


def test_a_prefix_begins_with_the_vectors_that_all_wires_share(lw, llms, reader, short_questions, tmp_path):
    encoder, adapters, made = load_checkpoint(lw.folder, lw.llms)
    heads = {name: PromptBuilder(llm.tokenizer, lw.source, "chat").head for name, llm in llms.items()}
    kept = {name: grown(one, PreambleAdapter, llms[name], heads[name]) for name, one in adapters.items()}
    save_checkpoint(tmp_path / "preamble", encoder, kept, made)
    ready = LatentWire(tmp_path / "preamble").reader("qwen")
    z = lw.encode(short_questions[0].context, short_questions[0].question)
    found = ready.prefix(z)
    assert len(found) == ready.adapter.constant + M == SOFT_VECTORS + M
    assert torch.equal(found[:SOFT_VECTORS], ready.llm.embed(heads["qwen"][:SOFT_VECTORS]))
    assert torch.equal(found[SOFT_VECTORS:], reader.prefix(z))


def test_budget_and_m_say_how_many_latents(lw, short_questions):
    q = short_questions[0]
    words = len(q.context.split())
    assert lw.wire(lw.encode(q.context, q.question, m=5)).blocks == (5,)
    assert lw.wire(lw.encode(q.context, q.question, budget=10)).blocks == (round(words / 10),)
    assert lw.wire(lw.encode("A text.", "Who?", budget=1)).blocks == (1,)
    for wrong in ({"m": 0}, {"budget": 0.0}, {"m": 3, "budget": 1.0}, {"codec": "zip"}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}=" if len(wrong) == 1 else "leave one out"):
            lw.encode(q.context, q.question, **wrong)


def test_a_long_document_is_read_block_by_block_and_refused_where_it_does_not_fit(later, short_questions):
    document = " ".join(dict.fromkeys(q.context for q in short_questions[:40]))
    wire = later.wire(later.encode(document))
    assert len(wire.blocks) > 2 and wire.m == sum(wire.blocks)
    sizes = tuple(round(len(part.split()) / 10) for part in later.parts(document))
    assert later.wire(later.encode(document, budget=10)).blocks == sizes
    ready = later.reader("llama")
    assert ready.answer(wire, "Who?") == _read(ready, wire, "Who?"), "of all blocks, one behind the other"
    needed = len(ready.prompts.head) + ready.adapter.constant + wire.m + len(ready.prompts.tail("Who?"))
    ready.llm.positions = needed + 12
    ready.answer(wire, "Who?", 12)
    with pytest.raises(ValueError, match=f"{wire.m} latents make a prompt"):
        ready.answer(wire, "Who?", 13)


def test_of_a_long_text_the_part_that_fits_a_known_question_is_sent(lw, short_questions):
    passages = list(dict.fromkeys(q.context for q in short_questions))[:30]
    document, q = " ".join(passages), next(q for q in short_questions if q.context == passages[20])
    asked = f"What of {q.context.rsplit(' ', 1)[0]}"[:80]
    one, two, whole = (lw.wire(lw.encode(document, asked, blocks=n)) for n in (None, 2, 99))
    assert (len(one.blocks), len(two.blocks)) == (1, 2) and len(whole.blocks) > 10
    rows = whole.z.reshape(len(whole.blocks), -1)
    at = [int((rows == block).all(axis=1).argmax()) for block in (one.z.reshape(-1), *two.z.reshape(2, -1))]
    assert at[0] in at[1:] and at[1] < at[2], "in reading order"
    parts = lw.parts(document, asked, blocks=99)
    assert len(parts) == len(whole.blocks) and q.context[:40] in parts[at[0]]
    assert lw.parts(document, asked) == [parts[at[0]]] and lw.parts(document, asked, 2) == [parts[i] for i in at[1:]]
    with pytest.raises(ValueError, match="blocks=0"):
        lw.encode(document, asked, blocks=0)


@pytest.mark.parametrize(
    ("context", "question", "says"),
    [
        ("", "Who?", "context=''"), (" \n", "Who?", "context="), ("A text.", None, "needs the question"),
        ("A text.", " ", "question=' '"), ("\ud800", "Who?", "lone surrogate"), (["a", "b"], ["Who?"], "as many"),
        (["a", "b"], "Who?", "as many"), ("A text.", "who " * 200, "word pieces"),
    ],
)  # fmt: skip
def test_texts_that_cannot_be_encoded_are_refused_by_name(lw, context, question, says):
    with pytest.raises(ValueError, match=says):
        lw.encode(context, question)


def test_a_wire_of_another_checkpoint_is_refused_by_name(lw, reader, checkpoint_of, short_questions):
    other = LatentWire.from_pretrained(checkpoint_of("prompt", seed=1))
    z = other.encode(short_questions[0].context, short_questions[0].question)
    for read in (lw.wire, reader.answer):
        with pytest.raises(ValueError, match=f"encoder {other.wire_id.hex()}"):
            read(z)


def test_a_wire_as_long_as_its_text_never_pays(lw, short_questions):
    wire = lw.wire(lw.encode(short_questions[0].context, short_questions[0].question))
    assert all(one["questions"] > 0 for one in break_even(lw, wire).values())
    for tokens in (wire.m, wire.m - 1):
        found = break_even(lw, replace(wire, text_tokens=tokens)).values()
        assert all(one["questions"] is None and "save nothing" in one["says"] for one in found)


def test_a_wire_of_another_source_is_refused_by_name(lw, reader, later, short_questions):
    assert later.wire_id == lw.wire_id
    for read in (lw.wire, reader.answer):
        with pytest.raises(ValueError, match=f"{later.wire_id.hex()}, source context"):
            read(later.encode(short_questions[0].context))


def test_a_wire_that_names_no_encoder_is_refused_by_its_width(lw, reader):
    for z in (np.zeros((1, 3, lw.d_z + 1)), np.zeros((1, 0, lw.d_z))):
        with pytest.raises(ValueError, match=f"{z.shape[1]} latents of width {z.shape[2]}"):
            reader.answer(pack(z, "fp16"))


def test_a_reader_holds_against_questions_that_its_wires_hold_already(lw, reader, short_questions):
    z = lw.encode(short_questions[0].context, short_questions[0].question)
    with pytest.raises(ValueError, match="holds its question"):
        reader.answer(z, "Who?")
    with pytest.raises(ValueError, match="2 wires need as many"):
        reader.answer([z, z], ["Who?"])


def test_an_llm_without_an_adapter_is_refused_with_the_way_to_one(lw):
    with pytest.raises(ValueError, match=r"readers for llama, qwen.*--stage join"):
        lw.reader("gemma")


def test_words_lead_back_to_what_was_chosen(lw, short_questions):
    q = short_questions[0]
    chosen = [lw.encoder.tokenizer.decode([i]) for i in lw.encoder.select([q], "prompt", M)[0]]
    words = lw.wire(lw.encode(q.context, q.question)).words()
    assert sum(a == b for a, b in zip(words, chosen, strict=True)) >= M - 1


def test_saved_and_opened_again_it_sends_the_same_as_safetensors_alone(lw, short_questions, tmp_path):
    lw.save_pretrained(tmp_path / "copy")
    again = LatentWire.from_pretrained(str(tmp_path / "copy"))
    q = short_questions[0]
    assert again.encode(q.context, q.question) == lw.encode(q.context, q.question)
    assert not list((tmp_path / "copy").glob("*.pt")) and (tmp_path / "copy" / "README.md").is_file()
    wire = lw.encode(q.context, q.question)
    assert again.reader("llama").answer(wire) == lw.reader("llama").answer(wire)
    with pytest.raises(ValueError, match="lies there already"):
        again.save_pretrained(tmp_path / "copy")


def test_saved_again_it_reads_its_compact_wires(checkpoint_of, short_questions, tmp_path):
    lw, q = LatentWire.from_pretrained(checkpoint_of("prompt", seed=7)), short_questions[0]
    codes, latents = codebook_of(lw.folder), torch.from_numpy(lw.wire(lw.encode(q.context, q.question)).z)
    Compact.fit(codes, latents, torch.ones(len(codes))).save(lw.folder)
    lw.save_pretrained(tmp_path / "copy")
    again, wire = LatentWire.from_pretrained(tmp_path / "copy"), lw.encode(q.context, q.question, codec="compact2")
    assert again.encode(q.context, q.question, codec="compact2") == wire
    assert np.array_equal(again.wire(wire).z, lw.wire(wire).z)
    (tmp_path / "copy" / "codec" / "tables.safetensors").unlink()
    assert "compact2" in lw.codecs and "compact2" not in LatentWire(tmp_path / "copy").codecs


def test_tables_that_were_fitted_anew_are_used_at_once(checkpoint_of, short_questions):
    lw = LatentWire.from_pretrained(checkpoint_of("prompt", seed=8))
    codes, wires = codebook_of(lw.folder), []
    for q in short_questions[:2]:
        latents = torch.from_numpy(lw.wire(lw.encode(q.context, q.question)).z)
        Compact.fit(codes, latents, torch.ones(len(codes))).save(lw.folder)
        wires.append(lw.encode(short_questions[0].context, short_questions[0].question, codec="compact2"))
        assert lw.wire(wires[-1]).m == M
    with pytest.raises(ValueError, match="tables of another checkpoint"):
        lw.wire(wires[0])


def test_a_hub_id_is_fetched_and_what_is_nowhere_is_said_in_one_line(lw, monkeypatch):
    asked = {}
    monkeypatch.setattr("latentwire.api.encoding.hub_answers", lambda: False)
    for name, error in (("nobody/nothing", ValueError), ("./nowhere", FileNotFoundError)):
        with pytest.raises(error, match=f"no checkpoint .*{name}"):
            LatentWire.from_pretrained(name)
    monkeypatch.setattr(
        "latentwire.api.encoding.snapshot_download", lambda name, **how: asked.update(how, name=name) or str(lw.folder)
    )
    assert LatentWire.from_pretrained("somebody/wire", revision="v1").folder == lw.folder
    assert asked == {"name": "somebody/wire", "revision": "v1", "local_files_only": True}
    LatentWire.from_pretrained("somebody/wire", local_files_only=False)
    assert asked["local_files_only"] is False


def test_half_precision_keeps_the_encoders_id_and_other_adapters_do_too(lw, tmp_path):
    encoder, adapters, made = load_checkpoint(lw.folder, read_config(lw.folder)["llms"])
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.copy_(weight.half())
        adapters["qwen"].linear.weight.zero_()
    save_checkpoint(tmp_path / "full", encoder, adapters, made)
    save_checkpoint(tmp_path / "half", encoder.half(), adapters, made)
    assert LatentWire(tmp_path / "full").wire_id == LatentWire(tmp_path / "half").wire_id != lw.wire_id


def test_a_machine_that_only_reads_needs_no_encoder_file(lw, short_questions, tmp_path):
    folder = tmp_path / "readers"
    folder.mkdir()
    for path in [lw.folder / "config.json", *lw.folder.glob("adapter_qwen*")]:
        shutil.copy(path, folder)
    z = lw.encode(short_questions[0].context, short_questions[0].question)
    assert LatentWire(folder).reader("qwen").answer(z) == lw.reader("qwen").answer(z)


def test_the_two_halves_load_nothing_of_each_other(lw, short_questions, tmp_path):
    """Each in a process of its own: what is loaded is what is imported and held."""
    q = short_questions[0]
    code = (
        "import gc, sys\nfrom latentwire import LatentWire\n"
        "from transformers import PreTrainedModel\n"
        f"lw = LatentWire.from_pretrained({str(lw.folder)!r})\n"
    )
    held = "\nprint(*sorted({type(x).__name__ for x in gc.get_objects() if isinstance(x, PreTrainedModel)} ))\n"
    held += "print(*sorted(m for m in sys.modules if m.startswith('latentwire.')))\n"
    send = f"z = lw.encode({q.context!r}, {q.question!r})\nopen({str(tmp_path / 'z')!r}, 'wb').write(z)"
    read = f"ready = lw.reader('qwen')\nready.answer(open({str(tmp_path / 'z')!r}, 'rb').read())"

    def run(what):
        done = subprocess.run([sys.executable, "-c", code + what + held], capture_output=True, text=True, check=True)
        models, modules = done.stdout.splitlines()[-2:]
        return models.split(), modules.split()

    models, modules = run(send)
    assert "BertModel" in models and not [name for name in models if "CausalLM" in name]
    assert not {"latentwire.llms.frozen", "latentwire.llms.loading"} & set(modules)
    models, modules = run(read)
    assert "Qwen2ForCausalLM" in models and not {"BertModel", "LlamaForCausalLM"} & set(models)
    assert not [name for name in modules if name.startswith(("latentwire.models.encoders", "latentwire.models.back"))]


def test_the_package_itself_imports_nothing_slow():
    code = "import sys, latentwire; print('torch' in sys.modules, *latentwire.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "LatentWire", "Wire"]
    assert latentwire.Wire is Wire
    with pytest.raises(AttributeError, match="Nothing"):
        _ = latentwire.Nothing
