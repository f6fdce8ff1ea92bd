"""Random two-layer models with tokenizers of their own, made in process: fast enough to test on every save."""

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import BertWordPieceTokenizer, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from latentwire.data.squad import load
from latentwire.llms.frozen import FrozenLLM

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPES = {"llama": (LlamaConfig, LlamaForCausalLM, 700, 48), "qwen": (Qwen2Config, Qwen2ForCausalLM, 900, 64)}


def make_tokenizer(size, texts, chat=True):
    """Byte-level BPE of about `size` tokens, trained on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE if chat else None
    return fast


def make_sentencepiece(size, texts):
    """BPE with word-start signs and byte fallback, as the Llama-2 family has it, trained on the texts."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    tokenizer.train_from_iterator([text.replace("\n", " ") for text in texts], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def make_llm(name, texts):
    """A random frozen LLM of the family and shape that SHAPES gives to `name`."""
    config_class, model_class, vocabulary, width = SHAPES[name]
    tokenizer = make_tokenizer(vocabulary, texts)
    torch.manual_seed(len(name))
    config = config_class(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False,
        initializer_range=0.3, bos_token_id=0, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return FrozenLLM(name, model_class(config), tokenizer)


@pytest.fixture(scope="session")
def questions():
    """The sample set's train questions."""
    return load("sample", "train").questions


@pytest.fixture(scope="session")
def texts(questions):
    return sorted({q.context for q in questions}) + [q.question for q in questions]


@pytest.fixture(scope="session")
def llms(texts):
    """{"llama": ..., "qwen": ...}, random and small."""
    return {name: make_llm(name, texts) for name in SHAPES}


@pytest.fixture(scope="session")
def encoder_folder(texts, tmp_path_factory):
    """A random two-layer BERT that reads 96 word pieces at once, saved as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("models") / "encoder"
    words = BertWordPieceTokenizer(lowercase=True)
    words.train_from_iterator(texts, vocab_size=600, show_progress=False)
    tokenizer = BertTokenizerFast(tokenizer_object=words._tokenizer, model_max_length=96)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=96,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def llm_folders(llms, tmp_path_factory):
    """The same models saved as Hugging Face folders: {"LLAMA_ID": path, "QWEN_ID": path}."""
    folders = {}
    for name, llm in llms.items():
        folder = tmp_path_factory.mktemp("models") / name
        llm.model.save_pretrained(folder)
        llm.tokenizer.save_pretrained(folder)
        folders[f"{name.upper()}_ID"] = str(folder)
    return folders


@contextmanager
def small_world(variables):
    """Inside, every program uses the small models and a cache of its own; no signal handler is left behind."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.delenv("SQUAD_DIR", raising=False)
        patch.setattr("latentwire.data.squad._load_from_hub", lambda split: None)
        patch.setattr("latentwire.utils.runs.git_sha", lambda: "a commit")  # somebody may commit while these tests run
        yield patch
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="session")
def variables(llm_folders, tmp_path_factory):
    """The environment of `small_world`."""
    return llm_folders | {"LATENTWIRE_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def surroundings(variables):
    """`small_world` for all tests of a file."""
    with small_world(variables):
        yield


@pytest.fixture
def tiny_models(variables):
    """`small_world` for one test."""
    with small_world(variables):
        yield


@pytest.fixture(scope="session")
def warm():
    """Variables by which scripts and torchrun start Python programs without the time of their imports (warm.py)."""
    read = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    with tempfile.TemporaryDirectory() as folder:  # a socket's path is short
        program, address, python = Path(__file__).with_name("warm.py"), f"{folder}/socket", Path(folder, "python")
        python.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-IS", str(program), address])} "$@"\n')
        python.chmod(0o755)
        environment = os.environ | read | {"PYTHONPATH": str(program.parents[1])}
        with subprocess.Popen(
            [sys.executable, str(program), address], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as server:
            assert server.stdout.readline() == b"ready\n"
            yield read | {"PYTHON": str(python), "PYTHON_EXEC": str(python)}
            server.stdin.close()


@pytest.fixture(scope="session")
def finished(variables, tmp_path_factory):
    """(folder, results) of a finished evaluation of the closed form. Who changes the folder copies it first."""
    from evaluation.evaluations import config

    from latentwire.evaluation.evaluate import evaluate

    folder = tmp_path_factory.mktemp("run") / "finished"
    with small_world(variables):
        return folder, evaluate(config(folder))


@pytest.fixture
def trained(finished, encoder_folder, tmp_path):
    """A checkpoint of type hf, with heads that chance has trained."""
    from latentwire.models.checkpoint import load_checkpoint, save_checkpoint
    from latentwire.models.encoders.selecting import SelectingEncoder
    from latentwire.models.weights import read_config

    untrained = finished[0] / "checkpoint_untrained"
    before, adapters, made = load_checkpoint(untrained, read_config(untrained)["llms"])
    torch.manual_seed(0)
    encoder = SelectingEncoder.begin(before, SelectingEncoder.Settings(encoder_id=encoder_folder), made["latent_len"])
    torch.nn.init.normal_(encoder.score.weight)
    save_checkpoint(tmp_path / "trained", encoder, adapters, made | {"stage": "joint", "source": "prompt"})
    return tmp_path / "trained"


# Trainings that several files look at, each made once. What a test changes, it copies first.
STEPS, PER_EPOCH = 6, 3  # of stage joint


@pytest.fixture(scope="session")
def short(encoder_folder):
    """short(folder, **changes): settings of a short training."""
    from latentwire.models.encoders.base import ENCODERS
    from latentwire.training.settings import TrainSettings

    def make(folder, **changes):
        kind = ENCODERS.get(changes.get("encoder_type", "hf"))
        own = {"encoder_id": encoder_folder} if hasattr(kind and kind.Settings, "encoder_id") else {}
        defaults = {
            "dataset": "sample", "samples": 8 * PER_EPOCH, "val_samples": 6, "batch_size": 8, "d_z": 24, "k": 3,
            "latent_len": 16, "epochs": 1, "max_new_tokens": 3, "save_minutes": 0.0, "device": "cpu",
            "save_dir": str(folder), "encoder": kind and kind.Settings(**own),
        }  # fmt: skip
        return TrainSettings(**(defaults | changes))

    return make


@pytest.fixture(scope="session")
def run_of(variables, tmp_path_factory):
    """run_of(config): train in `small_world`; the run folder."""
    from latentwire.training.running import train

    def run(config):
        with small_world(variables):
            train(config)
        return Path(config.save_dir)

    return run


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """The folder of the trainings below."""
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="session")
def codebook(short, run_of, runs):
    """checkpoint_best of stage codebook."""
    return run_of(short(runs / "codebook", stage="codebook")) / "checkpoint_best"


@pytest.fixture(scope="session")
def scores(short, run_of, runs, codebook):
    """The run folder of stage scores."""
    return run_of(short(runs / "scores", stage="scores", init=str(codebook)))


@pytest.fixture(scope="session")
def adapters(short, run_of, runs, scores):
    """The run folder of stage adapters."""
    return run_of(short(runs / "adapters", stage="adapters", init=str(scores / "checkpoint_best")))


@pytest.fixture(scope="session")
def joint_config(short, adapters):
    """joint_config(folder, **changes): settings of a joint stage with a teacher."""
    more = {"init": str(adapters / "checkpoint_best"), "epochs": STEPS // PER_EPOCH}
    more |= {"kd_weight": 0.75, "first_token_ce_weight": 0.25}  # that a test tells one from the other
    return lambda folder, **changes: short(folder, **(more | changes))


@pytest.fixture(scope="session")
def joint(joint_config, run_of, runs):
    """The run folder of stage joint, never interrupted."""
    return run_of(joint_config(runs / "joint"))


# Of a wire in use.
M, D_Z = 12, 24


@pytest.fixture(scope="session")
def checkpoint_of(llms, texts, llm_folders, encoder_folder, tmp_path_factory):
    """checkpoint_of(source, seed): a folder. Checkpoints of other seeds have other encoders."""
    from latentwire.models.checkpoint import save_checkpoint
    from latentwire.models.closed_form import closed_form
    from latentwire.models.encoders.selecting import SelectingEncoder

    made = {}

    def make(source="prompt", seed=0):
        if (source, seed) not in made:
            before, adapters, _ = closed_form(llms, texts, D_Z)
            torch.manual_seed(seed)
            encoder = SelectingEncoder.begin(before, SelectingEncoder.Settings(encoder_id=encoder_folder), M)
            torch.nn.init.normal_(encoder.score.weight)
            torch.nn.init.normal_(encoder.residual.weight, std=0.01)
            ids = {name: llm_folders[f"{name.upper()}_ID"] for name in llms}
            config = {"schema": 1, "stage": "joint", "source": source, "latent_len": M, "d_z": D_Z, "llms": ids}
            folder = tmp_path_factory.mktemp("wires") / f"{source}{seed}"
            save_checkpoint(folder, encoder, adapters, config)
            made[source, seed] = folder
        return made[source, seed]

    return make


@pytest.fixture(scope="session")
def short_questions():
    """Dev questions on contexts that the small encoder reads at once."""
    some = load("sample", "dev").questions
    return [dataclasses.replace(q, context=f"{q.context[:120].rsplit(' ', 1)[0]}.") for q in some]


@pytest.fixture(scope="module")
def lw(checkpoint_of):
    """A checkpoint in use whose wires know the question."""
    from latentwire import LatentWire

    return LatentWire.from_pretrained(checkpoint_of("prompt"))
