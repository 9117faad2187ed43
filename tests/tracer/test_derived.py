"""merge, split and sample: valid traces, nothing lost or counted twice, and no time that is not the batch's own."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from expertflow.tracer.check import check_trace
from expertflow.tracer.division import sample_sequences, split_sequences
from expertflow.tracer.errors import TraceError, UsageError
from expertflow.tracer.main import main
from expertflow.tracer.merge import merge_traces
from expertflow.tracer.store import Trace
from expertflow.tracer.subset import TIMES_LOST, write_subset
from expertflow.tracer.synthetic import synthetic_trace
from expertflow.tracer.writer import TraceWriter
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("derived") / "t"
    return synthetic_trace(path, sequences=7, batch_size=2, new_tokens=5, stream=True, lookahead=2)


def tokens_of(trace: Trace) -> Counter:
    """What each prompt's tokens were routed to, by prompt id."""
    names = dict(
        zip(*trace.table("sequences", ["sequence", "prompt_id"]).to_pydict().values(), strict=True)
    )
    return Counter(
        (names[r["sequence"]], r["layer"], r["position"], tuple(r["experts"]), tuple(r["weights"]))
        for r in trace.table("routing").to_pylist()
        if r["position"] >= 0
    )


@settings(max_examples=12, deadline=None)
@given(chosen=st.sets(st.integers(0, 6), min_size=1))
def test_any_part_is_a_sound_trace_of_just_those_sequences(source, tmp_path_factory, chosen):
    out = tmp_path_factory.mktemp("part") / "t"

    write_subset(source, chosen, out, seed=0, note="drawn")

    check_trace(out)
    part = Trace.open(out)
    names = {f"synthetic-{number}" for number in chosen}
    expected = {key: n for key, n in tokens_of(source).items() if key[0] in names}
    assert tokens_of(part) == expected
    listed = part.table("sequences").to_pydict()
    assert listed["sequence"] == list(range(len(chosen)))
    assert set(listed["batch"]) == set(range(len({number // 2 for number in chosen})))


def test_whole_batches_keep_times_copies_and_padding_as_they_were(source, tmp_path):
    write_subset(source, [2, 3], tmp_path / "t", seed=0, note="")

    part = Trace.open(tmp_path / "t")
    kept = source.table("steps", filters=[("step", ">=", 5), ("step", "<", 10)])
    assert part.has_times
    ours, theirs = part.table("steps").to_pandas(), kept.to_pandas()
    assert (ours.step == theirs.step - 5).all()
    assert ours.drop(columns="step").equals(theirs.drop(columns="step"))
    copies = source.table("transfers", filters=[("step", ">=", 5), ("step", "<", 10)])
    assert part.table("transfers")["end_s"].to_pylist() == copies["end_s"].to_pylist()
    pads = source.table("routing", filters=[("position", "<", 0)], steps=(5, 10)).num_rows
    assert part.table("routing", filters=[("position", "<", 0)]).num_rows == pads > 0
    assert part.manifest.warnings == source.manifest.warnings


def test_a_torn_batch_loses_all_times_and_says_so(source, tmp_path):
    write_subset(source, [0, 2, 3], tmp_path / "t", seed=0, note="")

    part = Trace.open(tmp_path / "t")
    assert TIMES_LOST in part.manifest.warnings
    assert not part.has_times
    assert "transfers" not in part.manifest.tables
    steps = part.table("steps").to_pandas()
    assert steps.filter(like="_s").isna().all(axis=None)
    assert part.table("sequences")["ttft_s"].to_pandas().isna().all()
    alone = steps[steps.step < 5]
    assert set(alone.batch) == {1}
    routing = part.routing_arrays()
    for row in steps[steps.layer >= 0].itertuples():
        rows = (routing.step == row.step) & (routing.layer == row.layer)
        assert row.tokens == rows.sum()
        assert row.distinct == len(np.unique(routing.experts[rows]))
        assert row.context == routing.position[routing.step == row.step].max() + 1


def test_provenance_says_what_it_was_made_of(source, tmp_path):
    manifest = write_subset(source, [0], tmp_path / "t", seed=5, note="The first one.")

    first, second, *rest = manifest.provenance.notes
    assert source.manifest.trace_id in first
    assert source.manifest.provenance.command in first
    assert second == "The first one."
    assert tuple(rest) == source.manifest.provenance.notes
    assert manifest.provenance.seed == 5


def with_sequences(source: Trace, out, **columns) -> Trace:
    """The same trace with other values in its sequences table."""
    m = source.manifest
    writer = TraceWriter(
        out, shape=m.shape, hardware=m.hardware, run=m.run, provenance=m.provenance,
        recorded=m.recorded,
    )  # fmt: skip
    with writer:
        for name in ("routing", "steps", "transfers"):
            writer.append(name, source.table(name))
        rows = source.table("sequences").to_pylist()
        for name, values in columns.items():
            for row, value in zip(rows, values, strict=True):
                row[name] = value
        writer.append("sequences", type(source.table("sequences")).from_pylist(rows))
    return Trace.open(out)


def test_prompts_of_one_hash_never_part(source, tmp_path):
    trace = with_sequences(source, tmp_path / "t", prompt_sha256=["a", "b", "a", "", "", "b", "c"])

    for seed in range(20):
        first, second = split_sequences(trace, 0.5, seed=seed)
        assert sorted(first + second) == list(range(7))
        assert first
        assert second
        assert (0 in first) == (2 in first)
        assert (1 in first) == (5 in first)


def test_split_by_domain_and_by_batch_keep_them_whole(source):
    first, second = split_sequences(source, 0.5, by="domain")
    assert {n % 2 for n in first} != {n % 2 for n in second}
    for seed in range(10):
        first, second = split_sequences(source, 0.5, seed=seed, whole_batches=True)
        assert not {n // 2 for n in first} & {n // 2 for n in second}


def test_the_share_is_met_as_nearly_as_prompts_allow_and_the_seed_decides(source):
    first, _ = split_sequences(source, 0.7, seed=1)

    assert len(first) == 5
    assert split_sequences(source, 0.7, seed=1)[0] == first
    assert any(split_sequences(source, 0.7, seed=seed)[0] != first for seed in range(2, 9))


def test_what_cannot_be_divided_says_why(source, tmp_path):
    same = with_sequences(source, tmp_path / "t", prompt_sha256=["a"] * 7)

    with pytest.raises(UsageError, match="all its sequences belong together"):
        split_sequences(same, 0.5)
    with pytest.raises(UsageError, match="between 0 and 1"):
        split_sequences(source, 1.0)
    with pytest.raises(UsageError, match="allowed: prompt, domain"):
        split_sequences(source, 0.5, by="token")
    with pytest.raises(UsageError, match="holds 7 sequences"):
        sample_sequences(source, sequences=8)
    with pytest.raises(UsageError, match="either --sequences or --share"):
        sample_sequences(source, sequences=1, share=0.5)
    with pytest.raises(UsageError, match="choose another name"):
        write_subset(source, [0], source.path, seed=0, note="", overwrite=True)
    check_trace(source.path)


def test_samples_have_the_size_that_was_asked_for(source):
    assert len(sample_sequences(source, sequences=3, seed=2)) == 3
    assert len(sample_sequences(source, share=0.3)) == 2
    whole = sample_sequences(source, sequences=4, whole_batches=True)
    assert all((n // 2 * 2 in whole) for n in whole)


def test_merging_what_was_split_gives_all_of_it_back(source, tmp_path):
    for name, chosen in (("a", [0, 1, 4, 5]), ("b", [2, 3, 6])):
        write_subset(source, chosen, tmp_path / name, seed=0, note="")

    merge_traces([Trace.open(tmp_path / "a"), Trace.open(tmp_path / "b")], tmp_path / "t")

    check_trace(tmp_path / "t")
    merged = Trace.open(tmp_path / "t")
    assert tokens_of(merged) == tokens_of(source)
    for table in ("routing", "steps", "transfers", "sequences"):
        assert merged.manifest.rows(table) == source.manifest.rows(table)
    total_s = merged.table("steps", ["total_s"])["total_s"].to_numpy().sum()
    assert total_s == pytest.approx(source.table("steps", ["total_s"])["total_s"].to_numpy().sum())
    assert merged.table("transfers")["transfer"].to_pylist() == list(
        range(source.manifest.rows("transfers"))
    )


def test_clocks_follow_one_another_and_notes_name_both(source, tmp_path):
    other = synthetic_trace(tmp_path / "o", sequences=2, new_tokens=3, seed=9, stream=True)

    manifest = merge_traces([source, other], tmp_path / "t")

    merged = Trace.open(tmp_path / "t")
    starts = merged.table("steps", ["start_s"], [("layer", "=", -1)])["start_s"].to_pylist()
    assert starts == sorted(starts)
    assert len(set(starts)) == len(starts)
    late = merged.table("transfers", steps=(source.table("steps")["step"].to_pylist()[-1] + 1, 999))
    assert min(late["start_s"].to_pylist()) >= starts[source.manifest.rows("steps") // 5]
    for trace in (source, other):
        assert any(trace.manifest.trace_id in note for note in manifest.provenance.notes)
    assert any("lookahead_2" in text for text in manifest.warnings)
    assert "lookahead_1" in manifest.recorded


def test_without_times_in_one_there_are_none_in_all(source, tmp_path):
    write_subset(source, [0], tmp_path / "a", seed=0, note="")
    untimed = Trace.open(tmp_path / "a")
    assert not untimed.has_times

    merge_traces([source, untimed], tmp_path / "t")

    merged = Trace.open(tmp_path / "t")
    check_trace(tmp_path / "t")
    assert not merged.has_times
    assert any("left out: steps, transfers" in text for text in merged.manifest.warnings)


def test_other_machines_and_traces_merged_with_themselves_are_warned_of(source, tmp_path):
    m = source.manifest
    elsewhere = Trace(
        source.path, replace(m, hardware=replace(m.hardware, name="another GPU"), trace_id="x")
    )

    machines = merge_traces([source, elsewhere], tmp_path / "a").warnings
    twice = merge_traces([source, source], tmp_path / "b").warnings

    assert any("different machines" in text and "another GPU" in text for text in machines)
    assert any("merged with itself" in text for text in twice)


def test_different_models_and_residencies_are_refused(source, tmp_path):
    other = synthetic_trace(tmp_path / "o", experts=8)
    resident = synthetic_trace(tmp_path / "r", lookahead=2)

    with pytest.raises(TraceError, match="different models"):
        merge_traces([source, other], tmp_path / "t")
    with pytest.raises(UsageError, match=r"experts stream.*experts resident"):
        merge_traces([source, resident], tmp_path / "t")
    with pytest.raises(UsageError, match="two or more"):
        merge_traces([source], tmp_path / "t")
    assert not (tmp_path / "t").exists()


def run(capsys, *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    streams = capsys.readouterr()
    return int(stop.value.code or 0), streams.out, streams.err


def test_the_commands_write_traces_and_say_what(source, tmp_path, capsys):
    train, heldout = tmp_path / "train", tmp_path / "heldout"

    code, out, err = run(
        capsys,
        "split",
        source.path,
        "--train",
        train,
        "--heldout",
        heldout,
        "--share",
        0.6,
        "--json",
    )

    document = json.loads(out)
    assert code == 0
    assert document["format"] == "expertflow.split/1"
    assert [made["rows"]["sequences"] for made in document["traces"]] == [4, 3]
    assert "--whole-batches" in err

    code, out, _ = run(capsys, "merge", train, heldout, "--out", tmp_path / "both")
    assert code == 0
    assert "7 rows" in out
    code, out, _ = run(
        capsys, "sample", tmp_path / "both", "--share", 0.5, "--out", tmp_path / "s", "--json"
    )
    assert code == 0
    assert json.loads(out)["traces"][0]["rows"]["sequences"] == 3
    check_trace(tmp_path / "s")

    code, _, err = run(capsys, "split", source.path, "--train", train, "--heldout", tmp_path / "x")
    assert code == 2
    assert "--overwrite" in err
    assert not (tmp_path / "x").exists()
    code, _, err = run(capsys, "split", source.path, "--train", "a", "--heldout", "a")
    assert (code, "two folders" in err) == (2, True)


def test_nothing_is_written_into_a_trace_that_is_read(source, capsys):
    code, out, error = run(
        capsys, "sample", source.path, "--sequences", 1, "--out", source.path / "sub"
    )

    assert (code, out) == (2, "")
    assert f"lies in {source.path}" in error
    assert not (source.path / "sub").exists()


def test_two_parts_cannot_lie_in_one_another(source, tmp_path, capsys):
    for train, heldout in (("a/x", "a"), ("a", "a/x")):
        code, _, error = run(
            capsys,
            "split",
            source.path,
            *("--train", tmp_path / train, "--heldout", tmp_path / heldout),
        )

        assert code == 2
        assert "lie in one another" in error
    assert not any(tmp_path.iterdir())
