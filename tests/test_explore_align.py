"""Putting rows beside their text: the right token at the right place, exact or honestly bounded."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import CHATS, TEACHER
from small_output import SETTINGS, extract_row, random_logits, random_rows, write_output

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


def test_everything_is_found_from_the_output_exact_or_bounded(made, tokenizer):
    places = []
    for row, (chat, part) in enumerate(zip(made.chats, made.logits, strict=True)):
        analysis = execute_analysis(made.folder, row, k=3)
        encoded = encode_conversation(chat["messages"], tokenizer)
        actual = encoded.input_ids[encoded.token_positions]
        assert (analysis.index, analysis.model) == (chat["id"], str(TEACHER))
        assert [token.id for token in analysis.tokens] == actual.tolist()
        assert [t for _, t in analysis.pieces if t is not None] == list(range(actual.size))
        if encoded.text.isascii():
            assert "".join(text for text, _ in analysis.pieces) == encoded.text
        for token, *true in zip(analysis.tokens, *true_figures(part, actual), strict=True):
            log_prob, rank = true
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
    sample = get_sample(made.folder, row)
    given = explore.analyze_token_probabilities(sample, chat["messages"], tokenizer, k=3)
    by_id = execute_analysis(made.folder, conversation=chat["id"], k=3)
    assert given.tokens == by_id.tokens == analysis.tokens


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


def test_a_bound_is_as_tight_as_what_is_stored_allows():
    # Three tokens: 0.6 in the nucleus, 0.3 drawn in the tail, so 0.1 is left for the third.
    logits = np.log(np.array([[0.6, 0.3, 0.1]])).astype(np.float32)
    settings, rng = {"top_p": 0.5, "sampled_n": 1, "vocab_size": 3}, np.random.default_rng(0)
    rows = (extract_row(logits, SETTINGS | settings, rng, index=0) for _ in range(20))
    row = next(row for row in rows if row["sampled_indices_low"] == [1])
    third, second = (explore.score_tokens(get_sample([row]).block, np.array([i])) for i in (2, 1))
    assert (third.exact[0], second.exact[0], third.rank[0]) == (False, True, 2)
    assert np.exp(third.log_probability[0]) == pytest.approx(0.1, rel=1e-4)
    assert np.exp(second.log_probability[0]) == pytest.approx(0.3, rel=1e-5)


def test_a_conversation_that_was_not_extracted_is_shown_as_such(made, chats):
    gone = chats[0]["id"]
    missing = execute_analysis(made.folder, conversation=gone)
    assert missing.tokens == []
    assert "not in the output" in missing.note
    assert all(t is None for _, t in missing.pieces)
    with pytest.raises(SourceError, match="no conversation 999999"):
        execute_analysis(made.folder, conversation=999_999)


def test_another_number_of_tokens_is_an_error_that_names_both(made, tokenizer):
    sample = get_sample(made.folder, 0)
    *before, last = made.chats[0]["messages"]
    for content in ("Quite another answer, and a longer one at that.", "Short."):
        chat = [*before, {**last, "content": content}]
        wanted = encode_conversation(chat, tokenizer).token_positions.size
        both = f"holds {sample['num_tokens']} tokens.*has {wanted} to extract"
        with pytest.raises(explore.AlignmentError, match=both):
            explore.analyze_token_probabilities(sample, chat, tokenizer)


def test_stored_text_needs_no_source_and_ids_no_model(tmp_path, tokenizer, capsys):
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
    assert explore.main([made, "--html", str(tmp_path / "page.html")]) == 2


def test_a_source_or_model_that_moved_can_be_given(tmp_path, chats):
    moved = {"model": "./gone", "dataset": "./gone.jsonl"}
    made = write_output(tmp_path, settings=RUN | moved)
    with pytest.raises(explore.LogitsError, match=r"\./gone.*--model, model="):
        open_text(made)
    with pytest.raises(explore.LogitsError, match=r"gone\.jsonl.*--dataset, dataset="):
        execute_analysis(made, model=str(TEACHER))
    text = open_text(made, model=TEACHER, dataset=CHATS)
    assert text.encode(np.int64(chats[3]["id"])).input_ids.size > 3


def test_the_source_and_template_are_the_runs_or_refused(tmp_path, tokenizer, chats):
    source, text, chat = tmp_path / "chats.jsonl", CHATS.read_text(encoding="utf-8"), chats[3]
    source.write_text(text, encoding="utf-8")
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>\n{% endfor %}"
    settings = RUN | {
        "dataset": str(source), "dataset_revision": explore.source_revision(str(source)),
        "chat_template_sha256": explore.hash_template(template),
    }  # fmt: skip
    made = write_output(tmp_path / "out", settings=settings, chat_template=template)
    expected = encode_conversation(chat["messages"], tokenizer, chat_template=template)
    assert open_text(made).encode(chat["id"]).input_ids.tolist() == expected.input_ids.tolist()
    source.write_text(text.replace(" the ", " and ", 1), encoding="utf-8")
    with pytest.raises(SourceError, match=r"changed since the run.*--dataset, dataset= says where"):
        open_text(made).encode(chat["id"])
    assert open_text(made, dataset=str(CHATS)).encode(chat["id"]).text == expected.text
    with pytest.raises(SourceError, match="changed since the run"):
        next(iter(explore.LogitIterableDataset(made)))
    source.unlink()  # as from another working directory
    with pytest.raises(SourceError, match=r"chats\.jsonl', is not here; --dataset, dataset= says"):
        execute_analysis(made, conversation=chat["id"])
    (made / "chat_template.jinja").write_text(template + " ")
    with pytest.raises(explore.TemplateError, match=r"bring back chat_template\.jinja"):
        open_text(made, dataset=str(CHATS)).encode(chat["id"])


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
    frame = pd.concat(analysis.to_pandas() for analysis in analyses)
    assert stats.mean_log_probability == pytest.approx(frame["log_probability"].mean())
    assert stats.bounded == (~frame["exact"]).sum() > 0
    assert stats.facts()["perplexity of the text"].startswith("≥ ")
    bounded = next(a for a in analyses if not all(token.exact for token in a.tokens))
    assert "typical probability of a token ≤ " in explore.render_page([bounded])


def test_code_that_a_tokenizer_brings_runs_only_when_asked(tmp_path, monkeypatch, tokenizer):
    def load(model, *, trust_remote_code=False, **_):
        if not trust_remote_code:
            raise explore.LogitsError("this tokenizer needs its own code")
        return tokenizer

    monkeypatch.setattr(explore, "load_tokenizer", load)
    made = write_output(tmp_path, settings=STORED | {"trust_remote_code": True})
    with pytest.raises(explore.LogitsError, match="--trust-remote-code, trust_remote_code=True"):
        execute_analysis(made)
    assert explore.main([str(made), "--trust-remote-code"]) == 0
