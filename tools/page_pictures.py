"""Draw docs/pages/: every page of a running server, wide and light, and on a phone in the dark.

    python tools/page_pictures.py

Needs chromium, playwright and Pillow (which streamlit brings).
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "page"))
from page_browser import CHROMIUM, FLAGS, PAGES, SHOTS, drawn, shoot, visitor
from page_server import ROOT, page_server

OUT = ROOT / "docs" / "pages"
RUN = "model=gpt2&batch_size=8&attention=sdpa&precision=bf16-mixed&loss=torch"  # one that fits
LAID_OUT = "model=llama-3-70b&gpu=h100-80gb-sxm&seq_len=4096&layouts.count=64&layouts.batch=256"
OWN = {"Plan": f"{RUN}&plan.dollars=300", "Layouts": f"{LAID_OUT}&layouts.code=Megatron-LM%27s"}
KINDS = {"wide": {}, "phone-dark": {"width": 390, "height": 844, "dark": True}}
COLOURS = 128  # of a picture: screenshots have few, and take a third of the room


def main():
    OUT.mkdir(exist_ok=True)
    with page_server() as (url, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        for kind, window in KINDS.items():
            with visitor(browser, f"{url}/?{RUN}", **window) as page:
                for name in PAGES:
                    path = "" if name == "Estimate" else name.lower()
                    query = OWN.get(name, RUN)
                    page.goto(f"{url}/{path}?{query}")
                    drawn(page)
                    shoot(page, f"{name.lower()}-{kind}")
                    picture = Image.open(SHOTS / f"{name.lower()}-{kind}.png").convert("RGB")
                    few = picture.quantize(COLOURS, dither=Image.Dither.NONE)
                    few.save(OUT / f"{name.lower()}-{kind}.png", optimize=True)
        browser.close()


if __name__ == "__main__":
    main()
