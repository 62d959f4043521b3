"""Attack the three scripts with hostile worlds; print how each attack ends.

    python tests/tools/attacks.py                # all of them: a table, then a line of JSON
    python tests/tools/attacks.py --only "Hub"   # those whose script and name match

An attack is a real process of a real script in a world made for it: a source, a teacher's template,
an output, a cache, an environment, a loopback Hub with faults, and sometimes somebody who acts
while it runs. A run must end by itself, in bounded time and memory, with an exit code that the
contract allows there, without a traceback, a raw control character or a byte of the access token
anywhere: neither on the terminal nor in any file that it leaves. No row that the output held goes,
none is there twice, an exit code of 0 means that all are there; and where an attack says so, a
calm run with --resume completes the job afterwards. Worlds in which one failed are left there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from bench import CHATS, ROOT, TEACHER, peak_bytes, print_head, print_row
from loopback_hub import LoopbackHub
from outputs import PART, Output

import extract_logits

REPO = "tester/logits"
TOKEN = "S3cret.0f-the-attacked"  # not what a token of the Hub looks like: it is hidden by itself
SECRETS = (TOKEN, "hf_AttackAttackAttackAttack")
SECONDS, PEAK_MB = 60.0, 1500.0  # that a run may take, where an attack says nothing else
KILLED_AFTER_S = 90.0
ADDRESS_SPACE_BYTES = 16 * 2**30  # so that a bomb ends in a MemoryError and not the machine
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
ESCAPES = "\x1b[31mred\x07\x9b2J\u202e"
DEEP = "[" * 20_000 + "]" * 20_000
EXTRACT, LENGTHS, EXPLORE = "extract_logits.py", "compute_lengths.py", "explore_logits.py"
READ: dict[str, Any] = {"model": TEACHER, "dataset": CHATS}
USUAL = {
    EXTRACT: {**READ, "output": "./out", "cache_dir": "cache", "limit": 2},
    LENGTHS: {**READ, "output_dir": "lengths", "num_proc": 1},
    EXPLORE: {},
}
PARTS = {"limit": 4, "upload_every": 2, "store_tokens": True}  # of the output that is continued

Words = Sequence[object]
Process = subprocess.Popen[bytes]


class World:
    """A folder that a run of a script works in, with what it meets there."""

    def __init__(self, folder: Path, ready: Path, script: str = EXTRACT, slack: float = 1) -> None:
        self.folder, self.ready, self.script, self.slack = folder, ready, script, slack
        self.held: set[int] = set()  # ids that the output holds before
        self.before: list[int] | None = None  # all ids, where nothing may change
        self.rows: set[int] | None = {0, 1}  # ids that a complete run stores; None: of no interest
        self.argv: Words = ()
        folder.mkdir()
        self.hub = LoopbackHub(folder / "hub")  # in place of the real one
        self.hub.tokens = {TOKEN: "tester"}
        self.env = {"HF_ENDPOINT": self.hub.endpoint, "HF_HUB_OFFLINE": "0"}

    def output(self) -> Path:
        """Put an output of the usual source there: conversations 0..3 in two parts."""
        self.held, self.rows = {0, 1, 2, 3}, {0, 1, 2, 3}
        return Path(shutil.copytree(self.ready, self.folder / "out"))

    def publish(self, folder: Path, kind: str = "dataset") -> None:
        store, entries = self.hub.store, {}
        for path in filter(Path.is_file, folder.rglob("*")):
            entry = store.put(path.read_bytes(), lfs=path.suffix in (".parquet", ".safetensors"))
            entries[path.relative_to(folder).as_posix()] = entry
        store.commit(store.create(kind, REPO, private=False)[0], "Publish", entries)

    def start(self, *words: object, **options: Any) -> Words:
        """Return options of a run: two conversations into ./out, or their lengths, or these words.

        Keywords are options, `x=True` a bare one, None one that is left out.
        """
        found = list(words)
        for name, value in {**USUAL[self.script], **options}.items():
            if name == "max_runtime_minutes" and value:
                value *= self.slack  # a busy machine starts slowly
            if value is not None:
                found += ["--" + name.replace("_", "-"), *([] if value is True else [value])]
        return found

    def stored(self) -> list[int]:
        """Return the ids of all rows of the output, twice where they are there twice."""
        words, found = list(map(str, self.argv)), list[int]()
        name = words[words.index("--output") + 1] if "--output" in words else "./out"
        place = Output(self.folder / name) if name.startswith(".") else Output(name, self.hub)
        with contextlib.suppress(OSError):  # a name that is none
            for path in filter(PART.fullmatch, sorted(place.files())):
                with contextlib.suppress(OSError, pa.ArrowException, KeyError):  # attacked itself
                    table = pq.read_table(pa.BufferReader(place.read(path)), columns=["index"])
                    found += table["index"].to_pylist()
        return found


# Attacks ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    """What is hostile, what is attacked, and how that may end."""

    name: str
    script: str
    prepare: Callable[[World], Words]  # makes the world and returns the options of the run
    exits: tuple[int, ...]
    says: str = ""  # a pattern that is found in the last line on stderr
    during: Callable[..., Any] = lambda *_: None  # acts while the process runs
    resumes: bool = False  # a calm run with --resume completes the job afterwards
    seconds: float = SECONDS
    traces: bool = False  # a library writes a traceback of its own into its log
    short: bool = False  # belongs to the tests


ATTACKS: list[Attack] = []


def add(name: str, prepare: Any, *exits: int, script: str = EXTRACT, **how: Any) -> None:
    ATTACKS.append(Attack(name, script, prepare, exits or (2,), **how))


def maker(prepare: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
    """Let a function of a world be called with everything else, to be given the world later."""
    return lambda *args, **how: lambda *world: prepare(*world, *args, **how)


@maker
def start(
    world: World, *words: object, files: dict[Any, Any] | None = None, faults: Any = None,
    env: dict[str, str] | None = None, ready: bool = False, rows: Any = None, **options: Any,
) -> Words:  # fmt: skip
    """Start beside files and links, on a Hub with faults; ready: it holds an output."""
    world.env |= env or {}
    if options.get("model") == REPO:
        world.publish(TEACHER, "model")
    if STEPS["listing"] in (faults or {}):  # asks what is there already
        world.hub.store.create("dataset", REPO, private=False)
    if ready:
        world.publish(world.output())
        words, options = ((REPO,), {}) if world.script == EXPLORE else ((), {**RESUMED, **options})
    for match, fault in (faults or {}).items():
        world.hub.fault(match, **{"count": 10**9, **fault})
    for name, content in (files or {}).items():
        world.rows, path = rows, world.folder / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, Path):
            path.symlink_to(content)
        else:
            path.write_bytes(content.encode(errors="surrogateescape"))
            path.chmod(0o755)
    return world.start(*words, **options)


@maker
def after(world: World, change: Callable[[Path], Any], *words: object, limit: int = 4) -> Words:
    """Continue an output that was changed by hand, or run on it by these words."""
    change(world.output())
    world.rows = set(range(limit))
    return words or world.start(**{**PARTS, "resume": True, "limit": limit})


def of_source(*rows: Any, **options: Any) -> Any:
    """Start on these rows; a str goes in as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return start(files={"chats.jsonl": "\n".join(lines) + "\n"}, dataset="chats.jsonl", **options)


