"""Opening outputs: any row at once, from any kind of dataset, and nothing that should not be."""

import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_output import SETTINGS, STORED, random_rows, rows_to_table, write_output, write_parts

import explore_logits as explore
from explore_logits import FormatError, OpenError, get_sample, iter_samples, load_logit_dataset

ROWS = random_rows(20)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """Twenty rows in three shards of three row groups each."""
    return write_output(tmp_path_factory.mktemp("output"), ROWS)


def assert_row(sample: explore.Sample, row: int) -> None:
    """Fail where a sample is not that of a row, in its values or their types."""
    wanted = get_sample([ROWS[row]])
    np.testing.assert_equal(dict(sample), dict(wanted))
    assert repr(dict(sample)) == repr(dict(wanted))


def put_column(rows: Any, name: str, values: pa.Array) -> pa.Table:
    """Return rows as a table with other values in a column."""
    table = rows_to_table(rows)
    return table.set_column(table.column_names.index(name), name, values)


def test_every_row_can_be_read_in_any_order(output):
    dataset = load_logit_dataset(output)
    order = np.random.default_rng(3).permutation(20)
    for row in order.tolist():
        assert_row(get_sample(dataset, row), row)
    assert len(dataset) == 20
    assert_row(get_sample(dataset, -1), 19)
    assert dataset[6:11:2] == [dataset[6], dataset[8], dataset[10]]
    assert dataset[5:5] == []
    assert_row(get_sample(dataset, conversation=13), 13)
    wanted = [13, 2, -1, 13, 7, 0]
    assert dataset.take(wanted)["index"].to_pylist() == [dataset[row]["index"] for row in wanted]
    for row in (20, -21):
        with pytest.raises(explore.RowError, match="20 rows"):
            get_sample(dataset, row)
    with pytest.raises(explore.RowError, match="none of the 20 rows is of conversation 77"):
        get_sample(dataset, conversation=77)


def test_threads_that_share_an_output_get_the_rows_that_they_ask_for(output, monkeypatch):
    dataset, arange = load_logit_dataset(output), np.arange

    def interrupted(*args: Any) -> Any:  # by a thread that reads a row of another group
        monkeypatch.setattr(np, "arange", arange)
        dataset.take([19])
        return arange(*args)

    for row in (2, 13):
        monkeypatch.setattr(np, "arange", interrupted)
        assert dataset.take([row])["index"].to_pylist() == [row]


def test_long_rows_are_read_a_few_at_a_time_and_all_of_them(tmp_path, monkeypatch):
    made = write_output(tmp_path, settings=STORED, rows_per_shard=20, rows_per_group=20)
    for size in (2**4, 2**8, 2**10):  # of 1, 5, 20 rows read at once; 1, 1, 5 to train on
        monkeypatch.setattr(explore, "ROW_BYTES", size)
        read = [part.num_rows for part in explore.iter_tables(made)]
        assert (max(read) < 10) == (size < 2**10)
        for rows in (iter_samples(made), iter_samples(ROWS), explore.LogitIterableDataset(made)):
            assert sorted(row["index"] for row in rows) == [*range(20)]


def test_columns_may_be_wider_or_missing_where_nothing_is_lost(tmp_path):
    wide, counts = pa.large_list(pa.int64()), ROWS[0]["top_counts"]
    changed = put_column(ROWS[:1], "top_counts", pa.array([counts], wide))
    with pytest.raises(FormatError, match="top_counts"):
        get_sample(put_column(ROWS[:1], "top_counts", pa.array([[300, *counts[1:]]], wide)))
    table = rows_to_table(ROWS[:4]).replace_schema_metadata(None)
    missing = [name for name in explore.OPTIONAL_COLUMNS if name in table.column_names]
    pq.write_table(table.drop_columns(missing), tmp_path / "old.parquet")
    pq.write_table(changed, tmp_path / "wide.parquet")
    dataset = load_logit_dataset(tmp_path)
    sample = get_sample(dataset, 2)
    assert sample["index"] == 2  # the row number, for want of better
    assert sample["num_tokens"] == ROWS[2]["num_tokens"]
    assert all(part.size == 0 for part in sample["sampled_indices"])
    assert [row["top_counts"] for row in dataset[-2:]] == [ROWS[3]["top_counts"], counts]
    with pytest.raises(FormatError, match="no column 'top_counts'"):
        get_sample(table.drop_columns(["top_counts"]))


