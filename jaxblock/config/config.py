"""Defines ``Config``, which holds the sections that the packages define."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from jaxblock.data.config import DataConfig
from jaxblock.diffusion.config import CanvasConfig, MethodConfig
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.evaluation.config import EvaluateConfig
from jaxblock.models.config import LoraConfig, ModelConfig
from jaxblock.settings import Section
from jaxblock.training.config import TrainConfig
from jaxblock.training.optim.config import OptimizerConfig


@dataclass(frozen=True)
class Config:
    """Holds all sections of a YAML file."""

    data: DataConfig = field(default_factory=DataConfig)
    canvas: CanvasConfig = field(default_factory=CanvasConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def sections(self) -> list[Section]:
        """Returns every section, in the order of the fields."""
        return [getattr(self, entry.name) for entry in dataclasses.fields(self)]
