"""Attack the three scripts with hostile worlds; print how each attack ends.

    python tests/tools/attacks.py                      # all of them: a table, then a line of JSON
    python tests/tools/attacks.py --only "hub" --list

An attack is a real process of a real script in a world made for it: a source, a teacher's template,
an output, a cache, an environment, a loopback Hub with faults, and sometimes somebody who acts
while it runs. A run must end by itself, in bounded time and memory, with an exit code that the
contract allows there, without a traceback, a raw control character or a byte of the access token
anywhere: neither on the terminal nor in any file that it leaves. No row that the output held goes,
none is there twice, an exit code of 0 means that all are there; and where an attack says so, a
calm run with --resume completes the job afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS)]

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from loopback_hub import LoopbackHub  # noqa: E402
from outputs import Output  # noqa: E402
from small_output import write_parts  # noqa: E402

import extract_logits  # noqa: E402

TEACHER = TESTS / "teacher" / "model"
CHATS = TESTS / "teacher" / "conversations.jsonl"
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

Words = Sequence[object]


# The world of an attack ---------------------------------------------------------------------------


class World:
    """A folder that a run works in, with what it meets there."""

    def __init__(self, folder: Path, ready: Path, seed: int, slack: float = 1.0) -> None:
        self.folder, self.ready, self.slack = folder, ready, slack
        self.random = random.Random(seed)
        self.env: dict[str, str] = {}
        self.held: set[int] = set()  # ids that the output holds before
        self.before: list[int] | None = None  # all ids, where nothing may change
        self.rows: set[int] | None = {0, 1}  # ids that a complete run stores; None: of no interest
        self.argv: Words = ()
        folder.mkdir()

    @cached_property
    def hub(self) -> LoopbackHub:
        """A Hub of its own, in place of the real one."""
        hub = LoopbackHub(self.folder / "hub").__enter__()
        hub.tokens = {TOKEN: "tester"}
        self.env |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
        return hub

    def write(self, name: str | bytes, content: str | bytes) -> Path:
        """Write a file."""
        path = self.folder / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def chats(self, *rows: Any, name: str = "chats.jsonl") -> Path:
        """Write a source; a str goes in as it is."""
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        return self.write(name, "\n".join(lines) + "\n")

    def teacher(self, template: str) -> Path:
        """Copy the teacher, with another template."""
        shutil.copytree(TEACHER, self.folder / "model")
        self.write("model/chat_template.jinja", template)
        return self.folder / "model"

    def output(self, name: str = "out") -> Path:
        """Put an output of the usual source there: conversations 0..3 in two parts."""
        self.held, self.rows = {0, 1, 2, 3}, {0, 1, 2, 3}
        shutil.copytree(self.ready, self.folder / name)
        return self.folder / name

    def publish(self, folder: Path, repo: str = REPO, kind: str = "dataset") -> None:
        """Put a folder onto the Hub."""
        store = self.hub.store
        found, _ = store.create(kind, repo, private=False)
        entries = {}
        for path in folder.rglob("*"):
            if path.is_file():
                data, name = path.read_bytes(), path.relative_to(folder).as_posix()
                entry = store.put_blob(data)
                if path.suffix in (".parquet", ".safetensors"):
                    sha256 = hashlib.sha256(data).hexdigest()
                    store.put_lfs(sha256, data)
                    entry = type(entry)(entry.oid, len(data), sha256)
                entries[name] = entry
        store.commit(found, "Publish", entries, [])

    def fault(self, match: str, **how: Any) -> None:
        """Let requests meet a fault, all that match where nothing else is said."""
        self.hub.fault(match, **{"count": 10**9, **how})

    def extract(self, *words: object, **options: Any) -> list[object]:
        """Return options of an extraction: two conversations into ./out."""
        usual = {"model": TEACHER, "dataset": CHATS, "output": "./out", "cache_dir": "cache",
                 "limit": 2}  # fmt: skip
        if minutes := options.get("max_runtime_minutes"):  # a busy machine starts slowly
            options["max_runtime_minutes"] = minutes * self.slack
        return [*words, *name_options({**usual, **options})]

    def resume(self, *words: object, **options: Any) -> list[object]:
        """Return options that continue the output of `output`."""
        usual = {"limit": 4, "upload_every": 2, "store_tokens": True, "resume": True}
        return self.extract(*words, **{**usual, **options})

    def lengths(self, *words: object, **options: Any) -> list[object]:
        """Return options of a measurement of lengths."""
        usual = {"model": TEACHER, "dataset": CHATS, "output_dir": "lengths", "num_proc": 1}
        return [*words, *name_options({**usual, **options})]

    def start(self, script: str, **options: Any) -> list[object]:
        """Return options of one of the two."""
        return (self.extract if script == EXTRACT else self.lengths)(**options)

    def close(self) -> None:
        """End the Hub."""
        if "hub" in self.__dict__:
            self.hub.__exit__()

    def stored(self) -> list[int]:
        """Return the ids of all rows of the output, twice where they are there twice."""
        words = list(map(str, self.argv))
        name = words[words.index("--output") + 1] if "--output" in words else "./out"
        if name.startswith("."):
            place = Output(self.folder / name)
        elif "hub" in self.__dict__:
            place = Output(name, self.hub)
        else:
            return []
        found: list[int] = []
        try:
            names = sorted(place.files())
        except OSError:  # a name that is none
            return found
        paths = [path for path in names if re.fullmatch(r"data/.*part-\d+\.parquet", path)]
        for path in paths:
            try:
                table = pq.read_table(pa.BufferReader(place.read(path)), columns=["index"])
            except (OSError, pa.ArrowException, KeyError):
                continue  # damaged by the attack itself
            found += table["index"].to_pylist()
        return found


def name_options(options: Mapping[str, Any]) -> list[object]:
    """Return keywords as options, `x=True` a bare one, None and False one that is left out."""
    words: list[object] = []
    for name, value in options.items():
        if value is not None and value is not False:
            words.append("--" + name.replace("_", "-"))
            words += [] if value is True else [value]
    return words


# Attacks ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        name: what is hostile.
        script: what is attacked.
        prepare: makes the world and returns the options of the run.
        exits: codes that it may end with.
        says: a pattern that is found in the last line on stderr.
        during: acts while the process runs.
        resumes: whether a calm run with --resume completes the job afterwards.
        check: what else must be so; returns what is wrong.
        seconds, peak_mb: what the run may take.
        traces: whether a library writes a traceback of its own into its log.
        short: whether it belongs to the tests.
    """

    name: str
    script: str
    prepare: Callable[[World], Words]
    exits: tuple[int, ...] = (2,)
    says: str = ""
    during: Callable[[World, subprocess.Popen[bytes]], None] | None = None
    resumes: bool = False
    check: Callable[[World], str] | None = None
    seconds: float = SECONDS
    peak_mb: float = PEAK_MB
    traces: bool = False
    short: bool = False