def test_all_kinds_of_datasets_give_the_same_samples_and_stay_as_they_are(output):
    mapped = datasets.load_dataset("parquet", data_dir=str(output / "data"), split="train")
    streamed, shaped = mapped.to_iterable_dataset(), mapped.with_format("numpy", columns=["index"])
    before = (mapped.format, shaped.format, shaped._fingerprint)
    files, opened = sorted((output / "data").glob("*.parquet")), load_logit_dataset(output)
    for kind in (str(output), output, files, opened, mapped, mapped.with_format("torch"), shaped,
                 mapped.with_format("numpy"), streamed, rows_to_table(ROWS), ROWS,
                 list(opened)):  # fmt: skip
        assert_row(get_sample(kind, 13), 13)
        assert [s["index"] for s in iter_samples(kind, max_samples=9)] == list(range(9))
    for row in (20, -1):
        with pytest.raises(explore.RowError, match="stream"):
            get_sample(streamed, row)
    assert (mapped.format, shaped.format, shaped._fingerprint) == before
    assert next(iter(streamed))["index"] == 0


WRONG = {  # calls, d an output that is open and s a sample of it, by what they are answered
    "a sample is needed, .* not a LogitDataset": ("print_top_tokens(d, 0)",),
    "a dataset is an output by name, .* not a list of int": ("get_sample([3])",),
    "a row number is an integer": ("d['3']", "get_sample(d, slice(2))", "get_sample(d, True)"),
    "a token's number is an integer, not 1.5": ("decode_top_tokens(s, 1.5)",),
    "percentile 101: a number from 0 to 100": ("analyze_nucleus_sizes(d).percentile(101)",),
    "bits=17: an integer in 4..16": ("quantize_logits([1.0], bits=17)",),
    "counts of at least 1 that sum to 2": ("quantize_logits([1, 2], [3])",),
    "4 ids need 1 high bytes, found 2": ("unpack_indices([1, 2, 3, 4], b'00')",),
    "counts sum to 4, but there are 5 ids": ("unpack_indices(range(5), b'00', [2, 2])",),
    "token ids must be integers, got float64": ("pack_indices([1.5])",),
    "world_size='2': an integer of 0": ("LogitIterableDataset(d, world_size='2')",),
    "takes rows of LogitIterableDataset with all of their columns": ("collate_logits([s])",),
}  # fmt: skip


@pytest.mark.parametrize(("message", "calls"), WRONG.items(), ids=WRONG.keys())
def test_what_is_of_a_wrong_kind_is_refused_with_what_to_pass(output, message, calls):
    names = {"d": load_logit_dataset(output), "s": get_sample(output)}
    for call in calls:
        with pytest.raises(explore.LogitsError, match=message) as refused:
            eval(call, vars(explore) | names)
        assert "\n" not in str(refused.value)


def test_names_tell_the_split_and_the_order_of_shards(tmp_path):
    for folder, names, there in (
        ("a", ("train-00000-of-00001", "test-00000-of-00001"), {"test": [1], "train": [0]}),
        ("b", ("data/part-99999", "data/part-100000", "data/part-00002"), {"train": [2, 0, 1]}),
        ("c", ("latest-00001", "model-test-00000", "my_dev_run"), {"train": [0, 1, 2]}),
        ("d", ("test/0", "data/dev/0", "data/001/part-09000"), {"dev": [1], "train": [2]}),
    ):
        for name in names:
            path = tmp_path / folder / f"{name}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(rows_to_table(ROWS[:1]), path)
        for split, order in there.items():
            shards = load_logit_dataset(tmp_path / folder, split).shards
            assert shards == [f"{names[place]}.parquet" for place in order]
        with pytest.raises(OpenError, match=rf"no split 'eval'; it has {', '.join(there)}$"):
            load_logit_dataset(tmp_path / folder, "eval")
    outer = write_output(tmp_path / "both/outer", ROWS[:4])
    write_output(outer / "old", ROWS[:8])
    assert len(load_logit_dataset(outer)) == 4
    with pytest.raises(OpenError, match=rf"name one of those below: {outer}, {outer}/old$"):
        load_logit_dataset(outer.parent)


