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


MAXIMAL_TEXT = 2000
"""Characters of a text that comes from a peer or a user and is passed on."""


def clipped(text: str, length: int = MAXIMAL_TEXT) -> str:
    """The text, or its beginning if it is too long to be passed on."""
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"


def refusal(rule: str, name: str, value: object, context: str = "") -> str:
    """The one form of every refusal: `expected <rule>, got <name=value> (<context>)`; long values are clipped."""
    tail = f" ({clipped(context)})" if context else ""
    return f"expected {clipped(rule)}, got {name}={clipped(str(value), 500)}{tail}"


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


class StorageError(DatpsError):
    """The disk is full or a file cannot be written; once that is mended, a new try can go on."""

    exit_code = EXIT_RETRY


class MismatchError(DatpsError):
    """Two peers disagree about protocol, job, layout or parameters."""

    exit_code = EXIT_MISMATCH


class CodecError(DatpsError):
    """A vector cannot be encoded or bytes cannot be decoded (NaN or infinity, wrong length, bad scale)."""

    exit_code = EXIT_MISMATCH
