"""The chat page in a real browser."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import CALL, Limits, Service, running, settle, slow_model
from tiny_models import scripted, tiny_model, tiny_tokenizer

from nanochat.conversation import validate
from nanochat.infer.decoder import Decoder
from nanochat.infer.engine import Engine
from nanochat.serve.service import Served
from tasks.customjson import CustomJSON

selenium = pytest.importorskip(
    "selenium", reason="selenium is not installed (pip install selenium)"
)
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
DRIVER = shutil.which("chromedriver") or ""
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="no Chromium with chromedriver here (Debian: apt-get install chromium chromium-driver)",
)

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webdriver import WebDriver  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.ui import Select  # noqa: E402

EVIL = """<script>window.hacked=1</script><img src=x onerror="window.hacked=2">
[click](javascript:window.hacked=3) [page](https://a.example/x?a=1) ![i](https://a.example/i.png)
<b>bold</b> **strong** and `<i>code</i>`

```html
<script>window.hacked=4</script>
```

- one
- two
  - inner

| a | b |
|---|---|
| <u>1</u> | 2 |"""
TABLE = """| quantity | symbol | value in SI units | remark |
|:--|:-:|--:|---|
| circumference | C | 12.566 | of the whole circle |
| area | A | 12.566 | happens to be equal for a radius of two |"""
RICH = """The area is $\\pi r^2$, it costs $5 and $10, and:

$$\\frac{1}{n}\\sum_{i=1}^{n} x_i = \\bar{x}$$

```python
def area(r: float) -> float:
    return 3.14159 * r**2  # in the unit of r, squared
```

TABLE

1. first
2. second

#### 4""".replace("TABLE", TABLE)
SCREENSHOTS = os.environ.get("NANOCHAT_SCREENSHOTS")
"""A folder to leave pictures of the page in."""


@pytest.fixture(scope="module")
def service() -> Service:
    tokenizer = tiny_tokenizer()

    def served(name: str, model: Any) -> Served:
        return Served(name, Engine(model, tokenizer, max_slots=4), parameters=1_500_000)

    markdown = scripted([EVIL, "<|assistant_end|>"], context_length=2000)
    rich = scripted([RICH, "<|assistant_end|>"], context_length=2000)
    random = Decoder(tiny_model(context_length=400))
    examples = ("Spell cat", "How many r are in strawberry?")
    return Service(
        [
            served("caller", scripted(CALL, context_length=400)),
            served("slow", slow_model("the sea ", seconds=0.02)),
            served("markdown", markdown),
            Served("rich", Engine(rich, tokenizer), parameters=1_500_000, examples=examples),
            served("random", random),
            Served("base", Engine(tiny_model(), tokenizer), chat=False),
        ],
        Limits(max_tokens=1500),
    )


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with running(service) as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """Actions of a person on the page."""

    def __init__(self, browser: WebDriver, url: str):
        self.browser, self.url = browser, url

    def open(self) -> "Page":
        self.browser.get(self.url)
        self.until(lambda: self.one("#model").is_enabled())
        return self

    def all(self, css: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, css)

    def one(self, css: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, css)

    def button(self, label: str, within: str = "body") -> WebElement:
        found = [b for b in self.all(f"{within} button") if b.text == label and b.is_displayed()]
        assert found, f"no button {label}"
        return found[-1]

    def until(self, holds: Callable[[], Any], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                if holds():
                    return
            except (AssertionError, selenium.common.exceptions.WebDriverException):
                pass
            if time.monotonic() > deadline:
                raise AssertionError(f"did not come: {self.one('body').text}")
            time.sleep(0.03)

    def send(self, text: str) -> None:
        self.one("#input").send_keys(text, Keys.ENTER)

    def choose(self, model: str) -> None:
        Select(self.one("#model")).select_by_value(model)

    def answered(self) -> None:
        self.until(lambda: self.one("#send").is_displayed() and self.all("article.assistant"))

    def answer(self) -> str:
        return self.texts("article.assistant .body")[-1]

    def users(self) -> list[str]:
        return self.texts("article.user .body")

    def texts(self, css: str) -> list[str]:
        """Read in one go: while an answer comes, its nodes are replaced at any moment."""
        script = "return [...document.querySelectorAll(arguments[0])].map((n) => n.innerText)"
        return list(self.browser.execute_script(script, css))

    def downloaded(self, path: Path) -> Path:
        """The file once it is whole: Chromium holds its name with an empty file, and renames."""
        self.until(lambda: path.exists() and path.stat().st_size)
        return path

    def picture(self, name: str) -> None:
        if SCREENSHOTS:
            Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
            time.sleep(0.3)  # the end of a transition
            self.browser.save_screenshot(str(Path(SCREENSHOTS) / f"{name}.png"))

    def is_too_wide(self) -> bool:
        return bool(
            self.browser.execute_script(
                "return document.documentElement.scrollWidth > document.documentElement.clientWidth"
            )
        )


@pytest.fixture
def page(browser: WebDriver, url: str, service: Service) -> Iterator[Page]:
    browser.set_window_size(1280, 860)
    browser.get(url)
    browser.execute_script("localStorage.clear()")
    browser.get("about:blank")
    browser.get_log("browser")
    yield Page(browser, url).open()
    complaints = [
        entry["message"]
        for entry in browser.get_log("browser")
        if entry["level"] == "SEVERE" and "Failed to load resource" not in entry["message"]
    ]
    assert not complaints  # no script error, nothing the content policy had to stop
    browser.get("about:blank")
    settle(service)


def test_send_and_tool_calls(page: Page) -> None:
    assert [o.text for o in page.all("#model option")] == [
        *("caller", "slow", "markdown", "rich", "random")
    ]
    page.send("what is 12 + 34?")
    page.answered()
    assert page.users() == ["what is 12 + 34?"]
    assert "46 🙂" in page.answer()
    assert "tokens/s" in page.one(".facts").text
    tool = page.one("details.tool")
    assert tool.get_attribute("open") is None
    summary = tool.find_element(By.TAG_NAME, "summary")
    assert summary.text == "Tool: 12 + 34 → 46"
    summary.send_keys(Keys.ENTER)  # by keyboard
    assert [pre.text for pre in tool.find_elements(By.TAG_NAME, "pre")] == ["12 + 34", "46"]
    page.picture("tool-1280")
    assert page.one("#status").get_attribute("textContent").startswith("Answer: said")
    # The next turn shows the model its call again.
    page.send("and again")
    page.until(lambda: len(page.all("article.assistant .actions")) == 2)
    assert page.users() == ["what is 12 + 34?", "and again"]


def test_streaming_and_stop(page: Page, service: Service) -> None:
    page.choose("slow")
    page.send("hi")
    page.until(lambda: len(page.answer()) > 20)
    first = page.answer()
    page.until(lambda: len(page.answer()) > len(first) + 20)  # it grows while it comes
    assert page.answer().startswith(first.strip())
    page.one("#stop").click()
    page.answered()
    text = page.answer()
    settle(service, 3)  # the server has stopped too
    assert page.answer() == text
    assert "stopped" in page.one(".facts").text
    page.send("hi again")
    page.until(lambda: len(page.all("article.assistant")) == 2 and len(page.answer()) > 10)
    page.one("#input").send_keys(Keys.ESCAPE)  # by keyboard
    page.answered()
    settle(service, 3)


def test_edit_and_regenerate(page: Page) -> None:
    page.send("first")
    page.answered()
    page.send("second")
    page.until(lambda: len(page.all("article.assistant .actions")) == 2)
    page.all("article.user")[0].find_element(By.XPATH, ".//button[.='Edit']").click()
    area = page.one(".edit textarea")
    assert area.get_attribute("value") == "first"
    area.send_keys(" thing", Keys.ENTER)
    page.until(lambda: page.users() == ["first thing"] and page.one("#send").is_displayed())
    page.button("Regenerate").click()
    page.answered()
    assert len(page.all("article.assistant")) == 1
    page.button("Edit").click()
    page.button("Cancel").click()
    assert page.users() == ["first thing"]


def test_conversations_survive_a_reload(page: Page) -> None:
    page.send("the king")
    page.answered()
    said = page.answer()
    page.open()
    assert (page.users(), page.answer()) == (["the king"], said)
    page.one("#new-chat").click()
    assert page.users() == []
    page.send("the sea")
    page.answered()
    titles = [node.text for node in page.all("#chats .open")]
    assert titles == ["the sea", "the king"]
    page.all("#chats .open")[1].click()
    assert page.users() == ["the king"]
    page.all("#chats .delete")[1].click()
    page.browser.switch_to.alert.accept()
    page.until(lambda: [node.text for node in page.all("#chats .open")] == ["the sea"])
    assert page.users() == []


def test_a_reload_in_the_middle_of_an_answer(page: Page, service: Service) -> None:
    page.choose("slow")
    page.send("hi")
    page.until(lambda: len(page.answer()) > 250)  # more than a second: kept once
    page.open()
    assert page.users() == ["hi"]
    assert "the sea" in page.answer()
    assert page.one("#send").is_displayed()
    settle(service, 3)
    page.browser.execute_script(  # as a browser leaves it that was killed
        """for (const [key, text] of Object.entries(localStorage)) {
            const chat = JSON.parse(text);
            if (!chat.messages) continue;
            chat.messages[1].coming = true;
            localStorage.setItem(key, JSON.stringify(chat));
        }"""
    )
    page.open()
    page.one("#new-chat").click()
    page.one("#chats .open").click()
    assert "the sea" in page.answer()
    assert page.button("Regenerate")
    assert "stopped" in page.one(".facts").text


def test_the_current_conversation_is_chosen_while_it_answers(page: Page, service: Service) -> None:
    page.choose("slow")
    page.send("hi")
    page.until(lambda: len(page.answer()) > 250)
    before = page.answer()
    page.one("#chats .open").click()  # it is shown already: nothing is lost or stopped
    assert page.answer().startswith(before)
    page.until(lambda: len(page.answer()) > len(before) + 20)
    page.one("#stop").click()
    page.answered()
    assert page.button("Regenerate")
    settle(service, 3)


@pytest.mark.parametrize("everything", [False, True], ids=["one", "all"])
def test_a_conversation_deleted_while_it_answers_stays_deleted(
    page: Page, service: Service, everything: bool
) -> None:
    page.choose("slow")
    page.send("hi")
    page.until(lambda: len(page.answer()) > 20)
    if everything:
        page.one("#open-settings").click()
    page.one("#clear-all" if everything else "#chats .delete").click()
    page.browser.switch_to.alert.accept()
    if everything:
        page.one("#close-settings").click()
    settle(service, 3)
    page.open()
    assert page.all("#chats .open") == []
    assert page.users() == []


def test_settings_are_kept_and_sent(page: Page, service: Service) -> None:
    page.one("#open-settings").click()
    assert page.one("#set-temperature").get_attribute("placeholder") == "0.6"
    page.picture("settings-1280")
    for name, value in {
        "temperature": "1.5",
        "top_k": "7",
        "top_p": "0.9",
        "min_p": "0.1",
        "max_tokens": "3",
        "seed": "11",
        "system": "the word",
    }.items():
        page.one(f"#set-{name}").send_keys(value)
    page.one("#close-settings").click()
    prepared: list[Any] = []
    engine = service.models["caller"].engine
    original = engine.prepare
    engine.prepare = lambda *a, **k: prepared.append(a) or original(*a, **k)  # type: ignore
    try:
        page.send("hi")
        page.answered()
    finally:
        del engine.prepare  # type: ignore[method-assign]
    ((prompt, params, *_),) = prepared
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (1.5, 7, 0.9, 0.1)
    assert (params.max_tokens, params.seed) == (3, 11)
    messages = [{"role": "system", "content": "the word"}, {"role": "user", "content": "hi"}]
    assert prompt == tiny_tokenizer().render_for_completion({"messages": messages})
    assert "cut off" in page.one(".facts").text
    page.open()
    page.one("#open-settings").click()
    assert page.one("#set-top_k").get_attribute("value") == "7"
    assert page.one("#set-system").get_attribute("value") == "the word"
    page.one("#reset-settings").click()
    page.one("#close-settings").click()
    page.one("#open-settings").click()
    assert page.one("#set-top_k").get_attribute("value") == ""
    page.one("#close-settings").click()


def test_model_text_is_only_text(page: Page) -> None:
    page.choose("markdown")
    page.send("<script>window.hacked=5</script><b>hi</b>")
    page.answered()
    time.sleep(0.2)
    assert page.browser.execute_script("return window.hacked") is None
    for name in ("script", "img", "b", "u", "i", "iframe"):
        assert not page.all(f"#log {name}"), name
    assert page.users() == ["<script>window.hacked=5</script><b>hi</b>"]
    answer = page.answer()
    assert "<script>window.hacked=1</script><img src=x onerror" in answer
    assert "[click](javascript:window.hacked=3)" in answer
    links = [node.get_attribute("href") for node in page.all("#log .body a")]
    assert links == ["https://a.example/x?a=1", "https://a.example/i.png"]
    assert page.one("#log strong").text == "strong"
    assert page.one("#log pre code").text == "<script>window.hacked=4</script>"
    assert [node.text.split("\n")[0] for node in page.all("#log li")] == ["one", "two", "inner"]
    assert [node.text for node in page.all("#log td")] == ["<u>1</u>", "2"]
    page.open()  # and what was kept is as harmless
    assert page.browser.execute_script("return window.hacked") is None
    page.picture("markdown-1280")
    page.browser.set_window_size(400, 800)
    page.picture("markdown-400")


def test_copy(page: Page) -> None:
    """Copying works where the browser keeps its clipboard from the page, as over plain HTTP."""
    page.choose("markdown")
    page.send("hi")
    page.answered()
    page.button("Copy", "article.assistant").click()
    page.until(lambda: page.button("Copied", "article.assistant"))
    page.one("#input").send_keys(Keys.CONTROL, "v")
    pasted = page.one("#input").get_attribute("value")
    assert pasted is not None
    assert pasted.replace("\r\n", "\n") == EVIL
    page.one("#input").clear()
    page.browser.execute_script("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.button("Copy code").click()
    page.until(lambda: page.button("Copied"))
    page.one("#input").send_keys(Keys.CONTROL, "v")
    assert page.one("#input").get_attribute("value") == "<script>window.hacked=4</script>"


def test_the_server_is_gone(browser: WebDriver) -> None:
    service = Service([Served("only", Engine(slow_model(seconds=0.02), tiny_tokenizer()))])
    with running(service) as url:
        page = Page(browser, url).open()
        page.send("hi")
        page.until(lambda: len(page.answer()) > 20)
    page.until(lambda: page.all("article .error"))
    assert "sea" in page.answer()  # what had come stays
    page.button("Try again").click()
    page.until(lambda: "cannot be reached" in page.one("article .error").text)
    assert page.users() == ["hi"]
    assert page.one("#send").is_displayed()
    page.picture("gone-1280")
    browser.get("about:blank")


def test_errors_are_told(page: Page, service: Service) -> None:
    service.limits.__dict__["max_characters"] = 5
    try:
        page.send("the king and the sea")
        page.until(lambda: page.all("article .error"))
        assert "20 characters are more than 5" in page.one("article .error").text
    finally:
        service.limits.__dict__["max_characters"] = 200_000
    page.button("Try again").click()
    page.until(lambda: "46" in page.answer())


def test_the_api_key_is_asked_for(browser: WebDriver) -> None:
    service = Service([Served("only", Engine(scripted(CALL), tiny_tokenizer()))])
    with running(service, api_key="s3cret") as url:
        page = Page(browser, url)
        browser.get(url)
        page.until(lambda: "API key" in page.one("#toast").text)
        page.one("#open-settings").click()
        page.one("#set-key").send_keys("s3cret")
        page.one("#close-settings").click()
        page.until(lambda: page.one("#model").is_enabled())
        page.send("hi")
        page.until(lambda: "46" in page.answer())
        browser.get("about:blank")


def test_narrow_screens(page: Page) -> None:
    page.browser.set_window_size(400, 800)
    assert page.browser.execute_script("return innerWidth") <= 420
    page.send("what is 12 + 34? " + "w" * 200)
    page.answered()
    assert not page.is_too_wide()
    page.picture("chat-400")
    assert not page.one("#new-chat").is_displayed()
    page.one("#menu").click()
    page.until(lambda: page.one("#new-chat").is_displayed())
    time.sleep(0.3)
    page.picture("sidebar-400")
    page.one("#chats .open").send_keys(Keys.ESCAPE)
    page.until(lambda: not page.one("#new-chat").is_displayed())
    page.one("#open-settings").click()
    assert not page.is_too_wide()
    page.picture("settings-400")
    page.one("#close-settings").click()


def test_dark_and_light(page: Page) -> None:
    def back() -> str:
        script = "return getComputedStyle(document.body).backgroundColor"
        return str(page.browser.execute_script(script))

    light = back()
    page.one("#theme").click()
    dark = back()
    assert light != dark
    page.send("hi")
    page.answered()
    page.picture("dark-1280")
    page.open()
    assert back() == dark
    page.choose("markdown")
    page.send("hi")
    page.until(lambda: page.all("#log table"))
    page.picture("dark-markdown-1280")
    page.browser.set_window_size(400, 800)
    page.picture("dark-400")
    page.one("#open-settings").click()
    page.picture("dark-settings-400")
    page.one("#close-settings").click()


def test_everything_has_a_name_and_a_place_in_the_tab_order(page: Page) -> None:
    """Each control is named for screen readers, and the keyboard alone reaches and uses it."""
    page.send("hi")
    page.answered()
    nameless = page.browser.execute_script(
        """return [...document.querySelectorAll("button, input, select, textarea, [role]")]
        .filter((node) => !node.textContent.trim() && !node.getAttribute("aria-label")
            && !(node.labels && node.labels.length) && !["status", "alert"].includes(node.role)
            && !node.getAttribute("aria-labelledby"))
        .map((node) => node.outerHTML)"""
    )
    assert nameless == []
    reached = set()
    for _ in range(25):
        page.browser.switch_to.active_element.send_keys(Keys.TAB)
        active = page.browser.switch_to.active_element
        reached.add(active.get_attribute("id") or active.text)
    assert {"menu", "Edit"} & reached == {"Edit"}  # the menu button is for narrow screens only
    assert {"model", "theme", "open-settings", "new-chat", "input", "Regenerate"} <= reached


def draw(page: Page, text: str) -> float:
    """Show this as an answer in a conversation of its own; the milliseconds that it took."""
    return float(
        page.browser.execute_async_script(
            """const [text, done] = arguments;
            import(`${location.origin}/markdown.js`).then(({ markdown, whenBetter }) => {
                const before = performance.now();
                const drawn = markdown(text);
                const took = performance.now() - before;
                const node = document.createElement("article");
                node.className = "assistant";
                node.innerHTML = "<div class=body></div>";
                node.firstChild.append(drawn);
                document.getElementById("log").replaceChildren(node);
                done(took);
            })""",
            text,
        )
    )


def test_the_final_answer_is_not_small(page: Page) -> None:
    for level in range(1, 7):
        draw(page, f"so\n\n{'#' * level} 4")
        script = (
            "return getComputedStyle(document.querySelector('#log .body :last-child')).fontSize"
        )
        assert page.texts("#log .body :last-child") == ["4"]
        assert float(page.browser.execute_script(script).removesuffix("px")) >= 16


@pytest.mark.parametrize(
    "text",
    [
        "|" + "a|" * 20_000 + "\n|" + "-|" * 20_000 + "\n|" + "b|" * 20_000,
        "| " + "x " * 50_000,
        "| a |\n|---|\n|" + " " * 100_000,
        "a" + " " * 50_000 + "|\n-" + " " * 50_000 + "-",
        "*" * 20_000 + "a" + "_" * 20_000,
        "[" * 50_000,
        "`" * 3 + "a`" * 20_000,
        "$" * 30_000 + "$a" * 10_000,
        "> " * 5_000 + "deep",
        "<" * 50_000 + "http://" * 5_000,
    ],
    ids=[
        "cells",
        "words",
        "spaces",
        "divider",
        "stars",
        "brackets",
        "ticks",
        "money",
        "quote",
        "links",
    ],
)
def test_no_text_makes_markdown_slow(page: Page, text: str) -> None:
    """A long table row once took 17 s; what is quadratic would not end in time here either."""
    page.browser.set_script_timeout(20)
    draw(page, text)


def test_a_selection_outlives_the_stream(page: Page, service: Service) -> None:
    page.choose("slow")
    page.send("hi")
    page.until(lambda: len(page.answer()) > 60)
    page.browser.execute_script(
        """const text = document.querySelector("article.assistant .body p").firstChild;
        getSelection().setBaseAndExtent(text, 4, text, 20);
        window.watched = text;"""
    )
    selected = "return getSelection().toString()"
    before, length = page.browser.execute_script(selected), len(page.answer())
    assert len(before) == 16
    page.until(lambda: len(page.answer()) > length + 60)
    assert page.browser.execute_script(selected) == before
    ActionChains(page.browser).send_keys(Keys.ESCAPE).perform()
    page.answered()
    assert page.browser.execute_script(selected) == before  # and the end of the answer
    assert page.browser.execute_script("return window.watched.isConnected")
    settle(service, 3)


def test_a_table_is_scrolled_and_not_torn(page: Page) -> None:
    page.browser.set_window_size(400, 800)
    draw(page, f"{TABLE}\n\n| a |\n|---|\n| {'w' * 300} |")
    script = """return [...document.querySelectorAll("#log td, #log th")].map((cell) => {
        const range = document.createRange();
        range.selectNodeContents(cell);
        return [cell.innerText, range.getClientRects().length, cell.clientWidth];
    })"""
    cells = page.browser.execute_script(script)
    lines = {text: count for text, count, _ in cells}
    assert lines["circumference"] == lines["value in SI units"] == 1  # in one line each
    assert max(width for *_, width in cells) < 400
    assert not page.is_too_wide()


def test_versions_of_answers_and_questions(page: Page) -> None:
    def done(count: int) -> None:
        page.until(lambda: len(page.all("article.assistant .actions")) == count)
        page.until(lambda: page.one("#send").is_displayed())

    def version(css: str = "article.assistant") -> str:
        return "".join(page.texts(f"{css} .versions")).replace("\n", " ")

    page.choose("random")
    page.one("#open-settings").click()
    page.one("#set-temperature").send_keys("2")
    page.one("#set-max_tokens").send_keys("8")
    page.one("#close-settings").click()
    page.send("one")
    done(1)
    first = page.answer()
    assert version() == ""
    page.button("Regenerate").click()
    page.until(lambda: "2/2" in version())
    done(1)
    second = page.answer()
    assert first != second
    page.send("two")
    done(2)
    third = page.answer()
    page.one("article.assistant [data-action=before]").click()
    page.until(lambda: "1/2" in version())
    assert page.texts("article.assistant .body") == [first]  # what came after belongs to the other
    page.open()
    assert page.texts("article.assistant .body") == [first]
    page.one("[data-action=after]").click()
    page.until(lambda: len(page.all("article.assistant")) == 2)
    assert page.texts("article.assistant .body") == [second, third]
    page.all("article.user")[0].find_element(By.XPATH, ".//button[.='Edit']").click()
    page.one(".edit textarea").send_keys(" more", Keys.ENTER)
    done(1)
    assert page.users() == ["one more"]
    assert "2/2" in version("article.user")
    page.picture("versions-1280")
    page.one("article.user [data-action=before]").click()
    page.until(lambda: page.users() == ["one", "two"])
    assert page.texts("article.assistant .body") == [second, third]
    assert "2/2" in version()


def test_an_empty_page_shows_what_to_ask(page: Page) -> None:
    assert page.all("[data-example]") == []
    page.choose("rich")
    page.until(lambda: page.texts("[data-example]"))
    page.picture("empty-1280")
    assert page.texts("[data-example]") == ["Spell cat", "How many r are in strawberry?"]
    page.button("Spell cat").click()
    page.answered()
    assert page.users() == ["Spell cat"]


def test_lines_around_a_message_are_not_sent(page: Page) -> None:
    page.one("#input").send_keys(Keys.SHIFT, Keys.ENTER, Keys.NULL, "hi", Keys.SHIFT, Keys.ENTER)
    page.one("#input").send_keys(Keys.NULL, Keys.ENTER)
    page.answered()
    # The other keys of the storage are settings.
    kept = """return JSON.parse(Object.entries(localStorage)
        .find(([key]) => key.startsWith("nanochat.chat."))[1])"""
    assert page.browser.execute_script(kept)["messages"][0]["content"] == "hi"


def test_back_to_the_end(page: Page, service: Service) -> None:
    page.browser.set_window_size(500, 500)
    page.choose("slow")
    page.send("hi")
    at = "return document.getElementById('log').scrollTop"
    page.until(lambda: page.browser.execute_script(at) > 150)  # it follows
    assert not page.one("#to-end").is_displayed()
    page.browser.execute_script("document.getElementById('log').scrollTop = 0")
    page.until(lambda: page.one("#to-end").is_displayed())
    length = len(page.answer())
    page.until(lambda: len(page.answer()) > length + 40)
    assert page.browser.execute_script(at) == 0  # it leaves the reader where they are
    page.picture("latest-500")
    page.one("#to-end").click()
    page.until(lambda: not page.one("#to-end").is_displayed())
    page.one("#stop").click()
    settle(service, 3)


def test_rename_search_and_export(page: Page, tmp_path: Path) -> None:
    def titles() -> list[str]:
        return page.texts("#chats .open")

    page.one("#open-settings").click()
    page.one("#set-system").send_keys("a word")
    page.one("#close-settings").click()
    page.one("#new-chat").click()
    page.send("the king")
    page.answered()
    page.one("#new-chat").click()
    page.send("the sea")
    page.answered()
    page.one("#search").send_keys("KING")
    assert titles() == ["the king"]
    page.one("#search").clear()
    page.one("#search").send_keys("said 46")  # words of the answers
    assert len(titles()) == 2
    page.one("#search").send_keys(" nowhere")
    assert titles() == []
    page.one("#search").clear()
    page.one("#search").send_keys(" ")
    page.one("#chats [data-current] .rename").click()
    page.one("#chats input").send_keys(Keys.CONTROL, "a", Keys.NULL, "Water/1", Keys.ENTER)
    page.until(lambda: titles() == ["Water/1", "the king"])
    page.button("Edit").click()
    page.one(".edit textarea").send_keys(" again", Keys.ENTER)
    page.answered()
    page.until(lambda: page.users() == ["the sea again"])
    assert titles() == ["Water/1", "the king"]  # a name that was given stays
    page.picture("sidebar-1280")
    settings = {"behavior": "allow", "downloadPath": str(tmp_path)}
    page.browser.execute_cdp_cmd("Browser.setDownloadBehavior", settings)  # type: ignore[attr-defined]
    page.one("#chats [data-current] .save").click()
    saved = json.loads(page.downloaded(tmp_path / "Water1.json").read_text(encoding="utf-8"))
    validate(saved, "the file")  # chat_cli's /load reads it
    assert [m["role"] for m in saved["messages"]] == ["system", "user", "assistant"]
    assert saved["messages"][2]["content"][1] == {"type": "python", "text": "12 + 34"}
    page.one("#open-settings").click()
    page.one("#export-all").click()
    assert len(CustomJSON("train", page.downloaded(tmp_path / "conversations.jsonl"))) == 2
    page.one("#close-settings").click()


def test_code_and_formulas(page: Page) -> None:
    """Their libraries are this server's own, and come only when they are needed."""
    files = "return performance.getEntriesByType('resource').map((one) => one.name)"
    page.send("hi")
    page.answered()
    assert not [name for name in page.browser.execute_script(files) if "katex" in name]
    page.choose("rich")
    page.send("hi")
    page.until(lambda: page.texts("#log h6") == ["4"] and page.all(".katex-display"), 60)
    assert page.texts("pre .hljs-keyword")[:2] == ["def", "return"]
    assert len(page.all(".math")) == 2
    assert "it costs $5 and $10" in page.answer()
    used = page.browser.execute_script(files)
    assert any(name.endswith(".woff2") for name in used)
    assert all(name.startswith(page.url) for name in used)
    page.button("Copy code").click()
    page.one("#input").send_keys(Keys.CONTROL, "v")
    assert str(page.one("#input").get_attribute("value")).startswith("def area(r: float)")
    page.one("#input").clear()
    draw(page, "$\\href{javascript:alert(1)}{x}$ $\\frac{$ and \\(b\\)\n\n$$\n- c\n$$\n\n\\[d\\]")
    assert not page.all("#log a, #log ul")
    assert len(page.all("#log .katex")) == 4
    assert "$\\frac{$" in page.answer()
    draw(page, "2*$3=$6, $5 and $10, US$4 or 5$, a$b$c, $5, sells for 7$ \\$x$")
    assert not page.all("#log .math")


def test_how_it_looks(page: Page) -> None:
    """Nothing sticks out, in light and in dark; the pictures are for a person to look at."""
    page.choose("rich")
    try:
        for kind in ("empty", "rich"):
            if kind == "rich":
                page.one("#theme").click()  # light again
                page.send("How large is a circle, and what does it cost?")
                page.until(lambda: page.all(".assistant .actions"), 60)
            for theme in ("light", "dark"):
                if theme == "dark":
                    page.browser.execute_script("document.getElementById('theme').click()")
                for width in (1280, 400, 320):
                    size = {"width": width, "height": 860, "deviceScaleFactor": 1}
                    page.browser.execute_cdp_cmd(  # type: ignore[attr-defined]
                        "Emulation.setDeviceMetricsOverride", {**size, "mobile": width < 500}
                    )
                    assert not page.is_too_wide()
                    page.picture(f"{kind}-{theme}-{width}")
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})  # type: ignore[attr-defined]
