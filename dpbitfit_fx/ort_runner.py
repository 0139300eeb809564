"""Train from exported artifacts, with onnxruntime and without PyTorch: `OrtTrainer`, and `dpbitfit ort-train` on top.

The runner draws the Poisson samples and the noise itself, from a key of the operating system's secure generator, keeps
the accounts, survives kill -9, and writes ``biases.safetensors`` (for ``load_biases`` on the PyTorch model) and
``privacy.json``. Before anything runs, the graphs are matched against the private template (``onnx_seal``). Needs numpy,
onnx, onnxruntime (onnxruntime-training-cpu for ``export_ort_training``'s artifacts), safetensors, cryptography, scipy and
dp-accounting; never torch.

``ort_artifacts`` files of an export · ``ort_backends`` one step of each runtime · ``ort_records``, ``ort_text`` the
user's data · ``ort_plan`` sampler, budget, step sizes · ``ort_run`` steps, journal, checkpoints · ``ort_evaluate`` public
scores · ``ort_cli`` the command.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpbitfit_fx.accounting import Prior, resolve_prior
from dpbitfit_fx.biases import save_biases
from dpbitfit_fx.checkpoint import CheckpointStore
from dpbitfit_fx.errors import ArtifactError, DPBitFitError, PrivacyError
from dpbitfit_fx.files import ensure_output_folder
from dpbitfit_fx.ledger import Ledger
from dpbitfit_fx.ort_artifacts import read_manifest
from dpbitfit_fx.ort_backends import Array, Backend, OrtTrainingBackend, PlainBackend, load_artifacts, pieces
from dpbitfit_fx.ort_device import check_device
from dpbitfit_fx.ort_plan import Plan, Schedule, plan_for
from dpbitfit_fx.ort_records import Records
from dpbitfit_fx.ort_run import Backends, OrtRun
from dpbitfit_fx.output_folder import BIASES, CHECKPOINT, naming_statements, settle, statements_in, write_statement
from dpbitfit_fx.privacy_statement import new_run_id
from dpbitfit_fx.progress import Progress, StepInfo
from dpbitfit_fx.randomness import SecretKey
from dpbitfit_fx.run_account import RunAccount

if TYPE_CHECKING:
    from dpbitfit_fx.privacy_statement import PrivacyStatement

__all__ = [
    "Backend",
    "OrtTrainer",
    "OrtTrainingBackend",
    "PlainBackend",
    "Plan",
    "Records",
    "Schedule",
    "StepInfo",
    "load_artifacts",
    "read_manifest",
]


class OrtTrainer:
    """Private training from an export, on records held in numpy: one class for both kinds of artifacts.

    Args:
        artifacts: folder written by ``export_ort_training`` or ``export_onnx``.
        data, pad_values: see ``Records``.
        steps or epochs, dataset_size, target_delta, target_epsilon, learning_rate, schedule, physical_batch_size: see
            ``ort_plan``; defaults are the export's. sample_rate is expected_batch_size / dataset_size. An export of several
            phases has its own steps, learning rates and schedules.
        padded_lengths: public lengths, where the export has a free one: each record is padded to the smallest that holds
            it; physical_batch_size is then one number, or one per length. Default: the export's.
        prior: privacy.json files or statements of earlier runs on the same records, composed exactly.
        ledger: as in ``fit``; ``close`` settles a run that is left before its end.
        output_dir: receives biases.safetensors, privacy.json and summary.md; while running, a private checkpoint
            folder, locked. Killed at any moment, the same call continues an unfinished run found there.
        checkpoint_every, resume, overwrite: as in ``fit``.
        device: "cpu", or "cuda" with an ONNX Runtime that has it: the sum, parameters and moments stay there.
        insecure_seed_for_tests: a known seed in place of a secret key: NO PRIVACY, recorded in privacy.json.

    Guarantee: (epsilon, delta)-DP for adding or removing one record, as ``finish`` states it in privacy.json. One noise
    vector per logical batch, from the operating system's secure generator; an empty draw takes a full noisy step.

    Raises:
        ArtifactError, CheckpointError, DataError, PrivacyError: before any step is taken.
    """

    def __init__(
        self,
        artifacts: str | os.PathLike[str],
        data: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        steps: int | None = None,
        epochs: float | None = None,
        dataset_size: int | None = None,
        target_delta: float | None = None,
        target_epsilon: float | None = None,
        learning_rate: float | None = None,
        schedule: Schedule | None = None,
        physical_batch_size: int | Sequence[int] = 32,
        padded_lengths: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
        pad_values: Mapping[str, float] | None = None,
        prior: Prior | Iterable[Prior] = (),
        ledger: Ledger | str | os.PathLike[str] | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 50,
        resume: bool = True,
        overwrite: bool = False,
        tuning_covered: bool = False,
        public_declarations: Mapping[str, Any] | None = None,
        device: str = "cpu",
        insecure_seed_for_tests: int | None = None,
    ) -> None:
        if type(checkpoint_every) is not int or checkpoint_every < 1:
            raise PrivacyError(f"checkpoint_every must be a positive number of steps; got {checkpoint_every!r}.")
        check_device(device)
        self.account = RunAccount(ledger)
        self.folder = Path(artifacts)
        self.manifest = read_manifest(self.folder)
        self.records = Records(self.manifest, data, pad_values, padded_lengths)
        self.records.check()
        self.checkpoint_every = checkpoint_every
        self.output_dir = None if output_dir is None else ensure_output_folder(output_dir)
        self.store: CheckpointStore | None = None
        if self.output_dir is not None:
            self.store = CheckpointStore(self.output_dir / CHECKPOINT, numpy=True).open()
        try:
            found: dict[str, PrivacyStatement] = {}
            if self.output_dir is not None and self.store is not None:
                settle(self.output_dir, self.store, resume=resume, overwrite=overwrite)
                found = statements_in(self.output_dir, self.store)
                unfinished = self.store.run_id if self.store.exists else None
                self.account.settle_given_up(self.output_dir, found.values(), unfinished)
            with naming_statements(self.output_dir, found):
                self.plan = plan_for(
                    self.manifest,
                    len(self.records),
                    padded_lengths=self.records.lengths,
                    steps=steps,
                    epochs=epochs,
                    dataset_size=dataset_size,
                    target_delta=target_delta,
                    target_epsilon=target_epsilon,
                    learning_rate=learning_rate,
                    schedule=schedule,
                    physical_batch_size=physical_batch_size,
                    prior=resolve_prior([*resolve_prior(prior), *found.values()]),
                )
            plan = self.plan
            own = self.store.run_id if self.store is not None and self.store.exists else new_run_id()
            self.account.check(
                plan.as_runs(own),
                dataset_size=plan.phases[0].sampler.dataset_size,
                run_delta=plan.target_delta,
                prior=plan.prior,
            )
            seed = insecure_seed_for_tests
            self.run = OrtRun(
                self.manifest,
                Backends(self.folder, self.manifest, device),
                self.records,
                self.plan,
                SecretKey() if seed is None else SecretKey.insecure_for_tests(seed),
                self.store,
                account=self.account,
                tuning_covered=tuning_covered,
                declared=dict(public_declarations or {}),
            )
            resumed = self.store is not None and self.store.exists
            if self.store is not None and resumed:
                self.run.restore(*self.store.load())
            else:
                self.run.save()
            try:
                self.run.reserve()
            except DPBitFitError:
                if self.store is not None and not resumed:
                    self.store.erase()  # nothing was begun
                raise
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> OrtTrainer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Settles the run in its ledger, and unlocks output_dir; an unfinished run stays there and can be continued."""
        self.account.stop(lambda: self.run.statement())
        if self.store is not None:
            self.store.close()

    @property
    def step(self) -> int:
        """Steps done."""
        return self.run.step

    @property
    def history(self) -> list[dict[str, Any]]:
        """One entry per evaluation: step, epsilon (an upper bound) and what ``eval_fn`` returned."""
        return self.run.history

    def train(
        self,
        steps: int | None = None,
        *,
        callbacks: Sequence[Callable[[StepInfo], None]] = (),
        eval_fn: Callable[[OrtTrainer], Mapping[str, float]] | None = None,
        progress: bool = False,
    ) -> int:
        """Take ``steps`` more logical steps (default: all that are left); returns how many are done. Never beyond the
        plan.

        Args:
            callbacks: called with a StepInfo after every step. progress: a bar once two seconds have passed.
            eval_fn: called at the end of every epoch and of the run, on data that the caller declares **public**; its
                numbers go to ``history``.
        """
        run = self.run
        if not self.account.open:
            run.reserve()  # closed before
        left = run.total - run.step
        if steps is not None and steps > left:
            raise PrivacyError(
                f"The plan has {left} steps left; {steps} were asked for. The budget was computed for the plan: make a "
                "new one."
            )
        goal = run.total if steps is None else run.step + steps
        bar = Progress(progress, run.step, run.total)
        try:
            while run.step < min(goal, run.total):
                before = run.step
                run.advance()
                if run.step == before:  # charged: the same step again, under a new key
                    continue
                spent, stage, done = run.spent(), run.stage, run.steps_in_phase
                if eval_fn is not None and (done % stage.per_epoch == 0 or run.phase_finished):
                    where = {"phase": run.phase} if len(self.plan.phases) > 1 else {}
                    run.history.append({"step": run.step, "epsilon": spent(), **where, **eval_fn(self)})
                for callback in callbacks:
                    callback(StepInfo(run.step, run.total, stage.rate(done - 1), spent, run.phase))
                bar.update(run.step, spent)
                if run.step % self.checkpoint_every == 0 and run.step < run.total:
                    run.save()
        except KeyboardInterrupt:
            saved = "" if self.store is None else " Running the same call again continues, at no extra cost."
            raise KeyboardInterrupt(f"Interrupted after {run.step} private steps.{saved}") from None
        finally:
            bar.close()
        return run.step

    def flat(self) -> Array:
        """The trained parameters, ``float32[D]``."""
        return self.run.flat()

    def biases(self) -> dict[str, Array]:
        """The trained parameters by their torch names."""
        return {name: piece.copy() for name, piece in pieces(self.manifest["parameters"], self.flat(), "name").items()}

    def statement(self) -> PrivacyStatement:
        """Of a run that stops here."""
        return self.run.statement()

    def finish(self, output: str | os.PathLike[str] | None = None) -> PrivacyStatement:
        """Write biases.safetensors, privacy.json and summary.md to output_dir (else to ``output``) and erase the key;
        training ends here.

        Raises:
            ArtifactError: the folder cannot be written; the run can be finished again.
        """
        if (output is None) == (self.output_dir is None):
            raise ArtifactError("Give the folder for the results once: as output_dir, or else to finish.")
        folder = self.output_dir if output is None else ensure_output_folder(output)
        assert folder is not None
        self.run.save()
        statement = self.account.settle(self.statement())
        about = {"graph_hash": statement.graph_hash, "run_id": statement.run_id}
        write_statement(folder, statement)
        save_biases(folder / BIASES, self.biases(), {**about, **self.manifest.get("fingerprints", {})})
        if self.store is not None:
            self.store.erase()
        self.run.key.erase()
        return statement
