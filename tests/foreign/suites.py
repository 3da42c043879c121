"""Run tlsfuzzer and testssl.sh against a running echod: `make suites`.

tlsfuzzer is fetched with git at a fixed commit. testssl.sh comes from the system's packages. `suites.toml` lists the
scripts that apply, the others with the reason, and each expected failure with its reason. The exit code is 1 after an
unexpected result, and 2 if something is missing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import Daemon

if TYPE_CHECKING:
    from collections.abc import Iterable

EXPECTED: dict[str, Any] = tomllib.loads((Path(__file__).parent / "suites.toml").read_text())

# Seconds. The slowest script sends handshakes of several megabytes.
SCRIPT_TIMEOUT = 600
TESTSSL_TIMEOUT = 1200

# At most this many conversations of a script, chosen at random; some have thousands.
CONVERSATIONS = "40"


class MissingError(Exception):
    """Something that the suites need is not there."""


def main() -> int:
    """Run both suites. The only argument is the folder for all that they need."""
    folder = Path(sys.argv[1]).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        python = fetch_tlsfuzzer(folder)
        testssl = find("testssl", "install testssl.sh, for example with apt-get install testssl.sh")
        key, certificate = issue(folder)
    except MissingError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    tls = ("--listeners.tls.tls.certificate", str(certificate), "--listeners.tls.tls.private-key", str(key))
    with Daemon("--listeners.tls.address", "127.0.0.1:0", *tls, listen=None) as daemon:
        port = str(daemon.address[1])
        problems = [*run_tlsfuzzer(folder / "tlsfuzzer", python, port), *run_testssl(testssl, port, folder)]
        problems += [f"echod logged {event}" for event in daemon.loud()]
        if code := daemon.stop():
            problems.append(f"the exit code of echod is {code}")
    sys.stderr.writelines(f"unexpected: {problem}\n" for problem in problems)
    return int(bool(problems))


def find(command: str, advice: str) -> str:
    """Return the path of a command."""
    if (path := shutil.which(command)) is None:
        msg = f"{command} is missing: {advice}"
        raise MissingError(msg)
    return path


def run(*command: str | Path, advice: str) -> None:
    """Run a command that prepares a suite."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        msg = f"{' '.join(map(str, command))} failed: {advice}\n{done.stderr}"
        raise MissingError(msg)


def fetch_tlsfuzzer(folder: Path) -> Path:
    """Fetch tlsfuzzer, and return a Python that has what it needs. TLSFUZZER_REPOSITORY is another place of it."""
    suite = EXPECTED["tlsfuzzer"]
    repository = os.environ.get("TLSFUZZER_REPOSITORY", suite["repository"])
    clone = folder / "tlsfuzzer"
    git = find("git", "install git")
    if not clone.exists():
        run(
            git,
            "clone",
            "--quiet",
            "--no-checkout",
            repository,
            clone,
            advice="set TLSFUZZER_REPOSITORY to a repository that can be read",
        )
    run(
        git, "-C", clone, "checkout", "--quiet", suite["commit"], "--", "scripts", "tlsfuzzer", advice=f"remove {clone}"
    )
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", folder / "venv", advice="install the module venv")
    run(python, "-m", "pip", "install", "--quiet", suite["requirement"], advice="it needs a package index")
    return python


def issue(folder: Path) -> tuple[Path, Path]:
    """Make an RSA key and its certificate, as most scripts need RSA signatures."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    name = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    new = ("-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-keyout", key, "-out", certificate)
    run(find("openssl", "install openssl"), "req", *new, *name, advice="it cannot issue a certificate")
    return key, certificate


def run_tlsfuzzer(clone: Path, python: Path, port: str) -> Iterable[str]:
    """Run the scripts that apply, and yield each unexpected result."""
    suite = EXPECTED["tlsfuzzer"]
    excluded = {name for group in suite["excluded"] for name in group["scripts"]}
    present = {path.stem for path in (clone / "scripts").glob("test*.py")}
    if unknown := present ^ excluded ^ suite["scripts"].keys():
        yield f"suites.toml must list each script of tlsfuzzer once: {', '.join(sorted(unknown))}"

    def one(name: str) -> str:
        command = [str(python), f"scripts/{name}.py", "-h", "127.0.0.1", "-p", port, "-n", CONVERSATIONS]
        done = subprocess.run(
            [*command, *suite["scripts"][name]],
            cwd=clone, env={"PYTHONPATH": "."}, capture_output=True, text=True, timeout=SCRIPT_TIMEOUT,
        )  # fmt: skip
        return f"{done.stdout}{done.stderr}"

    counts = {"passed": 0, "failed as expected": 0}
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for name, output in zip(suite["scripts"], threads.map(one, suite["scripts"]), strict=True):
            # The names of the failures follow, each in quotes on a line of its own.
            failures = {
                line.strip("\t")[1:-1] for line in output.rpartition("FAILED:")[2].splitlines() if line[:1] == "\t"
            }
            expected = suite["failures"].get(name, {})
            unexpected = sorted(each for each in failures if not any(re.fullmatch(regex, each) for regex in expected))
            totals = {key: int(number) for key, number in re.findall(r"^([A-Z]+): (\d+)$", output, re.MULTILINE)}
            if not totals or unexpected or bool(totals["FAIL"]) != bool(failures):
                yield f"tlsfuzzer {name}: {', '.join(unexpected) or output}"
            else:
                counts["passed"] += totals["PASS"] + totals["XFAIL"]
                counts["failed as expected"] += len(failures)
    sys.stdout.write(f"tlsfuzzer {suite['commit'][:12]}: {len(suite['scripts'])} scripts, conversations: {counts}\n")


def run_testssl(testssl: str, port: str, folder: Path) -> Iterable[str]:
    """Run testssl.sh, and yield each finding that is not expected."""
    report = folder / "testssl.json"
    report.unlink(missing_ok=True)  # testssl.sh does not overwrite it
    command = [testssl, "--quiet", "--color=0", "--warnings=off", f"--jsonfile={report}"]
    subprocess.run([*command, f"127.0.0.1:{port}"], capture_output=True, timeout=TESTSSL_TIMEOUT)
    findings = json.loads(report.read_text())
    loud = {entry["id"]: entry for entry in findings if entry["severity"] not in {"OK", "INFO"}}
    expected = EXPECTED["testssl"]["findings"]
    for name in loud.keys() - expected.keys():
        yield f"testssl.sh {name}: {loud[name]['severity']} {loud[name]['finding']}"
    sys.stdout.write(
        f"testssl.sh: {len(findings)} findings, {len(loud)} of them above INFO: {', '.join(sorted(loud))}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
