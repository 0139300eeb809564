"""The processes of one run: all of torch.distributed, and all that travels between them but shards (:mod:`sharding`).

Rank 0 runs `fit` as a single process does: the key, the draw, the noise, the optimizer, every file and every decision are its
own. The other ranks compile the same step and lend it their processors. For each step rank 0 sends them the trained
parameters, the numbers of their share of the drawn records and what the loading of those is seeded with; they send back the
clipped sum over that share, and rank 0 adds the sums up in the order of ranks. So the draw, the noise and epsilon are those of
one process, no other rank ever holds the key, and nobody can be out of step with rank 0.

Each message of rank 0 is answered by one of the other rank, an error being one of the answers; the last one is not answered.
All of them go through a gloo group of this run alone, whatever the backend of the default group: gloo notices at once when a
process is gone, and the sum has to reach the CPU anyway, for the journal. No pickle: a message is JSON and safetensors.

With sharded weights all ranks also gather at once, while a message of rank 0 waits for its answer. Whoever stops leaves the group
of the shards first, which ends every gather; then the ranks say here which of them stopped, and why.

**Private:** the sums, the row numbers and the seeds travel in clear, as torch.distributed sends everything.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from dpbitfit_fx import errors
from dpbitfit_fx.arrays import pack, raw_bytes, unpack
from dpbitfit_fx.batching import PhysicalBatches, global_random_state_kept
from dpbitfit_fx.errors import DPBitFitError, RankError
from dpbitfit_fx.passes.torch_private import default_group_timeout
from dpbitfit_fx.sharding import FrozenShards, GatherBroken

if TYPE_CHECKING:
    from dpbitfit_fx.engine import Engine
    from dpbitfit_fx.randomness import SecretKey

__all__ = ["Ranks", "records_digest", "together", "torchrun_group"]

P = ParamSpec("P")
T = TypeVar("T")
_PARAMETER: Final = "parameter."
# Under torchrun no caller says how long an evaluation on rank 0 may keep the others waiting.
_TORCHRUN_PATIENCE: Final = timedelta(hours=2)
_in_a_run: ContextVar[bool] = ContextVar("in_a_run", default=False)


class Ranks:
    """One process among those of a run: rank 0, which leads, or one that helps. Without a group: the only one.

    Guarantee: what stops one rank stops all, with an error that names it; a rank that dies or disagrees is never left out of a
    sum. Where a rank is gone nothing is released that was not journaled.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank, self.count = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self._peers = range(1, self.count) if self.first else range(1)
        self._to_speak = set() if self.first else {0}  # the peers whose turn it is
        self._gone: set[int] = set()  # those with whom nothing more is said, or a message was begun and not ended
        self._told: DPBitFitError | None = None
        self._phase = -1
        self.shards: FrozenShards | None = None  # while the frozen weights are sharded

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.count > 1

    # -- before the first step ------------------------------------------------------------------------------------

    def settle(self, value: Any) -> Any:
        """Rank 0's `value` (of JSON), on every rank."""
        if not self.first:
            return self._receive(0)[0]["settled"]
        for rank in self._peers:
            self._send(rank, {"settled": value})
        return value

    def compare(self, describe: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What a replay depends on besides: the threads of every rank; nothing where there is one. Follows `settle`.

        describe: values that must be the same on every rank, by the name that an error gives them; not called for one.

        Raises:
            RankError: on rank 0, which stops the others: a rank disagrees. No value is told; a number of records may be private.
        """
        if not self.several:
            return {}
        own = {name: json.dumps(value, sort_keys=True) for name, value in describe().items()}
        if not self.first:
            self._send(0, {"threads": torch.get_num_threads(), "described": own})
            return {}
        threads, differing = [torch.get_num_threads()], []
        for rank in self._peers:
            content, _ = self._receive(rank)
            threads.append(content["threads"])
            theirs = content["described"]
            names = [name for name in {**own, **theirs} if own.get(name) != theirs.get(name)]
            if names:
                differing.append(f"rank {rank} in {', '.join(names)}")
        if differing:
            raise RankError(
                f"The processes of this run do not agree with rank 0: {'; '.join(differing)}. No step was taken. Call fit "
                "with the same arguments, records and frozen weights, and the same versions, in every process."
            )
        return {"ranks": threads}

    def at_once(self, work: Callable[[], T]) -> T:
        """What `work`, which gathers, gives when all ranks do it at once. Rank 0 has the word before and after."""
        if self.first:
            for rank in self._peers:
                self._send(rank, {})
        else:
            self._receive(0)
        done = work()
        if self.first:
            for rank in self._peers:
                self._receive(rank)
        else:
            self._send(0, {})
        return done

    # -- one step -------------------------------------------------------------------------------------------------

    def drawn_sum(
        self,
        engine: Engine,
        key: SecretKey,
        step: int,
        phase: int = 0,
        trainables: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """As ``Engine.drawn_sum``, computed by all ranks, each on its share of the draw.

        trainables: of all phases; sent whole at the first step of a phase, after that only what `engine` trains is.
        """
        if not self.several:
            return engine.drawn_sum(key, step)
        rows, secret = engine.drawn(key, step)
        values = engine.update.parameters() if phase == self._phase else trainables or {}
        for rank in self._peers:
            share = torch.tensor(self.share(rows, rank), dtype=torch.int64)
            self._send(rank, {"phase": phase, "secret": secret.hex()}, {"rows": share, **_named(values)})
        self._phase = phase
        total = engine.clipped_sum(self.share(rows, 0), secret)
        for rank in self._peers:
            total = total + self._receive(rank)[1]["sum"].to(total.device)
        return total

    def share(self, rows: Sequence[int], rank: int) -> Sequence[int]:
        """The records that a rank takes: each is in one share, and no share has two more than another."""
        return rows[rank :: self.count]

    def help(
        self, engines: Sequence[Engine], trainables: Mapping[str, torch.Tensor], begin: Callable[[], None]
    ) -> dict[str, Any]:
        """What the other ranks do: their shares, one after the other, until rank 0 has finished; then what it tells.

        engines: of each phase. trainables: of all; they follow rank 0's. begin: called once, before the first share.
        """
        while True:
            content, tensors = self._receive(0)
            begin()
            begin = _nothing
            with torch.no_grad():
                for name, value in tensors.items():
                    if name.startswith(_PARAMETER):
                        trainables[name.removeprefix(_PARAMETER)].copy_(value)
            if "whole" in content:
                assert self.shards is not None
                self.shards.give_back(to_all=content["whole"] == "all")
                self._send(0, {})
                continue
            if "finished" in content:
                self._gone.add(0)
                finished: dict[str, Any] = content["finished"]
                return finished
            secret = bytes.fromhex(content["secret"])
            partial = engines[content["phase"]].clipped_sum(tensors["rows"].tolist(), secret)
            self._send(0, {}, {"sum": partial})

    def give_back(self, to_all: bool = True) -> None:
        """Rank 0's, and in :meth:`help` the others': the model has its frozen weights whole again; on rank 0, or on all."""
        if self.shards is None:
            return
        for rank in self._peers:
            self._send(rank, {"whole": "all" if to_all else "first"})
        self.shards.give_back(to_all)
        for rank in self._peers:
            self._receive(rank)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, rank 0's model has its frozen weights whole."""
        self.give_back(to_all=False)
        try:
            yield
        finally:
            if self.shards is not None:
                self.shards.free()

    # -- the end --------------------------------------------------------------------------------------------------

    def finish(self, told: Mapping[str, Any], trainables: Mapping[str, torch.Tensor]) -> None:
        """Rank 0's last message: `told` (of JSON) and the trained values. The run is whole without a rank that is gone."""
        for rank in self._peers:
            try:
                self._send(rank, {"finished": told}, _named(trainables))
            except RankError as error:
                warnings.warn(f"{error} The run was finished without it.", stacklevel=2)
            self._gone.add(rank)

    def stop(self, error: BaseException) -> BaseException:
        """Tells the others why this rank stops, and waits for nobody who cannot hear it. What stopped the run: where a gather
        broke, that is another rank's error, if one of them says so."""
        if self.shards is not None:
            self.shards.leave()
        broken = isinstance(error, GatherBroken)
        if broken and not self.first:
            try:
                self._send(0, {"broken": True})  # rank 0 hears the others first
                self._receive(0)
            except DPBitFitError as told:
                return told
        cause = error
        for rank in self._peers:
            if rank in self._to_speak and rank not in self._gone:
                try:
                    self._receive(rank)
                except DPBitFitError as told:
                    cause = told if broken and cause is error and not isinstance(told, GatherBroken) else cause
        kind, text = _said(cause)
        text = text if cause is self._told else f"Rank {self.rank} stopped the run: {text}"
        for rank in self._peers:
            with contextlib.suppress(DPBitFitError):
                if rank not in self._gone:
                    self._send(rank, {"stopped": [kind, text]})
                    self._gone.add(rank)
        return cause

    # -- messages -------------------------------------------------------------------------------------------------

    def _send(self, rank: int, content: dict[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        head, body = json.dumps(content).encode(), pack({n: _travelling(x) for n, x in (tensors or {}).items()})
        payload = torch.frombuffer(bytearray(head + body), dtype=torch.uint8)
        with self._speaking(rank):
            dist.send(torch.tensor([len(head), len(body)]), rank, self._group)
            dist.send(payload, rank, self._group)
            self._to_speak.add(rank)

    def _receive(self, rank: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Raises what the other rank stopped with, or RankError where it is gone."""
        sizes = torch.zeros(2, dtype=torch.int64)
        with self._speaking(rank):
            dist.recv(sizes, rank, self._group)
            head, body = sizes.tolist()
            payload = torch.empty(head + body, dtype=torch.uint8)
            dist.recv(payload, rank, self._group)
            self._to_speak.discard(rank)
        data = raw_bytes(payload)
        content: dict[str, Any] = json.loads(data[:head])
        if "stopped" in content:
            self._gone.add(rank)
            kind, text = content["stopped"]
            self._told = (getattr(errors, kind) if kind in errors.__all__ else RankError)(text)
            raise self._told
        if "broken" in content:
            raise GatherBroken
        return content, unpack(data[head:], tensors=True)

    @contextlib.contextmanager
    def _speaking(self, rank: int) -> Iterator[None]:
        """Inside, a message is under way: whatever ends it early, a Ctrl-C too, leaves a rank that is not spoken to again."""
        if rank in self._gone:
            raise RankError(f"Rank {rank} is gone.")
        self._gone.add(rank)
        try:
            yield
        except RuntimeError:  # gloo's, which names addresses and says nothing of ranks
            raise RankError(
                f"Rank {rank} is gone: its process ended or left the run, or was silent for longer than the timeout of the "
                "process group. The run stopped; where it has an output_dir, the same call in all processes continues it."
            ) from None
        self._gone.discard(rank)


def _nothing() -> None:
    pass


def _named(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {_PARAMETER + name: value for name, value in values.items()}


def _travelling(value: torch.Tensor) -> torch.Tensor:
    return value.detach().cpu().contiguous()


def _said(error: BaseException) -> tuple[str, str]:
    """The class of an error, where it is one of ours, and what may be told of it."""
    if isinstance(error, DPBitFitError):
        return type(error).__name__, str(error)
    if isinstance(error, KeyboardInterrupt):
        return "", "it was interrupted. Where the run has an output_dir, the same call in all processes continues it."
    return "", f"{type(error).__name__}. Its message is withheld because it may quote a record; that process shows it."


def records_digest(batches: PhysicalBatches, count: int = 16) -> list[str]:
    """SHA-256 of some records, spread over the dataset; a record that is not the same twice in one process tells nothing."""

    def digest(row: int) -> str:
        bucket, values = batches.load(row, bytes(32))
        content = [f"{bucket} {n} {x.dtype} {list(x.shape)}".encode() + raw_bytes(x) for n, x in sorted(values.items())]
        return hashlib.sha256(b"".join(content)).hexdigest()

    size = len(batches.dataset)
    found = []
    with global_random_state_kept():
        for row in sorted({number * (size - 1) // max(1, count - 1) for number in range(count)}):
            once = digest(row)
            found.append(once if once == digest(row) else "varies")
    return found


# -- joining -----------------------------------------------------------------------------------------------------------


def together(function: Callable[Concatenate[Ranks, P], T]) -> Callable[P, T]:
    """The function for callers: in each process of the default group, where there is one, it gets that process's Ranks."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with _joined() as ranks:
            return function(ranks, *args, **kwargs)

    signature = inspect.signature(function)
    call.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]
    return call


@contextlib.contextmanager
def _joined() -> Iterator[Ranks]:
    """Inside, the processes of the default group are one run's. A `fit` inside of a run, in a callback, is alone."""
    if _in_a_run.get() or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        yield Ranks()
        return
    try:
        group = dist.new_group(backend="gloo", timeout=default_group_timeout())
    except RuntimeError as error:
        raise RankError(
            "The processes of the default process group could not join for this run. Call fit in every one of them, and in a "
            "single process before init_process_group or after destroy_process_group."
        ) from error
    ranks, inside = Ranks(group), _in_a_run.set(True)
    try:
        with contextlib.ExitStack() as quiet:
            if not ranks.first:  # rank 0 says the same
                quiet.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            yield ranks
    except BaseException as error:
        cause = ranks.stop(error)
        if cause is not error:
            raise cause from None
        raise
    finally:
        _in_a_run.reset(inside)
        if ranks.shards is not None:
            ranks.shards.leave()
        # Closes the connections, so that no rank waits for this one.
        dist.destroy_process_group(group)
        ranks._group = group = None


@contextlib.contextmanager
def torchrun_group() -> Iterator[bool]:
    """Inside, the processes that torchrun started are the default group. Yields whether this is the first, or the only one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available() or not dist.is_torchelastic_launched():
        yield True
        return
    dist.init_process_group("gloo", timeout=_TORCHRUN_PATIENCE)
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()
