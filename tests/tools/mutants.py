"""Plant faults in the three scripts, one at a time, and see which test notices each.

    python tests/tools/mutants.py [--only REGEX] [--jobs 2]

Works in copies in temporary folders; the checkout is never written. First the tests that are to
notice something run without a fault and must pass. Prints a table: fault, the test that caught it,
seconds. The last line is one JSON object, which names those that survived. Ends with exit code 1
where fewer than 95 of 100 faults are caught: 57 of 60.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bench import ROOT, print_head, print_row
from processes import run_process

COPIED = ("*.py", "*.toml", "*.md", "*.cff", "Makefile", "LICENSE", "MANIFEST.in", "docs", "tests")
LIMIT_S = 900  # a fault that makes the tests hang is caught then
SHARE = 0.95  # of the faults have to be caught

# == script | tests that cover the section, the likeliest first
# : what is broken, as its victim would say it
# text that occurs once in the script, with ⟦what is there→what a tired engineer wrote instead⟧
FAULTS = r"""
== extract_logits | test_extract_config.py
: the workers' numbers may go up to their count: the last one takes nothing, the first ones too much
self.rank >⟦=→⟧ self.world_size
== extract_logits | test_extract_select.py
: rows at random come from the beginning of the source in spite of --start-offset
order_at_random(ids[config.start_offset :], config.seed)⟦ + config.start_offset→⟧
: every --seed takes the same rows at random
mix_hash(np.asarray(ids, np.int64), seed=⟦seed→0⟧)
: lengths are joined by the order of rows and not by id
KnownLengths(name, measured.index[order], measured.length⟦[order]→⟧, stored)
: a source that cannot be read to its end ends the run as if all were done
        ⟦yield error→return⟧
