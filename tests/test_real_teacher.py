"""`make real` in little: the same functions on the embedded teacher, and faults they must find."""

import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import CHATS, ROOT, TEACHER

sys.path.append(str(ROOT / "tests/tools"))
import oracle
import real_teacher
from oracle import Violation


@pytest.fixture(scope="module")
def teacher():
    return oracle.load_reference(str(TEACHER))


def test_greedy_answers_are_the_likeliest_tokens(teacher, chats):
    """Padding on the left and the batch must not change what the teacher says."""
    model, tokenizer = teacher
    asked = [chat for chat in chats[:8] if chat["messages"][0]["role"] == "user"]
    answers = real_teacher.answer(model, tokenizer, asked, "greedy")
    assert answers
    assert answers != real_teacher.answer(model, tokenizer, asked, "sampled")
    for chat in answers:
        ids, positions = oracle.assistant_tokens(chat["messages"], tokenizer)
        likeliest = oracle.full_forward(model, ids).argmax(-1)
        assert [ids[p] for p in positions] == [int(likeliest[p - 1]) for p in positions]


def test_the_suite_runs_as_by_a_user_and_its_rows_are_right(tmp_path, teacher, monkeypatch, capsys):
    kinds = {name: real_teacher.KINDS[name] for name in ("default", "--min-p 0.01")}
    monkeypatch.setattr(real_teacher, "KINDS", kinds)
    text = tmp_path / "human.jsonl"
    text.write_text("\n".join(CHATS.read_text("utf-8").splitlines()[:20]) + "\n")
    outputs = real_teacher.run_text(tmp_path, TEACHER, "human", text, 12)
    real_teacher.print_table([figures for figures, _ in outputs])
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(kinds)
    assert (tmp_path / "human/page-1.html").stat().st_size > 10_000
    for figures, output in outputs:
        tokens, error = real_teacher.check_rows(output, *teacher, text, 4)
        assert 0 < tokens < figures["tokens"]
        assert 0 < error < real_teacher.NOISE.logsumexp
        (part,) = (output / "data").glob("*.parquet")
        table = pq.read_table(part)
        records = table.to_pylist()
        records[0]["logsumexp"] = [value + 0.01 for value in records[0]["logsumexp"]]
        pq.write_table(table.from_pylist(records, table.schema), part)
        with pytest.raises(Violation, match="row"):
            real_teacher.check_rows(output, *teacher, text, 4)


def test_points_of_one_u_pass_and_others_do_not():
    weights = np.exp(np.random.default_rng(5).normal(0, 2, 400))
    p = weights / weights.sum()
    top = np.flatnonzero(p >= 0.02).tolist()
    rest = np.where(p >= 0.02, 0, p)
    count = int(np.ceil(rest.sum() / 0.02))
    points = (0.3 + np.arange(count)) * rest.sum() / count
    drawn = np.searchsorted(np.cumsum(rest), points, side="right").tolist()
    real_teacher.check_points(p, top, drawn, 0.02, "here")
    faults = {
        "a likely id is missing": (top[1:], drawn),
        "an unlikely id": ([*top, int(np.argmin(p))], drawn),
        f"{count - 2} points": (top, drawn[2:]),
        "ids out of place": (top, drawn[::-1]),
        "no u puts": (top, [*drawn[:3], drawn[5], drawn[5], *drawn[5:]]),
    }
    for said, (ids, hit) in faults.items():
        with pytest.raises(Violation, match=said):
            real_teacher.check_points(p, ids, hit, 0.02, "here")
