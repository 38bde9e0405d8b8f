"""The page at `/`, clicked through in a headless Chromium against a real server."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorakit.serve.api.auth import Keys, Tenant
from lorakit.serve.api.page import add_page
from tests.serve.http_world import Running, World, chat, save_world

pytest.importorskip("websockets", reason="the websockets package speaks with the browser")

from tests.serve.browser import CHROMIUM, Page, browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on this machine")

PROMPT = "How many singers?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def world(folder: Path) -> Iterator[World]:
    with Running(folder) as running:
        yield running


@pytest.fixture
def page(world: World, window: Page) -> Iterator[Page]:
    """The page, freshly opened; at the end nothing may be wrong but what the test took note of."""
    window.size(1280)
    show(window, world)
    yield window
    window.run("0")  # whatever is still to be told
    assert window.complaints == []
    assert {url for url in window.asked if not url.startswith((world.url, "data:"))} == set()
    world.idle()


def show(page: Page, world: World) -> None:
    page.complaints.clear()
    page.asked.clear()
    page.open("about:blank")
    page.open(world.url + "/")
    page.until("document.querySelector('#chips input, #access[open]')")


def choose(page: Page, *models: str) -> None:
    """Have these answer and nobody else."""
    for model in page.run("[...document.querySelectorAll('#chips input')].map(e => e.dataset.model)"):
        box = f"#chips [data-model='{model}']"
        if page.run(f'document.querySelector("{box}").checked') != (model in models):
            page.click(box)


def settings(page: Page, **values: object) -> None:
    if not page.run("document.getElementById('settings').open"):
        page.click("#settings summary")
    for name, value in values.items():
        page.write(f"#{name}", str(value))


def answers(page: Page) -> dict[str, str]:
    """The answers of the newest turn, when all are complete."""
    page.until("document.querySelector('.turn') && !document.querySelector('[aria-busy=true]')")
    found = page.run(
        "[...document.querySelector('.turn').querySelectorAll('.answer')]"
        ".map(e => [e.querySelector('h3').textContent, e.querySelector('.text').textContent])"
    )
    return dict(found)


def refusals(page: Page, status: int) -> None:
    """Strike what the browser itself notes of answers that are errors, which a test has asked for."""
    page.run("0")
    page.complaints[:] = [text for text in page.complaints if f"status of {status}" not in text]


def entry(world: World, name: str) -> dict[str, object]:
    return dict(world.get(f"/v1/adapters/{name}").json())


def row(name: str) -> str:
    return f"#adapters [data-name='{name}']"


@pytest.fixture
def slow(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that can be watched."""
    runner = world.server.runner
    step = runner.step

    def slowly(batch: object) -> object:
        time.sleep(0.03)
        return step(batch)

    monkeypatch.setattr(runner, "step", slowly)


# ---- the files
def test_every_file_has_a_path_and_may_ask_nobody_else(world: World) -> None:
    for path, kind in {"/": "text/html", "/page.css": "text/css", "/page.js": "text/javascript"}.items():
        answer = world.get(path)
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert answer.headers["cache-control"] == "no-cache"
    assert world.get("/index.html").status_code == 404
    assert not any(
        path.startswith("/page") or path == "/" for path in world.get("/openapi.json").json()["paths"]
    )


def test_the_files_are_in_the_package() -> None:
    import fastapi

    assert {"/", "/page.css", "/page.js", "/api.js"} <= add_page(fastapi.FastAPI())


# ---- the playground
def test_it_shows_the_base_and_the_adapters(page: Page) -> None:
    page.until("document.querySelectorAll('#adapters li').length === 3")
    assert page.run("document.title") == "tiny · lorakit"
    assert page.text("#health") == "Ready"
    assert page.text(row("sql") + " .name") == "sql"
    names = page.run("[...document.querySelectorAll('#chips input')].map(e => e.dataset.model)")
    assert names == ["tiny", "acme-secret", "sql", "style"]


