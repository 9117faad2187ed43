"""`plan`: from a config alone, what fits, how fast at best and at worst, and what would have to change."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from expertflow.simulator.hardware import declared_gpu, parse_link
from expertflow.simulator.memory_plan import RunSize, estimated_needs
from expertflow.simulator.plan import Plan, fits, make_plan
from expertflow.simulator.speed_plan import speed_plan
from expertflow.tracer.main import main
from expertflow.tracer.records import from_json
from expertflow.tracer.unloaded import describe

from tests.families import config_of

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
MIXTRAL = {
    "model_type": "mixtral",
    "dtype": "bfloat16",
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}

KINDS = ("olmoe", "mixtral", "gpt_oss", "deepseek_v3", "switch_transformers", "jamba", "aria")
"""Plain, sliding windows, latent attention, an encoder, states beside keys and values, images."""


@pytest.fixture
def command(capsys):
    """Run a command line; returns its exit code, stdout and stderr."""

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        streams = capsys.readouterr()
        return int(stop.value.code or 0), streams.out, streams.err

    return run


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    (folder / "config.json").write_text(json.dumps(MIXTRAL), encoding="utf-8")
    return folder


def planned(command, *args) -> tuple[int, Plan]:
    code, out, _ = command("plan", *args, "--json")
    return code, from_json(Plan, json.loads(out))


@pytest.mark.parametrize("family", KINDS)
def test_families_of_every_kind_plan_from_their_configs(family, tmp_path):
    config_of(family).save_pretrained(tmp_path)
    found = describe(str(tmp_path), dtype="float32")

    assert found.widths.is_by_pass

    def needs(context: int):
        return estimated_needs(found.shape, RunSize.of(2, context, context), found.widths)

    roomy = make_plan(
        needs,
        64,
        device_bytes=GIB,
        host_bytes=None,
        gpu=declared_gpu("t4"),
        link=parse_link("1GB/s"),
    )
    least = roomy.changes.least_bytes
    short = make_plan(
        needs, 64, device_bytes=least, host_bytes=0, gpu=None, link=parse_link("pcie3x8")
    )

    assert roomy.outcome == "resident"
    assert roomy.memory.slots == found.shape.total_experts
    assert roomy.speed.best_tokens_per_s > roomy.speed.worst_tokens_per_s > 0
    # Rows that waves gather may weigh more than a tiny model's experts.
    assert least < max(roomy.changes.event_bytes, roomy.changes.resident_bytes)
    assert short.memory.slots >= 1
    assert short.memory.device_bytes <= least
    assert not fits(short)  # no host memory at all


def test_a_32_gib_card_holds_part_of_mixtral(command, mixtral):
    code, plan = planned(
        command, mixtral, "--vram", "32GiB", "--link", "pcie4x16", "--gpu", "rtx5090",
        "--host-ram", "128GiB",
    )  # fmt: skip

    expert = 3 * 4096 * 14_336 * 2
    assert code == 0
    assert plan.outcome == "offloaded"
    assert plan.memory.expert_bytes == expert
    assert plan.memory.kv_cache == 4096 * 32 * 2 * 8 * 128 * 2
    assert plan.memory.device_bytes <= 32 * GIB < plan.memory.device_bytes + expert
    assert plan.memory.total_experts == 256
    assert plan.changes.event_bytes < 32 * GIB < plan.changes.resident_bytes
    assert plan.changes.longest_context >= 4096
    # The worst: 2 experts in each of 32 layers cross the link one after the other, and are then computed.
    copies_s = 64 * (10e-6 + expert / (0.8 * 16e9 * 16 * 128 / 130 / 8))
    assert 1 / plan.speed.worst_tokens_per_s > copies_s
    assert 1 / plan.speed.worst_tokens_per_s < 1.2 * copies_s
    # The best: what one token reads crosses the device memory once.
    read_s = (64 * expert + plan.memory.non_expert_weights) / 1792e9
    assert 1 / plan.speed.best_tokens_per_s == pytest.approx(read_s, rel=0.1)


def test_rates_rise_with_hits_and_hiding_and_stay_between_the_bounds(mixtral):
    shape = describe(str(mixtral)).shape
    speed = speed_plan(
        shape, RunSize.of(1, 512, 512), 64, gpu=declared_gpu("rtx4090"), link=parse_link("pcie4x16")
    )

    low = [row.hidden_none_tokens_per_s for row in speed.rows]
    high = [row.hidden_all_tokens_per_s for row in speed.rows]
    assert low == sorted(low)
    assert high == sorted(high)
    for least, most in zip(low, high, strict=True):
        assert speed.worst_tokens_per_s < least < most <= speed.best_tokens_per_s * 1.0001
    assert speed.even_hit_rate == 64 / 256
    assert speed.first_token_best_s < speed.first_token_worst_s


def test_sequences_of_a_batch_may_agree_or_not(mixtral):
    shape = describe(str(mixtral)).shape
    gpu, link = declared_gpu("rtx4090"), parse_link("pcie4x16")
    one, four = (
        speed_plan(shape, RunSize.of(batch, 512, 512), 64, gpu=gpu, link=link) for batch in (1, 4)
    )

    # At best four sequences share two experts; at worst each has its own.
    assert 3.5 * one.best_tokens_per_s < four.best_tokens_per_s < 4 * one.best_tokens_per_s
    assert four.worst_tokens_per_s == pytest.approx(one.worst_tokens_per_s, rel=0.05)


def test_without_a_gpu_only_the_link_is_judged(command, mixtral):
    code, plan = planned(command, mixtral, "--vram", "24GiB", "--link", "25GB/s")
    _, text, _ = command("plan", mixtral, "--vram", "24GiB", "--link", "25GB/s")

    assert code == 0
    assert plan.speed.best_tokens_per_s == 0
    assert plan.speed.worst_tokens_per_s == pytest.approx(25e9 / (64 * plan.memory.expert_bytes))
    assert "not known without --gpu" in text


def test_every_number_says_how_it_is_known(command, mixtral):
    code, text, err = command("plan", mixtral, "--gpu", "rtx4090", "--link", "pcie4x16")

    assert code == 0
    assert "Next: expertflow-trace run" in err
    for line in text.splitlines()[3:]:
        if any(digit in line for digit in "0123456789") and not line.strip().startswith("note"):
            words = ("config", "over shapes", "declared", "device memory", " of ")
            assert any(word in line for word in words), line
    for words in (
        "computed from the config",
        "upper estimate",
        "declared",
        "PCI-SIG",
        "whitepaper",
    ):
        assert words in text


def test_what_cannot_run_exits_4_after_its_plan(command, mixtral):
    code, out, err = command("plan", mixtral, "--vram", "4GiB")

    assert code == 4
    assert "does not fit" in out
    assert "--context" in err
    assert "Traceback" not in err

    code, out, err = command("plan", mixtral, "--vram", "24GiB", "--host-ram", "32GiB")
    assert code == 4
    assert "host is too small" in err
    assert "--tier disk" in err


def test_fewer_slots_than_an_event_are_said_to_be_too_few(command, mixtral):
    _, roomy = planned(command, mixtral, "--vram", "24GiB")
    between = (roomy.changes.least_bytes + roomy.changes.event_bytes) // 2

    code, plan = planned(command, mixtral, "--vram", f"{between}B")

    assert code == 0
    assert plan.outcome == "in waves"
    assert plan.slots_ratio > 1
    assert "waves" in plan.finding


def test_packed_experts_are_planned_for_other_engines(command, mixtral):
    _, whole = planned(command, mixtral, "--vram", "24GiB")
    _, packed = planned(command, mixtral, "--vram", "24GiB", "--dtype", "mxfp4")

    assert packed.memory.expert_bytes == whole.memory.expert_bytes * 4.25 / 16
    assert packed.memory.non_expert_weights == whole.memory.non_expert_weights
    assert any("unpacked weights only" in note for note in packed.notes)


def test_the_plan_can_be_kept(command, mixtral, tmp_path):
    out = tmp_path / "plan.json"

    command("plan", mixtral, "--vram", "24GiB", "--out", out)

    assert from_json(Plan, json.loads(out.read_text())).memory.slots > 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "--vram"),
        (("--vram", "24"), "24"),
        (("--gpu", "rtx9999"), "rtx9999"),
        (("--vram", "24GiB", "--link", "string"), "string"),
        (("--vram", "24GiB", "--context", "0"), "--context"),
        (("--vram", "24GiB", "--batch-size", "0"), "--batch-size"),
        (("--vram", "24GiB", "--dtype", "int3"), "int3"),
        (("--vram", "24GiB", "--tier", "tape"), "tape"),
        (("--vram", "24GiB", "--reserve", "some"), "some"),
    ],
)
def test_impossible_options_exit_2(command, mixtral, args, words):
    code, out, err = command("plan", mixtral, *args)

    assert code == 2
    assert words in err
    assert out == ""


def test_a_model_that_is_not_there_exits_4(command, tmp_path):
    code, _, err = command("plan", tmp_path / "gone", "--vram", "24GiB")

    assert code == 4
    assert "gone" in err


@pytest.mark.parametrize("name", ["plan", "export-flags"])
def test_help_needs_no_torch(name):
    code = (
        "import sys\n"
        "from expertflow.tracer.main import main\n"
        "try: main([sys.argv[1], '--help'])\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, name],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT / ".typing"), "PATH": ""},
    )

    assert done.stdout.splitlines()[-1].startswith("False")
