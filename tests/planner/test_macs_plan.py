"""Plans of several Macs that share a base: whose part fits, and whether the link or the chips decide."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from run_cli import run

from mlx_lora.api.plan import parse_macs, plan_on_macs, planned_on, shared_model, suggested
from mlx_lora.config.load import train_settings
from mlx_lora.parallel.sharded_base import shares_of
from mlx_lora.planner.memory import Block, Layer, ModelShape, RunShape
from mlx_lora.planner.several_macs import (
    Link,
    Mac,
    Split,
    Units,
    best,
    least_tokens,
    memory_shares,
    plan_macs,
    rank_part,
    sending,
)
from mlx_lora.planner.speed import find_chip, listed_ceilings
from mlx_lora.utils.errors import InputError

LAYERS = (Layer("mlp", "up_proj", 4096, 16384, rank=8), Layer("mlp", "down_proj", 16384, 4096, rank=8))
BLOCK = Block(LAYERS, heads=32, key_heads=8, head_width=128)
MB = 10**6


def model(blocks: int = 40) -> tuple[ModelShape, Units]:
    units = Units((70 * MB,) * blocks, (80 * MB,), tied=True)
    return ModelShape("llama", 4096, 32000, (BLOCK,) * blocks, units.bytes + MB, 10**6), units


def mac(chip: str, gb: int) -> Mac:
    return Mac(find_chip(chip).machine(gb), listed_ceilings(find_chip(chip)))


def test_a_part_is_its_share_and_two_units():
    shape, units = model()
    assert rank_part(shape, units, 0.25).base_bytes == MB + units.bytes // 4 + 150 * MB
    assert sum(memory_shares([mac("M2", 8).machine, mac("M4", 24).machine])) == pytest.approx(1)


def test_a_base_that_fits_no_mac_alone_fits_two():
    shape, units = model(blocks=150)
    run_of_all = RunShape(2, 512, checkpointing="block")
    macs = [mac("M4", 16)] * 2
    alone = plan_macs(shape, run_of_all, macs[:1], Link(5e9), units, [1.0])
    both = plan_macs(shape, run_of_all, macs, Link(5e9), units, [0.5, 0.5])
    assert (alone.fits, both.fits) == (False, True)
    assert both.memory[0].parts["base"] == rank_part(shape, units, 0.5).base_bytes
    assert (
        plan_macs(shape, run_of_all, macs, Link(5e9), units, [0.9, 0.1]).memory[1].peak_bytes
        < both.memory[1].peak_bytes
    )


def test_a_whole_base_is_best_where_it_fits():
    shape, units = model(blocks=150)
    batch = RunShape(2, 512, checkpointing="block")
    for gb, shared_is_best in ((64, False), (16, True)):
        macs, link = [mac("M4", gb)] * 2, Link(5e9)
        shared = plan_macs(shape, batch, macs, link, units, [0.5, 0.5])
        whole = plan_macs(shape, batch, macs, link)
        assert best([whole, shared]).shared == shared_is_best
        assert ("does not fit (needs " in whole.verdict) == shared_is_best
        assert best([Split(True, problem="no"), whole]) is whole


def test_what_is_sent_is_each_block_twice_and_the_embedding_for_both_of_its_uses():
    shape, units = model()
    batch, macs, link = RunShape(2, 512), [mac("M4", 32)] * 2, Link(1e9, 0)
    plan = plan_macs(shape, batch, macs, link, units, [0.5, 0.5])
    assert plan.sending.link_s == pytest.approx((2 * 40 * 70e6 + 2 * 80e6) / 2 / 1e9)
    frozen = plan_macs(replace(shape, first_trained=30), batch, macs, link, units, [0.5, 0.5])
    assert frozen.sending.link_s == pytest.approx((50 * 70e6 + 2 * 80e6) / 2 / 1e9)


def test_a_larger_batch_hides_the_link():
    shape, units = model()
    macs, shares, link = [mac("M4", 32)] * 2, [0.5, 0.5], Link(1e9)
    least = least_tokens(shape, units, RunShape(2, 128), macs, shares, link)
    assert least
    small, large = (
        plan_macs(shape, RunShape(tokens // 128, 128), macs, link, units, shares) for tokens in (least // 2, least)
    )
    assert small.sending.link_s > max(small.computing_s)
    assert large.sending.link_s <= max(large.computing_s)
    assert least_tokens(shape, units, RunShape(2, 128), macs, shares, Link(1e3)) is None


def test_the_command_names_what_decides(tiny_folder):
    asked = ("plan", "--model", tiny_folder, "--macs", "M4 Pro:48, M2 Max:32")
    ran = run(*asked)
    assert "2 Macs that share the base" in ran.out, ran.err
    assert "predicted" in ran.out
    found = json.loads(run(*asked, "--json", "--shard-base", "3:1").out)
    assert [one["share"] for one in found["macs"]] == [0.75, 0.25]
    assert found["predicted"]["decides"] in ("link", "chips")
    assert "name the Macs that share the base" in run(*asked[:3], "--shard-base", "3:1").err
    slow = json.loads(run(*asked, "--json", "--link-gbit", 0.01).out)
    assert slow["predicted"]["decides"] == "link"
    assert slow["predicted"]["step_s"] > found["predicted"]["step_s"]
    assert [one["name"] for one in found["splits"]] == ["data with a shared base", "data with a whole base"]
    assert [one["best"] for one in found["splits"]] == [False, True]


@pytest.mark.parametrize(
    "text", ["M4 Pro:48", "M4 Pro", "M4 Pro:x,M2:8", "M9:8,M2:8", "1 x M2:8", "M2:8:9,M2:8", "M2:8:4:2,M2:8"]
)
def test_macs_that_are_none_are_refused(text):
    with pytest.raises(InputError):
        parse_macs(text)


def test_a_step_is_a_pipeline_of_sending_and_computing():
    units = Units((100, 100, 100))
    equal = [0.5, 0.5]
    link = Link(50.0, 0)  # a second for each unit
    sent = sending(replace(model(3)[0], trained=0), units, equal, link)
    assert [seconds for seconds, _ in sent.units] == [1.0] * 6
    assert sent.step_s(0.0) == pytest.approx(6.0)
    # Nine products of a hundred seconds each; only the first unit is waited for.
    assert sent.step_s(900.0) == pytest.approx(901.0)
    # Half a second for a unit forward, one backward: the forward pass waits for the link, the backward pass does not.
    assert sent.step_s(4.5) == pytest.approx(3 + 0.5 + 3 * 1.0 + 0.5)
    assert sent.step_s(4.5) < 6 + 4.5


def test_unequal_parts_send_more():
    link, unit = Link(1.0, 0), 120
    assert link.gather_s(unit, [0.5, 0.5]) == pytest.approx(60)
    # The larger part of two, as the smaller Mac needs all of it.
    assert link.gather_s(unit, [0.75, 0.25]) == pytest.approx(90)
    assert link.gather_s(unit, [0.25] * 4) == pytest.approx(90)
    assert link.gather_s(unit, [0.4, 0.2, 0.2, 0.2]) == pytest.approx(120 * 3 / 4 * 1.2)


@pytest.mark.long
def test_flags_that_fit_are_suggested(tiny_folder):
    settings = train_settings({"model": str(tiny_folder), "rank": 16})
    asked = shared_model(settings)
    roomy = parse_macs("2 x M2:8")
    assert plan_on_macs(settings, roomy, Link(5e9))["suggested"] is None
    needed = max(mac["needed_bytes"] for mac in planned_on(asked, roomy, Link(5e9))["macs"])
    tight = [replace(mac, working_set_bytes=int(0.7 * needed)) for mac in roomy]
    found = suggested(asked, tight, Link(5e9))
    assert found is not None
    assert "--batch-tokens" in found[0]
    assert planned_on(found[1], tight, Link(5e9))["fits"]
    of_examples = shared_model(train_settings({"model": str(tiny_folder), "rank": 16, "batch_size": 64}))
    found = suggested(of_examples, tight, Link(5e9))
    assert found is not None
    assert "--batch-size 2" in found[0]
    assert planned_on(found[1], tight, Link(5e9))["fits"]
    hopeless = [replace(mac, working_set_bytes=1 << 20) for mac in roomy]
    assert suggested(asked, hopeless, Link(5e9)) is None


@pytest.mark.parametrize(
    ("flag", "value"), [("--grad-checkpoint", "none"), ("--objective", "grpo"), ("--method", "full")]
)
def test_a_base_that_train_would_not_share_is_not_planned_to_be(flag, value, tiny_folder):
    flags = ["--model", tiny_folder, "--macs", "M2:8,M2:8", flag, value, "--batch-tokens", 128, "--max-seq-length", 64]
    plan = json.loads(run("plan", *flags, "--json").out)
    shared, whole = plan["splits"]
    assert not plan["fits"]
    assert flag in plan["problem"]
    assert flag in shared["verdict"]
    assert not shared["best"]
    assert whole["fits"]
    assert plan["suggested"] is None
    text = run("plan", *flags).out
    assert flag in text.splitlines()[0]
    assert "To fit" not in text


def test_a_rank_keeps_the_part_that_its_budget_allows():
    class Beside:
        size = 2

        def everyone(self, own: int) -> list[int]:
            return [own, 3 * 10**6]

    settings = train_settings({"model": "x", "shard_base": "memory", "memory_budget": 1e-3})
    assert shares_of(settings, Beside()) == [0.25, 0.75]


def test_all_pairs_of_equal_macs(tiny_folder):
    ran = run("plan", "--model", tiny_folder, "--macs", 2, "--all-chips")
    assert "| 2 x M4 Pro, 48 GB |" in ran.out, ran.err
    assert "predicted" in ran.out
    assert "write --macs 2 --all-chips" in run("plan", "--model", tiny_folder, "--macs", "M2:8,M2:8", "--all-chips").err
    assert "from 2 to 256" in run("plan", "--model", tiny_folder, "--macs", 1, "--all-chips").err


def test_a_checked_host_file_is_planned_with_its_link(tiny_folder, tmp_path):
    one = {"device": "Apple M4 Pro", "memory_bytes": 48 << 30, "working_set_bytes": 40 << 30}
    checked = {"machines": [one, {**one, "device": "Apple M2 Max"}], "link": {"bytes_per_s": 1e9, "latency_s": 1e-4}}
    file = tmp_path / "checked.json"
    file.write_text(json.dumps(checked))
    found = json.loads(run("plan", "--model", tiny_folder, "--hostfile", file, "--json").out)
    assert found["link_gbit_per_s"] == 8.0
    assert [mac["budget_bytes"] for mac in found["macs"]] == [40 << 30] * 2
    assert "as `mlx-lora cluster` measured it" in run("plan", "--model", tiny_folder, "--hostfile", file).out
    file.write_text(json.dumps({"machines": [{}], "link": None}))
    assert "not what `mlx-lora cluster --json` prints" in run("plan", "--model", tiny_folder, "--hostfile", file).err
    file.write_text('[{"ssh": "localhost"}, {"ssh": "localhost"}]')
    assert "cannot be asked for its chip" in run("plan", "--model", tiny_folder, "--hostfile", file).err
