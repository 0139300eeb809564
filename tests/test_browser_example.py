"""examples/browser: a page fine-tunes privately in headless Chromium, shows epsilon, and cannot send anything away."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("tokenizers")

from chromium import Page, find_chromium
from javascript_cases import DELTA, examples, flat_biases, furthest, needs, text_export, write_texts

from dpbitfit_fx.accounting import epsilon, format_epsilon
from dpbitfit_fx.data import read_table
from dpbitfit_fx.ort_runner import OrtTrainer
from dpbitfit_fx.ort_text import TextInput
from dpbitfit_fx.privacy_statement import PrivacyStatement
from dpbitfit_fx.sampling import PoissonSampler

BROWSER = find_chromium()
pytestmark = [needs("npm"), pytest.mark.skipif(BROWSER is None, reason="no chromium installed (or named by $CHROMIUM)")]
RECORDS, STEPS, BATCH, SIGMA, SEED = 24, 6, 6.0, 2.0, 7


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/, an export `texts` with external data, tokenizer and budget, and its records `texts.csv`."""
    folder = tmp_path_factory.mktemp("browser")
    examples("browser", folder)
    text_export(folder / "texts", RECORDS, STEPS)
    write_texts(folder / "texts.csv", RECORDS)
    return folder


class Site:
    """An export as the documented command serves it; `address` is the page."""

    def __init__(self, place: Path, export: Path) -> None:
        command = [str(place / "examples" / "browser" / "run"), str(export), "--port", "0"]
        environment = os.environ | {"PYTHON": sys.executable}
        self.process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", said)
        assert found is not None, said
        self.address = found[0]

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def site(place: Path) -> Iterator[Site]:
    with Site(place, place / "texts") as running:
        yield running


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    assert BROWSER is not None
    with Page(BROWSER, tmp_path) as one:
        yield one


def opened(page: Page, address: str) -> None:
    page.open(address + ("&" if "?" in address else "?") + "threads=1")
    page.wait("['ready', 'failed'].includes(document.body?.dataset.state)")


def type_records(page: Page, text: str) -> None:
    page.evaluate(
        f"{{ const t = document.getElementById('table'); t.value = {json.dumps(text)}; t.dispatchEvent(new Event('input')); }}"
    )


def click(page: Page, element: str) -> None:
    assert page.evaluate(f"!document.getElementById({element!r}).disabled"), element
    page.evaluate(f"document.getElementById({element!r}).click()")


def finish(page: Page) -> None:
    page.wait("['done', 'failed'].includes(document.body.dataset.state)")
    assert page.evaluate("document.body.dataset.state") == "done", page.text("problem")


def downloaded(page: Page, place: Path) -> tuple[np.ndarray[Any, Any], PrivacyStatement]:
    page.download("biases", "biases.safetensors")
    page.download("privacy", "privacy.json")
    said = PrivacyStatement.load(page.downloads / "privacy.json", verify=True)
    return flat_biases(page.downloads / "biases.safetensors", place / "texts"), said


def spent(steps: int) -> float:
    return epsilon(PoissonSampler.from_expected_batch_size(RECORDS, BATCH, steps=STEPS), SIGMA, DELTA, steps=steps)


def test_the_page_shows_dp_accountings_epsilon_and_under_pythons_key_ends_with_pythons_biases(
    place: Path, site: Site, page: Page, tmp_path: Path
) -> None:
    assert (place / "texts" / "weights.data").is_file(), "frozen weights are external data"
    opened(page, f"{site.address}?insecure-seed-for-tests={SEED}")
    assert "NO PRIVACY" in page.evaluate("document.body.innerText")
    page.choose_file("file", place / "texts.csv")
    page.wait("!document.getElementById('start').disabled")
    assert page.text("count") == f"{RECORDS} records."
    click(page, "start")
    finish(page)
    page.screenshot(tmp_path / "page.png")
    assert (page.text("step"), page.text("steps")) == (str(STEPS), str(STEPS))
    assert page.text("epsilon") == format_epsilon(spent(STEPS))
    assert page.evaluate("document.getElementById('start').disabled")
    found, said = downloaded(page, place)
    assert said.insecure and (said.steps, said.epsilon) == (STEPS, spent(STEPS))

    manifest = json.loads((place / "texts" / "manifest.json").read_text())
    reader = TextInput(place / "texts", manifest)
    records = reader.records(read_table(place / "texts.csv", "text", "label", ["neg", "pos"]))
    usual: dict[str, Any] = {"steps": STEPS, "target_delta": DELTA, "physical_batch_size": 8, "dataset_size": RECORDS}
    trainer = OrtTrainer(place / "texts", records, pad_values=reader.pad_values, insecure_seed_for_tests=SEED, **usual)
    start = trainer.flat()
    trainer.train()
    assert furthest(found, trainer.flat()) < 1e-5 and furthest(start, trainer.flat()) > 1e-2


