"""The kill drill, short: what `make drill` does a hundred times (docs/reliability.md)."""

import importlib.util
from pathlib import Path

DRILL = Path(__file__).parents[1] / "drills" / "kill.py"


def test_a_killed_run_goes_on_as_if_nothing_had_happened(capsys) -> None:
    spec = importlib.util.spec_from_file_location("kill", DRILL)
    assert spec and spec.loader
    kill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kill)
    result = kill.drill(num_trials=1, seed=1)
    assert result["wrong"] == 0, capsys.readouterr().out
    assert result["outcomes"] == {"killed": 1}