def test_shards_of_two_runs_are_not_read_as_one(tmp_path):
    def shard(name: str, first: int, **settings: Any) -> Path:
        made = write_output(tmp_path / name, ROWS[first : first + 3], settings=SETTINGS | settings)
        return made / "data/part-00000.parquet"

    one = shard("one", 0)
    with pytest.raises(FormatError, match="two runs, which differ in seed, top_p"):
        list(iter_samples([one, shard("two", 0, top_p=0.9, seed=7)]))
    with pytest.raises(OpenError, match="names a file twice"):
        load_logit_dataset([one, one])
    job = {"dataset_revision": "sha256:1", "numerics": {}}
    here = shard("job", 3, dataset="./chats.jsonl", **job)
    job |= {"numerics": {"attention": "eager"}, "attn": "eager", "versions": {"torch": "1"}}
    moved = shard("moved", 6, dataset="/data/chats.jsonl", **job)
    assert [sample["index"] for sample in iter_samples([here, moved])] == [*range(3, 9)]
    (tmp_path / "job/data/part-00001.parquet").write_bytes(moved.read_bytes())
    assert explore.validate_output(tmp_path / "job").ok


def test_an_output_in_parts_is_read_in_their_order_by_its_checkpoints(tmp_path):
    skipped = {3: "too_long", 9: "unusable"}
    rows = [row for row in ROWS if row["index"] not in skipped]
    how: Any = {"rows_per_part": 4, "first_part": 8998, "workers": 2}
    dataset = load_logit_dataset(write_parts(tmp_path, rows, skipped=skipped, **how))
    assert dataset.shards[1:3] == ["data/part-08999.parquet", "data/001/part-09000.parquet"]
    assert_row(get_sample(dataset, 12), 14)
    assert len(dataset._footers) == 1, "the checkpoints say which part holds the row"
    assert [sample["index"] for sample in iter_samples(dataset)] == [r["index"] for r in rows]
    assert dataset.skipped() == skipped


def test_the_settings_come_from_the_file_or_from_a_shard(output, tmp_path):
    assert explore.load_extraction_config(output) == SETTINGS
    alone = write_output(tmp_path, ROWS[:2])
    (alone / "extraction_config.json").unlink()
    assert explore.load_extraction_config(alone) == SETTINGS
    (alone / "extraction_config.json").write_text("[")
    assert get_sample(alone)["index"] == 0, "the rows need none of it"
    with pytest.raises(FormatError, match=r"^extraction_config\.json: the settings are not JSON"):
        explore.load_extraction_config(alone)


def test_a_checkpoint_of_other_files_is_not_believed(tmp_path):
    path = write_parts(tmp_path, ROWS) / "checkpoint.json"
    told = json.loads(path.read_text())
    for change in ({"rows": [9] * 3}, {"rows": [1] * 3, "bytes": [17] * 3}, {"rows": ["many"] * 3}):
        path.write_text(json.dumps({**told, "parts": told["parts"] | change}))
        for row in (0, 12, 15, 19):
            assert_row(get_sample(load_logit_dataset(tmp_path), row), row)
    for text in ('{"shards": 3}', "{", "[" * 100_000):
        path.write_text(text)
        assert_row(get_sample(load_logit_dataset(tmp_path), 19), 19)


