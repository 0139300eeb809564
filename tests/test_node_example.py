"""examples/node: Node.js takes private steps from a plain export, and under the same key they are Python's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import ndtri  # type: ignore[import-untyped, unused-ignore]

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from javascript_cases import DELTA, examples, flat_biases, furthest, needs, write_table
from onnx_cases import ROWS, compiled

import dpbitfit_fx as dpb
from dpbitfit_fx.accounting import epsilon
from dpbitfit_fx.biases import read_biases
from dpbitfit_fx.ort_backends import PlainBackend
from dpbitfit_fx.ort_budget import attach_budget
from dpbitfit_fx.ort_runner import OrtTrainer
from dpbitfit_fx.privacy_statement import PrivacyStatement
from dpbitfit_fx.randomness import SecretKey, stream
from dpbitfit_fx.sampling import PoissonSampler

pytestmark = needs("node", "npm")
STEPS, PHYSICAL, SIGMA, BATCH = 3, 4, 2.0, 6.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/, an export `mlp` with its budget, and its records `mlp.csv`."""
    folder = tmp_path_factory.mktemp("node")
    examples("node", folder)
    step, data = compiled("mlp", noise_multiplier=SIGMA, expected_batch_size=BATCH)
    dpb.export_onnx(step, folder / "mlp")
    attach_budget(folder / "mlp", dataset_size=ROWS, target_epsilon=8, target_delta=DELTA, steps=5)
    write_table(folder / "mlp.csv", data)
    arrays: dict[str, Any] = {name: value.numpy() for name, value in data.items()}
    np.savez(folder / "mlp.npz", **arrays)
    return folder


def node(place: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["node", *map(str, words)], cwd=place, capture_output=True, text=True, timeout=120)


def train(place: Path, out: Path, *more: object, table: Path | None = None, export: Path | None = None) -> Any:
    usual = [export or place / "mlp", table or place / "mlp.csv", "--output", out, "--physical-batch-size", PHYSICAL]
    return node(place, "examples/node/train.mjs", *usual, *more)


def biases(place: Path, out: Path) -> np.ndarray[Any, Any]:
    return flat_biases(out / "biases.safetensors", place / "mlp")


def statement(out: Path) -> PrivacyStatement:
    return PrivacyStatement.load(out / "privacy.json", verify=True)


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2 and "    at " not in done.stderr, done.stderr
    for part in parts:
        assert part in done.stderr


def test_the_streams_of_a_key_are_pythons_bit_for_bit_and_its_normals_to_the_last_digits(place: Path) -> None:
    count, tails = 4000, [2.0**-54 * 1.7**i for i in range(70)]
    (place / "streams.mjs").write_text(f"""
        import {{ SecretKey, lowerNormalQuantile }} from "./examples/javascript/randomness.mjs";
        const key = await SecretKey.insecureForTests(7);
        const uniform = Array.from(await key.uniform("poisson sample", 5, {count}));
        const normal = Array.from(await key.normal("noise", 2 ** 40, {count}));
        console.log(JSON.stringify([uniform, normal, {json.dumps(tails)}.map(lowerNormalQuantile)]));
    """)
    uniform, normal, quantiles = (np.array(x) for x in json.loads(node(place, "streams.mjs").stdout))
    key = SecretKey.insecure_for_tests(7)
    assert np.array_equal(uniform, stream(key, "poisson sample", 5).uniform(count))
    np.testing.assert_allclose(normal, stream(key, "noise", 2**40).normal(count), rtol=2e-15, atol=1e-16)
    assert max(tails) < 0.5 < max(tails) * 1.7
    np.testing.assert_allclose(quantiles, ndtri(tails), rtol=4e-15)


def test_three_private_steps_under_one_key_end_where_pythons_do(place: Path, tmp_path: Path) -> None:
    seed = ("--insecure-seed-for-tests", 7)
    done = train(place, tmp_path / "node", "--steps", STEPS, *seed)
    assert done.returncode == 0 and "NO PRIVACY" in done.stderr, done.stderr
    with np.load(place / "mlp.npz") as records:
        trainer = OrtTrainer(
            place / "mlp", dict(records), steps=STEPS, target_delta=DELTA, physical_batch_size=PHYSICAL,
            insecure_seed_for_tests=7,
        )  # fmt: skip
    start = trainer.flat()
    sizes = [len(trainer.plan.sampler.draw(trainer.run.key, step)) for step in range(STEPS)]
    assert max(sizes) > PHYSICAL, "a draw takes several micro-batches"
    trainer.train()
    found = biases(place, tmp_path / "node")
    assert furthest(found, trainer.flat()) < 1e-5
    assert furthest(start, trainer.flat()) > 1e-3
    said = statement(tmp_path / "node")
    assert said.insecure and said.steps == STEPS and any("INSECURE" in text for text in said.numeric_caveats)
    assert train(place, tmp_path / "other", "--steps", STEPS, "--insecure-seed-for-tests", 8).returncode == 0
    assert furthest(biases(place, tmp_path / "other"), trainer.flat()) > 1e-3


