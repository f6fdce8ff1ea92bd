"""An LLM comes from where it is said to be, whole, or it is refused with the remedy."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from latentwire.llms.known import LARGE_SHAPES
from latentwire.llms.loading import counted_shape, load_llm, random_llm


@pytest.mark.parametrize(
    ("llm_id", "error", "match"),
    [
        ("offline:gpt-9", ValueError, "offline:gpt-9.*LLAMA_ID"),
        ("/no/such/model", FileNotFoundError, "/no/such/model.*LLAMA_ID"),
    ],
)
def test_a_model_that_is_not_there_is_named_with_the_remedy(llm_id, error, match):
    with pytest.raises(error, match=match):
        load_llm("llama", llm_id, "cpu", "float32")


def test_an_unreadable_model_is_named_with_the_remedy(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ValueError, match=r"cannot load.*LLAMA_ID"):
        load_llm("llama", str(tmp_path), "cpu", "float32")


def with_weights(source, folder, change):
    """A copy of a model folder whose weights went through `change`."""
    shutil.copytree(source, folder)
    weights = {key: value.clone() for key, value in load_file(f"{source}/model.safetensors").items()}
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_a_model_with_a_missing_weight_is_refused(llm_folders, tmp_path):
    key = "model.layers.1.mlp.up_proj.weight"
    folder = with_weights(llm_folders["LLAMA_ID"], tmp_path / "model", lambda weights: weights.pop(key))
    with pytest.raises(ValueError, match=rf"lacks the weights \['{key}'\].*LLAMA_ID"):
        load_llm("llama", folder, "cpu", "float32")


def test_a_model_with_misshapen_weights_is_refused(llm_folders, tmp_path):
    def narrow(weights):
        weights["lm_head.weight"] = weights["lm_head.weight"][:, :8].contiguous()

    folder = with_weights(llm_folders["QWEN_ID"], tmp_path / "model", narrow)
    with pytest.raises(ValueError, match=r"cannot load.*QWEN_ID"):
        load_llm("qwen", folder, "cpu", "float32")


def test_a_model_with_cut_weights_is_refused(llm_folders, tmp_path):
    folder = shutil.copytree(llm_folders["QWEN_ID"], tmp_path / "model")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cannot load.*QWEN_ID"):
        load_llm("qwen", str(folder), "cpu", "float32")


def test_random_weights_come_in_the_shape_that_is_asked_for(llm_folders, monkeypatch):
    shape = {"model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000}  # fmt: skip
    monkeypatch.setitem(LARGE_SHAPES, "qwen", shape)
    llm = random_llm("qwen", llm_folders["QWEN_ID"], "cpu", "bfloat16")
    assert llm.width == 32 and llm.dtype == torch.bfloat16 and len(llm.model.get_decoder().layers) == 2
    assert llm.kv_bytes == 2 * 2 * 2 * 8 * 2  # keys and values, layers, heads, their width, bytes
    assert isinstance(llm.generate_with_prefix((1, 2), [torch.randn(3, 32)], [[3]], 2)[0], str)
    with pytest.raises(ValueError, match="llms='gemma'"):
        random_llm("gemma", llm_folders["QWEN_ID"], "cpu", "bfloat16")


def test_a_device_map_is_accelerates(llms, llm_folders, monkeypatch):
    monkeypatch.setenv("DEVICE_MAP", "auto")
    spread = load_llm("llama", llm_folders["LLAMA_ID"], "cpu", "float32")
    assert spread.weights_sha256() == llms["llama"].weights_sha256()
    monkeypatch.setenv("DEVICE_MAP", "sideways")
    with pytest.raises(ValueError, match="balanced_low_0"):  # accelerate names those it knows
        load_llm("llama", llm_folders["LLAMA_ID"], "cpu", "float32")


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_the_shape_of_a_model_is_known_without_its_weights(llms, llm_folders, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(f"{llm_folders[f'{name.upper()}_ID']}/config.json", folder)
    shape, model = counted_shape(name, str(folder)), llms[name].model
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    assert (shape.layers, shape.width, shape.inner) == (2, llms[name].width, 2 * llms[name].width)
    assert shape.vocabulary == len(llms[name].embedding_table()) == len(llms[name].tokenizer)
    assert 2 * shape.layers * shape.key_width * 4 == llms[name].kv_bytes, "keys and values, layers, width, bytes"


def test_a_folder_may_be_named_from_the_home_folder(llm_folders, monkeypatch):
    home, _, name = llm_folders["QWEN_ID"].rpartition("/")
    monkeypatch.setenv("HOME", home)
    assert counted_shape("qwen", f"~/{name}") == counted_shape("qwen", llm_folders["QWEN_ID"])


def test_the_shape_of_a_model_that_is_not_there_is_refused_like_the_model(tmp_path):
    with pytest.raises(ValueError, match=r"offline:gpt-9.*QWEN_ID"):
        counted_shape("qwen", "offline:gpt-9")
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ValueError, match=r"cannot load.*QWEN_ID"):
        counted_shape("qwen", str(tmp_path))


def test_a_tokenizer_that_is_larger_than_its_model_is_refused_at_loading(llm_folders, tmp_path):
    folder = shutil.copytree(llm_folders["LLAMA_ID"], tmp_path / "larger")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<one more>", "<and more>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"has \d+ embeddings, and its tokenizer tokens up to \d+"):
        load_llm("llama", str(folder), "cpu", "float32")
