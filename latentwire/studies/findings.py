"""findings.md: what the diagnostics' figures say, in words. Every sentence is chosen by a figure, and shows it."""

from collections.abc import Mapping, Sequence

from latentwire.evaluation.scores import show_interval
from latentwire.reporting.labels import model_name
from latentwire.reporting.tables import interventions_markdown
from latentwire.utils.machine import machine_line

_NEAR = 3.0  # a ratio of magnitudes between 1 / _NEAR and _NEAR is no mismatch
_FAR = 30.0  # from here on it would be called one of "100x"
_COLLAPSED = 0.9  # mean cosine between the latents of a question
_DESTROYED = 0.5  # share of F1 that must be lost


def findings_markdown(results: Mapping) -> str:
    """The whole document from what stands in diagnostics.json."""
    lines = [
        "# What the embeddings say",
        "",
        f"Checkpoint {results['checkpoint']}; {results['dataset']} {results['split']}, n={results['n']}, seed "
        f"{results['seed']}, source {results['source']}, M={results['m']}, d_z={results['d_z']}, {results['dtype']}; "
        f"commit {results['git']}; {machine_line(results['machine'])}. Intervals are 95%, by paragraph.",
    ]
    if results["dataset"] == "sample":
        lines += ["", "**The sample set shows that everything runs; its numbers support no claim.**"]
    sections = (
        ("Where does a mismatch of magnitudes come from?", _magnitudes),
        ("What differs between text and learned embeddings?", _differences),
        ("Does scaling the RMS destroy answers, and why?", _scaling),
        ("What does the LLM need?", _needs),
        ("Where does the gradient go?", _gradients),
    )
    for title, write in sections:
        lines += ["", f"## {title}", ""]
        for name, llm in results["llms"].items():
            rows = [row for row in results["interventions"] if row["llm"] == name]
            lines += [f"**{model_name(llm['llm_id'])}** ({name}). " + " ".join(write(llm, rows)), ""]
    lines += ["## What is saved", "", *_compression(results["compression"]), ""]
    lines += ["## All interventions", "", *interventions_markdown(results["interventions"])]
    return "\n".join(lines) + "\n"


def _magnitudes(llm: Mapping, rows: Sequence[Mapping]) -> list[str]:
    """The learned prefix, and what else may have been held against the vocabulary."""
    prefix = llm["magnitudes"]["the learned prefix"]
    said = [
        f"The vocabulary's embeddings have RMS {llm['vocabulary_rms']:.4f}, the learned prefix {prefix:.2f} times that:"
    ]
    said.append(
        "no mismatch." if 1 / _NEAR < prefix < _NEAR else "it is off, and the adapter's scale should be looked at."
    )
    others = sorted(((r, what) for what, r in llm["magnitudes"].items() if what != "the learned prefix"), reverse=True)
    said.append(
        "Held against the same RMS, " + ", ".join(f"{what} is {ratio:.0f} times" for ratio, what in others) + "."
    )
    ratio, what = others[0]
    if ratio > _FAR:
        said.append(
            f"So a mismatch of that order needs no fault of training: {what}, taken for an embedding, is {ratio:.0f} "
            f"times too large for this LLM. Embeddings are small (RMS {llm['vocabulary_rms']:.4f}), and whoever feeds "
            "vectors of unit size without the LLM's own scale makes the mismatch."
        )
    else:
        said.append(f"None of them comes near 100: the largest here is {ratio:.0f}.")
    return said


def _differences(llm: Mapping, rows: Sequence[Mapping]) -> list[str]:
    text, learned = llm["embeddings"]["text"], llm["embeddings"]["latentwire"]
    said = [
        f"RMS per token: text {_spread(text['rms_per_token'], 4)}, learned {_spread(learned['rms_per_token'], 4)} "
        "(median, 5% to 95%).",
        f"After the first layer's normalisation: {_spread(text['first_norm'], 2)} and "
        f"{_spread(learned['first_norm'], 2)}.",
        f"Nearest token of the vocabulary, cosine: {_spread(text['nearest_cosine'], 2)} and "
        f"{_spread(learned['nearest_cosine'], 2)}.",
    ]
    cosine = learned["nearest_cosine"]["p50"]
    said.append(
        "Half of the learned vectors are as good as tokens."
        if cosine > 0.95
        else f"The median learned vector points {cosine:.2f} along its nearest token: it is no token of the vocabulary."
    )
    said.append(
        f"Directions in use (effective rank): text {text['effective_rank']:.0f}, learned "
        f"{learned['effective_rank']:.0f}. Mean cosine between the vectors of one "
        f"question: {text['mean_cosine']:.2f} and {learned['mean_cosine']:.2f}:"
    )
    said.append(
        "the latents collapsed, they say nearly the same." if learned["mean_cosine"] > _COLLAPSED else "no collapse."
    )
    return said


