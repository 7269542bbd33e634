"""The report as one page: what a person reads of real comparisons, and the page in a real browser.

What reports can hold besides, and hostile ones, are in test_oracle_report.py.
"""

import dataclasses
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from test_oracle_report import Read, cause, hostile_report, report_of, written

from oracle import diagnosis, ladder, models, noise
from oracle.comparison import Comparison
from oracle.reference import Reference
from oracle.reports import evidence, heat_map, json_report, page, terminal
from oracle.results import UNKNOWN, Report, Residual

CONFIG = models.MODELS["llama"] | {"num_hidden_layers": 2, "max_position_embeddings": 24}
RUNGS = ("environment", "bits", "operators", "forward")
SEED = 4321


def interleaved(config: Any, p: Any, x: Any, angles: Any) -> Any:
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape).astype(x.dtype)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A tiny model and its true reference."""
    folder = models.write(CONFIG, tmp_path_factory.mktemp("page"), "float32", SEED)
    candidate, reference = models.candidate(folder, "float32"), Reference.load(folder, "float32")
    return Comparison(candidate, reference, folder, folder, noise.stored_calibration(), SEED)


@pytest.fixture(scope="module")
def passed(comparison: Comparison) -> Report:
    return ladder.climb(comparison, rungs=RUNGS)


@pytest.fixture(scope="module")
def faulty(comparison: Comparison) -> Report:
    """RoPE on the wrong pairs, found and undone."""
    altered = dataclasses.replace(comparison.candidate, replace={"rope": interleaved})
    return diagnosis.bisect(dataclasses.replace(comparison, candidate=altered), everything=True, rungs=RUNGS)


@pytest.fixture
def inconclusive(comparison: Comparison) -> Iterator[Report]:
    comparison.reference.peer.decoder.train()
    yield ladder.climb(comparison, rungs=RUNGS)
    comparison.reference.peer.decoder.eval()


# -- What a person reads ---------------------------------------------------------------


def test_the_page_of_a_fault_says_where_why_with_what_proof_and_what_to_change(faulty: Report):
    (cause,) = faulty.causes
    assert cause.name != UNKNOWN
    read = Read(page.render(faulty))
    start = read.text.index("FAIL The two models part at layers.0.attn.q_rope.")
    wanted = (cause.name, "jaxgpt/ops.py", "With the repair PASS", "The ladder", "Where it differs", "Environment")
    places = [read.text.index(words, start) for words in wanted]
    assert places == sorted(places), "the answer comes before what it rests on"
    answer = read.text[start : read.text.index("The ladder")]
    for words in ("op rope", "its inputs are the reference’s own", "proved", "the error falls from", "times the noise"):
        assert words.lower() in answer.lower()
    assert "What these inputs could expose" in read.text
    assert "float32" in read.text


def test_the_maps_mark_exactly_the_comparisons_beyond_their_limits(faulty: Report):
    local, inherited = (next(rung for rung in faulty.rungs if rung.name == name) for name in ("operators", "forward"))
    grid = heat_map.arrange(local)
    broken = {row for row, cells in grid.inside.items() for cell in cells.values() if cell.broken}
    assert broken == {"attn.q_rope", "attn.k_rope"}
    assert all(cells.keys() == {0, 1} for cells in grid.inside.values())
    assert list(grid.before) == ["embed.tokens", "rope.angles", "mask"]
    assert list(grid.behind) == ["final_norm", "logits"]
    assert "KL per token" in heat_map.arrange(inherited).behind
    classes = Read(heat_map.render(local, "", "")).values("class")
    assert sum(name.startswith("b") for name in classes) == 4
    assert sum(name.endswith(" first") for name in classes) == 1


def test_a_pass_claims_no_more_than_was_climbed_and_shown(passed: Report):
    text = Read(page.render(passed)).text
    assert "PASS No difference beyond measured noise." in text
    assert "All 4 rungs that were climbed: environment, bits, operators, forward." in text
    assert f"Nothing is said about {len(passed.hidden)} others:" in text
    assert "decode" in text[text.index("Not climbed:") : text.index("Layer by layer")]


def test_an_inconclusive_page_says_why_and_that_it_says_nothing(inconclusive: Report):
    text = Read(page.render(inconclusive)).text
    assert "INCONCLUSIVE The reference is in training mode: dropout is on." in text
    assert "This says nothing about the model." in text


def test_every_rung_of_the_ladder_has_its_question():
    assert set(ladder.LADDER) <= set(evidence.ASKS)


# -- From the JSON alone ---------------------------------------------------------------


def test_the_json_report_says_all_that_the_page_and_the_text_do(faulty: Report, passed: Report):
    for report in (faulty, passed, report_of(cause(residual=Residual((1,), {"row": [float("inf")]}, 1.0, 1.0, [])))):
        whole = [dataclasses.replace(rung, seconds=1.25) for rung in report.rungs]
        report = dataclasses.replace(report, rungs=whole, repaired=None)
        back = json_report.parse(json.loads(json.dumps(report.to_dict(), allow_nan=False)))
        assert page.render(back) == page.render(report)
        assert list(terminal.lines(back)) == list(terminal.lines(report))


def test_the_verb_needs_neither_jax_nor_torch_nor_numpy(faulty: Report, tmp_path: Path):
    source, target = written(faulty, tmp_path), tmp_path / "page.html"
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('jax', 'torch', 'numpy', 'flax')))\n"
        "from oracle.__main__ import main\n"
        f"sys.exit(main(['report', {str(source)!r}, '--html', {str(target)!r}, '--text']))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("FAIL. First divergence: layers.0.attn.q_rope")
    assert target.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_page_loads_nothing_and_runs_only_its_own_script(faulty: Report):
    html = page.render(faulty)
    assert not re.search(
        r"https?://|//\w|@import|url\(", html.replace("// One tooltip", "").replace("// The browser", "")
    )
    read = Read(html)
    assert not {"img", "link", "iframe", "object", "form", "a"} & set(read.tags)
    (policy,) = (value for value in read.values("content") if "default-src" in value)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


# -- In a real browser -----------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND")


class Browser:
    """Chromium, spoken to over its debugging pipe: JSON messages that end with a zero byte."""

    def __init__(self, program: str, profile: Path):
        to_browser, self.writer = os.pipe()
        self.reader, from_browser = os.pipe()
        # The pipe's two ends are file descriptors 3 and 4, whatever they are here.
        command = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        arguments = [program, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", command, "bash", *arguments],
            pass_fds=(to_browser, from_browser),
            env={**os.environ, "TMPDIR": str(profile)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self.buffer = b""
        self.calls = 0
        self.session = ""
        self.events: list[dict[str, Any]] = []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.calls += 1
        session = {"sessionId": self.session} if self.session else {}
        message = {"id": self.calls, "method": method, "params": parameters, **session}
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.calls:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.reader], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self.reader, 1 << 16) if ready else b""
            assert data, "the browser went away or did not answer for a minute"
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, *, width: int = 1200, scheme: str = "light") -> None:
        self.events = []
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def ask(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def press(self, key: str, code: int) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def point_at(self, selector: str) -> None:
        where = f"document.querySelector({selector!r}).getBoundingClientRect()"
        self.ask(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        # Scrolling hides the tooltip, one frame later.
        time.sleep(0.2)
        x, y = self.ask(f"{where}.x + 5"), self.ask(f"{where}.y + 5")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def complaints(self) -> list[str]:
        """What the console says, and every request for something else than the page."""
        said = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        asked = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [str(e) for e in self.events if e.get("method") in said] + asked[1:]

    def close(self) -> None:
        self.session = ""
        self.call("Browser.close")
        self.process.wait(timeout=60)
        os.close(self.writer)
        os.close(self.reader)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium here: the page was not opened in a browser (set $CHROMIUM to one)")
    running = Browser(program, tmp_path_factory.mktemp("browser"))
    yield running
    running.close()


@pytest.fixture
def opened(faulty: Report, browser: Browser, tmp_path: Path) -> Path:
    """The page of the faulty model, open."""
    path = tmp_path / "page.html"
    path.write_text(page.render(faulty), encoding="utf-8")
    browser.open(path)
    return path


def test_a_browser_shows_verdict_and_maps_without_a_request_or_a_complaint(opened: Path, browser: Browser):
    assert browser.ask("document.querySelector('h1').innerText") == "FAIL"
    assert browser.ask("document.title").startswith("FAIL · layers.0.attn.q_rope")
    assert browser.ask("document.querySelectorAll('table.map').length") == 2
    cells = "document.querySelectorAll('table.map td[data-tip]')"
    assert browser.ask(f"{cells}.length") > 80
    first = "getComputedStyle(document.querySelector('td.first')).backgroundColor"
    assert browser.ask(first) == "rgb(101, 12, 10)", "the style sheet is in force"
    assert browser.complaints() == []


def test_pointing_at_a_cell_shows_its_numbers_and_escape_hides_them(opened: Path, browser: Browser):
    assert browser.ask("document.getElementById('tip').hidden") is True
    browser.point_at("td.first")
    text = browser.ask("document.getElementById('tip').innerText")
    assert text.startswith("layers.0.attn.q_rope · rope")
    assert "times its limit" in text
    assert browser.ask("document.querySelector('td.first').getAttribute('aria-describedby')") == "tip"
    browser.press("Escape", 27)
    assert browser.ask("document.getElementById('tip').hidden") is True


def test_the_keyboard_walks_a_map_cell_by_cell(opened: Path, browser: Browser):
    assert browser.ask("document.querySelectorAll('table.map')[0].querySelectorAll('td[tabindex=\"0\"]').length") == 1
    browser.ask("document.querySelector('td.first').focus()")
    walk = (("ArrowRight", 39, "layers.1.attn.q_rope"), ("ArrowDown", 40, "layers.1.attn.k_rope"))
    for key, code, tap in walk:
        browser.press(key, code)
        assert browser.ask("document.activeElement.dataset.tip").startswith(tap)
        assert browser.ask("document.getElementById('tip').innerText").startswith(tap)
    for _ in range(30):
        browser.press("ArrowDown", 40)
    assert browser.ask("document.activeElement.dataset.tip").startswith("logits"), "the last row, and no further"


def test_the_many_kinds_of_fault_are_folded_away_and_fit_a_phone_unfolded(
    opened: Path, browser: Browser, faulty: Report
):
    browser.open(opened, width=360)
    mine = "[...document.querySelectorAll('details')].filter(d => d.innerText.includes('known kinds of fault'))"
    assert browser.ask(f"{mine}.length") == 1
    assert browser.ask(f"{mine}[0].open") is False
    assert len(faulty.exposed) > 50
    assert faulty.exposed[-1] not in browser.ask("document.body.innerText")
    browser.ask("document.querySelectorAll('summary').forEach(summary => summary.click())")
    shown = browser.ask("document.body.innerText")
    assert not [name for name in (*faulty.exposed, *faulty.hidden) if name not in shown]
    assert browser.ask("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_in_both_schemes(opened: Path, browser: Browser, scheme: str):
    browser.open(opened, width=360, scheme=scheme)
    assert browser.ask("document.documentElement.scrollWidth") <= 360
    paper = browser.ask("getComputedStyle(document.documentElement).backgroundColor")
    assert paper == {"light": "rgb(253, 252, 250)", "dark": "rgb(22, 23, 26)"}[scheme]


def test_a_hostile_report_runs_nothing_in_a_browser(browser: Browser, tmp_path: Path):
    path = tmp_path / "hostile.html"
    path.write_text(page.render(json_report.parse(hostile_report())), encoding="utf-8")
    browser.open(path)
    for selector in ("td.first", "h1"):
        browser.point_at(selector)
    assert browser.ask("window.hacked") is None
    assert browser.complaints() == []
    # Even markup that got in could run nothing: the policy knows one script.
    browser.ask("document.body.appendChild(document.createElement('script')).textContent = 'window.hacked = 1'")
    assert browser.ask("window.hacked") is None
