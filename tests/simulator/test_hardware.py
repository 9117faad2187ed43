"""Declared machines: names, the roofline by hand, and tables of measured MoE layers."""

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from expertflow.simulator.costs import NO_TRAFFIC
from expertflow.simulator.hardware import declared_costs, declared_gpu, machine_of, parse_link
from expertflow.simulator.hardware_profiles import GPUS, LINKS
from expertflow.simulator.machine import read_machine
from expertflow.simulator.moe_table import INSTALLED, MoeTable, read_moe_table
from expertflow.simulator.policy.checked import tiny_shape
from expertflow.tracer.errors import InputError, ResourceError, UsageError
from expertflow.tracer.quantities import LinkSpec
from expertflow.tracer.records import write_json

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "gpu-moe-latency"
HIDDEN, INTER = 512, 256
WEIGHTS = 3 * HIDDEN * INTER
SHAPE = replace(
    tiny_shape(num_layers=4, num_experts=16, top_k=2),
    hidden_size=HIDDEN,
    expert_bytes=2 * WEIGHTS,
    non_expert_bytes=10_000_000,
    kv_bytes_per_token=4096,
)
LINK = LinkSpec("1GB/s", 1e9, 0.0)
PLANTED = (2e-5, 3e-7, 4e-6)
HEADER = (
    "framework,version,device,op_name,kernel_source,moe_dtype,num_tokens,hidden_size,inter_size,topk,"
    "num_experts,moe_tp_size,moe_ep_size,distribution,latency"
)


def kernel_row(tokens: int, **changed: object) -> str:
    distinct = min(16, 2 * tokens)
    row = {
        "framework": "VLLM", "version": "1", "device": "NVIDIA H100 80GB HBM3", "op_name": "moe",
        "kernel_source": "k", "moe_dtype": "bfloat16", "num_tokens": tokens, "hidden_size": HIDDEN,
        "inter_size": INTER, "topk": 2, "num_experts": 16, "moe_tp_size": 1, "moe_ep_size": 1,
        "distribution": "balanced",
        "latency": 1e3 * (PLANTED[0] + PLANTED[1] * tokens + PLANTED[2] * distinct),
    } | changed  # fmt: skip
    return ",".join(map(str, row.values()))


def kernels(path: Path, *more: str, **changed: object) -> Path:
    rows = [kernel_row(n, **changed) for n in (1, 2, 4, 8, 16, 64, 256, 1024, 4096)]
    path.write_text("\n".join([HEADER, *rows, *more]) + "\n")
    return path


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gigabytes_per_s"),
    [
        ("pcie3x8", 6.30),
        ("pcie3x16", 12.60),
        ("pcie4x8", 12.60),
        ("pcie4x16", 25.21),
        ("pcie5x8", 25.21),
        ("pcie5x16", 50.41),
        ("nvlink-c2c", 360.0),
    ],
)
def test_a_link_by_name_has_four_fifths_of_its_rate(name, gigabytes_per_s):
    link = parse_link(name.upper())

    assert link.text == name
    assert link.bandwidth_Bps == pytest.approx(gigabytes_per_s * 1e9, rel=1e-3)
    assert link.latency_s == 10e-6
    assert "0.8" in LINKS[name].source


def test_a_link_may_be_typed_in():
    assert parse_link("25GB/s+10us") == LinkSpec.parse("25GB/s+10us")


def test_an_unknown_link_names_the_nearest_and_both_forms():
    with pytest.raises(UsageError, match=r"Did you mean 'pcie4x16'.*25GB/s\+10us"):
        parse_link("pci4x16")


def test_an_unknown_gpu_names_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'rtx4090'"):
        declared_gpu("rtx409")


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_declared_gpus_name_their_source_and_are_plausible(gpu):
    assert "NVIDIA" in gpu.source
    assert 3e11 <= gpu.memory_Bps <= 5e12
    assert 6e13 <= gpu.flops <= 1e15
    assert 2**34 <= gpu.memory_bytes <= 2**38
    # Arithmetic per byte has stayed within an order of magnitude.
    assert 50 <= gpu.flops / gpu.memory_Bps <= 500


# --- roofline ----------------------------------------------------------------------------------


def test_experts_cost_their_bytes_and_their_arithmetic():
    gpu = declared_gpu("a100-80gb")
    costs, _ = declared_costs(SHAPE, gpu, LINK)

    seconds = costs.experts_s("decode", 3, 5, NO_TRAFFIC, 1, 16)

    by_hand = 5 * 2 * WEIGHTS / 2.039e12 + 3 * 2 * 2 * WEIGHTS / 312e12
    assert seconds == pytest.approx(by_hand)
    assert costs.copy_s == pytest.approx(2 * WEIGHTS / 1e9)


