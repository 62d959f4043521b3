"""Attack the three scripts with hostile worlds; print how each attack ends.

    python tests/tools/attacks.py                      # all of them: a table, then a line of JSON
    python tests/tools/attacks.py --only "hub" --list

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
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from bench import CHATS, ROOT, TEACHER, peak_bytes, print_head, print_row
from loopback_hub import LoopbackHub
from outputs import PART, Output
from small_output import write_parts

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
USUAL: dict[str, dict[str, Any]] = {
    EXTRACT: {**READ, "output": "./out", "cache_dir": "cache", "limit": 2},
    LENGTHS: {**READ, "output_dir": "lengths", "num_proc": 1},
    EXPLORE: {},
}
PARTS = {"limit": 4, "upload_every": 2, "store_tokens": True}  # of the output that is continued

Words = Sequence[object]
Process = subprocess.Popen[bytes]
Preparing = Callable[["World"], Words]  # makes a world and returns the options of the run
Acting = Callable[["World", Process], None]


def show(text: str, width: int) -> str:
    """Return text that fits a cell of the table."""
    text = CONTROL.sub("?", text.replace("\n", " ")).encode(errors="backslashreplace").decode()
    return text if len(text) <= width else text[: width - 1] + "…"


class World:
    """A folder that a run of a script works in, with what it meets there."""

    def __init__(
        self, folder: Path, ready: Path, script: str = EXTRACT, slack: float = 1.0
    ) -> None:
        self.folder, self.ready, self.script, self.slack = folder, ready, script, slack
        self.env: dict[str, str] = {}
        self.file_bytes = -1  # that a file may have: a full disk
        self.held: set[int] = set()  # ids that the output holds before
        self.before: list[int] | None = None  # all ids, where nothing may change
        self.rows: set[int] | None = {0, 1}  # ids that a complete run stores; None: of no interest
        self.argv: Words = ()
        self.open = contextlib.ExitStack()  # what ends with this world
        folder.mkdir()

    @cached_property
    def hub(self) -> LoopbackHub:
        """A Hub of its own, in place of the real one."""
        hub = self.open.enter_context(LoopbackHub(self.folder / "hub"))
        hub.tokens = {TOKEN: "tester"}
        self.env |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
        return hub

    @property
    def has_hub(self) -> bool:
        return "hub" in vars(self)

    def write(self, name: str | bytes, content: str | bytes) -> Path:
        path = self.folder / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        is_text = isinstance(content, str)
        path.write_bytes(content.encode(errors="surrogateescape") if is_text else content)
        return path

    def chats(self, *rows: Any, name: str = "chats.jsonl") -> Path:
        """Write a source; a str goes in as it is."""
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        return self.write(name, "\n".join(lines) + "\n")

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

    def fault(self, match: str, **how: Any) -> None:
        """Let requests meet a fault, all that match where nothing else is said."""
        self.hub.fault(match, **{"count": 10**9, **how})

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

    def resume(self, **options: Any) -> Words:
        return self.start(**{**PARTS, "resume": True, **options})

    def stored(self) -> list[int]:
        """Return the ids of all rows of the output, twice where they are there twice."""
        words, found = list(map(str, self.argv)), list[int]()
        name = words[words.index("--output") + 1] if "--output" in words else "./out"
        if not (name.startswith(".") or self.has_hub):
            return []
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
    prepare: Preparing
    exits: tuple[int, ...]
    says: str = ""  # a pattern that is found in the last line on stderr
    during: Acting = lambda *_: None  # acts while the process runs
    resumes: bool = False  # a calm run with --resume completes the job afterwards
    check: Callable[[World], str] | None = None  # returns what else is wrong
    seconds: float = SECONDS
    traces: bool = False  # a library writes a traceback of its own into its log
    short: bool = False  # belongs to the tests


ATTACKS: list[Attack] = []


def add(name: str, prepare: Preparing, *exits: int, script: str = EXTRACT, **how: Any) -> None:
    ATTACKS.append(Attack(name, script, prepare, exits or (2,), **how))


def attack(name: str, *exits: int, **how: Any) -> Callable[[Preparing], None]:
    return lambda prepare: add(name, prepare, *exits, **how)


def maker(prepare: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
    """Let a function of a world be called with everything else, to be given the world later."""
    return lambda *args, **how: lambda *world: prepare(*world, *args, **how)


@maker
def start(
    world: World, *words: object, match: str = "", fault: dict[str, Any] | None = None,
    env: dict[str, str] | None = None, **options: Any,
) -> Words:  # fmt: skip
    """Start with these options, on a Hub of its own, where requests that match meet a fault."""
    world.env |= {"HF_ENDPOINT": world.hub.endpoint, **(env or {})}
    if options.get("model") == REPO:
        world.publish(TEACHER, "model")
    if match == OUTPUT_REQUESTS["listing"]:  # asks what is there already
        world.hub.store.create("dataset", REPO, private=False)
    if fault:
        world.fault(match, **fault)
    return world.start(*words, **options)


@maker
def from_hub(world: World, request: str, deadline: float = 0.6, **fault: Any) -> Words:
    """Read or continue an output on a Hub on which a request meets a fault."""
    world.publish(world.output())
    world.fault(request, **fault)
    if world.script == EXPLORE:
        return [REPO]
    return world.resume(output=REPO, max_runtime_minutes=deadline)


@maker
def after(world: World, change: Callable[[Path], Any], *words: object, limit: int = 4) -> Words:
    """Continue an output that was changed by hand, or run on it by these words."""
    change(world.output())
    world.rows = set(range(limit))
    return words or world.resume(limit=limit)


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


# Time: the Hub

OUTPUT_REQUESTS = {  # that an extraction into a new repository makes, in their order
    "repo info": rf"GET /api/datasets/{REPO}(\?|$)",
    "whoami": "GET /api/whoami",
    "listing": "GET /api/datasets/.*/tree/",
    "create": "POST /api/repos/create",
    "preupload": "POST .*/preupload/",
    "LFS batch": "POST .*/objects/batch",
    "LFS upload": "PUT /_lfs",
    "commit": "POST .*/commit/",
    "paths after the commit": "POST .*/paths-info/",
}
NONSENSE = {
    "a list": "[1, 2]",
    "an object": "{}",
    "a page": "<html>sign in</html>",
    "deep brackets": DEEP,
    "types": '{"sha": [1], "private": "x", "files": 7, "name": null, "siblings": 3, "id": {}}',
}
WAITS = {
    "in 2099": {"Retry-After": "Tue, 01 Dec 2099 00:00:00 GMT"},
    "no number": {"Retry-After": "\u00b2 soon"},
    "of 5,000 digits": {"Retry-After": "9" * 5000},
    "by a rate limit of ages": {"RateLimit": '"api";r=0;t=99999999999'},
}
SILENCE = {"latency": 600.0}


def echo(status: int) -> dict[str, Any]:
    """Return a fault that says what it was told in secret."""
    message = f"Authorization: Bearer {' '.join(SECRETS)}\r\n{ESCAPES}"
    return {"status": status, "message": message}


def met(
    name: str, match: str, fault: dict[str, Any], *exits: int, minutes: float | None = None,
    **how: Any,
) -> None:  # fmt: skip
    """Add an extraction into a repository of its own that meets a fault."""
    run = start(match=match, fault=fault, output=REPO, max_runtime_minutes=minutes)
    add(name, run, *exits, **how)


for step, request in OUTPUT_REQUESTS.items():
    met(f"the Hub never answers: {step}; SIGTERM", request, SILENCE, 143, during=stop_when_met,
        resumes=True)  # fmt: skip
    met(f"the Hub answers nonsense: {step}", request, {"text": "[1, 2]"}, 0, 2, 4, 75, minutes=0.25,
        resumes=True)  # fmt: skip
    if step in ("repo info", "LFS upload"):
        met(f"the Hub never answers: {step}; deadline", request, SILENCE, 4, 75, minutes=0.3,
            resumes=True)  # fmt: skip
    if step in ("create", "preupload", "LFS batch", "LFS upload", "commit"):
        met(f"HTTP 403 echoes the token: {step}", request, echo(403), 4, 75, minutes=0.5,
            resumes=True)  # fmt: skip
SLOW = {"text": b" ", "times": 10**6, "pause_s": 1.0}
met("the Hub answers a byte a second", "GET /api/datasets", SLOW, 143, during=stop_when_met)
RING = {"status": 302, "headers": {"Location": "/api/datasets/x/y"}}
met("redirects in a ring", "GET /api/datasets", RING, 2, 4, 143, during=stop_when_met)
met("nothing but HTTP 503 for commits, until the deadline", "POST .*/commit/", {"status": 503},
    4, 75, minutes=0.3, resumes=True)  # fmt: skip
met("a stale listing after a commit that landed", "POST .*/paths-info/",
    {"text": "[]", "count": 3}, 0)  # fmt: skip
for kind, headers in WAITS.items():
    met(f"429 with a Retry-After {kind}", "GET /api/datasets", {"status": 429, "headers": headers},
        143, during=stop_when_met)  # fmt: skip
for status in (408, 409, 429, 500, 503):
    met(f"nothing but HTTP {status}, until the deadline", "/api/", {"status": status}, 4, 75,
        minutes=0.3)  # fmt: skip
for status in (400, 401, 403, 404):
    met(f"HTTP {status} echoes the token", "/api/(datasets|repos)", echo(status), 4)


@attack("the commit's answer is lost and then nothing answers", 143, during=stop_when_met,
        resumes=True)  # fmt: skip
def _(world: World) -> Words:
    world.fault("POST .*/commit/", drop="after", count=1)
    world.fault("commit/|paths-info|tree", skip=1, **SILENCE)
    return world.start(output=REPO)


for script, kind in product((EXTRACT, LENGTHS), ("model", "dataset")):
    add(f"the Hub of the {kind} never answers; SIGTERM",
        start(fault=SILENCE, **{kind: "tester/thing"}), 143, script=script, during=stop_when_met,
        short=kind == "model")  # fmt: skip
add("the Hub of the model never answers; deadline",
    start(fault=SILENCE, model=REPO, max_runtime_minutes=0.3), 2, 4, 75, seconds=40)  # fmt: skip
WEIGHTS = {"match": "safetensors", "fault": SILENCE, "model": REPO}
add("the weights of the model never come; SIGTERM", start(**WEIGHTS), 143, during=stop_when_met)
add("the weights of the model never come; deadline", start(**WEIGHTS, max_runtime_minutes=0.3), 75)
add("the Hub never answers", start(REPO, fault=SILENCE), script=EXPLORE, seconds=200, says="logits")


# Time: templates and conversations

OWN = (TEACHER / "chat_template.jinja").read_text()
TEMPLATES = {
    "loops for ever": "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2,
    "a billion blanks by %": "{{ '%1000000000d' % 1 }}",
    "a billion blanks by format": "{{ '{:>9999999999}'.format(1) }}",
    "a long string": "{{ 'a' * 10**11 }}",
    "a number of 10**9 digits": "{{ 10 ** (10 ** 9) }}",
    "3,000 nested ifs": "{% if true %}" * 3000 + "{% endif %}" * 3000,
    "a recursive macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a sandbox violation": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "an include": "{% include '/etc/passwd' %}",
    "bad syntax and escape codes": "{{ " + ESCAPES + " }}",
    "raises with escape codes": "{{ raise_exception('" + ESCAPES + "') }}",
}
CHAT = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]}
LONG = {"messages": [{"role": ("user", "assistant")[n % 2], "content": "a"} for n in range(10**5)]}


@maker
def with_template(world: World, template: str) -> Words:
    model = shutil.copytree(TEACHER, world.folder / "model")
    world.write("model/chat_template.jinja", template + OWN)
    return world.start(model=model)


@maker
def of_source(world: World, *rows: Any, stored: set[int] | None = None, **options: Any) -> Words:
    world.rows = stored
    return world.start(dataset=world.chats(*rows), **options)


for script, (kind, template) in product((EXTRACT, LENGTHS), TEMPLATES.items()):
    exits = (2, 143) if kind == "loops for ever" else (2,)
    add(f"a template: {kind}", with_template(template), *exits, script=script)
add("a template of the output that loops for ever",
    after(lambda out: (out / "chat_template.jinja").write_text(TEMPLATES["loops for ever"] + OWN),
          "out", "--sample", "0"), 0, 2, script=EXPLORE)  # fmt: skip


# Data: sources

SOURCES: dict[str, tuple[list[Any], dict[str, Any], int]] = {  # rows, options, exit
    "a conversation of 100,000 messages": ([LONG, CHAT], {"stored": {1}}, 0),
    "JSON 20,000 deep": (['{"messages": ' + DEEP + "}", CHAT], {}, 2),
    "JSON 20,000 deep, a stream": (['{"messages": ' + DEEP + "}", CHAT], {"streaming": True}, 2),
    "deep JSON as text in a cell": ([{"messages": "[" * 100_000}, CHAT], {}, 0),
    "roles with escape codes": (
        [{"messages": [{"role": ESCAPES, "content": "a"}, *CHAT["messages"]]}, CHAT], {}, 0),
    "content with escape codes": (
        [{"messages": [{"role": "user", "content": ESCAPES}, *CHAT["messages"][1:]]}], {}, 0),
    "columns with escape codes": ([{ESCAPES: "a"}], {}, 2),
    "ids with escape codes": ([{**CHAT, "id": ESCAPES}], {"index_col": "id"}, 2),
    "ids twice": ([{**CHAT, "id": 1}, {**CHAT, "id": 1}], {"index_col": "id"}, 2),
    "ids beyond 32 bits": ([{**CHAT, "id": 2**70}], {"index_col": "id"}, 2),
    "ids that are NaN": (['{"id": NaN, "messages": []}', CHAT], {"index_col": "id"}, 2),
    "a number of 5,000 digits": (['{"messages": ' + "9" * 5000 + "}", CHAT], {}, 2),
    "NUL bytes": (["\0\0\0\0", CHAT], {}, 2),
    "no UTF-8": ([CHAT, '{"a": "\udce9"}'], {}, 2),
    "arguments of templates 3,000 deep": (
        [{**CHAT, "chat_template_kwargs": '{"a": ' * 3000 + "1" + "}" * 3000}, CHAT], {}, 0),
}  # fmt: skip
for script, (kind, (rows, options, code)) in product((EXTRACT, LENGTHS), SOURCES.items()):
    add(f"a source: {kind}", of_source(*rows, **options), code, script=script,
        short=kind == "JSON 20,000 deep")  # fmt: skip


@attack("a source: a ring of links, a file named by no UTF-8", 0, 2, short=True)
def _(world: World) -> Words:
    world.rows = None
    world.write(b"chats/\xff\x1b[31m.jsonl", json.dumps(CHAT) + "\n")
    (world.folder / "chats" / "again").symlink_to(world.folder / "chats")
    (world.folder / "chats" / "gone.jsonl").symlink_to("nowhere")
    return world.start(dataset="./chats")


def check_card(world: World) -> str:
    card = (world.folder / "out" / "README.md").read_text()
    wrong = {
        "an <img>": "<img" in card.split("\n---\n", 1)[1],
        "a title": "\n# T" in card,
        "its line not once": card.count(extract_logits.CARD_LINE) != 1,
        "a control character": CONTROL.search(card),
    }
    return "; ".join(f"in the card: {what}" for what, found in wrong.items() if found)


@attack("a source named by codes, HTML, the card's line", 0, check=check_card)
def _(world: World) -> Words:
    name = f"{ESCAPES}<img src=x onerror=1>\n# T\n{extract_logits.CARD_LINE}\n---\n|a|b|.jsonl"
    dataset = world.chats(CHAT, CHAT, name=name.replace("/", ""))
    return world.start(dataset=dataset, upload_every=1)


# Names and numbers on the command line

for name in ("user/..", "user/x--y", "üser/näme", "user/" + "x" * 120, "user/\udcff", "user/a\nb",
             f"user/{ESCAPES}"):  # fmt: skip
    shown = show(name, 24)
    add(f"--output {shown}", start(output=name))
    add(f"--model {shown}", start(model=name))
    add(f"--dataset {shown}", start(dataset=name), script=LENGTHS)
    add(f"OUTPUT {shown}", start(name), script=EXPLORE)

GENEROUS: dict[str, object] = {  # may be as large as one likes
    **dict.fromkeys(("--limit", "--upload-every", "--max-seq-len", "--max-batch-tokens"), 10**30),
    **dict.fromkeys(("--max-runtime-minutes", "--upload-size-mb", "--plan --plan-tokens"), "1e308"),
}
HUGE: dict[str, object] = {
    **dict.fromkeys(("--start-offset", "--sampled-n", "--seed"), 10**30),
    "--rank 0 --world-size": "9" * 5000,
    "--template-kwargs": "[" * 100_000,
    "--batch-thresholds": '{"' + "9" * 5000 + '": 1}',
    "--sample-subject": '{"a": ' * 5000 + "1" + "}" * 5000,
    "--device": f"cuda:{10**30}",
    "--chat-template": "/dev/zero",
}
for flags, value in {**GENEROUS, **HUGE}.items():
    name = flags.split()[-1]
    add(f"{name} beyond all measure", start(*flags.split(), value),
        *((0, 2) if flags in GENEROUS else (2,)), short=name == "--chat-template")  # fmt: skip
for value, name in product(
    ("nan", "inf", "-inf"), ("--max-runtime-minutes", "--upload-size-mb", "--top-p", "--plan-rate")
):
    add(f"{name} {value}", start(name, value))


# What the output holds

SETTINGS, CHECKPOINT = "extraction_config.json", "checkpoint.json"


@maker
def put(folder: Path, path: str, content: bytes | int) -> None:
    """Write a file anew; an int: a hole of that size."""
    (folder / path).unlink(missing_ok=True)
    with (folder / path).open("wb") as file:
        file.write(content) if isinstance(content, bytes) else file.truncate(content)


@maker
def tell(folder: Path, path: str, section: str, name: str, value: Any) -> None:
    content = json.loads((folder / path).read_text())
    (content[section] if section else content)[name] = value
    (folder / path).write_text(json.dumps(content))


CHECKPOINTS: dict[str, bytes | int] = {  # an int: a hole of that size
    "200,000 brackets": b"[" * 200_000,
    "nothing": b"",
    "null": b"null",
    "parts of wrong types": b'{"format_version": 1, "job": 3, "parts": 7, "skipped": []}',
    "a version of 5,000 digits": b'{"format_version": ' + b"9" * 5000 + b"}",
    "no UTF-8": b"\xff\xfe" * 50,
    "escape codes": b'{"job": "' + ESCAPES.encode() + b'"}',
    "60 MB of objects": b'{"parts": [' + b"{}," * 20_000_000 + b"{}]}",
    "3 GB": 3 * 2**30,
}
for kind, content in CHECKPOINTS.items():
    exits = (0, 2) if kind == "3 GB" else (0,)
    add(f"a checkpoint: {kind}", after(put(CHECKPOINT, content)), *exits)
    if kind in ("200,000 brackets", "parts of wrong types", "60 MB of objects"):
        add(f"a checkpoint: {kind}", after(put(CHECKPOINT, content), "out", "--validate"),
            0, 1, 2, 3, script=EXPLORE)  # fmt: skip
for column, value in {
    "rows": [float("nan"), float("inf")], "mass": [float("nan"), "x"], "ids": [None, DEEP],
    "bytes": [-1, True],
}.items():  # fmt: skip
    add(
        f"a checkpoint whose {column} is absurd", after(tell(CHECKPOINT, "parts", column, value)), 0
    )

for setting, value in (
    *(("rows_per_part", value) for value in ("x", 0, -1, 10**30, 1.5, True, [2])),
    ("template_date", 5), ("numerics", 3), ("model_revision", [1]), ("dataset_revision", {"a": 1}),
    ("limit", "all"), ("model", 7), ("versions", None), ("chat_template_sha256", 3),
    ("vocab_size", "many"), ("format_version", 99),
):  # fmt: skip
    add(f"settings: {setting} is {value!r}", after(tell(SETTINGS, "", setting, value)), 0, 2)
SAID = {"model": str(TEACHER), "dataset": str(CHATS)}
for kind, value in {
    "a list": [],
    "types": {"model": 5, "dataset": [1], "limit": "x"},
    "a limit of text": {**SAID, "limit": "4"},
    "thresholds of text": {**SAID, "batch_thresholds": "x"},
    "escape codes": {"model": ESCAPES, "dataset": ESCAPES},
    "places of the machine": {**SAID, "cache_dir": "/etc/x"},
    "code of strangers": {**SAID, "trust_remote_code": True},
}.items():
    words = ("--output", "./out", "--resume", "--cache-dir", "cache")
    add(f"settings: options are {kind}", after(tell(SETTINGS, "", "options", value), *words), 0, 2)
for kind, content in {
    "brackets": b"[" * 200_000, "null": b"null", "no UTF-8": b"\xff", "3 GB": 3 * 2**30,
    "a number of 5,000 digits": b'{"limit": ' + b"9" * 5000 + b"}",
}.items():  # fmt: skip
    add(f"settings: {kind}", after(put(SETTINGS, content)), says=SETTINGS)
    add(f"settings: {kind}", after(put(SETTINGS, content), "out", "--stats"), 0, 2, script=EXPLORE)

for kind, content in {
    "YAML 50,000 deep": b"---\na: " + b"[" * 50_000 + b"\n---\n",
    "YAML of aliases": b"---\n" + b"\n".join(
        b"a%d: &a%d [%s]" % (n, n, b",".join([b"*a%d" % (n - 1)] * 9 if n else [b"1"] * 9))
        for n in range(12)) + b"\n---\n",
    "YAML with Python": b"---\na: !!python/object/apply:os.system ['touch /tmp/owned']\n---\n",
    "its line a thousand times": extract_logits.CARD_LINE.encode() * 1000,
    "no UTF-8 and NUL": b"---\n\xff\0: \xfe\n---\n\xff\0" + ESCAPES.encode(),
    "a date of the year 99999": b"---\na: 99999-99-99\nb: 2020-01-01\n---\n",
    "30 MB": b"x\n" * 15_000_000,
    "3 GB": 3 * 2**30,
}.items():  # fmt: skip
    exits = (0, 4) if kind == "3 GB" else (0,)
    add(f"a card: {kind}", after(put("README.md", content), limit=5), *exits)


@maker
def reshard(folder: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a part that no checkpoint knows."""
    (folder / CHECKPOINT).unlink()
    path = folder / "data" / "part-00000.parquet"
    path.write_bytes(change(path.read_bytes()))


