"""Secret keys and the cryptographic streams drawn from them: Poisson draws and Gaussian noise.

One 32-byte key, from the operating system, decides every random choice of a private run. A stream is named by
``(key, purpose, step)``: HKDF-SHA256 derives an AES-256 key for that triple alone, and AES-256 in counter mode gives
the bytes. So a killed run replays its step bit for bit, and no two purposes, steps or keys share bytes.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
from pathlib import Path
from typing import Final, NoReturn

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from scipy.special import ndtri  # type: ignore[import-untyped, unused-ignore]

from dpbitfit_fx.errors import PrivacyError
from dpbitfit_fx.files import atomic_write_text, describe_os_error, json_digest, read_text
from dpbitfit_fx.passes.numerics import slack

KEY_BYTES: Final = 32
MAX_STEP: Final = 2**63 - 1
_FORMAT: Final = "dpbitfit_fx.secret_key.v2"
_DOMAIN: Final = b"dpbitfit_fx/randomness/v1"
_INFO_BYTES: Final = 256

NOISE_SOURCE: Final = (
    "AES-256 in counter mode, keyed by HKDF-SHA256 from a 32-byte key of the operating system's secure generator, one "
    "stream per purpose and step."
)
TAIL_CAVEAT: Final = (
    "Noise is the inverse normal distribution function, in float64, of a uniform with 53 random bits (one for the "
    "sign): the tail beyond 8.29 standard deviations (probability about 1.1e-16 a coordinate) is never drawn, and the "
    "values form a grid that is coarse near its ends."
)
FINITE_PRECISION_CAVEAT: Final = (
    "The guarantee is proved for real-number arithmetic. Clipped sums and noise are added in floating point, not by a "
    "discrete mechanism: the least significant bits of an output may depend on the data (Mironov, CCS 2012), and "
    "epsilon does not count that."
)
SLACK_CAVEAT: Final = (
    "Float32 rounding lets one record move a clipped sum by up to max_grad_norm * (1 + slack); the noise's standard "
    "deviation is noise_multiplier * max_grad_norm * (1 + slack), so epsilon counts it. The slack, {slack:.3g} here, is "
    "several times what was measured, not a proof, and takes a record's gradient to be the same bits whatever stands "
    "beside it in its batch."
)
GRID_CAVEAT: Final = (
    "noise='grid': every clipped gradient is rounded, never up, to whole multiples of 2**-24 of the noise's standard "
    "deviation in float64, where their sums are exact; the noise is a normal rounded to the same grid, sampled exactly "
    "(Karney 2016). What is released is a rounding of the real Gaussian mechanism, so its low bits tell no more than "
    "epsilon counts. Assumed: a record's gradient is the same bits whatever stands beside it in its batch and wherever "
    "it stands (tried on the example batch; nothing to assume where a physical batch holds one record)."
)
SAMPLING_CAVEAT: Final = (
    "Poisson sampling compares a 53-bit uniform with sample_rate: "
    "a record's probability exceeds it by less than 2**-53."
)
INSECURE_CAVEAT: Final = (
    "INSECURE: the noise came from a known seed (insecure_for_tests). "
    "There is no privacy guarantee, whatever epsilon says."
)


def numeric_caveats(insecure: bool, expected_batch_size: float, noise: str = "float") -> tuple[str, ...]:
    """The sentences on randomness and arithmetic that belong in privacy.json, the insecure one first where it holds.

    expected_batch_size: of the phase with the largest draws, whose slack is the largest. noise: "float" or "grid".
    """
    charged = SLACK_CAVEAT.format(slack=slack(expected_batch_size))
    arithmetic = (GRID_CAVEAT,) if noise == "grid" else (TAIL_CAVEAT, FINITE_PRECISION_CAVEAT, charged)
    caveats = (NOISE_SOURCE, *arithmetic, SAMPLING_CAVEAT)
    return (INSECURE_CAVEAT, *caveats) if insecure else caveats


class SecretKey:
    """Thirty-two secret bytes. Whoever learns them can subtract the noise: never log, print or pickle one.

    Guarantee: ``repr``, ``str``, exceptions and pickling never show the bytes; files are created with mode 0600.
    ``erase`` overwrites what this object and its file hold. Python may have made copies, and SSDs and snapshots keep
    old blocks: erasing is best effort.
    """

    __slots__ = ("_bytes", "_erased", "_insecure")

    def __init__(self) -> None:
        """A fresh key from the operating system's secure generator."""
        self._bytes = bytearray(secrets.token_bytes(KEY_BYTES))
        self._insecure = False
        self._erased = False

    @classmethod
    def generate(cls) -> SecretKey:
        """A fresh key from the operating system's secure generator."""
        return cls()

    @classmethod
    def insecure_for_tests(cls, seed: int) -> SecretKey:
        """A key that everyone can compute from ``seed``: NO PRIVACY. ``insecure`` is True and privacy.json records
        it."""
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise PrivacyError(f"An insecure test seed must be an integer, not {type(seed).__name__}.")
        info = b"INSECURE test seed " + str(seed).encode()
        return cls.from_bytes(_hkdf(b"\x00" * KEY_BYTES, info), insecure=True)

    @classmethod
    def from_bytes(cls, secret: bytes, insecure: bool = False) -> SecretKey:
        """A key from 32 bytes made by ``export_secret``. Bytes from anywhere else void the guarantee."""
        if len(secret) != KEY_BYTES:
            raise PrivacyError(f"A secret key has {KEY_BYTES} bytes; {len(secret)} were given. Use SecretKey().")
        key = cls.__new__(cls)
        key._bytes = bytearray(secret)
        key._insecure = insecure
        key._erased = False
        return key

    @property
    def insecure(self) -> bool:
        """True where the key comes, directly or by ``renewed``, from ``insecure_for_tests``."""
        return self._insecure

    @property
    def erased(self) -> bool:
        return self._erased

    def export_secret(self) -> bytes:
        """The secret bytes, for a private checkpoint file (mode 0600) and nothing else."""
        self._require()
        return bytes(self._bytes)

    def renewed(self) -> SecretKey:
        """The next key, for redrawing a step that cannot be replayed; the caller charges the lost step and erases this
        one.

        A secure key is renewed from the operating system; an insecure one deterministically, and stays insecure.
        """
        self._require()
        if self._insecure:
            return SecretKey.from_bytes(_hkdf(bytes(self._bytes), b"next key"), insecure=True)
        return SecretKey()

    def same_as(self, other: SecretKey) -> bool:
        """Whether both hold the same bytes, compared in constant time."""
        return hmac.compare_digest(self.export_secret(), other.export_secret())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the key, atomically, to a file that only its owner may read (mode 0600).

        Raises:
            ArtifactError: the file cannot be written; the previous file is unchanged.
        """
        self._require()
        content = {"format": _FORMAT, "insecure": self._insecure, "key": bytes(self._bytes).hex()}
        atomic_write_text(path, json.dumps(content | {"check": json_digest(content)[:16]}) + "\n", mode=0o600)

    @classmethod
    def load(cls, path: str | os.PathLike[str], require_private: bool = True) -> SecretKey:
        """Read a key written by ``save``.

        Args:
            path: the key file.
            require_private: refuse a file that others may read (POSIX only); turn off for file systems without modes.

        Raises:
            ArtifactError: the file is absent or unreadable.
            PrivacyError: others may read it, or it is not a key file. No message quotes the file's contents.
        """
        text = read_text(path)
        if require_private and os.name == "posix" and os.stat(path).st_mode & 0o077:
            raise PrivacyError(
                f"The secret key file {os.fspath(path)!r} can be read by other users of this machine, so the noise "
                "it gave may be known to them. If you are sure it was not read, run `chmod 600` on it and try again."
            )
        damaged = PrivacyError(
            f"{os.fspath(path)!r} is not a secret key file of dpbitfit_fx, or is damaged. A step that was drawn from "
            "it cannot be replayed: it has to be charged and redrawn under a new key."
        )
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            raise damaged from None
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise damaged
        if content.pop("check", None) != json_digest(content)[:16]:
            raise damaged
        secret, insecure = content.get("key"), content.get("insecure")
        if not isinstance(secret, str) or not isinstance(insecure, bool):
            raise damaged
        try:
            raw = bytes.fromhex(secret)
        except ValueError:
            raise damaged from None
        if len(raw) != KEY_BYTES:
            raise damaged
        return cls.from_bytes(raw, insecure=insecure)

    def erase(self) -> None:
        """Overwrite the bytes in memory; every later use of this object is an error."""
        for index in range(KEY_BYTES):
            self._bytes[index] = 0
        self._erased = True

    @staticmethod
    def erase_file(path: str | os.PathLike[str]) -> None:
        """Overwrite a key file in place, sync and delete it; an absent file is no error.

        Raises:
            PrivacyError: the file is there and could not be overwritten or deleted.
        """
        target = Path(path)
        try:
            size = target.stat().st_size
            descriptor = os.open(target, os.O_WRONLY)
            try:
                remaining = os.urandom(size)
                while remaining:
                    remaining = remaining[os.write(descriptor, remaining) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            target.unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            raise PrivacyError(
                describe_os_error(error, path, "erase the secret key file")
                + " Until it is deleted, whoever reads it can take the noise out of the result."
            ) from error

    def _require(self) -> None:
        if self._erased:
            raise PrivacyError("This secret key was erased at the end of its run and cannot be used again.")

    def __repr__(self) -> str:
        state = "erased" if self._erased else "INSECURE, for tests" if self._insecure else "secret"
        return f"SecretKey({state})"

    def __reduce__(self) -> NoReturn:
        raise PrivacyError("A secret key cannot be pickled or copied. Use save() and load().")


def _hkdf(secret: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=_DOMAIN, info=info).derive(secret)


class Stream:
    """The random numbers of one ``(key, purpose, step)``, in a fixed order: asking for n then m equals asking for n +
    m.

    Eight bytes of keystream a number. The stream is read once; make it again to replay it.
    """

    __slots__ = ("_encryptor",)

    def __init__(self, derived_key: bytes) -> None:
        # A zero counter is safe: the derived key is used for this stream alone.
        self._encryptor = Cipher(algorithms.AES(derived_key), modes.CTR(b"\x00" * 16)).encryptor()

    def bytes(self, count: int) -> bytes:
        """The next ``count`` bytes of the keystream."""
        return self._encryptor.update(b"\x00" * _count(count))

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """``uint64[count]`` of independent uniform bits."""
        # Little-endian whatever the machine, so that a run resumes elsewhere with the same numbers.
        return np.frombuffer(self.bytes(8 * _count(count)), dtype="<u8").astype(np.uint64, copy=False)

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """``float64[count]`` uniforms strictly inside (0, 1): k / 2**53 with k of 53 bits, and 2**-54 in place of 0.

        For a probability q, P(u < q) lies in [q, q + 2**-53).
        """
        integers = (self.words(count) >> np.uint64(11)).astype(np.float64)
        values: npt.NDArray[np.float64] = np.maximum(integers, 0.5) * 2.0**-53
        return values

    def normal(self, count: int) -> npt.NDArray[np.float64]:
        """``float64[count]`` standard normals: 52 bits of magnitude by ``scipy.special.ndtri``, one bit of sign.

        Taking the quantile in the lower half only keeps full precision in both tails and the law exactly symmetric.
        No value exceeds 8.3 in magnitude (``TAIL_CAVEAT``).
        """
        words = self.words(count)
        lower_half = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-53
        magnitude = -ndtri(lower_half)
        values: npt.NDArray[np.float64] = np.where(words & np.uint64(1), magnitude, -magnitude)
        return values


def _count(count: int) -> int:
    if count < 0:
        raise PrivacyError(f"A stream cannot give {count} numbers; ask for zero or more.")
    return count


def stream(key: SecretKey, purpose: str, step: int) -> Stream:
    """The stream of ``(key, purpose, step)``: always the same numbers, independent of every other triple's.

    Args:
        key: the run's secret key.
        purpose: what the numbers are for ("sample", "noise"): at most 200 bytes of UTF-8, not empty.
        step: the logical step, 0 or more.

    Raises:
        PrivacyError: the key was erased, or purpose or step are not usable.
    """
    name = purpose.encode("utf-8")
    if not name or len(name) > 200:
        raise PrivacyError("The purpose of a random stream must be 1 to 200 bytes of text.")
    if isinstance(step, bool) or not 0 <= step <= MAX_STEP:
        raise PrivacyError(f"The step of a random stream must be between 0 and 2**63 - 1; got {step}.")
    # Fixed-length fields: no two (purpose, step) pairs encode alike.
    info = len(name).to_bytes(2, "big") + name.ljust(_INFO_BYTES, b"\x00") + int(step).to_bytes(8, "big")
    return Stream(_hkdf(key.export_secret(), info))
