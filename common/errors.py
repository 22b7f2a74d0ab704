"""Errors that a user or a peer can cause, each with the exit code of the process that meets it.

Exit codes are a contract (see README): 2 usage or job spec, 65 unusable checkpoint, 75 worth a retry, 76 protocol
or layout mismatch, 77 not authorized.
"""

from __future__ import annotations

EXIT_COMPLETE = 0
EXIT_USAGE = 2
EXIT_CHECKPOINT = 65
EXIT_RETRY = 75
EXIT_MISMATCH = 76
EXIT_NOT_AUTHORIZED = 77
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


def refusal(rule: str, name: str, value: object, context: str = "") -> str:
    """The one form of every refusal: `expected <rule>, got <name=value> (<context>)`."""
    tail = f" ({context})" if context else ""
    return f"expected {rule}, got {name}={value}{tail}"


class DatpsError(Exception):
    """Base of all errors whose message is meant for the user; never shown with a traceback."""

    exit_code = EXIT_USAGE


class SpecError(DatpsError):
    """A key or value of the job spec, a flag or a local path breaks its rule."""

    exit_code = EXIT_USAGE


class DataError(DatpsError):
    """A data set is missing, unreadable or does not fit the job."""

    exit_code = EXIT_USAGE


class CheckpointError(DatpsError):
    """A checkpoint is cut off, damaged or belongs to another model or job."""

    exit_code = EXIT_CHECKPOINT


class PeerLostError(DatpsError):
    """A server or another worker is gone or did not answer in time; a new try can succeed."""

    exit_code = EXIT_RETRY


class MismatchError(DatpsError):
    """Two peers disagree about protocol, job, layout or parameters."""

    exit_code = EXIT_MISMATCH


class CodecError(DatpsError):
    """A vector cannot be encoded or bytes cannot be decoded (NaN or infinity, wrong length, bad scale)."""

    exit_code = EXIT_MISMATCH