ATTACKS: list[Attack] = []


def add(name: str, script: str, prepare: Callable[[World], Words], **how: Any) -> None:
    """Enter an attack in the register."""
    ATTACKS.append(Attack(name, script, prepare, **how))


def attack(name: str, script: str, **how: Any) -> Callable[[Callable[[World], Words]], Any]:
    """Enter a function that prepares a world in the register."""
    return lambda prepare: add(name, script, prepare, **how)


def maker(prepare: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
    """Let a function of a world be called with everything else, to be given the world later."""
    return lambda *args, **how: lambda *world: prepare(*world, *args, **how)


def is_running(process: subprocess.Popen[bytes]) -> bool:
    """Tell whether a process runs; its end is left to who measures it, unlike by `poll`."""
    with contextlib.suppress(ChildProcessError):
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    return False


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes]) -> bool:
    """Wait until a condition holds while a process runs."""
    while is_running(process):
        if condition():
            return True
        time.sleep(0.02)
    return False


def stop_when_met(world: World, process: subprocess.Popen[bytes]) -> None:
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
    "null": "null",
    "a page": "<html>sign in</html>",
    "deep brackets": DEEP,
    "types": '{"sha": [1], "private": "x", "files": 7, "name": null, "siblings": 3, "id": {}}',
}


@maker
def into_new(
    world: World, request: str, *, there: bool = False, deadline: float | None = None, **fault: Any
) -> Words:
    """Extract into a Hub on which a request meets a fault."""
    if there:
        world.hub.store.create("dataset", REPO, private=False)
    world.fault(request, **fault)
    return world.extract(output=REPO, max_runtime_minutes=deadline)


for step, line in OUTPUT_REQUESTS.items():
    add(f"the Hub never answers: {step}; SIGTERM", EXTRACT,
        into_new(line, there=step == "listing", latency=600.0), exits=(143,),
        during=stop_when_met, resumes=True)  # fmt: skip
    add(f"the Hub answers nonsense: {step}", EXTRACT,
        into_new(line, there=step == "listing", text="[1, 2]", deadline=0.25),
        exits=(0, 2, 4, 75), resumes=True)  # fmt: skip


@attack("the commit's answer is lost and then nothing answers", EXTRACT, exits=(143,),
        during=stop_when_met, resumes=True)  # fmt: skip
def _(world: World) -> Words:
    world.fault("POST .*/commit/", drop="after", count=1)
    world.fault("commit/|paths-info|tree", latency=600.0, skip=1)
    return world.extract(output=REPO)


for name, repo_type in {"model": "models", "dataset": "datasets"}.items():
    option = {name: "tester/thing"}
    add(f"the Hub of the {name} never answers; SIGTERM", EXTRACT,
        lambda world, kind=repo_type, option=option: (
            world.fault(f"/(api/)?{kind}?", latency=600.0) or world.extract(**option)),
        exits=(143,), during=stop_when_met, short=name == "model")  # fmt: skip
    add(f"the Hub of the {name} never answers; SIGTERM", LENGTHS,
        lambda world, option=option: (
            world.fault("", latency=600.0) or world.lengths(**option)),
        exits=(143,), during=stop_when_met, short=name == "model")  # fmt: skip


for kind, match, how in (
    ("Hub of the model never answers; deadline", "", {"exits": (2, 4, 75), "seconds": 40}),
    ("weights of the model never come; SIGTERM", "safetensors",
     {"exits": (143,), "during": stop_when_met}),
    ("weights of the model never come; deadline", "safetensors", {"exits": (75,)}),
):  # fmt: skip
    add(f"the {kind}", EXTRACT,
        lambda world, match=match, stopped="during" in how: (
            world.publish(TEACHER, REPO, "model") or world.fault(match, latency=600.0) or
            world.extract(model=REPO, max_runtime_minutes=None if stopped else 0.3)),
        **how)  # fmt: skip


@attack("the Hub never answers", EXPLORE, exits=(2,), seconds=200, says="logits")
def _(world: World) -> Words:
    world.fault("", latency=600.0)
    return [REPO]


WAITS = {
    "in 2099": {"Retry-After": "Tue, 01 Dec 2099 00:00:00 GMT"},
    "negative": {"Retry-After": "-5"},
    "no number": {"Retry-After": "\u00b2 soon"},
    "of 5,000 digits": {"Retry-After": "9" * 5000},
    "by a rate limit of ages": {"RateLimit": '"api";r=0;t=99999999999'},
}
STOPPED = {"exits": (143,), "during": stop_when_met}
RESUMABLE = {"exits": (4, 75), "resumes": True}
MET_BY_NEW: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # request, fault, end
    "the Hub never answers: repo info; deadline": (
        "GET", {"latency": 600.0, "deadline": 0.3}, {"exits": (4, 75)}),
    "the Hub never answers: LFS upload; deadline": (
        "PUT /_lfs", {"latency": 600.0, "deadline": 0.3}, RESUMABLE),
    "the Hub answers a byte a second": (
        "GET /api/datasets", {"text": b" ", "times": 10**6, "pause_s": 1.0}, STOPPED),
    "nothing but HTTP 503 for commits, until the deadline": (
        "POST .*/commit/", {"status": 503, "deadline": 0.3}, RESUMABLE),
    "redirects in a ring": (
        "GET /api/datasets", {"status": 302, "headers": {"Location": "/api/datasets/x/y"}},
        {**STOPPED, "exits": (2, 4, 143)}),
    "a stale listing after a commit that landed": (
        "POST .*/paths-info/", {"text": "[]", "count": 3}, {"exits": (0,)}),
    **{f"429 with a Retry-After {kind}": (
        "GET /api/datasets", {"status": 429, "headers": headers},
        STOPPED) for kind, headers in WAITS.items()},
    **{f"nothing but HTTP {status}, until the deadline": (
        "/api/", {"status": status, "deadline": 0.3}, {"exits": (4, 75)})
       for status in (408, 409, 429, 500, 503)},
}  # fmt: skip
for name, (line, fault, how) in MET_BY_NEW.items():
    add(name, EXTRACT, into_new(line, **fault), **how)


