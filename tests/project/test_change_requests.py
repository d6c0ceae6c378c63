"""Changes that users ask for, made in a copy of the package: how many files does each touch, and does all of it follow?"""

from __future__ import annotations

from pathlib import Path

import yaml
from changed_package import copied

# Prints what a run would do with two settings that are new, `target_spread` and `report_color`.
NEW_SETTINGS = """
import contextlib, io, json
from pathlib import Path
from types import SimpleNamespace
import mlx_lora
from mlx_lora.trainer.run_folder import RunFolder, check_continuation, identity_of
from mlx_lora.config.load import train_settings
from mlx_lora.config.load import read_settings
from mlx_lora.utils.errors import InputError
from mlx_lora.cli.train import main
from mlx_lora.parallel.strategy import SINGLE_DEVICE, DataParallel

def told(call, *arguments):
    try:
        call(*arguments)
    except InputError as error:
        return str(error)

def shown(flag):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main.main([flag])
    return out.getvalue()

class Plan:
    shapes = ((1, 2),)

    def __len__(self):
        return 1

class Ranks:
    size = 2

    def everyone(self, facts):
        self.first = getattr(self, "first", facts)
        return [self.first, facts]

def identity(settings):
    return identity_of(settings, "base", "rows", Plan(), 1.0)

plain = train_settings({})
changed = {name: train_settings({name: value}) for name, value in (("target_spread", 0.5), ("report_color", "blue"))}
changed["target_spread"] = train_settings({"target_spread": 0.5, "adapter_path": "."})
RunFolder(changed["target_spread"], None, {}, SINGLE_DEVICE, None, None).begin(None, 1)
found = train_settings({}, read_settings("run.yaml", {}))

begun = SimpleNamespace(folder="a", identity=identity(plain))
check_same = DataParallel(Ranks()).check_same
check_same(plain, identity(plain))
print(json.dumps({
    "package": mlx_lora.__file__,
    "help": shown("--help"),
    "help-all": shown("--help-all"),
    "too large": told(train_settings, {"target_spread": 1.5}),
    "no choice": told(train_settings, {"report_color": "red"}),
    "from run.yaml": found.to_flat()["target_spread"],
    "resumed": {name: told(check_continuation, begun, identity(settings)) for name, settings in changed.items()},
    "on rank 1": {name: told(check_same, settings, identity(settings)) for name, settings in changed.items()},
}))
"""


def test_a_new_setting_is_one_row(tmp_path):
    package = copied(tmp_path)
    before = "    epochs: float | None = setting("
    package.edit("config/settings.py", before, f'''\
    target_spread: float = setting(0.0, "Share of the target spread over all tokens.", TRAINING, at_least=0, at_most=0.9)
    report_color: str = setting("green", "Color of the curves.", OUTPUT, common=True, may_change=True, per_machine=True,
        choices=("green", "blue"))
{before}''')  # fmt: skip
    assert package.touched() == ["config/settings.py"]
    seen = package.python(NEW_SETTINGS)
    assert Path(seen["package"]).is_relative_to(tmp_path)
    assert "--target-spread X" in seen["help-all"]
    assert "--target-spread" not in seen["help"]
    assert "--report-color NAME" in seen["help"]
    assert seen["too large"] == "--target-spread 1.5: must be at least 0 and at most 0.9"
    assert seen["no choice"] == "--report-color 'red': not one of green, blue"
    written = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert (written["target_spread"], written["report_color"]) == (0.5, "green")
    assert seen["from run.yaml"] == 0.5
    for seen_by, words in (
        ("resumed", "target_spread was 0.0, is now 0.5"),
        ("on rank 1", "target_spread is 0.0 on rank 0, 0.5"),
    ):
        assert words in seen[seen_by]["target_spread"]
        assert seen[seen_by]["report_color"] is None
