"""The secret key and its streams: the right law, replayable, independent, and never shown."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats  # type: ignore[import-untyped, unused-ignore]

from dpbitfit_fx import randomness
from dpbitfit_fx.errors import ArtifactError, PrivacyError
from dpbitfit_fx.randomness import SecretKey, stream

KEY = SecretKey.insecure_for_tests(0)


def test_normals_pass_a_ks_test_for_their_scale_and_fail_it_for_two_thirds_and_three_halves() -> None:
    values = stream(KEY, "noise", 3).normal(20_000)
    assert stats.kstest(values, "norm").pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(values * wrong, "norm").pvalue < 1e-12


def test_normals_have_the_moments_and_the_tails_of_a_normal() -> None:
    values = stream(KEY, "noise", 4).normal(1_000_000)
    assert abs(values.mean()) < 5e-3
    assert abs(values.var() - 1) < 7e-3
    assert abs(stats.kurtosis(values)) < 0.025
    beyond = int((np.abs(values) > 3).sum())
    assert stats.binomtest(beyond, values.size, 2 * stats.norm.sf(3)).pvalue > 1e-4


def test_the_extreme_words_give_finite_symmetric_normals_at_the_stated_tail_bound() -> None:
    words = np.array([0, 1, 2**64 - 1, 2**64 - 2], dtype="<u8")
    extreme = _from_words(words).normal(4)
    assert np.isfinite(extreme).all()
    assert extreme[0] == -extreme[1] and abs(extreme[0]) == pytest.approx(8.29, abs=0.005)
    assert 0 < abs(extreme[2]) < 1e-15 and extreme[2] == -extreme[3]
    assert "8.29" in randomness.TAIL_CAVEAT


def test_the_extreme_words_give_uniforms_strictly_inside_zero_and_one() -> None:
    extreme = _from_words(np.array([0, 2**64 - 1], dtype="<u8")).uniform(2)
    assert 0 < extreme[0] < extreme[1] < 1


class _Words(randomness.Stream):
    """A stream of given words, to reach values that no test would draw."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def bytes(self, count: int) -> bytes:
        assert count == len(self._data)
        return self._data


def _from_words(words: npt.NDArray[np.uint64]) -> randomness.Stream:
    return _Words(words.tobytes())


def test_uniforms_are_uniform_and_a_skewed_sample_is_told_apart() -> None:
    values = stream(KEY, "uniform", 0).uniform(50_000)
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert stats.kstest(values**1.05, "uniform").pvalue < 1e-6


def test_the_same_key_purpose_and_step_replay_bit_for_bit_in_whatever_pieces() -> None:
    whole = stream(KEY, "noise", 7).normal(1000)
    pieces = stream(KEY, "noise", 7)
    again = np.concatenate([pieces.normal(n) for n in (1, 0, 499, 500)])
    assert whole.tobytes() == again.tobytes()
    reloaded = SecretKey.from_bytes(KEY.export_secret(), insecure=True)
    assert stream(reloaded, "noise", 7).normal(1000).tobytes() == whole.tobytes()


def test_the_numbers_of_a_known_seed_stay_the_same_from_version_to_version() -> None:
    # A change here makes every checkpoint in the field unable to replay its step.
    assert stream(KEY, "noise", 0).bytes(16).hex() == "e3e70811082ef9431e40b2060b8fd884"


def test_streams_of_other_keys_purposes_and_steps_share_no_word_and_do_not_correlate() -> None:
    keys = [KEY, SecretKey.insecure_for_tests(1), KEY.renewed()]
    triples = list(itertools.product(keys, ("noise", "sample", "noise\x00", "noise0"), (0, 1, 256, 2**40)))
    drawn = np.stack([stream(*triple).normal(2000) for triple in triples])
    assert np.unique(drawn).size == drawn.size
    correlation = np.asarray(np.corrcoef(drawn))[np.triu_indices(len(triples), 1)]
    # 1128 pairs, each of standard deviation 1/sqrt(2000): 5.5 of them would be beyond chance.
    assert np.abs(correlation).max() < 5.5 / np.sqrt(2000)


