"""Recipes say what they mean or are refused with the nearest word that would have been understood."""

from __future__ import annotations

import pytest

from vqcompress.errors import UsageError
from vqcompress.storage import recipe as recipes
from vqcompress.storage.recipe import parse
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


def methods_by_name(text: str) -> dict[str, str]:
    return {name: rule.method.name for name, rule in parse(text, "test").assign(BLOCKS).items()}


@pytest.mark.parametrize("name", ["smoothquant-int8", "fp8-tile", "vq-2bit", "vq-2bit-aqlm", "vq-3bit", "vq-4bit"])
def test_every_packaged_recipe_is_valid_and_says_what_it_does(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.name == name
    assert recipe.description
    recipe.assign(BLOCKS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "recipe test"),
        ("- 3", "recipe test"),
        ("rules: [", "recipe test"),
        ("description: nothing", "'rules'"),
        ("rules: []", "'rules'"),
        ("rules: {match: '*'}", "'rules'"),
        ("ruls: []\nrules: []", "unknown key 'ruls'.*Did you mean 'rules'"),
        (rules("3"), "rule 1.*'match' and 'method'"),
        (rules("{match: '*'}"), "rule 1.*'match' and 'method'"),
        (rules("{method: int8}"), "rule 1.*'match' and 'method'"),
        (rules("{match: 3, method: int8}"), "rule 1.*'match' and 'method'"),
        (rules("{match: '*', metod: vq}"), "is 'metod' meant to be 'method'"),
        (rules("{match: '*', method: int8}", "{match: '*', method: in8}"), "rule 2.*'in8'.*Did you mean 'int8'"),
        (rules("{match: '*', method: int8, activation: per_token}"), "'activation'.*Did you mean 'activations'"),
        (rules("{match: '*', method: vq, bits: 17}"), "bits=17"),
        (rules("{match: '*', method: vq, bits: four}"), "bits='four'"),
        (rules("{match: '*', method: vq, d: 0}"), "d=0"),
        (rules("{match: '*', method: vq, scope: world}"), "scope='world'"),
        (rules("{match: 're:(', method: int8}"), r"'re:\('"),
        (rules("{match: '*', method: int8, smoothing: 0.5}"), "smoothing.*mapping"),
        (rules("{match: '*', method: int8, smoothing: {alfa: 0.5}}"), "'alfa'.*Did you mean 'alpha'"),
        (
            rules("{match: '*', method: int8, smoothing: {alpha: 2}}"),
            "rule 1: smoothing alpha=2: alpha 2.* is not between 0",
        ),
        (rules("{match: '*', method: int8, smoothing: {alpha: some}}"), "smoothing: alpha='some' is not valid"),
        (rules("{match: '*', method: int8, smoothing: {norm: folded}}"), "norm"),
        (rules("{match: '*', method: int8, smoothing: {grid: []}}"), "grid"),
        (
            rules("{match: '*', method: vq, codebook: trellis, bits: 7}"),
            "rule 1.*bits=7",
        ),
        (rules("{match: '*', method: int8, 3: 4}"), "3"),
        (rules("{match: '*', method: int8, [a]: 4}"), "YAML"),
    ],
)
def test_what_a_recipe_gets_wrong_is_named(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse(text, "test")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vq-2bits", "Did you mean 'vq-2bit'"),
        ("smoothquant", "Did you mean 'smoothquant-int8'"),
        ("nowhere.yaml", "no such recipe file"),
        ("some/where", "no such recipe file"),
        (
            str(packaged()["vq-2bit"].with_name("vq-2bt.yaml")),
            r"no such recipe file: .*; did you mean .*/configs/vq-2bit.yaml\?",
        ),
    ],
)
def test_a_recipe_that_is_not_there_is_named(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        recipes.load(name)


def test_the_first_rule_that_matches_decides() -> None:
    text = rules("{match: '*.down_proj', method: fp8}", "{match: '*.mlp.*', method: int8}", "{match: '*', method: vq}")
    assert list(methods_by_name(text).values()) == ["vq", "int8", "fp8", "fp8"]


def test_what_no_rule_matches_is_kept() -> None:
    assert list(methods_by_name(rules("{match: '*.up_proj', method: int8}")).values()) == [
        "keep",
        "int8",
        "keep",
        "keep",
    ]


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("re:.*down_proj", [2, 3]),
        # The whole name must match.
        ("re:down_proj", []),
        (r"re:model\.layers\.0\..*", [0, 1, 2]),
        (r"re:.*\.layers\.(1[0-9])\..*", [3]),
        ("model.layers.1*", [3]),
        ("*.layers.0.*", [0, 1, 2]),
        ("*.MLP.*", []),
        ("*.[uv]p_proj", [1]),
    ],
)
def test_patterns_match_whole_names(pattern: str, matched: list[int]) -> None:
    rule = parse(rules(f"{{match: '{pattern}', method: int8}}"), "test").rules[0]
    assert [i for i, name in enumerate(NAMES) if rule.matches(name)] == matched


def test_a_rule_that_matches_nothing_is_refused_and_shows_a_name() -> None:
    with pytest.raises(UsageError, match=r"'\*\.up'.*the nearest of their names is model\.layers\.\*\.mlp\.up_proj"):
        parse(rules("{match: '*.up', method: int8}"), "test").assign(BLOCKS)


def test_a_fingerprint_is_of_the_meaning_not_of_the_words() -> None:
    first = parse(rules("{match: '*', method: int8}"), "a")
    same = parse("description: other words\n" + rules("{method: int8, activations: per_token, match: '*'}"), "b")
    other = parse(rules("{match: '*', method: int8, activations: per_tensor}"), "a")
    assert first.fingerprint() == same.fingerprint() != other.fingerprint()


def test_a_rule_that_takes_forever_is_named() -> None:
    rule = parse(rules(r"{match: 're:(.*?\.?)+\d\d\d', method: int8}"), "test").rules[0]
    with pytest.raises(UsageError, match="takes more than"):
        rule.matches("model.layers.10.self_attn.q_proj" * 2)


@pytest.mark.parametrize(
    "text",
    [
        "l0: &l0 [x, x]\ndescription: [*l0, *l0]",
        "[" * 1000,
        "rules: " + "9" * 5000,
        "rules: 2001-99-99",
        "rules: !!int ''",
        "rules: !!bool maybe",
    ],
    ids=lambda text: text[:20],
)
def test_yaml_that_would_grow_or_break_is_named(text: str) -> None:
    with pytest.raises(UsageError, match="YAML"):
        parse(text, "test")


def test_yaml_cannot_make_objects() -> None:
    with pytest.raises(UsageError, match="YAML"):
        parse("rules: !!python/object/apply:os.system ['true']", "test")
