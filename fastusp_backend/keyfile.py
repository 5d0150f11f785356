"""The key file of a server: who has it may use the server's workers, and knows by it that this is the server.

It holds a secret, which both ends prove to each other that they have, and the server's certificate, the only one that a
client accepts. The certificate's private key lies beside it, in FILE.private, and stays on the server: so a client
cannot pass for the server.
"""

import os
import re
import secrets
import ssl
import stat
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from .command import run
from .errors import KeyFileError
from .user_folders import user_folder

_FIRST = "FastUSP key 1"
_SECRET = re.compile(r"^secret ([0-9a-f]{64})$", re.MULTILINE)
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n?", re.DOTALL)
_SECONDS = 30


def usual_path() -> Path:
    """Where a key file lies that nobody has named."""
    return user_folder("XDG_CONFIG_HOME", ".config") / "key"


@dataclass(frozen=True, slots=True)
class Key:
    """secret: 32 bytes. certificate: the server's, PEM."""

    path: Path
    secret: bytes = field(repr=False)
    certificate: str = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> "Key":
        """Raises KeyFileError where there is no key file, or others than its owner may read it."""
        text = _private_text(path)
        secret, certificate = _SECRET.search(text), _CERTIFICATE.search(text)
        if not text.startswith(_FIRST) or secret is None or certificate is None:
            raise KeyFileError(f"Copy the key file from the server again: {path} is none")
        return cls(path, bytes.fromhex(secret[1]), certificate[0])

    @classmethod
    def read_or_make(cls, path: Path) -> "Key":
        """For the server: a new one where there is none. Raises KeyFileError."""
        try:
            os.stat(path)
        except FileNotFoundError:
            _make(path)
        except OSError as error:
            raise KeyFileError(f"Name another file with --key: {path}: {error.strerror}") from error
        return cls.read(path)

    def server_context(self) -> ssl.SSLContext:
        """TLS for the server's end. Raises KeyFileError where the private key is not there, or another's."""
        private = _private_key(self.path)
        if not os.path.exists(private):
            raise KeyFileError(
                f"Name another file with --key, for one to be made, or of several machines, if this is not the first, "
                f"give --node-rank: {self.path} is another server's, since {private} is not there"
            )
        _private_text(private)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            context.load_cert_chain(self.path, private)
        except (OSError, ssl.SSLError) as error:
            raise KeyFileError(f"Remove {self.path} and {private}, for new ones to be made: {error}") from error
        return context

    def client_context(self) -> ssl.SSLContext:
        """TLS for a client's end, which must compare the certificate (`is_from`): no authority has signed it, and it
        names no host."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context

    def is_from(self, certificate: bytes | None) -> bool:
        """Whether this is the server's certificate, in DER."""
        return certificate == ssl.PEM_cert_to_DER_cert(self.certificate)


def _private_key(path: Path) -> Path:
    return path.with_name(f"{path.name}.private")


def _private_text(path: Path) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode) or mode & 0o077:
                raise KeyFileError(f"chmod 600 {path}: others than its owner may read it")
            return file.read(1 << 16)
    except OSError as error:
        raise KeyFileError(
            f"Copy the key file from the server (it prints where it lies) to {path}, or correct the path: it cannot be "
            f"read: {error.strerror}"
        ) from error


def _make(path: Path) -> None:
    """A secret and a certificate of its own, by the `openssl` command. Raises KeyFileError."""
    private, by_hand = _private_key(path), "or make the key file where there is one: python -m fastusp_backend serve"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Made here, for its owner alone: openssl writes into it.
        os.close(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        os.chmod(private, 0o600)
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        made = run([*command, "-days", "36500", "-subj", "/CN=fastusp", "-keyout", str(private)], _SECONDS)
        certificate = _CERTIFICATE.search(made.stdout)
        if made.returncode or certificate is None:
            told = (made.stderr.strip().splitlines() or ["no certificate"])[-1]
            raise KeyFileError(f"Install another openssl, {by_hand}: it failed: {told}")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w", encoding="ascii") as file:
            file.write(f"{_FIRST}\nsecret {secrets.token_hex(32)}\n{certificate[0]}")
    except FileNotFoundError as error:
        if error.filename != "openssl":
            raise KeyFileError(f"Name another file with --key: {path}: {error.strerror}") from error
        raise KeyFileError(f"Install the openssl command (apt install openssl), {by_hand}") from error
    except subprocess.TimeoutExpired as error:
        raise KeyFileError(f"Try again: openssl did not make a certificate within {_SECONDS} s") from error
    except OSError as error:
        raise KeyFileError(f"Name another file with --key: {path}: {error.strerror}") from error
