"""Parts as processes: side by side or alone on the device, each with its limits, all in one limit.

A part that crashes, hangs or is killed loses what it had not yet written. It is started again as
long as it gets further: it leaves out what it has begun before.
"""

import os
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu import lines

LOG = "log.txt"
LEAST_SECONDS = 4.0  # a part that has less than this is not started
NICE = ("nice", "-n", "10")


@dataclass(frozen=True)
class Part:
    """A process, and when it may run. It appends its lines to results.jsonl itself."""

    name: str
    command: tuple[str, ...]
    limit: float = 60.0  # seconds in all, times of rest not counted
    silence: float = 60.0  # seconds without a line
    alone: bool = False  # the others rest meanwhile
    patient: bool = False  # leaves slots and cores to others
    foreign: bool = False  # its crash is not ours
    reason: str | None = None  # why it cannot run here at all
    needs: tuple[str, ...] = ()  # parts that have ended before, if they were asked for


@dataclass
class Running:
    """A part's process, its own log, and the moments that its limits count from."""

    part: Part
    process: subprocess.Popen[bytes]
    log: Path
    started: float
    heard: float
    begun: set[str]  # by the part before this process
    resting_since: float | None = None

    def send(self, number: int) -> None:
        """To the process and its children."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def rest(self, now: float) -> None:
        if self.resting_since is None:
            self.send(signal.SIGSTOP)
            self.resting_since = now

    def go_on(self, now: float) -> None:
        if self.resting_since is not None:
            self.send(signal.SIGCONT)
            self.started += now - self.resting_since
            self.heard += now - self.resting_since
            self.resting_since = None

    def over_limit(self, now: float) -> str | None:
        """Which of its limits it has passed."""
        if self.resting_since is not None:
            return None
        if now - self.started > self.part.limit:
            return f"did not end in {self.part.limit:.0f} s"
        if now - self.heard > self.part.silence:
            return f"hung: no line in {self.part.silence:.0f} s"
        return None


@dataclass
class Schedule:
    """Runs `parts` in `seconds`; `jobs` processes where they are patient, else twice as many."""

    parts: list[Part]
    directory: Path
    seconds: float
    jobs: int
    environment: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        self.waiting = list(self.parts)
        self.running: list[Running] = []
        self.used: dict[str, float] = {}  # seconds of a part's earlier processes
        self.offset = 0
        self.end = time.monotonic() + self.seconds
        why = "interrupted"
        with tempfile.TemporaryDirectory() as logs:
            self.logs = Path(logs)
            try:
                while (self.waiting or self.running) and time.monotonic() < self.end:
                    self.start()
                    self.listen()
                    self.look_after()
                    time.sleep(0.02)
                why = f"no time left of {self.seconds:.0f} s"
            finally:
                self.stop(why)

    def start(self) -> None:
        """Every part that may: one that wants to be alone before all others."""
        now = time.monotonic()
        if any(x.part.alone for x in self.running):
            return
        for part in [x for x in self.waiting if x.reason is not None]:
            self.begin(part, now)
        unfinished = {x.name for x in self.waiting} | {x.part.name for x in self.running}
        ready = [x for x in self.waiting if not unfinished & set(x.needs)]
        alone = next((x for x in ready if x.alone), None)
        if alone is not None:
            beside = list(self.running)
            if self.begin(alone, now):
                for other in beside:
                    other.rest(now)
            return
        for part in ready:
            if len(self.running) < self.jobs * (1 if part.patient else 2):
                self.begin(part, now)

    def begin(self, part: Part, now: float) -> bool:
        """Whether there is a process of it now."""
        self.waiting.remove(part)
        reason = part.reason
        if self.end - now < LEAST_SECONDS:
            reason = f"no time left of {self.seconds:.0f} s"
        if reason is not None:
            self.tell("not run", part.name, reason, part)
            return False
        log = self.logs / part.name
        with log.open("ab") as output:
            process = subprocess.Popen(
                (*NICE, *part.command) if part.patient else part.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | self.environment,
            )
        started = now - self.used.get(part.name, 0.0)
        self.running.append(Running(part, process, log, started, now, self.begun_by(part)))
        return True

    def begun_by(self, part: Part) -> set[str]:
        found = lines.read(self.directory)
        return {x["name"] for x in found if x["part"] == part.name and x["kind"] == "begun"}

    def listen(self) -> None:
        """Notes who has written since the last time."""
        path = self.directory / lines.FILE
        if not path.exists() or path.stat().st_size == self.offset:
            return
        with path.open("rb") as file:
            file.seek(self.offset)
            text = file.read()
        self.offset += len(text)
        heard = {line["part"] for line in lines.parse(text.decode(errors="replace"))}
        for x in self.running:
            if x.part.name in heard:
                x.heard = time.monotonic()

    def look_after(self) -> None:
        now = time.monotonic()
        for x in list(self.running):
            code = x.process.poll()
            late = x.over_limit(now) if code is None else None
            if code is None and late is None:
                continue
            self.end_of(x, late or said(code), crashed=late is not None or code != 0)
            if x.part.alone:
                for other in self.running:
                    other.go_on(now)

    def end_of(self, x: Running, why: str, crashed: bool) -> None:
        """Keeps its log; says what it has lost; lets it go on behind what it has lost."""
        x.send(signal.SIGKILL)
        x.process.wait()
        self.running.remove(x)
        passed = time.monotonic() - self.end + self.seconds
        print(f"{passed:5.0f} s  {x.part.name} {why}", flush=True)
        last = self.keep_log(x)
        lost = lines.unanswered(lines.read(self.directory), x.part.name)
        further = self.begun_by(x.part) > x.begun
        if not crashed and not lost:
            return
        reason = f"{why}: {last}" if last else why
        kind = "not run" if x.part.foreign else "crash"
        for line in lost or [{"name": x.part.name}]:
            known = {key: line[key] for key in ("ops", "backend") if key in line}
            self.tell(kind, line["name"], reason, x.part, **known)
        self.used[x.part.name] = time.monotonic() - x.started
        if further and x.part.limit - self.used[x.part.name] > LEAST_SECONDS:
            self.waiting.insert(0, x.part)

    def stop(self, why: str) -> None:
        """Ends what runs and says what did not: nobody's fault."""
        for x in self.running:
            x.send(signal.SIGKILL)
        for x in self.running:
            x.process.wait()
            self.keep_log(x)
            lost = lines.unanswered(lines.read(self.directory), x.part.name)
            for name in {line["name"] for line in lost} or {x.part.name}:
                self.tell("not run", name, f"stopped, {why}", x.part)
        for part in self.waiting:
            self.tell("not run", part.name, why, part)

    def tell(self, kind: str, name: str, verdict: str, part: Part, **known: Any) -> None:
        lines.write(self.directory, part.name, kind, name, verdict=verdict, **known)

    def keep_log(self, x: Running) -> str:
        """Appends its log to the one log; its last line."""
        text = x.log.read_text(errors="replace")
        x.log.unlink()
        with (self.directory / LOG).open("a") as log:
            log.write(f"== {x.part.name}\n{text}\n")
        told = [line.strip() for line in text.splitlines() if line.strip()]
        return told[-1][:300] if told else ""


def said(code: int | None) -> str:
    """An exit status in words."""
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"ended with {code}"
