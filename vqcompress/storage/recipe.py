"""Recipes: YAML rules, first match wins, from the names of modules to a method, its options and a transform."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from vqcompress import methods
from vqcompress.errors import UsageError, did_you_mean, explain_value, nearest
from vqcompress.methods import Method
from vqcompress.methods.smoothing import Smoothing
from vqcompress.storage.recipe_files import packaged, recipe_file
from vqcompress.storage.targets import Block, kind

KEEP = methods.make("keep", {})


class Tuning(BaseModel):
    """The options of distillation, which trains scales, codebooks and norms after the codes are fixed.

    distill_epochs: passes over the calibration rows. distill_rate: the first step of Adam, as a share of a tensor's
    root mean square.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    distill_epochs: int = Field(4, ge=1, le=1000)
    distill_rate: float = Field(2e-3, gt=0, le=1)


class ExpertCalibration(BaseModel):
    """What the statistics of a mixture's experts are made of, see `gather`.

    calibrate: the tokens `routed` to an expert; those, `weighted` by the square of their routing weight; or `all`
    tokens through all experts. min_tokens: an expert that saw fewer takes the statistics of all experts of its layer
    together; as many as its last layer has inputs unless given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    calibrate: Literal["routed", "weighted", "all"] = "routed"
    min_tokens: int | None = Field(None, ge=1)


class KVCacheConfig(BaseModel):
    """How keys and values are kept while a model runs, see `kv_cache.cache`.

    bits: per channel. codebook: `learned` ones of each layer, head and group of channels, which `quantize` calibrates
    and the artifact holds, or `fp8` (E4M3), which needs no data. weights: of errors in learning, by the squared
    `gradient` of the calibration rows, which takes the whole model in memory with its activations, or `uniform`.
    rounds: of k-means. keys: stored before their rotary embedding where that can be proven (`auto`), or `after` it.
    window, sinks: how many of the newest and of the first tokens stay in full precision.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    bits: Literal[1, 2, 4, 8] = 4
    codebook: Literal["learned", "fp8"] = "learned"
    weights: Literal["gradient", "uniform"] = "gradient"
    rounds: int = Field(12, ge=1, le=1000)
    keys: Literal["auto", "after"] = "auto"
    window: int = Field(32, ge=0, le=1 << 20)
    sinks: int = Field(4, ge=0, le=1 << 20)

    @model_validator(mode="after")
    def _fit_together(self) -> KVCacheConfig:
        """8 bits are E4M3 and the other way round."""
        if (self.bits == 8) != (self.codebook == "fp8"):
            raise ValueError("fp8 has 8 bits, learned codebooks 1, 2 or 4")
        return self


@dataclass(frozen=True)
class Rule:
    """match: a shell pattern over module names, or `re:` and a regular expression that the whole name must match."""

    match: str
    method: Method
    smoothing: Smoothing | None = None

    def __post_init__(self) -> None:
        if self.smoothing and self.method.dense:
            raise ValueError(f"{self.method.name} leaves a weight as it is, so there is nothing to smooth for")
        self.matches("")

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that method and smoothing ask for."""
        # The sample also measures the error that the report shows.
        return self.method.needs | (self.smoothing.needs | {"sample"} if self.smoothing else frozenset())

    @property
    def is_pattern(self) -> bool:
        """Whether the rule may match other names than its own."""
        return self.match.startswith("re:") or any(c in self.match for c in "*?[")

    def matches(self, name: str) -> bool:
        """Whether the rule matches a module; ValueError for what is no regular expression."""
        if not self.match.startswith("re:"):
            return fnmatch.fnmatchcase(name, self.match)
        try:
            return re.fullmatch(self.match[3:], name) is not None
        except re.error as error:
            raise ValueError(f"'{self.match}' is no regular expression: {error}") from error


def _with_method(rule: Any) -> Any:
    """A rule of a recipe file with its Method in the place of that method's name and options."""
    if not isinstance(rule, dict) or "method" not in rule:
        return rule
    own = {"match": "*"} | {key: rule[key] for key in ("match", "smoothing") if key in rule}
    options = {key: value for key, value in rule.items() if key not in ("match", "smoothing", "method")}
    return own | {"method": methods.make(str(rule["method"]), options)}


Rules = tuple[Annotated[Rule, BeforeValidator(_with_method)], ...]