# Time: templates and conversations

OWN = (TEACHER / "chat_template.jinja").read_text()
TEMPLATES = {
    "loops for ever": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}",
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
for kind, template in TEMPLATES.items():
    exits = (2, 143) if kind == "loops for ever" else (2,)
    for script in (EXTRACT, LENGTHS):
        add(f"a template: {kind}", script,
            lambda world, script=script, template=template: world.start(
                script, model=world.teacher(template + OWN)),
            exits=exits)  # fmt: skip


@attack("a template of the output that loops for ever", EXPLORE, exits=(0, 2))
def _(world: World) -> Words:
    world.output()
    world.write("out/chat_template.jinja", TEMPLATES["loops for ever"] + OWN)
    return ["out", "--sample", "0"]


def long_chat(count: int) -> dict[str, Any]:
    """Return a conversation of many messages."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": "a"} for n in range(count)]
    return {"messages": turns}


for script in (EXTRACT, LENGTHS):
    add("a conversation of 100,000 messages", script,
        lambda world, script=script: world.start(
            script, dataset=world.chats(long_chat(100_000), long_chat(2))),
        exits=(0,), check=lambda world: setattr(world, "rows", {1}) or "")  # fmt: skip


# Data: sources

CHAT = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]}
SOURCES: dict[str, tuple[list[Any], dict[str, Any], tuple[int, ...]]] = {
    "JSON 20,000 deep": (['{"messages": ' + DEEP + "}", CHAT], {}, (2,)),
    "JSON 20,000 deep, a stream": (
        ['{"messages": ' + DEEP + "}", CHAT], {"streaming": True}, (2,)),
    "JSON 5,000 deep": (['{"messages": ' + "[" * 5000 + "]" * 5000 + "}", CHAT], {}, (2,)),
    "objects 5,000 deep": (['{"a": ' * 5000 + "1" + "}" * 5000, CHAT], {}, (2,)),
    "deep JSON as text in a cell": ([{"messages": "[" * 100_000}, CHAT], {}, (0,)),
    "roles with escape codes": (
        [{"messages": [{"role": ESCAPES, "content": "a"}, *CHAT["messages"]]}, CHAT], {}, (0,)),
    "content with escape codes": (
        [{"messages": [{"role": "user", "content": ESCAPES}, *CHAT["messages"][1:]]}], {}, (0,)),
    "columns with escape codes": ([{ESCAPES: "a"}], {}, (2,)),
    "ids with escape codes": ([{**CHAT, "id": ESCAPES}], {"index_col": "id"}, (2,)),
    "ids twice": ([{**CHAT, "id": 1}, {**CHAT, "id": 1}], {"index_col": "id"}, (2,)),
    "ids beyond 32 bits": ([{**CHAT, "id": 2**70}], {"index_col": "id"}, (2,)),
    "ids that are NaN": (['{"id": NaN, "messages": []}', CHAT], {"index_col": "id"}, (2,)),
    "a number of 5,000 digits": (['{"messages": ' + "9" * 5000 + "}", CHAT], {}, (2,)),
    "NUL bytes": (["\0\0\0\0", CHAT], {}, (2,)),
    "no UTF-8": ([CHAT], {"dataset": "latin"}, (2,)),
    "arguments of templates 3,000 deep": (
        [{**CHAT, "chat_template_kwargs": '{"a": ' * 3000 + "1" + "}" * 3000}, CHAT], {}, (0,)),
}  # fmt: skip


@maker
def of_source(world: World, script: str, rows: list[Any], options: Mapping[str, Any]) -> Words:
    """Run over rows."""
    world.rows = None
    dataset = world.chats(*rows)
    if options.get("dataset") == "latin":
        dataset = world.write("latin.jsonl", json.dumps(CHAT).encode() + b'\n{"a": "\xe9"}\n')
    return world.start(script, **{**options, "dataset": dataset})


for kind, (rows, options, exits) in SOURCES.items():
    for script in (EXTRACT, LENGTHS):
        add(f"a source: {kind}", script, of_source(script, rows, options), exits=exits,
            short=kind == "JSON 20,000 deep")  # fmt: skip


@attack("a source: files in a ring of links, one named by no UTF-8", EXTRACT, exits=(0, 2),
        short=True)  # fmt: skip
def _(world: World) -> Words:
    world.rows = None
    world.write(b"chats/\xff\x1b[31m.jsonl", json.dumps(CHAT) + "\n")
    (world.folder / "chats" / "again").symlink_to(world.folder / "chats")
    (world.folder / "chats" / "gone.jsonl").symlink_to("nowhere")
    return world.extract(dataset="./chats")


@attack("a source named by escape codes, HTML and the line of the card", EXTRACT, exits=(0,),
        check=lambda world: check_card(world))  # fmt: skip
def _(world: World) -> Words:
    name = f"{ESCAPES}<img src=x onerror=1>\n# T\n{extract_logits.CARD_LINE}\n---\n|a|b|".replace(
        "/", ""
    )
    return world.extract(dataset=world.chats(CHAT, CHAT, name=name + ".jsonl"), upload_every=1)


def check_card(world: World) -> str:
    """Return what is wrong with the card of an output."""
    card = (world.folder / "out" / "README.md").read_text()
    body = card.split("\n---\n", 1)[1]
    wrong = {
        "an <img> is in the card": "<img" in body,
        "a title is in the card": "\n# T" in card,
        "the card's line is there twice": card.count(extract_logits.CARD_LINE) != 1,
        "a control character is in the card": bool(CONTROL.search(card)),
    }
    return "; ".join(name for name, found in wrong.items() if found)


# Names and numbers on the command line

NAMES = ["user/..", "user/x--y", "user/x.git", "üser/näme", "user/" + "x" * 120, "user/\udcff",
         "user/a\nb", f"user/{ESCAPES}"]  # fmt: skip
for name in NAMES:
    shown = name.encode("ascii", "backslashreplace").decode()[:24]
    shown = CONTROL.sub("?", shown.replace("\n", "\\n"))
    add(f"--output {shown}", EXTRACT,
        lambda world, name=name: world.hub and world.extract(output=name))  # fmt: skip
    add(f"--model {shown}", EXTRACT,
        lambda world, name=name: world.hub and world.extract(model=name))  # fmt: skip
    add(f"--dataset {shown}", LENGTHS,
        lambda world, name=name: world.hub and world.lengths(dataset=name))  # fmt: skip
    add(f"OUTPUT {shown}", EXPLORE, lambda world, name=name: world.hub and [name])

HUGE: dict[str, tuple[object, tuple[int, ...]]] = {
    **{f"--{name}": (10**30, (0, 2)) for name in ("limit", "upload-every")},
    "--start-offset": (10**30, (2,)), "--sampled-n": (10**30, (2,)),
    "--max-seq-len": (10**30, (0, 2)), "--max-batch-tokens": (10**30, (0, 2)),
    "--seed": (10**30, (2,)), "--world-size": ("9" * 5000, (2,)),
    **{f"--{name}": ("1e308", (0, 2))
       for name in ("max-runtime-minutes", "upload-size-mb", "plan-tokens")},
    "--template-kwargs": ("[" * 100_000, (2,)),
    "--batch-thresholds": ('{"' + "9" * 5000 + '": 1}', (2,)),
    "--sample-subject": ('{"a": ' * 5000 + "1" + "}" * 5000, (2,)),
    "--device": (f"cuda:{10**30}", (2,)), "--chat-template": ("/dev/zero", (2,)),
}  # fmt: skip
for option_name, (value, exits) in HUGE.items():
    more = ["--rank", 0] if option_name == "--world-size" else []
    more = ["--plan"] if option_name == "--plan-tokens" else more
    add(f"{option_name} beyond all measure", EXTRACT,
        lambda world, words=(option_name, value, *more): world.extract(*words),
        exits=exits, short=option_name == "--chat-template")  # fmt: skip
for value in ("nan", "inf", "-inf"):
    for option_name in ("--max-runtime-minutes", "--upload-size-mb", "--top-p", "--plan-rate"):
        add(f"{option_name} {value}", EXTRACT,
            lambda world, o=option_name, v=value: world.extract(o, v), exits=(2,))  # fmt: skip


# What the output holds

CHECKPOINTS: dict[str, bytes | int] = {
    "200,000 brackets": b"[" * 200_000,
    "nothing": b"",
    "null": b"null",
    "a list": b"[1]",
    "parts of wrong types": b'{"format_version": 1, "job": 3, "parts": 7, "skipped": []}',
    "a version of 5,000 digits": b'{"format_version": ' + b"9" * 5000 + b"}",
    "no UTF-8": b"\xff\xfe" * 50,
    "escape codes": b'{"job": "' + ESCAPES.encode() + b'"}',
    "a number of 6,000 digits": b'{"parts": {"number": [' + b"9" * 6000 + b"]}}",
    "60 MB of objects": b'{"parts": [' + b"{}," * 20_000_000 + b"{}]}",
    "3 GB": 3 * 2**30,
}


@maker
def with_file(world: World, path: str, content: bytes | int) -> Words:
    """Continue an output in which a file is another; an int: a hole of that size."""
    place = world.output() / path
    place.unlink(missing_ok=True)
    with place.open("wb") as file:
        file.write(content) if isinstance(content, bytes) else file.truncate(content)
    return world.resume()


@maker
def spoil(world: World, path: str, section: str, name: str, value: Any) -> Words:
    """Continue an output of which a JSON file says something else."""
    place = world.output() / path
    content = json.loads(place.read_text())
    (content[section] if section else content)[name] = value
    place.write_text(json.dumps(content))
    return world.resume()


for kind, content in CHECKPOINTS.items():
    add(f"a checkpoint: {kind}", EXTRACT, with_file("checkpoint.json", content),
        exits=(0, 2) if kind == "3 GB" else (0,))  # fmt: skip
    if kind in ("200,000 brackets", "parts of wrong types", "60 MB of objects"):
        add(f"a checkpoint: {kind}", EXPLORE,
            lambda world, content=content: (
                with_file("checkpoint.json", content)(world) and ["out", "--validate"]),
            exits=(0, 3, 1, 2))  # fmt: skip
for column, value in {
    "rows": [float("nan"), float("inf")], "mass": [float("nan"), "x"], "ids": [None, DEEP],
    "bytes": [-1, True],
}.items():  # fmt: skip
    add(f"a checkpoint whose {column} is absurd", EXTRACT,
        spoil("checkpoint.json", "parts", column, value), exits=(0,))  # fmt: skip

SETTINGS_FAULTS: dict[str, list[Any]] = {
    "rows_per_part": ["x", 0, -1, 10**30, 1.5, True, [2]], "template_date": [5], "numerics": [3],
    "model_revision": [[1]], "dataset_revision": [{"a": 1}], "limit": ["all"], "model": [7],
    "versions": [None], "chat_template_sha256": [3], "vocab_size": ["many"],
    "format_version": [99],
}  # fmt: skip
for setting, values in SETTINGS_FAULTS.items():
    for value in values:
        add(f"settings: {setting} is {value!r}", EXTRACT,
            spoil("extraction_config.json", "", setting, value), exits=(0, 2))  # fmt: skip
OPTION_FAULTS: dict[str, Any] = {
    "a list": [], "types": {"model": 5, "dataset": [1], "limit": "x"},
    "a limit of text": {"model": str(TEACHER), "dataset": str(CHATS), "limit": "4"},
    "thresholds of text": {"model": str(TEACHER), "dataset": str(CHATS), "batch_thresholds": "x"},
    "escape codes": {"model": ESCAPES, "dataset": ESCAPES},
    "places of the machine": {"model": str(TEACHER), "dataset": str(CHATS), "cache_dir": "/etc/x"},
    "code of strangers": {"model": str(TEACHER), "dataset": str(CHATS), "trust_remote_code": True},
}  # fmt: skip
for kind, value in OPTION_FAULTS.items():
    add(f"settings: options are {kind}", EXTRACT,
        lambda world, value=value: (
            spoil("extraction_config.json", "", "options", value)(world) and
            ["--output", "./out", "--resume", "--cache-dir", "cache"]),
        exits=(0, 2))  # fmt: skip
for kind, content in {
    "brackets": b"[" * 200_000, "null": b"null", "no UTF-8": b"\xff", "3 GB": 3 * 2**30,
    "a number of 5,000 digits": b'{"limit": ' + b"9" * 5000 + b"}",
}.items():  # fmt: skip
    add(f"settings: {kind}", EXTRACT, with_file("extraction_config.json", content),
        says="extraction_config.json")  # fmt: skip
    add(f"settings: {kind}", EXPLORE,
        lambda world, content=content: with_file("extraction_config.json", content)(world)
        and ["out", "--stats"], exits=(0, 2))  # fmt: skip

CARDS: dict[str, bytes | int] = {
    "YAML 50,000 deep": b"---\na: " + b"[" * 50_000 + b"\n---\n",
    "YAML 3,000 deep": b"---\na: " + b"[" * 3000 + b"]" * 3000 + b"\n---\n",
    "YAML of aliases": b"---\n" + b"\n".join(
        b"a%d: &a%d [%s]" % (n, n, b",".join([b"*a%d" % (n - 1)] * 9 if n else [b"1"] * 9))
        for n in range(12)) + b"\n---\n",
    "YAML with Python": b"---\na: !!python/object/apply:os.system ['touch /tmp/owned']\n---\n",
    "its line a thousand times": extract_logits.CARD_LINE.encode() * 1000,
    "no UTF-8 and NUL": b"---\n\xff\0: \xfe\n---\n\xff\0" + ESCAPES.encode(),
    "a date of the year 99999": b"---\na: 99999-99-99\nb: 2020-01-01\n---\n",
    "30 MB": b"x\n" * 15_000_000,
    "3 GB": 3 * 2**30,
}  # fmt: skip


@maker
def with_card(world: World, content: bytes | int) -> Words:
    """Raise the limit of an output that has another card."""
    words = with_file("README.md", content)(world)
    world.rows = set(range(5))
    return [*words, "--limit", 5]


for kind, content in CARDS.items():
    add(f"a card: {kind}", EXTRACT, with_card(content), exits=(0, 4) if kind == "3 GB" else (0,))


@maker
def without_checkpoint(world: World, change: Callable[[bytes], bytes]) -> Words:
    """Continue an output without a checkpoint and with a part that is another."""
    (world.output() / "checkpoint.json").unlink()
    path = world.folder / "out" / "data" / "part-00000.parquet"
    path.write_bytes(change(path.read_bytes()))
    return world.resume()


@maker
def with_metadata(data: bytes, value: bytes) -> bytes:
    """Give a part other words about itself."""
    table = pq.read_table(pa.BufferReader(data))
    metadata = {**table.schema.metadata, b"logits.part": value}
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(metadata), sink)
    return bytes(sink.getvalue())


FOOTERS: dict[str, Callable[[bytes], bytes]] = {
    "is empty": lambda data: b"",
    "is cut": lambda data: data[: len(data) // 2],
    "announces a footer of 4 GB": lambda data: data[:-8] + b"\xff\xff\xff\xffPAR1",
    "has a footer of noise": lambda data: data[:-300] + b"\x9b" * 292 + data[-8:],
    "says brackets of itself": with_metadata(b"[" * 200_000),
    "says a list of itself": with_metadata(b"[1]"),
    "says null of itself": with_metadata(b"null"),
    "says a number of 5,000 digits": with_metadata(b'{"number": ' + b"9" * 5000 + b"}"),
    "says skipped rows of wrong types": with_metadata(b'{"number": 0, "skipped": 5}'),
}
for kind, change in FOOTERS.items():
    add(f"a part that {kind}", EXTRACT, without_checkpoint(change), exits=(0,))
    add(f"a part that {kind}", EXPLORE,
        lambda world, change=change: without_checkpoint(change)(world) and ["out", "--validate"],
        exits=(0, 1, 2, 3))  # fmt: skip


def bomb(world: World, rows: int = 64, size: int = 64 * 2**20) -> Words:
    """Write rows that point at one large value of a dictionary."""
    write_parts(world.folder / "out")
    path = world.folder / "out" / "data" / "part-00000.parquet"
    table = pa.concat_tables([pq.read_table(path).slice(0, 1)] * rows)
    at, name = table.schema.get_field_index("top_indices_high"), "top_indices_high"
    large = pa.array([b"\0" * size], pa.binary())
    table = table.set_column(at, name, pa.DictionaryArray.from_arrays([0] * rows, large))
    pq.write_table(table, path, use_dictionary=[name], compression="zstd", store_schema=False,
                   dictionary_pagesize_limit=2**30)  # fmt: skip
    return ["out"]


for flag in ("--stats", "--validate", "--sample=0"):
    add(f"a part of few bytes that decodes to 4 GB, {flag}", EXPLORE,
        lambda world, flag=flag: [*bomb(world), flag], exits=(0, 1, 2, 3))  # fmt: skip


# What the cache holds


@maker
def with_cache(world: World, change: Callable[[Path], None], *, ends: str = "backup") -> Words:
    """Continue a job of which a part waits in the cache, changed by hand."""
    out = world.output()
    world.held = {2, 3}
    cache = world.folder / "cache" / extract_logits.cache_key(str(out))
    (cache / "pending").mkdir(parents=True)
    name = {"backup": "backup_part", "part": "part", "pending": "pending/pending"}[ends]
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
def replace_by(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@maker
def link_to(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


CACHE_FAULTS: dict[str, Callable[[Path], None]] = {
    "has damaged pages": damage_pages,
    "is empty": replace_by(b""),
    "is noise": replace_by(b"PAR1" + b"\x9b" * 5000 + b"PAR1"),
    "has no digest": lambda path: path.with_name(f"{path.name}.sha256").unlink(),
    "has a digest of noise": lambda path: (
        path.with_name(f"{path.name}.sha256").write_bytes(b"\xff\xfe\xfd"), None)[1],
    "is a folder": lambda path: (path.unlink(), path.mkdir())[1],
    "is a link to nothing": link_to("nowhere"),
    "is a link to itself": link_to("backup_part-00000.parquet"),
    "is a link to /dev/zero": link_to("/dev/zero"),
}  # fmt: skip
for kind, damage in CACHE_FAULTS.items():
    for ends in ("backup", "part", "pending"):
        if ends == "backup" or kind in ("has damaged pages", "is noise"):
            add(f"a {ends} in the cache that {kind}", EXTRACT, with_cache(damage, ends=ends),
                exits=(0,))  # fmt: skip


# The machine


def kill_child(world: World, process: subprocess.Popen[bytes]) -> None:
    """Kill a process that the run has started, as the system does for want of memory."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def found() -> list[str]:
        return children.read_text().split() if children.exists() else []

    while wait_for(found, process):
        for child in found():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)


