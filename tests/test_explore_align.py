"""Putting rows beside their text: the right token at the right place, exact or honestly bounded."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import CHATS, TEACHER, run_script
from small_output import (
    SETTINGS,
    extract_row,
    random_logits,
    random_rows,
    write_output,
    write_parts,
)

import explore_logits as explore
from explore_logits import SourceError, encode_conversation, execute_analysis, get_sample, open_text

VOCAB = 5000
RUN = SETTINGS | {
    "model": str(TEACHER), "dataset": str(CHATS), "messages_col": "messages", "user_col": None,
    "assistant_col": None, "index_col": "id", "vocab_size": VOCAB,
}  # fmt: skip
STORED = RUN | {"store_tokens": True}


@pytest.fixture(scope="module")
def tokenizer():
    return explore.load_tokenizer(str(TEACHER))


@pytest.fixture(scope="module")
def made(tmp_path_factory, chats, tokenizer):
    """An output of made-up logits over six conversations, not the source's first or in its order.

    Its folder, the chats, and the logits (N, V) of the extracted tokens of each.
    """
    chosen = sorted(chats[40:], key=lambda row: len(json.dumps(row)))[15:9:-1]
    rng, logits, rows = np.random.default_rng(17), [], []
    for row in chosen:
        encoded = encode_conversation(row["messages"], tokenizer)
        part = random_logits(rng, encoded.token_positions.size, VOCAB)
        actual = encoded.input_ids[encoded.token_positions]
        part[np.arange(actual.size), actual] += rng.choice([0.0, 8.0, 20.0], actual.size)
        logits.append(part.astype(np.float32))
        rows.append(extract_row(logits[-1], RUN, rng, index=row["id"]))
    folder = write_output(tmp_path_factory.mktemp("align"), rows, settings=RUN, rows_per_shard=4)
    return SimpleNamespace(folder=folder, chats=chosen, logits=logits)


def true_figures(logits: np.ndarray, actual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return log-probability and rank of the actual tokens from the full logits."""
    wide = logits.astype(np.float64)
    total = np.log(np.exp(wide - wide.max()).sum(axis=1)) + wide.max()
    chosen = wide[np.arange(actual.size), actual]
    return chosen - total, 1 + (wide > chosen[:, None]).sum(axis=1)


def test_probability_and_rank_are_exact_or_bound_the_truth(made, tokenizer):
    places = []
    for row, (chat, part) in enumerate(zip(made.chats, made.logits, strict=True)):
        sample = get_sample(made.folder, row)
        analysis = explore.analyze_token_probabilities(sample, chat["messages"], tokenizer, k=3)
        actual = np.array([token.id for token in analysis.tokens])
        log_probs, ranks = true_figures(part, actual)
        for token, log_prob, rank in zip(analysis.tokens, log_probs, ranks, strict=True):
            places.append(token.where)
            assert token.exact == (token.where != "not stored")
            if token.exact:
                assert token.log_probability == pytest.approx(log_prob, abs=1e-3)
            else:
                assert token.log_probability >= log_prob
            assert token.probability == pytest.approx(np.exp(token.log_probability))
            if token.where == "nucleus":
                assert token.rank == rank
            else:
                assert token.nucleus_size < token.rank <= rank
            assert len(token.predictions) == min(3, token.nucleus_size)
            assert len(token.tail) == 24
    assert {"nucleus", "not stored"} <= set(places)


@pytest.mark.parametrize("bits", [16, 6])
def test_no_token_of_the_vocabulary_escapes_its_bound(bits, tmp_path):
    settings = SETTINGS | {"vocab_size": 300, "logit_bits": bits, "top_p": 0.9, "top_p_max": 20}
    rng = np.random.default_rng(23)
    logits = random_logits(rng, 12, 300)
    row = extract_row(logits, settings, rng, index=0)
    block = get_sample(write_output(tmp_path, [row], settings=settings)).block
    where = set()
    step = 2 * (block.top.high - block.tail.low).max() / (2**bits - 1)
    for token in range(300):
        actual = np.full(12, token)
        scores = explore.score_tokens(block, actual)
        log_probs, ranks = true_figures(logits, actual)
        error = scores.log_probability - log_probs
        assert (np.abs(error[scores.exact]) <= step).all()
        assert (error[~scores.exact] >= -1e-9).all()
        assert (scores.rank[scores.in_nucleus] == ranks[scores.in_nucleus]).all() or bits < 16
        assert (scores.rank[~scores.in_nucleus] <= ranks[~scores.in_nucleus]).all()
        assert (scores.exact == (scores.in_nucleus | scores.in_tail)).all()
        where |= set(zip(scores.in_nucleus.tolist(), scores.in_tail.tolist(), strict=True))
    assert where == {(True, False), (False, True), (False, False)}


