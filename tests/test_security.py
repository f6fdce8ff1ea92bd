"""What comes from others can neither run code nor write outside its folder, nor take memory for what it only claims.

Wires and checkpoints that are cut or altered: tests/test_properties.py. Sizes that a checkpoint claims:
tests/models/test_checkpoint.py.
"""

import ast
import html
import json
import shutil
import struct
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from latentwire.api.message import Wire
from latentwire.data.squad import SAMPLE_DIR, read_squad_file
from latentwire.llms.loading import load_llm
from latentwire.models.backbones import load_backbone
from latentwire.models.checkpoint import load_checkpoint
from latentwire.models.exporting import export
from latentwire.models.weights import load_adapters, read_config
from latentwire.models.wire import CODECS, sealed, unpack
from latentwire.reporting.page import render
from latentwire.reporting.records import gather
from latentwire.service import page
from latentwire.utils.files import write_sealed

ROOT = Path(__file__).parents[1]
CALLS_THAT_RUN = {"eval", "exec", "compile", "__import__"}
OWN_PICKLES = {"corpus.py"}  # from one process of its Ray pipeline to the next
MODULES_THAT_RUN = {"dill", "joblib", "marshal", "shelve", "cloudpickle"}
EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(1)> Cats & dogs"


def calls(path):
    """Name, keyword arguments and text of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield (
                ast.unparse(node.func),
                {word.arg: ast.unparse(word.value) for word in node.keywords},
                ast.unparse(node),
            )


@pytest.mark.parametrize("path", sorted((ROOT / "latentwire").rglob("*.py")), ids=lambda path: path.stem)
def test_nothing_here_runs_what_it_reads(path):
    for name, words, text in calls(path):
        assert name not in CALLS_THAT_RUN, text
        assert path.name in OWN_PICKLES or not name.startswith("pickle.")
        assert not name.endswith(("os.system", "os.popen")), text
        assert words.get("trust_remote_code", "False") == words.get("allow_pickle", "False") == "False", text
        assert words.get("shell", "False") == "False", text
        assert name != "torch.load" or words.get("weights_only") == "True", text
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert not imported & MODULES_THAT_RUN


def with_code(folder, name, **config):
    """Let a file of transformers' name a class whose module says that it ran."""
    code = f"open({str(folder / 'ran')!r}, 'w')\nfrom transformers import BertConfig, BertModel\nEvil = BertConfig\n"
    (folder / "evil.py").write_text(code)
    found = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(found | config))


AUTO = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.Evil")
AUTO |= {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}


@pytest.mark.parametrize(
    ("part", "name", "changes"),
    [
        ("wire_tokenizer", "tokenizer_config.json", {"auto_map": AUTO, "tokenizer_class": "EvilTokenizer"}),
        ("backbone", "tokenizer_config.json", {"auto_map": AUTO, "tokenizer_class": "EvilTokenizer"}),
        ("backbone", "config.json", {"auto_map": AUTO, "model_type": "evil"}),
        ("backbone", "config.json", {"auto_map": AUTO}),
    ],
)
def test_code_in_a_checkpoint_is_not_run(trained, monkeypatch, part, name, changes):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked whether to run it"))
    folder = trained / part
    with_code(folder, name, **changes)
    config = read_config(trained)
    del config["parts_sha256"]  # as its author would
    write_sealed(trained / "config.json", config)
    try:
        load_checkpoint(trained, config["llms"])
    except ValueError as error:
        assert str(folder) in str(error)
    assert not (folder / "ran").exists()


def test_code_beside_a_model_is_not_run_and_the_model_is_refused(llm_folders, encoder_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked whether to run it"))
    llm, encoder = tmp_path / "llm", tmp_path / "encoder"
    shutil.copytree(llm_folders["LLAMA_ID"], llm)
    shutil.copytree(encoder_folder, encoder)
    for folder in (llm, encoder):
        with_code(folder, "config.json", auto_map=AUTO, model_type="evil")
    with pytest.raises(ValueError, match="cannot load the model"):
        load_llm("llama", str(llm), "cpu", "float32")
    with pytest.raises(ValueError, match="cannot load the encoder"):
        load_backbone(str(encoder))
    assert not [*tmp_path.rglob("ran")]


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "..", "a\\evil"])
def test_an_llm_that_is_called_like_a_path_is_refused_before_a_file_is_called_by_it(trained, tmp_path, name):
    config = read_config(trained)
    write_sealed(trained / "config.json", config | {"llms": {name: "some/model"}, "widths": {name: 48}})
    before = sorted(tmp_path.rglob("*"))
    for attempt in (
        lambda: export(trained, tmp_path / "shipped" / "deep"), lambda: load_adapters(trained, {name: "some/model"}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"config\.json calls an LLM .*which can be no part of a file's name"):
            attempt()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "backbone/../../secret", "", "encoder.safetensors"])
