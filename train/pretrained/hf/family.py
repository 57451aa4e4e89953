"""Table that maps one Hugging Face model family to ours: config keys, weight names, requirements.

Export and import are both derived from the same table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.config import schema
from train.errors import UserError
from train.pretrained.hf.listing import StoredTensor, same_values

ArchKeys = dict[str, Any]
"""Keys of ``schema.Model`` that determine the function a trained model computes, with every default resolved."""
Shape = tuple[int, ...]

WITH_LM_HEAD = ("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForPreTraining", "ForConditionalGeneration")
"""Ends of the names of classes that predict tokens."""
OLD_NORM_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Names in files that were converted from TensorFlow -> today's."""

MAX_SHOWN = 200
"""Characters of a value of a config.json that a message repeats."""
TRAINING_KEYS = {"dropout", "init_std", "checkpoint_activations"}
"""Keys of ``schema.Model`` that matter in training only: they are not part of ``ArchKeys``."""


def arch_keys(model: schema.Model, rows: int) -> ArchKeys:
    """Architecture keys of our model; ``rows`` is the number of rows of its embedding."""
    return _fill_defaults(model.model_dump(exclude=TRAINING_KEYS) | {"vocab_size": rows})


def _fill_defaults(arch: ArchKeys) -> ArchKeys:
    """Replace each None by the value that the models derive for it."""
    heads, width = arch.get("heads", 1), arch["width"]
    derived = {"kv_heads": heads, "head_dim": width // heads, "mlp_width": 4 * width}
    return {key: derived.get(key) if value is None else value for key, value in arch.items()}


@dataclass(frozen=True)
class ModuleMapping:
    """The Hugging Face modules that one of our modules is stored in; several are concatenated along the rows.

    ``shares`` names the architecture keys that the parts' row counts are proportional to; empty: equal parts.
    ``transposed``: weights are stored as (inputs, outputs), as in GPT-2's ``Conv1D``.
    """

    hf_modules: tuple[str, ...]
    shares: tuple[str, ...] = ()
    transposed: bool = False


def map_to(*modules: str, shares: tuple[str, ...] = (), transposed: bool = False) -> ModuleMapping:
    """Short form of ``ModuleMapping`` for the tables; ``#`` in a name stands for the block number."""
    return ModuleMapping(modules, shares, transposed)


@dataclass(frozen=True)
class TensorSlice:
    """Rows [start, start + count) of our parameter ``name``, and the Hugging Face tensor that holds them."""

    name: str
    start: int
    count: int
    hf_name: str
    hf_shape: Shape
    transposed: bool


@dataclass(frozen=True)
class HFFamily:
    """Everything that import and export need to know about one family of transformers models."""

    name: str
    model_type: str
    hf_classes: dict[str, tuple[str, str]]
    """Parameter of ours -> (transformers class, our objective) of the models that have it; "" is for all others."""
    required: ArchKeys
    """Values that a model of ours must have to belong to this family."""
    required_equal: dict[str, str]
    """Keys whose values must equal those of other keys."""
    config_keys: dict[str, tuple[str, ...]]
    """Our key -> its names in config.json; several names must all have one value."""
    defaults: ArchKeys
    """Values of our keys where config.json leaves them out."""
    allowed: dict[str, tuple[Any, ...]]
    """Our keys that are limited to some values."""
    fixed_config: dict[str, tuple[Any, ...]]
    """Other keys of config.json and the values accepted where they are present; the first is written on export."""
    dropout_keys: tuple[str, ...]
    modules: dict[str, ModuleMapping]
    base_prefix: str
    """Prefix of tensor names that older files leave out."""
    ignored_tensors: tuple[str, ...]
    """Patterns of tensors that hold no parameter, such as stored attention masks."""
    normalize_config: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """Brings any published form of config.json to the keys and values named above."""
    head_matrix: str = "lm_head.weight"
    """Tensor of the language model's head, which is the embedding's own where they are tied."""
    stand_ins: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Tensor -> the names under which it is looked for instead, the first that is there counts."""
    tied_scales: bool = False
    """Whether tie_word_embeddings scales the output too, so that weights alone do not tell what the model computes."""
    finalize_config: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """Brings those keys and values to the form of config.json that is written."""

    def hf_class(self, names: Iterable[str]) -> str:
        """Name of the transformers class for a model with parameters ``names``."""
        return next(hf_class for mark, (hf_class, _) in self.hf_classes.items() if mark in {"", *names})

    def objective(self, config: dict[str, Any]) -> str:
        """Our objective for the class that a config.json names; for other classes the family's default."""
        named = config.get("architectures") or ()
        objectives = [objective for hf_class, objective in self.hf_classes.values() if hf_class in named]
        return objectives[0] if objectives else self.hf_classes[""][1]

    def unmet_requirements(self, objective: str, arch: ArchKeys) -> list[str]:
        """Requirements that a model of ours does not meet, as "key=required (not actual)"; empty if it belongs here."""
        known = sorted({known_objective for _, known_objective in self.hf_classes.values()})
        unmet = [] if objective in known else [f"objective={' or '.join(known)} (not {objective})"]
        required = {key: (value,) for key, value in self.required.items()} | self.allowed
        required |= {key: (arch.get(other),) for key, other in self.required_equal.items()}
        for key, values in required.items():
            if arch.get(key) not in values:
                unmet.append(f"model.{key}={' or '.join(map(yaml_text, values))} (not {yaml_text(arch.get(key))})")
        return unmet

    def to_hf_config(self, arch: ArchKeys, dropout: float, extra: dict[str, Any]) -> dict[str, Any]:
        """Content of config.json for a model of ours; ``extra`` keys are added as they are."""
        config: dict[str, Any] = {"model_type": self.model_type, "dtype": "float32"}
        for key, names in self.config_keys.items():
            config |= dict.fromkeys(names, arch[key])
        config |= {name: values[0] for name, values in self.fixed_config.items() if values[0] is not None}
        config |= dict.fromkeys(self.dropout_keys, dropout)
        return self.finalize_config(config | extra)

    def from_hf_config(self, config: dict[str, Any]) -> tuple[ArchKeys, list[str]]:
        """Architecture keys that a config.json describes, and the settings in it that none of our models supports."""
        config, arch, unsupported = self.normalize_config(config), dict(self.required), []
        for key, names in self.config_keys.items():
            stored = [config.get(name) for name in names]
            values = [self.defaults.get(key) if value is None else value for value in stored]
            if any(value != values[0] for value in values):
                listed = ", ".join(f"{n}={yaml_text(v)}" for n, v in zip(names, values, strict=True))
                unsupported.append(f"{listed}, which must be equal")
            if values[0] is None and key not in ("kv_heads", "mlp_width"):
                unsupported.append(f"{names[0]}, which is missing")
            if key in self.allowed and values[0] not in self.allowed[key]:
                unsupported.append(f"{names[0]}={yaml_text(values[0])}")
            arch[key] = values[0]
        for name, accepted in self.fixed_config.items():
            if config.get(name, accepted[0]) not in accepted:
                allowed = " or ".join(map(yaml_text, accepted))
                unsupported.append(f"{name}={yaml_text(config[name])}, which must be {allowed}")
        if not unsupported:
            arch |= {key: arch[other] for key, other in self.required_equal.items()}
            arch = _fill_defaults(arch)
        return arch, unsupported

    def stored_name(self, hf_name: str, stored: Container[str], tied: bool) -> str | None:
        """The name of a tensor among those ``stored``, of older files too; None where it is missing."""
        embedding = f"{self.modules['backbone.embed'].hf_modules[0]}.weight"
        known = self.stand_ins.get(hf_name, (hf_name,))
        if tied and hf_name == embedding:
            known = (*known, self.head_matrix)
        for name in known:
            spellings = [name, name.removeprefix(self.base_prefix)]
            for old, new in OLD_NORM_NAMES.items():
                spellings += [s.replace(new, old) for s in spellings[:2] if new in s]
            for spelling in spellings:
                if spelling in stored:
                    return spelling
        return None

    def is_tied(self, tied: bool, config: dict[str, Any], folder: Path, stored: Mapping[str, StoredTensor]) -> bool:
        """Whether head and embedding are one matrix: what the weights say is believed before ``tied`` of config.json.

        As transformers 5 does: a head that differs from the embedding is one of its own. A class with such a head whose
        files hold none can only have meant the embedding.
        """
        embedding = self.stored_name(f"{self.modules['backbone.embed'].hf_modules[0]}.weight", stored, tied=False)
        head = self.stored_name(self.head_matrix, stored, tied=False)
        if head is None:
            causal = [name for name, _ in self.hf_classes.values() if name.endswith(WITH_LM_HEAD)]
            named = config.get("architectures") or ()
            return tied or any(name in named for name in causal)
        return tied and (embedding is None or same_values(folder, stored[embedding], stored[head]))

    def is_backbone_tensor(self, hf_name: str) -> bool:
        """Whether a tensor lies where our table has a module of the backbone, the pooler left out."""
        roots = set()
        for module, mapping in self.modules.items():
            if module.startswith("backbone."):
                roots |= {name.removeprefix(self.base_prefix).split(".")[0] for name in mapping.hf_modules}
        return hf_name.removeprefix(self.base_prefix).split(".")[0] in roots - {"pooler"}

    def hf_names(self, name: str) -> tuple[ModuleMapping, list[str]]:
        """Mapping of our parameter ``name``, and the tensors it is stored in. Raises KeyError if it is not mapped."""
        number = re.search(r"\.(\d+)\.", name)
        pattern = re.sub(r"\.\d+\.", ".#.", name, count=1)
        module, _, leaf = pattern.rpartition(".")
        is_parameter = pattern in self.modules  # a bare parameter of ours that is a table entry of its own
        mapping = self.modules[pattern if is_parameter else module]
        hf_names = [hf_module if is_parameter else f"{hf_module}.{leaf}" for hf_module in mapping.hf_modules]
        return mapping, [hf_name.replace("#", number[1] if number else "#") for hf_name in hf_names]

    def slices(self, shapes: Iterable[tuple[str, Shape]], arch: ArchKeys) -> Iterator[TensorSlice]:
        """Row slices of our parameters (name, shape), in our order. Raises UserError that lists unmapped ones."""
        slices, unmapped = [], []
        for name, shape in shapes:
            try:
                mapping, hf_names = self.hf_names(name)
            except KeyError:
                unmapped.append(name)
                continue
            shares = [arch[share] for share in mapping.shares] or [1] * len(hf_names)
            transposed, start = mapping.transposed and len(shape) == 2, 0
            for hf_name, share in zip(hf_names, shares, strict=True):
                count = shape[0] * share // sum(shares)
                part = (count, *shape[1:])
                slices.append(TensorSlice(name, start, count, hf_name, part[::-1] if transposed else part, transposed))
                start += count
        if unmapped:
            raise UserError(f"{self.name} of transformers has no place for {', '.join(unmapped)}")
        yield from slices


def yaml_text(value: Any) -> str:
    """A scalar as it is written in YAML: true, false, null or its text."""
    text = str(value)
    return text.lower() if value is None or isinstance(value, bool) else text[:MAX_SHOWN]
