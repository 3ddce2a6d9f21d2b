import pytest

from whisper_steer import errors

CHILDREN = ["UsageError", "AudioError", "ModelError", "FormatError", "MismatchError"]


@pytest.mark.parametrize("name", CHILDREN)
def test_every_error_has_the_one_root(name):
    assert issubclass(getattr(errors, name), errors.WhisperSteerError)


def test_exit_codes():
    codes = {name: getattr(errors, name).exit_code for name in ["WhisperSteerError", *CHILDREN]}
    assert codes == {
        "WhisperSteerError": 1,
        "UsageError": 2,
        "AudioError": 1,
        "ModelError": 1,
        "FormatError": 1,
        "MismatchError": 1,
    }


def test_a_usage_error_is_a_value_error():
    with pytest.raises(ValueError, match="alpha"):
        raise errors.UsageError("alpha is -1")