def test_typed_records_train_under_a_secret_key_until_the_user_stops_and_the_page_can_reach_nobody(
    place: Path, site: Site, page: Page, tmp_path: Path
) -> None:
    opened(page, site.address)
    page.evaluate(
        "document.addEventListener('securitypolicyviolation', (e) => { window.refused = e.effectiveDirective; })"
    )
    for address in ("/export/manifest.json", "http://127.0.0.1:9/"):
        assert page.evaluate(f"fetch({address!r}).then(() => 'answered', () => 'refused')") == "refused"
    page.evaluate("new Image().src = '/export/manifest.json?a-record'")
    page.wait("window.refused === 'img-src'")
    assert page.evaluate("navigator.sendBeacon('/', 'a record'); window.refused") is not None
    secret = "very good film"
    type_records(page, f"text,label\n{secret},pos\n{secret},nobody\n")
    assert page.evaluate("document.getElementById('start').disabled")
    shown = page.evaluate("document.body.innerText")
    assert "Row 2: its label is not one of neg, pos." in shown and "nobody" not in shown
    type_records(page, (place / "texts.csv").read_text())
    assert page.evaluate("document.getElementById('problem').hidden")
    # As soon as the page shows its first step; asking from here would come too late for steps this small.
    page.evaluate("""
        new MutationObserver((_, one) => { one.disconnect(); document.getElementById('stop').click(); })
            .observe(document.getElementById('step'), { childList: true });
    """)
    click(page, "start")
    finish(page)
    steps = int(page.text("step"))
    assert 1 <= steps < STEPS and page.text("epsilon") == format_epsilon(said_epsilon(place, steps))
    assert spent(steps) <= said_epsilon(place, steps) < spent(steps) * 1.001
    assert page.evaluate("document.getElementById('table').value") == ""
    found, said = downloaded(page, place)
    assert not said.insecure and said.steps == steps and np.isfinite(found).all()
    assert f"epsilon = {page.text('epsilon')}" in page.text("result")


def said_epsilon(place: Path, steps: int) -> float:
    return float(json.loads((place / "texts" / "budget.json").read_text())["epsilon_by_step"][steps])


def test_weights_that_were_changed_never_train(place: Path, page: Page, tmp_path: Path) -> None:
    shutil.copytree(place / "texts", tmp_path / "changed")
    data = bytearray((tmp_path / "changed" / "weights.data").read_bytes())
    data[100] ^= 1
    (tmp_path / "changed" / "weights.data").write_bytes(data)
    with Site(place, tmp_path / "changed") as changed:
        opened(page, changed.address)
        assert "weights.data was changed after the export" in page.text("problem")
        assert page.evaluate("document.body.dataset.state") == "failed"
        assert page.evaluate("document.getElementById('start').disabled && document.getElementById('table').disabled")


def test_the_server_gives_only_the_page_and_the_export_takes_nothing_and_confines_every_answer(site: Site) -> None:
    for path in ("", "page.mjs", "npm/onnxruntime-web/ort-wasm-simd-threaded.mjs", "export/grad_step.onnx"):
        with urllib.request.urlopen(site.address + path) as answer:
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe-inline" not in policy
            assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    for path, data, code in (("serve.py", None, 404), ("export/../serve.py", None, 404), ("", b"a record", 501)):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(site.address + path, data)
        assert error.value.code == code
