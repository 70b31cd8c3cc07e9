"""Recipes: one validated record, and the rewards that are made of it."""

import pytest
import yaml

from nextscale.base.errors import ConfigError
from nextscale.config.build import make_rewards, resolve
from nextscale.config.files import packaged_recipes
from nextscale.config.recipe import Recipe, load_recipe, to_yaml
from nextscale.config.resume import check_resumable
from nextscale.models import zoo
from nextscale.policy import SamplingConfig
from nextscale.rewards.kinds import read_reward

PAINTING = "rewards: {painting: {clip_score: 'a painting of a {label}', clip: toy}}\n"


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("bound", ["bass", ".nan", "true", "[1]"])
def test_a_bound_is_a_number_or_base(bound):
    with pytest.raises(ConfigError, match=r"rewards\.painting\.at_most = .* expected a number, or base"):
        load_recipe("toy-painting", {"rewards.painting.at_most": bound})


def test_rewards_misspelt(write):
    with pytest.raises(ConfigError, match="unknown key 'reward'; did you mean 'rewards'"):
        load_recipe(write(PAINTING.replace("rewards", "reward")))


@pytest.mark.parametrize(
    ("text", "sampling"),
    [
        ("", {}),
        ("sampling: {}\n", {}),
        ("sampling: {top_k: 5}\n", {"top_k": 5}),
        ("sampling: {guidance_scale: 0.0, top_k: 0, top_p: 1}\n",
         {"guidance_scale": 0.0, "top_k": 0, "top_p": 1.0}),
    ],
)  # fmt: skip
def test_sampling_that_is_not_given_is_the_models(write, text, sampling):
    for model, own in (("toy", {"guidance_scale": 1.5}), ("var-d16", zoo.OFFICIAL_SAMPLING.model_dump())):
        recipe = load_recipe(write(f"model: {model}\n{text}{PAINTING}"))
        resolved = resolve(recipe)
        assert resolved.sampling == SamplingConfig(**own | sampling)
        assert resolved.replace(sampling=recipe.sampling) == recipe and resolve(resolved) == resolved


def test_packaged_recipes_sample_as_before():
    for name in packaged_recipes():
        sampling = resolve(load_recipe(name)).sampling
        own = {"toy-unguided": {"guidance_scale": 0.0}, "var-clip-painting": {"guidance_scale": 2.0}}
        stopped = {"guidance_scale": 3.0, "guidance_stop": 8}
        own |= {"switti-512-aesthetic": stopped, "switti-512-geneval": stopped}
        assert sampling == SamplingConfig(**own.get(name, {"guidance_scale": 1.5})), name


def test_a_recipe_trains_on_a_reward():
    for role, value in (("at_least", "base"), ("held_out", "true")):
        with pytest.raises(ConfigError, match="every reward is a constraint or held out"):
            load_recipe("toy-collapse", {f"rewards.aesthetic.{role}": value})


def test_prompts_are_one_or_several(write):
    several = "rewards: {r: {clip_score: [a, 'b {label}'], negative: c, clip: toy}}"
    reward = load_recipe(write(several)).rewards["r"]
    assert reward.prompt == ("a", "b {label}") and reward.negative == "c"
    assert load_recipe(write(to_yaml(load_recipe(write(several))), "again.yaml")).rewards["r"] == reward
    texts = {"rewards.r.clip_score": "{label}: no", "rewards.r.negative": "[a moon, '{label}']"}
    reward = load_recipe(write(several), texts).rewards["r"]
    assert reward.prompt == "{label}: no" and reward.negative == ("a moon", "{label}")
    assert load_recipe(write(several), {"rewards.r.negative": "null"}).rewards["r"].negative is None


def test_options_reach_their_reward(monkeypatch):
    monkeypatch.setenv("KEY", "sesame")
    request = {"request_timeout": 7.0, "retries": 5, "api_key_env": "KEY"}
    asking = {"vlm_model": "m", "question": "{label}?", "score_range": (1, 5), "concurrency": 3}
    configs = {
        "far": read_reward({"remote": "http://h/score", "batch_size": 9, "timeout": 60, **request}),
        "judge": read_reward({"vlm_judge": "http://h/v1", "weight": 2, **request, **asking}),
    }
    made = make_rewards(configs)
    far, judge = made.rewards.values()
    assert (made.timeouts, made.weights) == ({"far": 60.0}, {"far": 1.0, "judge": 2.0})
    assert (far.batch_size, judge.concurrency, judge.vlm_model) == (9, 3, "m")
    assert judge.question == "{label}?" and "1 to 5" in judge.instruction
    for client in (far.client, judge.client):
        assert (client.retries, client._client.timeout.read) == (5, 7.0)
        assert client._client.headers["Authorization"] == "Bearer sesame"
    assert "sesame" not in to_yaml(Recipe(rewards=configs))
    with pytest.raises(ConfigError, match="reward 'judge': a judge needs vlm_model"):
        make_rewards({"judge": read_reward({"vlm_judge": "http://h/v1", "vlm_model": ""})})
    with pytest.raises(ConfigError, match="'vlm_model' is missing"):
        read_reward({"vlm_judge": "http://h/v1"})


