"""The model card of an adapter folder, and what `export --push-to-hub` sends to the hub."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from gguf import GGUFWriter
from hub_stand_in import hub_server, run_with_hub
from huggingface_hub import ModelCard
from run_cli import holds, one_line, run, succeeds

from mlx_lora.exporters.card import CARD_FILE, MARK, CardFacts, float_base, read_facts

SHORT = (
    "--iters",
    4,
    "--learning-rate",
    "5e-3",
    "--max-seq-length",
    128,
    "--rank",
    4,
    "--target-modules",
    "q_proj,v_proj",
)


@pytest.fixture(scope="module")
def place(tiny_folder, chats, tmp_path_factory):
    """A working folder as the card assumes it: the base and the adapter by their names."""
    root = tmp_path_factory.mktemp("card")
    succeeds("train", "--model", tiny_folder, "--data", chats, "--adapter-path", root / "adapter", *SHORT)
    (root / tiny_folder.name).symlink_to(tiny_folder)
    return root


@pytest.fixture(scope="module")
def exported(place, tiny_folder):
    out = place / "peft"
    ran = succeeds("export", "--model", tiny_folder, "--adapter-path", place / "adapter", "--to", "peft", "--out", out)
    assert "README.md: the model card" in ran.err
    return out


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def row(text: str, name: str) -> str:
    return next(line.split("|")[2].strip() for line in text.splitlines() if line.startswith(f"| {name} |"))


@pytest.mark.long
def test_the_run_folders_card_says_what_was_done(place, tiny_folder, chats):
    text = (place / "adapter" / CARD_FILE).read_text()
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "mlx", "mlx-lora"],
    }
    assert MARK in text
    assert [row(text, name) for name in ("base", "method", "rank", "alpha", "targets", "data", "steps")] == [
        tiny_folder.name, "lora", "4", "32", "q_proj, v_proj", chats.name, "4",
    ]  # fmt: skip
    last = json.loads((place / "adapter/metrics.jsonl").read_text().splitlines()[-1])
    assert row(text, "held-out loss").startswith(f"{last['val_loss']:.4f} (perplexity ")
    assert str(tiny_folder.parent) not in text  # the author's own disk


@pytest.mark.slow
def test_the_cards_commands_run(place):
    text = (place / "adapter" / CARD_FILE).read_text()
    lines = [line for block in blocks(text, "bash") for line in block.splitlines()]
    assert [line.split()[0] for line in lines] == ["mlx-lora", "mlx_lm.generate", "mlx-lora"]
    modules = {"mlx-lora": ["mlx_lora"], "mlx_lm.generate": ["mlx_lm", "generate"]}
    for line in lines:
        program, *words = shlex.split(line)
        ran = subprocess.run(
            [sys.executable, "-m", *modules[program], *words], cwd=place, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, (line, ran.stderr)
    assert (place / "peft-adapter/adapter_model.safetensors").exists()


@pytest.mark.parity
def test_the_cards_peft_code_runs(place, exported):
    pytest.importorskip("peft")
    text = (exported / CARD_FILE).read_text().replace('"adapter"', '"peft"')
    (code,) = blocks(text, "python")
    ran = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


def test_a_peft_folders_card(exported, place):
    text = (exported / CARD_FILE).read_text()
    data = ModelCard(text).data.to_dict()
    assert (data["library_name"], data["tags"]) == ("peft", ["lora", "peft", "mlx-lora"])
    assert row(text, "steps") == "4"
    holds(text, "--to mlx-lm --out mlx-adapter", "PeftModel.from_pretrained")
    assert "--to peft" not in text


@pytest.mark.slow
def test_a_named_base_and_repository_are_in_card_and_commands(place, tiny_4bit_folder, tmp_path):
    with hub_server() as server:
        command = [
            "-m", "mlx_lora", "export", "--model", tiny_4bit_folder, "--adapter-path", place / "adapter", "--to", "peft",
            "--out", tmp_path / "out", "--base-id", "someone/base", "--ignore-fingerprint", "--push-to-hub", "me/tuned",
        ]  # fmt: skip
        ran = run_with_hub(tmp_path / "home", server.endpoint, command, HF_TOKEN="hf_write")
        assert ran.returncode == 0, ran.stderr
        text = server.repos["me/tuned"]["files"][CARD_FILE].decode()
    assert ModelCard(text).data.base_model == "someone/base"
    holds(text, "--model someone/base --adapter-path me/tuned", 'from_pretrained("someone/base"), "me/tuned")')


def test_a_quantized_base_is_no_base_for_transformers(place, tiny_4bit_folder, tmp_path):
    command = ("export", "--model", tiny_4bit_folder, "--adapter-path", place / "adapter", "--ignore-fingerprint")
    assert run(*command, "--to", "peft", "--out", tmp_path / "out").code == 0
    text = (tmp_path / "out" / CARD_FILE).read_text()
    holds(text, "transformers needs the float model", "OWNER/FLOAT-MODEL")


def test_layers_of_different_ranks_are_padded_for_mlx_lm(tiny_folder, chats, tmp_path):
    command = ("train", "--model", tiny_folder, "--data", chats, "--adapter-path", tmp_path / "a", *SHORT)
    assert run(*command, "--rank-pattern", "v_proj=2").code == 0
    assert "--to mlx-lm --out mlx-adapter" in (tmp_path / "a" / CARD_FILE).read_text()


def test_a_readme_of_the_users_own_stays(tiny_folder, chats, tmp_path):
    folder = tmp_path / "a"
    command = ("train", "--model", tiny_folder, "--data", chats, "--adapter-path", folder, "--max-seq-length", 128)
    folder.mkdir()
    (folder / CARD_FILE).write_text("# mine\n")
    ran = succeeds(*command, "--iters", 1)
    assert (folder / CARD_FILE).read_text() == "# mine\n"
    assert "your own file, left as it is" in ran.err
    (folder / CARD_FILE).write_text(f"---\n---\n{MARK}\nan earlier run\n")
    assert run(*command, "--iters", 2, "--force").code == 0
    text = (folder / CARD_FILE).read_text()
    assert "an earlier run" not in text
    assert row(text, "steps") == "2"


def test_facts_of_folders_that_tell_none(tmp_path):
    assert read_facts(tmp_path) == CardFacts()
    (tmp_path / "run.yaml").write_text("[1]")
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n')
    assert read_facts(tmp_path) == CardFacts()
    (tmp_path / "run.yaml").write_text("data: d\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "val_loss": 2.0}\n{"step": 3, "val_loss": null}\n')
    assert read_facts(tmp_path) == CardFacts("d", 3, None)  # the loss was another adapter's


@pytest.mark.slow
def test_pushed_is_what_was_written_and_it_comes_back(place, exported, tiny_folder, tmp_path):
    with hub_server() as server:
        command = ["-m", "mlx_lora", "export", "--model", tiny_folder, "--adapter-path", place / "adapter"]
        push = ["--push-to-hub", "me/tuned", "--private"]
        out = tmp_path / "out"
        ran = run_with_hub(
            tmp_path / "home", server.endpoint, [*command, "--to", "peft", "--out", out, *push], HF_TOKEN="hf_write"
        )
        assert ran.returncode == 0, ran.stderr
        assert "me/tuned: uploaded, http" in ran.stderr
        assert (ran.stdout, "%|" in ran.stderr) == ("", False)  # no bar where no terminal is
        assert server.repos["me/tuned"]["private"] is True
        assert server.repos["me/tuned"]["files"] == {p.name: p.read_bytes() for p in out.iterdir()}
        file = [*command, "--to", "gguf-adapter", "--out", tmp_path / "a.gguf", "--push-to-hub", "me/files"]
        ran = run_with_hub(tmp_path / "home", server.endpoint, file, HF_TOKEN="hf_write")
        assert ran.returncode == 0, ran.stderr
        assert server.repos["me/files"] == {"private": False, "files": {"a.gguf": (tmp_path / "a.gguf").read_bytes()}}

        server.folders["org/tuned"] = out
        ask = ["--model", tiny_folder, "--prompt", "Say 1.", "--max-tokens", 8, "--json"]
        found = [
            run_with_hub(tmp_path / "home", server.endpoint, ["-m", "mlx_lora", "generate", *ask, *adapter])
            for adapter in (["--adapter-path", "org/tuned"], ["--adapter-path", exported], [])
        ]
    texts = [json.loads(ran.stdout)["text"] for ran in found]
    assert texts[0] == texts[1]


PUSH = """
import os, sys
from pathlib import Path
from mlx_lora.exporters.card import push
from mlx_lora.utils.errors import RunError
for token in sys.argv[3:]:
    os.environ["HF_TOKEN"] = token
    try:
        print(push(Path(sys.argv[1]), "me/tuned", sys.argv[2] == "private"))
    except RunError as error:
        print(error)
