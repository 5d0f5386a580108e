"""Known holes in the dependencies that constraints.txt pins, by pip-audit. Arguments are passed on to it.

    python .ci/audit.py [--vulnerability-service osv] [--requirement constraints.txt]

Status 1 when there is one. Where advisories cannot be reached pip-audit skips a package and still says that it found
none: that is said here in so many words, with status 0, since no change of ours could mend it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def main() -> int:
    arguments = sys.argv[1:]
    if not {"-r", "--requirement"} & set(arguments):
        arguments += ["--requirement", "constraints.txt"]
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch) / "audit.json"
        command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner", "off",
                   "--format", "json", "--output", str(found), *arguments]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if not found.is_file():
            reason = (done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1]
            print(f"AUDIT NOT DONE: {reason}", file=sys.stderr)
            return 0
        packages: list[dict[str, Any]] = json.loads(found.read_text(encoding="utf-8"))["dependencies"]
    skipped = [package for package in packages if "skip_reason" in package]
    holes = [(package, hole) for package in packages for hole in package.get("vulns", [])]
    for package, hole in holes:
        mended = ", ".join(hole["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {hole['id']}, mended in {mended}", file=sys.stderr)
    if skipped:
        print(
            f"AUDIT NOT DONE for {len(skipped)} of {len(packages)} packages: {skipped[0]['skip_reason']}",
            file=sys.stderr,
        )
    print(f"audited: {len(packages) - len(skipped)} of {len(packages)} packages, {len(holes)} known holes")
    return 1 if holes else 0


if __name__ == "__main__":
    sys.exit(main())