def wait_for(condition: Callable[[], Any], process: Process) -> bool:
    while process.returncode is None:
        if condition():
            return True
        time.sleep(0.02)
    return False


def stop_when_met(world: World, process: Process) -> None:
    """Send SIGTERM once the run waits for the Hub."""
    if wait_for(lambda: world.hub.faults_met, process):
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)


# The Hub: silence, nonsense, answers that are too long or too large, secrets

RESUMED = {**PARTS, "resume": True, "output": REPO, "max_runtime_minutes": 0.4}
STEPS = {  # requests that an extraction into a new repository makes, in their order
    "repo info": rf"GET /api/datasets/{REPO}(\?|$)", "whoami": "GET /api/whoami",
    "listing": "GET /api/datasets/.*/tree/", "create": "POST /api/repos/create",
    "preupload": "POST .*/preupload/", "LFS batch": "POST .*/objects/batch",
    "LFS upload": "PUT /_lfs", "commit": "POST .*/commit/", "after it": "POST .*/paths-info/",
    "any": "GET /api/datasets",
}  # fmt: skip
SETTINGS, CHECKPOINT = "extraction_config.json", "checkpoint.json"
PART_0 = "data/part-00000.parquet"
SILENCE, BLOCK = {"latency": 600.0}, b" " * 2**20
PACKER = zlib.compressobj(9, zlib.DEFLATED, -15)
PACKED = PACKER.compress(BLOCK) + PACKER.flush(zlib.Z_FULL_FLUSH)  # may be said again and again
GZIP = {"text": b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + PACKED * 2048,
        "headers": {"Content-Encoding": "gzip"}}  # fmt: skip
