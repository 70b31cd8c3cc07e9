import pydantic
import pytest
from pydantic import Field

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError, NextscaleError
from nextscale.base.records import FREE_ON_RESUME, Record, did_you_mean, free_on_resume, suggest


class Optimizer(Record):
    learning_rate: float = Field(1e-4, gt=0)
    weight_decay: float = Field(0.0, ge=0)


class Model(Record):
    optimizer: Optimizer = Optimizer()


class Recipe(Record):
    steps: int = Field(10, gt=0)
    sizes: tuple[int, ...] = (1, 2)
    model: Model = Model()
    adapter: Optimizer | None = None


def error_of(values, how):
    with pytest.raises(ConfigError) as caught:
        Recipe(**values) if how == "keywords" else Recipe.from_mapping(values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


both_ways = pytest.mark.parametrize("how", ["keywords", "mapping"])


@both_ways
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": 3}, "unknown key 'step'; did you mean 'steps'?"),
        ({"zzz": 3}, "unknown key 'zzz'; valid are steps, sizes, model, adapter"),
        ({"model": {"optimiser": {}}}, "unknown key 'model.optimiser'; did you mean 'optimizer'?"),
        (
            {"model": {"optimizer": {"learning_rat": 1}}},
            "unknown key 'model.optimizer.learning_rat'; did you mean 'learning_rate'?",
        ),
        ({"adapter": {"weight_deca": 1}}, "unknown key 'adapter.weight_deca'; did you mean 'weight_decay'?"),
    ],
)
def test_an_unknown_key_names_the_nearest(how, values, message):
    assert error_of(values, how) == message


@both_ways
@pytest.mark.parametrize(
    ("values", "key", "value"),
    [
        ({"steps": 0}, "steps", "0"),
        ({"steps": "many"}, "steps", "'many'"),
        ({"steps": 1.5}, "steps", "1.5"),
        ({"steps": None}, "steps", "None"),
        ({"sizes": [1, "x"]}, "sizes.1", "'x'"),
        ({"model": {"optimizer": {"learning_rate": -2.0}}}, "model.optimizer.learning_rate", "-2.0"),
        ({"adapter": {"learning_rate": 0}}, "adapter.learning_rate", "0"),
        ({"model": 3}, "model", "3"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_its_key(how, values, key, value):
    assert error_of(values, how).startswith(f"{key} = {value} cannot be used: ")


def test_a_range_is_told():
    assert error_of({"steps": 0}, "keywords") == "steps = 0 cannot be used: input should be greater than 0"


@pytest.mark.parametrize("values", [None, [1], "ab", 3])
def test_what_is_no_mapping_is_refused(values):
    with pytest.raises(ConfigError, match="Recipe needs keys with values"):
        Recipe.from_mapping(values)


def test_a_key_that_is_no_text_is_refused():
    with pytest.raises(ConfigError, match="1"):
        Recipe.from_mapping({1: 2})


def test_a_mapping_becomes_nested_records():
    recipe = Recipe.from_mapping({"steps": 3, "model": {"optimizer": {"learning_rate": 0.5}}, "adapter": {}})
    assert recipe == Recipe(steps=3, model=Model(optimizer=Optimizer(learning_rate=0.5)), adapter=Optimizer())
    assert isinstance(recipe.model.optimizer, Optimizer)
    assert Recipe.from_mapping(recipe.model_dump()) == recipe


def test_records_are_keyword_only_frozen_and_hashable():
    with pytest.raises(TypeError):
        Recipe(3)  # type: ignore[misc]
    recipe = Recipe()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        recipe.steps = 3  # type: ignore[misc]
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        recipe.model.optimizer.learning_rate = 3.0  # type: ignore[misc]
    assert recipe == Recipe() and hash(recipe) == hash(Recipe())


def test_replace_makes_a_validated_copy():
    recipe = Recipe(steps=4, model=Model(optimizer=Optimizer(learning_rate=0.5)))
    changed = recipe.replace(steps=5)
    assert (recipe.steps, changed.steps) == (4, 5)
    assert changed.model == recipe.model
    with pytest.raises(ConfigError, match="unknown key 'stepz'; did you mean 'steps'"):
        recipe.replace(stepz=5)
    with pytest.raises(ConfigError, match="steps = -1"):
        recipe.replace(steps=-1)


def test_a_default_is_validated_too():
    class Wrong(Record):
        steps: int = Field(-1, gt=0)

    with pytest.raises(ConfigError, match="steps = -1"):
        Wrong()


def test_a_records_own_check_keeps_its_sentence():
    class Pair(Record):
        low: int = 0
        high: int = 1

        @pydantic.model_validator(mode="after")
        def _ordered(self):
            if self.low > self.high:
                raise ValueError(f"low ({self.low}) must not be above high ({self.high})")
            return self

    class Outer(Record):
        pair: Pair = Pair()

    with pytest.raises(ConfigError, match=r"low \(3\) must not be above high \(1\)"):
        Pair(low=3)
    with pytest.raises(ConfigError, match=r"^pair: low \(3\) must not be above high \(1\)$"):
        Outer.from_mapping({"pair": {"low": 3}})


def test_the_nearest_name_is_suggested_or_none():
    assert suggest("temprature", ["top_k", "temperature"]) == "temperature"
    assert suggest("xyz", ["top_k", "top_p"]) is None
    assert did_you_mean("temprature", ["top_k", "temperature"]) == "; did you mean 'temperature'?"
    assert did_you_mean("xyz", ["top_k", "top_p"]) == "; valid are top_k, top_p"
    assert did_you_mean("xyz", ["top_k", "top_p"], "see the list") == "; see the list"
    assert did_you_mean("xyz", []) == ""


def test_fields_that_a_resumed_run_may_change_are_marked():
    class Run(Record):
        seed: int = 0
        max_steps: int = Field(default=10, ge=1, json_schema_extra=FREE_ON_RESUME)

    assert free_on_resume(Run) == {"max_steps"} and free_on_resume(Recipe) == set()


def test_errors_are_value_errors():
    assert issubclass(ConfigError, NextscaleError) and issubclass(NextscaleError, ValueError)


def test_a_condition_has_a_label_and_a_text():
    assert Condition(3, "a fish") == Condition(label=3, text="a fish")
    assert Condition(None, "a prompt").label is None
