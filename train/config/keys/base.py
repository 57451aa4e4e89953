"""Base classes of configuration sections and model families, and their shared types."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Above0 = Annotated[float, Field(gt=0)]
InitStd = Annotated[
    Above0 | None,
    Field(
        description="deviation that weights start with: 0.02, of encdec null; null: 1 / sqrt(what each sums), as T5's"
    ),
]


def _stay_below(name: str) -> str:
    """``name`` itself; an error where it would lead out of the folder that it names a folder of."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or not name.isprintable():
        text = "a folder is made by this name: not empty, without '..', '/' at its start and control characters"
        raise PydanticCustomError("folder_name", text)
    return name


FolderName = Annotated[str, AfterValidator(_stay_below)]
"""A name that a folder is made by, below one that the program chooses."""

ENCODER_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
ENCDEC_TOKENS = ("<pad>", *(f"<extra_id_{n}>" for n in range(100)))


def _not_blank(value: object) -> object:
    """``value`` itself; an error where it is a text of nothing, as a shell makes of a variable that is not set."""
    if isinstance(value, str) and not value.strip():
        text = "it is empty (a variable that is not set?): say what it is, or leave it out"
        raise PydanticCustomError("blank", text)
    return value


NotBlank = Annotated[str, AfterValidator(_not_blank)]
"""A text with something in it, where a list has several."""


class Section(BaseModel):
    """A group of keys: unknown keys are refused, types are not coerced, values are immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False)

    _texts_are_not_blank = field_validator("*")(_not_blank)


class Family(Section):
    """Keys that every model family has.

    A subclass adds those of one family; its backbone is the class of the same name in ``train/models/<family>.py``.
    """

    objectives: ClassVar[tuple[str, ...]]
    """Names of the objectives that can train it."""
    special: ClassVar[tuple[str, ...]] = ()
    """Tokens that it needs beside the text's; those that the tokenizer lacks are added after its vocabulary."""

    mean_pooling: ClassVar[bool] = True
    """Whether a row can be pooled by the mean of its hidden states."""

    layers: Positive
    width: Positive = Field(description="features of the residual stream, or of a recurrent layer")
    vocab_size: Positive | None = Field(None, description="default: the tokenizer's, rounded up to a multiple of 64")
    tied: bool = Field(description="the head shares the token embedding")
    dropout: Fraction = 0.0
    init_std: InitStd = 0.02

    def deviation(self, inputs: int) -> float:
        """Initial standard deviation of the weights of a layer that sums ``inputs`` features."""
        return inputs**-0.5 if self.init_std is None else self.init_std

    @property
    def carries_state(self) -> bool:
        """Whether a row starts from the final hidden state of the previous row of its stream."""
        return False

    def problems(self, seq_len: int) -> list[str]:
        """Problems of these values with each other and with rows of ``seq_len`` tokens, each with its cure."""
        return []


class Transformer(Family):
    """Keys that all Transformer families have."""

    heads: Positive
    mlp_width: Positive | None = Field(None, description="features inside the MLP; default: 4 * width")
    norm_eps: Above0 = 1e-5
    checkpoint_activations: bool | Literal["attention", "mlp"] = Field(
        False, description="recompute each block, or that part of it, in the backward pass to save memory"
    )
    checkpoint_blocks: Positive | list[NonNegative] | None = Field(
        None, description="of these blocks alone: 2 for every second one, from the first; or a list; default: all"
    )

    def recomputed(self, block: int) -> str | None:
        """Part of a block, by its number from 0, that is recomputed: "block", "attention", "mlp", or None."""
        among = self.checkpoint_blocks
        chosen = block in among if isinstance(among, list) else block % (among or 1) == 0
        if not (chosen and self.checkpoint_activations):
            return None
        return "block" if self.checkpoint_activations is True else self.checkpoint_activations

    @property
    def recomputed_share(self) -> float:
        """Share of the blocks of which anything is recomputed."""
        return sum(self.recomputed(block) is not None for block in range(self.layers)) / self.layers

    def problems(self, seq_len: int) -> list[str]:
        """See ``Family.problems``: the blocks that are recomputed."""
        among = self.checkpoint_blocks
        if among is not None and not self.checkpoint_activations:
            return [
                "model.checkpoint_blocks says where model.checkpoint_activations recomputes, and that is false: "
                "set it to true, attention or mlp, or leave the blocks out"
            ]
        beyond = [block for block in among if block >= self.layers] if isinstance(among, list) else []
        if not beyond:
            return []
        return [
            f"model.checkpoint_blocks has block {beyond[0]}, and model.layers={self.layers} makes blocks 0 to "
            f"{self.layers - 1}: name some of those"
        ]


def length_problem(seq_len: int, max_len: int) -> list[str]:
    """The problem of rows longer than the model's positions, as a list of at most one."""
    if seq_len <= max_len:
        return []
    return [f"batch.seq_len={seq_len} is longer than model.max_len={max_len}: lower the one or raise the other"]


def heads_problem(width: int, heads: int) -> list[str]:
    """The problem of a width that is not divisible by the number of heads, as a list of at most one."""
    return [f"model.heads={heads} does not divide model.width={width}"] if width % heads else []
