"""Questions: SQuAD v1.1 from SQUAD_DIR or the hub, any file in its form, or the sample set that ships here.

Whatever is malformed is refused with file, question id and reason; nothing is skipped silently.
"""

import gzip
import json
import os
import re
import sys
import unicodedata
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from reprlib import repr as shown  # of anything, in a few words

import latentwire.data
from latentwire.data.question import SPLITS, Question, QuestionSet, split_by_article
from latentwire.data.registry import DATASETS, dataset
from latentwire.data.scoring import squad_scores
from latentwire.utils.cli import reason
from latentwire.utils.files import UNREADABLE
from latentwire.utils.registry import import_all
from latentwire.utils.surroundings import hub_answers

SAMPLE_DIR = Path(__file__).with_name("sample_data")
HUB_ID = "rajpurkar/squad"
_HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair


def load(name: str, split: str) -> QuestionSet:
    """Questions of one split of a registered data set, or of a file or folder in SQuAD v1.1 form.

    name: one of DATASETS ("squad", "sample", ...), or a path. A folder holds train*.json and dev*.json, plain or .gz. A
    file is read as "dev"; its "train" is that of "squad". split: "train", "dev", or "held_out": the questions of train
    on the articles that no training sees. Raises FileNotFoundError or ValueError naming what is amiss.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if split == "held_out":
        train = load(name, "train")
        return replace(train, questions=split_by_article(train.questions)[1])
    import_all(latentwire.data)
    if name in DATASETS:
        found = DATASETS[name]
        real, questions = found.read(split)
        return QuestionSet(real, questions, found.score, found.spans)
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(
            f"dataset {name!r} is neither {', '.join(DATASETS)} nor an existing file or folder in SQuAD v1.1 form"
        )
    if path.is_dir():
        return QuestionSet(name, read_squad_file(_find_split(path, split)), squad_scores, True)
    return QuestionSet(name, read_squad_file(path), squad_scores, True) if split == "dev" else load("squad", split)


@dataset("squad")
def squad(split: str) -> tuple[str, list[Question]]:
    """SQuAD v1.1 from SQUAD_DIR, else the hub, else the sample set."""
    folder = os.environ.get("SQUAD_DIR")
    if folder:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"SQUAD_DIR={folder} is not a folder; unset it or point it at SQuAD v1.1's files")
        return "squad", read_squad_file(_find_split(Path(folder), split))
    questions = _load_from_hub(split)
    if questions is not None:
        return "squad", questions
    print("data: no SQUAD_DIR and no hub, so the sample set is read (its numbers support no claim)", file=sys.stderr)
    return "sample", sample(split)


@dataset("sample")
def sample(split: str) -> list[Question]:
    """The questions that were written for this repository."""
    return read_squad_file(SAMPLE_DIR / f"{split}.json")


def read_squad_file(path: Path) -> list[Question]:
    """Read and check one file in the official SQuAD v1.1 form, plain or gzip."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" or path.suffix == ".gz" else raw).decode("utf-8-sig")
        document = json.loads(text)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: broken gzip file ({error}); fetch it again") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    except UNREADABLE as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    try:
        rows = [
            (article["title"], f"{article['title']}/{place}.{number}", paragraph["context"], qa["id"], qa["question"],
             _answers(qa))
            for place, article in enumerate(document["data"])
            for number, paragraph in enumerate(article["paragraphs"])
            for qa in paragraph["qas"]
        ]  # fmt: skip
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not in SQuAD v1.1 form ({type(error).__name__}: {error}); "
            "expected data[].{title, paragraphs[].{context, qas[].{id, question, answers[].{text, answer_start}}}}"
        ) from error
    return _checked(rows, str(path))


def _answers(qa: dict) -> list[tuple[str, int]]:
    """Text and offset of each answer; none where SQuAD v2 says that the question has none."""
    return [] if qa.get("is_impossible") else [(answer["text"], answer["answer_start"]) for answer in qa["answers"]]


