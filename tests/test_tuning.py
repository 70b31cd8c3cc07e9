"""What of a model is trained: adapters, frozen parts, and the average of the weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from nextscale.base.average import Average
from nextscale.base.errors import CheckpointError, ConfigError, RewardError
from nextscale.base.patterns import matching
from nextscale.models.lora import adapter_off, merged
from nextscale.models.var import VAR, VARConfig
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.rewards import AtLeast, RewardSet
from nextscale.tuning import TuningConfig, check_tuning, tune, untune
from test_trainer import brightness, gradient, make_trainer, metrics_of, redness

MakePipeline = Callable[..., VARPipeline]
LORA = {"use_peft": True, "lora_r": 4, "learning_rate": 1e-2}


def state_of(pipe: VARPipeline) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in pipe.transformer.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(each, other[name]) for name, each in one.items())


def log_probs(pipe: VARPipeline) -> Tensor:
    return pipe([0, 1, 2], 2, seed=3).log_probs


def trainable(pipe: VARPipeline) -> list[str]:
    return [name for name, each in pipe.transformer.named_parameters() if each.requires_grad]


def test_a_pattern_means_whole_words() -> None:
    names = [
        "blocks.0.attn.proj.weight",
        "blocks.10.ffn.fc1.weight",
        "projection.weight",
        "head_nm.ada_lin.1",
    ]
    assert matching("proj", names) == names[:1]
    assert matching("blocks.0", names) == matching("blocks.0.*", names) == names[:1]
    assert matching("blocks.*.ffn", names) == matching("fc?", names) == names[1:2]
    assert matching("ada_lin", names) == names[3:]
    assert matching("*", names) == names


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_begins_as_its_base_and_is_it_where_switched_off(
    make_pipeline: MakePipeline, use_dora: bool
) -> None:
    pipe = make_pipeline()
    before, base = log_probs(pipe), state_of(pipe)
    layers = "*"  # the head and the embedding of tokens among them
    tune(pipe.transformer, TuningConfig(use_peft=True, lora_target_modules=layers, use_dora=use_dora))
    torch.testing.assert_close(log_probs(pipe), before, rtol=0, atol=1e-4 if use_dora else 0)
    for name, each in pipe.transformer.named_parameters():
        assert each.requires_grad == (".lora_" in name)
        if each.requires_grad:
            torch.nn.init.normal_(each, std=0.1)
    assert (log_probs(pipe) - before).abs().max() > 0.1
    with adapter_off(pipe.transformer):
        assert torch.equal(log_probs(pipe), before)
    adapted = log_probs(pipe)
    copied = merged(pipe.transformer)
    assert copied is not pipe.transformer and copied.state_dict().keys() == base.keys()
    untune(pipe.transformer)
    assert equal(copied.state_dict(), state_of(pipe)) and len(trainable(pipe)) == len(
        list(pipe.transformer.parameters())
    )
    torch.testing.assert_close(log_probs(pipe), adapted, rtol=0, atol=1e-3)
    assert type(pipe.transformer) is VAR and merged(pipe.transformer) is pipe.transformer


def test_the_head_and_ada_lin_can_be_adapted_by_name(make_pipeline: MakePipeline) -> None:
    for shared in (False, True):
        pipe = make_pipeline(shared_adaln=shared)
        tune(pipe.transformer, TuningConfig(use_peft=True, lora_target_modules=("head", "*ada_lin")))
        layers = {name.split(".lora_")[0] for name in trainable(pipe)}
        own = {"shared_ada_lin.1"} if shared else {"blocks.0.ada_lin.1", "blocks.1.ada_lin.1"}
        assert layers == {"head", "head_nm.ada_lin.1"} | own
        with torch.autocast("cpu", torch.bfloat16):
            pipe([0])


def test_an_adapter_off_leaves_its_frozen_parts_frozen(tiny_pipeline: VARPipeline) -> None:
    tune(tiny_pipeline.transformer, TuningConfig(use_peft=True, freeze="lora_A"))
    before = trainable(tiny_pipeline)
    assert before and all(".lora_B." in name for name in before)
    with adapter_off(tiny_pipeline.transformer):
        pass
    assert trainable(tiny_pipeline) == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lora_r": 8}, r"^tuning.lora_r 8 has no effect without tuning.use_peft"),
        ({"use_dora": True}, r"^tuning.use_dora True has no effect without tuning.use_peft"),
        ({"ema_use": "export"}, r"^tuning.ema_use export has no effect without tuning.ema_decay"),
        ({"use_peft": True, "lora_dropout": 0.05}, r"drawn without dropout.*remove it"),
        ({"use_peft": True, "lora_target_modules": "qkv"}, r"no linear layer; did.* 'mat_qkv'\?$"),
        ({"use_peft": True, "lora_target_modules": "zzz"}, r"linear layer; valid are word_embed, blocks"),
        ({"use_peft": True, "lora_target_modules": ()}, r"^tuning.lora_target_modules is empty"),
        ({"freeze": "class_embed"}, r"'class_embed' matches no parameter that.*did you mean"),
        ({"freeze": "blocks.7"}, r"^tuning.freeze: 'blocks.7' matches no parameter"),
        ({"freeze": "*"}, r"^tuning.freeze \* leaves nothing to train"),
        ({"use_peft": True, "freeze": "class_emb"}, r"'class_emb' matches no parameter that would be"),
        ({"use_peft": True, "freeze": ("lora_A", "lora_B")}, r"^tuning.freeze lora_A, lora_B leaves nothing"),
    ],
)  # fmt: skip
def test_what_has_no_effect_or_matches_nothing_is_refused(
    tiny_pipeline: VARPipeline, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        make_trainer(tiny_pipeline, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists() and not hasattr(tiny_pipeline.transformer, "peft_config")
    with torch.device("meta"):
        model = VAR(VARConfig(depth=2))
    with pytest.raises(ConfigError, match=says):
        check_tuning(TuningConfig(**options), model)


def test_a_model_that_is_frozen_by_hand_is_refused(tiny_pipeline: VARPipeline, tmp_path: Path) -> None:
    tiny_pipeline.transformer.requires_grad_(False)
    with pytest.raises(ConfigError, match="every parameter of the model is frozen"):
        make_trainer(tiny_pipeline, tmp_path / "run")


@pytest.mark.usefixtures("without_pages")
def test_every_option_of_lora_has_an_effect(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    def weights(name: str, **options: Any) -> Tensor:
        pipe = make_pipeline()
        make_trainer(pipe, tmp_path / name, **LORA | options).train()
        return torch.cat([each.detach().flatten() for each in pipe.transformer.parameters()])

    plain = weights("plain")
    assert torch.equal(plain, weights("again"))
    for name, value in {
        "lora_r": 2,
        "lora_alpha": 8,
        "lora_target_modules": ("mat_qkv",),
        "use_rslora": True,
        "use_dora": True,
        "freeze": "blocks.0",
        "ema_decay": 0.9,
        "seed": 1,
    }.items():
        assert not torch.equal(weights(name, **{name: value}), plain), name


@pytest.mark.parametrize("use_dora", [False, True])
def test_final_its_adapter_and_the_pipeline_draw_the_same(
    make_pipeline: MakePipeline, tmp_path: Path, use_dora: bool
) -> None:
    base = make_pipeline()
    base.sampling = SamplingConfig(top_k=9)
    base.save_pretrained(tmp_path / "base")
    pipe = VARPipeline.from_pretrained(tmp_path / "base")
    before = log_probs(pipe)
    trainer = make_trainer(pipe, tmp_path / "run", max_steps=3, use_dora=use_dora, **LORA)
    final = trainer.train().folder / "final"
    trained, sampling = log_probs(pipe), pipe.sampling
    pipe.sampling = SamplingConfig(top_k=9)
    assert (log_probs(pipe) - before).abs().max() > 0.01
    assert load_file(final / "transformer.safetensors").keys() == pipe.transformer.state_dict().keys()
    assert torch.equal(log_probs(VARPipeline.from_pretrained(final)), trained)
    adapted = VARPipeline.from_pretrained(tmp_path / "base", adapter=final / "adapter")
    assert torch.equal(log_probs(adapted), trained) and adapted.sampling == sampling
    assert adapted.sampling != VARPipeline.from_pretrained(tmp_path / "base").sampling

    # peft's own loader reads it, and the adapter not merged draws the same up to rounding.
    base = VARPipeline.from_pretrained(tmp_path / "base")
    PeftModel.from_pretrained(base.transformer, str(final / "adapter"))
    base.sampling = sampling
    torch.testing.assert_close(log_probs(base), trained, rtol=0, atol=1e-3)

    # In another dtype, it is merged first.
    halved = VARPipeline.from_pretrained(tmp_path / "base", "bfloat16", adapter=final / "adapter")
    assert equal(state_of(halved), state_of(VARPipeline.from_pretrained(final, "bfloat16")))

    config = json.loads((final / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "base"
    text = (final / "adapter" / "adapter_config.json").read_text()
    assert str(tmp_path) not in text and config["target_modules"] == sorted(config["target_modules"])


def test_an_official_file_takes_an_adapter(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    files = make_pipeline().save_official(tmp_path / "official")
    pipe = VARPipeline.from_official(*files)
    adapter = make_trainer(pipe, tmp_path / "run", **LORA).train().folder / "final" / "adapter"
    assert equal(state_of(VARPipeline.from_official(*files, adapter=adapter)), state_of(pipe))


def test_an_adapter_of_another_base_and_what_is_none_are_refused(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    make_pipeline().save_pretrained(tmp_path / "base")
    make_pipeline(seed=1).save_pretrained(tmp_path / "other")
    make_pipeline(width=32).save_pretrained(tmp_path / "narrow")
    pipe = VARPipeline.from_pretrained(tmp_path / "base")
    final = make_trainer(pipe, tmp_path / "run", **LORA).train().folder / "final"
    for other in (tmp_path / "other", final):
        with pytest.raises(
            CheckpointError, match="for other weights than this model's: it was trained on 'base'"
        ):
            VARPipeline.from_pretrained(other, adapter=final / "adapter")
    bare = tmp_path / "bare"  # as peft alone writes it: without a word on its base
    bare.mkdir()
    tensors = load_file(final / "adapter" / "adapter_model.safetensors")
    config = (final / "adapter" / "adapter_config.json").read_text()
    save_file(tensors, bare / "adapter_model.safetensors")
    (bare / "adapter_config.json").write_text(config)
    loaded = VARPipeline.from_pretrained(tmp_path / "base", adapter=bare)
    assert equal(state_of(loaded), state_of(pipe))
    with pytest.raises(CheckpointError, match="for other weights than this model's"):
        VARPipeline.from_pretrained(tmp_path / "narrow", adapter=bare)
    save_file(
        {**tensors, "base_model.model.head.lora_A.weight": torch.zeros(4, 64)},
        bare / "adapter_model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"for other weights.*head\.lora_A"):
        VARPipeline.from_pretrained(tmp_path / "base", adapter=bare)
    (bare / "adapter_config.json").write_text(config.replace('"LORA"', '"IA3"'))
    with pytest.raises(CheckpointError, match="an adapter of the kind IA3, expected LORA"):
        VARPipeline.from_pretrained(tmp_path / "base", adapter=bare)
    (bare / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is no adapter that can be read"):
        VARPipeline.from_pretrained(tmp_path / "base", adapter=bare)
    for wrong, says in (
        (final, f"that is '{final / 'adapter'}'"),
        (tmp_path / "run", f"that is '{final / 'adapter'}'"),
        (tmp_path / "base", "expected a folder with adapter_config.json and adapter_model.safetensors"),
        ("nowhere", "no adapter 'nowhere'"),
    ):
        with pytest.raises(CheckpointError, match=says):
            VARPipeline.from_pretrained(tmp_path / "base", adapter=wrong)


@pytest.fixture
def foreign(make_pipeline: MakePipeline, tmp_path: Path) -> Callable[..., Path]:
    """Writes an adapter as peft alone does, for the model in tmp_path / "base"."""

    def write(name: str, **options: Any) -> Path:
        model = make_pipeline().transformer
        config = LoraConfig(r=4, lora_alpha=4, target_modules=["proj"], **options)
        get_peft_model(model, config).save_pretrained(str(tmp_path / name))
        return tmp_path / name

    make_pipeline().save_pretrained(tmp_path / "base")
    return write


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa', which changes the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora', which changes the base"),
        ({"modules_to_save": ["head"]}, "it has modules_to_save, trained layers of the model besides"),
    ],
)
def test_an_adapter_that_is_more_than_one_is_refused(
    foreign: Callable[..., Path], tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        VARPipeline.from_pretrained(tmp_path / "base", adapter=foreign("other", **options))


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_an_adapter_of_peft_alone_is_the_base_before_it_is_trained(
    foreign: Callable[..., Path], tmp_path: Path, init: Any
) -> None:
    adapter, base = foreign("own", init_lora_weights=init), tmp_path / "base"
    adapted = VARPipeline.from_pretrained(base, adapter=adapter).transformer.state_dict()
    for name, each in VARPipeline.from_pretrained(base).transformer.state_dict().items():
        torch.testing.assert_close(adapted[name], each, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "damage",
    [
        {"lora_alpha": None},
        {"r": "x"},
        {"r": [2]},
        {"target_modules": 5},
        {"target_modules": "*(("},
        {"target_modules": None},
        {"rank_pattern": "x"},
        {"alpha_pattern": {"blocks.0.attn.proj": "x"}},
        {"lora_dropout": "x"},
        {"megatron_config": {"a": 1}},
        {"alora_invocation_tokens": [1, 2]},
    ],
)
def test_a_damaged_adapter_is_told_in_one_sentence(
    foreign: Callable[..., Path], tmp_path: Path, damage: dict[str, Any]
) -> None:
    adapter = foreign("own")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | damage))
    with pytest.raises(CheckpointError, match=rf"^'{adapter}' is (no|an) adapter") as caught:
        VARPipeline.from_pretrained(tmp_path / "base", adapter=adapter)
    assert "\n" not in str(caught.value)


def test_an_adapter_that_is_not_finite_is_refused(foreign: Callable[..., Path], tmp_path: Path) -> None:
    adapter = foreign("own")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"its 'blocks\.0.*' holds NaN or infinity"):
        VARPipeline.from_pretrained(tmp_path / "base", adapter=adapter)
    tensors[name][0, 0] = 0.0
    save_file(tensors, adapter / "adapter_model.safetensors", {"nextscale": "[1]"})
    with pytest.raises(CheckpointError, match="is no adapter that can be read"):
        VARPipeline.from_pretrained(tmp_path / "base", adapter=adapter)


def test_a_trainer_of_an_adapter_leaves_nothing_behind(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    """A second trainer, of all weights or of a second adapter, is like a first one on the same weights; so is
    one that follows a trainer that was made and never run."""
    pipe = make_pipeline()
    before = state_of(pipe)
    make_trainer(pipe, tmp_path / "unrun", freeze="lora_A", **LORA)
    assert any(".lora_" in name for name in state_of(pipe))
    pipe.save_pretrained(tmp_path / "saved")  # a model as any other, at any time
    assert equal(state_of(VARPipeline.from_pretrained(tmp_path / "saved")), before)
    lost = make_trainer(pipe, tmp_path / "lost", **LORA)
    final = make_trainer(pipe, tmp_path / "run", **LORA).train().folder / "final"
    with pytest.raises(ConfigError, match="no longer has this trainer's adapter"):
        lost.train()
    first = make_pipeline()
    make_trainer(first, tmp_path / "first", **LORA).train()
    assert equal(state_of(first), state_of(pipe))
    for name, options in {"full": {}, "lora": LORA}.items():
        fresh = VARPipeline.from_pretrained(final)
        again = VARPipeline.from_pretrained(final)
        make_trainer(again, tmp_path / f"unrun-{name}", freeze="blocks.0")
        make_trainer(again, tmp_path / f"again-{name}", **options).train()
        make_trainer(fresh, tmp_path / f"fresh-{name}", **options).train()
        assert equal(state_of(again), state_of(fresh)), name
        assert len(trainable(again)) == len(list(again.transformer.parameters()))


def test_a_run_that_stops_leaves_its_adapter_merged_and_goes_on_from_its_base(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    calls: list[int] = []

    def fails_once(images: Tensor, conditions: Any) -> Tensor:
        calls.append(len(images))
        if len(calls) == 3:
            raise RuntimeError("not today")
        return redness(images, conditions)

    pipe, straight, options = make_pipeline(), make_pipeline(), LORA | {"max_steps": 3, "save_steps": 1}
    with pytest.raises(RewardError, match="not today"):
        make_trainer(pipe, tmp_path / "run", fails_once, **options).train()
    assert state_of(pipe).keys() == state_of(make_pipeline()).keys() and trainable(pipe)
    two = make_pipeline()
    make_trainer(two, tmp_path / "two", fails_once, **options | {"max_steps": 2}).train()
    assert equal(state_of(pipe), state_of(two))  # what it had learned in its two steps
    with pytest.raises(CheckpointError, match="go on with the model that it began with"):
        make_trainer(pipe, tmp_path / "run", fails_once, resume="auto", **options).train()
    again = make_pipeline()
    make_trainer(again, tmp_path / "run", fails_once, resume="auto", **options).train()
    make_trainer(straight, tmp_path / "straight", fails_once, **options).train()
    assert equal(state_of(again), state_of(straight))


@pytest.mark.parametrize(
    "options",
    [
        LORA | {"ema_decay": 0.5, "freeze": "blocks.0.ffn"},
        LORA | {"use_dora": True, "entropy_floor": 0.9, "num_iterations": 2},
        {"freeze": ("blocks.0", "class_emb"), "ema_decay": 0.9, "ema_use": "evaluation"},
    ],
)
def test_resumed_equals_straight(make_pipeline: MakePipeline, tmp_path: Path, options: dict) -> None:
    evaluated = {"eval_steps": 2, "eval_num_images": 8}
    straight, resumed = make_pipeline(), make_pipeline()
    make_trainer(straight, tmp_path / "straight", max_steps=4, **evaluated, **options).train()
    make_trainer(resumed, tmp_path / "run", max_steps=2, **evaluated, **options).train()
    resumed = make_pipeline()
    trainer = make_trainer(resumed, tmp_path / "run", max_steps=4, resume="auto", **evaluated, **options)
    names = trainable(resumed)
    trainer.train()
    assert equal(state_of(straight), state_of(resumed))
    noisy = ("time", "images_per_second")
    first, second = (
        {key: each for key, each in metrics_of(folder)[-1].items() if not any(word in key for word in noisy)}
        for folder in (tmp_path / "straight", tmp_path / "run")
    )
    assert first == second

    checkpoint = tmp_path / "run" / "checkpoints" / "step-000004"
    files = ["model.safetensors", *(["average.safetensors"] if "ema_decay" in options else [])]
    for file in files:
        assert sorted(load_file(checkpoint / file)) == sorted(names)
    moments = load_file(checkpoint / "optimizer.safetensors")
    assert {name.rpartition("/")[0] for name in moments} == set(names)
    with pytest.raises(CheckpointError, match="the rest of this model is not that run's"):
        make_trainer(make_pipeline(seed=1), tmp_path / "run", max_steps=5, resume="auto", **options).train()
    with pytest.raises(ConfigError, match=rf"(grpo|tuning)\.\w+ is .*, but checkpoint '{checkpoint}' was"):
        make_trainer(make_pipeline(), tmp_path / "run", max_steps=5, resume="auto")


def test_only_what_is_not_frozen_moves(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    pipe = make_pipeline()
    before = state_of(pipe)
    trainer = make_trainer(pipe, tmp_path / "run", freeze=("blocks.0", "*.bias", "pos_*"))
    assert len(trainer.learner.optimizer.param_groups[0]["params"]) == len(trainable(pipe))
    trainer.train()
    names = dict(pipe.transformer.named_parameters())
    still = {name for name in names if torch.equal(before[name], pipe.transformer.state_dict()[name])}
    assert still == {
        name for name in names if name.startswith(("blocks.0.", "pos_")) or name.endswith(".bias")
    }


def test_no_gradient_changes_with_accumulation_or_checkpointing(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    lora = {**LORA, "lora_target_modules": "*"}
    whole = gradient(make_trainer(make_pipeline(), tmp_path / "whole", **lora))
    assert whole and all(".lora_" in name for name in whole)
    for name, options in {
        "parts": {"per_device_train_batch_size": 5},
        "recomputed": {"gradient_checkpointing": True},
    }.items():
        other = gradient(make_trainer(make_pipeline(), tmp_path / name, **lora, **options))
        for key, expected in whole.items():
            scale = expected.abs().max().clamp_min(1e-8)
            assert (other[key] - expected).abs().max() / scale < 1e-4, (name, key)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True, "use_rslora": True},
        {"freeze": "lora_A"},
        {"lora_target_modules": "*"},
    ],
)
def test_an_adapter_works_with_every_other_option(
    make_pipeline: MakePipeline, tmp_path: Path, options: dict
) -> None:
    """Sampled and re-scored under one policy, from the reference on, in bf16 and with all that adapts."""
    named: dict[str, Any] = {"red": redness, "bright": brightness}
    rewards = RewardSet(named, constraints={"bright": AtLeast(0.6)})
    others = {"entropy_floor": 0.9, "constraint_start": 1.0, "num_iterations": 2, "ema_decay": 0.5}
    others |= {"gradient_checkpointing": True, "per_device_train_batch_size": 6, "max_steps": 2}
    for precision in ("no", "bf16"):
        pipe, folder = make_pipeline(), tmp_path / precision
        run = {"mixed_precision": precision, "eval_steps": 1, "eval_num_images": 8}
        make_trainer(pipe, folder, rewards, **LORA | others | options | run).train()
        assert all(each.isfinite().all() for each in pipe.transformer.parameters())
    once = make_trainer(make_pipeline(), tmp_path / "once", **LORA | options, max_steps=2)
    once.train()
    first, second = metrics_of(tmp_path / "once")
    assert abs(first["kl"]) < 1e-6 < second["kl"]
    for each in (first, second):
        assert each["sampling/sampling_logp_difference/max"] < 1e-4


def test_no_second_copy_of_the_model_is_kept_with_an_adapter(
    tiny_pipeline: VARPipeline, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_pipeline, tmp_path / "run", **LORA)
    assert (
        trainer.learner.objective.reference
        and trainer.learner.objective.reference.model is tiny_pipeline.transformer
    )


def test_an_average_is_what_its_formula_says() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    average = Average([weight], 0.75)
    expected = weight.detach().clone()
    for step in range(3):
        with torch.no_grad():
            weight += step + 1
        average.update()
        expected = 0.75 * expected + 0.25 * weight.detach()
    torch.testing.assert_close(average.values[0], expected)
    held = weight.detach().clone()
    with average.in_place():
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight.detach(), held)


@pytest.mark.parametrize("lora", [{}, LORA])
def test_the_average_stands_in_where_it_was_asked_for(
    make_pipeline: MakePipeline, tmp_path: Path, lora: dict
) -> None:
    """With a decay next to 1 it is the model before training; the weights are trained alike in any case."""
    states, measured = {}, {}
    for use in (None, "both", "evaluation", "export"):
        average = {} if use is None else {"ema_decay": 1 - 1e-7, "ema_use": use}
        pipe, folder = make_pipeline(), tmp_path / str(use)
        options = {"eval_steps": 2, "eval_num_images": 16, "learning_rate": 1e-2} | lora | average
        make_trainer(pipe, folder, **options).train()
        states[use], measured[use] = state_of(pipe), metrics_of(folder)[-1]["eval_reward"]
        assert torch.equal(log_probs(pipe), log_probs(VARPipeline.from_pretrained(folder / "final")))
    before = make_pipeline().transformer.state_dict()
    assert equal(states["evaluation"], states[None]) and equal(states["both"], states["export"])
    for name, each in states["both"].items():
        torch.testing.assert_close(each, before[name], rtol=0, atol=1e-5)
    assert measured["both"] == measured["evaluation"] != measured["export"] == measured[None]


def test_an_update_that_is_skipped_does_not_move_the_average(
    tiny_pipeline: VARPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_pipeline, tmp_path / "run", ema_decay=0.5)
    assert trainer.learner.average
    before = [each.clone() for each in trainer.learner.average.values]
    with monkeypatch.context() as patched:
        patched.setattr(trainer.accelerator, "clip_grad_norm_", lambda *words: torch.tensor(float("nan")))
        assert trainer.step(1)["skipped_updates"] == 1
    assert all(map(torch.equal, trainer.learner.average.values, before))
    assert trainer.step(2)["skipped_updates"] == 0
    assert not all(map(torch.equal, trainer.learner.average.values, before))