def test_infinity_is_no_value_where_it_means_nothing(write):
    for key in ("grpo: {beta", "grpo: {target_kl", "grpo: {entropy_coef", "optimizer: {learning_rate"):
        with pytest.raises(ConfigError, match="= inf cannot be used: input should be a finite number"):
            load_recipe(write(f"rewards: {{r: {{python: 'a.py:f', weight: 1}}}}\n{key}: .inf}}"))


def test_infinity_is_no_bound(write):
    recipe = load_recipe(write(
        "rewards: {r: {python: 'a.py:f', weight: 1}}\n"
        "grpo: {num_iterations: 2, epsilon_high: .inf}\noptimizer: {max_grad_norm: .inf}"
    ))  # fmt: skip
    assert recipe.grpo.epsilon_high == recipe.optimizer.max_grad_norm == float("inf")


@pytest.mark.parametrize("weight", [".nan", ".inf"])
def test_a_weight_is_a_number(write, weight):
    with pytest.raises(ConfigError, match=r"rewards\.r\.weight = (nan|inf) cannot be used"):
        load_recipe(write(f"rewards: {{r: {{python: 'a.py:f', weight: {weight}}}}}"))


def test_a_python_file_beside_the_recipe_is_found(write, tmp_path, monkeypatch):
    """Before one of the working directory; an override is typed there, and means that one."""
    path = write("rewards: {a: {python: 'mine.py:f'}, b: {python: 'other.py:f'}, c: {python: '/mine.py:f'}}")
    (tmp_path / "mine.py").touch()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine.py").touch()
    monkeypatch.chdir(tmp_path / "work")
    found = {name: reward.function for name, reward in load_recipe(path).rewards.items()}
    assert found == {"a": f"{tmp_path}/mine.py:f", "b": "other.py:f", "c": "/mine.py:f"}
    assert load_recipe("../mine.yaml").rewards["a"].function == "../mine.py:f"
    assert load_recipe(path, {"rewards.a.python": "mine.py:f"}).rewards["a"].function == "mine.py:f"


def test_the_resolved_recipe_has_all_keys_and_loads_back_equal(write):
    text = "description: '1e-4'\nmodel: 'no'\nrun: {output_dir: '010', mixed_precision: no}\n"
    weights = "grpo: {scale_weighting: [1, 2.5e-7], class_labels: [3]}\noptimizer: {learning_rate: 1e-5}\n"
    recipe = load_recipe(write(text + weights + PAINTING))
    resolved = to_yaml(recipe)
    assert load_recipe(write(resolved, "resolved.yaml")) == recipe
    loaded = yaml.safe_load(resolved)  # any reader of YAML 1.1, such as the report, gets the same
    assert loaded["run"]["mixed_precision"] == "no" and loaded["model"] == "no"
    assert loaded["run"]["output_dir"] == "010" and loaded["description"] == "1e-4"
    for name in ("sampling", "grpo", "optimizer", "run"):
        assert set(loaded[name]) == set(type(getattr(recipe, name)).model_fields)
    assert loaded["rewards"]["painting"]["weight"] == 1.0


def test_the_config_of_an_earlier_run_is_read_and_may_be_resumed(write):
    """It has the short form, and no key that was not set."""
    old = "painting: {clip_score: 'a {label}', clip: toy, weight: 1.0, held_out: false}"
    far = "far: {remote: 'http://h/score', batch_size: 9, at_least: base, held_out: false, timeout: 60.0}"
    path = write(f"rewards:\n  {old}\n  {far}\n")
    recipe = load_recipe(path)
    assert load_recipe(write(to_yaml(recipe), "new.yaml")) == recipe
    far = recipe.rewards["far"]
    check_resumable(
        recipe.replace(rewards={**recipe.rewards, "far": far.replace(batch_size=3, retries=1)}), path
    )
    with pytest.raises(ConfigError, match=r"rewards\.far\.url is 'http://other', but the run in"):
        check_resumable(
            recipe.replace(rewards={**recipe.rewards, "far": far.replace(url="http://other")}), path
        )
