"""What every refusal looks like."""

from collections.abc import Callable

import pytest

from fastsd.errors import InputError


def refusal(call: Callable[[], object]) -> str:
    """The message of the InputError of `call`: one sentence on one line."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert not message.endswith(".")
    assert ": " in message  # what is wrong: what would be right
    return message
