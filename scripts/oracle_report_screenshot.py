"""The picture of a report in docs/oracle.md: a faulty model is bisected and its page opened in Chromium.

The fault: layer 1 of four rotates the pairs (2i, 2i + 1) of queries and keys, all other
layers the pairs (i, i + H/2) for which the weights were trained.

    python scripts/oracle_report_screenshot.py [--out docs/images/oracle-report.png]
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from oracle import diagnosis, models, noise
from oracle.comparison import Comparison
from oracle.reference import Reference
from oracle.reports import page, terminal
from oracle.results import Report

MODEL = models.MODELS["llama"] | {"num_hidden_layers": 4}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTH, HEIGHT = 1200, 1880
"""Of the picture: the verdict, the ladder and the maps."""
LARGEST = 300_000
"""Bytes that a picture in the repository may have."""


def interleaved(config: Any, parameters: Any, x: Any, angles: Any) -> Any:
    """RoPE on the wrong pairs."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape).astype(x.dtype)


def bisected(folder: Path) -> Report:
    """The report of the faulty model; every rung is climbed, so that the maps show what was inherited."""
    models.write(MODEL, folder, "float32", seed=1)
    true, reference = models.candidate(folder, "float32"), Reference.load(folder, "float32")
    faulty = replace(true, replace={f"layers.1.attn.{side}_rope": interleaved for side in "qk"})
    comparison = Comparison(faulty, reference, folder, folder, noise.stored_calibration())
    return diagnosis.bisect(comparison, everything=True)


def photograph(browser: str, html: Path, picture: Path) -> None:
    """The upper part of the page, in its light scheme."""
    size = f"--window-size={WIDTH},{HEIGHT}"
    light = "--blink-settings=preferredColorScheme=1"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", light, size]
    environment = {**os.environ, "TMPDIR": str(html.parent)}
    command = [browser, *flags, f"--screenshot={picture}", html.as_uri()]
    subprocess.run(command, check=True, capture_output=True, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images/oracle-report.png"), help="the picture")
    arguments = parser.parse_args()
    browser = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit("no Chromium found; install one or set $CHROMIUM to its path")
    with tempfile.TemporaryDirectory() as folder:
        report = bisected(Path(folder) / "model")
        print(terminal.verdict(report))
        html, picture = Path(folder) / "report.html", Path(folder) / "report.png"
        html.write_text(page.render(report), encoding="utf-8")
        photograph(browser, html, picture)
        size = picture.stat().st_size
        if size > LARGEST:
            sys.exit(f"the picture has {size:,} bytes, more than {LARGEST:,}")
        shutil.copyfile(picture, arguments.out)
    print(f"{arguments.out}: {size:,} bytes")


if __name__ == "__main__":
    main()
