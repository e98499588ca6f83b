"""Known vulnerabilities of what is installed: `python .ci/audit.py SITE-PACKAGES`, with pip-audit.

Ends with 1 and their list where there are any. Where the service of advisories cannot be asked, or
a mirror answers without them, it says so in one line and ends with 0.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 240
KNOWN = "pyyaml==5.3"  # CVE-2020-1747, which a service that has advisories knows
ACCEPTED: dict[str, str] = {}  # an advisory's id -> why it does not concern us


def audited(*words: str) -> tuple[list[dict], str]:
    """Packages as pip-audit lists them; or none, and why."""
    with tempfile.TemporaryDirectory() as place:
        found = Path(place, "found.json")
        command = [sys.executable, "-m", "pip_audit", "--format", "json", "--output", str(found),
                   "--progress-spinner", "off", "--timeout", "15", *words]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return [], f"no answer in {SECONDS} s"
        if not found.exists() or not found.stat().st_size:
            return [], (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:200]
        return json.loads(found.read_text())["dependencies"], ""


def has_advisories() -> str:
    """Why the service tells nothing; "" where it knows what is known."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(KNOWN)
        file.flush()
        found, why = audited("--requirement", file.name, "--no-deps", "--disable-pip")
    return why or ("" if any(one.get("vulns") for one in found) else f"it knows none of {KNOWN}")


def lines(found: list[dict]) -> list[str]:
    """A line a vulnerability that is not accepted."""
    return [
        f"{one['name']} {one['version']}: {vuln['id']}, fixed in "
        f"{', '.join(vuln['fix_versions']) or 'no version'}"
        for one in found
        for vuln in one.get("vulns", ())
        if vuln["id"] not in ACCEPTED
    ]


def main() -> int:
    if why := has_advisories():
        print(f"audit: not done, advisories cannot be had: {why}")
        return 0
    found, why = audited("--path", sys.argv[1])
    if why:
        print(f"audit: not done, {why}")
        return 0
    bad = lines(found)
    print(*bad, f"audit: {len(bad)} known vulnerabilities of {len(found)} packages", sep="\n")
    return min(len(bad), 1)


if __name__ == "__main__":
    sys.exit(main())
