"""Answers from compressed key-value caches, by the methods of kvpress: a rival from outside.

    .venv-kvpress/bin/python scripts/baselines/kv_cache.py FOLDER     # kv_cache_baseline.sh makes both

kvpress needs an older transformers than LatentWire, so the two share nothing but files: FOLDER/asked.json has questions
as token ids (latentwire/evaluation/outside.py), and FOLDER/answers.jsonl gets a line per answer as it is given. What is
there is not computed again.

The LLM reads head and context without the question. A method then keeps the whole head, which is the same for all
questions, and M entries of the context; entries keep their positions, and the tail (question, anchor) continues after
the whole context.
Shapes: H heads of keys and values, L entries of a layer's cache, of which the prompt's head has P, d a head's width,
V vocabulary.
"""

import contextlib
import inspect
import logging
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from latentwire.utils.cli import refuse_long, run
from latentwire.utils.files import append_lines, drop_cut_line, read_json, read_lines

PROBE = 10  # answers that tell how long all will take
# SnapKV keeps its window, the context's end, whole: kvpress's 64 entries would be more than all of M = 32.
WINDOW_SHARE = 4


def main() -> None:
    """Give the answers that FOLDER lacks."""
    if len(sys.argv) != 2:
        raise ValueError(f"arguments={' '.join(sys.argv[1:])!r}: name one folder, which holds asked.json")
    folder = Path(sys.argv[1])
    if not (folder / "asked.json").is_file():
        raise FileNotFoundError(f"{folder} holds no asked.json; run scripts/baselines/kv_cache_baseline.sh")
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # KVzip says for each answer that it is slow
    disable_progress_bar()  # of loading weights: ours tells of answers
    with FileLock(folder / ".lock", timeout=0):
        complete(read_json(folder / "asked.json"), folder / "answers.jsonl")


def complete(asked: Mapping, path: Path) -> None:
    """Append a line for each answer that is not in the file yet; one that a kill cut off is dropped.

    Raises ValueError where the rest would take hours on a CPU and nobody chose the number of questions.
    """
    drop_cut_line(path)
    given = {(line["llm"], line["condition"], line["id"]) for line in read_lines(path)}
    todo = {
        name: [
            (question, condition)
            for question in llm["questions"]
            for condition in asked["conditions"]
            if (name, condition, question["id"]) not in given
        ]
        for name, llm in asked["llms"].items()
    }
    everything, by = sum(map(len, todo.values())), versions()
    for name, missing in todo.items():
        if not missing:
            continue
        model, started = load(asked["llms"][name], asked), time.perf_counter()
        for number, (question, condition) in enumerate(tqdm(missing, desc=name, unit="answer", mininterval=1)):
            if number == PROBE:
                left = (time.perf_counter() - started) / PROBE * everything
                refuse_long(left, asked["device"], asked["by_hand"], f"{everything} answers")
            found = answer(model, asked["llms"][name], question, condition, asked["m"], asked["max_new_tokens"])
            line = {"llm": name, "condition": condition, "id": question["id"], **found, "by": by}
            append_lines(path, [line])
        everything -= len(missing)
        del model


def versions() -> str:
    """What gives the answers."""
    return ", ".join(f"{name} {version(name)}" for name in ("kvpress", "transformers", "torch"))


def load(llm: Mapping, asked: Mapping) -> PreTrainedModel:
    """The model of one LLM. ValueError for one that does not look at all earlier positions in every layer."""
    model = AutoModelForCausalLM.from_pretrained(llm["model"], dtype=getattr(torch, asked["dtype"]))
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(
            f"{llm['model']}: has layers of {', '.join(sorted(kinds))}, whose caches hold no whole context; choose an "
            "LLM whose layers all have full attention"
        )
    return model.eval().to(asked["device"])


@torch.inference_mode()
def answer(
    model: PreTrainedModel, llm: Mapping, question: Mapping, condition: str, m: int, max_new_tokens: int
) -> dict:
    """What one answer's line holds: its token ids, greedy, up to and with the first that ends it; nll of the first
    reference after the same cache, in nats; entries of the context that the cache holds per layer and head, and their
    bytes."""
    started = time.perf_counter()
    head, context, tail = llm["head"], question["context"], question["tail"]
    cache, entries = DynamicCache(), min(m, len(context)) if condition != "kv_full" else len(context)
    torch.manual_seed(zlib.crc32(question["id"].encode()))  # of random; a continued run draws the same
    with compressing(condition, model, len(head), len(context), entries):
        model.model(input_ids=torch.tensor([head + context], device=model.device), **named(model, cache))
    require_kept(model, cache, len(head) + entries)
    one = sum(part[:, :, 0].nbytes for layer in cache.layers for part in (layer.keys, layer.values))

    after = len(head) + len(context)
    anchor = read(model, cache, tail, after)[-1]
    length, after = cache.get_seq_length(), after + len(tail)
    said = [int(anchor.argmax())]
    while len(said) < max_new_tokens and said[-1] not in llm["stops"]:
        said.append(int(read(model, cache, said[-1:], after + len(said) - 1)[-1].argmax()))
    for layer in cache.layers:  # the cache as it was at the anchor
        layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
    wanted = question["answer"]
    rest = read(model, cache, wanted[:-1], after) if len(wanted) > 1 else anchor[:0].view(0, len(anchor))
    logits = torch.cat([anchor[None], rest]).float()
    nll = cross_entropy(logits, torch.tensor(wanted, device=model.device), reduction="sum").item()
    seconds = time.perf_counter() - started
    return {"said": said, "nll": nll, "entries": entries, "bytes": one * entries, "seconds": seconds}


