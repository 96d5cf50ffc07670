"""Types of values that the configuration's records take: bounds, spellings and choices."""

# Choices that follow from the tables of verl.algos, where pyright wants them written out.
# pyright: reportInvalidTypeForm=false
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, NonNegativeFloat

from verl.config.choices import read_names

_DTYPE_SPELLINGS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", None: "fp32"}
_DTYPE_SPELLINGS |= {16: "fp16", "16": "fp16", 32: "fp32", "32": "fp32"}


def _spell_dtype(value: Any) -> Any:
    return _DTYPE_SPELLINGS.get(value, value) if isinstance(value, str | int | None) else value


def _spell_dtype_if_any(value: Any) -> Any:
    return None if value is None else _spell_dtype(value)


Count = Annotated[int, Field(ge=1)]
FrameCount = Annotated[int, Field(ge=2)]
CountOrNoLimit = Count | Literal[-1]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]
if TYPE_CHECKING:  # verl.trainer.plan puts numbers in the place of "auto" before anything computes with them
    AutoCount, AutoSize, AutoShare = int, float, float
else:
    AutoCount = Count | Literal["auto"]
    AutoSize = NonNegativeFloat | Literal["auto"]
    AutoShare = PositiveShare | Literal["auto"]
TrainDtype = Annotated[Literal["bf16", "fp32"], BeforeValidator(_spell_dtype)]
ReferenceDtype = Annotated[Literal["bf16", "fp32"] | None, BeforeValidator(_spell_dtype_if_any)]
RolloutDtype = Annotated[Literal["bf16", "fp16", "fp32"], BeforeValidator(_spell_dtype)]
Logger = Literal["console", "file", "tensorboard", "wandb", "mlflow", "swanlab"]
Estimator = Literal[*read_names("advantages", "GROUP_ESTIMATORS"), *read_names("advantages", "OTHER_ESTIMATORS")]
LossType = Literal[*read_names("losses", "POLICY_LOSSES")]
KLPenalty = Literal[*read_names("divergences", "KL_ESTIMATORS"), "full"]
LossAverage = Literal["token", "seq", "fixed_length"]

AUTO: Any = "auto"
"""Value of keys that follow from the GPU, the model and the data: verl.trainer.plan chooses them at the start."""
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