@attack("a process that tokenizes is killed", EXTRACT, exits=(4,), during=kill_child,
        says="memory")  # fmt: skip
def _(world: World) -> Words:
    world.rows = None
    return world.extract(dataset=world.chats(*[CHAT] * 6000), limit=6000, upload_every=50)


@maker
def remove_during(world: World, process: subprocess.Popen[bytes], name: str, sign: str) -> None:
    """Remove a folder again and again, once there is a sign of work."""
    wait_for(lambda: next(world.folder.glob(sign), None), process)
    while is_running(process):
        shutil.rmtree(world.folder / name, ignore_errors=True)
        time.sleep(0.1)


def many_parts(world: World) -> Words:
    """Return the options of a run that takes a while."""
    world.rows = None
    dataset = world.chats(*[CHAT] * 300)
    return world.extract(dataset=dataset, limit=300, upload_every=3, max_batch_size=1)


# What was committed and is gone before it is looked for is looked for two minutes, a commit.
for name, sign in (("cache", "cache/*/pending"), ("out", "out/data/*"), ("cache", "out/data/*")):
    add(f"{name} is removed again and again, once there is {sign}", EXTRACT, many_parts,
        exits=(0, 2, 4), during=remove_during(name, sign), seconds=600.0)  # fmt: skip

