"""Questions: the sample set that ships, refusal of malformed files, and where "squad" comes from."""

import gzip
import json
import re
from pathlib import Path

import pytest

from latentwire.data import squad as data
from latentwire.data.question import SPLITS, Question, QuestionSet, split_by_article
from latentwire.data.registry import DATASETS, dataset
from latentwire.data.scoring import squad_scores
from latentwire.data.squad import SAMPLE_DIR, _load_from_hub, load, read_squad_file

CONTEXT = "Łódź lies 120 km from Warsaw. Łódź grew around 1823."


@pytest.fixture(autouse=True)
def no_squad_dir_and_no_network(monkeypatch):
    monkeypatch.delenv("SQUAD_DIR", raising=False)
    monkeypatch.setattr(data, "_load_from_hub", lambda split: pytest.fail("the hub was asked"))


def qa(id_: str = "q1", answer: str = "120", start: int = 10) -> dict:
    return {"id": id_, "question": "How far?", "answers": [{"text": answer, "answer_start": start}]}


def squad(*qas: dict, context: str = CONTEXT, title: str = "Lodz") -> dict:
    return {"version": "1.1", "data": [{"title": title, "paragraphs": [{"context": context, "qas": list(qas)}]}]}


def encoded(document: dict) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode()


def write_splits(folder: Path, suffix: str = ".json") -> None:
    folder.mkdir()
    for split in ("train", "dev"):
        content = encoded(squad(qa(f"{split}-1"), qa(f"{split}-2"), title=f"{split} article"))
        (folder / f"{split}-v1.1{suffix}").write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)


def numbered(n: int) -> list[Question]:
    return [Question(f"id{i:03d}", "t", "t/0", "c", "q", ("c",), (0,)) for i in range(n)]


@pytest.fixture(scope="module")
def sample() -> dict[str, list[Question]]:
    return {split: read_squad_file(SAMPLE_DIR / f"{split}.json") for split in ("train", "dev")}


@pytest.fixture(scope="module")
def sample_questions(sample) -> list[Question]:
    return sample["train"] + sample["dev"]


def test_sample_set_is_large_enough(sample_questions):
    passages = {q.context for q in sample_questions}
    assert len(passages) >= 60
    assert min(len(passage.split()) for passage in passages) >= 80
    assert len(sample_questions) >= 240


def test_sample_set_has_unique_ids_and_one_name_for_each_paragraph(sample_questions):
    assert len({q.id for q in sample_questions}) == len(sample_questions)
    assert len({q.paragraph for q in sample_questions}) == len({q.context for q in sample_questions})
    assert len({(q.paragraph, q.context) for q in sample_questions}) == len({q.context for q in sample_questions})


def test_sample_set_shares_neither_article_nor_passage_between_train_and_dev(sample):
    for key in ("title", "paragraph", "context"):
        train, dev = ({getattr(q, key) for q in sample[split]} for split in ("train", "dev"))
        assert train & dev == set()


@pytest.mark.parametrize("split", ["train", "dev"])
def test_sample_set_holds_the_hard_kinds_of_answers(sample, split):
    questions = sample[split]
    assert sum(len(set(q.answers)) > 1 for q in questions) >= 10
    assert sum(not q.context.isascii() for q in questions) >= 10
    assert sum(not "".join(q.answers).isascii() for q in questions) >= 1
    assert sum(any(c.isdigit() for c in "".join(q.answers)) for q in questions) >= 10