def test_fresh_keys_differ_and_are_secure() -> None:
    keys = [SecretKey() for _ in range(50)]
    assert len({key.export_secret() for key in keys}) == 50
    assert not any(key.insecure for key in keys)
    assert len(keys[0].export_secret()) == 32


def test_a_renewed_key_is_another_one_and_an_insecure_key_stays_insecure() -> None:
    secure = SecretKey()
    assert not secure.renewed().same_as(secure) and not secure.renewed().insecure
    assert not secure.renewed().same_as(secure.renewed())
    assert KEY.renewed().insecure and not KEY.renewed().same_as(KEY)
    assert KEY.renewed().same_as(KEY.renewed())


def test_a_key_never_shows_its_bytes_and_cannot_be_pickled_or_copied() -> None:
    key = SecretKey()
    secret = key.export_secret()
    for text in (repr(key), str(key), f"{key}", repr([key])):
        assert secret.hex() not in text and repr(secret)[2:-1] not in text
    assert "INSECURE" in repr(KEY)
    for copier in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(PrivacyError, match="cannot be pickled"):
            copier(key)


def test_a_saved_key_is_private_and_loads_back(tmp_path: Path) -> None:
    for key in (SecretKey(), KEY):
        key.save(tmp_path / "key")
        assert os.stat(tmp_path / "key").st_mode & 0o777 == 0o600
        loaded = SecretKey.load(tmp_path / "key")
        assert loaded.same_as(key) and loaded.insecure == key.insecure


def test_a_key_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    SecretKey().save(tmp_path / "key")
    os.chmod(tmp_path / "key", 0o644)
    with pytest.raises(PrivacyError, match="other users"):
        SecretKey.load(tmp_path / "key")
    assert not SecretKey.load(tmp_path / "key", require_private=False).insecure


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{",
        '{"format": "dpbitfit_fx.secret_key.v1"}',
        "deadbeef" * 8,
        '{"format": "dpbitfit_fx.secret_key.v1", "insecure": false, "key": "deadbeef"}',
    ],
)
def test_a_damaged_key_file_is_refused_without_quoting_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "key").write_text(text)
    os.chmod(tmp_path / "key", 0o600)
    with pytest.raises(PrivacyError, match="damaged") as caught:
        SecretKey.load(tmp_path / "key")
    assert "deadbeef" not in str(caught.value)


def test_an_absent_key_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        SecretKey.load(tmp_path / "key")


def test_an_erased_key_is_gone_from_memory_and_disk_and_cannot_be_used(tmp_path: Path) -> None:
    key = SecretKey()
    key.save(tmp_path / "key")
    # A hard link still shows the old blocks: they must have been overwritten, not only unlinked.
    os.link(tmp_path / "key", tmp_path / "link")
    SecretKey.erase_file(tmp_path / "key")
    SecretKey.erase_file(tmp_path / "key")
    assert not (tmp_path / "key").exists()
    assert key.export_secret().hex().encode() not in (tmp_path / "link").read_bytes()
    key.erase()
    assert key.erased and "erased" in repr(key)
    for use in (key.export_secret, key.renewed, lambda: key.save(tmp_path / "k"), lambda: stream(key, "noise", 0)):
        with pytest.raises(PrivacyError, match="erased"):
            use()


@pytest.mark.parametrize(
    ("purpose", "step"), [("", 0), ("x" * 201, 0), ("noise", -1), ("noise", 2**63), ("noise", True)]
)
def test_unusable_stream_names_are_refused(purpose: str, step: int) -> None:
    with pytest.raises(PrivacyError):
        stream(KEY, purpose, step)


def test_the_noise_of_a_step_of_forty_two_thousand_biases_takes_milliseconds() -> None:
    times = []
    for step in range(15):
        start = time.process_time()
        stream(KEY, "noise", step).normal(42_000)
        times.append(time.process_time() - start)
    assert sorted(times)[len(times) // 2] < 0.05