@maker
def with_metadata(data: bytes, value: bytes) -> bytes:
    """Give a part other words about itself."""
    table, sink = pq.read_table(pa.BufferReader(data)), pa.BufferOutputStream()
    metadata = {**table.schema.metadata, b"logits.part": value}
    pq.write_table(table.replace_schema_metadata(metadata), sink)
    return bytes(sink.getvalue())


FOOTERS: dict[str, Callable[[bytes], bytes]] = {
    "is empty": lambda data: b"",
    "is cut": lambda data: data[: len(data) // 2],
    "announces a footer of 4 GB": lambda data: data[:-8] + b"\xff\xff\xff\xffPAR1",
    "has a footer of noise": lambda data: data[:-300] + b"\x9b" * 292 + data[-8:],
    "says brackets of itself": with_metadata(b"[" * 200_000),
    "says null of itself": with_metadata(b"null"),
    "says skipped rows of wrong types": with_metadata(b'{"number": 0, "skipped": 5}'),
}
for kind, change in FOOTERS.items():
    add(f"a part that {kind}", after(reshard(change)), 0)
    add(f"a part that {kind}", after(reshard(change), "out", "--validate"), 0, 1, 2, 3,
        script=EXPLORE)  # fmt: skip


@maker
def bomb(world: World, flag: str) -> Words:
    """Write rows that point at one large value of a dictionary."""
    write_parts(world.folder / "out")
    path = world.folder / "out" / "data" / "part-00000.parquet"
    table = pa.concat_tables([pq.read_table(path).slice(0, 1)] * 64)
    at, name = table.schema.get_field_index("top_indices_high"), "top_indices_high"
    large = pa.array([b"\0" * 64 * 2**20], pa.binary())
    table = table.set_column(at, name, pa.DictionaryArray.from_arrays([0] * 64, large))
    pq.write_table(table, path, use_dictionary=[name], compression="zstd", store_schema=False,
                   dictionary_pagesize_limit=2**30)  # fmt: skip
    return ["out", flag]


for flag in ("--stats", "--validate", "--sample=0"):
    add(f"a part of few bytes that decodes to 4 GB, {flag}", bomb(flag), 0, 1, 2, 3, script=EXPLORE)


# What the cache holds


@maker
def with_cache(world: World, change: Callable[[Path], Any], name: str) -> Words:
    """Continue a job of which a part waits in the cache, changed by hand."""
    out = world.output()
    world.held = {2, 3}
    cache = world.folder / "cache" / extract_logits.cache_key(str(out))
    (cache / "pending").mkdir(parents=True)
    path = cache / f"{name}-00000.parquet"
    shutil.move(out / "data" / "part-00000.parquet", path)
    extract_logits.digest_path(path).write_text(extract_logits.digest_file(path))
    change(path)
    return world.resume()


def damage_pages(path: Path) -> None:
    """Turn bytes in the middle of a file, the footer left whole."""
    data = bytearray(path.read_bytes())
    for at in range(40, len(data) // 2, 7):
        data[at] ^= 0xFF
    path.write_bytes(data)


@maker
def link_to(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


CACHED = {"backup": "backup_part", "part": "part", "pending": "pending/pending"}
CACHE_FAULTS: dict[str, Callable[[Path], Any]] = {
    "has damaged pages": damage_pages,
    "is empty": lambda path: path.write_bytes(b""),
    "is noise": lambda path: path.write_bytes(b"PAR1" + b"\x9b" * 5000 + b"PAR1"),
    "has no digest": lambda path: extract_logits.digest_path(path).unlink(),
    "has a digest of noise": lambda path: extract_logits.digest_path(path).write_bytes(b"\xff\xfe"),
    "is a folder": lambda path: (path.unlink(), path.mkdir()),
    "is a link to nothing": link_to("nowhere"),
    "is a link to itself": link_to("backup_part-00000.parquet"),
    "is a link to /dev/zero": link_to("/dev/zero"),
}
for (kind, damage), (ends, name) in product(CACHE_FAULTS.items(), CACHED.items()):
    if ends == "backup" or kind in ("has damaged pages", "is noise"):
        add(f"a {ends} in the cache that {kind}", with_cache(damage, name), 0)


# The machine


def kill_child(world: World, process: Process) -> None:
    """Kill a process that the run has started, as the system does for want of memory."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while wait_for(children.exists, process):
        with contextlib.suppress(OSError):  # it has gone by itself
            for child in children.read_text().split():
                os.kill(int(child), signal.SIGKILL)
        time.sleep(0.02)


add("a process that tokenizes is killed", of_source(*[CHAT] * 6000, limit=6000, upload_every=50),
    4, during=kill_child, says="memory")  # fmt: skip


@maker
def remove_during(world: World, process: Process, name: str, sign: str) -> None:
    """Remove a folder again and again, once there is a sign of work."""
    wait_for(lambda: next(world.folder.glob(sign), None), process)
    while process.returncode is None:
        shutil.rmtree(world.folder / name, ignore_errors=True)
        time.sleep(0.1)


# What was committed and is gone before it is looked for is looked for two minutes, a commit.
for name, sign in (("cache", "cache/*/pending"), ("out", "out/data/*")):
    add(f"{name} is removed again and again, once there is {sign}",
        of_source(*[CHAT] * 300, limit=300, upload_every=3, max_batch_size=1), 0, 2, 4,
        during=remove_during(name, sign), seconds=600.0)  # fmt: skip


@maker
def at_place(world: World, option: str, place: str) -> Words:
    (world.folder / "ring").symlink_to("ring")
    local = option == "cache_dir" or place[0] in "/.~"
    return world.start(**{option: place if local else f"./{place}"})


for place in ("/proc/here", "/dev/null/here", "/dev/full", "ring/here", "a" * 300, "./\udcff",
              "~nobody-has-this/x"):  # fmt: skip
    for option, exits in (("output", (2, 4)), ("cache_dir", (0, 2, 4))):
        add(f"--{option} {show(place, 16)}", at_place(option, place), *exits)


@attack("files may have 20 kB (a full disk)", 4, says="make room", resumes=True)
def _(world: World) -> Words:
    world.file_bytes = 20_000
    return world.start(streaming=True)


NO_THREADS = """import threading
left, start = [{}], threading.Thread.start
def refuse(self):
    if not left[0]:
        raise RuntimeError("can't start new thread")
    left[0] -= 1
    start(self)
threading.Thread.start = refuse
"""


@maker
def no_threads(world: World, after: int) -> Words:
    """Let the start of a thread fail, as with too low a limit of processes."""
    world.write("site/sitecustomize.py", NO_THREADS.format(after))
    world.env["PYTHONPATH"] = str(world.folder / "site")
    return world.start()


for count in (0, 5):
    add(f"no thread is to be had after {count}", no_threads(count), 2, 4, resumes=True)


# Answers of strange size

BLOCK = 2**20


def gzip_bomb(size: int) -> bytes:
    """Return few bytes of gzip that decode to many blanks."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(b" " * BLOCK) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + block * (size // BLOCK)


GZIP = {"text": gzip_bomb(2 * 2**30), "headers": {"Content-Encoding": "gzip"}}
for script in (EXTRACT, EXPLORE):
    for request in (f"GET /api/datasets/{REPO}", "GET .*/tree/", f"GET .*/{CHECKPOINT}",
                    f"GET .*/{SETTINGS}"):  # fmt: skip
        add(f"an answer of 2 GB in gzip: {request}", from_hub(request, **GZIP), 0, 2, 4, 75,
            script=script, short=script == EXPLORE and SETTINGS in request)  # fmt: skip
    for kind, text in NONSENSE.items():
        add(f"the Hub answers {kind} to every question", from_hub("GET", text=text, deadline=0.3),
            *((2, 4, 75) if script == EXTRACT else (2,)), script=script,
            short=(script, kind) == (EXPLORE, "deep brackets"))  # fmt: skip
LARGE = {"text": b" " * BLOCK, "times": 2048}
add("a listing of 2 GB", from_hub("GET .*/tree/", **LARGE), 2, 4, 75)
CUT = {"drop": "body", "drop_after": 10}
add("an answer that is cut", from_hub("GET .*/tree/", deadline=0.3, **CUT), 4, 75)


# Secrets

for status in (400, 401, 403, 404, 500):
    add(f"HTTP {status} echoes the token", start(REPO, fault=echo(status)), script=EXPLORE,
        seconds=120, short=status == 403)  # fmt: skip
    add(f"HTTP {status} echoes the token to the model",
        start(fault=echo(status), model="tester/thing"), script=LENGTHS, seconds=120)  # fmt: skip
ENDINGS = {"a line's end": "\nX", "an umlaut": "äX", "an escape code": "\x1b[31m"}
for kind, ending in ENDINGS.items():
    env = {"HF_TOKEN": TOKEN + ending}
    add(f"the token has {kind}", start(output=REPO, env=env), 2, 4)
    add(f"the token has {kind}", start(REPO, env=env), script=EXPLORE)
env = dict.fromkeys(("HF_HUB_VERBOSITY", "DATASETS_VERBOSITY", "TRANSFORMERS_VERBOSITY"), "debug")
add("the Hub's client logs everything", start(output=REPO, env={"HF_DEBUG": "1", **env}), 0)
env = {"HTTPS_PROXY": f"http://me:{TOKEN}@127.0.0.1:9", "HF_ENDPOINT": "https://hub.test"}
add("a proxy with a password is not there",
    start(output=REPO, max_runtime_minutes=0.3, env=env), 4, 75)  # fmt: skip
add("tasks of an executor fail with an echo of the token",
    start("--executor", "local", "--tasks", 2, "--workers", 1, output=REPO,
          match="POST .*/commit/", fault=echo(403)), 4, 75, seconds=90, traces=True)  # fmt: skip


@attack("a script of a batch system, the token in its environment", 0, seconds=90)
def _(world: World) -> Words:
    world.rows = None
    path = world.write("bin/sbatch", "#!/bin/sh\necho Submitted batch job 1\n")
    path.chmod(0o755)
    world.env["PATH"] = f"{path.parent}:{os.environ['PATH']}"
    options = '{"partition": "p", "time": "1:00:00"}'
    return world.start("--executor", "slurm", "--tasks", 2, "--executor-options", options)


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
    world: World, argv: Words, killed_after_s: float, during: Acting = lambda *_: None
) -> Ended:
    """Run the world's script to its end, or kill it; measure its time and its peak of memory."""
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(world.folder / "home"), "HF_TOKEN": TOKEN, **world.env,
    }  # fmt: skip

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
        resource.setrlimit(resource.RLIMIT_FSIZE, (world.file_bytes, world.file_bytes))

    words = [sys.executable, *(os.fsencode(str(word)) for word in (ROOT / world.script, *argv))]
    begun, peak, killed = time.monotonic(), 0, False
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            words, cwd=world.folder, env=env, start_new_session=True, preexec_fn=limit,
            stdin=subprocess.DEVNULL, stdout=out, stderr=err,
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
    ended = run(world, world.start(**PARTS), 300.0)
    assert ended.code == 0, ended.stderr
    return world.folder / "out"


def run_attack(attack: Attack, folder: Path, ready: Path, slack: float = 1.0) -> Ended:
    """Run an attack, and where it says so a run with --resume after it, without faults."""
    world = World(folder, ready, attack.script, slack)
    with world.open:
        world.argv = attack.prepare(world)
        world.before = None if attack.script == EXTRACT else world.stored()
        limit_s = max(KILLED_AFTER_S, attack.seconds) * slack
        ended = run(world, world.argv, limit_s, attack.during)
        ended.wrong = judge(attack, world, ended)
        if attack.check and (more := attack.check(world)):
            ended.wrong.append(more)
        if world.has_hub and world.hub.faults and not world.hub.faults_met:
            ended.wrong.append("the Hub was never asked")
        if attack.resumes:
            if world.has_hub:
                world.hub.clear()
            world.file_bytes = -1
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
    parser.add_argument("--list", action="store_true", help="print their names and stop")
    parser.add_argument("--jobs", type=int, default=1, help="attacks at the same time")
    parser.add_argument("--slack", type=float, default=1.0, help="times the seconds allowed")
    options = parser.parse_args()
    chosen = [one for one in ATTACKS if re.search(options.only, f"{one.script} {one.name}")]
    if options.list:
        print(*(f"{one.script:18} {show(one.name, 80)}" for one in chosen), sep="\n")
        return 0
    folder, done, wrong = Path(tempfile.mkdtemp(prefix="attacks-")), [], []
    ready = make_output(folder)
    print_head("attack", "script", "exit", "s", "MB", "last line")
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = {
            pool.submit(run_attack, one, folder / f"{n:03d}", ready, options.slack): one
            for n, one in enumerate(chosen)
        }
        for future in as_completed(runs):
            one, ended = runs[future], future.result()
            done.append(ended)
            print_row(show(one.name, 60), one.script.split("_")[0],
                      "-" if ended.code is None else ended.code, f"{ended.seconds:.1f}",
                      f"{ended.peak_mb:.0f}", show(ended.last_line, 110))  # fmt: skip
            for said in ended.wrong:
                print(f"    WRONG {show(said, 200)}", flush=True)
            wrong += [f"{one.script}: {one.name}"] if ended.wrong else []
    if wrong:
        print(f"left for a look: {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    codes = Counter(str(ended.code) for ended in done)
    print(json.dumps({
        "attacks": len(done), "wrong": wrong, "exits": dict(sorted(codes.items())),
        "most_seconds": round(max((ended.seconds for ended in done), default=0.0), 1),
        "most_mb": round(max((ended.peak_mb for ended in done), default=0.0)),
    }))  # fmt: skip
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
