"""Configurations: command line -> dataclass -> JSON -> dataclass."""

import json
from dataclasses import dataclass
from typing import Any

import pytest

from nanochat.cli import parse
from nanochat.config import BaseConfig, Duration, MidConfig, SftConfig, from_dict, to_dict
from nanochat.errors import UserError
from nanochat.gpt import GPTConfig

CLASSES: list[type[Any]] = [BaseConfig, MidConfig, SftConfig]


@pytest.mark.parametrize("cls", CLASSES)
def test_defaults_parse_and_survive_json(cls: type[Any]) -> None:
    config = parse(cls, [])
    assert config == cls()
    assert from_dict(cls, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("cls", CLASSES)
def test_flags_have_no_prefix_and_survive_json(cls: type[Any]) -> None:
    argv = ["--tag", "x", "--seed", "5", "--dtype", "bfloat16", "--resume"]
    argv += ["--device-batch-size", "4", "--total-batch-size", "1024", "--num-steps", "7"]
    argv += ["--matrix-lr", "0.5", "--adam-betas", "0.7", "0.9", "--weight-decay", "0.3"]
    argv += ["--eval-every", "3", "--save-every", "2", "--max-hours", "1.5"]
    config = parse(cls, argv)
    assert (config.run.tag, config.run.seed, config.run.resume) == ("x", 5, True)
    assert config.batching.device_batch_size == 4
    assert config.batching.total_batch_size == 1024
    assert config.duration.num_steps == 7
    assert config.learning.adam_betas == (0.7, 0.9)
    assert config.learning.weight_decay == 0.3
    assert config.saving.max_hours == 1.5
    assert from_dict(cls, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    "argv",
    [
        "--mix a:1 b:2",
        "--mix a:1 --mix b:2",
        "--mix=a:1 --depth 3 --mix b:2",
        "--mix a:1 --mix=b:2",
    ],
)
def test_a_list_may_be_given_in_one_flag_or_in_several(argv: str) -> None:
    assert parse(BaseConfig, [*argv.split(), "--portable"]).mix == ("a:1", "b:2")


def test_lists_and_switches() -> None:
    base = parse(BaseConfig, ["--mix", "a:0.9", "b:0.1", "--portable", "--kv-heads", "2"])
    assert (base.mix, base.portable, base.kv_heads) == (("a:0.9", "b:0.1"), True, 2)
    mid = parse(MidConfig, ["--mix", "gsm8k:2", "--replay", "0", "--device-batch-size", "auto"])
    assert (mid.mix, mid.replay, mid.batching.device_batch_size) == (("gsm8k:2",), 0.0, "auto")


@pytest.mark.parametrize(
    "argv", [["--no-such-flag", "1"], ["--depth", "two"], ["--dtype", "int8"], ["--depth"]]
)
def test_a_wrong_flag_ends_the_program(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(BaseConfig, argv)
    assert stop.value.code == 2
    assert argv[0] in capsys.readouterr().err


@pytest.mark.parametrize("cls", CLASSES)
def test_help_lists_the_flags_of_every_group(
    cls: type[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(cls, ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--tag", "--device-batch-size", "--num-steps", "--matrix-lr", "--save-every"):
        assert flag in text


def test_stages_differ_where_they_should() -> None:
    assert (MidConfig().prompt_weight, SftConfig().prompt_weight) == (1.0, 0.0)
    assert (MidConfig().source, SftConfig().source) == ("base", "mid")
    assert SftConfig().learning.warmdown == 1.0


@dataclass(frozen=True)
class Old:
    a: int = 1
    sizes: tuple[int, ...] = ()
    maybe: tuple[float, float] | None = None


@dataclass(frozen=True)
class Nested:
    old: Old = Old()
    name: str = ""


def test_from_dict_takes_defaults_and_refuses_the_unknown() -> None:
    """An older checkpoint lacks a field; one of a newer version must not lose a setting."""
    assert from_dict(Old, {}) == Old()
    assert from_dict(Old, {"sizes": [1, 2], "maybe": [0.5, 1]}) == Old(1, (1, 2), (0.5, 1))
    assert from_dict(Nested, {"old": {"a": 3}}) == Nested(Old(3))
    with pytest.raises(UserError, match=r"meta.json: unknown setting zoom for Old"):
        from_dict(Old, {"zoom": 1}, "meta.json")
    with pytest.raises(UserError, match=r"x\.old: unknown setting b"):
        from_dict(Nested, {"old": {"b": 3}}, "x")


def test_a_list_saved_as_its_only_value_is_read() -> None:
    assert from_dict(MidConfig, {"corpus": "bbe"}).corpus == ("bbe",)


def test_model_configuration_survives_json() -> None:
    config = GPTConfig(vocab_size=9, n_layer=2, windows=(4, 0), trained_context_length=8)
    again = from_dict(GPTConfig, json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert isinstance(again.windows, tuple)


def test_epochs_give_way_to_whatever_else_is_set() -> None:
    """Epochs are the default of some stages: a flag must not be ignored because of a default."""
    assert MidConfig().duration.counts_epochs
    assert parse(MidConfig, ["--epochs", "3"]).duration.counts_epochs
    for flag in ("--num-steps", "--target-tokens", "--target-flops", "--target-param-data-ratio"):
        assert not parse(MidConfig, [flag, "5"]).duration.counts_epochs
    assert not Duration().counts_epochs