for option_name in ("output", "cache_dir"):
    for place in ("/proc/here", "/dev/null/here", "/dev/full", "ring/here", "a" * 300, "./\udcff",
                  "~nobody-has-this/x"):  # fmt: skip
        shown = place.encode("ascii", "backslashreplace").decode()[:16]
        add(f"--{option_name} {shown}", EXTRACT,
            lambda world, o=option_name, place=place: (
                (world.folder / "ring").symlink_to("ring") or world.extract(
                    **{o: place if o == "cache_dir" or place[0] in "/.~" else f"./{place}"})),
            exits=(0, 2, 4) if option_name == "cache_dir" else (2, 4))  # fmt: skip


@attack("files may have 20 kB (the disk is full)", EXTRACT, exits=(4,), says="make room",
        resumes=True)  # fmt: skip
def _(world: World) -> Words:
    world.env["ATTACK_FSIZE"] = "20000"
    return world.extract(streaming=True)


NO_THREADS = """import threading
left, start = [{}], threading.Thread.start
def refuse(self):
    if not left[0]:
        raise RuntimeError("can't start new thread")
    left[0] -= 1
    start(self)
threading.Thread.start = refuse
"""


def no_threads(world: World, *, after: int) -> Words:
    """Let the start of a thread fail, as with too low a limit of processes."""
    world.write("site/sitecustomize.py", NO_THREADS.format(after))
    world.env["PYTHONPATH"] = str(world.folder / "site")
    return world.extract(output="./out")


