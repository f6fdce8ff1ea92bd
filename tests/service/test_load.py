"""The load test: bounded, on this machine only, and its figures are those of the requests that were made."""

import json
import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from service.service_tools import listening

from latentwire.service import load
from latentwire.service.app import app_of
from latentwire.service.load import _quantile, run_load
from latentwire.service.settings import LoadSettings, ServeSettings

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("surroundings")


@pytest.mark.parametrize(
    ("n", "share", "ms"), [(1, 0.5, 1000), (2, 0.5, 1000), (20, 0.95, 19_000), (100, 0.95, 95_000)]
)
def test_a_quantile_is_what_the_share_took_at_most(n, share, ms):
    assert _quantile(list(range(n, 0, -1)), share) == ms and _quantile([], share) is None


def test_requests_per_second_are_of_the_seconds_that_they_took():
    assert load._Asked([0.1] * 4, {}, 2.0).row("one", "encode", 1)["per_second"] == 2


@pytest.fixture(scope="module")
def reader(lw):
    return lw.reader("qwen")


def test_two_services_are_measured_in_turns_and_compared(lw, reader, tmp_path, monkeypatch):
    asked, ask = [], load._Target.ask

    def noted(self, kind, clients, seconds):
        asked.append((self.url, kind, clients))
        return ask(self, kind, clients, seconds)

    monkeypatch.setattr(load._Target, "ask", noted)
    apps = [app_of(ServeSettings(page=False, batch=batch), lw, {"qwen": reader}) for batch in (8, 1)]
    with ExitStack() as stack:
        url, one_url = (stack.enter_context(listening(app)) for app in apps)
        folder = str(tmp_path / "load")
        results = run_load(LoadSettings(url=url, one_url=one_url, clients="1,4", seconds=0.6, save_dir=folder))
        seen = [app.state.service.registry.get_sample_value for app in apps]
    assert [of for of, kind, clients in asked if (kind, clients) == ("answer", 1)] == [url, one_url, one_url, url]
    assert results == json.loads((tmp_path / "load" / "results.json").read_text())
    rows = {(row["service"], row["kind"], row["clients"]): row for row in results["rows"]}
    assert len(rows) == 8 and all(row["requests"] and not row["errors"] for row in rows.values())
    for kind, before in (("encode", 40), ("answer", 1)):  # wires to ask about, and one answer to be warm
        for name, counted in zip(("batched", "one"), seen, strict=True):
            made = sum(rows[name, kind, clients]["requests"] for clients in (1, 4))
            answered = counted("latentwire_requests_total", {"route": f"/v1/{kind}", "status": "200"})
            assert answered == made + before + results["services"][name]["warm"][kind]["requests"]
    assert seen[0]("latentwire_batch_size_count", {"kind": "answer qwen"}) < seen[0](
        "latentwire_batch_size_sum", {"kind": "answer qwen"}
    ), "requests of several clients are answered together"
    assert all(row["p50_ms"] <= row["p95_ms"] for row in rows.values())
    both = rows["batched", "answer", 4]["per_second"] / rows["one", "answer", 4]["per_second"]
    assert results["ratios"][-1]["per_second"] == pytest.approx(both)
    own = psutil.Process().memory_info().rss
    assert all(own / 2 < found["rss_after"] < own * 2 for found in results["services"].values())
    shown = (tmp_path / "load" / "table.md").read_text()
    assert "| one at a time | answer | 4 |" in shown and "MiB before" in shown
    assert (tmp_path / "load" / "load.png").read_bytes().startswith(b"\x89PNG")


def test_errors_are_counted_and_not_timed(lw, reader, tmp_path):
    """A queue of one, and four clients: some are told to come back later."""
    app = app_of(ServeSettings(page=False, batch=1, queue=1, items=1), lw, {"qwen": reader})
    with listening(app) as url:
        results = run_load(LoadSettings(url=url, clients="8", seconds=0.6, save_dir=str(tmp_path)))
    row = results["rows"][-1]
    assert row["errors"].keys() == {"429"} and row["requests"] > 0 and results["ratios"] == []
    counted = app.state.service.registry.get_sample_value
    warm = results["services"]["batched"]["warm"]["answer"]["errors"].get("429", 0)
    refused = counted("latentwire_requests_total", {"route": "/v1/answer", "status": "429"})
    assert row["errors"]["429"] + warm == refused
    before = results["services"]["batched"]["warm"]["answer"]["requests"] + 1
    assert counted("latentwire_requests_total", {"route": "/v1/answer", "status": "200"}) == row["requests"] + before
    assert f"{row['errors']['429']} x 429" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "http://example.com"}, {"url": "http://127.0.0.1.example.com:80"}, {"url": "10.0.0.1"}, {"url": ""},
        {"one_url": "https://example.com:8000"}, {"clients": "1,many"}, {"clients": "0"}, {"clients": "1,100000"},
        {"clients": ""}, {"seconds": 10**6},
    ],
)  # fmt: skip
def test_other_machines_and_loads_without_bounds_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoadSettings(**wrong)


def test_where_there_is_no_service_that_is_said(lw, tmp_path):
    with pytest.raises(ValueError, match=r"no service there.*serve\.sh"):
        run_load(LoadSettings(url="http://127.0.0.1:9", save_dir=str(tmp_path)))
    with listening(app_of(ServeSettings(role="encoder"), lw, {})) as url, pytest.raises(ValueError, match="both roles"):
        run_load(LoadSettings(url=url, save_dir=str(tmp_path)))


def test_the_script_starts_its_own_services_and_ends_them(lw, warm, tmp_path):
    variables = warm | {"CKPT": str(lw.folder), "OUTPUT_DIR": str(tmp_path), "LOAD_SECONDS": "1"}
    command = ["bash", str(ROOT / "scripts" / "load_test.sh"), "--clients", "1,2"]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["rows"]) == 8 and len(results["ratios"]) == 4 and results["seconds"] == 1
    assert (tmp_path / "table.md").read_text() in done.stdout
    for log in ("together.log", "one.log"):
        assert "finishing what was asked" in (tmp_path / log).read_text()
