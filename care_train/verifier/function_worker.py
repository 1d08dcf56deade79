"""The process of one user's reward function, started by `function_process.py`."""

import pickle
import traceback
from typing import Any

from care_train.verifier.child import Parent
from care_train.verifier.functions import UserFunction


def main() -> None:
    """Load the function that the first message names; answer batches of responses until the end."""
    parent = Parent()
    begin = parent.receive()
    if begin is None:
        return
    settings, max_image_pixels = pickle.loads(begin)
    try:
        function = UserFunction(settings, max_image_pixels)
    except Exception as error:  # the parent raises it
        parent.replies.send_bytes(_pickled(error))
        return
    parent.replies.send_bytes(pickle.dumps(function.is_per_response))
    while (message := parent.receive()) is not None:
        try:
            reply: Any = pickle.dumps(function(pickle.loads(message)))
        except Exception as error:
            reply = _pickled(error)
        parent.replies.send_bytes(reply)


def _pickled(error: Exception) -> bytes:
    """The error with its traceback as a note, of a kind that the other process knows."""
    kind = type(error)
    trace = "".join(traceback.format_exception(error))
    if kind.__module__ != "builtins":
        name = "" if isinstance(error, ValueError) else f"{kind.__name__}: "
        plain = ValueError if isinstance(error, ValueError) else RuntimeError
        notes = getattr(error, "__notes__", [])
        error = plain(f"{name}{error}")
        for note in notes:
            error.add_note(note)
    if not isinstance(error, ValueError):
        error.add_note(trace)
    return pickle.dumps(error.with_traceback(None))


if __name__ == "__main__":
    main()