for after, name in enumerate(("no thread is to be had", "no thread is to be had after the fifth")):
    add(name, EXTRACT, lambda world, after=5 * after: no_threads(world, after=after),
        exits=(2, 4), resumes=True)  # fmt: skip


# Answers of strange size

BLOCK = 2**20


def gzip_bomb(size: int) -> bytes:
    """Return few bytes of gzip that decode to many blanks."""
    import zlib

    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(b" " * BLOCK) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + block * (size // BLOCK)


@maker
def published(
    world: World, script: str, request: str, *, deadline: float = 0.6, **fault: Any
) -> Words:
    """Read or continue an output on a Hub on which a request meets a fault."""
    world.publish(world.output())
    world.fault(request, **fault)
    words = world.resume(output=REPO, max_runtime_minutes=deadline)
    return words if script == EXTRACT else [REPO]


GZIP = {"text": gzip_bomb(2 * 2**30), "headers": {"Content-Encoding": "gzip"}}
for script in (EXTRACT, EXPLORE):
    for step, line in {
        "repo info": rf"GET /api/datasets/{REPO}", "listing": "GET .*/tree/",
        "checkpoint": "GET .*/checkpoint.json", "settings": "GET .*/extraction_config.json",
    }.items():  # fmt: skip
        add(f"an answer of 2 GB in gzip: {step}", script, published(script, line, **GZIP),
            exits=(0, 2, 4, 75), short=(script, step) == (EXPLORE, "settings"))  # fmt: skip
    for kind, text in NONSENSE.items():
        add(f"the Hub answers {kind} to every question", script,
            published(script, "GET", text=text, deadline=0.3),
            exits=(2, 4, 75) if script == EXTRACT else (2,),
            short=(script, kind) == (EXPLORE, "deep brackets"))  # fmt: skip
add("a listing of 2 GB", EXTRACT,
    published(EXTRACT, "GET .*/tree/", text=b" " * BLOCK, times=2048),
    exits=(2, 4, 75))  # fmt: skip
add("an answer that is cut", EXTRACT,
    published(EXTRACT, "GET .*/tree/", deadline=0.3, drop="body", drop_after=10),
    exits=(4, 75))  # fmt: skip


# Secrets

ECHO = f"Authorization: Bearer {' '.join(SECRETS)}\r\n{ESCAPES}"
for status in (400, 401, 403, 404, 500):
    add(f"HTTP {status} echoes the token", EXPLORE,
        lambda world, status=status: world.fault("", status=status, message=ECHO) or [REPO],
        seconds=120, short=status == 403)  # fmt: skip
    add(f"HTTP {status} echoes the token to the model", LENGTHS,
        lambda world, status=status: (
            world.fault("", status=status, message=ECHO) or world.lengths(model="tester/thing")),
        seconds=120)  # fmt: skip
    if status != 500:
        add(f"HTTP {status} echoes the token", EXTRACT,
            into_new("/api/(datasets|repos)", status=status, message=ECHO), exits=(4,))  # fmt: skip
for step in ("create", "preupload", "LFS batch", "LFS upload", "commit"):
    add(f"HTTP 403 echoes the token: {step}", EXTRACT,
        into_new(OUTPUT_REQUESTS[step], status=403, message=ECHO,
                 deadline=0.5 if step == "LFS upload" else None),
        exits=(4, 75), resumes=step == "commit")  # fmt: skip


@maker
def with_token(world: World, ending: str, script: str) -> Words:
    """Meet a Hub with a token that goes on strangely."""
    world.hub.tokens = {}
    world.env["HF_TOKEN"] = TOKEN + ending
    return world.extract(output=REPO) if script == EXTRACT else [REPO]


ENDINGS = {"a line's end": "\nX", "an umlaut": "äX", "an escape code": "\x1b[31m"}
for kind, ending in ENDINGS.items():
    for script, exits in ((EXTRACT, (2, 4)), (EXPLORE, (2,))):
        add(f"the token has {kind}", script, with_token(ending, script), exits=exits)


@attack("the Hub's client logs everything", EXTRACT, exits=(0,))
def _(world: World) -> Words:
    world.hub.store.create("dataset", REPO, private=False)
    world.env |= {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "DATASETS_VERBOSITY": "debug",
                  "TRANSFORMERS_VERBOSITY": "debug"}  # fmt: skip
    return world.extract(output=REPO)


@attack("a proxy with a password is not there", EXTRACT, exits=(4, 75))
def _(world: World) -> Words:
    world.env["HF_HUB_OFFLINE"] = "0"
    proxy = f"http://me:{TOKEN}@127.0.0.1:9"
    world.env |= {"HTTPS_PROXY": proxy, "HF_ENDPOINT": "https://hub.test"}
    return world.extract(output=REPO, max_runtime_minutes=0.3)


@attack("tasks of an executor fail with an echo of the token", EXTRACT, exits=(4, 75), seconds=90,
        traces=True)  # fmt: skip
def _(world: World) -> Words:
    world.fault("POST .*/commit/", status=403, message=ECHO)
    return world.extract("--executor", "local", "--tasks", 2, "--workers", 1, output=REPO)


@attack("the script of a batch system, with the token in the environment", EXTRACT, exits=(0,),
        seconds=90)  # fmt: skip
def _(world: World) -> Words:
    world.rows = None
    path = world.write("bin/sbatch", "#!/bin/sh\necho Submitted batch job 1\n")
    path.chmod(0o755)
    world.env["PATH"] = f"{path.parent}:{os.environ['PATH']}"
    options = '{"partition": "p", "time": "1:00:00"}'
    return world.extract("--executor", "slurm", "--tasks", 2, "--executor-options", options)


# Running them -------------------------------------------------------------------------------------


@dataclass
class Ended:
    """How a run ended."""

    code: int | None  # None: it was killed for its time
    stdout: str
    stderr: str
    seconds: float
    peak_mb: float

    @property
    def last_line(self) -> str:
        """What it said in the end."""
        lines = [line for line in re.split("[\r\n]+", self.stderr) if line.strip()]
        return lines[-1] if lines else ""


@dataclass
class Verdict:
    """An attack, how it ended, and what is wrong with that."""

    attack: Attack
    ended: Ended
    wrong: list[str] = field(default_factory=list)


def limit_process(file_bytes: int | None) -> None:
    """Limit what a process may take; in the child."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))


def run(
    world: World, script: str, argv: Words, killed_after_s: float,
    during: Callable[[World, subprocess.Popen[bytes]], None] | None = None,
) -> Ended:  # fmt: skip
    """Run a script to its end, or kill it; measure its time and its peak of memory."""
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(world.folder / "home"), "HF_TOKEN": TOKEN, **world.env,
    }  # fmt: skip
    size = env.pop("ATTACK_FSIZE", None)
    words = [os.fsencode(str(word)) for word in (ROOT / script, *argv)]
    begun = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            [sys.executable, *words], stdout=out, stderr=err, cwd=world.folder, env=env,
            start_new_session=True, stdin=subprocess.DEVNULL,
            preexec_fn=lambda: limit_process(int(size) if size else None),
        )  # fmt: skip
        actor = threading.Thread(target=during or (lambda *_: None), args=(world, process))
        actor.start()
        killer = threading.Timer(killed_after_s, os.killpg, (process.pid, signal.SIGKILL))
        killer.start()
        peak_kb = 0
        while not (ended := os.waitpid(process.pid, os.WNOHANG))[0]:
            peak_kb = read_peak_kb(process.pid) or peak_kb  # the last is of the script alone
            time.sleep(0.02)
        status = ended[1]
        seconds = time.monotonic() - begun
        killer.cancel()
        process.returncode = code = os.waitstatus_to_exitcode(status)
        actor.join()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has left behind
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read(50 * 2**20).decode(errors="surrogateescape"))
    killed = code == -signal.SIGKILL and seconds >= killed_after_s - 1
    return Ended(None if killed else code, *texts, seconds, peak_kb / 1024)


def read_peak_kb(pid: int) -> int:
    """Return the peak of a process's memory; `ru_maxrss` would count this one's before the exec."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) if found else 0
    return 0


def judge(attack: Attack, world: World, ended: Ended) -> list[str]:
    """Return what is wrong with the end of a run."""
    said = ended.stdout + ended.stderr
    wrong = []
    if ended.code is None:
        wrong.append("did not end")
    elif ended.code not in attack.exits:
        wrong.append(f"exit {ended.code}, not {'/'.join(map(str, attack.exits))}")
    if "Traceback (most recent call last)" in said and not attack.traces:
        wrong.append("a traceback")
    if found := CONTROL.search(said):
        wrong.append(f"a raw {found[0]!r} on the terminal")
    if found := find_secret(world, said):
        wrong.append(f"the token in {found}")
    if (ended.code or 0) > 0 and not said.strip():
        wrong.append("says nothing")
    if attack.says and not re.search(attack.says, ended.last_line):
        wrong.append(f"does not say {attack.says!r}")
    if attack.script == EXTRACT and (lacking := find_lacking(ended)):
        wrong.append(f"the last line lacks {', '.join(sorted(lacking))}")
    if ended.seconds > attack.seconds * world.slack:
        wrong.append(f"{ended.seconds:.0f} s")
    if ended.peak_mb > attack.peak_mb:
        wrong.append(f"{ended.peak_mb:.0f} MB")
    return wrong + judge_rows(world, ended.code)


SAID = {"rows", "tokens", "shards", "bytes", "skipped", "seconds", "tokens_per_second", "output"}


def find_lacking(ended: Ended) -> set[str]:
    """Return what the last line of an extraction does not tell; a refused one tells nothing."""
    lines = ended.stdout.splitlines()
    if ended.code in (None, 2, -signal.SIGKILL):
        return set()
    with contextlib.suppress(ValueError):
        last = json.loads(lines[-1] if lines else "{}")
        return set() if "plan" in last else SAID - last.keys()
    return SAID


def judge_rows(world: World, code: int | None) -> list[str]:
    """Return what is wrong with the rows of the output."""
    stored = world.stored()
    if world.before is not None:
        return [] if stored == world.before else ["another script changed the rows"]
    counts = Counter(stored)
    wrong = []
    if lost := world.held - counts.keys():
        wrong.append(f"rows lost: {sorted(lost)}")
    if twice := [index for index, count in counts.items() if count > 1]:
        wrong.append(f"rows twice: {sorted(twice)}")
    complete = world.rows if code == 0 and "--output" in map(str, world.argv) else None
    if complete is not None and counts.keys() != complete:
        wrong.append(f"rows {sorted(counts)}, not {sorted(complete)}")
    return wrong


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


def make_output(folder: Path) -> Path:
    """Extract conversations 0..3 in two parts, in peace."""
    world = World(folder / "ready", folder / "none", 0)
    words = world.extract(limit=4, upload_every=2, store_tokens=True)
    ended = run(world, EXTRACT, words, 300.0)
    assert ended.code == 0, ended.stderr
    return world.folder / "out"


def run_attack(attack: Attack, folder: Path, ready: Path, seed: int, slack: float = 1.0) -> Verdict:
    """Run an attack, and a calm run after it where it says so."""
    world = World(folder, ready, seed, slack)
    try:
        world.argv = attack.prepare(world)
        world.before = None if attack.script == EXTRACT else world.stored()
        limit_s = max(KILLED_AFTER_S, attack.seconds) * slack
        ended = run(world, attack.script, world.argv, limit_s, attack.during)
        verdict = Verdict(attack, ended)
        more = attack.check(world) if attack.check else ""
        verdict.wrong = judge(attack, world, ended) + ([more] if more else [])
        if "hub" in world.__dict__ and world.hub.faults and not world.hub.faults_met:
            verdict.wrong.append("the Hub was never asked")
        if attack.resumes:
            calm = resume_calmly(world, attack)
            if calm.code != 0:
                verdict.wrong.append(f"--resume ends with {calm.code}: {calm.last_line}")
            verdict.wrong += judge_rows(world, calm.code)
        return verdict
    finally:
        world.close()


def resume_calmly(world: World, attack: Attack) -> Ended:
    """Run the same command with --resume in a world without faults."""
    if "hub" in world.__dict__:
        world.hub.clear()
    world.env.pop("ATTACK_FSIZE", None)
    world.env.pop("PYTHONPATH", None)
    words = list(world.argv)
    if "--max-runtime-minutes" in words:
        at = words.index("--max-runtime-minutes")
        del words[at : at + 2]
    if "--resume" not in words:
        words.append("--resume")
    return run(world, attack.script, words, 300.0)


def run_all(
    attacks: Sequence[Attack], folder: Path, seed: int, jobs: int, slack: float
) -> Iterator[Verdict]:
    """Run attacks, some at a time, and yield how they ended."""
    ready = make_output(folder)

    def work(number: int) -> Verdict:
        place = folder / f"{number:03d}"
        verdict = run_attack(attacks[number], place, ready, seed + number, slack)
        if not verdict.wrong:
            shutil.rmtree(place, ignore_errors=True)
        return verdict

    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(work, number) for number in range(len(attacks))]):
            yield done.result()


