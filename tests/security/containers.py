"""Run a command as a container would: another user, no home, no user name, a read-only tree."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
USER = 54321
"""An id that the machine's user database does not have."""

_SCRIPT = """
set -e
# In a mount namespace of its own: nothing of this is seen outside.
if [ -n "$CLOSED" ]; then
  mount --bind "$PREFIX" "$SPARE"
  mount -t tmpfs -o mode=755 none "$CLOSED"
  mkdir -p "$PREFIX"
  mount --bind "$SPARE" "$PREFIX"
fi
for tree in "$PREFIX" "$ROOT"; do
  mount --bind "$tree" "$tree"
  mount -o remount,bind,ro "$tree"
done
cd "$DESK"
exec setpriv --reuid "$USER_ID" --regid "$USER_ID" --clear-groups env -i $KEPT "$@"
"""


def can_run() -> bool:
    """Whether this process may make mount namespaces and become another user."""
    tools = all(map(shutil.which, ("unshare", "setpriv", "mount")))
    return os.geteuid() == 0 and tools and subprocess.run(["unshare", "-m", "true"]).returncode == 0


def run_in_container(
    desk: Path, *command: str, seconds: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command's end.

    Args:
        desk: an empty folder; the only one, with /tmp, that the user can write to.
        command: what to run, in `desk`; `python` first stands for this interpreter.
        seconds: how long it may take.
        environment: its variables, beside PATH and TMPDIR.
    """
    spare, temporary = desk / "spare", desk / "tmp"
    for folder in (desk, spare, temporary):
        folder.mkdir(exist_ok=True)
        os.chown(folder, USER, USER)
    kept = {"PATH": os.environ["PATH"], "TMPDIR": str(temporary), **environment}
    prefix = Path(sys.base_prefix)
    closed = next((p for p in reversed(prefix.parents) if not p.stat().st_mode & 0o001), None)
    script = {
        **{"PREFIX": str(prefix), "ROOT": str(ROOT), "SPARE": str(spare), "DESK": str(desk)},
        **{"CLOSED": str(closed or ""), "USER_ID": str(USER), "PATH": os.environ["PATH"]},
        "KEPT": " ".join(f"{key}={value}" for key, value in kept.items()),
    }
    program = [sys.executable if part == "python" else part for part in command]
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", _SCRIPT, "sh", *program],
        env=script,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