NONSENSE = {
    "a list": "[1, 2]", "a page": "<html>sign in</html>", "deep brackets": DEEP,
    "types": '{"sha": [1], "private": "x", "files": 7, "name": null, "siblings": 3, "id": {}}',
}  # fmt: skip


def echo(status: int) -> dict[str, Any]:
    """Return a fault that says what it was told in secret."""
    message = f"Authorization: Bearer {' '.join(SECRETS)}\r\n{ESCAPES}"
    return {"status": status, "message": message}


for name, match, fault, minutes, *exits in (  # where no minutes are given, until SIGTERM
    *((f"never answers: {step}", step, SILENCE, None, 143) for step in STEPS),
    *((f"answers nonsense: {step}", step, {"text": "[1, 2]"}, 0.25, 0, 2, 4, 75) for step in STEPS),
    ("never takes a file", "LFS upload", SILENCE, 0.3, 4, 75),
    ("says 403 and the token", "commit", echo(403), 0.5, 4, 75),
    ("says 401 and the token", "any", echo(401), 0.5, 4),
    ("says 503", "commit", {"status": 503}, 0.3, 4, 75),
    ("says 429", "any", {"status": 429}, 0.3, 4, 75),
    *((f"says 429: {told:.9}", "any", {"status": 429, "headers": {"Retry-After": told}}, None, 143)
      for told in ("9" * 5000, "\u00b2 soon")),
    ("answers a byte a second", "any", {"text": b" ", "times": 10**6, "pause_s": 1.0}, None, 143),
    ("redirects in a ring", "any", {"status": 302, "headers": {"Location": "/api/datasets/x/y"}},
     None, 2, 4, 143),
    ("lists nothing after a commit", "after it", {"text": "[]", "count": 3}, 9, 0),
):  # fmt: skip
    run = start(faults={STEPS[match]: fault}, output=REPO, max_runtime_minutes=minutes)
    during = {} if minutes else {"during": stop_when_met}
    add(f"the Hub {name}", run, *exits, resumes=True, **during)
add("the commit's answer is lost and then nothing answers", start(output=REPO, faults={
    "POST .*/commit/": {"drop": "after", "count": 1},
    "commit/|paths-info|tree": {"skip": 1, **SILENCE},
}), 143, resumes=True, during=stop_when_met)  # fmt: skip
for script, kind in product((EXTRACT, LENGTHS), ("model", "dataset")):
    add(f"the Hub of the {kind} never answers; SIGTERM",
        start(faults={"": SILENCE}, **{kind: "tester/thing"}), 143, script=script,
        during=stop_when_met, short=kind == "model")  # fmt: skip
add("the weights of the model never come; deadline",
    start(faults={"safetensors": SILENCE}, model=REPO, max_runtime_minutes=0.3), 75)  # fmt: skip
add("the Hub never answers", start(REPO, faults={"": SILENCE}), script=EXPLORE, seconds=200,
    says="logits")  # fmt: skip