def test_a_part_outside_the_checkpoint_is_refused(trained, tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    config = read_config(trained)
    write_sealed(trained / "config.json", config | {"parts_sha256": {name: "0" * 64}})
    with pytest.raises(ValueError, match=rf"config\.json names {name!r}, which is no part of a checkpoint"):
        load_checkpoint(trained, config["llms"])


def claims(version, codec):
    """Wires of a few bytes whose headers claim as much as a header can."""
    if version == 1:
        yield sealed(struct.pack("<4sBBHHI", b"LWIR", 1, codec, 0xFFFF, 0xFFFF, 0xFFFFFFFF))
        yield sealed(struct.pack("<4sBBHHI", b"LWIR", 1, codec, 1, 1, 0xFFFFFFFF))
        yield sealed(struct.pack("<4sBBHHI", b"LWIR", 1, codec, 0xFFFF, 0xFFFF, 1) + b"\0" * 64)
    else:
        header = struct.pack("<4sBBBHH8sII", b"LWIR", 2, codec, 0, 0xFFFF, 0xFFFF, b"x" * 8, 2**32 - 1, 2**32 - 1)
        yield sealed(header)
        yield sealed(header + b"\xff\xff" * 0xFFFF)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("version", [1, 2])
def test_a_wire_that_claims_more_than_it_has_is_refused_at_once(version, codec):
    for data in claims(version, codec):
        tracemalloc.start()
        try:
            for read in (unpack, Wire.unpack):
                with pytest.raises(ValueError):
                    read(data)
            assert tracemalloc.get_traced_memory()[1] < 5e6
        finally:
            tracemalloc.stop()


class Markup(HTMLParser):
    """What a browser would make of a text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]


def assert_harmless(text, scripts):
    """No element and no attribute that runs or fetches something, but our own script."""
    found = Markup(text)
    assert found.tags.count("script") == scripts and "alert(1)" in html.unescape(text)
    assert not {"img", "iframe", "object", "embed", "link", "base"} & set(found.tags)
    for tag, name, value in found.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("href", "src", "action") or value.startswith("#"), (tag, name, value)


def poisoned(value, keep=()):
    """Every text of a record with markup behind it, but those of the keys to keep."""
    if isinstance(value, dict):
        return {key: item if key in keep else poisoned(item, keep) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item, keep) for item in value]
    return value + EVIL if isinstance(value, str) else value


def test_texts_of_a_record_cannot_become_markup(finished, tmp_path):
    """Answers, references, ids, LLMs' names, data, settings, machine, commit, the name of the folder."""
    folder = tmp_path / EVIL.replace("/", "_")
    shutil.copytree(finished[0], folder)
    for name in ("results.json", "config.json", "manifest.json"):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(poisoned(found, keep=("condition", "a", "b", "metric", "colour"))))
    lines = map(json.loads, (folder / "predictions.jsonl").read_text().splitlines())
    lines = [{k: v for k, v in line.items() if k != "crc32"} for line in lines]
    text = "".join(json.dumps(poisoned(line, keep=("condition",))) + "\n" for line in lines)
    (folder / "predictions.jsonl").write_text(text)
    step = {"step": 1, "loss": 2.0, EVIL: 1.0, "llms": {EVIL: {"ce": 1.0, EVIL: 2.0}}}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step | {"step": n}) + "\n" for n in range(1, 20)))
    assert_harmless(render(gather([folder])), scripts=1)


def test_texts_of_questions_cannot_become_markup_in_a_report(finished, tmp_path):
    document = poisoned(json.loads((SAMPLE_DIR / "dev.json").read_text()), keep=("id", "answers"))
    (tmp_path / "dev.json").write_text(json.dumps(document))
    assert all("<script>" in q.context for q in read_squad_file(tmp_path / "dev.json"))
    shutil.copytree(finished[0], tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (tmp_path / "run" / "results.json").write_text(json.dumps(results | {"dataset": str(tmp_path / "dev.json")}))
    assert_harmless(render(gather([tmp_path / "run"])), scripts=1)


def test_answers_and_names_cannot_become_markup_in_the_services_page():
    service = SimpleNamespace(readers={EVIL: SimpleNamespace(llm=SimpleNamespace(id=EVIL))})
    rows = [page._Row(EVIL, reads, answer=EVIL) for reads in ("text", "wire")]
    assert_harmless(page._table(service, rows, EVIL, 0.1), scripts=0)
    for chooses in (False, True):
        encoder = SimpleNamespace(chooses_tokens=chooses, chosen_spans=lambda *_: [[(0, 3), (9, len(EVIL))]])
        lw = SimpleNamespace(source="context", encoder=encoder, parts=lambda *_: [EVIL])
        assert_harmless(page._marked(lw, SimpleNamespace(blocks=[2], m=2), EVIL, EVIL), scripts=0)


def test_a_wire_that_claims_billions_of_empty_blocks_takes_no_memory():
    data = sealed(struct.pack("<4sBBHHI", b"LWIR", 1, 0, 0, 8, 0xFFFFFFFF))
    tracemalloc.start()
    try:
        assert Wire.unpack(data).m == 0
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()