@pytest.mark.parametrize("bits", range(4, 17))
def test_no_logit_is_further_off_than_its_bound(bits):
    # 20,000 logits in 1,000 ranges, seeded; half a step alone was exceeded at 15 bits by 1 in 8.
    rng = np.random.default_rng(bits)
    logits = (rng.standard_normal((1000, 20)) * rng.uniform(1, 20, (1000, 1))).astype(np.float32)
    q, low, high = explore.quantize_logits(logits, [20] * 1000, bits=bits)
    starts, none = explore.to_starts([20] * 1000), np.zeros(0, np.int32)
    entries = explore.Entries(starts, none, q, low, high, np.zeros(1000), bits)
    off = np.abs(entries.logits.reshape(1000, 20) - logits).max(axis=1)
    bound = entries.error
    assert (off <= bound * (1 + 1e-9)).all()
    assert off.max() > 0.9 * bound[off.argmax()]


def test_a_bound_is_as_tight_as_what_is_stored_allows(tmp_path):
    # Three tokens: 0.6 in the nucleus, 0.3 drawn in the tail, so 0.1 is left for the third.
    logits = np.log(np.array([[0.6, 0.3, 0.1]])).astype(np.float32)
    settings = SETTINGS | {"top_p": 0.5, "sampled_n": 1, "vocab_size": 3}
    for seed in range(20):
        row = extract_row(logits, settings, np.random.default_rng(seed), index=0)
        if row["sampled_indices_low"] == [1]:
            break
    block = get_sample(write_output(tmp_path, [row], settings=settings)).block
    scores = explore.score_tokens(block, np.array([2]))
    assert not scores.exact[0]
    assert np.exp(scores.log_probability[0]) == pytest.approx(0.1, rel=1e-4)
    assert scores.rank[0] == 2
    in_tail = explore.score_tokens(block, np.array([1]))
    assert in_tail.exact[0]
    assert np.exp(in_tail.log_probability[0]) == pytest.approx(0.3, rel=1e-5)


def test_everything_is_found_from_the_output_itself(made, tokenizer):
    for row, chat in enumerate(made.chats):
        analysis = execute_analysis(made.folder, row)
        assert analysis.index == chat["id"]
        assert analysis.model == str(TEACHER)
        encoded = encode_conversation(chat["messages"], tokenizer)
        extracted = encoded.input_ids[encoded.token_positions].tolist()
        assert [token.id for token in analysis.tokens] == extracted
        assert [t for _, t in analysis.pieces if t is not None] == list(range(len(extracted)))
        if all(ord(c) < 128 for c in encoded.text):
            assert "".join(text for text, _ in analysis.pieces) == encoded.text
    by_index = execute_analysis(made.folder, conversation=chat["id"])
    assert (by_index.index, by_index.tokens) == (chat["id"], analysis.tokens)


def test_a_conversation_that_was_not_extracted_is_shown_as_such(made, chats, tmp_path):
    gone = chats[0]["id"]
    missing = execute_analysis(made.folder, conversation=gone)
    assert missing.tokens == []
    assert "not in the output" in missing.note
    assert all(t is None for _, t in missing.pieces)
    assert "not extracted" in explore.visualize_conversation_probabilities(missing)
    with pytest.raises(SourceError, match="no conversation 999999"):
        execute_analysis(made.folder, conversation=999_999)
    rows = [{**row, "index": gone + 1 + i} for i, row in enumerate(random_rows(3, settings=RUN))]
    parts = write_parts(tmp_path, rows, settings=RUN, skipped={gone: "too_long"})
    assert execute_analysis(parts, conversation=gone).note.endswith("gave no row: too_long")


def test_another_number_of_tokens_is_an_error_that_names_both(made, tokenizer):
    sample = get_sample(made.folder, 0)
    *before, last = made.chats[0]["messages"]
    for content in ("Quite another answer, and a longer one at that.", "Short."):
        chat = [*before, {**last, "content": content}]
        wanted = encode_conversation(chat, tokenizer).token_positions.size
        both = f"holds {sample['num_tokens']} tokens.*has {wanted} to extract"
        with pytest.raises(explore.AlignmentError, match=both):
            explore.analyze_token_probabilities(sample, chat, tokenizer)


