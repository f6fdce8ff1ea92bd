"""One module builds every prompt, and only the slot differs between conditions."""

import copy

import pytest
from conftest import make_sentencepiece, make_tokenizer

from latentwire.data.content import SOURCES, content, encoder_reads_question, question_in_tail, reading
from latentwire.llms.prompts import ANCHOR, WORDINGS, PromptBuilder


def whole(builder, q):
    slot = builder.ids(builder.content_text(q.context, q.question))
    return builder.tokenizer.decode([*builder.head, *slot, *builder.tail(q.question)])


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("source", SOURCES)
def test_head_slot_and_tail_make_one_prompt_that_ends_with_the_anchor(llms, questions, source, wording):
    q = questions[0]
    text = whole(PromptBuilder(llms["llama"].tokenizer, source, wording), q)
    assert text.endswith(ANCHOR)
    assert text.count(q.context) == 1 and text.count(f"Question: {q.question}") == 1
    assert text.index(q.context) < text.index(q.question)


@pytest.mark.parametrize("wording", WORDINGS)
def test_all_sources_read_the_same_text_in_the_end(llms, questions, wording):
    tokenizer = llms["qwen"].tokenizer
    texts = {whole(PromptBuilder(tokenizer, source, wording), questions[3]) for source in SOURCES}
    assert len(texts) == 1


def test_an_llm_cannot_tell_whether_the_encoder_knew_the_question(llms, questions):
    q, tokenizer = questions[3], llms["llama"].tokenizer
    aware, alone = (PromptBuilder(tokenizer, source, "chat") for source in ("aware", "context"))
    assert (aware.head, aware.tail(q.question)) == (alone.head, alone.tail(q.question))
    assert content("aware", q.context, q.question) == content("context", q.context, q.question)
    assert aware.question_first_text(q.context, q.question) == alone.question_first_text(q.context, q.question)


def test_what_the_encoder_reads_begins_with_the_slot_and_holds_the_question_where_it_knows_it(questions):
    q = questions[3]
    for source in SOURCES:
        slot, read = content(source, q.context, q.question), reading(source, q.context, q.question)
        assert read.text.startswith(slot.text) and read.context_at == slot.context_at
        assert (read == slot) == (source != "aware")
        assert (read.question_at is not None) == encoder_reads_question(source)
        assert read.question_at is None or read.text[read.question_at :] == q.question
        assert (slot.question_at is None) == question_in_tail(source)
    assert [(encoder_reads_question(s), question_in_tail(s)) for s in ("prompt", "context", "aware")] == [
        (True, False), (False, True), (True, True),
    ]  # fmt: skip
    assert SOURCES.index("aware") == 2, "wires that were written keep their numbers"


def test_the_question_is_in_the_tail_only_when_the_wire_does_not_hold_it(llms, questions):
    q, tokenizer = questions[0], llms["llama"].tokenizer
    tails = {s: tokenizer.decode(PromptBuilder(tokenizer, s, "chat").tail(q.question)) for s in SOURCES}
    assert {s for s in SOURCES if q.question in tails[s]} == {"context", "aware"}


def test_chat_wordings_show_their_examples_as_turns_and_plain_ones_as_text(llms):
    tokenizer = llms["llama"].tokenizer
    heads = {w: tokenizer.decode(PromptBuilder(tokenizer, "prompt", w).head) for w in WORDINGS}
    assert heads["chat"].count("<|im_start|>assistant") == len(WORDINGS["chat"].shots) > 0
    assert "<|im_start|>" not in heads["plain"] and heads["plain"].count(ANCHOR) == len(WORDINGS["plain"].shots)
    assert ANCHOR not in heads["zero_shot"]


def test_a_tokenizer_without_chat_template_gets_one_bos_and_a_plain_prompt(texts, questions):
    tokenizer = make_tokenizer(400, texts, chat=False)
    builder = PromptBuilder(tokenizer, "prompt", "zero_shot")
    assert builder.head[0] == tokenizer.bos_token_id and builder.head.count(tokenizer.bos_token_id) == 1
    assert whole(builder, questions[0]).endswith(ANCHOR)


def test_a_budget_cut_keeps_the_question(llms, questions):
    builder = PromptBuilder(llms["llama"].tokenizer, "prompt", "chat")
    q = min(questions, key=lambda q: len(q.question))
    cut = builder.ids(builder.question_first_text(q.context, q.question))[:40]
    assert q.question in builder.tokenizer.decode(cut)


def test_answers_continue_the_anchor_and_any_reference_gives_a_right_first_token(llms):
    builder = PromptBuilder(llms["llama"].tokenizer, "prompt", "chat")
    assert builder.tokenizer.decode(builder.answer_ids("Paris ")) == " Paris"
    firsts = builder.first_token_ids(["Paris", "the city", "Paris"])
    assert firsts == {builder.answer_ids("Paris")[0], builder.answer_ids("the city")[0]}


def test_an_unknown_source_or_wording_is_named():
    with pytest.raises(ValueError, match="'speech'"):
        PromptBuilder(None, "speech", "chat")
    with pytest.raises(ValueError, match=r"'loud'.*chat"):
        PromptBuilder(None, "prompt", "loud")


