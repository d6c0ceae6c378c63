"""Speeds and sizes of a model have one source each: no two places say two things of one model."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import tiny_model, write_folder
from mlx.utils import tree_flatten
from run_cli import run

from mlx_lora.planner.machine import KEPT_S, STORE, ceilings_here
from mlx_lora.planner.speed import Ceilings
from mlx_lora.studio.model_stores import folder_facts
from mlx_lora.utils import device
from mlx_lora.utils.files import read_store, write_store


def measurer(*rates: float):
    """A measurement that finds these rates, one after another, as on a machine with other work."""
    left = list(rates)
    return lambda dtype, polynomials: Ceilings(left.pop(0), 1e10, 1e8, 0.0, "measured here")


def test_two_plans_predict_from_one_measurement(own_cache):
    measure = measurer(1e11, 3e11)
    first = ceilings_here(measure=measure, now=lambda: 1000.0)
    assert ceilings_here(measure=measure, now=lambda: 2000.0) == first
    other = "bfloat16" if device.compute_dtype() == mx.float32 else "float32"
    assert ceilings_here(other, measure=measure, now=lambda: 2000.0).flops_per_s == 3e11  # another dtype's are its own


def test_an_old_measurement_is_repeated_and_the_better_figure_kept(own_cache):
    measure = measurer(3e11, 1e11, 4e11)
    times = [0.0, KEPT_S + 1, 3 * KEPT_S]
    assert [ceilings_here(measure=measure, now=lambda at=at: at).flops_per_s for at in times] == [3e11, 3e11, 4e11]


def test_a_damaged_store_is_measured_anew(own_cache):
    measure = measurer(1e11, 2e11)
    ceilings_here(measure=measure)
    write_store(STORE, {key: {"at": 1.0, "other": 2} for key in read_store(STORE)})
    assert ceilings_here(measure=measure).flops_per_s == 2e11


@pytest.mark.long
def test_parameters_are_counted_alike_for_every_form_of_a_model(tiny_folder, tmp_path):
    model = tiny_model()
    count = sum(p.size for _, p in tree_flatten(model.parameters()))
    layout = {"group_size": 32, "bits": 4, "mode": "affine"}
    own = {**layout, "bits": 8}  # as a GGUF's tied embedding in Q8_0 is carried over
    nn.quantize(
        model,
        **layout,
        class_predicate=lambda path, m: hasattr(m, "to_quantized") and (own if "embed" in path else True),
    )
    mixed = write_folder(tmp_path / "mixed", model, {"quantization": {**layout, "model.embed_tokens": own}})
    assert model.model.embed_tokens.bits == 8
    for folder in (tiny_folder, mixed):
        assert folder_facts(folder)["parameters"] == count
        planned = json.loads(run("plan", "--model", folder, "--chip", "M2", "--json").out)
        assert planned["model"]["parameters"] == count
    ranked = json.loads(run("plan", "--model", tiny_folder, "--chip", "M2", "--rank", 32, "--json").out)
    assert ranked["model"]["parameters"] == count
    assert ranked["model"]["trained_parameters"] > planned["model"]["trained_parameters"]
