"""A serving engine as receiver: vLLM reads a wire's prompt as embeddings. Its answers stand beside transformers'.

vLLM takes embeddings in place of token ids where `enable_prompt_embeds` is set (its documentation, "Prompt embedding
inputs"). Nothing of vLLM is changed: the adapter's output goes in as it is.
"""

from latentwire.api.encoding import LatentWire
from latentwire.api.settings import EngineSettings
from latentwire.data.content import encoder_reads_question, question_in_tail
from latentwire.data.question import subset
from latentwire.data.squad import load


def compare(config: EngineSettings) -> dict:
    """{"n", "same", "answers": [(question, vLLM's, transformers')]}: how many answers are the same.

    Raises ValueError where vLLM is not installed.
    """
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise ValueError(f"vllm is not installed here ({error}); see docs/vllm.md") from error
    lw = LatentWire.from_pretrained(config.ckpt, device=config.device)
    reader = lw.reader(config.llm or next(iter(lw.llms)))
    some = subset(load("sample", "dev").questions, config.samples, seed=0)
    known, later = encoder_reads_question(lw.source), question_in_tail(lw.source)
    wires = lw.encode([q.context for q in some], [q.question for q in some] if known else None)
    asked = [q.question if later else None for q in some]
    prompts = [{"prompt_embeds": reader.prompt_embeds(z, q).cpu()} for z, q in zip(wires, asked, strict=True)]
    ours = [reader.answer(z, question, config.max_new_tokens) for z, question in zip(wires, asked, strict=True)]
    where = reader.llm.model.config._name_or_path
    engine = LLM(model=where, enable_prompt_embeds=True, dtype=str(reader.llm.dtype).removeprefix("torch."))
    found = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=config.max_new_tokens, stop=["\n"]))
    theirs = [one.outputs[0].text.strip() for one in found]
    return {
        "n": len(some), "same": sum(a == b for a, b in zip(theirs, ours, strict=True)),
        "answers": list(zip([q.question for q in some], theirs, ours, strict=True)),
    }  # fmt: skip
