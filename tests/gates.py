"""Gates for tests, from one flat set of fields."""

from dataclasses import fields, replace
from typing import Any

from whisper_steer.gate import Gate
from whisper_steer.probe import Probe

_PROBE = {field.name for field in fields(Probe)}


def one_probe_gate(**values: Any) -> Gate:
    """A gate with a single probe: its fields and the probe's together."""
    probe = Probe(**{name: value for name, value in values.items() if name in _PROBE})
    return Gate((probe,), **{name: value for name, value in values.items() if name not in _PROBE})


def changed_gate(gate: Gate, **changes: Any) -> Gate:
    """A one-probe gate with some fields of it, or of its probe, replaced."""
    probe = replace(gate.probes[0], **{name: value for name, value in changes.items() if name in _PROBE})
    rest = {name: value for name, value in changes.items() if name not in _PROBE}
    return replace(gate, probes=(probe,), **rest)