@pytest.mark.parametrize("split", ["train", "dev"])
def test_every_span_of_the_sample_file_is_exact(split):
    spans = 0
    for article in json.loads((SAMPLE_DIR / f"{split}.json").read_text("utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                for answer in question["answers"]:
                    start, text = answer["answer_start"], answer["text"]
                    assert paragraph["context"][start : start + len(text)] == text, question["id"]
                    assert text == text.strip() != "", question["id"]
                    spans += 1
    assert spans >= 100


def test_sample_is_named_sample_and_equals_the_file(sample):
    for split in ("dev", "train"):
        assert load("sample", split) == QuestionSet("sample", sample[split], squad_scores, spans=True)


def test_a_question_carries_every_field_of_its_file(tmp_path):
    document = squad(qa("x"), title="First")
    document["data"][0]["paragraphs"].append(
        {
            "context": "Two tins.",
            "qas": [
                {
                    "id": "y",
                    "question": " What? ",
                    "answers": [{"text": "tins", "answer_start": 4}, {"text": "Two tins", "answer_start": 0}],
                }
            ],
        }
    )
    (tmp_path / "f.json").write_bytes(encoded(document))
    assert read_squad_file(tmp_path / "f.json") == [
        Question("x", "First", "First/0.0", CONTEXT, "How far?", ("120",), (10,)),
        Question("y", "First", "First/0.1", "Two tins.", "What?", ("tins", "Two tins"), (4, 0)),
    ]


GZIPPED = gzip.compress(encoded(squad(*(qa(f"q{i}") for i in range(50)))), mtime=0)
MIDDLE = len(GZIPPED) // 2
INVALID_BLOCK = GZIPPED[:10] + b"\xff" + GZIPPED[11:]
WRONG_CRC = GZIPPED[:-8] + bytes([GZIPPED[-8] ^ 1]) + GZIPPED[-7:]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("bad.json", b"id,question\n1,why?\n", "not JSON"),
        ("bad.json", b"", "not JSON"),
        ("bad.json", encoded(squad(qa()))[:-5], "not JSON"),
        ("bad.json", encoded(squad(qa())).replace("Łódź".encode(), b"\xa3\xf3d\xbc"), "not UTF-8"),
        ("bad.json.gz", encoded(squad(qa())), "broken gzip"),
        ("bad.json.gz", GZIPPED[:MIDDLE], "broken gzip"),
        ("bad.json.gz", GZIPPED[:-1], "broken gzip"),
        ("bad.json.gz", GZIPPED[:3], "broken gzip"),
        ("bad.json.gz", INVALID_BLOCK, "broken gzip"),
        ("bad.json.gz", WRONG_CRC, "broken gzip"),
        ("bad.json.gz", gzip.compress(b"not json", mtime=0), "not JSON"),
        ("bad.json.gz", gzip.compress(b"\xff\xfe", mtime=0), "not UTF-8"),
        ("bad.json", b'["data"]', "not in SQuAD v1.1 form"),
        ("bad.json", b'{"data": null}', "not in SQuAD v1.1 form"),
        ("bad.json", b'{"data": ["title"]}', "not in SQuAD v1.1 form"),
        ("bad.json", b'{"data": []}', "holds no questions"),
        ("bad.json", encoded(squad()), "holds no questions"),
    ],
)
def test_an_unreadable_file_is_refused_with_its_name(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: .*{reason}"):
        read_squad_file(tmp_path / name)


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ((), "data"),
        (("data", 0), "title"),
        (("data", 0), "paragraphs"),
        (("data", 0, "paragraphs", 0), "context"),
        (("data", 0, "paragraphs", 0), "qas"),
        (("data", 0, "paragraphs", 0, "qas", 0), "id"),
        (("data", 0, "paragraphs", 0, "qas", 0), "question"),
        (("data", 0, "paragraphs", 0, "qas", 0), "answers"),
        (("data", 0, "paragraphs", 0, "qas", 0, "answers", 0), "text"),
        (("data", 0, "paragraphs", 0, "qas", 0, "answers", 0), "answer_start"),
    ],
)
def test_a_missing_key_is_refused_and_named(tmp_path, path, key):
    document = squad(qa())
    place = document
    for step in path:
        place = place[step]
    del place[key]
    (tmp_path / "bad.json").write_bytes(encoded(document))
    with pytest.raises(ValueError, match=rf"bad\.json: not in SQuAD v1\.1 form \(KeyError: '{key}'\); expected"):
        read_squad_file(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (squad(qa("good"), qa("q7", "120", 11)), r"answer '120' does not stand at its answer_start 11 \(found '20 '\)"),
        (squad(qa("q7", "120", 10 - len(CONTEXT))), "answer_start -42"),
        (squad(qa("q7", "120", 9_999)), "answer_start 9999"),
        (squad(qa("q7", "Łódź", 1)), "answer 'Łódź' does not stand at its answer_start 1"),
        (squad(qa("q7", "1823.", len(CONTEXT) - 4)), "answer '1823.' does not stand"),
        (squad(qa("q7", "", 3)), "answer '' at 3 is not a text and an offset"),
        (squad(qa("q7", " ", 4)), "answer ' ' at 4 is not a text and an offset"),
        (squad(qa("q7", "120", "10")), "answer '120' at '10' is not a text and an offset"),
        (squad(qa("q7", "120", None)), "at None is not a text and an offset"),
        (squad(qa("q7", 120, 10)), "answer 120 at 10 is not a text and an offset"),
        (squad(qa("q7"), context=""), "context is empty"),
        (squad(qa("q7"), context=" \n"), "context is empty"),
        (squad(qa("q7"), context=None), "context is empty"),
        (squad(qa("q7") | {"question": "  "}), "the question is empty"),
        (squad(qa("q7") | {"question": None}), "the question is empty"),
        (squad(qa("q7") | {"answers": []}), "no answers"),
        (squad(qa("q7"), qa("q7")), "this id occurs twice"),
    ],
)
def test_a_malformed_question_is_refused_with_file_and_id(tmp_path, document, reason):
    (tmp_path / "bad.json").write_bytes(encoded(document))
    with pytest.raises(ValueError, match=rf"bad\.json: question q7: .*{reason}"):
        read_squad_file(tmp_path / "bad.json")


