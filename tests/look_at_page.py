"""Look at a report in a browser, by hand or where a machine has one; not part of the test suite.

    pip install playwright && npm install --prefix /tmp/axe axe-core     # and a Chromium, such as Debian's package
    python tests/look_at_page.py runs/tiny/report/index.html --pictures /tmp/pictures --axe /tmp/axe

Without a network, at 390 and 1440 pixels, in light and dark, on screen and printed, it checks: nothing in the console,
no request but the page's, no horizontal scroll of the page, the browser of users works from the keyboard, and axe-core
finds nothing serious. Exit status 1 if something is wrong.
"""

import argparse
import shutil
import sys
from pathlib import Path

SIZES = ((390, 844), (1440, 900))
CHROMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 600  # on a machine that does other things


def main():
    """Look, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path, help="index.html of a report")
    parser.add_argument("--pictures", type=Path, help="folder for the pictures; none without it")
    parser.add_argument("--axe", type=Path, help="folder that has node_modules/axe-core; without it axe is left out")
    parser.add_argument("--chrome", help="path of the browser; else the first of " + ", ".join(CHROMES))
    words = parser.parse_args()
    chrome = words.chrome or next(filter(None, map(shutil.which, CHROMES)), None)
    if chrome is None:
        parser.error("no browser found; install chromium, or give --chrome")
    from playwright.sync_api import sync_playwright

    axe = (words.axe / "node_modules/axe-core/axe.min.js").read_text() if words.axe else None
    faults = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chrome, args=["--no-sandbox"])
        for width, height in SIZES:
            for scheme in ("light", "dark"):
                context = browser.new_context(
                    viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
                )
                found = looked_at(context.new_page(), words.page, words.pictures, f"{width}-{scheme}", axe)
                print(f"{width} {scheme}: {'; '.join(found) or 'fine'}")
                faults += found
                context.close()
        browser.close()
    return 1 if faults else 0


def looked_at(page, path, pictures, name, axe):
    """Open the page once; return what is wrong with it."""
    page.set_default_timeout(1000 * SECONDS)
    told, requests, faults = [], [], []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("dialog", lambda dialog: (told.append("a dialog"), dialog.dismiss()))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.resolve().as_uri())
    if pictures:
        pictures.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(pictures / f"{name}.png"), full_page=True)
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    width, inner = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    faults += [f"the page is {width} wide on {inner}"] if width > inner else []
    faults += users_fault(page)
    if axe:
        page.evaluate(axe)
        for found in page.evaluate("axe.run()")["violations"]:
            if found["impact"] in ("serious", "critical"):
                faults.append(f"{found['id']}: {found['nodes'][0]['html'][:120]}")
    if pictures:
        page.pdf(path=str(pictures / f"{name}.pdf"))
    faults += [f"console: {text}" for text in told] + [f"asked for {url}" for url in requests[1:]]
    return faults


def users_fault(page):
    """Use the browser of users from the keyboard: go to another, search for nothing that is there, come back."""
    if not page.locator("#browser").count():
        return []
    names = page.locator("#list button")
    number = names.count()
    names.first.focus()
    page.keyboard.press("ArrowDown")
    second = names.nth(min(1, number - 1))
    faults = [] if second.get_attribute("aria-current") == "true" else ["an arrow does not go to the next user"]
    page.locator("#find").fill("nothing has these words")
    faults += [] if names.count() == 0 else ["a search for nothing finds users"]
    page.locator("#find").fill("")
    page.locator("#which").select_option("hit")
    hits = names.count()
    page.locator("#which").select_option("miss")
    faults += [] if hits + names.count() == number else [f"{hits} hits and {names.count()} misses of {number} users"]
    page.locator("#which").select_option("all")
    return faults


if __name__ == "__main__":
    sys.exit(main())