for name, match, fault, *exits in (
    *((f"2 GB in gzip: {name}", match, GZIP, 0, 2, 4, 75)
      for name, match in (("listing", STEPS["listing"]), (SETTINGS, f"GET .*/{SETTINGS}"))),
    ("a listing of 2 GB", STEPS["listing"], {"text": BLOCK, "times": 2048}, 2, 4, 75),
    ("a listing that is cut", STEPS["listing"], {"drop": "body", "drop_after": 10}, 4, 75),
    *((f"{kind} to all", "GET", {"text": text}, 2, 4, 75) for kind, text in NONSENSE.items()),
):  # fmt: skip
    add(f"the Hub answers {name}", start(ready=True, faults={match: fault}), *exits)
    add(f"the Hub answers {name}", start(ready=True, faults={match: fault}), 2,
        *((0,) if fault is GZIP else ()), script=EXPLORE, seconds=120.0,
        short="brackets" in name or SETTINGS in name)  # fmt: skip
for status in (401, 403, 500):
    name, faults, seconds = f"HTTP {status} echoes the token", {"": echo(status)}, 120.0
    add(name, start(faults=faults, model=REPO), script=LENGTHS, seconds=seconds)
    add(name, start(REPO, faults=faults), script=EXPLORE, seconds=seconds, short=status == 403)
for kind, ending in {"a line's end": "\nX", "an umlaut": "äX", "an escape code": "\x1b[3m"}.items():
    env = {"HF_TOKEN": TOKEN + ending}
    add(f"the token has {kind}", start(output=REPO, env=env), 2, 4)
    add(f"the token has {kind}", start(REPO, env=env), script=EXPLORE)
env = {f"{library}_VERBOSITY": "debug" for library in ("HF_HUB", "DATASETS", "TRANSFORMERS")}
add("the Hub's client logs everything", start(output=REPO, env={"HF_DEBUG": "1", **env}), 0)
env = {"HTTPS_PROXY": f"http://me:{TOKEN}@127.0.0.1:9", "HF_ENDPOINT": "https://hub.test"}
add("a proxy with a password is not there",
    start(output=REPO, max_runtime_minutes=0.3, env=env), 4, 75)  # fmt: skip
add("tasks of an executor fail with an echo of the token",
    start("--executor", "local", "--tasks", 2, "--workers", 1, output=REPO,
          faults={STEPS["commit"]: echo(403)}), 4, 75, seconds=90, traces=True)  # fmt: skip
add("a script of a batch system, the token in its environment",
    start("--executor", "slurm", "--tasks", 2,
          "--executor-options", '{"partition": "p", "time": "1:00:00"}',
          files={"bin/sbatch": "#!/bin/sh\necho Submitted batch job 1\n"},
          env={"PATH": f"bin:{os.environ['PATH']}"}), 0, seconds=90)  # fmt: skip


# Templates, sources, the command line

OWN = (TEACHER / "chat_template.jinja").read_text()
LOOP = "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2 + OWN
TEMPLATES = {
    "loops for ever": LOOP,
    "3,000 nested ifs": "{% if true %}" * 3000 + "{% endif %}" * 3000,
    "a recursive macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "an include": "{% include '/etc/passwd' %}",
    "bad syntax and escape codes": "{{ " + ESCAPES + " }}",
    "raises with escape codes": "{{ raise_exception('" + ESCAPES + "') }}",
}
CHAT = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]}
LONG = {"messages": [{"role": ("user", "assistant")[n % 2], "content": "a"} for n in range(10**5)]}
SOURCES = {  # rows, options, exit
    "a conversation of 100,000 messages": ([LONG, CHAT], {"rows": {1}}, 0),
    "JSON 20,000 deep": (['{"messages": ' + DEEP + "}", CHAT], {}, 2),
    "deep JSON as text in a cell": ([{"messages": "[" * 100_000}, CHAT], {}, 0),
    "roles with escape codes": (
        [{"messages": [{"role": ESCAPES, "content": "a"}, *CHAT["messages"]]}, CHAT], {}, 0),
    "ids with escape codes": ([{**CHAT, "id": ESCAPES}], {"index_col": "id"}, 2),
    "ids that are NaN": (['{"id": NaN, "messages": []}', CHAT], {"index_col": "id"}, 2),
    "a number of 5,000 digits": (['{"messages": ' + "9" * 5000 + "}", CHAT], {}, 2),
    "NUL bytes": (["\0\0\0\0", CHAT], {}, 2),
    "no UTF-8": ([CHAT, '{"a": "\udce9"}'], {}, 2),
    "arguments of templates 3,000 deep": (
        [{**CHAT, "chat_template_kwargs": '{"a": ' * 3000 + "1" + "}" * 3000}, CHAT], {}, 0),
}  # fmt: skip