def test_a_bomb_of_few_bytes_is_refused_before_it_is_decoded(tmp_path):
    levels = pa.ListArray.from_arrays([0, 2**24], pa.array(np.zeros(2**24, np.uint16)))
    long = put_column(ROWS[:1], "top_logits_quantized", levels)
    packed = pa.array([bytes(2**22)], pa.binary())  # 4 MiB, which each of 64 rows points at
    shared = pa.DictionaryArray.from_arrays(pa.array(np.zeros(64, np.int32)), packed)
    wide = put_column([ROWS[0]] * 64, "top_indices_high", shared)
    for table, message in ((long, "smaller row groups"), (wide, "268,435,456 bytes in")):
        path = tmp_path / f"{len(table)}.parquet"
        pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=2**23)
        peak = pa.default_memory_pool().max_memory()
        with pytest.raises(explore.LogitsError, match=rf"{path.name}: .*{message}"):
            get_sample(path)
        assert pa.default_memory_pool().max_memory() - peak < 2**27


def test_a_later_format_is_refused_whatever_it_says(tmp_path):
    table = rows_to_table(ROWS[:1])
    for version in (b"3", b"9" * 5000, b"\xff", b""):
        metadata = table.schema.metadata | {explore.METADATA_VERSION: version}
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
        with pytest.raises(FormatError, match=r"a\.parquet is in format .{,20}, formats up to 2"):
            get_sample(tmp_path)


def test_a_damaged_file_is_a_format_error_that_names_it(tmp_path):
    shard = write_output(tmp_path, ROWS[:8]) / "data/part-00000.parquet"
    data = shard.read_bytes()
    for damaged in (data[: len(data) // 2], b"", data[:100] + bytes(99) + data[199:]):
        shard.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"part-00000\.parquet"):
            list(iter_samples(tmp_path))


def upload(folder: Path) -> None:
    """Upload an output as user/logits, to be read by a fresh connection."""
    api = huggingface_hub.HfApi()
    api.create_repo("user/logits", repo_type="dataset")
    api.upload_folder(repo_id="user/logits", repo_type="dataset", folder_path=folder)
    huggingface_hub.HfFileSystem.clear_instance_cache()


def test_over_the_hub_one_row_costs_a_footer_and_a_row_group(hub, tmp_path, monkeypatch):
    rows = random_rows(24, settings=SETTINGS | {"vocab_size": 2000}, tokens=90)
    upload(write_parts(tmp_path / "out", rows, rows_per_part=12))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def cost(row: int) -> list[int]:
        """Return the bytes of each answer to what reading a row asks for."""
        hub.clear()
        assert get_sample(dataset, row)["index"] == row
        return [e["sent"] for e in hub.log if e["method"] == "GET" and e["range"]]

    dataset = load_logit_dataset("user/logits")
    first, second = cost(17), cost(22)
    assert len(dataset._footers) == 1  # the checkpoint says which shard holds row 17
    groups = [
        sum(group.column(i).total_compressed_size for i in range(group.num_columns))
        for group in map(dataset.footer(1).row_group, (1, 3))
    ]
    # The footer is read with the 64 KiB at the end of the file, a row group exactly once.
    assert sum(first) <= 2**16 + groups[0] + 1000
    assert sum(second) <= groups[1] + 1000
    assert cost(22) == []  # the same row group is kept
    local = load_logit_dataset("user/logits", streaming=False)
    assert (len(local), local.store.on_hub, get_sample(local, 17)["index"]) == (24, False, 17)


def test_a_hub_in_trouble_is_one_line_without_a_token(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(explore, "HUB_TIMEOUT_S", 0.5)
    upload(write_output(tmp_path / "out", ROWS))
    with pytest.raises(explore.LogitsError, match="no dataset 'user/nothing'"):
        load_logit_dataset("user/nothing")
    unreadable = "user/logits cannot be read from the Hub"
    for match, fault, message in (
        ("parquet", {"status": 403, "message": "Bearer hf_loopback"}, unreadable[12:]),
        ("api/datasets", {"drop": "before"}, unreadable),
        ("api/datasets", {"latency": 60}, unreadable),
        ("tree", {"text": "[1,2]"}, "^user/logits"),
    ):
        huggingface_hub.close_session()
        huggingface_hub.HfFileSystem.clear_instance_cache()
        hub.fault(match, count=99, **fault)
        with pytest.raises(explore.LogitsError, match=message) as refused:
            get_sample(load_logit_dataset("user/logits"), 3)
        assert "\n" not in str(refused.value)
        assert "hf_loopback" not in str(refused.value)
        hub.clear()