def test_a_title_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "bad.json").write_bytes(encoded(squad(qa("q7"), title=None)))
    with pytest.raises(
        ValueError, match=r"bad\.json: question q7: the title of its article must be a string, found None"
    ):
        read_squad_file(tmp_path / "bad.json")


def test_a_question_that_squad_v2_calls_impossible_is_refused_as_one_without_answers(tmp_path):
    unanswerable = qa("q7") | {"is_impossible": True, "plausible_answers": []}
    for document in (squad(unanswerable), squad({key: unanswerable[key] for key in unanswerable if key != "answers"})):
        (tmp_path / "bad.json").write_bytes(encoded(document))
        with pytest.raises(ValueError, match=r"bad\.json: question q7: it has no answers \(SQuAD v2"):
            read_squad_file(tmp_path / "bad.json")
    (tmp_path / "good.json").write_bytes(encoded(squad(qa("q7") | {"is_impossible": False})))
    assert len(read_squad_file(tmp_path / "good.json")) == 1


@pytest.mark.parametrize("what", ["id", "title", "context", "question"])
def test_half_of_a_surrogate_pair_is_refused_before_a_tokenizer_meets_it(tmp_path, what):
    texts = {"id": "q7", "title": "Lodz", "context": CONTEXT, "question": "How far?"}
    texts[what] += "\ud83d"
    document = squad(qa(texts["id"]) | {"question": texts["question"]}, context=texts["context"], title=texts["title"])
    (tmp_path / "bad.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=rf"question \W?q7.*: its {what} holds half of a surrogate pair"):
        read_squad_file(tmp_path / "bad.json")


@pytest.mark.parametrize("packed", [True, False])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, packed):
    content = b"\xef\xbb\xbf" + encoded(squad(qa()))
    (tmp_path / "f.json").write_bytes(gzip.compress(content, mtime=0) if packed else content)
    assert read_squad_file(tmp_path / "f.json")[0].context == CONTEXT


def test_an_id_that_occurs_in_two_articles_is_refused(tmp_path):
    document = squad(qa("q7"))
    document["data"] += squad(qa("q7"), title="Other")["data"]
    (tmp_path / "bad.json").write_bytes(encoded(document))
    with pytest.raises(ValueError, match=r"question q7: this id occurs twice"):
        read_squad_file(tmp_path / "bad.json")


@pytest.mark.parametrize("name", ["zipped.json.gz", "zipped.json"])
def test_gzip_and_plain_give_the_same_questions(tmp_path, name):
    raw = (SAMPLE_DIR / "dev.json").read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(raw, mtime=0))
    assert read_squad_file(tmp_path / name) == read_squad_file(SAMPLE_DIR / "dev.json")


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
@pytest.mark.parametrize("split", ["train", "dev"])
def test_squad_dir_wins_and_is_called_squad(tmp_path, monkeypatch, capsys, split, suffix):
    write_splits(tmp_path / "squad", suffix)
    monkeypatch.setenv("SQUAD_DIR", str(tmp_path / "squad"))
    found = load("squad", split)
    assert found.name == "squad" and found.spans and found.score is squad_scores
    assert [q.id for q in found.questions] == [f"{split}-1", f"{split}-2"]
    assert capsys.readouterr().err == ""


def test_squad_dir_does_not_replace_the_sample_set(tmp_path, monkeypatch, sample):
    write_splits(tmp_path / "squad")
    monkeypatch.setenv("SQUAD_DIR", str(tmp_path / "squad"))
    found = load("sample", "dev")
    assert (found.name, found.questions) == ("sample", sample["dev"])


def test_a_squad_dir_that_does_not_exist_is_refused_and_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SQUAD_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"SQUAD_DIR=.*nowhere is not a folder; unset it or point it"):
        load("squad", "dev")


def test_a_squad_dir_without_the_split_is_refused(tmp_path, monkeypatch):
    write_splits(tmp_path / "squad")
    (tmp_path / "squad" / "dev-v1.1.json").unlink()
    monkeypatch.setenv("SQUAD_DIR", str(tmp_path / "squad"))
    with pytest.raises(FileNotFoundError, match=r"squad must hold exactly one dev\*\.json.* found none"):
        load("squad", "dev")