for script in (EXTRACT, LENGTHS):
    for kind, template in TEMPLATES.items():
        exits = (2, 143) if template is LOOP else (2,)
        run = start(files={"t.jinja": template + OWN}, chat_template="./t.jinja")
        add(f"a template: {kind}", run, *exits, script=script)
    for kind, (rows, options, code) in SOURCES.items():
        add(f"a source: {kind}", of_source(*rows, **options), code, script=script,
            short=kind == "JSON 20,000 deep")  # fmt: skip
add("a source: a ring of links, a file named by no UTF-8", start(dataset="./chats", files={
    b"chats/\xff\x1b[31m.jsonl": json.dumps(CHAT) + "\n", "chats/again": Path(),
    "chats/gone.jsonl": Path("nowhere"),
}), 0, 2, short=True)  # fmt: skip
for name in ("user/\udcff", f"user/{ESCAPES}"):
    for option in ("output", "model", "dataset"):
        add(f"{option} {name!a}", start(**{option: name}))
    add(f"output {name!a}", start(name), script=EXPLORE)
for flags, value, *exits in (
    ("--limit", 10**30, 0, 2), ("--seed", 10**30), ("--max-runtime-minutes", "1e308", 0, 2),
    ("--rank 0 --world-size", "9" * 5000), ("--template-kwargs", "[" * 100_000),
    ("--batch-thresholds", '{"' + "9" * 5000 + '": 1}'), ("--chat-template", "/dev/zero"),
):  # fmt: skip
    words = flags.split()
    add(f"{words[-1]} {value!s:.9}", start(*words, value), *exits, short=value == "/dev/zero")
for place in ("/proc/here", "/dev/full", "/dev/null/here", "./" + "a" * 300, "./\udcff"):
    for option, exits in (("output", (2, 4)), ("cache_dir", (0, 2, 4))):
        add(f"{option} {place!a:.16}", start(**{option: place}), *exits)


# What output and cache hold, and what happens to them


@maker
def edit(folder: Path, path: str, change: Callable[[bytes], bytes] | bytes | int) -> None:
    """Change a file; an int: a hole of that size. No checkpoint knows a part that was changed."""
    if path == PART_0:
        (folder / CHECKPOINT).unlink()
    old = (folder / path).read_bytes()
    new = change(old) if callable(change) else change
    (folder / path).write_bytes(b"" if isinstance(new, int) else new)
    if isinstance(new, int):
        os.truncate(folder / path, new)


def tell(**said: Any) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps({**json.loads(data), **said}).encode()


ALIASES = b"a0: &a0 [1]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 12)
)
ANYWHERE = {
    "200,000 brackets": b"[" * 200_000, "escape codes and no UTF-8": ESCAPES.encode() + b"\xff\0",
    "a number of 5,000 digits": b'{"format_version": ' + b"9" * 5000 + b"}", "3 GB": 3 * 2**30,
}  # fmt: skip
CONTENTS = {
    CHECKPOINT: {
        "parts of wrong types": b'{"format_version": 1, "job": 3, "parts": 7, "skipped": []}',
        "rows that are absurd": lambda data: data.replace(b'"rows": [', b'"rows": [NaN, -1e999, '),
        "60 MB of objects": b'{"parts": [' + b"{}," * 20_000_000 + b"{}]}",
    },
    SETTINGS: {"null": b"null"},
    "README.md": {
        "YAML 50,000 deep": b"---\na: " + b"[" * 50_000 + b"\n---\n",
        "YAML of aliases": b"---\n" + ALIASES + b"---\n",
        "its line a thousand times": extract_logits.CARD_LINE.encode() * 1000,
        "a date of the year 99999": b"---\na: 99999-99-99\nb: 2020-01-01\n---\n",
    },
}
for path, contents in CONTENTS.items():
    for kind, content in {**ANYWHERE, **contents}.items():
        more = {CHECKPOINT: [2], "README.md": [4]}.get(path, []) if kind == "3 GB" else []
        exits, says = ([2], path) if path == SETTINGS else ([0, *more], "")
        add(f"{path}: {kind}", after(edit(path, content), limit=5), *exits, says=says)
        add(f"{path}: {kind}", after(edit(path, content), "out", "--validate"), 0, 1, 2, 3,
            script=EXPLORE)  # fmt: skip
