"""The teacher's lines are what the LLM says of the whole text, and are computed once."""

import dataclasses

import pytest
import torch
from safetensors import SafetensorError

from latentwire.llms.prompts import Labels, PromptBuilder
from latentwire.training import teacher
from latentwire.training.teacher import TOP, teach

K = 4


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The cache of this test alone, with three questions a file."""
    monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path))
    monkeypatch.setattr(teacher, "BLOCK", 3)
    return tmp_path / "teacher"


@pytest.fixture
def some(questions):
    """Seven questions: more than two files hold."""
    return [questions[i] for i in (70, 3, 41, 0, 12, 90, 55)]


@pytest.fixture
def asked(llms, monkeypatch):
    """How many questions each LLM was asked, by calls."""
    calls = {name: [] for name in llms}
    for name, llm in llms.items():

        def counted(*args, real=llm.loss_with_prefix, seen=calls[name], **how):
            seen.append(len(args[1]))
            return real(*args, **how)

        monkeypatch.setattr(llm, "loss_with_prefix", counted)
    return calls


def prompts_of(llms, name="llama", source="prompt", wording="zero_shot"):
    return PromptBuilder(llms[name].tokenizer, source, wording)


@pytest.mark.parametrize("name", ["llama", "qwen"])
@pytest.mark.parametrize("source", ["prompt", "context"])
def test_the_lines_are_the_llms_own_likeliest_tokens_after_the_whole_text(llms, folder, some, name, source):
    prompts = prompts_of(llms, name, source)
    lines = teach(llms[name], "w", prompts, some, K)
    assert lines.keys() == {q.id for q in some}
    for q in some:
        labels, line = prompts.labels(q.answers[0], K), lines[q.id]
        slot = prompts.plain(prompts.content_text(q.context, q.question))
        ids = torch.tensor([[*prompts.head, *slot, *prompts.tail(q.question), *labels.ids]])
        with torch.no_grad():
            logprobs = llms[name].model(ids).logits[0, -len(labels.ids) - 1 : -1].log_softmax(dim=1)
        logprobs, right = logprobs[labels.learned], torch.tensor(labels.ids)[labels.learned]
        assert line.ids.shape == line.logprobs.shape == (sum(labels.learned), TOP)
        kept = logprobs.gather(1, line.ids.long())
        torch.testing.assert_close(line.logprobs.float(), kept, atol=1e-2, rtol=0)
        torch.testing.assert_close(kept, logprobs.topk(TOP, dim=1).values, atol=1e-3, rtol=0)
        assert line.right.tolist() == (logprobs.argmax(dim=1) == right).tolist()
    assert any(
        sum(prompts.labels(q.answers[0], K).learned) == K + 1 < len(prompts.labels(q.answers[0], K).ids) for q in some
    )


def test_a_label_that_the_teacher_would_say_is_right(llms, folder, some, monkeypatch):
    prompts, llm = prompts_of(llms), llms["llama"]
    first = {q.answers[0]: int(teach(llm, "w", prompts, [q], 1)[q.id].ids[0, 0]) for q in some}
    monkeypatch.setattr(prompts, "labels", lambda answer, k: Labels([first[answer], 5], [True, True], 0))
    lines = teach(llm, "other", prompts, some, 2)
    assert all(line.right[0] for line in lines.values())
    assert not all(line.right[1] for line in lines.values())


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(getattr(a[i], field.name), getattr(b[i], field.name))
        for i in a
        for field in dataclasses.fields(a[i])
    )


def test_a_second_call_asks_nothing_whatever_the_order_of_the_questions(llms, folder, some, monkeypatch):
    lines = teach(llms["llama"], "w", prompts_of(llms), some, K)
    assert len(list(folder.iterdir())) == 3
    monkeypatch.setattr(llms["llama"], "loss_with_prefix", lambda *a, **k: pytest.fail("asked again"))
    assert same(teach(llms["llama"], "w", prompts_of(llms), some[::-1], K), lines)


def test_a_process_begins_with_blocks_of_its_own_and_finds_those_of_others(llms, folder, some, asked):
    second = teach(llms["llama"], "w", prompts_of(llms), some, K, share=(1, 2))
    assert asked["llama"] == [3, 1, 3], "the last two of three blocks, then the first"
    first = teach(llms["llama"], "w", prompts_of(llms), some, K, share=(0, 2))
    assert len(asked["llama"]) == 3 and same(first, second)


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.99])
def test_a_cut_file_is_computed_again_and_no_other(llms, folder, some, asked, keep):
    lines = teach(llms["llama"], "w", prompts_of(llms), some, K)
    asked["llama"].clear()
    path = max(folder.iterdir(), key=lambda p: p.stat().st_size)
    data = path.read_bytes()
    path.write_bytes(data[: keep if keep in (0, 5) else int(len(data) * keep)])
    assert same(teach(llms["llama"], "w", prompts_of(llms), some, K), lines)
    assert asked["llama"] == [3] and path.read_bytes() == data


def test_a_block_with_one_altered_byte_is_computed_again(llms, folder, some, asked):
    lines = teach(llms["llama"], "w", prompts_of(llms), some, K)
    asked["llama"].clear()
    path = max(folder.iterdir(), key=lambda p: p.stat().st_size)
    data = path.read_bytes()
    path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])  # the header is whole: only the values differ
    assert same(teach(llms["llama"], "w", prompts_of(llms), some, K), lines)
    assert asked["llama"] and path.read_bytes() == data


@pytest.mark.parametrize(
    "change",
    [{"k": 2}, {"wording": "chat"}, {"source": "context"}, {"sha": "v"}, {"name": "qwen"}, {"answer": "27"}],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_the_lines_is_another_file(llms, folder, some, asked, change):
    def lines(name="llama", sha="w", k=K, answer=None, **prompt):
        these = [dataclasses.replace(q, answers=(answer or q.answers[0],)) for q in some]
        return teach(llms[name], sha, prompts_of(llms, name, **prompt), these, k)

    before = lines()
    files = set(folder.iterdir())
    for calls in asked.values():
        calls.clear()
    lines(**change)
    assert sum(asked[change.get("name", "llama")]) == len(some)
    assert len(set(folder.iterdir()) - files) == 3 and files <= set(folder.iterdir())
    assert same(lines(), before)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_failure_while_writing_leaves_no_block(llms, folder, some, monkeypatch, error):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(teacher, "save_file", full)
        with pytest.raises(OSError, match=rf"to {folder} \(.*No space.*make room, or set LATENTWIRE_CACHE"):
            teach(llms["llama"], "w", prompts_of(llms), some, K)
    assert not list(folder.iterdir())
    assert len(teach(llms["llama"], "w", prompts_of(llms), some, K)) == len(some)