def _scaling(llm: Mapping, rows: Sequence[Mapping]) -> list[str]:
    """What rms_token and rms_example do to text and to learned embeddings."""
    said = []
    for kind in ("text", "latentwire"):
        of = {row["intervention"]: row for row in rows if row["embeddings"] == kind}
        base = of["none"]["f1"]
        scaled = [row for name, row in of.items() if name.startswith("rms_")]
        worst = min(scaled, key=lambda row: row["f1_minus_none"])
        said.append(
            f"{_called(kind)} unchanged F1 {base:.3f}; "
            + "; ".join(f"{row['intervention']} {row['f1']:.3f}" for row in scaled)
            + "."
        )
        if base == 0:
            said.append("There is no F1 to lose here, so nothing follows.")
            continue
        lost = -worst["f1_minus_none"] / base
        if lost > _DESTROYED and _below(worst):
            said.append(f"{worst['intervention']} destroys {lost:.0%} of it {_difference(worst)}.")
        elif _below(worst):
            said.append(
                f"The worst, {worst['intervention']}, costs {lost:.0%} {_difference(worst)}: harm, not destruction."
            )
        else:
            said.append(f"Even the worst, {worst['intervention']}, is within the noise {_difference(worst)}.")
    text = llm["embeddings"]["text"]
    spread = text["rms_per_token"]["p95"] / max(text["rms_per_token"]["p5"], 1e-12)
    after = text["first_norm"]["p95"] / max(text["first_norm"]["p5"], 1e-12)
    said.append(
        f"Why: the first layer normalises each vector before it reads it, so a factor is divided out there, and "
        f"remains in the residual stream, where it weighs the embedding against everything that the layers add. Real "
        f"tokens differ in RMS by {spread:.1f} (95% over 5%), which setting all to one RMS takes away, and by "
        f"{after:.1f} after that normalisation."
    )
    return said


def _needs(llm: Mapping, rows: Sequence[Mapping]) -> list[str]:
    """The interventions on the learned embeddings, by what they cost."""
    of = {row["intervention"]: row for row in rows if row["embeddings"] == "latentwire"}
    if of["none"]["f1"] == 0:
        return ["The learned embeddings answer nothing (F1 0), so no intervention can show what is needed."]
    harmful = [row for row in of.values() if _below(row)]
    harmless = [row for name, row in of.items() if name != "none" and not _below(row)]
    said = []
    if harmful:
        ranked = sorted(harmful, key=lambda row: row["f1_minus_none"])
        said.append("It loses by " + ", ".join(f"{row['intervention']} {_difference(row)}" for row in ranked) + ".")
    if harmless:
        said.append(
            "No loss is shown by " + ", ".join(f"{row['intervention']} {_difference(row)}" for row in harmless) + "."
        )
    token = of["nearest_token"]
    kept = max(0.0, token["f1"] / of["none"]["f1"])
    said.append(
        f"With each learned vector replaced by its nearest token {kept:.0%} of F1 remains: "
        + ("what is no token carries the rest." if _below(token) else "that is not told apart from all of it here.")
    )
    return said


def _gradients(llm: Mapping, rows: Sequence[Mapping]) -> list[str]:
    norms = sorted(llm["gradient_norms"].items(), key=lambda item: -item[1])
    said = "Length of the gradient of the answers' cross-entropy: " + ", ".join(f"{n} {v:.3g}" for n, v in norms) + "."
    still = [name for name, value in norms if value == 0]
    return [said, *([f"None reaches {', '.join(still)}."] if still else [])]


def _compression(found: Mapping) -> list[str]:
    wires = ", ".join(f"{size:.0f} in {codec}" for codec, size in found["wire_bytes"].items())
    lines = [
        f"- Bytes: the text takes {found['text_bytes']:.0f} (zlib: {found['zlib_bytes']:.0f}), the wire {wires}: "
        + ("fewer" if min(found["wire_bytes"].values()) < found["zlib_bytes"] else "not fewer")
        + " than compressed text."
    ]
    for name, positions in found["positions"].items():
        kv = found["kv_bytes"][name]
        lines.append(
            f"- {name}: {positions['text']:.0f} positions as text, {positions['latentwire']:.0f} as latents "
            f"({positions['text'] / positions['latentwire']:.1f} times fewer); keys and values "
            f"{kv['text'] / 1e6:.1f} MB and {kv['latentwire'] / 1e6:.1f} MB."
        )
    return lines


def _below(row: Mapping) -> bool:
    """Whether the whole interval of the difference to the unchanged embeddings lies below 0."""
    return bool(row["f1_minus_none_ci95"]) and row["f1_minus_none_ci95"][1] < 0


def _difference(row: Mapping) -> str:
    return f"({row['f1_minus_none']:+.3f} {show_interval(row['f1_minus_none_ci95'])})"


def _spread(found: Mapping, digits: int) -> str:
    return f"{found['p50']:.{digits}f} ({found['p5']:.{digits}f} to {found['p95']:.{digits}f})"


def _called(kind: str) -> str:
    return "Text" if kind == "text" else "Learned"