@dataclass(frozen=True)
class Recipe:
    """A recipe file, parsed; see docs/recipes.md. name: as the user gave it.

    rules: in order; a target that none matches is kept as it is. candidates: instead of rules, those for all targets
    that `allocate` chooses from. rotation: `fold` rotates the whole model first, see `rotation.RotatedCheckpoint`.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    name: str
    description: str = ""
    rules: Rules = ()
    rotation: Literal["fold"] | None = None
    candidates: Rules = ()
    tuning: Tuning | None = None
    experts: ExpertCalibration | None = None
    cache: KVCacheConfig | None = None

    def assign(self, blocks: list[Block]) -> dict[str, Rule]:
        """Target name → first rule that matches; UsageError for a rule that decides about none of the targets."""
        names = [target.name for block in blocks for target in block.targets]
        # A written-down choice has a rule for every weight by its name: those are looked up, not tried one by one.
        by_name = {rule.match: [n] for n, rule in reversed(list(enumerate(self.rules)))}
        patterns = [n for n, rule in enumerate(self.rules) if rule.is_pattern]
        decides: dict[str, int] = {}
        for name in names:
            found = by_name.get(name, []) + [n for n in patterns if self.rules[n].matches(name)]
            if found:
                decides[name] = min(found)
        if idle := set(range(len(self.rules))) - set(decides.values()):
            match = self.rules[min(idle)].match
            near = nearest(match, sorted({kind(name) for name in names}), 0)
            raise UsageError(
                f"recipe {self.name}: the rule '{match}' matches no linear layer of the model's blocks, or none that"
                f" earlier rules leave; the nearest name is {near}"
            )
        return {name: self.rules[decides[name]] if name in decides else Rule("*", KEEP) for name in names}

    def fingerprint(self) -> str:
        """SHA-256 of the parsed recipe, so that comments and spacing do not count."""
        rules: list[Any] = [
            [rule.match, rule.method.describe(), rule.smoothing.model_dump(mode="json") if rule.smoothing else None]
            for rule in self.rules + self.candidates
        ]
        return hashlib.sha256(json.dumps([rules, self.model_options()], sort_keys=True).encode()).hexdigest()

    def model_options(self) -> dict[str, Any]:
        """JSON of the options that apply to the whole model, by their key in a recipe file; unset ones are left out."""
        groups = {"tuning": self.tuning, "experts": self.experts, "cache": self.cache}
        options = {key: group.model_dump(mode="json") for key, group in groups.items() if group}
        return ({"rotation": self.rotation} if self.rotation else {}) | options


# The keys of a recipe file, and the groups of options below some of them.
KEYS = {field.name for field in fields(Recipe)} - {"name"}
GROUPS: dict[str, type[BaseModel]] = {
    "tuning": Tuning,
    "experts": ExpertCalibration,
    "cache": KVCacheConfig,
    "smoothing": Smoothing,
}


def load(name: str) -> Recipe:
    """The packaged recipe of that name, or the recipe in that file."""
    path = recipe_file(name, packaged())
    try:
        return parse(path.read_text(encoding="utf-8"), name)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {name} cannot be read: {error}") from error


def cache_config(name: str) -> KVCacheConfig:
    """The `cache` of a recipe; UsageError if it has none."""
    recipe = load(name)
    if recipe.cache is None:
        raise UsageError(f"--kv-cache {name}: that recipe has no 'cache'; kv-vq-4bit has one")
    return recipe.cache


def parse(text: str, name: str) -> Recipe:
    """The recipe in a YAML text; UsageError naming the key and its value."""
    try:
        data = yaml.safe_load(text)
        recipe: Recipe = TypeAdapter(Recipe).validate_python({**data, "name": name})
    except ValidationError as error:
        first = error.errors()[0]
        # pydantic also names the member of a union, such as constrained-float; no key has a hyphen.
        key, value = ".".join(str(part) for part in first["loc"] if "-" not in str(part)), first["input"]
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            group = GROUPS.get(str(first["loc"][-2])) if len(first["loc"]) > 1 else None
            hint = did_you_mean(str(first["loc"][-1]), group.model_fields if group else KEYS)
            raise UsageError(f"recipe {name} has no key '{key}'.{hint}") from error
        given = f"recipe {name}: {key}" + ("" if isinstance(value, dict) else f"={value!r}")
        raise UsageError(explain_value(given, first["msg"])) from error
    except (yaml.YAMLError, TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML lets pass what Python raises for a date or a number that is none.
        raise UsageError(f"recipe {name} is not a mapping in valid YAML: {' '.join(str(error).split())}") from error
    only_cache = recipe.cache and data.keys() <= {"description", "cache"}
    if bool(recipe.rules) == bool(recipe.candidates) and not only_cache:
        raise UsageError(f"recipe {name} needs either 'rules' or 'candidates'")
    if any(candidate.smoothing or candidate.match != "*" for candidate in recipe.candidates):
        raise UsageError(f"recipe {name}: a candidate has neither 'match' nor 'smoothing'")
    if recipe.tuning and not any(rule.method.tunable for rule in recipe.rules + recipe.candidates):
        raise UsageError(f"recipe {name}: 'tuning' has nothing to tune; it needs a rule of the vq method")
    return recipe


def dump(recipe: Recipe) -> str:
    """The text that `parse` reads as the same rules, a line for each; of options, what the rules were given."""
    rules = []
    for rule in recipe.rules:
        options = rule.method.model_dump(mode="json", exclude_unset=True)
        rules.append({"match": rule.match, "method": rule.method.name, **options})
        if rule.smoothing:
            rules[-1]["smoothing"] = rule.smoothing.model_dump(mode="json")
    data = {"description": recipe.description, **recipe.model_options(), "rules": rules}
    return yaml.safe_dump(data, default_flow_style=None, sort_keys=False, allow_unicode=True, width=1000)


def setting(method: Method) -> str:
    """A method and the options that it was given, for people: vq d=4 bits=8."""
    options = method.model_dump(mode="json", exclude_unset=True)
    return " ".join([method.name, *(f"{option}={value}" for option, value in options.items())])