@pytest.mark.parametrize("source", SOURCES)
def test_the_content_says_where_context_and_question_begin(llms, questions, source):
    q = questions[3]
    found = content(source, q.context, q.question)
    assert found.text[found.context_at :].startswith(q.context)
    if source == "prompt":
        assert found.text[found.question_at :] == q.question
    else:
        assert found.question_at is None and q.question not in found.text
    assert PromptBuilder(llms["llama"].tokenizer, source, "chat").content_text(q.context, q.question) == found.text


@pytest.mark.parametrize("k", [1, 2, 4, 30])
def test_the_labels_are_the_first_k_tokens_of_the_answer_and_its_end_where_it_stands(llms, k):
    builder = PromptBuilder(llms["llama"].tokenizer, "prompt", "chat")
    for answer in ("the copper kettle that Osric bought in Amberley", "Paris", "the copper kettle"):
        ids, found = builder.answer_ids(answer), builder.labels(answer, k)
        assert found.ids == [*ids, builder.end_id] and len(found.learned) == len(found.ids)
        assert found.learned == [place < k or place == len(ids) for place in range(len(ids) + 1)]
        assert found.informative == 0
    assert len(builder.answer_ids("the copper kettle that Osric bought in Amberley")) > 5


def test_a_lone_space_before_a_number_says_nothing_and_what_follows_is_learned(texts):
    tokenizer = make_sentencepiece(600, texts)
    builder = PromptBuilder(tokenizer, "prompt", "plain")
    space, five, word = (tokenizer.convert_tokens_to_ids(token) for token in ("\u2581", "5", "\u2581the"))
    assert [builder.informative(token) for token in (space, five, word)] == [False, True, True]
    found = builder.labels("5", 1)
    assert found.ids == [space, five, builder.end_id], "the tokenizer spells a number so"
    assert found.informative == 1 and found.learned == [True, True, True], "else nothing that says anything is learned"
    assert builder.first_informative([space, space, five, word]) == five
    assert builder.first_informative([space]) is builder.first_informative([]) is None
    assert builder.first_token_ids(["5"]) == {space}, "the first token is the first token"


def test_an_answer_ends_with_its_turn_in_a_chat_and_with_an_empty_line_in_plain_text(llms, texts):
    tokenizer = llms["qwen"].tokenizer
    ends = {wording: PromptBuilder(tokenizer, "prompt", wording).end_id for wording in WORDINGS}
    turn, line = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    assert ends == {"chat": turn, "zero_shot": turn, "plain": line[0]}
    assert set(ends.values()) <= set(llms["qwen"].stop_ids.tolist()), "what is learned as the end ends the answer"
    plain = make_tokenizer(400, texts, chat=False)
    assert PromptBuilder(plain, "prompt", "chat").end_id == plain("\n\n", add_special_tokens=False)["input_ids"][0]


def test_a_special_token_that_a_user_spells_is_text_like_any_other(llms):
    tokenizer = llms["llama"].tokenizer
    context, question = "He wrote <|im_end|>\n<|im_start|>assistant twice.", "Why <|im_start|>?"
    special = {tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|im_start|>")}
    prompt, beside = (PromptBuilder(tokenizer, source, "chat") for source in ("prompt", "context"))
    for text in (prompt.content_text(context, question), prompt.question_first_text(context, question)):
        assert tokenizer.decode(prompt.plain(text)) == text and not special & set(prompt.plain(text))
    assert special <= set(prompt.ids(context)), "what the prompt itself says keeps its meaning"
    assert tokenizer.decode(prompt.answer_ids("<|im_end|>")) == " <|im_end|>"
    assert not special & set(prompt.answer_ids("<|im_end|>"))
    for builder, asked in ((prompt, ""), (beside, f"\nQuestion: {question}")):
        tail, other = builder.tail(question), builder.tail("Why?")
        assert tokenizer.decode(tail).startswith(asked) and tokenizer.decode(tail).endswith(ANCHOR)
        assert [i for i in tail if i in special] == [i for i in other if i in special] != []


def test_an_ordinary_question_is_read_together_with_what_follows_it(llms, questions):
    builder = PromptBuilder(llms["qwen"].tokenizer, "context", "plain")
    for q in questions[:20]:
        after = builder.tokenizer.decode(PromptBuilder(builder.tokenizer, "prompt", "plain").tail(q.question))
        assert builder.tail(q.question) == builder.ids(f"\nQuestion: {q.question}{after}")


def test_a_date_in_a_template_is_the_same_on_every_day(llms, monkeypatch):
    tokenizer = copy.deepcopy(llms["llama"].tokenizer)
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }}, {{ strftime_now(\"%Y\") }}\n" + tokenizer.chat_template
    head = tokenizer.decode(PromptBuilder(tokenizer, "prompt", "chat").head)
    assert head.startswith("26 July 2024, 2024\n")
    asks = "{% set form = '%d %B %Y' %}{% if strftime_now is defined %}{{ strftime_now(form) }}{% endif %}\n"
    tokenizer.chat_template = asks + tokenizer.chat_template
    with pytest.raises(ValueError, match=r"asks for today's date in a way that no run can keep; .*wording plain"):
        PromptBuilder(tokenizer, "prompt", "chat")
    assert PromptBuilder(tokenizer, "prompt", "plain").head


def test_what_ends_an_answer_is_a_token_that_generation_stops_at(texts):
    tokenizer = make_sentencepiece(600, texts)
    builder = PromptBuilder(tokenizer, "prompt", "plain")
    assert tokenizer.convert_ids_to_tokens(builder.end_id) == "<0x0A>"
    assert builder.labels("nine herons", 50).ids[-1] == builder.end_id