def _checked(rows: Iterable[tuple], source: str) -> list[Question]:
    """Build questions from (title, paragraph, context, id, question, [(text, start)]) and refuse malformed ones."""
    questions, seen = [], set()
    paragraphs: dict[str, str] = {}  # by context: intervals are drawn by paragraph, however often a file repeats it
    for title, paragraph, context, id_, question, answers in rows:
        where = f"{source}: question {id_ if isinstance(id_, str) and id_.isprintable() else shown(id_)}"
        if not isinstance(id_, str):
            raise ValueError(f"{where}: the id must be a string")
        if not isinstance(title, str):
            raise ValueError(f"{where}: the title of its article must be a string, found {shown(title)}")
        if not (isinstance(context, str) and _visible(context)):
            raise ValueError(f"{where}: its context is empty, or holds only signs that nobody sees")
        if not (isinstance(question, str) and question.strip()):
            raise ValueError(f"{where}: the question is empty")
        for what, text in (("id", id_), ("title", title), ("context", context), ("question", question)):
            if _HALF.search(text):
                raise ValueError(f"{where}: its {what} holds half of a surrogate pair, which no text can; repair it")
        if id_ in seen:
            raise ValueError(f"{where}: this id occurs twice")
        if not answers:
            raise ValueError(f"{where}: it has no answers (SQuAD v2's unanswerable questions are not supported)")
        for text, start in answers:
            if not (isinstance(text, str) and text.strip() and isinstance(start, int)):
                raise ValueError(f"{where}: answer {shown(text)} at {shown(start)} is not a text and an offset")
            if start < 0 or context[start : start + len(text)] != text:
                found = context[max(start, 0) : max(start, 0) + len(text)]
                raise ValueError(
                    f"{where}: answer {text!r} does not stand at its answer_start {start} (found {found!r})"
                )
        seen.add(id_)
        texts, starts = zip(*answers, strict=True)
        paragraph = paragraphs.setdefault(context, paragraph)
        questions.append(Question(id_, title, paragraph, context, question.strip(), texts, starts))
    if not questions:
        raise ValueError(f"{source}: it holds no questions")
    return questions


def _visible(text: str) -> bool:
    """Whether a text holds more than white space, control and format signs."""
    return any(unicodedata.category(sign) not in ("Cc", "Cf", "Zl", "Zp", "Zs") for sign in text)


def _find_split(folder: Path, split: str) -> Path:
    found = sorted(p for p in folder.glob(f"{split}*.json*") if p.name.endswith((".json", ".json.gz")))
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise FileNotFoundError(f"{folder} must hold exactly one {split}*.json or {split}*.json.gz, found {names}")
    return found[0]


def why(error: Exception) -> str:
    """What a hub, or `datasets`, says; where a data set was fetched and cannot be made, what that came from."""
    from datasets.exceptions import DatasetGenerationError

    unmade = isinstance(error, DatasetGenerationError)
    return reason(error.__cause__ if unmade and error.__cause__ else error)


def _load_from_hub(split: str) -> list[Question] | None:
    """SQuAD through `datasets`; None where no hub answers and no cache holds the data. ValueError with the reason where
    a hub answers and does not give it."""
    import datasets  # kept here: only this function needs it

    reachable = hub_answers()
    if not reachable:
        datasets.config.HF_HUB_OFFLINE = True  # the local cache may still hold it
    try:
        rows = datasets.load_dataset(HUB_ID, split="validation" if split == "dev" else "train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if not reachable:
            return None
        raise ValueError(
            f"the hub did not give {HUB_ID} ({why(error)}); try again, set SQUAD_DIR, or name --dataset sample"
        ) from error
    return _checked(
        (
            (r["title"], f"{r['title']}/{number}", r["context"], r["id"], r["question"],
             list(zip(r["answers"]["text"], r["answers"]["answer_start"], strict=True)))
            for number, r in enumerate(rows)
        ),
        f"hub {HUB_ID} {split}",
    )  # fmt: skip