add("a template of the output that loops for ever",
    after(edit("chat_template.jinja", LOOP.encode()), "out", "--sample", "0"), 0, 2,
    script=EXPLORE)  # fmt: skip
SAID = {"model": str(TEACHER), "dataset": str(CHATS)}
BARE = ("--output", "./out", "--resume", "--cache-dir", "cache")  # options are the output's
for setting, value in (
    ("rows_per_part", "x"), ("rows_per_part", 10**30), ("template_date", 5), ("model", 7),
    ("dataset_revision", {"a": 1}), ("versions", None), ("format_version", 99), ("options", []),
    ("options", {"model": ESCAPES, "dataset": 7}), ("options", {"cache_dir": "/etc/x", **SAID}),
):  # fmt: skip
    words = BARE if setting == "options" else ()
    change = edit(SETTINGS, tell(**{setting: value}))
    add(f"settings: {setting} is {value!a:.30}", after(change, *words), 0, 2)
for kind, change in {
    "is cut": lambda data: data[: len(data) // 2],
    "announces a footer of 4 GB": lambda data: data[:-8] + b"\xff\xff\xff\xffPAR1",
    "has a footer of noise": lambda data: data[:-300] + b"\x9b" * 292 + data[-8:],
    "says brackets of itself": lambda data: data.replace(b'{"actual": ', b"[" * 11),
    "says types of itself": lambda data: data.replace(b'"skipped": {}', b'"skipped":  5'),
}.items():
    add(f"a part that {kind}", after(edit(PART_0, change)), 0)
    add(f"a part that {kind}", after(edit(PART_0, change), "out", "--validate"), 0, 1, 2, 3,
        script=EXPLORE)  # fmt: skip


@maker
def back_up(out: Path, change: Callable[[Path], Any]) -> None:
    """Let a part wait in the cache, changed by hand."""
    path = out.parent / "cache" / extract_logits.cache_key(str(out)) / "backup_part-00000.parquet"
    path.parent.mkdir(parents=True)
    shutil.move(out / PART_0, path)
    extract_logits.digest_path(path).write_text(extract_logits.digest_file(path))
    change(path)


for kind, damage in {
    "is noise": lambda path: path.write_bytes(b"PAR1" + b"\x9b" * 5000 + b"PAR1"),
    "has a digest of noise": lambda path: extract_logits.digest_path(path).write_bytes(b"\xff\xfe"),
    "is a folder": lambda path: (path.unlink(), path.mkdir()),
    "is a link to /dev/zero": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
}.items():
    add(f"a backup in the cache that {kind}", after(back_up(damage)), 0)


@maker
def remove_during(world: World, process: Process, name: str, sign: str) -> None:
    """Remove a folder again and again, once there is a sign of work."""
    wait_for(lambda: next(world.folder.glob(sign), None), process)
    while process.returncode is None:
        shutil.rmtree(world.folder / name, ignore_errors=True)
        time.sleep(0.1)


def kill_child(world: World, process: Process) -> None:
    """Kill a process that the run has started, as the system does for want of memory."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while wait_for(children.exists, process):
        with contextlib.suppress(OSError):  # it has gone by itself
            for child in children.read_text().split():
                os.kill(int(child), signal.SIGKILL)
        time.sleep(0.02)


# What was committed and is gone before it is looked for is looked for two minutes, a commit.
for name, sign in (("cache", "cache/*/pending"), ("out", "out/data/*")):
    run = of_source(*[CHAT] * 300, limit=300, upload_every=3, max_batch_size=1)
    add(f"{name} is removed again and again, once there is {sign}", run, 0, 2, 4, seconds=600.0,
        during=remove_during(name, sign))  # fmt: skip
add("a process that tokenizes is killed", of_source(*[CHAT] * 6000, limit=6000, upload_every=50),
    4, during=kill_child, says="memory")  # fmt: skip
NO_THREADS = """import threading
start, left = threading.Thread.start, iter(range(5))
def refuse(self):
    if next(left, None) is None:
        raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = refuse
"""
add("no thread is to be had after the fifth", start(rows={0, 1}, env={"PYTHONPATH": "site"},
    files={"site/sitecustomize.py": NO_THREADS}), 2, 4, resumes=True)  # fmt: skip


# Running them -------------------------------------------------------------------------------------


@dataclass
class Ended:
    code: int | None  # None: it was killed for its time
    stdout: str
    stderr: str
    seconds: float
    peak_mb: float
    wrong: list[str] = field(default_factory=list)

    @property
    def last_line(self) -> str:
        return ["", *filter(str.strip, re.split("[\r\n]+", self.stderr))][-1]


def run(
    world: World, argv: Words, killed_after_s: float, during: Callable[..., Any] = lambda *_: None
) -> Ended:
    """Run the world's script to its end, or kill it; measure its time and its peak of memory."""
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(world.folder / "home"), "HF_TOKEN": TOKEN, **world.env,
    }  # fmt: skip
    limit = resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES)
    words = [sys.executable, *(os.fsencode(str(word)) for word in (ROOT / world.script, *argv))]
    begun, peak, killed = time.monotonic(), 0, False
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            words, cwd=world.folder, env=env, start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=out, stderr=err, preexec_fn=lambda: resource.setrlimit(*limit),
        )  # fmt: skip
        actor = threading.Thread(target=during, args=(world, process))
        actor.start()
        while process.poll() is None:
            peak = peak_bytes(process.pid) or peak
            if killed := time.monotonic() - begun > killed_after_s:
                process.kill()
            time.sleep(0.02)
        seconds = time.monotonic() - begun
        actor.join()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has left behind
        said = [os.pread(file.fileno(), 50 * 2**20, 0) for file in (out, err)]
    texts = [data.decode(errors="surrogateescape") for data in said]
    return Ended(None if killed else process.returncode, *texts, seconds, peak / 2**20)


