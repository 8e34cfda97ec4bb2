"""Recipes: YAML rules, first match wins, from the names of modules to a method, its options and a transform."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import regex
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vqcompress import methods
from vqcompress.errors import UsageError, did_you_mean, nearest
from vqcompress.methods import Method
from vqcompress.methods.smoothing import Smoothing
from vqcompress.storage.recipe_files import packaged, recipe_file
from vqcompress.storage.targets import Block, kind

# A choice written down for 70,000 weights is a third of this.
MAX_BYTES = 16 * 2**20
# Of matching one name: a regular expression may take longer than anybody lives.
MATCH_SECONDS = 1.0
KEEP = methods.make("keep", {})
NAMES = {"match", "method"}


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

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that method and smoothing ask for."""
        # The sample also measures the error that the report shows.
        return self.method.needs | (self.smoothing.needs | {"sample"} if self.smoothing else frozenset())

    @property
    def is_pattern(self) -> bool:
        """Whether the rule may speak of other names than its own."""
        return self.match.startswith("re:") or any(c in self.match for c in "*?[")

    def matches(self, name: str) -> bool:
        """Whether the rule speaks of the module."""
        if self.match.startswith("re:"):
            try:
                return regex.fullmatch(self.match[3:], name, timeout=MATCH_SECONDS) is not None
            except (TimeoutError, MemoryError) as error:
                hint = f"takes more than {MATCH_SECONDS:.0f} s, or too much memory, to match {name}; say it more simply"
                raise UsageError(f"the rule '{self.match}' {hint}") from error
        return fnmatch.fnmatchcase(name, self.match)


@dataclass(frozen=True)
class Recipe:
    """name: what the user called it. rules: in order; a target that none matches is kept as it is.

    rotation: `fold` rotates the whole model first, see `rotation.RotatedCheckpoint`.
    tuning: of scales, codebooks and norms, once the codes are fixed.
    candidates: instead of rules, those for all targets that `allocate` chooses from.
    experts: how those of a mixture are calibrated, if not by default. cache: how keys and values are kept, if coded.
    """

    name: str
    description: str
    rules: tuple[Rule, ...]
    rotation: str | None = None
    candidates: tuple[Rule, ...] = ()
    tuning: Tuning | None = None
    experts: ExpertCalibration | None = None
    cache: KVCacheConfig | None = None

    def assign(self, blocks: list[Block]) -> dict[str, Rule]:
        """Target name → first rule that matches; UsageError for a rule that decides about none of the targets."""
        names = [target.name for block in blocks for target in block.targets]
        # A written-down choice has a rule for every weight by its name: those are looked up, not tried one by one.
        places: dict[str, list[int]] = {}
        for n, rule in enumerate(self.rules):
            if not rule.is_pattern:
                places.setdefault(rule.match, []).append(n)
        patterns = [n for n, rule in enumerate(self.rules) if rule.is_pattern]
        matching = {
            name: sorted(places.get(name, []) + [n for n in patterns if self.rules[n].matches(name)]) for name in names
        }
        unused = set(range(len(self.rules))) - {n for found in matching.values() for n in found}
        if unused:
            match = self.rules[min(unused)].match
            kinds = {kind(name) for name in names}
            near = nearest(re.sub(r"^re:|[*?\\]", "", match), sorted(kinds), 0) or "(there are none)"
            raise UsageError(
                f"recipe {self.name}: the rule '{match}' matches no linear layer of the model's blocks;"
                f" the nearest of their names is {near}"
            )
        decides = {found[0] for found in matching.values() if found}
        for n in sorted(set(range(len(self.rules))) - decides):
            other = next(self.rules[found[0]].match for found in matching.values() if n in found)
            raise UsageError(
                f"recipe {self.name}: the rule '{self.rules[n].match}' decides nothing, since earlier ones match all"
                f" that it does, '{other}' for one; the first rule that matches wins, so put it before them"
            )
        return {name: self.rules[found[0]] if found else Rule("*", KEEP) for name, found in matching.items()}

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


