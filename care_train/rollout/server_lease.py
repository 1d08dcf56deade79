"""A run's hold on its server: taken before weights are sent, kept while the run is alive."""

import os
import socket
import threading
import time
import uuid
import weakref

from care_train.rollout.errors import RolloutServerError
from care_train.rollout.server_client import ServerClient

BEAT_SECONDS = 5.0
"""How often the server hears that the run is alive: a sixth of what it waits for that."""

WAIT_SECONDS = 40.0
"""How long to ask for a server that another run has: that run may be one that was just killed,
which the server knows after 30 s of silence."""

_ANSWER_SECONDS = 5.0


class Lease:
    """Says that this run is alive, from a thread, until it is released or the process ends."""

    def __init__(self, client: ServerClient) -> None:
        """Nothing is taken yet.

        Args:
            client: the server's.
        """
        self.sender = uuid.uuid4().hex
        self._client = client
        self._message = {
            "sender": self.sender,
            "who": f"process {os.getpid()} on {socket.gethostname()}",
        }
        self._is_over = threading.Event()
        self._is_over.set()

    def take(self) -> None:
        """Have the server from now on.

        Raises:
            RolloutServerError: it cannot be reached, or a run that is alive has it.
        """
        end = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                self._client.post("/lease", self._message)
                break
            except RolloutServerError as error:
                if error.status != 409 or time.monotonic() > end:
                    raise
            time.sleep(1)
        if self._is_over.is_set():
            self._is_over = threading.Event()
            quick = self._client.with_timeout(_ANSWER_SECONDS)
            beats = threading.Thread(
                target=_beat, args=(quick, self._message, self._is_over), daemon=True
            )
            beats.start()
            # At the end of the process too, so that the next run need not wait.
            self._release = weakref.finalize(self, _end, quick, self.sender, self._is_over, beats)

    def release(self) -> None:
        """Leave the server to others."""
        if not self._is_over.is_set():
            self._release()


_of_process: dict[tuple[str, str | None], Lease] = {}


def process_lease(client: ServerClient) -> Lease:
    """This process's hold on a server: a process is one run, and its engines, of which the last
    that was made is used, share it."""
    return _of_process.setdefault((client.url, client.token.value), Lease(client))


def _beat(client: ServerClient, message: dict[str, str], is_over: threading.Event) -> None:
    while not is_over.wait(BEAT_SECONDS):
        try:
            client.post("/lease", message)
        except RolloutServerError as error:
            # Another run has it. Other failures may pass; what is next sent there says them.
            if error.status == 409:
                is_over.set()


def _end(
    client: ServerClient, sender: str, is_over: threading.Event, beats: threading.Thread
) -> None:
    is_over.set()
    # A beat under way would take the server again.
    beats.join()
    try:
        client.post("/release", {"sender": sender})
    # The server is gone or has another run: it has nothing to be told.
    except RolloutServerError:
        return