def test_several_answer_side_by_side(world: World, page: Page, slow: None) -> None:
    choose(page, "sql", "style", "tiny")
    settings(page, temperature=0, max_tokens=12)
    page.write("#prompt", PROMPT)
    page.press("Control", "Enter")
    # All of them grow at the same time.
    page.until(
        "[...document.querySelectorAll('.answer[aria-busy=true] .text')].filter(e => e.textContent).length === 3"
    )
    assert answers(page) == {model: world.ask(model, PROMPT) for model in ("tiny", "sql", "style")}
    left = page.run("[...document.querySelectorAll('.answer')].map(e => e.getBoundingClientRect().x)")
    assert left == sorted(set(left))
    assert "12\N{NO-BREAK SPACE}tokens" in page.text(".answer .facts")
    assert page.text(".answer:nth-child(2) header") == "sql\nversion 1"


def test_a_mix_and_the_system_prompt(world: World, page: Page) -> None:
    choose(page)
    page.write("#other", "sql:0.5+style:0.5")
    page.press("Enter")
    settings(page, temperature=0, max_tokens=12, system="Be brief.")
    page.write("#prompt", PROMPT)
    page.click("#send")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    wanted = world.ask("sql:0.5+style:0.5", messages=messages)
    assert answers(page) == {"sql:0.5+style:0.5": wanted}


