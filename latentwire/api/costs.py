"""After how many questions a wire has paid for its encoding, in multiplications.

A forward pass costs two operations per position for each parameter that it is multiplied with (Kaplan et al. 2020,
arXiv:2001.08361, section 2.1; without attention's share, which grows with the text). Encoding reads the text once; each
question read from the wire instead of from the text saves the reader the difference in positions. What an adapter has
before the latents is the same for all questions: it is kept with the head of the prompt, and costs nothing.
"""

from latentwire.api.encoding import LatentWire
from latentwire.api.message import Wire
from latentwire.llms.loading import shape_of

_TABLES = ("embedding", "codebook")  # looked up, not multiplied


def break_even(lw: LatentWire, wire: Wire) -> dict[str, dict]:
    """Per LLM: encode_gflop, saved_gflop (per question), questions (to break even), and the same in words under
    "says". None where nothing is saved; both where the LLM's shape cannot be told here."""
    weights = [*lw.encoder.named_parameters(), *lw.encoder.named_buffers()]  # with LoRA the frozen ones are buffers
    encoder = sum(w.numel() for name, w in weights if w.ndim > 1 and not any(t in name for t in _TABLES))
    cost = 2 * encoder * wire.text_tokens / 1e9
    saved_positions = wire.text_tokens - wire.m
    found = {}
    for name, llm_id in lw.llms.items():
        try:
            body = shape_of(name, llm_id).body
        except (ValueError, OSError) as error:  # an LLM that only its readers' machine can load
            found[name] = {"encode_gflop": cost, "saved_gflop": None, "questions": None, "says": f"not known: {error}"}
            continue
        saved = 2 * body * saved_positions / 1e9
        questions = cost / saved if saved > 0 else None
        says = f"encoding {cost:.2f} GFLOP; "
        if questions:
            says += f"saves {saved:.1f} GFLOP per question: pays after {questions:.2f} questions"
        else:
            says += f"the text has {wire.text_tokens} tokens, so its {wire.m} latents save nothing"
        found[name] = {"encode_gflop": cost, "saved_gflop": saved, "questions": questions, "says": says}
    return found