: a conversation of exactly --max-seq-len tokens is dropped by its known length
np.flatnonzero(lengths <⟦=→⟧ limit)
== extract_logits | test_extract_batches.py
: the middle conversation of a batch that did not fit is lost
Batch(self.rows[middle⟦→ + 1 ⟧:])
== extract_logits | test_extract_teacher.py test_extract_run.py
: position p's output is stored against token p
torch.from_numpy(np.asarray(token_positions[i], np.int64)) ⟦- 1 →⟧for i in part
: the head of a bfloat16 teacher rounds its logits to bfloat16
return ⟦swapped_forward(head, product) if is_plain_linear(head) else →⟧nullcontext()
: rows of the head beyond the tokenizer get into nucleus, tail and log-sum-exp
min(rows, MAX_TOKEN_ID + 1⟦, vocab_size or rows→⟧)
== extract_logits | test_extract_faithful.py
: a model that sees the answer is taken for a teacher
FORESIGHT = ⟦1e-5→1e5⟧
: weights that the checkpoint lacks are random and nobody says so
sorted(⟦(wrong | set(info["missing_keys"]))→wrong⟧ & set(own))
== extract_logits | test_extract_extraction.py
: the nucleus leaves out the token that crosses top_p
torch.minimum(short⟦ + 1→⟧, possible)
: the range of quantization is that of all K candidates, not of the nucleus
last = width⟦ if counts is None else counts.unsqueeze(1)→⟧
: the race of the tail favours blocks with the wrong sign of their weight
(noise.gather(1, blocks) ⟦-→+⟧ values.logsumexp(-1))
: the order in which the tail was drawn is sorted away
ids.gather(1, drawn.indices).clamp_(max=logits.shape[1] - 1)⟦→.sort(-1).values⟧
: the same position of all conversations has the same random numbers
mix64_(⟦(state ^ index)→state⟧ + SPLITMIX_STEP)
== extract_logits | test_extract_compact.py
: points of compact rows fall on what is kept and never on what is not
rest.scatter_add_(1, top_ids // BLOCK, chances.masked_fill_(⟦→~⟧kept, 0))
== extract_logits | test_extract_pack.py
: the log-sum-exp goes through float32
as_list(result.logsumexp[tokens]⟦→.astype(np.float32)⟧, sizes, np.float64)
: the columns top_min and top_max are swapped
"top_min": as_list(result.⟦top_min→top_max⟧[tokens]
: a conversation with NaN at one token is stored, as its other tokens are fine
np.⟦logical_and→logical_or⟧.reduceat(result.usable, starts)
: only the first result under way is waited for at the end
        ⟦while→if⟧ self.pending:
            self.deliver(
== extract_logits | test_extract_parts.py
: rows of a part stand in the order in which they were computed
return rows⟦.take(order.astype(np.int64))→⟧
: a damaged file of the cache is delivered
⟦raise ValueError→logger.debug⟧("its digest is another")
== extract_logits | test_extract_output.py test_extract_parts.py
: a stale checkpoint is believed: a part of fewer conversations counts as done
return ⟦getattr(self.listed[number], "ids", None) == ids→self.listed[number] is not None⟧
: an answer 429 ends the run, with its Retry-After unread
PASSING_STATUS = {408, 409, 412, 425⟦, 429→⟧}
: --private makes a public repository
self.name, repo_type="dataset", ⟦private=self.private, →⟧exist_ok=True
== extract_logits | test_extract_stop.py
: the runtime limit keeps no time for the last upload
self._longest_step_s⟦ + self.upload_s()→⟧
== extract_logits | test_extract_run.py test_extract_output.py test_extract_parts.py
: a run with undelivered shards ends with exit code 0
⟦any(name.startswith("backup_") for name in left) or (complete and left)→False⟧
== explore_logits | test_explore_html.py test_explore_cli.py test_explore_format.py
: what a source or a Hub says acts on the terminal that shows the log
return hide_tokens(⟦show_text(→⟧re.sub(r"\s*\n\s*", " ", text.strip())⟦)→⟧)
: an access token is printed with the message that holds it
return ⟦re.sub(r"\b(hf|api_org)_\w{6,}", "***", text)→text⟧
== explore_logits | test_explore_format.py
: the high bits of ids are packed from the other end of the byte
quads[:, ⟦0→3⟧] | quads[:, ⟦1→2⟧] << 2 | quads[:, ⟦2→1⟧] << 4 | quads[:, ⟦3→0⟧] << 6
: ids from 262,144 on wrap
if int(full.min()) < 0⟦ or int(full.max()) > MAX_TOKEN_ID→⟧:
: logits come back with 65536 for 65535
as_array(q, np.float64, "q") / ⟦65535→65536⟧ * (high - low) + low
: quantization cuts instead of rounding
np.rint(np.⟦rint→floor⟧(part * levels) * (65535 / levels))
== explore_logits | test_explore_source.py test_explore_conversation.py
: the message of --system-col is left out
messages = [⟦{"role": "system", "content": text}, →⟧*messages]
== explore_logits | test_explore_conversation.py test_templates.py
: the first token of a text, which nothing predicts, is extracted
    inside[:⟦1→0⟧] = False
: the end-of-turn token after a template's own markers is not extracted
end = found.⟦end→start⟧() if found else end
: think tags that the template inserts are extracted without --include-think, and not with it
if ⟦not →⟧self.choice.include_think:
== explore_logits | test_explore_open.py
: rows asked for in an order come in the order of the shards
pa.concat_tables(tables, promote_options="permissive")⟦.take(order)→⟧
: a file of a later format is read as if it were known
range(1, FORMAT_VERSION + ⟦1→10⟧)
== explore_logits | test_extract_parts.py
: a job goes on with another seed
NOT_OF_JOB = {"attn", "versions", "numerics", "limit", "options"⟦→, "seed"⟧}
== explore_logits | test_explore_align.py test_explore_decode.py
: ranks in the nucleus count from 0
np.where(in_nucleus, top - block.top.starts[:-1], block.top.counts⟦) + 1→ + 1)⟧
: the bound of a token that is not stored is the looser of two
np.⟦minimum→maximum⟧(left, block.top.low - block.logsumexp), left)
: a conversation with more tokens than its row is put beside it
if positions.size ⟦!=→<⟧ sample["num_tokens"]:
== explore_logits | test_explore_html.py
: HTML in a conversation acts on the page
        autoescape=⟦True→False⟧,
        finalize
== explore_logits | test_explore_validate.py
: an id that occurs twice for a token is valid
twice[keys[1:][np.diff(keys) ⟦==→<⟧ 0] >> 18] = True
: a nucleus that the cap cut is called broken
(mass < top_p - tolerance) & (top.counts <⟦→=⟧ min(
== explore_logits | test_explore_stats.py
: a percentile may lie one size too low
max(math.⟦ceil→floor⟧(q * self.tokens / 100), 1)
== explore_logits | test_explore_training.py test_explore_loss.py
: a student is trained one position late
row["teacher_positions"] + ⟦(s - 1)→s⟧
: every epoch has the order of the first
np.random.default_rng([self.seed, ⟦epoch, →⟧*of])
== explore_logits | test_explore_loss.py
: the divergence is scaled by the temperature and not by its square
(alpha * temperature⟦**2→⟧)
: the weights of the tail take the mass that was not drawn with the wrong sign
(log_times ⟦-→+⟧ undrawn * times + arrived.log().sum(0))
== explore_logits | test_explore_cli.py test_explore_validate.py
: --validate ends with exit code 0 whatever it finds
return summary, ⟦3→0⟧  # what breaks
== compute_lengths | test_compute_lengths.py
: --index-col is dropped: lengths are written by row number
index = ⟦source_id(row, number, encoder.columns)→number⟧
: rows of a stream have wrong numbers from the third batch on
start ⟦+→⟧= len(batch)
: the last batches of a source measured in several processes are lost
        ⟦while→if⟧ waiting:
: the columns length and num_tokens are swapped
[measured.index, measured.⟦length, measured.num_tokens→num_tokens, measured.length⟧]
: percentiles count conversations that cannot be used
return self.num_tokens >⟦→=⟧ 0
: a push that the Hub never took is reported as done
            if ⟦not passing or wait_s is None or→wait_s is None:
                return
            if not passing or⟧
"""


class Fault(NamedTuple):
    """A planted fault: `old` becomes `new` in a script."""

    script: str
    tests: tuple[str, ...]  # files in tests/, in the order in which they run
    says: str
    old: str
    new: str


def parse_faults(text: str) -> list[Fault]:
    faults: list[Fault] = []
    script, tests = "", ""
    for block in re.split(r"\n+(?=: |== )", text.strip()):
        first, _, snippet = block.partition("\n")
        mark, _, said = first.partition(" ")
        if mark == "==":
            script, tests = said.split(" | ")
        else:
            old, new = (re.sub("(?s)⟦(.*?)→(.*?)⟧", rf"\{n}", snippet) for n in (1, 2))
            faults.append(Fault(script, tuple(tests.split()), said, old, new))
    return faults


def check_faults(faults: Sequence[Fault]) -> None:
    """End where a fault cannot be planted, or names a file of tests that is not there."""
    for fault in faults:
        found = (ROOT / f"{fault.script}.py").read_text().count(fault.old)
        if found != 1 or fault.old == fault.new:
            sys.exit(f"{fault.script}.py holds {found} times, not once: {fault.old!r}")
        for name in fault.tests:
            if not (ROOT / "tests" / name).is_file():
                sys.exit(f"no tests/{name}, which is to catch: {fault.says}")


def run_tests(fault: Fault | None, tests: Sequence[str], *options: str) -> tuple[int, str]:
    """Run files of tests in a copy with a fault until one fails; return pytest's code and words."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "project"
        for source in (path for pattern in COPIED for path in ROOT.glob(pattern)):
            ignored = shutil.ignore_patterns("__pycache__", ".*")
            if source.is_dir():
                shutil.copytree(source, folder / source.name, ignore=ignored)
            else:
                folder.mkdir(exist_ok=True)
                shutil.copy(source, folder)
        if fault:
            script = folder / f"{fault.script}.py"
            script.write_text(script.read_text().replace(fault.old, fault.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider"]
        command += ["-m", "not slow", *options, *(f"tests/{name}" for name in tests)]
        env = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
        env |= {"TOKENIZERS_PARALLELISM": "false"}
        try:
            done = run_process(command, timeout_s=LIMIT_S, cwd=folder, env=env)
        except AssertionError:
            return 1, f"FAILED tests/{tests[0]}::(no end within {LIMIT_S} s)"
        return done.code, done.stdout + done.stderr


def try_faults(
    faults: Sequence[Fault], *options: str, jobs: int = 1
) -> Iterator[tuple[Fault, str, float]]:
    """Yield each fault, the test that caught it ("" where all passed), and seconds, in order.

    Ends where a fault does not fit, where the same tests do not pass without one, and where they
    cannot be collected with it: no user would ever have met that fault.
    """
    check_faults(faults)
    files = list(dict.fromkeys(name for fault in faults for name in fault.tests))
    spread = ("-n", str(jobs), "--dist", "loadfile") if jobs > 1 else ()
    code, said = run_tests(None, files, *options, *spread)
    if code not in (0, 5):
        sys.exit(f"{said[-3000:]}\nthe tests fail without a fault")

    def try_fault(fault: Fault) -> tuple[Fault, str, float]:
        began = time.monotonic()
        code, said = run_tests(fault, fault.tests, *options)
        failed = re.findall(r"^(?:FAILED|ERROR) tests/(\S+::[^\s\[]+|\S+)", said, re.M)
        if code not in (0, 1, 5) or (code == 1 and not failed):
            sys.exit(f"{said[-3000:]}\n{fault.says}: pytest ended with exit code {code}")
        return fault, failed[0] if code == 1 else "", time.monotonic() - began

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(try_fault, faults)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="faults whose script or words match a pattern")
    parser.add_argument("--jobs", type=int, default=1, help="copies in which tests run at a time")
    args = parser.parse_args()
    faults = [f for f in parse_faults(FAULTS) if re.search(args.only, f"{f.script} {f.says}")]
    began, survivors = time.monotonic(), []
    print_head("script", "fault", "caught by", "s")
    for fault, caught_by, seconds in try_faults(faults, jobs=args.jobs):
        print_row(fault.script, fault.says, caught_by or "nothing", f"{seconds:.0f}")
        survivors += [] if caught_by else [fault.says]
    caught = len(faults) - len(survivors)
    figures = {"faults": len(faults), "caught": caught, "survivors": survivors}
    print(json.dumps({**figures, "seconds": round(time.monotonic() - began)}))
    return int(caught < math.ceil(SHARE * len(faults)))


if __name__ == "__main__":
    sys.exit(main())