def test_a_conversation_goes_on_only_if_asked_to(world: World, page: Page) -> None:
    choose(page, "sql")
    settings(page, temperature=0, max_tokens=12)
    page.write("#prompt", PROMPT)
    page.click("#send")
    first = answers(page)["sql"]
    page.click("#send")
    assert answers(page)["sql"] == first
    page.click("#clear")
    assert page.text("#turns") == ""
    page.click("#send")
    answers(page)
    page.click("#onward")
    page.write("#prompt", "And now?")
    page.click("#send")
    turns = [("user", PROMPT), ("assistant", first), ("user", "And now?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert answers(page)["sql"] == world.ask("sql", messages=messages)


def test_plain_text(world: World, page: Page) -> None:
    choose(page, "style")
    settings(page, temperature=0, max_tokens=12)
    page.run("mode.value = 'text'; mode.dispatchEvent(new Event('input', {bubbles: true}))")
    page.write("#prompt", "Once")
    page.click("#send")
    asked = {"model": "style", "prompt": "Once", "temperature": 0, "max_tokens": 12}
    assert answers(page)["style"] == world.post("/v1/completions", asked).json()["choices"][0]["text"]


@pytest.mark.parametrize("way", ["key", "button"])
def test_stop(world: World, page: Page, slow: None, way: str) -> None:
    choose(page, "sql", "style")
    settings(page, temperature=0, max_tokens=800)
    page.write("#prompt", PROMPT)
    page.press("Control", "Enter")
    page.until("[...document.querySelectorAll('.answer .text')].filter(e => e.textContent).length === 2")
    if way == "key":
        page.press("Escape")
    else:
        page.click("#stop")
    assert all(answers(page).values())
    assert page.text(".answer .facts") == "stopped"
    world.idle()  # the server has noticed
    assert world.server.engine.state().generated_tokens < 800
    page.until("!document.getElementById('send').disabled")


def test_what_is_wrong_is_told_in_the_servers_words(world: World, page: Page) -> None:
    page.write("#prompt", "")
    page.click("#send")
    assert page.text("#ask-note") == "Write a message first."
    page.write("#prompt", PROMPT)
    choose(page)
    page.click("#send")
    assert page.text("#ask-note") == "Choose who answers."

    choose(page, "sql")
    settings(page, temperature="hot")
    page.click("#send")
    answers(page)
    message = world.post("/v1/chat/completions", chat("sql", temperature="hot")).json()["error"]["message"]
    assert page.text(".answer .facts.problem") == message

    choose(page)
    settings(page, temperature="")
    page.write("#other", "nobody")
    page.click("#add-other")
    page.click("#send")
    answers(page)
    message = world.post("/v1/chat/completions", chat("nobody")).json()["error"]["message"]
    assert page.text(".answer .facts.problem") == message
    refusals(page, 400)
    refusals(page, 404)


# ---- the load
def test_the_load_is_live(page: Page, slow: None) -> None:
    choose(page, "sql", "tiny")
    settings(page, temperature=0, max_tokens=800)
    page.write("#prompt", PROMPT)
    page.press("Control", "Enter")
    page.until("document.getElementById('running').textContent === '2'")
    rows = page.run("[...document.querySelectorAll('#mix li')].map(e => e.innerText.split('\\n')[0])")
    assert rows == ["sql", "tiny"]
    page.until("Number(document.getElementById('rate').textContent) > 0")
    assert "now 0" not in page.run("document.getElementById('spark').getAttribute('aria-label')")
    page.press("Escape")
    page.until("document.getElementById('running').textContent === '0'")
    assert page.text("#mix") == "nothing"


# ---- the adapters
def test_pin_unload_and_load(world: World, page: Page) -> None:
    name = "acme-secret"
    page.click(f"{row(name)} [aria-label='Pin {name}']")
    page.until(f"document.querySelector(\"{row(name)} .state\")?.textContent.endsWith(', pinned')")
    assert entry(world, name)["pinned"] is True
    told = page.text(row(name) + " .facts")
    assert "rank 4" in told
    assert str(entry(world, name)["digest"])[:8] in told

    page.click(f"{row(name)} [aria-label='Unpin {name}']")
    page.until(f"!document.querySelector(\"{row(name)} .state\").textContent.endsWith('pinned')")
    assert entry(world, name)["pinned"] is False

    page.click(f"{row(name)} [aria-label='Unload {name}']")
    page.until("document.querySelectorAll('#adapters li').length === 2")
    assert world.get(f"/v1/adapters/{name}").status_code == 404
    page.until(f"!document.querySelector(\"#chips [data-model='{name}']\")")
    assert page.text("#adapters-note").startswith(f"{name} is unloaded.")
    page.click("#adapters-note button")
    page.until("document.querySelectorAll('#adapters li').length === 3")
    assert entry(world, name)["digest"]


def test_pin_what_a_request_has_had_read_meanwhile(world: World, page: Page) -> None:
    shutil.copytree(world.adapters / "sql", world.adapters / "meanwhile")
    page.click("#refresh")
    page.until(f'document.querySelector("{row("meanwhile")}")')
    world.ask("meanwhile")
    page.click(f"{row('meanwhile')} [aria-label='Pin meanwhile']")
    page.until("document.getElementById('adapters-note').textContent === 'meanwhile is pinned.'")
    assert entry(world, "meanwhile")["pinned"] is True
    page.click(f"{row('meanwhile')} [aria-label='Unload meanwhile']")
    page.until(f'!document.querySelector("{row("meanwhile")}")')
    shutil.rmtree(world.adapters / "meanwhile")


def test_load_by_name_and_path(world: World, page: Page) -> None:
    page.click("#load-adapter summary")
    page.write("#load-name", "second")
    page.write("#load-source", "nowhere")
    page.click("#load-form button")
    page.until("document.getElementById('adapters-note').classList.contains('problem')")
    body = {"name": "second", "source": "nowhere"}
    assert page.text("#adapters-note") == world.post("/v1/adapters", body).json()["error"]["message"]
    refusals(page, 404)

    page.write("#load-source", "style")
    page.click("#load-pinned")
    page.click("#load-form button")
    page.until(f'document.querySelector("{row("second")}")')
    assert page.text("#adapters-note") == "second is loaded as version 1."
    found = entry(world, "second")
    assert (found["rank"], found["pinned"]) == (8, True)
    page.click(f"{row('second')} [aria-label='Unload second']")
    page.until(f'!document.querySelector("{row("second")}")')


def test_an_adapter_that_comes_later(world: World, page: Page) -> None:
    shutil.copytree(world.adapters / "sql", world.adapters / "later")
    page.click("#refresh")
    page.until(f'document.querySelector("{row("later")}")')
    shutil.rmtree(world.adapters / "later")


def test_a_list_of_many_is_filtered(world: World, page: Page) -> None:
    for i in range(110):
        shutil.copytree(world.adapters / "sql", world.adapters / f"many-{i:03}")
    try:
        page.click("#refresh")
        page.until("document.querySelectorAll('#adapters li').length === 100")
        assert page.text("#more") == "13 more: filter by name to see them."
        page.write("#filter", "many-07")
        page.until("document.querySelectorAll('#adapters li').length === 10")
        page.write("#other", "many-109")
        page.click("#add-other")
        assert page.run("document.querySelector(\"#chips [data-model='many-109']\").checked")
    finally:
        for path in world.adapters.glob("many-*"):
            shutil.rmtree(path)


# ---- keys, and a server that goes away
def test_keys(folder: Path, window: Page) -> None:
    digest = hashlib.sha256(b"sk-acme-123").digest()
    with Running(folder, keys=Keys([(digest, Tenant("acme", ("acme-*",), admin=False))])) as world:
        window.size(1280)
        show(window, world)
        window.until("document.getElementById('access').open")
        assert window.text("#load-note") == world.get("/v1/state").json()["error"]["message"]
        window.write("#key", "sk-wrong-key")
        window.press("Enter")
        window.until("document.getElementById('load-note').textContent.includes('not known')")
        window.write("#key", "sk-acme-123")
        window.press("Enter")
        window.until("document.querySelectorAll('#adapters li').length === 1")
        window.until("!document.getElementById('load').checkVisibility()")  # its state is for administrators
        assert window.run("JSON.stringify(sessionStorage)") == json.dumps(
            {"lorakit-api-key": "sk-acme-123"}, separators=(",", ":")
        )
        assert window.run("localStorage.length") == 0
        assert not window.run("document.querySelector('.row-actions').checkVisibility()")
        choose(window, "acme-secret")
        settings(window, max_tokens=5)
        window.write("#prompt", PROMPT)
        window.click("#send")
        assert list(answers(window)) == ["acme-secret"]
        window.click("#access summary")
        window.click("#forget-key")
        window.until("document.getElementById('access').open && !sessionStorage.length")
        refusals(window, 401)
        refusals(window, 403)
        assert window.complaints == []


def test_a_server_that_goes_away(folder: Path, window: Page) -> None:
    with Running(folder) as world:
        window.size(1280)
        show(window, world)
        window.until("document.getElementById('health').textContent === 'Ready'")
    window.until("document.getElementById('health').textContent === 'The server does not answer.'")
    window.write("#prompt", PROMPT)
    window.click("#send")
    answers(window)
    assert window.text(".answer .facts.problem") == "The server does not answer."


# ---- for every screen and everyone
CONTRAST = """(() => {
  const channel = c => (c /= 255) <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const ground = e => {
    if (!e) return [255, 255, 255];
    const [r, g, b, a = 1] = parse(getComputedStyle(e).backgroundColor);
    if (a === 1) return [r, g, b];
    return a === 0 ? ground(e.parentElement) : ground(e.parentElement).map((c, i) => a * [r, g, b][i] + (1 - a) * c);
  };
  const shown = e => e.checkVisibility() && !e.disabled && !e.closest(".unseen, svg");
  return [...document.querySelectorAll("body *")].filter(e => shown(e)
      && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
    return [(a + .05) / (b + .05), e.outerHTML.slice(0, 80)];
  }).filter(([ratio]) => ratio < 4.5);
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_it_fits_and_can_be_read(page: Page, tmp_path: Path, width: int, dark: bool) -> None:
    page.size(width, dark=dark)
    choose(page, "sql", "style")
    settings(page, max_tokens=5)
    page.click("#load-adapter summary")
    page.click("#access summary")
    page.write("#prompt", PROMPT)
    page.click("#send")
    answers(page)
    assert page.run("document.documentElement.scrollWidth") == width
    assert page.run(CONTRAST) == []
    picture = page.picture(tmp_path / "page.png").read_bytes()  # to be looked at; pytest keeps it for a while
    assert int.from_bytes(picture[16:20], "big") == width
    beyond = f"e.checkVisibility() && !e.closest('.unseen') && e.getBoundingClientRect().right > {width}"
    assert page.run(f"[...document.querySelectorAll('body *')].filter(e => {beyond}).length") == 0


def test_every_control_has_a_name(page: Page) -> None:
    for summary in ("#settings summary", "#load-adapter summary", "#access summary"):
        page.click(summary)
    controls = {"button", "textbox", "checkbox", "combobox", "searchbox", "DisclosureTriangle"}
    seen = []
    for node in page.tell("Accessibility.getFullAXTree")["nodes"]:
        if node.get("role", {}).get("value") in controls and not node["ignored"]:
            seen.append(node["name"]["value"])
    assert len(seen) > 25
    assert "" not in seen
    seen.remove("API key")  # what opens the field and the field itself
    assert len(set(seen)) == len(seen)


def test_the_keyboard_reaches_everything(page: Page) -> None:
    page.run("document.activeElement.blur()")
    reached = []
    for _ in range(40):
        page.press("Tab")
        reached.append(page.run("document.activeElement.id || document.activeElement.dataset.model || ''"))
    for wanted in ("tiny", "sql", "other", "prompt", "send", "onward", "refresh"):
        assert wanted in reached