def show(text: str, width: int) -> str:
    """Return text that fits a cell of the table."""
    text = CONTROL.sub("?", text.replace("\n", " ")).encode(errors="backslashreplace").decode()
    return text if len(text) <= width else text[: width - 1] + "…"


def main() -> int:
    """Print a table and a line of JSON; 1 when an attack ended as it must not."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--only", default="", help="attacks whose script and name match this")
    parser.add_argument("--list", action="store_true", help="print their names and stop")
    parser.add_argument("--short", action="store_true", help="those that belong to the tests")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="attacks at the same time")
    parser.add_argument("--slack", type=float, default=1.0, help="times the seconds allowed")
    parser.add_argument("--keep", type=Path, help="work in this folder, leave what failed there")
    options = parser.parse_args()
    chosen = [one for one in ATTACKS if re.search(options.only, f"{one.script} {one.name}")]
    chosen = [one for one in chosen if one.short or not options.short]
    if options.list:
        for one in chosen:
            print(f"{one.script:18} {show(one.name, 80)}")
        return 0
    folder = (options.keep or Path(tempfile.mkdtemp(prefix="attacks-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    verdicts = []
    print(f"{'attack':60} {'script':8} {'exit':>4} {'s':>5} {'MB':>5}  last line")
    for verdict in run_all(chosen, folder, options.seed, options.jobs, options.slack):
        verdicts.append(verdict)
        one, ended = verdict.attack, verdict.ended
        code = "-" if ended.code is None else ended.code
        cells = f"{show(one.name, 60):60} {one.script.split('_')[0]:8} {code:>4}"
        figures = f"{ended.seconds:5.1f} {ended.peak_mb:5.0f}"
        print(f"{cells} {figures}  {show(ended.last_line, 110)}", flush=True)
        for wrong in verdict.wrong:
            print(f"    WRONG {show(wrong, 200)}", flush=True)
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(summarize(verdicts)))
    return int(any(verdict.wrong for verdict in verdicts))


def summarize(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return the figures of all attacks."""
    codes = Counter(str(verdict.ended.code) for verdict in verdicts)
    return {
        "attacks": len(verdicts),
        "wrong": [f"{v.attack.script}: {v.attack.name}" for v in verdicts if v.wrong],
        "exits": dict(sorted(codes.items())),
        "most_seconds": round(max((v.ended.seconds for v in verdicts), default=0.0), 1),
        "most_mb": round(max((v.ended.peak_mb for v in verdicts), default=0.0)),
    }


if __name__ == "__main__":
    sys.exit(main())
