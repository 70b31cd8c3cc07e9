"""A user's own reward: a Python function in a file."""

import importlib.util
import sys
from pathlib import Path
from typing import Literal, cast

from nextscale.base.errors import ConfigError
from nextscale.base.records import did_you_mean
from nextscale.rewards.asking.answers import user_line
from nextscale.rewards.protocol import Reward, RewardConfig


def load_function(reference: str, what: str = "python reward") -> Reward:
    """The function named by `path/to/file.py:function`. The file is executed.

    Args:
        what: it is, for errors.

    Raises:
        ConfigError: there is no such file or function, or the file raises.
    """
    path_text, _, name = reference.rpartition(":")
    path = Path(path_text)
    if not path_text or not name.isidentifier():
        raise ConfigError(f"{what} '{reference}' must be of the form path/to/file.py:function")
    if not path.is_file():
        raise ConfigError(f"{what} '{reference}': no file '{path}'")
    spec = importlib.util.spec_from_file_location(f"nextscale_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{what} '{reference}': '{path}' is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module while they are created
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise ConfigError(
            f"{what} '{reference}': the file raised {type(error).__name__}: {error}{user_line(error)}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [
            key for key, value in vars(module).items() if callable(value) and not key.startswith("_")
        ]
        raise ConfigError(f"{what} '{reference}': no function '{name}' in it{did_you_mean(name, functions)}")
    return cast("Reward", function)


class PythonConfig(RewardConfig):
    """Python function of yours."""

    main_option = "function"

    kind: Literal["python"] = "python"
    function: str
    """path/to/file.py:function; looked for beside the recipe, then from the working directory."""

    @property
    def networks(self) -> tuple[str | None, ...]:
        return (None,)  # whatever it runs

    def make(self) -> Reward:
        return load_function(self.function)
