"""A third LLM joins a finished wire: it reads what is sent, and nobody else's weights change by a bit."""

import dataclasses
import json

import pytest
import torch
from conftest import make_llm
from safetensors.torch import load_file
from training.run_tools import Stopped, changed, lines_of, read, stop_in_step, timeless

from latentwire import LatentWire
from latentwire.models.closed_form import least_squares_map
from latentwire.models.exporting import export
from latentwire.models.weights import read_config
from latentwire.reporting.card import card
from latentwire.training.running import train
from latentwire.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("surroundings")
NAMES = ("encoder", "adapter_llama", "adapter_qwen")


@pytest.fixture(scope="module")
def third(texts, tmp_path_factory):
    """A model of another width and another vocabulary, as a folder."""
    folder = tmp_path_factory.mktemp("third") / "model"
    llm = make_llm("qwen", texts[::3])
    llm.model.save_pretrained(folder)
    llm.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def join(short, joint, third, monkeypatch, tmp_path):
    """join(**changes): the folder of a run that joins the checkpoint of stage joint."""
    monkeypatch.setenv("THIRD_ID", third)

    def run(folder="joined", **changes):
        settings = {"stage": "join", "init": str(joint / "checkpoint_best"), "llms": "third"} | changes
        train(short(tmp_path / folder, **settings))
        return tmp_path / folder

    return run


def test_a_new_reader_is_of_the_others_kind_unless_nothing_is_trained(join):
    deep = str(join("deep", llms="llama", samples=16, adapter_type="deep", lr=1e-6) / "checkpoint_last")
    trained, closed = join("trained", samples=16, init=deep), join("closed", samples=0, init=deep)
    assert read_config(trained / "checkpoint_last")["adapters"]["third"] == "deep"
    assert read_config(closed / "checkpoint_best")["adapters"]["third"] == "residual_mlp"


def test_the_map_is_the_weighted_least_squares_one():
    drawn = torch.Generator().manual_seed(0)
    codebook, true = torch.randn(200, 6, generator=drawn), torch.randn(9, 6, generator=drawn)
    counts = torch.randint(0, 50, (200,), generator=drawn).double()
    table = codebook @ true.T + 3.0
    weight, bias = least_squares_map(codebook, table, counts)
    assert torch.allclose(weight, true, atol=1e-4) and torch.allclose(bias, torch.full((9,), 3.0), atol=1e-4)
    table[counts == counts.min()] += 100  # tokens that hardly occur hardly count
    noisy = table + torch.randn(table.shape, generator=drawn)
    found, off = least_squares_map(codebook, noisy, counts)

    def error(weight, bias):
        return (((counts + 1)[:, None] * (codebook @ weight.T + bias - noisy).square()).sum()).item()

    worse = [(found * 1.01, off), (found, off + 0.01), (true, torch.full((9,), 3.0))]
    assert error(found, off) < min(error(*one) for one in worse)


def test_in_closed_form_it_reads_the_wire_and_leaves_all_others_as_they_are(join, joint, questions):
    made = join(samples=0) / "checkpoint_best"
    before = joint / "checkpoint_best"
    assert not [name for name in NAMES if changed(before, made, name)]
    config = read_config(made)
    assert list(config["llms"]) == ["llama", "qwen", "third"] and config["joined"]["third"]["samples"] == 0
    assert config["wire_id"] == read_config(before)["wire_id"] and config["stage"] == "joint"
    assert 0 < config["interface"]["third"]["explained_variance"] <= 1
    old, new = LatentWire(before), LatentWire(made)
    q = questions[0]
    wire = old.encode(q.context, q.question)
    assert new.reader("qwen").answer(wire) == old.reader("qwen").answer(wire)
    assert isinstance(new.reader("third").answer(wire), str)


def test_trained_it_changes_its_own_adapter_alone(join, joint):
    closed, made = join(samples=0) / "checkpoint_best", join("trained", samples=16) / "checkpoint_last"
    assert not [name for name in NAMES if changed(joint / "checkpoint_best", made, name)]
    assert changed(closed, made, "adapter_third") >= {"linear.weight", "mlp.2.weight"}
    line = json.loads((made.parent / "metrics.jsonl").read_text().splitlines()[1])
    assert line["grad_norms"].keys() == {"adapter third"}


def test_a_reader_that_is_there_begins_as_it_is_and_may_grow(join, joint):
    """One step moves little: the old weights are where it began; what `deep` has besides is new."""
    before = joint / "checkpoint_best"
    made = join(llms="qwen", samples=16, adapter_type="deep", lr=1e-6) / "checkpoint_last"
    assert not [name for name in NAMES[:2] if changed(before, made, name)]
    old, new = read(before / "adapter_qwen.pt"), read(made / "adapter_qwen.pt")
    assert new.keys() - old.keys() == {"unit", "preamble", "down.weight", "up"} and not old.keys() - new.keys()
    assert all(torch.allclose(new[name], old[name], atol=1e-4) for name in old)
    config = read_config(made)
    assert config["adapters"] == {"llama": "residual_mlp", "qwen": "deep"} and config["joined"]["qwen"]["samples"] == 16
    with pytest.raises(ValueError, match=r"would lose down.weight, preamble, unit, up of .*; name deep"):
        join("less", llms="qwen", samples=16, adapter_type="residual_mlp", init=str(made))


