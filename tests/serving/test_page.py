"""The chat page in a real browser, against a running server."""

import asyncio

import pytest
from browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

IDLE = "!running"
TEXTS = "[...document.querySelectorAll('.turn .text')].map(e => e.textContent)"


def drive(scenario) -> None:
    async def run() -> None:
        async with Browser() as page:
            await scenario(page)
            assert page.problems == []  # no exception, nothing refused by the page's own policy

    asyncio.run(asyncio.wait_for(run(), 120))


def test_chat_stop_retry_edit_and_keys(server):
    async def scenario(page: Browser) -> None:
        await page.open(server.address)
        assert await page.run("document.activeElement.id") == "question"
        await page.run("loadSettings({max_tokens: '12', temperature: '3', seed: '3'})")

        await page.type("Hello")
        await page.press("Enter")
        await page.until(f"turns.length === 2 && {IDLE}")
        asked, first = await page.run(TEXTS)
        assert asked == "Hello"
        assert first
        note = await page.run("document.querySelector('.assistant .under span').textContent")
        assert "12 tokens" in note
        assert "tokens/s" in note

        await page.run("loadSettings({max_tokens: '12', temperature: '3', seed: '4'})")
        await page.click("button", "Retry")
        await page.until(f"turns.length === 2 && {IDLE} && turns[1].note.includes('tokens')")
        assert (await page.run(TEXTS))[1] != first

        await page.press("ArrowUp")  # edits the last question
        await page.until("document.querySelector('.edit textarea')")
        await page.run("document.querySelector('.edit textarea').value = 'Goodbye'")
        await page.press("Enter")
        await page.until(f"turns[0].content === 'Goodbye' && turns.length === 2 && {IDLE}")

        await page.run("loadSettings({max_tokens: '1000'})")
        await page.type("Talk for long")
        await page.press("Enter")
        await page.until("running && turns[3].content.length > 5")
        await page.press("Escape")
        await page.until(IDLE)
        assert (await page.run("turns[3].note")).startswith("stopped")
        await page.press("n", modifiers=1)
        await page.until("turns.length === 0 && document.querySelector('#empty').offsetParent")

    drive(scenario)


def test_text_is_never_html_and_a_phone_needs_no_sideways_scrolling(server):
    evil = "<img src=x onerror=alert(1)><b>bold</b>" + "x" * 300

    async def scenario(page: Browser) -> None:
        await page.open(server.address, 360, 640, dark=True)
        await page.run("loadSettings({max_tokens: '4'})")
        await page.type(evil)
        await page.press("Enter")
        await page.until(f"turns.length === 2 && {IDLE}")
        assert (await page.run(TEXTS))[0] == evil
        assert await page.run("document.querySelectorAll('#talk img, #talk b').length") == 0
        assert await page.run("document.documentElement.scrollWidth <= innerWidth")
        back = await page.run("getComputedStyle(document.body).backgroundColor")
        assert back == "rgb(22, 24, 27)"
        await page.click("#settings")
        await page.until("document.querySelector('dialog').open")
        assert await page.run(
            "document.querySelector('dialog').getBoundingClientRect().right <= innerWidth"
        )

    drive(scenario)


def test_when_the_context_is_full_the_oldest_turns_go(server):
    async def scenario(page: Browser) -> None:
        await page.open(server.address)
        await page.run("loadSettings({max_tokens: '5'})")
        await page.run(
            "turns = [{role: 'user', content: 'q '.repeat(3000)},"
            " {role: 'assistant', content: 'a'}]"
        )
        await page.type("Still there?")
        await page.press("Enter")
        await page.until(f"turns.length === 4 && {IDLE}")
        assert await page.run("!turns[3].failed && turns[3].content.length > 0")

    async def with_expected_refusal(page: Browser) -> None:
        await scenario(page)
        assert all("400" in problem for problem in page.problems)
        page.problems.clear()

    drive(with_expected_refusal)


def test_a_page_without_the_key_says_what_to_do(strict):
    async def scenario(page: Browser) -> None:
        await page.send("Page.navigate", url=strict.address)
        await page.until("document.querySelector('#model')?.textContent.includes('needs a key')")
        await page.run("fields.key.value = 'sesame'; saveSettings()")
        await page.until("model === 'tiny'")
        page.problems.clear()  # the browser tells the 401

    drive(scenario)
