"""How fast the page of export.py generates in headless Chromium on one core.

    python tests/page_speed.py nano.html

Asks the page five times, at a temperature that makes its answers long. The last line is one JSON object.
"""

import json
import os
import re
import statistics
import sys
from pathlib import Path

from browser import Browser

IS_DONE = "document.body.dataset.busy === 'false' && document.querySelector('.note').textContent"


def main():
    page = Path(sys.argv[1]).resolve().as_uri()
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})  # inherited by the browser and all its processes
    browser = Browser("--lang=en-US")
    rates = []
    try:
        for n in range(5):
            browser.open(f"{page}#q={n}&t=5&k=0&r=1")
            browser.wait("document.body.dataset.ready === 'true'")
            browser.wait(IS_DONE)
            found = re.findall(r"(\d+) tokens · ([\d.]+) tokens/s", browser.run("document.body.innerText"))
            tokens, rate = map(float, found[-1])
            rates.append(rate)
            print(f"{tokens:.0f} tokens, {rate:.0f} tokens/s")
    finally:
        browser.close()
    print(json.dumps({"core": core, "tokens_per_second": rates, "median": statistics.median(rates)}))


if __name__ == "__main__":
    main()
