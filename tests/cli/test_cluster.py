"""The check of several machines before a run: what must be equal, and the link between them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import Started
from run_cli import run

from mlx_lora.cli.cluster import facts_here, files_sum, problems_of
from mlx_lora.parallel.hosts import hosts_of
from mlx_lora.utils.errors import InputError


@pytest.mark.long
def test_two_processes_find_each_other_equal(tiny_folder, tmp_path):
    words = ["-m", "mlx_lora", "cluster", "--model", tiny_folder, "--json"]
    ended = Started([words] * 2, tmp_path).wait(120)
    assert ended.codes == [0, 0], ended.errs
    found = json.loads(ended.outs[0])
    assert len(found["machines"]) == 2
    assert found["problems"] == []
    assert found["link"]["bytes_per_s"] > 1e6
    assert 0 < found["link"]["latency_s"] < 1
    assert ended.outs[1] == ""


def test_what_differs_is_named(tiny_folder):
    one = facts_here(str(tiny_folder))
    first, other = ({**one, "versions": dict(one["versions"])} for _ in range(2))
    assert problems_of([first, other]) == []
    other["versions"]["mlx"], other["model"] = "0.1", "0" * 16
    mlx, model = problems_of([first, other])
    assert "mlx 0.1, and rank 0 has" in mlx
    assert "other model files" in model
    other["model"] = files_sum("/no/such/folder")
    assert "does not have the model's files" in problems_of([first, other])[1]


def test_files_that_begin_or_end_otherwise_have_another_sum(tiny_folder, tmp_path):
    copies = [tmp_path / name for name in ("a", "b")]
    for copy in copies:
        copy.mkdir()
        for file in Path(tiny_folder).iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
    assert files_sum(str(copies[0])) == files_sum(str(copies[1])) == files_sum(str(tiny_folder))
    with (copies[1] / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert files_sum(str(copies[0])) != files_sum(str(copies[1]))


def test_a_host_file_is_read_as_mlx_launch_reads_it(tmp_path):
    file = tmp_path / "macs.json"
    file.write_text('[{"ssh": "first.local", "ips": ["10.0.0.1"]}, {"ssh": "second.local", "ips": []}]')
    assert hosts_of(file) == ["first.local", "second.local"]
    for text, words in (
        ("[", "not a JSON list"),
        ('[{"ssh": "a"}]', "name two or more"),
        ('[{"ips": []}]', "not a JSON"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=words):
            hosts_of(file)
    assert "--hostfile is required" in run("cluster").err
