"""The benchmark compares like with like, and keeps what it has measured."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from latentwire.conditions.base import Reader
from latentwire.llms.frozen import FrozenLLM
from latentwire.llms.prompts import PromptBuilder
from latentwire.models.adapters import SOFT_VECTORS
from latentwire.reporting.charts import growth
from latentwire.reporting.tables import speed_markdown
from latentwire.studies import speed as room
from latentwire.studies.plain import PlainLLM, answer_batched, answer_one_by_one, teach_now
from latentwire.studies.settings import PARTS, BenchmarkSettings
from latentwire.studies.speed import benchmark, ratios
from latentwire.training.losses import answer_sums, distillation_sum
from latentwire.training.running import train
from latentwire.training.settings import TrainSettings
from latentwire.training.teacher import teach

ROOT = Path(__file__).parents[2]
NAMES = ["llama", "qwen"]
RATIOS = ("train_step_vs_plain", "text_eval_vs_loop", "text_eval_vs_batched", "prefill_text_vs_z_40",
          "answer_text_vs_z_80_at_once", "mfu_share_of_ceiling")  # fmt: skip


def test_ways_are_measured_in_turns_and_the_first_round_is_not_counted():
    times, order = iter([9.0, 9.0, 1.0, 3.0, 2.0, 4.0]), []
    bench = SimpleNamespace(config=SimpleNamespace(repeats=2), seconds=lambda work: work())
    ways = {name: lambda name=name: order.append(name) or next(times) for name in ("ours", "other")}
    assert room.Bench.side_by_side(bench, ways) == [{"ours": 1.0, "other": 3.0}, {"ours": 2.0, "other": 4.0}]
    assert order == ["ours", "other"] * 3


@pytest.mark.parametrize(("recompute", "deep"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("name", NAMES)
def test_the_plain_way_gives_the_same_loss_and_gradients(llms, questions, name, recompute, deep, tmp_path):
    llm = llms[name]
    some = questions[:9:2]
    prompts = PromptBuilder(llm.tokenizer, "prompt", "chat")
    plainly = Reader(PlainLLM(llm, recompute), prompts)
    torch.manual_seed(0)
    slots = torch.randn(len(some), 6, llm.width)
    layers, width = llm.kv_shape
    added = torch.randn(len(some), layers, 2, 6, width)
    labels, tails = [prompts.labels(q.answers[0], 3) for q in some], [prompts.tail(q.question) for q in some]
    ids, learned = [one.ids for one in labels], [one.learned for one in labels]
    assert not all(map(all, learned)), "some answer is longer than what is learned of it"
    found = []
    for way, lines in (
        (llm, teach(llm, "w", prompts, some, 3, cache=tmp_path)),
        (plainly.llm, teach_now(plainly, some, 3)),
    ):
        rows, deltas = slots.clone().requires_grad_(), added.clone().requires_grad_()
        scored = way.loss_with_prefix(prompts.head, list(rows), tails, ids, list(deltas) if deep else (), learned)
        sums = answer_sums(scored, [one.informative for one in labels])
        loss = sums["ce"] + sums["first_ce"] + distillation_sum(scored, [lines[q.id] for q in some])
        loss.backward()
        found.append((loss.detach(), sums["first_token_acc"], rows.grad, *([deltas.grad] if deep else ())))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-3, atol=1e-4)  # the cache keeps the teacher in half precision


@pytest.mark.parametrize(("recompute", "times"), [(False, 1), (True, 2)])
def test_a_plain_step_that_recomputes_runs_its_layers_twice_and_leaves_the_model_as_it_was(llms, recompute, times):
    llm, calls = llms["llama"], []
    hook = llm.model.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    slot = torch.zeros(4, llm.width, requires_grad=True)
    PlainLLM(llm, recompute).loss_with_prefix((5, 6), [slot], [[7]], [[8, 9]]).nll.sum().backward()
    hook.remove()
    assert len(calls) == times and slot.grad.abs().sum() > 0
    if recompute:
        with pytest.raises(ValueError, match=r"recompute=True: keys and values"):
            PlainLLM(llm, recompute).loss_with_prefix((5,), [slot], [[7]], [[8]], [torch.zeros(1)])
    assert not llm.model.training and not llm.model.is_gradient_checkpointing and not llm.embed([5]).requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_the_plain_ways_give_the_same_answers(llms, questions, name):
    llm = llms[name]
    prompts, some = PromptBuilder(llm.tokenizer, "prompt", "zero_shot"), questions[:40:9]
    head, tails = prompts.head, [prompts.tail(q.question) for q in some]
    slots = [prompts.plain(prompts.content_text(q.context, q.question)) for q in some]
    ours = llm.generate_with_prefix(head, [llm.embed(s) for s in slots], tails, 6)
    whole = [[*head, *slot, *tail] for slot, tail in zip(slots, tails, strict=True)]
    assert ours == answer_one_by_one(llm, whole, 6) == answer_batched(llm, whole, 6)


def test_attention_is_counted_with_fewer_heads_of_keys_too():
    query, pair = torch.randn(1, 4, 64, 16), torch.randn(1, 2, 64, 16)
    count = room._operations(lambda: scaled_dot_product_attention(query, pair, pair, enable_gqa=True))
    assert count == 2 * 4 * (2 * 64 * 64 * 16)  # two products, four heads of queries


def config(folder, encoder_folder, **changes):
    small = {"dataset": "sample", "batch_size": 2, "steps": 2, "repeats": 2, "latent_len": 8, "d_z": 24, "k": 2,
             "max_new_tokens": 2, "device": "cpu", "encoder_id": encoder_folder, "save_dir": str(folder)}  # fmt: skip
    return BenchmarkSettings(**(small | changes))


@pytest.fixture
def small(tiny_models, monkeypatch):
    monkeypatch.setattr(room, "_LENGTHS", (40, 80))
    monkeypatch.setattr(room, "_BATCHES", (1, 2))
    monkeypatch.setattr(room, "_SIZES", (4, 8))
    monkeypatch.setattr(room, "_GROWN_WORDS", (20, 200))
    monkeypatch.setattr(room, "_MATRICES", {"cpu": (32, 64)})


@pytest.mark.usefixtures("small")
def test_everything_is_measured_once(tmp_path, encoder_folder, monkeypatch, capsys):
    first = benchmark(config(tmp_path / "b", encoder_folder, parts="train,text_eval,serving"))
    monkeypatch.setitem(room.PARTS, "train", lambda bench: pytest.fail("measured again"))
    results = benchmark(config(tmp_path / "b", encoder_folder))
    assert results == json.loads((tmp_path / "b" / "results.json").read_text())
    assert results["schema"] == 1 and results["hardware"]["threads"] > 0
    assert results["raw"][: len(first["raw"])] == first["raw"]
    assert set(RATIOS) <= results["ratios"].keys()
    assert all(0 < x["min"] <= x["median"] <= x["max"] for x in results["ratios"].values())
    for line in (line for line in results["raw"] if line["part"] == "serving"):
        assert line["kv_bytes_text"] / line["kv_bytes_z"] == line["text_positions"] / 8
    grown = {(line["name"], line["value"]) for line in results["raw"] if line["name"].startswith("growth_")}
    assert {
        ("growth_batch", 2),
        ("growth_m", 4),
        ("growth_llms", 2),
        ("growth_questions", 4),
        ("growth_words_encoded", 200),
        ("growth_words_read", 200),
        ("growth_processes", 2),
    } <= grown
    assert (tmp_path / "b" / "growth.png").stat().st_size > 1000
    table = (tmp_path / "b" / "table.md").read_text()
    assert "| train_step_vs_plain |" in table and "| words read | 200 |" in table and table in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_a_checkpoint_is_measured_with_what_it_adds_to_keys_and_values(tmp_path, monkeypatch):
    begin = {"stage": "codebook", "adapter_type": "deep", "source": "context", "kd_weight": 0.0, "d_z": 24}
    train(TrainSettings(**begin, dataset="sample", latent_len=8, device="cpu", save_dir=str(tmp_path / "begun")))
    ckpt, added, prefill = str(tmp_path / "begun" / "checkpoint_best"), [], FrozenLLM.prefill
    monkeypatch.setattr(FrozenLLM, "prefill", lambda self, *read: (added.append(read[3:]), prefill(self, *read))[1])
    results = benchmark(config(tmp_path / "b", "", ckpt=ckpt, parts="serving,encode"))
    with_latents = [(deltas[0].shape[2], constant) for deltas, constant in filter(None, added)]
    assert set(with_latents) == {(SOFT_VECTORS + 8, SOFT_VECTORS)}
    for line in (line for line in results["raw"] if line["part"] == "serving"):
        assert line["kv_bytes_text"] / line["kv_bytes_z"] == line["text_positions"] / 8, "constant places cost nothing"
    assert f"Checkpoint: {ckpt}." in (tmp_path / "b" / "table.md").read_text()
    with pytest.raises(ValueError, match="ckpt"):
        config(tmp_path / "b", "", ckpt=ckpt, random_weights=True).check()


def test_ratios_add_the_llms_up_repeat_by_repeat():
    others = {"a": (2.0, 4.0), "b": (4.0, 6.0)}
    raw = [{"name": "x", "llm": llm, "ours": 1.0, "other": s} for llm, seconds in others.items() for s in seconds]
    assert ratios(raw)["x"] == {"min": 3.0, "median": 4.0, "max": 5.0}


def test_an_encoder_that_never_pays_is_said_so():
    seconds = {"encode": 1.0, "prefill_z": 0.5, "prefill_text": 0.4, "decode_z": 0.1, "decode_text": 0.2}
    line = {"part": "serving", "name": "ttft", "llm": "a", "text_positions": 40, "kv_bytes_z": 1, "kv_bytes_text": 5}
    hardware = {"gpus": [], "processor": "P", "threads": 2, "torch": "2", "transformers": "5"}
    table = speed_markdown({"hardware": hardware, "raw": [line | {"seconds": seconds}]})
    assert table.splitlines()[-1].endswith("| never |")
    assert "| 1.500 s | 0.400 s | 0.100 s | 0.200 s |" in table
    table = speed_markdown({"hardware": hardware, "raw": [line | {"seconds": seconds | {"prefill_text": 0.9}}]})
    assert table.splitlines()[-1].endswith("| 2.5 |")


def test_what_is_answered_at_once_is_told_per_second():
    hardware = {"gpus": ["G"], "torch": "2", "transformers": "5"}
    line = {"part": "together", "name": "x", "llm": "a", "text_positions": 40, "questions": 6, "other": 3.0}
    table = speed_markdown({"hardware": hardware, "raw": [line | {"ours": seconds} for seconds in (9.0, 0.5, 1.5)]})
    assert table.splitlines()[-1] == "| 40 | a | 6 | 4.00 | 2.00 |"


def test_a_ratio_says_of_how_many_repeats_it_is():
    hardware = {"gpus": ["G"], "torch": "2", "transformers": "5"}
    line = {"part": "train", "name": "train_step", "ours": 1.0}
    raw = [line | {"llm": llm, "other": 2.0} for llm in "ab" for _ in range(3)]
    table = speed_markdown({"hardware": hardware, "raw": raw, "ratios": room.ratios(raw)})
    assert "| train_step | 2.00 | 2.00 | 2.00 | 3 |" in table


def test_a_chart_of_growth_has_a_panel_for_each_thing_and_a_line_of_proportion():
    lines = [
        {"name": f"growth_{kind}", "value": n, "seconds": 2.0 * n, "peak_memory_mb": memory}
        for kind, memory in (("batch", 500.0), ("words_read", None))
        for n in (1, 4)
    ]
    first, second, *beside = growth(lines).axes
    assert [panel.get_xlabel() for panel in (first, second)] == ["batch", "words read"] and len(beside) == 1
    proportional, measured = first.lines
    assert list(proportional.get_ydata()) == [0.0, 8.0] and list(measured.get_ydata()) == [2.0, 8.0]


SHOWN = ["52_together", "50_gpu_speed/large", "50_gpu_speed/small", "47_serving", "31_speed", "31_speed/batch16",
         "31_speed/text16", "31_speed/growth"]  # fmt: skip


@pytest.mark.parametrize("name", ["16_speed", *SHOWN])
def test_a_records_table_states_what_was_measured(name):
    record = ROOT / "results" / name
    assert (record / "table.md").read_text() == speed_markdown(json.loads((record / "results.json").read_text()))


@pytest.mark.parametrize("name", SHOWN)
def test_the_document_shows_what_was_measured(name):
    table = (ROOT / "results" / name / "table.md").read_text()
    assert table.partition("| grows |")[0] in (ROOT / "docs" / "performance.md").read_text()


def test_every_part_is_declared_and_measured():
    assert tuple(room.PARTS) == PARTS


@pytest.mark.parametrize(
    ("change", "match"), [({"parts": "train,speed"}, "parts='speed'"), ({"repeats": 0}, "repeats=0")]
)
def test_a_wrong_setting_is_refused(tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        config(tmp_path, "x", **change)