def test_quantised_experts_have_more_weights_per_byte():
    gpu = declared_gpu("h100-sxm")
    packed = replace(SHAPE, dtype="mxfp4", expert_bytes=int(WEIGHTS * 4.25 / 8))

    wide, _ = declared_costs(SHAPE, gpu, LINK)
    small, _ = declared_costs(packed, gpu, LINK)

    wide_experts, small_experts = wide.decode.experts.weights, small.decode.experts.weights
    assert small_experts[1] == pytest.approx(wide_experts[1], rel=1e-4)
    assert small_experts[2] == pytest.approx(wide_experts[2] * 4.25 / 16, rel=1e-4)


def test_other_weights_are_read_once_and_the_embedding_is_not():
    gpu = declared_gpu("a10")
    costs, _ = declared_costs(SHAPE, gpu, LINK)
    table = SHAPE.vocab_size * HIDDEN * 2
    per_layer = (SHAPE.non_expert_bytes - 2 * table) / 4

    head = costs.head_s("decode", 2, 2)
    mixer = costs.mixer_s("decode", 2, 100, NO_TRAFFIC)

    assert head == pytest.approx(table / 600e9 + 2 * table / 125e12)
    kv = 2 * 100 * 4096 / 4 / 600e9
    assert mixer == pytest.approx(per_layer / 600e9 + 2 * per_layer / 125e12 + kv)
    assert costs.prefill.mixer.weights[2] == 0


def test_what_is_not_charged_is_zero_and_said():
    costs, notes = declared_costs(SHAPE, declared_gpu("h200"), LINK)

    assert costs.decision_s("decode", 8, 8) == 0
    assert costs.lookahead_s("decode", 8, 8) == 0
    assert costs.decode.readback_s == costs.wake_s == costs.group_s == 0
    assert "not charged; real speed is lower" in notes[0]
    assert "1GB/s: as typed in" in notes[1]


def test_unknown_sizes_are_said():
    bare = replace(SHAPE, non_expert_bytes=0, kv_bytes_per_token=0, hidden_size=0, vocab_size=0)

    costs, notes = declared_costs(bare, declared_gpu("t4"), LINK)

    assert costs.mixer_s("decode", 1, 1, NO_TRAFFIC) == 0
    assert sum("not known" in note for note in notes) == 2


@pytest.mark.parametrize(
    ("changed", "words"),
    [({"expert_bytes": 0}, "--expert-bytes"), ({"dtype": "mxfp5"}, "Did you mean 'mxfp4'")],
)
def test_a_shape_without_sizes_cannot_be_declared(changed, words):
    with pytest.raises(UsageError, match=words):
        declared_costs(replace(SHAPE, **changed), declared_gpu("h200"), LINK)


def test_a_declared_machine_is_a_machine_file(tmp_path):
    machine = machine_of(SHAPE, "H100-SXM", "pcie5x16")
    write_json(tmp_path / "machine.json", machine)

    assert read_machine(tmp_path / "machine.json") == machine
    assert machine.device == "h100-sxm (declared)"
    assert machine.link == "pcie5x16"
    assert machine.link_origin == "declared"
    assert "PCI-SIG" in machine.provenance.notes[1]


# --- tables ------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_fit_finds_what_was_planted(tmp_path, phase):
    table = read_moe_table(kernels(tmp_path / "t.csv"), device="H100", shape=SHAPE)

    fitted = table.fit(phase)

    assert fitted.weights == pytest.approx((*PLANTED, 0, 0, 0))
    assert fitted.residual == pytest.approx(0, abs=1e-9)
    assert "even" in table.notes[0]
    assert "NVIDIA H100 80GB HBM3" in table.notes[0]


def test_weights_of_a_fit_are_never_negative():
    dice = np.random.default_rng(0)
    tokens = tuple(dice.integers(1, 500, 40).astype(float).tolist())
    seconds = tuple(dice.random(40).tolist())
    table = MoeTable(tokens=tokens, distinct=tokens[::-1], seconds=seconds, source="noise")

    assert min(table.fit("decode").weights) >= 0
    assert table.fit("decode").residual > 0


def test_other_devices_loads_and_splits_are_left_out(tmp_path):
    slow = {"latency": 1e3}
    others = [
        kernel_row(1, device="NVIDIA H200", **slow | {"latency": 1e-9}),
        kernel_row(1, distribution="power_law_1.2", latency=1e-9),
        kernel_row(1, moe_tp_size=2, latency=1e-9),
        kernel_row(1, moe_dtype="fp8", latency=1e-9),
        kernel_row(1, num_experts=128, latency=1e-9),
        kernel_row(1, kernel_source="slow", **slow),
    ]

    table = read_moe_table(kernels(tmp_path / "t.csv", *others), device="H100", shape=SHAPE)

    assert table.fit("decode").weights[:3] == pytest.approx(PLANTED)


