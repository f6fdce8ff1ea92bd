"""Which model an LLM's name stands for, and with which wording it is asked."""

import json
from dataclasses import dataclass

import pytest

from latentwire.llms import known
from latentwire.llms.known import CHOSEN_WORDINGS, DEFAULT_LLMS, LARGE_LLMS, LARGE_SHAPES, MORE_LLMS, LLMSettings
from latentwire.llms.offline import OFFLINE_LLMS, OFFLINE_MODELS
from latentwire.utils.cli import option

BOTH = ",".join(DEFAULT_LLMS)


@dataclass(kw_only=True)
class Begun(LLMSettings):
    """Of a program that begins with a checkpoint."""

    ckpt: str = option("", "checkpoint folder")


@pytest.fixture(autouse=True)
def cpu_without_ids(monkeypatch):
    for name in ("LLAMA_ID", "QWEN_ID", "GEMMA_ID", "PHI_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(known, "has_gpu", lambda: False)


@pytest.fixture
def ckpt(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"llms": {"qwen": "some/qwen"}}))
    return str(tmp_path)


def test_names_are_read_with_spaces_and_at_least_one_is_needed():
    assert LLMSettings(llms=" llama, gemma ,").llm_names == ["llama", "gemma"]
    for nobody in ("", " , "):
        with pytest.raises(ValueError, match=r"llms='.*': name at least one"):
            LLMSettings(llms=nobody)


def test_the_environment_names_a_model_before_the_checkpoint_and_the_checkpoint_before_the_default(ckpt, monkeypatch):
    assert LLMSettings().llm_ids == DEFAULT_LLMS
    assert Begun(ckpt=ckpt).llm_ids == {"qwen": "some/qwen"}
    assert Begun(ckpt=ckpt, llms=BOTH).llm_ids == {"llama": DEFAULT_LLMS["llama"], "qwen": "some/qwen"}
    monkeypatch.setenv("QWEN_ID", "other/qwen")
    assert Begun(ckpt=ckpt).llm_ids["qwen"] == LLMSettings().llm_ids["qwen"] == "other/qwen"
    monkeypatch.setenv("QWEN_ID", "")
    assert Begun(ckpt=ckpt).llm_ids["qwen"] == "some/qwen", "an empty variable is not set"


def test_a_gpu_has_larger_models_by_default(ckpt, monkeypatch):
    monkeypatch.setattr(known, "has_gpu", lambda: True)
    assert LLMSettings().llm_ids == LARGE_LLMS
    assert LLMSettings(device="cpu").llm_ids == DEFAULT_LLMS
    assert Begun(ckpt=ckpt, llms=BOTH).llm_ids == {"llama": LARGE_LLMS["llama"], "qwen": "some/qwen"}


def test_a_name_without_a_model_is_refused_with_the_remedy_until_it_has_one(monkeypatch):
    settings = LLMSettings(llms="llama,phi")
    with pytest.raises(ValueError, match="llms='phi': set PHI_ID to a hub id or a model folder"):
        _ = settings.llm_ids
    monkeypatch.setenv("PHI_ID", "some/phi")
    assert settings.llm_ids == {"llama": DEFAULT_LLMS["llama"], "phi": "some/phi"}


@pytest.mark.parametrize("gpu", [False, True])
def test_a_model_beyond_the_defaults_has_a_name_on_every_machine_and_is_used_only_by_it(monkeypatch, gpu):
    monkeypatch.setattr(known, "has_gpu", lambda: gpu)
    assert LLMSettings(llms="gemma").llm_ids == {"gemma": MORE_LLMS["gemma"]}
    assert LLMSettings(llms="gemma").llm_wordings == {"gemma": "plain"}
    monkeypatch.setenv("GEMMA_ID", "some/gemma")
    assert LLMSettings(llms="gemma").llm_ids == {"gemma": "some/gemma"}
    assert LLMSettings().llm_names == list(DEFAULT_LLMS), "no default list has it"
    assert set(MORE_LLMS.values()) <= OFFLINE_LLMS.keys() - OFFLINE_MODELS.keys(), "and no first run fetches it"


def test_a_model_has_the_wording_that_was_chosen_for_it_unless_another_is_named(monkeypatch):
    chosen = {name: CHOSEN_WORDINGS[llm_id] for name, llm_id in DEFAULT_LLMS.items()}
    assert LLMSettings().llm_wordings == chosen and len(set(chosen.values())) == 2
    assert LLMSettings(wordings="llama=zero_shot, ").llm_wordings == chosen | {"llama": "zero_shot"}
    monkeypatch.setenv("LLAMA_ID", "some/llama")
    assert LLMSettings().llm_wordings == chosen | {"llama": "chat"}, "a wording belongs to a model, not to a name"
    for wrong, says in (
        ("gemma=chat", "wordings='gemma'.*llama,qwen"),
        ("llama", "wordings='llama': write LLM=WORDING"),
    ):
        with pytest.raises(ValueError, match=says):
            _ = LLMSettings(wordings=wrong).llm_wordings


def test_a_checkpoints_llm_keeps_the_wording_that_it_was_trained_with(tmp_path, monkeypatch):
    made = {"llms": {"llama": DEFAULT_LLMS["llama"]}, "wordings": {"llama": "zero_shot"}}
    (tmp_path / "config.json").write_text(json.dumps(made))
    chosen, ckpt = LLMSettings().llm_wordings, str(tmp_path)
    assert chosen["llama"] != "zero_shot"
    assert Begun(ckpt=ckpt, llms=BOTH).llm_wordings == chosen | {"llama": "zero_shot"}
    assert Begun(ckpt=ckpt, llms=BOTH, wordings="llama=chat").llm_wordings == chosen | {"llama": "chat"}
    monkeypatch.chdir(tmp_path)
    assert Begun().llm_wordings == chosen, "no checkpoint was named"
    monkeypatch.setenv("LLAMA_ID", "other/llama")
    assert Begun(ckpt=ckpt).llm_wordings["llama"] == "chat", "it is another LLM"


def test_the_large_models_have_shapes_for_times_without_their_weights():
    assert LARGE_SHAPES.keys() == LARGE_LLMS.keys() == DEFAULT_LLMS.keys()


@pytest.mark.parametrize(("wrong", "match"), [({"dtype": "int8"}, "dtype='int8'.*bfloat16"), ({"max_new_tokens": 0},
                                              "max_new_tokens=0: must be at least 1")])  # fmt: skip
def test_a_wrong_setting_is_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        LLMSettings(**wrong)


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B", "./model", "offline:x"])
def test_a_models_id_is_no_name(name):
    with pytest.raises(ValueError, match="give it a name, for example x, and set X_ID"):
        LLMSettings(llms=name)


def test_the_variable_of_a_name_can_be_exported_by_every_shell(monkeypatch):
    monkeypatch.setenv("PHI_3_ID", "some/model")
    assert LLMSettings(llms="phi-3").llm_ids == {"phi-3": "some/model"}