def read(model: PreTrainedModel, cache: DynamicCache, ids: Sequence[int], position: int) -> Tensor:
    """Logits [len(ids), V] after each of the ids, of which the first has this position; the cache grows by them."""
    ids = torch.tensor([ids], device=model.device)
    positions = torch.arange(position, position + ids.shape[1], device=model.device)[None]
    return model(input_ids=ids, position_ids=positions, **named(model, cache)).logits[0]


def named(model: PreTrainedModel, cache: DynamicCache) -> dict[str, DynamicCache]:
    """The cache by the name that the model's forward has for it: kvpress's transformers, or ours from 5.24 on."""
    known = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}


def compressing(
    condition: str, model: PreTrainedModel, head: int, context: int, entries: int
) -> contextlib.AbstractContextManager:
    """Inside, the cache of what `model` reads loses all but `head` first entries and `entries` of `context` others."""
    if entries == context:
        return contextlib.nullcontext()
    import kvpress  # only this half's environment has it

    if condition in ("kv_kvzip", "kv_kvzip_uniform"):
        press = kvzip(kvpress.KVzipPress, model, head, context, entries)
        return (uniform(press, head, entries) if condition == "kv_kvzip_uniform" else press)(model)
    presses = {
        "kv_random": kvpress.RandomPress,
        "kv_snapkv": partial(kvpress.SnapKVPress, window_size=max(1, entries // WINDOW_SHARE)),
        "kv_expected_attention": kvpress.ExpectedAttentionPress,
    }
    return keeping(presses[condition](), head, entries)(model)


def keeping(press: object, head: int, entries: int) -> object:
    """A press that scores entries, made to keep the first `head` of them and exactly `entries` others of each head."""

    def compress(
        module: nn.Module, hidden: Tensor, keys: Tensor, values: Tensor, attentions: Tensor | None, kwargs: dict
    ) -> tuple[Tensor, Tensor]:
        return best(press.score(module, hidden, keys, values, attentions, kwargs), keys, values, head, entries)

    press.compress = compress
    return press


def best(scores: Tensor, keys: Tensor, values: Tensor, head: int, entries: int) -> tuple[Tensor, Tensor]:
    """Of keys and values [1, H, L, d] those of the `head` first entries and of the best others of each head: [1, H,
    head + entries, d] each. scores: [1, H, L]."""
    others = scores[..., head:].topk(entries, dim=-1).indices + head  # [1, H, entries]
    first = torch.arange(head, device=scores.device).expand(*others.shape[:2], -1)
    kept = torch.cat([first, others], dim=-1)[..., None].expand(-1, -1, -1, keys.shape[-1])
    return keys.gather(2, kept), values.gather(2, kept)


def kvzip(press_class: type, model: PreTrainedModel, head: int, context: int, entries: int) -> object:
    """KVzip, made to keep the head and to repeat the context alone.

    As its authors have it, layers and heads share one budget by their scores: `entries` is the mean over them. kvpress
    masks what goes, instead of removing it.
    """
    of_all = model.config.num_hidden_layers * model.config.num_key_value_heads
    pruned = (context - entries) * of_all
    ratio = (pruned + 0.5) / ((head + context) * of_all)  # kvpress rounds the number down
    press = press_class(compression_ratio=ratio, n_sink=head)

    def prepare(model: PreTrainedModel, tokenizer: object) -> list[tuple[Tensor, Tensor]]:
        press.prefix_length = head  # else that of a chat without instruction and examples
        return press_class.prepare(press, model, tokenizer)

    press.prepare = prepare
    return press


def uniform(press: object, head: int, entries: int) -> object:
    """KVzip, made to keep `entries` of the context in every head by its scores, as the other methods do."""

    def compress_post(model: PreTrainedModel) -> None:
        for layer, scores in zip(press._cache.layers, press.score_val, strict=True):
            layer.keys, layer.values = best(scores, layer.keys, layer.values, head, entries)

    press.compress_post = compress_post
    return press


def require_kept(model: PreTrainedModel, cache: DynamicCache, entries: int) -> None:
    """AssertionError unless the LLM will see this many entries, on average over layers and heads."""
    seen = 0
    for layer, block in zip(cache.layers, model.model.layers, strict=True):
        masked = getattr(block.self_attn, "masked_key_indices", None)
        seen += layer.keys.shape[1] * layer.keys.shape[2] - (len(masked[1]) if masked else 0)
    wanted = entries * sum(layer.keys.shape[1] for layer in cache.layers)
    assert seen == wanted, f"{seen} entries are kept, not {wanted}"


if __name__ == "__main__":
    run(main)