def test_the_nearest_layer_is_scaled_and_said(tmp_path):
    path = kernels(tmp_path / "t.csv")
    wide = replace(SHAPE, expert_bytes=2 * SHAPE.expert_bytes, top_k=4)

    table = read_moe_table(path, device="H100", shape=wide)

    expected = (PLANTED[0], 4 * PLANTED[1], 2 * PLANTED[2])
    assert table.fit("decode").weights[:3] == pytest.approx(expected)
    assert "was scaled" in table.notes[1]


def test_a_table_of_tokens_and_experts_is_read_compressed_too(tmp_path):
    rows = [
        f"{n},{d},{1e6 * (PLANTED[0] + PLANTED[1] * n + PLANTED[2] * d)}"
        for n in (1, 4, 64, 512)
        for d in (2, 8, 16)
    ]
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress("\n".join(["tokens,activated_experts,time_us", *rows]).encode()))

    table = read_moe_table(path, device="H100", shape=SHAPE)

    assert table.fit("decode").weights[:3] == pytest.approx(PLANTED)
    assert "names neither device nor model" in table.notes[0]


def test_a_machine_with_a_table_says_where_its_times_are_from(tmp_path):
    machine = machine_of(SHAPE, "h100-sxm", "pcie4x16", kernels(tmp_path / "mine.csv"))

    assert machine.costs.decode.experts.weights[:3] == pytest.approx(PLANTED)
    notes = " ".join(machine.provenance.notes)
    assert "mine.csv, NVIDIA H100 80GB HBM3" in notes
    assert "Median error of the fit to mine.csv: 0.0% in decode" in notes


def test_a_device_is_matched_by_whole_words(tmp_path):
    path = kernels(tmp_path / "t.csv", device="NVIDIA A100-SXM4-80GB")

    assert machine_of(SHAPE, "a100-80gb", "pcie4x16", path)
    with pytest.raises(InputError, match=r"device 'A10'; it has NVIDIA A100-SXM4-80GB\."):
        machine_of(SHAPE, "a10", "pcie4x16", path)


def test_a_number_format_the_table_lacks_is_named(tmp_path):
    packed = replace(SHAPE, dtype="mxfp4")

    with pytest.raises(InputError, match=r"'mxfp4' on H100; it has bfloat16"):
        read_moe_table(kernels(tmp_path / "t.csv"), device="H100", shape=packed)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("a,b\n1,2\n", "has the columns a, b; expected tokens"),
        ("", "cannot be read as a table"),
        ("tokens,activated_experts,time_us\n", "column tokens must hold numbers"),
        ("tokens,activated_experts,time_us\n1,2,-3\n", "column time_us must hold numbers"),
        ("tokens,activated_experts,time_us\n1,2,soon\n", "column time_us must hold numbers"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path, body, words):
    path = tmp_path / "t.csv"
    path.write_text(body)

    with pytest.raises(InputError, match=words):
        read_moe_table(path, device="H100", shape=SHAPE)


def test_a_missing_table_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read as a table"):
        read_moe_table(tmp_path / "none.csv", device="H100", shape=SHAPE)


def test_the_installed_package_is_found(tmp_path, monkeypatch):
    place = tmp_path / "aiconfigurator_core"
    for device in ("H100 80GB HBM3", "L40S"):
        folder = place / "systems" / "data" / device / "moe" / "vllm" / "1"
        folder.mkdir(parents=True)
        rows = kernels(tmp_path / "t.csv", device=f"NVIDIA {device}")
        pq.write_table(pa_csv.read_csv(rows), folder / "moe_perf.parquet")
    (place / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))

    table = read_moe_table(INSTALLED, device="L40S", shape=SHAPE)

    assert table.fit("decode").weights[:3] == pytest.approx(PLANTED)
    with pytest.raises(InputError, match="it has NVIDIA H100 80GB HBM3, NVIDIA L40S"):
        read_moe_table(INSTALLED, device="T4", shape=SHAPE)


def test_without_the_package_a_path_is_asked_for(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(ResourceError, match="pip install aiconfigurator-core"):
        read_moe_table(INSTALLED, device="L40S", shape=SHAPE)


def test_published_tables_agree_with_the_roofline():
    """Two tables of one GPU, and the datasheet: within a factor of two of each other at one token."""
    files = [DATA / "moe_perf_tp1_ep1.csv.gz", DATA / "rtxpro6000_qwen3-30b-a3b_moe.csv"]
    if not all(file.is_file() for file in files):
        pytest.skip("the published tables are not on this machine")
    qwen = replace(
        tiny_shape(48, 128, 8),
        hidden_size=2048,
        expert_bytes=3 * 2048 * 768 * 2,
    )

    seconds = [
        machine_of(qwen, "rtx-pro-6000", "pcie5x16", file).costs.experts_s(
            "decode", 1, 8, NO_TRAFFIC, 1, 128
        )
        for file in (None, *files)
    ]

    assert seconds[0] <= min(seconds[1:])
    assert max(seconds) <= 2 * min(seconds)