SUMMARY = {"rows", "tokens", "shards", "bytes", "skipped", "seconds", "tokens_per_second", "output"}


def find_lacking(ended: Ended) -> set[str]:
    """Return what the last line of an extraction does not tell; a refused one tells nothing."""
    if ended.code in (None, 2, -signal.SIGKILL):
        return set()
    with contextlib.suppress(ValueError):
        last = json.loads(["{}", *ended.stdout.splitlines()][-1])
        return set() if "plan" in last else SUMMARY - last.keys()
    return SUMMARY


def find_secret(world: World, said: str) -> str:
    """Return where a byte of a token has gone, "" where nowhere."""
    if any(secret in said for secret in SECRETS):
        return "what it said"
    for path in world.folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 50 * 2**20:
            data = path.read_bytes()
            if any(secret.encode() in data for secret in SECRETS):
                return path.relative_to(world.folder).as_posix()
    return ""


def judge(attack: Attack, world: World, ended: Ended) -> list[str]:
    said, code = ended.stdout + ended.stderr, ended.code
    control, secret = CONTROL.search(said), find_secret(world, said)
    lacking = find_lacking(ended) if attack.script == EXTRACT else set()
    wrong = {
        "did not end": code is None,
        f"exit {code}, not {'/'.join(map(str, attack.exits))}": code not in (None, *attack.exits),
        "a traceback": "Traceback (most recent call last)" in said and not attack.traces,
        f"a raw {control and control[0]!r} on the terminal": control,
        f"the token in {secret}": secret,
        "says nothing": (code or 0) > 0 and not said.strip(),
        f"does not say {attack.says!r}": not re.search(attack.says, ended.last_line),
        f"the last line lacks {', '.join(sorted(lacking))}": lacking,
        f"{ended.seconds:.0f} s": ended.seconds > attack.seconds * world.slack,
        f"{ended.peak_mb:.0f} MB": ended.peak_mb > PEAK_MB,
    }
    return [words for words, found in wrong.items() if found] + judge_rows(world, code)