def test_stored_text_needs_no_source_nor_a_model(tmp_path, tokenizer, capsys, caplog):
    rows = random_rows(2, settings=STORED, tokens=6)
    made = write_output(tmp_path / "a", rows, settings=STORED | {"dataset": "./gone.jsonl"})
    analysis = execute_analysis(made, 1)
    ids = np.array(rows[1]["input_ids"])
    assert [token.id for token in analysis.tokens] == ids[rows[1]["token_positions"]].tolist()
    assert len(analysis.pieces) == ids.size
    with pytest.raises(explore.AlignmentError, match="--store-tokens"):
        explore.analyze_token_probabilities(get_sample(random_rows(1)), None, tokenizer)
    made = str(write_output(tmp_path / "b", rows, settings=STORED | {"model": "./gone"}))
    assert explore.main([made, "--sample", "1", "--token", "0"]) == 0
    assert f"#{get_sample(rows, 1)['top_indices'][0][0]}" in capsys.readouterr().out
    assert "showing ids only" in caplog.text
    assert explore.main([made, "--html", str(tmp_path / "page.html")]) == 2


def test_a_source_or_model_that_moved_can_be_given(tmp_path, chats):
    rows, moved = random_rows(1, settings=RUN), {"model": "./gone", "dataset": "./gone.jsonl"}
    for name, where in moved.items():
        made = write_output(tmp_path / name, rows, settings=RUN | {name: where})
        with pytest.raises(explore.LogitsError, match=f"{where}.*--{name}, {name}="):
            execute_analysis(made)
    made = write_output(tmp_path / "both", rows, settings=RUN | moved)
    for as_given in (str, Path):
        text = open_text(made, model=as_given(TEACHER), dataset=as_given(CHATS))
        assert text.encode(np.int64(chats[3]["id"])).input_ids.size > 3


def test_the_source_and_template_are_the_runs_or_refused(tmp_path, tokenizer, chats):
    source, text, chat = tmp_path / "chats.jsonl", CHATS.read_text(encoding="utf-8"), chats[3]
    source.write_text(text, encoding="utf-8")
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>\n{% endfor %}"
    settings = RUN | {
        "dataset": str(source), "dataset_revision": explore.source_revision(str(source)),
        "chat_template_sha256": explore.hash_template(template),
    }  # fmt: skip
    rows = random_rows(1, settings=STORED)
    made = write_output(tmp_path / "out", rows, settings=settings, chat_template=template)
    expected = encode_conversation(chat["messages"], tokenizer, chat_template=template)
    index = chat["id"]
    assert open_text(made).encode(index).input_ids.tolist() == expected.input_ids.tolist()
    source.write_text(text.replace(" the ", " and ", 1), encoding="utf-8")
    with pytest.raises(SourceError, match=r"changed since the run.*--dataset, dataset= says where"):
        open_text(made).encode(index)
    assert open_text(made, dataset=str(CHATS)).encode(index).text == expected.text
    with pytest.raises(SourceError, match="changed since the run"):
        next(iter(explore.LogitIterableDataset(made)))
    source.unlink()  # as from another working directory
    elsewhere = r"chats\.jsonl', is not here; --dataset, dataset= says"
    for conversation in (None, index, 10**6):
        with pytest.raises(SourceError, match=elsewhere):
            execute_analysis(made, conversation=conversation)
    stored = settings | {"store_tokens": True}
    kept = write_output(tmp_path / "kept", rows, settings=stored, chat_template="changed")
    trained = next(iter(explore.LogitIterableDataset(kept)))
    assert trained["input_ids"].tolist() == rows[0]["input_ids"], "what the rows store wins"
    (made / "chat_template.jinja").write_text(template + " ")
    with pytest.raises(explore.TemplateError, match=r"bring back chat_template\.jinja"):
        open_text(made, dataset=str(CHATS)).encode(index)