"""


@pytest.mark.long
def test_refused_uploads_are_one_line_and_leave_the_files(exported, tmp_path):
    before = {p.name: p.read_bytes() for p in exported.iterdir()}

    def attempts(endpoint: str, *tokens: str, private: str = "public", **environment: str) -> list[str]:
        ran = run_with_hub(tmp_path, endpoint, ["-c", PUSH, exported, private, *tokens], **environment)
        assert ran.returncode == 0, ran.stderr
        lines = ran.stdout.splitlines()
        assert len(lines) == len(tokens)
        assert all(line.startswith("--push-to-hub me/tuned: ") for line in lines)
        assert all(line.endswith(f"the written files stay in {exported}") for line in lines)
        return lines

    with hub_server() as server:
        none, unknown, reads = attempts(server.endpoint, "", "hf_unknown", "hf_read")
        assert all("hf auth login" in line for line in (none, unknown))
        assert "may not write there" in reads
        server.repos["me/tuned"] = {"private": False, "files": {}}
        assert "already exists, and is public" in attempts(server.endpoint, "hf_write", private="private")[0]
        assert server.repos["me/tuned"]["files"] == {}
        assert "HF_HUB_OFFLINE" in attempts(server.endpoint, "hf_write", HF_HUB_OFFLINE="1")[0]
    assert "Hugging Face is unreachable" in attempts("http://127.0.0.1:9", "hf_write")[0]
    assert {p.name: p.read_bytes() for p in exported.iterdir()} == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--push-to-hub", "tuned"), "not a hub id"),
        (("--push-to-hub", "me/a:b"), "not a hub id"),
        (("--push-to-hub", "me/-bad-"), "not a hub id"),
        (("--private",), "--private without --push-to-hub"),
    ],
)
def test_wrong_ids_are_refused_before_the_work(place, tiny_folder, tmp_path, flags, message):
    given = ("--model", tiny_folder, "--adapter-path", place / "adapter", "--out", tmp_path / "o")
    one_line(run("export", *given, "--to", "peft", *flags), message)
    assert not (tmp_path / "o").exists()


def test_the_cards_place_is_a_path_of_the_readers(exported):
    assert "`adapter` is this folder" in (Path(exported) / CARD_FILE).read_text()


@pytest.mark.parametrize(
    ("name", "said", "card", "hub_id"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", {}, None, "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("gemma-3-270m-Q4_K_M.gguf", {}, None, "google/gemma-3-270m"),
        ("Qwen_Qwen3-0.6B-UD-Q4_K_XL.gguf", {}, None, "Qwen/Qwen3-0.6B"),
        ("New-1B-it-IQ4_XS.gguf", {"general.base_model.0.repo_url": "https://huggingface.co/lab/New-1B-it"}, None, "lab/New-1B-it"),
        ("New-1B-it-F16.gguf", {"general.source.repo_url": "https://huggingface.co/lab/New-1B-it/"}, None, "lab/New-1B-it"),
        # It names the model that this one was trained from.
        ("New-1B-it-Q8_0.gguf", {"general.base_model.0.repo_url": "https://huggingface.co/lab/New-1B"}, None, None),
        ("mine.gguf", {}, "base_model: lab/New-1B", None),
        ("New-1B-MLX-4bit", None, "base_model: lab/New-1B", "lab/New-1B"),
        ("New-1B-8bit-DWQ", None, "base_model:\n- lab/New-1B", None),
        ("New-1B-4bit", None, "base_model: [", None),
        ("SmolLM2-135M-Instruct-4bit", None, None, "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("my-model", None, None, None),
    ],
)  # fmt: skip
def test_the_float_model_of_a_base_is_found_by_its_files_and_its_name(name, said, card, hub_id, tmp_path):
    source = tmp_path / name
    if said is None:
        source.mkdir()
    else:
        writer = GGUFWriter(str(source), "llama")
        for key, value in said.items():
            writer.add_string(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    if card:
        ((source if said is None else tmp_path) / CARD_FILE).write_text(f"---\n{card}\n---\n# x\n")
    base = SimpleNamespace(source=source, folder=source, model_id=str(source), revision=None, quantization={"bits": 4})
    assert float_base(base, SimpleNamespace(base_model=str(source), base_revision=None)) == hub_id


def test_a_float_model_of_the_hub_is_its_own_base(tmp_path):
    info = SimpleNamespace(base_model="lab/New-1B", base_revision="abc")
    base = SimpleNamespace(source=tmp_path, folder=tmp_path, model_id="lab/New-1B", revision="abc", quantization=None)
    assert float_base(base, info) == "lab/New-1B"
    base.quantization = {"bits": 4}
    assert float_base(base, info) is None  # it is stored so
    base.folder = tmp_path / "cached"  # made here, with --bits
    assert float_base(base, info) == "lab/New-1B"


@pytest.mark.parametrize("to", ["peft", "mlx-lm", "gguf-adapter"])
def test_no_export_names_a_path_of_this_machine(to, place, tiny_folder, tmp_path):
    out = tmp_path / ("a.gguf" if to == "gguf-adapter" else "out")
    ran = succeeds("export", "--model", tiny_folder, "--adapter-path", place / "adapter", "--to", to, "--out", out)
    written = [out] if out.is_file() else list(out.iterdir())
    assert not [file.name for file in written if str(tiny_folder.parent).encode() in file.read_bytes()]
    assert ("--base-id" in ran.err) == (to == "peft")  # whose base is loaded by that name


@pytest.mark.slow
def test_the_small_model_is_named_by_its_id_on_the_hub(chats, tmp_path):
    adapter, out = tmp_path / "a", tmp_path / "out"
    succeeds("train", "--model", "smollm2", "--data", chats, "--adapter-path", adapter, *SHORT, "--iters", 1)
    exported = succeeds("export", "--model", "smollm2", "--adapter-path", adapter, "--to", "peft", "--out", out)
    assert "--base-id" not in exported.err
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    for folder in (adapter, out):
        text = (folder / CARD_FILE).read_text()
        assert ModelCard(text).data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert " smollm2" not in text
    assert 'from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")' in (out / CARD_FILE).read_text()