def changed_half(trained, exported, name):
    """Weights of a reader that an export does not have in half precision."""
    one, other = read(trained / f"adapter_{name}.pt"), load_file(exported / f"adapter_{name}.safetensors")
    return {key for key in one.keys() | other.keys() if not torch.equal(one[key].half(), other[key])}


def test_an_export_takes_readers_that_joined_elsewhere(join, joint, codebook, questions, tmp_path):
    before, shipped = joint / "checkpoint_best", tmp_path / "shipped"
    others = {"here": join("here", samples=0), "there": join("there", llms="qwen", samples=16, adapter_type="deep")}
    folders = [others["here"] / "checkpoint_best", others["there"] / "checkpoint_last"]
    made = export(before, shipped, folders)
    assert made["llms"].keys() == {"llama", "qwen", "third"} == made["interface"].keys()
    assert made["adapters"] == {"llama": "residual_mlp", "qwen": "deep", "third": "residual_mlp"}
    assert made["joined"].keys() == {"qwen", "third"} and str(tmp_path) not in json.dumps(made)
    for folder, name in zip(folders, ("third", "qwen"), strict=True):
        assert not changed_half(folder, shipped, name)
    text = card(made, shipped, "")
    assert "`qwen`** by stage `join`" in text and "16 questions" in text and "\n  deep, batch" in text
    lw = LatentWire(shipped)
    wire = lw.encode(questions[0].context, questions[0].question)
    assert all(isinstance(lw.reader(name).answer(wire), str) for name in made["llms"])
    with pytest.raises(ValueError, match=r"readers=.*no reader of it was trained beyond"):
        export(before, shipped, [before])
    with pytest.raises(ValueError, match=r"readers=.*read other wires"):
        export(before, shipped, [codebook])
    more = [
        join(name, llms=name, samples=16, init=str(shipped), lr=0.01) / "checkpoint_last" for name in ("qwen", "llama")
    ]
    again = export(shipped, tmp_path / "again", more)
    for name, folder in zip(("qwen", "llama"), more, strict=True):
        assert changed_half(folder, tmp_path / "again", name) == set(), "not the one that its neighbour began with"
        assert again["joined"][name]["git"] and "validation" not in again
    with pytest.raises(ValueError, match=r"readers=.*trained 'qwen', too"):
        export(shipped, tmp_path / "twice", [more[0], more[0]])


def test_an_encoder_without_a_joint_stage_is_exported_once_every_reader_has_joined(join, scores, tmp_path):
    init = str(scores / "checkpoint_best")
    joined = [join(name, llms=name, samples=16, init=init) / "checkpoint_last" for name in ("llama", "qwen")]
    with pytest.raises(ValueError, match="with a reader of stage join for each LLM"):
        export(scores / "checkpoint_best", tmp_path / "shipped", joined[:1])
    made = export(scores / "checkpoint_best", tmp_path / "shipped", joined)
    assert made["stage"] == "scores" and made["joined"].keys() == {"llama", "qwen"}
    again = export(
        tmp_path / "shipped", tmp_path / "more", [join(samples=0, init=str(tmp_path / "shipped")) / "checkpoint_best"]
    )
    assert again["joined"].keys() == {"llama", "qwen", "third"}
    assert "**Made by** stage `scores`" in card(made, tmp_path / "shipped", "")


@pytest.mark.parametrize("who", ["third", "llama,third"])
def test_killed_and_started_again_it_ends_with_the_same_adapters(join, joint, monkeypatch, who):
    """Also where one of two LLMs reads the wire already, and the other joins it."""
    run, learned = Trainer.run, []

    def noted(self):
        learned.append([found.name for found in self.components])
        assert learned[-1] == learned[0], "each has its own state of the optimizer, which asks for no shape"
        run(self)

    monkeypatch.setattr(Trainer, "run", noted)
    whole = join("whole", samples=16, llms=who) / "checkpoint_last"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_in_step(patch, 1)
        join("parts", samples=16, llms=who)
    parts = join("parts", samples=16, llms=who) / "checkpoint_last"
    lines = [timeless(lines_of(folder.parent)) for folder in (whole, parts)]
    assert [line["step"] for line in lines[0]] == [0, 1, 2, 2] and lines[0] == lines[1]
    for name in who.split(","):
        assert not changed(whole, parts, f"adapter_{name}")
        assert read(whole / f"adapter_{name}.pt").keys() == read(parts / f"adapter_{name}.pt").keys()
    assert bool(changed(joint / "checkpoint_best", parts, "adapter_llama")) == ("llama" in who)


def test_continued_it_reads_as_many_questions_at_once_as_before(join, monkeypatch):
    asked = []

    def planned(config, _):
        asked.append(config.micro_batch)
        return dataclasses.replace(config, micro_batch=config.micro_batch or 2), "memory: enough for two at a time"

    monkeypatch.setattr("latentwire.training.running.within_memory", planned)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_in_step(patch, 1)
        join("parts", samples=16)
    join("parts", samples=16)
    assert asked == [None, 2]


def test_what_cannot_join_is_refused_by_name(join, short, codebook, tmp_path):
    with pytest.raises(ValueError, match=r"llms='qwen'.*has a reader of this name already"):
        join(llms="qwen", samples=0)
    with pytest.raises(ValueError, match="samples=0: stage joint needs questions"):
        short(tmp_path / "none", stage="joint", init=str(codebook), samples=0)