def test_figures_over_the_text_say_where_they_rest_on_bounds_and_which_are_known(made, tmp_path):
    fits, (one, two, *_), rng = len(made.logits[0]), made.chats, np.random.default_rng(2)
    rows = [  # the second one's conversation is not there, the third one's has another length
        extract_row(random_logits(rng, n, VOCAB), RUN, rng, index=index)
        for n, index in ((fits, one["id"]), (4, -9), (fits + 1, two["id"]))
    ]
    other, stats = (
        explore.compute_dataset_stats(output, actual_tokens=open_text(output).actual_tokens)
        for output in (write_output(tmp_path, rows, settings=RUN), made.folder)
    )
    assert (other.known, other.rows) == (fits, 3)
    analyses = [execute_analysis(made.folder, row) for row in range(6)]
    tokens = [token for analysis in analyses for token in analysis.tokens]
    assert stats.known == stats.tokens == len(tokens)
    assert stats.in_nucleus == pytest.approx(np.mean([t.where == "nucleus" for t in tokens]))
    assert stats.agreement == pytest.approx(np.mean([t.rank == 1 for t in tokens]))
    mean = np.mean([token.log_probability for token in tokens])
    assert stats.mean_log_probability == pytest.approx(mean)
    assert stats.bounded > 0
    assert dict(stats.facts())["perplexity of the text"].startswith("≥ ")
    bounded = next(a for a in analyses if not all(token.exact for token in a.tokens))
    assert "typical probability of a token ≤ " in explore.render_page([bounded])
    frame = bounded.to_pandas()
    assert frame["log_probability"].mean() == pytest.approx(bounded.mean_log_probability)


def test_code_that_a_tokenizer_brings_runs_only_when_asked(tmp_path, monkeypatch, tokenizer):
    settings = RUN | {"trust_remote_code": True, "store_tokens": True}
    made = write_output(tmp_path, random_rows(1, settings=settings), settings=settings)

    def needs_trust(model: str, *, trust_remote_code: bool = False, **_: Any) -> Any:
        if not trust_remote_code:
            raise explore.LogitsError("this tokenizer needs its own code")
        return tokenizer

    monkeypatch.setattr(explore, "load_tokenizer", needs_trust)
    with pytest.raises(explore.LogitsError, match="--trust-remote-code, trust_remote_code=True"):
        execute_analysis(made)
    assert explore.main([str(made), "--trust-remote-code"]) == 0


def test_pipes_get_the_text_as_it_is(tmp_path, chats, tokenizer):
    rng, rows = np.random.default_rng(4), []
    encoded = (encode_conversation(chat["messages"], tokenizer) for chat in chats)
    wide = [e for e in encoded if sum(ord(c) > 0x2FF for c in e.text) > 40][:2]
    for index, chat in enumerate(wide):
        positions = chat.token_positions.tolist()
        row = extract_row(random_logits(rng, len(positions), VOCAB), STORED, rng, index=index)
        rows.append(row | {"input_ids": chat.input_ids.tolist(), "token_positions": positions})
    made = write_output(tmp_path, rows, settings=STORED)
    done = run_script("explore_logits.py", made, "--sample", "0,1", LC_ALL="C", COLUMNS="")
    assert done.code == 0, done.stderr
    assert done.summary["sample"] == [0, 1]
    assert "\x1b" not in done.stdout
    body = re.sub(r"\{[^{}]*%\}", "", done.stdout)
    assert all(chat.text.strip() in body for chat in wide)


def test_lines_break_between_words_and_wide_characters_count_twice(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = f"{'one ' * 9}two three\nfour {'日本語 ' * 5}五 {'a' * 50}"
    broken = f"{'one ' * 9}two\nthree\nfour {'日本語 ' * 5}".rstrip() + f"\n五\n{'a' * 50}"
    assert explore.break_lines(text) == broken
    monkeypatch.delenv("COLUMNS")
    assert explore.break_lines(text) == text


@pytest.mark.parametrize(("width", "colour"), [(80, True), (120, False)])
def test_words_stay_whole_and_are_coloured_or_marked(made, width, colour, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    for row in range(6):
        analysis = execute_analysis(made.folder, row)
        coloured = explore.visualize_conversation_probabilities(analysis)
        shown = re.sub("\x1b\\[[0-9;]*m", "", coloured)
        assert (coloured != shown) == colour
        body = shown.split("\n\n", 1)[1]
        texts = explore.join_characters([text for text, _ in analysis.pieces])
        whole = explore.show_text("".join(texts))
        if colour:
            assert body.split() == whole.split(), "only spaces became line breaks"
        else:
            unlikely = [token for token in analysis.tokens if token.probability < 0.5]
            assert shown.count("{") >= len(unlikely)
            assert ("{≤" in shown) or all(token.exact for token in analysis.tokens)
        for line in shown.split("\n"):
            assert explore.count_columns(line) <= width or " " not in line.strip()
    sample = explore.quick_explore(made.folder, 1)
    shown = capsys.readouterr().out
    assert all(len(line) <= width for line in shown.splitlines())
    assert "its first 3 tokens:" in shown
    assert "#" not in shown.split("tokens:")[1], "words are found from the output"
    explore.print_top_tokens(sample, 0)
    assert "#" not in capsys.readouterr().out