def test_a_run_under_its_own_secret_key_is_stated_loads_into_the_model_and_never_repeats(
    place: Path, tmp_path: Path
) -> None:
    for out in ("one", "two"):
        done = train(place, tmp_path / out, "--steps", STEPS)
        assert done.returncode == 0 and not done.stderr, done.stderr
    assert furthest(biases(place, tmp_path / "one"), biases(place, tmp_path / "two")) > 1e-3
    one, two = statement(tmp_path / "one"), statement(tmp_path / "two")
    assert not one.insecure and one.run_id != two.run_id and one.as_prior_runs()[0].steps == STEPS
    sampler = PoissonSampler.from_expected_batch_size(ROWS, BATCH, steps=5)
    exact = epsilon(sampler, SIGMA, DELTA, steps=STEPS)
    assert exact <= one.epsilon < exact * 1.001
    shown = f"step 3 of 3: epsilon {np.ceil(one.epsilon * 1e4) / 1e4:.4f} of 8 at delta 0.001"
    assert done.stdout.splitlines()[-1] == shown
    model = compiled("mlp")[0].model
    dpb.load_biases(model, tmp_path / "one" / "biases.safetensors")
    for name, value in read_biases(tmp_path / "one" / "biases.safetensors")[0].items():
        assert np.array_equal(model.get_parameter(name).detach().numpy(), value), name
    refused(train(place, tmp_path / "one"), "EEXIST")


def test_a_step_that_draws_nobody_is_the_same_noisy_step(place: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.csv"
    one.write_text("\n".join((place / "mlp.csv").read_text().splitlines()[:2]) + "\n")
    rate = BATCH / ROWS

    def empty(seed: int) -> bool:
        key = SecretKey.insecure_for_tests(seed)
        return all(stream(key, "poisson sample", step).uniform(1)[0] >= rate for step in range(STEPS))

    seed = next(seed for seed in range(100) if empty(seed))
    done = train(place, tmp_path / "out", "--steps", STEPS, "--insecure-seed-for-tests", seed, table=one)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((place / "mlp" / "manifest.json").read_text())
    backend = PlainBackend(place / "mlp", manifest)
    for step in range(STEPS):
        noise = stream(SecretKey.insecure_for_tests(seed), "noise", step).normal(manifest["num_trainable"])
        backend.update(noise.astype(np.float32), manifest["optimizer"]["lr"])
    assert furthest(biases(place, tmp_path / "out"), backend.flat()) < 1e-5


@pytest.mark.parametrize("what", ["graph", "budget", "no budget", "other plan"])
def test_an_export_that_was_changed_or_has_no_budget_takes_no_step(what: str, place: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    shutil.copytree(place / "mlp", export)
    path, said = export / "manifest.json", json.loads((export / "manifest.json").read_text())
    if what == "graph":
        with (export / "grad_step.onnx").open("ab") as file:
            file.write(b"\0")
    elif what == "budget":
        (export / "budget.json").write_text((export / "budget.json").read_text().replace('"steps": 5', '"steps": 9'))
    elif what == "no budget":
        del said["files"]["budget.json"]
    else:
        said["noise_multiplier"] = 1.0
    path.write_text(json.dumps(said))
    reasons = {
        "graph": "grad_step.onnx was changed after the export",
        "budget": "budget.json was changed after the export",
        "no budget": "ort-budget",
        "other plan": "does not belong to this export",
    }
    refused(train(place, tmp_path / "out", export=export), reasons[what])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("cell", "reason"),
    [("secret", "Row 2: x_0 is not a number"), ("0.5,0.5", "Row 2 is not a regular row"), ("1e99", "Row 2: x_0")],
)
def test_a_bad_record_is_named_by_its_row_and_never_quoted(cell: str, reason: str, place: Path, tmp_path: Path) -> None:
    rows = (place / "mlp.csv").read_text().splitlines()
    rows[2] = ",".join([cell, *rows[2].split(",")[1:]])
    (tmp_path / "bad.csv").write_text("\n".join(rows))
    done = train(place, tmp_path / "out", table=tmp_path / "bad.csv")
    refused(done, reason)
    assert cell not in done.stderr + done.stdout


def test_a_label_beyond_the_classes_ends_the_run_without_being_quoted(place: Path, tmp_path: Path) -> None:
    rows = (place / "mlp.csv").read_text().splitlines()
    (tmp_path / "bad.csv").write_text("\n".join([rows[0], *(row[:-1] + "987654" for row in rows[1:])]))
    done = train(place, tmp_path / "out", table=tmp_path / "bad.csv")
    refused(done, "could not compute step", "nothing of it was released")
    assert "987654" not in done.stderr + done.stdout and not (tmp_path / "out").exists()


def test_no_more_steps_than_the_budget_allows_and_no_missing_column(place: Path, tmp_path: Path) -> None:
    refused(train(place, tmp_path / "out", "--steps", 6), "between 1 and 5")
    (tmp_path / "bad.csv").write_text("x_0,x_1,y\n1,2,0\n")
    refused(train(place, tmp_path / "out", table=tmp_path / "bad.csv"), "missing: x_2, x_3, x_4")


def test_npm_runs_no_script_of_a_package_and_pins_every_version() -> None:
    root = Path(__file__).resolve().parents[1] / "examples"
    for which in ("node", "browser"):
        assert "ignore-scripts=true" in (root / which / ".npmrc").read_text()
        versions = json.loads((root / which / "package.json").read_text())["dependencies"].values()
        assert all(version.replace(".", "").isdigit() for version in versions)
    assert not [p for p in root.rglob("package-lock.json") if "node_modules" not in p.parts], os.fspath(root)
