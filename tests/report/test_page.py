"""The page in headless Chromium: it draws, asks the network for nothing, and runs no script but its own."""

import pytest

from increlora.workbench.report import read_runs, write_report
from increlora.workbench.report.figures import FIGURES
from increlora.workbench.report.reading import printable
from increlora.workbench.report.summary import SETTINGS

from . import browser as browsing
from .folders import STEPS, modules, write_run

HOSTILE = [
    "<img src=x onerror=hacked()>",
    "</script><script>hacked()</script>",
    "model.layer.0.<svg onload=hacked()>",
    "model.layer.1.\"];hacked();['",
    "model.layer.2.${hacked()}{{ 7 * 7 }}",
    "model.layer.3.__proto__",
    "model.layer.4.a\\u003cb>]]>--><!--<script>",
    "model.layer.5.a.b[0].c\n\u2028d'\"`",
]
WATCH = "window.hacked = () => { window.wasHacked = true; }; window.alert = window.hacked;"
MAP = "#run0-rank_map svg .mark-text.role-mark text"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    yield from browsing.start(tmp_path_factory.mktemp("profile"))


def written(tmp_path, *folders):
    page = tmp_path / "report.html"
    write_report(read_runs(folders), page, command="increlora report runs/toy")
    return page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return written(folder, write_run(folder / "run"))


def texts(browser, selector):
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector
    )


def ranks_shown(browser):
    return [int(text) for text in texts(browser, MAP)]


def test_every_figure_is_drawn_without_complaint_or_request(browser, page):
    seen = browsing.show(browser, page)
    assert seen == {"console": [], "requests": [page.as_uri()]}
    drawn = browser.execute_script("return [...document.querySelectorAll('.chart')].map(e => !!e.querySelector('svg'))")
    assert drawn == [True] * len(FIGURES)
    assert texts(browser, ".tile .value")[:2] == ["0.500 → 0.750", "17 of 17"]


def test_the_page_could_not_ask_the_network(browser, page):
    """Not even if a script got into it: the policy admits no request and no script but its own."""
    browsing.show(browser, page)
    refused = browser.execute_async_script(
        """const [done] = arguments, refused = [];
           document.addEventListener('securitypolicyviolation', (event) => refused.push(event.effectiveDirective));
           const script = document.createElement('script');
           script.textContent = 'window.ran = true';
           document.body.append(script);
           const image = new Image();
           image.src = 'http://127.0.0.1:9/x.png';
           fetch('http://127.0.0.1:9/').catch(() => setTimeout(() => done(refused), 100))"""
    )
    assert sorted(refused) == ["connect-src", "img-src", "script-src-elem"]
    assert browser.execute_script("return window.ran") is None


def test_the_slider_moves_the_map_through_the_run(browser, page):
    browsing.show(browser, page)
    assert sum(ranks_shown(browser)) == 17
    move = """const range = document.querySelector('#run0-rank_map input[type=range]');
              range.value = arguments[0]; range.dispatchEvent(new Event('input'));
              const done = arguments[1]; setTimeout(done, 200)"""
    for step, ranks in {0: 9, 9: 13, 16: 13, 17: 17, STEPS: 17}.items():
        browser.execute_async_script(move, step)
        assert sum(ranks_shown(browser)) == ranks, step


def test_play_moves_the_slider_to_the_end(browser, page):
    browsing.show(browser, page)
    browser.execute_script("document.querySelector('#run0-rank_map .vega-bind button').click()")
    seen = set()
    for _ in range(200):
        seen.add(sum(ranks_shown(browser)))
        if texts(browser, "#run0-rank_map .vega-bind button") == ["play"]:
            break
    assert {9, 13} & seen and sum(ranks_shown(browser)) == 17


def colors(browser):
    """Of the page's background and of the first label of a figure."""
    return browser.execute_script(
        """const label = document.querySelector('#run0-rank_map svg .role-axis-label text');
           return [getComputedStyle(document.body).backgroundColor, getComputedStyle(label).fill]"""
    )


def test_dark_and_light(browser, page):
    """The system's wish, the button, and white paper; labels of the figures follow."""
    themes = {}
    for theme in ("light", "dark"):
        wish = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", wish)
        browsing.show(browser, page)
        themes[theme] = colors(browser)
    assert themes["light"] == ["rgb(255, 255, 255)", "rgb(28, 32, 36)"]
    assert themes["dark"] == ["rgb(20, 23, 27)", "rgb(230, 232, 235)"]
    browser.execute_script("document.getElementById('theme').click()")
    assert colors(browser) == themes["light"]
    browser.execute_script("document.getElementById('theme').click()")
    assert colors(browser) == themes["dark"]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", **wish})
    assert colors(browser) == themes["light"]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


def test_hostile_names_are_text(browser, tmp_path):
    """In the map, the tables, the tooltips, the command, the error, the settings; in one run and in several."""
    bad = HOSTILE[1] + HOSTILE[0]
    strings = dict.fromkeys(("command", "error", "source", *SETTINGS[:3]), bad)
    metric = {"name": bad, "before": 0.1, "after": 0.2, "best": 0.2}
    first = write_run(
        tmp_path / "a<b>&amp;'\"", HOSTILE, status="failed", metric=metric, environment={bad: bad}, **strings
    )
    (first / "config.toml").write_text(f"# {bad}\n")
    path = first / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 41, "loss": 1, "</script><script>hacked()</script>": 2}\n')
    second = write_run(tmp_path / "b", modules())
    page = written(tmp_path, first, second)
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
    seen = browsing.show(browser, page)
    assert seen == {"console": [], "requests": [page.as_uri()]}
    assert set(map(printable, HOSTILE)) == set(texts(browser, "#run0 td.name"))
    hover = """for (const mark of document.querySelectorAll('#run0-rank_map svg .mark-rect path'))
                   for (const kind of ['pointerover', 'pointermove', 'mouseover', 'mousemove'])
                       mark.dispatchEvent(new PointerEvent(kind, {bubbles: true, clientX: 300, clientY: 300}));
               return document.getElementById('vg-tooltip-element').textContent"""
    assert "layer" in browser.execute_script(hover)
    assert browser.execute_script("return document.querySelectorAll('main img, #vg-tooltip-element img').length") == 0
    assert browser.execute_script("return window.wasHacked") is None
    assert browser.get_log("browser") == []


def test_a_large_model_stays_quick_and_small(browser, tmp_path):
    names = modules(
        32, tuple(f"self_attn.{c}_proj" for c in "qkvo") + tuple(f"mlp.{c}_proj" for c in ("gate", "up", "down"))
    )
    page = written(tmp_path, write_run(tmp_path / "run", names))
    assert len(names) == 224 and page.stat().st_size < 2_000_000
    assert browsing.show(browser, page)["console"] == []
    assert len(ranks_shown(browser)) == 224