def load(name: str) -> Recipe:
    """The packaged recipe of that name, or the recipe in that file."""
    path = recipe_file(name, packaged())
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"recipe {name} is larger than {MAX_BYTES} bytes, too large for a recipe")
        return parse(path.read_text(encoding="utf-8"), name)
    except UnicodeDecodeError as error:
        raise UsageError(f"recipe {name} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise UsageError(f"recipe {name} cannot be read: {error.strerror}") from error


def cache_config(name: str) -> KVCacheConfig:
    """The `cache` of a recipe; UsageError if it has none."""
    recipe = load(name)
    if recipe.cache is None:
        raise UsageError(f"--kv-cache {name}: that recipe says nothing of a cache; kv-vq-4bit does, for one")
    return recipe.cache


class _Loader(yaml.SafeLoader):
    """YAML without aliases: ten lines of them can stand for a billion items."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As PyYAML's."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases have no place in a recipe", mark)
        return super().compose_node(parent, index)


def parse(text: str, name: str) -> Recipe:
    """The recipe in a YAML text; UsageError naming the key, its value and the nearest known one."""
    try:
        data = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        # PyYAML lets pass what Python says of a date or a number that is none.
        raise UsageError(f"recipe {name} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UsageError(f"recipe {name} must be a mapping with a list 'rules'")
    _only(data, {"description", "rules", "candidates", "rotation", "tuning", "experts", "cache"}, f"recipe {name}")
    rotation = data.get("rotation")
    if rotation not in (None, "fold"):
        hint = "rotation at run time is an option of a vq rule"
        raise UsageError(f"recipe {name}: 'rotation' is 'fold' or left out, not {rotation!r}; {hint}")
    tuning = _options(Tuning, data.get("tuning"), f"recipe {name}", "tuning")
    experts = _options(ExpertCalibration, data.get("experts"), f"recipe {name}", "experts")
    cache = _options(KVCacheConfig, data.get("cache"), f"recipe {name}", "cache")
    if cache and not {"rules", "candidates", "rotation", "tuning", "experts"} & data.keys():
        return Recipe(name, str(data.get("description", "")), (), cache=cache)
    if {"rules", "candidates"} <= data.keys():
        raise UsageError(f"recipe {name} has both 'rules' and 'candidates'; it can have one of them")
    kind = "candidates" if "candidates" in data else "rules"
    listed, description = data.get(kind), str(data.get("description", ""))
    if not isinstance(listed, list) or not listed:
        raise UsageError(f"recipe {name} needs a list '{kind}' with at least one {kind[:-1]}")
    if kind == "rules":
        rules = tuple(_rule(r, i, name) for i, r in enumerate(listed, 1))
        return _tunable(Recipe(name, description, rules, rotation, (), tuning, experts, cache))
    if not all(isinstance(c, dict) and not {"match", "smoothing"} & c.keys() for c in listed):
        raise UsageError(
            f"recipe {name}: a candidate is a mapping with 'method', then the method's options, nothing else"
        )
    candidates = tuple(_rule({"match": "*", **c}, i, name) for i, c in enumerate(listed, 1))
    return _tunable(Recipe(name, description, (), rotation, candidates, tuning, experts, cache))


def _tunable(recipe: Recipe) -> Recipe:
    if recipe.tuning and not any(rule.method.tunable for rule in recipe.rules + recipe.candidates):
        raise UsageError(f"recipe {recipe.name}: 'tuning' has nothing to tune; it needs a rule of the vq method")
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


def _only(data: dict[str, Any], known: set[str], where: str) -> None:
    for key in data:
        if key not in known:
            raise UsageError(f"{where}: unknown key '{key}'.{did_you_mean(str(key), known)}")


def _rule(data: object, number: int, recipe: str) -> Rule:
    where = f"recipe {recipe}, rule {number}"
    if not isinstance(data, dict) or not isinstance(data.get("match"), str) or not isinstance(data.get("method"), str):
        keys = set(map(str, data)) if isinstance(data, dict) else set()
        near = {name: nearest(name, keys - NAMES) for name in NAMES - keys}
        hint = "".join(f"; is '{key}' meant to be '{name}'?" for name, key in near.items() if key)
        raise UsageError(f"{where}: a rule is a mapping with 'match' and 'method', then the method's options{hint}")
    if data["match"].startswith("re:"):
        try:
            regex.compile(data["match"][3:])
        except regex.error as error:
            raise UsageError(f"{where}: '{data['match']}' is no regular expression: {error}") from error
    options = {key: value for key, value in data.items() if key not in ("match", "method", "smoothing")}
    try:
        method = methods.make(data["method"], options)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error
    smoothing = _options(Smoothing, data.get("smoothing"), where, "smoothing")
    if smoothing and method.dense:
        raise UsageError(f"{where}: {method.name} leaves a weight as it is, so there is nothing to smooth for")
    return Rule(data["match"], method, smoothing)


Options = TypeVar("Options", bound=BaseModel)


def _options(kind: type[Options], data: object, where: str, key: str) -> Options | None:
    """A group of options under a key; None if it is left out or false."""
    if data is None or data is False:
        return None
    if not isinstance(data, dict):
        example = ", ".join(f"{name}: {field.default}" for name, field in list(kind.model_fields.items())[:1])
        raise UsageError(f"{where}: '{key}' is a mapping such as {{{example}}}, not {data!r}")
    _only(data, set(kind.model_fields), f"{where}, {key}")
    try:
        return kind(**data)
    except ValidationError as error:
        raise UsageError(f"{where}: {methods.explain(key, data, error)}") from error
