"""Recipes decide by their first matching rule; what is wrong in one is named by its key and value."""

from __future__ import annotations

import pytest

from vqcompress.errors import UsageError, VQCompressError
from vqcompress.storage import recipe as recipes
from vqcompress.storage.recipe import dump, parse
from vqcompress.storage.recipe_files import packaged
from vqcompress.storage.targets import Block, Target

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.10.mlp.down_proj",
]
BLOCKS = [Block(f"model.layers.{i}", tuple(Target(n, (8, 8), False) for n in NAMES if f".{i}." in n)) for i in (0, 10)]


def rules(*lines: str) -> str:
    return "rules:\n" + "".join(f"  - {line}\n" for line in lines)


@pytest.mark.parametrize("name", packaged())
def test_every_packaged_recipe_is_valid_and_can_be_written_down(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.name == name
    assert recipe.description
    recipe.assign(BLOCKS if recipe.rules else [])
    if recipe.rules:
        assert parse(dump(recipe), name) == recipe


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "recipe test"),
        ("- 3", "recipe test"),
        ("rules: [", "recipe test"),
        ("rules: 2001-99-99", "recipe test"),
        ("rules: !!python/object/apply:os.system ['true']", "recipe test"),
        ("description: nothing", "'rules'"),
        ("rules: []", "'rules'"),
        (rules("{method: int8}") + "candidates: [{method: int8}]", "'candidates'"),
        ("candidates: [{method: int8, smoothing: {}}]", "'smoothing'"),
        ("cache: {bits: 4}\nrotation: fold", "'rules'"),
        ("ruls: []", "ruls"),
        (rules("3"), r"rules\.0=3"),
        (rules("{match: '*'}"), r"rules\.0\.method"),
        (rules("{match: 3, method: int8}"), r"rules\.0\.match=3"),
        (rules("{method: int8}", "{method: in8}"), r"rules\.1.*'in8'.*'int8'"),
        (rules("{method: int8, activation: per_token}"), "'activation'.*'activations'"),
        (rules("{method: vq, bits: 17}"), "bits=17"),
        (rules("{match: 're:(', method: int8}"), r"'re:\('"),
        (rules("{method: int8, smoothing: 0.5}"), r"rules\.0\.smoothing=0\.5"),
        (rules("{method: int8, smoothing: {alfa: 0.5}}"), r"rules\.0\.smoothing\.alfa"),
        (rules("{method: int8, smoothing: {alpha: 2}}"), r"rules\.0\.smoothing\.alpha=2"),
        (rules("{method: keep, smoothing: {}}"), "keep"),
    ],
)
def test_wrong_recipes_are_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        parse(text, "test")


@pytest.mark.parametrize(
    ("name", "error", "named"),
    [("vq-2bits", UsageError, "'vq-2bit'"), ("some/where.yaml", VQCompressError, "some/where.yaml")],
)
def test_a_recipe_that_is_not_there_is_named(name: str, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        recipes.load(name)


def test_the_first_rule_that_matches_decides_and_unmatched_layers_are_kept() -> None:
    text = rules("{match: '*.down_proj', method: fp8}", "{match: '*.mlp.*', method: int8}")
    decided = parse(text, "test").assign(BLOCKS)
    assert {name: rule.method.name for name, rule in decided.items()} == dict(
        zip(NAMES, ["keep", "int8", "fp8", "fp8"], strict=True)
    )


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("re:.*down_proj", [2, 3]),
        # The whole name must match.
        ("re:down_proj", []),
        (r"re:.*\.layers\.(1[0-9])\..*", [3]),
        ("*.layers.0.*", [0, 1, 2]),
        ("*.MLP.*", []),
        ("*.[uv]p_proj", [1]),
        (NAMES[2], [2]),
    ],
)
def test_patterns_match_whole_names(pattern: str, matched: list[int]) -> None:
    rule = parse(rules(f"{{match: '{pattern}', method: int8}}"), "test").rules[0]
    assert [i for i, name in enumerate(NAMES) if rule.matches(name)] == matched


def test_a_rule_that_decides_nothing_is_named_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"'\*\.up'.*model\.layers\.\*\.mlp\.up_proj"):
        parse(rules("{match: '*.up', method: int8}"), "test").assign(BLOCKS)
    with pytest.raises(UsageError, match=r"'\*\.mlp\.up_proj'"):
        parse(rules("{method: int8}", "{match: '*.mlp.up_proj', method: fp8}"), "test").assign(BLOCKS)


def test_a_fingerprint_is_of_the_meaning_not_of_the_text() -> None:
    first = parse(rules("{match: '*', method: int8}"), "a")
    same = parse("description: other text\n" + rules("{method: int8, activations: per_token, match: '*'}"), "b")
    other = parse(rules("{match: '*', method: int8, activations: per_tensor}"), "a")
    assert first.fingerprint() == same.fingerprint() != other.fingerprint()