def judge_rows(world: World, code: int | None) -> list[str]:
    stored = world.stored()
    if world.before is not None:
        return [] if stored == world.before else ["another script changed the rows"]
    counts = Counter(stored)
    lost, twice = world.held - counts.keys(), [i for i, count in counts.items() if count > 1]
    complete = world.rows if code == 0 and "--output" in map(str, world.argv) else None
    wrong = {
        f"rows lost: {sorted(lost)}": lost,
        f"rows twice: {sorted(twice)}": twice,
        f"rows {sorted(counts)}, not all": complete is not None and counts.keys() != complete,
    }
    return [words for words, found in wrong.items() if found]


def make_output(folder: Path) -> Path:
    world = World(folder / "ready", folder / "none")
    with world.hub:
        ended = run(world, world.start(**PARTS), 300.0)
    assert ended.code == 0, ended.stderr
    return world.folder / "out"


def run_attack(attack: Attack, folder: Path, ready: Path, slack: float = 1.0) -> Ended:
    """Run an attack, and where it says so a run with --resume after it, without faults."""
    world = World(folder, ready, attack.script, slack)
    with world.hub:
        world.argv = attack.prepare(world)
        world.before = None if attack.script == EXTRACT else world.stored()
        limit_s = max(KILLED_AFTER_S, attack.seconds) * slack
        ended = run(world, world.argv, limit_s, attack.during)
        ended.wrong = judge(attack, world, ended)
        if world.hub.faults and not world.hub.faults_met:
            ended.wrong.append("the Hub was never asked")
        if attack.resumes:
            world.hub.clear()
            world.env.pop("PYTHONPATH", None)
            calm = run(world, [*world.argv, "--resume", "--max-runtime-minutes", 60], 300.0)
            if calm.code != 0:
                ended.wrong.append(f"--resume ends with {calm.code}: {calm.last_line}")
            ended.wrong += judge_rows(world, calm.code)
    if not ended.wrong:
        shutil.rmtree(folder, ignore_errors=True)
    return ended


def main() -> int:
    """Print a table and a line of JSON; 1 when an attack ended as it must not."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--only", default="", help="attacks whose script and name match this")
    parser.add_argument("--jobs", type=int, default=1, help="attacks at the same time")
    options = parser.parse_args()
    chosen = [one for one in ATTACKS if re.search(options.only, f"{one.script} {one.name}")]
    folder, wrong, codes = Path(tempfile.mkdtemp(prefix="attacks-")), [], Counter[str]()
    ready = make_output(folder)
    print_head("attack", "script", "exit", "s", "MB", "last line")
    with ThreadPoolExecutor(options.jobs) as pool:
        places = [folder / f"{number:03d}" for number in range(len(chosen))]
        runs = pool.map(run_attack, chosen, places, [ready] * len(chosen))
        for one, ended in zip(chosen, runs, strict=True):
            codes[str(ended.code)] += 1
            said = CONTROL.sub("?", ended.last_line).encode(errors="backslashreplace").decode()
            print_row(one.name, one.script.split("_")[0], ended.code, f"{ended.seconds:.1f}",
                      f"{ended.peak_mb:.0f}", said[:110])  # fmt: skip
            for said in ended.wrong:
                print(f"    WRONG {said!a:.200}", flush=True)
            wrong += [f"{one.script}: {one.name}"] if ended.wrong else []
    if wrong:
        print(f"left for a look: {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"attacks": len(chosen), "wrong": wrong, "exits": codes}))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
