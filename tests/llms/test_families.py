"""Families of LLMs: what each reads from embeddings is what transformers itself reads from token ids.

One line of ATTENTION adds a family, one of TOKENIZERS a kind of tokenizer; docs/models.md says what they stand for.
"""

import json

import pytest
import torch
from conftest import make_sentencepiece, make_tokenizer
from llms.test_frozen import prompts_of, reference_answers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from latentwire.llms.frozen import FrozenLLM
from latentwire.llms.prompts import WORDINGS, PromptBuilder

CLOSE = {"rtol": 0, "atol": 1e-4}
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.3, "bos_token_id": 0,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024}
_MIXED = ["sliding_attention", "full_attention"]
# The prompts below have a head of about 60 positions and rows of up to 200: windows shorter than the head, between
# head and whole, and beyond everything.
ATTENTION = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, sliding 9": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9,
                         "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral, sliding 16": {"model_type": "mistral", "sliding_window": 16},
    "mistral, sliding 100": {"model_type": "mistral", "sliding_window": 100},
    "mistral, sliding 1000": {"model_type": "mistral", "sliding_window": 1000},
    "mixtral, sliding 16": {"model_type": "mixtral", "sliding_window": 16, "num_local_experts": 2},
    "qwen3-moe": {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "deepseek-v3": {"model_type": "deepseek_v3", "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
                    "qk_nope_head_dim": 4, "v_head_dim": 6, "num_key_value_heads": 4, "n_routed_experts": 4,
                    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
                    "first_k_dense_replace": 1, "n_shared_experts": 1},
    "phi3": {"model_type": "phi3"},
    "phi3, sliding 16": {"model_type": "phi3", "sliding_window": 16},
    "gemma": {"model_type": "gemma", "head_dim": 8},
    "gemma2, sliding 16": {"model_type": "gemma2", "sliding_window": 16, "head_dim": 8},
    "gemma3, sliding 16": {"model_type": "gemma3_text", "sliding_window": 16, "head_dim": 8, "layer_types": _MIXED},
    "gemma3, sliding 100": {"model_type": "gemma3_text", "sliding_window": 100, "head_dim": 8, "layer_types": _MIXED},
    "gpt2": {"model_type": "gpt2", **_GPT},
    "olmo2": {"model_type": "olmo2"},
    "olmo3, sliding 16": {"model_type": "olmo3", "sliding_window": 16, "layer_types": _MIXED},
    "granite": {"model_type": "granite", "embedding_multiplier": 12.0, "logits_scaling": 8.0},
    "smollm3": {"model_type": "smollm3"},
    "cohere2, sliding 16": {"model_type": "cohere2", "sliding_window": 16, "layer_types": _MIXED},
    "gpt-oss, sliding 16": {"model_type": "gpt_oss", "sliding_window": 16, "num_local_experts": 2, "head_dim": 8,
                            "num_experts_per_tok": 1},
    "llama4, chunks of 32": {"model_type": "llama4_text", "attention_chunk_size": 32, "intermediate_size_mlp": 64,
                             "num_local_experts": 2, "head_dim": 8},
    "gpt-neo, local 16": {"model_type": "gpt_neo", "num_layers": 2, "num_heads": 4, "window_size": 16,
                          "attention_types": [[["local", "global"], 1]]},
    "starcoder2, sliding 16": {"model_type": "starcoder2", "sliding_window": 16},
    "gpt-neox": {"model_type": "gpt_neox"},
    "opt": {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"model_type": "bloom", "n_head": 4, "n_layer": 2},
    "falcon, alibi": {"model_type": "falcon", "alibi": True},
    "mpt": {"model_type": "mpt", "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 1024},
}  # fmt: skip
COPIED = ("deepseek-v3", "bloom", "mpt")  # whose head is copied to each row
# Whose layers have no keys and values of their own that could be added to.
SHALLOW = ("deepseek-v3", "phi3", "gpt2", "llama4", "gpt-neo", "gpt-neox", "bloom", "falcon", "mpt")
LIMITED = [name for name in ATTENTION if "," in name and "alibi" not in name]


def sentencepiece_with_bytes(size, texts):
    """BPE with word-start signs whose unknown characters are read byte by byte; bytes are text, not special tokens."""
    made = make_sentencepiece(size, texts)
    described = json.loads(made.backend_tokenizer.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(described))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sentencepiece_without_bytes(size, texts):
    """BPE with word-start signs whose unknown characters, a new line among them, are <unk>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([text.replace("\n", " ") for text in texts], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram(size, texts):
    """Likeliest pieces with word-start signs, unknown characters as <unk>."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([text.replace("\n", " ") for text in texts], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece(size, texts, **more):
    """Lower-case words in pieces: neither spaces nor new lines are tokens."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **more)


def with_added_tokens(size, texts):
    """Byte-level BPE to whose vocabulary special tokens were added later, one of them an end of turn."""
    tokenizer = make_tokenizer(size, texts, chat=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}<|assistant|>\n"
    )
    return tokenizer


TOKENIZERS = {
    "byte-level": make_tokenizer,
    "byte-level without template": lambda size, texts: make_tokenizer(size, texts, chat=False),
    "byte-level, tokens added": with_added_tokens,
    "sentencepiece with bytes": sentencepiece_with_bytes,
    "sentencepiece without bytes": sentencepiece_without_bytes,
    "wordpiece": lambda size, texts: wordpiece(size, texts, eos_token="[SEP]"),
}


def make(name, tokenizer, **more):
    """A random two-layer LLM of a family; more: settings of its own."""
    torch.manual_seed(len(name))
    family = SIZES | {"vocab_size": len(tokenizer)} | more
    return FrozenLLM(name, AutoModelForCausalLM.from_config(AutoConfig.for_model(**family)), tokenizer)


@pytest.fixture(scope="module")
def tokenizer(texts):
    return make_tokenizer(500, texts)


@pytest.fixture(scope="module", params=ATTENTION)
def family(request, tokenizer):
    return make(request.param, tokenizer, **ATTENTION[request.param])


@pytest.fixture(scope="module", params=TOKENIZERS)
def reader(request, texts):
    """A Llama that reads with each kind of tokenizer."""
    return make(request.param, TOKENIZERS[request.param](500, texts), **ATTENTION["llama"])


@pytest.fixture(scope="module")
def rows(questions):
    """rows(llm): head, ids of four slots of very different lengths, tails, answers."""
    some = [questions[i] for i in (0, 3, 50, 120)]

    def of(llm):
        head, slots, tails, answers = prompts_of(llm, some)
        return head, [slots[0][:2], slots[1][:40], slots[2][:90], slots[3][:130]], tails, answers

    return of


def same_as_transformers(llm, head, slots, tails, answers):
    """First-token logits, likelihoods and gradients of a batch against transformers' forward, row by row, on ids."""
    embeds = [llm.embed(slot).clone().requires_grad_() for slot in slots]
    prefill = llm.prefill(head, embeds, tails)
    scored, forced = llm.answer_nll(prefill, answers), llm.loss_with_prefix(head, embeds, tails, answers)
    forced.nll.sum().backward()
    for row, (slot, tail, answer) in enumerate(zip(slots, tails, answers, strict=True)):
        ids = torch.tensor([[*head, *slot, *tail, *answer]])
        own = llm.embed(ids[0])[None].clone().requires_grad_()  # [1, length, d]
        logits = llm.model(inputs_embeds=own, use_cache=False).logits[0, -len(answer) - 1 : -1]
        torch.testing.assert_close(logits, llm.model(input_ids=ids, use_cache=False).logits[0, -len(answer) - 1 : -1])
        nll = cross_entropy(logits, ids[0, -len(answer) :], reduction="sum")
        nll.backward()
        torch.testing.assert_close(prefill.logits[row], logits[0], **CLOSE)
        assert prefill.logits[row].argmax() == logits[0].argmax()
        torch.testing.assert_close(scored[row], nll, **CLOSE)
        torch.testing.assert_close(forced.nll[row].sum(), nll, **CLOSE)
        own = own.grad[0, len(head) : len(head) + len(slot)]
        torch.testing.assert_close(embeds[row].grad, own, rtol=1e-3, atol=1e-4)


def test_a_family_reads_embeddings_as_transformers_reads_the_text(family, rows):
    same_as_transformers(family, *rows(family))


def test_a_family_continues_as_transformers_does_and_padding_changes_nothing(family, rows):
    head, slots, tails, _ = rows(family)
    embeds = [family.embed(slot) for slot in slots]
    together = family.generate_with_prefix(head, embeds, tails, 12)
    alone = [family.generate_with_prefix(head, [e], [t], 12)[0] for e, t in zip(embeds, tails, strict=True)]
    assert together == alone == reference_answers(family, head, slots, tails, 12)
    assert any(together)


@pytest.mark.parametrize("family", [next(iter(ATTENTION))], indirect=True)
def test_an_end_stops_an_answer(family, rows, monkeypatch):
    head, slots, tails, _ = rows(family)
    prompt = head, [family.embed(slots[2])], tails[2:3]
    tokens = []
    family.prefill(*prompt)  # the head is read
    hook = family.model.register_forward_hook(
        lambda _model, _inputs, out: tokens.append(int(out.logits[0, -1].argmax()))
    )
    monkeypatch.setattr(family, "stop_ids", torch.tensor([], dtype=torch.long))
    family.generate_with_prefix(*prompt, 8)
    greedy = tokens[:]
    assert len(greedy) == 8
    monkeypatch.setattr(family, "stop_ids", torch.tensor([greedy[3]]))
    tokens.clear()
    family.generate_with_prefix(*prompt, 8)
    assert tokens == greedy[: greedy.index(greedy[3]) + 1]
    hook.remove()


@pytest.mark.parametrize("name", LIMITED)
def test_limited_attention_is_known_as_such(name, tokenizer):
    assert not make(name, tokenizer, **ATTENTION[name])._sees_all


def test_windows_of_the_table_are_shorter_than_its_prompts(tokenizer, rows):
    """Two layers of 16 see 31 positions: what stands before them changes nothing, and in a model without window all."""
    head, slots, *_ = rows(make("llama", tokenizer, **ATTENTION["llama"]))
    assert 16 < len(head) < 100 < len(head) + len(slots[2]) < 1000
    for name, same in (("mistral, sliding 16", True), ("mistral", False)):
        llm = make(name, tokenizer, **ATTENTION[name])
        a, b = (llm.model(input_ids=torch.tensor([[first, *head]])).logits[0, -1] for first in (70, 80))
        assert torch.equal(a, b) == same


@pytest.mark.parametrize("name", [name for name in ATTENTION if "," not in name and name not in ("bloom", "mpt")])
def test_full_attention_is_known_as_such(name, tokenizer):
    assert make(name, tokenizer, **ATTENTION[name])._sees_all


@pytest.mark.parametrize("name", [name for name in ATTENTION if "," not in name])
def test_on_a_cpu_the_rows_of_a_batch_share_the_heads_keys(name, tokenizer, rows):
    """But of families that keep something else than keys, or that attend by code of their own."""
    llm = make(name, tokenizer, **ATTENTION[name])
    head, slots, tails, _ = rows(llm)
    read = llm.prefill(head, [llm.embed(slot) for slot in slots], tails)
    own = max(len(slot) + len(tail) for slot, tail in zip(slots, tails, strict=True))
    copied = name in COPIED
    assert read.cache.get_seq_length() == own + copied * len(head) and bool(read.cache.head) != copied


def test_a_tokenizer_of_any_kind_is_read_alike_from_embeddings_and_ids(reader, rows):
    head, slots, tails, answers = rows(reader)
    assert all(answers), "an answer has tokens"
    same_as_transformers(reader, head, slots, tails, answers)
    ours = reader.generate_with_prefix(head, [reader.embed(slot) for slot in slots], tails, 8)
    assert ours == reference_answers(reader, head, slots, tails, 8)


@pytest.mark.parametrize("wording", WORDINGS)
def test_what_ends_an_answer_stops_generation_with_every_tokenizer(reader, wording):
    builder = PromptBuilder(reader.tokenizer, "prompt", wording)
    assert builder.end_id in reader.stop_ids.tolist()
    answer = builder.answer_ids("the copper kettle")
    assert reader.text([*answer, builder.end_id, *answer]) == "the copper kettle"
    assert not set(answer) & set(reader.stop_ids.tolist())


def test_a_users_special_tokens_are_text_with_every_tokenizer(reader):
    builder = PromptBuilder(reader.tokenizer, "context", "chat")
    special = set(reader.tokenizer.all_special_ids) - {reader.tokenizer.unk_token_id}
    for token in reader.tokenizer.convert_ids_to_tokens(sorted(special)):
        assert not special & set(builder.plain(f"He wrote {token} twice."))


# What they keep instead of each layer's own keys and values.
REFUSED = {
    "mamba": ({"model_type": "mamba"}, "LinearAttentionLayer"),
    "lfm2": ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, "LinearAttentionLayer"),
    "jamba": ({"model_type": "jamba", "num_experts": 2, "mamba_dt_rank": 4}, "LinearAttentionLayer"),
    "falcon-h1": ({"model_type": "falcon_h1", "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
                   "mamba_d_state": 8}, "LinearAttentionAndFullAttentionLayer"),
    "qwen3-next": ({"model_type": "qwen3_next", "num_experts": 2, "num_experts_per_tok": 1, "head_dim": 8,
                    "moe_intermediate_size": 16}, "LinearAttentionLayer"),
    "gemma3n": ({"model_type": "gemma3n_text", "num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 8,
                 "layer_types": 2 * _MIXED, "intermediate_size": [64] * 4, "activation_sparsity_pattern": [0.0] * 4,
                 "vocab_size_per_layer_input": 500, "hidden_size_per_layer_input": 8, "laurel_rank": 4}, "DummyLayer"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_keeps_something_else_than_keys_and_values_is_refused_by_name(tokenizer, name):
    settings, kept = REFUSED[name]
    with pytest.raises(ValueError, match=rf"{name} \({name}\) does not keep keys and values .*{kept}.*choose a model"):
        make(name, tokenizer, **settings)


def test_a_tokenizer_that_reads_control_tokens_out_of_users_text_is_refused(texts):
    with pytest.raises(ValueError, match="reads '<s>' in a user's text as a control token; choose another model"):
        PromptBuilder(unigram(500, texts), "prompt", "plain")


def test_a_tokenizer_with_nothing_that_ends_an_answer_is_refused(texts):
    with pytest.raises(ValueError, match="no token that ends an answer"):
        PromptBuilder(wordpiece(500, texts), "prompt", "plain")


@pytest.mark.parametrize("name", ATTENTION)
def test_a_family_without_keys_and_values_of_its_own_is_refused_for_deep_adapters(name, tokenizer):
    llm = make(name, tokenizer, **ATTENTION[name])
    if name.split(",")[0] not in SHALLOW:
        assert llm.kv_shape[0] == 2
        return
    with pytest.raises(ValueError, match=r"no k_proj and v_proj of one width.*another adapter_type"):
        _ = llm.kv_shape