def test_two_files_for_one_split_are_refused_and_both_named(tmp_path, monkeypatch):
    write_splits(tmp_path / "squad")
    (tmp_path / "squad" / "dev-v2.0.json.gz").write_bytes(gzip.compress(encoded(squad(qa()))))
    monkeypatch.setenv("SQUAD_DIR", str(tmp_path / "squad"))
    with pytest.raises(FileNotFoundError, match=r"exactly one dev.* found dev-v1\.1\.json, dev-v2\.0\.json\.gz"):
        load("squad", "dev")


def test_files_that_are_no_json_do_not_count_as_splits(tmp_path):
    write_splits(tmp_path / "mine")
    (tmp_path / "mine" / "dev-v1.1.json.md5").write_text("0")
    assert len(load(str(tmp_path / "mine"), "dev").questions) == 2


def test_a_folder_as_dataset_gives_its_own_splits_under_its_own_name(tmp_path):
    write_splits(tmp_path / "mine")
    folder = str(tmp_path / "mine")
    for split in ("train", "dev"):
        found = load(folder, split)
        assert found.name == folder and found.spans and found.score is squad_scores
        assert {q.title for q in found.questions} == {f"{split} article"}


def test_a_file_as_dataset_is_its_dev_and_trains_on_squad(tmp_path, monkeypatch):
    write_splits(tmp_path / "squad")
    monkeypatch.setenv("SQUAD_DIR", str(tmp_path / "squad"))
    file = tmp_path / "mine.json"
    file.write_bytes(encoded(squad(qa("mine"))))
    found = load(str(file), "dev")
    assert (found.name, [q.id for q in found.questions]) == (str(file), ["mine"])
    found = load(str(file), "train")
    assert (found.name, [q.id for q in found.questions]) == ("squad", ["train-1", "train-2"])


def test_an_unknown_dataset_is_refused_with_the_choices():
    with pytest.raises(FileNotFoundError, match=r"dataset 'squat' is neither squad, sample.* nor an existing file"):
        load("squat", "dev")


@pytest.mark.parametrize("name", ["squad", "sample"])
def test_an_unknown_split_is_refused_with_the_choices(name):
    with pytest.raises(ValueError, match="unknown split 'test'; choose one of dev, train, held_out"):
        load(name, "test")


def test_the_hub_serves_squad_where_squad_dir_is_unset(monkeypatch, capsys):
    monkeypatch.setattr(data, "_load_from_hub", lambda split: numbered(3) if split == "dev" else None)
    found = load("squad", "dev")
    assert (found.name, found.questions) == ("squad", numbered(3))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("split", ["train", "dev"])
def test_without_squad_dir_and_hub_the_sample_set_is_used_and_said_so(monkeypatch, capsys, sample, split):
    monkeypatch.setattr(data, "_load_from_hub", lambda split: None)
    found = load("squad", split)
    assert (found.name, found.questions) == ("sample", sample[split])
    printed = capsys.readouterr()
    assert "no SQUAD_DIR and no hub" in printed.err
    assert "sample set" in printed.err
    assert printed.out == ""


