"""Known vulnerabilities of the packages installed beside this Python, by pip-audit.

    python -m bench.audit

pip-audit ends well where its service knows none of the packages, as behind a mirror of PyPI that
serves files alone. Here that is told from a clean audit. The last line is a JSON object. Exit
status: 0 nothing is found that `EXPLAINED` does not have, 1 something is, 2 pip-audit failed, 3 no
service answers.
"""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

EXPLAINED: dict[str, str] = {}
"""Vulnerabilities that do not reach this project, by id, each with the reason."""

_PROBE = "https://pypi.org/pypi/pip/23.2.1/json"
"""A release with known vulnerabilities: an index that has no answer here has none for any."""
_SECONDS = 10.0


def main() -> int:
    """Ask, and print what was found."""
    if reason := unreachable():
        print(f"not audited: PyPI's vulnerability service does not answer here ({reason})")
        print(json.dumps({"audited": 0, "reason": reason}))
        return 3
    command = [sys.executable, "-m", "pip_audit", "--format=json", "--progress-spinner=off"]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout:
        sys.stderr.write(done.stderr)
        print(json.dumps({"audited": 0, "reason": f"pip-audit ended with {done.returncode}"}))
        return 2
    return report(json.loads(done.stdout)["dependencies"])


def unreachable() -> str | None:
    """Why the service cannot be asked; None where it answers."""
    try:
        with urllib.request.urlopen(_PROBE, timeout=_SECONDS) as reply:  # an https address
            known = json.load(reply).get("vulnerabilities")
    except (OSError, ValueError) as error:
        return str(error)
    return None if known else "it knows no vulnerability of a release that has some"


def report(dependencies: Sequence[Mapping[str, Any]]) -> int:
    """Print a table of pip-audit's findings and what they say; the exit status."""
    audited = [entry for entry in dependencies if "vulns" in entry]
    table = Table("package", "vulnerability", "fixed in", "explained")
    open_ids = []
    for entry in audited:
        for found in entry["vulns"]:
            names = [found["id"], *found["aliases"]]
            reason = next((EXPLAINED[name] for name in names if name in EXPLAINED), "")
            package = f"{entry['name']} {entry['version']}"
            table.add_row(package, found["id"], ", ".join(found["fix_versions"]), reason)
            if not reason:
                open_ids.append(found["id"])
    skipped = [entry["name"] for entry in dependencies if "vulns" not in entry]
    Console().print(table)
    if skipped:
        print(f"not on PyPI, so not audited: {', '.join(skipped)}")
    print(json.dumps({"audited": len(audited), "skipped": len(skipped), "open": open_ids}))
    return 3 if not audited else int(bool(open_ids))


if __name__ == "__main__":
    sys.exit(main())