def test_the_hubs_rows_become_questions_and_paragraphs_are_kept_apart(monkeypatch):
    import datasets

    rows = [
        {"id": f"h{i}", "title": "T", "context": context, "question": "Which?",
         "answers": {"text": ["tins"], "answer_start": [context.index("tins")]}}
        for i, context in enumerate(["Two tins.", "Two tins.", "Nine tins."])
    ]  # fmt: skip
    asked = []
    monkeypatch.delenv("SQUAD_DIR", raising=False)
    monkeypatch.setattr(data, "_load_from_hub", _load_from_hub)
    monkeypatch.setattr(data, "hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or rows)
    found = load("squad", "dev")
    questions = found.questions
    assert found.name == "squad" and asked == [("rajpurkar/squad", "validation")]
    assert [q.id for q in questions] == ["h0", "h1", "h2"] and questions[2].starts == (5,)
    assert questions[0].paragraph == questions[1].paragraph != questions[2].paragraph


@pytest.fixture
def failing_hub(monkeypatch):
    """`datasets` fails; whether the hub answered before is told by whoever asks for this."""
    import datasets

    def with_error(error, reachable):
        def fail(name, split):
            raise error

        monkeypatch.setattr(data, "hub_answers", lambda: reachable)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # set by what is tested, and put back
        monkeypatch.setattr(datasets, "load_dataset", fail)
        return datasets

    return with_error


FAILURES = [
    ConnectionError("no route"),
    FileNotFoundError("not in the cache"),
    ValueError("no such split"),
    OSError("?"),
    RuntimeError("scripts are no longer supported"),
]


@pytest.mark.parametrize("error", FAILURES)
def test_where_no_hub_answers_and_no_cache_holds_the_data_there_is_none(failing_hub, error):
    datasets = failing_hub(error, reachable=False)
    assert _load_from_hub("dev") is None
    assert datasets.config.HF_HUB_OFFLINE, "nothing is tried that must fail slowly"


@pytest.mark.parametrize("error", FAILURES)
def test_a_hub_that_answers_and_does_not_give_the_data_is_not_taken_for_none(failing_hub, error):
    failing_hub(error, reachable=True)
    with pytest.raises(
        ValueError, match=rf"the hub did not give rajpurkar/squad \({re.escape(str(error))}\); .*SQUAD_DIR"
    ):
        _load_from_hub("dev")


def test_data_that_the_hub_gave_and_that_cannot_be_made_is_told_with_the_reason(failing_hub):
    from datasets.exceptions import DatasetGenerationError

    error = DatasetGenerationError("An error occurred while generating the dataset")
    error.__cause__ = ValueError("column n is no number")
    failing_hub(error, reachable=True)
    with pytest.raises(ValueError, match=r"the hub did not give rajpurkar/squad \(column n is no number\); try again"):
        _load_from_hub("dev")
    failing_hub(error, reachable=False)
    assert _load_from_hub("dev") is None


def test_held_out_are_the_questions_of_train_on_articles_that_no_training_sees(sample):
    found = load("sample", "held_out")
    assert (found.name, found.questions) == ("sample", split_by_article(sample["train"])[1])
    assert "held_out" in SPLITS


def test_a_data_set_is_added_by_one_decorated_function(monkeypatch):
    """With answers that are no spans, a score of its own, and the name of the data that they really come from."""
    for name in ("mine", "fallback"):
        monkeypatch.setitem(DATASETS, name, None)
        del DATASETS[name]  # what is registered below goes when the test ends

    def score(prediction, references):
        return {"f1": 0.25, "em": 0.0}

    @dataset("mine", score=score, spans=False)
    def mine(split):
        return [Question(f"{split}-{i}", f"t{i}", f"t{i}/0", "c", "q", ("not there",)) for i in range(3)]

    @dataset("fallback")
    def fallback(split):
        return "something else", mine(split)

    found = load("mine", "dev")
    assert (found.name, found.spans, found.score("x", ["y"])["f1"]) == ("mine", False, 0.25)
    assert [q.id for q in found.questions] == ["dev-0", "dev-1", "dev-2"] and found.questions[0].starts == ()
    assert len(load("mine", "held_out").questions) == 1 and load("mine", "held_out").score is score
    assert load("fallback", "dev").name == "something else" and load("fallback", "dev").score is squad_scores
    with pytest.raises(FileNotFoundError, match="neither squad, sample, mine, fallback nor an existing file"):
        load("yours", "dev")


def test_a_paragraph_that_a_file_repeats_is_one_paragraph(tmp_path):
    """One entry per question, as some tools write: intervals must not take questions on one text for independent."""
    nested, flat = [], []
    for n in range(4):
        context = f"Hall {n} was built in 1{n}20, and nobody lives there."
        qas = [qa(f"q{n}-{k}", answer=f"1{n}20", start=context.index(f"1{n}20")) for k in range(3)]
        nested.append({"context": context, "qas": qas})
        flat += [{"context": context, "qas": [one]} for one in qas]
    found = {}
    for name, paragraphs in (("nested", nested), ("flat", flat)):
        path = tmp_path / f"{name}.json"
        path.write_bytes(encoded({"data": [{"title": "Halls", "paragraphs": paragraphs}]}))
        groups = {}
        for question in read_squad_file(path):
            groups.setdefault(question.paragraph, set()).add(question.id)
        found[name] = sorted(map(sorted, groups.values()))
    assert found["flat"] == found["nested"] and len(found["flat"]) == 4


@pytest.mark.parametrize("context", ["\u200b\u200b", " \u2060\ufeff\n"])
def test_a_context_that_nobody_sees_is_empty(tmp_path, context):
    path = tmp_path / "dev.json"
    path.write_bytes(encoded(squad(qa(answer="\u200b", start=0), context=context)))
    with pytest.raises(ValueError, match="question q1: its context is empty"):
        read_squad_file(path)
